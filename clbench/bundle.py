"""An offline copy of what an experiment reads: `python -m clbench.bundle [overrides] out=DIR`; then run it with `data_dir=DIR`.

Per dataset `DIR/<name>/<split>.jsonl` with the rows that the experiment uses, beside it their index on the hub, so that samples and ids stay what
they were; and `DIR/tokens/`, the training examples as token ids. Run it where the hub can be reached, or on another `data_dir`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.utils import instantiate

from clbench.cli import USERS_MISTAKES, compose
from clbench.config import Config, writable
from clbench.data import Encoder, indexed_rows
from clbench.parts import make_probes, make_tasks
from clbench.protocols import Probe, Task
from clbench.stream import build_stream
from clbench.types import UserMistake

SPLITS = ("train", "test")
Rows = dict[tuple[str, str], dict[int, Mapping[str, Any]]]


def bundle(config: Config, out: Path) -> dict[str, int]:
    """Writes the copy; gives the rows of each file."""
    tasks = make_tasks(config)
    probes = make_probes(config)
    tokenizer = instantiate(config.model).load_tokenizer(Path(config.cache_dir))
    encoder = Encoder(tokenizer, max_length=config.train.max_length, token_dirs=[out / "tokens"])
    stream = build_stream(config.stream, order=config.order, tasks=tasks, encoder=encoder)
    counts = {}
    found = gathered([stage.task for stage in stream.stages], probes)
    for spec in (spec for probe in probes for spec in probe.datasets()):
        if not any(name == spec.name for name, _ in found):  # text is read whole, from its test split
            found[spec.name, "test"] = indexed_rows(spec, split="test", data_dir=config.data_dir)
    for (name, split), rows in sorted(found.items()):
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        indices = sorted(rows)
        lines = (json.dumps(rows[index], ensure_ascii=False, default=str) + "\n" for index in indices)
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        (folder / f"{split}.index.json").write_text(json.dumps(indices) + "\n")
        counts[f"{name}/{split}.jsonl"] = len(rows)
    return counts


def gathered(tasks: Sequence[Task], probes: Sequence[Probe]) -> Rows:
    """Every row that a task or probe uses, by the dataset's folder and split, and by its index; datasets used twice are merged."""
    found: Rows = {}
    for task in tasks:
        for split in SPLITS if task.dataset is not None else ():
            found.setdefault((task.dataset.name, split), {}).update(task.rows(split))
    for probe in probes:
        for place, rows in probe.rows().items():
            found.setdefault(place, {}).update(rows)
    return found


def main(arguments: Sequence[str]) -> int:
    """Writes the bundle that the command line asks for; 0, or 2 for a mistake of the user's."""
    outs = [argument.removeprefix("out=") for argument in arguments if argument.startswith("out=")]
    overrides = [argument for argument in arguments if not argument.startswith("out=")]
    try:
        if len(outs) != 1:
            raise UserMistake("usage: python -m clbench.bundle [+experiment=NAME] [key=value ...] out=DIR")
        writable("out", outs[0])
        counts = bundle(compose(overrides), Path(outs[0]))
    except USERS_MISTAKES as error:
        print(f"clbench: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for name, rows in counts.items():
        print(f"{rows:8} rows  {name}")
    print(f"now run it with data_dir={outs[0]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
