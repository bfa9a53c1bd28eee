VENV ?= .venv
PY := $(VENV)/bin/python
EXTRAS ?= dev,sweep

setup: $(VENV)/.done ## make .venv with everything installed (nothing to do when it is up to date)

$(VENV)/.done: pyproject.toml constraints.txt
	test -x $(PY) || python3 -m venv $(VENV)
	@if command -v uv >/dev/null 2>&1; then \
	  uv pip install --python $(PY) $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS)) -c constraints.txt -e '.[$(EXTRAS)]'; \
	else $(PY) -m pip install -q -c constraints.txt -e '.[$(EXTRAS)]'; fi
	touch $@
