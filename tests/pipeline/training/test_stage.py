import dataclasses
import errno
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from pipeline.core import checkpoints
from pipeline.core.errors import BadInput, Stopped
from pipeline.core.presets import load_config
from pipeline.core.run import Run
from pipeline.data.shards import fingerprint, read_manifest, write_manifest
from pipeline.training import loop, train
from pipeline.training.distributed import prepared
from pipeline.training.recorder import Recorder
from pipeline.training.tokenizer_training import TokenizerState
from pipeline.training.train import export
from tatok_model import TaTok


def lines(run):
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def weights(run):
    return load_file(run.folder / "checkpoint" / "model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def trained(configure, run_training):
    return run_training(configure(), "whole")


def test_a_run_leaves_a_tokenizer_metrics_and_pictures(trained):
    assert TaTok.from_pretrained(trained.folder / "checkpoint").config.codebook_size == 16
    names = {name for line in lines(trained) for name in line["metrics"]}
    assert {"train/loss", "train/l2", "train/images_per_second", "train_codebook/usage_patch"} <= names
    assert {"validation/psnr", "validation/rfd_compact_cifar10", "validation_codebook/perplexity_global"} <= names
    assert sorted(path.name for path in (trained.folder / "pictures").iterdir()) == [
        "step-00000004.png",
        "step-00000008.png",
    ]
    assert trained.results["images_seen"] == 64
    assert trained.results["validation_psnr"] > 5


def test_the_last_validation_is_of_the_exported_weights(trained, shards):
    from pipeline.data.shards import ShardDataset
    from tatok_model.metrics.images import psnr, to_uint8

    images = torch.from_numpy(ShardDataset(shards, "heldout").images(range(8))).permute(0, 3, 1, 2)
    model = TaTok.from_pretrained(trained.folder / "checkpoint")
    measured = psnr(images, to_uint8(model.reconstruct(images))).mean()
    assert float(measured) == pytest.approx(trained.results["validation_psnr"], abs=1e-3)


def test_stopping_and_resuming_ends_with_the_weights_of_an_uninterrupted_run(trained, configure, run_training):
    with pytest.raises(Stopped, match="max_minutes are over after step 1"):
        run_training(configure(train={"max_minutes": 1e-9}), "broken")
    resumed = run_training(configure(), "broken", resume=True)
    assert equal(weights(resumed), weights(trained))


def test_a_killed_run_goes_on_from_its_last_checkpoint_and_logs_each_step_once(trained, configure, run_training):
    killed = run_training(configure(train={"max_steps": 8, "checkpoint_every": 4, "keep_checkpoints": 9}), "killed")
    for gone in ("checkpoint", "checkpoints/step-00000008"):  # as if SIGKILL had come after step 7
        for path in (killed.folder / gone).iterdir():
            path.unlink()
        (killed.folder / gone).rmdir()
    resumed = run_training(configure(), "killed", resume=True)
    assert equal(weights(resumed), weights(trained))
    steps = [line["step"] for line in lines(resumed) if "train/loss" in line["metrics"]]
    assert steps == [2, 4, 6, 8]


def test_fine_tuning_starts_from_the_checkpoint(trained, configure):
    config = configure(tokenizer={"checkpoint": str(trained.folder)})
    from pipeline.training.tokenizer_training import starting_state

    state = starting_state(config, trained.folder.parent / "none", torch.device("cpu"))
    assert state.step == 0
    assert equal(state.model.state_dict(), weights(trained))


def test_the_entropy_model_trains_alone_on_a_frozen_tokenizer(trained, configure, run_training):
    tokenizer = {"checkpoint": str(trained.folder), "entropy_layers": 1, "entropy_width": 64, "entropy_globals": False}
    run = run_training(configure(tokenizer=tokenizer, train={"parts": "entropy", "max_steps": 6}), "alone")
    before, after = weights(trained), weights(run)
    entropy = {name for name in after if name.startswith("entropy_model.")}
    assert after.keys() - entropy == {name for name in before if not name.startswith("entropy_model.")}
    assert all(torch.equal(before[name], after[name]) for name in after.keys() - entropy)
    losses = [line["metrics"]["train/loss"] for line in lines(run) if "train/loss" in line["metrics"]]
    assert losses[-1] < losses[0]
    assert not TaTok.from_pretrained(run.folder / "checkpoint").config.entropy_globals


def test_an_entropy_model_that_trains_alone_goes_on_where_it_stopped(trained, configure, run_training):
    config = {"tokenizer": {"checkpoint": str(trained.folder)}, "train": {"parts": "entropy"}}
    whole = run_training(configure(**config), "whole-alone")
    with pytest.raises(Stopped):
        run_training(configure(tokenizer=config["tokenizer"], train={"parts": "entropy", "max_minutes": 1e-9}), "alone")
    assert equal(weights(run_training(configure(**config), "alone", resume=True)), weights(whole))


def test_the_log_tells_how_much_is_kept_and_what_the_entropy_model_knows(trained):
    logged = [line["metrics"] for line in lines(trained)]
    assert all(0 <= metrics["train/kept_patch_tokens"] <= 16 for metrics in logged if "train/loss" in metrics)
    last = {name: value for metrics in logged for name, value in metrics.items()}
    assert {"train/code_bits", "train/unigram_bits", "train/gradient_norm_entropy"} <= last.keys()
    assert {"validation/psnr_quarter", "validation/psnr_globals_only", "validation/bits_mutual"} <= last.keys()


def test_kept_sets_are_drawn_by_sample_and_not_by_worker(shards):
    from pipeline.data.shards import ShardDataset
    from pipeline.training.order import Batches, SampleOrder

    pictures = ShardDataset(shards, "train")
    order = SampleOrder(len(pictures), seed=3, global_batch_size=4)
    whole = Batches(pictures, order, 0, 1, horizontal_flip=False, draws=20).load(2)
    halves = [Batches(pictures, order, rank, 2, horizontal_flip=False, draws=20).load(2) for rank in (0, 1)]
    assert whole.uniforms.shape == (4, 20)
    assert torch.equal(torch.cat([half.uniforms for half in halves]), whole.uniforms)
    assert len(whole.uniforms.unique()) == 80


@pytest.mark.parametrize(
    "tokenizer", [{"global_tokens": 0}, {"patch_tokens": False}], ids=["patch_only", "global_only"]
)
def test_the_controls_train(tokenizer, configure, run_training):
    run = run_training(configure(tokenizer=tokenizer, train={"max_steps": 2}), "control")
    assert run.results["steps"] == 2


@pytest.mark.parametrize("losses", [{}, {"gan": 0.1}], ids=["plain", "gan"])
def test_a_stop_between_micro_batches_costs_that_step_only_and_nothing_has_moved(
    configure, run_training, monkeypatch, losses
):
    """A VQ codebook moves with every micro-batch: what the abandoned ones did has to be taken back."""
    train = {"accumulation": 4, "checkpoint_every": 4}
    whole = run_training(configure(losses=losses, train=train), "whole-parts")
    asked = iter([""] * (2 * 4 + 2))  # four times in each of two steps, the end of a step counted, then twice
    monkeypatch.setattr(Recorder, "stop_reason", lambda self: next(asked, "stopped"))
    with pytest.raises(Stopped, match="stopped after step 2; go on with --resume"):
        run_training(configure(losses=losses, train=train), "parts")
    monkeypatch.undo()
    resumed = run_training(configure(losses=losses, train=train), "parts", resume=True)
    assert equal(weights(resumed), weights(whole))


def test_a_stop_before_the_first_step_is_done_goes_on_from_nothing(configure, run_training, monkeypatch):
    whole = run_training(configure(train={"accumulation": 2}), "whole-first")
    monkeypatch.setattr(Recorder, "stop_reason", lambda self: "stopped")
    with pytest.raises(Stopped, match="stopped after step 0"):
        run_training(configure(train={"accumulation": 2}), "first")
    monkeypatch.undo()
    assert equal(weights(run_training(configure(train={"accumulation": 2}), "first", resume=True)), weights(whole))


def test_training_says_what_it_trains_and_only_the_main_numbers(configure, run_training, capsys):
    run = run_training(configure(), "told")
    said = capsys.readouterr().err.splitlines()
    millions = f"{run.results['parameters'] / 1e6:.3g}"
    assert said[0].startswith(f"training {millions} million parameters on cpu: 8 steps of 8 images, 0.0")
    validations = [line for line in said if line.startswith("step ")]
    assert [line.split(":")[0] for line in validations] == ["step 4", "step 8"]
    names = [part.split()[0] for part in validations[0].partition(": ")[2].split(", ")]
    assert names == ["psnr", "ssim", "psnr_quarter", "rfd_compact_cifar10"]
    kinds = [line.partition(":")[0] + line.partition(":")[2].partition(":")[0] for line in said if "warning" in line]
    assert len(kinds) == len(set(kinds))  # each once, though both validations found them
    assert not [line for line in said if "step takes" in line or "may take minutes" in line]  # it is quick


def test_a_slow_step_says_how_long_the_others_take(configure, run_training, capsys, monkeypatch):
    monkeypatch.setattr(loop, "SLOW", 0.0)
    monkeypatch.setattr(loop, "LARGE", 0.0)
    run_training(configure(train={"max_steps": 3}), "slow")
    said = capsys.readouterr().err
    assert said.count("the first step of so large a model may take minutes on a CPU") == 1
    told = re.findall(r"^a step takes ([\d.]+) s and ([\d.]+) GiB of memory: ([\d.]+) s for the rest$", said, re.M)
    assert len(told) == 1  # after the first step
    seconds, gib, rest = map(float, told[0])
    assert rest == pytest.approx(2 * seconds, rel=0.1)
    assert 0.1 < gib < 20


def test_an_adversarial_term_joins_at_its_step_and_survives_resuming(configure, run_training):
    losses = {"gan": 0.1, "gan_start_step": 4}
    whole = run_training(configure(losses=losses), "whole-gan")
    with pytest.raises(Stopped):
        run_training(configure(losses=losses, train={"max_minutes": 1e-9}), "gan")
    run = run_training(configure(losses=losses), "gan", resume=True)
    with_term = [line["step"] for line in lines(run) if "train/discriminator" in line["metrics"]]
    assert with_term == [6, 8]
    assert equal(weights(run), weights(whole))


def test_a_wish_to_stop_saves_a_checkpoint(configure):
    run = Run.open("train", configure(train={"max_steps": 100000, "checkpoint_every": 0}), "stopped", resume=False)
    run.request_stop()
    with pytest.raises(Stopped, match="go on with --resume"):
        train.run(run)
    run.close()
    newest = checkpoints.latest(run.folder / "checkpoints")
    assert newest is not None
    assert newest.step == newest.record["samples_seen"] / 8
    assert not (run.folder / "stop").exists()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_state_survives_a_round_trip(configure, tmp_path, optimizer):
    state = TokenizerState(configure(losses={"gan": 1.0}, train={"optimizer": optimizer}), torch.device("cpu"))
    output = state.model(torch.rand(4, 3, 32, 32))
    output.images.mean().backward()
    state.optimizer.step()
    state.step = 5
    checkpoints.save(tmp_path, 5, state.average, state.tensors(), keep=1)
    other = TokenizerState(dataclasses.replace(state.config), torch.device("cpu"))
    other.load(checkpoints.latest(tmp_path))
    assert other.step == 5
    assert equal(other.tensors(), state.tensors())
    assert equal(other.average.state_dict(), state.average.state_dict())


def test_the_average_carries_no_graph(configure):
    state = TokenizerState(configure(), torch.device("cpu"))
    for _ in range(2):
        state.model(torch.rand(4, 3, 32, 32)).images.mean().backward()
        state.step += 1
        state.update_average()
    tensors = [*state.average.parameters(), *state.average.buffers()]
    assert all(tensor.grad_fn is None for tensor in tensors)


def test_empty_splits_are_refused(configure, shards, tmp_path):
    from pipeline.data.shards import Split, fingerprint, read_manifest

    manifest = read_manifest(shards)
    splits = {**manifest.splits, "heldout": Split(0, ())}
    values = dataclasses.replace(manifest, splits=splits, fingerprint=fingerprint(splits)).to_dict()
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    run = Run.open("train", configure(data={"shards": str(tmp_path)}), "empty", resume=False)
    with pytest.raises(BadInput, match="expected some in both splits"):
        train.run(run)
    run.close()


def test_exporting_to_full_storage_leaves_the_earlier_export_and_no_half_one(trained, monkeypatch):
    (trained.folder / ".checkpoint.1").mkdir()  # of an attempt that was killed

    def no_room(source, target):
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    before = weights(trained)
    monkeypatch.setattr(shutil, "copy2", no_room)
    with pytest.raises(OSError, match="No space left"):
        export(trained.folder)
    assert not list(trained.folder.glob(".checkpoint.*"))
    assert equal(weights(trained), before)


def test_modules_are_compiled_where_the_training_asks_for_it(monkeypatch):
    module = torch.nn.Linear(1, 1)
    monkeypatch.setattr(torch, "compile", lambda module: ("compiled", module))
    assert prepared(module, compiled=True) == ("compiled", module)
    assert prepared(module, compiled=False) is module


def test_exporting_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        export(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"num_workers": 512, "global_batch_size": 512}}, r"train\.num_workers is 512.*expected at most"),
        ({"data": {"image_size": 64}}, "made for image size 32; expected data.image_size, 64"),
        ({"data": {"shards": "/nowhere"}}, "holds no manifest.json"),
        ({"data": {"shards": "", "source": "/nowhere"}}, "/nowhere.* does not exist"),
        ({"data": {"shards": ""}}, "data.source"),
        ({"tokenizer": {"checkpoint": "/nowhere"}}, "'/nowhere' does not exist"),
        ({"tracking": {"uri": "file:///tmp/x"}}, "tracking.uri"),
        (
            {"losses": {"perceptual": 1, "perceptual_backbone": "/no", "perceptual_heads": "/no"}},
            "losses.perceptual_backbone '/no' does not exist; expected a file",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_made(changes, message, configure):
    with pytest.raises(BadInput, match=message):
        train.check(configure(**changes))


def test_a_checkpoint_of_another_architecture_is_refused(trained, configure):
    config = configure(tokenizer={"checkpoint": str(trained.folder), "global_tokens": 3})
    with pytest.raises(BadInput, match=r"has global_tokens 2; expected tokenizer\.global_tokens, 3"):
        train.check(config)


def test_hiding_global_tokens_of_no_sample_is_told(configure):
    nothing = {"all": 0, "none": 1, "random": 0, "blocks": 0, "filtered": 0}
    assert train.hides_nothing(configure(kept_sets=nothing))
    assert not train.hides_nothing(configure())
    assert not train.hides_nothing(configure(kept_sets={**nothing, "hide_globals": 0}))
    assert not train.hides_nothing(configure(kept_sets=nothing, tokenizer={"patch_tokens": False}))


def test_the_default_name_says_preset_and_stage():
    assert train.default_name(load_config("smoke")) == "smoke-train"


@pytest.mark.gpu
def test_training_runs_in_bf16_on_a_gpu(configure, run_training):
    run = run_training(configure(train={"device": "cuda"}, losses={"gan": 0.1}), "gpu")
    assert run.results["steps"] == 8
    assert run.results["validation_psnr"] > 5


def test_going_on_with_other_values_is_refused(configure, run_training):
    with pytest.raises(Stopped):
        run_training(configure(train={"max_minutes": 1e-9}), "changed")
    with pytest.raises(BadInput, match=r"train\.seed is 1; expected 0, as this run was begun"):
        run_training(configure(train={"seed": 1}), "changed", resume=True)
    with pytest.raises(BadInput, match=r"tokenizer\.global_tokens is 3; expected 2"):
        run_training(configure(tokenizer={"global_tokens": 3}), "changed", resume=True)


def test_a_mistyped_resume_is_refused_before_pictures_are_preprocessed(trained, configure, run_training, monkeypatch):
    monkeypatch.setattr(train, "with_input", lambda *arguments: pytest.fail("shards are looked for"))
    with pytest.raises(BadInput, match=r"train\.seed is 1; expected 0, as this run was begun"):
        run_training(configure(train={"seed": 1}), "whole", resume=True)
    monkeypatch.undo()
    folder = shutil.copytree(trained.config.data.shards, trained.folder / "copy")
    other = configure(data={"shards": str(folder)})
    run_training(other, "whole", resume=True)  # the same pictures elsewhere
    manifest = read_manifest(folder)
    splits = {"train": manifest.splits["heldout"], "heldout": manifest.splits["train"]}
    write_manifest(folder, dataclasses.replace(manifest, splits=splits, fingerprint=fingerprint(splits)))
    with pytest.raises(BadInput, match="data.shards .*copy' is not, or no longer, what this run was begun with"):
        run_training(other, "whole", resume=True)


def test_resuming_a_finished_run_measures_it_again_and_changes_nothing(trained, configure, run_training):
    before = weights(trained)
    again = run_training(configure(), "whole", resume=True)
    assert equal(weights(again), before)
    assert again.results["validation_psnr"] == pytest.approx(trained.results["validation_psnr"], abs=1e-6)
    assert again.results["train_seconds"] >= trained.results["train_seconds"] * 0.5


def test_more_workers_than_the_cluster_has_cpus_are_refused(configure):
    from pipeline.training.train import check_resources

    config = configure(train={"num_workers": 4})
    check_resources({"CPU": 4.0}, config)
    with pytest.raises(BadInput, match="needs 4 CPUs; expected at most what the cluster has, 3"):
        check_resources({"CPU": 3.0}, config)
    with pytest.raises(BadInput, match="needs 4 GPUs; expected at most what the cluster has, 0"):
        check_resources({"CPU": 4.0}, configure(train={"num_workers": 4, "device": "cuda"}))


def test_pictures_too_small_for_ssim_are_refused(configure):
    with pytest.raises(BadInput, match=r"data\.image_size is 8; expected at least 11 pixels"):
        train.check(configure(data={"image_size": 8}, tokenizer={"patch_size": 4}))


def test_the_loop_runs_without_ray_and_mlflow(run_python, configure, tmp_path):
    config = configure(train={"max_steps": 2})
    code = f"""
import sys
for name in ("ray", "mlflow"): sys.modules[name] = None
from pathlib import Path
from pipeline.core.presets import config_from_dict
from pipeline.core.run import Run
from pipeline.training import train
config = config_from_dict({config.to_dict()!r})
run = Run.open("train", config, "bare", resume=False)
train.run(run)
print(int(run.results["steps"]))
"""
    found = run_python(code)
    assert found.stdout.strip().endswith("2"), found.stderr


def test_freed_memory_is_given_back_when_metrics_are_logged(trained, configure, run_training, monkeypatch):
    times = []
    monkeypatch.setattr(loop, "HeapTrim", lambda: lambda: times.append(1))
    run = run_training(configure(), "trimmed")
    assert len(times) == 4  # 8 steps, logged every second one
    assert equal(weights(run), weights(trained))
