"""The configuration of a job: sections whose types say what their keys may hold. `presets.py` fills them from YAML."""

import dataclasses
import hashlib
import json
from dataclasses import field
from operator import attrgetter
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from pipeline.core.stages import BENCHMARKS
from tatok_model.config import GENERATOR_SIZES, KeptSetConfig, LossConfig, SamplingConfig, TokenizerConfig
from tatok_model.filtering_rules import SCORES, check_cut

SECTION = ConfigDict(extra="forbid")
AtLeast0 = Annotated[int, Field(ge=0)]
AtLeast1 = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
Sizes = Annotated[tuple[AtLeast1, ...], Field(min_length=1)]
Device = Literal["auto", "cpu", "cuda"]
Encoding = Literal["png", "jpeg", "webp"]


def _require(section: Any, key: str, good: Any, expected: str) -> None:
    if not good:
        raise ValueError(f"{key} is {attrgetter(key)(section)!r}; expected {expected}")


@dataclass(frozen=True, config=SECTION)
class RunConfig:
    """Where a run is kept."""

    output: str = "runs"  # folder that holds the run folders
    name: str = ""  # the run folder's name; empty: named after the preset and the stage
    make: bool = False  # as --make: train a model that a job needs and that nobody named

    def __post_init__(self) -> None:
        _require(self, "output", self.output, "a folder")
        inside = not self.name.startswith("/") and not {".", ".."} & set(self.name.split("/"))
        _require(self, "name", inside, "the name of a folder inside run.output")


@dataclass(frozen=True, config=SECTION)
class DataConfig:
    """Where images come from and what shape they get."""

    source: str = ""  # folder, .parquet, .tar, a URL of those, or "samples" (photographs inside scikit-image)
    heldout_source: str = ""  # like source; empty: a share of source, chosen by hash of the picture
    shards: str = ""  # folder with manifest.json, written by preprocess; empty: made from source when needed
    image_size: AtLeast1 = 32  # pixels, square
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1  # share of source, without a heldout_source
    rows_per_shard: AtLeast1 = 4096  # source pictures per shard
    max_pixels: AtLeast1 = 64_000_000  # pictures that decode to more pixels are rejected
    encoding: Encoding = "png"  # how resized pictures are stored; others keep their bytes
    quality: Annotated[int, Field(ge=1, le=100)] = 95  # of jpeg and webp, 1-100
    image_column: str = "image"  # Parquet column with the picture: bytes or {bytes, path}
    label_column: str = "label"  # of Parquet, or entry of .json in a tar: class index or name; "" none
    class_name_column: str = "class_name"  # the same for the name of a class; "" none
    num_workers: AtLeast0 = 0  # parallel shard tasks; 0: one per CPU


@dataclass(frozen=True, config=SECTION)
class TokenizerSection(TokenizerConfig):
    """The tokenizer's architecture and, optionally, the checkpoint to start from or to use."""

    checkpoint: str = ""  # folder or hub id; train: start from these weights; evaluate: what is evaluated

    def architecture(self) -> TokenizerConfig:
        """The part that `tatok_model` knows."""
        names = [f.name for f in dataclasses.fields(TokenizerConfig)]
        return TokenizerConfig(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True, config=SECTION)
