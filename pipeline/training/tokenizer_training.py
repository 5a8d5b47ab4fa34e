"""What training a tokenizer changes (the tokenizer, its average, a discriminator), and where it starts from."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.core.checkpoints import load_lpips, load_tokenizer
from pipeline.core.cluster import uses_bf16
from pipeline.core.config import Config, TrainConfig
from pipeline.core.run import Run
from pipeline.data.shards import ShardDataset, read_manifest
from pipeline.training import distributed
from pipeline.training.batches import Batch, Batches
from pipeline.training.order import SampleOrder
from pipeline.training.recorder import Recorder
from pipeline.training.resume import go_on, values_of
from pipeline.training.state import TrainState, derive_seed, load_optimizer, optimizer_tensors, prefixed, under
from pipeline.training.validation import Validator
from tatok_model.config import TokenizerConfig
from tatok_model.kept_sets import LANES
from tatok_model.losses import Discriminator, ReconstructionLoss, hinge_discriminator_loss, hinge_generator_loss
from tatok_model.metrics.extractors.small_networks import CompactExtractor
from tatok_model.metrics.scores import CodeUsage
from tatok_model.tokenizer import TaTok
from tatok_model.tokens import Tokens

# How a codebook is used while it is trained, and how many patch tokens are kept.


class UsageMeter:
    """Counts codes over some steps."""

    def __init__(self, config: TokenizerConfig) -> None:
        self._codes, self._has_patch_codes = config.codebook_size, config.patch_tokens
        self._counts: dict[str, Tensor] = {}
        self._kept: list[Tensor] = []  # kept patch tokens, images

    def add(self, tokens: Tokens) -> None:
        """Count one step. Counts stay on the device, without a look at them: it would have to wait."""
        everything = [("global", tokens.global_indices)]
        if self._has_patch_codes:
            everything.append(("patch", tokens.patch_indices))
        for kind, indices in everything:  # kept or not: the codebook learns from all of them
            counts = self._counts.setdefault(kind, indices.new_zeros(self._codes))
            counts.scatter_add_(0, indices.flatten(), torch.ones_like(indices).flatten())
        kept = [tokens.kept_mask.sum(), tokens.kept_mask.new_full((), len(tokens), dtype=torch.int64)]
        self._kept = [old + new for old, new in zip(self._kept, kept, strict=True)] if self._kept else kept

    def read(self) -> dict[str, float]:
        """Metrics since the last call by their logged names, over all workers; every worker has to ask."""
        metrics: dict[str, float] = {}
        for kind, counts in self._counts.items():
            usage = CodeUsage.from_arrays({"counts": distributed.total(counts).cpu().numpy()})
            if usage.counts.sum():
                metrics[f"codebook/usage_{kind}"] = usage.usage
                metrics[f"codebook/perplexity_{kind}"] = usage.perplexity
        kept = [distributed.total(count) for count in self._kept]
        metrics["train/kept_patch_tokens"] = float(kept[0] / kept[1])
        self._counts, self._kept = {}, []
        return metrics


# The adversarial term: a discriminator, its own optimiser step, and what the tokenizer gains by deceiving it.

BETAS = (0.5, 0.9)  # as VQGAN trains its discriminator


class Adversary:
    """A discriminator in training.

    Args:
        config: weights and learning rate in `losses`.
        device: where it lives.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config = config.losses
        self.network = Discriminator().to(device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), self.config.discriminator_lr, BETAS)
        self._wrapped: nn.Module = self.network

    def wrap(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Make it ready for several workers."""
        self._wrapped = wrap(self.network)

    def active(self, step: int) -> bool:
        """Whether the term counts at this step."""
        return step >= self.config.gan_start_step

    def deception(self, pictures: Tensor, autocast: Callable[[], Any]) -> Tensor:
        """The tokenizer's weighted adversarial loss: a scalar with gradients to `pictures`, (B, 3, H, W) in [0, 1]."""
        self.network.requires_grad_(False)
        with autocast():
            scores = self.network(pictures)
        self.network.requires_grad_(True)
        return self.config.gan * hinge_generator_loss(scores.float())

    def step(self, originals: Tensor, pictures: Tensor, autocast: Callable[[], Any]) -> dict[str, Tensor]:
        """One step of the discriminator on (B, 3, H, W) images in [0, 1]; its loss terms."""
        with autocast():
            scores = self._wrapped(torch.cat([originals, pictures.clamp(0, 1)]))
        real, fake = scores.float().chunk(2)
        loss = hinge_discriminator_loss(real, fake)
        means = distributed.total(torch.stack([real.detach().mean(), fake.detach().mean()])) / distributed.world_size()
        penalty = self.config.lecam * self.network.lecam(real, fake, *means)
        (loss + penalty).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"discriminator": loss, "lecam": penalty}


