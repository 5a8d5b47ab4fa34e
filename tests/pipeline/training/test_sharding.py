"""FSDP2 against DDP: two processes over gloo on the CPU, without Ray."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.core.errors import BadInput

STEPS = {
    "max_steps": 14, "num_workers": 2, "log_every": 1, "checkpoint_every": 0, "validate_every": 7,
    "validation_images": 7,  # one of two workers has more than the other
}  # fmt: skip
DDP, FSDP2 = {"parallel": "ddp"}, {"parallel": "fsdp2"}
STOPPED = {"max_minutes": 1e-9}  # at step 10, where workers ask each other

WORKER = """
import json, sys
from pathlib import Path
import torch
from torch import distributed
from pipeline.core.presets import config_from_dict
from pipeline.core.run import Run
from pipeline.training.tokenizer_training import work

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
distributed.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=2)
for name, values in json.loads((folder / "runs.json").read_text()):
    (folder / name).mkdir(exist_ok=True)
    run = Run("train", config_from_dict(values), folder / name, command=["test"])
    work(run, torch.device("cpu"))
    distributed.barrier()  # the first writes the checkpoint that both go on from
distributed.destroy_process_group()
"""

HALVES = """
import json, sys
from pathlib import Path
import torch
from torch import distributed
from pipeline.core.presets import config_from_dict
from pipeline.training.tokenizer_training import TokenizerState

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
distributed.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=2)
state = TokenizerState(config_from_dict(json.loads((folder / "runs.json").read_text())), torch.device("cpu"))
for parameter in state.model.parameters():
    parameter.grad = torch.randn_like(parameter)  # alike: building the state has keyed the generator
state.descend()
state.end_step()
average, tensors = state.snapshot()
state.shard()
held = [*state.model.parameters(), *state.average.parameters()]
held += [v for values in state.optimizer.state.values() for v in values.values() if v.ndim]
share = sum(t.to_local().numel() for t in held) / sum(t.numel() for t in held)
assert abs(share - 0.5) < 0.01, share
gathered, found = state.snapshot()
for one, other in ((average.state_dict(), gathered.state_dict()), (tensors, found)):
    assert rank or one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items() if name in other)
assert bool(found) == (rank == 0)
distributed.destroy_process_group()
"""


STEPS_OF_BOTH = """
import json, sys
from pathlib import Path
import torch
from torch import distributed
from pipeline.core.presets import config_from_dict
from pipeline.training.distributed import whole
from pipeline.training.tokenizer_training import TokenizerState

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
distributed.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=2)
config = config_from_dict(json.loads((folder / "runs.json").read_text()))
one, other = (TokenizerState(config, torch.device("cpu")) for _ in range(2))
other.shard()
for step in range(3):
    gradients = [torch.randn_like(parameter) for parameter in one.model.parameters()]
    for gradient, parameter, part in zip(gradients, one.model.parameters(), other.model.parameters(), strict=True):
        parameter.grad = gradient
        part.grad = torch.distributed.tensor.distribute_tensor(gradient, part.device_mesh, part.placements)
    for state in (one, other):
        state.begin_step()
        state.descend()
        state.end_step()
for name, parameter in one.model.named_parameters():
    assert torch.equal(parameter, whole(other.model.get_parameter(name))), name
