"""The filter on a tokenizer: an untrained one, whose entropy model has been given large random weights."""

import dataclasses
import math

import pytest
import torch

from tatok_model import TaTok
from tatok_model.config import BY_MODEL, KeptSetConfig
from tatok_model.config import ORDERS as CONFIGURED
from tatok_model.filtering_rules import SCORES, QualityLine
from tatok_model.kept_sets import draw
from tatok_model.ranking import FIXED_UNITS, KNOWN_ORDERS, Models, rank, training_places
from tatok_model.tokens import Tokens

RESOLUTIONS = {"distortion": 2**16, "error": 2**20, "surprisal": 1024, "entropy": 1024}  # steps in a unit
IN_ROUNDS = list(RESOLUTIONS)


@pytest.fixture(scope="module", params=[0, 3], ids=["no trunk", "trunk of 3"])
def tokenizer(request, opinionated):
    return opinionated(trunk_layers=request.param)


@pytest.fixture(scope="module")
def tokens(tokenizer, images):
    return tokenizer.encode(images)


def ranked(tokenizer, tokens, images, score, rounds=1):
    return tokenizer.rank(tokens, score, rounds, images)


@pytest.mark.parametrize(
    ("score", "rounds"),
    [(name, 1) for name in SCORES] + [("distortion", 2), ("error", 4), ("surprisal", 4), ("entropy", 16)],
)
def test_a_ranking_holds_every_position_once_and_keeps_all(tokenizer, tokens, images, score, rounds):
    found = ranked(tokenizer, tokens, images, score, rounds)
    assert found.ranking.order.sort(1).values.tolist() == [list(range(16))] * 6
    assert (found.ranking.score, found.ranking.rounds) == (score, rounds)
    assert found.kept_mask.all()
    assert (found.ranking.score_units >= 0).all()


def test_every_score_that_asks_no_model_is_in_the_table_that_its_entry_names():
    alone = {name: score.known_to_decoder for name, score in SCORES.items() if not score.in_rounds}
    assert KNOWN_ORDERS.keys() == {name for name, known in alone.items() if known}
    assert FIXED_UNITS.keys() == {name for name, known in alone.items() if not known}
    assert not any(SCORES[name].unit for name in KNOWN_ORDERS)


def test_training_knows_every_order_that_a_ranking_has_but_random():
    assert set(ORDERS) == SCORES.keys() - {"random"}
    assert set(BY_MODEL) == {"distortion", "surprisal", "entropy", "filter"}


def what_a_score_is(tokenizer, tokens, images, score, placed):
    """(B, N) values in the score's unit, by the definition, from whole logits and whole pictures."""
    if score == "error":
        wrong = (tokenizer.decode(dataclasses.replace(tokens, kept_mask=placed)) - images).square().mean(dim=1)
        return torch.nn.functional.avg_pool2d(wrong[:, None], 8).flatten(1)
    codes = tokenizer.code_vectors()[1]
    values = torch.zeros(placed.shape)
    q = tokenizer.patch_logits(tokens, placed, ~placed).double().softmax(-1)
    true = tokens.patch_indices[~placed]
    if score == "distortion":
        open_values = (codes[true] - q @ codes.double()).square().sum(-1)
    elif score == "surprisal":
        open_values = -q.gather(-1, true[:, None])[:, 0].log2()
    else:
        open_values = torch.special.entr(q).sum(-1) / math.log(2)
    return values.masked_scatter(~placed, open_values.float())


@pytest.mark.parametrize("rounds", [1, 2, 4, 16])
@pytest.mark.parametrize("score", IN_ROUNDS)
def test_every_round_scores_what_is_open_given_what_is_placed(tokenizer, tokens, images, score, rounds):
    """One round: given the global tokens alone. Of two rounds the second half is scored given the first half."""
    ranking = ranked(tokenizer, tokens, images, score, rounds).ranking
    placed, size = torch.zeros_like(tokens.kept_mask), 16 // rounds
    for start in range(0, 16, size):
        expected = what_a_score_is(tokenizer, tokens, images, score, placed)
        here = ranking.order[:, start : start + size]
        found = ranking.score_units[:, start : start + size] / RESOLUTIONS[score]
        step = 1.01 / RESOLUTIONS[score]
        torch.testing.assert_close(found, expected.gather(1, here), atol=max(step, 1e-6), rtol=1e-6)
        assert (found.diff(dim=1) <= 0).all()
        placed = placed.scatter(1, here, True)
        left = expected.masked_fill(placed, -1).amax(dim=1)
        assert (left <= found[:, -1] + step).all()  # no better one was passed over
    assert placed.all()


