"""What stands beside a tokenizer's own numbers where it is asked for: baselines at equal bits, information in bits."""

import time
from typing import Any

import numpy as np

from pipeline.data.shards import ShardDataset
from pipeline.devices import pick_device
from pipeline.errors import BadInput, Stopped
from pipeline.evaluation.baselines import fit_kmeans
from pipeline.evaluation.bench import Bench
from pipeline.evaluation.curve import Distance
from pipeline.evaluation.information import measure_information
from pipeline.evaluation.outside import Outside
from pipeline.evaluation.results import baseline_results
from pipeline.progress import progress, say
from pipeline.run import Run
from tatok_model.tokenizer import TaTok


def baselines_results(
    run: Run, bench: Bench, distances: list[Distance], cuts: list[tuple[str, dict[str, float]]]
) -> dict[str, float]:
    """The baselines that are asked for, at the bits of the operating point, the first of the named `cuts`.

    Picture codecs are measured at the bits of every cut: `baseline_jpeg_curve00_psnr` stands beside `curve00_psnr`.
    """
    wanted = run.config.evaluate.baselines
    results: dict[str, float] = {}
    training = ShardDataset(run.config.data.shards, "train")
    if "kmeans" in wanted:
        results |= _kmeans_results(run, bench, distances, training, cuts[0][1]["bits_fixed"])
    outside = Outside(bench.pictures, bench.plan, bench.instruments, distances, training, len(training))
    for codec in (kind for kind in wanted if kind != "kmeans"):
        with progress(codec, bench.plan.count * len(cuts), "images") as shown:
            for name, cut in cuts:
                prefix = f"baseline_{codec}_" + (f"{name}_" if name else "")
                found = outside.measure(codec, cut["bits_fixed"], shown.advance)
                results |= {f"{prefix}{metric}": value for metric, value in found.items()}
                if run.should_stop:
                    raise Stopped("evaluation was asked to stop; --resume measures anew")
    return results


def information_results(run: Run, bench: Bench, tokenizer: Any, blind: TaTok | None) -> dict[str, float]:
    """Redundancy and mutual information, in this process: one position a round is slow however it is shared out."""
    device = pick_device("evaluate", run.config.evaluate.device)
    places = bench.plan.indices(np.arange(bench.plan.count))

    with progress("information", len(places), "images") as shown:

        def advance(count: int) -> None:
            shown.advance(count)
            if run.should_stop:
                raise Stopped("evaluation was asked to stop; --resume measures anew")

        size = bench.plan.batch_size
        return measure_information(tokenizer, blind, bench.pictures, places, size, advance, device)


def _kmeans_results(
    run: Run, bench: Bench, distances: list[Distance], pictures: ShardDataset, bits: float
) -> dict[str, float]:
    """Fit the baseline to the training split and measure it as the tokenizer was measured.

    Bits that vary between images are known only now: where no codebook can spend them, the row is left out.
    """
    started = time.monotonic()
    try:
        baseline = fit_kmeans(pictures, len(pictures), run.config.tokenizer.architecture(), bits)
    except BadInput as reason:
        say(f"the kmeans baseline is left out: {reason}")
        return {}
    seconds = time.monotonic() - started
    found = bench.measure("kmeans baseline", baseline, originals=False)
    return {**baseline_results(found, distances), "baseline_kmeans_fit_seconds": seconds}
