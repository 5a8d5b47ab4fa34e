"""Pictures to tokens as a whole: every picture, the same bytes however it is run, resumed or stopped."""

import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.config import TokensConfig
from pipeline.core.errors import BadInput, Stopped
from pipeline.core.presets import load_config
from pipeline.core.run import Run
from pipeline.data.shards import ShardDataset
from pipeline.evaluation import calibrate
from pipeline.tokens.encoder import look
from pipeline.tokens.stream import from_table, read_token_file
from pipeline.tokens.token_manifest import View, ranges_of_pictures, read_token_manifest, views_of
from tatok_model.tokenizer import TaTok
from tatok_model.tokens import Tokens
from tatok_model.vit import one_thread

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # Ray Data's own old settings

Started = Callable[..., Run]
VIEWS = ("tokens.flip=true", "tokens.crops=2")


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


WARNING = re.compile(
    r"warning: filter.threshold \S+ \(rule (\w+), score distortion\) keeps (\d+\.\d)% of the patch tokens of 31 "
    r"pictures; expected one between (\S+), where the median picture keeps (all|none), and (\S+), where it keeps "
    r"(all|none): "
    r"python jobs/calibrate.py smoke (.*)\n"
)


@pytest.mark.parametrize(
    ("rule", "nothing", "everything"),
    [("marginal", 1e9, 1e-9), ("residual", 1e12, 1e-9), ("relative", 1e-12, 1 - 1e-12)],
)
def test_a_threshold_of_another_model_is_warned_of_with_the_range_that_matters_and_a_command_that_works(
    finished: Started, capsys: pytest.CaptureFixture[str], rule: str, nothing: float, everything: float
) -> None:
    for threshold, share in ((nothing, 0), (everything, 100)):
        run = finished("tokenize_images", f"{threshold:g}", f"filter.rule={rule}", f"filter.threshold={threshold}")
        told = WARNING.search(capsys.readouterr().err)
        if rule == "relative" and threshold == nothing:  # any share above 0 keeps a token
            assert told is None
            continue
        assert told is not None
        assert (told[1], float(told[2])) == (rule, pytest.approx(share, abs=1))
        low, high = float(told[3]), float(told[5])
        assert 0 <= low < high
        assert {told[4], told[6]} == {"all", "none"}
        assert (told[4] == "none") == (rule == "relative")
    calibrate.check(load_config("smoke", [*shlex.split(told[7]), f"run.output={run.folder}", "tracking.uri="]))
    middle = math.sqrt(low * high) if rule != "relative" else 0.5
    run = finished("tokenize_images", "middle", f"filter.rule={rule}", f"filter.threshold={middle}")
    assert 2 + 0.16 < run.results["tokens_per_image"] < 2 + 15.84
    assert "warning" not in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("filter.rounds=4", "filter.rounds is 4, but the run in .* was begun with 1"),
        ("filter.score=entropy", "filter.score is 'entropy', but the run in .* was begun with 'distortion'"),
        ("tokens.batch_size=8", "tokens.batch_size is 8, but the run in .* was begun with 4"),
        ("tokens.flip=false", "tokens.flip is False, but the run in .* was begun with True"),
        ("tokens.crops=1", "tokens.crops is 1, but the run in .* was begun with 2"),
        ("train.seed=5", "train.seed is 5, but the run in .* was begun with 0"),
    ],
)
def test_a_run_is_not_resumed_as_another_one(finished: Started, override: str, sentence: str) -> None:
    with pytest.raises(Stopped):
        finished("tokenize_images", "one", *VIEWS, stop=True)
    with pytest.raises(BadInput, match=sentence):
        finished("tokenize_images", "one", *VIEWS, override, resume=True)


def test_a_score_needs_its_model(finished: Started) -> None:
    with pytest.raises(BadInput, match="filter.score is 'distortion' with tokenizer.entropy_layers 0; expected a tok"):
        finished("tokenize_images", "one", "tokenizer.entropy_layers=0")


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


# Views: mirror images and shifted copies as rows of their own.


