import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tatok_model.config import GeneratorConfig, SamplingConfig
from tatok_model.generation.generator import Generator
from tatok_model.generation.sampling import Stepper, draw, kv_cache_bytes, sample, uniforms
from tatok_model.generation.sequences import Sequences

CONFIG = GeneratorConfig(
    size="nano", dropout=0, classes=5, global_tokens=3, grid_size=4, codebook_size=16, max_patch_tokens=12
)
KINDS = {
    "adaptive": CONFIG,
    "patch_only": replace(CONFIG, global_tokens=0, positions="derived", max_patch_tokens=16),
    "global_only": replace(CONFIG, patch_tokens=False, max_patch_tokens=0),
}
SETTINGS = {
    "plain": SamplingConfig(),
    "guided": SamplingConfig(guidance=2.5, schedule="linear"),
    "positions guided": SamplingConfig(guidance=2.0, position_guidance=1.5, schedule="power-cosine"),
    "narrow": SamplingConfig(temperature=0.8, top_k=9, top_p=0.9),
    "greedy": SamplingConfig(temperature=0, position_temperature=0),
}
LABELS, NUMBERS = torch.arange(64) % 6 - 1, torch.arange(64) + 7


def generator_of(config: GeneratorConfig, dtype: torch.dtype = torch.float64) -> Generator:
    torch.manual_seed(0)
    generator = Generator(config).eval()
    with torch.no_grad():
        for parameter in generator.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return generator.to(dtype)


