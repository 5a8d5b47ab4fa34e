"""Sampling from a generator: one step per token, with a key-value cache, or without one to test the cache.

`sample` draws whole sequences. A `Stepper` holds a batch of unfinished ones: it returns the logits of the next token
and appends the token that was drawn. Under classifier-free guidance every sequence has a second row without its class,
and the logits of both are combined. Random numbers depend on (seed, number of the sample, step) only: `uniforms`.

Shapes: B sequences, A of them unfinished, R rows that are computed (A, or 2 A under guidance), L embeddings so far,
T patch tokens of the longest one, D width, N patch positions, K codebook entries.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tatok_model.config import GENERATOR_SIZES, GeneratorConfig, SamplingConfig
from tatok_model.generation.generator import NO_CLASS, Generator, check_labels
from tatok_model.generation.sequences import Sequences

LEAVE_SHARE = 1 / 8  # ended sequences are removed once they are this share of the batch: removal copies the cache


def uniforms(seed: int, numbers: Tensor, count: int) -> Tensor:
    """Random (B, S) float64 in [0, 1), multiples of 2^-32: S for each (seed, number), the same on every device.

    Args:
        seed: any integer.
        numbers: (B,) int64 sample numbers.
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
    """A batch of unfinished sequences.

    Args:
        generator: in evaluation mode.
        labels: (A,) int64 classes, -1 for no class.
        config: its guidance scales.
        use_cache: keep keys and values; else every step computes all embeddings again.
    """

    def __init__(self, generator: Generator, labels: Tensor, config: SamplingConfig, use_cache: bool = True) -> None:
        self._generator, self._config = generator, config
        self._cache = generator.new_cache() if use_cache else None
        self._inputs: list[Tensor] = []  # (R, D) each: all so far, or the newest alone with a cache
        self._rotary: list[Tensor] = []  # (R,) each, rotary positions of the inputs
        self._steps = 0
        self._hidden: Tensor  # (R, L, D) of the inputs; L = 1 with a cache
        rows = torch.cat([labels, torch.full_like(labels, NO_CLASS)]) if config.guided else labels
        self._read(generator.class_input(rows), torch.zeros_like(rows))

    @property
    def derived(self) -> bool:
        """Whether patch tokens stand at 0, 1, ..., N - 1, so that no position is drawn."""
        return self._generator.config.positions == "derived"

    @property
    def end(self) -> int:
        """N, the last entry of `place_logits`: no further position."""
        return self._generator.config.patch_positions

    def global_logits(self, number: int) -> Tensor:
        """(A, K) logits of the code of global token `number`."""
        generator = self._generator
        target = generator.global_targets.weight[number].expand(len(self._hidden), 1, -1)
        attended = self._attend(target, torch.zeros_like(self._rotary[-1])[:, None])
        return self._guided(generator.to_global_codes(attended), self._config.guidance)

    def place_logits(self, last: Tensor) -> Tensor:
        """(A, N + 1) logits of the next position or the end, after the (A,) `last` ones; -1: none yet."""
        logits = self._generator.place_logits(self._hidden[:, -1], self._rows(last))
        return self._guided(logits, self._config.position_guidance)

    def code_logits(self, places: Tensor) -> Tensor:
        """(A, K) logits of the codes at (A,) positions."""
        rows = self._rows(places)
        attended = self._attend(self._generator.patch_targets(rows)[:, None], rows[:, None] + 1)
        return self._guided(self._generator.to_patch_codes(attended), self._config.guidance)

    def take_global(self, codes: Tensor, number: int) -> None:
        """Append (A,) codes of global token `number`."""
        rows = self._rows(codes)
        self._read(self._generator.global_input(rows, torch.full_like(rows, number)), torch.zeros_like(rows))

    def take_patch(self, codes: Tensor, places: Tensor) -> None:
        """Append (A,) codes at (A,) positions."""
        places = self._rows(places)
        self._read(self._generator.patch_input(self._rows(codes), places), places + 1)

    def keep(self, stay: Tensor) -> None:
        """Remove all sequences but `stay`, (A',) indices into the batch."""
        rows = torch.cat([stay, stay + len(self._hidden) // 2]) if self._config.guided else stay
        self._hidden = self._hidden[rows]
        self._inputs, self._rotary = ([part[rows] for part in parts] for parts in (self._inputs, self._rotary))
        if self._cache is not None:
            self._cache.keep(rows)

    def _rows(self, values: Tensor) -> Tensor:
        """(A,) -> (R,): repeated for the rows without a class."""
        return values.repeat(2) if self._config.guided else values

    def _read(self, newest: Tensor, rotary: Tensor) -> None:
        """Append (R, D) inputs at (R,) rotary positions and compute their hidden states."""
        if self._steps >= self._generator.config.max_length:
            raise ValueError(f"a sequence has {self._steps} embeddings; expected at most that, as trained")
        if self._cache is not None:
            self._inputs, self._rotary = [], []
        self._inputs.append(newest)
        self._rotary.append(rotary)
        self._steps += 1
        inputs, all_rotary = torch.stack(self._inputs, 1), torch.stack(self._rotary, 1)
        self._hidden = self._generator.read(inputs, all_rotary, self._cache)

    def _attend(self, target: Tensor, target_rotary: Tensor) -> Tensor:
        """(R, D) output of the code layer for a (R, 1, D) target."""
        rotary = torch.stack(self._rotary, 1)
        return self._generator.attend(self._hidden, rotary, target, target_rotary, self._cache)[:, 0]

    def _guided(self, logits: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance by the schedule's scale: (R, C) logits -> (A, C)."""
        wide = logits if logits.dtype == torch.float64 else logits.float()  # autocast may have left bfloat16
        if not self._config.guided:
            return wide
        conditional, unconditional = wide.chunk(2)
        scale = self._config.scale_at(scale, self._steps / self._generator.config.max_length)
        if scale == 1:
            return conditional
        # Where both are -inf their difference is NaN.
        guided = unconditional + scale * (conditional - unconditional)
        return torch.where(conditional.isinf(), conditional, guided)


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
        numbers: (B,) int64 sample numbers; with the seed they fix the random numbers of a sample. None: 0 to B - 1.
        seed: any integer.
        config: temperature, guidance, ...
        use_cache: False computes every step from the beginning: slow, the reference that the cache is tested against.
        places: (B, T) int64 positions of the patch tokens, ascending, -1 after the last; None: the generator draws
            them.

    Raises:
        ValueError: a class that does not exist, or places out of range or not ascending.
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
    draws = uniforms(seed, numbers, m + 2 * most)  # a column per global token, then position, code, position, code, ...
    stepper = Stepper(generator, labels, config, use_cache)
    global_indices = labels.new_zeros(len(labels), m)
    for number in range(m):
        code = draw(stepper.global_logits(number), draws[:, number], config.temperature, config.top_k, config.top_p)
        global_indices[:, number] = code
        stepper.take_global(code, number)
    codes, drawn = labels.new_full((len(labels), most), 0), labels.new_full((len(labels), most), -1)
    _draw_patches(stepper, config, draws[:, m::2], draws[:, m + 1 :: 2], codes, drawn, places)
    counts = (drawn >= 0).sum(1)
    longest = int(counts.max()) if len(counts) else 0
    return Sequences(global_indices, codes[:, :longest], drawn[:, :longest].clamp(min=0), counts)


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
    stepper: Stepper,
    config: SamplingConfig,
    place_draws: Tensor,
    code_draws: Tensor,
    codes: Tensor,
    places: Tensor,
    given: Tensor | None,
) -> None:
    """Draw patch tokens, at `given` positions if any, into (B, T) `codes` and `places`; unchanged after the end."""
    active = torch.arange(len(codes), device=codes.device)  # (A,) rows of `codes` that are still in the batch
    last = torch.full_like(active, -1)
    for step in range(codes.shape[1]):
        if stepper.derived:
            place, ended = torch.full_like(active, step), torch.zeros_like(active, dtype=torch.bool)
        else:
            place = draw(stepper.place_logits(last), place_draws[active, step], config.position_temperature)
            if given is not None:
                wanted = given[active, step]
                place = wanted.where(wanted >= 0, stepper.end)
            ended = place == stepper.end
            if ended.float().mean() >= LEAVE_SHARE:
                stay = (~ended).nonzero()[:, 0]
                stepper.keep(stay)
                active, place, ended = active[stay], place[stay], ended[stay]
            if not len(active):
                return
        at = place.where(~ended, 0)
        code = draw(stepper.code_logits(at), code_draws[active, step], config.temperature, config.top_k, config.top_p)
        # `where` instead of a boolean index, whose size the host would have to wait for.
        codes[active, step], places[active, step] = code.where(~ended, 0), place.where(~ended, -1)
        stepper.take_patch(code, at)
        last = place.where(~ended, stepper.end - 1)  # after the last position only the end can follow again


def draw(logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """(A,) int64, one draw per row by inverse transform sampling.

    Args:
        logits: (A, C); -inf is never drawn.
        uniform: (A,) float64 in [0, 1), multiples of 2^-32, so that uniform * total rounds to less than the total.
        temperature: 0 takes the likeliest.
        top_k: only the k likeliest and those equal to the k-th; 0: all.
        top_p: only the likeliest whose probabilities sum to this share (nucleus sampling).
    """
    if temperature == 0:
        return logits.argmax(1)
    scores = logits.double() / temperature
    if 0 < top_k < scores.shape[1]:
        scores = scores.masked_fill(scores < scores.topk(top_k, dim=1).values[:, -1:], -torch.inf)
    shares = scores.softmax(1)
    if top_p < 1:
        sorted_, order = shares.sort(dim=1, descending=True, stable=True)
        beyond = sorted_.cumsum(1) - sorted_ >= top_p  # likelier ones already sum to top_p
        shares = shares.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), 0)
    cumulative = shares.cumsum(1)
    return torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]


def kv_cache_bytes(config: GeneratorConfig, batch: int, dtype: torch.dtype, guided: bool) -> int:
    """Bytes of the key-value cache for a batch of longest sequences; guidance doubles it."""
    width, layers, _ = GENERATOR_SIZES[config.size]
    return (2 if guided else 1) * batch * 2 * (layers + 1) * config.max_length * width * dtype.itemsize
