"""The stage behind `jobs/evaluate.py`: a tokenizer and held-out images in, numbers out.

With `evaluate.generated`, pictures that a generator made are measured instead: see `generated`.
"""

from typing import TYPE_CHECKING, Any

from pipeline.core.checkpoints import check_quality, load_tokenizer
from pipeline.core.cluster import check_machine
from pipeline.core.config import Config
from pipeline.core.inputs import check_tokenizer, with_input
from pipeline.core.run import Run
from pipeline.data.checks import check_global_counts, check_pictures, check_score
from pipeline.data.shards import read_manifest
from pipeline.evaluation.evaluation_checks import (
    check_baselines,
    check_generated,
    check_information,
    check_networks,
)
from pipeline.tracking import Tracker, check_tracking

if TYPE_CHECKING:  # torch is imported inside functions: `check` answers without it
    from pipeline.evaluation.evaluator import EvaluationSetup
    from pipeline.evaluation.measurements import Measurements
    from pipeline.evaluation.results import CurveResults
    from tatok_model import TaTok


def check(config: Config) -> None:
    """Refuse what cannot work before anything is made; reads no pictures.

    Raises:
        BadInput: as training's `check` where there is no tokenizer yet; shards of another image size, a checkpoint of
            another architecture, files that do not exist, pictures too small for SSIM, cuts, baselines or measures of
            information that cannot be, more workers than CPUs, a tracking address of unknown form.
    """
    check_machine("evaluate", config.evaluate)
    check_tracking(config)
    check_networks(config)
    if config.evaluate.generated:
        check_generated(config)
        return
    check_global_counts(config)
    if config.evaluate.thresholds or (config.filter.rule, config.filter.threshold) != ("relative", 1):
        check_score(config)
    check_information(config)
    check_tokenizer(config)
    check_pictures(config)
    if config.data.shards:
        check_baselines(config, read_manifest(config.data.shards).splits["train"].rows)


def default_name(config: Config) -> str:
    """The run folder's name when `run.name` is empty."""
    return f"{config.preset}-evaluate-generated" if config.evaluate.generated else f"{config.preset}-evaluate"


def run(run: Run) -> None:
    """Measure, and leave a report and pictures in the run folder."""
    run.config = with_input(run.config, "data.shards")
    if run.config.evaluate.generated:
        from pipeline.evaluation.generated import evaluate_generated

        evaluate_generated(run)
        return
    manifest = read_manifest(run.config.data.shards)
    run.inputs["shards"] = {"path": run.config.data.shards, "sha256": manifest.fingerprint}
    run.config = with_input(run.config, "tokenizer.checkpoint")
    tokenizer, sha256 = load_tokenizer(run.config)
    check_quality(run.config, tokenizer)
    run.inputs["tokenizer"] = {"path": run.config.tokenizer.checkpoint, "sha256": sha256}
    run.check_inputs()
    check_baselines(run.config, manifest.splits["train"].rows)

    from pipeline.evaluation.evaluator import EvaluationSetup
    from pipeline.evaluation.information import load_blind

    blind = load_blind(run, tokenizer)
    setup = EvaluationSetup.of(run)
    facts = _facts(setup)
    with Tracker.start(run, facts) as tracker:
        _evaluate(run, setup, tokenizer, blind, facts, tracker)


