"""Progress without a terminal: whole lines, now and then."""

import re
import time

import pytest

from pipeline.core.console import Progress, duration, progress, say, say_once, short_path


def test_without_a_terminal_every_line_is_whole(capsys):
    with progress("shards", total=10, unit="images", done=3) as shown:
        shown.advance(3)
        shown.advance(4, loss="0.5")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("shards: 100% 10/10 images [")
    assert "loss=0.5" in lines[0]
    assert "\r" not in lines[0]


def test_a_line_appears_when_the_last_one_is_old_enough(capsys):
    shown = Progress("train", total=4, unit="steps", every_seconds=0.01)
    shown.advance(1)
    time.sleep(0.02)
    shown.advance(1)
    assert [line[:21] for line in capsys.readouterr().err.splitlines()] == ["train:  50% 2/4 steps"]
    shown.close()


def test_without_a_terminal_it_is_never_silent_for_long(capsys):
    shown = Progress("train", total=4, unit="steps", silent_seconds=0.2)
    time.sleep(0.9)  # nothing advances
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 4
    assert all(line.startswith("train:   0% 0/4 steps [") for line in lines)
    shown.close()
    time.sleep(0.4)
    assert len(capsys.readouterr().err.splitlines()) == 0  # closing adds nothing to an equal line, and ends it


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.04 s"), (12.3, "12 s"), (99, "99 s"), (100, "1.7 min"), (3600, "60 min"), (7200, "2 h"),
     (86400, "24 h"), (200_000, "2 days")],
)  # fmt: skip
def test_a_length_of_time_is_told_as_people_say_it(seconds, words):
    assert duration(seconds) == words


def test_a_line_that_was_said_is_not_repeated(capsys):
    for text in ("once, of this test", "twice, of this test", "once, of this test"):
        say_once(text)
    assert capsys.readouterr().err == "once, of this test\ntwice, of this test\n"


@pytest.mark.parametrize(
    ("root", "path", "shown"),
    [("", "runs/one", "runs/one"), ("", "/else/where", "/else/where"), ("", "owner/name", "owner/name"),
     ("/data", "runs/one", None)],
)  # fmt: skip
def test_paths_are_shown_as_a_command_here_may_have_them(monkeypatch, tmp_path, root, path, shown):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TATOK_ROOT", root)
    absolute = path if path.startswith(("/", "owner")) else str(tmp_path / path)
    assert short_path(absolute) == (shown or absolute)


def test_what_was_done_earlier_does_not_count_into_the_rate(capsys):
    shown = Progress("train", total=1000, unit="images", done=998)
    time.sleep(0.2)
    shown.advance(1)
    shown.close()
    rate = float(capsys.readouterr().err.rpartition(" images/s")[0].rpartition(" ")[2].strip(","))
    assert 0 < rate < 10  # 1 image in 0.2 s, not 999


def test_what_is_slow_is_counted_in_seconds_too(capsys):
    shown = Progress("train", total=2, unit="steps")
    time.sleep(1.5)
    shown.advance(1)
    shown.close()
    assert re.search(r"1/2 steps \[00:0\d<00:0\d, +0\.\d\d steps/s\]", capsys.readouterr().err)  # not s/steps


def test_nothing_to_do_is_shown_too(capsys):
    with progress("none", total=0, unit="images"):
        pass
    assert capsys.readouterr().err.startswith("none:   0% 0/0 images")


def test_progress_is_closed_also_after_an_error(capsys):
    with pytest.raises(KeyError), progress("broken", total=5, unit="images") as shown:
        shown.advance(2)
        raise KeyError
    assert "broken:  40% 2/5 images" in capsys.readouterr().err


def test_say_writes_one_line_to_stderr(capsys):
    say("hello")
    assert capsys.readouterr() == ("", "hello\n")
