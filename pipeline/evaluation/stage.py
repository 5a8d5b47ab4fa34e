"""The stage behind `jobs/evaluate.py`: a tokenizer and held-out images in, numbers out."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.checkpoints import check_architecture
from pipeline.checks import check_files, check_pictures
from pipeline.cluster import check_cpus
from pipeline.config import Config
from pipeline.data.manifest import read_manifest
from pipeline.evaluation.inputs import with_tokenizer, with_trained
from pipeline.paths import sha256_file, write_atomically
from pipeline.pretrained import load_tokenizer
from pipeline.progress import say
from pipeline.run import Run
from pipeline.tracking import Tracker, check_tracking
from pipeline.training import stage as training

if TYPE_CHECKING:  # torch is imported inside functions: `check` answers without it
    from pipeline.evaluation.bench import Bench
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
    found = with_trained(config)
    if not found.tokenizer.checkpoint:
        training.check(config)
        return
    check_architecture(found)
    check_pictures(config)


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
    from pipeline.evaluation.results import tokenizer_results

    reference = _known_reference(run, bench)
    found = bench.measure("evaluate", tokenizer, originals=reference is None)
    if reference is None:
        reference = _new_reference(run, bench, found)
    pixels = run.config.data.image_size**2
    results = tokenizer_results(found, reference, bench.extractor, pixels, bench.plan)
    if "kmeans" in run.config.evaluate.baselines:
        results |= _kmeans_results(run, bench, reference, results["bits_per_image"])
    run.results = results
    run.rewind_metrics(-1)  # a resumed run measures anew
    run.log(results, step=0)
    _report(run, bench, reference, facts, tracker)
    if bench.plan.grid:
        _draw(run, bench, found, tracker)


def _known_reference(run: Run, bench: "Bench") -> "Reference | None":
    """Statistics of the originals that were given, or kept by an earlier run."""
    from pipeline.evaluation.reference import cache_path, describe, read_cached, read_given

    meta = describe(bench.manifest, bench.plan, bench.extractor)
    width = bench.extractor.network.feature_dim
    path = Path(run.config.evaluate.reference or cache_path(run.config.run.output, meta))
    given = bool(run.config.evaluate.reference)
    reference = read_given(str(path), meta, width) if given else read_cached(path, meta, width)
    if reference is not None:
        run.inputs["reference"] = {"path": str(path), "sha256": sha256_file(path)}
    return reference


def _new_reference(run: Run, bench: "Bench", found: "Measurements") -> "Reference":
    """Statistics of the originals, kept for later runs."""
    from pipeline.evaluation.reference import Reference, cache_path, describe

    meta = describe(bench.manifest, bench.plan, bench.extractor)
    reference = Reference.of(found["original_features"], found["original_score"].result(), meta)
    path = cache_path(run.config.run.output, meta)
    reference.save(path)
    run.outputs["reference"] = str(path)
    return reference


def _kmeans_results(run: Run, bench: "Bench", reference: "Reference", bits: float) -> dict[str, float]:
    """Fit the baseline to the training split and measure it as the tokenizer was measured."""
    from pipeline.data.shards import ShardDataset
    from pipeline.evaluation.baselines import fit_kmeans
    from pipeline.evaluation.results import baseline_results

    pictures = ShardDataset(run.config.data.shards, "train")
    started = time.monotonic()
    baseline = fit_kmeans(pictures, len(pictures), run.config.tokenizer.architecture(), bits)
    seconds = time.monotonic() - started
    found = bench.measure("kmeans baseline", baseline, originals=False)
    return {**baseline_results(found, reference, bench.extractor), "baseline_kmeans_fit_seconds": seconds}


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
        "crop": meta["crop"],
        "uint8": meta["uint8"],
        "score_splits": str(bench.plan.score_splits),
        "device": bench.device,
        "workers": str(config.evaluate.num_workers),
    }


def _report(run: Run, bench: "Bench", reference: "Reference", facts: dict[str, str], tracker: Tracker) -> None:
    """Show the table and keep it as `report.md`."""
    from pipeline.evaluation.report import markdown, terminal_table
    from pipeline.evaluation.results import rows, warnings

    title = f"{run.config.preset}: {bench.plan.count} held-out images"
    table = list(rows(run.results, bench.extractor, bench.device))
    told = warnings(run.results, reference, bench.extractor)
    path = run.folder / "report.md"
    write_atomically(path, markdown(title, table, told, facts).encode())
    run.outputs["report"] = str(path)
    tracker.artifact(path)
    say(terminal_table(title, table, told))


def _draw(run: Run, bench: "Bench", found: "Measurements", tracker: Tracker) -> None:
    """Originals over reconstructions."""
    from pipeline.grids import save_rows

    originals = bench.pictures.images(bench.plan.indices(bench.plan.shown()).tolist())
    path = run.folder / "pictures" / "reconstructions.png"
    save_rows(path, [originals, found["pictures"].images])
    run.outputs["reconstructions"] = str(path)
    tracker.picture(path, "reconstructions", 0)
    say(f"originals over reconstructions: {path}")
