"""Batches of similar length: every sample once, whatever the number of workers, and hardly any padding."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.config import FilterConfig
from pipeline.generator.token_data import WINDOW, LayeredOrder, TokenBatches, TokenDataset
from pipeline.training.order import SampleOrder


def lengths_of(rows: int, seed: int = 0) -> np.ndarray:
    """Mean 60, standard deviation 30% of it."""
    return np.clip(np.random.default_rng(seed).normal(60, 18, rows).round(), 1, 256).astype(int)


@given(rows=st.integers(1, 300), batch=st.integers(1, 40), groups=st.integers(1, 12), window=st.integers(0, 5))
def test_a_window_has_the_samples_of_its_steps_each_once(rows: int, batch: int, groups: int, window: int) -> None:
    plain = SampleOrder(rows, 3, batch)
    layered = LayeredOrder(plain, lengths_of(rows), groups)
    steps = range(window * WINDOW, (window + 1) * WINDOW)

    def seen(order: SampleOrder | LayeredOrder) -> list[tuple[int, int]]:
        pairs = [zip(*(values.tolist() for values in order.global_batch(step)), strict=True) for step in steps]
        return sorted(pair for part in pairs for pair in part)

    assert seen(layered) == seen(plain)
    assert all(len(layered.global_batch(step)[0]) == batch for step in steps)


def test_a_step_is_a_function_of_seed_and_step_alone() -> None:
    lengths = lengths_of(500)
    one, other = (LayeredOrder(SampleOrder(500, 3, 16), lengths, 4) for _ in range(2))
    for step in (9, 3, 30, 9):
        for found, expected in zip(one.global_batch(step), other.global_batch(step), strict=True):
            assert np.array_equal(found, expected)


def test_every_step_sees_short_and_long_sequences_in_their_shares() -> None:
    lengths = lengths_of(4096)
    order = LayeredOrder(SampleOrder(4096, 0, 128), lengths, 8)
    means = [lengths[order.global_batch(step)[0]].mean() for step in range(32)]
    assert np.abs(np.array(means) - lengths.mean()).max() < 18 / np.sqrt(128) * 3
    tenths = [np.percentile(lengths[order.global_batch(step)[0]], (10, 90)) for step in range(32)]
    assert np.abs(np.array(tenths) - np.percentile(lengths, (10, 90))).max() < 18


@pytest.mark.parametrize("world", [1, 2])
def test_padding_is_below_five_percent_of_the_computed_tokens(world: int) -> None:
    lengths = lengths_of(50_000)
    order = LayeredOrder(SampleOrder(50_000, 0, 128), lengths, 8)
    real = computed = 0
    for step in range(64):
        samples, _ = order.global_batch(step)
        for part in np.array_split(samples[::world], 8):
            real += lengths[part].sum()
            computed += len(part) * lengths[part].max()
    assert 1 - real / computed < 0.05


@pytest.fixture(scope="module")
def dataset(stream_folder: Path) -> TokenDataset:
    return TokenDataset.load(str(stream_folder), "train", FilterConfig(threshold=0.6))


def batches(
    dataset: TokenDataset, rank: int = 0, world: int = 1, dropout: float = 0.0, groups: int = 4
) -> TokenBatches:
    return TokenBatches(dataset, SampleOrder(len(dataset), 0, 16), rank, world, groups, dropout, ends=1)


def rows_of(batch) -> list[tuple]:
    return sorted(
        (label, *part.global_indices[0].tolist(), *part.codes[0, : part.counts[0]].tolist())
        for group in batch.parts
        for label, part in ((int(group.labels[i]), group.sequences[[i]]) for i in range(len(group.labels)))
    )


def test_workers_share_a_global_batch_out_among_themselves(dataset: TokenDataset) -> None:
    whole = batches(dataset, dropout=0.3).load(5)
    parts = [batches(dataset, rank, 4, dropout=0.3).load(5) for rank in range(4)]
    assert sorted(row for part in parts for row in rows_of(part)) == rows_of(whole)
    assert {part.tokens for part in parts} == {whole.tokens}
    assert whole.tokens == sum(int((group.sequences.lengths() + 1).sum()) for group in whole.parts)


def test_parts_are_sorted_by_length_and_padded_to_their_own_longest(dataset: TokenDataset) -> None:
    parts = batches(dataset).load(2).parts
    assert [len(part.labels) for part in parts] == [4, 4, 4, 4]
    for part, following in pairwise(parts):
        assert part.sequences.counts.max() <= following.sequences.counts.max()
    assert all(part.sequences.codes.shape[1] == int(part.sequences.counts.max()) for part in parts)


def test_labels_are_dropped_by_seed_epoch_and_sample(dataset: TokenDataset) -> None:
    def labels(dropout: float) -> torch.Tensor:
        loaded = batches(dataset, dropout=dropout)
        return torch.cat([part.labels for step in range(48) for part in loaded.load(step).parts])

    told, some = labels(0.0), labels(0.25)
    assert torch.equal(some, labels(0.25))
    hidden = (told >= 0) & (some < 0)
    assert torch.equal(some[~hidden], told[~hidden])
    assert 0.18 < hidden.sum() / (told >= 0).sum() < 0.32
    assert torch.equal(labels(0.0), told), "the data set keeps its labels"


def test_more_groups_than_samples_are_as_many_as_samples(dataset: TokenDataset) -> None:
    assert len(batches(dataset, groups=99).load(0).parts) == 16
