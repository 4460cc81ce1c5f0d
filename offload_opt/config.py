"""Settings: frozen, keyword-only dataclasses, validated once."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from .errors import ConfigError

ENGINES = ("auto", "io_uring", "libaio", "threads")
"""Names that ``AioConfig.engine`` and ``AioHandle(engine=...)`` take."""

DURABILITIES = ("snapshot", "step", "scratch")
"""What ``OffloadConfig.durability`` takes."""

STATE_DTYPES = ("exact", "bf16", "int8")
"""What ``OffloadConfig.state_dtype`` takes, for all state or by the name of each."""

CHECKSUMS = ("write", "read", "off")
"""What ``OffloadConfig.checksum`` takes."""

LIMITS = {"block_size": 1 << 30, "queue_depth": 1 << 12, "num_threads": 1 << 8}
"""The most that a handle takes of each."""

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGTP", start=1):
    _UNITS[_letter] = _UNITS[f"{_letter}B"] = 1000**_power
    _UNITS[f"{_letter}I"] = _UNITS[f"{_letter}IB"] = 1024**_power


def parse_bytes(value: int | str, name: str) -> int:
    """Turn ``"2GiB"``, ``"500 MB"``, ``"2G"`` or a number into bytes. Raises ConfigError that names ``name``."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        if match and match[2].upper() in _UNITS:
            value = int(float(match[1]) * _UNITS[match[2].upper()])
        else:
            raise ConfigError(
                f"{name}={value!r} is not a size: write bytes, or a number with K, M, G, T or P (powers of 1000) or "
                'with Ki, Mi, Gi, Ti or Pi (powers of 1024), each with or without a B, for example "512MiB"'
            )
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be a size in bytes or a string such as '2GiB', not {type(value).__name__}")
    if value <= 0:
        raise ConfigError(f"{name} must be positive, not {value}")
    return value


