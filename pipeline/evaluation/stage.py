"""The stage behind `jobs/evaluate.py`: a tokenizer and held-out images in, numbers out."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.checkpoints import check_architecture, read_architecture
from pipeline.checks import check_files, check_pictures
from pipeline.cluster import check_cpus
from pipeline.config import Config
from pipeline.data.manifest import read_manifest
from pipeline.errors import BadInput, Stopped
from pipeline.evaluation.inputs import with_tokenizer, with_trained
from pipeline.paths import sha256_file, write_atomically
from pipeline.pretrained import load_tokenizer
from pipeline.progress import say
from pipeline.run import Run
from pipeline.tracking import Tracker, check_tracking
from pipeline.training import stage as training

if TYPE_CHECKING:  # torch is imported inside functions: `check` answers without it
    from pipeline.evaluation.bench import Bench
    from pipeline.evaluation.curve import Distance
    from pipeline.evaluation.cuts import Point
    from pipeline.evaluation.extractors import Extractor
    from pipeline.evaluation.measurements import Measurements
    from pipeline.evaluation.reference import Reference

FILES = ("evaluate.inception_weights", "evaluate.reference", "evaluate.lpips_backbone", "evaluate.lpips_heads")


def check(config: Config) -> None:
    """Refuse what cannot work before anything is made; reads no pictures.

    Raises:
        BadInput: as training's `check` where there is no tokenizer yet; shards of another image size, a checkpoint of
            another architecture, files that do not exist, pictures too small for SSIM, more workers than CPUs, a
            tracking address of unknown form.
    """
    check_cpus("evaluate.num_workers", config.evaluate.num_workers)
    check_tracking(config)
    check_files(config, *FILES)
    check_global_counts(config)
    if config.evaluate.information and not config.tokenizer.has_entropy_model:
        raise BadInput("evaluate.information is true; expected a tokenizer with an entropy model")
    if config.evaluate.blind_checkpoint:
        read_architecture(config.evaluate.blind_checkpoint)
    found = with_trained(config)
    if not found.tokenizer.checkpoint:
        training.check(config)
        return
    check_architecture(found)
    check_pictures(config)


def check_global_counts(config: Config) -> None:
    """Refuse cuts of a tokenizer without patch tokens that are not a number of its global tokens.

    Raises:
        BadInput: another rule than count, or a threshold that is not from 1 to M.
    """
    if config.tokenizer.patch_tokens:
        return
    section, most = config.filter, config.tokenizer.global_tokens
    cuts = {"evaluate.thresholds": config.evaluate.thresholds}
    if (section.rule, section.threshold) != ("relative", 1):
        cuts["filter.threshold"] = (section.threshold,)
    for key, thresholds in cuts.items():
        if thresholds and section.rule != "count":
            raise BadInput(f"filter.rule is {section.rule!r} without patch tokens; expected count, of global tokens")
        for threshold in thresholds:
            if not 1 <= threshold <= most:
                raise BadInput(f"{key} has {threshold:g}; expected 1 to {most}, the global tokens")


def default_name(config: Config) -> str:
    """The run folder's name when `run.name` is empty."""
    return f"{config.preset}-evaluate"


def run(run: Run) -> None:
    """Measure, and leave a report and a picture in the run folder."""
    run.config = with_tokenizer(training.with_shards(run.config))
    manifest = read_manifest(run.config.data.shards)
    run.inputs["shards"] = {"path": run.config.data.shards, "sha256": manifest.fingerprint}
    tokenizer, sha256 = load_tokenizer(run.config)
    run.inputs["tokenizer"] = {"path": run.config.tokenizer.checkpoint, "sha256": sha256}

    from pipeline.evaluation.bench import Bench

    bench = Bench.set_up(run)
    facts = _facts(bench)
    with Tracker.start(run, facts) as tracker:
        _evaluate(run, bench, tokenizer, facts, tracker)


