"""The networks behind Frechet distances, and statistics of the originals: kept as npz, checked when read.

    {run.output}/reference/{extractor}-{key}.npz    mu (F,), sigma (F, F), n (), inception_score (), meta (JSON text)

`meta` says of what they are; the key is its hash. Files of others with `mu` and `sigma`, such as ADM's, are read too.
"""

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.config import EvaluateConfig
from pipeline.core.errors import BadInput
from pipeline.core.files import sha256_file, write_atomically
from pipeline.core.run import Run
from pipeline.data.shards import Manifest
from pipeline.evaluation.measurements import EvaluationPlan
from tatok_model.metrics.extractors.extractor import FeatureExtractor, TrainableExtractor
from tatok_model.metrics.extractors.inception import Inception2015
from tatok_model.metrics.extractors.small_networks import (
    IMAGE_SIZE,
    SHIPPED_NAME,
    CifarResNet,
    CompactExtractor,
    load_trained,
)
from tatok_model.metrics.frechet import FeatureStatistics, frechet_distance
from tatok_model.metrics.images import UINT8_RULE

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


def load_extractors(config: EvaluateConfig) -> list[Extractor]:
    """The network of `evaluate.extractor`, the main one, and those of `evaluate.more_extractors`, with their weights.

    Raises:
        BadInput: a file is not what its key asks for (the FID Inception, one that `jobs/train_extractor.py` wrote, a
            CIFAR ResNet), or `evaluate.more_extractors` names a network twice.
    """
    found = [_main_extractor(config)]
    for path in config.more_extractors:
        load = load_trained if path.endswith(TRAINED) else CifarResNet.from_file
        network = _loaded("evaluate.more_extractors", load, path)
        if network.name in [extractor.name for extractor in found[1:]]:
            raise BadInput(
                f"evaluate.more_extractors has {path!r}, a second {network.name}; expected different networks"
            )
        found.append(Extractor(network, network.weights_sha256))
    return found


def _main_extractor(config: EvaluateConfig) -> Extractor:
    network: Any
    if config.extractor.endswith(TRAINED):
        network = _loaded("evaluate.extractor", load_trained, config.extractor)
        return Extractor(network, network.weights_sha256)
    if extractor_name(config) == SHIPPED_NAME:
        network = CompactExtractor.shipped()
        return Extractor(network, network.weights_sha256)
    network = _loaded("evaluate.inception_weights", Inception2015.from_file, config.inception_weights)
    return Extractor(network, sha256_file(Path(config.inception_weights)))


def extractor_name(config: EvaluateConfig) -> str:
    """What `evaluate.extractor` means; `auto` is Inception when its weights are given."""
    if config.extractor == "auto":
        return Inception2015.name if config.inception_weights else SHIPPED_NAME
    return config.extractor


def _loaded(key: str, load: Callable[[str], Any], path: str) -> Any:
    try:
        return load(path)
    except (FileNotFoundError, ValueError) as error:
        raise BadInput(f"{key}: {error}") from None


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


@dataclass(frozen=True)
class Distance:
    """One Frechet distance: by which network, from which originals."""

    extractor: Extractor
    reference: Reference

    @property
    def name(self) -> str:
        """`rfid`, or `rfd_<extractor>`."""
        return self.extractor.distance_name

    def of(self, features: FeatureStatistics) -> float:
        """Of pictures with these features; arithmetic may leave a tiny negative one: 0."""
        to = self.reference
        return max(0.0, frechet_distance(features.mean(), features.covariance(), to.mu, to.sigma))


def known_reference(run: Run, meta: dict[str, Any], extractor: Extractor, main: bool) -> Reference | None:
    """What an earlier run kept, or for the main extractor what `evaluate.reference` names; None: it is to be measured.

    It is noted among the run's inputs; `meta` is as `describe`.

    Raises:
        BadInput: as `read_reference`.
    """
    given = run.config.evaluate.reference if main else ""
    path = Path(given) if given else cache_path(run.config.run.output, meta)
    if not given and not path.exists():
        return None
    reference = read_reference(str(path), meta, extractor.network.feature_dim, given=bool(given))
    run.inputs[_reference_name(extractor, main)] = {"path": str(path), "sha256": sha256_file(path)}
    return reference


