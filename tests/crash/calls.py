"""The system calls by which a store changes the disk, seen as they are made: reported, or recorded for ``power_loss``.

They are intercepted in Python, where the package makes them: in ``os``, in the files that ``open`` gives out, and at
AioHandle. What changes names or bytes happens under one lock with its event, so the events' order is the disk's.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from offload_opt.aio import AioHandle, IoFuture
from tests.crash.training import Job, Report, train

SYNCS = ("fsync", "fdatasync")
NAMES = ("mkdir", "link", "rename", "replace", "unlink", "rmdir")
REPORTED = (*SYNCS, *NAMES, "posix_fallocate")

Event = tuple[Any, ...]
"""What happened on the disk. Files are named by their paths at that time, and numbers pair a begin with its end.

("mkdir", path), ("create", path), ("rename", path, path), ("link", path, path), ("unlink", path): of folders, too;
("resize", path, size), ("write", number, path, offset, bytes), ("sync", number, path), ("ended", number): of a write or
of a sync; ("report", word, ...): what the run has told its user.
"""


def train_reporting_calls(job: Job, report: Report) -> None:
    """``train``, with a report at the begin of each call: ``["call", name]``."""
    for name in REPORTED:
        call = getattr(os, name)

        def reporting(*args: Any, call: Callable[..., Any] = call, name: str = name, **kwargs: Any) -> Any:
            report("call", name)
            return call(*args, **kwargs)

        setattr(os, name, reporting)
    train(job, report)


def train_recording(job: Job, report: Report) -> None:
    """``train``, with its events left in ``job.record``; killed in the middle where ``job.die_after`` says so."""
    assert job.record is not None
    recorder = _Recorder(job)
    recorder.intercept()

    def recorded(word: str, *values: Any) -> None:
        recorder.note("report", word, *values)
        report(word, *values)

    train(job, recorded)
    recorder.save()


def load(record: Path) -> list[Event]:
    """The events of one life."""
    events: list[Event] = pickle.loads(record.read_bytes())
    return events


class _Recorder:
    """Notes events, in the process whose calls they are."""

    def __init__(self, job: Job) -> None:
        self._root = job.root
        self._target = str(job.record)
        self._die_after = tuple(job.die_after) if job.die_after else None
        self._events: list[Event] = []
        self._calls: dict[str, int] = {}
        self._number = 0
        self._under_way: dict[IoFuture, tuple[int | None, list[IoFuture]]] = {}
        self._lock = threading.RLock()
        self._open = io.open

    def save(self) -> None:
        with self._lock, self._open(self._target, "wb") as file:
            pickle.dump(self._events, file)

    def note(self, *event: Any) -> None:
        with self._lock:
            self._events.append(event)

    def intercept(self) -> None:
        """From now on. Nothing is undone: the process is there for this only."""
        for name in SYNCS:
            setattr(os, name, self._sync(name))
        os.mkdir = self._name_call("mkdir", "mkdir")  # type: ignore[assignment]
        os.unlink = self._name_call("unlink", "unlink")  # type: ignore[assignment]
        os.rmdir = self._name_call("rmdir", "unlink")  # type: ignore[assignment]
        os.link = self._name_call("link", "link")
        os.rename = self._name_call("rename", "rename")
        os.replace = self._name_call("replace", "rename")
        os.open = self._opening(os.open)
        os.write = self._writing(os.write)
        os.ftruncate = self._resizing(os.ftruncate, lambda fd, size: size)
        os.posix_fallocate = self._resizing(
            os.posix_fallocate, lambda fd, offset, size: max(os.fstat(fd).st_size, offset + size)
        )
        io.open = self._file_objects  # type: ignore[assignment]
        self._intercept_handle()

    # Calls.

    @contextlib.contextmanager
    def _call(self, name: str) -> Iterator[None]:
        """A call and its events, whole; and then, maybe, the end."""
        with self._lock:
            yield
            self._calls[name] = self._calls.get(name, 0) + 1
            if self._die_after == (name, self._calls[name]):
                self.save()
                os.kill(os.getpid(), signal.SIGKILL)

    def _sync(self, name: str) -> Callable[[int], None]:
        call = getattr(os, name)

        def sync(fd: int) -> None:
            path = self._path_of(fd)
            number = self._begin("sync", path) if path else None
            call(fd)
            with self._call(name):
                if number is not None:
                    self.note("ended", number)

        return sync

    def _name_call(self, name: str, kind: str) -> Callable[..., None]:
        call = getattr(os, name)

        @functools.wraps(call)
        def change(*args: Any, dir_fd: int | None = None, **kwargs: Any) -> None:
            paths = [self._path(arg, dir_fd) for arg in args if not isinstance(arg, int)]
            if dir_fd is not None:
                kwargs["dir_fd"] = dir_fd
            with self._call(name):
                call(*args, **kwargs)
                if all(paths):
                    self.note(kind, *paths)

        return change

    def _opening(self, call: Callable[..., int]) -> Callable[..., int]:
        def opening(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if not flags & os.O_CREAT:
                return call(path, flags, *args, **kwargs)
            with self._call("create"):
                is_new = not os.path.lexists(path)
                fd = call(path, flags, *args, **kwargs)
                if name := self._path_of(fd):
                    if is_new:
                        self.note("create", name)
                    elif flags & os.O_TRUNC:
                        self.note("resize", name, 0)
                return fd

        return opening

    def _writing(self, call: Callable[[int, Any], int]) -> Callable[[int, Any], int]:
        def writing(fd: int, data: Any) -> int:
            path = self._path_of(fd)
            if path is None:
                return call(fd, data)
            with self._call("write"):
                offset = os.lseek(fd, 0, os.SEEK_CUR)
                count = call(fd, data)
                self.note("ended", self._begin("write", path, offset, bytes(data)[:count]))
                return count

        return writing

    def _resizing(self, call: Callable[..., None], size_of: Callable[..., int]) -> Callable[..., None]:
        def resizing(fd: int, *args: int) -> None:
            path = self._path_of(fd)
            with self._call(call.__name__):
                size = size_of(fd, *args)
                call(fd, *args)
                if path:
                    self.note("resize", path, size)

        return resizing

    def _file_objects(self, file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        """``open()``: what is written through a file object goes through our ``os.write``."""
        if mode != "wb" or any(args) or kwargs:
            return self._open(file, mode, buffering, *args, **kwargs)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        return io.BufferedWriter(_RecordedFile(file if isinstance(file, int) else os.open(file, flags, 0o666), "wb"))

    # Transfers.

    def _intercept_handle(self) -> None:
        write, read, wait, done, wait_for_all = (
            AioHandle.async_pwrite,
            AioHandle.async_pread,
            IoFuture.wait,
            IoFuture.done,
            AioHandle.wait,
        )

        def async_pwrite(handle: AioHandle, buffer: Any, file: Any, offset: int = 0, *, after: Any = ()) -> IoFuture:
            with self._call("async_pwrite"):
                number = self._begin("write", os.fspath(file), offset, buffer.numpy().tobytes())
                future = write(handle, buffer, file, offset, after=after)
                self._under_way[future] = (number, list(after))
                return future

        def async_pread(handle: AioHandle, buffer: Any, file: Any, offset: int = 0, *, after: Any = ()) -> IoFuture:
            with self._lock:
                future = read(handle, buffer, file, offset, after=after)
                self._under_way[future] = (None, list(after))
                return future

        def waiting(future: IoFuture) -> int:
            count = wait(future)
            self._has_ended(future)
            return count

        def asking(future: IoFuture) -> bool:
            if not done(future):
                return False
            self._has_ended(future)
            return True

        def waiting_for_all(handle: AioHandle) -> int:
            count = wait_for_all(handle)
            for future in list(self._under_way):
                self._has_ended(future)
            return count

        for owner, replacement in (
            (AioHandle, {"async_pwrite": async_pwrite, "async_pread": async_pread, "wait": waiting_for_all}),
            (IoFuture, {"wait": waiting, "done": asking}),
        ):
            for name, function in replacement.items():
                setattr(owner, name, function)

    def _has_ended(self, future: IoFuture) -> None:
        """And what it came after, too: who waits for a read need not wait for the write before it."""
        with self._lock:
            number, after = self._under_way.pop(future, (None, []))
            for earlier in after:
                self._has_ended(earlier)
            if number is not None:
                self.note("ended", number)

    # Events.

    def _begin(self, kind: str, *values: Any) -> int:
        """Note the begin of what takes time. Returns the number that its end is noted with."""
        with self._lock:
            self._number += 1
            self.note(kind, self._number, *values)
            return self._number

    def _path(self, path: Any, dir_fd: int | None = None) -> str | None:
        """An absolute path; None for one that is none of ours."""
        folder = Path.cwd() if dir_fd is None else Path(f"/proc/self/fd/{dir_fd}").readlink()
        absolute = str(folder / path)
        return absolute if f"{absolute}/".startswith(f"{self._root}/") else None

    def _path_of(self, fd: int) -> str | None:
        """The path of an open file; None for one that is none of ours, or has no name."""
        path = str(Path(f"/proc/self/fd/{fd}").readlink())
        return None if path.endswith(" (deleted)") else self._path(path)


class _RecordedFile(io.FileIO):
    def write(self, data: Any) -> int:
        return os.write(self.fileno(), data)
