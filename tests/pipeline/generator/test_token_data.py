"""A token stream in memory is what cutting its rows one by one gives."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.core.config import FilterConfig
from pipeline.core.errors import BadInput
from pipeline.generator.token_data import TokenDataset
from pipeline.tokens.stream import from_table, read_token_file
from pipeline.tokens.token_manifest import read_token_manifest
from tatok_model.generation.sequences import Sequences

WriteStream = Callable[..., Path]


@pytest.mark.parametrize(
    ("rule", "threshold"), [("relative", 0.6), ("relative", 1.0), ("residual", 3.0), ("count", 5), ("count", 0)]
)
def test_one_stream_is_cut_at_every_threshold(stream_folder: Path, rule: str, threshold: float) -> None:
    dataset = TokenDataset.load(str(stream_folder), "train", FilterConfig(rule=rule, threshold=threshold))
    manifest = read_token_manifest(stream_folder)
    first = 0
    for file in manifest.splits["train"].files:
        tokens, ids, labels = from_table(read_token_file(str(stream_folder), file, manifest.stream))
        rows = np.arange(first, first + len(ids))
        expected, found = Sequences.from_tokens(tokens.cut(rule, threshold)), dataset.sequences(rows)
        for name in ("global_indices", "codes", "places", "counts"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
            assert getattr(found, name).dtype == torch.int64
        assert dataset.ids[first : first + len(ids)] == ids
        assert dataset.labels[rows].tolist() == labels.tolist()
        assert dataset.lengths()[rows].tolist() == expected.lengths().tolist()
        first += len(ids)
    assert len(dataset) == first
    assert dataset.longest == int(dataset.counts.max())


def test_any_rows_in_any_order_make_a_batch(stream_folder: Path) -> None:
    dataset = TokenDataset.load(str(stream_folder), "train", FilterConfig(threshold=0.6))
    whole = dataset.sequences(range(len(dataset)))
    rows = [40, 3, 3, 17]
    some = dataset.sequences(rows)
    assert some.codes.shape[1] == int(dataset.counts[rows].max()), "padded to its own longest"
    for name in ("global_indices", "codes", "places", "counts"):
        assert torch.equal(getattr(some, name), getattr(whole[rows], name)), name
    assert len(dataset.sequences([])) == 0


def test_numbers_are_kept_small(stream_folder: Path) -> None:
    dataset = TokenDataset.load(str(stream_folder), "train", FilterConfig(threshold=0.6))
    assert (dataset.codes.dtype, dataset.places.dtype, dataset.global_indices.dtype) == (np.int16, np.int32, np.int16)


def test_global_tokens_alone_are_cut_to_a_count(write_stream: WriteStream, stream_folder: Path) -> None:
    from_conftest = read_token_manifest(stream_folder).stream
    tokens = _only_globals(48)
    folder = str(write_stream(train=tokens, heldout=_only_globals(12)))
    whole = TokenDataset.load(folder, "train", FilterConfig())
    assert torch.equal(whole.sequences(range(48)).global_indices, tokens.global_indices)
    assert (whole.longest, set(whole.lengths())) == (0, {from_conftest.global_tokens})
    one = TokenDataset.load(folder, "train", FilterConfig(rule="count", threshold=1))
    assert torch.equal(one.sequences(range(48)).global_indices, tokens.global_indices[:, :1])
    for threshold in (0, 3):
        with pytest.raises(BadInput, match=f"filter.threshold is {threshold}; expected 1 to 2, the global tokens"):
            TokenDataset.load(folder, "train", FilterConfig(rule="count", threshold=threshold))


def _only_globals(rows: int):
    from tatok_model.tokens import Tokens

    globals_ = torch.randint(16, (rows, 2), generator=torch.Generator().manual_seed(rows))
    return Tokens(globals_, torch.zeros(rows, 16, dtype=torch.int64), torch.zeros(rows, 16, dtype=torch.bool))


def test_a_cut_that_the_ranking_does_not_allow_is_refused(stream_folder: Path) -> None:
    with pytest.raises(BadInput, match="filter.threshold: .*17"):
        TokenDataset.load(str(stream_folder), "train", FilterConfig(rule="count", threshold=17))


def test_a_label_without_a_class_is_refused(write_stream: WriteStream) -> None:
    folder = str(write_stream(classes=("ant", "bee")))
    with pytest.raises(BadInput, match="have labels -1 to 2; expected at most 1: they name 2 classes"):
        TokenDataset.load(folder, "train", FilterConfig())


def test_a_changed_file_is_refused(write_stream: WriteStream) -> None:
    folder = write_stream()
    path = folder / "tokens/train-00001.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(BadInput, match="does not match its checksum"):
        TokenDataset.load(str(folder), "train", FilterConfig())
