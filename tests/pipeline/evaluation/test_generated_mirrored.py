"""Copies of training pictures are found whichever way round they are."""

import numpy as np
import torch

from pipeline.evaluation.generated import nearest_either_way
from pipeline.evaluation.generated_features import FeatureSet


def pictures(*features: list[float]) -> FeatureSet:
    count = len(features)
    return FeatureSet(np.arange(count), np.zeros(count), torch.tensor(features), torch.zeros(count, 1))


def test_the_nearer_of_a_picture_and_its_mirror_image_counts_with_its_neighbours():
    train = pictures([0.0], [10.0], [20.0])
    plain, mirrored = pictures([1.0], [14.0]), pictures([18.0], [20.0])
    distances, indices = nearest_either_way(plain, mirrored, train, k=2)
    assert distances.tolist() == [[1.0, 9.0], [0.0, 10.0]]
    assert indices.tolist() == [[0, 1], [2, 1]]
