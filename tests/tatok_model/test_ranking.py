"""The filter on a tokenizer: an untrained one, whose entropy model has been given large random weights."""

import dataclasses
from itertools import pairwise

import pytest
import torch

from tatok_model import TaTok, TokenizerConfig
from tatok_model.config import KeptSetConfig
from tatok_model.filtering_rules import SCORES

CONFIG = TokenizerConfig(
    image_size=32, patch_size=8, global_tokens=4, codebook_size=16, codebook_dim=8, entropy_width=32
)
CUTS = [("relative", 0.6), ("residual", 20.0), ("marginal", 3.0), ("count", 5.0)]


def opinionated(**changes):
    """Weights so large that predictions differ between positions and images."""
    torch.manual_seed(0)
    model = TaTok(dataclasses.replace(CONFIG, **changes)).train()
    model(torch.rand(8, 3, 32, 32))  # the codebook is drawn from data
    with torch.no_grad():
        for parameter in model.entropy_model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        if model.config.expected_fill:
            model.fill_gate.fill_(1.0)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return opinionated()


@pytest.fixture(scope="module")
def images():
    return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tokens(tokenizer, images):
    return tokenizer.encode(images)


def ranked(tokenizer, tokens, images, score, rounds=1):
    return tokenizer.rank(tokens, score, rounds, images)


@pytest.mark.parametrize(("score", "rounds"), [(name, 1) for name in SCORES] + [("surprisal", 4), ("entropy", 16)])
def test_a_ranking_holds_every_position_once_and_keeps_all(tokenizer, tokens, images, score, rounds):
    found = ranked(tokenizer, tokens, images, score, rounds)
    assert found.ranking.order.sort(1).values.tolist() == [list(range(16))] * 6
    assert (found.ranking.score, found.ranking.rounds) == (score, rounds)
    assert found.kept_mask.all()
    assert (found.ranking.score_units >= 0).all()


def test_surprisal_of_one_round_is_that_of_the_entropy_model(tokenizer, tokens):
    nothing = torch.zeros_like(tokens.kept_mask)
    logits = tokenizer.patch_logits(tokens, nothing, ~nothing).view(6, 16, 16)
    bits = -logits.log_softmax(-1).gather(-1, tokens.patch_indices[..., None]).squeeze(-1) / torch.log(
        torch.tensor(2.0)
    )
    ranking = tokenizer.rank(tokens).ranking
    torch.testing.assert_close(ranking.score_units / 1024, bits.gather(1, ranking.order), atol=1e-3, rtol=0)
    assert (ranking.score_units.diff(dim=1) <= 0).all()


def test_a_code_cannot_change_what_is_predicted_at_its_own_place(tokenizer, tokens):
    given = torch.rand(6, 16, generator=torch.Generator().manual_seed(3)) < 0.5
    other = dataclasses.replace(
        tokens, patch_indices=tokens.patch_indices.where(given, (tokens.patch_indices + 5) % 16)
    )
    before, after = (tokenizer.patch_logits(found, given, ~given) for found in (tokens, other))
    assert torch.equal(before, after)


def test_a_given_code_does_change_what_is_predicted_elsewhere(tokenizer, tokens):
    given = torch.arange(16).expand(6, 16) < 8
    other = dataclasses.replace(tokens, patch_indices=(tokens.patch_indices + 5) % 16)
    before, after = (tokenizer.patch_logits(found, given, ~given) for found in (tokens, other))
    assert not torch.allclose(before, after)


def test_hiding_the_global_tokens_hides_them(tokenizer, tokens):
    nothing = torch.zeros_like(tokens.kept_mask)
    everyone = torch.ones(6, dtype=torch.bool)
    other = dataclasses.replace(tokens, global_indices=(tokens.global_indices + 1) % 16)
    hidden = [tokenizer.patch_logits(found, nothing, ~nothing, everyone) for found in (tokens, other)]
    shown = [tokenizer.patch_logits(found, nothing, ~nothing) for found in (tokens, other)]
    assert torch.equal(*hidden)
    assert not torch.allclose(*shown)


