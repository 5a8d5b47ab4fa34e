"""Pictures drawn from fewer and fewer of their tokens, as a page with a slider and as one PNG: `jobs/show.py`.

The page holds everything it shows and opens without a network, also as an artifact inside MLflow.
"""

import argparse
import base64
import html
import io
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.core.checkpoints import find, from_hub
from pipeline.core.errors import BadInput

if TYPE_CHECKING:  # heavy imports wait until the arguments are understood
    import numpy as np
    from torch import Tensor

    from tatok_model import TaTok

SHARES = (0.08, 0.12, 0.18, 0.25, 0.35, 0.5, 0.65, 0.8, 1.0)
FIRST = 3  # of SHARES, where the slider stands at first
IN_DOCUMENTS = (0.12, 0.25, 0.5)  # shares in the PNG
SAMPLES = ("astronaut", "coffee", "chelsea")  # of skimage.data
SAMPLE_SIDE = 324  # pixels of the longer side of a sample: six tiles of 64 pixels
LONGEST = 512  # pixels of a picture's longer side; larger ones are shown smaller, unless asked otherwise
QUALITY = 92  # of the JPEG files that the page holds, so good that nobody sees a loss
INTRODUCTION = (
    "The tokenizer writes every picture as tokens, tile by tile, and drops those that would be missed least. "
    "Move the slider: tokens stay where the detail is."
)


@dataclass(frozen=True)
class ShownCut:
    """A picture at one budget."""

    share: float  # of all tokens
    tokens: int
    bits: int  # bits_fixed
    size: int  # bytes of the .tatok file
    psnr: float  # dB
    picture: "np.ndarray"  # (H, W, 3) uint8
    kept: "np.ndarray"  # (H, W) floats: which share of the patches there was kept
    jpeg: tuple[int, float, bytes] | None  # bytes, dB and file of the best JPEG that is not larger; None: all are
    smallest_jpeg: int  # bytes


@dataclass(frozen=True)
class ShownPicture:
    """A picture at every budget."""

    name: str
    original: "np.ndarray"  # (H, W, 3) uint8
    all_tokens: int
    cuts: tuple[ShownCut, ...]


