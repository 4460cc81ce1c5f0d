"""Measuring folders, the search for settings, and the file that keeps what was found."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import math
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_opt import AioConfig, AioHandle, ConfigError
from offload_opt.aio import engines
from offload_opt.bandwidth import measure
from offload_opt.tuning import (
    TUNED_FILE,
    Tuned,
    load_tuned,
    save_tuned,
    settings_for,
    simplest_of_the_best,
    tune,
)

MIB = 1 << 20
WORKING = [name for name, works, _ in engines() if works]
FOUND = Tuned(
    AioConfig(block_size=4 * MIB, queue_depth=64, num_threads=2, engine=WORKING[-1]),
    read=3e9,
    write=2e9,
    mixed=2.5e9,
    date="2030-01-02T03:04:05+00:00",
)


# Measuring.


@pytest.mark.parametrize("direction", ["read", "write", "mixed"])
def test_folders_are_measured_at_once(tmp_path: Path, direction: Any) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    rates = measure(folders, AioConfig(), direction=direction, nbytes=MIB, seconds=0.01)
    assert len(rates) == 3
    assert all(rate > 0 for rate in rates)
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["a", "b", "c"]


def test_what_cannot_be_measured_is_refused(tmp_path: Path, small_disk: Path) -> None:
    def attempt(folder: Path, direction: Any = "read", nbytes: int = 2 * MIB) -> None:
        measure([tmp_path, folder], AioConfig(), direction=direction, nbytes=nbytes, seconds=0.01)

    for arguments, problem in (
        ((tmp_path / "missing",), "does not exist"),
        ((small_disk,), r"too small: there is no room for 2\.0 MiB"),
        ((tmp_path, "sideways"), "direction must be one of read, write, mixed"),
        ((tmp_path, "read", 1000), r"at least 1\.0 MiB"),
    ):
        with pytest.raises(ConfigError, match=problem) as caught:
            attempt(*arguments)
        if len(arguments) == 1:
            assert str(arguments[0]) in str(caught.value)
    assert list(tmp_path.iterdir()) == [small_disk]
    assert list(small_disk.iterdir()) == []


def test_a_failed_transfer_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "broken", "file")

    monkeypatch.setattr(AioHandle, "async_pread", fail)
    with pytest.raises(OSError, match="broken"):
        measure([tmp_path], AioConfig(), direction="mixed", nbytes=MIB, seconds=0.01)
    assert list(tmp_path.iterdir()) == []


# The search.


def test_a_search_tells_what_it_does_and_leaves_no_files(tmp_path: Path) -> None:
    told: list[tuple[float, str]] = []
    found, default = tune(tmp_path, seconds=1, progress=lambda part, text: told.append((part, text)))
    assert min(found.read, found.write, found.mixed, default.read, default.write, default.mixed) > 0
    assert default.aio == AioConfig()
    assert found.aio.engine in ["auto", *WORKING]
    parts = [part for part, _ in told]
    assert parts == sorted(parts)
    assert (parts[-1], told[-1][1]) == (1.0, "done")
    texts = list(dict.fromkeys(text for _, text in told))
    assert texts[:2] == ["writing the test files", "engine and block size"]
    assert texts[-2:] == ["the find beside the defaults", "done"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "fastest",
    [
        AioConfig(),
        AioConfig(block_size="512KiB", queue_depth=8),
        AioConfig(block_size="16MiB", num_threads=4),
        AioConfig(block_size="2MiB", queue_depth=128, num_threads=2, engine=WORKING[-1] if WORKING[1:] else "auto"),
    ],
)
def test_the_fastest_settings_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fastest: AioConfig) -> None:
    def made_up(drives: object, aio: AioConfig, direction: str, seconds: float) -> list[float]:
        if aio.queue_depth == 16:
            raise ConfigError("not here")
        far = abs(math.log2(int(aio.block_size) / int(fastest.block_size)))
        far += abs(math.log2(aio.queue_depth / fastest.queue_depth))
        far += abs(aio.num_threads - fastest.num_threads) + (aio.engine != fastest.engine)
        return [1e9 * 0.9**far * {"read": 3, "write": 2, "mixed": 1}[direction]]

    monkeypatch.setattr("offload_opt.tuning.run", made_up)
    found, default = tune(tmp_path, seconds=20)  # of which little is used
    assert found.aio == fastest
    assert default.aio == AioConfig()
    assert default.mixed <= found.mixed
    assert (found.read, found.write, found.mixed) == pytest.approx((3e9, 2e9, 1e9))


def test_defaults_that_turn_out_as_fast_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lucky = AioConfig(queue_depth=64)
    runs = 0

    def made_up(drives: object, aio: AioConfig, direction: str, seconds: float) -> list[float]:
        nonlocal runs
        runs += direction == "mixed"
        return [2e9 if aio == lucky and not confirming else 1e9]

    confirming = False

    def progress(part: float, text: str) -> None:
        nonlocal confirming
        confirming = text == "the find beside the defaults"

    monkeypatch.setattr("offload_opt.tuning.run", made_up)
    found, default = tune(tmp_path, seconds=20, progress=progress)
    assert found == default
    assert found.aio == AioConfig()
    assert runs > 20


def test_a_search_for_one_engine_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What suits that engine must not be taken up by another one later.
    monkeypatch.setenv("OFFLOAD_OPT_ENGINE", "threads")

    def made_up(drives: object, aio: AioConfig, direction: str, seconds: float) -> list[float]:
        return [1e9 * aio.num_threads]

    monkeypatch.setattr("offload_opt.tuning.run", made_up)
    found, _ = tune(tmp_path, seconds=20)
    assert (found.aio.engine, found.aio.num_threads) == ("threads", 4)


def test_an_interrupted_search_leaves_no_files(tmp_path: Path) -> None:
    script = """
