"""The stage as a whole, on a local Ray."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config import EvaluateConfig, load_config
from pipeline.errors import BadInput, Stopped
from pipeline.evaluation import plan, stage
from pipeline.evaluation.actors import pick_device
from pipeline.run import Run
from tatok_model.tokenizer import TaTok

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # Ray Data's own old settings

RATES = ("encode_images_per_second", "decode_images_per_second", "images_per_second", "baseline_kmeans_fit_seconds")


@pytest.fixture
def evaluation(tmp_path: Path, shards: Path, tokenizer: TaTok) -> Iterator[Any]:
    """`evaluation("name", "evaluate.key=value")` makes a run of the stage that has not begun."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    runs = []

    def make(name: str, *overrides: str) -> Run:
        shape = [f"tokenizer.{k}={v}" for k, v in {"patch_size": 4, "global_tokens": 2, "quantizer": "fsq"}.items()]
        shape += ["tokenizer.codebook_dim=16", "tokenizer.fsq_levels=[4,4]", "data.image_size=16"]
        places = [f"run.output={tmp_path}", f"data.shards={shards}", f"tokenizer.checkpoint={tmp_path / 'tokenizer'}"]
        config = load_config("smoke", [*shape, *places, "tracking.uri=", "evaluate.batch_size=4", *overrides])
        runs.append(Run.open("evaluate", config, name, resume=False))
        return runs[-1]

    yield make
    for run in runs:
        run.close()


def test_one_and_two_actors_find_the_same_to_the_last_bit(
    ray_session: ModuleType, evaluation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "NARROW", 8)  # four ranges of the 30 pictures
    found = []
    for workers in (1, 2):
        run = evaluation(f"of-{workers}", f"evaluate.num_workers={workers}", "evaluate.baselines=[kmeans]")
        stage.run(run)
        found.append({name: value for name, value in run.results.items() if name not in RATES})
        assert ("reference" in run.outputs, "reference" in run.inputs) == (workers == 1, workers == 2), "cached"
    assert found[0] == found[1]
    assert found[0]["images"] == 30
    assert found[0]["baseline_kmeans_bits_per_image"] <= found[0]["bits_per_image"] == 72
    line = json.loads((run.folder / "metrics.jsonl").read_text())
    assert line["metrics"] == run.results
    with Image.open(run.outputs["reconstructions"]) as picture:
        assert np.asarray(picture).shape[1] > np.asarray(picture).shape[0], "eight pictures in two rows"
    assert "| rfd_compact_cifar10 |" in Path(run.outputs["report"]).read_text()


def test_an_evaluation_that_is_asked_to_stop_stops(ray_session: ModuleType, evaluation: Any) -> None:
    run = evaluation("stopped")
    run.request_stop()
    with pytest.raises(Stopped, match="asked to stop"):
        stage.run(run)


def test_more_actors_than_the_cluster_has_room_for_are_refused(ray_session: ModuleType) -> None:
    assert pick_device(EvaluateConfig(num_workers=2)) == "cpu"
    with pytest.raises(BadInput, match="evaluate.num_workers is 3; expected at most the cluster's 2 CPUs"):
        pick_device(EvaluateConfig(num_workers=3))
    if not ray_session.cluster_resources().get("GPU"):
        with pytest.raises(BadInput, match="evaluate.device is 'cuda' .* expected at most the cluster's 0 GPUs"):
            pick_device(EvaluateConfig(device="cuda"))
