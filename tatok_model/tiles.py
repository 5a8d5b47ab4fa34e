"""Pictures of any size: overlapping square tiles, all cut at one score threshold, blended when decoded.

    photo = encode_picture(tokenizer, "photo.jpg")     # a path, PIL image, array or tensor; every token, ranked
    short = photo.keep(0.25)                           # the quarter of all tokens that matters most
    short.tokens_per_tile                              # (rows, columns)
    picture = decode_picture(tokenizer, short)         # (3, H, W) in [0, 1]
    save_picture(tokenizer, short, "photo.tatok")      # and load_picture

Tiles are spread evenly, so that neighbours share at least `OVERLAP` of their side. A picture that is smaller than a
tile is reflected at its borders.

Shapes: H, W picture, S tile side, R x C tiles, M global tokens, N patch positions of a tile.
"""

import io
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tatok_model.config import TokenizerConfig
from tatok_model.filtering import calibrate
from tatok_model.filtering_rules import SCORES
from tatok_model.tokenizer import check_range
from tatok_model.tokens import Tokens, joined

if TYPE_CHECKING:  # Pillow and the codec are imported where they are needed
    from PIL import Image

    from tatok_model.tokenizer import TaTok

OVERLAP = 3 / 16  # of a tile's side that neighbours share at least: with 1 / 16 flat areas show the grid at few tokens
BATCH = 64  # tiles at once
MAGIC, VERSION = b"TaTP", 1
FIXED = struct.Struct("<4sBIIHH")  # magic, version, H, W, S, bytes of the streams' common head
LENGTH, CHECKSUM = struct.Struct("<H"), struct.Struct("<I")


@dataclass(frozen=True)
class PictureTokens:
    """The tokens of a picture.

    Attributes:
        tokens: of R * C tiles, row by row.
        height: H in pixels.
        width: W in pixels.
        config: of the tokenizer, whose `image_size` is S.
    """

    tokens: Tokens
    height: int
    width: int
    config: TokenizerConfig

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1:
            raise ValueError(f"a picture has {self.height}x{self.width} pixels; expected at least 1x1")
        if len(self.tokens) != math.prod(self.grid):
            raise ValueError(f"tokens are of {len(self.tokens)} tiles; expected {self.grid[0]} x {self.grid[1]}")

    def __repr__(self) -> str:
        rows, columns = self.grid
        return (
            f"PictureTokens({self.height}x{self.width} pixels, {rows}x{columns} tiles of {self.side}, "
            f"{int(self.counts.sum())} of {self.all_tokens} tokens, {self.bits:.0f} bits)"
        )

    @property
    def side(self) -> int:
        """S, pixels of a tile's side."""
        return self.config.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return len(tile_starts(self.height, self.side)), len(tile_starts(self.width, self.side))

    @property
    def counts(self) -> Tensor:
        """(R * C,) int64, tokens of each tile."""
        return self.tokens.counts()

    @property
    def tokens_per_tile(self) -> Tensor:
        """(R, C) int64."""
        return self.counts.view(self.grid)

    @property
    def all_tokens(self) -> int:
        """How many tokens the picture has before any is dropped."""
        return len(self.tokens) * self.config.max_tokens

    @property
    def bits(self) -> float:
        """`bits_fixed` of all tiles: log2 K for every token, plus length and positions."""
        return float(self.tokens.bits(self.config.bits_per_token).sum())

    @property
    def least_share(self) -> float:
        """That of the global tokens among all tokens, which every cut keeps."""
        return self.config.global_tokens / self.config.max_tokens

    def cut(self, rule: str, threshold: float) -> "PictureTokens":
        """Every tile cut by the same rule and threshold, as `Tokens.cut`."""
        return replace(self, tokens=self.tokens.cut(rule, threshold))

    def keep(self, share: float) -> "PictureTokens":
        """About this share of all tokens, by one score threshold for all tiles; see `keep_together`."""
        return keep_together([self], share)[0]

    def kept_map(self) -> Tensor:
        """(H, W) floats: which share of the patches that cover a pixel was kept."""
        patches_a_side = self.side // self.config.patch_size
        patches = self.tokens.kept_mask.view(-1, 1, patches_a_side, patches_a_side).float()
        return self._blend(F.interpolate(patches, size=(self.side, self.side)))[0]

    def _blend(self, tiles: Tensor) -> Tensor:
        """(R * C, c, S, S) tiles -> (c, H, W); where tiles overlap, each counts less towards its edge."""
        tops, lefts = tile_starts(self.height, self.side), tile_starts(self.width, self.side)
        rows, columns = _weights(tops, self.side), _weights(lefts, self.side)
        size = tops[-1] + self.side, lefts[-1] + self.side
        total, weight = tiles.new_zeros(tiles.shape[1], *size), tiles.new_zeros(size)
        for number, tile in enumerate(tiles):
            row, column = divmod(number, len(lefts))
            window = (rows[row][:, None] * columns[column]).to(tiles)
            place = slice(tops[row], tops[row] + self.side), slice(lefts[column], lefts[column] + self.side)
            total[:, *place] += tile * window
            weight[place] += window
        return (total / weight)[:, : self.height, : self.width]


