"""Statistics of the originals, which a Frechet distance compares with: computed once, kept as npz, checked when read.

    {run.output}/reference/{extractor}-{key}.npz    mu (F,), sigma (F, F), n (), inception_score (), meta (JSON text)

`meta` says of what they are; the key is its hash. Files of others with `mu` and `sigma`, such as ADM's, are read too.
"""

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.manifest import Manifest
from pipeline.errors import BadInput
from pipeline.evaluation.extractors import Extractor
from pipeline.evaluation.plan import Plan
from pipeline.paths import write_atomically
from tatok_model.metrics.frechet import FeatureStatistics
from tatok_model.metrics.images import UINT8_RULE

PICTURE_KEYS = ("image_size", "encoding", "quality")  # of the manifest's configuration: they decide pixels
CROP = "shorter side bicubic (antialiased), centre crop"  # what preprocess does


@dataclass(frozen=True)
class Reference:
    """Mean and covariance of the originals' features."""

    mu: np.ndarray  # (F,)
    sigma: np.ndarray  # (F, F)
    n: int | None  # images; None: the file does not say
    inception_score: float | None  # of the originals; None: the file does not say
    meta: dict[str, Any] | None  # as `describe`; None: the file does not say

    @classmethod
    def of(cls, features: FeatureStatistics, inception_score: float | None, meta: dict[str, Any]) -> "Reference":
        """From what was measured on the originals."""
        return cls(features.mean().numpy(), features.covariance().numpy(), features.n, inception_score, meta)

    def save(self, path: Path) -> None:
        """Write the npz, whole or not at all."""
        file = io.BytesIO()
        known = {"n": self.n, "inception_score": self.inception_score, "meta": json.dumps(self.meta, sort_keys=True)}
        arrays: dict[str, Any] = {name: np.array(value) for name, value in known.items() if value is not None}
        np.savez(file, mu=self.mu, sigma=self.sigma, **arrays)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, file.getvalue())


def describe(manifest: Manifest, plan: Plan, extractor: Extractor) -> dict[str, Any]:
    """Everything that statistics of the held-out originals depend on."""
    return {
        "data": manifest.fingerprint,
        "split": "heldout",
        "images": plan.count,
        "pictures": {key: manifest.config.get(key, manifest.image_size) for key in PICTURE_KEYS},
        "crop": CROP,
        "extractor": extractor.name,
        "weights_sha256": extractor.weights_sha256,
        "extractor_resize": extractor.protocol,
        "uint8": UINT8_RULE,
    }


def cache_path(output: str, meta: dict[str, Any]) -> Path:
    """Where statistics described by `meta` are kept."""
    key = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:16]
    return Path(output) / "reference" / f"{meta['extractor']}-{key}.npz"


def read_cached(path: Path, meta: dict[str, Any], feature_dim: int) -> Reference | None:
    """What was kept at `path`, None when nothing was.

    Raises:
        BadInput: the file is not what `meta` describes, or as `read`.
    """
    if not path.exists():
        return None
    found = read(str(path), feature_dim)
    _check_meta(str(path), found.meta or {}, meta)
    return found


def read_given(path: str, meta: dict[str, Any], feature_dim: int) -> Reference:
    """Statistics that `evaluate.reference` names; ours have to fit but for the number of images.

    Raises:
        BadInput: they are of other images or another network, or as `read`.
    """
    found = read(path, feature_dim)
    if found.meta is not None:
        _check_meta(path, {**found.meta, "images": meta["images"]}, meta)
    return found


def read(path: str, feature_dim: int) -> Reference:
    """An npz with `mu` and `sigma`, and more if it is ours.

    Raises:
        BadInput: it is no such file, or not of `feature_dim` features.
    """
    try:
        with open(path, "rb") as raw:  # np.load leaves a file open that it cannot read
            file = np.load(raw, allow_pickle=False)
            arrays = {name: file[name] for name in ("mu", "sigma", "n", "inception_score", "meta") if name in file}
        mu, sigma = arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64)
        meta = json.loads(str(arrays["meta"])) if "meta" in arrays else None
    except (EOFError, KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise BadInput(
            f"reference statistics {path!r} cannot be read ({' '.join(str(error).split())}); "
            "expected an npz with mu and sigma"
        ) from None
    if mu.shape != (feature_dim,) or sigma.shape != (feature_dim, feature_dim):
        raise BadInput(
            f"reference statistics {path!r} have mu {mu.shape} and sigma {sigma.shape}; "
            f"expected ({feature_dim},) and ({feature_dim}, {feature_dim}) of this extractor"
        )
    n = int(arrays["n"]) if "n" in arrays else None
    score = float(arrays["inception_score"]) if "inception_score" in arrays else None
    return Reference(mu, sigma, n, score, meta)


def _check_meta(path: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key, value in wanted.items():
        if found.get(key) != value:
            raise BadInput(
                f"reference statistics {path!r} are of {key} {found.get(key)!r}; expected {value!r}: "
                "delete the file, or name others with evaluate.reference"
            )
