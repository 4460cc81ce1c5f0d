"""The command, in this process through ``main`` and in processes of its own."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from offload_opt import _C, AioHandle, __version__, cli
from offload_opt.config import AioConfig
from offload_opt.doctor import Finding
from offload_opt.drives import Mount
from offload_opt.terminal import make_console
from offload_opt.tuning import TUNED_FILE, Tuned, load_tuned

WORKING = [name for name, works, _ in _C.engines() if works]
SMALL_BENCH = ["--size", "4MiB", "--seconds", "0.2", "--repeats", "1", "--block-size", "256KiB"]


def run(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    """(exit status, stdout, stderr)."""
    try:
        status = cli.main([str(argument) for argument in argv])
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else 1
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def python(code: str, *argv: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def in_words(out: str) -> str:
    """Without line ends and repeated blanks."""
    return " ".join(out.split())


# Usage.


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"offload-opt {__version__}\n", "")


@pytest.mark.parametrize("command", ["doctor", "bench", "tune"])
def test_a_path_that_is_no_folder_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    status, out, err = run(capsys, command, tmp_path / "none")
    assert (status, out) == (2, "")
    assert f"'{tmp_path}/none' does not exist: make the folder first" in err
    (tmp_path / "file").touch()
    status, out, err = run(capsys, command, tmp_path / "file")
    assert (status, out) == (2, "")
    assert "is not a folder" in err


def test_a_path_that_cannot_be_looked_at_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(capsys, "doctor", "")[0] == 2  # a shell's variable that is not set

    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)
    status, out, err = run(capsys, "doctor", "/root/x")
    assert (status, out) == (2, "")
    assert "'/root/x' cannot be looked at: Permission denied" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "COMMAND"),
        (["polish"], "polish"),
        (["bench"], "PATH"),
        (["tune"], "PATH"),
        (["bench", ".", "--size", "3q"], "argument --size: '3q' is not a size"),
        (["bench", ".", "--block-size", "1MiB,-1"], "argument --block-size: '-1' is not a size"),
        (["bench", ".", "--block-size", "1MiB,0"], "positive"),
        (["bench", ".", "--queue-depth", "8,,16"], "'' is not a positive number"),
        (["bench", ".", "--threads", "0"], "'0' is not a positive number"),
        (["bench", ".", "--engine", "floppy"], "'floppy' is not one of auto, io_uring"),
        (["bench", ".", "--repeats", "many"], "'many' is not a positive number"),
        (["tune", ".", "--seconds", "-1"], "'-1' is not a number of seconds"),
        (["tune", ".", "--seconds", "nan"], "'nan' is not a number of seconds"),
    ],
)
def test_usage_errors(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert said in err.splitlines()[-1]


@pytest.mark.parametrize("command", ["doctor", "bench", "tune"])
def test_a_mistyped_option_shows_the_usage_of_its_command(capsys: pytest.CaptureFixture[str], command: str) -> None:
    status, out, err = run(capsys, command, ".", "--foo")
    assert (status, out) == (2, "")
    assert err.startswith(f"usage: offload-opt {command} [-h]")
    assert err.endswith(f"offload-opt {command}: error: unrecognized arguments: --foo\n")


def test_a_file_system_that_is_not_for_data_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("bench", "tune"):
        status, out, err = run(capsys, command, "/proc/self")
        assert (status, out) == (1, "")
        assert "/proc/self is on proc, not a file system for data" in err
    status, out, _ = run(capsys, "doctor", "/proc/self")
    assert status == 1
    assert "proc on /proc: not a file system for data" in in_words(out)
    assert "chmod" not in out


# doctor


def test_doctor_prints_every_finding(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, err = run(capsys, "doctor", tmp_path)
    assert (status, err) == (0, "")
    assert "This machine" in out
    assert str(tmp_path) in out
    assert f"→offload-opttune{tmp_path}" in "".join(out.split())
    findings = json.loads(run(capsys, "doctor", "--json", tmp_path)[1])["findings"]
    for finding in findings:
        assert re.search(rf"^  {finding['status']} +{re.escape(finding['name'])} ", out, re.MULTILINE)


def test_doctor_without_a_path_looks_at_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "doctor")
    assert status == 0
    assert "kernel" in out
    assert "direct I/O" not in out


def test_doctor_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, err = run(capsys, "doctor", "--json", tmp_path)
    content = json.loads(out)
    assert (status, err) == (0, "")
    assert content["offload_opt"] == __version__
    assert content["path"] == str(tmp_path.resolve())
    for finding in content["findings"]:
        assert set(finding) == {"name", "status", "found", "advice"}
        assert finding["status"] in ("ok", "warn")
    assert json.loads(run(capsys, "doctor", "--json")[1])["path"] is None


LONG = "x" * 200
FINDINGS = [
    Finding("good", "ok", "[bold]as it is[/bold]"),
    Finding("so-so", "warn", "slow", "make it fast"),
    Finding("bad", "fail", f"broken: {LONG}", "mend it"),
]


@pytest.mark.parametrize("width", [80, 120])
def test_doctor_with_a_failure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(cli, "examine_machine", lambda: FINDINGS)
    status, out, _ = run(capsys, "doctor")
    assert status == 1
    assert "[bold]as it is[/bold]" in out  # text, not markup
    assert "\x1b" not in out  # no colours where it is no terminal
    assert "→ make it fast" in out
    assert "1 failure, 1 warning" in out
    assert out.count("x") == 200
    assert max(map(len, out.splitlines())) <= width
    assert not re.search(" $", out, re.MULTILINE)
    status, out, _ = run(capsys, "doctor", "--json")
    assert status == 1
    assert json.loads(out)["findings"][2] == {
        "name": "bad",
        "status": "fail",
        "found": f"broken: {LONG}",
        "advice": "mend it",
    }


@pytest.mark.parametrize(
    ("findings", "said"),
    [(FINDINGS[:1], "All is well."), (FINDINGS[:2], "1 warning:"), ([FINDINGS[1]] * 2, "2 warnings:")],
)
def test_doctor_sums_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, findings: list[Finding], said: str
) -> None:
    monkeypatch.setattr(cli, "examine_machine", lambda: findings)
    status, out, _ = run(capsys, "doctor")
    assert status == 0
    assert said in out


# bench


def test_bench_measures_the_grid(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sizes = ["--block-size", "128KiB,1MiB", "--queue-depth", "4,8"]
    status, out, err = run(capsys, "bench", tmp_path, *SMALL_BENCH, *sizes, "--json")
    assert (status, err) == (0, "")
    content = json.loads(out)
    assert content["size"] == 4 << 20
    grid = [(result["engine"], result["block_size"], result["queue_depth"]) for result in content["results"]]
    assert grid == [(name, block, depth) for name in WORKING for block in (1 << 17, 1 << 20) for depth in (4, 8)]
    for result in content["results"]:
        assert set(result["bytes_per_second"]) == {"read", "write", "mixed"}
        assert all(rate > 0 for rate in result["bytes_per_second"].values())
    assert list(tmp_path.iterdir()) == []


def fake_drive(monkeypatch: pytest.MonkeyPatch, rate: Callable[[AioConfig, str], float]) -> None:
    """Let measurements give these rates, without files."""
    monkeypatch.setattr(cli, "ScratchFiles", lambda folder, nbytes, seconds: contextlib.nullcontext())
    monkeypatch.setattr(cli, "run", lambda files, aio, direction, seconds: [rate(aio, direction)])


def test_bench_takes_medians_of_repeats_in_turns(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[tuple[int, str]] = []

    def rate(aio: AioConfig, direction: str) -> float:
        order.append((int(aio.block_size), direction))
        return 1e9 * len(order)

    fake_drive(monkeypatch, rate)
    arguments = ["--engine", "threads", "--block-size", "1MiB,2MiB"]
    status, out, _ = run(capsys, "bench", tmp_path, *arguments)
    once = [(block, direction) for block in (1 << 20, 2 << 20) for direction in ("read", "write", "mixed")]
    assert (status, order) == (0, 3 * once)
    rows = [re.findall(r"[\w.]+", line) for line in out.splitlines() if "threads" in line and "MiB" in line]
    assert rows[:2] == [
        ["threads", "1.0", "MiB", "32", "1", "7.00", "8.00", "9.00"],
        ["threads", "2.0", "MiB", "32", "1", "10.00", "11.00", "12.00"],
    ]
    assert "Fastest at it: engine threads, blocks of 2.0 MiB, queue depth 32, 1 thread." in in_words(out)
    assert "Repeats differ by up to" in out


def test_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, err = run(capsys, "bench", tmp_path, "--size", "64")
    assert (status, out) == (1, "")
    assert re.fullmatch(r"offload-opt: error: --size .*64 B.*\n", err)

    status, out, err = run(capsys, "bench", tmp_path, "--queue-depth", "1000000")
    assert (status, out) == (1, "")
    assert re.fullmatch(r"offload-opt: error: --queue-depth .*1000000.*\n", err)
    assert list(tmp_path.iterdir()) == []

    def rate(aio: AioConfig, direction: str) -> float:
        raise OSError(errno.EIO, "read at offset 4096: Input/output error", files.pop())

    fake_drive(monkeypatch, rate)
    files = ["/mnt/x", "/mnt/x/.offload-opt-a1b2c_34", "/mnt/x/.offload-opt-a1b2c_34/17"]
    while files:  # the name of a temporary file says nothing
        status, out, err = run(capsys, "bench", tmp_path)
        assert (status, out) == (1, "")
        assert err == "offload-opt: error: read at offset 4096: Input/output error: /mnt/x\n"


def test_an_engine_that_does_not_work_fails_before_anything_is_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_C, "engines", lambda: [("threads", True, ""), ("io_uring", False, "it is forbidden")])
    monkeypatch.setattr(cli, "ScratchFiles", None)
    status, out, err = run(capsys, "bench", tmp_path, "--engine", "threads,io_uring")
    assert (status, out) == (1, "")
    assert re.fullmatch(r"offload-opt: error: .*it is forbidden.*\n", err)


def test_warnings_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rate(aio: AioConfig, direction: str) -> float:
        warnings.warn("the drive is warm", UserWarning, stacklevel=2)
        return 1e9

    fake_drive(monkeypatch, rate)
    status, out, err = run(capsys, "bench", tmp_path, "--json")
    assert status == 0
    assert json.loads(out)["results"]
    assert set(err.splitlines()) == {"offload-opt: warning: the drive is warm"}


def test_signals_that_the_caller_ignores_stay_ignored(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = []

    def rate(aio: AioConfig, direction: str) -> float:
        handlers.append((signal.getsignal(signal.SIGHUP), signal.getsignal(signal.SIGTERM)))
        return 1e9

    fake_drive(monkeypatch, rate)
    before = [signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.signal(signal.SIGTERM, signal.SIG_DFL)]
    try:
        assert run(capsys, "bench", tmp_path)[0] == 0
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert {hup for hup, _ in handlers} == {signal.SIG_IGN}
    assert signal.SIG_DFL not in {term for _, term in handlers}


# tune


def test_tune_saves_what_it_finds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, err = run(capsys, "tune", tmp_path, "--seconds", "1")
    assert (status, err) == (0, "")
    file = re.escape(str(tmp_path / TUNED_FILE))
    assert re.search(f"Saved in {file}: OffloadOptimizer uses|The defaults suit this drive; recorded in {file}", out)
    tuned = load_tuned(tmp_path)
    assert tuned is not None
    assert min(tuned.read, tuned.write, tuned.mixed) > 0
    assert [file.name for file in tmp_path.iterdir()] == [TUNED_FILE]


def with_tuned(monkeypatch: pytest.MonkeyPatch, found: AioConfig, rates: dict[AioConfig, float]) -> None:
    """Let ``tune`` find these settings, at these rates."""

    def tuned(aio: AioConfig) -> Tuned:
        return Tuned(aio, rates[aio], rates[aio], rates[aio], "2026-01-02T03:04:05+00:00")

    monkeypatch.setattr(cli, "tune", lambda *_, **__: (tuned(found), tuned(AioConfig())))


FOUND = AioConfig(block_size="4MiB", queue_depth=64)


def test_tune_shows_what_it_found_against_the_defaults(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_tuned(monkeypatch, FOUND, {AioConfig(): 2e9, FOUND: 3e9})
    status, out, _ = run(capsys, "tune", tmp_path)
    assert status == 0
    rows = {words[0]: words[1:] for words in (re.findall(r"[\w.+%]+", line) for line in out.splitlines()) if words}
    assert rows["block_size"] == ["1.0", "MiB", "4.0", "MiB", "changed"]
    assert rows["queue_depth"] == ["32", "64", "changed"]
    assert rows["num_threads"] == ["1", "1"]
    assert (rows["single_submit"], rows["registered"]) == (["no", "no"], ["yes", "yes"])
    assert rows["setting"] == ["default", "found", "change"]
    assert "Chosen by the mixed figure" in out
    assert rows["mixed"] == ["2.00", "GB", "s", "3.00", "GB", "s", "+50", "%"]
    tuned = load_tuned(tmp_path)
    assert tuned is not None
    assert tuned.aio == FOUND


def test_tune_that_finds_nothing_better(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_tuned(monkeypatch, AioConfig(), {AioConfig(): 3e9})
    status, out, _ = run(capsys, "tune", tmp_path)
    assert status == 0
    assert "Nothing else" in out
    assert f"The defaults suit this drive; recorded in {tmp_path / TUNED_FILE}." in out
    assert "changed" not in out
    tuned = load_tuned(tmp_path)
    assert tuned is not None
    assert (tuned.aio, tuned.mixed) == (AioConfig(), 3e9)


def test_tune_dry_run_saves_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_tuned(monkeypatch, FOUND, {AioConfig(): 2e9, FOUND: 3e9})
    status, out, _ = run(capsys, "tune", tmp_path, "--dry-run")
    assert status == 0
    assert "Not saved" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("in_memory", [True, False])
def test_tune_warns_of_a_folder_in_memory(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool
) -> None:
    mount = Mount("/mnt", "tmpfs" if in_memory else "ext4", "x", ("rw",), "0:30")
    monkeypatch.setattr("offload_opt.doctor.find_mount", lambda *_: mount)
    with_tuned(monkeypatch, FOUND, {AioConfig(): 2e9, FOUND: 3e9})
    status, out, _ = run(capsys, "tune", tmp_path)
    assert status == 0
    assert ("Warning: tmpfs on /mnt from x (rw): its files are in memory" in in_words(out)) == in_memory


# In processes of its own.


def test_the_installed_command(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("offload-opt")
    if not command.exists():
        pytest.skip("the package is not installed beside this Python")
    done = subprocess.run([command, "doctor", "--json", tmp_path], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["path"] == str(tmp_path.resolve())


def test_importing_the_package_does_not_import_the_command() -> None:
    modules = ["rich", "offload_opt.cli", "offload_opt.doctor"]
    process = python(f"import sys, offload_opt; print([m for m in {modules} if m in sys.modules])")
    assert process.communicate(timeout=120) == ("[]\n", "")


COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have made it ignored
from offload_opt.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_command_is_quiet_and_removes_its_files(tmp_path: Path, number: signal.Signals) -> None:
    process = python(COMMAND, "bench", tmp_path, "--seconds", "600")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".offload-opt-*/*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    assert list(tmp_path.iterdir()) != []
    process.send_signal(number)
    assert process.communicate(timeout=120) == ("", "")
    assert process.returncode == 128 + number
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_early_causes_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        for arguments in (["doctor"], ["doctor", "--json"]):
            command = [sys.executable, "-c", COMMAND, *arguments]
            done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=120)
            assert (done.returncode, done.stderr) == (1, "")


def test_lines_on_a_terminal_end_where_their_text_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is copied off the screen is to be typed in: rich fills lines with blanks, in the colour of their text."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    console = make_console()
    table = Table.grid()
    for text in ("offload-opt tune /mnt", "offload-opt tune /mnt/longer"):
        table.add_row(Text(text, style="yellow"))
    console.print(table)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["\x1b[33moffload-opt tune /mnt\x1b[0m", "\x1b[33moffload-opt tune /mnt/longer\x1b[0m"]


def test_bench_says_which_engine_auto_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, _ = run(capsys, "bench", tmp_path, *SMALL_BENCH, "--engine", "auto,threads", "--json")
    assert status == 0
    with AioHandle() as handle:
        assert [row["engine"] for row in json.loads(out)["results"]] == list(dict.fromkeys([handle.engine, "threads"]))
