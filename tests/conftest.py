"""Shared by the tests: one torch thread, no network, and a tiny model with a tiny stream that a whole run passes in a second."""

import os
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="disabled", TQDM_DISABLE="1")

import runpy  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"

TINY_MODEL = (
    "model.steps=20",
    "model.corpus.lines=1500",
    "model.batch_size=8",
    "model.architecture.hidden_size=32",
    "model.architecture.intermediate_size=64",
    "model.architecture.num_hidden_layers=2",
    "model.architecture.num_attention_heads=2",
    "model.architecture.num_key_value_heads=2",
)
TINY_STREAM = (
    "stream.limit=3",
    "stream.train_rows=24",
    "stream.test_rows=6",
    "train.steps=3",
    "train.batch_size=4",
    "probe.limit=12",
)
QUIET = ("tracking.progress=false", "engine.threads=1")


def small(method: str) -> list[str]:
    """What chooses a method for a model of width 32, of which CURLoRA's own rank asks too much."""
    return [f"method={method}", *(["method.rank=16"] if method.startswith("curlora") else [])]


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny model is kept for the whole session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny(cache_dir: Path) -> list[str]:
    """The command line of a run that takes about a second, but for its results_dir."""
    return [*TINY_MODEL, *TINY_STREAM, *QUIET, f"cache_dir={cache_dir}"]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to import from in which the wheel of this checkout is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    root = str(Path(__file__).resolve().parent.parent)
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(folder), root], check=True, timeout=300)
    (wheel,) = folder.glob("clbench-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), wheel], check=True, timeout=300)
    return folder / "site"


@pytest.fixture()
def overrides(tiny: list[str], tmp_path: Path) -> list[str]:
    """The command line of a run that takes about a second."""
    return [*tiny, f"results_dir={tmp_path / 'results'}"]


@pytest.fixture()
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `python -m MODULE WORDS` in this process; gives its exit code, output and errors."""

    def run(module: str, *words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [module, *map(str, words)])
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr("clbench.progress.set_up_logging", lambda: None)
        code = 0
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run
