"""Finding a threshold for a wanted mean."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.config import load_config
from pipeline.data.shards import ShardDataset
from pipeline.errors import BadInput, Stopped
from pipeline.evaluation import calibration
from pipeline.run import Run
from tatok_model.tokenizer import TaTok


@pytest.fixture
def calibrating(tmp_path: Path, shards: Path, tokenizer: TaTok) -> Iterator[Any]:
    """`calibrating("filter.key=value")` makes a run of the stage that has not begun."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    runs = []

    def make(*overrides: str) -> Run:
        shape = [f"tokenizer.{k}={v}" for k, v in {"patch_size": 4, "global_tokens": 2, "quantizer": "fsq"}.items()]
        shape += ["tokenizer.codebook_dim=16", "tokenizer.fsq_levels=[4,4]", "data.image_size=16"]
        places = [f"run.output={tmp_path}", f"data.shards={shards}", f"tokenizer.checkpoint={tmp_path / 'tokenizer'}"]
        config = load_config("smoke", [*shape, *places, "tracking.uri=", "evaluate.batch_size=8", *overrides])
        runs.append(Run.open("calibrate", config, f"run-{len(runs)}", resume=False))
        return runs[-1]

    yield make
    for run in runs:
        run.close()


@pytest.mark.parametrize("rule", ["residual", "relative", "count"])
def test_the_threshold_keeps_the_wanted_mean(
    calibrating: Any, tokenizer: TaTok, shards: Path, rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = calibrating(f"filter.rule={rule}", "filter.threshold=0", "filter.mean_tokens=10", "evaluate.max_images=0")
    calibration.check(run.config)
    calibration.run(run)
    assert run.results["tokens_per_image"] == pytest.approx(10, abs=1)
    kept = yaml.safe_load(Path(run.outputs["filter"]).read_text())["filter"]
    pictures = ShardDataset(shards, "heldout").images(range(30))
    ranked = tokenizer.rank(tokenizer.encode(torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy())))
    again = ranked.cut(kept["rule"], kept["threshold"]).counts().double().mean()
    assert float(again) == pytest.approx(run.results["tokens_per_image"], abs=0.1)
    assert kept["replay"] is False
    told = capsys.readouterr().err.split("filter.threshold=")[-1].strip()
    assert float(told) == kept["threshold"] == run.results["threshold"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["filter.mean_tokens=1"], "filter.mean_tokens is 1; expected 2 to 18"),
        (["filter.mean_tokens=19"], "filter.mean_tokens is 19; expected 2 to 18"),
        (["tokenizer.patch_tokens=false", "filter.mean_tokens=2"], "tokenizer.patch_tokens is false"),
        (
            ["filter.score=grid", "filter.rule=count", "filter.mean_tokens=9"],
            "filter.score is 'grid'; expected a score in",
        ),
    ],
)
def test_what_cannot_be_calibrated_is_refused(calibrating: Any, overrides: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        calibration.check(calibrating(*overrides).config)


def test_a_calibration_that_is_asked_to_stop_stops(calibrating: Any) -> None:
    run = calibrating("filter.mean_tokens=9")
    run.request_stop()
    with pytest.raises(Stopped, match="asked to stop"):
        calibration.run(run)


def test_a_gpu_that_is_not_there_is_refused(calibrating: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match="evaluate.device is 'cuda'; expected cpu or auto"):
        calibration.run(calibrating("filter.mean_tokens=9", "evaluate.device=cuda"))
