"""The I/O handle in DeepSpeed's place: its NVMe offload with nothing to compile, and with errors that are told.

>>> from offload_opt.integrations import deepspeed as offload_deepspeed
>>> offload_deepspeed.install()
>>> engine, *_ = deepspeed.initialize(...)  # with "offload_optimizer": {"device": "nvme", ...}, as before

After ``install()`` DeepSpeed's ``AsyncIOBuilder().load()`` gives this module. What DeepSpeed calls on it is here under
DeepSpeed's names, with its argument order and its return values: 0 from what starts or runs one transfer, the number of
transfers that have ended from ``wait()`` and from ``sync_pread`` and its kin, which wait for everything pending.

Where DeepSpeed's own handle prints a line and returns -1, reports success for bytes that it has not moved, or ends the
process, this one raises OSError with errno, path and offset. Any size goes with any number of threads.

Not here: ``gds_handle`` (GPUDirect Storage), which DeepSpeed goes on to compile, as it does its own ``pin_memory``
operator under DS_PIN_MEMORY_BACKEND=native.
"""

from __future__ import annotations

import importlib
import sys
import threading
from typing import Any

import torch

from ..aio import AioHandle
from ..errors import ConfigError

__all__ = ["aio_handle", "aio_read", "aio_write", "deepspeed_memcpy", "install"]


class aio_handle:
    """DeepSpeed's ``aio_handle``: transfers between tensors and files.

    A tensor on another device, or one that is not contiguous, moves through host memory. Until ``wait()`` a page-locked
    tensor that is being written must not change, and a tensor that is being read has no defined contents; both may be
    dropped. Methods may be called from several threads; as in DeepSpeed, one that waits keeps the others waiting.

    Args:
        block_size: Bytes of one request to the device.
        queue_depth: Requests in flight on one thread.
        single_submit: One request a system call.
        overlap_events: Refill the queue while completions arrive, instead of draining it first.
        intra_op_parallelism: Worker threads.
    """

    def __init__(
        self,
        block_size: int = 1 << 20,
        queue_depth: int = 128,
        single_submit: bool = False,
        overlap_events: bool = False,
        intra_op_parallelism: int = 1,
    ) -> None:
        self._handle = AioHandle(block_size, queue_depth, single_submit, overlap_events, intra_op_parallelism)
        self._lock = threading.RLock()  # what one call waits for and counts, no other call takes from it
        self._arriving: list[tuple[torch.Tensor, torch.Tensor]] = []  # (destination, host memory) of pending reads

    def get_block_size(self) -> int:
        """Bytes of one request to the device."""
        return self._handle.get_block_size()

    def get_queue_depth(self) -> int:
        """Requests in flight on one thread."""
        return self._handle.get_queue_depth()

    def get_single_submit(self) -> bool:
        """Whether each request is a system call of its own."""
        return self._handle.get_single_submit()

    def get_overlap_events(self) -> bool:
        """Whether the queue is refilled while completions arrive."""
        return self._handle.get_overlap_events()

    def get_intra_op_parallelism(self) -> int:
        """Worker threads."""
        return self._handle.get_intra_op_parallelism()

    def get_alignment(self) -> int:
        """Bytes that DeepSpeed makes its own buffers and offsets multiples of. Transfers here need no alignment.

        DeepSpeed's number, not the page size: its checkpoint writer's default buffer is no multiple of two pages.
        """
        return 512 * self.get_intra_op_parallelism()

    # One transfer, on the caller's thread.

    def read(self, buffer: torch.Tensor, filename: str, validate: bool, file_offset: int = 0) -> int:
        """Fill ``buffer`` from the file. Returns 0. ``validate`` reads again and compares."""
        host = _host_memory(buffer)
        self._handle.read(host, filename, validate, file_offset)
        if host is not buffer:
            buffer.detach().copy_(host)
        return 0

    def write(self, buffer: torch.Tensor, filename: str, validate: bool, file_offset: int = 0) -> int:
        """Write ``buffer`` to the file. Returns 0. ``validate`` reads back and compares."""
        self._handle.write(_host_copy(buffer), filename, validate, file_offset)
        return 0

    # Transfers through the worker threads. DeepSpeed calls the fourth argument of pread and pwrite "async", which no
    # Python function can: it goes by position.

    def pread(self, buffer: torch.Tensor, filename: str, validate: bool, async_op: bool, file_offset: int = 0) -> int:
        """Fill ``buffer`` from the file. Returns 0 at once with ``async_op``, else what ``wait()`` does."""
        with self._lock:
            host = _host_memory(buffer)
            self._handle.pread(host, filename, validate, True, file_offset)
            if host is not buffer:
                self._arriving.append((buffer.detach(), host))
            return 0 if async_op else self.wait()

    def pwrite(
        self, buffer: torch.Tensor, filename: str | int, validate: bool, async_op: bool, file_offset: int = 0
    ) -> int:
        """Write ``buffer`` to the file. Returns 0 at once with ``async_op``, else what ``wait()`` does.

        With ``async_op``, what is not page-locked is copied first, as in DeepSpeed: it may change at once.
        """
        with self._lock:
            host = _host_copy(buffer)
            is_the_same = host.data_ptr() == buffer.data_ptr()
            if async_op and is_the_same and not self._handle.is_pinned(host):
                host = host.clone()
            self._handle.pwrite(host, filename, validate, True, file_offset)
            return 0 if async_op else self.wait()

    def sync_pread(self, buffer: torch.Tensor, filename: str, file_offset: int = 0) -> int:
        """Fill ``buffer`` from the file, and ``wait()``."""
        return self.pread(buffer, filename, False, False, file_offset)

    def sync_pwrite(self, buffer: torch.Tensor, filename: str, file_offset: int = 0) -> int:
        """Write ``buffer`` to the file, and ``wait()``."""
        return self.pwrite(buffer, filename, False, False, file_offset)

    def async_pread(self, buffer: torch.Tensor, filename: str, file_offset: int = 0) -> int:
        """Start to fill ``buffer`` from the file. Returns 0."""
        return self.pread(buffer, filename, False, True, file_offset)

    def async_pwrite(
        self, buffer: torch.Tensor, filename: str | int | None = None, file_offset: int = 0, *, fd: int | None = None
    ) -> int:
        """Start to write ``buffer`` to the file, a path or (also as ``fd``) an open descriptor. Returns 0."""
        if (filename is None) == (fd is None):
            raise TypeError("async_pwrite needs either filename or fd")
        target = fd if filename is None else filename
        assert target is not None
        return self.pwrite(buffer, target, False, True, file_offset)

    def wait(self) -> int:
        """Wait for everything pending. Returns how many transfers ended since the last time; 0 where there was none.

        Raises the first ``OSError`` after all have ended; nothing that was being read then has defined contents.
        """
        with self._lock:
            try:
                ended = self._handle.wait()
            except OSError:
                self._arriving.clear()
                raise
            for destination, host in self._arriving:
                destination.copy_(host)
            self._arriving.clear()
            return ended

    # Page-locked memory, of the whole process: every handle knows what another has given out.

    def new_cpu_locked_tensor(self, num_elem: int, example_tensor: torch.Tensor) -> torch.Tensor:
        """A zeroed, page-locked 1-D tensor of ``num_elem`` elements of ``example_tensor``'s dtype."""
        return self._handle.new_cpu_locked_tensor(num_elem, example_tensor)

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> bool:
        """Let go of a locked tensor: its last view frees its memory. False: no handle made it, or it is freed."""
        return self._handle.free_cpu_locked_tensor(tensor)

    def is_pinned(self, buffer: torch.Tensor) -> bool:
        """Whether ``buffer`` lies in memory that any handle gave out, or that torch has pinned."""
        return self._handle.is_pinned(buffer)


