"""One training worker: builds what the loop needs from the configuration, runs it, reports.

In-process training calls `work` directly, Ray Train calls it in every worker. What it leaves behind lies in the run
folder, which all workers and the driver share: checkpoints, pictures, metrics.jsonl; a file `stop` asks it to end.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from pipeline import checkpoints
from pipeline.checkpoints import check_same_architecture
from pipeline.config import Config
from pipeline.data.shards import ShardDataset
from pipeline.errors import BadInput, Stopped
from pipeline.grids import save_rows
from pipeline.progress import Progress, say
from pipeline.run import Run
from pipeline.training import distributed
from pipeline.training.batches import Batches
from pipeline.training.loop import Hooks, train
from pipeline.training.objective import Objective
from pipeline.training.order import SampleOrder
from pipeline.training.state import TrainState
from pipeline.training.validation import Validator
from tatok_model.losses import ReconstructionLoss
from tatok_model.metrics.compact import CompactExtractor
from tatok_model.tokenizer import TaTok

STOP_FILE = "stop"


def work(
    run: Run,
    device: torch.device,
    wrap: Callable[[torch.nn.Module], torch.nn.Module],
    report: Callable[[dict[str, float]], None] = lambda metrics: None,
) -> dict[str, Any]:
    """Train this worker's part to the end of the run.

    Args:
        run: the run folder and the configuration; `data.shards` names existing shards.
        device: where this worker computes.
        wrap: prepares a module for several workers.
        report: told the latest validation metrics at every checkpoint, on every worker.

    Returns:
        `results` by name, and `stopped`: why it ended early, or ''.
    """
    config, train_config = run.config, run.config.train
    state = _starting_state(config, run.folder / "checkpoints", device)
    validator = Validator(
        ShardDataset(config.data.shards, "heldout"),
        train_config.validation_images,
        train_config.grid_images,
        CompactExtractor.shipped(),
        device,
    )
    pictures = ShardDataset(config.data.shards, "train")
    order = SampleOrder(len(pictures), train_config.seed, train_config.global_batch_size, local=not pictures.in_memory)
    batches = Batches(pictures, order, distributed.rank(), distributed.world_size(), train_config.horizontal_flip)
    objective = Objective(state, _losses(config, device), device, uses_bf16(config, device), wrap)
    recorder = Recorder(run, validator, report, state.step)
    started = time.monotonic()
    stopped = ""
    try:
        train(objective, batches, train_config, recorder.hooks())
    except Stopped as reason:
        stopped = str(reason)
    finally:
        recorder.close()
    results = {name.replace("/", "_"): value for name, value in recorder.validated.items()}
    results |= {
        "steps": float(state.step),
        "images_seen": float(state.step * train_config.global_batch_size),
        "train_seconds": time.monotonic() - started,
        "parameters": float(sum(p.numel() for p in state.model.parameters())),
        "images_per_second": recorder.images_per_second,
    }
    return {"results": results, "stopped": stopped}


class Recorder:
    """The loop's hooks: what is logged, drawn and saved, on the first worker only."""

    def __init__(
        self, run: Run, validator: Validator, report: Callable[[dict[str, float]], None], first_step: int
    ) -> None:
        self.run, self.validator, self.report = run, validator, report
        self.validated: dict[str, float] = {}
        self.images_per_second = 0.0
        self.first = distributed.rank() == 0
        self._progress: Progress | None = None
        if self.first:
            run.rewind_metrics(first_step)
            batch, steps = run.config.train.global_batch_size, run.config.train.max_steps
            self._progress = Progress("train", batch * steps, "images", done=batch * first_step)

    def hooks(self) -> Hooks:
        """As the loop wants them."""
        return Hooks(self.log, self.validate, self.save, self.advance, self.stop_reason)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Append to metrics.jsonl."""
        self.images_per_second = metrics.get("train/images_per_second", self.images_per_second)
        if self.first:
            self.run.log(metrics, step)

    def validate(self, state: TrainState) -> None:
        """Measure the averaged model and draw originals over reconstructions."""
        self.validated = self.validator.measure(state.average)
        self.log(self.validated, state.step)
        if self.first and self.validator.grid:
            path = self.run.folder / "pictures" / f"step-{state.step:08d}.png"
            save_rows(path, self.validator.examples(state.average))
        if self.first:
            values = ", ".join(f"{k.removeprefix('validation/')} {v:.4g}" for k, v in self.validated.items())
            say(f"step {state.step}: {values}")

    def save(self, state: TrainState) -> None:
        """Write a checkpoint; no worker goes on before it is safe."""
        if self.first:
            config = self.run.config.train
            seen = state.step * config.global_batch_size
            folder = self.run.folder / "checkpoints"
            checkpoints.save(
                folder, state.step, state.average, state.tensors(), config.keep_checkpoints, samples_seen=seen
            )
        distributed.wait_for_all()
        self.report({**self.validated, "step": state.step})

    def advance(self, images: int, loss: float) -> None:
        """Move the progress bar."""
        if self._progress is not None:
            self._progress.advance(images, loss=f"{loss:.4g}")

    def stop_reason(self) -> str:
        """Somebody put a file `stop` into the run folder: the driver, when it is told to end."""
        return "stopped" if (self.run.folder / STOP_FILE).exists() else ""

    def close(self) -> None:
        """End the progress bar."""
        if self._progress is not None:
            with suppress(OSError):
                self._progress.close()


def _starting_state(config: Config, folder: Path, device: torch.device) -> TrainState:
    """From the run's newest checkpoint, else from `tokenizer.checkpoint`, else new."""
    state = TrainState(config, device)
    checkpoint = checkpoints.latest(folder)
    if checkpoint is not None:
        state.load(checkpoint)
        say(f"going on from step {state.step}")
    elif config.tokenizer.checkpoint:
        path = config.tokenizer.checkpoint
        weights = TaTok.from_pretrained(path if checkpoints.is_hub_id(path) else checkpoints.find(path))
        check_same_architecture(path, weights.config, config.tokenizer.architecture())
        state.start_from(weights)
    return state


def _losses(config: Config, device: torch.device) -> ReconstructionLoss:
    perceptual = None
    if config.losses.perceptual:
        from tatok_model.lpips import LPIPS

        perceptual = LPIPS.from_files(config.losses.perceptual_backbone, config.losses.perceptual_heads)
    return ReconstructionLoss(config.losses, perceptual).to(device)


def uses_bf16(config: Config, device: torch.device) -> bool:
    """Whether to compute in bfloat16: as configured, by default on a GPU that can."""
    if config.train.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return config.train.precision == "bf16"


def pick_device(config: Config) -> torch.device:
    """The configured device; `auto` is a GPU where there is one.

    Raises:
        BadInput: a GPU is wanted where there is none.
    """
    if config.train.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("train.device is 'cuda'; expected cpu or auto on a machine without a CUDA GPU")
    if config.train.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.train.device)


def compiled(config: Config) -> Callable[[torch.nn.Module], torch.nn.Module]:
    """`torch.compile` when it is asked for."""
    return torch.compile if config.train.compile else lambda module: module  # type: ignore[return-value]
