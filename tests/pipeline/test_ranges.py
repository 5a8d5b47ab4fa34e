"""The skeleton of work in pieces: every range is made once, whoever makes it, and a run goes on as it was begun."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

from pipeline.core import ranges
from pipeline.core.errors import BadInput, Stopped
from pipeline.core.presets import load_config
from pipeline.core.ranges import Part, PartMaker, Shard, keep_plan, prepare_folders, rates, run_ranges, write_shard
from pipeline.core.run import Run


@dataclass(frozen=True)
class Task:
    number: int
    rows: int = 2


@dataclass(frozen=True)
class NumberWork:
    """Writes the number of a range into a file."""

    folder: Path
    key: str = "key"
    folders: ClassVar[tuple[str, ...]] = ("numbers",)
    made: list[int] = field(default_factory=list)

    def worker(self, models: str, device: str) -> Callable[[Task], Part]:
        def make(task: Task) -> Part:
            self.made.append(task.number)
            data = f"{models} {task.number} on {device}".encode()
            file = write_shard(self.folder, f"numbers/{task.number}", data, task.rows)
            return Part(self.key, task.number, {"file": file}, seconds={"total": 1.0})

        return make


@pytest.fixture
def run(tmp_path: Path) -> Run:
    config = load_config("smoke", ["tokens.device=cpu"])
    (tmp_path / "run").mkdir()
    return Run("tokenize_images", config, tmp_path / "run")


def test_a_finished_range_is_not_made_again_unless_its_file_or_the_plan_changed(tmp_path: Path) -> None:
    prepare_folders(tmp_path, "parts", "numbers")
    work = NumberWork(tmp_path)

    def is_new(key: str = "key") -> bool:
        return bool(PartMaker(NumberWork(tmp_path, key, work.made), "number", "cpu").part(Task(0)).seconds)

    assert is_new()
    assert not is_new()
    (tmp_path / "numbers/0").write_bytes(b"other")
    assert is_new()
    (tmp_path / "numbers/0").unlink()
    assert is_new()
    assert is_new("another")
    assert len(work.made) == 4


@pytest.mark.parametrize("rejected", [None, [("a.png", "empty file")], []])
def test_a_part_is_read_as_it_was_written_but_for_times(rejected: list[tuple[str, str]] | None) -> None:
    files = {"train": Shard("a", 1, "0"), "heldout": Shard("b", 2, "1")}
    part = Part("key", 3, files, rejected, {"total": 1.0}, (1.0,))
    assert Part.from_dict(part.to_dict()) == Part("key", 3, files, rejected)


def test_models_are_not_loaded_where_all_is_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    work = NumberWork(run.folder)
    tasks = [Task(0), Task(1)]
    run_ranges(run, "number", work, "number", tasks, "tokens")
    monkeypatch.setattr(NumberWork, "worker", lambda *arguments: pytest.fail("loaded"))
    parts, _ = run_ranges(run, "number", work, "number", tasks, "tokens")
    assert [part.number for part in parts] == [0, 1]


def test_a_stop_keeps_what_is_done(run: Run) -> None:
    work = NumberWork(run.folder)
    run.request_stop()
    with pytest.raises(Stopped, match="1 of 3 files are made; --resume makes the others"):
        run_ranges(run, "number", work, "number", [Task(0), Task(1), Task(2)], "tokens")
    parts, _ = run_ranges(run, "number", work, "number", [Task(0)], "tokens")
    assert (parts[0].seconds, work.made) == ({}, [0]), "the last of all is not stopped for"


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # Ray Data reads its own old settings
def test_two_actors_give_the_parts_of_one_process(ray_session: ModuleType, tmp_path: Path, run: Run) -> None:
    tasks = [Task(number) for number in range(5)]
    alone, _ = run_ranges(run, "number", NumberWork(run.folder), "number", tasks, "tokens")
    config = load_config("smoke", ["tokens.device=cpu", "tokens.num_workers=2"])
    together, _ = run_ranges(
        Run("tokenize_images", config, tmp_path / "two"), "number", NumberWork(tmp_path / "two"), "number", tasks,
        "tokens",
    )  # fmt: skip
    assert together == alone


def test_leftovers_of_a_killed_worker_are_removed_unless_others_write_there(tmp_path: Path) -> None:
    prepare_folders(tmp_path, "tokens")
    for name in (".train-00000.parquet.7.tmp", "train-00001.parquet"):
        (tmp_path / "tokens" / name).touch()
    prepare_folders(tmp_path, "tokens", tidy=False)
    assert len(list((tmp_path / "tokens").iterdir())) == 2
    prepare_folders(tmp_path, "tokens")
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == ["train-00001.parquet"]


def test_rates_are_of_what_was_made_now() -> None:
    seconds = {"total": 2.0, "encode": 1.0, "rank": 0.5}
    parts = [
        Part("", 0, {"file": Shard("a", 10, "")}),
        Part("", 1, {"file": Shard("b", 30, "")}, seconds=seconds),
    ]
    assert rates(parts, 4.0, ("encode", "rank")) == {
        "images_per_second": 15,
        "stage_images_per_second": 7.5,
        "encode_images_per_second": 30,
        "encode_share": 0.5,
        "rank_images_per_second": 60,
        "rank_share": 0.25,
    }
    assert rates(parts[:1], 4.0, ("encode", "rank")) == {}


def test_a_run_goes_on_only_with_what_it_was_begun_with(tmp_path: Path) -> None:
    """Inputs are told apart by fingerprints and called by their names."""
    run = Run("tokenize_images", load_config("smoke", ["data.shards=/new"]), tmp_path)
    run.earlier = {"inputs": {"shards": {"path": "/old", "sha256": "a"}}}
    facts = {"filter.rounds": 1, "data.shards": "a"}
    key = keep_plan(run, facts, [Task(0)])
    assert keep_plan(run, facts, [Task(0)]) == key
    with pytest.raises(BadInput, match=r"filter.rounds is 8, but the run in '.*' was begun with 1; expected the same"):
        keep_plan(run, {**facts, "filter.rounds": 8}, [Task(0)])
    with pytest.raises(BadInput, match=r"data.shards is '/new', but the run in '.*' was begun with '/old'; expected"):
        keep_plan(run, {**facts, "data.shards": "b"}, [Task(0)])
    run.earlier["inputs"]["shards"]["path"] = "/new"
    with pytest.raises(BadInput, match=r"data.shards '/new' is not, or no longer, what the run in .* a new run.name"):
        keep_plan(run, {**facts, "data.shards": "b"}, [Task(0)])


@pytest.mark.parametrize(
    ("there", "most", "workers", "tasks", "expected"),
    [
        ({"CPU": 4.0}, {"CPU": 4.0}, 0, 100, (4, 4)),
        ({"CPU": 4.0}, {"CPU": 64.0}, 0, 100, (4, 64)),
        ({"memory": 1.0}, {"CPU": 16.0}, 0, 100, (1, 16)),  # a head node without CPUs, before workers came
        ({"CPU": 4.0}, {"CPU": 64.0}, 8, 100, (8, 8)),
        ({"CPU": 4.0}, {"CPU": 64.0}, 0, 3, (3, 3)),
    ],
)
def test_the_pool_begins_with_what_is_there_and_may_grow(
    monkeypatch: pytest.MonkeyPatch, there: Any, most: Any, workers: int, tasks: int, expected: tuple[int, int]
) -> None:
    made: dict[str, int] = {}
    strategy = SimpleNamespace(ActorPoolStrategy=lambda **sizes: made.update(sizes))
    monkeypatch.setattr(ranges, "most_resources", lambda ray: most)
    ranges.actor_pool(SimpleNamespace(cluster_resources=lambda: there, data=strategy), tasks, workers)
    assert (made["min_size"], made["max_size"]) == expected
