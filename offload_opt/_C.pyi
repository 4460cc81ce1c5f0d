"""Types of the native core (csrc/bindings.cpp)."""

from collections.abc import Callable, Sequence

from typing_extensions import Buffer

class Operation:
    def wait(self) -> int: ...
    @property
    def done(self) -> bool: ...

class Handle:
    def __init__(
        self,
        block_size: int,
        queue_depth: int,
        single_submit: bool,
        overlap_events: bool,
        num_threads: int,
        engine: str,
    ) -> None: ...
    def submit(
        self,
        write: bool,
        data: int,
        length: int,
        path: bytes,
        fd: int,
        offset: int,
        validate: bool,
        buffer: object,
        after: Sequence[Operation],
    ) -> Operation: ...
    def run_on_workers(
        self, write: bool, data: int, length: int, path: bytes, fd: int, offset: int, validate: bool, buffer: object
    ) -> int: ...
    def run_here(
        self, write: bool, data: int, length: int, path: bytes, fd: int, offset: int, validate: bool
    ) -> int: ...
    def wait(self) -> int: ...
    def close(self) -> None: ...

class LockedMemory(Buffer):
    def __init__(self, size: int, on_free: Callable[[int], None] | None = None) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    @property
    def address(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def why_not_locked(self) -> str: ...

def buffer_address(buffer: memoryview, writable: bool) -> tuple[int, int]: ...
def engines() -> list[tuple[str, bool, str]]: ...
def page_size() -> int: ...