@pytest.mark.parametrize("score", SCORES)
def test_permuting_a_batch_permutes_its_result(tokenizer, tokens, images, score):
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    together = ranked(tokenizer, tokens, images, score)
    permuted = ranked(tokenizer, tokens[order], images[order], score)
    assert torch.equal(together.ranking.order[order], permuted.ranking.order)
    cut = together.cut("count", 5)
    torch.testing.assert_close(
        tokenizer.decode(cut)[order], tokenizer.decode(permuted.cut("count", 5)), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(("rule", "threshold"), CUTS)
def test_lengths_do_not_depend_on_the_other_images_of_the_batch(tokenizer, images, rule, threshold):
    together = tokenizer.rank(tokenizer.encode(images)).cut(rule, threshold)
    for number in range(len(images)):
        alone = tokenizer.rank(tokenizer.encode(images[number : number + 1])).cut(rule, threshold)
        assert torch.equal(alone.kept_mask[0], together.kept_mask[number])


@pytest.mark.parametrize("score", ["surprisal", "entropy"])
def test_a_dropped_code_cannot_influence_the_picture(tokenizer, tokens, score):
    cut = tokenizer.rank(tokens, score).cut("count", 6)
    other = dataclasses.replace(cut, patch_indices=cut.patch_indices.where(cut.kept_mask, (cut.patch_indices + 7) % 16))
    assert not torch.equal(cut.patch_indices, other.patch_indices)
    assert torch.equal(tokenizer.decode(cut), tokenizer.decode(other))


def test_what_is_expected_at_dropped_places_reaches_the_picture(tokenizer, tokens, images):
    cut = tokenizer.rank(tokens).cut("count", 6)
    plain = opinionated(expected_fill=False)
    plain.load_state_dict(tokenizer.state_dict(), strict=False)
    assert not torch.allclose(tokenizer.decode(cut), plain.decode(cut), atol=1e-3)


def test_training_starts_without_the_expected_codes(images):
    torch.manual_seed(0)
    model = TaTok(CONFIG).eval()
    assert model.fill_gate.abs().max() == 0
    cut = model.rank(model.encode(images)).cut("count", 6)
    bare = TaTok(dataclasses.replace(CONFIG, expected_fill=False)).eval()
    bare.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model.decode(cut), bare.decode(cut))


def test_raising_tau_never_drops_a_token(tokenizer, tokens):
    found = tokenizer.rank(tokens)
    masks = [found.cut("relative", tau).kept_mask for tau in (0.0, 0.2, 0.5, 0.51, 0.9, 1.0)]
    assert not masks[0].any()
    assert masks[-1].all()
    for smaller, larger in pairwise(masks):
        assert (larger | ~smaller).all()


def test_code_lengths_add_up_over_any_schedule_of_one_token_a_round(tokenizer, tokens):
    cut = tokenizer.rank(tokens).cut("count", 3)
    schedule = torch.arange(16).expand(6, 16)
    expected = torch.zeros(6, dtype=torch.float64)
    for position in range(16):
        at = cut.kept_mask & (torch.arange(16) == position)
        logits = tokenizer.patch_logits(cut, cut.kept_mask & (torch.arange(16) < position), at)
        bits = torch.nn.functional.cross_entropy(logits, cut.patch_indices[at], reduction="none") / torch.log(
            torch.tensor(2.0)
        )
        expected.index_add_(0, at.nonzero()[:, 0], bits.double())
    torch.testing.assert_close(tokenizer.code_lengths(cut, schedule), expected, atol=1e-4, rtol=1e-5)


def test_no_kept_code_costs_nothing(tokenizer, tokens):
    none = tokenizer.rank(tokens).cut("count", 0)
    assert tokenizer.code_lengths(none, torch.zeros(6, 16, dtype=torch.int64)).tolist() == [0.0] * 6


