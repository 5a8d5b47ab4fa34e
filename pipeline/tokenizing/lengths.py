"""How long the token sequences of a stored stream are at the configured cut; reads no picture and asks no model.

Shapes: B images, M global tokens, T kept patch tokens.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.config import FilterConfig
from pipeline.tokenizing.arrow import from_table, read_token_file
from pipeline.tokenizing.decoding import cut
from pipeline.tokenizing.manifest import TokenManifest
from pipeline.tokenizing.plan import Range


@dataclass(frozen=True)
class Lengths:
    """Of B images."""

    counts: np.ndarray  # (B,) int64, tokens of each image: M + T
    bits_fixed: np.ndarray  # (B,) float64

    def results(self) -> dict[str, float]:
        """By their names in summary.json."""
        low, middle, high = np.percentile(self.counts, (5, 50, 95)).tolist()
        return {
            "tokens_per_image": float(self.counts.mean()),
            "tokens_std": float(self.counts.std()),
            "tokens_p05": low,
            "tokens_p50": middle,
            "tokens_p95": high,
            "bits_fixed": float(self.bits_fixed.mean()),
        }


def measure_lengths(folder: str | Path, manifest: TokenManifest, ranges: list[Range], config: FilterConfig) -> Lengths:
    """Lengths of the rows of some ranges.

    Args:
        folder: of the stream, a path or URL.
        manifest: of the stream.
        ranges: of its files, at least one.
        config: how rankings are cut.

    Raises:
        BadInput: a file that is missing, changed or foreign; see `read_token_file` and `from_table`.
    """
    bits_per_token = math.log2(manifest.stream.codebook_size)
    counts, bits = [], []
    for task in ranges:
        file = manifest.splits[task.split].files[task.index]
        table = read_token_file(str(folder), file, manifest.stream).take(task.rows() - file.first_row)
        tokens = cut(from_table(table)[0], config)
        counts.append(tokens.counts().numpy())
        bits.append(tokens.bits(bits_per_token).numpy())
    return Lengths(np.concatenate(counts), np.concatenate(bits))
