"""What `python -m clbench --help` says: what clbench is, four commands, and what each group offers.

Hydra's own page takes two seconds and shows a configuration of a hundred lines; `--hydra-help` and `--cfg job` still show it.
"""

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import fill, shorten

from clbench.config.composition import CONF_DIR, file_of

DESCRIBED = ("method", "stream", "probe")
NAMED = ("experiment", "model", "settings", "texts", "train", "engine", "tracking", "task")
WIDTH = 80
TEXT = """\
clbench takes a causal language model through a stream of fine-tuning tasks with
one continual-learning method, and measures after every task what was learned,
what base knowledge was kept, how far perplexity drifted, and what it cost.

  python -m clbench                                    SEQ, the embedded stream
  python -m clbench method=ewc seed=1 train.lr=1e-3    any key can be overridden
  python -m clbench -m method=seq,er,ewc seed=0,1,2    a sweep
  python -m clbench model.name=FOLDER stream=seq16_local probe=mini_local \\
    data_dir=ROWS                                      a model of your own

All keys and their values: --cfg job. A folder of your own yamls: --config-dir
DIR. Hydra's flags: --hydra-help. Other commands, each with --help, where RUN is
RESULTS/runs/NAME:

  python -m clbench.doctor [key=value ...]           what a run would cost
  python -m clbench.contract method=NAME             what a method has to keep
  python -m clbench.leaderboard RESULTS              the tables again
  python -m clbench.report RESULTS                   one HTML page
  python -m clbench.verify RUN|RESULTS               whether records are whole
  python -m clbench.compare RUN RUN                  differences, with intervals
  python -m clbench.examine RUN probe=NAME           other probes, afterwards
  python -m clbench.export RUN out=DIR [stage=K]     for transformers and PEFT
"""


def page(arguments: Sequence[str]) -> str:
    """The whole text; `arguments` may name a folder of the user's (--config-dir), whose options are listed, too."""
    folders = [CONF_DIR, *_own(arguments)]
    parts = [TEXT]
    for group in DESCRIBED:
        rows = [f"  {name:<20}{_line(path, folders)}".rstrip() for name, path in _options(folders, group)]
        parts.append("\n".join([f"{group}:", *rows, ""]))
    for group in NAMED:
        names = ", ".join(name for name, _ in _options(folders, group))
        parts.append(fill(f"{group}: {names}", WIDTH, subsequent_indent="  ", break_on_hyphens=False) + "\n")
    return "\n".join(parts)


def _own(arguments: Sequence[str]) -> Iterator[Path]:
    for place, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        if flag in ("--config-dir", "-cd"):
            yield Path(value or " ".join(arguments[place + 1 : place + 2]))


def _options(folders: Sequence[Path], group: str) -> Iterator[tuple[str, Path]]:
    """Each option of a group with its yaml."""
    for folder in folders:
        for path in sorted((folder / group).rglob("*.yaml")):
            yield path.relative_to(folder / group).with_suffix("").as_posix(), path


def _line(path: Path, folders: Sequence[Path]) -> str:
    """The first sentence of what a yaml, or the module of the method that it names, says of itself."""
    text = path.read_text(encoding="utf-8")
    target = re.search(r"^  _target_: (.+)\.\w+$", text, re.MULTILINE) if path.parent.name == "method" else None
    if target is None:
        comments = re.findall(r"^# (?!@package)(.*)$", text.partition("\n\n")[0], re.MULTILINE)
        return _sentence(" ".join(comments))
    module = file_of(target[1], sorted({*(folder.parent for folder in folders), Path.cwd()}))
    return _sentence(ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or "") if module else ""


def _sentence(text: str) -> str:
    """The first sentence, without what stands in brackets, cut to what a line has room for.

    >>> _sentence("EWC: elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796). More.")
    'EWC: elastic weight consolidation'
    """
    first = re.split(r"(?<=[a-z)])(?<! al)\.(?:\s|$)", " ".join(text.split()), maxsplit=1)[0]
    return shorten(re.sub(r"\s*\([^)]*\)", "", first), WIDTH - 22, placeholder=" ...")
