"""The best trial as a model that `mlflow.pyfunc.load_model` loads: pictures in, tokens and reconstructions out.

    model = mlflow.pyfunc.load_model("models:/tatok@champion")
    found = model.predict(pictures)  # (B, H, W, 3) uint8
    found["tokens"], found["reconstructions"]

MLflow calls `_load_pyfunc` with a copy of the folder that `write_data` made. This module does not import mlflow.

Shapes: B pictures, H and W pixels, M global tokens, N patch positions.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.core.config import FilterConfig

if TYPE_CHECKING:  # torch is imported inside functions: `check` answers without it
    from tatok_model.tokenizer import TaTok

CUT = "filter.json"  # beside the checkpoint's files
BATCH = 64  # pictures per forward pass


def write_data(folder: Path, tokenizer: "TaTok", cut: FilterConfig) -> None:
    """What a champion is made of, in a folder that is replaced: a tokenizer, and where its rankings are cut."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    (folder / CUT).write_text(json.dumps(dataclasses.asdict(cut), indent=2, sort_keys=True) + "\n")


class Champion:
    """A tokenizer in evaluation mode with its cut: score, rounds, rule and threshold."""

    def __init__(self, tokenizer: "TaTok", cut: FilterConfig) -> None:
        self.tokenizer, self.cut = tokenizer, cut

    def predict(self, pictures: Any, params: dict[str, Any] | None = None) -> dict[str, np.ndarray]:
        """Tokens and reconstructions of pictures (B, H, W, 3) uint8, of the size that the tokenizer was trained for.

        Returns:
            `tokens` (B,) int64, global ones counted; `bits` (B,) float64, length and positions counted;
            `global_indices` (B, M) int64; `patch_indices` (B, N) int64 in raster order; both -1 where
            a token was dropped;
            `reconstructions` (B, H, W, 3) uint8.

        Raises:
            ValueError: pictures of another shape or type.
        """
        given = np.asarray(pictures)
        side = self.tokenizer.config.image_size
        if given.dtype != np.uint8 or given.ndim != 4 or given.shape[1:] != (side, side, 3) or not len(given):
            raise ValueError(f"pictures are {given.dtype} {given.shape}; expected uint8 (B, {side}, {side}, 3)")
        parts = [self._predict(given[start : start + BATCH]) for start in range(0, len(given), BATCH)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _predict(self, pictures: np.ndarray) -> dict[str, np.ndarray]:
        import torch

        from pipeline.evaluation.measurements import Cuts
        from tatok_model.metrics.images import to_uint8

        images = torch.from_numpy(pictures.copy()).permute(0, 3, 1, 2)
        with torch.inference_mode():
            cuts = Cuts(self.cut)  # as evaluation cuts
            tokens = cuts.operating(cuts.rank(self.tokenizer, self.tokenizer.encode(images), images))
            decoded = self.tokenizer.decode(tokens)
        globals_ = tokens.global_indices
        if tokens.global_counts is not None:
            places = torch.arange(globals_.shape[1])
            globals_ = globals_.masked_fill(places >= tokens.global_counts[:, None], -1)
        return {
            "tokens": tokens.counts().numpy(),
            "bits": tokens.bits(self.tokenizer.config.bits_per_token).double().numpy(),
            "global_indices": globals_.numpy(),
            "patch_indices": tokens.patch_indices.masked_fill(~tokens.kept_mask, -1).numpy(),
            "reconstructions": to_uint8(decoded).permute(0, 2, 3, 1).numpy(),
        }


def load(folder: Path) -> Champion:
    """The champion that `write_data` wrote."""
    from tatok_model.tokenizer import TaTok

    cut = FilterConfig(**json.loads((folder / CUT).read_text()))
    return Champion(TaTok.from_pretrained(folder), cut)


def _load_pyfunc(path: str) -> Champion:
    """What MLflow calls."""
    return load(Path(path))
