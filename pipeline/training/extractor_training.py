"""Training a feature network on labelled pictures: reading them, the loop, and measuring accuracy.

SGD with Nesterov momentum, one cycle of the learning rate, label smoothing, random shift and flip, in one process.
Only `extractor.*`, `train.seed`, `train.precision` and the pictures decide the weights.

Shapes: B pictures of a batch.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from pipeline.core.cluster import uses_bf16
from pipeline.core.config import DataConfig
from pipeline.core.console import Progress, progress, say
from pipeline.core.errors import BadInput, Stopped
from pipeline.core.files import locate, write_atomically
from pipeline.core.run import Run
from pipeline.data.pictures import BadPicture, decode, prepare
from pipeline.data.shards import ShardDataset
from pipeline.data.tables import check_parquet, read_parquet
from pipeline.tracking import Tracker
from tatok_model.metrics.extractors.extractor import TrainableExtractor

MAX_SHIFT = 4  # pixels
READ = 256  # pictures read from shards at a time
MOMENTUM = 0.9
LABEL_SMOOTHING = 0.1
WARM_UP = 0.2  # share of the steps in which the learning rate rises; it falls to 0 in the rest
VALIDATION_SHARE = 0.04  # of the training pictures, chosen by seed, so that no choice is made on the test file
LAST_EPOCH = "last_epoch.safetensors"  # from which a stopped run resumes


@dataclass(frozen=True)
class Labelled:
    """Pictures of one size and their classes, in memory."""

    images: Tensor  # (B, side, side, 3) uint8 RGB
    labels: Tensor  # (B,) int64

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> int:
        """Number of classes: the largest label + 1."""
        return int(self.labels.max()) + 1

    def take(self, indices: Tensor) -> "Labelled":
        """The pictures at (B,) int64 `indices`, in their order."""
        indices = indices.to(self.labels.device)
        return Labelled(self.images[indices], self.labels[indices])

    def to(self, device: torch.device) -> "Labelled":
        """The same pictures on another device."""
        return Labelled(self.images.to(device), self.labels.to(device))


def read_labelled(path: str, data: DataConfig, split: str = "train", classes: int | None = None) -> Labelled:
    """Every picture of a Parquet file, made square as in a shard, or of a split of shards, with its class.

    Labels are 0 to `classes` - 1; without `classes`, any integer from 0.

    Raises:
        BadInput: neither shards nor a Parquet file with a column of pictures, no rows, a row that is not a picture, an
            invalid label.
    """
    images: list[np.ndarray] = []
    labels: list[int] = []
    rows = _of_shards(path, split) if Path(path).is_dir() else _of_parquet(path, data)
    for row, (image, label) in enumerate(rows):
        if not isinstance(label, int) or not 0 <= label < (classes or label + 1):
            expected = "classes from 0" + (f" to {classes - 1}" if classes else "")
            raise BadInput(
                f"row {row} of {path!r} has the label {label!r}; expected data.label_column to hold {expected}"
            )
        images.append(image)
        labels.append(label)
    if not labels:
        raise BadInput(f"{path!r} has no rows; expected labelled pictures")
    return Labelled(torch.from_numpy(np.stack(images)), torch.tensor(labels))


def _of_parquet(path: str, data: DataConfig) -> Iterator[tuple[np.ndarray, object]]:
    place = locate(path)
    rows = check_parquet(place, data)
    for row, picture in enumerate(read_parquet(place.parent, [[place.name, 0, rows]], data)):
        try:
            yield decode(prepare(picture.data, data)), picture.label
        except BadPicture as reason:
            raise BadInput(f"row {row} of {path!r} is not a usable picture: {reason}") from None


def _of_shards(folder: str, split: str) -> Iterator[tuple[np.ndarray, object]]:
    pictures = ShardDataset(folder, split)
    for start in range(0, len(pictures), READ):
        numbers = range(start, min(start + READ, len(pictures)))
        yield from zip(pictures.images(numbers), pictures.labels(numbers).tolist(), strict=True)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift every picture by up to 4 pixels, borders reflected, and mirror half of them.

    Args:
        images: (B, side, side, 3) uint8.
        generator: of the random shifts; on the CPU, whatever the device of the images.
    """
    count, side = images.shape[:2]
    shift = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (2, count, 1), generator=generator)
    rows, columns = (_reflect(offset + torch.arange(side), side) for offset in shift)  # (B, side) source indices
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    batch, rows, columns = (indices.to(images.device) for indices in (torch.arange(count), rows, columns))
    return images[batch[:, None, None], rows[:, :, None], columns[:, None, :]]


def _reflect(indices: Tensor, side: int) -> Tensor:
    """Indices reflected at 0 and at side - 1, so that all lie between them."""
    last = side - 1
    return last - (last - indices.abs()).abs()


def train(run: Run, network: TrainableExtractor, pictures: Labelled, tracker: Tracker) -> int:
    """Train to the last epoch, from the state after the last whole one if there is any. Returns the number of steps.

    Raises:
        BadInput: fewer training pictures than one batch, or a saved state of another configuration.
        Stopped: the run was asked to stop; it resumes from the last whole epoch.
    """
    extractor = run.config.extractor
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(run.config.train.seed))
    held_out = max(1, round(VALIDATION_SHARE * len(pictures)))
    validation, training = pictures.take(order[:held_out]), pictures.take(order[held_out:])
    steps = len(training) // extractor.batch_size  # per epoch; a last, smaller batch is left out
    if steps == 0:
        raise BadInput(
            f"extractor.batch_size is {extractor.batch_size}; expected at most {len(training)}, the number of training "
            f"pictures without the {held_out} for validation"
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
    """Accuracy from 0 to 1, and pictures per second.

    Leaves the network in evaluation mode.
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
    """Learning rate as a share of its peak after the share `done` of all steps: linear warm-up, then linear decay."""
    return done / WARM_UP if done < WARM_UP else (1 - done) / (1 - WARM_UP)


def _train_epoch(
    run: Run, network: TrainableExtractor, optimizer: Optimizer, training: Labelled, epoch: int, bar: Progress
) -> float:
    """One epoch, whose order, shifts and flips depend on seed and epoch only; returns the mean loss."""
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
    """SGD without weight decay on biases and normalisation. The loop sets the learning rate at every step."""
    kernels = [value for value in network.parameters() if value.ndim > 1]
    others = [value for value in network.parameters() if value.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return SGD(groups, momentum=MOMENTUM, nesterov=True)


def _keep(run: Run, network: TrainableExtractor, optimizer: Optimizer, epochs: int) -> None:
    """Save the state for the next epoch: network, momentum, and the settings that decide the weights."""
    momentum = {name: optimizer.state[value]["momentum_buffer"] for name, value in network.named_parameters()}
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    tensors |= {f"momentum.{name}": value for name, value in momentum.items()}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    write_atomically(run.folder / LAST_EPOCH, save(tensors, {"epochs": str(epochs), "settings": settings(run)}))


def _restore(run: Run, network: TrainableExtractor, optimizer: Optimizer) -> int:
    """Load what `_keep` wrote, if anything, and return the number of finished epochs."""
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
    """The settings that decide the weights, as JSON: checksums of pictures instead of paths."""
    extractor, train = run.config.extractor, run.config.train
    names = ("architecture", "epochs", "batch_size", "learning_rate", "weight_decay")
    values = {name: getattr(extractor, name) for name in names} | {"image_size": run.config.data.image_size}
    values |= {"seed": train.seed, "precision": train.precision, "train_sha256": run.inputs["train"]["sha256"]}
    return json.dumps(values)
