"""The decoder's trunk: leading blocks that run on the tokens that are there, as if the others did not exist."""

import json
from dataclasses import replace

import pytest
import torch
from einops import repeat

from tatok_model import TaTok, TokenizerConfig, vit
from tatok_model.config import KeptSetConfig
from tatok_model.tokens import Tokens
from tatok_model.vit import Block, run_on_present, unpatchify

WIDTH, PLACES = 32, 9
LENGTHS = [0, 1, 5, 9, 15, 16]


@pytest.fixture(scope="module")
def blocks():
    """Two blocks that change what they see a lot."""
    torch.manual_seed(0)
    found = torch.nn.ModuleList(Block(WIDTH, 2) for _ in range(2))
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return found.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def sequences():
    """(B, L, D) and (B, L) of which none, one, some and all are there."""
    generator = torch.Generator().manual_seed(1)
    counts = torch.tensor([9, 0, 3, 8, 1, 3, 5, 0, 9, 2])
    places = torch.rand(len(counts), PLACES, generator=generator).argsort(dim=1)
    return torch.randn(len(counts), PLACES, WIDTH, generator=generator), places < counts[:, None]


def one_by_one(blocks, x, present):
    """What a trunk is: every sequence alone, without what is not there."""
    rows = []
    for row, there in zip(x, present, strict=True):
        tokens = row[there][None]
        if there.any():
            for block in blocks:
                tokens = block(tokens)
        rows.append(row.masked_scatter(there[:, None], tokens))
    return torch.stack(rows)


@pytest.mark.parametrize("parts", [1, 2, 4, 100])
def test_sequences_run_together_as_each_runs_alone(blocks, sequences, parts, monkeypatch):
    monkeypatch.setattr(vit, "CPU_PARTS", parts)
    x, present = sequences
    found, expected = run_on_present(blocks, x, present), one_by_one(blocks, x, present)
    assert found.isfinite().all()
    torch.testing.assert_close(found[present], expected[present], atol=2e-5, rtol=1e-5)
    assert (found[present] - x[present]).abs().mean() > 0.1


def test_what_stands_where_no_token_is_changes_nothing_where_one_is(blocks, sequences):
    x, present = sequences
    other = x.where(present[..., None], torch.randn(x.shape, generator=torch.Generator().manual_seed(2)) * 10)
    before, after = run_on_present(blocks, x, present), run_on_present(blocks, other, present)
    assert torch.equal(before[present], after[present])


def test_every_token_that_is_there_is_seen_by_the_others(blocks, sequences):
    x, present = sequences
    other = x.clone()
    other[3, present[3].nonzero()[-1]] *= -1
    before, after = run_on_present(blocks, x, present), run_on_present(blocks, other, present)
    changed = (before - after).abs().amax(-1)
    assert (changed[3][present[3]] > 1e-3).all()
    changed[3] = 0
    assert not changed[present].any()


def test_with_every_token_there_the_blocks_just_run(blocks, sequences):
    x, present = sequences
    expected = x
    for block in blocks:
        expected = block(expected)
    assert torch.equal(run_on_present(blocks, x, torch.ones_like(present)), expected)


@pytest.mark.parametrize("parts", [1, 4])
def test_gradients_are_those_of_sequences_run_alone(blocks, sequences, parts, monkeypatch):
    monkeypatch.setattr(vit, "CPU_PARTS", parts)
    (x, present), found = sequences, []
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(4)) * present[..., None]
    for run in (run_on_present, one_by_one):
        inputs = x.clone().requires_grad_()
        parameter = blocks[0].attention.to_qkv.weight.clone().requires_grad_()
        patched = replaced(blocks, parameter)
        (run(patched, inputs, present) * weights).sum().backward()
        found.append((inputs.grad[present], parameter.grad))
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-4)
    assert found[0][1].abs().max() > 0.1


def replaced(blocks, weight):
    """The blocks with another first weight of the first attention, which may carry gradients."""

    def first(x, key_mask=None):
        named = {"attention.to_qkv.weight": weight}
        return torch.func.functional_call(blocks[0], named, (x, key_mask))

    return [first, blocks[1]]


