"""Bjontegaard delta rate between the run folders of two evaluations."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import BadInput
from pipeline.evaluation.compare import bd_rates, main


def evaluation(folder: Path, factor: float, points: int = 5, images: int = 30, shards: str = "5ad") -> Path:
    """A run whose rates are `factor` times those of another at the same PSNR."""
    results = {}
    for i in range(points):
        values = {"tokens_per_image": factor * 2**i, "bits_fixed": factor * 20 * 2**i, "bits_coded": 15 * 2**i}
        results |= {f"curve{i:02d}_{name}": value for name, value in {**values, "psnr": 18 + i}.items()}
    folder.mkdir()
    write_summary(folder, {"psnr": 20, "images": images, **results}, inputs={"shards": {"sha256": shards}})
    return folder


def write_summary(folder: Path, results: dict[str, Any], **values: Any) -> None:
    summary = {"stage": "evaluate", "status": "finished", "inputs": {}, "results": results, **values}
    (folder / "summary.json").write_text(json.dumps(summary))


def test_half_the_tokens_at_equal_psnr_are_minus_50_percent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = evaluation(tmp_path / "one", 1.0), evaluation(tmp_path / "other", 0.5)
    found = bd_rates(one, other)
    assert found["tokens_per_image"] == pytest.approx(-50, abs=1e-6)
    assert found["bits_coded"] == pytest.approx(0, abs=1e-6)
    assert main([str(one), str(other)]) == 0
    assert "bits_fixed        -50.0%" in capsys.readouterr().out


def test_too_few_points_are_undefined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = evaluation(tmp_path / "one", 1.0), evaluation(tmp_path / "other", 0.5, points=3)
    assert set(bd_rates(one, other).values()) == {None}
    main([str(one), str(other)])
    assert "undefined" in capsys.readouterr().out


def test_folders_without_a_curve_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadInput, match="holds no summary.json"):
        bd_rates(tmp_path, tmp_path)
    write_summary(tmp_path, {"psnr": 20})
    with pytest.raises(BadInput, match="has no curve; expected a run of jobs/evaluate.py with evaluate.thresholds"):
        bd_rates(tmp_path, tmp_path)
    assert main([str(tmp_path), str(tmp_path)]) == 2
    assert main([]) == 2
    assert "expected two run folders" in capsys.readouterr().err


def test_runs_that_measured_other_pictures_are_refused(tmp_path: Path) -> None:
    one = evaluation(tmp_path / "one", 1.0)
    with pytest.raises(BadInput, match="fewer' measured images 20; expected 30, as .*one'"):
        bd_rates(one, evaluation(tmp_path / "fewer", 1.0, images=20))
    with pytest.raises(BadInput, match="others' measured shards c0c0; expected 5ad"):
        bd_rates(one, evaluation(tmp_path / "others", 1.0, shards="c0c0"))


@pytest.mark.parametrize("text", ['{"results": {', "[]", '{"stage": "evaluate", "status": "finished"}'])
def test_a_damaged_summary_is_refused_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "summary.json").write_text(text)
    assert main([str(tmp_path), str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "summary.json' is damaged" in told
    assert told.count("\n") == 1


def test_a_curve_with_a_hole_is_refused(tmp_path: Path) -> None:
    write_summary(tmp_path, {"curve00_psnr": 20, "curve00_bits_fixed": 3, "curve01_psnr": 21})
    with pytest.raises(BadInput, match="is damaged .KeyError: 'curve01_bits_fixed'"):
        bd_rates(tmp_path, tmp_path)


def test_another_run_than_a_finished_evaluation_is_refused(tmp_path: Path) -> None:
    write_summary(tmp_path, {}, status="stopped")
    with pytest.raises(BadInput, match="holds a stopped run of 'evaluate'; expected a finished one"):
        bd_rates(tmp_path, tmp_path)
