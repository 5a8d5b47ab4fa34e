"""Training a generator: the objective, the validation, and the work of one worker.

Shapes: B sequences.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.core.checkpoints import find, load_tokenizer, read_generator
from pipeline.core.cluster import uses_bf16
from pipeline.core.config import Config, GenerateConfig, TrainConfig
from pipeline.core.console import say
from pipeline.core.run import Run
from pipeline.generator.fit import asked_labels, check_length, check_start, generator_config
from pipeline.generator.generate import class_rows
from pipeline.generator.token_data import LayeredOrder, TokenBatch, TokenBatches, TokenDataset, TokenPart
from pipeline.generator.train_generator import decides
from pipeline.tokens.decoder import cut_warning, decoded_pictures
from pipeline.tokens.token_manifest import check_tokenizer
from pipeline.training import distributed
from pipeline.training.distributed import Mean, Terms
from pipeline.training.loop import train
from pipeline.training.order import SampleOrder
from pipeline.training.recorder import Recorder
from pipeline.training.state import TrainState, derive_seed, go_on
from pipeline.training.validation import spread
from tatok_model.generation.generator import Generator
from tatok_model.generation.sampling import sample
from tatok_model.generation.sequences import Sequences
from tatok_model.tokenizer import TaTok

BATCH = 64  # sequences per forward pass of a validation
KINDS = ("globals", "positions", "codes")  # of bits


class GeneratorObjective:
    """The training loss of a generator: bits per token, averaged over the tokens of the global batch.

    Args:
        state: model, optimizer and averaged weights.
        device: where the model lives.
        bf16: compute in bfloat16 under autocast; weights stay float32.
    """

    def __init__(self, state: TrainState[Generator], device: torch.device, bf16: bool) -> None:
        self.state, self.device, self.bf16 = state, device, bf16
        self.model = distributed.prepared(state.model, state.train_config.compile)
        self._images = self._tokens = self._computed = 0

    def parts(self, batch: TokenBatch) -> list[tuple[TokenPart, int]]:
        """The parts of a batch, each with the number of tokens of the global batch, by which its loss is divided."""
        return [(part, batch.tokens) for part in batch.parts]

    def forward(self, part: tuple[TokenPart, int]) -> tuple[Tensor, Terms]:
        """The loss of a part and its terms: `loss` in bits per token, `bits_{kind}` per image.

        Losses add up over the parts: how a batch is divided into parts does not change the gradient.
        """
        (sequences, labels, tokens), batch_tokens = part
        self._count(sequences.lengths())
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            bits = self.model(sequences.to(self.device), labels.to(self.device, non_blocking=True))
        kinds = [kind.detach().sum().float() for kind in (bits.globals_, bits.positions, bits.codes)]
        terms = {"loss": Mean(torch.stack(kinds).sum(), tokens)}
        terms |= {f"bits_{name}": Mean(kind, len(labels)) for name, kind in zip(KINDS, kinds, strict=True)}
        # Times the number of workers, because gradients are averaged over them.
        return bits.total().sum() * distributed.world_size() / batch_tokens, terms

    def metrics(self) -> dict[str, float]:
        """The share of padding among computed tokens, and tokens per image, since the last call."""
        counts = torch.tensor([self._images, self._tokens, self._computed], device=self.device)
        images, tokens, computed = distributed.total(counts).tolist()
        self._images = self._tokens = self._computed = 0
        return {"train/padding_share": 1 - tokens / computed, "train/tokens_per_image": tokens / images}

    def _count(self, lengths: Tensor) -> None:
        self._images += len(lengths)
        self._tokens += int(lengths.sum())
        self._computed += len(lengths) * int(lengths.max())


class GeneratorValidator:
    """Measures a generator on `count` held-out sequences, evenly spread over the split, divided among the workers.

    Args:
        dataset: the held-out split.
        count: how many of its sequences to use.
        generate: how example pictures are sampled.
        pictures: how many of them; 0: none.
        tokenizer: decodes them; None on workers that draw none.
        device: of the models.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        count: int,
        generate: GenerateConfig,
        pictures: int,
        tokenizer: TaTok | None,
        device: torch.device,
    ) -> None:
        self.dataset, self.generate, self.pictures, self.device = dataset, generate, pictures, device
        self.tokenizer = None if tokenizer is None else tokenizer.to(device).eval()
        indices = spread(len(dataset), count)
        self._indices = indices[np.argsort(dataset.counts[indices], kind="stable")]  # batches of like length pad less
        self._best, self._train_at_best = float("inf"), float("inf")  # bits per token: held-out, training

    @torch.inference_mode()
    def measure(self, model: Generator) -> dict[str, float]:
        """Metrics by their logged names; the same on every worker."""
        sums = distributed.summed(self._sums(model, *batch) for batch in self._batches())
        images = sums["images"]
        metrics = {f"validation/bits_{name}": sums[name] / images for name in KINDS}
        total = sum(sums[name] for name in KINDS)
        metrics["validation/bits_per_image"] = total / images
        metrics["validation/bits_per_token"] = total / sums["tokens"]
        if sums["patches"]:  # number of patch tokens, where `codes` is the sum of their bits
            metrics["validation/bits_per_code"] = sums["codes"] / sums["patches"]
        return metrics

    @torch.inference_mode()
    def examples(self, model: Generator) -> list[np.ndarray]:
        """Rows of sampled pictures, (B, H, W, 3) uint8 each: the first ones that `jobs/generate.py` would make."""
        if not self.pictures or self.tokenizer is None:
            return []
        in_turn = asked_labels(self.generate, model.config.classes)
        numbers = np.arange(self.pictures)
        labels = np.array(in_turn)[numbers % len(in_turn)]
        classes, keys = (torch.from_numpy(array).to(self.device) for array in (labels, numbers))
        sequences = sample(model, classes, keys, self.generate.seed, self.generate)
        architecture = self.tokenizer.config
        tokens = sequences.to_tokens(architecture.patch_positions, architecture.global_tokens)
        return class_rows(decoded_pictures(self.tokenizer, tokens), labels)

    def warnings(self, model: Generator, latest: dict[str, float]) -> list[str]:
        """A warning of overfitting: held-out bits rose above their best while training bits fell."""
        heldout, train_bits = latest["validation/bits_per_token"], latest.get("train/loss", float("inf"))
        best, train_at_best = self._best, self._train_at_best
        if heldout < best:
            self._best, self._train_at_best = heldout, train_bits
        if heldout <= best or train_bits >= train_at_best:
            return []
        warning = (
            f"held-out tokens cost {heldout:.3f} bits and cost {best:.3f} before, while those of training fell from "
            f"{train_at_best:.3f} to {train_bits:.3f}: the generator learns its training set by heart; expected more "
            "data, generator.dropout, or fewer steps"
        )
        return [warning]

    def _sums(self, model: Generator, sequences: Sequences, labels: Tensor) -> dict[str, float]:
        """Sums over a batch: bits by kind, and the counts they are divided by; a predicted end counts as a token."""
        bits = model(sequences, labels)
        sums = zip(KINDS, (bits.globals_, bits.positions, bits.codes), strict=True)
        ends = len(labels) if bits.positions.shape[1] else 0
        counts = {"images": float(len(labels)), "tokens": float(sequences.lengths().sum()) + ends}
        return counts | {"patches": float(sequences.counts.sum())} | {name: float(b.double().sum()) for name, b in sums}

    def _batches(self) -> Iterator[tuple[Sequences, Tensor]]:
        mine = self._indices[distributed.rank() :: distributed.world_size()]
        for start in range(0, len(mine), BATCH):
            rows = mine[start : start + BATCH]
            labels = torch.from_numpy(self.dataset.labels[rows])
            yield self.dataset.sequences(rows).to(self.device), labels.to(self.device)


