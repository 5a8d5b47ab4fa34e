import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tatok_model.config import GeneratorConfig, SamplingConfig, read_generator_config
from tatok_model.generation.generator import Generator
from tatok_model.generation.layers import Rotation, rotate
from tatok_model.generation.sampling import Stepper, sample
from tatok_model.generation.sequences import Sequences

CONFIG = GeneratorConfig(
    size="nano", dropout=0, classes=5, global_tokens=3, grid_size=4, codebook_size=16, max_patch_tokens=16
)
KINDS = {
    "adaptive": CONFIG,
    "patch_only": replace(CONFIG, global_tokens=0, positions="derived"),
    "global_only": replace(CONFIG, patch_tokens=False, max_patch_tokens=0),
    "no_globals": replace(CONFIG, global_tokens=0),
    "unlabelled": replace(CONFIG, classes=0),
}


def generator_of(config: GeneratorConfig = CONFIG, seed: int = 0) -> Generator:
    """Weights large enough that predictions differ from place to place."""
    torch.manual_seed(seed)
    generator = Generator(config).double().eval()
    with torch.no_grad():
        for parameter in generator.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return generator


def sequences_of(config: GeneratorConfig, batch: int = 6, seed: int = 0) -> Sequences:
    random = torch.Generator().manual_seed(seed)
    n, k = config.patch_positions, config.codebook_size
    globals_ = torch.randint(0, k, (batch, config.global_tokens), generator=random)
    if not config.patch_tokens:
        none = torch.zeros(batch, 0, dtype=torch.int64)
        return Sequences(globals_, none, none, torch.zeros(batch, dtype=torch.int64))
    if config.positions == "derived":
        counts = torch.full((batch,), n)
    else:
        counts = torch.randint(0, config.max_patch_tokens + 1, (batch,), generator=random)
    longest = int(counts.max())
    real = torch.arange(longest) < counts[:, None]
    places = torch.stack([torch.randperm(n, generator=random) for _ in range(batch)])[:, :longest]
    places = places.where(real, n).sort(dim=1).values.where(real, 0)
    codes = torch.randint(0, k, (batch, longest), generator=random).where(real, 0)
    return Sequences(globals_, codes, places, counts)


def labels_of(config: GeneratorConfig, batch: int = 6) -> Tensor:
    return torch.arange(batch) % (config.classes + 1) - 1


@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_costs_what_the_steps_add_up_to(kind: str) -> None:
    config = KINDS[kind]
    generator, sequences, labels = generator_of(config), sequences_of(config), labels_of(config)
    with torch.no_grad():
        bits = generator(sequences, labels)
        for image in range(len(sequences)):
            one = sequences[[image]]
            steps = bits_by_steps(generator, one, labels[[image]])
            assert float(bits.total()[image]) == pytest.approx(steps, abs=1e-9)


def bits_by_steps(generator: Generator, one: Sequences, labels: Tensor) -> float:
    rows, total = Stepper(generator, labels, SamplingConfig()), 0.0
    for number, code in enumerate(one.global_indices[0]):
        total += cost(rows.global_logits(number), code)
        rows.take_global(code[None], number)
    last = torch.tensor([-1])
    for place, code in zip(one.places[0], one.codes[0], strict=True):
        if not rows.derived:
            total += cost(rows.place_logits(last), place)
        total += cost(rows.code_logits(place[None]), code)
        rows.take_patch(code[None], place[None])
        last = place[None]
    if generator.config.patch_tokens and not rows.derived:
        total += cost(rows.place_logits(last), torch.tensor(rows.end))
    return total


def cost(logits: Tensor, target: Tensor) -> float:
    return -float(logits.log_softmax(1)[0, target]) / math.log(2)


def test_padding_costs_nothing_and_changes_nothing() -> None:
    generator, sequences = generator_of(), sequences_of(CONFIG)
    bits = generator(sequences, labels_of(CONFIG))
    assert not bits.codes[~sequences.real].any()
    ends = torch.arange(sequences.codes.shape[1] + 1) > sequences.counts[:, None]
    assert not bits.positions[ends].any()
    for image in range(len(sequences)):
        alone = generator(sequences[[image]], labels_of(CONFIG)[[image]])
        assert torch.allclose(alone.total(), bits.total()[[image]], atol=1e-9)


def test_what_comes_later_changes_nothing_before() -> None:
    sequences = sequences_of(KINDS["patch_only"], seed=1)
    generator = generator_of(KINDS["patch_only"])
    changed = Sequences(sequences.global_indices, sequences.codes.clone(), sequences.places, sequences.counts)
    changed.codes[:, 9] = (changed.codes[:, 9] + 1) % 16
    labels = labels_of(CONFIG)
    before, after = generator(sequences, labels).codes, generator(changed, labels).codes
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


def test_class_and_every_earlier_token_matter() -> None:
    generator, sequences = generator_of(), sequences_of(CONFIG)
    labels = torch.zeros(6, dtype=torch.int64)
    base = generator(sequences, labels)
    assert not torch.allclose(base.globals_, generator(sequences, labels + 1).globals_)
    other = Sequences((sequences.global_indices + 1) % 16, sequences.codes, sequences.places, sequences.counts)
    assert not torch.allclose(base.codes, generator(other, labels).codes)


def test_positions_add_up_to_one_over_what_lies_ahead() -> None:
    generator = generator_of()
    hidden = torch.randn(3, 128, dtype=torch.float64)
    shares = generator.place_logits(hidden, torch.tensor([-1, 4, 15])).softmax(1)
    assert torch.allclose(shares.sum(1), torch.ones(3, dtype=torch.float64))
    assert not shares[1, :5].any()
    assert bool((shares[1, 5:] > 0).all())
    assert shares[2, -1] == 1
    assert bool((shares[0] > 0).all())


