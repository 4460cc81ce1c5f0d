"""The heap is trimmed by how much updates make the process grow."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from offload_opt import heap

MIB = 1 << 20

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say")


def test_what_a_trim_frees_is_not_taken_off_the_growth_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # As if freed between two updates: what grew in the next one did not count, and AdamW's peak was 8 MiB higher.
    kept: list[mmap.mmap] = []
    grown = []
    contents = b"1" * (3 * MIB)

    def trim() -> None:
        grown.append(len(kept))
        while kept:
            kept.pop().close()

    monkeypatch.setattr(heap, "trim_heap", trim)
    watched = heap.Heap(largest=MIB)
    for _ in range(12):
        with watched.watched(has_temporaries=False):
            kept.append(mmap.mmap(-1, len(contents), mmap.MAP_PRIVATE))
            kept[-1].write(contents)
    assert grown == [4, 4, 4]  # 12 MiB: 8 above the 2 that the temporaries take
