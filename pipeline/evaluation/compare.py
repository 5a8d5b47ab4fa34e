"""Bjontegaard delta rate between two evaluations: how many percent fewer tokens or bits at equal PSNR.

    python -m pipeline.evaluation.compare RUN_FOLDER OTHER_RUN_FOLDER

Both need a rate-distortion curve (evaluate.thresholds) measured on the same pictures. Negative numbers: the other run
spends less.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.errors import BadInput
from pipeline.core.run import read_summary
from tatok_model.metrics.rate_distortion import bd_rate

RATES = ("tokens_per_image", "bits_fixed", "bits_coded")


def curve_of(folder: Path) -> dict[str, list[float]]:
    """Every metric of an evaluation's curve as a list over its thresholds.

    Raises:
        BadInput: the folder holds no whole summary of a finished evaluation with a curve.
    """
    results = _summary(folder)["results"]
    count = sum(name.startswith("curve") and name.endswith("_psnr") for name in results)
    if not count:
        raise BadInput(f"{str(folder)!r} has no curve; expected a run of jobs/evaluate.py with evaluate.thresholds")
    names = [name.removeprefix("curve00_") for name in results if name.startswith("curve00_")]
    try:
        return {name: [float(results[f"curve{i:02d}_{name}"]) for i in range(count)] for name in names}
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"summary.json in {str(folder)!r} is damaged ({type(error).__name__}: {error})") from None


def bd_rates(folder: Path, other: Path) -> dict[str, float | None]:
    """Percent that `other` spends over `folder` at equal PSNR, by rate; None where it is undefined.

    Undefined are curves with fewer than four points in the PSNR that both reach (`bd_rate`).

    Raises:
        BadInput: as `curve_of`, or the two measured different pictures.
    """
    one, two = curve_of(folder), curve_of(other)
    for (name, measured), (_, wanted) in zip(_pictures(other), _pictures(folder), strict=True):
        if measured != wanted:
            raise BadInput(f"{str(other)!r} measured {name} {measured}; expected {wanted}, as {str(folder)!r}")
    first, second = ({name: np.array(values) for name, values in curve.items()} for curve in (one, two))
    return {name: bd_rate(first[name], first["psnr"], second[name], second["psnr"]) for name in RATES}


def main(arguments: list[str]) -> int:
    """Print a line for each rate; exit code 0, or 2 for bad input."""
    if len(arguments) != 2:
        print("error: expected two run folders of jobs/evaluate.py", file=sys.stderr)
        return 2
    try:
        found = bd_rates(Path(arguments[0]), Path(arguments[1]))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, percent in found.items():
        print(f"{name:<16}  {'undefined' if percent is None else f'{percent:+.1f}%'}")
    return 0


def _summary(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    if not path.is_file():
        raise BadInput(f"{str(folder)!r} holds no summary.json; expected the run folder of jobs/evaluate.py")
    try:
        summary = read_summary(folder)
        stage, status = str(summary["stage"]), str(summary["status"])
        dict(summary["results"]), dict(summary["inputs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{str(path)!r} is damaged ({type(error).__name__}: {error})") from None
    if (stage, status) != ("evaluate", "finished"):
        raise BadInput(f"{str(folder)!r} holds a {status} run of {stage!r}; expected a finished one of 'evaluate'")
    return summary


def _pictures(folder: Path) -> list[tuple[str, str]]:
    """What decides which pictures were measured: always held-out ones of some shards, evenly spread."""
    summary = _summary(folder)
    fingerprint = summary["inputs"].get("shards", {}).get("sha256", "unknown")
    return [("shards", str(fingerprint)[:12]), ("images", f"{summary['results'].get('images', 0):g}")]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
