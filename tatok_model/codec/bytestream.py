"""Tokens as bytes: one cut of one image, with version and checksum, about as short as its information content.

    codec = Codec(tokenizer)
    streams = codec.to_bytes(tokens.cut("residual", 60.0), entropy_coded=True)     # one bytes object an image
    tokens = codec.from_bytes(streams)                                             # the same cut; no ranking

`Codec` uses a tokenizer's entropy model; `to_bytes` and `from_bytes` below it work with any `CodeModel`. `header.py`
and `payload.py` describe the format. Payload and checksum have at most `bits_fixed` + 64 bits an image, where
entropy-coded patch codes count as 1.02 times their ideal code length.

Shapes: B images, M global tokens, N patch positions, K codebook entries, T kept patch tokens, n positions asked for.
"""

import hashlib
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tatok_model.codec.header import Format, Header, check_format, seal, unseal
from tatok_model.codec.payload import CodeModel, Image, check_bits, code_image, grid_schedule, hash_of
from tatok_model.codec.range_coder import RangeDecoder, RangeEncoder
from tatok_model.filtering import conditional_entropy, to_units
from tatok_model.ranking import best_open
from tatok_model.tokenizer import TaTok
from tatok_model.tokens import Side, Tokens
from tatok_model.vit import one_thread

CODING_ROUNDS = 8


class Codec:
    """Writes and reads streams of one tokenizer; predicted ones need hardware that computes the same numbers.

    Args:
        tokenizer: predicts the codes, on its device; a hash of its weights is in every stream.
        coding_rounds: in how many rounds codes are entropy-coded, each predicted from the rounds before.
    """

    def __init__(self, tokenizer: TaTok, coding_rounds: int = CODING_ROUNDS) -> None:
        config = tokenizer.config
        self._has_model = tokenizer.entropy_model is not None
        self._model = _OneImage(tokenizer, coding_rounds)
        self.format = Format(config.global_tokens, config.patch_positions, config.codebook_size, model_id(tokenizer))

    def to_bytes(self, tokens: Tokens, entropy_coded: bool = False) -> list[bytes]:
        """One stream for each image.

        Args:
            tokens: one cut; positions are sent, derived or replayed as its `side` says.
            entropy_coded: a patch code costs -log2 q bits instead of log2 K.

        Raises:
            ValueError: as the function `to_bytes`, or an entropy model is needed that this tokenizer does not have.
        """
        if not self._has_model and (entropy_coded or tokens.side.positions == "replayed"):
            raise ValueError("this tokenizer has no entropy model; expected one for entropy-coded or replayed streams")
        with one_thread():
            return to_bytes(tokens.to("cpu"), self.format, self._model, entropy_coded)

    def from_bytes(self, streams: list[bytes]) -> Tokens:
        """The tokens of streams: one cut, without a ranking, on the tokenizer's device.

        Raises:
            ValueError: as the function `from_bytes`.
        """
        with one_thread():
            tokens = from_bytes(streams, self.format, self._model if self._has_model else None)
        return tokens.to(self._model.device)


