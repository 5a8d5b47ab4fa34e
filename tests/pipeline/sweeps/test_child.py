"""A trial's own run: what it copies of a training that is interrupted, repeated and torn."""

import json
from pathlib import Path

import pytest

from pipeline.core.run import Run
from pipeline.sweeps.driver import Child, _Lines


def line(step: int, psnr: float | None) -> str:
    return json.dumps({"time": 1.0, "step": step, "metrics": {"validation/psnr": psnr}}) + "\n"


def logged(folder: Path) -> list[tuple[int, float | None]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(entry["step"], entry["metrics"]["validation/psnr"]) for entry in map(json.loads, lines)]


@pytest.fixture
def begin(plan, configure):
    """Opens the child of the first trial, whose training folder is there; closes all at the end."""
    sweep = plan()
    run = Run.open("sweep", configure(), "sweep", resume=False)
    trial, opened = sweep.trials()[0], []
    sweep.training_folder(trial).mkdir()

    def make() -> Child:
        opened.append(Child(sweep, trial, run, None, {}))
        return opened[-1]

    yield make, sweep.training_folder(trial) / "metrics.jsonl"
    for child in opened:
        child.run.close()
    run.close()


def test_a_step_that_is_repeated_after_a_kill_is_copied_once(begin):
    make, source = begin
    child = make()
    source.write_text(line(1, 10.0) + line(2, 11.0))
    child.look()
    child.run.close()  # killed
    with open(child.run.folder / "metrics.jsonl", "a") as file:
        file.write('{"time": 1.0, "st')
    again = make()
    source.write_text(line(1, 10.0))  # a training that goes on rewinds to its checkpoint
    again.look()
    source.write_text(line(1, 10.0) + line(2, 11.5) + line(3, 12.0))
    again.look()
    assert logged(again.run.folder) == [(1, 10.0), (2, 11.0), (3, 12.0)]


def test_what_is_no_number_stays_none(begin):
    make, source = begin
    source.write_text(line(1, None))
    child = make()
    child.look()
    assert logged(child.run.folder) == [(1, None)]


def test_a_child_that_is_left_says_that_it_goes_on(begin):
    make, _ = begin
    child = make()
    child.leave()
    summary = json.loads((child.run.folder / "summary.json").read_text())
    assert (summary["status"], summary["exit_code"]) == ("stopped", 3)
    assert summary["error"] == "the sweep was stopped; it goes on with --resume"
    assert summary["stage"] == "trial"


def test_only_whole_lines_are_read_and_each_of_them_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = _Lines(path)
    assert lines.new() == []
    path.write_text(line(1, 1.0) + line(2, 2.0)[:9])
    assert [entry.step for entry in lines.new()] == [1]
    path.write_text(line(1, 1.0) + line(2, 2.0))
    assert [entry.step for entry in lines.new()] == [2]
    path.write_text(line(2, 5.0))  # written anew
    assert [entry.metrics["validation/psnr"] for entry in lines.new()] == [5.0]
