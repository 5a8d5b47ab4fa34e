"""Pictures at nine budgets of tokens, as a page with a slider and as one PNG.

The page holds everything it shows and opens without a network, also as an artifact inside MLflow.

Shapes: H and W pixels.
"""

import base64
import html
import io
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.evaluation.baselines import jpeg
from tatok_model import TaTok
from tatok_model.metrics.images import psnr, to_uint8
from tatok_model.tiles import PictureTokens, decode_picture, encode_picture, keep_together, save_picture

SHARES = (0.08, 0.12, 0.18, 0.25, 0.35, 0.5, 0.65, 0.8, 1.0)
FIRST = 3  # of SHARES, where the slider stands at first
IN_DOCUMENTS = (0.12, 0.25, 0.5)  # shares in the PNG
QUALITY = 92  # of the JPEG files that the page holds, so good that nobody sees a loss
INTRODUCTION = (
    "The tokenizer writes every picture as tokens, tile by tile, and drops those that would be missed least, at one "
    "level for all pictures. Move the slider: tokens stay where the detail is."
)


@dataclass(frozen=True)
class ShownCut:
    """A picture at one budget."""

    share: float  # of all tokens, on average over the pictures that are shown together
    tokens: int
    bits: int  # bits_fixed
    size: int  # bytes of the .tatok file
    psnr: float  # dB
    picture: np.ndarray  # (H, W, 3) uint8
    kept: np.ndarray  # (H, W) floats: which share of the patches there was kept
    jpeg: tuple[int, float, bytes] | None  # bytes, dB and file of the best JPEG that is not larger; None: all are
    smallest_jpeg: int  # bytes


@dataclass(frozen=True)
class ShownPicture:
    """A picture at every budget."""

    name: str
    original: np.ndarray  # (H, W, 3) uint8
    all_tokens: int
    cuts: tuple[ShownCut, ...]


def at_every_budget(
    tokenizer: TaTok, pictures: Sequence[tuple[str, Tensor]], score: str = "error", rounds: int = 1
) -> list[ShownPicture]:
    """Names and (3, H, W) pictures in [0, 1], cut at one level for all, at each share that the tokenizer can reach."""
    ranked = [encode_picture(tokenizer, pixels, score, rounds) for _, pixels in pictures]
    shares = [share for share in SHARES if share >= ranked[0].least_share]
    cuts = zip(*(keep_together(ranked, share) for share in shares), strict=True)
    return [
        _shown(tokenizer, name, to_uint8(pixels), dict(zip(shares, short, strict=True)))
        for (name, pixels), short in zip(pictures, cuts, strict=True)
    ]


def _shown(tokenizer: TaTok, name: str, original: Tensor, cuts: dict[float, PictureTokens]) -> ShownPicture:
    """A (3, H, W) uint8 picture with its tokens at each share."""
    picture = Image.fromarray(_channels_last(original))
    files = [jpeg(picture, quality) for quality in range(1, 96)]
    shown = []
    for share, short in cuts.items():
        made = to_uint8(decode_picture(tokenizer, short))
        with tempfile.TemporaryDirectory() as scratch:
            size = save_picture(tokenizer, short, Path(scratch) / "picture.tatok")
        best = next((file for file in reversed(files) if len(file) <= size), None)
        beside = None if best is None else (len(best), float(psnr(original[None], _of_file(best)[None])), best)
        shown.append(
            ShownCut(
                share=share,
                tokens=int(short.counts.sum()),
                bits=round(short.bits),
                size=size,
                psnr=float(psnr(original[None], made[None])),
                picture=_channels_last(made),
                kept=short.kept_map().numpy(),
                jpeg=beside,
                smallest_jpeg=len(files[0]),
            )
        )
    return ShownPicture(name, _channels_last(original), short.all_tokens, tuple(shown))


def write_page(path: Path, shown: Sequence[ShownPicture]) -> None:
    """A page that holds all pictures; a slider moves over the budgets, which are shares of all tokens."""
    pictures = [
        {
            "name": picture.name,
            "width": picture.original.shape[1],
            "height": picture.original.shape[0],
            "all_tokens": picture.all_tokens,
            "original": _in_page(picture.original),
            "cuts": [_cut_values(cut) for cut in picture.cuts],
        }
        for picture in shown
    ]
    text = (resources.files("pipeline.evaluation") / "page.html").read_text(encoding="utf-8")
    values = {
        "INTRODUCTION": html.escape(INTRODUCTION),
        "LAST": str(len(shown[0].cuts) - 1),
        "FIRST": str(min(FIRST, len(shown[0].cuts) - 1)),
        "DATA": json.dumps(pictures).replace("<", "\\u003c"),
    }
    path.write_text(re.sub(r"__([A-Z]+)__", lambda found: values[found[1]], text), encoding="utf-8")


def write_png(path: Path, shown: Sequence[ShownPicture]) -> None:
    """A row for each picture: original, then the map of kept tokens and the reconstruction at some budgets."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    cuts = [[cut for cut in picture.cuts if cut.share in IN_DOCUMENTS] or [picture.cuts[-1]] for picture in shown]
    columns = 1 + max(len(row) for row in cuts) + 1
    heights = [picture.original.shape[0] / picture.original.shape[1] for picture in shown]
    width = 2.6
    with mpl.rc_context({"font.size": 8}):
        figure = Figure((columns * width, sum(heights) * width + 0.28 * len(shown)), layout="constrained", dpi=150)
        grid = figure.subplots(len(shown), columns, squeeze=False, height_ratios=heights)
        for axes in grid.flat:
            axes.axis("off")
        for axes, picture, row in zip(grid, shown, cuts, strict=True):
            axes[0].imshow(picture.original)
            axes[0].set_title(f"original, {picture.all_tokens:,} tokens")
            middle = row[len(row) // 2]
            axes[1].imshow(middle.kept, cmap="inferno", vmin=0, vmax=1)
            axes[1].set_title(f"where the {middle.tokens:,} are")
            for place, cut in zip(axes[2:], row, strict=False):
                place.imshow(cut.picture)
                place.set_title(f"{cut.tokens:,} tokens, {cut.psnr:.1f} dB")
        figure.savefig(path)


def _cut_values(cut: ShownCut) -> dict[str, Any]:
    jpeg = None
    if cut.jpeg:
        jpeg = {"bytes": cut.jpeg[0], "psnr": cut.jpeg[1], "picture": _data_url(cut.jpeg[2], "jpeg")}
    buffer = io.BytesIO()
    Image.fromarray((cut.kept * 255).astype("uint8")).save(buffer, "PNG")
    return {
        "share": cut.share,
        "tokens": cut.tokens,
        "bits": cut.bits,
        "bytes": cut.size,
        "psnr": cut.psnr,
        "picture": _in_page(cut.picture),
        "map": _data_url(buffer.getvalue(), "png"),
        "jpeg": jpeg,
        "smallest_jpeg": cut.smallest_jpeg,
    }


def _channels_last(pixels: Tensor) -> np.ndarray:
    """(3, H, W) uint8 as (H, W, 3)."""
    return pixels.permute(1, 2, 0).numpy()


def _in_page(picture: np.ndarray) -> str:
    """An (H, W, 3) uint8 picture as the page holds it."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=QUALITY)
    return _data_url(file.getvalue(), "jpeg")


def _of_file(file: bytes) -> Tensor:
    """(3, H, W) uint8 of a JPEG file."""
    import numpy as np

    return torch.from_numpy(np.array(Image.open(io.BytesIO(file)).convert("RGB"))).permute(2, 0, 1)


def _data_url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
