"""Training a tokenizer: its state (with a discriminator), what a step minimises, and the work of one worker."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.core.checkpoints import load_lpips, load_tokenizer
from pipeline.core.cluster import uses_bf16
from pipeline.core.config import Config, TrainConfig
from pipeline.core.run import Run
from pipeline.data.shards import ShardDataset
from pipeline.training import distributed
from pipeline.training.distributed import Mean, Terms, added
from pipeline.training.loop import train
from pipeline.training.order import Batch, Batches, SampleOrder
from pipeline.training.recorder import Recorder
from pipeline.training.state import (
    TrainState,
    derive_seed,
    go_on,
    load_optimizer,
    make_optimizer,
    optimizer_tensors,
)
from pipeline.training.train import decides
from pipeline.training.validation import TokenizerValidator
from tatok_model.config import LossConfig, TokenizerConfig
from tatok_model.kept_sets import LANES
from tatok_model.losses import Discriminator, ReconstructionLoss, hinge_discriminator_loss, hinge_generator_loss
from tatok_model.metrics.extractors.small_networks import CompactExtractor
from tatok_model.metrics.scores import CodeUsage
from tatok_model.tokenizer import TaTok
from tatok_model.tokens import Tokens

BETAS = (0.5, 0.9)  # of the discriminator's optimiser, as VQGAN has them
ENTROPY = "entropy_model."  # beginning of its parameters' names


class Adversary:
    """A discriminator in training, with an optimiser step of its own, and what the tokenizer gains by deceiving it.

    Args:
        losses: weights and learning rate.
        pictures: in a mean worker's part of a global batch.
        device: where it lives.
    """

    def __init__(self, losses: LossConfig, pictures: float, device: torch.device) -> None:
        self.losses, self._pictures = losses, pictures
        self.network = Discriminator().to(device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), losses.discriminator_lr, BETAS)
        self._seen: list[tuple[Tensor, Tensor]] = []  # originals and reconstructions of a step's micro-batches

    def prepare(self, compiled: bool, autocast: Callable[[], Any]) -> None:
        """Make it ready to train, in the precision of the tokenizer."""
        self._prepared, self._autocast = distributed.prepared(self.network, compiled), autocast

    def active(self, step: int) -> bool:
        """Whether the term counts at this step."""
        return step >= self.losses.gan_start_step

    def deception(self, originals: Tensor, pictures: Tensor) -> Tensor:
        """The tokenizer's weighted adversarial loss of a micro-batch: a scalar with gradients to `pictures`.

        Args:
            originals: (B, 3, H, W) in [0, 1]; kept with the pictures for `step`.
            pictures: their reconstructions, not clipped.
        """
        self._seen.append((originals, pictures.detach().clamp(0, 1)))
        self.network.requires_grad_(False)
        with self._autocast():
            scores = self.network(pictures)
        self.network.requires_grad_(True)
        return self.losses.gan * hinge_generator_loss(scores.float())

    def step(self, skipped: bool) -> Terms:
        """One step of the discriminator on all micro-batches since the last, unless it is skipped; its loss terms."""
        seen, self._seen = self._seen, []
        if skipped or not seen:
            return {}
        # LeCam's means move once, by all pictures. Scores of several micro-batches are made anew for their gradients.
        means, terms = torch.zeros(2, device=seen[0][0].device), Terms()
        for pair in seen:
            with torch.set_grad_enabled(len(seen) == 1):
                scores = self._scores(*pair)
            means = means + torch.stack([kind.detach().mean() for kind in scores]) * (len(pair[0]) / self._pictures)
        self.network.lecam.update(*distributed.total(means) / distributed.world_size())
        for number, pair in enumerate(seen, start=1):
            with distributed.synchronised(self._prepared, last=number == len(seen)):
                real, fake = scores if len(seen) == 1 else self._scores(*pair)
                loss, penalty = hinge_discriminator_loss(real, fake), self.losses.lecam * self.network.lecam(real, fake)
                ((loss + penalty) * (len(pair[0]) / self._pictures)).backward()
            part = {"discriminator": Mean.of(loss, len(pair[0])), "lecam": Mean.of(penalty, len(pair[0]))}
            terms = added(terms, part)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return terms

    def _scores(self, originals: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
        with self._autocast():
            scores = self._prepared(torch.cat([originals, pictures]))
        real, fake = scores.float().chunk(2)
        return real, fake


class TokenizerState(TrainState[TaTok]):
    """The tokenizer, its average, optionally a discriminator, and their optimisers after `step` steps."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config = config
        torch.manual_seed(derive_seed(config.train.seed, "weights"))
        model = TaTok(config.tokenizer.architecture()).to(device)
        frozen = config.train.parts == "entropy"  # all but the entropy model
        if frozen:
            if model.entropy_model is None:
                raise ValueError("this tokenizer has no entropy model; expected one with entropy_layers above 0")
            model.requires_grad_(False)
            model.entropy_model.requires_grad_(True)
        super().__init__(model, config.train, TaTok.from_pretrained)
        self.device, self.frozen = device, frozen
        self.pictures = config.train.global_batch_size / distributed.world_size()  # in a mean worker's part of a batch
        self.adversary = Adversary(config.losses, self.pictures, device) if config.losses.gan else None

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

    def descend(self) -> Terms:
        """Move the tokenizer, then the discriminator."""
        terms = super().descend()
        return terms if self.adversary is None else terms | self.adversary.step(self.skipped)

    def shard(self) -> None:
        """Keep this worker's part of weights, average, gradients and optimiser; all of a block only while it is due.

        What is loaded and what starts anew has to be in place before, equal on every worker.

        Source: `torch.distributed.fsdp.fully_shard`, which is FSDP2 (arXiv 2304.11277 for the idea).
        """
        from torch.distributed.device_mesh import init_device_mesh  # imports for a second what only FSDP2 needs
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import distribute_tensor

        mesh = init_device_mesh(self.device.type, (distributed.world_size(),))
        for model in (self.model, self.average):
            for block in (*model.encoder.blocks, *model.decoder.blocks):
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        optimizer = make_optimizer(self.model, self.train_config)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        tensors = optimizer_tensors(self.optimizer)
        for name, tensor in tensors.items():
            if tensor.ndim:  # a moment, not the count of steps
                tensors[name] = distribute_tensor(tensor, mesh, parameters[int(name.split(".")[0])].placements)
        load_optimizer(optimizer, tensors)
        self.optimizer, self.sharded = optimizer, True

    def averaged(self) -> TaTok:
        """Gathered into a plain model where the state is sharded."""
        if not self.sharded:
            return self.average
        gathered = TaTok(self.average.config).to(self.device).eval().requires_grad_(False)
        values = {name: distributed.whole(value) for name, value in self.average.state_dict().items()}
        gathered.load_state_dict(values)
        return gathered

    def stateful(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        """With the discriminator."""
        parts = super().stateful()
        if self.adversary is not None:
            parts |= {"discriminator": self.adversary.network, "discriminator_optimizer": self.adversary.optimizer}
        return parts


def starting_state(config: Config, folder: Path, device: torch.device) -> TokenizerState:
    """From the run's newest checkpoint in `folder`, else from `tokenizer.checkpoint`, else new.

    Raises:
        BadInput: the run was begun with other values, or `tokenizer.checkpoint` cannot be used.
    """
    state = TokenizerState(config, device)
    if not go_on(state, folder, decides(config)) and config.tokenizer.checkpoint:
        state.start_from(load_tokenizer(config)[0])
    return state


class TokenizerObjective:
    """What a tokenizer minimises.

    Args:
        state: what is trained.
        losses: reconstruction terms.
        device: where the models live.
        bf16: compute in bfloat16 under autocast; weights stay float32.
    """

    def __init__(self, state: TokenizerState, losses: ReconstructionLoss, device: torch.device, bf16: bool) -> None:
        self.state, self.losses, self.device = state, losses, device
        compiled = state.train_config.compile
        self.model = distributed.prepared(state.model, compiled)
        self._autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)
        if state.adversary is not None:
            state.adversary.prepare(compiled, self._autocast)
        self._usage = UsageMeter(state.config.tokenizer)

    def parts(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Images and uniform numbers of `accumulation` micro-batches, or of as many as every worker has pictures."""
        images, uniforms = (tensor.to(self.device, non_blocking=True) for tensor in (batch.images, batch.uniforms))
        count = min(self.state.train_config.accumulation, int(self.state.pictures))
        return list(zip(images.tensor_split(count), uniforms.tensor_split(count), strict=True))

    def forward(self, part: tuple[Tensor, Tensor]) -> tuple[Tensor, Terms]:
        """The loss of a micro-batch and its terms by name.

        Args:
            part: (B, 3, H, W) uint8 images, (B, LANES + N) uniform numbers that draw their kept sets.
        """
        images, uniforms = part
        state, mix, count = self.state, self.state.config.kept_sets, len(images)
        pixels = images.float() / 255  # (B, 3, H, W) in [0, 1]
        with self._autocast():
            output = self.model(
                pixels,
                None,
                uniforms,
                mix,
                filtering_now=state.step >= mix.warmup_steps,
                reconstruct=not state.frozen,
            )
        self._usage.add(output.tokens)
        pictures = output.images.float()
        losses = {} if state.frozen else self.losses(pixels, pictures) | {"commitment": output.commitment_loss}
        if state.adversary is not None and state.adversary.active(state.step):
            losses["adversarial"] = state.adversary.deception(pixels, pictures)
        loss = torch.stack([pixels.new_zeros(()), *losses.values()]).sum()
        terms = {name: Mean.of(value, count) for name, value in (losses | {"loss": loss}).items()}
        if bits := len(output.code_bits):
            # The entropy model has parameters of its own: its loss moves nothing else and is not part of "loss". Every
            # prediction counts alike, however many a micro-batch or a worker has.
            entropy = output.code_bits.sum() / output.tokens.patch_indices.numel()
            terms["code_bits"] = Mean.of(output.code_bits.mean(), bits)
            if state.frozen:
                terms["loss"] = Mean.of(entropy, count)
            loss = loss + entropy
        # Every picture counts alike, however workers and micro-batches divide them.
        return loss * (count / state.pictures), terms

    def metrics(self) -> dict[str, float]:
        """Use of the codebook and kept patch tokens since the last call."""
        metrics = self._usage.read()
        if self.state.model.entropy_model is not None and "train_codebook/perplexity_patch" in metrics:
            # What q saves against a code that knows only how often each entry is used.
            metrics["train/unigram_bits"] = math.log2(metrics["train_codebook/perplexity_patch"])
        return metrics


class UsageMeter:
    """Counts how a codebook is used over some steps, and how many patch tokens are kept."""

    def __init__(self, config: TokenizerConfig) -> None:
        self._codes, self._has_patch_codes = config.codebook_size, config.patch_tokens
        self._counts: dict[str, Tensor] = {}
        self._kept: list[Tensor] = []  # kept patch tokens, images

    def add(self, tokens: Tokens) -> None:
        """Count a micro-batch. Counts stay on the device, without a look at them: it would have to wait."""
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
                metrics[f"train_codebook/usage_{kind}"] = usage.usage
                metrics[f"train_codebook/perplexity_{kind}"] = usage.perplexity
        kept = [distributed.total(count) for count in self._kept]
        metrics["train/kept_patch_tokens"] = float(kept[0] / kept[1])
        self._counts, self._kept = {}, []
        return metrics


def work(
    run: Run, device: torch.device, report: Callable[[dict[str, float]], None] = lambda metrics: None
) -> dict[str, Any]:
    """Train this worker's part to the end of the run.

    Args:
        run: the run folder and the configuration; `data.shards` names existing shards.
        device: where this worker computes.
        report: given the latest validation metrics at every checkpoint, on every worker.

    Returns:
        `results` by name, and `stopped`: why it ended early, or ''.
    """
    config, train_config = run.config, run.config.train
    state = starting_state(config, run.folder / "checkpoints", device)
    if train_config.parallel == "fsdp2" and distributed.world_size() > 1:
        state.shard()
    validator = TokenizerValidator(
        ShardDataset(config.data.shards, "heldout"),
        train_config.validation_images,
        train_config.grid_images,
        CompactExtractor.shipped(),
        device,
    )
    pictures = ShardDataset(config.data.shards, "train")
    order = _order(pictures, train_config)
    draws = LANES + config.tokenizer.patch_positions
    world = distributed.world_size()
    batches = Batches(pictures, order, distributed.rank(), world, train_config.horizontal_flip, draws)
    bf16 = uses_bf16(train_config.precision, device)
    objective = TokenizerObjective(state, _losses(config, device), device, bf16)
    named = ShardDataset(config.data.shards, "train")  # for the ids: the other serves the thread that reads ahead
    named_order = _order(named, train_config)

    def ids(step: int) -> list[str]:
        return named.ids(named_order.global_batch(step)[0].tolist())

    recorder = Recorder(run, train_config, decides(config), state, ids)
    return train(objective, batches.load, train_config, validator, recorder, report)


def _order(pictures: ShardDataset, config: TrainConfig) -> SampleOrder:
    return SampleOrder(len(pictures), config.seed, config.global_batch_size, local=not pictures.in_memory)


def _losses(config: Config, device: torch.device) -> ReconstructionLoss:
    perceptual = None
    if config.losses.perceptual:
        files = config.losses.perceptual_backbone, config.losses.perceptual_heads
        perceptual = load_lpips("losses.perceptual", *files, config.data.image_size)
    return ReconstructionLoss(config.losses, perceptual).to(device)
