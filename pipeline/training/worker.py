"""One worker that trains a tokenizer: builds what the loop needs from the configuration, runs it, reports.

In-process training calls `work` directly, Ray Train calls it in every worker. What it leaves behind lies in the run
folder, which all workers and the driver share: checkpoints, pictures, metrics.jsonl; a file `stop` asks it to end.
"""

from collections.abc import Callable
from typing import Any

import torch

from pipeline.config import Config, TrainConfig
from pipeline.data.shards import ShardDataset
from pipeline.devices import uses_bf16
from pipeline.pretrained import load_lpips
from pipeline.run import Run
from pipeline.training import distributed
from pipeline.training.batches import Batches
from pipeline.training.objective import Objective
from pipeline.training.order import SampleOrder
from pipeline.training.recorder import Recorder
from pipeline.training.tokenizer_state import deciding, starting_state
from pipeline.training.validation import Validator
from tatok_model.kept_sets import LANES
from tatok_model.losses import ReconstructionLoss
from tatok_model.metrics.compact import CompactExtractor


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
    state = starting_state(config, run.folder / "checkpoints", device)
    if train_config.parallel == "fsdp2" and distributed.world_size() > 1:
        state.shard()
    validator = Validator(
        ShardDataset(config.data.shards, "heldout"),
        train_config.validation_images,
        train_config.grid_images,
        CompactExtractor.shipped(),
        device,
    )
    pictures = ShardDataset(config.data.shards, "train")
    order = _order(pictures, train_config)
    draws = LANES + config.tokenizer.patch_positions
    batches = Batches(
        pictures, order, distributed.rank(), distributed.world_size(), train_config.horizontal_flip, draws
    )
    objective = Objective(state, _losses(config, device), device, uses_bf16(train_config.precision, device), wrap)
    named = ShardDataset(config.data.shards, "train")  # for the ids: the other serves the thread that reads ahead
    named_order = _order(named, train_config)

    def ids(step: int) -> list[str]:
        return named.ids(named_order.global_batch(step)[0].tolist())

    return Recorder(run, train_config, deciding(config), validator, report, state, ids).train(objective, batches)


def _order(pictures: ShardDataset, config: TrainConfig) -> SampleOrder:
    return SampleOrder(len(pictures), config.seed, config.global_batch_size, local=not pictures.in_memory)


def _losses(config: Config, device: torch.device) -> ReconstructionLoss:
    perceptual = None
    if config.losses.perceptual:
        files = config.losses.perceptual_backbone, config.losses.perceptual_heads
        perceptual = load_lpips("losses.perceptual", *files, config.data.image_size)
    return ReconstructionLoss(config.losses, perceptual).to(device)
