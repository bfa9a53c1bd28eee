"""What a run's manifest says: configuration, data, evaluation, versions, machine, commit. It is written once, when the run begins."""

import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

import torch

from clbench.config import Config, model_label, run_hash, run_name, variant
from clbench.config.secrets import masked
from clbench.protocols import Stream

VERSIONED = (
    *("clbench", "torch", "transformers", "tokenizers", "peft", "datasets", "lm_eval", "deepspeed", "numpy"),
    *("scikit-learn", "sacrebleu", "rouge_score", "rapidfuzz"),
)


FORMAT = 1
"""Goes up when a run's records can no longer be continued by a later version."""


def describe(config: Config, stream: Stream, *, command: str) -> dict[str, Any]:
    """What was run, with which versions, on which machine."""
    plain = masked(asdict(config))
    return {
        "format": FORMAT,
        "run": run_name(config),
        "experiment": config.experiment,
        "stream": stream.name,
        "order": stream.order,
        "model": model_label(plain),
        "method": config.method["name"],
        "seed": config.seed,
        "tasks": [stage.name for stage in stream.stages],
        "metrics": {stage.name: stage.task.metric for stage in stream.stages},
        "config": plain,
        "config_hash": run_hash(plain),
        "variant": variant(plain),
        "git": git_state(),
        "versions": versions() | versions_of(config.sources),
        "hardware": hardware(),
        "command": masked(command),
    }


def failed_canaries(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """Which of the canaries' results (the fields of examine.canaries.Canary) keep a run from being ranked, and why."""
    return [f"{one['name']} ({one['task']}: {one['detail']})" for one in results if not one["passed"]]


def versions() -> dict[str, str]:
    """Installed versions of what the numbers depend on."""
    return {"python": platform.python_version()} | dict(installed(VERSIONED))


def versions_of(modules: Iterable[str]) -> dict[str, str]:
    """Installed versions of the packages that modules of the user's are in."""
    tops, brought_by = {module.partition(".")[0] for module in modules}, packages_distributions()
    # What is installed from its folder may say nothing of what it brings.
    return dict(installed(name for top in tops for name in brought_by.get(top, [top])))


def installed(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Name and version of those distributions that are installed."""
    for name in names:
        with suppress(PackageNotFoundError):
            yield name, version(name)


def hardware() -> dict[str, str | int]:
    """Processor, threads, accelerator."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"machine": platform.machine(), "threads": torch.get_num_threads(), "accelerator": accelerator}


def git_state() -> dict[str, str | bool]:
    """Commit of the code, and whether tracked files differ from it; "unknown" outside a checkout."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return {"commit": "unknown", "dirty": False}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
    return {"commit": git("rev-parse", "HEAD") or "unknown", "dirty": dirty}
