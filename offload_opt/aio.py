"""The Python face of the native I/O handle. The only module that imports ``_C``."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from . import _C
from .config import ENGINES, LIMITS, AioConfig, format_bytes, parse_bytes
from .errors import ConfigError, OffloadWarning

logger = logging.getLogger("offload_opt")

# Every handle that is open: closed before the interpreter tears down what their buffers need.
_open_handles: weakref.WeakSet[AioHandle] = weakref.WeakSet()

# Page-locked memory of the whole process: first address -> bytes, as long as the memory lives; and first address ->
# memory for what new_cpu_locked_tensor gave out and free_cpu_locked_tensor has not taken back. Single dict operations
# only, and no lock: memory may be freed, and so leave _locked, at any point where an object dies.
_locked: dict[int, int] = {}
_kept: dict[int, _C.LockedMemory] = {}
_warned_not_locked = False


class IoFuture:
    """One transfer under way. It keeps its buffer alive. Made by ``AioHandle.async_pread`` and ``async_pwrite``."""

    __slots__ = ("_operation",)

    def __init__(self, operation: _C.Operation) -> None:
        self._operation = operation

    def wait(self) -> int:
        """Wait for this transfer. Returns bytes moved; raises its ``OSError`` (errno, message with offset, path)."""
        return self._operation.wait()

    def done(self) -> bool:
        """Whether the transfer has ended, well or not. Never blocks."""
        return self._operation.done


class AioHandle:
    """Asynchronous file I/O between host memory and files, past the page cache where the file system allows it.

    ``filename`` is a path or an open file descriptor; a file to be written is created where it is missing. ``buffer``
    is a contiguous CPU tensor or any object with a contiguous buffer. Sizes and offsets (bytes) need no alignment: what
    is aligned goes past the page cache, ragged ends go through it. Transfers are cut into blocks over the worker
    threads.

    Every result is read: a short transfer is continued, EINTR and EAGAIN are tried again, and anything else raises
    ``OSError`` with errno, path, and the offset in its message. A read past the end of the file is such an error.

    Methods may be called from several threads. After ``fork()`` a handle works in the parent only.

    Args:
        block_size: Bytes of one request to the device, or for example ``"1MiB"``.
        queue_depth: Requests in flight on one worker.
        single_submit: One request a system call.
        overlap_events: Refill the queue while completions arrive, instead of draining it first.
        num_threads: Worker threads for each device that is used, each with a queue of its own.
        engine: ``"io_uring"``, ``"libaio"``, ``"threads"``, or ``"auto"``: what the environment's OFFLOAD_OPT_ENGINE
            says, or else the first of them that works here; an info line in the log says which and why.
        registered: Register page-locked memory (``new_cpu_locked_tensor``) and busy files with the kernel, where the
            engine can. It saves CPU time; the bytes are the same.
        quiet: Leave the info line out: the handle serves a measurement, for example.
        folder: Where the files will be, if that is known: without direct I/O there, ``"auto"`` leaves libaio out, which
            is asynchronous with direct I/O only.

    Raises:
        ConfigError: A setting out of range, or an engine that does not exist or does not work here.
    """

    def __init__(
        self,
        block_size: int | str = 1 << 20,
        queue_depth: int = 32,
        single_submit: bool = False,
        overlap_events: bool = True,
        num_threads: int = 1,
        *,
        engine: str = "auto",
        registered: bool = True,
        folder: str | os.PathLike[str] | None = None,
        quiet: bool = False,
    ) -> None:
        block_size = parse_bytes(block_size, "block_size")
        for name, value in (("block_size", block_size), ("queue_depth", queue_depth), ("num_threads", num_threads)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"{name} must be an integer, not {value!r}")
            if not 1 <= value <= LIMITS[name]:
                raise ConfigError(f"{name} must lie in 1..{LIMITS[name]}, not {value}")
        self._settings = (block_size, queue_depth, bool(single_submit), bool(overlap_events), num_threads)
        self.engine, self._handle, why = _make_handle(self._settings, registered, engine, folder)
        logger.log(logging.DEBUG if quiet else logging.INFO, "I/O engine %s: %s", self.engine, why)
        _open_handles.add(self)

    @classmethod
    def from_config(
        cls, config: AioConfig, folder: str | os.PathLike[str] | None = None, *, quiet: bool = False
    ) -> AioHandle:
        """A handle with the settings of ``config``."""
        return cls(
            config.block_size,
            config.queue_depth,
            config.single_submit,
            config.overlap_events,
            config.num_threads,
            engine=config.engine,
            registered=config.registered,
            folder=folder,
            quiet=quiet,
        )

    # What it was made with.

    def get_block_size(self) -> int:
        """Bytes of one request to the device."""
        return self._settings[0]

    def get_queue_depth(self) -> int:
        """Requests in flight on one worker."""
        return self._settings[1]

    def get_single_submit(self) -> bool:
        """Whether each request is a system call of its own."""
        return self._settings[2]

    def get_overlap_events(self) -> bool:
        """Whether the queue is refilled while completions arrive."""
        return self._settings[3]

    def get_thread_count(self) -> int:
        """Worker threads."""
        return self._settings[4]

    def get_intra_op_parallelism(self) -> int:
        """The same as ``get_thread_count()``."""
        return self.get_thread_count()

    def get_alignment(self) -> int:
        """Bytes. Transfers whose buffer, offset and size are multiples of it go past the page cache whole.

        Some file systems want more, such as their block's size: ``direct_io`` says how much in a folder.
        """
        return _C.page_size()

    # Blocking transfers on the caller's thread.

    def read(
        self, buffer: Any, filename: str | os.PathLike[str] | int, validate: bool = False, file_offset: int = 0
    ) -> int:
        """Fill ``buffer`` from the file, on this thread. Returns bytes moved. ``validate`` reads again and compares."""
        return self._run_here(False, buffer, filename, validate, file_offset)

    def write(
        self, buffer: Any, filename: str | os.PathLike[str] | int, validate: bool = False, file_offset: int = 0
    ) -> int:
        """Write ``buffer`` to the file, on this thread. Returns bytes moved. ``validate`` reads back and compares."""
        return self._run_here(True, buffer, filename, validate, file_offset)

    # Transfers through the worker threads.

    def pread(
        self, buffer: Any, filename: str | os.PathLike[str] | int, validate: bool, async_op: bool, file_offset: int = 0
    ) -> int | IoFuture:
        """Fill ``buffer`` from the file. Returns bytes moved, or with ``async_op`` an IoFuture at once."""
        if async_op:
            return self._submit(False, buffer, filename, validate, file_offset, ())
        return self._run_on_workers(False, buffer, filename, validate, file_offset)

    def pwrite(
        self, buffer: Any, filename: str | os.PathLike[str] | int, validate: bool, async_op: bool, file_offset: int = 0
    ) -> int | IoFuture:
        """Write ``buffer`` to the file. Returns bytes moved, or with ``async_op`` an IoFuture at once."""
        if async_op:
            return self._submit(True, buffer, filename, validate, file_offset, ())
        return self._run_on_workers(True, buffer, filename, validate, file_offset)

    def sync_pread(self, buffer: Any, filename: str | os.PathLike[str] | int, file_offset: int = 0) -> int:
        """Fill ``buffer`` from the file and wait for this transfer only. Returns bytes moved."""
        return self._run_on_workers(False, buffer, filename, False, file_offset)

    def sync_pwrite(self, buffer: Any, filename: str | os.PathLike[str] | int, file_offset: int = 0) -> int:
        """Write ``buffer`` to the file and wait for this transfer only. Returns bytes moved."""
        return self._run_on_workers(True, buffer, filename, False, file_offset)

    def async_pread(
        self,
        buffer: Any,
        filename: str | os.PathLike[str] | int,
        file_offset: int = 0,
        *,
        after: Sequence[IoFuture] = (),
    ) -> IoFuture:
        """Start to fill ``buffer`` from the file. The transfer begins when those in ``after`` have ended.

        Of the transfers that can begin, a thread of the handle takes the one that was asked for first: waiting for
        others costs no place.
        Where one of ``after`` fails, this one is not started and fails with ECANCELED.
        """
        return self._submit(False, buffer, filename, False, file_offset, after)

    def async_pwrite(
        self,
        buffer: Any,
        filename: str | os.PathLike[str] | int,
        file_offset: int = 0,
        *,
        after: Sequence[IoFuture] = (),
    ) -> IoFuture:
        """Start to write ``buffer`` to the file. ``after`` is as for ``async_pread``."""
        return self._submit(True, buffer, filename, False, file_offset, after)

    def wait(self) -> int:
        """Wait for everything pending. Returns how many asynchronous transfers ended since the last ``wait()``.

        Raises the first error that no future's ``wait()`` has raised, after all have ended.
        """
        return self._handle.wait()

    # Page-locked memory.

    def new_cpu_locked_tensor(self, num_elem: int, example_tensor: torch.Tensor) -> torch.Tensor:
        """A zeroed 1-D tensor of ``num_elem`` elements of ``example_tensor``'s dtype, page-aligned and page-locked.

        Views of it count as locked too. The memory lives until ``free_cpu_locked_tensor`` and the last view.
        """
        memory = _allocate_locked(num_elem * example_tensor.element_size())
        if memory is None:
            return torch.empty(0, dtype=example_tensor.dtype, device="cpu")
        _kept[memory.address] = memory
        return torch.frombuffer(memory, dtype=example_tensor.dtype, count=num_elem)

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> bool:
        """Let go of a tensor of ``new_cpu_locked_tensor``: its last view frees its memory. False: not one of ours."""
        return _kept.pop(tensor.data_ptr(), None) is not None

    def exclude_from_fork(self, tensor: torch.Tensor) -> None:
        """Leave a locked tensor out of forked children, which would each keep a copy of all that changes in it.

        A child that touches it all the same ends with a segmentation fault.
        """
        _C.exclude_from_fork(tensor.data_ptr(), -(-tensor.nbytes // _C.page_size()) * _C.page_size())

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor lies in memory that any handle of this process gave out, or that torch has pinned."""
        if tensor.device.type != "cpu":
            return False
        begin, size = tensor.data_ptr(), tensor.nbytes
        if any(start <= begin and begin + size <= start + length for start, length in _locked.copy().items()):
            return size > 0
        return torch.cuda.is_available() and tensor.is_pinned()

    # Lifetime.

    def close(self) -> None:
        """Wait for everything pending and stop the threads. Safe to call twice, and in a child of ``fork()``."""
        self._handle.close()
        _open_handles.discard(self)

    def __enter__(self) -> AioHandle:
        return self

    def __exit__(self, exc_type: object, *exc_info: object) -> None:
        try:
            if exc_type is None:
                self.wait()  # an error that nobody was told of must not go with the handle
        finally:
            self.close()

    def __repr__(self) -> str:
        block, depth, _, _, threads = self._settings
        return f"AioHandle(engine={self.engine!r}, block_size={block}, queue_depth={depth}, num_threads={threads})"

    # The one way into the native handle.

    def _submit(
        self, write: bool, buffer: Any, filename: Any, validate: bool, offset: int, after: Sequence[IoFuture]
    ) -> IoFuture:
        data, length, keep = _address(buffer, writable=not write)
        path, fd = _file(filename, offset)
        before = [future._operation for future in after]
        return IoFuture(self._handle.submit(write, data, length, path, fd, offset, validate, keep, before))

    def _run_on_workers(self, write: bool, buffer: Any, filename: Any, validate: bool, offset: int) -> int:
        data, length, keep = _address(buffer, writable=not write)
        path, fd = _file(filename, offset)
        return self._handle.run_on_workers(write, data, length, path, fd, offset, validate, keep)

    def _run_here(self, write: bool, buffer: Any, filename: Any, validate: bool, offset: int) -> int:
        data, length, keep = _address(buffer, writable=not write)
        path, fd = _file(filename, offset)
        moved = self._handle.run_here(write, data, length, path, fd, offset, validate)
        del keep  # alive until here
        return moved


