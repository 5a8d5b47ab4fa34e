"""A step and what is logged are the same however a batch is divided, into micro-batches or over workers."""

import pytest
import torch

from pipeline.data.shards import ShardDataset
from pipeline.training import distributed
from pipeline.training.distributed import added, means
from pipeline.training.loop import take_step
from pipeline.training.order import Batches, SampleOrder
from pipeline.training.tokenizer_training import TokenizerObjective, TokenizerState
from tatok_model.losses import ReconstructionLoss

CPU = torch.device("cpu")
FSQ = {"quantizer": "fsq", "fsq_levels": (4, 4), "codebook_size": 16}  # no codebook that moves with each micro-batch
GAN = {"gan": 0.1, "lecam": 0.01, "gan_start_step": 1}


@pytest.fixture
def steps(configure, shards):
    """`steps(accumulation)` takes three steps on the same pictures; returns the objective and each step's terms."""
    pictures = ShardDataset(shards, "train")

    def take(accumulation):
        train = {"global_batch_size": 16, "accumulation": accumulation}
        config = configure(tokenizer=FSQ, losses=GAN, train=train)
        state = TokenizerState(config, CPU)
        objective = TokenizerObjective(state, ReconstructionLoss(config.losses), CPU, False)
        batches = Batches(pictures, SampleOrder(len(pictures), 0, 16), 0, 1, True, draws=20)
        return objective, [take_step(objective, batches.load(step)) for step in range(3)]

    return take


def test_four_micro_batches_log_and_train_what_one_does(steps):
    (one, terms), (four, others) = steps(1), steps(4)
    for step, (whole, parts) in enumerate(zip(terms, others, strict=True)):
        assert ("discriminator" in whole) == (step >= 1)
        assert {"loss", "l2", "commitment", "code_bits", "gradient_norm", "gradient_norm_entropy"} <= whole.keys()
        assert means(parts) == pytest.approx(means(whole), rel=1e-4, abs=1e-6)
        assert [parts[name].count for name in whole] == [mean.count for mean in whole.values()]
    assert four.metrics() == pytest.approx(one.metrics())
    for name in ("model", "average", "adversary"):
        first, second = (getattr(each.state, name) for each in (one, four))
        first, second = (getattr(each, "network", each).state_dict() for each in (first, second))
        for key, value in first.items():
            torch.testing.assert_close(second[key], value, rtol=1e-3, atol=2e-5, msg=f"{name}.{key}")
    assert float(one.state.adversary.network.lecam.real_mean) != 0


def test_the_discriminator_sees_every_micro_batch(steps, monkeypatch):
    objective, _ = steps(4)
    seen = []
    network = objective.state.adversary._prepared
    real = network.forward
    monkeypatch.setattr(network, "forward", lambda images: seen.append(images) or real(images))
    images, uniforms = torch.randint(0, 256, (8, 3, 32, 32)).to(torch.uint8), torch.rand(8, 20)
    for part in zip(images.split(2), uniforms.split(2), strict=True):
        objective.forward(part)
    objective.state.adversary.step(skipped=False)
    trained_on = torch.cat([pair[: len(pair) // 2] for pair in seen if len(pair) == 4][-4:])
    assert torch.equal(trained_on, images.float() / 255)


def test_two_workers_log_what_one_does(configure, shards, monkeypatch):
    pictures = ShardDataset(shards, "train")
    config = configure(tokenizer=FSQ, train={"global_batch_size": 9})
    found = {}
    for world in (1, 2):
        monkeypatch.setattr(distributed, "world_size", lambda world=world: world)
        monkeypatch.setattr(distributed, "prepared", lambda module, compiled: module)
        terms, usage = [], []
        for rank in range(world):
            objective = TokenizerObjective(TokenizerState(config, CPU), ReconstructionLoss(config.losses), CPU, False)
            batch = Batches(pictures, SampleOrder(24, 0, 9), rank, world, True, draws=20).load(0)
            terms.append({})
            for part in objective.parts(batch):
                terms[-1] = added(terms[-1], objective.forward(part)[1])
            usage.append(objective._usage)
        assert len({mean.count for worker in terms for name, mean in worker.items() if name == "code_bits"}) == world
        # What the collectives add up over the workers, without any.
        sums = {name: sum(worker[name].sum for worker in terms) for name in terms[0]}
        counts = {name: sum(worker[name].count for worker in terms) for name in terms[0]}
        codes = sum(meter._counts["patch"] for meter in usage)
        found[world] = {name: float(sums[name] / counts[name]) for name in sums}, counts, codes.tolist()
    assert found[2][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[2][1:] == found[1][1:]


def test_a_mean_of_one_part_is_logged_to_the_bit():
    value = torch.tensor(0.1)
    mean = distributed.Mean.of(value, 7)
    assert means({"loss": mean}) == {"loss": float(value)}
    halves = mean + distributed.Mean.of(torch.tensor(0.4), 1)
    assert float(halves.sum / halves.count) == pytest.approx((0.7 + 0.4) / 8)
