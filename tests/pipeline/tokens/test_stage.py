"""Pictures to tokens as a whole: every picture, the same bytes however it is run, resumed or stopped."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.core.errors import BadInput, Stopped
from pipeline.core.run import Run
from pipeline.data.shards import ShardDataset
from pipeline.tokens import tokenize
from pipeline.tokens.stream import from_table, read_token_file
from pipeline.tokens.token_manifest import read_token_manifest
from tatok_model.tokenizer import TaTok
from tatok_model.tokens import Tokens
from tatok_model.vit import one_thread

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # Ray Data's own old settings

Started = Callable[..., Run]


def checksums(run: Run) -> dict[str, bytes]:
    """The manifest and every file it lists; no other file is there."""
    manifest = read_token_manifest(run.folder)
    files = {file.file for split in manifest.splits.values() for file in split.files}
    assert {f"tokens/{path.name}" for path in (run.folder / "tokens").iterdir()} == files
    return {name: (run.folder / name).read_bytes() for name in ("tokens.json", *files)}


def stored_tokens(run: Run, split: str) -> tuple[list[Tokens], list[str], list[int]]:
    """Tokens by file, ids, labels."""
    manifest = read_token_manifest(run.folder)
    parts, ids, labels = [], [], []
    for file in manifest.splits[split].files:
        tokens, names, classes = from_table(read_token_file(str(run.folder), file, manifest.stream))
        parts.append(tokens)
        ids += names
        labels += classes.tolist()
    return parts, ids, labels


def ranked(tokenizer: TaTok, pictures: np.ndarray) -> Tokens:
    """Of (B, H, W, 3) pictures, by distortion."""
    return tokenizer.rank(tokenizer.encode(torch.from_numpy(pictures).permute(0, 3, 1, 2)))


def test_every_picture_is_there_with_its_tokens_and_its_label(
    finished: Started, shards: Path, tokenizer: TaTok
) -> None:
    run = finished("tokenize_images", "one", "filter.rule=residual", "filter.threshold=20")
    for split in ("train", "heldout"):
        pictures = ShardDataset(shards, split)
        every = range(len(pictures))
        parts, ids, labels = stored_tokens(run, split)
        assert ids == pictures.ids(every)
        assert labels == pictures.labels(every).tolist()
        parts_of_four = [every[first : first + 4] for first in range(0, len(every), 4)]  # batches as in the run
        with one_thread():
            expected = [ranked(tokenizer, pictures.images(numbers)) for numbers in parts_of_four]
        for name in ("global_indices", "patch_indices"):
            found = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(found, torch.cat([getattr(part, name) for part in expected])), name
        kept = torch.cat([part.cut("residual", 20.0).kept_mask for part in parts])
        assert torch.equal(kept, torch.cat([part.cut("residual", 20.0).kept_mask for part in expected]))
    assert run.results["images"] == 31
    assert (run.results["rows_train"], run.results["rows_heldout"]) == (21, 10)
    assert run.results["tokens_p05"] <= run.results["tokens_p50"] <= run.results["tokens_p95"]
    for name in ("images_per_second", "encode_images_per_second", "rank_images_per_second", "stage_images_per_second"):
        assert run.results[name] > 0
    assert 0 < run.results["encode_share"] + run.results["rank_share"] < 1
    assert Path(run.outputs["token_histogram"]).stat().st_size
    line = json.loads((run.folder / "metrics.jsonl").read_text())
    assert line["metrics"] == run.results


def test_lengths_are_those_of_the_configured_cut(finished: Started) -> None:
    run = finished("tokenize_images", "one", "filter.rule=relative", "filter.threshold=0.5")
    cuts = [part.cut("relative", 0.5) for split in ("train", "heldout") for part in stored_tokens(run, split)[0]]
    counts = np.concatenate([tokens.counts().numpy() for tokens in cuts])
    assert run.results["tokens_per_image"] == counts.mean()
    assert run.results["tokens_std"] == counts.std()
    assert run.results["tokens_p95"] == np.percentile(counts, 95)
    assert run.results["bits_fixed"] == pytest.approx(torch.cat([tokens.bits(4) for tokens in cuts]).mean().item())


def test_files_carry_what_they_are_and_the_manifest_where_they_begin(finished: Started) -> None:
    run = finished("tokenize_images", "one", "filter.score=entropy", "filter.rounds=4")
    manifest = read_token_manifest(run.folder)
    assert (manifest.stream.score, manifest.stream.rounds) == ("entropy", 4)
    assert [file.first_row for file in manifest.splits["train"].files] == [0, 8, 16]
    assert [file.rows for file in manifest.splits["train"].files] == [8, 8, 5]
    metadata = pq.read_schema(run.folder / "tokens/heldout-00001.parquet").metadata[b"tatok_tokens"]
    assert json.loads(metadata) == manifest.stream.to_dict()
    assert manifest.classes == ("ant", "bee", "cow")


@pytest.mark.parametrize("score", ["distortion", "error", "surprisal", "entropy", "pixel_entropy", "random", "grid"])
def test_every_score_makes_a_stream(finished: Started, score: str) -> None:
    run = finished("tokenize_images", score, f"filter.score={score}", "filter.rule=count", "filter.threshold=5")
    assert run.results["tokens_per_image"] == 7
    assert read_token_manifest(run.folder).stream.score == score


def test_a_tokenizer_without_patch_tokens_makes_a_stream_without_ranking(
    finished: Started, new_tokenizer: Callable[..., Path]
) -> None:
    checkpoint = new_tokenizer(patch_tokens=False)
    run = finished("tokenize_images", "one", "tokenizer.patch_tokens=false", f"tokenizer.checkpoint={checkpoint}")
    parts, _, _ = stored_tokens(run, "train")
    assert all(tokens.ranking is None and not tokens.kept_mask.any() for tokens in parts)
    assert (run.results["tokens_per_image"], run.results["bits_fixed"]) == (2, 8)


def test_some_pictures_are_spread_over_the_split(finished: Started) -> None:
    run = finished("tokenize_images", "one", "tokens.max_images=7", "tokens.split=train")
    assert stored_tokens(run, "train")[1] == ["0", "3", "6", "9", "12", "15", "18"]
    assert run.results["rows_heldout"] == 0


def test_one_and_two_workers_make_the_same_bytes(ray_session: ModuleType, finished: Started) -> None:
    alone = finished("tokenize_images", "alone")
    together = finished("tokenize_images", "together", "tokens.num_workers=2")
    assert checksums(together) == checksums(alone)
    assert together.results["images"] == 31
    assert together.results["rank_images_per_second"] > 0


def test_a_resumed_run_makes_what_is_missing_to_the_same_bytes(finished: Started) -> None:
    expected = checksums(finished("tokenize_images", "whole"))
    run = finished("tokenize_images", "killed")
    kept = run.folder / "tokens/train-00000.parquet"
    made = kept.stat().st_mtime_ns
    (run.folder / "tokens.json").unlink()
    (run.folder / "parts/00001.json").unlink()  # killed before it said so
    (run.folder / "tokens/train-00002.parquet").write_bytes(b"torn")
    (run.folder / "tokens/heldout-00000.parquet").unlink()
    resumed = finished("tokenize_images", "killed", resume=True)
    assert checksums(resumed) == expected
    assert kept.stat().st_mtime_ns == made, "a finished file is left alone"
    again = finished("tokenize_images", "killed", "filter.threshold=0.5", resume=True)
    assert "images_per_second" not in again.results, "nothing was made"
    assert again.results["tokens_per_image"] < resumed.results["tokens_per_image"], "another cut needs no other stream"
    assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_run_that_is_asked_to_stop_keeps_what_is_made(begin: Started, finished: Started) -> None:
    run = begin("tokenize_images", "stopped")
    run.request_stop()
    with pytest.raises(Stopped, match="1 of 5 files are made; --resume makes the others"):
        tokenize.run(run)
    run.close()
    assert not (run.folder / "tokens.json").exists()
    assert checksums(finished("tokenize_images", "stopped", resume=True)) == checksums(
        finished("tokenize_images", "whole")
    )


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("filter.rounds=4", "filter.rounds is 4, but the run in .* was begun with 1"),
        ("filter.score=entropy", "filter.score is 'entropy', but the run in .* was begun with 'distortion'"),
        ("tokens.batch_size=8", "tokens.batch_size is 8, but the run in .* was begun with 4"),
    ],
)
def test_a_run_is_not_resumed_as_another_one(begin: Started, finished: Started, override: str, sentence: str) -> None:
    finished("tokenize_images", "one")
    with pytest.raises(BadInput, match=sentence):
        tokenize.run(begin("tokenize_images", "one", override, resume=True))


def test_a_score_needs_its_model(begin: Started) -> None:
    with pytest.raises(BadInput, match="filter.score is 'distortion' with tokenizer.entropy_layers 0; expected a tok"):
        begin("tokenize_images", "one", "tokenizer.entropy_layers=0")


def test_one_worker_computes_as_an_actor_does(finished: Started, tokenizer: TaTok, shards: Path) -> None:
    """To the last bit: the scores of a batch on one thread."""
    run = finished("tokenize_images", "one", "filter.score=entropy", "filter.rounds=2")
    images = torch.from_numpy(ShardDataset(shards, "train").images(range(4))).permute(0, 3, 1, 2)
    with one_thread():
        expected = tokenizer.rank(tokenizer.encode(images), "entropy", 2).ranking
    found = stored_tokens(run, "train")[0][0].ranking
    assert expected is not None
    assert found is not None
    assert torch.equal(found.score_units[:4], expected.score_units)
    assert torch.equal(found.order[:4], expected.order)


def test_the_job_refuses_bad_input_in_one_sentence(run_job: Callable, overrides: list[str]) -> None:
    done = run_job("tokenize_images", "smoke", *overrides, "filter.rule=count", "filter.threshold=17")
    assert done.returncode == 2
    assert done.stderr == "error: filter.threshold is 17; expected at most 16, the patch tokens of an image\n"
    assert done.stdout == ""
