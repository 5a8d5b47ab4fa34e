import pytest
import torch

from tatok_model.config import ORDERS, KeptSetConfig
from tatok_model.kept_sets import LANES, draw, kept_sets

B, N = 4000, 16
DEFAULT = KeptSetConfig()


@pytest.fixture(scope="module")
def uniforms():
    return torch.rand(B, LANES + N, generator=torch.Generator().manual_seed(0))


def sets(uniforms, config=DEFAULT, filtering=True):
    wanted = draw(uniforms, config, filtering)
    ranked = torch.arange(N).flip(0).expand(len(uniforms), N)  # the last position first
    return wanted, kept_sets(wanted, ranked)


def test_shares_are_those_of_the_configuration(uniforms):
    wanted, found = sets(uniforms)
    assert wanted.everything.float().mean().item() == pytest.approx(0.15, abs=0.02)
    assert wanted.nothing.float().mean().item() == pytest.approx(0.05, abs=0.02)
    assert wanted.blocks.float().mean().item() == pytest.approx(0.15, abs=0.02)
    assert wanted.filtered.float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert found.without_globals.float().mean().item() == pytest.approx(0.10, abs=0.02)
    assert wanted.by_entropy.float().mean().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("order", "share"), [("filter", 0.5), ("surprisal", 0.0), ("entropy", 1.0)])
def test_prefixes_are_ranked_by_the_scores_that_are_wanted(uniforms, order, share):
    wanted, _ = sets(uniforms, KeptSetConfig(order=order))
    assert wanted.by_entropy.float().mean().item() == pytest.approx(share, abs=0.03)


def test_training_keeps_prefixes_by_distortion_unless_another_order_is_named():
    assert DEFAULT.order == "distortion"


@pytest.mark.parametrize("order", ORDERS)
def test_no_order_changes_which_samples_are_drawn_a_prefix_or_how_long(uniforms, order):
    (reference, _), (wanted, found) = sets(uniforms), sets(uniforms, KeptSetConfig(order=order))
    for name in ("everything", "nothing", "blocks", "filtered", "own_set", "sizes", "without_globals", "noise"):
        assert torch.equal(getattr(wanted, name), getattr(reference, name)), name
    assert torch.equal(found.kept_mask[wanted.filtered].sum(1), wanted.sizes[wanted.filtered])


def test_every_length_is_drawn_alike(uniforms):
    wanted, found = sets(uniforms)
    free = ~(wanted.everything | wanted.nothing)
    counts = found.kept_mask[free].sum(1)
    share = torch.bincount(counts, minlength=N + 1) / len(counts)
    assert share[N] == 0  # keeping everything is a kind of its own
    assert (share[:N] - 1 / N).abs().max() < 0.02


def test_the_entropy_model_always_has_something_to_predict(uniforms):
    _, found = sets(uniforms)
    assert (found.given_mask.sum(1) < N).all()
    assert (found.kept_mask | ~found.given_mask).all()


def test_globals_are_hidden_only_where_the_decoder_needs_no_fill(uniforms):
    wanted, found = sets(uniforms)
    assert found.kept_mask[found.without_globals].all()
    assert not wanted.own_set[found.without_globals].any()


def test_filtered_sets_are_prefixes_of_the_ranking(uniforms):
    wanted, found = sets(uniforms)
    kept = found.kept_mask[wanted.filtered]
    assert (kept[:, 1:] | ~kept[:, :-1]).all()  # the ranking begins at the end of the raster


def test_while_the_entropy_model_warms_up_nothing_is_filtered(uniforms):
    wanted, found = sets(uniforms, filtering=False)
    assert not wanted.filtered.any()
    assert not wanted.own_set.any()
    assert found.kept_mask.float().mean().item() == pytest.approx(0.15 + 0.8 * (N - 1) / 2 / N, abs=0.03)


def test_blocks_are_connected_squares(uniforms):
    wanted, found = sets(uniforms)
    four = found.kept_mask[wanted.blocks & (wanted.sizes == 4)].view(-1, 4, 4)
    assert len(four) > 10
    for mask in four:
        rows, columns = mask.nonzero().T
        assert max(rows.max() - rows.min(), columns.max() - columns.min()) <= 3
    spread = torch.stack([mask.nonzero().double().std(0).mean() for mask in four]).mean()
    assert spread < 0.9  # scattered sets of four have 1.2


def test_controls_keep_everything_or_nothing(uniforms):
    nothing = KeptSetConfig(all=0, none=1, random=0, blocks=0, filtered=0)
    assert not sets(uniforms, nothing)[1].kept_mask.any()
    everything = KeptSetConfig(all=1, none=0, random=0, blocks=0, filtered=0)
    _, found = sets(uniforms, everything)
    assert found.kept_mask.all()
    assert found.without_globals.float().mean().item() == pytest.approx(0.10, abs=0.02)
