"""Train the compact feature network on labelled pictures (CIFAR-10's ten classes, 32 pixels) and measure its accuracy.

A plain loop in one process: SGD with Nesterov momentum, one cycle of the learning rate, random shift and flip, label
smoothing. What decides the weights is in `extractor.*`, `train.seed` and `train.precision`; of the rest of `train`
only `device` is read. The weights in the package were made by `pipeline/configs/extractor_cifar10.yaml`.

Shapes: B pictures of a batch.
"""

import json
import shlex
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import Config
from pipeline.errors import BadInput, Stopped
from pipeline.paths import sha256_file, write_atomically
from pipeline.progress import Progress, progress, say
from pipeline.run import Run, commit

if TYPE_CHECKING:  # torch is imported inside functions: `check` answers without it
    import torch
    from torch import Tensor

    from pipeline.labelled import Labelled
    from tatok_model.metrics.compact import CompactExtractor

SIDE = 32  # pixels that the network sees
MOMENTUM = 0.9
LABEL_SMOOTHING = 0.1
RISING = 0.2  # share of the steps in which the learning rate rises; it falls to 0 in the rest
VALIDATION_SHARE = 0.04  # of the training pictures, chosen by seed: choices are made on these, never on the test file
LAST_EPOCH = "last_epoch.safetensors"  # where a stopped run goes on


