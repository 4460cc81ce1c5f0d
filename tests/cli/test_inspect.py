"""What ``inspect`` and ``verify`` say of stores and snapshots, whole and damaged, and while a run commits."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_opt import AioHandle, OffloadOptimizer, __version__, verification
from offload_opt.inspection import find_ranks, in_short
from tests.cli.test_cli import in_words, run
from tests.conftest import seed
from tests.optim.support import adam, parameters

SIZES = (60_000, 2_000, 7)
RANK = "rank-00000-of-00001"


def make(folder: Path | Sequence[Path], sizes: Sequence[int] = SIZES, **fields: Any) -> OffloadOptimizer:
    """An optimizer of three parameters, the first of which is cut into units, before its first step."""
    named = [(f"w{number}", parameter) for number, parameter in enumerate(parameters(*sizes))]
    return OffloadOptimizer(adam(named), folder, **{"host_memory": "200KiB", **fields})


@pytest.fixture
def committed(store: Path) -> Path:
    """A store with an epoch."""
    with make(store, persist_params=True) as optimizer:
        optimizer.step()
        optimizer.snapshot(extra={"step": 1, "note": "[bold]x[/bold]", "rng": torch.get_rng_state()})
    return store


def manifest(store: Path) -> Any:
    """The body of the manifest of the only rank."""
    return json.loads((store / RANK / "MANIFEST.json").read_text())["body"]


def units(store: Path) -> list[Any]:
    body = manifest(store)
    return body["state"]["units"] + (body["weights"] or {"units": []})["units"]


def file_of(store: Path, record: Any) -> Path:
    return store / RANK / "units" / record["file"]


def inspected(capsys: pytest.CaptureFixture[str], *stores: Path) -> list[Any]:
    status, out, err = run(capsys, "inspect", "--json", *stores)
    assert (status, err) == (0, "")
    content = json.loads(out)
    assert content["offload_opt"] == __version__
    return list(content["ranks"])


def verified(capsys: pytest.CaptureFixture[str], *stores: Path) -> tuple[int, Any]:
    status, out, err = run(capsys, "verify", "--json", *stores)
    assert err == ""
    content = json.loads(out)
    assert content["is_whole"] == (status == 0)
    return status, content["ranks"]


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))


# inspect


@pytest.mark.parametrize("width", [80, 140])
def test_inspect_shows_a_commit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, committed: Path, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    status, out, err = run(capsys, "inspect", committed)
    assert (status, err) == (0, "")
    body, files = manifest(committed), units(committed)
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line[:1] == "│"]
    assert [*rows[0][:2], *rows[0][3:6]] == ["0 of 1", "1", body["run"][:6], "3", str(len(files))]
    assert ["exp_avg", "state", "F32", "exact", "3", "242.2 KiB"] in rows
    assert ["parameter", "weights", "F32", "exact", "3", "242.2 KiB"] in rows
    assert ["step", "in the manifest", "F32", "exact", "3", ""] in rows
    assert f"in {len(body['weights']['units'])} of the units" in out
    assert "of every unit" in out
    assert "{'step': 1, 'note': '[bold]x[/bold]', 'rng': tensor(U8, [5056])}" in in_words(out)
    assert max(map(len, out.splitlines()[1:])) <= width  # the first is the path, to be copied


@pytest.mark.parametrize("what", ["store", "rank folder", "snapshot"])
def test_inspect_json(capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path, what: str) -> None:
    snapshot = tmp_path / "snapshots" / "first"
    with make(store) as optimizer:
        optimizer.step()
        optimizer.snapshot(snapshot, extra=[1.5])
    places = {"store": store, "rank folder": store / RANK, "snapshot": snapshot}
    (rank,) = inspected(capsys, places[what])
    body, files = manifest(store), [file_of(store, record) for record in units(store)]
    assert rank["folder"] == str((snapshot if what == "snapshot" else store) / RANK)
    for field in ("epoch", "run", "created", "rank", "world_size", "optimizer", "folders"):
        assert rank[field] == body[field]
    assert (rank["parameters"], rank["parameters_in_groups"], rank["extra"]) == (3, 3, [1.5])
    assert (rank["units"], rank["units_with_checksum"]) == (len(files), len(files))
    nbytes = sum(file.stat().st_size for file in files)
    assert rank["nbytes"] == nbytes
    assert (rank["weights_units"], rank["weights_bytes"]) == (None, None)
    state = {"held": "state", "dtype": "F32", "codec": "exact", "parameters": 3, "nbytes": 4 * sum(SIZES)}
    assert {"name": "exp_avg", **state} in rank["states"]
    assert {"name": "exp_avg_sq", **state} in rank["states"]
    (listed,) = rank["snapshots"]
    assert (listed["path"], listed["epoch"]) == (str(snapshot), 1)
    assert (listed["nbytes"], listed["own_bytes"]) == (nbytes, 0)


def test_inspect_lists_the_snapshots_that_are_left(capsys: pytest.CaptureFixture[str], store: Path) -> None:
    places = [store / "snapshots" / name for name in ("first", "second", "third")]
    with make(store) as optimizer:
        for place in places:
            optimizer.step()
            optimizer.snapshot(place)
        optimizer.step()
        optimizer.snapshot()
    shutil.rmtree(places[1])
    (rank,) = inspected(capsys, store)
    assert [(Path(s["path"]), s["epoch"]) for s in rank["snapshots"]] == [(places[0], 1), (places[2], 3)]
    assert all(s["own_bytes"] == s["nbytes"] == rank["nbytes"] for s in rank["snapshots"])

    next(places[0].glob("*/units/*")).unlink()
    path = places[2] / RANK / "MANIFEST.json"
    path.write_bytes(path.read_bytes()[:-5])
    status, out, err = run(capsys, "inspect", store)
    assert (status, err) == (0, "")
    assert f"Snapshots in {store}/snapshots" in in_words(out)
    words = in_words(out.replace("│", " "))
    assert "second" not in words
    for part in ("1 of its unit", "are missing", "is truncated or"):
        assert part in words


def test_inspect_shows_every_rank(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, store: Path
) -> None:
    for rank in (0, 2):
        as_rank(monkeypatch, rank, 3)
        with make(store) as optimizer:
            for _ in range(1 + rank):
                optimizer.step()
            optimizer.snapshot(extra=f"of {rank}")
    assert [(rank["rank"], rank["world_size"], rank["epoch"]) for rank in inspected(capsys, store)] == [
        (0, 3, 1),
        (2, 3, 3),
    ]
    out = in_words(run(capsys, "inspect", store)[1])
    for text in ("│ 0 of 3 │ 1 │", "│ 2 of 3 │ 3 │", "nothing is here of rank 1 of 3", "the ranks' epochs differ"):
        assert text in out
    assert "rank 0: 'of 0' rank 2: 'of 2'" in out
    assert len(inspected(capsys, store / "rank-00002-of-00003")) == 1

    path = store / "rank-00000-of-00003" / "MANIFEST.json"
    path.write_bytes(b"{}")
    status, out, err = run(capsys, "inspect", store)
    assert (status, err.count("\n")) == (1, 1)
    assert err.startswith(f"offload-opt: error: {path} is truncated or damaged, or not a manifest")
    assert "│ 2 of 3 │" in in_words(out)
    status, ranks = verified(capsys, store)
    assert status == 1
    assert "is truncated or damaged" in ranks[0]["problem"]
    assert (ranks[1]["problem"], ranks[1]["epoch"]) == ("", 3)


def test_a_store_with_no_commit_yet(capsys: pytest.CaptureFixture[str], store: Path) -> None:
    with make(store, durability="scratch") as optimizer:
        optimizer.step()
    count = len(list(store.glob("*/units/*")))
    status, out, err = run(capsys, "inspect", store)
    assert (status, err) == (0, "")
    assert f"has no committed epoch yet, only {count} unit files" in out
    assert inspected(capsys, store) == [{"folder": str(store / RANK), "epoch": None}]
    status, out, err = run(capsys, "verify", store)
    assert (status, err) == (1, "")
    assert "has no committed epoch yet" in out
    assert "All is well" not in out


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_what_is_no_store(capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path, command: str) -> None:
    status, out, err = run(capsys, command, tmp_path / "none")
    assert (status, out) == (2, "")
    assert err.endswith(f"'{tmp_path}/none' does not exist\n")
    status, out, err = run(capsys, command, store)
    assert (status, out) == (1, "")
    assert err == (f"offload-opt: error: {store} is not a store or a snapshot: it has no folder such as {RANK}\n")
    (tmp_path / "snapshots" / "first" / RANK).mkdir(parents=True)
    assert "first in it can be looked at" in run(capsys, command, tmp_path / "snapshots")[2]


def test_values_are_shown_in_short() -> None:
    assert in_short({}) == "{}"
    assert in_short({"a": [1, (2.5, None)], "b": b"abc", "c": torch.tensor(3)}) == (
        "{'a': [1, (2.5, None)], 'b': bytes(3), 'c': 3}"
    )
    for large in ({str(n): n for n in range(10_000)}, "x" * 10_000, [["y" * 500] * 500] * 500):
        assert len(in_short(large)) <= 200
    assert in_short(list(range(1000)), 20) == "[0, 1, 2, 3, 4, 5, …"


# verify


def overwrite(file: Path, position: int, data: bytes) -> None:
    with file.open("r+b") as opened:
        opened.seek(position)
        opened.write(data)


def damage(capsys: pytest.CaptureFixture[str], store: Path) -> list[Any]:
    """What is found of the only rank, in which something is damaged."""
    status, (rank,) = verified(capsys, store)
    assert (status, rank["problem"], rank["units"]) == (1, "", len(units(store)))
    return list(rank["damages"])


def tensors_in(record: Any, body: Any, layout: str) -> list[Any]:
    """The names that a unit's tensors have in its file, and where their bytes lie, read from the manifest."""
    found = []
    for piece in record["pieces"]:
        name = body[layout]["parameters"][piece["parameter"]]["name"]
        run = "" if piece["is_whole"] else f"[{piece['start']}:{piece['stop']}]"
        for tensor in piece["tensors"]:
            nbytes = 4 * tensor["shape"][0]
            offset = record["data_start"] + tensor["offset"]
            found.append({"name": f"{name}.{tensor['name']}{run}", "offset": offset, "nbytes": nbytes})
    return found


