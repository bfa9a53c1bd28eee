"""The data contract: what a stream is made of, as one hash, and which text occurs where it should not.

Duplicates and prompts shared by train and test are exact, after lower-casing and dropping what is no letter or digit. Between tasks and
probes, whose templates differ, a text overlaps when it shares 13 consecutive words with training text (the unit of arXiv 2005.14165,
appendix C); texts of fewer words overlap when they are equal. Word sequences that recur in more than one per cent of the rows of a pool,
and in at least three, are its template and do not count. What a method trains on besides, which may be beginnings, is compared in the same way,
but that one of fewer words overlaps with any text that begins so.

>>> normalised("What's  new, Ida?")
'what s new ida'
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

from clbench.data.rows import DatasetSpec, fingerprint
from clbench.protocols import Probe, Stage, Stream
from clbench.stream import fingerprints
from clbench.types import Example, Unusable, UserMistake

log = logging.getLogger("clbench")
SHINGLE_WORDS = 13
TEMPLATE_SHARE = 0.01
TEMPLATE_ROWS = 3
COLLECTIONS = {"glue", "super_glue", "ai2_arc", "natural-instructions", "bigbench", "trace-train-5000"}
"""Hub repositories that hold many datasets: there the configuration, or else our folder's name, names the dataset."""


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """`count` of the `of` texts of `where` are also in `also_in`."""

    kind: str
    where: str
    also_in: str
    count: int
    of: int


@dataclass(frozen=True, kw_only=True)
class DataCheck:
    """What was found in the data: `record` is what the manifest says of it, `overlapping` the ids of training examples in a test or probe, too."""

    record: dict[str, Any]
    found: tuple[Overlap, ...]
    overlapping: frozenset[str]
    unusable: tuple[Unusable, ...]

    def warn(self) -> None:
        for one in self.unusable:
            done = "were dropped" if one.dropped else "stay: too many for the rows to be at fault"
            log.warning("%d of %d %s rows of %s %s: %s", one.count, one.of, one.split, one.task, done, one.why)
        for one in self.found:
            log.warning("%s: %d of %d of %s are also in %s", one.kind, one.count, one.of, one.where, one.also_in)


def check_data(
    stream: Stream, probes: Sequence[Probe], *, allow_overlap: bool, general: Sequence[str] = ()
) -> DataCheck:
    """Fingerprints and overlaps of the stream's and the probes' data; raises UserMistake where a probe measures what is trained on.

    `general`: what the method trains on besides the stream.
    """
    trained = trained_probes(stream.stages, {probe.name: probe.datasets() for probe in probes}, allow=allow_overlap)
    documents = {f"{probe.name} {task}": texts for probe in probes for task, texts in probe.documents().items()}
    once = {tuple(texts): name for name, texts in reversed(documents.items())}  # several probes may read one text
    trained += measured_texts(general, documents, allow=allow_overlap)
    found, overlapping = overlaps(stream.stages, {name: texts for texts, name in once.items()})
    data = fingerprints(stream)
    record = {
        "data": data,
        "stream_hash": stream_hash(data),
        "probe_data": {
            name: {"documents": len(texts), "sha256": fingerprint(texts)} for name, texts in documents.items()
        },
        "unusable": [asdict(one) for one in stream.unusable],
        "overlaps": [asdict(overlap) for overlap in found],
        "trained_probes": trained,
    }
    return DataCheck(record=record, found=found, overlapping=overlapping, unusable=stream.unusable)


def stream_hash(fingerprints: Mapping[str, Mapping[str, Any]]) -> str:
    """12 hexadecimal digits that stand for the rows, prompts and metrics of a stream, whatever the order of its tasks."""
    return sha256(json.dumps(fingerprints, sort_keys=True).encode()).hexdigest()[:12]


def dataset_name(spec: DatasetSpec) -> str:
    """The dataset behind a hub address, without its owner: `google/boolq` and `aps/super_glue : boolq` are both "boolq"."""
    repository = spec.hub.rsplit("/", 1)[-1]
    name = (spec.config or spec.name) if repository.lower() in COLLECTIONS else repository
    return re.sub(r"[^a-z0-9]", "", name.lower())


def trained_probes(stages: Sequence[Stage], probes: Mapping[str, Sequence[DatasetSpec]], *, allow: bool) -> list[str]:
    """The probes that measure a dataset which the stream trains on, as "probe: task"; raises UserMistake unless `allow`."""
    trained = {dataset_name(stage.task.dataset): stage.name for stage in stages if stage.task.dataset is not None}
    found = sorted(
        {
            f"{probe} {spec.hub}: {trained[dataset_name(spec)]}"
            for probe, specs in probes.items()
            for spec in specs
            if dataset_name(spec) in trained
        }
    )
    if found and not allow:
        raise UserMistake(
            f"a probe of base knowledge measures what the stream trains on ({'; '.join(found)}); take it out of probe.tasks, or set "
            "probe.allow_overlap=true, which flags the run on the leaderboard"
        )
    return found