import signal, sys
from offload_opt.tuning import tune
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have made it ignored
tune(sys.argv[1], seconds=60, progress=lambda part, text: print(text, flush=True))
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as search:
        assert search.stdout is not None
        assert search.stderr is not None
        while search.stdout.readline() not in ("engine and block size\n", ""):
            pass
        assert list(tmp_path.iterdir()) != []
        search.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in search.stderr.read()
    assert list(tmp_path.iterdir()) == []


def test_a_search_that_cannot_be_is_refused(tmp_path: Path, small_disk: Path) -> None:
    for folder, problem in (
        (tmp_path / "missing", "does not exist"),
        (small_disk, r"too small to tune: 288\.0 MiB are needed, and .*free"),
    ):
        with pytest.raises(ConfigError, match=problem) as caught:
            tune(folder)
        assert str(folder) in str(caught.value)
    with pytest.raises(ConfigError, match="seconds must be positive"):
        tune(tmp_path, seconds=0)


def test_the_simplest_of_the_best() -> None:
    default = AioConfig()
    deep = AioConfig(queue_depth=64)
    deeper = AioConfig(queue_depth=128)
    threads = AioConfig(num_threads=4)
    large = AioConfig(block_size="2MiB")
    larger = AioConfig(block_size="16MiB")
    for rates, best in (
        ({deeper: 102.0, default: 100.0, deep: 101.0}, default),  # no gain worth a change
        ({deeper: 110.0, default: 100.0, deep: 108.0}, deep),
        ({threads: 110.0, default: 100.0, deeper: 109.0}, deeper),
        ({threads: 120.0, default: 100.0, deeper: 109.0}, threads),
        ({larger: 110.0, default: 100.0, large: 109.0}, large),
        ({large: 90.0}, large),
    ):
        assert simplest_of_the_best(rates) == best


# The file.


