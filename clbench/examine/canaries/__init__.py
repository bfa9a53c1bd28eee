"""Canaries: proof, before a run may be ranked, that the examination of its tasks is able to fail.

Per task, on its first test examples: what cannot know the answer does not find it (`chance`, a model with random weights; `copier`,
readers that only copy out of the prompt; `swap`, another row's answer put into the row; `shuffled`, wrong answers), what is right counts
as right (`reference`), and a score does not depend on how it was computed (`bos`, `prompt`, `invariance`). Each is described where it is
defined: `clbench.canaries.answers` and `clbench.canaries.tokens`.

Not here: duplicates and overlaps between texts (`clbench.contract`), and what becomes of a run whose canary failed (the leaderboard).
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers
from torch.nn import Module

import clbench
from clbench.data.encoder import Encoder, tokenizer_fingerprint
from clbench.data.sampling import seeded
from clbench.examine.canaries.answers import Verdict, chance, copier, near_zero, reference, shuffled, swap, wrong_scores
from clbench.examine.canaries.tokens import NEW_TOKENS, Watched, invariance, one_bos, same_prompt
from clbench.models.tiny import fresh_llama
from clbench.protocols import Stage, Stream

# A wide initialisation, so that the random model answers different prompts differently.
ARCHITECTURE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


@dataclass(frozen=True, kw_only=True)
class Canary:
    """One check of one task: whether it passed, and the numbers that it saw."""

    name: str
    task: str
    passed: bool
    detail: str


def checked(stream: Stream, encoder: Encoder, *, cache_dir: Path, stream_hash: str) -> tuple[Canary, ...]:
    """`check_stream`, kept under `cache_dir` for as long as stream, tokenizer, length, code and libraries stay the same.

    `stream_hash` stands for the stream's rows and the settings of its tasks. The result is written to a name of its own and renamed:
    processes may race.
    """
    content = [stream_hash, tokenizer_fingerprint(encoder.tokenizer), encoder.max_length, code_hash(stream)]
    content += [torch.__version__, transformers.__version__]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    path = cache_dir / "canaries" / f"{key}.json"
    if path.is_file():
        kept = [Canary(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
        return tuple(canary for stage in stream.stages for canary in kept if canary.task == stage.name)
    found = check_stream(stream, encoder)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    unfinished.write_text(json.dumps([asdict(canary) for canary in found], indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
    return found


def code_hash(stream: Stream, package: Path = Path(clbench.__file__).parent) -> str:
    """SHA-256, in hexadecimal, of every source file of `package` and of those that define the stream's tasks."""
    classes = {cls.__module__ for stage in stream.stages for cls in type(stage.task).__mro__}
    files = {Path(sys.modules[name].__file__) for name in classes if "__file__" in vars(sys.modules[name])}
    files = {file for file in files if package not in file.parents}  # builtins have no file
    contents = sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in {*files, *package.rglob("*.py")})
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def check_stream(stream: Stream, encoder: Encoder, *, seed: int = 0, rows: int = 32) -> tuple[Canary, ...]:
    """Every canary of every task, on its first `rows` test examples; the random model's weights depend on `seed` alone.

    All of it runs on the CPU, with the tokens of `encoder`, and so does not depend on the device of the run.
    """
    encoder = copy.copy(encoder)  # its tokens are shared
    encoder.device = torch.device("cpu")
    with seeded(seed, "canary"):  # what an accelerator draws next is left alone, too
        size = {"max_position_embeddings": encoder.max_length + NEW_TOKENS}
        model = fresh_llama(encoder.tokenizer, architecture=ARCHITECTURE | size, seed=seed).eval()
    return tuple(
        Canary(name=name, task=stage.name, passed=passed, detail=detail)
        for stage in stream.stages
        for name, (passed, detail) in check_task(
            replace(stage, train=stage.train[:rows], test=stage.test[:rows]), model=model, encoder=encoder
        ).items()
    )


def check_task(stage: Stage, *, model: Module, encoder: Encoder) -> dict[str, Verdict]:
    """The verdict of every canary on `stage`'s test examples; `swap` is absent where the task has no rows."""
    student = Watched(model, encoder)
    closed = bool(stage.test[0].choices)
    wrong = wrong_scores(stage)
    # `prompt` looks at what the student was asked for `chance`.
    verdicts = {
        "chance": chance(stage, student) if closed else near_zero(stage, student, wrong),
        "copier": copier(stage),
        "reference": reference(stage),
        "shuffled": shuffled(wrong, closed=closed),
        "bos": one_bos(stage, encoder),
        "prompt": same_prompt(stage, student),
        "invariance": invariance(stage, model, encoder),
    }
    pairs = stage.task.answer_swaps("test", len(stage.test))
    return verdicts | ({"swap": swap(pairs)} if pairs else {})