class TrainConfig:
    """One training run. Schedules count optimiser steps; `max_minutes` only stops."""

    parts: Literal["all", "entropy"] = "all"  # entropy: that model alone, on a frozen tokenizer.checkpoint
    num_workers: AtLeast0 = 0  # 0: in this process; n: n Ray Train workers
    parallel: Literal["ddp", "fsdp2"] = "ddp"  # each worker holds the whole state, or its part of a tokenizer's
    device: Device = "auto"  # auto: a CUDA GPU where there is one
    precision: Literal["auto", "float32", "bf16"] = "auto"  # auto: bf16 on GPU, float32 on CPU
    compile: bool = False  # torch.compile the model: minutes at the start, faster steps
    seed: int = 0  # every random draw derives from it
    max_steps: AtLeast1 = 1000  # optimiser steps
    max_minutes: NotNegative = 0.0  # stop (resumable) after this many minutes; 0: no limit
    global_batch_size: AtLeast1 = 64  # images per optimiser step over all workers
    accumulation: AtLeast1 = 1  # micro-batches per optimiser step; the codebook averages move with each of them
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon moves the hidden matrices, AdamW the rest
    learning_rate: Positive = 1e-3  # peak
    min_learning_rate: NotNegative = 1e-5  # at the end of the cosine
    warmup_steps: AtLeast0 = 100  # linear warm-up
    beta1: Below1 = 0.9  # of AdamW: decay of the mean gradient
    beta2: Below1 = 0.99  # of AdamW: decay of the mean squared gradient
    weight_decay: NotNegative = 1e-4  # of matrices
    clip_norm: NotNegative = 1.0  # gradient norm; 0: no clipping
    ema_decay: Below1 = 0.999  # of the exported weights; 0: no averaging
    horizontal_flip: bool = True  # training pictures are mirrored at random
    log_every: AtLeast1 = 20  # steps between logged metrics
    validate_every: AtLeast0 = 500  # steps between validations; 0: only at the end
    validation_images: AtLeast1 = 1024  # held-out images per validation
    grid_images: AtLeast0 = 8  # originals beside reconstructions in the logged picture
    checkpoint_every: AtLeast0 = 500  # steps between checkpoints; 0: only at the end
    keep_checkpoints: AtLeast1 = 2  # how many are kept
    max_failures: AtLeast0 = 3  # restarts of failed workers, with num_workers
    min_workers: AtLeast0 = 0  # go on with so many where the cluster has no room for num_workers; 0: wait for all
    not_finite: Literal["stop", "skip"] = "stop"  # what a NaN in the gradient does: end the run, or skip the step
    cpus_per_worker: Positive = 1.0  # CPUs that each of num_workers reserves
    fused: bool = True  # fused AdamW; Muon has no such choice

    def __post_init__(self) -> None:
        workers, parts = self.num_workers, max(self.num_workers, 1) * self.accumulation
        _require(self, "min_workers", self.min_workers <= workers, f"0 to num_workers, {workers}")
        if self.parallel == "fsdp2":
            _require(self, "num_workers", workers >= 2, "at least 2 with parallel: fsdp2")
            _require(self, "compile", not self.compile, "false with parallel: fsdp2")
        whole = self.global_batch_size % parts == 0
        _require(self, "global_batch_size", whole, f"a multiple of num_workers x accumulation, {parts}")


@dataclass(frozen=True, config=SECTION)
class FilterConfig:
    """Dynamic token filtering: how patch tokens are ranked, and where a ranking is cut."""

    score: str = "distortion"  # distortion | error | surprisal | entropy | pixel_entropy | random | grid
    rounds: AtLeast1 = 1  # R: open positions are scored anew in every round; more than 1 for the first four scores only
    rule: str = "relative"  # relative | residual | marginal | count | quality
    threshold: float = 1.0  # a share, the score's unit (residual and marginal), patch tokens or dB, as the rule has it
    replay: bool = False  # score entropy: decoders repeat the ranking, positions are not sent
    coding_rounds: AtLeast1 = 8  # rounds in which kept codes are entropy-coded, for bits_coded
    mean_tokens: NotNegative = 0.0  # calibrate: wanted mean of tokens per image, global ones counted
    mean_psnr: NotNegative = 0.0  # calibrate: wanted mean PSNR in dB instead

    def cut(self, patch_tokens: bool) -> str:
        """What decides which tokens a sequence keeps, in words that are equal where the cut is."""
        ranked = f"{self.score}, {self.rounds} rounds, " if patch_tokens else ""
        return f"{ranked}{self.rule} {self.threshold!r}"

    def __post_init__(self) -> None:
        check_cut(self.score, self.rule, self.threshold, positions=2**31)
        in_rounds = self.rounds == 1 or SCORES[self.score].in_rounds
        _require(self, "rounds", in_rounds, f"1 for the score {self.score!r}")
        _require(self, "replay", not self.replay or self.score == "entropy", "false unless score is entropy")


