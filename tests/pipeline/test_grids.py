import numpy as np
import pytest
from PIL import Image

from pipeline.core.plots import GAP, save_rows


def test_rows_lie_below_one_another_enlarged_without_smoothing(tmp_path):
    dark, light = (np.full((3, 32, 32, 3), value, dtype=np.uint8) for value in (10, 200))
    save_rows(tmp_path / "deep" / "grid.png", [dark, light])
    picture = np.asarray(Image.open(tmp_path / "deep" / "grid.png"))
    assert picture.shape == (2 * 96 + GAP, 3 * 96 + 2 * GAP, 3)
    assert (picture[:96, :96] == 10).all()
    assert (picture[-96:, -96:] == 200).all()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["grid.png"]


def test_rows_that_differ_in_shape_are_refused(tmp_path):
    row = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="expected equal"):
        save_rows(tmp_path / "grid.png", [row, row[:1]])
    with pytest.raises(ValueError, match="expected equal"):
        save_rows(tmp_path / "grid.png", [])