distributed.destroy_process_group()
"""


@pytest.fixture
def two_processes(repository: Path, tmp_path: Path) -> Callable[[str, object], None]:
    """`two_processes(code, values)` runs code, which is told `tmp_path` and its rank; the values are in runs.json."""

    def run(code: str, values: object) -> None:
        (tmp_path / "runs.json").write_text(json.dumps(values))
        (tmp_path / "group").unlink(missing_ok=True)
        commands = [[sys.executable, "-c", code, str(tmp_path), str(rank)] for rank in range(2)]
        processes = [
            subprocess.Popen(command, cwd=repository, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            for command in commands
        ]
        try:
            said = [process.communicate(timeout=200)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        assert [process.returncode for process in processes] == [0, 0], "\n".join(said)[-3000:]

    return run


@pytest.fixture
def train_by_turns(two_processes, configure) -> Callable[..., None]:
    """`train_by_turns([("name", {"parallel": "ddp"}), ...], losses={...})`: an equal name goes on where it stopped."""

    def run(turns: list[tuple[str, dict]], **sections: dict) -> None:
        changes = {name: part for name, part in sections.items() if name != "train"}
        everywhere = {**STEPS, **sections.get("train", {})}
        two_processes(
            WORKER, [(name, configure(train={**everywhere, **keys}, **changes).to_dict()) for name, keys in turns]
        )

    return run


def metrics(folder: Path, *names: str) -> torch.Tensor:
    lines = [json.loads(line)["metrics"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([[line[name] for name in names] for line in lines if names[0] in line])


def assert_same_course(one: Path, other: Path, tolerance: float, *names: str) -> None:
    first, second = (metrics(folder, *names) for folder in (one, other))
    assert len(first) == STEPS["max_steps"]
    torch.testing.assert_close(second, first, rtol=tolerance, atol=0)
    for file in ("model.safetensors", "training_state.safetensors"):
        first, second = (load_file(folder / "checkpoints" / "step-00000014" / file) for folder in (one, other))
        assert {name: value.shape for name, value in first.items()} == {n: value.shape for n, value in second.items()}


@pytest.mark.slow
# Muon computes in bfloat16, which makes more of every difference.
@pytest.mark.parametrize(("optimizer", "tolerance"), [("adamw", 1e-4), ("muon", 1e-3)])
def test_fsdp2_takes_the_course_of_ddp_and_each_goes_on_from_the_other(train_by_turns, tmp_path, optimizer, tolerance):
    ways = {"ddp": [DDP], "fsdp2": [FSDP2], "there": [DDP | STOPPED, FSDP2], "back": [FSDP2 | STOPPED, DDP]}
    train_by_turns([(name, keys) for name, turns in ways.items() for keys in turns], train={"optimizer": optimizer})
    for name in ("fsdp2", "there", "back"):
        # Norms are summed in parts, and what is rounded otherwise is all that differs.
        assert_same_course(tmp_path / "ddp", tmp_path / name, tolerance, "train/loss", "train/gradient_norm")
        psnr = [metrics(tmp_path / folder, "validation/psnr") for folder in ("ddp", name)]
        torch.testing.assert_close(*psnr, rtol=tolerance / 10, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sections", "tolerance"),
    [
        # one sample of a worker at a time: some ask the entropy model for a ranking, and some do not
        pytest.param(
            {"kept_sets": {"warmup_steps": 0}, "train": {"accumulation": 4, "not_finite": "skip"}}, 1e-4, id="rankings"
        ),
        pytest.param({"losses": {"gan": 0.1, "gan_start_step": 4}}, 1e-3, id="gan"),
        pytest.param(
            {"tokenizer": {"checkpoint": "made"}, "train": {"parts": "entropy"}}, 1e-4, id="entropy model alone"
        ),
        # rounding to eight bits makes more of every difference
        pytest.param({"train": {"precision": "bf16"}}, 1e-2, id="bf16"),
    ],
)
def test_fsdp2_goes_with(train_by_turns, configure, run_training, tmp_path, sections, tolerance):
    if "tokenizer" in sections:
        run_training(configure(train={"max_steps": 1}), "made")
        sections = sections | {"tokenizer": {"checkpoint": str(tmp_path / "made" / "checkpoint")}}
    train_by_turns([("ddp", DDP), ("fsdp2", FSDP2)], **sections)
    assert_same_course(tmp_path / "ddp", tmp_path / "fsdp2", tolerance, "train/loss")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"parallel": "fsdp"}, "train.parallel is 'fsdp'; expected ddp or fsdp2"),
        ({"parallel": "fsdp2", "num_workers": 1}, "train.num_workers is 1; expected at least 2 with parallel: fsdp2"),
        (
            {"parallel": "fsdp2", "num_workers": 2, "compile": True},
            "train.compile is True; expected false with parallel: fsdp2",
        ),
    ],
)
def test_what_does_not_go_with_fsdp2_is_refused(configure, keys, message):
    with pytest.raises(BadInput, match=message):
        configure(train=keys)


def test_a_generator_is_not_sharded(configure):
    with pytest.raises(BadInput, match="train_generator.parallel is 'fsdp2'; expected 'ddp': only tokenizers"):
        configure(train_generator=FSDP2 | {"num_workers": 2})


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_worker_holds_half_and_a_snapshot_is_whole(two_processes, configure, optimizer):
    two_processes(HALVES, configure(train=STEPS | FSDP2 | {"optimizer": optimizer}).to_dict())


@pytest.mark.slow
def test_muon_orthogonalises_whole_matrices_of_workers_that_hold_halves(two_processes, configure):
    # Without clipping: its norm is summed in parts.
    two_processes(STEPS_OF_BOTH, configure(train=STEPS | FSDP2 | {"optimizer": "muon", "clip_norm": 0}).to_dict())