@dataclass(frozen=True, config=SECTION)
class EvaluateConfig:
    """What is measured on the held-out images."""

    max_images: AtLeast0 = 0  # held-out images to use; 0: all
    batch_size: AtLeast1 = 64  # images per forward pass
    num_workers: AtLeast1 = 1  # Ray actors that measure; 1: in this process
    device: Device = "auto"  # auto: a CUDA GPU where there is one
    extractor: str = "auto"  # compact_cifar10, inception2015, or a file by jobs/train_extractor.py; auto: inception2015
    # when its weights are given
    inception_weights: str = ""  # path of the FID Inception weights (pt_inception-2015-12-05-6726825d.pth)
    reference: str = ""  # npz with mu and sigma, e.g. ADM's; empty: computed from the held-out images and cached
    lpips_backbone: str = ""  # path of VGG16 weights; with lpips_heads: LPIPS is measured
    lpips_heads: str = ""  # path of the LPIPS linear heads
    baselines: tuple[Literal["kmeans", "jpeg", "webp"], ...] = ()  # kmeans: patch VQ; at the same total bits
    thresholds: tuple[float, ...] = ()  # of filter.rule: cuts of one ranking, for a rate-distortion curve
    more_extractors: tuple[str, ...] = ()  # files of further Frechet distances: by jobs/train_extractor.py, or
    # CIFAR ResNet-20 or -56 (.th)
    information: bool = False  # measure redundancy and, with blind_checkpoint, the mutual information I(c; g), in bits
    blind_checkpoint: str = ""  # the same tokenizer with an entropy model that does not see the global tokens
    grid_images: AtLeast0 = 8  # originals beside reconstructions in the picture
    generated: str = ""  # run folder of jobs/generate.py: its pictures are measured instead of a tokenizer
    nearest: AtLeast0 = 8  # generated pictures shown beside their nearest training pictures

    def __post_init__(self) -> None:
        names = ("auto", "compact_cifar10", "inception2015")
        known = self.extractor in names or self.extractor.endswith(".safetensors")
        _require(self, "extractor", known, f"one of {', '.join(names)}, or a .safetensors file")
        _require(self, "thresholds", len(set(self.thresholds)) == len(self.thresholds), "different numbers")
        _require(self, "blind_checkpoint", self.information or not self.blind_checkpoint, "information: true")
        weights = self.inception_weights or self.extractor != "inception2015"
        _require(self, "inception_weights", weights, "the path of the FID Inception weights")
        together = bool(self.lpips_backbone) == bool(self.lpips_heads)
        _require(self, "lpips_heads", together, "lpips_backbone and lpips_heads to be given together")


@dataclass(frozen=True, config=SECTION)
class TokensConfig:
    """Pictures as ranked token streams, and back."""

    path: str = ""  # folder with tokens.json, written by tokenize_images; what detokenize reads
    split: Literal["train", "heldout", "both"] = "both"  # which pictures become tokens
    batch_size: AtLeast1 = 64  # images per forward pass
    num_workers: AtLeast1 = 1  # Ray actors; 1: in this process
    device: Device = "auto"  # auto: a CUDA GPU where there is one
    encoding: Encoding = "png"  # of pictures that detokenize writes
    max_images: AtLeast0 = 0  # of each split; 0: all
    flip: bool = False  # every training picture's mirror image too, as rows of their own
    crops: AtLeast0 = 0  # that many shifted copies of every training picture too, mirrored at random