def pictures(count: int, side: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def test_training_pictures_have_the_views_that_are_asked_for_and_held_out_ones_have_one() -> None:
    config = TokensConfig(flip=True, crops=2)
    assert [view.name for view in views_of("train", config)] == ["", "@flip", "@crop1", "@crop2"]
    assert views_of("heldout", config) == views_of("train", TokensConfig()) == [View("")]


def test_a_mirror_image_is_left_for_right_and_the_picture_itself_is_untouched() -> None:
    images = pictures(3)
    assert np.array_equal(look(images, View(""), 0, np.arange(3)), images)
    assert np.array_equal(look(images, View("@flip", mirrored=True), 0, np.arange(3)), images[:, :, ::-1])


def test_a_copy_is_a_shift_over_reflected_borders_by_at_most_an_eighth_of_the_side() -> None:
    images, numbers = pictures(200), np.arange(200)
    copies = look(images, View("@crop1", copy=1), 7, numbers)
    found = []
    for image, copy in zip(images, copies, strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
        windows = {
            (down, right, turned): padded[down : down + 16, right : right + 16][:, :: -1 if turned else 1]
            for down in range(5)
            for right in range(5)
            for turned in (False, True)
        }
        found.append(next(key for key, window in windows.items() if np.array_equal(window, copy)))
    downs, rights, turned = (np.array(values) for values in zip(*found, strict=True))
    assert set(downs) == set(rights) == set(range(5)), "every distance comes up"
    assert 0.4 < turned.mean() < 0.6
    assert abs(np.corrcoef(downs, rights)[0, 1]) < 0.25


def test_a_copy_depends_on_seed_picture_and_copy_and_on_nothing_else() -> None:
    images, numbers = pictures(20), np.arange(20)
    copies = look(images, View("@crop1", copy=1), 7, numbers)
    alone = [look(images[[n]], View("@crop1", copy=1), 7, numbers[[n]])[0] for n in range(20)]
    assert np.array_equal(np.stack(alone), copies)
    for view, seed in ((View("@crop2", copy=2), 7), (View("@crop1", copy=1), 8)):
        assert not np.array_equal(look(images, view, seed, numbers), copies)


@given(
    total=st.integers(1, 5000), most=st.integers(0, 5000), batch=st.integers(1, 300), flip=st.booleans(),
    crops=st.integers(0, 4),
)  # fmt: skip
def test_ranges_hold_every_view_of_a_picture_together(
    total: int, most: int, batch: int, flip: bool, crops: int
) -> None:
    config = TokensConfig(max_images=most, batch_size=batch, flip=flip, crops=crops)
    ranges = [task for task in ranges_of_pictures({"train": total, "heldout": 1}, config) if task.split == "train"]
    plain = ranges_of_pictures({"train": total, "heldout": 0}, TokensConfig(max_images=most, batch_size=batch))
    views = 1 + flip + crops
    assert (
        np.concatenate([task.pictures() for task in ranges]).tolist()
        == np.concatenate([task.places() for task in plain]).tolist()
    )
    assert all(len(task.pictures()) * views == task.stop - task.start for task in ranges)
    assert [task.start for task in ranges] == [0, *(task.stop for task in ranges[:-1])]


def test_the_views_of_a_picture_stand_together_with_their_own_tokens(
    finished: Started, shards: Path, tokenizer: TaTok
) -> None:
    run = finished("tokenize_images", "views", *VIEWS, "tokens.batch_size=32")
    manifest = read_token_manifest(run.folder)
    rows, first = [], 0
    for file in manifest.splits["train"].files:
        assert file.first_row == first
        first += file.rows
        rows.append(from_table(read_token_file(str(run.folder), file, manifest.stream)))
    assert (run.results["rows_train"], run.results["rows_heldout"]) == (84, 10)
    ids = [name for _, names, _ in rows for name in names]
    originals = ShardDataset(shards, "train")
    assert ids == [f"{name}{view}" for name in originals.ids(range(21)) for view in ("", "@flip", "@crop1", "@crop2")]
    labels = np.concatenate([part for _, _, part in rows])
    assert labels.tolist() == originals.labels(range(21)).repeat(4).tolist()
    indices = torch.cat([tokens.patch_indices for tokens, _, _ in rows])
    images = originals.images(range(21))
    for place, view in enumerate(views_of("train", run.config.tokens)):
        seen = look(images, view, run.config.train.seed, np.arange(21))
        with one_thread():
            expected = tokenizer.encode(torch.from_numpy(seen.copy()).permute(0, 3, 1, 2)).patch_indices
        assert torch.equal(indices[place::4], expected), view


def test_detokenizing_gives_every_row_back(finished: Started) -> None:
    tokens = finished("tokenize_images", "views", *VIEWS)
    run = finished("detokenize", "pictures", f"tokens.path={tokens.folder}", "filter.threshold=1.0")
    decoded = ShardDataset(run.folder, "train")
    assert len(decoded) == 84
    assert decoded.ids(range(4)) == ["0", "0@flip", "0@crop1", "0@crop2"]
    assert len(ShardDataset(run.folder, "heldout")) == 10
