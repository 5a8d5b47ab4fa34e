import json
import math

import pytest

from pipeline.tracking.mlflow_store import MetricPoint
from pipeline.tracking.sender import Feed


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def write(path, *steps, name="loss", mode="a"):
    with open(path, mode) as file:
        for step in steps:
            file.write(json.dumps({"time": 1000.5 + step, "step": step, "metrics": {name: float(step)}}) + "\n")


def take(feed, limit=1000):
    batch = feed.next(limit)
    feed.accept(batch)
    return [(point.name, point.step) for point in batch.points]


def test_a_point_keeps_name_value_time_and_step(path):
    write(path, 3)
    feed = Feed(path, {})
    feed.commit()
    assert feed.next().points == [MetricPoint("loss", 3.0, 1003500, 3)]


def test_there_is_nothing_before_the_first_commit_nor_without_a_file(path):
    feed = Feed(path, {})
    feed.commit()
    assert take(feed) == []
    write(path, 1)
    assert take(feed) == []


def test_what_comes_after_the_last_commit_is_held_back(path):
    feed = Feed(path, {})
    write(path, 1, 2)
    feed.commit()
    write(path, 3)
    assert take(feed) == [("loss", 1), ("loss", 2)]
    assert take(feed) == []
    feed.commit()
    assert take(feed) == [("loss", 3)]


def test_batches_follow_the_order_of_the_file_and_stay_within_the_limit(path):
    write(path, *range(25))
    feed = Feed(path, {})
    feed.commit()
    batches = [take(feed, limit=10) for _ in range(4)]
    assert [len(batch) for batch in batches] == [10, 10, 5, 0]
    assert [step for batch in batches for _, step in batch] == list(range(25))


def test_a_batch_that_is_not_accepted_comes_again(path):
    write(path, 1, 2)
    feed = Feed(path, {})
    feed.commit()
    assert feed.next() == feed.next()


def test_a_new_feed_skips_what_an_earlier_one_has_sent(path):
    write(path, 1, 2)
    first = Feed(path, {})
    first.commit()
    take(first)
    write(path, 3)
    second = Feed(path, first.sent)
    second.commit()
    assert take(second) == [("loss", 3)]


def test_a_file_rewound_to_an_older_checkpoint_brings_no_step_twice(path):
    feed = Feed(path, {})
    write(path, *range(10))
    feed.commit()
    take(feed)
    new = path.with_name("new")
    write(new, *range(4))
    write(new, *range(4, 20), name="psnr")  # longer again than what was read, before anybody looked
    write(new, *range(4, 12))
    new.replace(path)
    feed.commit()
    assert take(feed) == [("psnr", step) for step in range(4, 20)] + [("loss", 10), ("loss", 11)]


def test_names_are_counted_separately(path):
    feed = Feed(path, {"loss": 5})
    write(path, 5)
    write(path, 5, name="psnr")
    feed.commit()
    assert take(feed) == [("psnr", 5)]


def test_a_name_logged_twice_at_a_step_is_sent_once(path):
    write(path, 1, 1)
    feed = Feed(path, {})
    feed.commit()
    assert take(feed) == [("loss", 1)]


def test_a_line_still_being_written_waits(path):
    write(path, 1)
    with open(path, "a") as file:
        file.write('{"time": 1, "step": 2, "met')
    feed = Feed(path, {})
    feed.commit()
    assert take(feed) == [("loss", 1)]
    with open(path, "a") as file:
        file.write('rics": {"loss": 2}}\n')
    feed.commit()
    assert take(feed) == [("loss", 2)]


@pytest.mark.parametrize("line", ["not json", "[]", '{"step": 1}', '{"time": 0, "step": 1, "metrics": {"a": "b"}}'])
def test_a_line_that_is_not_understood_does_not_hold_up_the_others(path, line):
    path.write_text(line + "\n")
    write(path, 2)
    feed = Feed(path, {})
    feed.commit()
    assert take(feed) == [("loss", 2)]


def test_null_is_not_a_number(path):
    path.write_text('{"time": 0, "step": 1, "metrics": {"loss": null, "psnr": 20}}\n')
    feed = Feed(path, {})
    feed.commit()
    loss, psnr = feed.next().points
    assert math.isnan(loss.value)
    assert psnr.value == 20
