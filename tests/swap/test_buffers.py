"""The pool of buffers: what it makes, and how much memory that takes."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch

from offload_opt import AioHandle
from offload_opt.buffers import BufferPool, PinnedBuffer

PAGE = 4096
HUGE = 2 << 20


class CountingHandle(AioHandle):
    """Notes how much memory it is asked for, and how much of it comes back."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.sizes: dict[int, int] = {}

    def new_cpu_locked_tensor(self, num_elem: int, example_tensor: torch.Tensor) -> torch.Tensor:
        tensor = super().new_cpu_locked_tensor(num_elem, example_tensor)
        self.sizes[tensor.data_ptr()] = num_elem
        return tensor

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> bool:
        del self.sizes[tensor.data_ptr()]
        return super().free_cpu_locked_tensor(tensor)


def take_all(pool: BufferPool) -> list[PinnedBuffer]:
    return list(iter(pool.take, None))


@pytest.mark.parametrize("seed", range(20))
def test_buffers_lie_apart_and_within_the_limit(seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    size = rng.choice([1, 3, 300, 511, 512, 513, 700]) * PAGE
    limit = rng.randrange(0, 12 << 20)
    with CountingHandle() as handle:
        pool = BufferPool(handle, limit)
        pool.fit(size)
        assert pool.capacity == min(limit // size, 256)
        taken: list[PinnedBuffer] = []
        while pool.available:
            count = rng.randint(1, 4)
            expected = min(count, pool.available)
            pool.reserve(count)
            new = take_all(pool)
            assert len(new) == expected
            taken += new
            assert pool.nbytes == len(taken) * size <= sum(handle.sizes.values()) <= limit
        pool.reserve(1)
        assert pool.take() is None
        begins = sorted(buffer.data.data_ptr() for buffer in taken)
        assert all(begin % PAGE == 0 for begin in begins)
        assert all(after - before >= size for before, after in itertools.pairwise(begins))
        assert all(buffer.data.nbytes == size and handle.is_pinned(buffer.data) for buffer in taken)
        del taken
        pool.release()
        assert not handle.sizes
        assert pool.available == pool.capacity


@pytest.mark.parametrize("size", [HUGE + PAGE, HUGE - PAGE, 3 * HUGE // 2, 64 * PAGE])
def test_all_buffers_at_once_fill_whole_huge_pages(size: int) -> None:
    with CountingHandle() as handle:
        pool = BufferPool(handle, 16 * HUGE)
        pool.fit(size)
        pool.reserve(1000)
        assert len(take_all(pool)) == pool.capacity
        (nbytes,) = handle.sizes.values()
        assert nbytes % HUGE == 0
        assert nbytes < pool.nbytes + HUGE
        pool.release()


def test_the_buffer_that_was_given_back_first_is_taken_first() -> None:
    with CountingHandle() as handle:
        pool = BufferPool(handle, 3 * PAGE)
        pool.fit(PAGE)
        pool.reserve(3)
        buffers: Any = take_all(pool)
        for buffer in reversed(buffers):
            pool.give_back(buffer)
        assert take_all(pool) == buffers[::-1]
        pool.release()