def measured_texts(texts: Sequence[str], documents: Mapping[str, Sequence[str]], *, allow: bool) -> list[str]:
    """The probe tasks whose `documents` hold what a method trains on, as "probe task: the method's texts"; raises UserMistake unless `allow`."""
    if not texts:
        return []
    asked = set().union(*_shingles(texts))
    short = tuple(f"{text} " for text in map(normalised, texts) if text and len(text.split()) < SHINGLE_WORDS)
    found = [
        name
        for name, pool in documents.items()
        if any(not asked.isdisjoint(shingles) for shingles in _shingles(pool))
        or any(f"{document} ".startswith(short) for document in map(normalised, pool))
    ]
    if found and not allow:
        raise UserMistake(
            f"the method trains on text that a probe measures ({', '.join(found)}); give it other texts (method.texts, conf/texts), take the "
            "probe out, or set probe.allow_overlap=true, which flags the run on the leaderboard"
        )
    return [f"{name}: the method's texts" for name in found]


def overlaps(
    stages: Sequence[Stage], documents: Mapping[str, Sequence[str]]
) -> tuple[tuple[Overlap, ...], frozenset[str]]:
    """What occurs twice in the stream, or in it and in probe `documents` (texts by probe task), where any does.

    Also gives the ids of the training examples that overlap with a test or probe text, for counting them in replay.
    """
    found = [overlap for stage in stages for overlap in _inside(stage)]
    touching = {example.id for stage in stages for example in _shared(stage.train, stage.test)}
    tests = {f"test of {stage.name}": [example.prompt for example in stage.test] for stage in stages}
    pools = tests | dict(documents)
    rows_with: dict[int, list[tuple[str, int]]] = {}  # which rows of which pool hold a shingle
    for pool, texts in pools.items():
        for row, shingles in enumerate(_shingles(texts)):
            for shingle in shingles:
                rows_with.setdefault(shingle, []).append((pool, row))
    for stage in stages:
        hits: dict[str, set[int]] = {}
        for example, shingles in zip(stage.train, _shingles([example.prompt for example in stage.train]), strict=True):
            for pool, row in (place for shingle in shingles for place in rows_with.get(shingle, ())):
                if pool != f"test of {stage.name}":
                    hits.setdefault(pool, set()).add(row)
                    touching.add(example.id)
        for pool, rows in sorted(hits.items()):
            kind = "test and train of two tasks" if pool in tests else "probe and train"
            found.append(Overlap(kind=kind, where=pool, also_in=stage.name, count=len(rows), of=len(pools[pool])))
    return tuple(found), frozenset(touching)


def normalised(text: str) -> str:
    """The words of `text` in lower case, one space between."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _inside(stage: Stage) -> Iterable[Overlap]:
    """Duplicates within train and test, and test prompts seen in train, of one task."""
    train, test = f"train of {stage.name}", f"test of {stage.name}"
    for where, examples in ((train, stage.train), (test, stage.test)):
        asked = {(normalised(example.prompt), normalised(example.answer)) for example in examples}
        if twice := len(examples) - len(asked):
            yield Overlap(kind="duplicates", where=where, also_in="itself", count=twice, of=len(examples))
    if shared := len(_shared(stage.test, stage.train)):
        yield Overlap(kind="test in train", where=test, also_in=train, count=shared, of=len(stage.test))


def _shared(examples: Sequence[Example], others: Sequence[Example]) -> list[Example]:
    prompts = {normalised(example.prompt) for example in others}
    return [example for example in examples if normalised(example.prompt) in prompts]


def _shingles(texts: Sequence[str]) -> list[set[int]]:
    """The hashed word sequences of each text, without those that the pool's template makes common."""
    hashed = []
    for text in texts:
        words = normalised(text).split()
        last = max(len(words) - SHINGLE_WORDS, 0)
        hashed.append({hash(tuple(words[start : start + SHINGLE_WORDS])) for start in range(last + 1)})
    rows = Counter(shingle for shingles in hashed for shingle in shingles)
    common = max(TEMPLATE_SHARE * len(texts), TEMPLATE_ROWS - 1)
    return [{shingle for shingle in shingles if rows[shingle] <= common} for shingles in hashed]