def keep_together(pictures: Sequence[PictureTokens], share: float) -> list[PictureTokens]:
    """Cut some pictures to about this share of all their tokens, by one score threshold: hard tiles keep more.

    Global tokens are always kept. Patches of equal score are kept or dropped together: of a flat picture, whose patches
    all score alike, none or all. A ranking without scores (`random`, `grid`) keeps the same number in every tile.

    Args:
        pictures: at least one, all of one tokenizer and ranked by one score.
        share: of all tokens, global ones included.

    Raises:
        ValueError: a share that is above 1 or below that of the global tokens, or tokens without a ranking.
    """
    config, least_share = pictures[0].config, pictures[0].least_share
    if not isinstance(share, int | float) or not least_share <= share <= 1:
        least = math.ceil(least_share * 1000) / 1000
        raise ValueError(f"share is {share!r}; expected {least} (global tokens alone) to 1")
    if not config.patch_tokens:
        return list(pictures)
    rankings = [picture.tokens.ranking for picture in pictures if picture.tokens.ranking is not None]
    if len(rankings) < len(pictures):
        raise ValueError("these tokens hold one cut and no ranking; expected those of encode_picture")
    patch_tokens = share * config.max_tokens - config.global_tokens
    if share == 1 or not SCORES[rankings[0].score].unit:
        return [picture.cut("count", round(patch_tokens)) for picture in pictures]
    units = torch.cat([ranking.score_units for ranking in rankings])
    threshold = calibrate(units, "marginal", patch_tokens, rankings[0].resolution)
    return [picture.cut("marginal", threshold) for picture in pictures]


def tile_starts(length: int, side: int) -> list[int]:
    """Where tiles of `side` begin along `length` pixels: as few as overlap enough, spread evenly."""
    if length <= side:
        return [0]
    shared = int(side * OVERLAP)
    number = math.ceil((length - shared) / (side - shared))
    return [round(place * (length - side) / (number - 1)) for place in range(number)]


def encode_picture(
    tokenizer: "TaTok", picture: Any, score: str | None = None, rounds: int = 1, batch: int = BATCH
) -> PictureTokens:
    """All tokens of a picture, ranked.

    Args:
        tokenizer: of square pictures; its side is that of a tile.
        picture: a path, a PIL image, or an array or tensor (H, W), (H, W, 3), (3, H, W) or (1, 3, H, W), uint8 or
            floats in [0, 1].
        score: as `TaTok.rank`; None: `error` where there are patch tokens.
        rounds: as `TaTok.rank`.
        batch: tiles at once.

    Raises:
        ValueError: something else than a picture.
        FileNotFoundError: a path that does not exist.
    """
    if not hasattr(tokenizer, "config"):
        raise ValueError(f"tokenizer is a {type(tokenizer).__name__}; expected a TaTok, then the picture")
    config = tokenizer.config
    if batch < 1:
        raise ValueError(f"batch is {batch}; expected at least 1 tile")
    pixels = as_pixels(picture).to(tokenizer.mask_token.device)
    height, width = pixels.shape[1:]
    tiles = _tiles(pixels, config.image_size)
    parts = []
    for images in tiles.split(batch):
        tokens = tokenizer.encode(images)
        parts.append(tokenizer.rank(tokens, score or "error", rounds, images) if config.patch_tokens else tokens)
    return PictureTokens(joined(parts), height, width, config)