def test_what_was_found_comes_back(tmp_path: Path) -> None:
    assert load_tuned(tmp_path) is None
    assert settings_for(tmp_path) == AioConfig()
    for tuned in (FOUND, dataclasses.replace(FOUND, aio=AioConfig(), read=1.5)):
        before = os.umask(0)
        try:
            path = save_tuned(tmp_path, tuned)
        finally:
            os.umask(before)
        assert load_tuned(tmp_path) == tuned
        assert settings_for(tmp_path) == tuned.aio
        assert list(tmp_path.iterdir()) == [path]
        assert stat.S_IMODE(path.stat().st_mode) == 0o644  # others may use the folder, too
    assert json.loads(path.read_text())["kernel"] == os.uname().release


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_tuned(tmp_path, FOUND)

    def fail(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            save_tuned(tmp_path, dataclasses.replace(FOUND, read=1e9))
    assert list(tmp_path.iterdir()) == [path]
    assert load_tuned(tmp_path) == FOUND


def test_an_engine_that_works_no_more_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tuned(tmp_path, FOUND)
    with monkeypatch.context() as patch:
        patch.setattr("offload_opt.tuning.engines", lambda: [(name, False, "not here") for name in WORKING])
        assert settings_for(tmp_path) == dataclasses.replace(FOUND.aio, engine="auto")
    monkeypatch.setenv("OFFLOAD_OPT_ENGINE", "threads")
    assert settings_for(tmp_path).engine == "auto"


def content_of(folder: Path) -> dict[str, Any]:
    content = json.loads(save_tuned(folder, FOUND).read_text())
    assert isinstance(content, dict)
    return content


@pytest.mark.parametrize(
    ("entry", "value", "problem"),
    [
        (("format",), 2, "format 1"),
        (("settings",), None, "'settings' is missing"),
        (("settings", "block_size"), "1MiB", "block_size must be of type int"),
        (("settings", "block_size"), 1 << 40, "block_size must be at most"),
        (("settings", "queue_depth"), 0, "queue_depth must be a positive"),
        (("settings", "queue_depth"), 10**9, "queue_depth must be at most"),
        (("settings", "num_threads"), True, "num_threads must be of type int"),
        (("settings", "single_submit"), 1, "single_submit must be of type bool"),
        (("settings", "engine"), "warp", "engine must be one of"),
        (("settings", "colour"), "red", "unknown setting 'colour'"),
        (("bytes_per_second", "read"), -1, "bytes_per_second.read"),
        (("bytes_per_second", "mixed"), float("nan"), "bytes_per_second.mixed"),
        (("bytes_per_second", "write"), 10**400, "bytes_per_second.write"),
        (("date",), 5, "'date' is missing or malformed"),
        (("date",), "\x1b[31mtoday", "Invalid isoformat"),
    ],
)
def test_a_file_with_a_bad_value_is_refused(tmp_path: Path, entry: tuple[str, ...], value: Any, problem: str) -> None:
    content = content_of(tmp_path)
    inner = content
    for name in entry[:-1]:
        inner = inner[name]
    inner[entry[-1]] = value
    path = tmp_path / TUNED_FILE
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=problem) as caught:
        load_tuned(tmp_path)
    assert str(path) in str(caught.value)
    assert "offload-opt tune" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"[" * 60_000, b" " * 70_000, b"9" * 5000])
def test_a_file_that_is_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / TUNED_FILE).write_bytes(content)
    with pytest.raises(ConfigError, match=TUNED_FILE):
        load_tuned(tmp_path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder" / TUNED_FILE).mkdir(parents=True)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / TUNED_FILE)
    for name in ("folder", "pipe"):
        with pytest.raises(ConfigError, match=TUNED_FILE):
            load_tuned(tmp_path / name)


def test_a_file_that_we_may_not_read_is_passed_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_tuned(tmp_path, FOUND)

    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("offload_opt.tuning.os.open", refuse)
    assert load_tuned(tmp_path) is None
    assert settings_for(tmp_path) == AioConfig()
    assert str(path) in caplog.text


def test_settings_that_pass_a_limit_of_the_machine_give_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_tuned(tmp_path, FOUND)

    def refuse(*_: object, **__: object) -> AioHandle:
        raise ConfigError("no I/O engine: the queue is too deep")

    monkeypatch.setattr(AioHandle, "from_config", refuse)
    assert settings_for(tmp_path) == AioConfig()
    assert f"{path} do not work any more" in caplog.text
    assert "the queue is too deep" in caplog.text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with a file, and what the file has."""
    folder = tmp_path_factory.mktemp("changed")
    return folder, content_of(folder)


@given(data=st.data())
def test_a_changed_file_is_refused_or_makes_sense(changed: tuple[Path, dict[str, Any]], data: st.DataObject) -> None:
    folder, content = changed[0], copy.deepcopy(changed[1])
    inner = content
    while True:
        name = data.draw(st.sampled_from(sorted(inner)))
        if not isinstance(inner[name], dict) or data.draw(st.booleans()):
            break
        inner = inner[name]
    inner[name] = data.draw(JSON)
    (folder / TUNED_FILE).write_text(json.dumps(content))
    try:
        tuned = load_tuned(folder)
    except ConfigError:
        return
    assert tuned is not None
    assert min(tuned.read, tuned.write, tuned.mixed) >= 1
    assert isinstance(tuned.aio.block_size, int)
    assert tuned.aio.queue_depth <= 4096
