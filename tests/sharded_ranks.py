"""What the ranks of tests/test_sharded_base.py do, as those of tests/ranks.py: one by one they answer questions about a base model in slices.

The same functions answer in the test's own process, where weights are whole.
"""

import sys
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from hydra.utils import instantiate  # noqa: E402
from torch.nn import Module, Parameter  # noqa: E402
from transformers import modeling_utils  # noqa: E402

from clbench import build, experiment
from clbench.build import make_method  # noqa: E402
from clbench.config import (
    Config,  # noqa: E402
    composition,  # noqa: E402
)
from clbench.data.encoder import Encoder  # noqa: E402
from clbench.examine.student import Student  # noqa: E402
from clbench.experiment.examination import Watch  # noqa: E402
from clbench.models import sharding  # noqa: E402
from clbench.models.folding import export, foldable, folded, merged_into  # noqa: E402
from clbench.models.loss import causal_lm  # noqa: E402
from clbench.models.weights import count_parameters, trainable  # noqa: E402
from tests import ranks  # noqa: E402
from tests.ranks import run  # noqa: E402

VIEWS = {"log_likelihoods": 7, "generate": 5, "read": 3}
"""How many requests of each kind the students are asked."""


def wrapped(config: Config) -> tuple[Module, Encoder]:
    """The method's model, in slices where the configuration says so, and its encoder."""
    source, method = instantiate(config.model, _convert_="all"), make_method(config)
    encoder = Encoder(source.load_tokenizer(Path(config.cache_dir)), max_length=config.train.max_length)
    return build.wrap(method, build.load_model(config, source)), encoder


def stirred(model: Module) -> Module:
    """`model`, its adapters no longer without effect."""
    with torch.no_grad():
        for number, parameter in enumerate(trainable(model).values()):
            entries = torch.arange(parameter.numel(), dtype=torch.float32).view(parameter.shape)
            parameter.copy_(0.02 * torch.sin(entries + number))
    return model.eval()


# --- what is held, and when -------------------------------------------------------------------------------------------------


def base_of(model: Module) -> dict[str, Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}


def holding(model: Module) -> dict[str, int]:
    """Entries of the base that this rank holds: of its slices, and whole."""
    base = base_of(model).values()
    return {
        "slices": sum(parameter.ds_tensor.numel() for parameter in base),
        "whole": sum(parameter.numel() for parameter in base),
    }


def held(*overrides: str) -> dict[str, object]:
    """A whole run that is watched: what each rank holds after every gather, before and after an examination, and before a stage."""
    moments: dict[str, list[dict[str, int]]] = {"examining": [], "between": [], "before a stage": []}
    sizes: dict[str, int] = {}
    wrap, examine, train, gather = experiment.wrap, experiment.examine, experiment.train, sharding.gather
    adapters: list[int] = []

    def noted_wrap(*arguments: object) -> Module:
        model = wrap(*arguments)
        units = list(sharding.units(causal_lm(model)))
        sizes.update(
            base=sum(parameter.ds_numel for parameter in base_of(model).values()),
            padding=len(base_of(model)),
            unit=max(sum(p.ds_numel for p in unit.parameters() if sharding.is_sharded(p)) for unit in units),
            units=len(units),
            counted=count_parameters(model)["parameters"] - count_parameters(model)["trainable"],
        )
        moments["between"].append(holding(model))
        moments["model"] = model
        return model

    def noted_gather(slices: list[Parameter]) -> None:
        gather(slices)
        if slices and "model" in moments:
            moments["examining"].append(holding(moments["model"]))

    def noted_examine(made: experiment.Run, index: int, watch: Watch) -> tuple[list, int]:
        moments["between"].append(holding(made.model))
        adapters.append(sum(parameter.numel() for parameter in trainable(made.model).values()))
        found = examine(made, index, watch)
        moments["between"].append(holding(made.model))
        return found

    def noted_train(made: experiment.Run, *arguments: object, **named: object) -> object:
        moments["before a stage"].append(holding(made.model))
        return train(made, *arguments, **named)

    with (
        patch.object(experiment, "wrap", noted_wrap),
        patch.object(experiment, "examine", noted_examine),
        patch.object(experiment, "train", noted_train),
        patch.object(sharding, "gather", noted_gather),
    ):
        found = run(*overrides)
    del moments["model"]
    return found | {"moments": ranks.from_all(moments), "sizes": sizes, "adapters": adapters}


