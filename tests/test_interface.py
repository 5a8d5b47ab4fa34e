"""The contract of the jobs, docs/interface.md: a change here is a change there.

A made stage stands for the real ones, in a process of its own: the contract is `pipeline/core/job.py`'s, whatever
the stage.
"""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipeline.core.config import Config
from pipeline.core.presets import load_config

JOB = '''
"""Do a made thing."""

from pipeline.core.job import main
from pipeline.core.stages import MADE, NEXT, READS, STAGES

STAGES |= {"made": "made_stage", "inner": "inner_stage"}
READS["made"] = "data train"
NEXT["made"] = ("made", "do it again", "data.shards")
MADE["made"] = ("tokenizer.checkpoint", "made")
if __name__ == "__main__":
    main("made", __doc__)
'''

STAGE = """
import pathlib, time
from pipeline.core.errors import BadInput, Stopped
from pipeline.core.job import run_nested

def check(config):
    if config.tracking.experiment == "unwelcome":
        raise BadInput("tracking.experiment is 'unwelcome'; expected another")

def default_name(config):
    return f"{config.preset}-made"

def run(run):
    act = run.config.tracking.experiment
    print("working")
    if act == "refuse_at_once":
        raise BadInput("train.seed is 1; expected 0, as this run was begun, or a new run.name")
    run.log({"loss": 1.0}, step=1)
    run.results["psnr"] = 20.0
    run.outputs["made"] = str(run.folder / "made")
    if act == "fail":
        raise ZeroDivisionError("a made failure")
    if act == "refuse":
        raise BadInput("data.source is '/x'; expected images")
    if act == "nest":
        run_nested("inner", run.config)
    if act == "wait":
        wait(run)

def wait(run):
    pathlib.Path("waiting").touch()
    while not run.should_stop:
        time.sleep(0.01)
    raise Stopped("asked to")
"""

INNER = """
import pathlib, time

def check(config):
    pass

def default_name(config):
    return "inner"

def run(run):
    pathlib.Path("waiting").touch()
    while not run.should_stop:  # a stage that ends as it would have, the stop notwithstanding
        time.sleep(0.01)
"""

