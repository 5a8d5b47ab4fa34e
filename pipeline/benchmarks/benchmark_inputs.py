"""Pictures for a benchmark: those that the configuration names, else photographs that are made for the run."""

import dataclasses
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pipeline.core.config import Config, DataConfig
from pipeline.core.inputs import with_shards
from pipeline.core.run import Run
from pipeline.data import preprocess
from pipeline.data.checks import check_pictures
from pipeline.data.samples import PHOTOGRAPHS, photograph_files
from pipeline.data.shards import read_manifest

if TYPE_CHECKING:  # torch is imported inside functions: `check` answers without it
    from tatok_model.tokenizer import TaTok

# JPEG files of 500x375 pixels, the size of a usual ImageNet picture, cut from the photographs inside scikit-image.

WIDTH, HEIGHT = 500, 375
DISTINCT = 512  # different files; further ones are links to these: who reads them has the same work to do


def make_photographs(folder: Path, count: int) -> list[Path]:
    """`count` files 000000.jpg, 000001.jpg, ... in a new folder, in the order of their names.

    Raises:
        BadInput: scikit-image is not installed, or without one of its photographs.
    """
    folder.mkdir(parents=True)
    files = [folder / f"{number:06d}.jpg" for number in range(count)]
    with ThreadPoolExecutor() as threads:
        for path, data in zip(files, threads.map(photograph, range(min(count, DISTINCT))), strict=False):
            path.write_bytes(data)
    for path, first in zip(files[DISTINCT:], _forever(files[:DISTINCT]), strict=False):
        os.link(first, path)
    return files


def photograph(number: int) -> bytes:
    """One such file."""
    random = np.random.default_rng([0, number])
    whole = _open(sorted(PHOTOGRAPHS)[number % len(PHOTOGRAPHS)])
    width = random.uniform(0.8, 1) * min(whole.width, whole.height * WIDTH / HEIGHT)
    height = width * HEIGHT / WIDTH
    left, top = random.uniform(0, whole.width - width), random.uniform(0, whole.height - height)
    box = (left, top, left + width, top + height)
    picture = whole.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=box)
    if random.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=int(random.integers(85, 97)))
    return file.getvalue()


@lru_cache(maxsize=len(PHOTOGRAPHS))
def _open(name: str) -> Image.Image:
    with Image.open(photograph_files()[name]) as picture:
        return picture.convert("RGB")


def _forever(files: list[Path]) -> Iterator[Path]:
    while files:
        yield from files


def names_pictures(config: Config) -> bool:
    """Whether there are shards or a source."""
    return bool(config.data.shards or config.data.source)


def check_named(config: Config) -> None:
    """Refuse pictures that cannot be used.

    Raises:
        BadInput: as `check_pictures`; none are named and there are no photographs to make them of.
    """
    if names_pictures(config):
        check_pictures(config)
    else:
        photograph_files()


def take_pictures(run: Run, folder: Path, heldout_fraction: float) -> None:
    """Give the run `data.shards`, and say in its inputs what they are.

    Args:
        run: of the benchmark.
        folder: a new one, for the photographs and shards that are made where no pictures are named.
        heldout_fraction: of what is made.
    """
    if names_pictures(run.config):
        run.config = with_shards(run.config)
    else:
        make_photographs(folder / "photographs", run.config.benchmark.pictures)
        changes: dict[str, Any] = {"source": str(folder / "photographs"), "heldout_source": ""}
        data = dataclasses.replace(run.config.data, **changes, heldout_fraction=heldout_fraction)
        shards = make_shards(run.config, data, folder / "shards")
        run.config = dataclasses.replace(run.config, data=dataclasses.replace(data, shards=str(shards)))
    place = run.config.data.shards
    run.inputs["shards"] = {"path": place, "sha256": read_manifest(place).fingerprint}


def make_shards(config: Config, data: DataConfig, folder: Path) -> Path:
    """Run the preprocess stage in a new run folder; gives that folder back.

    Args:
        config: of the run that asks.
        data: what to preprocess, and how.
        folder: for the shards.
    """
    return run_quietly("preprocess", preprocess, dataclasses.replace(config, data=data), folder)


def run_quietly(name: str, stage: Any, config: Config, folder: Path) -> Path:
    """Run a stage in a new run folder, without a word; gives that folder back.

    Args:
        name: of the stage.
        stage: its module.
        config: that it takes.
        folder: of its run.
    """
    place = dataclasses.replace(config.run, output=str(folder.parent), name=folder.name)
    quiet = dataclasses.replace(config, run=place, tracking=dataclasses.replace(config.tracking, uri=""))
    run = Run.open(name, quiet, folder.name, resume=False)
    try:
        with redirect_stderr(io.StringIO()):  # what it says is not for the reader of a benchmark
            stage.run(run)
    finally:
        run.close()
    return folder


# The tokenizer that a benchmark times.


def tokenizer_of(run: Run) -> "TaTok":
    """The trained one where the configuration names it, which is said in the run's inputs, else one of fresh weights.

    Raises:
        BadInput: the checkpoint cannot be used.
    """
    import torch

    from pipeline.core.checkpoints import load_tokenizer
    from tatok_model.tokenizer import TaTok

    section = run.config.tokenizer
    if section.checkpoint:
        tokenizer, sha256 = load_tokenizer(run.config)
        run.inputs["tokenizer"] = {"path": section.checkpoint, "sha256": sha256}
    else:
        torch.manual_seed(0)
        tokenizer = TaTok(section.architecture())
    return tokenizer.eval()
