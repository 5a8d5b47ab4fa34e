"""Statistics of the originals: kept, found again, refused when they are of something else."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.core.config import EvaluateConfig
from pipeline.core.errors import BadInput
from pipeline.data.shards import ShardDataset
from pipeline.evaluation.measurements import make_plan
from pipeline.evaluation.reference import Extractor, Reference, cache_path, describe, read_reference
from tatok_model.metrics.frechet import FeatureStatistics

WIDTH = 3


@pytest.fixture
def meta(heldout: ShardDataset, extractor: Extractor) -> dict[str, Any]:
    return describe(heldout.manifest, make_plan(len(heldout), WIDTH, EvaluateConfig()), extractor)


@pytest.fixture
def reference(meta: dict[str, Any]) -> Reference:
    statistics = FeatureStatistics(WIDTH)
    statistics.update(torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(0)))
    return Reference.of(statistics, 1.5, meta)


def test_what_was_kept_is_found_again(tmp_path: Path, reference: Reference, meta: dict[str, Any]) -> None:
    path = cache_path(str(tmp_path), meta)
    reference.save(path)
    found = read_reference(str(path), meta, WIDTH)
    assert np.array_equal(found.mu, reference.mu)
    assert np.array_equal(found.sigma, reference.sigma)
    assert (found.n, found.inception_score, found.meta) == (20, 1.5, meta)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("key", "value"), [("data", "0123"), ("images", 7), ("weights_sha256", "other"), ("uint8", "truncate")]
)
def test_statistics_of_something_else_are_kept_elsewhere_and_refused_here(
    tmp_path: Path, reference: Reference, meta: dict[str, Any], key: str, value: Any
) -> None:
    other = {**meta, key: value}
    assert cache_path("runs", other) != cache_path("runs", meta)
    path = cache_path(str(tmp_path), meta)
    dataclasses.replace(reference, meta=other).save(path)
    with pytest.raises(BadInput, match=f"are of {key} {value!r}; expected"):
        read_reference(str(path), meta, WIDTH)


def test_the_key_knows_the_data_the_crop_and_the_network(meta: dict[str, Any]) -> None:
    assert set(meta) == {
        "data", "split", "images", "pictures", "crop", "extractor", "weights_sha256", "extractor_resize", "uint8"
    }  # fmt: skip
    assert meta["pictures"] == {"image_size": 16, "encoding": "png", "quality": 95}


def test_statistics_that_were_given_may_be_of_another_number_of_images(
    tmp_path: Path, reference: Reference, meta: dict[str, Any]
) -> None:
    path = tmp_path / "given.npz"
    reference.save(path)
    assert read_reference(str(path), {**meta, "images": 10}, WIDTH, given=True).n == 20
    with pytest.raises(BadInput, match="are of extractor 'compact_cifar10'; expected 'inception2015'"):
        read_reference(str(path), {**meta, "extractor": "inception2015"}, WIDTH, given=True)


def test_adm_files_hold_only_mu_and_sigma(tmp_path: Path, meta: dict[str, Any]) -> None:
    path = tmp_path / "adm.npz"
    np.savez(path, mu=np.zeros(WIDTH, np.float32), sigma=np.eye(WIDTH, dtype=np.float32), arr_0=np.zeros(9))
    found = read_reference(str(path), meta, WIDTH, given=True)
    assert found.mu.dtype == found.sigma.dtype == np.float64
    assert (found.n, found.inception_score, found.meta) == (None, None, None)


def test_statistics_of_another_width_are_refused(tmp_path: Path, meta: dict[str, Any]) -> None:
    path = tmp_path / "wide.npz"
    np.savez(path, mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(BadInput, match=r"mu \(5,\) and sigma \(5, 5\); expected \(3,\)"):
        read_reference(str(path), meta, WIDTH, given=True)


@pytest.mark.parametrize("content", ["nothing", "text", "array", "no sigma", "torn"])
def test_a_file_that_holds_no_statistics_is_refused(tmp_path: Path, meta: dict[str, Any], content: str) -> None:
    path = tmp_path / "bad.npz"
    if content == "array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif content == "no sigma":
        np.savez(path, mu=np.zeros(3))
    elif content == "torn":
        np.savez(path, mu=np.zeros(3), sigma=np.eye(3), meta=np.array(json.dumps(meta)))
        path.write_bytes(path.read_bytes()[:-30])
    else:
        path.write_text("" if content == "nothing" else "statistics")
    with pytest.raises(BadInput, match="expected an npz with mu and sigma"):
        read_reference(str(path), meta, WIDTH, given=True)


NAN = np.full(WIDTH, np.nan)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"mu": NAN}, "hold NaN or infinity in mu;"),
        ({"sigma": np.diag([1, np.inf, 1])}, "hold NaN or infinity in sigma;"),
        ({"inception_score": np.nan}, "hold NaN or infinity in inception_score;"),
        ({"sigma": np.triu(np.ones((WIDTH, WIDTH)))}, "hold a sigma that is not symmetric;"),
        ({"sigma": -np.eye(WIDTH)}, "hold a negative variance in sigma;"),
        ({"n": 0}, "hold n 0;"),
        ({"n": np.nan}, "cannot be read"),
        ({"n": np.arange(4)}, "cannot be read"),
        ({"sigma": np.eye(WIDTH) * 1j}, "cannot be read .*complex128"),
        ({"mu": np.array([None] * WIDTH)}, "cannot be read"),
        ({"mu": np.array(["a"] * WIDTH)}, "cannot be read"),
        ({"meta": "[1]"}, "cannot be read"),
        ({"meta": "no JSON"}, "cannot be read"),
        ({"sigma": np.ones(WIDTH)}, r"have mu \(3,\) and sigma \(3,\);"),
        ({"mu": np.zeros((1, WIDTH))}, r"have mu \(1, 3\) and sigma \(3, 3\);"),
    ],
)
def test_statistics_that_no_features_have_are_refused(
    tmp_path: Path, meta: dict[str, Any], arrays: dict[str, Any], reason: str
) -> None:
    path = tmp_path / "foreign.npz"
    np.savez(path, **{"mu": np.zeros(WIDTH), "sigma": np.eye(WIDTH), **arrays})
    with pytest.raises(BadInput, match=f"reference statistics '{path}' {reason}"):
        read_reference(str(path), meta, WIDTH, given=True)


def test_single_precision_is_symmetric_enough(tmp_path: Path, meta: dict[str, Any]) -> None:
    features = np.random.default_rng(0).normal(size=(50, WIDTH)).astype(np.float32)
    sigma = np.cov(features.T).astype(np.float32) + np.float32(1e-6) * np.arange(9, dtype=np.float32).reshape(3, 3)
    np.savez(tmp_path / "a.npz", mu=features.mean(0), sigma=sigma)
    assert np.array_equal(read_reference(str(tmp_path / "a.npz"), meta, WIDTH, given=True).sigma, sigma)
