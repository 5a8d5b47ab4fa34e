"""A tiny tokenizer with an entropy model and made shards of three classes: no training, no download."""

import io
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.core.presets import load_config
from pipeline.core.run import Run
from pipeline.data.shards import Manifest, ShardWriter, write_manifest
from pipeline.tokens import detokenize, token_manifest, tokenize
from pipeline.tokens.token_manifest import Stream
from tatok_model.config import TokenizerConfig
from tatok_model.tokenizer import TaTok

SIDE = 16  # pixels
TRAIN, HELDOUT = 21, 10  # pictures
CLASSES = ("ant", "bee", "cow")
SHAPE = {"patch_size": 4, "global_tokens": 2, "quantizer": "fsq", "codebook_size": 16}
STAGES: dict[str, ModuleType] = {"tokenize_images": tokenize, "detokenize": detokenize}


def smooth_picture(number: int) -> np.ndarray:
    """(SIDE, SIDE, 3): a made photograph, another one for every number."""
    coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def row_of(number: int) -> dict[str, Any]:
    """Of a shard; every fourth has no label."""
    file = io.BytesIO()
    Image.fromarray(smooth_picture(number)).save(file, "PNG")
    label = number % 4 if number % 4 < 3 else -1
    row = {"id": str(number), "image": file.getvalue(), "height": SIDE, "width": SIDE, "label": label}
    return {**row, "label_name": CLASSES[label] if label >= 0 else ""}


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards with pictures in both splits."""
    folder = tmp_path_factory.mktemp("tokenizing") / "shards"
    (folder / "shards").mkdir(parents=True)
    numbers = {"train": range(TRAIN), "heldout": range(1000, 1000 + HELDOUT)}
    shards = [
        (split, ShardWriter.write(folder, f"shards/{split}-00000.parquet", map(row_of, numbers[split])))
        for split in numbers
    ]
    config = {"image_size": SIDE, "encoding": "png", "quality": 95}
    write_manifest(folder, Manifest.of(SIDE, config, "made", CLASSES, shards))
    return folder


def made_tokenizer(seed: int = 0, **changes: object) -> TaTok:
    """Untrained. FSQ: a VQ codebook would be made from the first batch it sees."""
    torch.manual_seed(seed)
    config = TokenizerConfig(SIDE, fsq_levels=(4, 4), **{**SHAPE, **changes})  # type: ignore[arg-type]
    tokenizer = TaTok(config).eval()
    if tokenizer.entropy_model is not None:
        torch.nn.init.normal_(tokenizer.fill_gate)  # else no picture would depend on the entropy model
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> TaTok:
    return made_tokenizer()


@pytest.fixture(scope="session")
def checkpoint(tokenizer: TaTok, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizing") / "checkpoint"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def new_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`new_tokenizer(seed, key=value)`: the checkpoint folder of another one."""

    def make(seed: int = 0, **changes: object) -> Path:
        folder = tmp_path_factory.mktemp("other") / "checkpoint"
        made_tokenizer(seed, **changes).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def stream() -> Stream:
    """Of the tiny tokenizer's shape."""
    return Stream("distortion", 1, "0" * 64, global_tokens=2, patch_positions=16, codebook_size=16, image_size=SIDE,
                  patch_size=4)  # fmt: skip


@pytest.fixture
def overrides(tmp_path: Path, shards: Path, checkpoint: Path) -> list[str]:
    """Of the smoke preset, for the made tokenizer and pictures."""
    shape = [f"tokenizer.{key}={value}" for key, value in SHAPE.items()]
    shape += ["tokenizer.codebook_dim=16", "tokenizer.fsq_levels=[4,4]", f"data.image_size={SIDE}"]
    places = [f"run.output={tmp_path}/runs", f"data.shards={shards}", f"tokenizer.checkpoint={checkpoint}"]
    return [*shape, *places, "tracking.uri=", "tokens.batch_size=4"]


@pytest.fixture
def finished(carry_out: Any, overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """`finished("tokenize_images", "name", "section.key=value")` checks and runs a stage; returns the closed run."""
    monkeypatch.setattr(token_manifest, "RANGE_ROWS", 8)  # three ranges of the 21 pictures, two of the 10

    def finish(kind: str, name: str, *more: str, **options: bool) -> Run:
        return carry_out(kind, STAGES[kind], load_config("smoke", [*overrides, *more]), name, **options)

    return finish
