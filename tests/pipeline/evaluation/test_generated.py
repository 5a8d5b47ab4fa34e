"""Whose classes a classifier is asked about."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.evaluation.generated import Comparison
from tatok_model.metrics.extractors.extractor import CIFAR10

PICTURES = SimpleNamespace(logits=torch.eye(10), labels=np.arange(10))


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
def test_class_accuracy_is_only_told_of_the_classes_that_the_network_knows(known, ours, counted):
    extractor = SimpleNamespace(name="made", network=SimpleNamespace(class_names=known))
    comparison = SimpleNamespace(extractor=extractor, heldout=SimpleNamespace(manifest=SimpleNamespace(classes=ours)))
    found = Comparison._classes(comparison, extractor, PICTURES, PICTURES)
    assert bool(found) == counted
    if counted:
        assert found["class_accuracy"] == found["class_accuracy_real"] == 1
