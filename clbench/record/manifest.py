"""What a run's manifest says: the configuration, the data and what is wrong with it, the canaries, versions, machine, commit."""

from __future__ import annotations

import logging
import platform
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from clbench.config import Config, run_hash, run_name, variant
from clbench.data.encoder import Encoder
from clbench.data.rows import fingerprint
from clbench.examine.canaries import checked
from clbench.protocols import Probe, Stream
from clbench.record.overlaps import overlaps, stream_hash, trained_probes
from clbench.stream import fingerprints

log = logging.getLogger("clbench")
VERSIONED = (
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "datasets",
    "lm_eval",
    "deepspeed",
    "numpy",
    "sacrebleu",
    "rouge_score",
)


def manifest(config: Config, stream: Stream, *, model_label: str, fingerprint: str, command: str) -> dict[str, Any]:
    """What was run, on what, with which versions: written once, when the run begins."""
    return {
        "run": run_name(config),
        "experiment": config.experiment,
        "stream": stream.name,
        "order": stream.order,
        "model": model_label,
        "method": config.method["name"],
        "seed": config.seed,
        "tasks": [stage.name for stage in stream.stages],
        "metrics": {stage.name: stage.task.metric for stage in stream.stages},
        "config": asdict(config),
        "config_hash": run_hash(asdict(config)),
        "variant": variant(asdict(config)),
        "model_fingerprint": fingerprint,
        "git": git_state(),
        "versions": versions(),
        "hardware": hardware(),
        "command": command,
    }


def versions() -> Mapping[str, str]:
    """Installed versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def hardware() -> dict[str, str | int]:
    """Processor, threads, accelerator."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"machine": platform.machine(), "threads": torch.get_num_threads(), "accelerator": accelerator}


def git_state() -> dict[str, str | bool]:
    """Commit of the code, and whether tracked files differ from it; "unknown" outside a checkout."""
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return {"commit": "unknown", "dirty": False}

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=False
        ).stdout.strip()

    return {
        "commit": git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
    }


def data_contract(
    config: Config, stream: Stream, probes: Sequence[Probe], encoder: Encoder
) -> tuple[dict[str, Any], frozenset[str]]:
    """What the manifest says of the data and of the canaries, and the ids of training examples that are also in a test or probe."""
    trained = trained_probes(
        stream.stages, {probe.name: probe.datasets() for probe in probes}, allow=config.probe.allow_overlap
    )
    documents = {f"{probe.name} {task}": texts for probe in probes for task, texts in probe.documents().items()}
    once = {tuple(texts): name for name, texts in reversed(documents.items())}  # several probes may read one text
    found, overlapping = overlaps(stream.stages, {name: texts for texts, name in once.items()})
    data = fingerprints(stream)
    # The hash of the data stands for rows, prompts and metrics; the settings of a scorer count for the canaries, too.
    settings = stream_hash({**data, "settings": config.tasks})
    canaries = checked(stream, encoder, cache_dir=Path(config.cache_dir), stream_hash=settings)
    for overlap in found:
        log.warning(
            "%s: %d of %d of %s are also in %s", overlap.kind, overlap.count, overlap.of, overlap.where, overlap.also_in
        )
    failed = [f"{canary.name} ({canary.task}: {canary.detail})" for canary in canaries if not canary.passed]
    if failed:
        log.warning("the run will not be ranked, its evaluation failed its own tests: %s", "; ".join(failed))
    contract = {
        "data": data,
        "stream_hash": stream_hash(data),
        "probe_data": {
            task: {"documents": len(texts), "sha256": fingerprint(texts)} for task, texts in documents.items()
        },
        "overlaps": [asdict(overlap) for overlap in found],
        "trained_probes": trained,
        "canaries": {
            "checked": len(canaries),
            "failed": failed,
            "results": [asdict(canary) for canary in canaries],
        },
    }
    return contract, overlapping