def test_nothing_is_shared_between_empty_sequences_and_full_ones(blocks):
    """A batch without any token, and one with a single place."""
    x = torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(5))
    assert run_on_present(blocks, x, torch.zeros(3, 4, dtype=torch.bool)).isfinite().all()
    single = run_on_present(blocks, x[:, :1], torch.tensor([[True], [False], [True]]))
    alone = one_by_one(blocks, x[:, :1], torch.tensor([[True], [False], [True]]))
    torch.testing.assert_close(single[[0, 2]], alone[[0, 2]], atol=2e-5, rtol=1e-5)


def kept_of(lengths):
    """(B, 16) bool: a random set of each length."""
    places = torch.rand(len(lengths), 16, generator=torch.Generator().manual_seed(6)).argsort(dim=1)
    return places < torch.tensor(lengths)[:, None]


def by_hand(model, tokens, trunk):
    """The decoder, one image after the other, without anything that a trunk's batches need."""
    m, codes = model.config.global_tokens, model.code_vectors()[1]
    pictures = []
    for number in range(len(tokens)):
        image = tokens[[number]]
        kept = image.kept_mask[0]
        said = m if image.global_counts is None else int(image.global_counts)
        known = model.mask_token.new_zeros(1, 0, len(model.mask_token))
        if m:
            known = repeat(model.mask_token, "d -> 1 m d", m=m).clone()
            known[:, :said] = model._global_quantizer.embed(image.global_indices)[:, :said]
        slots = repeat(model.mask_token, "d -> 1 n d", n=16).clone()
        if model.entropy_model is not None and model.config.expected_fill and not kept.all():
            q = model.patch_logits(image, image.kept_mask, ~image.kept_mask).softmax(-1)
            slots[0, ~kept] += model.fill_gate * model.from_expected(q @ codes)
        if kept.any():
            slots[0, kept] = model.patch_quantizer.embed(image.patch_indices)[0, kept]
        x = torch.cat([known + model.global_positions, slots + model.decoder_positions], dim=1)
        there = torch.cat([torch.arange(m) < said, kept])
        x = one_by_one(model.decoder.blocks[:trunk], x, there[None])
        for block in model.decoder.blocks[trunk:]:
            x = block(x)
        patches = model.to_pixels(model.decoder.norm(x)[:, m:])
        pictures.append((unpatchify(patches, 8) + 1) / 2)
    return torch.cat(pictures).clamp(0, 1)


VARIANTS = {
    "both kinds": {},
    "patch tokens only": {"global_tokens": 0},
    "no expected codes": {"expected_fill": False},
    "no entropy model": {"entropy_layers": 0},
}


@pytest.fixture(scope="module", params=[0, 2, 3], ids=["no trunk", "trunk of 2", "trunk of 3"])
def trunk(request):
    return request.param


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def tokenizer(request, trunk, opinionated):
    return opinionated(trunk_layers=trunk, **request.param)


@pytest.fixture(scope="module")
def tokens(tokenizer, images):
    """Nothing, something and everything kept."""
    return tokenizer.encode(images, kept_of(LENGTHS))


@torch.no_grad()
def test_pictures_are_those_of_a_decoder_written_out_by_hand(tokenizer, trunk, tokens):
    pictures = tokenizer.decode(tokens)
    torch.testing.assert_close(pictures, by_hand(tokenizer, tokens, trunk), atol=1e-5, rtol=0)
    if trunk:
        assert (pictures[:-1] - by_hand(tokenizer, tokens, 0)[:-1]).abs().amax() > 1e-4  # a trunk is no matter of speed


