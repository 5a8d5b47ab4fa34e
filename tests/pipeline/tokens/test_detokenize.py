"""Tokens back to pictures: what encoding at that threshold gives, and nothing from a stream that does not fit."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.core.errors import BadInput, Stopped
from pipeline.core.presets import load_config
from pipeline.core.run import Run
from pipeline.data.shards import ShardDataset, read_manifest
from pipeline.tokens import detokenize
from pipeline.tokens.stream import from_table
from tatok_model.metrics.images import to_uint8
from tatok_model.tokenizer import TaTok
from tatok_model.vit import one_thread

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # Ray Data's own old settings

Started = Callable[..., Run]
CUT = ("filter.rule=relative", "filter.threshold=0.5")


@pytest.fixture
def tokens(finished: Started) -> Path:
    """A stream of all pictures, ranked by distortion in one round."""
    return finished("tokenize_images", "tokens").folder


def test_cutting_a_stored_stream_equals_encoding_at_that_threshold(
    finished: Started, tokens: Path, tokenizer: TaTok, shards: Path
) -> None:
    """Bitwise: kept sets and pictures."""
    run = finished("detokenize", "pictures", f"tokens.path={tokens}", *CUT)
    made, originals = ShardDataset(run.folder, "train"), ShardDataset(shards, "train")
    for first in range(0, 21, 4):
        numbers = range(first, min(first + 4, 21))
        images = torch.from_numpy(originals.images(numbers)).permute(0, 3, 1, 2)
        with one_thread():
            cut = tokenizer.rank(tokenizer.encode(images)).cut("relative", 0.5)
            expected = to_uint8(tokenizer.decode(cut)).permute(0, 2, 3, 1).numpy()
        table = pq.read_table(tokens / f"tokens/train-{first // 8:05d}.parquet").slice(first % 8, len(numbers))
        assert torch.equal(from_table(table)[0].cut("relative", 0.5).kept_mask, cut.kept_mask)
        assert np.array_equal(made.images(numbers), expected)
    assert not cut.kept_mask.all()
    assert cut.kept_mask.any()


def test_the_shards_are_like_those_of_preprocess(finished: Started, tokens: Path, shards: Path) -> None:
    run = finished("detokenize", "pictures", f"tokens.path={tokens}", *CUT)
    manifest = read_manifest(run.folder)
    assert manifest.classes == ("ant", "bee", "cow")
    assert manifest.image_size == 16
    assert pq.read_table(run.folder / "rejected.parquet").num_rows == manifest.rejected == 0
    for split in ("train", "heldout"):
        made, originals = ShardDataset(run.folder, split), ShardDataset(shards, split)
        every = range(len(originals))
        assert made.ids(every) == originals.ids(every)
        assert made.labels(every).tolist() == originals.labels(every).tolist()
    rows = pq.read_table(run.folder / manifest.splits["train"].shards[0].file).to_pylist()
    assert [row["label_name"] for row in rows[:4]] == ["ant", "bee", "cow", ""]
    assert (rows[0]["height"], rows[0]["width"]) == (16, 16)
    assert run.results["images"] == 31
    assert run.results["decode_images_per_second"] > 0
    assert 2 < run.results["tokens_per_image"] < 18
    with Image.open(run.outputs["decoded"]) as grid:
        assert grid.width > 7 * grid.height, "eight pictures in a row"
    assert Path(run.outputs["token_histogram"]).stat().st_size


def test_fewer_tokens_are_another_picture(finished: Started, tokens: Path) -> None:
    names = []
    for threshold in ("1", "0.5", "0"):
        run = finished("detokenize", f"at-{threshold}", f"tokens.path={tokens}", f"filter.threshold={threshold}")
        names.append(read_manifest(run.folder).fingerprint)
    assert len(set(names)) == 3
    assert run.results["tokens_per_image"] == 2


def test_some_pictures_in_another_encoding(finished: Started, tokens: Path) -> None:
    more = "tokens.max_images=5", "tokens.split=heldout", "tokens.encoding=webp", "data.quality=80"
    run = finished("detokenize", "pictures", f"tokens.path={tokens}", *more)
    made = ShardDataset(run.folder, "heldout")
    assert made.ids(range(5)) == ["1000", "1002", "1004", "1006", "1008"]
    assert len(made) == run.results["images"] == 5
    assert made.encoded([0])[0][8:12] == b"WEBP"
    assert made.manifest.config["encoding"] == "webp"


def test_tokens_that_are_only_global_are_decoded_and_cut_too(
    finished: Started, new_tokenizer: Callable[..., Path]
) -> None:
    kind = "tokenizer.patch_tokens=false", f"tokenizer.checkpoint={new_tokenizer(patch_tokens=False)}"
    stream = finished("tokenize_images", "tokens", *kind).folder
    run = finished("detokenize", "pictures", f"tokens.path={stream}", *kind)
    assert (run.results["images"], run.results["tokens_per_image"]) == (31, 2)
    cut = "filter.rule=count", "filter.threshold=1"
    shorter = finished("detokenize", "cut", f"tokens.path={stream}", *kind, *cut)
    assert shorter.results["tokens_per_image"] == 1
    assert read_manifest(shorter.folder).fingerprint != read_manifest(run.folder).fingerprint
    with pytest.raises(BadInput, match="filter.threshold is 2"):
        finished("detokenize", "cut", f"tokens.path={stream}", *kind, cut[0], "filter.threshold=2", resume=True)
    with pytest.raises(BadInput, match="filter.threshold has 3; expected a whole number from 1 to 2"):
        finished("detokenize", "half", f"tokens.path={stream}", *kind, cut[0], "filter.threshold=3")


def test_without_a_stream_it_is_made_first(finished: Started) -> None:
    run = finished("detokenize", "pictures")
    made = Path(run.inputs["tokens"]["path"])
    assert (made.parent, made.name[:-8]) == (run.folder.parent, "smoke-tokens-")
    assert json.loads((made / "summary.json").read_text())["status"] == "finished"
    assert run.results["images"] == 31
    before = (made / "summary.json").read_bytes()
    again = finished("detokenize", "again")
    assert (again.inputs["tokens"]["path"], (made / "summary.json").read_bytes()) == (str(made), before)


@pytest.mark.slow
def test_one_and_two_workers_make_the_same_bytes(ray_session: ModuleType, finished: Started, tokens: Path) -> None:
    alone = finished("detokenize", "alone", f"tokens.path={tokens}", *CUT)
    together = finished("detokenize", "together", f"tokens.path={tokens}", *CUT, "tokens.num_workers=2")
    files = [
        alone.folder / shard.file for split in read_manifest(alone.folder).splits.values() for shard in split.shards
    ]
    assert len(files) == 5
    for path in (alone.folder / "manifest.json", *files):
        assert (together.folder / path.relative_to(alone.folder)).read_bytes() == path.read_bytes()


def test_a_stopped_run_resumes_to_the_same_bytes(finished: Started, tokens: Path) -> None:
    with pytest.raises(Stopped, match="1 of 5 files are made"):
        finished("detokenize", "stopped", f"tokens.path={tokens}", *CUT, stop=True)
    resumed = finished("detokenize", "stopped", f"tokens.path={tokens}", *CUT, resume=True)
    whole = finished("detokenize", "whole", f"tokens.path={tokens}", *CUT)
    assert read_manifest(resumed.folder) == read_manifest(whole.folder)
    with pytest.raises(BadInput, match="filter.threshold is 0.25, but the run in .* was begun with 0.5"):
        finished("detokenize", "whole", f"tokens.path={tokens}", "filter.threshold=0.25", resume=True)


def test_a_stream_that_does_not_fit_is_refused_before_anything_is_made(
    finished: Started, tokens: Path, new_tokenizer: Callable[..., Path]
) -> None:
    for override, sentence in {
        f"tokenizer.checkpoint={new_tokenizer(1)}": "is of a tokenizer with sha256 .*; expected that of",
        "filter.score=entropy": "is ranked by distortion; expected filter.score, entropy",
        "filter.rule=quality": "filter.rule is 'quality' and tokens.path .* has no line from distortion to dB; exp",
        "filter.rounds=2": "is ranked in 1 rounds; expected filter.rounds, 2: another R is another order",
        "tokenizer.checkpoint=": "tokenizer.checkpoint is empty; expected the tokenizer that made",
        f"tokens.path={tokens.parent}": "holds no tokens.json; expected a folder written by jobs/tokenize_images.py",
    }.items():
        with pytest.raises(BadInput, match=sentence):
            finished("detokenize", "pictures", f"tokens.path={tokens}", override)
    assert not (tokens.parent / "pictures").exists()


def test_a_truncated_file_is_refused_before_any_is_decoded(finished: Started, tokens: Path) -> None:
    last = tokens / "tokens/heldout-00001.parquet"
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(BadInput, match="token file .* does not match its checksum"):
        finished("detokenize", "pictures", f"tokens.path={tokens}")
    assert not (tokens.parent / "pictures" / "shards").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["filter.threshold=1.5"], "threshold is 1.5; expected a share from 0 to 1 for the rule relative"),
        (["filter.rule=count", "filter.threshold=17"], "filter.threshold is 17; expected at most 16"),
        (["filter.score=grid"], "rule is 'relative'; expected count for the score 'grid', whose steps have no scores"),
        (["filter.rounds=2"], "is ranked in 1 rounds; expected filter.rounds, 2"),
    ],
)
def test_the_job_refuses_bad_input_in_one_sentence(
    run_job: Callable, overrides: list[str], tokens: Path, arguments: list[str], sentence: str
) -> None:
    done = run_job("detokenize", "smoke", *overrides, f"tokens.path={tokens}", *arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert not (tokens.parent / "smoke-detokenize-relative-1").exists()


def test_every_cut_has_a_run_folder_of_its_own() -> None:
    config = load_config("smoke", ["filter.rule=residual", "filter.threshold=60"])
    assert detokenize.default_name(config) == "smoke-detokenize-residual-60"