def _evaluate(run: Run, bench: "Bench", tokenizer: Any, facts: dict[str, str], tracker: Tracker) -> None:
    from pipeline.evaluation.curve import Distance
    from pipeline.evaluation.results import curve_results, tokenizer_results

    extractors = {"": bench.extractor, **{f"@{extractor.name}": extractor for extractor in bench.more}}
    known = {key: _known_reference(run, bench, extractor) for key, extractor in extractors.items()}
    found = bench.measure("evaluate", tokenizer, originals=None in known.values())
    references = {
        key: known[key] or _new_reference(run, bench, found, key, extractor) for key, extractor in extractors.items()
    }
    distances = [Distance(key, extractor.distance_name, references[key]) for key, extractor in extractors.items()]
    pixels = run.config.data.image_size**2
    points = bench.cuts.curve(tokenizer)
    results = tokenizer_results(found, distances, references[""], bench.extractor, pixels, bench.plan)
    curve = curve_results(found, [point.name for point in points], distances, pixels)
    results |= _baseline_results(run, bench, distances, [results, *curve])
    if run.config.evaluate.information:
        results |= _information_results(run, bench, tokenizer)
    run.results = results | {
        f"{point.name}_{name}": value
        for point, values in zip(points, curve, strict=True)
        for name, value in values.items()
    }
    _log(run, results, points, curve)
    _report(run, bench, references[""], facts, tracker, results, list(zip(points, curve, strict=True)))
    if bench.plan.grid:
        _draw(run, bench, found, tracker)
    if points:
        from pipeline.evaluation.curve_files import keep_curve

        keep_curve(run, bench, found, list(zip(points, curve, strict=True)), distances[0].name, tracker)


def _log(run: Run, results: dict[str, float], points: list["Point"], curve: list[dict[str, float]]) -> None:
    """Metrics of the run, and those of the curve with the number of the threshold as their step."""
    run.rewind_metrics(-1)  # a resumed run measures anew
    run.log(results, step=0)
    for step, (point, values) in enumerate(zip(points, curve, strict=True)):
        at = {} if point.threshold is None else {"curve/threshold": point.threshold}
        run.log({**at, **{f"curve/{name}": value for name, value in values.items()}}, step=step)


def _known_reference(run: Run, bench: "Bench", extractor: "Extractor") -> "Reference | None":
    """Statistics of the originals that were given for the main extractor, or kept by an earlier run."""
    from pipeline.evaluation.reference import cache_path, describe, read_cached, read_given

    meta = describe(bench.manifest, bench.plan, extractor)
    width = extractor.network.feature_dim
    given = run.config.evaluate.reference if extractor is bench.extractor else ""
    path = Path(given or cache_path(run.config.run.output, meta))
    reference = read_given(str(path), meta, width) if given else read_cached(path, meta, width)
    if reference is not None:
        run.inputs[_reference_name(bench, extractor)] = {"path": str(path), "sha256": sha256_file(path)}
    return reference


def _new_reference(run: Run, bench: "Bench", found: "Measurements", key: str, extractor: "Extractor") -> "Reference":
    """Statistics of the originals, kept for later runs."""
    from pipeline.evaluation.reference import Reference, cache_path, describe

    meta = describe(bench.manifest, bench.plan, extractor)
    score = found["original_score"].result() if extractor is bench.extractor else None
    reference = Reference.of(found[f"original_features{key}"], score, meta)
    path = cache_path(run.config.run.output, meta)
    reference.save(path)
    run.outputs[_reference_name(bench, extractor)] = str(path)
    return reference


def _reference_name(bench: "Bench", extractor: "Extractor") -> str:
    return "reference" if extractor is bench.extractor else f"reference_{extractor.name}"


def _baseline_results(
    run: Run, bench: "Bench", distances: "list[Distance]", cuts: list[dict[str, float]]
) -> dict[str, float]:
    """The baselines that are asked for, at the bits of the operating point, which is the first of `cuts`.

    Picture codecs are measured at the bits of every cut: `baseline_jpeg_curve00_psnr` stands beside `curve00_psnr`.
    """
    from pipeline.evaluation.outside import Outside
    from pipeline.progress import progress

    wanted = run.config.evaluate.baselines
    results: dict[str, float] = {}
    if "kmeans" in wanted:
        results |= _kmeans_results(run, bench, distances, cuts[0]["bits_fixed"])
    outside = Outside(bench.pictures, bench.plan, bench.instruments, distances)
    for codec in (name for name in wanted if name != "kmeans"):
        with progress(codec, bench.plan.count * len(cuts), "images") as shown:
            for number, cut in enumerate(cuts):
                prefix = f"baseline_{codec}_" + (f"curve{number - 1:02d}_" if number else "")
                found = outside.measure(codec, cut["bits_fixed"], shown.advance)
                results |= {f"{prefix}{name}": value for name, value in found.items()}
                if run.should_stop:
                    raise Stopped("evaluation was asked to stop; --resume measures anew")
    return results


