"""The loop that trains a feature network, and how it is measured.

SGD with Nesterov momentum, one cycle of the learning rate, label smoothing, random shift and flip, in one process.
What decides the weights is in `extractor.*`, `train.seed`, `train.precision` and the pictures.

Shapes: B pictures of a batch.
"""

import json
import time

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from pipeline.devices import uses_bf16
from pipeline.errors import BadInput, Stopped
from pipeline.labelled import Labelled, augment
from pipeline.paths import write_atomically
from pipeline.progress import Progress, progress, say
from pipeline.run import Run
from pipeline.tracking import Tracker
from tatok_model.metrics.trainable import TrainableExtractor

MOMENTUM = 0.9
LABEL_SMOOTHING = 0.1
RISING = 0.2  # share of the steps in which the learning rate rises; it falls to 0 in the rest
VALIDATION_SHARE = 0.04  # of the training pictures, chosen by seed: choices are made on these, never on the test file
LAST_EPOCH = "last_epoch.safetensors"  # where a stopped run goes on


def train(run: Run, network: TrainableExtractor, pictures: Labelled, tracker: Tracker) -> int:
    """All epochs, or those that an earlier attempt left; the state is kept after each. Returns the number of steps.

    Raises:
        BadInput: fewer training pictures than one batch, or a state to go on from that was configured differently.
        Stopped: asked to stop.
    """
    extractor = run.config.extractor
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(run.config.train.seed))
    share = max(1, round(VALIDATION_SHARE * len(pictures)))
    validation, training = pictures.take(order[:share]), pictures.take(order[share:])
    steps = len(training) // extractor.batch_size  # of an epoch; a last, smaller batch is left out
    if steps == 0:
        raise BadInput(
            f"extractor.batch_size is {extractor.batch_size}; expected at most {len(training)}, the number of training "
            f"pictures without the {share} for validation"
        )
    optimizer = _optimizer(network, extractor.weight_decay)
    first = _restore(run, network, optimizer)
    run.rewind_metrics(first * steps)
    with progress("training", extractor.epochs * steps, "steps", done=first * steps) as bar:
        for epoch in range(first, extractor.epochs):
            started = time.perf_counter()
            loss = _train_epoch(run, network, optimizer, training, epoch, bar)
            rate = steps * extractor.batch_size / (time.perf_counter() - started)
            accuracy, _ = measure(network, validation)
            metrics = {"train/loss": loss, "train/images_per_second": rate, "validation/accuracy": accuracy}
            run.log(metrics, step=(epoch + 1) * steps)
            say(f"epoch {epoch + 1}: loss {loss:.3f}, validation accuracy {accuracy:.2%}, {rate:.0f} images/s")
            _keep(run, network, optimizer, epoch + 1)
            tracker.commit()
    return extractor.epochs * steps


def measure(network: TrainableExtractor, pictures: Labelled, batch_size: int = 250) -> tuple[float, float]:
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
    run: Run, network: TrainableExtractor, optimizer: Optimizer, training: Labelled, epoch: int, bar: Progress
) -> float:
    """One pass, whose order, shifts and flips depend on seed and epoch alone; returns the mean loss."""
    extractor, total = run.config.extractor, 0.0
    generator = torch.Generator().manual_seed(run.config.train.seed * 1_000_003 + epoch + 1)
    steps = len(training) // extractor.batch_size
    order = torch.randperm(len(training), generator=generator)[: steps * extractor.batch_size]
    bf16 = uses_bf16(run.config.train.precision, training.images.device)
    network.train()
    for number, indices in enumerate(order.view(steps, extractor.batch_size)):
        if run.should_stop:
            raise Stopped(f"stopped in epoch {epoch + 1} of {extractor.epochs}; --resume goes on from its start")
        for group in optimizer.param_groups:
            group["lr"] = extractor.learning_rate * one_cycle((epoch + number / steps) / extractor.epochs)
        batch = training.take(indices)
        images = augment(batch.images, generator).permute(0, 3, 1, 2)  # (B, 3, side, side), channels last in memory
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            _, logits = network(images)
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
        bar.advance(1, epoch=str(epoch + 1), loss=f"{loss.item():.3f}")
    return total / steps


def _optimizer(network: TrainableExtractor, weight_decay: float) -> Optimizer:
    """SGD; biases and normalisation are not decayed. The loop sets the learning rate at every step."""
    kernels = [value for value in network.parameters() if value.ndim > 1]
    others = [value for value in network.parameters() if value.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return SGD(groups, momentum=MOMENTUM, nesterov=True)


def _keep(run: Run, network: TrainableExtractor, optimizer: Optimizer, epochs: int) -> None:
    """Write what the next epoch starts from: the network, the momentum, and what was configured."""
    momentum = {name: optimizer.state[value]["momentum_buffer"] for name, value in network.named_parameters()}
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    tensors |= {f"momentum.{name}": value for name, value in momentum.items()}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    write_atomically(run.folder / LAST_EPOCH, save(tensors, {"epochs": str(epochs), "settings": settings(run)}))


def _restore(run: Run, network: TrainableExtractor, optimizer: Optimizer) -> int:
    """Load what `_keep` wrote, if anything, and return how many epochs it has seen."""
    path = run.folder / LAST_EPOCH
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        kept = file.metadata()
        asked, trained = json.loads(settings(run)), json.loads(kept["settings"])
        for name, value in asked.items():
            if trained.get(name) != value:
                raise BadInput(
                    f"{name} is {value!r}; expected {trained.get(name)!r}, with which {str(path)!r} was trained"
                )
        network.load_state_dict({name: file.get_tensor(f"network.{name}") for name in network.state_dict()})
        for name, value in network.named_parameters():
            optimizer.state[value]["momentum_buffer"] = file.get_tensor(f"momentum.{name}").to(value.device)
    say(f"going on after epoch {kept['epochs']}")
    return int(kept["epochs"])


def settings(run: Run) -> str:
    """What decides the weights, as JSON: where the pictures lie does not."""
    extractor, train = run.config.extractor, run.config.train
    names = ("architecture", "epochs", "batch_size", "learning_rate", "weight_decay")
    values = {name: getattr(extractor, name) for name in names} | {"image_size": run.config.data.image_size}
    values |= {"seed": train.seed, "precision": train.precision, "train_sha256": run.inputs["train"]["sha256"]}
    return json.dumps(values)