def check(config: Config) -> None:
    """Refuse what cannot work before anything is read.

    Raises:
        BadInput: no training or test file, one that does not exist, or pictures of another size than the network's.
    """
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
        BadInput: a file that does not hold what is expected (see `read_labelled`), too few pictures for a batch, or
            a state to go on from that was configured differently.
        Stopped: asked to stop; the state after the last whole epoch is in the run folder.
    """
    import torch

    from pipeline.labelled import read_labelled
    from tatok_model.metrics.compact import CompactExtractor

    config = run.config
    training, test = (read_labelled(source, config.data, CompactExtractor.classes) for _, _, source in _sources(config))
    for name, (_, _, source) in zip(("train", "test"), _sources(config), strict=True):
        run.inputs[name] = {"path": source, "sha256": sha256_file(Path(source))}
    device = _device(config)
    torch.manual_seed(config.train.seed)
    network = CompactExtractor().to(device)
    train(run, network, training.to(device))
    path = run.folder / "extractor.safetensors"
    network.save(path, {})
    network = CompactExtractor.from_file(path).to(device)  # measured as rounded and written
    test_accuracy, images_per_second = measure(network, test.to(device))
    network.save(path, _description(run, test_accuracy))
    run.outputs["extractor"] = str(path)
    run.results = {
        "test_accuracy": test_accuracy,
        "images_per_second": images_per_second,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }
    say(f"test accuracy {test_accuracy:.2%}, {images_per_second:.0f} images/s, weights in {path}")


def train(run: Run, network: "CompactExtractor", pictures: "Labelled") -> None:
    """All epochs, or those that an earlier attempt left; the state is kept after each.

    Raises:
        BadInput: fewer training pictures than one batch, or see `_restore`.
        Stopped: asked to stop.
    """
    import torch

    settings = run.config.extractor
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(run.config.train.seed))
    share = max(1, round(VALIDATION_SHARE * len(pictures)))
    validation, training = pictures.take(order[:share]), pictures.take(order[share:])
    steps = len(training) // settings.batch_size  # of an epoch; a last, smaller batch is left out
    if steps == 0:
        raise BadInput(
            f"extractor.batch_size is {settings.batch_size}; expected at most {len(training)}, the number of training "
            f"pictures without the {share} for validation"
        )
    optimizer = _optimizer(network, settings.weight_decay)
    first = _restore(run, network, optimizer)
    with progress("training", settings.epochs * steps, "steps", done=first * steps) as bar:
        for epoch in range(first, settings.epochs):
            started = time.perf_counter()
            loss = _train_epoch(run, network, optimizer, training, epoch, bar)
            rate = steps * settings.batch_size / (time.perf_counter() - started)
            accuracy, _ = measure(network, validation)
            metrics = {"loss": loss, "validation_accuracy": accuracy, "training_images_per_second": rate}
            run.log(metrics, step=(epoch + 1) * steps)
            say(f"epoch {epoch + 1}: loss {loss:.3f}, validation accuracy {accuracy:.2%}, {rate:.0f} images/s")
            _keep(run, network, optimizer, epoch + 1)


def measure(network: "CompactExtractor", pictures: "Labelled", batch_size: int = 250) -> tuple[float, float]:
    """The share of pictures that get their label, and how many pictures a second went through the network.

    The network is left in evaluation mode.
    """
    import torch

    network.eval()
    started, right = time.perf_counter(), 0
    with torch.inference_mode():
        for first in range(0, len(pictures), batch_size):
            batch = slice(first, first + batch_size)
            _, logits = network(pictures.images[batch].permute(0, 3, 1, 2))
            right += int((logits.argmax(1) == pictures.labels[batch]).sum())
    return right / len(pictures), len(pictures) / (time.perf_counter() - started)


def one_cycle(done: float) -> float:
    """The learning rate as a share of its peak after a share `done` of all steps: straight up, then straight down."""
    return done / RISING if done < RISING else (1 - done) / (1 - RISING)


def _train_epoch(
    run: Run,
    network: "CompactExtractor",
    optimizer: "torch.optim.Optimizer",
    training: "Labelled",
    epoch: int,
    bar: Progress,
) -> float:
    """One pass, whose order, shifts and flips depend on seed and epoch alone; returns the mean loss."""
    import torch
    from torch.nn import functional as F

    from pipeline.labelled import augment

    settings, total = run.config.extractor, 0.0
    generator = torch.Generator().manual_seed(run.config.train.seed * 1_000_003 + epoch + 1)
    steps = len(training) // settings.batch_size
    order = torch.randperm(len(training), generator=generator)[: steps * settings.batch_size]
    network.train()
    for number, indices in enumerate(order.view(steps, settings.batch_size)):
        if run.should_stop:
            raise Stopped(f"stopped in epoch {epoch + 1} of {settings.epochs}; --resume goes on from its start")
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * one_cycle((epoch + number / steps) / settings.epochs)
        batch = training.take(indices)
        images = augment(batch.images, generator).permute(0, 3, 1, 2)  # (B, 3, 32, 32), channels last in memory
        with _autocast(run.config, images):
            _, logits = network(images)
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
        bar.advance(1, epoch=str(epoch + 1), loss=f"{loss.item():.3f}")
    return total / steps


def _keep(run: Run, network: "CompactExtractor", optimizer: "torch.optim.Optimizer", epochs: int) -> None:
    """Write what the next epoch starts from: the network, the momentum, and what was configured."""
    from safetensors.torch import save

    momentum = {name: optimizer.state[value]["momentum_buffer"] for name, value in network.named_parameters()}
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    tensors |= {f"momentum.{name}": value for name, value in momentum.items()}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    write_atomically(run.folder / LAST_EPOCH, save(tensors, {"epochs": str(epochs), "settings": _settings(run)}))


def _restore(run: Run, network: "CompactExtractor", optimizer: "torch.optim.Optimizer") -> int:
    """Load what `_keep` wrote, if anything, and return how many epochs it has seen.

    Raises:
        BadInput: it belongs to a run that was configured differently.
    """
    from safetensors import safe_open

    path = run.folder / LAST_EPOCH
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        if metadata["settings"] != _settings(run):
            raise BadInput(f"{str(path)!r} was trained with {metadata['settings']}; expected {_settings(run)} to go on")
        network.load_state_dict({name: file.get_tensor(f"network.{name}") for name in network.state_dict()})
        for name, value in network.named_parameters():
            optimizer.state[value]["momentum_buffer"] = file.get_tensor(f"momentum.{name}").to(value.device)
    say(f"going on after epoch {metadata['epochs']}")
    return int(metadata["epochs"])


def _settings(run: Run) -> str:
    """What decides the weights beside the pictures."""
    train = run.config.train
    return json.dumps({**asdict(run.config.extractor), "seed": train.seed, "precision": train.precision})


def _description(run: Run, test_accuracy: float) -> dict[str, str]:
    """What the weight file says about itself."""
    code = commit()
    return {
        "command": shlex.join(["python", *sys.argv]),
        "settings": _settings(run),
        "test_accuracy": f"{test_accuracy:.4f}",
        "commit": code["commit"] + ("-dirty" if code["dirty"] else ""),
        **{f"{name}_sha256": source["sha256"] for name, source in run.inputs.items()},
    }


def _sources(config: Config) -> list[tuple[str, str, str]]:
    """Training and test file, each as (key, the key it falls back to, path)."""
    extractor, data = config.extractor, config.data
    return [
        ("extractor.train_source", "data.source", extractor.train_source or data.source),
        ("extractor.test_source", "data.heldout_source", extractor.test_source or data.heldout_source),
    ]


def _device(config: Config) -> "torch.device":
    import torch

    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(automatic if config.train.device == "auto" else config.train.device)


def _optimizer(network: "CompactExtractor", weight_decay: float) -> "torch.optim.Optimizer":
    """SGD; biases and normalisation are not decayed. The loop sets the learning rate at every step."""
    import torch

    kernels = [value for value in network.parameters() if value.ndim > 1]
    others = [value for value in network.parameters() if value.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, momentum=MOMENTUM, nesterov=True)


def _autocast(config: Config, images: "Tensor") -> AbstractContextManager[None]:
    import torch

    kind, precision = images.device.type, config.train.precision
    enabled = precision == "bf16" or (precision == "auto" and kind == "cuda")
    return torch.autocast(kind, torch.bfloat16, enabled=enabled)
