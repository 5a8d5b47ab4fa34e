"""The repository keeps its own rules: imports, packages, jobs, presets, links."""

import ast
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from setuptools import find_packages

from pipeline.core.presets import load_config, preset_names
from pipeline.core.stages import BENCHMARKS, STAGES, find_benchmark, find_stage

REPOSITORY = Path(__file__).parents[1]
JOBS = sorted((REPOSITORY / "jobs").glob("*.py"))
PRESETS = sorted((REPOSITORY / "pipeline" / "configs").rglob("*.yaml"))
PAGES = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")]
HEAVY = {"torch", "ray", "mlflow", "matplotlib", "pandas", "skimage", "sklearn", "scipy"}


def name(path: Path) -> str:
    return path.stem


def test_imports_keep_their_direction():
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stdout


@pytest.mark.parametrize("job", JOBS, ids=name)
def test_a_job_imports_only_python_and_the_project(job):
    tree = ast.parse(job.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    tops = {module.partition(".")[0] for module in imported}
    assert tops <= sys.stdlib_module_names | {"pipeline", "tatok_model"}


def test_the_listed_packages_are_those_in_the_tree():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    found = find_packages(str(REPOSITORY), include=["tatok_model*", "pipeline*"])
    assert sorted(project["tool"]["setuptools"]["packages"]) == sorted(found)
    folders = {path.parent for top in ("tatok_model", "pipeline") for path in (REPOSITORY / top).rglob("*.py")}
    assert {str(folder.relative_to(REPOSITORY)).replace("/", ".") for folder in folders} == set(found)


def test_no_job_bears_the_name_of_a_standard_module():
    assert JOBS
    assert not {job.stem for job in JOBS} & sys.stdlib_module_names


def test_every_job_that_calls_main_is_a_stage_and_every_stage_has_its_functions():
    assert set(STAGES) == {job.stem for job in JOBS if "pipeline.core.job import main" in job.read_text()}
    for name in STAGES:
        assert all(callable(getattr(find_stage(name), function)) for function in ("check", "default_name", "run"))
    for kind in BENCHMARKS:
        assert all(callable(getattr(find_benchmark(kind), function)) for function in ("check", "run"))


def test_every_preset_file_is_known_by_its_name():
    assert len(PRESETS) >= 2
    assert [preset.stem for preset in PRESETS] == preset_names()


@pytest.mark.parametrize("preset", PRESETS, ids=name)
def test_a_preset_loads_and_opens_with_its_command_and_what_to_expect(preset):
    assert load_config(preset.stem).preset == preset.stem
    head = re.match(r"(#.*\n)+", preset.read_text())
    assert head, "expected a comment at the top"
    commands = re.findall(r"python jobs/(\w+)\.py(?: (\w+))?", head[0])
    assert commands, "expected the command that runs it"
    assert {job for job, _ in commands} <= {job.stem for job in JOBS}
    assert preset.stem in {used or "demo" for _, used in commands}
    assert re.search(r"^# Expected\b", head[0], flags=re.MULTILINE), "expected what to expect"


@pytest.mark.parametrize("job", JOBS, ids=name)
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], {0}),
        (["--help", "train"], {0}),
        (["no_such_preset"], {2}),
        (["smoke", "no.key=1"], {2}),
        (["smoke", "--dry-run"], {0, 2}),
    ],
    ids=["help", "help of a section", "bad preset", "bad key", "dry run"],
)
def test_a_job_answers_before_it_loads_anything_heavy(job, arguments, code, tmp_path):
    started = time.monotonic()
    command = [sys.executable, "-X", "importtime", job, *arguments]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    seconds = time.monotonic() - started
    lines = finished.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines if line.startswith("import time:")}
    said = [line for line in lines if not line.startswith("import time:")]
    assert finished.returncode in code, said
    assert finished.returncode == 0 or said[-1].startswith("error: ")
    assert not imported & HEAVY
    assert "pipeline" in imported  # else nothing was seen
    assert seconds < 10
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_inside_the_documentation_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
