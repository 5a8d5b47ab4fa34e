"""Images per second of a training step: in our Ray Train loop, in a bare loop, and of other models.

All contenders take turns in one Ray Train worker, on the same pictures. What they are is told in `train_step_worker`.
"""

import dataclasses
from pathlib import Path

from pipeline.benchmarks.benchmark_inputs import names_pictures, take_pictures
from pipeline.benchmarks.harness import (
    Findings,
    Goal,
    Ratio,
    Spread,
    publish,
    rate_table,
    ratio,
    scratch,
    spread_results,
)
from pipeline.core.config import Config
from pipeline.core.run import Run
from pipeline.tracking import Tracker
from pipeline.training import train as training
from tatok_model.config import SIZES, TokenizerConfig
from tatok_model.vit import CHANNELS

# Floating point operations of a training step, and what share of a GPU's they are.

FORWARD_AND_BACKWARD = 3  # forward passes' worth
DENSE_BF16 = {  # operations per second without sparsity, by what the name of a GPU contains; the vendor's data sheets
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}


def training_flops(config: TokenizerConfig) -> float:
    """Operations of a training step for each image; q's own ranking pass is not counted."""
    return FORWARD_AND_BACKWARD * forward_flops(config)


def forward_flops(config: TokenizerConfig) -> float:
    """Operations of a forward pass for an image of which everything is read, kept and predicted."""
    width, encoder_layers, decoder_layers, _ = SIZES[config.size]
    m, n = config.global_tokens, config.patch_positions
    pixels = config.patch_size**2 * CHANNELS
    total = 2.0 * (2 * n * pixels * width)  # patches in, pixels out
    total += transformer_flops(m + n, width, encoder_layers + decoder_layers)
    total += 2.0 * config.max_tokens * config.codebook_size * _code_dim(config)  # nearest entries
    total += 2 * (2.0 * config.max_tokens * width * _code_dim(config))  # to code vectors and back
    if config.has_entropy_model:
        seen = n + (m if config.entropy_globals else 0)
        total += 2.0 * seen * _code_dim(config) * config.entropy_width
        total += transformer_flops(seen, config.entropy_width, config.entropy_layers)
        total += 2.0 * n * config.entropy_width * config.codebook_size
    return total


def transformer_flops(length: int, width: int, layers: int) -> float:
    """Of L embeddings through blocks: 12 D^2 weights for each embedding, and L^2 D twice for scores and mixing."""
    return 2.0 * layers * (12 * length * width**2 + 2 * length**2 * width)


def peak_flops(gpu: str) -> float | None:
    """Dense bf16 operations per second of a GPU by its name; None: not in the table."""
    return next((peak for name, peak in DENSE_BF16.items() if name in gpu), None)


def _code_dim(config: TokenizerConfig) -> int:
    return config.codebook_dim if config.quantizer == "vq" else len(config.fsq_levels)


LOOP, BARE, GLOBAL_ONLY, TITOK = "ray_train_loop", "bare_loop", "global_only", "titok"
TAX, TAX_ON_GPU, AGAINST_TITOK, UTILISATION = Goal(0.97), Goal(0.98), Goal(1.2), Goal(0.45)
WORKER = "pipeline.benchmarks.train_step_worker"


def check(config: Config) -> None:
    """Refuse what cannot work before anything is made.

    Raises:
        BadInput: as training's `check`; a `benchmark.titok` that is no checkout, or no size that TiTok has.
    """
    made = dataclasses.replace(config.data, source="samples")  # as good a name as any for pictures that will be made
    known = config if names_pictures(config) else dataclasses.replace(config, data=made)
    training.check(for_benchmark(known))
    if config.benchmark.titok:
        from pipeline.benchmarks import titok

        titok.check(config.benchmark.titok, config.tokenizer)


def for_benchmark(config: Config) -> Config:
    """The configuration of the loop: one worker, the benchmark's batch, and no step that stands out.

    Kept sets are those of the ranking from the first step on; nothing is validated or saved but at the end.
    """
    section = config.benchmark
    steps = steps_of(config)
    train = dataclasses.replace(
        config.train,
        num_workers=1,
        min_workers=0,
        accumulation=1,
        global_batch_size=section.batch_size,
        max_steps=2 * steps,  # the first half warms up
        max_minutes=0.0,
        log_every=steps,
        validate_every=0,
        checkpoint_every=0,
        validation_images=2,
        grid_images=0,
    )
    kept_sets = dataclasses.replace(config.kept_sets, warmup_steps=0)
    folder = str(Path(section.titok).resolve()) if section.titok else ""  # a worker starts in another folder
    benchmark = dataclasses.replace(section, titok=folder)
    return dataclasses.replace(config, train=train, kept_sets=kept_sets, benchmark=benchmark)


def steps_of(config: Config) -> int:
    """Steps of a timing."""
    return max(1, config.benchmark.images // config.benchmark.batch_size)


def run(run: Run) -> None:
    """Measure, and leave `report.md` with the table.

    Raises:
        BadInput: the cluster has no room for a worker.
        Stopped: the run was asked to stop.
    """
    from pipeline.training.train import run_workers

    with scratch(run) as folder:
        take_pictures(run, folder, heldout_fraction=0.1)
        run.config = for_benchmark(run.config)
        with Tracker.start(run, {"data_fingerprint": run.inputs["shards"]["sha256"]}) as tracker:
            outcome = run_workers(run, "train", WORKER)
            publish(run, tracker, findings(run.config, outcome["rates"], outcome["facts"]))


def findings(config: Config, rates: dict[str, list[float]], facts: dict[str, str]) -> Findings:
    """What the rates say.

    Args:
        config: of the benchmark.
        rates: images per second of every contender, one a round.
        facts: of the worker: device and such; `gpu` names one where there is one.
    """
    spreads = {name: Spread.of(values) for name, values in rates.items()}
    gpu = facts.get("gpu", "")
    ratios = [Ratio("loop_over_bare", ratio(rates[LOOP], rates[BARE]), "Ray Train loop over bare loop", TAX)]
    if gpu:
        ratios[0] = dataclasses.replace(ratios[0], goal=TAX_ON_GPU)
    for name, its in rates.items():
        if name not in (LOOP, BARE):
            goal = AGAINST_TITOK if name == TITOK else None
            ratios.append(Ratio(f"{BARE}_over_{name}", ratio(rates[BARE], its), f"bare loop over {name}", goal))
    ratios += utilisation(config, rates[BARE], gpu)
    numbers: dict[str, float] = {}
    for name, spread in spreads.items():
        numbers |= spread_results(f"{name}_images_per_second", spread)
    return Findings(rate_table("images/s", spreads, BARE), ratios, numbers, facts)


def utilisation(config: Config, rates: list[float], gpu: str) -> list[Ratio]:
    """Model FLOP utilisation in bf16, where the GPU is one whose peak is known; [] elsewhere."""
    peak = peak_flops(gpu)
    if peak is None:
        return []
    spread = Spread.of([rate * training_flops(config.tokenizer) / peak for rate in rates])
    return [Ratio("flop_utilisation", spread, f"of {peak / 1e12:.0f} dense bf16 TFLOP/s", UTILISATION)]
