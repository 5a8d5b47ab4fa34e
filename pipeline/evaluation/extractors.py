"""The network behind the Frechet distance: which one it is, where its weights are, what its numbers are called."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.config import EvaluateConfig
from pipeline.errors import BadInput
from pipeline.paths import sha256_file
from tatok_model.metrics.compact import SHIPPED_NAME, CompactExtractor
from tatok_model.metrics.extractor import FeatureExtractor
from tatok_model.metrics.inception import Inception2015
from tatok_model.metrics.resnet import IMAGE_SIZE, CifarResNet
from tatok_model.metrics.trainable import TrainableExtractor
from tatok_model.metrics.trained import load_trained

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