@dataclass(frozen=True, config=SECTION)
class GeneratorSection:
    """The generator; what its tokens look like comes from the token stream and the cut."""

    checkpoint: str = ""  # folder; generate: what samples; train_generator: start from these weights
    size: str = "tiny"  # nano | tiny | small | base | large
    dropout: Below1 = 0.1  # of attention and MLP outputs, in training
    class_dropout: Below1 = 0.1  # share of training samples without their label, for guidance
    positions: Literal["auto", "generated", "derived"] = "auto"  # auto: derived where every patch token is kept
    from_codebook: bool = True  # codes that are alike in the tokenizer start alike; needs tokenizer.checkpoint
    length_groups: AtLeast1 = 8  # a worker's batch is cut into that many parts of similar length, to pad less

    def __post_init__(self) -> None:
        _require(self, "size", self.size in GENERATOR_SIZES, f"one of {', '.join(GENERATOR_SIZES)}")


@dataclass(frozen=True, config=SECTION)
class GenerateConfig(SamplingConfig):
    """Pictures from a generator."""

    images: AtLeast1 = 64  # how many, all classes together
    labels: tuple[AtLeast0, ...] = ()  # only these classes, in turn; empty: every class in turn
    unconditional: bool = False  # no class at all
    seed: int = 0  # a picture is a function of (seed, its number, the weights)
    batch_size: AtLeast1 = 64  # pictures that are written together
    images_per_shard: AtLeast1 = 4096  # pictures of a file: what an interrupted run loses at most
    num_workers: AtLeast1 = 1  # Ray actors; 1: in this process
    device: Device = "auto"  # auto: a CUDA GPU where there is one
    encoding: Encoding = "png"  # of the pictures that are written
    files: bool = False  # each picture as a file in images/ too, as other people's evaluators want them
    grid_images: AtLeast0 = 64  # pictures in the grid

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, "labels", not (self.labels and self.unconditional), "none with unconditional: true")


@dataclass(frozen=True, config=SECTION)
class BenchmarkConfig:
    """Speed, measured side by side in one run."""

    kind: str = "generation"  # preprocess | ingest | train_step | encode | generation | evaluate | scaling | all
    repeats: AtLeast1 = 5  # of everything that is timed; medians are reported
    batch_size: AtLeast1 = 64  # the equal batch
    batch_sizes: Sizes = (16, 64, 256)  # among which each one's best is sought
    images: AtLeast1 = 256  # per timing
    pictures: AtLeast1 = 2000  # preprocess, ingest, scaling's workers: JPEG files of 500x375 made for the run
    sizes: Sizes = (1000, 10000)  # scaling: pictures over which time and memory an image should stay flat
    workers: Sizes = (1, 2, 4)  # scaling: numbers of workers; those beyond the CPUs are left out
    fresh: bool = False  # generation: fresh weights that write as many tokens as a trained tokenizer keeps
    mean_tokens: Positive = 56.4  # of those on average, global ones included
    titok: str = ""  # train_step: folder with TiTok's public code (1d-tokenizer); empty: it is left out

    def __post_init__(self) -> None:
        _require(self, "kind", self.kind in BENCHMARKS, f"one of {', '.join(BENCHMARKS)}")
        largest = max(self.batch_size, *self.batch_sizes)
        _require(self, "images", self.images >= largest, f"at least the largest batch, {largest}")


