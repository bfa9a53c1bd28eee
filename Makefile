# `make help` lists the targets. Each one sets up what it needs.
comma := ,
empty :=
space := $(empty) $(empty)
VENV ?= .venv
PY := $(VENV)/bin/python
EXTRAS ?= dev
RESULTS ?= results
METHODS ?= base,seq,er,ewc,ilora,clora,curlora,secura
FIELD ?= $(subst $(space),$(comma),$(sort $(basename $(notdir $(wildcard conf/method/*.yaml)))))
SEEDS ?= 0
# Six orders are six blocks, with which differences can be claimed; short streams and stages, as it is to be over in minutes.
ORDERS ?= default,latin:1,latin:2,latin:3,reversed,random:2
SHORT ?= stream.limit=4 train.steps=30
# An order and a seed each. No two share either, as what an order does to a method is shared by all its seeds; none is the search's (reversed).
BLOCKS ?= default,0 random:3,1 latin:5,2 latin:10,3 random:1,4 random:2,5
JOBS ?= 2
LAUNCH := hydra/launcher=joblib hydra.launcher.n_jobs=$(JOBS)

.PHONY: help setup run tune reference test test-ranks test-slow test-faults test-learnability test-gpu bench report leaderboard check format clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/.done ## make .venv with everything installed (nothing to do when it is up to date)

# torch comes as the CPU build where a local one is on pip's find-links, as the ordinary build elsewhere.
$(VENV)/.done: pyproject.toml constraints.txt
	test -x $(PY) || python3 -m venv $(VENV)
	@if command -v uv >/dev/null 2>&1; then \
	  uv pip install --python $(PY) $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS)) -c constraints.txt -e '.[$(EXTRAS)]'; \
	else $(PY) -m pip install -q -c constraints.txt -e '.[$(EXTRAS)]'; fi
	touch $@

run: setup ## a first leaderboard: every core method over four tasks of the embedded stream in six orders
	$(PY) -m clbench -m method=$(METHODS) order=$(ORDERS) seed=$(SEEDS) $(SHORT) results_dir=$(RESULTS) $(LAUNCH)
	$(PY) -m clbench.report $(RESULTS)

# Beside the runs of `make reference`, whose report draws the search's learning-rate curves.
tune: setup ## the search that chose learning rates and strengths, on another world and other seeds
	for search in $(basename $(notdir $(wildcard conf/experiment/tune/*.yaml))); do \
	  case $$search in common|rates|optuna) continue;; esac; \
	  $(PY) -m clbench +experiment=tune/$$search model.world_seed=100 results_dir=$(RESULTS)/reference/tuning tracking.progress=false $(LAUNCH) || exit 1; \
	done
	$(PY) -m clbench.leaderboard $(RESULTS)/reference/tuning --pack

reference: setup ## the whole field, bounds and baselines included, six blocks
	for block in $(BLOCKS); do \
	  $(PY) -m clbench -m method=$(FIELD) order=$${block%,*} seed=$${block#*,} results_dir=$(RESULTS)/reference tracking.progress=false $(LAUNCH) || exit 1; \
	done
	$(PY) -m clbench.leaderboard $(RESULTS)/reference --pack

test: setup ## the tests that a change must pass, JOBS at a time
	$(PY) -m pytest -n $(JOBS) --dist worksteal -m "not slow and not gpu and not learnability"

test-ranks: setup ## equal numbers from one and two processes, mostly on ZeRO 2 and 3; test-slow has every method on every stage
	$(PY) -m pytest -m "slow and not gpu" tests/test_deepspeed.py "tests/test_sharded_base.py::test_a_run_in_slices_has_the_weights_and_scores_of_one_process[seq]"

test-slow: setup ## all tests that take minutes, those of test-ranks among them
	$(PY) -m pytest -m "slow and not gpu"

test-learnability: setup ## that every task of the embedded stream can be learned; its last run is in results/README.md
	$(PY) -m pytest -m learnability -rA

test-gpu: setup ## what needs a CUDA device; skipped, and says so, where there is none
	$(PY) -m pytest -m gpu -s -rs

test-faults: setup ## a seeded campaign: 200 kills, 60 damaged files, every mistake; its last run is in results/README.md
	$(PY) -m tests.faults $(FAULTS)

bench: setup ## timings against peers, equality first
	$(PY) -m tests.benchmarks $(BENCHMARKS)

report: setup ## results/report.html from the ledger
	$(PY) -m clbench.report $(RESULTS)

leaderboard: setup ## the CSVs from the ledger
	$(PY) -m clbench.leaderboard $(RESULTS)

check: setup ## format, lint and types, as CI does
	$(VENV)/bin/ruff format --check . && $(VENV)/bin/ruff check .
	$(VENV)/bin/basedpyright --pythonpath $(PY)

format: setup ## format and mend what can be mended
	$(VENV)/bin/ruff format . && $(VENV)/bin/ruff check --fix .

clean: ## remove runs and generated tables (not the environment, not the reference records)
	rm -rf $(RESULTS)/runs $(RESULTS)/*.csv.tmp $(RESULTS)/leaderboard.* $(RESULTS)/stages.csv $(RESULTS)/retention.csv $(RESULTS)/differences.csv $(RESULTS)/probes.csv $(RESULTS)/search.csv $(RESULTS)/report.html
