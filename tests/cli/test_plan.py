"""``offload-opt plan``, in this process through ``main``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from offload_opt import plan_command, planning
from offload_opt.config import AioConfig
from offload_opt.tuning import Tuned, save_tuned

from .test_cli import in_words, run

FAST = ["--bandwidth", "3.2GB/s", "--update-rate", "300M"]
COUNT = ["--parameters", "1B"]


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


def figures(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> dict[str, Any]:
    status, out, err = run(capsys, "plan", *argv, "--json")
    assert (status, err) == (0, "")
    content = json.loads(out)
    assert isinstance(content, dict)
    return content


def forbid_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("find_bandwidth", "measure_update", "measure_checksums"):
        monkeypatch.setattr(plan_command, name, lambda *_: pytest.fail("measured"))


def test_it_says_what_was_given_and_what_it_costs(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "plan", *COUNT, *FAST)
    assert (status, err) == (0, "")
    words = in_words(out)
    assert "AdamW of 1 billion parameters in fp32" in words
    assert "3.20 GB/s of reads and writes, given" in words
    assert "300 million parameters a second, given" in words
    assert "one after the other; durability snapshot" in words
    assert "the drive is the limit (drive 3.66 s, update 3.33 s)" in words
    rows = [line for line in out.splitlines() if line.startswith("│")]
    assert [row.split()[1] for row in rows] == ["exact", "bf16", "int8"]


def test_figures(capsys: pytest.CaptureFixture[str]) -> None:
    content = figures(capsys, *COUNT, *FAST, "--endurance", "100TB")
    exact, bf16, int8 = content["results"]
    assert (exact["state_dtype"], exact["is_asked_for"], bf16["is_asked_for"]) == ("exact", True, False)
    assert exact["kept"] == 128
    assert exact["read"] == exact["written"] == pytest.approx(8e9 - (2 << 30), rel=0.01)
    assert exact["disk_seconds"] == pytest.approx((exact["read"] + exact["written"]) / 3.2e9)
    assert exact["seconds"] == pytest.approx(exact["disk_seconds"] + exact["update_seconds"] * 0.15)
    assert exact["days"] == pytest.approx(100e12 / (exact["written"] * 86400 / exact["seconds"]))
    assert exact["disk_space"] == pytest.approx(16e9, rel=0.01)
    assert bf16["state"] == pytest.approx(4e9, rel=0.01)
    assert int8["state"] == pytest.approx(2 * (1 + 1 / 128) * 1e9, rel=0.01)
    assert (int8["kept"], int8["written"], int8["days"]) == (int8["units"], 0, None)
    assert int8["limit"] == "update"


def test_masters_are_stored_as_what_the_weights_lack(capsys: pytest.CaptureFixture[str]) -> None:
    for dtype, stored in (("bf16", 10), ("fp16", 12)):
        content = figures(capsys, *COUNT, *FAST, "--dtype", dtype, "--master-weights", "--durability", "step")
        assert content["results"][0]["state"] == pytest.approx(stored * 1e9, rel=0.01)
        assert content["results"][0]["written"] == pytest.approx((stored + 2) * 1e9, rel=0.01)


def test_codecs_that_do_not_apply_are_left_out_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    content = figures(capsys, *COUNT, *FAST, "--dtype", "bf16")
    assert [row["state_dtype"] for row in content["results"]] == ["exact"]
    assert all("--master-weights keeps it in float32" in reason for reason in content["left_out"])


def test_a_codec_for_each_state(capsys: pytest.CaptureFixture[str]) -> None:
    content = figures(capsys, *COUNT, *FAST, "--state-dtype", "exp_avg=int8,exp_avg_sq=bf16")
    chosen = content["results"][-1]
    assert (chosen["state_dtype"], chosen["is_asked_for"]) == ("exp_avg=int8, exp_avg_sq=bf16", True)
    assert chosen["state"] == pytest.approx((3 + 1 / 128) * 1e9, rel=0.01)


def test_iterations_set_the_pace(capsys: pytest.CaptureFixture[str]) -> None:
    exact = figures(capsys, *COUNT, *FAST, "--iteration", "60")["results"][0]
    assert exact["written_a_day"] == pytest.approx(exact["written"] * 1440)


def test_the_model_from_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save_file({"w": torch.zeros(300, 200), "b": torch.zeros(300)}, tmp_path / "model.safetensors")
    content = figures(capsys, "--model", tmp_path / "model.safetensors", *FAST, "--optimizer", "Adafactor")
    assert (content["parameters"], content["optimizer"]) == (60300, "Adafactor")


def test_what_tune_found_is_used(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save_tuned(tmp_path, Tuned(AioConfig(), 4e9, 5e9, 3e9, "2026-01-02T03:04:05+00:00"))
    status, out, _ = run(capsys, "plan", tmp_path, *COUNT, "--update-rate", "300M")
    assert status == 0
    assert f"3.00 GB/s of reads and writes, found by offload-opt tune on 2026-01-02 in {tmp_path}" in in_words(out)


def test_it_measures_what_is_not_given(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "_MEASURED_ON", 8 << 20)
    monkeypatch.setattr(planning, "_UPDATED", 100_000)
    content = figures(capsys, tmp_path, *COUNT, "--host-memory", "1GiB")
    assert content["bandwidth"]["source"] == "measured now"
    assert min(content["bandwidth"][name] for name in ("mixed", "read", "write")) > 0
    assert len({row["update_rate"] for row in content["results"]}) == 3
    assert content["checksum_rate"] > 0
    assert list(tmp_path.iterdir()) == []


def test_the_update_is_measured_with_the_models_own_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_UPDATED", 1000)
    save_file({"big": torch.zeros(100, 100), "w": torch.zeros(20, 20)}, tmp_path / "model.safetensors")
    model = plan_command.load_model(str(tmp_path / "model.safetensors"))
    config = plan_command.OffloadConfig(path=tmp_path)
    for kind in (torch.optim.AdamW, torch.optim.Adafactor, torch.optim.Muon):
        question = planning.Question(model, kind, config)
        layout = planning.lay_out(question)[0][0]
        assert planning.measure_update(question, layout, tmp_path, seconds=0.01).rate > 0
        assert planning._sample(question, layout.footprint) == [((20, 20), torch.float32)]


ADVICE = [
    (["--bandwidth", "0.5GB/s"], "The drive takes 7.0 x as long as the update: --state-dtype int8 makes a step 7.2 x"),
    (["--bandwidth", "0.5GB/s"], "--host-memory 7GiB keeps so much in memory that the drive keeps up"),
    (["--bandwidth", "0.2GB/s", "--durability", "step", "--state-dtype", "int8"], "update. A faster drive would help."),
    (
        ["--endurance", "1TB", "--state-dtype", "int8", "--durability", "step"],
        "rated writes in 0.5 hours: --iteration",
    ),
    (["--endurance", "1TB"], "--state-dtype int8 writes nothing a step; or --iteration says"),
    (["--endurance", "1TB"], "Steps without a pause use up the drive's rated writes in"),
    (["--iteration", "1"], "A step takes 4.2 x as long as --iteration says that an iteration does"),
    (["--endurance", "1TB", "--iteration", "9"], "Steps at this pace use up the drive's rated writes in"),
]


@pytest.mark.parametrize(("options", "said"), ADVICE)
def test_advice(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    monkeypatch.setattr(planning, "physical_memory", lambda: 16 << 30)
    status, out, _ = run(capsys, "plan", *COUNT, *FAST, *options)
    assert status == 0
    assert said in in_words(out)


@pytest.mark.parametrize("text", ["1.2PBW", "1200 TBW", "1.2PB", "1.2P"])
def test_rated_writes_are_read_as_data_sheets_have_them(capsys: pytest.CaptureFixture[str], text: str) -> None:
    assert figures(capsys, *COUNT, *FAST, "--endurance", text)["endurance"] == 1.2e15


def test_advice_about_a_drive_that_is_too_small(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "free_bytes", lambda _: 9 << 30)
    advice = figures(capsys, tmp_path, *COUNT, *FAST)["advice"]
    assert advice[0].startswith("The state does not fit: it needs 14.9 GiB, and 9.0 GiB are free in")
    assert "--durability scratch needs 7.5 GiB" in advice[0]
    assert "--state-dtype bf16 needs 7.5 GiB" in advice[0]
    assert "----" not in advice[0]
    monkeypatch.setattr(planning, "free_bytes", lambda _: 2 << 30)
    (advice, *_) = figures(capsys, tmp_path, *COUNT, *FAST)["advice"]
    assert advice.endswith(": --state-dtype int8 --durability scratch needs 1.9 GiB, and does not survive a crash.")
    monkeypatch.setattr(planning, "free_bytes", lambda _: 1 << 30)
    advice = figures(capsys, tmp_path, *COUNT, *FAST, "--durability", "scratch")["advice"]
    assert advice[0].endswith("A larger drive is needed.")


def test_advice_about_memory_that_is_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "physical_memory", lambda: 1 << 30)
    assert "Buffers would take 2.0 GiB, and this machine has 1.0 GiB" in figures(capsys, *COUNT, *FAST)["advice"][0]


def test_a_busy_machine_is_noticed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_command, "measure_update", lambda *_: planning.Measured.of([1e8, 2e8, 3e8]))
    content = figures(capsys, *COUNT, "--bandwidth", "3GB/s")
    assert content["results"][0]["update_rate"] == 2e8
    assert content["advice"][0].startswith("Repeats of what was measured differ by up to 100 %: the machine is busy")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "one of the arguments --parameters --model is required"),
        ([*COUNT, "--model", "x"], "not allowed with argument --parameters"),
        (["--parameters", "lots"], "argument --parameters: 'lots' is not a count"),
        ([*COUNT, "--bandwidth", "fast"], "'fast' is not a bandwidth: write it as 3.2GB/s"),
        ([*COUNT, "--bandwidth", "3.2"], "'3.2' is 3 bytes a second: write it with its unit, as 3.2GB/s"),
        ([*COUNT, "--endurance", "1.2XBW"], "'1.2XBW' is not a number of bytes: write it as 600TB, or 1.2PB"),
        ([*COUNT, "--state-dtype", "fp8"], "'fp8' is not one of exact, bf16, int8"),
        ([*COUNT, "--state-dtype", "bf16,int8"], "names several"),
        ([*COUNT, "--state-dtype", "=int8"], "is not one of"),
        ([*COUNT, "--optimizer-args", "{"], "is not JSON"),
        ([*COUNT, "--optimizer-args", "3"], "is not a JSON object"),
        ([*COUNT, "--iteration", "0"], "'0' is not a number of seconds"),
        ([*COUNT, "no-such-folder"], "'no-such-folder' does not exist"),
    ],
)
def test_usage_errors(capsys: pytest.CaptureFixture[str], options: list[str], said: str) -> None:
    status, out, err = run(capsys, "plan", *options)
    assert (status, out) == (2, "")
    assert said in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (COUNT, "name a folder on it, to measure there, or give --bandwidth"),
        ([*COUNT, "/proc/self"], "not a file system for data"),
        ([*COUNT, ".", "--model-args", "{}"], "--model-args is for --model"),
        ([*COUNT, ".", "--optimizer", "adamw"], "'adamw' is no optimizer of torch.optim; did you mean AdamW?"),
        ([*COUNT, ".", "--optimizer", "LBFGS"], "the state of LBFGS cannot be paged"),
        ([*COUNT, ".", "--optimizer", "SGD"], "SGD keeps no state to speak of"),
        ([*COUNT, ".", "--optimizer", "Adafactor"], "depends on the shapes of the parameters: name the model"),
        ([*COUNT, ".", "--optimizer-args", '{"speed": 1}'], "torch.optim.AdamW cannot be made"),
        ([*COUNT, ".", "--host-memory", "4KiB"], "--host-memory=4.0 KiB is too small"),
        ([*COUNT, ".", "--unit-size", "1GiB"], "--unit-size=1.0 GiB must lie between"),
        ([*COUNT, ".", "--dtype", "bf16", "--state-dtype", "int8"], "--master-weights keeps it in float32"),
        ([*COUNT, ".", "--state-dtype", "momentum=int8"], "there is no state 'momentum'"),
        (["--model", "nothing", "."], "neither a file or folder that exists nor a class"),
    ],
)
def test_what_cannot_work_fails_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    forbid_measuring(monkeypatch)
    status, out, err = run(capsys, "plan", *options)
    assert (status, out) == (1, "")
    assert err.startswith("offload-opt: error: ")
    assert said in err


def test_narrow_screens_hold_the_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run(capsys, "plan", "--parameters", "70B", *FAST)
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
