"""Header and checksum of a token stream: which tokenizer wrote it, how it is laid out, whether it is intact.

    magic "TaTk" | version | flags | positions | model id (8) | M (2) | N (2) | K (4) | T (2) | rounds (2) |
    coding rounds (2) | score, one byte of length and its name | payload | CRC-32 of all before (4)

Integers are little-endian. `payload.py` describes the payload.

Shapes: M global tokens, N patch positions, K codebook entries, T kept patch tokens.
"""

import struct
import zlib
from dataclasses import dataclass

from tatok_model.filtering_rules import SCORES
from tatok_model.tokens import POSITIONS, Side

MAGIC = b"TaTk"
VERSION = 1
MODEL_ID_BYTES = 8
LENGTH, CODED, COUNTED_GLOBALS = 1, 2, 4  # flags
FIXED = struct.Struct("<4sBBB8sHHIHHHB")
CHECKSUM = struct.Struct("<I")


@dataclass(frozen=True)
class Format:
    """The tokenizer of a stream, the same for writer and reader.

    Attributes:
        global_tokens: M.
        patch_positions: N.
        codebook_size: K, of global and patch tokens.
        model_id: the first 8 bytes of the SHA-256 of the tokenizer's weights: no other tokenizer can decode the codes.
    """

    global_tokens: int
    patch_positions: int
    codebook_size: int
    model_id: bytes

    def __post_init__(self) -> None:
        limits = {"global_tokens": (0, 2**16), "patch_positions": (1, 2**16), "codebook_size": (1, 2**32)}
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) < high:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {low} to {high - 1}")
        if len(self.model_id) != MODEL_ID_BYTES:
            raise ValueError(f"model_id has {len(self.model_id)} bytes; expected {MODEL_ID_BYTES}")


@dataclass(frozen=True)
class Header:
    """How one stream is laid out.

    Attributes:
        form: of the tokenizer.
        side: whether the payload holds T, and how the kept positions are known.
        count: T; 0 when the payload holds it.
        coded: patch codes are entropy-coded; else every code costs log2 K bits.
        counted_globals: the payload holds how many global tokens follow; else all M do.
        score: what the patch tokens were ranked by, a key of `filtering_rules.SCORES`; "" when unknown.
        rounds: R, in how many rounds they were ranked; 0 when unknown.
        coding_rounds: in how many rounds patch codes are coded; 0 when the replay decides or nothing is coded.
    """

    form: Format
    side: Side
    count: int = 0
    coded: bool = False
    counted_globals: bool = False
    score: str = ""
    rounds: int = 0
    coding_rounds: int = 0

    def __post_init__(self) -> None:
        positions = self.form.patch_positions
        if not 0 <= self.count <= (0 if self.side.length else positions):
            wanted = "0, the payload says it" if self.side.length else f"0 to {positions}"
            raise ValueError(f"count is {self.count}; expected {wanted}")
        if self.score and self.score not in SCORES:
            raise ValueError(f"score is {self.score!r}; expected one of {', '.join(SCORES)}")
        if not (1 <= self.rounds <= positions if self.score else self.rounds == 0):
            wanted = f"1 to {positions}" if self.score else "0 without a score"
            raise ValueError(f"rounds is {self.rounds}; expected {wanted}")
        if self.side.positions == "replayed" and self.score != "entropy":
            raise ValueError(f"positions are replayed with score {self.score!r}; expected entropy")
        coding = self.coded and self.side.positions != "replayed"
        if not (1 <= self.coding_rounds < 2**16 if coding else self.coding_rounds == 0):
            raise ValueError(f"coding_rounds is {self.coding_rounds}; expected {'1 to 65535' if coding else 0}")


def seal(header: Header, payload: bytes) -> bytes:
    """The bytes of one stream."""
    form, score = header.form, header.score.encode("ascii")
    flags = LENGTH * header.side.length | CODED * header.coded | COUNTED_GLOBALS * header.counted_globals
    fixed = FIXED.pack(
        MAGIC,
        VERSION,
        flags,
        POSITIONS.index(header.side.positions),
        form.model_id,
        form.global_tokens,
        form.patch_positions,
        form.codebook_size,
        header.count,
        header.rounds,
        header.coding_rounds,
        len(score),
    )
    data = fixed + score + payload
    return data + CHECKSUM.pack(zlib.crc32(data))


def unseal(data: bytes) -> tuple[Header, bytes]:
    """The header and the payload of a stream; ValueError where it is none, of another version, cut short or damaged."""
    if data[:4] != MAGIC:
        raise ValueError(f"stream begins with {data[:4]!r}; expected {MAGIC!r}")
    if data[4:5] != bytes([VERSION]):
        raise ValueError(f"stream's version is {data[4] if len(data) > 4 else 'missing'}; expected {VERSION}")
    if len(data) < FIXED.size + CHECKSUM.size:
        raise ValueError(f"stream has {len(data)} bytes; expected at least {FIXED.size + CHECKSUM.size}")
    body, checksum = data[: -CHECKSUM.size], CHECKSUM.unpack(data[-CHECKSUM.size :])[0]
    if zlib.crc32(body) != checksum:
        raise ValueError(
            f"stream's checksum is {checksum:08x}; expected {zlib.crc32(body):08x}: it is damaged or cut short"
        )
    _, _, flags, positions, model_id, m, n, k, count, rounds, coding_rounds, length = FIXED.unpack_from(body)
    if flags >= 2 * COUNTED_GLOBALS or positions >= len(POSITIONS) or len(body) < FIXED.size + length:
        raise ValueError(
            f"stream has flags {flags}, positions {positions} and {length} bytes of score; "
            f"expected flags below {2 * COUNTED_GLOBALS}, positions below {len(POSITIONS)} and a score that fits"
        )
    header = Header(
        Format(m, n, k, model_id),
        Side(length=bool(flags & LENGTH), positions=POSITIONS[positions]),
        count,
        bool(flags & CODED),
        bool(flags & COUNTED_GLOBALS),
        body[FIXED.size : FIXED.size + length].decode("ascii", "replace"),
        rounds,
        coding_rounds,
    )
    return header, body[FIXED.size + length :]


def payload_bits(data: bytes) -> int:
    """Bits of a stream without its header: payload and checksum, to compare with `Tokens.bits`."""
    return 8 * (len(unseal(data)[1]) + CHECKSUM.size)


def check_format(header: Header, form: Format) -> None:
    """Raises ValueError when a stream is not of the expected tokenizer."""
    if header.form.model_id != form.model_id:
        raise ValueError(f"stream is of the model {header.form.model_id.hex()}; expected {form.model_id.hex()}")
    for name in ("global_tokens", "patch_positions", "codebook_size"):
        if getattr(header.form, name) != getattr(form, name):
            raise ValueError(f"stream has {name} {getattr(header.form, name)}; expected {getattr(form, name)}")
