"""Faults that a training run meets in this process: no number, no memory, no room, slow storage."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pipeline.core import checkpoints
from pipeline.core.errors import BadInput
from pipeline.core.files import OutOfRoom
from pipeline.core.job import execute
from pipeline.core.run import Run
from pipeline.data.shards import ShardDataset
from pipeline.training import train
from pipeline.training.distributed import Mean
from pipeline.training.loop import Guard, NotFinite
from pipeline.training.order import SampleOrder

LOSSES = "tatok_model.losses.ReconstructionLoss.forward"


def weights(run):
    return load_file(run.folder / "checkpoint" / "model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def lines(run):
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def no_number_in(monkeypatch, calls):
    """The reconstruction loss is no number in these calls, counted from 1."""
    from tatok_model.losses import ReconstructionLoss

    real, count = ReconstructionLoss.forward, iter(range(1, 10_000))

    def forward(self, images, pictures):
        terms = real(self, images, pictures)
        bad = next(count) in calls
        return {name: value * float("nan") for name, value in terms.items()} if bad else terms

    monkeypatch.setattr(LOSSES, forward)


def test_a_loss_that_is_no_number_ends_the_run_before_a_checkpoint_has_it_and_keeps_the_ids(
    configure, run_training, shards, monkeypatch
):
    no_number_in(monkeypatch, {3})
    config = configure(train={"log_every": 100, "checkpoint_every": 2})
    with pytest.raises(
        NotFinite,
        match=r"the loss is nan at step 3; expected a number: .*ids of its batch are in not_finite/step-00000003\.json",
    ):
        run_training(config, "nan")
    folder = Path(config.run.output) / "nan"
    kept = json.loads((folder / "not_finite" / "step-00000003.json").read_text())
    pictures = ShardDataset(shards, "train")
    assert kept == {"step": 3, "ids": pictures.ids(SampleOrder(len(pictures), 0, 8).global_batch(2)[0])}
    assert checkpoints.latest(folder / "checkpoints").step == 2
    monkeypatch.undo()
    resumed = run_training(config, "nan", resume=True)  # from step 2, and the loss is a number now
    assert equal(weights(resumed), weights(run_training(config, "whole")))


def test_ids_are_asked_of_another_reader_than_the_one_that_a_thread_reads_ahead_with(
    configure, run_training, monkeypatch
):
    no_number_in(monkeypatch, {3})
    asked: dict[str, set[ShardDataset]] = {"images": set(), "ids": set()}

    def noted(name):
        real = getattr(ShardDataset, name)

        def read(self, indices):
            asked[name].add(self)
            return real(self, indices)

        monkeypatch.setattr(ShardDataset, name, read)

    for name in asked:
        noted(name)
    run_training(configure(train={"not_finite": "skip"}), "skip")
    assert len(asked["ids"]) == 1
    assert not asked["ids"] & asked["images"]


def test_steps_whose_gradient_is_no_number_are_left_out_and_counted_by_option(configure, run_training, monkeypatch):
    no_number_in(monkeypatch, {3, 4})
    run = run_training(configure(train={"not_finite": "skip"}), "skip")
    logged = {line["step"]: line["metrics"] for line in lines(run) if "train/loss" in line["metrics"]}
    assert {step: metrics.get("train/skipped_steps", 0) for step, metrics in logged.items()} == {2: 0, 4: 2, 6: 2, 8: 2}
    assert all(np.isfinite(metrics["train/loss"]) for metrics in logged.values())
    assert all(value.isfinite().all() for value in weights(run).values())
    assert sorted(path.name for path in (run.folder / "not_finite").iterdir()) == [
        "step-00000003.json",
        "step-00000004.json",
    ]


def test_leaving_out_changes_nothing_where_every_step_is_a_number(configure, run_training):
    one = run_training(configure(), "stop")
    other = run_training(configure(train={"not_finite": "skip"}), "skip")
    assert equal(weights(one), weights(other))


def test_ten_steps_in_a_row_without_a_number_end_the_run(configure, run_training, monkeypatch):
    no_number_in(monkeypatch, range(3, 1000))
    with pytest.raises(NotFinite, match="the gradient is nan at step 12; expected a number, and so were 10 in a row"):
        run_training(configure(train={"not_finite": "skip", "max_steps": 20, "checkpoint_every": 0}), "lost")


def test_the_guard_names_the_first_term_that_is_no_number():
    guard = Guard(SimpleNamespace(keep_ids=lambda step: f"step-{step}"))
    guard.check()
    for step, value in enumerate((1.0, float("inf"), float("nan")), start=5):
        terms = {"loss": Mean.of(torch.tensor(2.0), 8), "lecam": Mean.of(torch.tensor(value), 8)}
        guard.add(SimpleNamespace(step=step, skipped=False), terms)
    with pytest.raises(NotFinite, match="the lecam is inf at step 6; expected a number.* in step-6"):
        guard.check()
    guard.check()  # asked again, it has forgotten


def test_full_memory_is_answered_with_the_number_of_images_to_try(configure, run_training, monkeypatch):
    def forward(self, part):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr("pipeline.training.tokenizer_training.TokenizerObjective.forward", forward)
    with pytest.raises(OutOfRoom, match=r"full with 8 images at a time .* try train\.accumulation=2, 4 at a time"):
        run_training(configure(), "large")
    with pytest.raises(OutOfRoom, match="full with 1 images at a time .* expected a smaller model"):
        run_training(configure(train={"accumulation": 8}), "small")


def test_another_error_of_a_step_is_not_taken_for_full_memory(configure, run_training, monkeypatch):
    def forward(self, part):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("pipeline.training.tokenizer_training.TokenizerObjective.forward", forward)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run_training(configure(), "wrong")


def test_full_storage_is_told_in_a_sentence_and_the_run_goes_on_once_there_is_room(
    configure, run_training, monkeypatch, capsys
):
    config = configure(train={"checkpoint_every": 2})
    real = checkpoints.save

    def no_room(tensors, path, metadata=None):  # tests/test_storage_full.py has the real thing
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def save(folder, step, *arguments, **options):
        if step > 4:
            monkeypatch.setattr("safetensors.torch.save_file", no_room)
        return real(folder, step, *arguments, **options)

    monkeypatch.setattr(checkpoints, "save", save)
    run = Run.open("train", config, "full", resume=False)
    assert execute(run, train) == 1
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert summary["error"].startswith("storage is full")
    assert "make space, then go on with --resume" in capsys.readouterr().err
    assert [path.name for path in sorted((run.folder / "checkpoints").iterdir())] == ["step-00000002", "step-00000004"]
    monkeypatch.undo()
    resumed = run_training(config, "full", resume=True)
    assert equal(weights(resumed), weights(run_training(config, "whole")))


def test_training_goes_on_while_a_checkpoint_is_written_to_slow_storage(configure, run_training, monkeypatch):
    gone_on, real_save, real_log = threading.Event(), checkpoints.save, Run.log

    def save(folder, step, *arguments, **options):
        assert step != 2 or gone_on.wait(60), "training waited for the storage"
        return real_save(folder, step, *arguments, **options)

    def log(self, metrics, step):
        real_log(self, metrics, step)
        if step == 4:
            gone_on.set()

    monkeypatch.setattr(checkpoints, "save", save)
    monkeypatch.setattr(Run, "log", log)
    slow = run_training(configure(train={"checkpoint_every": 2, "max_steps": 6}), "slow")
    monkeypatch.undo()
    assert equal(weights(slow), weights(run_training(configure(train={"max_steps": 6}), "fast")))
    assert checkpoints.latest(slow.folder / "checkpoints").record["samples_seen"] == 48


def test_a_damaged_newest_checkpoint_costs_only_the_steps_after_the_one_before(configure, run_training, capsys):
    config = configure(train={"checkpoint_every": 2})
    run = run_training(config, "torn")
    whole = weights(run)
    state = run.folder / "checkpoints" / "step-00000008" / "training_state.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    again = run_training(config, "torn", resume=True)
    said = capsys.readouterr().err
    assert "step-00000008 is not used: training_state.safetensors does not match its checksum" in said
    assert "going on from step 6" in said
    assert equal(weights(again), whole)


def test_a_stop_waits_until_its_checkpoint_is_safe(configure, run_training, monkeypatch):
    def save(*arguments, **options):
        raise OSError("the storage went away")

    monkeypatch.setattr(checkpoints, "save", save)
    with pytest.raises(OSError, match="the storage went away"):  # and not Stopped, which promises a checkpoint
        run_training(configure(train={"max_minutes": 1e-9}), "gone")


def test_fewer_workers_than_asked_for_are_enough_where_the_least_says_so(configure):
    from pipeline.training.train import check_resources

    config = configure(train={"num_workers": 4, "min_workers": 2})
    check_resources({"CPU": 2.0}, config)
    with pytest.raises(BadInput, match="train.min_workers is 2, which needs 2 CPUs; expected at most .* has, 1"):
        check_resources({"CPU": 1.0}, config)
    for wrong, expected in ((-1, "at least 0"), (5, "0 to num_workers, 4")):
        with pytest.raises(BadInput, match=f"min_workers is {wrong}; expected {expected}"):
            configure(train={"num_workers": 4, "min_workers": wrong})


def test_workers_that_are_started_again_hear_why_another_one_gave_up(configure, tmp_path):
    from pipeline.training.train import GAVE_UP, _work

    (tmp_path / GAVE_UP).write_text('{"out_of_room": "memory is full"}')
    values = {"config": configure().to_dict(), "stage": "train", "section": "train", "folder": str(tmp_path)}
    assert _work(values) == {"out_of_room": "memory is full"}
