"""Whether the hub still has what conf/ names: every dataset of a task or probe, its configuration, revision and splits (`clbench.doctor hub`)."""

from collections.abc import Iterator
from typing import Any

from datasets import get_dataset_split_names
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

from clbench.config.composition import CONF_DIR
from clbench.data.rows import DatasetSpec
from clbench.examine.lm_tasks import resolve, task_index
from clbench.types import UserMistake


def wanted() -> Iterator[tuple[str, DatasetSpec, set[str]]]:
    """(who asks for it, the dataset, the names of its splits on the hub) of every yaml of conf/task and conf/probe."""
    for path in sorted((CONF_DIR / "task").glob("*.yaml")):
        task: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        if "dataset" in task:
            spec = instantiate(task["dataset"])
            yield path.stem, spec, set(spec.splits.values()) or {"train", "test"}
    index = task_index([], search=OmegaConf.load(CONF_DIR / "probe" / "mini.yaml").probes.knowledge.search)
    for path in sorted((CONF_DIR / "probe").glob("*.yaml")):
        for name in [name for name in OmegaConf.load(path).tasks if name in index.task_index]:
            for row in resolve(name, index).values():
                for task in row.tasks:
                    split = task.config.get("test_split") or task.config.get("validation_split")
                    address = {"hub": task.config["dataset_path"], "config": task.config.get("dataset_name")}
                    yield f"probe {path.stem}: {task.name}", DatasetSpec(name=task.name, **address), {str(split)}
    yield "probe: text, texts=wikitext", get_object("tasks.wikitext.DATASET"), {"test", "train"}


def wrong(spec: DatasetSpec, splits: set[str]) -> str:
    """What keeps the dataset from being read, in one line; "" where nothing does. Raises UserMistake where the hub cannot be reached."""
    try:
        if spec.data_files:
            there = HfApi().list_repo_files(spec.hub, repo_type="dataset", revision=spec.revision)
            needed = set(spec.data_files.values())
        else:
            there = get_dataset_split_names(spec.hub, spec.config, revision=spec.revision)
            # "train[:5000]+train[-5000:]" asks for train.
            needed = {part.partition("[")[0] for split in splits for part in split.split("+")}
    except ConnectionError as error:
        raise UserMistake(f"the hub cannot be reached ({error}); `doctor hub` needs a network") from error
    except (DatasetNotFoundError, HfHubHTTPError, ValueError, OSError, RuntimeError) as error:  # RuntimeError: a script
        return " ".join(str(error).split())[:200]
    missing = needed - set(there)
    return f"has no {', '.join(sorted(missing))}; it has {', '.join(sorted(there)[:8])}" if missing else ""


def checked() -> Iterator[tuple[str, str, str]]:
    """Rows of the table: who asks, the address, what is wrong; an address that several ask for is looked at once."""
    found: dict[tuple[str, ...], str] = {}
    for who, spec, splits in wanted():
        key = (spec.hub, f"{spec.config}", f"{spec.revision}", *sorted(splits), *sorted(spec.data_files.values()))
        if key not in found:
            found[key] = wrong(spec, splits)
        yield who, f"{spec.hub} : {spec.config} @ {spec.revision} [{', '.join(sorted(splits))}]", found[key] or "right"
