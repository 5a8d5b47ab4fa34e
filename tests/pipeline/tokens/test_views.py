"""Mirror images and shifted copies as rows of their own."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.config import TokensConfig
from pipeline.core.errors import BadInput
from pipeline.core.run import Run
from pipeline.data.shards import ShardDataset
from pipeline.tokens import tokenize
from pipeline.tokens.ranges import View, look, ranges_of_pictures, views_of
from pipeline.tokens.stream import from_table, read_token_file
from pipeline.tokens.token_manifest import read_token_manifest
from tatok_model.tokenizer import TaTok
from tatok_model.vit import one_thread

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # Ray Data's own old settings

Started = Callable[..., Run]
VIEWS = ("tokens.flip=true", "tokens.crops=2")


def pictures(count: int, side: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def files(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in [run.folder / "tokens.json", *(run.folder / "tokens").iterdir()]}


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
        == np.concatenate([task.rows() for task in plain]).tolist()
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


def test_a_picture_itself_has_the_tokens_that_it_has_without_views(finished: Started) -> None:
    plain, views = finished("tokenize_images", "plain"), finished("tokenize_images", "views", *VIEWS)

    def rows(run: Run) -> dict[str, torch.Tensor]:
        manifest = read_token_manifest(run.folder)
        parts = [
            from_table(read_token_file(str(run.folder), f, manifest.stream)) for f in manifest.splits["train"].files
        ]
        return {name: row for tokens, names, _ in parts for name, row in zip(names, tokens.patch_indices, strict=True)}

    expected, found = rows(plain), rows(views)
    assert all(torch.equal(found[name], tokens) for name, tokens in expected.items())


@pytest.mark.slow
def test_views_are_the_same_bytes_after_resuming_and_with_two_workers(
    ray_session: ModuleType, finished: Started
) -> None:
    expected = files(finished("tokenize_images", "whole", *VIEWS))
    run = finished("tokenize_images", "killed", *VIEWS)
    (run.folder / "tokens.json").unlink()
    (run.folder / "parts/00001.json").unlink()
    assert files(finished("tokenize_images", "killed", *VIEWS, resume=True)) == expected
    assert files(finished("tokenize_images", "together", *VIEWS, "tokens.num_workers=2")) == expected


def test_detokenizing_gives_every_row_back(finished: Started) -> None:
    tokens = finished("tokenize_images", "views", *VIEWS)
    run = finished("detokenize", "pictures", f"tokens.path={tokens.folder}", "filter.threshold=1.0")
    decoded = ShardDataset(run.folder, "train")
    assert len(decoded) == 84
    assert decoded.ids(range(4)) == ["0", "0@flip", "0@crop1", "0@crop2"]
    assert len(ShardDataset(run.folder, "heldout")) == 10


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("tokens.flip=false", "tokens.flip is False, but the run in .* was begun with True"),
        ("tokens.crops=1", "tokens.crops is 1, but the run in .* was begun with 2"),
        ("train.seed=5", "train.seed is 5, but the run in .* was begun with 0"),
    ],
)
def test_a_run_with_views_is_not_resumed_with_others(
    begin: Started, finished: Started, override: str, sentence: str
) -> None:
    finished("tokenize_images", "views", *VIEWS)
    with pytest.raises(BadInput, match=sentence):
        tokenize.run(begin("tokenize_images", "views", *VIEWS, override, resume=True))
