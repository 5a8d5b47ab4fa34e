"""`generated.json` and the generated tokens, read back; refused when damaged."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.core.errors import BadInput
from pipeline.core.files import sha256_file
from pipeline.core.ranges import Shard
from pipeline.data.shards import SPLITS, Manifest, Split, fingerprint
from pipeline.generator.generated_files import Generated, read_generated
from pipeline.generator.sampler import token_table
from pipeline.tokens.stream import to_parquet
from tatok_model.generation.sequences import Sequences


@pytest.fixture
def generated(tmp_path: Path) -> Generated:
    """Three sequences of 3, 1 and 2 tokens, one of them global, and no pictures."""
    sequences = Sequences(
        torch.tensor([[7], [8], [9]]),
        torch.tensor([[1, 2], [0, 0], [3, 0]]),
        torch.tensor([[0, 3], [0, 0], [2, 0]]),
        torch.tensor([2, 0, 1]),
    )
    (tmp_path / "tokens").mkdir()
    path = tmp_path / "tokens/part-00000.parquet"
    path.write_bytes(to_parquet(token_table(sequences, np.arange(3), np.array([0, 1, -1]))))
    splits = {name: Split(0, ()) for name in SPLITS}
    manifest = Manifest(16, {}, "made", ("a", "b"), splits, 0, fingerprint(splits))
    (tmp_path / "manifest.json").write_text(json.dumps(manifest.to_dict()))
    file = Shard("tokens/part-00000.parquet", 3, sha256_file(path))
    tokens, speed = {"mean": 2.0}, {"images_per_second": 4.0}
    found = Generated(
        tmp_path, manifest, 3, 2, "g" * 64, "t" * 64, "relative 0.5", 0, 2, {"top_k": 0}, tokens, speed, (file,)
    )
    found.write()
    return found


def test_what_was_written_is_read(generated: Generated) -> None:
    found = read_generated(generated.folder)
    assert found == generated
    counts, labels = found.lengths()
    assert counts.tolist() == [3, 1, 2]
    assert labels.tolist() == [0, 1, -1]


def test_a_folder_without_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no generated.json; expected a folder written by jobs/generate.py"):
        read_generated(tmp_path)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ("{", "generated.json in .* cannot be read"),
        ({"format": "other"}, "is not of format 'tatok-generated'; expected one by jobs/generate.py"),
        ({"version": 2}, "has version 2; expected 1"),
        ({"seed": None}, "is damaged .seed: Input should be a valid integer"),
        ({"pictures": "0"}, "is of other pictures than manifest.json; expected a folder that one run wrote"),
    ],
)
def test_damage_is_told(generated: Generated, values: dict | str, sentence: str) -> None:
    path = generated.folder / "generated.json"
    path.write_text(values if isinstance(values, str) else json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(BadInput, match=sentence):
        read_generated(generated.folder)


def test_tokens_that_were_changed_are_refused(generated: Generated) -> None:
    path = generated.folder / "tokens/part-00000.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadInput, match="token file .* is missing or changed; expected it as jobs/generate.py wrote it"):
        generated.lengths()
