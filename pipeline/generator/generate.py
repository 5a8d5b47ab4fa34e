"""The stage behind `jobs/generate.py`: a generator and a tokenizer in, pictures out, as shards.

First the plan (`plan.json`), then one shard and one token file per range of it, then `manifest.json` and, last,
`generated.json`.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.checkpoints import load_tokenizer, read_generator
from pipeline.core.cluster import check_machine
from pipeline.core.config import Config, GenerateConfig
from pipeline.core.console import say
from pipeline.core.errors import BadInput
from pipeline.core.inputs import with_input
from pipeline.core.ranges import Part, keep_plan, rates, run_ranges
from pipeline.core.run import Run
from pipeline.data.shards import Manifest, ShardDataset, read_manifest, write_manifest
from pipeline.generator.fit import asked_labels, check_generator, check_guidance, load_generator
from pipeline.generator.generated_files import Generated, token_lengths
from pipeline.tokens.token_manifest import RowRange, read_token_manifest
from pipeline.tracking import Tracker, check_tracking
from tatok_model.config import GeneratorConfig, SamplingConfig

DECIDING = ("images", "labels", "unconditional", "seed", "batch_size", "images_per_shard", "encoding")
SAMPLING = tuple(field.name for field in dataclasses.fields(SamplingConfig))
WHITE = 255


def check(config: Config) -> None:
    """Refuse what cannot work before anything is made.

    Raises:
        BadInput: as training's `check` where there is no generator yet; a checkpoint that is none, a generator of
            another tokenizer, a class that does not exist, guidance towards none, names for another number of classes,
            more workers than CPUs, a tracking address of unknown form.
    """
    check_machine("generate", config.generate)
    check_tracking(config)
    config = check_generator(config)
    if config.generator.checkpoint:
        generator = read_generator(config.generator.checkpoint)
        check_guidance(config.generate, asked_labels(config.generate, generator.classes), generator.class_dropout)
        _class_names(config, generator)


def default_name(config: Config) -> str:
    """The run folder's name when `run.name` is empty."""
    return f"{config.preset}-generate"


def run(run: Run) -> None:
    """Make the shards in the run folder, or what is missing of them.

    Raises:
        BadInput: as `check`, or the run was begun with another configuration.
        Stopped: the run was asked to stop; finished files are kept.
    """
    config = run.config = with_input(run.config, "generator.checkpoint")
    generator, generator_sha256 = load_generator(config)
    run.inputs["generator"] = {"path": config.generator.checkpoint, "sha256": generator_sha256}
    tokenizer, tokenizer_sha256 = load_tokenizer(config)
    run.inputs["tokenizer"] = {"path": config.tokenizer.checkpoint, "sha256": tokenizer_sha256}
    labels = asked_labels(config.generate, generator.config.classes)
    check_guidance(config.generate, labels, generator.config.class_dropout)
    classes = _class_names(config, generator.config)
    ranges = ranges_of_samples(config.generate)
    facts = _facts(config, generator_sha256, tokenizer_sha256, classes)
    key = keep_plan(run, facts, ranges)

    from pipeline.generator.sampler import SamplingWork
    from pipeline.tokens.decoder import length_statistics

    section = config.generate
    sampling = SamplingConfig(**{name: getattr(section, name) for name in SAMPLING})
    sizes = section.batch_size, section.encoding, config.data.quality
    work = SamplingWork(run.folder, key, labels, classes, section.seed, sampling, *sizes)
    tags = {"generator_sha256": generator_sha256, "tokenizer_sha256": tokenizer_sha256}
    with Tracker.start(run, tags) as tracker:
        parts, seconds = run_ranges(run, "generate", work, (generator, tokenizer), ranges, "generate")
        manifest = _write_manifest(run, facts, parts, classes)
        files = tuple(part.files["beside"] for part in parts)
        counts, _ = token_lengths(run.folder, files)
        generated = Generated(
            folder=run.folder,
            manifest=manifest,
            images=section.images,
            classes=generator.config.classes,
            generator_sha256=generator_sha256,
            tokenizer_sha256=tokenizer_sha256,
            cut=generator.config.cut,
            seed=section.seed,
            batch_size=section.batch_size,
            sampling=dataclasses.asdict(sampling),
            tokens=length_statistics(counts),
            speed=_speed(parts, seconds),
            files=files,
        )
        generated.write()
        _report(run, generated, counts, tracker)


def ranges_of_samples(config: GenerateConfig) -> list[RowRange]:
    """One range for each shard."""
    size, count = config.images_per_shard, config.images
    starts = range(0, count, size)
    return [RowRange(i, "heldout", i, start, min(start + size, count), count, count) for i, start in enumerate(starts)]


def _class_names(config: Config, generator: GeneratorConfig) -> tuple[str, ...]:
    """Of the tokens that the generator learned from or of the pictures, where they are named; else numbers.

    Raises:
        BadInput: names for another number of classes than the generator has.
    """
    if config.tokens.path:
        key, names = "tokens.path", read_token_manifest(config.tokens.path).classes
    elif config.data.shards:
        key, names = "data.shards", read_manifest(config.data.shards).classes
    else:
        return tuple(str(number) for number in range(generator.classes))
    if generator.classes and len(names) != generator.classes:
        raise BadInput(f"{key} has {len(names)} classes; expected {generator.classes}, the generator's")
    return names if generator.classes else ()