def test_verify_a_store_that_is_whole(capsys: pytest.CaptureFixture[str], committed: Path, tmp_path: Path) -> None:
    records = units(committed)
    nbytes = sum(file_of(committed, record).stat().st_size for record in records)
    for place in (committed, committed / RANK):
        status, (rank,) = verified(capsys, place)
        assert (status, rank["units"], rank["nbytes"], rank["unchecked_units"]) == (0, len(records), nbytes, 0)
    status, out, err = run(capsys, "verify", committed)
    assert (status, err) == (0, "")
    assert out == f"All is well: {len(records)} units ({nbytes / 1024:.1f} KiB) verified.\n"


def test_verify_names_what_a_flipped_bit_damaged(capsys: pytest.CaptureFixture[str], committed: Path) -> None:
    chosen, body = random.Random(seed()), manifest(committed)
    records = [(layout, record) for layout in ("state", "weights") for record in body[layout]["units"]]
    for layout, record in chosen.sample(records, 4):
        file = file_of(committed, record)
        whole = file.read_bytes()
        position = chosen.randrange(record["data_start"], len(whole))
        overwrite(file, position, bytes([whole[position] ^ 1 << chosen.randrange(8)]))
        (found,) = damage(capsys, committed)
        why = f"byte {position} of {file}, seed {seed()}"
        assert found["path"] == str(file), why
        assert found["problem"] == "its bytes are not those that were written (checksum)", why
        assert found["tensors"] == tensors_in(record, body, layout), why
        status, out, err = run(capsys, "verify", committed)
        assert (status, err) == (1, "")
        assert f"  {file}\n" in out
        assert f"at byte {found['tensors'][0]['offset']} " in out
        assert out.splitlines()[-1].startswith(f"1 of {len(records)} units (")
        overwrite(file, position, whole[position : position + 1])
        assert run(capsys, "verify", committed)[0] == 0, why


