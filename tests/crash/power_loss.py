"""What a disk may hold after the power went, given the events that ``calls`` recorded.

The disk keeps no promise that POSIX does not make it keep:

- Bytes, and a file's size, are there for certain when an fsync or fdatasync of the file that began after they were
  written has ended. Of other bytes, any sectors may be there.
- A name in a folder is there (or gone) for certain when an fsync of the folder that began after the change has ended.
  Of other changes, each may have happened or not, in any combination; a rename within a folder is one change.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.crash.calls import Event

SECTORS = (512, 4096)
# How much of what is not certain is kept: nothing, everything, or about so much.
SHARES = (0.0, 1.0, 0.1, 0.5, 0.9)


@dataclasses.dataclass(eq=False)
class _File:
    """A file, whatever its names. ``changes``: (event, size) and (event, offset, bytes), in their order."""

    changes: list[tuple[int, Any, bytes | None]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class _Folder:
    """``entries`` as the running system sees them. ``changes``: (event, {name: what it names then, None if gone})."""

    entries: dict[str, _File | _Folder] = dataclasses.field(default_factory=dict)
    changes: list[tuple[int, dict[str, _File | _Folder | None]]] = dataclasses.field(default_factory=list)

    def change(self, event: int, names: dict[str, _File | _Folder | None]) -> None:
        for name, node in names.items():
            self.entries.pop(name, None)
            if node is not None:
                self.entries[name] = node
        self.changes.append((event, names))


class Disk:
    """The folder ``root``, which exists and holds the empty folders ``made``, with everything that ``events`` did."""

    def __init__(self, root: Path, made: Sequence[Path], events: Sequence[Event]) -> None:
        self._root = root
        self._top = _Folder()
        for folder in made:
            self._top.entries[folder.name] = _Folder()
            self._top.changes.append((-1, dict(self._top.entries)))
        self._ended: dict[int, int] = {}  # event of a write -> event of its end
        self._synced: dict[_File | _Folder, list[tuple[int, int]]] = {}  # (begin, end) of its syncs
        begun: dict[int, tuple[int, _File | _Folder | None]] = {}
        for index, (kind, *values) in enumerate(events):
            if kind == "report":
                continue
            if kind == "ended":
                begin, synced = begun[values[0]]
                self._ended[begin] = index
                if synced is not None:
                    self._synced.setdefault(synced, []).append((begin, index))
            elif kind == "sync":
                begun[values[0]] = index, self._find(values[1])
            elif kind == "write":
                number, path, offset, data = values
                begun[number] = index, None
                self._file(path).changes.append((index, offset, data))
            elif kind == "resize":
                self._file(values[0]).changes.append((index, values[1], None))
                self._ended[index] = index
            else:
                self._change_names(index, kind, *values)

    def lose_power(self, cut: int, dice: random.Random) -> None:
        """Make ``root``, an empty folder, what the disk may hold when the power goes after ``cut`` events."""
        self._write_folder(self._root, self._top, cut, dice, {})

    def _change_names(self, index: int, kind: str, path: str, other: str = "") -> None:
        folder, name = self._parent(path)
        if kind == "mkdir":
            folder.change(index, {name: _Folder()})
        elif kind == "create":
            folder.change(index, {name: _File()})
        elif kind == "unlink":
            folder.change(index, {name: None})
        elif kind == "link":
            target, target_name = self._parent(other)
            target.change(index, {target_name: self._find(path)})
        elif kind == "rename":
            target, target_name = self._parent(other)
            if target is not folder:
                raise ValueError(f"{path} is moved to another folder, which is no single change: {other}")
            folder.change(index, {name: None, target_name: self._find(path)})
        else:
            raise ValueError(f"unknown event {kind!r}")

    def _find(self, path: str) -> _File | _Folder:
        node: _File | _Folder = self._top
        for part in Path(path).relative_to(self._root).parts:
            assert isinstance(node, _Folder)
            node = node.entries[part]
        return node

    def _parent(self, path: str) -> tuple[_Folder, str]:
        node = self._find(str(Path(path).parent))
        assert isinstance(node, _Folder)
        return node, Path(path).name

    def _file(self, path: str) -> _File:
        node = self._find(path)
        assert isinstance(node, _File)
        return node

    # After the power went.

    def _is_certain(self, node: _File | _Folder, change: int, cut: int) -> bool:
        if change < 0:
            return True
        ended = self._ended.get(change, cut) if isinstance(node, _File) else change
        return any(ended < begin and end < cut for begin, end in self._synced.get(node, []))

    def _write_folder(
        self, place: Path, folder: _Folder, cut: int, dice: random.Random, written: dict[_File, Path]
    ) -> None:
        entries: dict[str, _File | _Folder] = {}
        share = dice.choice(SHARES)
        for index, names in folder.changes:
            if index < cut and (self._is_certain(folder, index, cut) or dice.random() < share):
                for name, node in names.items():
                    entries.pop(name, None)
                    if node is not None:
                        entries[name] = node
        for name, node in entries.items():
            target = place / name
            if isinstance(node, _Folder):
                target.mkdir(mode=0o700, exist_ok=True)
                self._write_folder(target, node, cut, dice, written)
            elif node in written:
                target.hardlink_to(written[node])
            else:
                fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                os.write(fd, self._content(node, cut, dice))
                os.close(fd)
                written[node] = target

    def _content(self, file: _File, cut: int, dice: random.Random) -> bytearray:
        content = bytearray()
        share, sector = dice.choice(SHARES), dice.choice(SECTORS)
        for index, where, data in file.changes:
            if index >= cut:
                break
            certain = self._is_certain(file, index, cut)
            if data is None:
                if certain or dice.random() < share:
                    del content[where:]
                    content.extend(bytes(where - len(content)))
                continue
            for offset in range(0, len(data), sector):
                if certain or dice.random() < share:
                    begin, part = where + offset, data[offset : offset + sector]
                    content.extend(bytes(max(0, begin + len(part) - len(content))))
                    content[begin : begin + len(part)] = part
        return content
