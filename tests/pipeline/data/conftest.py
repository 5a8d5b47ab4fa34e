"""Pictures and folders of pictures for the tests of sources and of the stage."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def _picture(number: int, size: int = 16, encoding: str = "PNG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, encoding)
    return file.getvalue()


@pytest.fixture(scope="session")
def picture_bytes() -> Callable[..., bytes]:
    """`picture_bytes(number, size=16, encoding="PNG")`: another picture for every number."""
    return _picture


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    """Two classes of three pictures, and files that are none."""
    folder = tmp_path / "classes"
    for label, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for number in range(3):
            (folder / name / f"{number}.png").write_bytes(_picture(10 * label + number))
    (folder / "README.txt").write_text("no picture")
    (folder / "dog" / ".hidden.png").write_bytes(b"")
    return folder
