"""The stage behind `jobs/detokenize.py`: a ranked token stream in, pictures at any threshold out, as shards.

The folder is one of shards like those of preprocess: other stages and tools read it.
"""

from pathlib import Path
from typing import Any

from pipeline.core.checkpoints import check_architecture, load_tokenizer
from pipeline.core.cluster import check_machine
from pipeline.core.config import Config
from pipeline.core.console import say
from pipeline.core.errors import BadInput
from pipeline.core.inputs import find_input, with_input
from pipeline.core.ranges import Part, keep_plan, rates, run_ranges
from pipeline.core.run import Run
from pipeline.data.checks import check_global_counts
from pipeline.data.shards import SPLITS, Manifest, ShardDataset, write_manifest
from pipeline.tokens import tokenize as tokenizing
from pipeline.tokens.token_manifest import (
    RowRange,
    TokenManifest,
    check_stream,
    check_tokenizer,
    ranges_of_files,
    read_token_manifest,
)
from pipeline.tracking import Tracker, check_tracking

SHOWN = 8  # pictures in the grid


def check(config: Config) -> None:
    """Refuse what cannot work before anything is made.

    Raises:
        BadInput: as tokenizing's `check` where no stream is named; a stream that is none, of another tokenizer, score
            or number of rounds than configured, no tokenizer, a cut that tokens without patch tokens cannot have, more
            workers than CPUs, a tracking address of unknown form.
    """
    check_machine("tokens", config.tokens)
    check_tracking(config)
    check_global_counts(config)
    if not config.tokens.path:
        tokenizing.check(config)
        return
    stream = read_token_manifest(config.tokens.path).stream
    config = find_input(config, "tokens.path")
    if not config.tokenizer.checkpoint:
        raise BadInput(f"tokenizer.checkpoint is empty; expected the tokenizer that made {config.tokens.path!r}")
    check_architecture(config)
    check_stream(config, stream)


def default_name(config: Config) -> str:
    """The run folder's name when `run.name` is empty: another one for every cut."""
    return f"{config.preset}-detokenize-{config.filter.rule}-{config.filter.threshold:g}"


def run(run: Run) -> None:
    """Make the shards in the run folder, or what is missing of them.

    Raises:
        BadInput: a stream that cannot be decoded as configured, or the run was begun with another one.
        Stopped: the run was asked to stop; finished files are kept.
    """
    config = run.config = with_input(run.config, "tokens.path")
    manifest = read_token_manifest(config.tokens.path)
    check_stream(config, manifest.stream)
    run.inputs["tokens"] = {"path": config.tokens.path, "sha256": manifest.fingerprint}
    tokenizer, sha256 = load_tokenizer(config)
    check_tokenizer(config, manifest.stream, sha256)
    run.inputs["tokenizer"] = {"path": config.tokenizer.checkpoint, "sha256": sha256}
    ranges = ranges_of_files(manifest, config.tokens)
    facts = _facts(config, manifest)
    key = keep_plan(run, facts, ranges)

    from pipeline.tokens.decoder import DecodingWork, measure_lengths

    # Reads every file before any is decoded, so that a bad one is reported here and not by a worker.
    counts, lengths = measure_lengths(config.tokens.path, manifest, ranges, config)
    sizes = config.tokens.batch_size, config.tokens.encoding, config.data.quality
    work = DecodingWork(run.folder, key, config.tokens.path, manifest, config.filter, *sizes)
    with Tracker.start(run, {"tokens_fingerprint": manifest.fingerprint, "tokenizer_sha256": sha256}) as tracker:
        parts, seconds = run_ranges(run, "detokenize", work, tokenizer, ranges, "tokens")
        shards = _write_results(run, manifest, facts, ranges, parts)
        _report(run, shards, counts, {**lengths, **rates(parts, seconds, ("decode",))}, tracker)


def _facts(config: Config, manifest: TokenManifest) -> dict[str, Any]:
    """Everything that decides bytes."""
    keys = ["filter.rule", "filter.threshold"]
    keys += ["tokens.split", "tokens.max_images", "tokens.batch_size", "tokens.encoding", "data.quality"]
    values = config.to_dict()
    return {
        "tokens.path": manifest.fingerprint,
        **{key: values[section][name] for key in keys for section, name in (key.split("."),)},
    }


def _write_results(
    run: Run, manifest: TokenManifest, facts: dict[str, Any], ranges: list[RowRange], parts: list[Part]
) -> Manifest:
    """Write what marks the shards as complete."""
    size = manifest.stream.image_size
    decides = {"image_size": size, "encoding": run.config.tokens.encoding, "quality": run.config.data.quality}
    config = {**decides, "detokenize": {**manifest.stream.to_dict(), **facts}}
    made = [(task.split, part.file) for task, part in zip(ranges, parts, strict=True)]
    shards = Manifest.of(size, config, manifest.fingerprint, manifest.classes, made)
    write_manifest(run.folder, shards)
    return shards


def _report(run: Run, shards: Manifest, counts: Any, results: dict[str, float], tracker: Tracker) -> None:
    """Lengths at this cut, and what the first pictures look like."""
    from pipeline.core.collages import save_rows
    from pipeline.tokens.decoder import draw_lengths

    rows = {f"rows_{name}": shards.splits[name].rows for name in SPLITS}
    run.results = {"images": sum(rows.values()), **rows, **results}
    run.rewind_metrics(-1)  # a resumed run measures anew
    run.log(run.results, step=0)
    run.outputs = {"shards": str(run.folder), "manifest": str(run.folder / "manifest.json")}
    # Held-out pictures where there are some
    dataset = ShardDataset(run.folder, "heldout" if rows["rows_heldout"] else "train")
    path: Path = run.folder / "pictures" / "decoded.png"
    save_rows(path, [dataset.images(range(min(SHOWN, len(dataset))))])
    run.outputs["decoded"] = str(path)
    tracker.picture(path, "decoded", 0)
    draw_lengths(run, counts, tracker)
    say(f"detokenize: {run.results['images']} images at {run.results['tokens_per_image']:.1f} tokens")
