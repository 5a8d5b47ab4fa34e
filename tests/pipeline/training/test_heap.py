"""Holes between tensors that live are given back, and not at every call."""

import platform
from types import SimpleNamespace

import psutil
import pytest
import torch

from pipeline.training import loop
from pipeline.training.loop import HeapTrim


# Asks Python and not the code under test, which would skip this where it no longer finds glibc.
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, whose heap it is about")
def test_holes_in_the_heap_are_given_back():
    made = [torch.ones(16_000) for _ in range(4000)]  # 64 kB each, small enough for glibc's heap: 244 MiB
    kept = made[::20]  # between the holes
    del made
    before = psutil.Process().memory_info().rss
    assert HeapTrim(seconds_between=0)()
    assert psutil.Process().memory_info().rss < before - 100 * 2**20
    assert all(tensor.sum() == 16_000 for tensor in kept)


def test_it_waits_between_two_times(monkeypatch):
    called, clock = [], [0.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(loop, "_malloc_trim", lambda: called.append)
    trim = HeapTrim(seconds_between=60)
    for clock[0], done in ((59, False), (60, True), (119, False), (120, True)):
        assert trim() is done
    assert called == [0, 0]


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(loop, "_malloc_trim", lambda: None)
    assert not HeapTrim(seconds_between=0)()