def work(
    run: Run, device: torch.device, report: Callable[[dict[str, float]], None] = lambda metrics: None
) -> dict[str, Any]:
    """Train this worker's part to the end of the run; see `pipeline.training.tokenizer_training.work`."""
    config, section, train_config = run.config, run.config.generator, run.config.train_generator
    training, heldout = (TokenDataset.load(config.tokens.path, name, config.filter) for name in ("train", "heldout"))
    deciding = decides(config, training.manifest)
    wanted = config.generator.from_codebook or train_config.grid_images
    tokenizer = _tokenizer(config, training) if wanted and config.tokenizer.checkpoint else None
    warning = cut_warning(config, config.filter.threshold, training.counts, training.limits)
    if warning and distributed.rank() == 0:
        say(f"warning: {warning}")
    state = starting_state(run, training, heldout, deciding, device, tokenizer)
    shows_pictures = train_config.grid_images and distributed.rank() == 0
    sizes = train_config.validation_images, config.generate, train_config.grid_images
    validator = GeneratorValidator(heldout, *sizes, tokenizer if shows_pictures else None, device)
    shape = state.model.config
    groups = max(section.length_groups, train_config.accumulation)
    batches = TokenBatches(
        training,
        _order(training, train_config),
        distributed.rank(),
        distributed.world_size(),
        groups=groups,
        class_dropout=section.class_dropout,
        ends=int(shape.patch_tokens and shape.positions == "generated"),
    )
    objective = GeneratorObjective(state, device, uses_bf16(train_config.precision, device))
    seen = LayeredOrder(_order(training, train_config), training.lengths(), groups)  # a thread has the batches' own

    def ids(step: int) -> list[str]:
        return [training.ids[row] for row in seen.global_batch(step)[0]]

    recorder = Recorder(run, train_config, deciding, state, ids)
    outcome = train(objective, batches.load, train_config, validator, recorder, report)
    lengths = training.lengths()
    facts = {"tokens_mean": float(lengths.mean()), "tokens_std": float(lengths.std()), "rows_train": len(training)}
    outcome["results"] |= facts
    return outcome


