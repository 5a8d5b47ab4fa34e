"""Images per second of encode, rank and decode: what each costs, for every batch size and number of rounds.

All take turns in this process on one device, on the same noise: what they cost does not depend on what is seen. A
tokenizer that no checkpoint names has fresh weights, for the same reason. Decoding is timed with everything kept, and
with a half and with the paper's share of the patch tokens, where q fills in what it expects. Ranking is timed by
distortion in R rounds, and in one round by surprisal and by error.

Shapes: B images of a batch, N patch positions, R rounds.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.benchmarks import harness
from pipeline.benchmarks.harness import Findings, Goal, Ratio, Spread
from pipeline.core.checkpoints import check_architecture
from pipeline.core.cluster import pick_device, uses_bf16
from pipeline.core.config import Config
from pipeline.core.run import Run

if TYPE_CHECKING:  # torch is imported inside functions: `check` answers without it
    from torch import Tensor

    from tatok_model.tokenizer import TaTok

ENCODE, DECODE, DECODE_HALF, DECODE_FEW = "encode", "decode", "decode_half", "decode_few"
FEW = 40 / 256  # of the patch tokens: 56 tokens with 16 global ones, as the paper has on average
ROUNDS = (1, 4, 8)
COST = Goal(1.15, at_most=True)  # of encode and one-pass rank, over encode
ALIKE = Goal(1.05, at_most=True)  # of ranking by distortion, over surprisal
FASTER = Goal(2.0)  # of decoding few tokens, over all


def check(config: Config) -> None:
    """Refuse what cannot work.

    Raises:
        BadInput: a checkpoint of another architecture, a GPU that is not there.
    """
    check_architecture(config)
    if config.evaluate.device == "cuda":  # else torch need not be imported
        pick_device("evaluate", config.evaluate.device)


def run(run: Run) -> None:
    """Measure, and leave `report.md` with the table."""
    tokenizer = harness.tokenizer_of(run)
    device = pick_device("evaluate", run.config.evaluate.device)
    harness.publish(run, partial(_measure, run, tokenizer.to(device), device))


def _measure(run: Run, tokenizer: "TaTok", device: Any) -> Findings:
    """Rates of every work at every batch size, and the ratios at the equal batch."""
    import torch

    section = run.config.benchmark

    def rate(work: Callable[[], Any], size: int) -> float:
        batches = max(1, section.images // size)
        started = harness.now(device)
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, uses_bf16("auto", device)):
            for _ in range(batches):
                work()
        return size * batches / (harness.now(device) - started)

    rates: dict[int, dict[str, list[float]]] = {}
    for size in sorted({section.batch_size, *section.batch_sizes}):
        works = works_of(tokenizer, noise(size, tokenizer.config.image_size, device))
        rates[size] = harness.take_turns(run, {name: partial(rate, work, size) for name, work in works.items()})
    facts = {
        **harness.device_facts(device),
        "tokenizer": f"{tokenizer.config.size}, {tokenizer.config.global_tokens} global tokens, "
        f"{tokenizer.config.patch_positions} patches, {tokenizer.config.codebook_size} codes",
        "entropy model": f"{tokenizer.config.entropy_layers} x {tokenizer.config.entropy_width}",
    }
    return findings(rates, section.batch_size, facts)


def works_of(tokenizer: "TaTok", images: "Tensor") -> dict[str, Callable[[], Any]]:
    """What is timed on (B, 3, H, W) uint8, by name; a tokenizer without an entropy model has nothing to rank."""
    tokens = tokenizer.encode(images)
    works: dict[str, Callable[[], Any]] = {ENCODE: lambda: tokenizer.encode(images)}
    if tokenizer.entropy_model is not None:
        positions = tokenizer.config.patch_positions
        half = tokenizer.rank(tokens).cut("count", positions // 2)
        for rounds in ROUNDS:
            if rounds <= positions:
                works[f"rank_{rounds}"] = partial(tokenizer.rank, tokens, rounds=rounds)
        works["rank_surprisal"] = partial(tokenizer.rank, tokens, "surprisal")
        works["rank_error"] = partial(tokenizer.rank, tokens, "error", images=images)
        few = half.cut("count", round(positions * FEW))
        works[DECODE_HALF], works[DECODE_FEW] = partial(tokenizer.decode, half), partial(tokenizer.decode, few)
    works[DECODE] = lambda: tokenizer.decode(tokens)
    return works


def noise(batch: int, side: int, device: Any) -> "Tensor":
    """(B, 3, H, W) uint8, the same every time."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=generator).to(device)


def findings(rates: dict[int, dict[str, list[float]]], equal: int, facts: dict[str, str]) -> Findings:
    """What the rates, of every work by batch size, say; ratios are of the batch size `equal`."""
    seconds = {name: [1 / rate for rate in its] for name, its in rates[equal].items()}
    ratios, numbers = [], {}
    for name in [name for name in seconds if name.removeprefix("rank_").isdigit()]:
        both = [one + other for one, other in zip(seconds[ENCODE], seconds[name], strict=True)]
        goal = COST if name == "rank_1" else None
        meaning = f"encode and {name.replace('_', ' in ')} rounds, over encode"
        ratios.append(Ratio.of(f"encode_{name}_over_encode", both, seconds[ENCODE], meaning, goal))
    for name, over, meaning, wanted in (
        ("rank_1", "rank_surprisal", "one round by distortion, over one by surprisal", ALIKE),
        ("rank_error", "rank_1", "one round by error, over one by distortion", None),
        (DECODE, DECODE_FEW, "all tokens decoded, over the paper's share of them", FASTER),
    ):
        if name in seconds and over in seconds:
            ratios.append(Ratio.of(f"{name}_over_{over}", seconds[name], seconds[over], meaning, wanted))
    whole = [name for name in (ENCODE, "rank_1", DECODE) if name in seconds]
    total = sum(Spread.of(seconds[name]).median for name in whole)
    for name in whole:
        numbers[f"{name}_share"] = Spread.of(seconds[name]).median / total
    header, lines = ["", "batch", "images/s", "lowest", "highest", "ms / image", "of encode"], []
    for size, its in rates.items():
        for name, values in its.items():
            spread, encode = Spread.of(values), Spread.of(its[ENCODE])
            numbers |= harness.spread_results(f"{name}_images_per_second_batch{size}", spread)
            more = f"{1e3 / spread.median:.3f}", f"{encode.median / spread.median:.2f}"
            lines.append([name, str(size), *harness.shown(spread), *more])
    return Findings([header, *lines], ratios, numbers, facts)
