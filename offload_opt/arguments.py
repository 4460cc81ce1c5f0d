"""The arguments of commands: how each kind is read, and what is said of one that cannot be."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .config import ENGINES, parse_bytes
from .errors import ConfigError


class CommandParser(argparse.ArgumentParser):
    """Refuses by itself what it does not know, with the usage of its command; else the parser above would."""

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        namespace, unknown = super().parse_known_args(*args, **kwargs)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown


def with_default(text: str) -> str:
    """An option's help, with its default."""
    return f"{text} (default: %(default)s)"


def store(text: str) -> Path:
    """The folder of a store."""
    return folder(text, missing="does not exist")


def folder(text: str, missing: str = "does not exist: make the folder first") -> Path:
    """A folder that exists."""
    path = Path(text)
    try:
        if text and path.is_dir():
            return path
        wrong = "is not a folder" if text and path.exists() else missing
    except OSError as error:
        wrong = f"cannot be looked at: {error.strerror}"
    raise argparse.ArgumentTypeError(f"{text!r} {wrong}")


def size(text: str) -> int:
    """Bytes: ``"512MiB"``."""
    try:
        return parse_bytes(text, "")
    except ConfigError as error:  # argparse puts the option's name before it
        raise argparse.ArgumentTypeError(str(error).lstrip("= ")) from None


def positive(text: str) -> int:
    """A whole number, 1 or more."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def seconds(text: str) -> float:
    """A time in seconds."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1e6:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")


def engine(text: str) -> str:
    """The name of an I/O engine."""
    if text not in ENGINES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(ENGINES)}")
    return text


def a_list(parse: Callable[[str], object]) -> Callable[[str], list[object]]:
    """What reads a list, separated by commas, of what ``parse`` reads."""
    return lambda text: list(dict.fromkeys(parse(part) for part in text.split(",")))