def engines() -> list[tuple[str, bool, str]]:
    """(name, whether it works here, why not) of each engine, in the order in which ``"auto"`` tries them."""
    return _C.engines()


def direct_io(folder: str | os.PathLike[str]) -> tuple[int, str]:
    """Whether files in ``folder`` can be read and written past the page cache, by trying it.

    Returns:
        The alignment that it takes, in bytes, or 0; and the reason why not.

    Raises:
        OSError: No file can be made there.
    """
    return _C.direct_io(os.fsencode(folder))


def _make_handle(
    settings: tuple[int, int, bool, bool, int], registered: bool, engine: str, folder: str | os.PathLike[str] | None
) -> tuple[str, _C.Handle, str]:
    """The engine's name, a native handle with it, and why it is that: for ``"auto"``, the first that can be made."""
    asked_for = repr(engine)
    if engine == "auto" and "OFFLOAD_OPT_ENGINE" in os.environ:
        engine = os.environ["OFFLOAD_OPT_ENGINE"]
        asked_for = f"OFFLOAD_OPT_ENGINE={engine!r}"
    if engine not in ENGINES:
        raise ConfigError(f"engine must be one of {', '.join(ENGINES)}, not {asked_for}")
    reasons = [] if engine == "auto" else [f"asked for by {asked_for}"]
    for name, works, why_not in engines():
        if engine not in ("auto", name):
            continue
        if works and engine == "auto" and name == "libaio" and folder is not None:
            works, why_not = _is_direct(folder)
        if works:
            try:  # the probe was a small one: these settings may pass a limit of the machine
                handle = _C.Handle(*settings, registered, name)
            except OSError as error:
                works, why_not = False, str(error)
        if works:
            return name, handle, "; ".join(reasons) or "the first that works"
        reasons.append(f"{name} does not work here ({why_not})")
    raise ConfigError(f"no I/O engine: {'; '.join(reasons)}")