def decode_picture(tokenizer: "TaTok", picture: PictureTokens, batch: int = BATCH) -> Tensor:
    """(3, H, W) floats in [0, 1] of the tokens that are kept.

    Raises:
        ValueError: tokens of tiles of another size, or that `TaTok.decode` does not take.
    """
    if picture.side != tokenizer.config.image_size:
        raise ValueError(f"tiles have {picture.side} pixels a side; expected {tokenizer.config.image_size}")
    numbers = torch.arange(len(picture.tokens)).split(batch)
    return picture._blend(torch.cat([tokenizer.decode(picture.tokens[some]) for some in numbers]))


def save_picture(tokenizer: "TaTok", picture: PictureTokens, path: str | Path, entropy_coded: bool = False) -> int:
    """Write a `.tatok` file; returns its size in bytes.

    The file: magic "TaTP", version, H, W, S, the head that the streams of all tiles share, then the payload of each
    with its length, and a CRC-32. `Codec` writes the streams.

    Raises:
        ValueError: as `Codec.to_bytes`.
    """
    from tatok_model.codec.bytestream import Codec
    from tatok_model.codec.header import seal, unseal

    streams = [unseal(stream) for stream in Codec(tokenizer).to_bytes(picture.tokens, entropy_coded)]
    head = seal(streams[0][0], b"")
    if any(seal(header, b"") != head for header, _ in streams):
        raise ValueError(
            "tiles differ in how their positions are sent; expected a cut whose positions are not replayed"
        )
    body = FIXED.pack(MAGIC, VERSION, picture.height, picture.width, picture.side, len(head)) + head
    body += b"".join(LENGTH.pack(len(payload)) + payload for _, payload in streams)
    data = body + CHECKSUM.pack(zlib.crc32(body))
    Path(path).write_bytes(data)
    return len(data)


def load_picture(tokenizer: "TaTok", path: str | Path) -> PictureTokens:
    """The tokens of a `.tatok` file that `save_picture` wrote with the same tokenizer: one cut, without a ranking.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, another version, a damaged one, or one of another tokenizer.
    """
    from tatok_model.codec.bytestream import Codec
    from tatok_model.codec.header import seal, unseal

    data = Path(path).read_bytes()
    if data[:4] != MAGIC:
        raise ValueError(f"{str(path)!r} begins with {data[:4]!r}; expected {MAGIC!r}, a .tatok file")
    if data[4:5] != bytes([VERSION]):
        raise ValueError(f"{str(path)!r} has version {data[4:5].hex() or 'none'}; expected {VERSION:02x}")
    body, checksum = data[: -CHECKSUM.size], data[-CHECKSUM.size :]
    if len(data) < FIXED.size + CHECKSUM.size or CHECKSUM.pack(zlib.crc32(body)) != checksum:
        raise ValueError(f"{str(path)!r} is damaged: its checksum differs; expected a whole .tatok file")
    _, _, height, width, _, head_size = FIXED.unpack_from(body)
    header, _ = unseal(body[FIXED.size : FIXED.size + head_size])
    streams, place = [], FIXED.size + head_size
    while place < len(body):
        (size,) = LENGTH.unpack_from(body, place)
        place += LENGTH.size + size
        streams.append(seal(header, body[place - size : place]))
    tokens = Codec(tokenizer).from_bytes(streams)
    return PictureTokens(tokens, height, width, tokenizer.config)


