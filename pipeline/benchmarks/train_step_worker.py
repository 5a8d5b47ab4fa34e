"""The contenders of `benchmark.kind=train_step`, taking turns in one Ray Train worker.

- ray_train_loop: `pipeline.training.tokenizer_training.work`, as a training runs it; its own steady rate, which
  leaves out start, validation and checkpoint.
- bare_loop: the same step by hand on pictures that are in memory already: forward, losses, backward, clipping,
  `train.optimizer` with fused AdamW, average of the weights; nothing is logged, watched or keyed.
- bare_float32 or bare_bf16: in the other precision. bare_not_fused: plain AdamW. bare_compiled: `torch.compile`, on a
  GPU or where `train.compile` asks for it (on a CPU it takes minutes).
- global_only: the bare loop of as many tokens as ours, all of them global.
- titok: the bare loop of TiTok's public model with as many tokens, where `benchmark.titok` names its code; by AdamW.

Every bare loop minimises a mean squared error and its quantizer's loss; ours with patch tokens trains q too.

Shapes: B images, H = W image side.
"""

import copy
import dataclasses
import io
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.benchmarks import titok
from pipeline.benchmarks.harness import device_facts, now, take_turns
from pipeline.benchmarks.train_step import BARE, GLOBAL_ONLY, LOOP, TITOK, steps_of
from pipeline.core.cluster import uses_bf16
from pipeline.core.config import Config
from pipeline.core.run import Run, read_metrics
from pipeline.data.shards import ShardDataset
from pipeline.training import tokenizer_training
from pipeline.training.order import Batch, Batches, SampleOrder
from pipeline.training.state import make_optimizer
from tatok_model.config import KeptSetConfig
from tatok_model.entropy import EntropyModel
from tatok_model.kept_sets import LANES
from tatok_model.tokenizer import TaTok

RATE = "train/images_per_second"
LossOf = Callable[[nn.Module, Tensor, Tensor], Tensor]  # of the model, (B, 3, H, W) pixels and (B, draws) uniforms


class BareLoop:
    """A model that is trained with as little around it as possible.

    Args:
        model: what is trained, on its device.
        loss_of: of a batch.
        config: of the benchmark.
        batches: what it sees, over and over, in memory.
        bf16: whether to compute in bfloat16 under autocast.
        compiled: whether to compile the model.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_of: LossOf,
        config: Config,
        batches: list[Batch],
        bf16: bool,
        compiled: bool = False,
    ) -> None:
        self._used: Any = torch.compile(model) if compiled else model
        self.model, self._loss_of, self._bf16 = model, loss_of, bf16
        self._device = next(model.parameters()).device
        self._average = copy.deepcopy(model).requires_grad_(False)
        self.optimizer = make_optimizer(model, config.train)
        self._train = config.train
        self._batches = [(batch.images.to(self._device), batch.uniforms.to(self._device)) for batch in batches]
        q = [p for m in model.modules() if isinstance(m, EntropyModel) for p in m.parameters()]
        rest = [p for p in model.parameters() if not any(p is other for other in q)]
        self._groups = [group for group in (rest, q) if group]  # clipped apart, as ours are
        model.train()

    def rate(self) -> float:
        """Images per second over one pass through the batches."""
        started = now(self._device)
        for images, uniforms in self._batches:
            self._step(images, uniforms)
        return sum(len(images) for images, _ in self._batches) / (now(self._device) - started)

    def _step(self, images: Tensor, uniforms: Tensor) -> None:
        pixels = images.float() / 255
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            loss = self._loss_of(self._used, pixels, uniforms)
        loss.backward()
        if self._train.clip_norm:
            for group in self._groups:
                nn.utils.clip_grad_norm_(group, self._train.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            averages: list[Tensor] = list(self._average.parameters())
            torch._foreach_lerp_(averages, list(self.model.parameters()), 1 - self._train.ema_decay)


def work(
    run: Run,
    device: torch.device,
    report: Callable[[dict[str, float]], None] = lambda metrics: None,
) -> dict[str, Any]:
    """Let all contenders take turns; arguments as those of `pipeline.training.tokenizer_training.work`.

    Returns:
        `rates`: images per second of every contender, one a round; `facts` about this worker.
    """
    config = run.config
    batches = load_batches(config)
    loops = bare_loops(config, batches, device)
    turns: dict[str, Callable[[], float]] = {LOOP: partial(loop_rate, run, device, report)}
    turns |= {name: loop.rate for name, loop in loops.items()}
    rates = take_turns(turns, config.benchmark.repeats)
    facts = {
        **device_facts(device),
        "steps a timing": str(len(batches)),
        "batch": str(config.benchmark.batch_size),
        "precision": "bf16" if uses_bf16(config.train.precision, device) else "float32",
        "tokenizer": f"{config.tokenizer.size}, {config.tokenizer.max_tokens} tokens",
    }
    return {"rates": rates, "facts": facts}


def loop_rate(
    run: Run,
    device: torch.device,
    report: Callable[[dict[str, float]], None],
) -> float:
    """Images per second of a short training in a folder of its own: the rate that it logs of its second half."""
    folder = run.folder / "loop"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    part = Run("train", run.config, folder)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it would tell of every round
            tokenizer_training.work(part, device, report)
        part.close()
        rates = [line.metrics[RATE] for line in read_metrics(folder, RATE)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return rates[-1]


def load_batches(config: Config) -> list[Batch]:
    """What the training sees in a timing's steps."""
    pictures, train = ShardDataset(config.data.shards, "train"), config.train
    order = SampleOrder(len(pictures), train.seed, train.global_batch_size, local=not pictures.in_memory)
    draws = LANES + config.tokenizer.patch_positions
    batches = Batches(pictures, order, 0, 1, train.horizontal_flip, draws)
    return [batches.load(step) for step in range(steps_of(config))]