@pytest.mark.parametrize("score", IN_ROUNDS)
def test_what_is_placed_changes_the_scores_of_what_is_open(tokenizer, tokens, images, score):
    once, twice = (ranked(tokenizer, tokens, images, score, rounds).ranking for rounds in (1, 2))
    assert torch.equal(once.order[:, :8], twice.order[:, :8])
    assert torch.equal(once.score_units[:, :8], twice.score_units[:, :8])
    assert (once.score_units[:, 8:] - twice.score_units[:, 8:]).abs().max() > RESOLUTIONS[score] / 1000


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


def test_what_is_expected_at_dropped_places_reaches_the_picture(tokenizer, tokens, images, opinionated):
    cut = tokenizer.rank(tokens).cut("count", 6)
    plain = opinionated(expected_fill=False, trunk_layers=tokenizer.config.trunk_layers)
    plain.load_state_dict(tokenizer.state_dict(), strict=False)
    assert not torch.allclose(tokenizer.decode(cut), plain.decode(cut), atol=1e-3)


def test_training_starts_without_the_expected_codes(images, config):
    torch.manual_seed(0)
    model = TaTok(config).eval()
    assert model.fill_gate.abs().max() == 0
    cut = model.rank(model.encode(images)).cut("count", 6)
    bare = TaTok(dataclasses.replace(config, expected_fill=False)).eval()
    bare.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model.decode(cut), bare.decode(cut))


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
        ("best", 1, "score is 'best'; expected one of distortion, error, surprisal, entropy, pixel_entropy, random"),
        *((score, rounds, f"rounds is {rounds}; expected 1 to 16") for score in IN_ROUNDS for rounds in (0, 17)),
        ("grid", 2, "rounds is 2; expected 1 for the score 'grid'"),
        ("pixel_entropy", 1, "score is 'pixel_entropy'; expected the images too"),
        ("error", 1, "score is 'error'; expected the images too, to see how wrong they get"),
        ("error", 4, "score is 'error'; expected the images too"),
    ],
)
def test_rankings_that_cannot_be_are_refused(tokenizer, tokens, score, rounds, message):
    with pytest.raises(ValueError, match=message) as caught:
        tokenizer.rank(tokens, score, rounds)
    assert "\n" not in str(caught.value)


def test_tokens_that_are_cut_or_have_no_patches_are_not_ranked(tokenizer, tokens, images, config):
    with pytest.raises(ValueError, match="tokens are cut already"):
        tokenizer.rank(tokenizer.rank(tokens).cut("count", 3))
    torch.manual_seed(0)
    global_only = TaTok(dataclasses.replace(config, patch_tokens=False)).eval()
    with pytest.raises(ValueError, match="has only global tokens"):
        global_only.rank(global_only.encode(images))
    without = TaTok(dataclasses.replace(config, entropy_layers=0)).eval()
    with pytest.raises(ValueError, match="has no entropy model"):
        without.rank(without.encode(images))
    assert without.rank(without.encode(images), "grid").cut("count", 4).patch_counts.tolist() == [4] * 6


def test_error_asks_the_decoder_and_no_entropy_model(images, opinionated):
    without = opinionated(entropy_layers=0)
    tokens = without.encode(images)
    found = without.rank(tokens, "error", images=images).ranking
    nothing = torch.zeros_like(tokens.kept_mask)
    expected = what_a_score_is(without, tokens, images, "error", nothing)
    torch.testing.assert_close(found.score_units / 2**20, expected.gather(1, found.order), atol=1.01 / 2**20, rtol=0)


def test_error_is_the_same_of_bytes_and_of_floats(tokenizer, images):
    levels = (images * 255).round()
    tokens = tokenizer.encode(levels / 255)
    from_bytes, from_floats = (
        tokenizer.rank(tokens, "error", images=found).ranking for found in (levels.to(torch.uint8), levels / 255)
    )
    assert torch.equal(from_bytes.order, from_floats.order)
    assert torch.equal(from_bytes.score_units, from_floats.score_units)


@pytest.mark.parametrize("score", ["error", "pixel_entropy"])
def test_images_of_another_batch_are_refused(tokenizer, tokens, images, score):
    with pytest.raises(ValueError, match="images"):
        tokenizer.rank(tokens, score, images=images[:1])


