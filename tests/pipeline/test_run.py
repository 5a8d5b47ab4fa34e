"""The run folder: made once, held by one process, and telling how the run stands."""

import fcntl
import json
import math
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from pipeline.core import run as run_module
from pipeline.core.config import Config
from pipeline.core.errors import BadInput
from pipeline.core.presets import load_config
from pipeline.core.run import (
    Run,
    check_folder,
    commit,
    hardware,
    numbered_name,
    parse_metrics,
    read_metrics,
    read_summary,
    versions,
    wait_while_held,
)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config("smoke", [f"run.output={tmp_path}", "train.seed=5"])


@pytest.fixture
def run(config: Config):
    opened = Run.open("train", config, "one", resume=False, command=["jobs/train.py", "smoke", "run.name=a b"])
    yield opened
    opened.close()


def summary(run: Run) -> dict:
    return read_summary(run.folder)


def test_an_opened_run_says_that_it_is_running_and_what_was_asked_for(run, config):
    found = summary(run)
    assert (found["status"], found["exit_code"], found["error"]) == ("running", None, None)
    assert (found["stage"], found["seed"]) == ("train", 5)
    assert found["command"] == "jobs/train.py smoke 'run.name=a b'"
    assert load_config(str(run.folder / "config.yaml")) == config


def test_the_summary_holds_what_the_stage_filled_in(run):
    run.results, run.outputs = {"psnr": 24.5, "loss": math.nan}, {"checkpoint": "/x"}
    run.inputs, run.mlflow_run_id = {"shards": {"path": "/s", "sha256": "0"}}, "abc"
    run.write_summary("finished", exit_code=0)
    found = summary(run)
    assert found["results"] == {"psnr": 24.5, "loss": None}
    assert (found["outputs"], found["inputs"]["shards"]["path"]) == ({"checkpoint": "/x"}, "/s")
    assert found["mlflow_run_id"] == "abc"
    assert found["seconds"] >= 0


def test_an_existing_folder_needs_resume(run, config):
    run.close()
    with pytest.raises(BadInput, match="'.*one' exists; expected a new run.name, or --resume"):
        Run.open("train", config, "one", resume=False)


def test_an_empty_folder_and_an_absent_one_are_free_and_a_file_is_not(tmp_path):
    check_folder(tmp_path / "absent", resume=False)
    (tmp_path / "empty").mkdir()
    check_folder(tmp_path / "empty", resume=False)
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="exists"):
        check_folder(tmp_path / "file", resume=False)


def test_what_measures_anew_gets_the_next_free_number_and_resumes_the_last(tmp_path):
    assert numbered_name(tmp_path, "smoke-evaluate", resume=False) == "smoke-evaluate"
    assert numbered_name(tmp_path, "smoke-evaluate", resume=True) == "smoke-evaluate"
    for number, name in enumerate(("smoke-evaluate", "smoke-evaluate-2", "smoke-evaluate-3"), 1):
        (tmp_path / name).mkdir()
        assert numbered_name(tmp_path, "smoke-evaluate", resume=False) == name  # empty: free
        (tmp_path / name / "config.yaml").touch()
        assert numbered_name(tmp_path, "smoke-evaluate", resume=False) == f"smoke-evaluate-{number + 1}"
        assert numbered_name(tmp_path, "smoke-evaluate", resume=True) == name


@pytest.mark.parametrize(
    ("status", "name", "sha256", "sentence"),
    [
        (
            "finished",
            "/t2",
            "b",
            "tokenizer.checkpoint is '/t2', but the run in '.*one' was begun with '/t1'; expected",
        ),
        ("finished", "/t1", "b", "tokenizer.checkpoint '/t1' is not, or no longer, what the run in .* was begun with"),
        ("finished", "/t1", "a", None),
        ("failed", "/t2", "b", None),
    ],
)
def test_a_finished_run_is_not_measured_anew_with_other_inputs(run, config, status, name, sha256, sentence):
    run.inputs = {"tokenizer": {"path": "/t1", "sha256": "a"}}
    run.write_summary(status)
    run.close()
    again = Run.open("train", config.with_values("tokenizer", checkpoint=name), "one", resume=True)
    again.inputs = {"tokenizer": {"path": name, "sha256": sha256}, "shards": {"path": "/s", "sha256": "c"}}
    with pytest.raises(BadInput, match=sentence) if sentence else nullcontext():
        again.check_inputs()
    again.close()


