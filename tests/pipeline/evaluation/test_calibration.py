"""Finding a threshold for a wanted mean, of tokens or of dB, and the line that predicts dB."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from pipeline.core.checkpoints import check_quality, load_tokenizer
from pipeline.core.errors import BadInput, Stopped
from pipeline.data.shards import ShardDataset
from pipeline.evaluation import calibrate
from tatok_model.filtering_rules import QualityLine, read_lines
from tatok_model.tokenizer import TaTok


@pytest.fixture
def calibrating(opened: Any) -> Any:
    """`calibrating("filter.key=value")` makes a run of the stage that has not begun."""
    return lambda *overrides: opened("calibrate", "evaluate.batch_size=8", *overrides)


@pytest.mark.parametrize("rule", ["residual", "relative", "count", "marginal"])
def test_the_threshold_keeps_the_wanted_mean(
    calibrating: Any, tokenizer: TaTok, shards: Path, rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = calibrating(f"filter.rule={rule}", "filter.threshold=0", "filter.mean_tokens=10", "evaluate.max_images=0")
    calibrate.check(run.config)
    calibrate.run(run)
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
            "filter.score is 'grid'; expected one whose steps have scores",
        ),
        (
            ["filter.mean_tokens=9", "filter.mean_psnr=20"],
            "filter.mean_psnr is 20 and filter.mean_tokens 9; exp",
        ),
        ([], "filter.mean_tokens is 0; expected 2 to 18, .* or filter.mean_psnr"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(calibrating: Any, overrides: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        calibrate.check(calibrating(*overrides).config)


def test_a_calibration_that_is_asked_to_stop_stops(calibrating: Any) -> None:
    run = calibrating("filter.mean_tokens=9")
    run.request_stop()
    with pytest.raises(Stopped, match="asked to stop"):
        calibrate.run(run)


def test_a_gpu_that_is_not_there_is_refused(calibrating: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match="evaluate.device is 'cuda'; expected cpu or auto"):
        calibrate.run(calibrating("filter.mean_tokens=9", "evaluate.device=cuda"))


def test_a_line_is_found_again_and_decibels_are_right_on_average() -> None:
    draw = np.random.default_rng(0)
    total = draw.uniform(1, 60, 2000)
    dropped = np.where(draw.random(2000) < 0.1, 0, total * draw.random(2000))  # of some, everything is kept
    exact = 0.002 + 0.0013 * dropped + 0.0002 * (total - dropped)
    assert calibrate.fit(dropped, total - dropped, exact) == pytest.approx((0.002, 0.0013, 0.0002), rel=1e-5)
    noisy = exact * 10 ** draw.normal(0, 0.1, len(total))  # a deviation of 1 dB
    intercept, slope, kept_slope = calibrate.fit(dropped, total - dropped, noisy)
    assert (slope, kept_slope) == pytest.approx((0.0013, 0.0002), rel=0.1)
    predicted = intercept + slope * dropped + kept_slope * (total - dropped)
    assert np.mean(10 * np.log10(predicted / noisy)) == pytest.approx(0, abs=0.05)


def test_a_model_that_keeping_tokens_does_not_help_still_has_a_line() -> None:
    total = np.linspace(1, 2, 50)
    _, slope, kept_slope = calibrate.fit(total / 2, total / 2, 0.01 + 0.001 * total)
    assert 0 < kept_slope < slope


@pytest.mark.parametrize(("score", "rounds"), [("distortion", 1), ("error", 1), ("error", 2)])
def test_calibration_keeps_a_line_beside_the_weights_and_quality_cuts_by_it(
    calibrating: Any, shards: Path, score: str, rounds: int, tmp_path: Path
) -> None:
    asked = [f"filter.score={score}", f"filter.rounds={rounds}", "filter.rule=quality", "filter.threshold=5"]
    run = calibrating(*asked, "filter.mean_tokens=10")
    calibrate.run(run)
    (line,) = TaTok.from_pretrained(tmp_path / "tokenizer").quality_lines
    assert (line.score, line.rounds) == (score, rounds)
    assert line == read_lines(run.folder / "quality.json")[0]
    for name in ("intercept", "slope", "kept_slope", "most"):
        assert getattr(line, name) == run.results[f"line_{name}"]
    assert run.results["threshold"] <= line.most  # an untrained model's line is nearly flat: no mean is promised
    images = torch.from_numpy(ShardDataset(shards, "heldout").images(range(30)).transpose(0, 3, 1, 2).copy())
    loaded = TaTok.from_pretrained(tmp_path / "tokenizer")
    again = loaded.rank(loaded.encode(images), score, rounds, images).cut("quality", run.results["threshold"])
    assert float(again.counts().double().mean()) == pytest.approx(run.results["tokens_per_image"], abs=0.1)


def test_a_line_of_another_score_stays(calibrating: Any, tmp_path: Path) -> None:
    for score in ("error", "distortion", "error"):
        calibrate.run(calibrating(f"filter.score={score}", "filter.mean_tokens=9"))
    found = TaTok.from_pretrained(tmp_path / "tokenizer").quality_lines
    assert [line.score for line in found] == ["distortion", "error"]


@pytest.mark.parametrize("rule", ["marginal", "relative", "residual", "count"])
def test_a_wanted_psnr_is_measured_at_the_threshold(calibrating: Any, rule: str) -> None:
    """The untrained tokenizer's pictures get worse with every token: wanted is what half of them give."""
    start = ["filter.score=error", f"filter.rule={rule}", "filter.threshold=0"]
    by_tokens = calibrating(*start, "filter.mean_tokens=10")
    pictures = calibrate._RankedImages(by_tokens, load_tokenizer(by_tokens.config)[0])
    wanted = float(pictures.decibels("count", 16).mean())
    run = calibrating(*start, f"filter.mean_psnr={wanted - 1e-9!r}")
    calibrate.run(run)
    assert run.results["psnr"] == pytest.approx(float(pictures.decibels(rule, run.results["threshold"]).mean()))


def test_more_db_than_all_tokens_give_are_refused_with_the_most(calibrating: Any) -> None:
    with pytest.raises(BadInput, match=r"filter.mean_psnr is 60; expected at most \d+\.\d\d dB, which this tokenizer"):
        calibrate.run(calibrating("filter.mean_psnr=60"))


@pytest.mark.parametrize("threshold", ["60", "5"])
def test_quality_needs_a_line_that_reaches(calibrating: Any, threshold: str) -> None:
    config = calibrating("filter.rule=quality", f"filter.threshold={threshold}").config
    tokenizer = load_tokenizer(config)[0]
    with pytest.raises(BadInput, match=r"has no line from distortion in 1 rounds to dB; expected one that jobs/calib"):
        check_quality(config, tokenizer)
    tokenizer.quality_lines = (QualityLine("distortion", 1, 0.01, 0.1),)  # 20 dB with everything
    if threshold == "60":
        with pytest.raises(BadInput, match="filter.threshold: threshold is 60 dB .* expected at most 20 dB"):
            check_quality(config, tokenizer)
    else:
        check_quality(config, tokenizer)
