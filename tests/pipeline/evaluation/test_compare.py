"""Bjontegaard delta rate between the run folders of two evaluations."""

import json
from pathlib import Path

import pytest

from pipeline.errors import BadInput
from pipeline.evaluation.compare import bd_rates, main


def evaluation(folder: Path, factor: float, points: int = 5) -> Path:
    """A run whose rates are `factor` times those of another at the same PSNR."""
    results = {}
    for i in range(points):
        values = {"tokens_per_image": factor * 2**i, "bits_fixed": factor * 20 * 2**i, "bits_coded": 15 * 2**i}
        results |= {f"curve{i:02d}_{name}": value for name, value in {**values, "psnr": 18 + i}.items()}
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"results": {"psnr": 20, **results}}))
    return folder


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
    (tmp_path / "summary.json").write_text('{"results": {"psnr": 20}}')
    with pytest.raises(BadInput, match="has no curve; expected a run of jobs/evaluate.py with evaluate.thresholds"):
        bd_rates(tmp_path, tmp_path)
    assert main([str(tmp_path), str(tmp_path)]) == 2
    assert main([]) == 2
    assert "expected two run folders" in capsys.readouterr().err