@pytest.mark.parametrize(
    ("score", "rounds", "message"),
    [
        ("best", 1, "score is 'best'; expected one of surprisal, entropy"),
        ("surprisal", 17, "rounds is 17; expected 1 to 16"),
        ("grid", 2, "rounds is 2; expected 1 for the score 'grid'"),
        ("pixel_entropy", 1, "expected the images too"),
    ],
)
def test_rankings_that_cannot_be_are_refused(tokenizer, tokens, score, rounds, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.rank(tokens, score, rounds)


def test_tokens_that_are_cut_or_have_no_patches_are_not_ranked(tokenizer, tokens, images):
    with pytest.raises(ValueError, match="tokens are cut already"):
        tokenizer.rank(tokenizer.rank(tokens).cut("count", 3))
    torch.manual_seed(0)
    global_only = TaTok(dataclasses.replace(CONFIG, patch_tokens=False)).eval()
    with pytest.raises(ValueError, match="has only global tokens"):
        global_only.rank(global_only.encode(images))
    without = TaTok(dataclasses.replace(CONFIG, entropy_layers=0)).eval()
    with pytest.raises(ValueError, match="has no entropy model"):
        without.rank(without.encode(images))
    assert without.rank(without.encode(images), "grid").cut("count", 4).patch_counts.tolist() == [4] * 6


def test_gradients_of_a_training_step_reach_the_entropy_model_and_only_it_learns_from_its_loss(images):
    model = opinionated().train()
    uniforms = torch.rand(6, 20, generator=torch.Generator().manual_seed(5))
    uniforms[0] = 0  # keeps everything, and hides its global tokens from the entropy model
    output = model(images, None, uniforms, KeptSetConfig())
    output.code_bits.mean().backward()
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert reached == name.startswith("entropy_model."), name


@pytest.mark.parametrize("changes", [{"global_tokens": 0}, {"entropy_globals": False}])
def test_a_model_that_sees_no_global_tokens_has_no_idle_parameters(changes, images):
    """DDP stops at parameters that no loss reaches."""
    model = opinionated(**changes).train()
    output = model(images, None, torch.rand(6, 20, generator=torch.Generator().manual_seed(5)), KeptSetConfig())
    output.code_bits.mean().backward()
    idle = [name for name, p in model.named_parameters() if name.startswith("entropy_model.") and p.grad is None]
    assert idle == []


def test_ranking_under_autocast_leaves_the_gradients_of_the_entropy_model(images):
    model = opinionated().train()
    uniforms = torch.rand(6, 20, generator=torch.Generator().manual_seed(5))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images, None, uniforms, KeptSetConfig(all=0, none=0, random=0, blocks=0, filtered=1))
    output.code_bits.mean().backward()
    matrices = [p for name, p in model.entropy_model.named_parameters() if p.ndim == 2 and "global" not in name]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in matrices)


def test_the_reconstruction_loss_does_not_move_the_entropy_model(images):
    model = opinionated().train()
    uniforms = torch.rand(6, 20, generator=torch.Generator().manual_seed(5))
    uniforms[0] = 0  # keeps everything, and hides its global tokens from the entropy model
    output = model(images, None, uniforms, KeptSetConfig())
    (output.images.square().mean() + output.commitment_loss).backward()
    unreached = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert unreached == {name for name, _ in model.named_parameters() if name.startswith("entropy_model.")}


def test_nested_dropout_loses_a_tail_of_global_tokens(images):
    torch.manual_seed(0)
    model = TaTok(dataclasses.replace(CONFIG, patch_tokens=False)).train()
    mix = KeptSetConfig(all=0, none=1, random=0, blocks=0, filtered=0, global_tail=1.0)
    counts = model(images, None, torch.rand(6, 20), mix).tokens.global_counts
    assert ((counts >= 1) & (counts <= 4)).all()
    model.eval()
    whole = model.encode(images)
    short = dataclasses.replace(whole, global_counts=torch.full((6,), 2))
    other = dataclasses.replace(
        short, global_indices=torch.cat([whole.global_indices[:, :2], whole.global_indices[:, 2:] ^ 1], 1)
    )
    assert short.counts().tolist() == [2] * 6
    assert torch.equal(model.decode(short), model.decode(other))
    assert not torch.equal(model.decode(short), model.decode(whole))