def test_tokens_are_ranked_by_distortion_unless_another_score_is_named(tokenizer, tokens):
    found, named = tokenizer.rank(tokens).ranking, tokenizer.rank(tokens, "distortion", 1).ranking
    assert (found.score, found.rounds) == ("distortion", 1)
    assert torch.equal(found.order, named.order)
    assert torch.equal(found.score_units, named.score_units)


def test_a_ranking_carries_the_line_of_its_score_and_rounds_and_no_other(opinionated, images):
    model = opinionated()
    tokens = model.encode(images)
    lines = [QualityLine("distortion", 1, 0.01, 0.1), QualityLine("distortion", 4, 0.02, 0.1)]
    lines += [QualityLine("error", 1, 0.03, 0.1)]
    model.quality_lines = tuple(lines)
    assert model.rank(tokens).ranking.line == lines[0]
    assert model.rank(tokens, rounds=4).ranking.line == lines[1]
    assert model.rank(tokens, "error", images=images).ranking.line == lines[2]
    assert model.rank(tokens, rounds=2).ranking.line is None
    for score in ("surprisal", "entropy", "pixel_entropy", "grid"):
        assert model.rank(tokens, score, images=images).ranking.line is None
    assert model.rank(tokens)[[1, 2]].to("cpu").ranking.line == lines[0]


def test_gradients_of_a_training_step_reach_the_entropy_model_and_only_it_learns_from_its_loss(images, opinionated):
    model = opinionated().train()
    uniforms = torch.rand(6, 20, generator=torch.Generator().manual_seed(5))
    uniforms[0] = 0  # keeps everything, and hides its global tokens from the entropy model
    output = model(images, None, uniforms, KeptSetConfig())
    output.code_bits.mean().backward()
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert reached == name.startswith("entropy_model."), name


@pytest.mark.parametrize("changes", [{"global_tokens": 0}, {"entropy_globals": False}])
def test_a_model_that_sees_no_global_tokens_has_no_idle_parameters(changes, images, opinionated):
    """DDP stops at parameters that no loss reaches."""
    model = opinionated(**changes).train()
    output = model(images, None, torch.rand(6, 20, generator=torch.Generator().manual_seed(5)), KeptSetConfig())
    output.code_bits.mean().backward()
    idle = [name for name, p in model.named_parameters() if name.startswith("entropy_model.") and p.grad is None]
    assert idle == []


def test_ranking_under_autocast_leaves_the_gradients_of_the_entropy_model(images, opinionated):
    model = opinionated().train()
    uniforms = torch.rand(6, 20, generator=torch.Generator().manual_seed(5))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images, None, uniforms, KeptSetConfig(all=0, none=0, random=0, blocks=0, filtered=1))
    output.code_bits.mean().backward()
    matrices = [p for name, p in model.entropy_model.named_parameters() if p.ndim == 2 and "global" not in name]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in matrices)


def test_the_reconstruction_loss_does_not_move_the_entropy_model(images, opinionated):
    model = opinionated().train()
    uniforms = torch.rand(6, 20, generator=torch.Generator().manual_seed(5))
    uniforms[0] = 0  # keeps everything, and hides its global tokens from the entropy model
    output = model(images, None, uniforms, KeptSetConfig())
    (output.images.square().mean() + output.commitment_loss).backward()
    unreached = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert unreached == {name for name, _ in model.named_parameters() if name.startswith("entropy_model.")}


def test_nested_dropout_loses_a_tail_of_global_tokens(images, config):
    torch.manual_seed(0)
    model = TaTok(dataclasses.replace(config, patch_tokens=False)).train()
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


ORDERS = [order for order in CONFIGURED if order != "filter"]


@pytest.mark.parametrize("order", ORDERS)
def test_training_keeps_prefixes_of_the_ranking_that_will_be_used(tokenizer, tokens, images, order):
    uniforms = torch.rand(6, 20, generator=torch.Generator().manual_seed(7))
    uniforms[0, 1], uniforms[1, 1] = 0.0, 0.999  # none and all but one are lengths too
    mix = KeptSetConfig(all=0, none=0, random=0, blocks=0, filtered=1, order=order)
    with torch.no_grad():
        kept = tokenizer(images, None, uniforms, mix).tokens.kept_mask
    ranking = ranked(tokenizer, tokens, images, order).ranking
    for image, uniform in enumerate(uniforms[:, 1].tolist()):
        prefix = ranking.order[image, : int(uniform * 16)].tolist()
        assert kept[image].nonzero()[:, 0].tolist() == sorted(prefix)


