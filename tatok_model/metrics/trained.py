"""Which feature networks can be trained, and a file of one back as a network."""

from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from tatok_model.metrics.compact import CompactExtractor
from tatok_model.metrics.small_resnet import SmallResNet
from tatok_model.metrics.trainable import TrainableExtractor, metadata

ARCHITECTURES: dict[str, Callable[[int, int], TrainableExtractor]] = {  # of classes and image size, random weights
    network.architecture: network for network in (CompactExtractor, SmallResNet)
}


def load_trained(path: str | Path) -> TrainableExtractor:
    """The network of a file that `jobs/train_extractor.py` wrote, named after its architecture and picture size.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, of an unknown architecture, or without the weights that it claims.
    """
    try:
        about = metadata(path)
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is no safetensors file: {str(error).splitlines()[0]}") from None
    architecture = about.get("architecture", CompactExtractor.architecture)
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{str(path)!r} holds a feature network of architecture {architecture!r}; "
            f"expected {' or '.join(ARCHITECTURES)}"
        )
    try:
        sizes = int(about.get("classes", 10)), int(about.get("image_size", 32))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} does not say how many classes and pixels it is for: {error}") from None
    return ARCHITECTURES[architecture](*sizes).load_file(path)
