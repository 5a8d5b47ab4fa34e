"""The stage as a whole."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.core.errors import BadInput, Stopped
from pipeline.evaluation import evaluate, measurements
from tatok_model.tokenizer import TaTok

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # Ray Data's own old settings

RATES = (
    "encode_images_per_second",
    "rank_images_per_second",
    "decode_images_per_second",
    "images_per_second",
    "baseline_kmeans_fit_seconds",
)


@pytest.fixture
def evaluation(opened: Any) -> Any:
    """`evaluation("evaluate.key=value")` makes a run of the stage that has not begun."""
    return lambda *overrides: opened("evaluate", "evaluate.batch_size=4", *overrides)


@pytest.mark.slow
def test_one_worker_in_this_process_and_two_actors_find_the_same_to_the_last_bit(
    ray_session: ModuleType, evaluation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurements, "NARROW", 8)  # four ranges of the 30 pictures
    found = []
    for workers in (1, 2):
        run = evaluation(f"evaluate.num_workers={workers}", "evaluate.baselines=[kmeans]")
        evaluate.run(run)
        found.append({name: value for name, value in run.results.items() if name not in RATES})
        assert ("reference" in run.outputs, "reference" in run.inputs) == (workers == 1, workers == 2), "cached"
    assert found[0] == found[1]
    assert found[0]["images"] == 30
    assert found[0]["baseline_kmeans_bits_per_image"] <= found[0]["bits_fixed"] == 72
    line = json.loads((run.folder / "metrics.jsonl").read_text())
    assert line["metrics"] == run.results
    with Image.open(run.outputs["reconstructions"]) as picture:
        assert np.asarray(picture).shape[1] > np.asarray(picture).shape[0], "eight pictures in two rows"
    assert "| rfd_compact_cifar10 |" in Path(run.outputs["report"]).read_text()


@pytest.mark.parametrize(
    ("cut", "share"),
    [
        (["filter.threshold=1e9"], "0.0%"),
        (["filter.threshold=1e-9"], "100.0%"),
        (["filter.threshold=0", "evaluate.thresholds=[1e9,2e9]"], "0.0%"),
        (["filter.threshold=0"], None),  # everything on purpose
        (
            ["filter.rule=relative", "filter.threshold=1", "evaluate.thresholds=[0.999999999,0.5]"],
            None,
        ),  # a curve's end
    ],
)
def test_a_threshold_that_keeps_nothing_or_everything_is_warned_of(
    evaluation: Any, capsys: pytest.CaptureFixture[str], cut: list[str], share: str | None
) -> None:
    run = evaluation("filter.rule=marginal", *cut)
    evaluate.run(run)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: filter.threshold")]
    assert len(told) == (share is not None)
    assert not told or f"keeps {share} of the patch tokens of 30 pictures; expected one between" in told[0]
    report = Path(run.outputs["report"]).read_text()
    assert ("filter.threshold 1e" in report) == bool(told)


def test_a_curve_is_measured_from_one_ranking(evaluation: Any) -> None:
    cut = ["filter.rule=count", "filter.threshold=8", "evaluate.thresholds=[4,8,16]", "evaluate.baselines=[jpeg]"]
    run = evaluation(*cut)
    evaluate.run(run)
    found = run.results
    assert [found[f"curve{number:02d}_tokens_per_image"] for number in range(3)] == [6, 10, 18]
    for name in ("psnr", "bits_fixed", "bits_coded", "rfd_compact_cifar10"):
        assert found[name] == found[f"curve01_{name}"], "the operating point is one of the curve"
        assert found[f"all_{name}"] == pytest.approx(found[f"curve02_{name}"], abs=1e-6)
    assert found["curve00_bits_fixed"] == pytest.approx(6 * 4 + math.log2(math.comb(16, 4)))
    assert found["baseline_jpeg_curve02_bits_per_image"] >= found["baseline_jpeg_curve00_bits_per_image"] > 0
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    curve = {line["step"]: line["metrics"] for line in lines if "curve/psnr" in line["metrics"]}
    assert [curve[step].get("curve/threshold") for step in range(4)] == [4, 8, 16, None]
    images = pq.read_table(run.outputs["images"]).to_pylist()
    assert len(images) == 30
    assert {image["operating_tokens"] for image in images} == {10}
    assert np.mean([image["operating_psnr"] for image in images]) == pytest.approx(found["psnr"])
    assert all(image["png_bytes"] > 0 and image["total_score"] > 0 for image in images)
    assert "| count 4 |" in Path(run.outputs["report"]).read_text()
    for name in ("rate_distortion", "token_histogram", "kept_patches", "reconstructions"):
        with Image.open(run.outputs[name]) as picture:
            assert min(picture.size) > 50


def test_counts_of_global_tokens_are_cut_where_there_are_no_patch_tokens(
    evaluation: Any, tokenizer: TaTok, tmp_path: Path
) -> None:
    TaTok(replace(tokenizer.config, patch_tokens=False)).save_pretrained(tmp_path / "global")
    only = ["tokenizer.patch_tokens=false", f"tokenizer.checkpoint={tmp_path / 'global'}"]
    run = evaluation(*only, "filter.rule=count", "filter.threshold=2", "evaluate.thresholds=[1,2]")
    evaluate.run(run)
    assert [run.results[f"curve0{number}_tokens_per_image"] for number in range(2)] == [1, 2]
    assert run.results["curve00_bits_coded"] == run.results["curve00_bits_fixed"] == 4
    assert "all_psnr" not in run.results


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["filter.rule=count", "filter.threshold=3"],
            "filter.threshold has 3; expected a whole number from 1 to 2, the global",
        ),
        (
            ["filter.rule=count", "filter.threshold=2", "evaluate.thresholds=[1.5]"],
            "evaluate.thresholds has 1.5; expected",
        ),
        (["evaluate.thresholds=[0.5]"], "filter.rule is 'relative' without patch tokens; expected count"),
    ],
)
def test_cuts_that_global_tokens_do_not_have_are_refused(evaluation: Any, overrides: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        evaluate.check(evaluation("tokenizer.patch_tokens=false", *overrides).config)


def test_a_ranking_without_an_entropy_model_is_refused(evaluation: Any) -> None:
    cut = ["tokenizer.entropy_layers=0", "filter.threshold=0.5"]
    with pytest.raises(BadInput, match=r"filter\.score is 'distortion' with tokenizer\.entropy_layers 0"):
        evaluate.check(evaluation(*cut).config)


def test_an_evaluation_that_is_asked_to_stop_stops(evaluation: Any) -> None:
    run = evaluation()
    run.request_stop()
    with pytest.raises(Stopped, match="asked to stop"):
        evaluate.run(run)
