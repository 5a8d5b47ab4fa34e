"""Configuration: a preset (YAML) plus `section.key=value` overrides becomes one frozen, checked `Config`.

The only module that reads YAML and overrides. Unknown keys are refused with the nearest valid one; values are coerced
by pydantic (`1e-4` is a number); every message names the key, the value and the expected form.
"""

import dataclasses
import difflib
import hashlib
import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.errors import BadInput
from pipeline.core.stages import BENCHMARKS
from tatok_model.config import GENERATOR_SIZES, KeptSetConfig, LossConfig, SamplingConfig, TokenizerConfig
from tatok_model.filtering_rules import SCORES, check_cut


@dataclass(frozen=True)
class RunConfig:
    """Where a run is kept."""

    output: str = "runs"  # folder that holds the run folders
    name: str = ""  # the run folder's name; empty: named after the preset and the stage

    def __post_init__(self) -> None:
        _require(bool(self.output), "output", self.output, "a folder")
        inside = not self.name.startswith("/") and not {".", ".."} & set(self.name.split("/"))
        _require(inside, "name", self.name, "the name of a folder inside run.output")


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and what shape they get."""

    source: str = ""  # folder, .parquet, .tar, a URL of those, or "samples" (photographs inside scikit-image)
    heldout_source: str = ""  # like source; empty: a share of source, chosen by hash of the picture
    shards: str = ""  # folder with manifest.json, written by preprocess; empty: made from source when needed
    image_size: int = 32  # pixels, square
    heldout_fraction: float = 0.1  # share of source that is held out when there is no heldout_source
    rows_per_shard: int = 4096  # source pictures per shard
    max_pixels: int = 64_000_000  # pictures that decode to more pixels are rejected
    encoding: str = "png"  # png | jpeg | webp: how resized pictures are stored; others keep their bytes
    quality: int = 95  # of jpeg and webp, 1-100
    image_column: str = "image"  # Parquet column with the picture: bytes or {bytes, path}
    label_column: str = "label"  # Parquet column with the class index, used when present
    class_name_column: str = "class_name"  # Parquet column with the class name, used when present
    num_workers: int = 0  # parallel shard tasks; 0: one per CPU

    def __post_init__(self) -> None:
        _require(self.image_size >= 1, "image_size", self.image_size, "at least 1 pixel")
        _require(0 < self.heldout_fraction < 1, "heldout_fraction", self.heldout_fraction, "a share between 0 and 1")
        _require(self.rows_per_shard >= 1, "rows_per_shard", self.rows_per_shard, "at least 1")
        _require(self.max_pixels >= 1, "max_pixels", self.max_pixels, "at least 1")
        _require(self.encoding in ("png", "jpeg", "webp"), "encoding", self.encoding, "png, jpeg or webp")
        _require(1 <= self.quality <= 100, "quality", self.quality, "1 to 100")
        _require(self.num_workers >= 0, "num_workers", self.num_workers, "0 or more")


@dataclass(frozen=True)
class TokenizerSection(TokenizerConfig):
    """The tokenizer's architecture and, optionally, the checkpoint to start from or to use."""

    checkpoint: str = ""  # folder or hub id; train: start from these weights; evaluate: what is evaluated

    def architecture(self) -> TokenizerConfig:
        """The part that `tatok_model` knows."""
        names = [f.name for f in dataclasses.fields(TokenizerConfig)]
        return TokenizerConfig(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Schedules count optimiser steps; `max_minutes` only stops."""

    parts: str = "all"  # all | entropy: train the entropy model alone, on the frozen tokenizer.checkpoint
    num_workers: int = 0  # 0: in this process; n: n Ray Train workers
    parallel: str = "ddp"  # ddp | fsdp2: each worker holds the whole state, or its part of a tokenizer's
    device: str = "auto"  # auto | cpu | cuda
    precision: str = "auto"  # auto (bf16 on GPU, float32 on CPU) | float32 | bf16
    compile: bool = False  # torch.compile the model
    seed: int = 0  # every random draw derives from it
    max_steps: int = 1000  # optimiser steps
    max_minutes: float = 0.0  # stop (resumable) after this many minutes; 0: no limit
    global_batch_size: int = 64  # images per optimiser step over all workers
    accumulation: int = 1  # micro-batches per optimiser step; the codebook averages move with each of them
    optimizer: str = "adamw"  # adamw | muon: Muon moves the hidden matrices, AdamW the rest
    learning_rate: float = 1e-3  # peak
    min_learning_rate: float = 1e-5  # at the end of the cosine
    warmup_steps: int = 100  # linear warm-up
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 1e-4
    clip_norm: float = 1.0  # gradient norm; 0: no clipping
    ema_decay: float = 0.999  # of the exported weights; 0: no averaging
    horizontal_flip: bool = True  # augmentation
    log_every: int = 20  # steps between logged metrics
    validate_every: int = 500  # steps between validations; 0: only at the end
    validation_images: int = 1024  # held-out images per validation
    grid_images: int = 8  # originals beside reconstructions in the logged picture
    checkpoint_every: int = 500  # steps between checkpoints; 0: only at the end
    keep_checkpoints: int = 2  # how many are kept
    max_failures: int = 3  # restarts of failed workers (num_workers > 0)
    min_workers: int = 0  # go on with so many where the cluster has no room for num_workers; 0: wait for all
    not_finite: str = "stop"  # stop | skip: a step whose gradient is no number ends the run, or is left out and counted
    cpus_per_worker: float = 1.0  # CPUs that each worker reserves (num_workers > 0)
    fused: bool = True  # fused AdamW; Muon has no such choice

    def __post_init__(self) -> None:
        _require(self.parts in ("all", "entropy"), "parts", self.parts, "all or entropy")
        _require(self.num_workers >= 0, "num_workers", self.num_workers, "0 or more")
        most = self.num_workers
        _require(0 <= self.min_workers <= most, "min_workers", self.min_workers, f"0 to num_workers, {most}")
        _require(self.parallel in ("ddp", "fsdp2"), "parallel", self.parallel, "ddp or fsdp2")
        if self.parallel == "fsdp2":
            _require(most >= 2, "num_workers", most, "at least 2 with parallel: fsdp2")
            _require(not self.compile, "compile", self.compile, "false with parallel: fsdp2")
        _require(self.not_finite in ("stop", "skip"), "not_finite", self.not_finite, "stop or skip")
        _require(self.optimizer in ("adamw", "muon"), "optimizer", self.optimizer, "adamw or muon")
        _require(self.device in ("auto", "cpu", "cuda"), "device", self.device, "auto, cpu or cuda")
        _require(self.precision in ("auto", "float32", "bf16"), "precision", self.precision, "auto, float32 or bf16")
        for name in (
            "max_steps", "global_batch_size", "accumulation", "log_every", "keep_checkpoints", "validation_images",
        ):  # fmt: skip
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in (
            "max_minutes", "warmup_steps", "weight_decay", "clip_norm", "validate_every",
            "grid_images", "checkpoint_every", "max_failures", "min_learning_rate",
        ):  # fmt: skip
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "more than 0")
        _require(self.cpus_per_worker > 0, "cpus_per_worker", self.cpus_per_worker, "more than 0")
        for name in ("beta1", "beta2", "ema_decay"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "at least 0 and below 1")
        parts = max(self.num_workers, 1) * self.accumulation
        _require(
            self.global_batch_size % parts == 0,
            "global_batch_size",
            self.global_batch_size,
            f"a multiple of num_workers x accumulation, {parts}",
        )


@dataclass(frozen=True)
class FilterConfig:
    """Dynamic token filtering: how patch tokens are ranked, and where a ranking is cut."""

    score: str = "distortion"  # distortion | error | surprisal | entropy | pixel_entropy | random | grid
    rounds: int = 1  # R: open positions are scored anew in every round; more than 1 for the first four scores only
    rule: str = "relative"  # relative | residual | marginal | count | quality
    threshold: float = 1.0  # a share, the score's unit (residual and marginal), patch tokens or dB, as the rule has it
    replay: bool = False  # score entropy: decoders repeat the ranking, positions are not sent
    coding_rounds: int = 8  # rounds in which kept codes are entropy-coded, for bits_coded
    mean_tokens: float = 0.0  # calibrate: wanted mean of tokens per image, global ones counted
    mean_psnr: float = 0.0  # calibrate: wanted mean PSNR in dB instead

    def cut(self, patch_tokens: bool) -> str:
        """What decides which tokens a sequence keeps, in words that are equal where the cut is."""
        ranked = f"{self.score}, {self.rounds} rounds, " if patch_tokens else ""
        return f"{ranked}{self.rule} {self.threshold!r}"

    def __post_init__(self) -> None:
        check_cut(self.score, self.rule, self.threshold, positions=2**31)
        _require(self.rounds >= 1, "rounds", self.rounds, "at least 1")
        _require(self.coding_rounds >= 1, "coding_rounds", self.coding_rounds, "at least 1")
        _require(self.mean_tokens >= 0, "mean_tokens", self.mean_tokens, "0 or more")
        _require(self.mean_psnr >= 0, "mean_psnr", self.mean_psnr, "0 or more dB")
        in_rounds = SCORES[self.score].in_rounds
        _require(in_rounds or self.rounds == 1, "rounds", self.rounds, f"1 for the score {self.score!r}")
        _require(not self.replay or self.score == "entropy", "replay", self.replay, "false unless score is entropy")


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured on the held-out images."""

    max_images: int = 0  # held-out images to use; 0: all
    batch_size: int = 64  # images per forward pass
    num_workers: int = 1  # evaluation actors
    device: str = "auto"  # auto | cpu | cuda
    extractor: str = "auto"  # auto | compact_cifar10 | inception2015 | file by jobs/train_extractor.py
    # (.safetensors); auto: inception2015 when its weights are given
    inception_weights: str = ""  # path of the FID Inception weights (pt_inception-2015-12-05-6726825d.pth)
    reference: str = ""  # npz with mu and sigma, e.g. ADM's; empty: computed from the held-out images and cached
    lpips_backbone: str = ""  # path of VGG16 weights; with lpips_heads: LPIPS is measured
    lpips_heads: str = ""  # path of the LPIPS linear heads
    baselines: tuple[str, ...] = ()  # kmeans (patch VQ), jpeg, webp: at the same total bits
    thresholds: tuple[
        float, ...
    ] = ()  # of filter.rule: one ranking is cut at each of them, for a rate-distortion curve
    more_extractors: tuple[str, ...] = ()  # weight files of further Frechet distances: by
    # jobs/train_extractor.py (.safetensors), or CIFAR ResNet-20 or -56 (.th)
    information: bool = False  # measure redundancy and, with blind_checkpoint, the mutual information I(c; g), in bits
    blind_checkpoint: str = ""  # the same tokenizer with an entropy model that does not see the global tokens
    grid_images: int = 8  # originals beside reconstructions in the picture
    generated: str = ""  # run folder of jobs/generate.py: its pictures are measured instead of a tokenizer
    nearest: int = 8  # generated pictures shown beside their nearest training pictures

    def __post_init__(self) -> None:
        _require(self.nearest >= 0, "nearest", self.nearest, "0 or more")
        _require(self.max_images >= 0, "max_images", self.max_images, "0 or more")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        _require(self.num_workers >= 1, "num_workers", self.num_workers, "at least 1")
        _require(self.grid_images >= 0, "grid_images", self.grid_images, "0 or more")
        _require(self.device in ("auto", "cpu", "cuda"), "device", self.device, "auto, cpu or cuda")
        names = ("auto", "compact_cifar10", "inception2015")
        known = self.extractor in names or self.extractor.endswith(".safetensors")
        _require(known, "extractor", self.extractor, f"one of {', '.join(names)}, or a .safetensors file")
        for name in self.baselines:
            _require(name in ("kmeans", "jpeg", "webp"), "baselines", name, "a list of: kmeans, jpeg, webp")
        _require(len(set(self.thresholds)) == len(self.thresholds), "thresholds", self.thresholds, "different numbers")
        _require(
            self.information or not self.blind_checkpoint,
            "blind_checkpoint",
            self.blind_checkpoint,
            "information: true",
        )
        if self.extractor == "inception2015":
            _require(bool(self.inception_weights), "inception_weights", "", "the path of the FID Inception weights")
        _require(
            bool(self.lpips_backbone) == bool(self.lpips_heads),
            "lpips_heads",
            self.lpips_heads,
            "lpips_backbone and lpips_heads to be given together",
        )


@dataclass(frozen=True)
class TokensConfig:
    """Pictures as ranked token streams, and back."""

    path: str = ""  # folder with tokens.json, written by tokenize_images; what detokenize reads
    split: str = "both"  # train | heldout | both: which pictures become tokens
    batch_size: int = 64  # images per forward pass
    num_workers: int = 1  # actors
    device: str = "auto"  # auto | cpu | cuda
    encoding: str = "png"  # png | jpeg | webp: of pictures that detokenize writes
    max_images: int = 0  # of each split; 0: all
    flip: bool = False  # every training picture's mirror image too, as rows of their own
    crops: int = 0  # that many shifted copies of every training picture too, mirrored at random

    def __post_init__(self) -> None:
        _require(self.crops >= 0, "crops", self.crops, "0 or more")
        _require(self.split in ("train", "heldout", "both"), "split", self.split, "train, heldout or both")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        _require(self.num_workers >= 1, "num_workers", self.num_workers, "at least 1")
        _require(self.device in ("auto", "cpu", "cuda"), "device", self.device, "auto, cpu or cuda")
        _require(self.encoding in ("png", "jpeg", "webp"), "encoding", self.encoding, "png, jpeg or webp")
        _require(self.max_images >= 0, "max_images", self.max_images, "0 or more")


@dataclass(frozen=True)
class GeneratorSection:
    """The generator; what its tokens look like comes from the token stream and the cut."""

    checkpoint: str = ""  # folder; generate: what samples; train_generator: start from these weights
    size: str = "tiny"  # nano | tiny | small | base | large
    dropout: float = 0.1  # of attention and MLP outputs, in training
    class_dropout: float = 0.1  # share of training samples without their label, for guidance
    positions: str = "auto"  # auto | generated | derived; auto: derived where every patch token is kept
    from_codebook: bool = True  # codes that are alike in the tokenizer start alike; needs tokenizer.checkpoint
    length_groups: int = 8  # a worker's batch is cut into that many parts of similar length, to pad less

    def __post_init__(self) -> None:
        _require(self.size in GENERATOR_SIZES, "size", self.size, f"one of {', '.join(GENERATOR_SIZES)}")
        for name in ("dropout", "class_dropout"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "at least 0 and below 1")
        names = ("auto", "generated", "derived")
        _require(self.positions in names, "positions", self.positions, f"one of {', '.join(names)}")
        _require(self.length_groups >= 1, "length_groups", self.length_groups, "at least 1")


@dataclass(frozen=True)
class GenerateConfig(SamplingConfig):
    """Pictures from a generator."""

    images: int = 64  # how many, all classes together
    labels: tuple[int, ...] = ()  # only these classes, in turn; empty: every class in turn
    unconditional: bool = False  # no class at all
    seed: int = 0  # a picture is a function of (seed, its number, the weights)
    batch_size: int = 64  # pictures that are written together
    images_per_shard: int = 4096  # pictures of a file: what an interrupted run loses at most
    num_workers: int = 1  # actors
    device: str = "auto"  # auto | cpu | cuda
    encoding: str = "png"  # png | jpeg | webp
    grid_images: int = 64  # pictures in the grid

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("images", "batch_size", "images_per_shard", "num_workers"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(all(label >= 0 for label in self.labels), "labels", self.labels, "class numbers, 0 or more")
        _require(not (self.labels and self.unconditional), "labels", self.labels, "none with unconditional: true")
        _require(self.device in ("auto", "cpu", "cuda"), "device", self.device, "auto, cpu or cuda")
        _require(self.encoding in ("png", "jpeg", "webp"), "encoding", self.encoding, "png, jpeg or webp")
        _require(self.grid_images >= 0, "grid_images", self.grid_images, "0 or more")


@dataclass(frozen=True)
class BenchmarkConfig:
    """Speed, measured side by side in one run."""

    kind: str = "generation"  # one of BENCHMARKS
    repeats: int = 5  # of everything that is timed; medians are reported
    batch_size: int = 64  # the equal batch
    batch_sizes: tuple[int, ...] = (16, 64, 256)  # among which each one's best is sought
    images: int = 256  # per timing
    pictures: int = 2000  # preprocess, ingest, scaling's workers: JPEG files of 500x375 made for the run
    sizes: tuple[int, ...] = (1000, 10000)  # scaling: pictures over which time and memory an image should stay flat
    workers: tuple[int, ...] = (1, 2, 4)  # scaling: numbers of workers; those beyond the CPUs are left out
    titok: str = ""  # train_step: folder with TiTok's public code (1d-tokenizer); empty: it is left out

    def __post_init__(self) -> None:
        _require(self.kind in BENCHMARKS, "kind", self.kind, f"one of {', '.join(BENCHMARKS)}")
        for name in ("repeats", "batch_size", "images", "pictures"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("batch_sizes", "sizes", "workers"):
            numbers = getattr(self, name)
            good = bool(numbers) and all(number >= 1 for number in numbers)
            _require(good, name, numbers, "numbers of at least 1")
        largest = max(self.batch_size, *self.batch_sizes)
        _require(self.images >= largest, "images", self.images, f"at least the largest batch, {largest}")


@dataclass(frozen=True)
class SweepConfig:
    """Many trials and how they are compared."""

    kind: str = "thresholds"  # thresholds: trained tokenizers at many cuts | architecture: a training for each trial
    checkpoints: tuple[str, ...] = ()  # thresholds: a trial for each; empty: tokenizer.checkpoint, or what train made
    space: dict[str, Any] = field(default_factory=dict)  # architecture: `section.key` to a list (grid), or to one of
    # {choice: [...]}, {uniform: [low, high]}, {log_uniform: [low, high]}, {int: [low, high]}, which are drawn
    cuts: dict[str, Any] = field(default_factory=dict)  # cut rule to a list of thresholds or {range: [low, high, how
    # many]}; empty: filter.rule at evaluate.thresholds
    search: str = "random"  # random | optuna: how what is not a grid is drawn; optuna: trials learn from those before
    samples: int = 1  # draws, of each grid point (random) or in all (optuna); without a draw the grid is walked once
    seed: int = 0  # of the draws
    objective: str = "psnr_at_tokens"  # psnr_at_tokens | distance_at_tokens | bd_rate: what the best trial is best in
    budget_tokens: float = 0.0  # tokens per image of the objectives at_tokens; 0: half of all that an image has
    rate: str = "tokens_per_image"  # tokens_per_image | bits_fixed | bits_coded: what bd_rate counts
    control: str = ""  # bd_rate: run folder of jobs/evaluate.py with a curve, which trials are compared with
    scheduler: str = "none"  # none | asha: stops trials whose validation PSNR is behind that of others
    grace_steps: int = 0  # asha: steps that every trial may take; 0: train.validate_every
    reduction: int = 3  # asha: of so many trials one goes on
    at_once: int = 0  # most trials at one time; 0: as many as there is room for
    register: str = "tatok"  # name of the registered model whose alias champion the best trial gets; empty: none

    def __post_init__(self) -> None:
        objectives, rates = (
            ("psnr_at_tokens", "distance_at_tokens", "bd_rate"),
            ("tokens_per_image", "bits_fixed", "bits_coded"),
        )
        for name, valid in (
            ("kind", ("thresholds", "architecture")), ("search", ("random", "optuna")), ("objective", objectives),
            ("rate", rates), ("scheduler", ("none", "asha")),
        ):  # fmt: skip
            _require(getattr(self, name) in valid, name, getattr(self, name), f"one of {', '.join(valid)}")
        _require(self.samples >= 1, "samples", self.samples, "at least 1")
        for name in ("budget_tokens", "grace_steps", "at_once"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(self.reduction >= 2, "reduction", self.reduction, "at least 2")
        if self.objective == "bd_rate":
            _require(bool(self.control), "control", "", "the run folder of jobs/evaluate.py that bd_rate compares with")
        _require(self.kind == "thresholds" or bool(self.space), "space", self.space, "at least one key to vary")
        _require(self.kind == "architecture" or not self.space, "space", self.space, "none with the kind thresholds")
        _require(
            self.kind == "thresholds" or not self.checkpoints,
            "checkpoints",
            self.checkpoints,
            "none with the kind architecture",
        )


@dataclass(frozen=True)
class ExtractorConfig:
    """Training of a feature network for Frechet distances within this project."""

    architecture: str = "compact"  # compact | resnet
    train_source: str = ""  # labelled Parquet, or a folder of shards (split train); empty: data.shards or data.source
    test_source: str = ""  # the same (split heldout); empty: data.shards or data.heldout_source
    epochs: int = 12
    batch_size: int = 128
    learning_rate: float = 0.01
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        names = ("compact", "resnet")
        _require(self.architecture in names, "architecture", self.architecture, f"one of {', '.join(names)}")
        for name in ("epochs", "batch_size"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "more than 0")


@dataclass(frozen=True)
class TrackingConfig:
    """MLflow."""

    uri: str = "sqlite:///mlflow.db"  # tracking server or SQLite file; empty: no tracking
    experiment: str = "tatok"
    system_metrics: bool = True  # CPU, memory, GPU in the run
    flush_seconds: float = 5.0  # at most this long between batches


@dataclass(frozen=True)
class Config:
    """Everything a job needs to know."""

    preset: str = "demo"  # the name the configuration was loaded by
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerSection = field(default_factory=TokenizerSection)
    losses: LossConfig = field(default_factory=LossConfig)
    kept_sets: KeptSetConfig = field(default_factory=KeptSetConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    generator: GeneratorSection = field(default_factory=GeneratorSection)
    train_generator: TrainConfig = field(default_factory=TrainConfig)  # as train, of the generator
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    extractor: ExtractorConfig = field(default_factory=ExtractorConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if self.tokenizer.image_size != self.data.image_size:
            raise ValueError(
                f"tokenizer.image_size is {self.tokenizer.image_size}; expected data.image_size, {self.data.image_size}"
            )
        if self.train.parts == "entropy" and not (self.tokenizer.checkpoint and self.tokenizer.has_entropy_model):
            raise ValueError(
                "train.parts is 'entropy'; expected tokenizer.checkpoint to name the tokenizer that stays as it is, "
                "with patch tokens and tokenizer.entropy_layers above 0"
            )
        if self.train.parts == "entropy" and self.losses.gan:
            raise ValueError(
                f"losses.gan is {self.losses.gan} with train.parts 'entropy'; expected 0: the tokenizer stays as it is"
            )
        if self.train_generator.parallel != "ddp":
            found = self.train_generator.parallel
            raise ValueError(f"train_generator.parallel is {found!r}; expected 'ddp': only tokenizers are sharded")
        if self.kept_sets.global_tail and self.tokenizer.patch_tokens:
            raise ValueError(
                f"kept_sets.global_tail is {self.kept_sets.global_tail}; expected 0, or tokenizer.patch_tokens: false"
            )
        if self.tokenizer.patch_tokens:
            self._check_filter(self.tokenizer.patch_positions)

    def _check_filter(self, positions: int) -> None:
        section = self.filter
        if section.rule == "count" and section.threshold > positions:
            raise ValueError(
                f"filter.threshold is {section.threshold:g}; expected at most {positions}, the patch tokens of an image"
            )
        for number in self.evaluate.thresholds:
            try:
                check_cut(section.score, section.rule, number, positions)
            except ValueError as error:
                raise ValueError(f"evaluate.thresholds: {error}") from None
        if section.rounds > positions:
            raise ValueError(f"filter.rounds is {section.rounds}; expected 1 to {positions}, the patch positions")

    def with_values(self, section: str, **values: Any) -> "Config":
        """The same configuration with other values in one section."""
        return dataclasses.replace(self, **{section: dataclasses.replace(getattr(self, section), **values)})

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as in a YAML file."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def to_yaml(self) -> str:
        """The resolved configuration; loading it again gives an equal `Config`."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def sha256(self) -> str:
        """Of the resolved values: two runs with the same hash were configured alike."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def load_config(preset: str = "demo", overrides: list[str] | None = None) -> Config:
    """Read a preset and apply overrides.

    Args:
        preset: a name in `pipeline/configs` or the path of a YAML file.
        overrides: `section.key=value` texts; values are YAML.

    Raises:
        BadInput: unknown preset or key (with the nearest valid one), a value of the wrong type, a failed check.
    """
    values = _read_preset(preset)
    values.setdefault("preset", Path(preset).stem)
    for text in overrides or []:
        _apply_override(values, text)
    return config_from_dict(values)


def config_from_dict(values: dict[str, Any]) -> Config:
    """Check nested values and build the `Config`; see `load_config` for what is raised."""
    from pydantic import TypeAdapter, ValidationError

    _check_keys(values, Config, prefix="")
    image_size = (values.get("data") or {}).get("image_size", DataConfig.image_size)
    values = {**values, "tokenizer": {"image_size": image_size, **(values.get("tokenizer") or {})}}
    try:
        return TypeAdapter(Config).validate_python(values)
    except ValidationError as error:
        raise BadInput(_explain(error.errors()[0])) from None


def preset_names() -> list[str]:
    """The presets that ship with the package."""
    folder = resources.files("pipeline") / "configs"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _read_preset(preset: str) -> dict[str, Any]:
    if preset.endswith((".yaml", ".yml")):
        path = Path(preset)
        if not path.is_file():
            raise BadInput(f"preset {preset!r} does not exist; expected the path of a YAML file or a name: {_list()}")
        text = path.read_text(encoding="utf-8", errors="replace")
    elif preset in preset_names():
        text = (resources.files("pipeline") / "configs" / f"{preset}.yaml").read_text(encoding="utf-8")
    else:
        raise BadInput(f"unknown preset {preset!r}{_nearest(preset, preset_names())}; expected one of {_list()}")
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise BadInput(f"preset {preset!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise BadInput(f"preset {preset!r} holds a {type(values).__name__}; expected sections with keys")
    values = {key: {} if value is None else value for key, value in values.items()}  # a section left empty
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str) or base not in preset_names():
        raise BadInput(f"extends is {base!r} in preset {preset!r}; expected one of {_list()}")
    return _merge(_read_preset(base), values)


def _list() -> str:
    return ", ".join(preset_names())


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _apply_override(values: dict[str, Any], text: str) -> None:
    key, separator, raw = text.partition("=")
    if not separator or key.count(".") != 1 or not all(key.split(".")):
        raise BadInput(f"override {text!r} is not understood; expected section.key=value, e.g. train.max_steps=100")
    section, name = key.split(".")
    part = values.setdefault(section, {})
    if not isinstance(part, dict):
        raise BadInput(f"{section} is not a section with keys; expected one of {', '.join(_sections())}")
    part[name] = raw if _is_text(section, name) else _parse_value(raw)


def _is_text(section: str, name: str) -> bool:
    """Text is taken as it was typed: YAML would read a run called 007 as a number and one called on as true."""
    cls = {f.name: f.type for f in dataclasses.fields(Config)}.get(section)
    if not isinstance(cls, type) or not dataclasses.is_dataclass(cls):
        return False
    return any(f.name == name and f.type is str for f in dataclasses.fields(cls))


def _parse_value(raw: str) -> Any:
    try:
        return yaml.safe_load(raw)
    except yaml.YAMLError:
        return raw


def _sections() -> list[str]:
    return [f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)]


def _check_keys(values: dict[str, Any], cls: Any, prefix: str) -> None:
    """Refuse unknown keys before pydantic does, to be able to name the nearest valid one."""
    known = {f.name: f.type for f in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in known:
            whole = f"{prefix}{key}"
            if isinstance(value, dict) or not prefix:
                valid = [n for n in known if dataclasses.is_dataclass(known[n])]
                nearest = _nearest(str(key), valid)
            else:
                everything = [f"{s.name}.{f.name}" for s in dataclasses.fields(Config)
                              if dataclasses.is_dataclass(s.type) for f in dataclasses.fields(s.type)]  # fmt: skip
                valid = list(known)
                nearest = _nearest(whole, everything)
            raise BadInput(f"unknown key {whole!r}{nearest}; expected one of {', '.join(valid)}")
        if dataclasses.is_dataclass(known[key]):
            if value is not None and not isinstance(value, dict):
                raise BadInput(f"{key} is {value!r}; expected a section with keys")
            _check_keys(value or {}, known[key], prefix=f"{key}.")


def _nearest(key: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
        return f"{where}.{message}" if where and not message.startswith(where) else message
    expected = error["msg"].removeprefix("Input should be ").partition(",")[0]
    return f"{where} is {error['input']!r}; expected {expected}"


def _require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}; expected {expected}")
