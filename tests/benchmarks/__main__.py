"""`python -m tests.benchmarks [name ...]`: runs the benchmarks and prints each figure as it is there."""

from __future__ import annotations

import sys
from importlib import import_module

import torch

NAMES = ("scoring", "training", "generation", "stream", "limit", "startup")


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    for name in names or NAMES:
        for found in import_module(f"tests.benchmarks.{name}").run():
            print(
                f"{found.benchmark:10} {found.case:45} {found.peer:28} ours {found.ours:8.3f} theirs {found.theirs:8.3f} ratio {found.ratio:6.2f} {found.difference}",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
