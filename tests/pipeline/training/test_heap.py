"""Holes between tensors that live are given back, and not at every call."""

import re
from pathlib import Path

import pytest
import torch

from pipeline.training import heap
from pipeline.training.heap import HeapTrim

STATUS = Path("/proc/self/status")


def _resident_mib() -> float:
    return int(re.search(r"VmRSS:\s+(\d+)", STATUS.read_text())[1]) / 1024


@pytest.mark.skipif(not STATUS.exists() or heap._malloc_trim() is None, reason="needs Linux and glibc")
def test_holes_in_the_heap_are_given_back():
    made = [torch.ones(16_000) for _ in range(4000)]  # 64 kB each, small enough for glibc's heap: 244 MiB
    kept = made[::20]  # between the holes
    del made
    before = _resident_mib()
    assert HeapTrim(seconds_between=0)()
    assert _resident_mib() < before - 100
    assert all(tensor.sum() == 16_000 for tensor in kept)


def test_it_waits_between_two_times_and_does_nothing_without_glibc(monkeypatch):
    called = []
    monkeypatch.setattr(heap, "_malloc_trim", lambda: called.append)
    trim = HeapTrim(seconds_between=60)
    assert not trim()
    trim._last -= 61
    assert trim()
    assert not trim()
    assert called == [0]
    monkeypatch.setattr(heap, "_malloc_trim", lambda: None)
    assert not HeapTrim(seconds_between=0)()
