"""Names, shares, warnings and notes of generated pictures' numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data.shards import Manifest
from pipeline.evaluation.generated import (
    class_accuracies,
    distance_name,
    inception_score,
    manifold_names,
    rows,
    score_splits,
    warnings,
)
from pipeline.evaluation.reference import Extractor, Reference
from pipeline.generator.generated_files import Generated
from tatok_model.metrics.extractors.inception import Inception2015
from tatok_model.metrics.scores import inception_score as in_order


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
    told = warnings({"images": 100}, reference(200, None), extractor, compared_lengths=False)
    for text in ("over 100 images: below 2048", "does not say how", "statistics of 200", "is no FID", "tokens.path"):
        assert any(text in line for line in told), text
    assert warnings({"images": 5000}, reference(5000, {}), inception, compared_lengths=True) == []


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
