"""A commit under way: what runs once, beside the caller or, where no thread can be had, in its place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from .errors import StoreError

# Flushes that run at once: the kernel makes one of those that wait for the same device.
_FLUSH_THREADS = 8


class Commit:
    """``work`` is run once, by a thread of its own or by whoever waits first.

    So one that was interrupted before its thread was there is not lost, and one whose thread comes late is not run
    twice. It is to be kept, by one assignment, before it is started.
    """

    def __init__(self, work: Callable[[Commit], None]) -> None:
        self._work = work
        self._claim = threading.Lock()
        self._future: Future[None] = Future()
        self._threads: set[int] = set()

    @property
    def is_done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._future.done()

    @property
    def is_this_thread(self) -> bool:
        """Whether the caller is one of its threads, and must not wait for it."""
        return threading.get_ident() in self._threads

    def start(self) -> None:
        """Run it beside the caller; here and now where no thread can be started, as when the interpreter ends."""
        try:
            threading.Thread(target=self._run, name="offload_opt-commit").start()
        except RuntimeError:
            self._run()

    def wait(self) -> None:
        """Wait until it has ended. Raises what it raised, each time."""
        self._run()
        self._future.result()

    def cancel(self) -> None:
        """Unless it runs or has run, it never will."""
        if self._claim.acquire(blocking=False):
            self._future.set_exception(StoreError("the commit was given up before it began"))

    def when_done(self, call: Callable[[], object]) -> None:
        """Call it when the commit has ended; at once if it has."""
        self._future.add_done_callback(lambda _: call())

    def each(self, calls: Iterable[Callable[[], None]]) -> None:
        """Of ``work``: make the calls, several at once. They may be made twice where threads run out."""
        calls = list(calls)
        try:
            with ThreadPoolExecutor(_FLUSH_THREADS, "offload_opt-flush", initializer=self._join) as pool:
                for done in [pool.submit(call) for call in calls]:
                    done.result()
        except RuntimeError:
            for call in calls:
                call()

    def _run(self) -> None:
        if not self._claim.acquire(blocking=False):
            return
        self._join()
        try:
            self._work(self)
        except BaseException as error:
            is_interrupt = not isinstance(error, Exception)
            self._future.set_exception(StoreError("the commit was interrupted") if is_interrupt else error)
            if is_interrupt:
                raise
        else:
            self._future.set_result(None)
        finally:
            self._threads.clear()  # other threads may have their numbers from now on

    def _join(self) -> None:
        self._threads.add(threading.get_ident())