def test_ties_of_errors_go_to_the_earlier_patch_in_training_too():
    """Errors that are the same whole number of steps: `rank` keeps raster order."""
    tokens = Tokens(torch.zeros(1, 0).long(), torch.zeros(1, 4).long(), torch.ones(1, 4, dtype=torch.bool))
    images = torch.zeros(1, 3, 2, 2)
    pictures = torch.tensor([0.5, 0.5 + 1e-7, 0.9, 0.5 + 2e-7]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    models = Models(lambda *_: pytest.fail("no entropy model is asked"), lambda _: pictures, torch.zeros(1, 1), 1)
    mix = KeptSetConfig(all=0, none=0, random=0, blocks=0, filtered=1, order="error")
    wanted = draw(torch.full((1, 8), 0.5), mix, True)
    order = rank(tokens, "error", 1, models, images).order
    assert order.tolist() == [[2, 0, 1, 3]]
    assert training_places(tokens, images, wanted, mix, models).argsort(dim=1).tolist() == order.tolist()


@pytest.mark.parametrize("order", ORDERS)
def test_only_samples_that_need_a_ranking_have_places_in_it(tokenizer, tokens, images, order):
    uniforms = torch.rand(6, 20, generator=torch.Generator().manual_seed(8))
    uniforms[:, 0] = torch.tensor([0.9, 0.1, 0.3, 0.99, 0.1, 0.7])  # filtered, all, random, filtered, all, blocks
    uniforms[1, 2:4], uniforms[4, 2:4] = torch.tensor([0.9, 0.1]), torch.tensor([0.9, 0.9])  # its own set; a random one
    mix = KeptSetConfig(order=order)
    with torch.no_grad():
        places = training_places(tokens, images, draw(uniforms, mix, True), mix, tokenizer._models())
    ranking = ranked(tokenizer, tokens, images, order).ranking
    for image in (0, 1, 3):
        assert places[image, ranking.order[image]].tolist() == list(range(16))
    assert not places[[2, 4, 5]].any()


def test_the_mixed_order_ranks_every_sample_by_surprisal_or_by_entropy(tokenizer, tokens, images):
    uniforms = torch.rand(6, 20, generator=torch.Generator().manual_seed(9))
    uniforms[:, 3] = torch.tensor([0.1, 0.3, 0.6, 0.8, 0.3, 0.1])  # surprisal, entropy, surprisal, entropy, ...
    mix = KeptSetConfig(all=0, none=0, random=0, blocks=0, filtered=1, order="filter")
    with torch.no_grad():
        places = training_places(tokens, images, draw(uniforms, mix, True), mix, tokenizer._models())
    for image, score in enumerate(["surprisal", "entropy", "surprisal", "entropy", "entropy", "surprisal"]):
        order = ranked(tokenizer, tokens, images, score).ranking.order
        assert places[image, order[image]].tolist() == list(range(16))


@pytest.mark.parametrize("order", ["distortion", "error"])
def test_without_an_entropy_model_only_orders_that_ask_it_become_random(opinionated, images, order):
    model = opinionated(entropy_layers=0)
    uniforms = torch.rand(6, 20, generator=torch.Generator().manual_seed(7))
    mix = KeptSetConfig(all=0, none=0, random=0, blocks=0, filtered=1, order=order)
    with torch.no_grad():
        kept = model(images, None, uniforms, mix).tokens.kept_mask
    counts = (uniforms[:, 1] * 16).long()
    first = uniforms[:, 4:].argsort(dim=1)
    if order == "error":
        first = model.rank(model.encode(images), "error", images=images).ranking.order
    for image in range(6):
        assert kept[image].nonzero()[:, 0].tolist() == sorted(first[image, : counts[image]].tolist())


@pytest.mark.parametrize("order", ["distortion", "error"])
def test_ranking_under_autocast_in_training_mode_leaves_gradients_and_weights_as_they_were(images, order, opinionated):
    model = opinionated(trunk_layers=2).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    uniforms = torch.rand(6, 20, generator=torch.Generator().manual_seed(5))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(
            images, None, uniforms, KeptSetConfig(all=0, none=0, random=0, blocks=0, filtered=1, order=order)
        )
    (output.images.float().square().mean() + output.code_bits.mean() + output.commitment_loss).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        if name.startswith("decoder.") or (parameter.ndim == 2 and name.startswith("entropy_model.transformer")):
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