class _OneImage:
    """The entropy model on one image, as a `CodeModel`; always at all N positions, because a shape can change bits."""

    def __init__(self, tokenizer: TaTok, coding_rounds: int) -> None:
        self.coding_rounds = coding_rounds
        self.device = tokenizer.mask_token.device
        self._tokenizer = tokenizer

    def rounds(self, kept_mask: np.ndarray) -> list[np.ndarray]:
        """The kept positions, spread evenly over the grid in every round, each round larger by at most one."""
        numbers = grid_schedule(torch.from_numpy(kept_mask)[None], self.coding_rounds)[0].numpy()
        return [np.flatnonzero(kept_mask & (numbers == number)) for number in range(self.coding_rounds)]

    def logits(
        self, global_indices: np.ndarray, patch_indices: np.ndarray, known: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        """(n, K) float32 at (n,) positions."""
        return self._all_logits(global_indices, patch_indices, known)[positions].cpu().numpy()

    def next_positions(
        self, global_indices: np.ndarray, patch_indices: np.ndarray, known: np.ndarray, count: int
    ) -> np.ndarray:
        """The `count` unplaced positions of highest entropy, (count,) int64."""
        units = to_units(conditional_entropy(self._all_logits(global_indices, patch_indices, known))).cpu()
        return best_open(units[None], torch.from_numpy(known)[None], count)[1][0].numpy()

    def _all_logits(self, global_indices: np.ndarray, patch_indices: np.ndarray, known: np.ndarray) -> Tensor:
        """(N, K) logits."""
        globals_, patches, given = (
            torch.from_numpy(values)[None].to(self.device) for values in (global_indices, patch_indices, known)
        )
        everywhere = torch.ones_like(given)
        return self._tokenizer.patch_logits(Tokens(globals_, patches, everywhere), given, everywhere)


def model_id(tokenizer: TaTok) -> bytes:
    """8 bytes that tell tokenizers with other weights apart: the beginning of a sha256 over them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()[:8]


def to_bytes(
    tokens: Tokens,
    form: Format,
    model: CodeModel | None = None,
    entropy_coded: bool = False,
    ranked_by: tuple[str, int] | None = None,
) -> list[bytes]:
    """One stream for each image of a batch.

    Where replaying the ranking does not give an image's kept set, its positions are sent instead.

    Args:
        tokens: one cut; `side` decides how length and positions are transmitted.
        form: sizes and identity of the tokenizer.
        model: needed if codes are entropy-coded or positions replayed.
        entropy_coded: patch codes cost -log2 of the model's probability; else log2 K bits each.
        ranked_by: score and rounds; None: those of `tokens.ranking`.

    Raises:
        ValueError: tokens of other sizes or with entries beyond the codebook, lengths that differ although
            none is sent, positions that a reader could not derive, or a missing model.
    """
    images = _images_of(tokens)
    _check_tokens(tokens, images, form)
    if ranked_by is None:
        ranked_by = ("", 0) if tokens.ranking is None else (tokens.ranking.score, tokens.ranking.rounds)
    counts = tokens.patch_counts.tolist()
    if not tokens.side.length and len(set(counts)) > 1:
        raise ValueError(f"images keep {min(counts)} to {max(counts)} patch tokens; expected a side with length=True")
    header = Header(
        form,
        tokens.side,
        count=counts[0] if counts and not tokens.side.length else 0,
        coded=entropy_coded,
        counted_globals=tokens.global_counts is not None,
        score=ranked_by[0],
        rounds=ranked_by[1],
        coding_rounds=model.coding_rounds if entropy_coded and model and tokens.side.positions != "replayed" else 0,
    )
    return [_write(image, header, model) for image in images]


def from_bytes(streams: list[bytes], form: Format, model: CodeModel | None = None) -> Tokens:
    """The tokens of streams that `to_bytes` wrote, in one call or several with the same arguments.

    Args:
        streams: one an image.
        form: sizes and identity of the tokenizer.
        model: as at writing; needed if codes are entropy-coded or positions replayed.

    Returns:
        One cut without a ranking; codes are 0 where dropped. If any image has its positions sent, `side` says sent.

    Raises:
        ValueError: a stream that is damaged, foreign, of another version, model or size, or of another cut than the
            first; a missing model, or one that predicts otherwise than the writer's.
    """
    if isinstance(streams, bytes | str):
        raise ValueError(f"streams are a {type(streams).__name__}; expected a list with the bytes of each image")
    opened = [unseal(data) for data in streams]
    headers = [header for header, _ in opened]
    for header in headers:
        check_format(header, form)
        _check_alike(header, headers[0])
    images = [_read(payload, header, model) for header, payload in opened]
    side = Side() if not headers else headers[0].side
    if any(header.side.positions == "sent" for header in headers):
        side = replace(side, positions="sent")
    counted = bool(headers) and headers[0].counted_globals
    return Tokens(
        _stack([image.global_indices for image in images], form.global_tokens),
        _stack([image.patch_indices for image in images], form.patch_positions),
        _stack([image.kept_mask for image in images], form.patch_positions).bool(),
        side=side,
        global_counts=torch.tensor([image.global_count for image in images]) if counted else None,
    )


def _write(image: Image, header: Header, model: CodeModel | None) -> bytes:
    """One stream; sends the positions where replaying the ranking does not give the image's kept set."""
    if not header.side.length:
        header = replace(header, count=int(image.kept_mask.sum()))
    coder = RangeEncoder()
    written = code_image(coder, image, header, model)
    if np.array_equal(written.kept_mask, image.kept_mask):
        return seal(header, coder.finish())
    if header.side.positions != "replayed":
        raise ValueError(
            f"{int(image.kept_mask.sum())} positions are kept that the order {header.score!r} does not begin with; "
            "expected a side with positions sent"
        )
    rounds = model.coding_rounds if header.coded and model else 0
    return _write(image, replace(header, side=replace(header.side, positions="sent"), coding_rounds=rounds), model)


def _read(payload: bytes, header: Header, model: CodeModel | None) -> Image:
    """Decode one payload; ValueError where its hash shows that the writer's model computed otherwise."""
    form, coder = header.form, RangeDecoder(payload)
    no_codes = np.zeros(form.patch_positions, dtype=np.int64)
    blank = Image(np.zeros(form.global_tokens, dtype=np.int64), 0, no_codes, no_codes.astype(bool))
    image = code_image(coder, blank, header, model)
    check = hash_of(image.patch_indices, image.kept_mask, check_bits(header))
    if image.check != check:
        raise ValueError(
            f"tokens have the hash {check:x}; expected {image.check:x}: "
            "the models here do not compute what the writer's did"
        )
    coder.finish()
    return image


def _images_of(tokens: Tokens) -> list[Image]:
    """One `Image` per image; indices of lost and dropped tokens become 0, as a reader will have them."""
    b, m = tokens.global_indices.shape
    counts = [m] * b if tokens.global_counts is None else tokens.global_counts.tolist()
    kept = tokens.kept_mask.cpu().numpy()
    patch_indices = np.where(kept, tokens.patch_indices.cpu().numpy(), 0)
    global_indices = np.where(np.arange(m) < np.array(counts).reshape(b, 1), tokens.global_indices.cpu().numpy(), 0)
    return [Image(global_indices[i], counts[i], patch_indices[i], kept[i]) for i in range(b)]


def _check_tokens(tokens: Tokens, images: list[Image], form: Format) -> None:
    m, n = tokens.global_indices.shape[1], tokens.patch_indices.shape[1]
    if (m, n) != (form.global_tokens, form.patch_positions):
        raise ValueError(
            f"tokens hold {m} global tokens and {n} patch positions; "
            f"expected {form.global_tokens} and {form.patch_positions}"
        )
    counts = [image.global_count for image in images]
    if counts and not 0 <= min(counts) <= max(counts) <= m:
        raise ValueError(f"global_counts go from {min(counts)} to {max(counts)}; expected 0 to {m}")
    for image in images:
        for indices in (image.global_indices, image.patch_indices):
            if len(indices) and not 0 <= indices.min() <= indices.max() < form.codebook_size:
                raise ValueError(
                    f"tokens hold entries from {indices.min()} to {indices.max()}; "
                    f"expected 0 to {form.codebook_size - 1}"
                )


def _check_alike(header: Header, first: Header) -> None:
    """Streams of one batch come from one cut: only fields that a failed replay changes may differ."""
    for name in ("count", "coded", "counted_globals", "score", "rounds"):
        if getattr(header, name) != getattr(first, name):
            raise ValueError(
                f"a stream has {name} {getattr(header, name)!r}; "
                f"expected {getattr(first, name)!r} as the first stream of the batch"
            )
    if header.side.length != first.side.length:
        raise ValueError(f"a stream has length={header.side.length}; expected {first.side.length} as the first stream")
    if (header.side.positions == "derived") != (first.side.positions == "derived"):
        raise ValueError(
            f"a stream has positions {header.side.positions}; expected {first.side.positions} as the first stream"
        )


def _stack(rows: list[np.ndarray], width: int) -> Tensor:
    """(B, width) int64; B may be 0."""
    return torch.from_numpy(np.array(rows).reshape(len(rows), width).astype(np.int64))
