"""Made token streams of three classes and the tokenizer that could have made them: no pictures, no download."""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.core.config import Config
from pipeline.core.files import sha256_file
from pipeline.core.presets import load_config
from pipeline.core.run import Run
from pipeline.tokens.stream import to_parquet, to_table
from pipeline.tokens.token_manifest import Stream, TokenFile, TokenManifest, TokenSplit, fingerprint
from tatok_model.config import TokenizerConfig
from tatok_model.tokenizer import TaTok
from tatok_model.tokens import Ranking, Tokens

SIDE, M, N, K = 16, 2, 16, 16  # pixels, global tokens, patch positions, codebook entries
CLASSES = ("ant", "bee", "cow")
TRAIN, HELDOUT = 48, 12  # rows
SHAPE = {"patch_size": 4, "global_tokens": M, "quantizer": "fsq", "codebook_size": K}

WriteStream = Callable[..., Path]


def made_tokens(rows: int, seed: int, patch_tokens: bool = True) -> Tokens:
    """Random tokens whose scores fall along the ranking, some faster than others."""
    random = torch.Generator().manual_seed(seed)
    globals_ = torch.randint(K, (rows, M), generator=random)
    patches = torch.randint(K, (rows, N), generator=random)
    if not patch_tokens:
        return Tokens(globals_, torch.zeros_like(patches), torch.zeros(rows, N, dtype=torch.bool))
    order = torch.rand(rows, N, generator=random).argsort(1)
    steep = torch.rand(rows, 1, generator=random) * 0.5
    units = (64 * 4096 * torch.exp(-steep * torch.arange(N))).long()
    return Tokens(globals_, patches, torch.ones(rows, N, dtype=torch.bool), Ranking(order, units, "distortion", 1))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of an untrained tokenizer."""
    folder = tmp_path_factory.mktemp("generating") / "tokenizer"
    torch.manual_seed(0)
    TaTok(TokenizerConfig(SIDE, fsq_levels=(4, 4), **SHAPE)).save_pretrained(folder)  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="session")
def write_stream(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> WriteStream:
    """`write_stream(train=Tokens, ...)` writes a stream in files of 20 rows; returns its folder.

    Row i of a split has label i mod 3, every seventh none.
    """

    def write(
        train: Tokens | None = None,
        heldout: Tokens | None = None,
        classes: tuple[str, ...] = CLASSES,
        labels: Callable[[int], int] = lambda row: -1 if row % 7 == 6 else row % 3,
        **changes: Any,
    ) -> Path:
        folder = tmp_path_factory.mktemp("generating") / "tokens"
        (folder / "tokens").mkdir(parents=True)
        found = {"train": made_tokens(TRAIN, 0) if train is None else train}
        found["heldout"] = made_tokens(HELDOUT, 1) if heldout is None else heldout
        ranked = found["train"].ranking is not None
        sha256 = sha256_file(tokenizer_folder / "model.safetensors")
        facts = {"score": "distortion" if ranked else "", "rounds": int(ranked), "tokenizer_sha256": sha256}
        sizes = {"global_tokens": M, "patch_positions": N, "codebook_size": K, "image_size": SIDE, "patch_size": 4}
        stream = Stream(**{**facts, **sizes, **changes})
        splits = {}
        for split, tokens in found.items():
            files = []
            for start in range(0, len(tokens), 20):
                rows = range(start, min(start + 20, len(tokens)))
                own = np.array([labels(row) for row in rows])
                data = to_parquet(to_table(tokens[list(rows)], [f"{split}/{row}" for row in rows], own, stream))
                name = f"tokens/{split}-{len(files):05d}.parquet"
                (folder / name).write_bytes(data)
                files.append(TokenFile(name, len(rows), hashlib.sha256(data).hexdigest(), start))
            splits[split] = TokenSplit(len(tokens), tuple(files))
        manifest = TokenManifest(stream, {}, "made", classes, splits, fingerprint(splits))
        (folder / "tokens.json").write_text(json.dumps(manifest.to_dict()))
        return folder

    return write


@pytest.fixture(scope="session")
def stream_folder(write_stream: WriteStream) -> Path:
    return write_stream()


@pytest.fixture
def configure(tmp_path: Path, stream_folder: Path, tokenizer_folder: Path) -> Callable[..., Config]:
    """`configure("section.key=value", ...)`: the tiny configuration with changes."""

    def make(*more: str) -> Config:
        shape = [f"tokenizer.{key}={value}" for key, value in SHAPE.items()]
        shape += ["tokenizer.codebook_dim=16", "tokenizer.fsq_levels=[4,4]", f"data.image_size={SIDE}"]
        places = [f"run.output={tmp_path}/runs", f"tokens.path={stream_folder}", "tracking.uri="]
        places += [f"tokenizer.checkpoint={tokenizer_folder}", "filter.threshold=0.6", "generator.size=nano"]
        steps = {
            "max_steps": 6, "global_batch_size": 16, "warmup_steps": 2, "log_every": 2, "validate_every": 3,
            "validation_images": 8, "checkpoint_every": 3, "grid_images": 3,
        }  # fmt: skip
        train = [f"train_generator.{key}={value}" for key, value in steps.items()]
        return load_config("smoke", [*shape, *places, *train, *more])

    return make


@pytest.fixture
def train_generator(carry_out: Callable[..., Run]) -> Callable[..., Run]:
    """`train_generator(config, name)` trains in this process; returns the closed run."""
    from pipeline.generator import train_generator

    return partial(carry_out, "train_generator", train_generator)