def _is_direct(folder: str | os.PathLike[str]) -> tuple[bool, str]:
    try:
        alignment, why_not = direct_io(folder)
    except OSError as error:
        alignment, why_not = 0, str(error)
    return bool(alignment), f"it is asynchronous with direct I/O only, and {os.fspath(folder)} has none: {why_not}"


def settle_heap(size: int) -> None:
    """Have the allocator, where it is glibc's, use memory again for the temporary tensors that this thread takes next.

    Blocks of up to ``size`` bytes are then no longer mapped, and up to twice as much that is free stays the process's,
    for good, as after any block of that size (``M_MMAP_THRESHOLD`` in mallopt(3)). Nothing is done where these bounds
    are higher already, or were set. Microseconds.
    """
    _C.settle_heap(size)


def trim_heap() -> None:
    """Give the pages of freed memory back to the system, where the allocator can. Milliseconds."""
    _C.trim_heap()


def _address(buffer: Any, *, writable: bool) -> tuple[int, int, Any]:
    """(address, bytes, an object that keeps both valid) of a tensor or buffer."""
    if isinstance(buffer, torch.Tensor):
        if buffer.device.type != "cpu":
            raise TypeError(f"buffer must be a CPU tensor, not one on {buffer.device}")
        if buffer.layout is not torch.strided or not buffer.is_contiguous():
            raise ValueError("buffer must be contiguous: a strided view has bytes between its elements")
        if buffer.is_conj() or buffer.is_neg():
            raise ValueError(
                "buffer is a lazy conjugate or negative, whose memory holds other values: resolve it first"
            )
        # Not the tensor itself: its memory may be taken from it by assigning to .data.
        return buffer.data_ptr(), buffer.nbytes, buffer.detach()
    try:
        view = memoryview(buffer)
    except TypeError:
        raise TypeError(
            f"buffer must be a CPU tensor or have the buffer protocol, not {type(buffer).__name__}"
        ) from None
    if not view.contiguous:
        raise ValueError("buffer must be contiguous: a strided view has bytes between its elements")
    if writable and view.readonly:
        raise TypeError(f"cannot read into a read-only {type(buffer).__name__}")
    data, length = _C.buffer_address(view, writable)
    return data, length, view