SUMMARY_KEYS = {
    "schema_version", "stage", "status", "error", "exit_code", "command", "config_sha256", "seed", "commit", "dirty",
    "hardware", "versions", "started", "seconds", "inputs", "made_of", "outputs",
    "mlflow_run_id", "results",
}  # fmt: skip
STABLE_KEYS = {
    "run.output", "run.name", "data.source", "data.heldout_source", "data.shards", "data.image_size",
    "train.num_workers", "train.max_steps", "train.max_minutes", "train.seed", "train.global_batch_size",
    "tokenizer.checkpoint", "filter.score", "filter.rounds", "filter.rule", "filter.threshold", "tokens.path",
    "evaluate.max_images", "evaluate.thresholds", "generator.checkpoint", "benchmark.kind", "tracking.uri",
    "tracking.experiment",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with the made job; its stage acts on tracking.experiment."""
    for name, text in {"job.py": JOB, "made_stage.py": STAGE, "inner_stage.py": INNER}.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def start(folder: Path, repository: Path, monkeypatch: pytest.MonkeyPatch):
    """Starts the made job and returns the process."""
    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.setenv("COLUMNS", "120")

    def start(*arguments: str, cwd: Path = folder) -> subprocess.Popen[str]:
        command = [sys.executable, str(folder / "job.py"), *arguments]
        return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


@pytest.fixture
def finish(start):
    """Runs the made job to its end; returns exit code, stdout, stderr."""

    def finish(*arguments: str, **options: Path) -> tuple[int, str, str]:
        process = start(*arguments, **options)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    return finish


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}


def wait_for(path: Path) -> None:
    limit = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < limit, f"{path} did not appear"
        time.sleep(0.02)


def test_stdout_is_the_run_folder_and_what_differs_from_the_defaults_is_told(finish, folder):
    code, out, err = finish("smoke", "run.name=one", "tracking.experiment=go", "train.max_steps=1e3")
    assert (code, out) == (0, f"RUN_FOLDER={folder / 'runs' / 'one'}\n")
    assert load_config(str(folder / "runs" / "one" / "config.yaml")).train.max_steps == 1000
    head, rest = err.split("working\n")
    assert [" ".join(line.split()) for line in head.splitlines()] == [
        "made: preset smoke, run folder runs/one",
        "data source=samples rows_per_shard=256",
        "train global_batch_size=16 warmup_steps=5 log_every=5 validate_every=10 validation_images=32",
        "checkpoint_every=10",
        "all else has its default: --dry-run shows it, --help SECTION explains",
    ]
    assert rest.splitlines()[:2] == ["made made:", "  made  runs/one/made"]


def test_a_run_ends_with_the_command_that_comes_next_and_it_works_when_pasted(finish, folder):
    shards = folder / "my shards"
    typed = ("smoke", "run.name=one", f"data.shards={shards}", "tokenizer.checkpoint=x", "tracking.experiment=go")
    for name in ("smoke-made", "smoke-made-2"):  # the second does not collide with the first
        code, _, err = finish(*typed)
        assert code == 0
        *_, why, command = err.splitlines()
        assert why == "next, do it again:"
        words = shlex.split(command)
        assert Path(words[0]).resolve() == Path(sys.executable).resolve()
        assert words[1:4] == [str(folder / "made.py"), "smoke", "tracking.experiment=go"]
        assert words[4:6] == ["data.shards=my shards", "tokenizer.checkpoint=runs/one/made"]
        (folder / "made.py").write_text(JOB)
        pasted = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, timeout=60)
        assert pasted.stdout == f"RUN_FOLDER={folder / 'runs' / name}\n", pasted.stderr
        shutil.rmtree(folder / "runs" / "one")


def test_a_stopped_run_ends_with_the_command_that_goes_on_with_it(start, folder):
    process = start("smoke", "tracking.experiment=wait")
    wait_for(folder / "waiting")
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert err.splitlines()[-1].endswith("made.py smoke tracking.experiment=wait run.name=smoke-made --resume")


def test_a_finished_run_leaves_exactly_the_promised_files_and_keys(finish, folder):
    finish("smoke", "run.name=one", "tracking.experiment=go")
    run = folder / "runs" / "one"
    assert files(run) == {"config.yaml", "summary.json", "metrics.jsonl", ".lock"}
    found = summary(run)
    assert set(found) == SUMMARY_KEYS
    assert (found["schema_version"], found["stage"], found["status"]) == (1, "made", "finished")
    assert (found["exit_code"], found["error"], found["results"]) == (0, None, {"psnr": 20.0})
    assert found["command"].endswith("job.py smoke run.name=one tracking.experiment=go")
    line = json.loads((run / "metrics.jsonl").read_text())
    assert set(line) == {"time", "step", "metrics"}


def test_without_a_preset_it_is_demo_and_the_stage_names_the_folder(finish, folder):
    code, out, err = finish("tracking.experiment=go")
    assert code == 0, err
    assert out.endswith(f"RUN_FOLDER={folder / 'runs' / 'demo-made'}\n")


def test_a_dry_run_prints_the_configuration_and_writes_nothing(finish, folder):
    before = files(folder)
    code, out, _ = finish("smoke", "--dry-run")
    assert code == 0
    assert yaml.safe_load(out)["run"]["name"] == "smoke-made"
    assert "RUN_FOLDER" not in out
    assert files(folder) == before


def test_a_dry_run_refuses_what_a_run_would_refuse(finish, folder):
    (folder / "runs" / "one").mkdir(parents=True)
    (folder / "runs" / "one" / "file").touch()
    assert finish("smoke", "run.name=one", "--dry-run")[0] == 2
    assert finish("smoke", "run.name=one", "--dry-run", "--resume")[0] == 0
    assert finish("smoke", "tracking.experiment=unwelcome", "--dry-run")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["smoek"], "error: unknown preset 'smoek' (did you mean 'smoke'?)"),
        (["smoke", "train.sede=1"], "error: unknown key 'train.sede' (did you mean 'train.seed'?)"),
        (["smoke", "train.seed=x"], "error: train.seed is 'x'; expected a whole number"),
        (["smoke", "tracking.experiment=unwelcome"], "error: tracking.experiment is 'unwelcome'; expected another"),
    ],
)
def test_bad_input_is_one_sentence_exit_code_2_and_no_folder(finish, folder, arguments, sentence):
    before = files(folder)
    code, out, err = finish(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(sentence)
    assert len(err.splitlines()) == 1
    assert files(folder) == before


def test_an_existing_name_needs_resume(finish, folder):
    finish("smoke", "run.name=one", "tracking.experiment=go")
    code, _, err = finish("smoke", "run.name=one", "tracking.experiment=go")
    assert code == 2
    assert "exists; expected a new run.name, or --resume" in err
    assert finish("smoke", "run.name=one", "tracking.experiment=go", "--resume")[0] == 0
    assert len((folder / "runs" / "one" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("mistyped", [["train.seed=1"], ["train.seed=1", "data.image_size=64", "tracking.uri="]])
def test_a_mistyped_resume_leaves_the_run_as_it_was(finish, folder, mistyped):
    finish("smoke", "run.name=one", "tracking.experiment=go")
    before = {name: (folder / "runs" / "one" / name).read_bytes() for name in ("summary.json", "config.yaml")}
    code, out, err = finish("smoke", "run.name=one", "tracking.experiment=refuse_at_once", *mistyped, "--resume")
    assert (code, out.splitlines()[-1]) == (2, f"RUN_FOLDER={folder / 'runs' / 'one'}")
    assert err.endswith("error: train.seed is 1; expected 0, as this run was begun, or a new run.name\n")
    assert {name: (folder / "runs" / "one" / name).read_bytes() for name in before} == before
    assert summary(folder / "runs" / "one")["status"] == "finished"


def test_bad_input_that_is_met_after_work_has_gone_on_is_recorded(finish, folder):
    finish("smoke", "run.name=one", "tracking.experiment=go")
    assert finish("smoke", "run.name=one", "tracking.experiment=refuse", "--resume")[0] == 2
    assert summary(folder / "runs" / "one")["status"] == "failed"


@pytest.mark.parametrize(
    ("name", "meant"), [("onee", " (did you mean 'one'?)"), ("quite-another", ""), ("", ""), ("empty", "")]
)
def test_resuming_what_is_not_there_is_refused_with_the_nearest_name(finish, folder, name, meant):
    finish("smoke", "run.name=one", "tracking.experiment=go")
    (folder / "runs" / "empty").mkdir()
    code, out, err = finish("smoke", f"run.name={name}", "--resume")
    assert (code, out) == (2, "")
    run = folder / "runs" / (name or "smoke-made")
    assert err == (
        f"error: run folder '{run}' does not exist, so that --resume has nothing to go on with{meant}; expected "
        "the run.name of one that does, or no --resume\n"
    )
    assert {path.name for path in (folder / "runs").iterdir()} == {"one", "empty"}


def test_the_switch_make_is_a_value_of_the_configuration(finish, folder):
    for arguments, made in (([], False), (["--make"], True), (["run.make=true"], True)):
        assert yaml.safe_load(finish("smoke", "--dry-run", *arguments)[1])["run"]["make"] is made


@pytest.mark.parametrize(
    ("act", "code", "error"),
    [("fail", 1, "ZeroDivisionError: a made failure"), ("refuse", 2, "data.source is '/x'; expected images")],
)
def test_a_run_that_fails_says_so_in_its_summary(finish, folder, act, code, error):
    returned, out, err = finish("smoke", "run.name=one", f"tracking.experiment={act}")
    found = summary(folder / "runs" / "one")
    assert returned == code
    assert (found["status"], found["exit_code"], found["error"]) == ("failed", code, error)
    assert f"RUN_FOLDER={folder / 'runs' / 'one'}\n" in out
    assert err.endswith(f"error: {error}\n")  # and no next command
    assert ("Traceback" in err) == (code == 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_run_in_good_order(start, folder, number):
    process = start("smoke", "run.name=one", "tracking.experiment=wait")
    wait_for(folder / "waiting")
    assert summary(folder / "runs" / "one")["status"] == "running"
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    found = summary(folder / "runs" / "one")
    assert process.returncode == 3
    assert (found["status"], found["exit_code"], found["error"]) == ("stopped", 3, "asked to")
    assert out.endswith(f"RUN_FOLDER={folder / 'runs' / 'one'}\n")


def test_a_signal_reaches_the_stage_that_makes_an_input(start, folder):
    process = start("smoke", "run.name=one", "tracking.experiment=nest")
    wait_for(folder / "waiting")
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 3
    assert summary(folder / "runs" / "inner")["status"] == "finished"
    assert summary(folder / "runs" / "one")["status"] == "stopped"


def test_a_second_process_on_the_same_folder_is_refused(start, finish, folder):
    first = start("smoke", "run.name=one", "tracking.experiment=wait")
    wait_for(folder / "waiting")
    code, _, err = finish("smoke", "run.name=one", "tracking.experiment=go", "--resume")
    first.terminate()
    first.communicate(timeout=30)
    assert code == 2
    assert "is in use by another process" in err
    assert first.returncode == 3


def test_a_relative_output_in_a_copied_working_directory_is_refused(finish, folder, monkeypatch):
    copy = folder / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    code, _, err = finish("smoke", "tracking.experiment=go", cwd=copy)
    assert code == 2
    assert "run.output is 'runs', which would vanish" in err
    monkeypatch.setenv("TATOK_ROOT", str(folder / "lasting"))
    code, out, err = finish("smoke", "tracking.experiment=go", cwd=copy)
    assert code == 0, err
    assert f"RUN_FOLDER={folder / 'lasting' / 'runs' / 'smoke-made'}\n" in out


def test_the_keys_that_stay_are_there():
    known = {
        f"{section}.{key}" for section, keys in Config().to_dict().items() if isinstance(keys, dict) for key in keys
    }
    assert known >= STABLE_KEYS


def test_the_documentation_names_the_same_keys(repository):
    text = (repository / "docs" / "interface.md").read_text()
    table = text.partition("### summary.json")[2].partition("### ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)) == SUMMARY_KEYS
    stay = text.partition("## Keys that stay")[2].partition("\n\n")[2].partition("\n\n")[0]
    assert set(re.findall(r"`([\w.]+)`", stay)) == STABLE_KEYS