def test_verify_goes_on_to_the_end(capsys: pytest.CaptureFixture[str], committed: Path, tmp_path: Path) -> None:
    records = units(committed)
    assert len(records) >= 6
    files = [file_of(committed, record) for record in records]
    tail = records[0]["data_start"] + records[0]["nbytes"] - 1
    overwrite(files[0], tail, bytes([files[0].read_bytes()[tail] ^ 1]))
    overwrite(files[1], 20, b"\0")
    files[2].unlink()
    os.truncate(files[3], 5000)
    with files[4].open("ab") as longer:
        longer.write(b"x")
    elsewhere = tmp_path / "elsewhere"
    files[5].rename(elsewhere)
    files[5].symlink_to(elsewhere)
    found = damage(capsys, committed)
    assert [d["path"] for d in found] == [str(file) for file in files[:6]]
    problems = [d["problem"] for d in found]
    assert "checksum" in problems[0]
    assert problems[1] == "its header is not as it was written; the state in it is"
    assert "missing" in problems[2]
    assert "has 5000 bytes, and should have" in problems[3]
    assert "and should have" in problems[4]
    assert "missing or not a plain file" in problems[5]
    assert [bool(d["tensors"]) for d in found] == [True, False, True, True, True, True]
    assert f"6 of {len(files)} units" in in_words(run(capsys, "verify", committed)[1])