def bare_loops(config: Config, batches: list[Batch], device: torch.device) -> dict[str, BareLoop]:
    """All contenders but the first, by their names."""
    torch.manual_seed(config.train.seed)
    architecture, bf16 = config.tokenizer.architecture(), uses_bf16(config.train.precision, device)
    ours = partial(tokenizer_loss, mix=config.kept_sets)
    plain = dataclasses.replace(config, train=dataclasses.replace(config.train, fused=False))
    alone = dataclasses.replace(architecture, global_tokens=architecture.max_tokens, patch_tokens=False)

    def loop(made: nn.Module, loss_of: LossOf, its: Config = config, precision: bool = bf16, **how: bool) -> BareLoop:
        return BareLoop(made.to(device), loss_of, its, batches, precision, **how)

    loops = {
        BARE: loop(TaTok(architecture), ours),
        "bare_float32" if bf16 else "bare_bf16": loop(TaTok(architecture), ours, precision=not bf16),
        "bare_not_fused": loop(TaTok(architecture), ours, plain),
        GLOBAL_ONLY: loop(TaTok(alone), ours),
    }
    if config.train.compile or device.type == "cuda":
        loops["bare_compiled"] = loop(TaTok(architecture), ours, compiled=True)
    if config.benchmark.titok:
        made = titok.make(config.benchmark.titok, architecture)
        loops[TITOK] = loop(made, lambda model, pixels, uniforms: titok.loss_of(model, pixels))
    return loops


def tokenizer_loss(model: nn.Module, pixels: Tensor, uniforms: Tensor, mix: KeptSetConfig) -> Tensor:
    """The loss of `pipeline.training.tokenizer_training` with its l2 term alone.

    Args:
        model: a `TaTok`, or what wraps it.
        pixels: (B, 3, H, W) in [0, 1].
        uniforms: (B, draws) in [0, 1).
        mix: of kept sets.
    """
    output = model(pixels, None, uniforms, mix)
    loss: Tensor = (output.images.float() - pixels).square().mean() + output.commitment_loss
    if len(output.code_bits):
        loss = loss + output.code_bits.sum() / output.tokens.patch_indices.numel()
    return loss