def _information_results(run: Run, bench: "Bench", tokenizer: Any) -> dict[str, float]:
    """Redundancy and mutual information, in this process: one position a round is slow however it is shared out."""
    import numpy as np

    from pipeline.checkpoints import find
    from pipeline.evaluation.information import measure_information
    from pipeline.progress import progress
    from tatok_model.tokenizer import TaTok

    path = run.config.evaluate.blind_checkpoint
    blind = TaTok.from_pretrained(find(path)) if path else None
    places = bench.plan.indices(np.arange(bench.plan.count))

    with progress("information", len(places), "images") as shown:

        def advance(count: int) -> None:
            shown.advance(count)
            if run.should_stop:
                raise Stopped("evaluation was asked to stop; --resume measures anew")

        size = bench.plan.batch_size
        return measure_information(tokenizer.cpu(), blind, bench.pictures, places, size, advance)


def _kmeans_results(run: Run, bench: "Bench", distances: "list[Distance]", bits: float) -> dict[str, float]:
    """Fit the baseline to the training split and measure it as the tokenizer was measured."""
    from pipeline.data.shards import ShardDataset
    from pipeline.evaluation.baselines import fit_kmeans
    from pipeline.evaluation.results import baseline_results

    pictures = ShardDataset(run.config.data.shards, "train")
    started = time.monotonic()
    baseline = fit_kmeans(pictures, len(pictures), run.config.tokenizer.architecture(), bits)
    seconds = time.monotonic() - started
    found = bench.measure("kmeans baseline", baseline, originals=False)
    return {**baseline_results(found, distances), "baseline_kmeans_fit_seconds": seconds}


def _facts(bench: "Bench") -> dict[str, str]:
    """What the numbers depend on: tags of the MLflow run, and the end of the report."""
    from pipeline.evaluation.reference import describe

    meta = describe(bench.manifest, bench.plan, bench.extractor)
    config = bench.run.config
    return {
        "data_fingerprint": meta["data"],
        "split": meta["split"],
        "images": str(meta["images"]),
        "tokenizer": config.tokenizer.checkpoint,
        "tokenizer_sha256": bench.run.inputs["tokenizer"]["sha256"],
        "extractor": meta["extractor"],
        "extractor_sha256": meta["weights_sha256"],
        "extractor_resize": meta["extractor_resize"],
        "comparable": str(bench.extractor.comparable).lower(),
        "reference": config.evaluate.reference or "the held-out originals",
        "score": f"{config.filter.score}, {config.filter.rounds} rounds",
        "cut": f"{config.filter.rule} {config.filter.threshold:g}",
        "crop": meta["crop"],
        "uint8": meta["uint8"],
        "score_splits": str(bench.plan.score_splits),
        "device": bench.device,
        "workers": str(config.evaluate.num_workers),
    }


def _report(
    run: Run,
    bench: "Bench",
    reference: "Reference",
    facts: dict[str, str],
    tracker: Tracker,
    results: dict[str, float],
    curve: "list[tuple[Point, dict[str, float]]]",
) -> None:
    """Show the table, and below it that of the curve, and keep both as `report.md`."""
    from pipeline.evaluation.curve import table
    from pipeline.evaluation.report import columns, markdown, terminal_table
    from pipeline.evaluation.results import rows, warnings

    title = f"{run.config.preset}: {bench.plan.count} held-out images"
    plain = {name: value for name, value in results.items() if "_curve" not in name}
    told = warnings(results, reference, bench.extractor)
    lines = list(rows(plain, bench.extractor, bench.device))
    names = [extractor.distance_name for extractor in (bench.extractor, *bench.more)]
    rule = run.config.filter.rule
    cuts = [("all" if p.threshold is None else f"{rule} {p.threshold:g}", values) for p, values in curve]
    cut_table = table(cuts, names) if cuts else []
    path = run.folder / "report.md"
    write_atomically(path, markdown(title, lines, told, facts, cut_table).encode())
    run.outputs["report"] = str(path)
    tracker.artifact(path)
    say(terminal_table(title, lines, told))
    if cut_table:
        say("\n" + columns(cut_table))


def _draw(run: Run, bench: "Bench", found: "Measurements", tracker: Tracker) -> None:
    """Originals over reconstructions."""
    from pipeline.grids import save_rows

    originals = bench.pictures.images(bench.plan.indices(bench.plan.shown()).tolist())
    path = run.folder / "pictures" / "reconstructions.png"
    save_rows(path, [originals, found["pictures"].images])
    run.outputs["reconstructions"] = str(path)
    tracker.picture(path, "reconstructions", 0)
    say(f"originals over reconstructions: {path}")
