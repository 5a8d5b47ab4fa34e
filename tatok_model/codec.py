"""Tokens as bytes and back with a tokenizer at hand: entropy-coded, with replayed positions, or neither.

    codec = Codec(tokenizer)
    streams = codec.to_bytes(tokens.cut("relative", 0.5, replay=True), entropy_coded=True)   # one bytes object an image
    pictures = tokenizer.decode(codec.from_bytes(streams))

Writer and reader must get the same numbers from the entropy model, to the last unit. So it runs here on one image at a
time, on one thread, in float32: a shape that does not depend on the batch. Streams of another machine may still fail;
their checks notice it, and the writer replays every image and sends the positions where that does not reach its kept
set.

Shapes: B images, M global tokens, N patch positions, K codebook entries, n positions asked for.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

from tatok_model import stream
from tatok_model.filtering import best_open, conditional_entropy, to_units
from tatok_model.orders import grid_order
from tatok_model.threads import one_thread
from tatok_model.tokenizer import TaTok
from tatok_model.tokens import Tokens

CODING_ROUNDS = 8


class Codec:
    """Writes and reads the streams of one tokenizer.

    Args:
        tokenizer: in evaluation mode; where it computes decides where streams can be read.
        coding_rounds: in how many rounds entropy-coded codes are predicted from one another.
    """

    def __init__(self, tokenizer: TaTok, coding_rounds: int = CODING_ROUNDS) -> None:
        config = tokenizer.config
        self._tokenizer = tokenizer
        self._model = _OneImage(tokenizer, coding_rounds)
        self.format = stream.Format(
            config.global_tokens, config.patch_positions, config.codebook_size, model_id(tokenizer)
        )

    def to_bytes(self, tokens: Tokens, entropy_coded: bool = False) -> list[bytes]:
        """One stream for each image.

        Args:
            tokens: one cut; positions are sent, derived or replayed as its `side` says.
            entropy_coded: spend what q says on each patch code, instead of log2 K.

        Raises:
            ValueError: as `stream.to_bytes`, or an entropy model is wanted that this tokenizer does not have.
        """
        self._check_model(entropy_coded or tokens.side.positions == "replayed")
        tokens = tokens.to("cpu")
        with one_thread():
            return stream.to_bytes(tokens, self.format, self._model if entropy_coded else None, self._model)

    def from_bytes(self, streams: list[bytes]) -> Tokens:
        """The tokens of streams: one cut, without a ranking, on the tokenizer's device.

        Raises:
            ValueError: as `stream.from_bytes`.
        """
        has_model = self._tokenizer.entropy_model is not None
        with one_thread():
            found = stream.from_bytes(
                streams, self.format, *((self._model, self._model) if has_model else (None, None))
            )
        return found.to(self._model.device)

    def _check_model(self, needed: bool) -> None:
        if needed and self._tokenizer.entropy_model is None:
            raise ValueError("this tokenizer has no entropy model; expected one for entropy-coded or replayed streams")


class _OneImage:
    """The entropy model on one image, as `stream.CodeModel` and `stream.Replay` want it."""

    def __init__(self, tokenizer: TaTok, coding_rounds: int) -> None:
        self.coding_rounds = coding_rounds
        self.device = tokenizer.mask_token.device
        self._tokenizer = tokenizer
        self._order = grid_order(tokenizer.config.patch_positions).numpy()

    def rounds(self, kept_mask: np.ndarray) -> list[np.ndarray]:
        """The kept positions, spread evenly over the grid in every round, each round larger by at most one."""
        kept = self._order[kept_mask[self._order]]
        numbers = np.arange(len(kept)) * self.coding_rounds // max(len(kept), 1)
        return [np.sort(kept[numbers == number]) for number in np.unique(numbers)]

    def logits(
        self, global_indices: np.ndarray, patch_indices: np.ndarray, known: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        """(M,) and (N,) int64 codes, (N,) bool where the latter are known, (n,) -> (n, K) float32."""
        return self._ask(global_indices, patch_indices, known)[positions].cpu().numpy()

    def next_positions(
        self, global_indices: np.ndarray, patch_indices: np.ndarray, placed: np.ndarray, count: int
    ) -> np.ndarray:
        """The `count` open positions of highest entropy, (count,) int64."""
        units = to_units(conditional_entropy(self._ask(global_indices, patch_indices, placed))).cpu()
        return best_open(units[None], torch.from_numpy(placed)[None], count)[1][0].numpy()

    def _ask(self, global_indices: np.ndarray, patch_indices: np.ndarray, given: np.ndarray) -> Tensor:
        """(N, K) logits, asked at every position so that the shape is always the same."""
        everywhere = torch.ones(1, len(given), dtype=torch.bool, device=self.device)
        tokens = Tokens(self._one(global_indices), self._one(patch_indices), everywhere)
        return self._tokenizer.patch_logits(tokens, self._one(given), everywhere)

    def _one(self, values: np.ndarray) -> Tensor:
        """A batch of one."""
        return torch.from_numpy(values)[None].to(self.device)


def model_id(tokenizer: TaTok) -> bytes:
    """8 bytes that tell tokenizers with other weights apart: the beginning of a sha256 over them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()[:8]
