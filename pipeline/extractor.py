"""Train the compact feature network on labelled pictures (CIFAR-10's ten classes, 32 pixels) and measure its accuracy.

The loop is in `extractor_loop.py`. Of the section `train` only seed, precision and device are read. The weights in the
package were made by `configs/extractor_cifar10.yaml`.
"""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import Config
from pipeline.errors import BadInput
from pipeline.paths import sha256_file
from pipeline.progress import say
from pipeline.run import Run, commit
from pipeline.tracking import Tracker, check_tracking

if TYPE_CHECKING:  # torch is imported inside functions: `check` answers without it
    from pipeline.labelled import Labelled
    from tatok_model.metrics.compact import CompactExtractor

SIDE = 32  # pixels that the network sees


def check(config: Config) -> None:
    """Refuse what cannot work before anything is read.

    Raises:
        BadInput: no training or test file, one that does not exist, pictures of another size than the network's, or a
            tracking address that makes no sense.
    """
    check_tracking(config)
    for key, fallback, source in _sources(config):
        if not source:
            raise BadInput(f"{key} and {fallback} are empty; expected one of them to name a labelled Parquet file")
        if not Path(source).is_file():
            raise BadInput(f"{key} is {source!r}, which is not a file; expected a labelled Parquet file")
    if config.data.image_size != SIDE:
        raise BadInput(f"data.image_size is {config.data.image_size}; expected {SIDE}, what the compact network sees")


def default_name(config: Config) -> str:
    """The run folder's name when `run.name` is empty."""
    return f"{config.preset}-extractor"


def run(run: Run) -> None:
    """Train, write `extractor.safetensors`, and measure what was written once on the test pictures.

    Raises:
        BadInput: a file that does not hold what is expected (see `read_labelled`), or see `extractor_loop.train`.
        Stopped: asked to stop; the state after the last whole epoch is in the run folder.
    """
    import torch

    from pipeline.extractor_loop import train
    from pipeline.labelled import read_labelled
    from pipeline.training.worker import pick_device
    from tatok_model.metrics.compact import CompactExtractor

    config = run.config
    training, test = (read_labelled(source, config.data, CompactExtractor.classes) for _, _, source in _sources(config))
    for name, (_, _, source) in zip(("train", "test"), _sources(config), strict=True):
        run.inputs[name] = {"path": source, "sha256": sha256_file(Path(source))}
    origin = _origin(run)  # now: the clone may move on while the run lasts
    torch.manual_seed(config.train.seed)
    device = pick_device(config)
    network = CompactExtractor().to(device)
    with Tracker.start(run) as tracker:
        steps = train(run, network, training.to(device), tracker)
        _export(run, network, test.to(device), origin)
        run.log({"test/accuracy": run.results["test_accuracy"]}, steps)


def _origin(run: Run) -> dict[str, str]:
    """Where the weights come from, as the weight file says it."""
    from pipeline.extractor_loop import settings

    code = commit()
    return {
        "command": shlex.join(["python", *sys.argv]),
        "settings": settings(run),
        "test_sha256": run.inputs["test"]["sha256"],
        "commit": code["commit"] + ("-dirty" if code["dirty"] else ""),
    }


def _export(run: Run, network: "CompactExtractor", test: "Labelled", origin: dict[str, str]) -> None:
    """Write the weights, then measure the written ones, which were rounded, and add to the file what they reach."""
    from pipeline.extractor_loop import measure
    from tatok_model.metrics.compact import CompactExtractor

    path = run.folder / "extractor.safetensors"
    network.save(path, origin)
    network = CompactExtractor.from_file(path).to(test.images.device)
    test_accuracy, images_per_second = measure(network, test)
    network.save(path, {**origin, "test_accuracy": f"{test_accuracy:.4f}"})
    run.outputs["extractor"] = str(path)
    run.results = {
        "test_accuracy": test_accuracy,
        "images_per_second": images_per_second,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }
    say(f"test accuracy {test_accuracy:.2%}, {images_per_second:.0f} images/s, weights in {path}")


def _sources(config: Config) -> list[tuple[str, str, str]]:
    """Training and test file, each as (key, the key it falls back to, path)."""
    extractor, data = config.extractor, config.data
    return [
        ("extractor.train_source", "data.source", extractor.train_source or data.source),
        ("extractor.test_source", "data.heldout_source", extractor.test_source or data.heldout_source),
    ]
