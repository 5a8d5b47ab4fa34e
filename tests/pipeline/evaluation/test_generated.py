"""Names, shares, lengths, neighbours, warnings and notes of generated pictures' numbers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.data.shards import Manifest
from pipeline.evaluation.generated import (
    VIEW,
    GeneratedComparison,
    class_accuracies,
    compare_lengths,
    distance_name,
    inception_score,
    ks_distance,
    length_plot,
    manifold_names,
    nearest_either_way,
    rows,
    warnings,
)
from pipeline.evaluation.generated_features import FeatureSet
from pipeline.evaluation.measurements import score_splits
from pipeline.evaluation.reference import Distance, Extractor, Reference
from pipeline.generator.generated_files import Generated
from tatok_model.metrics.extractors.extractor import CIFAR10
from tatok_model.metrics.extractors.inception import Inception2015
from tatok_model.metrics.scores import inception_score as in_order

PICTURES: Any = SimpleNamespace(logits=torch.eye(10), labels=np.arange(10))


@pytest.mark.parametrize(
    ("known", "ours", "counted"),
    [
        (CIFAR10, CIFAR10, True),
        (CIFAR10, tuple(name.title() for name in CIFAR10), True),
        (CIFAR10, tuple("abcdefghij"), False),  # as many, but others
        ((), (), False),  # neither says what its classes are
        ((), CIFAR10, False),
    ],
)
def test_class_accuracy_is_only_told_of_the_classes_that_the_network_knows(
    known: tuple[str, ...], ours: tuple[str, ...], counted: bool
) -> None:
    extractor: Any = SimpleNamespace(name="made", network=SimpleNamespace(class_names=known))
    heldout = SimpleNamespace(manifest=SimpleNamespace(classes=ours))
    comparison: Any = SimpleNamespace(main=extractor, heldout=heldout)
    found = GeneratedComparison._classes(comparison, extractor, PICTURES, PICTURES)
    assert bool(found) == counted
    if counted:
        assert found["class_accuracy"] == found["class_accuracy_real"] == 1


def pictures(*features: list[float]) -> FeatureSet:
    count = len(features)
    return FeatureSet(np.arange(count), np.zeros(count), torch.tensor(features), torch.zeros(count, 1))


def test_the_nearer_of_a_picture_and_its_mirror_image_counts_with_its_neighbours() -> None:
    train = pictures([0.0], [10.0], [20.0])
    plain, mirrored = pictures([1.0], [14.0]), pictures([18.0], [20.0])
    distances, indices = nearest_either_way(plain, mirrored, train, k=2)
    assert distances.tolist() == [[1.0, 9.0], [0.0, 10.0]]
    assert indices.tolist() == [[0, 1], [2, 1]]


@pytest.fixture
def inception() -> Extractor:
    """Its name is all that is asked for: no weights."""
    return Extractor(Inception2015.__new__(Inception2015), "made")


def reference(n: int | None, meta: dict | None) -> Reference:
    return Reference(np.zeros(2), np.eye(2), n, None, meta)


def test_only_inception_gives_published_names(extractor: Extractor, inception: Extractor) -> None:
    assert (distance_name(inception), *manifold_names(inception)) == ("gfid", "precision", "recall")
    assert distance_name(extractor) == "gfd_" + extractor.name
    assert manifold_names(extractor) == (f"precision_{extractor.name}", f"recall_{extractor.name}")


def test_accuracy_is_the_share_put_into_the_class_asked_for() -> None:
    logits = torch.eye(3)[[0, 1, 1, 2, 2, 0]]
    found = class_accuracies(logits, np.array([0, 1, 2, 2, 2, -1]), "accuracy")
    assert found == {"accuracy": 0.8, "accuracy_worst": pytest.approx(2 / 3), "accuracy_worst_class": 2}
    assert class_accuracies(logits, np.full(6, -1), "accuracy") == {}


def test_the_inception_score_does_not_depend_on_the_order_of_classes() -> None:
    """10,000 pictures sorted by class make two splits of five classes; dealt out, each has all ten."""
    logits = 20 * torch.eye(10).repeat_interleave(1000, dim=0)
    assert score_splits(len(logits)) == 2
    assert in_order(logits, 2) == pytest.approx(5, abs=0.01)
    assert inception_score(logits) == pytest.approx(10, abs=0.05)
    assert score_splits(4999) == score_splits(3) == 1


def test_readers_are_warned(extractor: Extractor, inception: Extractor) -> None:
    told = warnings({"images": 100}, Distance(extractor, reference(200, None)), compared_lengths=False)
    for text in ("over 100 images: below 2048", "does not say how", "statistics of 200", "is no FID", "tokens.path"):
        assert any(text in line for line in told), text
    assert warnings({"images": 5000}, Distance(inception, reference(5000, {})), compared_lengths=True) == []


def test_every_number_stands_in_the_table(extractor: Extractor) -> None:
    manifest = Manifest(16, {}, "made", (), {}, 0, "made")
    generated = Generated(Path("made"), manifest, 3, 2, "g", "t", "", 0, 7, {}, {}, {}, ())
    name = extractor.name
    names = ["images", "images_real", f"gfd_{name}", "gfd_other", "class_accuracy_worst", "class_accuracy_real_other"]
    names += ["class_accuracy_worst_class", "images_per_second", "unknown"]
    found = list(rows(dict.fromkeys(names, 5000.0), extractor, generated))
    assert [row.name for row in found] == names
    notes = {row.name: row.note for row in found}
    assert notes["gfd_other"] == "Frechet distance, other"
    assert notes["class_accuracy_worst"] == "of the worst class, numbered below"
    assert notes["class_accuracy_real_other"] == "the same by other"
    assert "batch 7" in notes["images_per_second"]
    assert notes["unknown"] == notes["class_accuracy_worst_class"] == ""


LENGTHS = st.lists(st.integers(0, 20), min_size=1, max_size=30).map(np.array)


def test_the_distance_of_known_distributions() -> None:
    assert ks_distance(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 4])) == 0
    assert ks_distance(np.array([1, 2]), np.array([3, 4])) == 1
    assert ks_distance(np.array([1, 2, 3, 4]), np.array([3, 4])) == 0.5


@given(LENGTHS, LENGTHS)
def test_it_is_the_largest_gap_between_distribution_functions(first: np.ndarray, second: np.ndarray) -> None:
    by_hand = max(abs((first <= point).mean() - (second <= point).mean()) for point in range(21))
    assert ks_distance(first, second) == pytest.approx(by_hand)
    assert ks_distance(first, second) == ks_distance(second, first)
    assert ks_distance(first, np.concatenate([first, first])) == pytest.approx(0)


def test_the_worst_class_is_named() -> None:
    counts, labels = np.array([10, 10, 30, 30, 99]), np.array([0, 0, 1, 1, -1])
    real_counts, real_labels = np.array([10, 10, 20, 20, 50]), np.array([0, 0, 1, 1, 2])
    found = compare_lengths(counts, labels, real_counts, real_labels)
    assert found["tokens_per_image"] == pytest.approx(35.8)
    assert found["tokens_per_image_real"] == 22
    assert found["tokens_mean_difference"] == pytest.approx(35.8 / 22 - 1)
    assert (found["tokens_ks_worst"], found["tokens_ks_worst_class"]) == (1, 1)
    assert found["tokens_mean_difference_worst"] == pytest.approx(0.5)


def test_without_classes_only_everything_is_compared() -> None:
    none = np.full(3, -1)
    found = compare_lengths(np.array([1, 2, 3]), none, np.array([1, 2, 3]), none)
    assert found["tokens_ks"] == found["tokens_mean_difference"] == 0
    assert "tokens_ks_worst" not in found


def test_views_of_a_picture_are_known_by_their_ids() -> None:
    assert all(VIEW.search(name) for name in ("a/b.png@flip", "file.parquet#7@crop12"))
    assert not any(VIEW.search(name) for name in ("a/b.png", "flip", "a@flip.png", "a@crop"))


def test_both_lengths_stand_in_one_figure(tmp_path: Path) -> None:
    path = tmp_path / "pictures" / "lengths.png"
    length_plot(path, np.array([8, 9, 9]), np.array([8, 300]), "Tokens")
    with Image.open(path) as picture:
        assert min(picture.size) > 300
    length_plot(path, np.array([8]), np.array([8]), "All alike")
