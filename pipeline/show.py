"""`jobs/show.py`: any pictures drawn from fewer and fewer of their tokens, as `pipeline.evaluation.page` draws them."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pipeline.core.checkpoints import find, from_hub
from pipeline.core.console import say
from pipeline.core.errors import BadInput
from pipeline.core.job import command_line

if TYPE_CHECKING:  # heavy imports wait until the arguments are understood
    from torch import Tensor

    from pipeline.evaluation.page import ShownPicture
    from tatok_model import TaTok

SAMPLES = ("astronaut", "coffee", "chelsea")  # of skimage.data
SAMPLE_SIDE = 324  # pixels of the longer side of a sample: six tiles of 64 pixels
LONGEST = 512  # pixels of a picture's longer side; larger ones are shown smaller, unless asked otherwise


def main(description: str | None) -> NoReturn:
    """Run `jobs/show.py` with the arguments of this process; exits 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="files; without any, three of scikit-image")
    parser.add_argument("--tokenizer", default="tatok64", help="a name in the box, a checkpoint folder or a hub id")
    parser.add_argument("--output", default="show", metavar="FOLDER", help="where show.html and show.png are written")
    parser.add_argument("--longest", type=float, default=float(LONGEST), help="pixels of the longer side, at most")
    parser.add_argument("--dry-run", action="store_true", help="check the arguments, write nothing")
    arguments = parser.parse_args()
    try:
        longest = arguments.longest  # a float, so that 1e3 is understood
        check(arguments.pictures, Path(arguments.output), longest)
        if arguments.dry_run:
            sys.exit(0)
        show(arguments.pictures, arguments.tokenizer, Path(arguments.output), int(longest))
        say(f"next, every stage on photographs, in minutes:\n  {command_line('demo')}")
    except (BadInput, ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def check(pictures: Sequence[str], folder: Path, longest: float) -> None:
    """Refuse what cannot work before anything heavy is loaded.

    Raises:
        BadInput: a picture that is not there, a file where the folder should be, or pictures smaller than 16 pixels.
    """
    if not (longest >= 16 and longest.is_integer()):
        raise BadInput(f"--longest is {longest:g}; expected a whole number, at least 16 pixels")
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"--output {str(folder)!r} is a file; expected a folder")
    for path in pictures:
        if not Path(path).exists():
            raise BadInput(f"picture {path!r} does not exist; expected a file that Pillow reads")


def show(pictures: Sequence[str], tokenizer_name: str, folder: Path, longest: int = LONGEST) -> "list[ShownPicture]":
    """Write `show.html` and `show.png` into `folder` and a line a picture to stdout.

    Args:
        pictures: paths; none: photographs inside scikit-image.
        tokenizer_name: one in the box, a checkpoint folder, the run folder of a training, or a hub id.
        folder: made if it is not there.
        longest: pixels of the longer side, at least 16; larger pictures are made smaller.

    Raises:
        BadInput: a tokenizer that cannot be loaded.
        ValueError: something that is no picture or no tokenizer.
        OSError: a file that cannot be read or written.
    """
    from pipeline.evaluation.page import IN_DOCUMENTS, at_every_budget, write_page, write_png

    names_and_pixels = [_opened(path, longest) for path in pictures] or _samples(longest)
    tokenizer = _tokenizer(tokenizer_name)
    folder.mkdir(parents=True, exist_ok=True)
    shown = at_every_budget(tokenizer, names_and_pixels)
    for picture in shown:
        for cut in picture.cuts:
            if cut.share in IN_DOCUMENTS:
                rate = f"{cut.tokens:>6,} of {picture.all_tokens:,} tokens, {cut.size:>6,} bytes, {cut.psnr:.2f} dB"
                print(f"{picture.name:<12} {rate}", flush=True)
    write_page(folder / "show.html", shown)
    write_png(folder / "show.png", shown)
    print(f"move the slider in {folder / 'show.html'}; for documents {folder / 'show.png'}")
    return shown


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