def as_pixels(picture: Any) -> Tensor:
    """(3, H, W) float32 in [0, 1] of a path, PIL image, array or tensor; see `encode_picture`.

    Transparency is laid on white, as preprocessing does.

    Raises:
        ValueError: another type or shape, values outside [0, 1] or NaN.
        FileNotFoundError: a path that does not exist.
    """
    if isinstance(picture, str | Path):
        return _of_pil(_opened(Path(picture)))
    if type(picture).__module__.startswith("PIL."):
        return _of_pil(picture)
    if isinstance(picture, np.ndarray):
        if picture.dtype.kind not in "uif":
            raise ValueError(f"picture is {picture.dtype}; expected uint8 or floats in [0, 1]")
        picture = torch.from_numpy(np.array(picture, dtype=picture.dtype.newbyteorder("=")))  # also what is read-only
    if not isinstance(picture, Tensor):
        raise ValueError(f"picture is a {type(picture).__name__}; expected a path, a PIL image, an array or a tensor")
    shape = tuple(picture.shape)
    if picture.ndim == 4 and len(picture) == 1:
        picture = picture[0]
    if picture.ndim == 2:
        picture = picture.expand(3, -1, -1)
    elif picture.ndim == 3 and picture.shape[0] != 3 and picture.shape[-1] == 3:
        picture = picture.permute(2, 0, 1)
    if picture.ndim != 3 or picture.shape[0] != 3 or 0 in picture.shape:
        raise ValueError(f"picture is {shape}; expected (H, W), (H, W, 3), (3, H, W) or (1, 3, H, W)")
    if picture.dtype == torch.uint8:
        return picture.float() / 255
    if not picture.is_floating_point():
        raise ValueError(f"picture is {picture.dtype}; expected uint8 or floats in [0, 1]")
    check_range(picture, "picture has")
    return picture.detach().float().clamp(0, 1)


def _opened(path: Path) -> "Image.Image":
    from PIL import Image

    from tatok_model.rgb import NOTE_ERRORS, load, without_notes

    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; expected one picture")
    try:
        try:
            with Image.open(path) as picture:
                return load(picture)
        except NOTE_ERRORS:
            data = path.read_bytes()
            bare = without_notes(data)
            if bare == data:
                raise
            return load(Image.open(io.BytesIO(bare)))
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever broken bytes lead them to
        reason = " ".join(str(error).split())
        raise ValueError(f"{str(path)!r} is not a picture that Pillow reads whole: {reason}") from error


def _of_pil(picture: "Image.Image") -> Tensor:
    from tatok_model.rgb import load, to_rgb, turn_of

    picture = load(picture)
    turn = turn_of(picture)
    upright = to_rgb(picture if turn is None else picture.transpose(turn))
    return torch.from_numpy(np.array(upright)).permute(2, 0, 1).float() / 255


def _tiles(pixels: Tensor, side: int) -> Tensor:
    """(3, H, W) -> (R * C, 3, S, S), row by row."""
    height, width = pixels.shape[1:]
    while min(pixels.shape[1:]) < side:  # one reflection adds at most size - 1 pixels
        down, right = (min(max(side - size, 0), max(size - 1, 1)) for size in pixels.shape[1:])
        mode = "reflect" if min(pixels.shape[1:]) > 1 else "replicate"
        pixels = F.pad(pixels[None], (0, right, 0, down), mode=mode)[0]
    tops, lefts = tile_starts(height, side), tile_starts(width, side)
    return torch.stack([pixels[:, top : top + side, left : left + side] for top in tops for left in lefts])


def _weights(starts: list[int], side: int) -> list[Tensor]:
    """(S,) blending weights for each tile along one axis: 1, falling linearly to 0 where it overlaps a neighbour."""
    weights = []
    for number, start in enumerate(starts):
        weight = torch.ones(side)
        if number:
            shared = starts[number - 1] + side - start
            weight[:shared] *= (torch.arange(shared) + 0.5) / shared
        if number + 1 < len(starts):
            shared = start + side - starts[number + 1]
            weight[side - shared :] *= 1 - (torch.arange(shared) + 0.5) / shared
        weights.append(weight)
    return weights
