"""Two Ray Train workers against one process, at the same global batch."""

import json
import time

import pytest
import torch
from safetensors.torch import load_file

FSQ = {"quantizer": "fsq", "fsq_levels": (4, 4), "codebook_size": 16}
STEPS = {"max_steps": 12, "log_every": 1, "checkpoint_every": 0, "validate_every": 0}


def losses(run):
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line["metrics"]["train/l2"] for line in lines if "train/l2" in line["metrics"]])


def said_by_a_worker(capfd, text):
    """How often a worker's line with `text` came to the driver, which hears it a little later."""
    lines, end = [], time.monotonic() + 30
    while time.monotonic() < end:
        new = [line for line in "".join(capfd.readouterr()).splitlines() if text in line and "RayTrainWorker" in line]
        if new and not lines:
            end = time.monotonic() + 2  # for a second one
        lines += new
        time.sleep(0.1)
    return len(lines)


@pytest.mark.parametrize(
    ("tokenizer", "tolerance", "optimizer"),
    [
        # the same sums in another order
        pytest.param(FSQ, 1e-3, "adamw", id="fsq", marks=pytest.mark.slow),
        pytest.param(FSQ, 1e-3, "muon", id="fsq, muon", marks=pytest.mark.slow),
        # the same, and a nearest entry may flip; dead ones are re-drawn from the batch of both
        pytest.param({}, 1e-2, "adamw", id="vq"),
    ],
)
def test_two_workers_reach_the_loss_of_one(
    ray_session, configure, run_training, capfd, tokenizer, tolerance, optimizer
):
    train = {**STEPS, "optimizer": optimizer}
    one = run_training(configure(tokenizer=tokenizer, train=train), "one")
    two = run_training(configure(tokenizer=tokenizer, train={**train, "num_workers": 2}), "two")
    assert len(losses(two)) == STEPS["max_steps"]
    torch.testing.assert_close(losses(two)[:2], losses(one)[:2], rtol=1e-4, atol=0)
    assert said_by_a_worker(capfd, "step 12: psnr") == 1
    torch.testing.assert_close(losses(two)[-3:], losses(one)[-3:], rtol=tolerance, atol=0)
    assert two.results["validation_psnr"] == pytest.approx(one.results["validation_psnr"], rel=tolerance)
    if tokenizer is FSQ:
        whole, shared = (load_file(run.folder / "checkpoint" / "model.safetensors") for run in (one, two))
        for name, value in whole.items():
            torch.testing.assert_close(value, shared[name], atol=1e-3, rtol=1e-2)


@pytest.mark.slow
def test_a_picture_that_one_of_two_workers_cannot_read_ends_both(ray_session, configure, run_training, damaged_shards):
    from pipeline.core.errors import BadInput

    config = configure(data={"shards": str(damaged_shards)}, train={**STEPS, "num_workers": 2})
    with pytest.raises(BadInput, match="picture 0 of split 'train' in .* cannot be decoded"):
        run_training(config, "damaged")


@pytest.mark.slow
def test_a_stop_reaches_the_workers_and_the_run_can_be_resumed(ray_session, configure, run_training):
    from pipeline.core.errors import Stopped
    from pipeline.core.run import Run
    from pipeline.training import train

    config = configure(train={"max_steps": 100000, "num_workers": 2, "validate_every": 0, "checkpoint_every": 0})
    run = Run.open("train", config, "stopped", resume=False)
    run.request_stop()
    with pytest.raises(Stopped, match="go on with --resume"):
        train.run(run)
    run.close()
    newest = max((run.folder / "checkpoints").iterdir())
    step = int(newest.name.removeprefix("step-"))
    resumed = run_training(configure(train={"max_steps": step + 2, "num_workers": 2}), "stopped", resume=True)
    assert resumed.results["steps"] == step + 2