def _facts(config: Config, generator_sha256: str, tokenizer_sha256: str, classes: tuple[str, ...]) -> dict[str, Any]:
    """Everything that decides bytes."""
    values = config.to_dict()
    return {
        "generator.checkpoint": generator_sha256,
        "tokenizer.checkpoint": tokenizer_sha256,
        **{f"generate.{name}": values["generate"][name] for name in (*DECIDING, *SAMPLING)},
        "data.quality": config.data.quality,
        "classes": list(classes),
    }


def _write_manifest(run: Run, facts: dict[str, Any], parts: list[Part], classes: tuple[str, ...]) -> Manifest:
    size = run.config.data.image_size
    decides = {"image_size": size, "encoding": run.config.generate.encoding, "quality": run.config.data.quality}
    shards = [("heldout", part.file) for part in parts]
    manifest = Manifest.of(size, {**decides, "generate": facts}, facts["generator.checkpoint"], classes, shards)
    write_manifest(run.folder, manifest)
    return manifest


def _speed(parts: list[Part], seconds: float) -> dict[str, float]:
    """As `rates`, and how long whole batches took; empty when nothing was made now."""
    speed = rates(parts, seconds, ("sample", "decode"))
    batches = [second for part in parts for second in part.batch_seconds]
    if batches:
        speed |= {f"batch_seconds_p{share}": float(np.percentile(batches, share)) for share in (50, 90, 99)}
    return speed


def occupancy(counts: np.ndarray, config: GenerateConfig) -> float:
    """Share of a batch's rows times steps that write a token of a picture, were no row to leave before the last ends.

    Args:
        counts: (images,) tokens of each picture.
        config: how pictures were dealt into batches.
    """
    steps = 0
    for shard in range(0, len(counts), config.images_per_shard):
        part = counts[shard : shard + config.images_per_shard]
        batches = [part[first : first + config.batch_size] for first in range(0, len(part), config.batch_size)]
        steps += sum(len(batch) * int(batch.max()) for batch in batches)
    return float(counts.sum() / steps)


def _report(run: Run, generated: Generated, counts: np.ndarray, tracker: Tracker) -> None:
    """Lengths and rates as numbers, lengths and pictures as pictures."""
    from pipeline.core.collages import save_rows
    from pipeline.tokens.decoder import draw_lengths, length_results

    section = run.config.generate
    lengths, row_occupancy = length_results(generated.tokens), occupancy(counts, section)
    run.results = {"images": generated.images, **generated.speed, **lengths, "row_occupancy": row_occupancy}
    run.rewind_metrics(-1)  # a resumed run measures anew
    run.log(run.results, step=0)
    run.outputs = {"shards": str(run.folder), "manifest": str(run.folder / "manifest.json")}
    run.outputs["generated"] = str(run.folder / "generated.json")
    draw_lengths(run, counts, tracker, f"Tokens of {len(counts)} generated pictures")
    if section.grid_images:
        made, path = ShardDataset(run.folder, "heldout"), run.folder / "pictures" / "samples.png"
        first = range(min(section.grid_images, len(made)))
        save_rows(path, class_rows(made.images(first), made.labels(first)))
        run.outputs["samples"] = str(path)
        tracker.picture(path, "samples", 0)
    if section.files:
        run.outputs["images"] = str(_write_files(run.folder, section))
    tracker.artifact(Path(run.outputs["generated"]))
    rate = f", {generated.speed['images_per_second']:.1f} images/s a worker" if generated.speed else ""
    say(f"generate: {generated.images} images of {generated.tokens['mean']:.1f} tokens{rate}")


def _write_files(folder: Path, section: GenerateConfig) -> Path:
    """Each picture of the shards as a file of its own, as it is encoded there; returns their folder."""
    made, images = ShardDataset(folder, "heldout"), folder / "images"
    images.mkdir(exist_ok=True)
    for first in range(0, len(made), section.images_per_shard):
        some = range(first, min(first + section.images_per_shard, len(made)))
        for name, data in zip(made.ids(some), made.encoded(some), strict=True):
            (images / f"{name}.{section.encoding}").write_bytes(data)
    return images


def class_rows(pictures: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """Generated pictures as rows for `plots.save_rows`.

    Classes that have at least two pictures each get a row of their own, as long as the class with the fewest has
    pictures. Otherwise the pictures fill a square, sorted by class, and white ones complete its last row.

    Args:
        pictures: (B, H, W, 3) uint8, at least one.
        labels: (B,) integers, -1 for no class.
    """
    order = np.argsort(labels, kind="stable")
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) > 1 and counts.min() > 1:
        return [pictures[order[labels[order] == label][: counts.min()]] for label in classes]
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    canvas = np.full((rows * columns, *pictures.shape[1:]), WHITE, dtype=np.uint8)
    canvas[: len(pictures)] = pictures[order]
    return list(canvas.reshape(rows, columns, *pictures.shape[1:]))
