"""Images per second of the evaluation stage, against the bare computation on pictures in memory.

Contenders, on held-out pictures at the configured cut, each on as many threads as an actor has:
- stage: Ray Data actors, as a job with several workers runs them; its rate leaves out the first range, which includes
  the start. The other contenders measure one range: their rates do not depend on the number of pictures.
- evaluator: the work of an actor (reading, encoding, cutting, decoding, every metric), in this process.
- bare: encode, rank and cut where the configuration cuts, decode, features.
- bare_with_bits: bare, and the entropy-coded length of the kept tokens, one pass of q per coding round.

Shapes: B images of a batch, H = W image side.
"""

import copy
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.benchmarks import harness
from pipeline.benchmarks.harness import Findings, Goal, Ratio, Spread
from pipeline.core.checkpoints import check_architecture
from pipeline.core.cluster import check_machine
from pipeline.core.config import Config
from pipeline.core.errors import BadInput
from pipeline.core.run import Run

if TYPE_CHECKING:  # torch is imported inside functions: `check` answers without it
    from pipeline.evaluation.evaluator import EvaluationSetup
    from pipeline.evaluation.measurements import EvaluationPlan
    from tatok_model.tokenizer import TaTok

STAGE, EVALUATOR, BARE, WITH_BITS = "stage", "evaluator", "bare", "bare_with_bits"
SHARE = Goal(0.9)
RANGES = 3  # per timing of the stage, whose rate leaves out the first


def check(config: Config) -> None:
    """Refuse what cannot work; reads no pictures.

    Raises:
        BadInput: shards or a checkpoint that do not fit, more workers than CPUs.
    """
    check_machine("evaluate", config.evaluate)
    check_architecture(config)
    harness.check_named(config)


def run(run: Run) -> None:
    """Measure all contenders and write `report.md`."""
    from pipeline.evaluation.evaluator import EvaluationSetup

    with harness.scratch(run) as folder:
        harness.take_pictures(run, folder, heldout_fraction=0.5)
        # One worker, because the other contenders run in one process too.
        run.config = run.config.with_values("evaluate", num_workers=1)
        tokenizer = harness.tokenizer_of(run)
        harness.publish(run, partial(_measure, run, EvaluationSetup.of(run), tokenizer))


def plan_of(plan: "EvaluationPlan", images: int) -> "EvaluationPlan":
    """The evaluation's plan, cut to `RANGES` whole ranges of equal size.

    They have at least `images` pictures together and the plan's range size each, where there are as many.

    Raises:
        BadInput: there are not enough held-out pictures for ranges of a batch each.
    """
    if plan.count < RANGES * plan.batch_size:
        raise BadInput(
            f"{plan.count} held-out pictures would be measured; "
            f"expected at least {RANGES * plan.batch_size}, {RANGES} batches of evaluate.batch_size"
        )
    whole = max(images, RANGES * plan.range_size)
    size = plan.batch_size * (min(plan.count, whole) // (RANGES * plan.batch_size))
    return dataclasses.replace(plan, count=RANGES * size, range_size=size, grid=0)


@dataclass
class StageRate:
    """Times the stage, its start separately."""

    setup: "EvaluationSetup"
    tokenizer: "TaTok"
    first: list[float] = field(default_factory=list)  # seconds until the first range was measured, in every round

    def __call__(self) -> float:
        """Images per second after the first range."""
        setup = self.setup
        started = time.perf_counter()
        parts = setup.parts_on_actors(self.tokenizer, originals=False, cuts=setup.cuts)
        times = [time.perf_counter() for _ in parts]
        self.first.append(times[0] - started)
        return (setup.plan.count - setup.plan.range_size) / (times[-1] - times[0])


def _measure(run: Run, setup: "EvaluationSetup", tokenizer: "TaTok") -> Findings:
    import torch

    from pipeline.evaluation.evaluator import Evaluator

    setup = dataclasses.replace(setup, plan=plan_of(setup.plan, run.config.benchmark.images))
    device = torch.device(setup.device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # as in an actor, which reserves a CPU
    stage = StageRate(setup, tokenizer)
    evaluator = Evaluator(copy.deepcopy(tokenizer), setup.instruments, setup.plan, False, device, setup.cuts)
    turns: dict[str, Callable[[], float]] = {
        STAGE: stage,
        EVALUATOR: partial(evaluator_rate, evaluator, setup),
        BARE: bare(setup, evaluator, device),
        WITH_BITS: bare(setup, evaluator, device, bits=True),
    }
    rates = harness.take_turns(run, turns)
    facts = {
        **harness.device_facts(device),
        "pictures a timing": f"{setup.plan.count} (stage), {setup.plan.range_size} (the others)",
        "batch": str(setup.plan.batch_size),
        "tokenizer": f"{tokenizer.config.size}, {tokenizer.config.max_tokens} tokens",
        "cut": f"{run.config.filter.rule} {run.config.filter.threshold:g}",
        "extractor": setup.extractors[0].name,
    }
    return findings(rates, Spread.of(stage.first[1:]), setup.plan.range_size, facts)


def findings(rates: dict[str, list[float]], first: Spread, range_size: int, facts: dict[str, str]) -> Findings:
    """Ratios and results of the rates; `first` is the seconds until the stage's first range of `range_size` images."""
    numbers = harness.rate_results(rates)
    numbers["start_seconds"] = max(0.0, first.median - range_size / numbers[f"{STAGE}_images_per_second"])
    ratios = [
        Ratio.of("stage_over_bare", rates[STAGE], rates[BARE], "stage, steady, over bare computation", SHARE),
        Ratio.of("stage_over_bare_with_bits", rates[STAGE], rates[WITH_BITS], "stage over bare with coded bits"),
        Ratio.of("evaluator_over_bare", rates[EVALUATOR], rates[BARE], "the same without Ray, over bare"),
    ]
    conclusion = f"the stage takes {numbers['start_seconds']:.1f} s to start"
    return Findings(harness.rate_table(rates, STAGE), ratios, numbers, facts, conclusion)


def evaluator_rate(evaluator: Any, setup: "EvaluationSetup") -> float:
    """Images per second of an actor's work on one range, in this process."""
    started = time.perf_counter()
    evaluator.measure(setup.pictures, 0, setup.plan.range_size)
    return setup.plan.range_size / (time.perf_counter() - started)


def bare(setup: "EvaluationSetup", evaluator: Any, device: Any, bits: bool = False) -> Callable[[], float]:
    """A function that times the bare computation on one range, in images per second.

    It uses the networks of `evaluator`; with `bits` it also computes entropy-coded lengths.
    """
    import numpy as np
    import torch

    from tatok_model.metrics.images import to_uint8

    plan, cuts, tokenizer = setup.plan, setup.cuts, evaluator.codec
    pictures = setup.pictures.images(plan.indices(np.arange(plan.range_size)).tolist())
    images = torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))  # (B, 3, H, W) uint8

    @torch.inference_mode()
    def rate() -> float:
        started = harness.now(device)
        for part in images.split(plan.batch_size):
            batch = part.to(device)
            tokens = cuts.operating(cuts.rank(tokenizer, tokenizer.encode(batch), batch))
            if bits:
                cuts.bits_coded(tokenizer, tokens)
            made = to_uint8(tokenizer.decode(tokens))
            for network in evaluator.networks:
                network(made)
        return plan.range_size / (harness.now(device) - started)

    return rate