def format_bytes(count: float) -> str:
    """Bytes for people: ``"96.0 MiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_exact(count: int) -> str:
    """Bytes for people where that says it exactly, so that it may be typed in: ``"12.0 KiB"``, or ``"12289 bytes"``."""
    shown = format_bytes(count)
    return shown if count > 0 and parse_bytes(shown, "") == count else f"{count} bytes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AioConfig:
    """How transfers are cut up and queued. The defaults suit an NVMe drive."""

    block_size: int | str = "1MiB"
    """Bytes of one request to the device."""
    queue_depth: int = 32
    """Requests in flight on one worker thread."""
    single_submit: bool = False
    """One request a system call."""
    overlap_events: bool = True
    """Refill the queue while completions arrive, instead of draining it first."""
    num_threads: int = 1
    """Worker threads for each device, each with a queue of its own. They sleep while the device works."""
    engine: str = "auto"
    """``"io_uring"``, ``"libaio"``, ``"threads"``, or ``"auto"``: what OFFLOAD_OPT_ENGINE says, or the first that works
    here."""
    registered: bool = True
    """Register page-locked memory and busy files with the kernel, where the engine can: less CPU time a request."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_size", parse_bytes(self.block_size, "aio.block_size"))
        for name in ("queue_depth", "num_threads"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"aio.{name} must be a positive integer, not {value!r}")
        for name, most in LIMITS.items():
            if getattr(self, name) > most:
                raise ConfigError(f"aio.{name} must be at most {most}, not {getattr(self, name)}")
        if self.engine not in ENGINES:
            raise ConfigError(f"aio.engine must be one of {', '.join(ENGINES)}, not {self.engine!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OffloadConfig:
    """Everything about an offloaded optimizer but the optimizer."""

    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
    """A folder on the drive that is to hold the state, or a list of folders on several drives, over which it is spread
    by their bandwidths. They must exist. Each rank keeps a folder of its own in them."""
    host_memory: int | str = "2GiB"
    """Bounds the page-locked host memory that optimizer state takes. More of it lets reads run further ahead."""
    unit_size: int | str | None = None
    """Bytes of state that are paged together. None chooses by host_memory: an eighth of it up to 8 MiB, a 32nd up to 16
    MiB, or a 256th."""
    state_dtype: str | Mapping[str, str] = "exact"
    """How fp32 state is stored: ``"exact"``; ``"bf16"``, rounded at random, 2 bytes each; ``"int8"``, a byte each and
    one for each 128. A mapping by the names of state, such as ``{"exp_avg": "bf16"}``, leaves the others exact."""
    master_weights: bool = False
    """Whether bf16 and fp16 parameters have an fp32 master in the store, which the optimizer updates, with fp32 state:
    the parameters are its rounding. (False: the optimizer updates them, and keeps state, in their own dtype.)"""
    durability: str = "snapshot"
    """When the state is committed, to survive a crash. ``"snapshot"``: by ``snapshot()``; ``"step"``: by every step,
    beside the next iteration (``synchronize()`` waits for it); ``"scratch"``: never, and the state takes half of the
    space on the drive."""
    persist_params: bool = False
    """Whether a commit holds the weights too: all parameters of the optimizer. With master_weights it always does."""
    checksum: str = "write"
    """``"write"``: of each unit that a commit may name, when it is written; ``restore()`` checks them all. ``"read"``:
    checked, too, at each read; ``"off"``: none."""
    aio: AioConfig | None = None
    """How transfers are cut up and queued. None: what `offload-opt tune` found for the (first) folder, else the
    defaults."""

    def __post_init__(self) -> None:
        if not isinstance(self.path, (list, tuple)):
            object.__setattr__(self, "path", _path(self.path))
        elif self.path:
            object.__setattr__(self, "path", tuple(map(_path, self.path)))
        else:
            raise ConfigError("path must name at least one folder, not an empty list")
        object.__setattr__(self, "host_memory", parse_bytes(self.host_memory, "host_memory"))
        if self.unit_size is not None:
            object.__setattr__(self, "unit_size", parse_bytes(self.unit_size, "unit_size"))
        for name, values in (("durability", DURABILITIES), ("checksum", CHECKSUMS)):
            if getattr(self, name) not in values:
                raise ConfigError(f"{name} must be one of {', '.join(values)}, not {getattr(self, name)!r}")
        self._check_state_dtype()
        for name in ("persist_params", "master_weights"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if not isinstance(self.aio, (AioConfig, type(None))):
            raise ConfigError(f"aio must be an AioConfig, not {type(self.aio).__name__}")

    def _check_state_dtype(self) -> None:
        given = self.state_dtype
        if not isinstance(given, (str, Mapping)):
            raise ConfigError(f"state_dtype must be a string or a mapping by state's names, not {type(given).__name__}")
        for kind in [given] if isinstance(given, str) else given.values():
            if kind not in STATE_DTYPES:
                raise ConfigError(f"state_dtype must be one of {', '.join(STATE_DTYPES)}, not {kind!r}")
        if not isinstance(given, str):
            object.__setattr__(self, "state_dtype", dict(given))

    @property
    def memory(self) -> tuple[int, int | None]:
        """``host_memory`` and ``unit_size`` in bytes."""
        return cast(int, self.host_memory), cast("int | None", self.unit_size)

    def codec_of(self, state_name: str) -> str:
        """How the state of that name is to be stored."""
        given = self.state_dtype
        return given if isinstance(given, str) else given.get(state_name, "exact")

    @property
    def holds_weights(self) -> bool:
        """Whether commits hold the weights. A master is stored as what its weight lacks: it needs that weight."""
        return self.persist_params or self.master_weights

    @property
    def paths(self) -> tuple[str, ...]:
        """The folders of ``path``."""
        return (self.path,) if isinstance(self.path, str) else cast("tuple[str, ...]", self.path)

    @classmethod
    def build(cls, path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], **fields: Any) -> OffloadConfig:
        """A config from keyword arguments. Raises ConfigError for an unknown name, and says which one is near it."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ConfigError(f"unknown option {name!r}{hint or '.'} The options are: {', '.join(known)}")
        return cls(path=path, **fields)


def _path(path: Any) -> str:
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(f"path must be a folder's path or a list of them, not {type(path).__name__}")
    folder = os.fspath(path)
    if not folder:  # a shell's variable that is not set, for example: not the current folder
        raise ConfigError("path must name a folder, and is empty")
    return folder