def aio_read(
    buffer: torch.Tensor,
    filename: str,
    block_size: int,
    queue_depth: int,
    single_submit: bool,
    overlap_events: bool,
    validate: bool,
) -> int:
    """Fill ``buffer`` from the file, with a handle for this alone. Returns 0."""
    return aio_handle(block_size, queue_depth, single_submit, overlap_events).read(buffer, filename, validate)


def aio_write(
    buffer: torch.Tensor,
    filename: str,
    block_size: int,
    queue_depth: int,
    single_submit: bool,
    overlap_events: bool,
    validate: bool,
) -> int:
    """Write ``buffer`` to the file, with a handle for this alone. Returns 0."""
    return aio_handle(block_size, queue_depth, single_submit, overlap_events).write(buffer, filename, validate)


def deepspeed_memcpy(dest: torch.Tensor, src: torch.Tensor) -> int:
    """Copy ``src`` into ``dest``, of the same shape. Returns 0."""
    if dest.shape != src.shape:
        raise ValueError(f"cannot copy a tensor of shape {tuple(src.shape)} into one of {tuple(dest.shape)}")
    dest.detach().copy_(src)
    return 0


def install() -> None:
    """Make DeepSpeed's ``AsyncIOBuilder().load()`` give this module, in this process, for every accelerator.

    May be called before or after DeepSpeed is imported, and again. What was loaded before keeps its own handle, so call
    it before ``deepspeed.initialize``.

    Raises:
        ImportError: DeepSpeed is not installed.
        ConfigError: DeepSpeed has no NVMe offload for the accelerator in use.
    """
    try:
        op_builder = importlib.import_module("deepspeed.ops.op_builder")
    except ImportError as error:
        raise ImportError(f"DeepSpeed cannot be imported ({error}); install it: pip install deepspeed") from error
    builders = _async_io_builders()
    if op_builder.AsyncIOBuilder not in builders:
        accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator()
        raise ConfigError(f"DeepSpeed has no NVMe offload for the accelerator {accelerator.device_name()!r}")
    for builder in builders:
        if builder.load.__module__ != __name__:
            _replace(builder)


def _async_io_builders() -> set[Any]:
    """DeepSpeed's builder classes of this operator: it has one for each kind of accelerator, and imports them all.

    In a source checkout they may be in a package of their own.
    """
    packages = ("deepspeed.ops.op_builder", "op_builder")
    modules = [module for name, module in sys.modules.items() if name.startswith(packages)]
    found = (getattr(module, "AsyncIOBuilder", None) for module in modules)
    return {builder for builder in found if getattr(builder, "NAME", None) == "async_io"}


def _replace(builder: Any) -> None:
    """Give a builder class our ``load`` and ``is_compatible``. GDSBuilder, which inherits from one, keeps its own.

    The class itself stays, for others have imported it by name.
    """
    their_load, their_is_compatible = builder.load, builder.is_compatible

    def load(self: Any, *args: Any, **options: Any) -> Any:
        return sys.modules[__name__] if self.NAME == "async_io" else their_load(self, *args, **options)

    def is_compatible(self: Any, *args: Any, **options: Any) -> bool:
        return self.NAME == "async_io" or bool(their_is_compatible(self, *args, **options))

    builder.load, builder.is_compatible = load, is_compatible


def _host_memory(buffer: torch.Tensor) -> torch.Tensor:
    """``buffer`` if files can be read into it, or host memory of its shape."""
    if buffer.device.type == "cpu" and buffer.is_contiguous():
        return buffer
    return torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _host_copy(buffer: torch.Tensor) -> torch.Tensor:
    """``buffer`` if it can be written to a file, or a copy in host memory."""
    return buffer.detach().to("cpu").contiguous()