# --- answers in step --------------------------------------------------------------------------------------------------------


def answers(*overrides: str) -> dict[str, object]:
    """A student's answers to all requests, and which weights each rank gathered for them, in order."""
    model, encoder = wrapped(composition.compose(list(overrides)))
    stirred(model)
    gather, taken = sharding.gather, []

    def counted(slices: list[Parameter]) -> None:
        taken.append([parameter.ds_id for parameter in slices])
        gather(slices)

    found: dict[str, object] = {}
    with folded(model), patch.object(sharding, "gather", counted), sharding.gathering(model):
        student = Student(model, encoder, tokens=40)
        for name, asked in requests(len(encoder.tokenizer)).items():
            found[name] = getattr(student, name)(asked, **({"max_new_tokens": 9} if name == "generate" else {}))
        left = [name for name, parameter in model.named_parameters() if parameter.is_inference()]
    return {
        "found": found,
        "gathers": ranks.from_all(taken),
        "counted": count_parameters(model),
        "not to be trained on": left,
    }


def requests(vocabulary: int) -> dict[str, list]:
    """Requests of each kind, of different lengths."""

    def ids(count: int, seed: int) -> tuple[int, ...]:
        return tuple((7 * place * place + 13 * seed + 4) % (vocabulary - 4) + 4 for place in range(count))

    return {
        "log_likelihoods": [(ids(3 + 5 * n, n), ids(1 + n, n + 50)) for n in range(VIEWS["log_likelihoods"])],
        "generate": [ids(2 + 7 * n, n) for n in range(VIEWS["generate"])],
        "read": [(ids(4 + n, n), ids(4, n), [n, 3]) for n in range(VIEWS["read"])],
    }


# --- weights ------------------------------------------------------------------------------------------------------------------


def loaded(*overrides: str) -> dict[str, object]:
    """Every weight and buffer of the method's model, whole; what each rank held whole when it began to read them and of how many it made copies."""
    holds: list[int] = []
    read = modeling_utils._load_state_dict_into_zero3_model

    def noted_read(model: Module, *arguments: object) -> object:
        holds.append(sum(parameter.numel() for parameter in model.parameters()))
        return read(model, *arguments)

    with patch.object(modeling_utils, "_load_state_dict_into_zero3_model", noted_read):
        model, _ = wrapped(composition.compose(list(overrides)))
    parameters = {name: sharding.copied(parameter) for name, parameter in model.named_parameters()}
    with merged_into(foldable(stirred(model))):  # as an export does, in any precision
        merged = {name: sharding.copied(parameter) for name, parameter in base_of(model).items()}
    again = {name: sharding.copied(parameter) for name, parameter in base_of(model).items()}
    linear = torch.nn.functional.linear is torch._C._nn.linear
    return {
        "parameters": parameters,
        "merged": merged,
        "again": again,
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "linear": linear,
        "held when read": ranks.from_all(holds),
        "copies": ranks.from_all(sum(not copy.is_meta for copy in again.values())),
    }


def exported(folder: str, *overrides: str) -> dict[str, object]:
    """Exports the model with its adapters stirred."""
    model, _ = wrapped(composition.compose(list(overrides)))
    export(stirred(model), Path(folder))
    return {"ranks": ranks.from_all(True)}


if __name__ == "__main__":
    ranks.main(Path(sys.argv[1]), (held, answers, loaded, exported, run))
