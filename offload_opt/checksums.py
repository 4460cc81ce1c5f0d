"""Checksums of state's bytes: 128 bits of XXH3 over those of leaves, which can be made in any order. Pure.

What an update has stored is hashed by the threads that stored it, while their caches have it: to read it all again
from memory, just before it is written, took about a tenth of a step of int8 state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xxhash

from . import _C

LEAF_BYTES = _C.LEAF_BYTES
"""Of each leaf but the last, whose rest is hashed to 64 bits of XXH3."""


class Checksum:
    """The checksum of a contiguous CPU tensor ``data``. Nothing of it is looked at before it is asked for.

    ``add`` hashes parts that are final beforehand; the rest is hashed by ``text``.
    """

    def __init__(self, data: torch.Tensor) -> None:
        self._data = data  # its memory is in use
        self.native = _C.LeafHashes(data.data_ptr(), data.nbytes)

    def add(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Hash what lies in ranges (first byte, bytes) of ``data``: from here on it must stay as it is."""
        if ranges:
            start = self._data.data_ptr()
            self.native.add([(start + first, count) for first, count in ranges], torch.get_num_threads())

    def text(self) -> str:
        """The checksum. Lets go of the GIL."""
        return _text(xxhash.xxh3_128(self.native.finish(torch.get_num_threads())))


class RunningChecksum:
    """The same checksum, of bytes that come one part after the other."""

    def __init__(self) -> None:
        self._hasher = xxhash.xxh3_128()
        self._rest = torch.empty(0, dtype=torch.uint8, device="cpu")  # less than a leaf

    def update(self, part: torch.Tensor) -> None:
        """Go on with a 1-D, contiguous uint8 tensor on the CPU. Its memory may be used again then."""
        data = torch.cat([self._rest, part]) if len(self._rest) else part
        whole = len(data) // LEAF_BYTES * LEAF_BYTES
        self._hasher.update(_leaves(data[:whole]))
        self._rest = data[whole:].clone()

    def text(self) -> str:
        """The checksum of all parts up to now."""
        hasher = self._hasher.copy()
        hasher.update(_leaves(self._rest))
        return _text(hasher)


def checksum_of(data: torch.Tensor) -> str:
    """The checksum of a contiguous CPU tensor's bytes. Lets go of the GIL."""
    return _text(xxhash.xxh3_128(_leaves(data)))


def _leaves(data: torch.Tensor) -> bytes:
    return _C.LeafHashes(data.data_ptr(), data.nbytes).finish(torch.get_num_threads())


def _text(hasher: xxhash.xxh3_128) -> str:
    return f"xxh3_leaves:{hasher.hexdigest()}"
