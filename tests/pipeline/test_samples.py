"""Tiles of the photographs in scikit-image."""

import importlib.util
import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pipeline.core.errors import BadInput
from pipeline.data import samples


def test_tiles_are_many_and_all_different() -> None:
    names = samples.list_tiles(32)
    assert len(names) > 2000
    assert len(set(names)) == len(names)
    assert len({samples.read_tile(name, 32) for name in names}) == len(names)


def test_every_photograph_gives_tiles_up_to_256_pixels() -> None:
    for size in (32, 256):
        assert {name.split("/")[0] for name in samples.list_tiles(size)} == set(samples.PHOTOGRAPHS)


def test_a_tile_is_the_part_of_the_photograph_that_its_name_says() -> None:
    data = samples.read_tile("cat/002-003.png", 64)
    with Image.open(samples.photograph_files()["cat"]) as photograph, Image.open(io.BytesIO(data)) as tile:
        assert np.array_equal(np.asarray(tile), np.asarray(photograph.convert("RGB"))[128:192, 192:256])
    assert data == samples.read_tile("cat/002-003.png", 64)


def test_flat_tiles_are_left_out() -> None:
    assert "retina/000-000.png" not in samples.list_tiles(32)  # black
    for name in samples.list_tiles(64)[::50]:
        with Image.open(io.BytesIO(samples.read_tile(name, 64))) as tile:
            assert max(high - low for low, high in tile.getextrema()) >= samples.LEAST_RANGE


def test_tiles_larger_than_the_photographs_are_refused() -> None:
    with pytest.raises(BadInput, match="data.image_size 1412; expected at most 1411 pixels"):
        samples.list_tiles(1412)
    assert samples.list_tiles(1411)


def test_a_missing_scikit_image_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="needs scikit-image; expected it to be installed"):
        samples.photograph_files()


def test_a_scikit_image_without_the_photographs_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)
    with pytest.raises(BadInput, match=r"has no astronaut.png; expected scikit-image>=0.25"):
        samples.photograph_files()
