"""What a handle is made with."""

from __future__ import annotations

import pytest

from offload_opt import AioHandle, ConfigError
from tests.aio.support import PAGE


def test_getters(engine: str) -> None:
    with AioHandle(12345, 7, True, False, 3, engine=engine) as handle:
        assert handle.get_block_size() == 12345
        assert handle.get_queue_depth() == 7
        assert handle.get_single_submit() is True
        assert handle.get_overlap_events() is False
        assert handle.get_thread_count() == handle.get_intra_op_parallelism() == 3
        assert handle.get_alignment() % PAGE == 0
        assert handle.engine == engine
        assert engine in repr(handle)


def test_defaults() -> None:
    with AioHandle() as handle:
        assert (handle.get_block_size(), handle.get_queue_depth(), handle.get_thread_count()) == (1 << 20, 32, 1)
        assert (handle.get_single_submit(), handle.get_overlap_events()) == (False, True)


@pytest.mark.parametrize("field", ["block_size", "queue_depth", "num_threads"])
def test_a_setting_out_of_range_is_refused(engine: str, field: str) -> None:
    for value in (0, 1 << 31):
        with pytest.raises(ValueError, match=f"{field}.*not {value}"):
            AioHandle(engine=engine, **{field: value})  # type: ignore[arg-type]


def test_a_block_size_in_words(engine: str) -> None:
    with AioHandle(block_size="128KiB", engine=engine) as handle:
        assert handle.get_block_size() == 128 << 10
    for setting, value in (("block_size", "much"), ("block_size", 1.5), ("queue_depth", "8"), ("num_threads", True)):
        with pytest.raises(ConfigError, match=f"{setting}.*(much|float|'8'|True)"):
            AioHandle(engine=engine, **{setting: value})  # type: ignore[arg-type]


def test_the_environment_chooses_the_engine_for_auto_alone(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_OPT_ENGINE", engine)
    with AioHandle() as handle, AioHandle(engine="threads") as explicit:
        assert handle.engine == engine
        assert explicit.engine == "threads"


def test_an_unknown_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'warp'"):
        AioHandle(engine="warp")
    monkeypatch.setenv("OFFLOAD_OPT_ENGINE", "weft")
    with pytest.raises(ConfigError, match="'weft'"):
        AioHandle()
