import pytest
import torch

from tatok_model.config import LossConfig
from tatok_model.losses import Discriminator, LeCam, ReconstructionLoss, hinge_discriminator_loss, hinge_generator_loss


def test_terms_are_weighted_means():
    originals, reconstructions = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5)
    terms = ReconstructionLoss(LossConfig(l1=2.0, l2=4.0))(originals, reconstructions)
    assert {name: float(value) for name, value in terms.items()} == {"l1": 1.0, "l2": 1.0}


def test_a_weight_of_zero_leaves_the_term_out():
    assert list(ReconstructionLoss(LossConfig())(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4))) == ["l2"]


def test_the_perceptual_term_is_the_weighted_mean_distance():
    config = LossConfig(perceptual=2.0, perceptual_backbone="a", perceptual_heads="b")
    loss = ReconstructionLoss(config, perceptual=lambda x, y: torch.tensor([1.0, 3.0]))
    assert float(loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))["perceptual"]) == 4.0


def test_a_perceptual_weight_without_a_distance_is_refused():
    with pytest.raises(ValueError, match=r"perceptual weight is 1\.0; expected a perceptual distance"):
        ReconstructionLoss(LossConfig(perceptual=1.0, perceptual_backbone="a", perceptual_heads="b"))


def test_the_hinge_stops_pulling_beyond_the_margin():
    far, near = torch.tensor([5.0]), torch.tensor([0.0])
    assert float(hinge_discriminator_loss(far, -far)) == 0.0
    assert float(hinge_discriminator_loss(near, near)) == 1.0
    assert float(hinge_generator_loss(torch.tensor([1.0, 3.0]))) == -2.0


def test_lecam_penalises_distance_from_the_other_kinds_running_mean():
    lecam = LeCam(decay=0.0)  # the means are those of this batch
    real, fake = torch.tensor([2.0, 2.0]), torch.tensor([-1.0, -1.0])
    lecam.update(real.mean(), fake.mean())
    assert float(lecam(real, fake)) == pytest.approx(9.0 + 9.0)
    lecam.update(fake.mean(), fake.mean())
    assert float(lecam(fake, fake)) == 0.0


def test_the_discriminator_learns_to_tell_two_kinds_apart():
    torch.manual_seed(0)
    network = Discriminator(width=16)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    real, fake = torch.rand(8, 3, 32, 32), torch.full((8, 3, 32, 32), 0.5)
    for _ in range(20):
        loss = hinge_discriminator_loss(network(real), network(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert network(real).shape == (8, 1, 4, 4)
    assert network(real).mean() > network(fake).mean() + 0.5


def test_a_score_does_not_depend_on_the_other_pictures():
    network = Discriminator(width=16)
    images = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(network(images)[:1], network(images[:1]))
