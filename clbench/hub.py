"""Whether the hub still has what conf/ names: every dataset of a task or probe, its configuration, revision and splits (`clbench.doctor hub`).

Of a task's dataset the first row of each split is read, too: its columns must make an example.
"""

from collections.abc import Callable, Iterator, Mapping
from fnmatch import filter as matching
from functools import partial
from typing import Any

from datasets import get_dataset_split_names, load_dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

from clbench.config.composition import CONF_DIR
from clbench.data.rows import DatasetSpec
from clbench.examine.lm_tasks import resolve, task_index
from clbench.types import UserMistake

UNREADABLE = (DatasetNotFoundError, HfHubHTTPError, ValueError, OSError, RuntimeError)
"""What datasets and the hub raise of a dataset that cannot be had; RuntimeError: it needs a script."""
Reader = Callable[[Mapping[str, Any]], object]
"""Makes an example of a row; raises UserMistake for a column that is missing or holds something else."""


def wanted() -> Iterator[tuple[str, DatasetSpec, set[str], Reader | None]]:
    """(who asks for it, the dataset, the names of its splits on the hub, what reads a row) of every yaml of conf/task and conf/probe."""
    for path in sorted((CONF_DIR / "task").glob("*.yaml")):
        yaml = OmegaConf.load(path)
        if "dataset" in yaml:
            task = instantiate(yaml, data_dir=None)
            splits = set(task.dataset.splits.values()) or {"train", "test"}
            yield path.stem, task.dataset, splits, partial(task.example, id=path.stem)
    index = task_index([], search=OmegaConf.load(CONF_DIR / "probe" / "mini.yaml").probes.knowledge.search)
    for path in sorted((CONF_DIR / "probe").glob("*.yaml")):
        for name in [name for name in OmegaConf.load(path).tasks if name in index.task_index]:
            for row in resolve(name, index).values():
                for task in row.tasks:
                    told = task.config.get
                    # What probe.shots puts before a question comes of the second.
                    asked = (
                        told("test_split") or told("validation_split"),
                        told("fewshot_split") or told("training_split"),
                    )
                    spec = DatasetSpec(name=task.name, hub=str(told("dataset_path")), config=told("dataset_name"))
                    yield f"probe {path.stem}: {task.name}", spec, {str(split) for split in asked if split}, None
    yield "probe: text, texts=wikitext", get_object("tasks.wikitext.DATASET"), {"test", "train"}, None


def wrong(spec: DatasetSpec, splits: set[str], read: Reader | None = None) -> str:
    """What keeps the dataset from being read, in one line; "" where nothing does. Raises UserMistake where the hub cannot be reached."""
    try:
        if spec.data_files:
            files = HfApi().list_repo_files(spec.hub, repo_type="dataset", revision=spec.revision)
            needed = set(spec.data_files.values())
            there = [*files, *(pattern for pattern in needed if matching(files, pattern))]
        else:
            there = get_dataset_split_names(spec.hub, spec.config, revision=spec.revision)
            # "train[:5000]+train[-5000:]" asks for train.
            needed = {part.partition("[")[0] for split in splits for part in split.split("+")}
    except ConnectionError as error:
        raise UserMistake(f"the hub cannot be reached ({error}); `doctor hub` needs a network") from error
    except UNREADABLE as error:
        return " ".join(str(error).split())[:200]
    if missing := needed - set(there):
        return f"has no {', '.join(sorted(missing))}; it has {', '.join(sorted(there)[:8])}"
    return _unread(spec, needed, read) if read else ""


def _unread(spec: DatasetSpec, needed: set[str], read: Reader) -> str:
    """What is wrong with the first row of a split, or of a file where the dataset names files."""
    for one in sorted(needed):
        asked = {"data_files": {"all": one}, "split": "all"} if spec.data_files else {"name": spec.config, "split": one}
        try:
            row = next(iter(load_dataset(spec.hub, revision=spec.revision, streaming=True, **asked)))
            read(row)
        except (UserMistake, *UNREADABLE) as error:
            return f"{one}: {' '.join(str(error).split())[:200]}"
    return ""


def checked() -> Iterator[tuple[str, str, str]]:
    """Rows of the table: who asks, the address, what is wrong; an address that several ask for is looked at once."""
    found: dict[str, str] = {}
    for who, spec, splits, read in wanted():
        address = f"{spec.hub} : {spec.config} @ {spec.revision} [{', '.join(sorted(splits))}]"
        key = who if read else address  # each reader reads rows in its own way
        if key not in found:
            found[key] = wrong(spec, splits, read)
        yield who, address, found[key] or "right"
