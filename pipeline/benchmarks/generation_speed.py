"""Pictures per second of the generator, against the same generator that writes all N patch tokens.

Both sample and decode the same number of pictures, in one process, on one device, taking turns; once at an equal batch
and once each at the batch that suits it best. The control is not trained: what it has to do does not depend on its
weights, because it always writes N tokens. Ours is, because its lengths are what training made of them; or, with
`benchmark.fresh`, it is not trained either, and writes as many tokens as a trained tokenizer keeps, at random places.
Positions are generated with the tokens, so nothing is filtered or replayed here; what decoding costs is counted, q's
expected codes included.

Shapes: B pictures of a batch, N patch positions.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.benchmarks import harness
from pipeline.benchmarks.harness import Findings, Ratio, Spread
from pipeline.core.checkpoints import read_generator
from pipeline.core.cluster import pick_device, uses_bf16
from pipeline.core.config import Config
from pipeline.core.errors import BadInput
from pipeline.core.inputs import with_input
from pipeline.core.run import Run
from pipeline.generator.fit import asked_labels, check_generator, check_guidance, load_generator

if TYPE_CHECKING:  # torch is imported inside functions: `check` answers without it
    from torch import Tensor

    from tatok_model.generation.generator import Generator
    from tatok_model.tokenizer import TaTok

OURS, CONTROL = "tatok", "patch_only"
LENGTHS = (  # patch tokens over their mean, in twenty equal parts of 1,024 test pictures of Tiny-ImageNet, at 55 of 272
    *(0.03, 0.10, 0.21, 0.28, 0.36, 0.46, 0.57, 0.65, 0.72, 0.83),
    *(0.90, 1.03, 1.14, 1.24, 1.39, 1.55, 1.70, 1.94, 2.17, 2.53),
)
STRIDE = 7  # of LENGTHS from one sample to the next: a batch has short and long ones
FRESH_CLASSES = 1000  # of a fresh generator, as of ImageNet
FLOOR = 0.9  # of the ratio of steps: what fewer steps have to give at least


def check(config: Config) -> None:
    """Refuse what cannot work; reads no tokens.

    Raises:
        BadInput: a tokenizer without patch tokens, which has no such control, or as the check of training a generator
            where there is none yet.
    """
    if not config.tokenizer.patch_tokens:
        raise BadInput("tokenizer.patch_tokens is false; expected patch tokens, which the control writes all of")
    if config.generate.device == "cuda":  # else torch need not be imported
        pick_device("generate", config.generate.device)
    if config.benchmark.fresh:
        least, most = config.tokenizer.global_tokens, config.tokenizer.max_tokens
        if not least < config.benchmark.mean_tokens <= most:
            raise BadInput(
                f"benchmark.mean_tokens is {config.benchmark.mean_tokens:g}; expected more than {least}, the global "
                f"tokens, and at most {most}"
            )
        asked_labels(config.generate, FRESH_CLASSES)
        return
    checkpoint = check_generator(config).generator.checkpoint
    if checkpoint:
        generator = read_generator(checkpoint)
        check_guidance(config.generate, asked_labels(config.generate, generator.classes), generator.class_dropout)


@dataclass(frozen=True)
class TimedGenerator:
    """A generator with the tokenizer that decodes for it."""

    name: str
    generator: "Generator"
    tokenizer: "TaTok"
    mean_tokens: float = 0.0  # of sequences whose lengths and places are given; 0: the generator chooses them


@dataclass
class TimeSpent:
    """What was made at one batch size, over all timings, and how long it took."""

    images: int = 0
    tokens: int = 0
    batches: int = 0
    longest: int = 0  # tokens of the longest sequence of each batch, added up
    sampling: float = 0.0  # seconds
    decoding: float = 0.0  # seconds

    @property
    def steps(self) -> float:
        """Of the generator for a picture: one a token."""
        return self.tokens / self.images

    @property
    def decoding_share(self) -> float:
        """Of the time."""
        return self.decoding / (self.decoding + self.sampling)


def run(run: Run) -> None:
    """Measure, and leave `report.md` with the table."""
    config = run.config
    device = pick_device("generate", config.generate.device)
    ours = _fresh(config, device) if config.benchmark.fresh else _trained(run, device)
    generator, config = ours.generator, run.config
    facts = {
        **harness.device_facts(device),
        "generator": f"{generator.config.size}, {sum(p.numel() for p in generator.parameters())} parameters",
        "pictures a timing": str(config.benchmark.images),
        "repeats": str(config.benchmark.repeats),
        "guidance": f"{config.generate.guidance:g}, {config.generate.schedule}",
    }
    contenders = [ours, control_of(ours, device)]
    tags = {name.replace(" ", "_"): fact for name, fact in facts.items()}
    if "generator" in run.inputs:
        tags["generator_sha256"] = run.inputs["generator"]["sha256"]
    harness.publish(run, lambda: _measure(run, contenders, device, facts), tags)


def _trained(run: Run, device: Any) -> TimedGenerator:
    """What the configuration names, or made first where it names none; said in the run's inputs."""
    from pipeline.core.checkpoints import load_tokenizer

    run.config = config = with_input(run.config, "generator.checkpoint")
    generator, sha256 = load_generator(config)
    tokenizer, tokenizer_sha256 = load_tokenizer(config)
    run.inputs["generator"] = {"path": config.generator.checkpoint, "sha256": sha256}
    run.inputs["tokenizer"] = {"path": config.tokenizer.checkpoint, "sha256": tokenizer_sha256}
    return TimedGenerator(OURS, generator.to(device).eval(), tokenizer.to(device).eval())


