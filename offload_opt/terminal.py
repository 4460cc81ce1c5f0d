"""What commands write to: a console that is easy to read, and progress bars."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_WIDEST = 110  # columns: beyond, the eye does not find the next line
_BLANKS_AT_END = re.compile(r"(?: |\x1b\[[0-9;]*m)+$")  # styles may end among or after them


def _styles_of(blanks: re.Match[str]) -> str:
    return blanks[0].replace(" ", "")


class _Console(Console):
    """Without the blanks with which rich fills lines up."""

    def print(self, *objects: Any, **options: Any) -> None:
        with self.capture() as captured:
            super().print(*objects, **options)
        for line in captured.get().splitlines():
            self.file.write(f"{_BLANKS_AT_END.sub(_styles_of, line)}\n")


def make_console() -> Console:
    """A console on stdout, of a readable width."""
    console = _Console(highlight=False)
    console.width = min(console.width, _WIDEST)
    return console


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[float, str], None]]:
    """A progress bar on stderr, where that is a terminal. Yields what sets the part that is done and the text."""
    with _bar(BarColumn(), TaskProgressColumn(), TimeRemainingColumn()) as update:
        yield lambda part, text: update(part, 1.0, text)


@contextlib.contextmanager
def byte_progress_bar() -> Iterator[Callable[[int, int, str], None]]:
    """As ``progress_bar``, of bytes. Yields what sets those that are done, all of them, and the text."""
    with _bar(BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn()) as update:
        yield update


@contextlib.contextmanager
def _bar(*columns: ProgressColumn) -> Iterator[Callable[[float, float, str], None]]:
    console = Console(stderr=True)
    text = TextColumn("{task.description}")
    with Progress(*columns, text, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=None)
        yield lambda done, total, text: progress.update(bar, completed=done, total=total, description=escape(text))