def _evaluate(
    run: Run, setup: "EvaluationSetup", tokenizer: Any, blind: Any, facts: dict[str, str], tracker: Tracker
) -> None:
    from pipeline.evaluation.baselines import baselines_results
    from pipeline.evaluation.information import information_results
    from pipeline.evaluation.measurements import OPERATING
    from pipeline.evaluation.results import (
        cut_results,
        cut_warnings,
        distance_warnings,
        keep_curve,
        measured_with_distances,
        report,
        rows,
        table,
        tokenizer_results,
    )

    found, distances = measured_with_distances(run, setup, tokenizer)
    results = tokenizer_results(found, distances, setup.pixels, setup.plan.batch_size)
    points = setup.cuts.curve(tokenizer)
    curve = [(point, cut_results(found.cuts[point.name], distances, setup.pixels)) for point in points]
    at_cuts = {OPERATING: results, **{point.name: values for point, values in curve}}
    results |= baselines_results(run, setup, distances, at_cuts)
    if run.config.evaluate.information:
        results |= information_results(run, setup, tokenizer, blind)
    run.results = results | {f"{point.name}_{name}": value for point, values in curve for name, value in values.items()}
    _log(run, results, curve)
    at_curve = tuple(f"baseline_{codec}_{point.name}_" for codec in ("jpeg", "webp") for point, _ in curve)
    reported = {name: value for name, value in results.items() if not name.startswith(at_curve)}
    lines = list(rows(reported, distances[0].extractor, setup.device))
    warnings = [*distance_warnings(distances[0].name, found.images, distances[0], "tokenizers")]
    warnings += cut_warnings(run, found)
    cuts = table(curve, run.config.filter.rule, distances)
    report(run, f"{run.config.preset}: {setup.plan.count} held-out images", lines, warnings, facts, tracker, cuts)
    if setup.plan.grid:
        _draw(run, setup, found, tokenizer, tracker)
    if curve:
        keep_curve(run, setup, found, curve, distances[0].name, tracker)


def _log(run: Run, results: dict[str, float], curve: "CurveResults") -> None:
    """Metrics of the run, and those of the curve with the number of the threshold as their step."""
    run.rewind_metrics(-1)  # a resumed run measures anew
    run.log(results, step=0)
    for step, (point, values) in enumerate(curve):
        at = {} if point.threshold is None else {"curve/threshold": point.threshold}
        run.log({**at, **{f"curve/{name}": value for name, value in values.items()}}, step=step)


def _facts(setup: "EvaluationSetup") -> dict[str, str]:
    """What the numbers depend on: tags of the MLflow run, and the end of the report."""
    from pipeline.evaluation.measurements import score_splits
    from pipeline.evaluation.reference import describe

    meta = describe(setup.pictures.manifest, setup.plan, setup.extractors[0])
    config = setup.run.config
    return {
        "data_fingerprint": meta["data"],
        "split": meta["split"],
        "images": str(meta["images"]),
        "tokenizer": config.tokenizer.checkpoint,
        "tokenizer_sha256": setup.run.inputs["tokenizer"]["sha256"],
        "extractor": meta["extractor"],
        "extractor_sha256": meta["weights_sha256"],
        "extractor_resize": meta["extractor_resize"],
        "comparable": str(setup.extractors[0].comparable).lower(),
        "reference": config.evaluate.reference or "the held-out originals",
        "score": f"{config.filter.score}, {config.filter.rounds} rounds",
        "cut": f"{config.filter.rule} {config.filter.threshold:g}",
        "crop": meta["crop"],
        "uint8": meta["uint8"],
        "score_splits": str(score_splits(setup.plan.count)),
        "device": setup.device,
        "workers": str(config.evaluate.num_workers),
    }


def _draw(run: Run, setup: "EvaluationSetup", found: "Measurements", tokenizer: "TaTok", tracker: Tracker) -> None:
    """Originals over reconstructions, and the page on which a slider moves over their budgets."""
    import torch

    from pipeline.core.collages import save_rows
    from pipeline.evaluation.page import at_every_budget, write_page

    path, page = run.folder / "pictures" / "reconstructions.png", run.folder / "show.html"
    originals = setup.originals_shown()
    save_rows(path, [originals, found.operating.shown.pictures])
    tracker.picture(path, "reconstructions", 0)
    places = setup.plan.indices(setup.plan.shown()).tolist()
    pictures = torch.from_numpy(originals).permute(0, 3, 1, 2).float() / 255
    named = list(zip(setup.pictures.ids(places), pictures, strict=True))
    write_page(page, at_every_budget(tokenizer, named, run.config.filter.score, run.config.filter.rounds))
    tracker.artifact(page)
    run.outputs |= {"reconstructions": str(path), "page": str(page)}