def test_a_picture_does_not_depend_on_the_other_lengths_of_its_batch(tokenizer, tokens):
    together = tokenizer.decode(tokens)
    assert together.isfinite().all()
    for number in range(len(tokens)):
        torch.testing.assert_close(tokenizer.decode(tokens[[number]])[0], together[number], atol=1e-5, rtol=0)
        twice = tokenizer.decode(tokens[[number, number]])
        torch.testing.assert_close(twice[1], together[number], atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", [{}, {"global_tokens": 0}])
@torch.no_grad()
def test_without_a_trunk_pictures_are_bit_for_bit_those_of_the_network_before(opinionated, images, changes):
    """Everything in one sequence, all blocks, the norm."""
    model = opinionated(expected_fill=False, **changes)
    tokens, m = model.encode(images, kept_of(LENGTHS)), model.config.global_tokens
    known = model._global_quantizer.embed(tokens.global_indices) if m else torch.zeros(6, 0, 192)
    patches = model.patch_quantizer.embed(tokens.patch_indices.where(tokens.kept_mask, 0))
    slots = patches.where(tokens.kept_mask[..., None], model.mask_token)
    x = torch.cat([known + model.global_positions, slots + model.decoder_positions], dim=1)
    pixels = model.to_pixels(model.decoder(x)[:, m:])
    assert torch.equal(model.decode(tokens), ((unpatchify(pixels, 8) + 1) / 2).clamp(0, 1))


def test_where_everything_is_kept_a_trunk_changes_nothing(opinionated, images):
    plain, with_trunk = opinionated(), opinionated(trunk_layers=3)
    tokens = plain.encode(images)
    assert torch.equal(plain.decode(tokens), with_trunk.decode(tokens))


@torch.no_grad()
def test_pictures_of_global_tokens_alone_come_from_a_trunk_too(opinionated, images):
    model = opinionated(trunk_layers=2, patch_tokens=False)
    tokens = model.encode(images)
    torch.testing.assert_close(model.decode(tokens), by_hand(model, tokens, 2), atol=1e-5, rtol=0)


def test_a_checkpoint_from_before_there_were_trunks_loads_and_decodes_alike(opinionated, images, tmp_path):
    model = opinionated()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved.pop("trunk_layers") == 0
    (tmp_path / "config.json").write_text(json.dumps(saved))
    loaded = TaTok.from_pretrained(tmp_path)
    assert loaded.config.trunk_layers == 0
    tokens = model.encode(images, kept_of(LENGTHS))
    assert torch.equal(loaded.decode(tokens), model.decode(tokens))


@pytest.mark.parametrize("trunk", [2, 3])
def test_mask_tokens_and_expected_codes_do_not_reach_the_trunk(opinionated, images, trunk):
    """What the first block behind the trunk gets: the same at places of tokens, another where there are none."""
    model, seen = opinionated(trunk_layers=trunk), []
    tokens = model.encode(images, kept_of(LENGTHS))
    there = torch.cat([torch.ones(6, 4, dtype=torch.bool), tokens.kept_mask], dim=1)
    model.decoder.blocks[trunk].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
    pictures = [model.decode(tokens)]
    with torch.no_grad():
        for changed in (model.mask_token, model.fill_gate, model.from_expected.weight):
            changed.copy_(torch.randn(changed.shape, generator=torch.Generator().manual_seed(7)))
            pictures.append(model.decode(tokens))
    for after in seen[1:]:
        assert torch.equal(after[there], seen[0][there])
        assert not torch.isclose(after[~there], seen[0][~there]).all(dim=-1).any()
    for after in pictures[1:]:
        assert not torch.allclose(after[0], pictures[0][0], atol=1e-3)
        torch.testing.assert_close(after[-1], pictures[0][-1], atol=1e-6, rtol=0)  # everything kept


@pytest.mark.parametrize("trunk", [0, 2, 3])
@torch.no_grad()
def test_dropped_global_tokens_are_not_there_either(opinionated, images, trunk):
    model = opinionated(trunk_layers=trunk, expected_fill=False)
    whole = model.encode(images, kept_of(LENGTHS))
    short = replace(whole, global_counts=torch.tensor([0, 1, 2, 3, 4, 2]))
    dropped = torch.arange(4) >= short.global_counts[:, None]
    other = replace(short, global_indices=(whole.global_indices + 5 * dropped) % 16)
    assert torch.equal(model.decode(short), model.decode(other))
    torch.testing.assert_close(model.decode(short), by_hand(model, short, trunk), atol=1e-5, rtol=0)
    all_said = replace(whole, global_counts=torch.full((6,), 4))
    torch.testing.assert_close(model.decode(all_said), model.decode(whole), atol=1e-6, rtol=0)


def step(model, images, mix):
    """Gradients of a training step by parameter name."""
    uniforms = torch.rand(6, 20, generator=torch.Generator().manual_seed(5))
    uniforms[0] = 0  # the first of the kinds; everything, with hidden global tokens, in the default mix
    output = model(images, None, uniforms, mix)
    loss = (output.images - images).square().mean() + output.commitment_loss
    (loss + output.code_bits.mean()).backward()
    assert loss.isfinite()
    return output, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("global_tokens", [4, 0])
@pytest.mark.parametrize("trunk", [1, 2, 3])
def test_gradients_reach_every_parameter(opinionated, images, trunk, global_tokens):
    model = opinionated(trunk_layers=trunk, global_tokens=global_tokens).train()
    _, gradients = step(model, images, KeptSetConfig())
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()] == []
    idle = [name for name, gradient in gradients.items() if gradient.numel() and not gradient.any()]
    assert idle == []


