"""The stage behind `jobs/train_extractor.py`: train a feature network on labelled pictures and measure its accuracy.

Of the section `train` only seed, precision and device are used. The weights in the package were made by
`configs/extractor_cifar10.yaml`.
"""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.cluster import check_device, pick_device
from pipeline.core.config import Config
from pipeline.core.console import say
from pipeline.core.errors import BadInput
from pipeline.core.files import sha256_file
from pipeline.core.run import Run, commit
from pipeline.data.shards import read_manifest
from pipeline.tracking import Tracker, check_tracking

if TYPE_CHECKING:  # torch is imported inside functions: `check` answers without it
    from pipeline.training.extractor_training import Labelled
    from tatok_model.metrics.extractors.extractor import TrainableExtractor

SMALLEST = 16  # pixels a side: the networks halve it down to 4


def check(config: Config) -> None:
    """Refuse pictures that are missing, too small or of another size, and a tracking address of unknown form."""
    check_device("train", config.train.device)
    check_tracking(config)
    if config.data.image_size < SMALLEST:
        raise BadInput(f"data.image_size is {config.data.image_size}; expected at least {SMALLEST} pixels")
    for key, fallback, source, _ in _sources(config):
        if not source:
            raise BadInput(
                f"{key}, data.shards and {fallback} are empty; expected one of them to name labelled pictures"
            )
        if not Path(source).exists():
            raise BadInput(f"{key} is {source!r}, which does not exist; expected a labelled Parquet file or shards")
        if Path(source).is_dir():
            made_for = read_manifest(source).image_size
            if made_for != config.data.image_size:
                raise BadInput(
                    f"data.image_size is {config.data.image_size}; expected {made_for}, as shards {source!r}"
                )


def default_name(config: Config) -> str:
    """The run folder's name when `run.name` is empty."""
    return f"{config.preset}-extractor"


def run(run: Run) -> None:
    """Train, write `extractor.safetensors`, and measure the written weights on the test pictures.

    Raises:
        BadInput: as `read_labelled` and `extractor_training.train`.
        Stopped: the run was asked to stop; the state after the last whole epoch is in the run folder.
    """
    import torch

    from pipeline.training.extractor_training import read_labelled, train
    from tatok_model.metrics.extractors.small_networks import ARCHITECTURES

    config = run.config
    (*_, source, split), (*_, test_source, test_split) = _sources(config)
    training = read_labelled(source, config.data, split)
    test = read_labelled(test_source, config.data, test_split, training.classes)
    for name, path in (("train", source), ("test", test_source)):
        run.inputs[name] = {"path": path, "sha256": _fingerprint(path)}
    origin = _origin(run)  # before training: the checkout may change meanwhile
    torch.manual_seed(config.train.seed)
    device = pick_device("train", config.train.device)
    network = ARCHITECTURES[config.extractor.architecture](training.classes, config.data.image_size).to(device)
    with Tracker.start(run) as tracker:
        steps = train(run, network, training.to(device), tracker)
        _export(run, network, test.to(device), origin)
        run.log({"test/accuracy": run.results["test_accuracy"]}, steps)


def _fingerprint(source: str) -> str:
    """Checksum of a file, or of a folder of shards."""
    return read_manifest(source).fingerprint if Path(source).is_dir() else sha256_file(Path(source))


def _origin(run: Run) -> dict[str, str]:
    """Origin of the weights, for the metadata of the weight file."""
    from pipeline.training.extractor_training import settings

    code = commit()
    return {
        "command": shlex.join(["python", *sys.argv]),
        "settings": settings(run),
        "test_sha256": run.inputs["test"]["sha256"],
        "commit": code["commit"] + ("-dirty" if code["dirty"] else ""),
    }


def _export(run: Run, network: "TrainableExtractor", test: "Labelled", origin: dict[str, str]) -> None:
    """Write the weights, measure them as written, in float16, and add the accuracy to the file's metadata."""
    from pipeline.training.extractor_training import measure
    from tatok_model.metrics.extractors.small_networks import load_trained

    path = run.folder / "extractor.safetensors"
    network.save(path, origin)
    network = load_trained(path).to(test.images.device)
    test_accuracy, images_per_second = measure(network, test)
    network.save(path, {**origin, "test_accuracy": f"{test_accuracy:.4f}"})
    run.outputs["extractor"] = str(path)
    run.results = {
        "test_accuracy": test_accuracy,
        "images_per_second": images_per_second,
        "classes": network.classes,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }
    say(f"{network.name}: test accuracy {test_accuracy:.2%}, {images_per_second:.0f} images/s")


def _sources(config: Config) -> list[tuple[str, str, str, str]]:
    """Training and test pictures, each as (key, the key it falls back to, path, split if they are shards)."""
    extractor, data = config.extractor, config.data
    train_source = extractor.train_source or data.shards or data.source
    test_source = extractor.test_source or data.shards or data.heldout_source
    return [
        ("extractor.train_source", "data.source", train_source, "train"),
        ("extractor.test_source", "data.heldout_source", test_source, "heldout"),
    ]
