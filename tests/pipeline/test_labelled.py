import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.core.config import DataConfig
from pipeline.core.errors import BadInput
from pipeline.training.extractor_training import Labelled, augment, read_labelled


def png(side: int = 32, colour: tuple[int, int, int] = (200, 30, 90)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, **columns: Any) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def read(path: str) -> Labelled:
    return read_labelled(path, DataConfig(), classes=10)


def test_pictures_and_labels_keep_their_order(tmp_path: Path) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    path = write(tmp_path / "a.parquet", image=[png(colour=c) for c in colours], label=[4, 0, 9])
    pictures = read(path)
    assert pictures.images.shape == (3, 32, 32, 3)
    assert pictures.images[:, 16, 16].tolist() == [list(c) for c in colours]
    assert pictures.labels.tolist() == [4, 0, 9]
    assert pictures.take(torch.tensor([2, 0])).labels.tolist() == [9, 4]


def test_a_struct_with_bytes_is_a_picture_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", image=[{"bytes": png(), "path": "x.png"}], label=[1])
    assert read(path).images[0, 0, 0].tolist() == [200, 30, 90]


def test_pictures_of_another_size_are_resized(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.parquet", image=[png(48)], label=[1])).images.shape == (1, 32, 32, 3)


def test_a_file_that_is_not_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("text")
    with pytest.raises(BadInput, match=r"a\.parquet' cannot be read as Parquet"):
        read(str(tmp_path / "a.parquet"))


CLASSES = r"expected data\.label_column to hold classes from 0"


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"photo": [png()], "label": [1]}, r"no column 'image'; expected data\.image_column to be one of photo, label"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int32())}, "has no rows"),
        ({"image": [png()]}, r"row 0 of .* has the label None; expected data\.label_column to hold classes"),
        *(
            ({"image": [png(), png()], "label": [3, no]}, f"row 1 of .* label {no}; {CLASSES} to 9")
            for no in (10, -1, None)
        ),
        *(
            ({"image": [png(), no], "label": [3, 3]}, "row 1 of .* is not a usable picture")
            for no in (b"not a picture", None, png()[:60])
        ),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, columns: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        read(write(tmp_path / "a.parquet", **columns))


def test_without_a_number_of_classes_labels_tell_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", image=[png(), png()], label=[199, 3])
    assert read_labelled(path, DataConfig()).classes == 200
    with pytest.raises(BadInput, match=rf"has the label -1; {CLASSES}$"):
        read_labelled(write(tmp_path / "b.parquet", image=[png()], label=[-1]), DataConfig())


def test_augmentation_only_shifts_and_mirrors_with_reflected_borders() -> None:
    """Every pixel holds its own coordinates, so that the result tells where it came from."""
    rows, columns = np.mgrid[0:32, 0:32]
    coordinates = torch.from_numpy(np.stack([rows, columns, columns], axis=-1).astype(np.uint8))
    images = augment(coordinates.expand(200, 32, 32, 3), torch.Generator().manual_seed(0))
    padded = np.pad(np.arange(32), 4, mode="reflect")
    shifted = [padded[start : start + 32].tolist() for start in range(9)]
    mirrored = [line[::-1] for line in shifted]
    seen_rows = {tuple(image[:, 0, 0].tolist()) for image in images}
    seen_columns = {tuple(image[0, :, 1].tolist()) for image in images}
    assert seen_rows == set(map(tuple, shifted))
    assert seen_columns == set(map(tuple, shifted + mirrored))


def test_augmentation_depends_on_the_generator_alone() -> None:
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    first, again, other = (augment(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