def _file(filename: str | os.PathLike[str] | int, offset: int) -> tuple[bytes, int]:
    """(path, -1) or (empty, file descriptor)."""
    if not 0 <= offset < 1 << 63:
        raise ValueError(f"file_offset must not be negative, nor beyond any file's end: {offset}")
    if isinstance(filename, int):
        if filename < 0 or isinstance(filename, bool):
            raise ValueError(f"filename must be a path or an open file descriptor, not {filename}")
        return b"", filename
    path = os.fsencode(filename)
    if not path or b"\0" in path:
        raise ValueError(f"filename must be a path or an open file descriptor, not {filename!r}")
    return path, -1


def _allocate_locked(size: int) -> _C.LockedMemory | None:
    """Page-locked memory of at least ``size`` bytes, known to CUDA where there is CUDA. None for no bytes."""
    global _warned_not_locked
    if size == 0:
        return None
    if size < 0:
        raise ValueError(f"a tensor cannot have {size} bytes")
    page = _C.page_size()
    registered = False
    owner = os.getpid()

    def forget(address: int) -> None:
        _locked.pop(address, None)
        if registered and os.getpid() == owner:  # CUDA does not work in a child of fork()
            _cuda_runtime().cudaHostUnregister(address)

    memory = _C.LockedMemory((size + page - 1) // page * page, forget)
    if memory.why_not_locked and not _warned_not_locked:
        _warned_not_locked = True
        warnings.warn(
            f"could not lock {format_bytes(memory.size)} of memory ({memory.why_not_locked}); going on with ordinary "
            "memory. Raise the limit (ulimit -l, or LimitMEMLOCK for a service) so that the buffers cannot be swapped "
            "out.",
            OffloadWarning,
            stacklevel=_stacklevel(),
        )
    if torch.cuda.is_available():
        error = int(_cuda_runtime().cudaHostRegister(memory.address, memory.size, 1))  # 1: portable over devices
        registered = error == 0
        if not registered:
            logger.warning(
                "cudaHostRegister of %d bytes failed with error %d: copies to the GPU will be slow", size, error
            )
    _locked[memory.address] = memory.size
    return memory


def _stacklevel() -> int:
    """For a warning of the function that calls this: the first caller that is neither the package's nor torch's."""
    level, frame = 1, sys._getframe(1)
    while frame.f_globals.get("__name__", "").partition(".")[0] in ("offload_opt", "torch"):
        if frame.f_back is None:
            return 2
        level, frame = level + 1, frame.f_back
    return level


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _close_all() -> None:
    for handle in list(_open_handles):
        handle.close()
    _C.prepare_to_exit()  # daemon threads may still be in there


# Pending transfers write into memory that the interpreter is about to free.
atexit.register(_close_all)
