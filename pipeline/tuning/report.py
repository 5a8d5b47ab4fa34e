"""What a sweep leaves for people: a table, a plot, the best configuration.

table.csv, table.md              a row per trial and threshold
pictures/rate_distortion.png     all trials, the Pareto front marked
best.yaml                        the best trial's configuration, a preset for every job
"""

import csv
import io
from dataclasses import fields, replace
from pathlib import Path

from pipeline.config import Config
from pipeline.evaluation.report import columns
from pipeline.paths import write_atomically
from pipeline.tuning.ledger import Entry
from pipeline.tuning.objective import LESS_IS_BETTER, Point, best_cut, budget, leading
from pipeline.tuning.plan import CHECKPOINT, Plan, Trial

HEADER = (
    "trial",
    "global tokens",
    "rule",
    "threshold",
    "tokens",
    "bits",
    "bits coded",
    "PSNR",
    "",
    "images/s",
    "front",
)


def on_front(points: list[Point]) -> set[int]:
    """Indices of the points that no other one beats in PSNR over tokens."""
    return set(leading([point.tokens for point in points], [point.psnr for point in points]))


def write_table(folder: Path, points: list[Point], distance: str, entries: list[Entry], summary: str) -> list[Path]:
    """Write `table.csv` and `table.md`.

    Args:
        folder: of the sweep.
        points: of all finished trials, one row each.
        distance: the name of the Frechet distance.
        entries: all trials: those that did not finish are named with their reason.
        summary: one line on top of the page.
    """
    front = on_front(points)
    names = [field.name for field in fields(Point)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([distance if name == "distance" else name for name in names] + ["pareto_front"])
    writer.writerows([[*point.to_dict().values(), int(i in front)] for i, point in enumerate(points)])
    header, *rows = table(points, distance)
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---", *["---:"] * (len(header) - 1)], *rows)]
    ends = [f"- {e.trial.name}: {e.status}: {e.reason}" for e in entries if e.status not in ("finished", "running")]
    notes = (
        "`front`: no other point has a higher PSNR at as few tokens. `images/s` is of the trial's whole evaluation: "
        "decoding takes the same time at every threshold."
    )
    page = [f"# {folder.name}", "", summary, "", *lines, "", notes, *(["", "Not finished:", "", *ends] if ends else [])]
    paths = [folder / "table.csv", folder / "table.md"]
    for path, content in zip(paths, (text.getvalue(), "\n".join(page) + "\n"), strict=True):
        write_atomically(path, content.encode())
    return paths


def table(points: list[Point], distance: str) -> list[list[str]]:
    """Header and a line for each point, for people."""
    front = on_front(points)
    return [
        [name or distance for name in HEADER],
        *(
            [
                p.trial, str(p.global_tokens), p.rule, f"{p.threshold:g}", f"{p.tokens:.1f}", f"{p.bits_fixed:.0f}",
                f"{p.bits_coded:.0f}", f"{p.psnr:.2f}", f"{p.distance:.3f}", f"{p.images_per_second:.0f}",
                "yes" if i in front else "",
            ]
            for i, p in enumerate(points)
        ),
    ]  # fmt: skip


def terminal_table(points: list[Point], distance: str) -> str:
    """The table as aligned columns."""
    return columns(table(points, distance))


def best_config(plan: Plan, trial: Trial, points: list[Point]) -> Config:
    """The configuration of the best trial, cut where the budget allows, as a preset for every job.

    Args:
        plan: of the sweep.
        trial: the best one.
        points: its own.
    """
    config = plan.config_of(trial)
    cut = best_cut(points, plan.config)
    if cut is not None:
        config = replace(config, filter=replace(config.filter, rule=cut.rule, threshold=cut.threshold))
    thresholds = plan.cuts.get(config.filter.rule, ())
    return replace(
        config,
        run=replace(config.run, name=""),
        evaluate=replace(config.evaluate, thresholds=thresholds),
        sweep=type(config.sweep)(),
    )


def write_best(folder: Path, config: Config, trial: Trial, said: str) -> Path:
    """Write `best.yaml`."""
    path = folder / "best.yaml"
    job = "evaluate" if trial.values.get(CHECKPOINT) else "train"  # what there is would be fine-tuned by train
    head = (
        f"# The best of a sweep: {trial.name}, {said}.\n#\n#     python jobs/{job}.py {path}\n#\n"
        "# Expected: the numbers of its trial; data.shards are the sweep's.\n"
    )
    write_atomically(path, (head + config.to_yaml()).encode())
    return path


def in_words(value: float, config: Config) -> str:
    """An objective with its unit."""
    sweep = config.sweep
    if sweep.objective == "bd_rate":
        return f"{value:+.1f}% {sweep.rate} against the control at equal PSNR"
    unit, name = ("", "Frechet distance") if LESS_IS_BETTER[sweep.objective] else (" dB", "PSNR")
    return f"{name} {value:.2f}{unit} at {budget(config):g} tokens"