def main(description: str | None) -> NoReturn:
    """Run `jobs/show.py` with the arguments of this process; exits 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="files; without any, three of scikit-image")
    parser.add_argument("--tokenizer", default="tatok64", help="a name in the box, a checkpoint folder or a hub id")
    parser.add_argument("--output", default="show", metavar="FOLDER", help="where show.html and show.png are written")
    parser.add_argument("--longest", type=int, default=LONGEST, help="pixels of the longer side, at most")
    parser.add_argument("--dry-run", action="store_true", help="check the arguments, write nothing")
    arguments = parser.parse_args()
    try:
        check(arguments.pictures, Path(arguments.output), arguments.longest)
        if arguments.dry_run:
            sys.exit(0)
        show(arguments.pictures, arguments.tokenizer, Path(arguments.output), arguments.longest)
    except (BadInput, ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def check(pictures: Sequence[str], folder: Path, longest: int) -> None:
    """Refuse what cannot work before anything heavy is loaded.

    Raises:
        BadInput: a picture that is not there, a file where the folder should be, or pictures smaller than 16 pixels.
    """
    if longest < 16:
        raise BadInput(f"--longest is {longest}; expected at least 16 pixels")
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"--output {str(folder)!r} is a file; expected a folder")
    for path in pictures:
        if not Path(path).exists():
            raise BadInput(f"picture {path!r} does not exist; expected a file that Pillow reads")


def show(pictures: Sequence[str], tokenizer_name: str, folder: Path, longest: int = LONGEST) -> list[ShownPicture]:
    """Write `show.html` and `show.png` into `folder` and a line a picture to stdout.

    Args:
        pictures: paths; none: photographs inside scikit-image.
        tokenizer_name: one in the box, a checkpoint folder, the run folder of a training, or a hub id.
        folder: made if it is not there.
        longest: pixels of the longer side, at least 16; larger pictures are made smaller.

    Raises:
        BadInput: a tokenizer that cannot be had.
        ValueError: something that is no picture or no tokenizer.
        OSError: a file that cannot be read or written.
    """
    names_and_pixels = [_opened(path, longest) for path in pictures] or _samples(longest)
    tokenizer = _tokenizer(tokenizer_name)
    folder.mkdir(parents=True, exist_ok=True)
    shown = []
    for name, pixels in names_and_pixels:
        shown.append(at_every_budget(tokenizer, name, pixels))
        for cut in shown[-1].cuts:
            if cut.share in IN_DOCUMENTS:
                rate = f"{cut.tokens:>6,} of {shown[-1].all_tokens:,} tokens, {cut.size:>6,} bytes, {cut.psnr:.2f} dB"
                print(f"{name:<12} {cut.share:>4.0%}  {rate}", flush=True)
    write_page(folder / "show.html", shown)
    write_png(folder / "show.png", shown)
    print(f"move the slider in {folder / 'show.html'}; for documents {folder / 'show.png'}")
    return shown


def at_every_budget(tokenizer: "TaTok", name: str, pixels: "Tensor") -> ShownPicture:
    """A (3, H, W) picture in [0, 1], cut at each share of its tokens that the tokenizer can reach."""
    from PIL import Image

    from pipeline.evaluation.baselines import jpeg
    from tatok_model.metrics.images import psnr, to_uint8
    from tatok_model.tiles import decode_picture, encode_picture, save_picture

    tokens, original = encode_picture(tokenizer, pixels), to_uint8(pixels)
    picture = Image.fromarray(_channels_last(original))
    files = [jpeg(picture, quality) for quality in range(1, 96)]
    cuts = []
    for share in (share for share in SHARES if share >= tokens.least_share):
        short = tokens.keep(share)
        made = to_uint8(decode_picture(tokenizer, short))
        with tempfile.TemporaryDirectory() as scratch:
            size = save_picture(tokenizer, short, Path(scratch) / "picture.tatok")
        best = next((file for file in reversed(files) if len(file) <= size), None)
        beside = None if best is None else (len(best), float(psnr(original[None], _of_file(best)[None])), best)
        cuts.append(
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
    return ShownPicture(name, _channels_last(original), tokens.all_tokens, tuple(cuts))


def write_page(path: Path, shown: Sequence[ShownPicture]) -> None:
    """A page that holds all pictures; a slider moves over the budgets, which are the same for every picture."""
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
    text = (resources.files("pipeline") / "show.html").read_text(encoding="utf-8")
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
            axes[1].set_title(f"kept at {middle.share:.0%}")
            for place, cut in zip(axes[2:], row, strict=False):
                place.imshow(cut.picture)
                place.set_title(f"{cut.share:.0%}: {cut.tokens:,} tokens, {cut.psnr:.1f} dB")
        figure.savefig(path)


def _cut_values(cut: ShownCut) -> dict[str, Any]:
    from PIL import Image

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


def _tokenizer(name: str) -> "TaTok":
    from safetensors import SafetensorError

    from tatok_model import TaTok

    if Path(name).exists():
        name = str(find(str(Path(name).absolute()), "--tokenizer"))
    elif name.count("/") == 1 and name[0] not in "./~":
        name = str(from_hub(name, "--tokenizer"))
    try:
        return TaTok.from_pretrained(name).eval()
    except (RuntimeError, SafetensorError) as error:  # torn weights, or of another shape
        reason = " ".join(str(error).split())[:300]
        raise BadInput(f"--tokenizer {name!r} cannot be loaded ({reason}); expected weights that are whole") from None


def _opened(path: str, longest: int) -> tuple[str, "Tensor"]:
    from tatok_model.tiles import as_pixels

    return Path(path).name, _shrunk(as_pixels(path), longest)


def _samples(longest: int) -> list[tuple[str, "Tensor"]]:
    from skimage import data

    from tatok_model.tiles import as_pixels

    return [(name, _shrunk(as_pixels(getattr(data, name)()), min(longest, SAMPLE_SIDE))) for name in SAMPLES]


def _shrunk(pixels: "Tensor", longest: int) -> "Tensor":
    """(3, H, W), made smaller where its longer side has more than `longest` pixels."""
    import torch.nn.functional as F

    height, width = pixels.shape[1:]
    scale = longest / max(height, width)
    if scale >= 1:
        return pixels
    size = max(1, round(height * scale)), max(1, round(width * scale))
    return F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)


def _channels_last(pixels: "Tensor") -> "np.ndarray":
    """(3, H, W) uint8 as (H, W, 3)."""
    return pixels.permute(1, 2, 0).numpy()


def _in_page(picture: "np.ndarray") -> str:
    """An (H, W, 3) uint8 picture as the page holds it."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=QUALITY)
    return _data_url(file.getvalue(), "jpeg")


def _of_file(file: bytes) -> "Tensor":
    """(3, H, W) uint8 of a JPEG file."""
    import numpy as np
    import torch
    from PIL import Image

    return torch.from_numpy(np.array(Image.open(io.BytesIO(file)).convert("RGB"))).permute(2, 0, 1)


def _data_url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
