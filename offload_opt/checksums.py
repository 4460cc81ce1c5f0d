"""Checksums of state's bytes: 128 bits of XXH3 over those of leaves, which can be made in any order. Pure.

What an update has stored is hashed by the threads that stored it, while their caches have it: to read it all again
from memory, just before it is written, took 7 % of a step of int8 state.
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
        self._is_at_leaf = True

    def update(self, part: torch.Tensor) -> None:
        """Go on with a contiguous CPU tensor. Raises ValueError unless those before it are of whole leaves."""
        if not self._is_at_leaf:
            raise ValueError(f"only the last part may be of other than whole {LEAF_BYTES} bytes")
        self._is_at_leaf = part.nbytes % LEAF_BYTES == 0
        self._hasher.update(_C.LeafHashes(part.data_ptr(), part.nbytes).finish(torch.get_num_threads()))

    def text(self) -> str:
        """The checksum of all parts."""
        return _text(self._hasher)


def checksum_of(data: torch.Tensor) -> str:
    """The checksum of a contiguous CPU tensor's bytes. Lets go of the GIL."""
    return Checksum(data).text()


def _text(hasher: xxhash.xxh3_128) -> str:
    return f"xxh3_leaves:{hasher.hexdigest()}"