@dataclass(frozen=True, config=SECTION)
class SweepConfig:
    """Many trials and how they are compared."""

    kind: Literal["thresholds", "architecture"] = "thresholds"  # trials are cuts of tokenizers, or trainings
    checkpoints: tuple[str, ...] = ()  # thresholds: a trial for each; empty: tokenizer.checkpoint, or what train made
    space: dict[str, Any] = field(default_factory=dict)  # architecture: `section.key` to a list (grid), or to one of
    # {choice: [...]}, {uniform: [low, high]}, {log_uniform: [low, high]}, {int: [low, high]}, which are drawn
    cuts: dict[str, Any] = field(default_factory=dict)  # cut rule to a list of thresholds or {range: [low, high, how
    # many]}; empty: filter.rule at evaluate.thresholds
    search: Literal["random", "optuna"] = "random"  # of what is not a grid; optuna learns from earlier trials
    samples: AtLeast1 = 1  # draws, of each grid point (random) or in all (optuna); a mere grid is walked once
    seed: int = 0  # of the draws
    objective: Literal["psnr_at_tokens", "distance_at_tokens", "bd_rate"] = "psnr_at_tokens"  # of the best trial
    budget_tokens: NotNegative = 0.0  # tokens per image of the objectives at_tokens; 0: half of all that an image has
    rate: Literal["tokens_per_image", "bits_fixed", "bits_coded"] = "tokens_per_image"  # what bd_rate counts
    control: str = ""  # bd_rate: run folder of jobs/evaluate.py with a curve, which trials are compared with
    scheduler: Literal["none", "asha"] = "none"  # asha stops trials whose validation PSNR is behind that of others
    grace_steps: AtLeast0 = 0  # asha: steps that every trial may take; 0: train.validate_every
    reduction: Annotated[int, Field(ge=2)] = 3  # asha: of so many trials one goes on
    at_once: AtLeast0 = 0  # most trials at one time; 0: as many as there is room for
    register: str = "tatok"  # name of the registered model whose alias champion the best trial gets; empty: none

    def __post_init__(self) -> None:
        control = self.control or self.objective != "bd_rate"
        _require(self, "control", control, "the run folder of jobs/evaluate.py that bd_rate compares with")
        if self.kind == "architecture":
            _require(self, "space", self.space, "at least one key to vary")
            _require(self, "checkpoints", not self.checkpoints, "none with the kind architecture")
        else:
            _require(self, "space", not self.space, "none with the kind thresholds")


@dataclass(frozen=True, config=SECTION)
class ExtractorConfig:
    """Training of a feature network for Frechet distances within this project."""

    architecture: Literal["compact", "resnet"] = "compact"  # which network
    train_source: str = ""  # labelled Parquet, or a folder of shards (split train); empty: data.shards or data.source
    test_source: str = ""  # the same (split heldout); empty: data.shards or data.heldout_source
    epochs: AtLeast1 = 12  # times that every training picture is seen
    batch_size: AtLeast1 = 128  # images per step
    learning_rate: Positive = 0.01  # peak
    weight_decay: float = 5e-4  # of all weights


@dataclass(frozen=True, config=SECTION)
class TrackingConfig:
    """MLflow: where runs are logged."""

    uri: str = "sqlite:///mlflow.db"  # tracking server or SQLite file; empty: no tracking
    experiment: str = "tatok"  # where the runs appear
    system_metrics: bool = True  # CPU, memory, GPU in the run
    flush_seconds: float = 5.0  # at most this long between batches


@dataclass(frozen=True, config=SECTION)
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
    train_generator: TrainConfig = field(
        default_factory=TrainConfig
    )  # training of the generator, with the keys of train
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    extractor: ExtractorConfig = field(default_factory=ExtractorConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        tokenizer, alone = self.tokenizer, self.train.parts == "entropy"
        sizes = f"data.image_size, {self.data.image_size}"
        _require(self, "tokenizer.image_size", tokenizer.image_size == self.data.image_size, sizes)
        expected = (
            "tokenizer.checkpoint to name the tokenizer that stays as it is, with patch tokens and "
            "tokenizer.entropy_layers above 0"
        )
        _require(self, "train.parts", not alone or (tokenizer.checkpoint and tokenizer.has_entropy_model), expected)
        if alone and self.losses.gan:
            raise ValueError(
                f"losses.gan is {self.losses.gan} with train.parts 'entropy'; expected 0: the tokenizer stays as it is"
            )
        ddp = self.train_generator.parallel == "ddp"
        _require(self, "train_generator.parallel", ddp, "'ddp': only tokenizers are sharded")
        no_tail = not (self.kept_sets.global_tail and tokenizer.patch_tokens)
        _require(self, "kept_sets.global_tail", no_tail, "0, or tokenizer.patch_tokens: false")
        if tokenizer.patch_tokens:
            self._check_filter(tokenizer.patch_positions)

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
        _require(self, "filter.rounds", section.rounds <= positions, f"1 to {positions}, the patch positions")

    def value(self, key: str) -> Any:
        """The value of a `section.key`."""
        return attrgetter(key)(self)

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
