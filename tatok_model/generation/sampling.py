"""Sampling from a generator: one step per token, with a cache of keys and values, or without to check it.

`sample` draws whole sequences. A `Stepper` is a batch of them in the middle of being written: it asks the generator
what comes next and takes what was chosen. Under guidance every sequence has a second row without its class; both are
combined before anybody sees a score. Draws are functions of (seed, number of the sample, step): `uniforms`.

Shapes: A sequences in the batch, R rows that are computed (A, or 2 A under guidance), L embeddings read, D width,
N patch positions, K codebook entries.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tatok_model.config import GENERATOR_SIZES, GeneratorConfig, SamplingConfig
from tatok_model.generation.generator import NO_CLASS, Generator, check_labels
from tatok_model.generation.sequences import Sequences

LEAVE_SHARE = 1 / 8  # ended sequences leave once they are that share of the batch: leaving copies the cache


def uniforms(seed: int, numbers: Tensor, count: int) -> Tensor:
    """(B, S) float64 in [0, 1), multiples of 2^-32: `count` for each (seed, number), the same on every device.

    Args:
        seed: any integer.
        numbers: (B,) int64.
        count: S.

    Source: the splitmix64 finaliser over the keys (Steele et al. 2014), in int64 arithmetic that wraps around.
    """
    if numbers.ndim != 1 or numbers.dtype != torch.int64:
        raise ValueError(f"numbers is {numbers.dtype} {tuple(numbers.shape)}; expected int64 (B,)")
    device = numbers.device
    key = _mix(torch.tensor([_signed(seed)], device=device))
    key = _mix(key ^ numbers)
    key = _mix(key[:, None] ^ _mix(torch.arange(1, count + 1, device=device)))
    return _shift(key, 32).double() / 2**32


def _mix(key: Tensor) -> Tensor:
    key = key + _signed(0x9E3779B97F4A7C15)
    key = (key ^ _shift(key, 30)) * _signed(0xBF58476D1CE4E5B9)
    key = (key ^ _shift(key, 27)) * _signed(0x94D049BB133111EB)
    return key ^ _shift(key, 31)


def _shift(key: Tensor, bits: int) -> Tensor:
    """A right shift that brings in zeros; torch's own repeats the sign."""
    return (key >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value


class Stepper:
    """The state of a batch.

    Args:
        generator: in evaluation mode.
        labels: (A,) int64.
        config: its guidance.
        use_cache: keep keys and values; else read everything again at every step.
    """

    def __init__(self, generator: Generator, labels: Tensor, config: SamplingConfig, use_cache: bool = True) -> None:
        self._generator, self._config = generator, config
        self._cache = generator.new_cache() if use_cache else None
        self._inputs: list[Tensor] = []  # (R, D) each: everything read, or the newest alone where there is a cache
        self._turns: list[Tensor] = []  # (R,) each
        self._steps = 0
        self._hidden: Tensor  # (R, L, D) of what was read; L = 1 where there is a cache
        rows = torch.cat([labels, torch.full_like(labels, NO_CLASS)]) if config.guided else labels
        self._read(generator.class_input(rows), torch.zeros_like(rows))

    @property
    def derived(self) -> bool:
        """Whether positions are known."""
        return self._generator.config.positions == "derived"

    @property
    def end(self) -> int:
        """What `place_logits` has last: no further position."""
        return self._generator.config.patch_positions

    def global_logits(self, number: int) -> Tensor:
        """(A, K) scores of global token `number`'s code."""
        generator = self._generator
        target = generator.global_targets.weight[number].expand(len(self._hidden), 1, -1)
        asked = self._ask(target, torch.zeros_like(self._turns[-1])[:, None])
        return self._guided(generator.to_global_codes(asked), self._config.guidance)

    def place_logits(self, last: Tensor) -> Tensor:
        """(A, N + 1) scores of the next position or the end, after (A,) positions; -1: none yet."""
        logits = self._generator.place_logits(self._hidden[:, -1], self._rows(last))
        return self._guided(logits, self._config.position_guidance)

    def code_logits(self, places: Tensor) -> Tensor:
        """(A, K) scores of the codes at (A,) positions."""
        rows = self._rows(places)
        asked = self._ask(self._generator.patch_targets(rows)[:, None], rows[:, None] + 1)
        return self._guided(self._generator.to_patch_codes(asked), self._config.guidance)

    def take_global(self, codes: Tensor, number: int) -> None:
        """Go on with (A,) codes of global token `number`."""
        rows = self._rows(codes)
        self._read(self._generator.global_input(rows, torch.full_like(rows, number)), torch.zeros_like(rows))

    def take_patch(self, codes: Tensor, places: Tensor) -> None:
        """Go on with (A,) codes at (A,) positions."""
        places = self._rows(places)
        self._read(self._generator.patch_input(self._rows(codes), places), places + 1)

    def keep(self, stay: Tensor) -> None:
        """Go on with some of the sequences: (A',) numbers of those that stay."""
        rows = torch.cat([stay, stay + len(self._hidden) // 2]) if self._config.guided else stay
        self._hidden = self._hidden[rows]
        self._inputs, self._turns = ([part[rows] for part in parts] for parts in (self._inputs, self._turns))
        if self._cache is not None:
            self._cache.keep(rows)

    def _rows(self, values: Tensor) -> Tensor:
        """(A,) -> (R,)."""
        return values.repeat(2) if self._config.guided else values

    def _read(self, newest: Tensor, turns: Tensor) -> None:
        """(R, D) and (R,): what the next token depends on most of all."""
        if self._steps >= self._generator.config.max_length:
            raise ValueError(f"a sequence has {self._steps} embeddings; expected at most that, as trained")
        if self._cache is not None:
            self._inputs, self._turns = [], []
        self._inputs.append(newest)
        self._turns.append(turns)
        self._steps += 1
        inputs, all_turns = torch.stack(self._inputs, 1), torch.stack(self._turns, 1)
        self._hidden = self._generator.read(inputs, all_turns, self._cache)

    def _ask(self, target: Tensor, target_turns: Tensor) -> Tensor:
        """(R, D) of a (R, 1, D) target."""
        turns = torch.stack(self._turns, 1)
        return self._generator.ask(self._hidden, turns, target, target_turns, self._cache)[:, 0]

    def _guided(self, logits: Tensor, scale: float) -> Tensor:
        """(R, C) -> (A, C): away from what is likely without the class, by the schedule's scale."""
        wide = logits if logits.dtype == torch.float64 else logits.float()  # autocast may have left bfloat16
        if not self._config.guided:
            return wide
        told, untold = wide.chunk(2)
        scale = self._config.scale_at(scale, self._steps / self._generator.config.max_length)
        if scale == 1:
            return told
        # Where both are -inf their difference is NaN.
        return torch.where(told.isinf(), told, untold + scale * (told - untold))


DEFAULTS = SamplingConfig()


@torch.no_grad()
def sample(
    generator: Generator,
    labels: Tensor | list[int],
    numbers: Tensor | None = None,
    seed: int = 0,
    config: SamplingConfig = DEFAULTS,
    use_cache: bool = True,
    places: Tensor | None = None,
) -> Sequences:
    """Draw one sequence for each label, on the generator's device.

    Args:
        generator: in evaluation mode.
        labels: (B,) int64 classes, -1 for no class.
        numbers: (B,) int64, which sample this is: it keys the draws; None: 0 to B - 1.
        seed: keys the draws too.
        config: temperature, guidance, ...
        use_cache: False computes every step from the beginning: slow, the reference that the cache is tested against.
        places: (B, T) int64, where each sequence is to have its patch tokens, ascending, -1 after the last; None: the
            generator chooses.

    Raises:
        ValueError: a class that does not exist, or places that cannot be.
    """
    labels = torch.as_tensor(labels, dtype=torch.int64, device=generator.device)
    if labels.ndim != 1:
        raise ValueError(f"labels are {tuple(labels.shape)}; expected one for each sample, -1 for no class")
    numbers = torch.arange(len(labels), device=labels.device) if numbers is None else numbers
    check_labels(labels, generator.config.classes)
    m, most = generator.config.global_tokens, generator.config.max_patch_tokens
    if places is not None:
        _check_places(places, generator.config, len(labels))
        places = F.pad(places.to(labels), (0, most - places.shape[1]), value=-1)
    draws = uniforms(seed, numbers, m + 2 * most)  # of each global token, then of each position and its code
    rows = Stepper(generator, labels, config, use_cache)
    global_indices = labels.new_zeros(len(labels), m)
    for number in range(m):
        code = draw(rows.global_logits(number), draws[:, number], config.temperature, config.top_k, config.top_p)
        global_indices[:, number] = code
        rows.take_global(code, number)
    codes, written = labels.new_full((len(labels), most), 0), labels.new_full((len(labels), most), -1)
    _draw_patches(rows, config, draws[:, m::2], draws[:, m + 1 :: 2], codes, written, places)
    counts = (written >= 0).sum(1)
    longest = int(counts.max()) if len(counts) else 0
    return Sequences(global_indices, codes[:, :longest], written[:, :longest].clamp(min=0), counts)


def _check_places(places: Tensor, config: GeneratorConfig, batch: int) -> None:
    if config.positions == "derived":
        raise ValueError("places are given and this generator's are derived; expected one that chooses positions")
    shape, most, n = tuple(places.shape), config.max_patch_tokens, config.patch_positions
    if places.ndim != 2 or shape[0] != batch or shape[1] > most:
        raise ValueError(f"places are {shape}; expected ({batch}, 0 to {most})")
    ended = places < 0
    ascend = ended[:, 1:] | (~ended[:, :-1] & (places[:, 1:] > places[:, :-1]))
    if not bool(ascend.all()) or bool((places >= n).any()):
        raise ValueError(f"places do not ascend within 0 to {n - 1}; expected raster order, then -1")


def _draw_patches(
    rows: Stepper,
    config: SamplingConfig,
    place_draws: Tensor,
    code_draws: Tensor,
    codes: Tensor,
    places: Tensor,
    given: Tensor | None,
) -> None:
    """Fill (B, T) codes and places, given ones if there are; what stays -1 is beyond the end of its sequence."""
    active = torch.arange(len(codes), device=codes.device)  # (A,) sequences in the batch, ended ones before they leave
    last = torch.full_like(active, -1)
    for step in range(codes.shape[1]):
        if rows.derived:
            place, ended = torch.full_like(active, step), torch.zeros_like(active, dtype=torch.bool)
        else:
            place = draw(rows.place_logits(last), place_draws[active, step], config.position_temperature)
            if given is not None:
                wanted = given[active, step]
                place = wanted.where(wanted >= 0, rows.end)
            ended = place == rows.end
            if ended.float().mean() >= LEAVE_SHARE:
                stay = (~ended).nonzero()[:, 0]
                rows.keep(stay)
                active, place, ended = active[stay], place[stay], ended[stay]
            if not len(active):
                return
        at = place.where(~ended, 0)
        code = draw(rows.code_logits(at), code_draws[active, step], config.temperature, config.top_k, config.top_p)
        # Not by a mask: how many go on is known on the device only, and the host would wait for it.
        codes[active, step], places[active, step] = code.where(~ended, 0), place.where(~ended, -1)
        rows.take_patch(code, at)
        last = place.where(~ended, rows.end - 1)  # nothing lies after it: who ended ends again


def draw(logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """(A,) int64, one choice of each row, by the inverse of its distribution function.

    Args:
        logits: (A, C); -inf is never drawn.
        uniform: (A,) float64 in [0, 1), multiples of 2^-32: a product with the total stays below it.
        temperature: 0 takes the likeliest.
        top_k: only the k likeliest, and what equals the last of them; 0: all.
        top_p: only the likeliest, until they make up this share.
    """
    if temperature == 0:
        return logits.argmax(1)
    scores = logits.double() / temperature
    if 0 < top_k < scores.shape[1]:
        scores = scores.masked_fill(scores < scores.topk(top_k, dim=1).values[:, -1:], -torch.inf)
    shares = scores.softmax(1)
    if top_p < 1:
        sorted_, order = shares.sort(dim=1, descending=True, stable=True)
        beyond = sorted_.cumsum(1) - sorted_ >= top_p  # what comes before it is enough
        shares = shares.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), 0)
    below = shares.cumsum(1)
    return torch.searchsorted(below, uniform[:, None] * below[:, -1:], right=True)[:, 0]


def kv_cache_bytes(config: GeneratorConfig, batch: int, dtype: torch.dtype, guided: bool) -> int:
    """Bytes of keys and values for a batch of sequences of the longest kind; guidance keeps a second set."""
    width, layers, _ = GENERATOR_SIZES[config.size]
    return (2 if guided else 1) * batch * 2 * (layers + 1) * config.max_length * width * dtype.itemsize
