"""The loop that trains the compact feature network, and how it is measured.

SGD with Nesterov momentum, one cycle of the learning rate, label smoothing, random shift and flip, in one process.
What decides the weights is in `extractor.*`, `train.seed`, `train.precision` and the pictures.

Shapes: B pictures of a batch.
"""

import json
import time
from contextlib import AbstractContextManager
from dataclasses import asdict

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from pipeline.config import Config
from pipeline.errors import BadInput, Stopped
from pipeline.labelled import Labelled, augment
from pipeline.paths import write_atomically
from pipeline.progress import Progress, progress, say
from pipeline.run import Run
from pipeline.tracking import Tracker
from tatok_model.metrics.compact import CompactExtractor

MOMENTUM = 0.9
LABEL_SMOOTHING = 0.1
RISING = 0.2  # share of the steps in which the learning rate rises; it falls to 0 in the rest
VALIDATION_SHARE = 0.04  # of the training pictures, chosen by seed: choices are made on these, never on the test file
LAST_EPOCH = "last_epoch.safetensors"  # where a stopped run goes on


def train(run: Run, network: CompactExtractor, pictures: Labelled, tracker: Tracker) -> int:
    """All epochs, or those that an earlier attempt left; the state is kept after each. Returns the number of steps.

    Raises:
        BadInput: fewer training pictures than one batch, or a state to go on from that was configured differently.
        Stopped: asked to stop.
    """
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
    run.rewind_metrics(first * steps)
    with progress("training", settings.epochs * steps, "steps", done=first * steps) as bar:
        for epoch in range(first, settings.epochs):
            started = time.perf_counter()
            loss = _train_epoch(run, network, optimizer, training, epoch, bar)
            rate = steps * settings.batch_size / (time.perf_counter() - started)
            accuracy, _ = measure(network, validation)
            metrics = {"train/loss": loss, "train/images_per_second": rate, "validation/accuracy": accuracy}
            run.log(metrics, step=(epoch + 1) * steps)
            say(f"epoch {epoch + 1}: loss {loss:.3f}, validation accuracy {accuracy:.2%}, {rate:.0f} images/s")
            _keep(run, network, optimizer, epoch + 1)
            tracker.commit()
    return settings.epochs * steps


def measure(network: CompactExtractor, pictures: Labelled, batch_size: int = 250) -> tuple[float, float]:
    """The share of pictures that get their label, and how many pictures a second went through the network.

    The network is left in evaluation mode.
    """
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
    run: Run, network: CompactExtractor, optimizer: Optimizer, training: Labelled, epoch: int, bar: Progress
) -> float:
    """One pass, whose order, shifts and flips depend on seed and epoch alone; returns the mean loss."""
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


def _optimizer(network: CompactExtractor, weight_decay: float) -> Optimizer:
    """SGD; biases and normalisation are not decayed. The loop sets the learning rate at every step."""
    kernels = [value for value in network.parameters() if value.ndim > 1]
    others = [value for value in network.parameters() if value.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return SGD(groups, momentum=MOMENTUM, nesterov=True)


def _autocast(config: Config, images: Tensor) -> AbstractContextManager[None]:
    kind, precision = images.device.type, config.train.precision
    enabled = precision == "bf16" or (precision == "auto" and kind == "cuda")
    return torch.autocast(kind, torch.bfloat16, enabled=enabled)


def _keep(run: Run, network: CompactExtractor, optimizer: Optimizer, epochs: int) -> None:
    """Write what the next epoch starts from: the network, the momentum, and what was configured."""
    momentum = {name: optimizer.state[value]["momentum_buffer"] for name, value in network.named_parameters()}
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    tensors |= {f"momentum.{name}": value for name, value in momentum.items()}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    write_atomically(run.folder / LAST_EPOCH, save(tensors, {"epochs": str(epochs), "settings": settings_text(run)}))


def _restore(run: Run, network: CompactExtractor, optimizer: Optimizer) -> int:
    """Load what `_keep` wrote, if anything, and return how many epochs it has seen."""
    path = run.folder / LAST_EPOCH
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        kept = file.metadata()
        if kept["settings"] != settings_text(run):
            raise BadInput(f"{str(path)!r} was trained with {kept['settings']}; expected {settings_text(run)} to go on")
        network.load_state_dict({name: file.get_tensor(f"network.{name}") for name in network.state_dict()})
        for name, value in network.named_parameters():
            optimizer.state[value]["momentum_buffer"] = file.get_tensor(f"momentum.{name}").to(value.device)
    say(f"going on after epoch {kept['epochs']}")
    return int(kept["epochs"])


def settings_text(run: Run) -> str:
    """What decides the weights beside the pictures."""
    train = run.config.train
    return json.dumps({**asdict(run.config.extractor), "seed": train.seed, "precision": train.precision})
