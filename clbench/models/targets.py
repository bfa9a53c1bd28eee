"""The layers that adapters go on."""

from collections.abc import Sequence

from torch.nn import Module

from clbench.types import UserMistake


def targeted(model: Module, targets: Sequence[str], *, kinds: tuple[type[Module], ...]) -> dict[str, Module]:
    """The layers whose full names end in one of `targets`, by name, as PEFT finds them; raises UserMistake where one is none of `kinds`."""
    names = {name: module for name, module in model.named_modules() if name}
    found = {target: [name for name in names if f".{name}".endswith(f".{target}")] for target in targets}
    allowed = sorted({name.rpartition(".")[2] for name, module in names.items() if type(module) in kinds})
    for target, chosen in found.items():
        refused = sorted({type(names[name]).__name__ for name in chosen if type(names[name]) not in kinds})
        if not chosen or refused:
            what = f"is a {', '.join(refused)}" if refused else "is in no layer's name"
            listed = " or ".join(kind.__name__ for kind in kinds)
            raise UserMistake(
                f"target {target!r} {what}; choose layers of type {listed}: {', '.join(allowed)} (conf/method)"
            )
    together = {name for chosen in found.values() for name in chosen}
    return {name: module for name, module in names.items() if name in together}
