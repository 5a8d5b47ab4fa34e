"""Every kind of benchmark in a row and one report: `benchmark.kind=all`, for a machine that one has for minutes.

Each kind leaves a run folder of its own inside this one. What ran on the device is set against two ceilings that are
measured first: bytes that a copy moves in a second, and operations of a large matrix product in a second. A kind that
fails, or that would begin after `SECONDS`, is named in the report and does not end it.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.benchmarks import harness
from pipeline.benchmarks.harness import Findings
from pipeline.benchmarks.train_step import decode_flops, encode_flops, entropy_flops, training_flops
from pipeline.core.cluster import pick_device, uses_bf16
from pipeline.core.config import Config
from pipeline.core.console import format_value, say
from pipeline.core.errors import BadInput, Stopped
from pipeline.core.files import write_atomically
from pipeline.core.job import run_nested
from pipeline.core.run import Run
from pipeline.core.stages import find_benchmark

KINDS = ("encode", "train_step", "generation", "evaluate", "ingest", "preprocess", "scaling")  # the device's first
SECONDS = 420  # after which no further kind begins
REPEATS, PICTURES, SIZES = 3, 500, (200, 1000)  # at most, or the data stages alone would take that long
COPIED = {"cuda": 2**30, "cpu": 2**27}  # bytes, far more than caches hold
SIDE = {"cuda": 8192, "cpu": 1024}  # of the matrices


def check(config: Config) -> None:
    """Refuse what no kind can work with.

    Raises:
        BadInput: as the check of the first kind, where every kind refuses.
    """
    refusals = [refused for kind in KINDS if (refused := _refusal(of_kind(config, kind)))]
    if len(refusals) == len(KINDS):
        raise refusals[0]


def of_kind(config: Config, kind: str) -> Config:
    """The configuration of one kind: short, and with fresh weights, so that nothing has to be trained first."""
    section = config.benchmark
    short = {"repeats": min(section.repeats, REPEATS), "pictures": min(section.pictures, PICTURES), "sizes": SIZES}
    return config.with_values("benchmark", kind=kind, fresh=True, **short)


def _refusal(config: Config) -> BadInput | None:
    try:
        find_benchmark(config.benchmark.kind).check(config)
    except BadInput as error:
        return error
    return None


def run(run: Run) -> None:
    """Measure, and leave `report.md` with the table, the reports of all kinds below it."""
    device = pick_device("train", run.config.train.device)
    reports: list[Path] = []
    harness.publish(run, lambda: _measure(run, device, reports))
    page = Path(run.outputs["report"])
    whole = "\n\n".join(report.read_text() for report in (page, *reports))
    write_atomically(page, whole.encode())


def _measure(run: Run, device: Any, reports: list[Path]) -> Findings:
    bf16 = uses_bf16("auto", device)
    numbers = {"copy_bytes_per_second": copy_rate(device), "product_flops": product_rate(device, bf16)}
    copy, product = numbers.values()
    table = [["", "images/s", "of the product", "of the copy", "what"]]
    table.append(["ceiling: copy", "", "", f"{copy / 1e9:.0f} GB/s", "read and written"])
    kind = "bf16" if bf16 else "float32"
    table.append(["ceiling: matrix product", "", f"{product / 1e12:.2f} TFLOP/s", "", f"{SIDE[device.type]}^3, {kind}"])
    started, left_out = time.monotonic(), []
    for kind in KINDS:
        harness.go_on(run)
        if time.monotonic() - started > SECONDS:
            left_out.append(f"{kind}: {SECONDS} s were over")
            continue
        config = of_kind(run.config, kind).with_values("run", output=str(run.folder), name="")
        say(f"\n== {kind} ==")
        try:
            done = run_nested("benchmark", config)
        except Stopped:
            raise
        except Exception as error:  # noqa: BLE001 - the others are worth something without it
            left_out.append(f"{kind}: {type(error).__name__}: {error}")
            say(f"not measured: {left_out[-1]}")
            continue
        reports.append(Path(done.outputs["report"]))
        numbers |= {f"{kind}_{name}": value for name, value in done.results.items()}
        table += shares(kind, done.results, config, copy, product)
    numbers["seconds"] = time.monotonic() - started
    facts = {**harness.device_facts(device), "precision": "bf16" if bf16 else "float32"}
    conclusion = "Not measured: " + "; ".join(left_out) if left_out else "Every kind was measured."
    return Findings(table, [], numbers, facts, f"{conclusion} {numbers['seconds']:.0f} s.")


def shares(kind: str, results: dict[str, float], config: Config, copy: float, product: float) -> list[list[str]]:
    """Lines of the table: what of a kind's results ran on the device, and which share of the ceilings that is.

    Encoding, ranking, decoding and training are compared by their operations, sampling by the bytes that its steps have
    to read: all weights once, and the cache as it is on average, half full.
    """
    shape, batch = config.tokenizer, config.benchmark.batch_size
    by_operations: dict[str, tuple[str, float]] = {}
    if kind == "encode":
        by_operations = {
            "encode": (f"encode_images_per_second_batch{batch}", encode_flops(shape)),
            "rank": (f"rank_1_images_per_second_batch{batch}", entropy_flops(shape)),
            "decode": (f"decode_images_per_second_batch{batch}", decode_flops(shape)),
        }
    if kind == "train_step":
        by_operations = {
            "training step, bare": ("bare_loop_images_per_second", training_flops(shape)),
            "training step, our loop": ("ray_train_loop_images_per_second", training_flops(shape)),
        }
    lines = []
    for name, (key, operations) in by_operations.items():
        if key in results:
            share = f"{results[key] * operations / product:.1%}"
            lines.append([name, format_value(results[key]), share, "", f"{operations / 1e9:.2f} GFLOP an image"])
    if kind == "generation":
        for name in ("tatok", "patch_only"):
            rate, steps = results[f"{name}_images_per_second"], results[f"{name}_longest"]
            seconds = (1 - results[f"{name}_decoding_share"]) * batch / rate  # of sampling a batch
            read = steps * (results["generator_bytes"] + results[f"{name}_kv_cache_bytes"] / 2)
            what = (
                f"batch {batch}, {results[f'{name}_steps']:.0f} steps, {results[f'{name}_decoding_share']:.0%} decoding"
            )
            lines.append([f"generate, {name}", format_value(rate), "", f"{read / seconds / copy:.1%}", what])
    return lines


def copy_rate(device: Any) -> float:
    """Bytes per second, read and written, of copying a large tensor: median of five."""
    import torch

    source = torch.zeros(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _median_seconds(lambda: target.copy_(source), device)


def product_rate(device: Any, bf16: bool) -> float:
    """Operations per second of a square matrix product: median of five."""
    import torch

    side = SIDE[device.type]
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    return 2 * side**3 / _median_seconds(lambda: matrix @ matrix, device)


def _median_seconds(work: Callable[[], Any], device: Any) -> float:
    seconds = []
    for _ in range(7):  # the first two warm up
        started = harness.now(device)
        work()
        seconds.append(harness.now(device) - started)
    return statistics.median(seconds[2:])
