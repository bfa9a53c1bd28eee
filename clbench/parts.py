"""The objects that a configuration names: its tasks, probes and method."""

from __future__ import annotations

from hydra.utils import instantiate

from clbench.config import Config
from clbench.protocols import Method, Probe, Task


def make_tasks(config: Config) -> dict[str, Task]:
    """The stream's tasks by name, in the order in which the stream lists them."""
    return {name: instantiate(task, _convert_="all") for name, task in config.tasks.items()}


def make_probes(config: Config) -> tuple[Probe, ...]:
    """The probes, each with its name."""
    return tuple(instantiate(probe, name=name, _convert_="all") for name, probe in config.probe.probes.items())


def make_method(config: Config) -> Method:
    """The method; `name` is its label and no field of it."""
    return instantiate({key: value for key, value in config.method.items() if key != "name"}, _convert_="all")