def test_verify_says_what_had_no_checksum(capsys: pytest.CaptureFixture[str], store: Path) -> None:
    with make(store, checksum="off") as optimizer:
        optimizer.step()
        optimizer.snapshot()
    (record, *rest) = units(store)
    status, (rank,) = verified(capsys, store)
    assert (status, rank["unchecked_units"], rank["unchecked_bytes"]) == (0, 1 + len(rest), rank["nbytes"])
    out = in_words(run(capsys, "verify", store)[1])
    assert f"All is well: {1 + len(rest)} units" in out
    assert f"of which {1 + len(rest)} (" in out
    assert "had no checksum: they can be read, and were not compared" in out
    assert "│" not in out
    overwrite(file_of(store, record), 20, b"\0")
    (found,) = damage(capsys, store)
    assert found["problem"] == "its header is not as it was written"
    assert found["tensors"] == tensors_in(record, manifest(store), "state")  # nobody can say


def test_a_read_error_is_damage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, committed: Path
) -> None:
    bad = file_of(committed, units(committed)[1])
    read = AioHandle.async_pread

    def refuse(handle: AioHandle, buffer: Any, path: Any, offset: int = 0) -> Any:
        if Path(path) == bad:
            raise OSError(errno.EIO, f"read at offset {offset}: Input/output error", str(path))
        return read(handle, buffer, path, offset)

    monkeypatch.setattr(AioHandle, "async_pread", refuse)
    (found,) = damage(capsys, committed)
    assert (found["path"], found["problem"]) == (str(bad), "read at offset 4096: Input/output error")


def test_chunks_of_any_size(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, committed: Path
) -> None:
    record = units(committed)[1]
    for chunk in (4096, 5000, 12288, record["nbytes"]):
        monkeypatch.setattr(verification, "_CHUNK", chunk)
        assert verified(capsys, committed)[0] == 0
    file, last = file_of(committed, record), record["data_start"] + record["nbytes"] - 1
    overwrite(file, last, bytes([file.read_bytes()[last] ^ 1]))
    monkeypatch.setattr(verification, "_CHUNK", 4096)
    assert [found["path"] for found in damage(capsys, committed)] == [str(file)]


def test_a_damaged_manifest_is_not_believed(capsys: pytest.CaptureFixture[str], committed: Path) -> None:
    path = committed / RANK / "MANIFEST.json"
    text = path.read_bytes()
    path.write_bytes(text.replace(b'"epoch":1', b'"epoch":2'))
    status, out, err = run(capsys, "verify", committed)
    assert (status, err) == (1, "")
    assert f"{path} is damaged: its bytes do not have the checksum" in out
    assert "1 of 1 ranks could not be verified." in out
    status, out, err = run(capsys, "inspect", committed)
    assert (status, out) == (1, "")
    assert err.startswith(f"offload-opt: error: {path} is damaged")
    path.write_bytes(text)
    (committed / RANK).rename(committed / "rank-00001-of-00002")
    status, (rank,) = verified(capsys, committed)
    assert (status, "is of rank 0 of 1" in rank["problem"]) == (1, True)


# While a run commits.


