"""The stage behind `jobs/evaluate.py`: a tokenizer and held-out images in, numbers out."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.checkpoints import check_quality, load_tokenizer
from pipeline.core.cluster import check_cpus
from pipeline.core.config import Config
from pipeline.core.console import say
from pipeline.core.errors import BadInput
from pipeline.core.files import write_atomically
from pipeline.core.inputs import check_tokenizer, with_shards, with_tokenizer
from pipeline.core.run import Run
from pipeline.data.checks import check_files, check_global_counts, check_pictures, check_score
from pipeline.data.shards import read_manifest
from pipeline.evaluation import evaluate_generated
from pipeline.evaluation.evaluation_checks import check_baselines, check_information, load_blind
from pipeline.tracking import Tracker, check_tracking

if TYPE_CHECKING:  # torch is imported inside functions: `check` answers without it
    from pipeline.evaluation.actors import Bench
    from pipeline.evaluation.measurements import Measurements, Point
    from pipeline.evaluation.reference import Reference

FILES = ("evaluate.inception_weights", "evaluate.reference", "evaluate.lpips_backbone", "evaluate.lpips_heads")


def check(config: Config) -> None:
    """Refuse what cannot work before anything is made; reads no pictures.

    Raises:
        BadInput: as training's `check` where there is no tokenizer yet; shards of another image size, a checkpoint of
            another architecture, files that do not exist, pictures too small for SSIM, cuts, baselines or measures of
            information that cannot be, more workers than CPUs, a tracking address of unknown form.
    """
    check_cpus("evaluate.num_workers", config.evaluate.num_workers)
    check_tracking(config)
    check_files(config, *FILES)
    check_extractors(config)
    if config.evaluate.generated:
        evaluate_generated.check(config)
        return
    check_global_counts(config)
    if config.evaluate.thresholds or (config.filter.rule, config.filter.threshold) != ("relative", 1):
        check_score(config)
    check_information(config)
    check_tokenizer(config)
    check_pictures(config)
    if config.data.shards:
        check_baselines(config, read_manifest(config.data.shards).splits["train"].rows)


def check_extractors(config: Config) -> None:
    """Refuse feature networks whose files are not there.

    Raises:
        BadInput: naming the first that is missing.
    """
    if config.evaluate.extractor.endswith(".safetensors"):
        check_files(config, "evaluate.extractor")
    for path in config.evaluate.more_extractors:
        if not Path(path).is_file():
            raise BadInput(f"evaluate.more_extractors has {path!r}, which does not exist; expected a file")


def default_name(config: Config) -> str:
    """The run folder's name when `run.name` is empty."""
    if config.evaluate.generated:
        return evaluate_generated.default_name(config)
    return f"{config.preset}-evaluate"


def run(run: Run) -> None:
    """Measure, and leave a report and a picture in the run folder."""
    if run.config.evaluate.generated:
        evaluate_generated.run(run)
        return
    run.config = with_shards(run.config)
    manifest = read_manifest(run.config.data.shards)
    run.inputs["shards"] = {"path": run.config.data.shards, "sha256": manifest.fingerprint}
    run.config = with_tokenizer(run.config, manifest.fingerprint)
    tokenizer, sha256 = load_tokenizer(run.config)
    check_quality(run.config, tokenizer)
    run.inputs["tokenizer"] = {"path": run.config.tokenizer.checkpoint, "sha256": sha256}
    check_baselines(run.config, manifest.splits["train"].rows)
    blind = load_blind(run, tokenizer)

    from pipeline.evaluation.actors import Bench

    bench = Bench.set_up(run)
    facts = _facts(bench)
    with Tracker.start(run, facts) as tracker:
        _evaluate(run, bench, tokenizer, blind, facts, tracker)


def _evaluate(run: Run, bench: "Bench", tokenizer: Any, blind: Any, facts: dict[str, str], tracker: Tracker) -> None:
    from pipeline.evaluation.baselines import baselines_results, information_results
    from pipeline.evaluation.measurements import OPERATING
    from pipeline.evaluation.results import curve_results, measured_with_distances, tokenizer_results

    found, distances = measured_with_distances(run, bench, tokenizer)
    pixels = run.config.data.image_size**2
    points = bench.cuts.curve(tokenizer)
    results = tokenizer_results(found, distances, distances[0].reference, bench.extractor, pixels, bench.plan)
    curve = curve_results(found, [point.name for point in points], distances, pixels)
    named = zip((point.name for point in points), curve, strict=True)
    results |= baselines_results(run, bench, distances, [(OPERATING, results), *named])
    if run.config.evaluate.information:
        results |= information_results(run, bench, tokenizer, blind)
    run.results = results | {
        f"{point.name}_{name}": value
        for point, values in zip(points, curve, strict=True)
        for name, value in values.items()
    }
    _log(run, results, points, curve)
    _report(run, bench, distances[0].reference, facts, tracker, results, list(zip(points, curve, strict=True)))
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
    from pipeline.core.console import columns, markdown, terminal_table
    from pipeline.evaluation.results import rows, table, warnings

    title = f"{run.config.preset}: {bench.plan.count} held-out images"
    at_cuts = tuple(f"baseline_{codec}_{point.name}_" for codec in ("jpeg", "webp") for point, _ in curve)
    plain = {name: value for name, value in results.items() if not name.startswith(at_cuts)}
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
    from pipeline.core.plots import save_rows

    originals = bench.pictures.images(bench.plan.indices(bench.plan.shown()).tolist())
    path = run.folder / "pictures" / "reconstructions.png"
    save_rows(path, [originals, found["pictures"].images])
    run.outputs["reconstructions"] = str(path)
    tracker.picture(path, "reconstructions", 0)
    say(f"originals over reconstructions: {path}")