def new_reference(
    run: Run, meta: dict[str, Any], extractor: Extractor, main: bool, features: FeatureStatistics, score: float
) -> Reference:
    """What was measured on the originals, kept for later runs and noted among the run's outputs."""
    reference = Reference.of(features, score if main else None, meta)
    path = cache_path(run.config.run.output, meta)
    reference.save(path)
    run.outputs[_reference_name(extractor, main)] = str(path)
    return reference


def _reference_name(extractor: Extractor, main: bool) -> str:
    return "reference" if main else f"reference_{extractor.name}"


def describe(manifest: Manifest, plan: EvaluationPlan, extractor: Extractor) -> dict[str, Any]:
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


def read_reference(path: str, wanted: dict[str, Any], feature_dim: int, given: bool = False) -> Reference:
    """An npz with `mu` and `sigma`, and more if it is ours.

    Args:
        path: of the file.
        wanted: of what it has to be, as `describe`.
        feature_dim: F.
        given: by `evaluate.reference`: it may be of another number of images, or not say of what it is.

    Raises:
        BadInput: it is no such file, not of `feature_dim` features, no mean and covariance, of other images or of
            another network.
    """
    try:
        with open(path, "rb") as raw:  # np.load leaves a file open that it cannot read
            file = np.load(raw, allow_pickle=False)
            arrays = {name: file[name] for name in ("mu", "sigma", "n", "inception_score", "meta") if name in file}
        mu, sigma = (arrays[name].astype(np.float64, casting="same_kind") for name in ("mu", "sigma"))
        n = int(arrays["n"]) if "n" in arrays else None
        score = float(arrays["inception_score"]) if "inception_score" in arrays else None
        meta = dict(json.loads(str(arrays["meta"]))) if "meta" in arrays else None
    except (EOFError, KeyError, OSError, OverflowError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise BadInput(
            f"reference statistics {path!r} cannot be read ({' '.join(str(error).split())}); "
            "expected an npz with mu and sigma"
        ) from None
    if mu.shape != (feature_dim,) or sigma.shape != (feature_dim, feature_dim):
        raise BadInput(
            f"reference statistics {path!r} have mu {mu.shape} and sigma {sigma.shape}; "
            f"expected ({feature_dim},) and ({feature_dim}, {feature_dim}) of this extractor"
        )
    wrong = _wrong_statistics(mu, sigma, n, score)
    if wrong:
        raise BadInput(f"reference statistics {path!r} hold {wrong}; expected mean and covariance of features")
    checked = [] if given and meta is None else [key for key in wanted if not (given and key == "images")]
    for key in checked:
        found, value = (meta or {}).get(key), wanted[key]
        if found != value:
            raise BadInput(
                f"reference statistics {path!r} are of {key} {found!r}; expected {value!r}: "
                "delete the file, or name others with evaluate.reference"
            )
    return Reference(mu, sigma, n, score, meta)


def _wrong_statistics(mu: np.ndarray, sigma: np.ndarray, n: int | None, score: float | None) -> str:
    """What no mean and covariance can hold; '' where nothing is wrong."""
    for name, values in (("mu", mu), ("sigma", sigma), ("inception_score", score)):
        if values is not None and not np.isfinite(values).all():
            return f"NaN or infinity in {name}"
    if n is not None and n < 1:
        return f"n {n}"
    if np.abs(sigma - sigma.T).max() > 1e-3 * np.abs(sigma).max():
        return "a sigma that is not symmetric"
    return "a negative variance in sigma" if np.diag(sigma).min() < 0 else ""