def equal(a: Sequences, b: Sequences) -> bool:
    pairs = zip(
        (a.global_indices, a.codes, a.places, a.counts), (b.global_indices, b.codes, b.places, b.counts), strict=True
    )
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_with_and_without_a_cache_the_same_tokens_are_drawn(kind: str, setting: str) -> None:
    generator = generator_of(KINDS[kind])
    cached, plain = (sample(generator, LABELS, NUMBERS, 0, SETTINGS[setting], use_cache=use) for use in (True, False))
    assert equal(cached, plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", ["plain", "guided"])
def test_a_sample_does_not_depend_on_its_batch(kind: str, setting: str) -> None:
    generator, config = generator_of(KINDS[kind]), SETTINGS[setting]
    together = sample(generator, LABELS, NUMBERS, 0, config)
    for image in range(0, 64, 5):
        alone = sample(generator, LABELS[[image]], NUMBERS[[image]], 0, config)
        assert equal(alone, together[[image]])
    backwards = torch.arange(63, -1, -1)
    assert equal(sample(generator, LABELS[backwards], NUMBERS[backwards], 0, config), together[backwards])


def test_in_float32_the_cache_agrees_closely() -> None:
    """Teacher-forced scores agree to 1e-4 and at least 99.9% of sampled tokens are the same."""
    generator = generator_of(CONFIG, torch.float32)
    cached, plain = (sample(generator, LABELS, NUMBERS, 0, SamplingConfig(), use_cache=use) for use in (True, False))
    a, b = (found.to_tokens(16, 3) for found in (cached, plain))
    same = torch.cat([a.global_indices == b.global_indices, a.patch_indices == b.patch_indices], 1)
    assert float((same.sum() + (a.kept_mask == b.kept_mask).sum()) / (same.numel() + a.kept_mask.numel())) >= 0.999
    with torch.no_grad():
        difference = forced_logits(generator, plain, True) - forced_logits(generator, plain, False)
    assert float(difference.abs().max()) < 1e-4


def test_scores_that_differ_little_draw_differently_only_near_a_border() -> None:
    """A first divergence of two samplers lies within the margin of their scores."""
    random = torch.Generator().manual_seed(0)
    scores = torch.randn(200, 1000, generator=random, dtype=torch.float64).repeat(50, 1)
    nearly = scores + (torch.rand(scores.shape, generator=random, dtype=torch.float64) - 0.5) * 2e-4
    uniform = (torch.arange(len(scores)) / len(scores)).double()
    a, b = draw(scores, uniform), draw(nearly, uniform)
    differ = a != b
    assert 0 < int(differ.sum()) < len(scores) // 10
    border = scores.softmax(1).cumsum(1).gather(1, torch.minimum(a, b)[:, None])[:, 0]
    assert float((border - uniform)[differ].abs().max()) < 2e-4


def forced_logits(generator: Generator, sequences: Sequences, use_cache: bool) -> Tensor:
    """All finite scores of given sequences, step by step."""
    rows, found = Stepper(generator, LABELS, SamplingConfig(), use_cache), []
    for number in range(generator.config.global_tokens):
        found.append(rows.global_logits(number))
        rows.take_global(sequences.global_indices[:, number], number)
    last = torch.full_like(LABELS, -1)
    for step in range(sequences.codes.shape[1]):
        place = sequences.places[:, step].maximum(last + 1).clamp(max=15)
        scores = rows.place_logits(last)
        found += [scores.where(scores.isfinite(), 0), rows.code_logits(place)]
        rows.take_patch(sequences.codes[:, step], place)
        last = place
    return torch.cat(found, 1)


def test_guidance_of_one_is_no_guidance() -> None:
    generator = generator_of(CONFIG)
    rows = Stepper(generator, LABELS, SamplingConfig(guidance=1.0, position_guidance=2.0))
    plain = Stepper(generator, LABELS, SamplingConfig())
    assert torch.equal(rows.global_logits(0), plain.global_logits(0))
    assert not SamplingConfig(guidance=1.0).guided


def test_guidance_moves_away_from_what_is_likely_without_the_class() -> None:
    generator = generator_of(CONFIG)
    told = Stepper(generator, LABELS, SamplingConfig()).global_logits(0)
    untold = Stepper(generator, torch.full_like(LABELS, -1), SamplingConfig()).global_logits(0)
    guided = Stepper(generator, LABELS, SamplingConfig(guidance=3.0)).global_logits(0)
    assert torch.allclose(guided, untold + 3 * (told - untold))


@pytest.mark.parametrize("schedule", ["constant", "linear", "power-cosine"])
def test_schedules_end_at_the_full_scale(schedule: str) -> None:
    config = SamplingConfig(guidance=4.0, schedule=schedule)
    scales = [config.scale_at(4.0, progress / 10) for progress in range(11)]
    assert scales[-1] == pytest.approx(4.0)
    assert scales == sorted(scales)
    assert scales[0] == (4.0 if schedule == "constant" else 1.0)


def test_lengths_end_where_training_ended_and_places_ascend() -> None:
    found = sample(generator_of(CONFIG), LABELS, NUMBERS, 0, SamplingConfig())
    assert int(found.counts.max()) <= 12
    assert len(set(found.counts.tolist())) > 3
    for places, count in zip(found.places, found.counts, strict=True):
        assert bool((places[:count].diff() > 0).all())
    assert sample(generator_of(KINDS["patch_only"]), LABELS, NUMBERS, 0, SamplingConfig()).counts.tolist() == [16] * 64


def test_another_seed_or_number_gives_another_sample() -> None:
    generator, config = generator_of(CONFIG), SamplingConfig()
    base = sample(generator, LABELS, NUMBERS, 0, config)
    assert equal(base, sample(generator, LABELS, NUMBERS, 0, config))
    for other in (sample(generator, LABELS, NUMBERS, 1, config), sample(generator, LABELS, NUMBERS + 64, 0, config)):
        assert not torch.equal(base.global_indices, other.global_indices)


def test_draws_follow_the_distribution() -> None:
    shares = torch.tensor([0.1, 0.0, 0.6, 0.3])
    count = 4000
    logits = shares.log().expand(count, -1)
    uniform = (torch.arange(count) / count).double()
    found = torch.bincount(draw(logits, uniform), minlength=4) / count
    assert torch.allclose(found, shares, atol=1e-3)
    sharper = torch.bincount(draw(logits, uniform, temperature=0.5), minlength=4) / count
    assert torch.allclose(sharper, shares**2 / (shares**2).sum(), atol=1e-3)


def test_only_the_likeliest_are_drawn_when_asked_for() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log().expand(100, -1)
    uniform = (torch.arange(100) / 100).double()
    assert set(draw(logits, uniform, top_k=2).tolist()) == {1, 3}
    assert set(draw(logits, uniform, top_p=0.5).tolist()) == {1}
    assert set(draw(logits, uniform, top_p=0.51).tolist()) == {1, 3}
    assert set(draw(logits, uniform, temperature=0).tolist()) == {1}
    assert set(draw(logits, uniform, top_k=9).tolist()) == {0, 1, 2, 3}


def test_what_has_no_share_is_never_drawn() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    for uniform in (0.0, 1 - 2**-32):
        assert int(draw(logits, torch.tensor([uniform], dtype=torch.float64))[0]) in (1, 3)


def test_cache_bytes_are_those_that_are_stored() -> None:
    generator = generator_of(CONFIG, torch.float32)
    rows = Stepper(generator, LABELS, SamplingConfig(guidance=2.0))
    rows.global_logits(0)
    assert rows._cache is not None
    assert rows._cache._stored is not None
    assert rows._cache._stored.numel() * 4 == kv_cache_bytes(CONFIG, 64, torch.float32, guided=True)


def test_a_class_that_does_not_exist_and_a_context_that_is_too_long_are_refused() -> None:
    generator = generator_of(CONFIG)
    with pytest.raises(ValueError, match="expected 0 to 4, or -1"):
        sample(generator, torch.tensor([5]), torch.tensor([0]), 0, SamplingConfig())
    rows = Stepper(generator, torch.tensor([0]), SamplingConfig())
    with pytest.raises(ValueError, match="as trained"):
        for place in range(20):
            rows.take_patch(torch.tensor([0]), torch.tensor([place % 16]))


def test_numbers_depend_on_their_key_alone() -> None:
    many = uniforms(3, torch.arange(50), 7)
    assert torch.equal(uniforms(3, torch.tensor([41, 2]), 7), many[[41, 2]])
    assert torch.equal(uniforms(3, torch.arange(50), 4), many[:, :4])


def test_another_seed_gives_other_numbers() -> None:
    assert not torch.equal(uniforms(0, torch.arange(5), 2), uniforms(1, torch.arange(5), 2))
    assert torch.equal(uniforms(-1, torch.arange(5), 2), uniforms(2**64 - 1, torch.arange(5), 2))


def test_numbers_are_uniform_and_below_one() -> None:
    found = uniforms(0, torch.arange(2000), 50)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1 - 2**-32
    counts = torch.histc(found.flatten(), bins=20, min=0, max=1)
    expected = found.numel() / 20
    assert float(((counts - expected) ** 2 / expected).sum()) < 43.8  # chi-square, 19 degrees of freedom, 0.1%
    centred = found - 0.5
    assert abs(float((centred[:, 0] * centred[:, 1]).mean())) < 0.01
    assert abs(float((centred[1:] * centred[:-1]).mean())) < 0.002


def test_numbers_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="expected int64"):
        uniforms(0, torch.zeros(2, 2, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="expected int64"):
        uniforms(0, torch.zeros(2), 1)


def test_codes_are_drawn_at_given_places() -> None:
    generator = generator_of(CONFIG)
    free = sample(generator, LABELS, NUMBERS, 0, SamplingConfig())
    places = free.places.where(free.real, -1)
    again = sample(generator, LABELS, NUMBERS, 0, SamplingConfig(), places=places)
    assert equal(free, again), "its own places give its own codes"
    short = places.clone()
    short[:, 2:] = -1
    cut = sample(generator, LABELS, NUMBERS, 0, SamplingConfig(), places=short[:, :2])
    assert cut.counts.tolist() == free.counts.clamp(max=2).tolist()
    assert torch.equal(cut.codes[cut.real], free.codes[:, :2][cut.real])


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([[3, 3]], "places do not ascend within 0 to 15; expected raster order, then -1"),
        ([[-1, 3]], "places do not ascend"),
        ([[3, 16]], "places do not ascend"),
        ([[3], [4]], r"places are \(2, 1\); expected \(1, 0 to "),
    ],
)
def test_places_that_cannot_be_are_refused(places: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(generator_of(CONFIG), LABELS[:1], NUMBERS[:1], places=torch.tensor(places))
