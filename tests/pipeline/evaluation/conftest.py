"""A tiny tokenizer, made shards and random feature weights: no training, no download."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.shards import Manifest, ShardDataset, ShardWriter, Split, fingerprint
from pipeline.evaluation.evaluator import Instruments
from pipeline.evaluation.reference import Extractor
from tatok_model.config import TokenizerConfig
from tatok_model.metrics.extractors.small_networks import CompactExtractor
from tatok_model.tokenizer import TaTok

SIDE = 16  # pixels
TRAIN, HELDOUT = 20, 30  # pictures


def smooth_picture(number: int) -> np.ndarray:
    """(SIDE, SIDE, 3): a made photograph, another one for every number."""
    draw = np.random.default_rng(number)
    coarse = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def write_split(folder: Path, split: str, numbers: range) -> Split:
    """One shard with the pictures `numbers`."""
    with ShardWriter(folder, f"shards/{split}-00000.parquet") as writer:
        for number in numbers:
            file = io.BytesIO()
            Image.fromarray(smooth_picture(number)).save(file, "PNG")
            row = {"id": str(number), "image": file.getvalue(), "height": SIDE, "width": SIDE}
            writer.add({**row, "label": -1, "label_name": ""})
    assert writer.shard is not None
    return Split(len(numbers), (writer.shard,))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards with pictures in both splits."""
    folder = tmp_path_factory.mktemp("evaluation") / "shards"
    (folder / "shards").mkdir(parents=True)
    train = write_split(folder, "train", range(TRAIN))
    heldout = write_split(folder, "heldout", range(1000, 1000 + HELDOUT))
    splits = {"train": train, "heldout": heldout}
    config = {"image_size": SIDE, "encoding": "png", "quality": 95}
    manifest = Manifest(SIDE, config, "made", (), splits, 0, fingerprint(splits))
    (folder / "manifest.json").write_text(json.dumps(manifest.to_dict()))
    return folder


@pytest.fixture(scope="session")
def heldout(shards: Path) -> ShardDataset:
    return ShardDataset(shards, "heldout")


@pytest.fixture(scope="session")
def tokenizer() -> TaTok:
    """Untrained. FSQ: a VQ codebook would be made from the first batch it sees."""
    torch.manual_seed(0)
    config = TokenizerConfig(SIDE, 4, global_tokens=2, quantizer="fsq", codebook_size=16, fsq_levels=(4, 4))
    return TaTok(config).eval()


@pytest.fixture(scope="session")
def extractor() -> Extractor:
    """The compact network with random weights."""
    torch.manual_seed(1)
    network = CompactExtractor()
    network.name = "compact_cifar10"
    return Extractor(network.eval().requires_grad_(False), "made")


@pytest.fixture(scope="session")
def instruments(extractor: Extractor) -> Instruments:
    return Instruments(extractor.network)
