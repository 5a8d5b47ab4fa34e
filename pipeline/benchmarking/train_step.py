"""Images per second of a training step: in our Ray Train loop, in a bare loop, and of other models.

All contenders take turns in one Ray Train worker, on the same pictures. What they are is told in `train_step_worker`.
"""

import dataclasses
from pathlib import Path

from pipeline.benchmarking.scratch import scratch
from pipeline.benchmarking.shards import names_pictures, take_pictures
from pipeline.benchmarking.table import Findings, Goal, Ratio, publish, rate_table, spread_results
from pipeline.benchmarking.timing import Spread, ratio
from pipeline.config import Config
from pipeline.run import Run
from pipeline.tracking import Tracker
from pipeline.training import stage as training

LOOP, BARE, GLOBAL_ONLY, TITOK = "ray_train_loop", "bare_loop", "global_only", "titok"
TAX, TAX_ON_GPU, AGAINST_TITOK, UTILISATION = Goal(0.97), Goal(0.98), Goal(1.2), Goal(0.45)
WORKER = "pipeline.benchmarking.train_step_worker"


def check(config: Config) -> None:
    """Refuse what cannot work before anything is made.

    Raises:
        BadInput: as training's `check`; a `benchmark.titok` that is no checkout, or no size that TiTok has.
    """
    made = dataclasses.replace(config.data, source="samples")  # as good a name as any for pictures that will be made
    known = config if names_pictures(config) else dataclasses.replace(config, data=made)
    training.check(for_benchmark(known))
    if config.benchmark.titok:
        from pipeline.benchmarking import titok

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
    from pipeline.training.ray_workers import run_workers

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
    from pipeline.benchmarking.flops import peak_flops, training_flops

    peak = peak_flops(gpu)
    if peak is None:
        return []
    spread = Spread.of([rate * training_flops(config.tokenizer) / peak for rate in rates])
    return [Ratio("flop_utilisation", spread, f"of {peak / 1e12:.0f} dense bf16 TFLOP/s", UTILISATION)]