@pytest.mark.parametrize("global_tokens", [4, 0])
@pytest.mark.parametrize("trunk", [2, 3])
def test_where_a_whole_batch_keeps_nothing_no_parameter_is_left_without_a_gradient(
    opinionated, images, trunk, global_tokens
):
    """DDP stops at one; a trunk of a model without global tokens then has nothing to look at."""
    model = opinionated(trunk_layers=trunk, global_tokens=global_tokens).train()
    nothing = KeptSetConfig(all=0, none=1, random=0, blocks=0, filtered=0)
    output, gradients = step(model, images, nothing)
    assert not output.tokens.kept_mask.any()
    assert output.images.isfinite().all()
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()] == []
    reached = [name for name in gradients if name.startswith("decoder.blocks.0.") and gradients[name].any()]
    assert bool(reached) == (global_tokens > 0)


@pytest.mark.parametrize("global_tokens", [4, 0])
@pytest.mark.parametrize("lengths", [LENGTHS, [0] * 6, [0, 0, 0, 1, 1, 16]])
def test_in_bfloat16_an_image_of_no_token_leaves_every_gradient_a_number(opinionated, images, global_tokens, lengths):
    """Attention to nothing is not a number there, and a gradient of 0 times that is none either."""
    model = opinionated(trunk_layers=3, global_tokens=global_tokens).train()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images, kept_of(lengths))
    assert output.images.isfinite().all()
    (output.images.float() - images).square().mean().backward()
    decoder = {name: p.grad for name, p in model.named_parameters() if name.startswith("decoder.")}
    assert [name for name, gradient in decoder.items() if gradient is None or not gradient.isfinite().all()] == []


def test_under_autocast_a_trunk_decodes_what_it_decodes_without(opinionated, images):
    model = opinionated(trunk_layers=3)
    tokens = model.encode(images, kept_of(LENGTHS))
    plain = model.decode(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.decode(tokens)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain, atol=0.02, rtol=0)


def test_learning_through_a_trunk_lowers_the_error_of_every_length(images):
    torch.manual_seed(0)
    config = TokenizerConfig(
        image_size=32, patch_size=8, size="nano", trunk_layers=3, global_tokens=4, codebook_size=16, codebook_dim=8,
        entropy_layers=0,
    )  # fmt: skip
    model = TaTok(config).train()
    blurred = torch.nn.functional.avg_pool2d(images, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    targets = (blurred - 0.5) * 4 + 0.5
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    kept, losses = kept_of(LENGTHS), []
    for _ in range(60):
        output = model(targets, kept)
        error = (output.images - targets).square().mean(dim=(1, 2, 3))
        optimizer.zero_grad()
        (error.mean() + output.commitment_loss).backward()
        optimizer.step()
        losses.append(error.detach())
    assert (losses[-1] < 0.7 * losses[0]).all()


@pytest.mark.parametrize("trunk", [0, 3])
def test_a_batch_of_no_images_decodes_to_none(opinionated, trunk):
    model = opinionated(trunk_layers=trunk)
    empty = Tokens(torch.zeros(0, 4).long(), torch.zeros(0, 16).long(), torch.zeros(0, 16).bool())
    assert model.decode(empty).shape == (0, 3, 32, 32)
