"""The stage behind `jobs/tokenize_images.py`: shards and a tokenizer in, the full ranked token stream out.

First the plan (`plan.json`), then one token file per range of it, then `tokens.json`, which marks the stream complete.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.core.checkpoints import check_quality, load_tokenizer, quality_lines, tokenizer_sha256
from pipeline.core.cluster import check_machine
from pipeline.core.config import Config, TokensConfig
from pipeline.core.console import say
from pipeline.core.files import write_json
from pipeline.core.inputs import check_tokenizer, with_input
from pipeline.core.ranges import Part, keep_plan, rates, run_ranges
from pipeline.core.run import Run
from pipeline.data.checks import check_global_counts, check_pictures, check_score
from pipeline.data.shards import SPLITS, Manifest, read_manifest
from pipeline.tokens.token_manifest import (
    NAME,
    RowRange,
    Stream,
    TokenFile,
    TokenManifest,
    TokenSplit,
    fingerprint,
    ranges_of_files,
    ranges_of_pictures,
    stream_of,
)
from pipeline.tracking import Tracker, check_tracking

ROW_KEYS = ("split", "max_images", "batch_size", "flip", "crops")  # keys of the tokens section that decide rows


def check(config: Config) -> None:
    """Refuse what cannot work before anything is made; reads no pictures.

    Raises:
        BadInput: as training's `check` where there is no tokenizer yet; a score that needs an entropy model without
            one, a cut that tokens without patch tokens cannot have, shards of another image size, a checkpoint of
            another architecture, more workers than CPUs, a tracking address of unknown form.
    """
    check_machine("tokens", config.tokens)
    check_tracking(config)
    check_score(config)
    check_global_counts(config)
    check_tokenizer(config)
    check_pictures(config)


def default_name(config: Config) -> str:
    """The run folder's name when `run.name` is empty."""
    return f"{config.preset}-tokens"


def made_of(config: Config) -> dict[str, Any]:
    """What decides the bytes of a stream of `data.shards` by `tokenizer.checkpoint`; reads no weights but their sum."""
    stream = stream_of(config, tokenizer_sha256(config), quality_lines(config))
    return _facts(config, stream, read_manifest(config.data.shards))


def run(run: Run) -> None:
    """Make the token files in the run folder that are not there yet.

    Raises:
        BadInput: the run was begun with another configuration, or there is no picture.
        Stopped: the run was asked to stop; finished ranges are kept.
    """
    config = with_input(run.config, "data.shards")
    shards = read_manifest(config.data.shards)
    run.inputs["shards"] = {"path": config.data.shards, "sha256": shards.fingerprint}
    config = run.config = with_input(config, "tokenizer.checkpoint")
    tokenizer, sha256 = load_tokenizer(config)
    run.inputs["tokenizer"] = {"path": config.tokenizer.checkpoint, "sha256": sha256}
    check_quality(config, tokenizer)
    stream = stream_of(config, sha256, tokenizer.quality_lines)
    ranges = ranges_of_pictures({name: split.rows for name, split in shards.splits.items()}, config.tokens)
    run.made_of = _facts(config, stream, shards)
    key = keep_plan(run, run.made_of, ranges)

    from pipeline.tokens.encoder import EncodingWork

    work = EncodingWork(run.folder, key, config.data.shards, stream, config.tokens, config.train.seed)
    tags = {"data_fingerprint": shards.fingerprint, "tokenizer_sha256": sha256, "score": stream.score}
    with Tracker.start(run, {**tags, "rounds": str(stream.rounds)}) as tracker:
        parts, seconds = run_ranges(run, "tokenize", work, tokenizer, ranges, "tokens")
        manifest = _write_manifest(run, stream, shards, ranges, parts)
        _report(run, manifest, rates(parts, seconds, ("encode", "rank")), tracker)


def _write_manifest(
    run: Run, stream: Stream, shards: Manifest, ranges: list[RowRange], parts: list[Part]
) -> TokenManifest:
    """Write `tokens.json`, which lists the files of all ranges."""
    splits = {}
    for name in SPLITS:
        written = [(task.start, part.file) for task, part in zip(ranges, parts, strict=True) if task.split == name]
        files = tuple(TokenFile(file.file, file.rows, file.sha256, start) for start, file in written)
        splits[name] = TokenSplit(sum(file.rows for file in files), files)
    settings = {key.removeprefix("tokens."): value for key, value in _row_settings(run.config).items()}
    manifest = TokenManifest(stream, settings, shards.fingerprint, shards.classes, splits, fingerprint(splits))
    write_json(run.folder / NAME, manifest.to_dict())
    return manifest


def _facts(config: Config, stream: Stream, shards: Manifest) -> dict[str, Any]:
    """Everything that decides the bytes of the token files, by key."""
    return {
        "data.shards": shards.fingerprint,
        "tokenizer.checkpoint": stream.tokenizer_sha256,
        "filter.score": stream.score,
        "filter.rounds": stream.rounds,
        **({"quality line": asdict(stream.line)} if stream.line else {}),
        **_row_settings(config),
    }


def _row_settings(config: Config) -> dict[str, Any]:
    """What decides the rows, by key; the seed only where copies are shifted at random."""
    settings: dict[str, Any] = {f"tokens.{key}": getattr(config.tokens, key) for key in ROW_KEYS}
    return settings | ({"train.seed": config.train.seed} if config.tokens.crops else {})


def _report(run: Run, manifest: TokenManifest, speed: dict[str, float], tracker: Tracker) -> None:
    """Log token counts at the configured cut, draw their histogram, and print a summary."""
    from pipeline.tokens.decoder import draw_lengths, measure_lengths

    all_rows = ranges_of_files(manifest, TokensConfig())
    counts, lengths = measure_lengths(run.folder, manifest, all_rows, run.config)
    rows = {f"rows_{name}": manifest.splits[name].rows for name in SPLITS}
    run.results = {"images": sum(rows.values()), **rows, **lengths, **speed}
    run.rewind_metrics(-1)  # a resumed run measures anew
    run.log(run.results, step=0)
    run.outputs = {"tokens": str(run.folder), "manifest": str(run.folder / NAME)}
    draw_lengths(run, counts, tracker)
    tracker.artifact(Path(run.outputs["manifest"]))
    rate = f", {speed['images_per_second']:.0f} images/s a worker" if speed else ""  # "" if nothing was left to do
    say(f"tokenize: {run.results['images']} images, {_lengths(run)}{rate}")


def _lengths(run: Run) -> str:
    section, results = run.config.filter, run.results
    cut = f"{section.rule} {section.threshold:g}" if run.config.tokenizer.patch_tokens else "global tokens only"
    return f"{results['tokens_per_image']:.1f} tokens and {results['bits_fixed']:.0f} bits an image ({cut})"