ENTROPY = "entropy_model."  # beginning of its parameters' names


class TokenizerState(TrainState[TaTok]):
    """The tokenizer, its average, optionally a discriminator, and their optimisers after `step` steps."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config = config
        torch.manual_seed(derive_seed(config.train.seed, "weights"))
        model = TaTok(config.tokenizer.architecture()).to(device)
        self.frozen = config.train.parts == "entropy"  # all but the entropy model
        if self.frozen:
            if model.entropy_model is None:
                raise ValueError("this tokenizer has no entropy model; expected one with entropy_layers above 0")
            model.requires_grad_(False)
            model.entropy_model.requires_grad_(True)
        super().__init__(model, config.train, TaTok.from_pretrained)
        self.adversary = Adversary(config, device) if config.losses.gan else None
        self.device = device

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The entropy model's parameters are clipped apart from the rest."""
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        rest = [p for name, p in trained if not name.startswith(ENTROPY)]
        entropy = [p for name, p in trained if name.startswith(ENTROPY)]
        return {name: group for name, group in {"": rest, "_entropy": entropy}.items() if group}

    def start_from(self, weights: TaTok) -> None:
        """Take over the weights of another tokenizer of the same architecture: fine-tuning.

        With everything but the entropy model frozen, that one starts anew and may be of another size.
        """
        values = weights.state_dict()
        if self.frozen:
            own = {name: value for name, value in self.model.state_dict().items() if name.startswith(ENTROPY)}
            values = {name: value for name, value in values.items() if not name.startswith(ENTROPY)} | own
        self.model.load_state_dict(values)
        self.average.load_state_dict(values)

    def shard(self) -> None:
        """Keep this worker's part alone; what is loaded and what starts anew has to be in place before."""
        from pipeline.training.workers import shard  # imports for a second what only FSDP2 needs

        self.optimizer = shard(self.model, self.average, self.optimizer, self.train_config, self.device)
        self.sharded = True

    def averaged(self) -> TaTok:
        """Gathered into a plain model where the state is sharded."""
        if not self.sharded:
            return self.average
        gathered = TaTok(self.average.config).to(self.device).eval().requires_grad_(False)
        values = {name: distributed.whole(value) for name, value in self.average.state_dict().items()}
        gathered.load_state_dict(values)
        return gathered

    def tensors(self) -> dict[str, Tensor]:
        """With the discriminator's."""
        found = super().tensors()
        if self.adversary is not None:
            found |= prefixed("discriminator", self.adversary.network.state_dict())
            found |= prefixed("discriminator_optimizer", optimizer_tensors(self.adversary.optimizer))
        return found

    def load_tensors(self, found: dict[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        super().load_tensors(found)
        if self.adversary is not None:
            self.adversary.network.load_state_dict(under("discriminator", found))
            load_optimizer(self.adversary.optimizer, under("discriminator_optimizer", found))


def starting_state(config: Config, folder: Path, device: torch.device) -> TokenizerState:
    """From the run's newest checkpoint in `folder`, else from `tokenizer.checkpoint`, else new.

    Raises:
        BadInput: the run was begun with other values, or `tokenizer.checkpoint` cannot be used.
    """
    state = TokenizerState(config, device)
    if not go_on(state, folder, deciding(config)) and config.tokenizer.checkpoint:
        state.start_from(load_tokenizer(config)[0])
    return state


def deciding(config: Config) -> dict[str, Any]:
    """What decides the weights of a step, by key: a run that goes on must have the same."""
    values = values_of(config, "tokenizer", "losses", "kept_sets", "train")
    return {**values, "data.shards": read_manifest(config.data.shards).fingerprint}


# One optimiser step of a tokenizer: forward, losses, backward, update.

Wrap = Callable[[nn.Module], nn.Module]


class Objective:
    """Performs steps on a `TokenizerState`.

    Args:
        state: what is trained.
        losses: reconstruction terms.
        device: where the models live.
        bf16: compute in bfloat16 under autocast; weights stay float32.
        wrap: makes a module ready for several workers (DDP) or faster (compile); called once per module.
    """

    def __init__(
        self, state: TokenizerState, losses: ReconstructionLoss, device: torch.device, bf16: bool, wrap: Wrap
    ) -> None:
        self.state, self.losses, self.device, self.bf16 = state, losses, device, bf16
        self.config = state.config
        self.model: nn.Module = wrap(state.model)
        if state.adversary is not None:
            state.adversary.wrap(wrap)
        self._usage = UsageMeter(self.config.tokenizer)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One optimiser step on this worker's part of a global batch, on any device.

        Returns:
            The terms of the last micro-batch by name, as scalars without gradients.
        """
        train, state = self.config.train, self.state
        state.begin_step()
        state.model.train(not state.frozen)  # a codebook in training moves
        everything = train.global_batch_size / distributed.world_size()  # pictures of a mean worker
        parts = batch.images.to(self.device, non_blocking=True).chunk(train.accumulation)
        draws = batch.uniforms.to(self.device, non_blocking=True).chunk(train.accumulation)
        for number, part in enumerate(zip(parts, draws, strict=True)):
            with distributed.synchronised(self.model, last=number == len(parts) - 1):
                terms, tokens, pixels, pictures = self._backward(*part, len(part[0]) / everything)
        terms |= state.descend()
        if state.adversary is not None and state.adversary.active(state.step) and not state.skipped:
            terms |= state.adversary.step(pixels, pictures, self._autocast)
        state.end_step()
        self._usage.add(tokens)
        return {name: value.detach() for name, value in terms.items()}

    def metrics(self) -> dict[str, float]:
        """Use of the codebook and kept patch tokens since the last call."""
        found = self._usage.read()
        if self.state.model.entropy_model is not None and "codebook/perplexity_patch" in found:
            # What q saves against a code that knows only how often each entry is used.
            found["train/unigram_bits"] = math.log2(found["codebook/perplexity_patch"])
        return found

    def _backward(
        self, images: Tensor, uniforms: Tensor, share: float
    ) -> tuple[dict[str, Tensor], Tokens, Tensor, Tensor]:
        pixels = images.float() / 255  # (B, 3, H, W) in [0, 1]
        frozen, step = self.state.frozen, self.state.step
        mix = self.config.kept_sets
        with self._autocast():
            output = self.model(
                pixels, None, uniforms, mix, filtering_now=step >= mix.warmup_steps, reconstruct=not frozen
            )
        pictures = output.images.float()
        terms = {} if frozen else self.losses(pixels, pictures)
        if not frozen:
            terms["commitment"] = output.commitment_loss
        adversary = self.state.adversary
        if adversary is not None and adversary.active(step):
            terms["adversarial"] = adversary.deception(pictures, self._autocast)
        total = torch.stack([pixels.new_zeros(()), *terms.values()]).sum()
        terms["loss"] = total
        if len(output.code_bits):
            # The entropy model has parameters of its own: its loss moves nothing else and is not part of "loss". Every
            # prediction counts alike, however many a micro-batch or a worker has.
            entropy = output.code_bits.sum() / output.tokens.patch_indices.numel()
            terms["code_bits"] = output.code_bits.mean()
            terms["loss"] = entropy if frozen else total
            total = total + entropy
        (total * share).backward()  # every picture counts alike, however workers and micro-batches divide them
        return terms, output.tokens, pixels, pictures.detach()

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


# One worker that trains a tokenizer: builds what the loop needs from the configuration, runs it, reports.


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
