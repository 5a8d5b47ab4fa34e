"""A tiny tokenizer, made shards and random feature weights: no training, no download."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.core.config import Config
from pipeline.core.presets import load_config
from pipeline.core.run import Run
from pipeline.data.shards import Manifest, ShardDataset, ShardWriter, Split, fingerprint
from pipeline.evaluation.evaluator import Instruments
from pipeline.evaluation.reference import Extractor
from tatok_model.config import TokenizerConfig
from tatok_model.metrics.extractors.extractor import CIFAR10
from tatok_model.metrics.extractors.small_networks import CompactExtractor
from tatok_model.tokenizer import TaTok

SIDE = 16  # pixels
TRAIN, HELDOUT = 20, 30  # pictures


def write_shards(folder: Path, splits: dict[str, range], side: int, classes: tuple[str, ...] = ()) -> Path:
    """One shard a split of made photographs, another one for every number, of the classes in turn."""
    (folder / "shards").mkdir(parents=True)
    written = {}
    for split, numbers in splits.items():
        with ShardWriter(folder, f"shards/{split}-00000.parquet") as writer:
            for number in numbers:
                coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
                file = io.BytesIO()
                Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(file, "PNG")
                label = number % len(classes) if classes else -1
                names = {"id": f"{split}/{number}", "label": label, "label_name": classes[label] if classes else ""}
                writer.add({**names, "image": file.getvalue(), "height": side, "width": side})
        assert writer.shard is not None
        written[split] = Split(len(numbers), (writer.shard,))
    config = {"image_size": side, "encoding": "png", "quality": 95}
    manifest = Manifest(side, config, "made", classes, written, 0, fingerprint(written))
    (folder / "manifest.json").write_text(json.dumps(manifest.to_dict()))
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards with pictures in both splits."""
    splits = {"train": range(TRAIN), "heldout": range(1000, 1000 + HELDOUT)}
    return write_shards(tmp_path_factory.mktemp("evaluation") / "shards", splits, SIDE)


@pytest.fixture(scope="session")
def classified_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of ten classes, 32 pixels a side."""
    splits = {"train": range(24), "heldout": range(1000, 1020)}
    return write_shards(tmp_path_factory.mktemp("classified") / "shards", splits, 32, CIFAR10)


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
def configure(shards: Path) -> Callable[..., Config]:
    """`configure("section.key=value")`: the shape of `tokenizer`, nothing tracked, the pictures of `shards`."""
    shape = [f"data.image_size={SIDE}", f"data.shards={shards}", "tracking.uri=", "tokenizer.patch_size=4"]
    shape += ["tokenizer.global_tokens=2", "tokenizer.quantizer=fsq", "tokenizer.codebook_size=16"]
    shape += ["tokenizer.codebook_dim=16", "tokenizer.fsq_levels=[4,4]"]
    return lambda *overrides: load_config("smoke", [*shape, *overrides])


@pytest.fixture
def opened(tmp_path: Path, tokenizer: TaTok, configure: Callable[..., Config]) -> Iterator[Callable[..., Run]]:
    """`opened("evaluate", "section.key=value")` makes a run of a stage that has not begun, of the saved tokenizer."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    places = [f"run.output={tmp_path}", f"tokenizer.checkpoint={tmp_path / 'tokenizer'}"]
    runs: list[Run] = []

    def make(stage: str, *overrides: str) -> Run:
        runs.append(Run.open(stage, configure(*places, *overrides), f"run-{len(runs)}", resume=False))
        return runs[-1]

    yield make
    for run in runs:
        run.close()


@pytest.fixture(scope="session")
def extractor() -> Extractor:
    """The compact network with random weights."""
    torch.manual_seed(1)
    network = CompactExtractor()
    network.name = "compact_cifar10"
    return Extractor(network.eval().requires_grad_(False), "made")


@pytest.fixture(scope="session")
def instruments(extractor: Extractor) -> Instruments:
    return Instruments((extractor.network,))
