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

from pipeline.core.config import EvaluateConfig
from pipeline.core.errors import BadInput
from pipeline.core.files import sha256_file, write_atomically
from pipeline.data.shards import Manifest
from pipeline.evaluation.measurements import Plan
from tatok_model.metrics.extractors.extractor import FeatureExtractor, TrainableExtractor
from tatok_model.metrics.extractors.inception import Inception2015
from tatok_model.metrics.extractors.small_networks import (
    IMAGE_SIZE,
    SHIPPED_NAME,
    CifarResNet,
    CompactExtractor,
    load_trained,
)
from tatok_model.metrics.frechet import FeatureStatistics
from tatok_model.metrics.images import UINT8_RULE

# The network behind the Frechet distance: which one it is, where its weights are, what its numbers are called.

TRAINED = ".safetensors"  # ending of files that `jobs/train_extractor.py` wrote


@dataclass(frozen=True)
class Extractor:
    """A loaded feature network and what it is."""

    network: FeatureExtractor
    weights_sha256: str

    @property
    def name(self) -> str:
        """As in `rfd_<name>`."""
        return self.network.name

    @property
    def comparable(self) -> bool:
        """Whether its numbers may stand beside published ones."""
        return self.name == Inception2015.name

    @property
    def distance_name(self) -> str:
        """Only the real Inception gives an `rfid`."""
        return "rfid" if self.comparable else f"rfd_{self.name}"

    @property
    def score_name(self) -> str:
        """Only the real Inception gives an `inception_score`."""
        return "inception_score" if self.comparable else f"is_{self.name}"

    @property
    def protocol(self) -> str:
        """How it resizes: it moves the number and belongs beside it."""
        if isinstance(self.network, Inception2015):
            return "TensorFlow 1 bilinear to 299 pixels, bias-free logits"
        side = self.network.image_size if isinstance(self.network, TrainableExtractor) else IMAGE_SIZE
        return f"bilinear antialiased to {side} pixels"


def extractor_name(config: EvaluateConfig) -> str:
    """What `evaluate.extractor` means; `auto` is Inception when its weights are given."""
    if config.extractor == "auto":
        return Inception2015.name if config.inception_weights else SHIPPED_NAME
    return config.extractor


def load_extractor(config: EvaluateConfig) -> Extractor:
    """The network that the configuration asks for, with its weights.

    Raises:
        BadInput: `evaluate.inception_weights` is not the file of the FID Inception, or `evaluate.extractor` none that
            `jobs/train_extractor.py` wrote.
    """
    if config.extractor.endswith(TRAINED):
        try:
            trained = load_trained(config.extractor)
        except (FileNotFoundError, ValueError) as error:
            raise BadInput(f"evaluate.extractor: {error}") from None
        return Extractor(trained, trained.weights_sha256)
    if extractor_name(config) == SHIPPED_NAME:
        compact = CompactExtractor.shipped()
        return Extractor(compact, compact.weights_sha256)
    try:
        network = Inception2015.from_file(config.inception_weights)
    except (FileNotFoundError, ValueError) as error:
        raise BadInput(f"evaluate.inception_weights: {error}") from None
    return Extractor(network, sha256_file(Path(config.inception_weights)))


def load_more(config: EvaluateConfig) -> list[Extractor]:
    """The networks of further Frechet distances.

    Raises:
        BadInput: a file of `evaluate.more_extractors` is neither one that `jobs/train_extractor.py` wrote nor that of a
            CIFAR ResNet, or a network is named twice.
    """
    found: list[Extractor] = []
    for path in config.more_extractors:
        try:
            network = load_trained(path) if path.endswith(TRAINED) else CifarResNet.from_file(path)
        except (FileNotFoundError, ValueError) as error:
            raise BadInput(f"evaluate.more_extractors: {error}") from None
        if network.name in [extractor.name for extractor in found]:
            raise BadInput(
                f"evaluate.more_extractors has {path!r}, a second {network.name}; expected different networks"
            )
        found.append(Extractor(network, network.weights_sha256))
    return found


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
