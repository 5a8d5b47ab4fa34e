"""Which Frechet distances an evaluation reports, and the statistics of originals that they are measured against."""

from pathlib import Path

from pipeline.evaluation.bench import Bench
from pipeline.evaluation.curve import Distance
from pipeline.evaluation.extractors import Extractor
from pipeline.evaluation.measurements import Measurements
from pipeline.evaluation.reference import Reference, cache_path, describe, read_cached, read_given
from pipeline.paths import sha256_file
from pipeline.run import Run


def measured_with_distances(run: Run, bench: Bench, tokenizer: object) -> tuple[Measurements, list[Distance]]:
    """Measure the tokenizer, and the originals too where their statistics are not known yet.

    Returns:
        What was measured; the Frechet distances to report, the main one first.

    Raises:
        BadInput: kept or given statistics are of other images or another network.
        Stopped: the run was asked to stop.
    """
    extractors = {"": bench.extractor, **{f"@{extractor.name}": extractor for extractor in bench.more}}
    known = {key: known_reference(run, bench, extractor) for key, extractor in extractors.items()}
    found = bench.measure("evaluate", tokenizer, originals=None in known.values())
    distances = []
    for key, extractor in extractors.items():
        reference = known[key] or new_reference(run, bench, found, key, extractor)
        distances.append(Distance(key, extractor.distance_name, reference))
    return found, distances


def known_reference(run: Run, bench: Bench, extractor: Extractor) -> Reference | None:
    """Statistics of the originals that were given for the main extractor, or kept by an earlier run."""
    meta = describe(bench.manifest, bench.plan, extractor)
    width = extractor.network.feature_dim
    given = run.config.evaluate.reference if extractor is bench.extractor else ""
    path = Path(given or cache_path(run.config.run.output, meta))
    reference = read_given(str(path), meta, width) if given else read_cached(path, meta, width)
    if reference is not None:
        run.inputs[_reference_name(bench, extractor)] = {"path": str(path), "sha256": sha256_file(path)}
    return reference


def new_reference(run: Run, bench: Bench, found: Measurements, key: str, extractor: Extractor) -> Reference:
    """Statistics of the originals, kept for later runs."""
    meta = describe(bench.manifest, bench.plan, extractor)
    score = found["original_score"].result() if extractor is bench.extractor else None
    reference = Reference.of(found[f"original_features{key}"], score, meta)
    path = cache_path(run.config.run.output, meta)
    reference.save(path)
    run.outputs[_reference_name(bench, extractor)] = str(path)
    return reference


def _reference_name(bench: Bench, extractor: Extractor) -> str:
    return "reference" if extractor is bench.extractor else f"reference_{extractor.name}"