def _fresh(config: Config, device: Any) -> TimedGenerator:
    """Generator and tokenizer of the configured sizes, not trained."""
    import torch

    from tatok_model.config import GeneratorConfig
    from tatok_model.generation.generator import Generator
    from tatok_model.tokenizer import TaTok

    section = config.tokenizer
    made = GeneratorConfig(
        size=config.generator.size,
        classes=FRESH_CLASSES,
        global_tokens=section.global_tokens,
        grid_size=section.grid_size,
        codebook_size=section.codebook_size,
        max_patch_tokens=section.patch_positions,
    )
    torch.manual_seed(0)
    generator, tokenizer = Generator(made).to(device).eval(), TaTok(section.architecture()).to(device).eval()
    return TimedGenerator(OURS, generator, tokenizer, config.benchmark.mean_tokens)


def places_of(contender: TimedGenerator, numbers: "Tensor") -> "Tensor | None":
    """(B, T) places for samples of these (B,) numbers, -1 after the last; None where the generator chooses.

    Lengths are of `LENGTHS` in turn, stretched to the mean that is asked for; places are drawn, keyed by the number.
    """
    import torch

    if not contender.mean_tokens:
        return None
    config = contender.generator.config
    most, mean = config.max_patch_tokens, contender.mean_tokens - config.global_tokens
    places = torch.full((len(numbers), most), -1)
    for row, number in enumerate(numbers.tolist()):
        length = min(round(LENGTHS[number * STRIDE % len(LENGTHS)] * mean), most)
        draws = torch.Generator().manual_seed(number)
        places[row, :length] = torch.randperm(config.patch_positions, generator=draws)[:length].sort().values
    return places.to(numbers.device)


def control_of(ours: TimedGenerator, device: Any) -> TimedGenerator:
    """The same generator and tokenizer for all N patch tokens and no global ones, with fresh weights."""
    import torch

    from tatok_model.generation.generator import Generator
    from tatok_model.tokenizer import TaTok

    made, n = ours.generator.config, ours.generator.config.patch_positions
    config = dataclasses.replace(made, global_tokens=0, positions="derived", max_patch_tokens=n)
    architecture = dataclasses.replace(ours.tokenizer.config, global_tokens=0, entropy_layers=0)
    torch.manual_seed(0)
    return TimedGenerator(CONTROL, Generator(config).to(device).eval(), TaTok(architecture).to(device).eval())


