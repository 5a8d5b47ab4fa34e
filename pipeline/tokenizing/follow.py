"""What stages do around workers that make files: progress, stopping, speed, the histogram of lengths."""

import time
from typing import Any

import numpy as np

from pipeline.devices import pick_device, pick_workers_device
from pipeline.errors import Stopped
from pipeline.progress import progress
from pipeline.run import Run
from pipeline.tokenizing.actors import Work, Workers, is_alone, make_here, make_on_actors
from pipeline.tokenizing.parts import Part, prepare_folder
from pipeline.tokenizing.plan import Range
from pipeline.tracking import Tracker


def make_all(
    run: Run, label: str, models: Any, work: Work, ranges: list[Range], section: str = "tokens"
) -> tuple[list[Part], float]:
    """The parts of all ranges, in their order, and how many seconds it took, start of the workers included.

    Args:
        run: may be asked to stop.
        label: of the progress bar.
        models: what the work's workers are made of; travels to actors.
        work: what the ranges have in common.
        ranges: at least one.
        section: of the configuration, that says how many workers there are and where they compute.

    Raises:
        BadInput: as `pick_device`, or as `pick_workers_device`.
        Stopped: the run was asked to stop; finished ranges are kept.
    """
    workers = Workers.of(run.config, section)
    alone = is_alone(workers, len(ranges))
    device = (
        pick_device(section, workers.device).type
        if alone
        else pick_workers_device(section, workers.device, workers.number)
    )
    prepare_folder(work.folder, "parts", work.files, tidy=work.folder == run.folder)
    made = (
        make_here(models, work, ranges, device)
        if alone
        else make_on_actors(models, work, ranges, device, workers.number)
    )
    parts: dict[int, Part] = {}
    started = time.monotonic()
    with progress(label, sum(task.stop - task.start for task in ranges), "images") as shown:
        for part in made:
            parts[part.number] = part
            shown.advance(part.file.rows)
            if run.should_stop and len(parts) < len(ranges):
                raise Stopped(f"{len(parts)} of {len(ranges)} files are made; --resume makes the others")
    return [parts[task.number] for task in ranges], time.monotonic() - started


def rates(parts: list[Part], seconds: float, kinds: tuple[str, ...]) -> dict[str, float]:
    """Images a second by their names in summary.json; empty when nothing was made now.

    Of one worker after its warm-up: `images_per_second` over all it does, then each kind of work alone with its share
    of the time. `stage_images_per_second` is of all workers by the clock, their start included.

    Args:
        parts: of the run.
        seconds: by the clock.
        kinds: of work that the parts have seconds of.
    """
    new = [part for part in parts if part.seconds]
    images = sum(part.file.rows for part in new)
    if not images:
        return {}
    spent = {kind: sum(part.seconds[kind] for part in new) for kind in ("total", *kinds)}
    found = {"images_per_second": images / spent["total"], "stage_images_per_second": images / seconds}
    for kind in kinds:
        found[f"{kind}_images_per_second"] = images / spent[kind]
        found[f"{kind}_share"] = spent[kind] / spent["total"]
    return found


def draw_lengths(run: Run, counts: np.ndarray, tracker: Tracker) -> None:
    """The histogram of (B,) tokens per image at the configured cut."""
    from pipeline.evaluation.plots import token_histogram

    section = run.config.filter
    title = "Tokens per image"
    if run.config.tokenizer.patch_tokens:
        title += f": {section.score}, {section.rule} {section.threshold:g}"
    path = run.folder / "pictures" / "token_histogram.png"
    path.parent.mkdir(exist_ok=True)
    token_histogram(path, counts, title)
    run.outputs["token_histogram"] = str(path)
    tracker.picture(path, "token_histogram", 0)
