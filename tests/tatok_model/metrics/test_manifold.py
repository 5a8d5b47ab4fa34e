"""Improved precision and recall against a computation by hand, and where they are known."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tatok_model.metrics.manifold import nearest, precision_recall, radii


def points(seed: int, count: int, width: int = 5) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def by_hand(real: Tensor, generated: Tensor, k: int) -> tuple[float, float]:
    """Loops and nothing clever."""

    def distance(a: Tensor, b: Tensor) -> float:
        return float((a.double() - b.double()).square().sum().sqrt())

    def share(inside: Tensor, manifold: Tensor) -> float:
        reach = [
            sorted(distance(one, other) for j, other in enumerate(manifold) if j != i)[k - 1]
            for i, one in enumerate(manifold)
        ]
        hits = [any(distance(x, y) <= r for y, r in zip(manifold, reach, strict=True)) for x in inside]
        return sum(hits) / len(hits)

    return share(generated, real), share(real, generated)


@given(st.integers(0, 10_000), st.integers(1, 4), st.sampled_from([1, 3, 1024]))
@settings(max_examples=15, deadline=None)
def test_it_is_what_loops_find_whatever_the_chunk(seed: int, k: int, chunk: int) -> None:
    real, generated = points(seed, 12), points(seed + 1, 9) * 1.5
    assert precision_recall(real, generated, k, chunk) == pytest.approx(by_hand(real, generated, k))


def test_a_set_covers_itself() -> None:
    features = points(0, 50)
    assert precision_recall(features, features.clone()) == (1, 1)


def test_sets_far_apart_share_nothing() -> None:
    assert precision_recall(points(0, 20), points(1, 20) + 1000) == (0, 0)


def test_copies_of_one_real_picture_are_precise_and_recall_little() -> None:
    real = points(0, 200)
    generated = real[:1] + points(1, 100) * 1e-3
    precision, recall = precision_recall(real, generated)
    assert precision == 1
    assert recall <= 0.01


def test_spread_beyond_the_real_recalls_more_than_it_is_precise() -> None:
    precision, recall = precision_recall(points(0, 200), points(1, 200) * 3)
    assert recall > precision


def test_radii_do_not_count_the_point_itself() -> None:
    line = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert radii(line, 1).tolist() == [1, 1, 2, 4]
    assert radii(line, 2, chunk=3).tolist() == [3, 2, 3, 6]
    assert radii(torch.zeros(4, 2), 1).tolist() == [0, 0, 0, 0], "copies are neighbours"


def test_the_nearest_come_in_order() -> None:
    among = torch.tensor([[10.0], [2.0], [4.0]])
    distances, indices = nearest(torch.tensor([[3.5], [9.0]]), among, k=2, chunk=1)
    assert distances.flatten().tolist() == pytest.approx([0.5, 1.5, 1, 5])
    assert indices.tolist() == [[2, 1], [0, 2]]


@pytest.mark.parametrize(
    ("real", "generated", "k", "sentence"),
    [
        (torch.zeros(4), torch.zeros(4, 2), 3, r"features are \(4,\) and \(4, 2\); expected \(B, F\) and \(C, F\)"),
        (torch.zeros(4, 3), torch.zeros(4, 2), 3, r"features are \(4, 3\) and \(4, 2\)"),
        (torch.zeros(4, 2), torch.full((4, 2), torch.nan), 3, "hold NaN or infinity"),
        (torch.zeros(4, 2), torch.zeros(3, 2), 3, r"generated has 3 features with k 3; expected at least k \+ 1"),
        (torch.zeros(4, 2), torch.zeros(4, 2), 0, "real has 4 features with k 0; .*k above 0"),
    ],
)
def test_what_has_no_manifold_is_refused(real: Tensor, generated: Tensor, k: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        precision_recall(real, generated, k)


def test_more_neighbours_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="k is 3 among 2 features; expected 1 to 2"):
        nearest(points(0, 4), points(1, 2), k=3)