def _measure(run: Run, contenders: list[TimedGenerator], device: Any, facts: dict[str, str]) -> Findings:
    """The table and every number behind it."""
    section, config = run.config.benchmark, run.config
    equal = section.batch_size
    sizes = sorted({equal, *section.batch_sizes})
    work = {(contender.name, size): TimeSpent() for size in sizes for contender in contenders}
    measured: dict[tuple[str, int], list[float]] = {}  # images/s, one a round

    def timed(contender: TimedGenerator, size: int) -> float:
        done = work[contender.name, size]
        before = done.sampling + done.decoding
        make_pictures(contender, size, section.images, config, device, done)
        return done.sampling + done.decoding - before

    for size in sizes:  # ratios compare what ran side by side: the contenders of one batch size take turns
        turns = {contender.name: partial(timed, contender, size) for contender in contenders}
        for name, seconds in harness.take_turns(run, turns).items():
            measured[name, size] = [section.images / value for value in seconds]
    rates = {key: Spread.of(values) for key, values in measured.items()}
    weights = sum(weight.nbytes for weight in contenders[0].generator.parameters())
    numbers: dict[str, float] = {"generator_bytes": weights}
    best: dict[str, int] = {}  # batch size by name
    for contender in contenders:
        name, spent = contender.name, work[contender.name, equal]
        best[name] = max(sizes, key=lambda size: rates[name, size].median)
        numbers |= {
            **harness.spread_results(f"{name}_images_per_second", rates[name, equal]),
            f"{name}_best_images_per_second": rates[name, best[name]].median,
            f"{name}_best_batch_size": best[name],
            f"{name}_steps": spent.steps,
            f"{name}_longest": spent.longest / spent.batches,
            f"{name}_decoding_share": spent.decoding_share,
            f"{name}_kv_cache_bytes": _cache_bytes(contender, equal, config),
        }
    steps = numbers[f"{CONTROL}_steps"] / numbers[f"{OURS}_steps"]
    each = f"images/s at each one's best, {best[OURS]} and {best[CONTROL]} pictures"
    ratios = [
        Ratio.of(name, measured[OURS, ours_size], measured[CONTROL, control_size], meaning)
        for name, ours_size, control_size, meaning in (
            ("speedup_equal_batch", equal, equal, f"images/s, both at {equal} pictures"),
            # Batches of different sizes did not take turns: this one's spread has in it what changed between them.
            ("speedup_best_batch", best[OURS], best[CONTROL], each),
        )
    ]
    ours, control = (work[name, equal] for name in (OURS, CONTROL))
    numbers |= {
        "ratio_of_steps": steps,
        "speedup_sampling_equal_batch": (control.sampling / control.images) / (ours.sampling / ours.images),
        "share_of_steps_equal_batch": ratios[0].spread.median / steps,
        "share_of_steps_best_batch": ratios[1].spread.median / steps,
    }
    table = [["", "batch", "images/s", "lowest", "highest", "steps", "longest", "decoding", "KV cache MB"]]
    for size in sizes:
        for contender in contenders:
            rate, spent = rates[contender.name, size], work[contender.name, size]
            columns = (rate.median, rate.low, rate.high, spent.steps, spent.longest / spent.batches)
            cache = f"{_cache_bytes(contender, size, config) / 1e6:.1f}"
            line = [contender.name, str(size), *(f"{number:.1f}" for number in columns)]
            table.append([*line, f"{spent.decoding_share:.0%}", cache])
    findings = Findings(table, ratios, numbers, facts)
    findings.conclusion = _conclusion(findings.results())
    return findings


def make_pictures(
    contender: TimedGenerator, batch_size: int, images: int, config: Config, device: Any, work: TimeSpent
) -> None:
    """Sample and decode that many pictures, and add to `work` what it took."""
    import torch

    from tatok_model.generation.sampling import sample

    generator, tokenizer = contender.generator, contender.tokenizer
    asked = torch.tensor(asked_labels(config.generate, generator.config.classes), device=device)
    for first in range(0, images, batch_size):
        numbers = torch.arange(first, min(first + batch_size, images), device=device)
        labels, places = asked[numbers % len(asked)], places_of(contender, numbers)
        started = harness.now(device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16("auto", device)):
            sequences = sample(generator, labels, numbers, config.generate.seed, config.generate, places=places)
            sampled = harness.now(device)
            tokenizer.decode(sequences.to_tokens(tokenizer.config.patch_positions, tokenizer.config.global_tokens))
        work.sampling += sampled - started
        work.decoding += harness.now(device) - sampled
        lengths = sequences.lengths()
        work.images += len(numbers)
        work.batches += 1
        work.tokens += int(lengths.sum())
        work.longest += int(lengths.max())


def _cache_bytes(contender: TimedGenerator, batch: int, config: Config) -> int:
    import torch

    from tatok_model.generation.sampling import kv_cache_bytes

    weight = next(contender.generator.parameters())
    dtype = torch.bfloat16 if uses_bf16("auto", weight.device) else weight.dtype
    return kv_cache_bytes(contender.generator.config, batch, dtype, config.generate.guided)


def _conclusion(results: dict[str, float]) -> str:
    equal, best, steps = (results[name] for name in ("speedup_equal_batch", "speedup_best_batch", "ratio_of_steps"))
    sampling = results["speedup_sampling_equal_batch"]
    return (
        f"{equal:.2f} times {CONTROL}'s images/s at an equal batch, {best:.2f} times at each one's best batch; "
        f"{CONTROL} takes {steps:.2f} times as many steps; {min(equal, best) / steps:.0%} of that arrive "
        f"(floor: {FLOOR:.0%}), sampling without decoding is {sampling:.2f} times as fast"
    )