def test_resuming_goes_on_with_the_same_mlflow_run(run, config):
    run.mlflow_run_id = "abc"
    run.write_summary("stopped", "asked", 3)
    run.close()
    again = Run.open("train", config, "one", resume=True)
    assert again.resumed
    assert (again.mlflow_run_id, summary(again)["status"]) == ("abc", "running")
    again.close()


def test_resuming_what_was_never_begun_begins_it(config):
    run = Run.open("train", config, "new", resume=True)
    assert not run.resumed
    run.close()


def test_a_folder_that_is_in_use_is_refused(run, config):
    with pytest.raises(BadInput, match="in use by another process"):
        Run.open("train", config, "one", resume=True)


def test_a_folder_of_another_stage_is_refused_and_left_free(run, config):
    run.close()
    with pytest.raises(BadInput, match="holds a run of 'train'; expected one of 'evaluate'"):
        Run.open("evaluate", config, "one", resume=True)
    Run.open("train", config, "one", resume=True).close()


def test_a_folder_that_cannot_be_made_is_refused(config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="cannot be made: Not a directory"):
        Run.open("train", config, "file/inside", resume=False)


def test_logged_metrics_are_lines_of_json_with_time_and_step(run):
    before = time.time()
    run.log({"loss": 0.5}, step=1)
    run.log({"loss": math.nan}, step=2)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["metrics"]) for line in lines] == [(1, {"loss": 0.5}), (2, {"loss": None})]
    assert before <= lines[0]["time"] <= lines[1]["time"] <= time.time()


def test_rewound_metrics_end_at_the_step_and_go_on_from_there(run):
    run.rewind_metrics(0)  # nothing was logged yet
    for step in (1, 2, 3):
        run.log({"loss": 1.0}, step)
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"time": 1, "st')  # torn by a kill
    run.rewind_metrics(2)
    run.log({"loss": 2.0}, 3)
    assert [(line.step, line.metrics["loss"]) for line in read_metrics(run.folder)] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_only_whole_lines_of_metrics_that_are_understood_are_read(run):
    assert read_metrics(run.folder) == []
    run.log({"loss": math.nan, "psnr": 20}, step=1)
    run.log({"loss": 0.5}, step=2)
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('[]\n{"step": 3}\n{"time": 1, "st')
    assert [line.step for line in read_metrics(run.folder)] == [1, 2]
    (line,) = read_metrics(run.folder, holding="psnr")
    assert (line.step, line.metrics["psnr"]) == (1, 20.0)
    assert math.isnan(line.metrics["loss"])
    assert parse_metrics(b"") == []


@pytest.mark.parametrize("text", ['{"status": "fin', "[]"])
def test_a_torn_or_foreign_summary_is_an_error(run, text):
    (run.folder / "summary.json").write_text(text)
    with pytest.raises(ValueError):  # noqa: PT011 - whatever the words
        read_summary(run.folder)


def test_asking_to_stop_is_remembered(run):
    assert not run.should_stop
    run.request_stop()
    assert run.should_stop


def test_the_commit_is_that_of_the_start_and_not_of_the_end(run, monkeypatch):
    first = summary(run)["commit"]
    monkeypatch.setattr(run_module, "commit", lambda: {"commit": "later", "dirty": False})
    run.write_summary("finished", exit_code=0)
    assert summary(run)["commit"] == first


def test_outside_a_clone_the_commit_is_unknown_or_given(monkeypatch):
    def no_git(*arguments: object, **options: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    assert commit() == {"commit": "unknown", "dirty": False}
    monkeypatch.setenv("TATOK_COMMIT", "abc")
    assert commit()["commit"] == "abc"


def test_hardware_and_versions_are_those_of_this_machine():
    assert hardware()["cpus"] >= 1
    assert hardware()["memory_gib"] > 0
    assert {"python", "torch", "ray", "mlflow"} <= set(versions())


def test_a_folder_that_another_process_holds_is_waited_for(tmp_path):
    assert not wait_while_held(tmp_path / "new", 60)
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        started = time.monotonic()
        assert wait_while_held(tmp_path, 0.3)
        assert 0.3 <= time.monotonic() - started < 30
    assert not wait_while_held(tmp_path, 60)