def _order(training: TokenDataset, config: TrainConfig) -> SampleOrder:
    return SampleOrder(len(training), config.seed, config.global_batch_size)


def starting_state(
    run: Run,
    training: TokenDataset,
    heldout: TokenDataset,
    deciding: dict[str, Any],
    device: torch.device,
    tokenizer: TaTok | None,
) -> TrainState[Generator]:
    """From the run's newest checkpoint, else `generator.checkpoint`, else new weights from the tokenizer's codebook.

    Raises:
        BadInput: the run was begun with other values, or `generator.checkpoint` writes other sequences.
    """
    config = run.config
    manifest, path = training.manifest, config.generator.checkpoint
    counts = np.concatenate([training.counts, heldout.counts])
    shape = generator_config(config, manifest, int(counts.min()), int(counts.max()))
    if path:
        found = read_generator(path)
        check_start(config, manifest, found)
        check_length(config, found, shape)
        shape = dataclasses.replace(shape, max_patch_tokens=found.max_patch_tokens)
    torch.manual_seed(derive_seed(config.train_generator.seed, "weights"))
    generator = Generator(shape)
    if config.generator.from_codebook and tokenizer is not None:
        generator.start_from_codes(*tokenizer.code_vectors())
    elif config.generator.from_codebook and distributed.rank() == 0:
        say("tokenizer.checkpoint is empty: codes start at random instead of from its codebook")
    state = TrainState(generator.to(device), config.train_generator, Generator.from_pretrained)
    if not go_on(state, run.folder / "checkpoints", deciding) and path:
        state.start_from(Generator.from_pretrained(find(path, "generator.checkpoint")))
    return state


def _tokenizer(config: Config, training: TokenDataset) -> TaTok:
    tokenizer, sha256 = load_tokenizer(config)
    check_tokenizer(config, training.manifest.stream, sha256)
    return tokenizer
