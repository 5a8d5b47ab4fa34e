"""Bjontegaard delta rate between two evaluations: how many percent fewer tokens or bits at equal PSNR.

    python -m pipeline.evaluation.compare RUN_FOLDER OTHER_RUN_FOLDER

Both need a rate-distortion curve (evaluate.thresholds). Negative numbers: the other run spends less.
"""

import json
import sys
from pathlib import Path

import numpy as np

from pipeline.errors import BadInput
from tatok_model.metrics.rate_distortion import bd_rate

RATES = ("tokens_per_image", "bits_fixed", "bits_coded")


def curve_of(folder: Path) -> dict[str, list[float]]:
    """Every metric of an evaluation's curve as a list over its thresholds.

    Raises:
        BadInput: the folder holds no finished evaluation with a curve.
    """
    path = folder / "summary.json"
    if not path.is_file():
        raise BadInput(f"{str(folder)!r} holds no summary.json; expected the run folder of jobs/evaluate.py")
    results: dict[str, float] = json.loads(path.read_text())["results"]
    count = sum(name.startswith("curve") and name.endswith("_psnr") for name in results)
    if not count:
        raise BadInput(f"{str(folder)!r} has no curve; expected a run of jobs/evaluate.py with evaluate.thresholds")
    names = [name.removeprefix("curve00_") for name in results if name.startswith("curve00_")]
    return {name: [results[f"curve{i:02d}_{name}"] for i in range(count)] for name in names}


def bd_rates(folder: Path, other: Path) -> dict[str, float | None]:
    """Percent that `other` spends over `folder` at equal PSNR, by rate; None where it is undefined.

    Undefined are curves with fewer than four points in the PSNR that both reach (`bd_rate`).

    Raises:
        BadInput: as `curve_of`.
    """
    one, two = curve_of(folder), curve_of(other)
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