def test_rotary_products_depend_on_the_offset_alone() -> None:
    rotation = Rotation(8, 16)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def product(a: int, b: int) -> float:
        turned = (rotate(x, rotation.of(torch.tensor([[p + 1]]))) for x, p in ((q, a), (k, b)))
        first, second = turned
        return float((first * second).sum())

    assert product(9, 20) == pytest.approx(product(9 + 17, 20 + 17), abs=1e-5)  # two rows and a column on
    assert product(9, 20) != pytest.approx(product(9, 21), abs=1e-3)
    assert product(0, 1) != pytest.approx(product(0, 8), abs=1e-3)  # rows are not columns
    assert torch.equal(rotate(q, rotation.of(torch.zeros(1, 1, dtype=torch.int64))), q)
    with pytest.raises(ValueError, match="multiple of 4"):
        Rotation(8, 10)


def test_every_parameter_gets_a_gradient_even_without_patch_tokens_in_a_batch() -> None:
    for config in KINDS.values():
        generator = Generator(config)
        sequences = sequences_of(config)
        if config.positions == "generated":
            sequences = empty(config)
        generator(sequences, labels_of(config)).total().sum().backward()
        assert [name for name, p in generator.named_parameters() if p.grad is None] == []


def empty(config: GeneratorConfig) -> Sequences:
    none = torch.zeros(6, 0, dtype=torch.int64)
    globals_ = torch.zeros(6, config.global_tokens, dtype=torch.int64)
    return Sequences(globals_, none, none, torch.zeros(6, dtype=torch.int64))


def test_codes_that_are_alike_start_alike() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(8, 6).repeat(2, 1)  # entry i + 8 is entry i again
    generator = Generator(CONFIG)
    before = generator.global_codes.weight.clone()
    generator.start_from_codes(None, vectors)
    assert torch.equal(generator.global_codes.weight, before)
    for weight in (generator.patch_codes.weight, generator.to_patch_codes.weight):
        assert torch.allclose(weight[:8], weight[8:])
        assert 0.01 < float(weight.detach().std()) < 0.04
    assert not torch.allclose(generator.patch_codes.weight, generator.to_patch_codes.weight)
    Generator(KINDS["global_only"]).start_from_codes(vectors, None)
    with pytest.raises(ValueError, match="codes are 5; expected 16"):
        generator.start_from_codes(vectors[:5], None)


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    generator = Generator(CONFIG).eval()
    generator.save_pretrained(tmp_path / "checkpoint")
    loaded = Generator.from_pretrained(tmp_path / "checkpoint").eval()
    assert loaded.config == CONFIG == read_generator_config(tmp_path / "checkpoint")
    sequences, labels = sequences_of(CONFIG), labels_of(CONFIG)
    assert torch.equal(loaded(sequences, labels).total(), generator(sequences, labels).total())


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    Generator(CONFIG).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["norm.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="norm.weight"):
        Generator.from_pretrained(tmp_path)


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no config.json"):
        Generator.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text('{"patch_size": 4}')
    with pytest.raises(ValueError, match="not a generator's"):
        Generator.from_pretrained(tmp_path)


def test_what_the_generator_was_not_made_for_is_refused() -> None:
    generator, sequences, labels = Generator(CONFIG), sequences_of(CONFIG), labels_of(CONFIG)
    with pytest.raises(ValueError, match="labels hold -1 to 5; expected 0 to 4"):
        generator(sequences, torch.tensor([-1, 0, 1, 2, 3, 5]))
    with pytest.raises(ValueError, match="knows no classes"):
        Generator(KINDS["unlabelled"])(sequences, torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ValueError, match="codes hold"):
        generator(replace(sequences, codes=sequences.codes + 16), labels)
    falling, beyond = sequences.places.flip(1), sequences.places + 16
    for places in (falling, beyond):
        with pytest.raises(ValueError, match="places do not ascend within 0 to 15"):
            generator(replace(sequences, places=places), labels)
    with pytest.raises(ValueError, match="2 global tokens; expected 3"):
        generator(replace(sequences, global_indices=sequences.global_indices[:, :2]), labels)
    with pytest.raises(ValueError, match="expected at most 2, as trained"):
        Generator(replace(CONFIG, max_patch_tokens=2))(sequences, labels)
    with pytest.raises(ValueError, match="expected all 16"):
        Generator(replace(CONFIG, positions="derived"))(sequences, labels)


def test_sixteen_images_with_classes_of_their_own_are_learnt_by_heart() -> None:
    """Greedy sampling gives back the exact tokens of each class: positions, codes and lengths."""
    config = replace(CONFIG, classes=16)
    torch.manual_seed(0)
    generator = Generator(config)
    sequences, labels = sequences_of(config, batch=16, seed=3), torch.arange(16)
    optimizer = torch.optim.AdamW(generator.parameters(), 1e-3, weight_decay=0)
    for _ in range(300):
        loss = generator(sequences, labels).total().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    greedy = SamplingConfig(temperature=0, position_temperature=0)
    found = sample(generator.eval(), labels, labels, 0, greedy)
    assert torch.equal(found.global_indices, sequences.global_indices)
    assert torch.equal(found.counts, sequences.counts)
    assert torch.equal(found.places, sequences.places)
    assert torch.equal(found.codes, sequences.codes)