def commits_under_way(optimizer: OffloadOptimizer, times: int) -> Callable[[int, int, str], None]:
    """Progress that is used to commit twice over, so that files of the commit before the last are written to."""
    left = times

    def progress(done: int, total: int, text: str) -> None:
        nonlocal left
        if left > 0 and 0 < done < total:
            left -= 1
            for _ in range(2):
                optimizer.step()
                optimizer.snapshot()

    return progress


def test_a_run_may_commit_meanwhile(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "_CHUNK", 4096)
    with make(store) as optimizer:
        optimizer.step()
        optimizer.snapshot()
        (report,) = verification.verify(find_ranks([store]), commits_under_way(optimizer, 2))
        assert report.is_whole, report
        assert report.epoch == optimizer.epoch == 5

        # What is damaged all the same is found.
        last = file_of(store, units(store)[-1])
        header = last.read_bytes()[:4096]
        for file in store.glob(f"*/units/{last.name.split('.')[0]}.*"):
            overwrite(file, 20, b"\0")
        (report,) = verification.verify(find_ranks([store]), commits_under_way(optimizer, 2))
        assert [Path(found.path).name.split(".")[0] for found in report.damages] == [last.name.split(".")[0]]
        for file in store.glob(f"*/units/{last.name.split('.')[0]}.*"):
            overwrite(file, 0, header)

        (report,) = verification.verify(find_ranks([store]), commits_under_way(optimizer, 1000))
        assert "a run commits faster than its files can be read" in report.problem
        assert not report.is_whole


# Stores over several folders.


@pytest.fixture
def spread(store: Path) -> list[Path]:
    folders = [store / "a", store / "b"]
    for folder in folders:
        folder.mkdir()
    with make(folders) as optimizer:
        optimizer.step()
        optimizer.snapshot()
    return folders


def test_a_store_over_several_folders(capsys: pytest.CaptureFixture[str], spread: list[Path]) -> None:
    (rank,) = inspected(capsys, spread[0])  # the first folder says it all
    assert rank["folders"] == 2
    assert "the units lie in 2 folders" in run(capsys, "inspect", spread[0])[1]
    for given in (spread, spread[::-1], [folder / RANK for folder in spread]):
        status, (found,) = verified(capsys, *given)
        assert (status, found["units"], found["folder"]) == (0, rank["units"], str(spread[0] / RANK))
    record = next(r for r in manifest(spread[0])["state"]["units"] if r["folder"] == 1)
    file = spread[1] / RANK / "units" / record["file"]
    file.unlink()
    _, (found,) = verified(capsys, *spread)
    assert [damage["path"] for damage in found["damages"]] == [str(file)]


def test_folders_that_are_not_given(capsys: pytest.CaptureFixture[str], spread: list[Path], store: Path) -> None:
    status, (rank,) = verified(capsys, spread[0])
    assert status == 1
    assert rank["problem"] == (
        f"{spread[0] / RANK} is the first of 2 folders of its store: give folder 2 too; here is 1 ({spread[0] / RANK})"
    )
    for command in ("inspect", "verify"):
        status, out, err = run(capsys, command, spread[1])
        assert (status, out) == (1, "")
        assert f"{spread[1] / RANK} is folder 2 of 2 of a store: give its first folder, too" in err

    shutil.copytree(spread[0], store / "c")
    status, out, err = run(capsys, "verify", *spread, store / "c")
    assert (status, out) == (1, "")
    assert "of which is not clear" in err
    (spread[1] / RANK / "PART.json").write_text("[1]")
    status, out, err = run(capsys, "verify", *spread)
    assert (status, out) == (1, "")
    assert "PART.json is damaged" in err


def test_several_stores_at_once(capsys: pytest.CaptureFixture[str], store: Path) -> None:
    with make(store) as optimizer:
        for name in ("first", "second"):
            optimizer.step()
            optimizer.snapshot(store / name)
    status, ranks = verified(capsys, store / "first", store / "second", store / "first")
    assert (status, [rank["epoch"] for rank in ranks]) == (0, [1, 2])
    out = run(capsys, "inspect", store / "first", store / "second")[1]
    assert f"{store / 'first'}\n" in out
    assert f"{store / 'second'}\n" in out
