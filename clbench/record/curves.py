"""Where the curves of a run go besides its own records, on request: Weights & Biases, TensorBoard. Nothing here is read back."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from clbench.config import Config, run_hash, run_name
from clbench.config.secrets import masked
from clbench.types import Reading, Score, UserMistake


class Wandb:
    """A run of Weights & Biases. Its id is the hash of the run, so that a run that is resumed goes on there, too."""

    def __init__(self, config: Config) -> None:
        import wandb
        from wandb.errors import Error

        self._name, tracking = run_name(config), config.tracking
        try:
            self._run = wandb.init(
                project=tracking.project,
                name=self._name,
                id=run_hash(asdict(config)),
                resume="allow",
                group=config.stream.name,
                tags=[config.method["name"], config.model["label"], f"seed={config.seed}", f"order={config.order}"],
                config=masked(asdict(config)),
                mode=cast(Any, tracking.wandb),  # one of its words, which config.checks has seen to
                dir=config.results_dir,
                # The command line and the repository's address may hold secrets; the manifest has the command, masked, and the commit.
                settings=wandb.Settings(x_disable_meta=True, disable_git=True),
            )
        except Error as error:
            why = str(error).rstrip(".")
            raise UserMistake(f"tracking.wandb={tracking.wandb}: {why}, or give tracking.wandb=offline") from error
        self._run.define_metric("train/*", step_metric="train/step")

    def training(self, step: int, reading: Reading) -> None:
        """A reading after `step` optimizer steps of the run."""
        self._run.log({f"train/{name}": value for name, value in asdict(reading).items()} | {"train/step": step})

    def stage(self, index: int, scores: Sequence[Score]) -> None:
        """All that was measured after a stage."""
        for probe in dict.fromkeys(score.probe for score in scores):
            self._run.define_metric(f"{probe}/*", step_metric="stage")
        self._run.log({_label(score): score.value for score in scores} | {"stage": index})

    def outcome(
        self, measures: Mapping[str, float], *, matrix: Sequence[Sequence[float]], stages: Sequence[str], report: str
    ) -> None:
        """What the run amounts to: `measures`, the columns of leaderboard.csv by name; `matrix`, the score of each task (across, in the stream's
        order) after each stage (down, the untouched model first); `stages` names them, the untouched model left out; `report`, a page of HTML."""
        import wandb

        self._run.summary.update(dict(measures))
        if matrix:
            rows = [[name, *row] for name, row in zip(("base", *stages), matrix, strict=True)]
            self._run.log({"matrix": wandb.Table(columns=["after", *stages], data=rows)})
        artifact = wandb.Artifact(f"report-{self._name}", type="report")
        with artifact.new_file("report.html") as file:
            file.write(report)
        self._run.log_artifact(artifact)

    def close(self, *, failed: bool) -> None:
        """Nothing comes after this."""
        self._run.finish(exit_code=int(failed))


class TensorBoard:
    """Event files in results_dir/tensorboard/RUN: training over the run's optimizer steps, all else over stages. Hears what Wandb does."""

    def __init__(self, config: Config) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(Path(config.results_dir) / "tensorboard" / run_name(config)))

    def training(self, step: int, reading: Reading) -> None:
        for name, value in asdict(reading).items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def stage(self, index: int, scores: Sequence[Score]) -> None:
        for score in scores:
            self._writer.add_scalar(_label(score), score.value, index)
        self._writer.flush()

    def outcome(
        self, measures: Mapping[str, float], *, matrix: Sequence[Sequence[float]], stages: Sequence[str], report: str
    ) -> None:
        for name, value in measures.items():
            self._writer.add_scalar(f"leaderboard/{name}", value, len(stages))

    def close(self, *, failed: bool) -> None:
        self._writer.close()


def curves_of(config: Config) -> tuple[Wandb | TensorBoard, ...]:
    """Those that the configuration asks for."""
    asked: list[Wandb | TensorBoard] = []
    if config.tracking.wandb != "disabled":
        asked.append(Wandb(config))
    if config.tracking.tensorboard:
        asked.append(TensorBoard(config))
    return tuple(asked)


def _label(score: Score) -> str:
    return f"{score.probe}/{score.task}/{score.metric}"
