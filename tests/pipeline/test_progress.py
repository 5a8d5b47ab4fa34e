"""Progress without a terminal: whole lines, now and then."""

import time

import pytest

from pipeline.core.console import Progress, progress, say


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


def test_what_was_done_earlier_does_not_count_into_the_rate(capsys):
    shown = Progress("train", total=1000, unit="images", done=998)
    time.sleep(0.2)
    shown.advance(1)
    shown.close()
    rate = float(capsys.readouterr().err.rpartition("images/s")[0].rpartition(" ")[2].strip(","))
    assert 0 < rate < 10  # 1 image in 0.2 s, not 999


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
