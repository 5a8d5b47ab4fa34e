"""Shards and their manifest: writing, reading back, refusing what is not ours."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.core.errors import BadInput
from pipeline.core.presets import load_config
from pipeline.data.shards import (
    CACHED_GROUPS,
    ROW_GROUP_ROWS,
    Manifest,
    ShardDataset,
    ShardWriter,
    check_shards,
    read_manifest,
    write_manifest,
)

SIZE = 8


def picture_of(number: int) -> np.ndarray:
    """(SIZE, SIZE, 3): another one for every number."""
    return np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def rows_of(numbers: range) -> list[dict[str, Any]]:
    rows = []
    for number in numbers:
        file = io.BytesIO()
        Image.fromarray(picture_of(number)).save(file, "PNG")
        label = number % 2
        rows.append(
            {"id": f"{number}.png", "image": file.getvalue(), "height": SIZE, "width": SIZE, "label": label}
            | {"label_name": ("cat", "dog")[label]}
        )
    return rows


def write_folder(folder: Path, shard_rows: list[int]) -> Path:
    """A folder of shards with the pictures 0, 1, 2, ... in `train`; `heldout` is empty."""
    (folder / "shards").mkdir(parents=True)
    shards = []
    for number, (rows, end) in enumerate(zip(shard_rows, np.cumsum(shard_rows).tolist(), strict=True)):
        made = ShardWriter.write(folder, f"shards/train-{number:05d}.parquet", rows_of(range(end - rows, end)))
        shards.append(("train", made))
    write_manifest(folder, Manifest.of(SIZE, {}, "source", ("cat", "dog"), shards))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards; the second has several row groups."""
    return write_folder(tmp_path_factory.mktemp("data") / "set", [10, 3 * ROW_GROUP_ROWS + 5])


@pytest.mark.parametrize("memory_bytes", [0, 2**30])
def test_pictures_labels_and_ids_come_back_in_the_order_asked_for(folder: Path, memory_bytes: int) -> None:
    dataset = ShardDataset(folder, "train", memory_bytes)
    last = len(dataset) - 1
    wanted = [last, 3, 10, 9, 3, 70, 0]
    images = dataset.images(wanted)
    assert images.shape == (7, SIZE, SIZE, 3)
    assert images.dtype == np.uint8
    for image, number in zip(images, wanted, strict=True):
        assert np.array_equal(image, picture_of(number))
    assert dataset.labels(wanted).tolist() == [number % 2 for number in wanted]
    assert dataset.ids(wanted) == [f"{number}.png" for number in wanted]


def test_length_is_the_number_of_rows_of_all_shards(folder: Path) -> None:
    assert len(ShardDataset(folder, "train")) == 15 + 3 * ROW_GROUP_ROWS
    empty = ShardDataset(folder, "heldout")
    assert len(empty) == 0
    assert empty.images([]).shape == (0, SIZE, SIZE, 3)
    assert empty.ids([]) == []
    assert empty.labels([]).shape == (0,)


def test_a_url_reads_like_a_path(folder: Path) -> None:
    dataset = ShardDataset(f"file://{folder}", "train", memory_bytes=0)
    assert np.array_equal(dataset.images([42])[0], picture_of(42))


def test_only_the_last_few_row_groups_are_kept(tmp_path: Path) -> None:
    rows = (CACHED_GROUPS + 3) * ROW_GROUP_ROWS
    dataset = ShardDataset(write_folder(tmp_path / "set", [rows]), "train", memory_bytes=0)
    assert dataset.encoded(range(rows)) == [row["image"] for row in rows_of(range(rows))]
    assert len(dataset._groups) == CACHED_GROUPS


def test_a_shard_that_fails_half_way_or_has_no_rows_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "a.parquet") as broken:
        for row in rows_of(range(ROW_GROUP_ROWS + 1)):
            broken.add(row)
        raise RuntimeError
    with ShardWriter(tmp_path, "b.parquet") as empty:
        pass
    assert broken.shard is None
    assert empty.shard is None
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_reads_back_as_it_was_written(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest.classes == ("cat", "dog")
    assert json.loads((folder / "manifest.json").read_text()) == json.loads(json.dumps(manifest.to_dict()))


def _without(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda values: json.dumps({name: value for name, value in values.items() if name != key})


def _with(**changes: Any) -> Callable[[dict[str, Any]], str]:
    return lambda values: json.dumps(values | changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: "{", "cannot be read"),
        (lambda values: "[]", "is not of format 'tatok-shards'"),
        (_with(format="other"), "is not of format 'tatok-shards'"),
        (_with(version=99), "has version 99; expected 1"),
        (_without("classes"), "is damaged"),
        (_with(image_size="big"), "is damaged"),
        (_with(fingerprint="0"), "its fingerprint does not match"),
    ],
)
def test_a_damaged_or_foreign_manifest_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], str], message: str
) -> None:
    folder = write_folder(tmp_path / "set", [2])
    path = folder / "manifest.json"
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(BadInput, match=message):
        read_manifest(folder)


def test_a_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no manifest.json; expected a folder written by"):
        read_manifest(tmp_path)


def test_an_unknown_split_is_refused(folder: Path) -> None:
    with pytest.raises(BadInput, match="split 'test' is not in .*; expected train or heldout"):
        ShardDataset(folder, "test")


def test_a_missing_or_damaged_or_exchanged_shard_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", [4, 4])
    shard = folder / "shards/train-00001.parquet"
    ShardWriter.write(folder, "shards/train-00001.parquet", rows_of(range(3)))
    with pytest.raises(BadInput, match="has 3 rows; expected 4"):
        ShardDataset(folder, "train").images([5])
    shard.write_bytes(b"no Parquet")
    with pytest.raises(BadInput, match="cannot be read"):
        ShardDataset(folder, "train").images([5])
    shard.unlink()
    with pytest.raises(BadInput, match="is missing; expected what manifest.json lists"):
        ShardDataset(folder, "train")


@pytest.mark.parametrize("index", [-1, 10**6])
def test_a_number_outside_the_split_is_refused(folder: Path, index: int) -> None:
    dataset = ShardDataset(folder, "train")
    for read in (dataset.images, dataset.labels, dataset.ids):
        with pytest.raises(IndexError, match=f"expected 0 to {len(dataset) - 1}"):
            read([index])


def test_shards_of_another_image_size_are_refused(folder: Path) -> None:
    check_shards(load_config("smoke"))
    check_shards(load_config("smoke", [f"data.shards={folder}", "data.image_size=8"]))
    with pytest.raises(BadInput, match="were made for image size 8; expected data.image_size, 32"):
        check_shards(load_config("smoke", [f"data.shards={folder}"]))
