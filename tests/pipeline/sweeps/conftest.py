"""Sweeps of tokenizers that were never trained: an evaluation is a summary.json, a training a few lines of metrics."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ray.tune.search import Searcher

from pipeline.core.config import Config
from pipeline.core.presets import load_config
from pipeline.sweeps.trials import SweepPlan

SIDE = 32  # pixels


def png(number: int) -> bytes:
    """A smooth picture, another one for every number."""
    coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def shards(write_plain_shards: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuning") / "shards"
    return write_plain_shards(folder, SIDE, train=list(map(png, range(32))), heldout=list(map(png, range(90, 122))))


@pytest.fixture
def configure(shards: Path, tmp_path: Path) -> Callable[..., Config]:
    """`configure("sweep.samples=2")`: the preset sweep_smoke on made pictures, not tracked."""

    def make(*overrides: str) -> Config:
        keys = [f"run.output={tmp_path}", f"data.shards={shards}", "tracking.uri=", "sweep.register="]
        return load_config("sweep_smoke", [*keys, *overrides])

    return make


@pytest.fixture
def plan(configure: Callable[..., Config], tmp_path: Path) -> Callable[..., SweepPlan]:
    """The plan of such a sweep in the folder `sweep`."""
    return lambda *overrides: SweepPlan.of(configure(*overrides), tmp_path / "sweep")


def curve(count: int, psnr: float = 20.0) -> dict[str, float]:
    """Results of an evaluation with `count` thresholds, each with two tokens and a decibel more than the one before."""
    results = {"images_per_second": 50.0, "psnr": psnr, "rfd_compact_cifar10": 5.0}
    for i in range(count):
        values = {"tokens_per_image": 4.0 + 2 * i, "bits_fixed": 20.0 + 9 * i, "bits_coded": 19.0 + 8 * i}
        values |= {"psnr": psnr + i, "ssim": 0.5, "rfd_compact_cifar10": 9.0 - i}
        results |= {f"curve{i:02d}_{name}": value for name, value in values.items()}
    return results


def pretend(task: dict[str, Any], psnr: float = 20.0) -> None:
    """Leave what the stages of a trial would leave."""
    if task["training"]:
        folder = Path(task["training"]["run"]["output"]) / f"{task['training']['preset']}-train"
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            {"time": 1.0, "step": step, "metrics": {"train/loss": 1 / step, "validation/psnr": psnr}}
            for step in (10, 20)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for values in task["evaluations"]:
        folder = Path(values["run"]["output"]) / f"{values['preset']}-evaluate"
        folder.mkdir(parents=True, exist_ok=True)
        results = curve(len(values["evaluate"]["thresholds"]), psnr)
        summary = {"stage": "evaluate", "status": "finished", "results": results, "inputs": {}}
        (folder / "summary.json").write_text(json.dumps(summary))


class FakeTune:
    """Works off trials one after another, in the place of `run_tune`.

    Attributes:
        acts: by number of the trial: a PSNR to pretend, the outcome and reason of a trial that does not finish,
            "die": all ends there, as if it was killed, "last": no trial begins after it, or "stop": the sweep is asked
            to stop while it runs.
        given: numbers of the trials that were handed out.
    """

    def __init__(self) -> None:
        self.acts: dict[int, Any] = {}
        self.given: list[int] = []

    def __call__(self, config: Config, folder: Path, total: int, at_once: int, searcher: Any, look: Any) -> None:
        while (task := searcher.suggest("x")) != Searcher.FINISHED:
            number = int(Path(task["folder"]).name.split("-")[1])
            self.given.append(number)
            act = self.acts.get(number, 20.0 + number)
            if act == "die":
                return
            if act == "stop":
                searcher.run.request_stop()
                act = ("interrupted", "stopped after step 3")
            look()
            if isinstance(act, tuple):
                searcher.on_trial_complete("x", {"outcome": act[0], "reason": act[1]})
            else:
                pretend(task, 20.0 + number if act == "last" else act)
                searcher.on_trial_complete("x", {"outcome": "finished", "reason": ""})
            if act == "last":
                return


@pytest.fixture
def fake_tune(monkeypatch: pytest.MonkeyPatch) -> FakeTune:
    """In the place of Ray Tune, and of a cluster with two CPUs."""
    fake = FakeTune()
    monkeypatch.setattr("pipeline.sweeps.driver.run_tune", fake)
    monkeypatch.setattr("pipeline.sweeps.driver.POLL_SECONDS", 0.01)
    monkeypatch.setattr("pipeline.sweeps.sweep._resources", lambda config: (2.0, 0.0))
    return fake


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An MLflow store for several tests: a new one takes MLflow seconds."""
    from pipeline.tracking.mlflow_store import MlflowStore

    uri = f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
    store = MlflowStore(uri, "other", None, system_metrics=False)
    store.open("first", 0.0, {}, {})
    store.end("FINISHED")
    return uri
