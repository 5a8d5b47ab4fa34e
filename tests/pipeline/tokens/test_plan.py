"""Ranges hold every picture once, and a resumed run goes on with the same ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.config import TokensConfig
from pipeline.core.errors import BadInput
from pipeline.tokens.token_manifest import (
    RowRange,
    Stream,
    TokenFile,
    TokenManifest,
    TokenSplit,
    ranges_of_files,
    ranges_of_pictures,
)

STREAM = Stream("surprisal", 1, "0" * 64, 2, 16, 16, 16, 4)


def places(ranges: list[RowRange], split: str) -> list[int]:
    return [row for task in ranges if task.split == split for row in task.places().tolist()]


def stored(ranges: list[RowRange]) -> TokenManifest:
    """The manifest of the files that ranges of pictures become."""
    splits = {}
    for name in ("train", "heldout"):
        tasks = [task for task in ranges if task.split == name]
        files = tuple(TokenFile(task.name, task.stop - task.start, "", task.start) for task in tasks)
        splits[name] = TokenSplit(sum(file.rows for file in files), files)
    return TokenManifest(STREAM, {}, "", (), splits, "")


@given(total=st.integers(1, 20_000), most=st.integers(0, 20_000), batch=st.integers(1, 3000))
def test_ranges_hold_every_chosen_picture_once_in_whole_batches(total: int, most: int, batch: int) -> None:
    ranges = ranges_of_pictures({"train": total, "heldout": 1}, TokensConfig(max_images=most, batch_size=batch))
    found = places(ranges, "train")
    assert len(found) == min(most or total, total)
    assert np.all(np.diff(found) > 0), "each once, in order"
    assert found[0] == 0
    assert found[-1] < total
    assert [task.number for task in ranges] == list(range(len(ranges)))
    assert all((task.stop - task.start) % batch == 0 for task in ranges if task.stop < task.count)


@given(total=st.integers(1, 20_000), most=st.integers(0, 20_000))
def test_ranges_of_files_hold_the_rows_that_were_chosen(total: int, most: int) -> None:
    manifest = stored(ranges_of_pictures({"train": total, "heldout": 0}, TokensConfig(batch_size=32)))
    ranges = ranges_of_files(manifest, TokensConfig(max_images=most))
    count = min(most or total, total)
    assert places(ranges, "train") == (np.arange(count) * total // count).tolist()
    for task in ranges:
        file = manifest.splits["train"].files[task.index]
        local = task.places() - file.first_row
        assert 0 <= local.min() <= local.max() < file.rows


def test_one_split_can_be_asked_for() -> None:
    rows = {"train": 5, "heldout": 3}
    assert {task.split for task in ranges_of_pictures(rows, TokensConfig(split="heldout"))} == {"heldout"}
    assert [task.name for task in ranges_of_pictures(rows, TokensConfig())] == ["train-00000", "heldout-00000"]


def test_a_split_without_pictures_is_refused() -> None:
    with pytest.raises(BadInput, match="tokens.split is 'heldout', which holds no picture; expected one of train"):
        ranges_of_pictures({"train": 5, "heldout": 0}, TokensConfig(split="heldout"))
