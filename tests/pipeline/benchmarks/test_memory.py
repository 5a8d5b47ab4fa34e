import pytest

from pipeline.benchmarks import harness
from pipeline.benchmarks.harness import in_fresh_process


def _hold(mib):
    return len(bytearray(mib * 2**20))


def test_the_peak_is_that_of_the_fresh_process_alone():
    ballast = bytearray(300 * 2**20)  # of this process: it must not count
    held, peak = in_fresh_process(_hold, 150)
    assert held == 150 * 2**20
    assert 150 < peak < 290
    assert len(ballast) > 0


def test_without_proc_the_system_is_asked(monkeypatch):
    monkeypatch.setattr(harness.Path, "exists", lambda path: False)
    monkeypatch.setattr(harness.sys, "platform", "linux")
    assert harness._peak() == pytest.approx(harness.resource.getrusage(harness.resource.RUSAGE_SELF).ru_maxrss / 1024)
