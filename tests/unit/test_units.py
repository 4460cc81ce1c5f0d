"""Planning: which state tensors are paged together, and where each byte of them lies."""

from __future__ import annotations

import dataclasses
import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from offload_opt import ConfigError
from offload_opt.config import format_exact
from offload_opt.units import (
    LARGEST_PIECE,
    PAGE,
    RING_DEPTH,
    TRANSITIONS,
    Chunking,
    Paging,
    ParameterPlan,
    Piece,
    StateTemplate,
    StateTensor,
    SwapUnit,
    UnitState,
    is_dense,
    least_host_memory,
    least_loaded,
    plan_units,
    state_bytes,
)

EXAMPLES = settings(max_examples=150, deadline=None)

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.uint8]


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def elementwise(*dtypes: torch.dtype) -> StateTemplate:
    tensors = tuple(StateTensor(f"state{i}", dtype, (7,), (1,)) for i, dtype in enumerate(dtypes))
    return StateTemplate(Paging.ELEMENTWISE, tensors, {}, tuple(tensor.name for tensor in tensors))


def whole(*tensors: tuple[torch.dtype, tuple[int, ...]]) -> StateTemplate:
    placed = tuple(StateTensor(f"state{i}", d, shape, row_major(shape)) for i, (d, shape) in enumerate(tensors))
    return StateTemplate(Paging.WHOLE, placed, {}, tuple(tensor.name for tensor in placed))


def parameter(
    position: int,
    shape: tuple[int, ...],
    template: StateTemplate,
    chunking: Chunking = Chunking(2, False, 256 * 1024),  # noqa: B008
    device: torch.device = CPU,
) -> ParameterPlan:
    name = f"layer.{position}"
    return ParameterPlan((0, position), name, shape, row_major(shape), torch.float32, template, device, chunking)


CHUNKINGS = st.builds(
    Chunking,
    threads=st.sampled_from([1, 2, 3, 8]),
    cuts_anywhere=st.booleans(),
    max_elements=st.sampled_from([256 * 1024, 32768, 1000, 64, 1 << 62]),
)
# Up to 32 bytes an element, as of a double-precision Adam and more; see test_many_state_tensors for beyond.
TEMPLATES = st.one_of(
    st.lists(st.sampled_from(DTYPES), max_size=4).map(lambda dtypes: elementwise(*dtypes)),
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 40), min_size=1, max_size=2).map(tuple)), max_size=3
    ).map(lambda tensors: whole(*tensors)),
)
SHAPES = st.one_of(
    st.lists(st.integers(1, 70), max_size=3).map(tuple),
    st.sampled_from([(1,), (63,), (64,), (65,), (32_767,), (32_768,), (100_003,), (300_000,)]),
)
DEVICES = st.sampled_from([CPU, CPU, CPU, torch.device("cuda:0")])


@st.composite
def parameter_lists(draw: st.DrawFn) -> list[ParameterPlan]:
    count = draw(st.integers(0, 6))
    return [parameter(i, draw(SHAPES), draw(TEMPLATES), draw(CHUNKINGS), draw(DEVICES)) for i in range(count)]


def check_plan(parameters: list[ParameterPlan], units: list[SwapUnit], host_memory: int, first_index: int = 0) -> None:
    """All that planning promises."""
    assert [unit.index for unit in units] == list(range(first_index, first_index + len(units)))
    by_key = {plan.key: plan for plan in parameters}
    assert len({piece.tensor_label(t) for unit in units for piece in unit.pieces for t in piece.tensors}) == sum(
        len(piece.tensors) for unit in units for piece in unit.pieces
    )
    for unit in units:
        assert unit.pieces
        assert unit.nbytes % 4096 == 0
        assert unit.nbytes <= host_memory // RING_DEPTH
        assert (unit.state, unit.is_blank) == (UnitState.ON_DISK, True)
        assert {by_key[piece.key].device for piece in unit.pieces} == {unit.device}
        end = 0
        for tensor in (tensor for piece in unit.pieces for tensor in piece.tensors):
            assert tensor.offset % 64 == 0
            assert tensor.offset >= end
            end = tensor.offset + tensor.nbytes
        assert end <= unit.nbytes < end + PAGE + 64
    for plan in parameters:
        pieces = [piece for unit in units for piece in unit.pieces if piece.key == plan.key]
        if not plan.template.paged:
            assert pieces == []
            continue
        assert [piece.name for piece in pieces] == [plan.name] * len(pieces)
        # Every element is in one piece, in order, and each piece has all of its state.
        assert [piece.start for piece in pieces] + [plan.numel] == [0] + [piece.stop for piece in pieces]
        for piece in pieces:
            assert (piece.cuts[0], piece.cuts[-1]) == (piece.start, piece.stop)
            assert all(a < b for a, b in pairwise(piece.cuts))
            assert [(t.name, t.dtype) for t in piece.tensors] == [(t.name, t.dtype) for t in plan.template.paged]
        if plan.template.paging is Paging.WHOLE:
            assert [(piece.cuts, piece.is_whole) for piece in pieces] == [((0, plan.numel), True)]
            assert [dataclasses.replace(t, offset=0) for t in pieces[0].tensors] == list(plan.template.paged)
            continue
        for piece in pieces:
            assert piece.is_whole == (piece.cuts == (0, plan.numel))
            shape, stride = (plan.shape, plan.stride) if piece.is_whole else ((piece.stop - piece.start,), (1,))
            assert {(tensor.shape, tensor.stride) for tensor in piece.tensors} == {(shape, stride)}
            assert max(b - a for a, b in pairwise(piece.cuts)) <= plan.chunking.max_elements
        if len(pieces) > 1:
            assert_same_code([0, *(cut for piece in pieces for cut in piece.cuts[1:])], plan.numel, plan.chunking)


@pytest.mark.parametrize("unit_size", [1 << 30, 8 << 30])
@pytest.mark.parametrize("max_elements", [1 << 20, 1 << 62])
def test_no_piece_has_more_elements_than_positions_of_ties_have_bits_for(unit_size: int, max_elements: int) -> None:
    plan = parameter(0, (5 << 30,), elementwise(torch.uint8), Chunking(2, True, max_elements))
    pieces = [piece for unit in plan_units([plan], 24 << 30, unit_size) for piece in unit.pieces]
    assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
    assert pieces[-1].stop == 5 << 30
    assert max(piece.stop - piece.start for piece in pieces) == LARGEST_PIECE <= 1 << 31


# What ATen does (aten/src/ATen/TensorIterator.cpp, Parallel.h), written anew: a kernel over n elements is split between
# threads from 32768 elements on, and each thread's run has vector code, and scalar code for its last few elements.


def scalar_elements(numel: int, threads: int, vector: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which of ``numel`` elements are updated by scalar code, with vectors of ``vector`` elements."""
    runs = 1 if numel < 32768 else min(threads, -(-numel // 32768))
    run = -(-numel // runs)
    is_scalar = np.zeros(numel, dtype=np.bool_)
    for begin in range(0, numel, run):
        end = min(begin + run, numel)
        is_scalar[begin + (end - begin) // vector * vector : end] = True
    return is_scalar


def assert_same_code(cuts: list[int], numel: int, chunking: Chunking) -> None:
    """Every element is updated by the same code in its chunk as it would be in the whole."""
    if chunking.cuts_anywhere:  # all elements are alike, given that each chunk begins with a whole vector
        assert all(cut % 64 == 0 for cut in cuts[:-1])
        return
    for vector in (4, 16, 64):
        expected = scalar_elements(numel, chunking.threads, vector)
        actual = np.concatenate([scalar_elements(b - a, chunking.threads, vector) for a, b in pairwise(cuts)])
        assert np.array_equal(actual, expected), np.flatnonzero(actual != expected)[:10]


@EXAMPLES
@given(
    parameters=parameter_lists(),
    spare=st.one_of(st.just(0), st.integers(0, 200_000), st.integers(0, 40_000_000)),
    place=st.none() | st.floats(0, 1),
    first_index=st.integers(0, 5),
)
def test_every_element_has_one_place(
    parameters: list[ParameterPlan], spare: int, place: float | None, first_index: int
) -> None:
    least, _ = least_host_memory(parameters)
    host_memory = least + spare
    unit_size = None
    if place is not None:
        smallest, largest = least // RING_DEPTH, host_memory // RING_DEPTH // PAGE * PAGE
        unit_size = smallest + round(place * (largest - smallest))
    units = plan_units(parameters, host_memory, unit_size, first_index)
    check_plan(parameters, units, host_memory, first_index)
    if unit_size is not None:
        assert all(unit.nbytes <= unit_size for unit in units)
    tensor_bytes = sum(t.nbytes for unit in units for piece in unit.pieces for t in piece.tensors)
    assert tensor_bytes <= state_bytes(parameters) <= sum(unit.nbytes for unit in units)


@EXAMPLES
@given(parameters=parameter_lists())
def test_the_least_host_memory_is_enough_and_less_is_not(parameters: list[ParameterPlan]) -> None:
    least, name = least_host_memory(parameters)
    assert least % (RING_DEPTH * PAGE) == 0
    check_plan(parameters, plan_units(parameters, least, None), least)
    for too_little in (least - 1, least - PAGE, 1):
        with pytest.raises(ConfigError, match=f"at least {re.escape(format_exact(least))} ") as caught:
            plan_units(parameters, too_little, None)
        assert name in str(caught.value)
    assert (name == "") == (least == RING_DEPTH * PAGE)


def test_the_least_host_memory_names_the_parameter_that_needs_it() -> None:
    small = parameter(0, (100, 100), whole((torch.float32, (100, 100))))
    large = parameter(1, (300, 100), whole((torch.float32, (300, 100)), (torch.float32, (300, 100))))
    sliceable = parameter(2, (10_000_000,), elementwise(torch.float32))
    needed = -(-300 * 100 * 4 * 2 // PAGE) * PAGE * RING_DEPTH
    assert least_host_memory([small, large, sliceable]) == (needed, "layer.1")
    assert least_host_memory([sliceable]) == least_host_memory([]) == (RING_DEPTH * PAGE, "")


@settings(max_examples=40, deadline=None)
@given(dtypes=st.lists(st.sampled_from(DTYPES), min_size=5, max_size=12), numel=st.integers(1, 1000))
@example([torch.float64] * 5, 1000)  # ValueError: range() arg 3 must not be zero
@example([torch.float64] * 9, 10)
def test_many_state_tensors(dtypes: list[torch.dtype], numel: int) -> None:
    parameters = [parameter(0, (numel,), elementwise(*dtypes))]
    least, _ = least_host_memory(parameters)
    check_plan(parameters, plan_units(parameters, least, None), least)


@EXAMPLES
@given(parameters=parameter_lists(), spare=st.integers(0, 1_000_000), off=st.integers(1, 100_000))
def test_a_unit_size_out_of_range_is_refused(parameters: list[ParameterPlan], spare: int, off: int) -> None:
    least, _ = least_host_memory(parameters)
    host_memory = least + spare
    smallest, largest = least // RING_DEPTH, host_memory // RING_DEPTH // PAGE * PAGE
    for unit_size in (smallest - off, largest + off):
        with pytest.raises(ConfigError, match="unit_size"):
            plan_units(parameters, host_memory, unit_size)
    for unit_size in (smallest, largest):
        check_plan(parameters, plan_units(parameters, host_memory, unit_size), host_memory)


def test_the_unit_size_that_is_chosen() -> None:
    parameters = [parameter(0, (20_000_000,), elementwise(torch.float32, torch.float32))]
    mib = 1 << 20
    for host_memory, unit_size in (
        (16 * mib, 2 * mib), (100 * mib, 8 * mib), (400 * mib, 25 * mib // 2), (1 << 30, 16 * mib), (8 << 30, 32 * mib)
    ):  # fmt: skip
        units = plan_units(parameters, host_memory, None)
        check_plan(parameters, units, host_memory)
        assert unit_size - (2 << 20) < units[0].nbytes <= unit_size


@EXAMPLES
@given(chunking=CHUNKINGS, limit=st.integers(0, 300_000))
def test_the_largest_chunk_has_no_scalar_code(chunking: Chunking, limit: int) -> None:
    largest = chunking.largest(limit)
    assert 0 <= largest <= min(limit, chunking.max_elements)
    assert largest % 64 == 0
    if not chunking.cuts_anywhere:
        assert not scalar_elements(largest, chunking.threads, 64).any() if largest else True
    assert (largest > 0) == (min(limit, chunking.max_elements) >= 64)
    if 64 <= limit < 32768:  # no threads: whole vectors are all that it takes
        assert largest == min(limit, chunking.max_elements) // 64 * 64


@EXAMPLES
@given(chunking=CHUNKINGS, numel=st.integers(1, 400_000), limit=st.integers(64, 400_000))
@example(Chunking(3, False, 1 << 62), 100_003, 40_000)  # a run of one thread is longer than a chunk
@example(Chunking(2, False, 1 << 62), 100_003, 100_002)
def test_cuts_keep_elements_in_the_same_code(chunking: Chunking, numel: int, limit: int) -> None:
    cuts = chunking.cut(numel, limit)
    assert (cuts[0], cuts[-1]) == (0, numel)
    assert all(a < b for a, b in pairwise(cuts))
    assert max(b - a for a, b in pairwise(cuts)) <= min(limit, chunking.max_elements)
    if len(cuts) > 2:
        assert_same_code(cuts, numel, chunking)
    chunk = chunking.largest(limit)
    if numel <= min(limit, chunking.max_elements):
        assert cuts == [0, numel]
    elif numel < 32768:  # one run: cut into chunks as large as they may be
        assert cuts == [*range(0, numel, chunk), numel]


@settings(max_examples=40, deadline=None)
@given(parameters=parameter_lists(), spare=st.integers(0, 100_000))
def test_views_of_a_unit_do_not_touch_each_other(parameters: list[ParameterPlan], spare: int) -> None:
    host_memory = least_host_memory(parameters)[0] + spare
    for unit in plan_units(parameters, host_memory, None):
        data = torch.zeros(unit.nbytes, dtype=torch.uint8)
        views = [
            (tensor, tensor.view(data)) for piece in unit.pieces for chunk in piece.chunks for tensor in chunk.exact
        ]
        for _, view in views:
            assert view.untyped_storage().data_ptr() == data.untyped_storage().data_ptr()
            as_bytes = view.reshape(-1).view(torch.uint8)
            as_bytes += 1
        assert int(data.max()) == 1  # no byte is in two views
        assert int(data.sum()) == sum(tensor.nbytes for piece in unit.pieces for tensor in piece.tensors)
        assert all(view.dtype == tensor.dtype for tensor, view in views)


def test_a_whole_piece_keeps_its_strides() -> None:
    channels_last = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
    template = elementwise(torch.bfloat16, torch.float32)
    shape, stride = tuple(channels_last.shape), channels_last.stride()
    plan = ParameterPlan((1, 2), "conv", shape, stride, torch.float32, template, CPU, Chunking(1, False, 1 << 20))
    (unit,) = plan_units([plan], 1 << 20, None)
    (piece,) = unit.pieces
    data = torch.arange(unit.nbytes, dtype=torch.uint8)
    (chunk,) = piece.chunks
    assert chunk.exact == piece.tensors
    for tensor in chunk.exact:
        view = tensor.view(data)
        assert (view.shape, view.stride(), view.dtype) == (shape, stride, tensor.dtype)
        assert view.data_ptr() == data.data_ptr() + tensor.offset
    assert [piece.tensor_label(tensor) for tensor in piece.tensors] == ["conv.state0", "conv.state1"]


def test_labels_name_the_elements_of_a_part() -> None:
    tensor = StateTensor("exp_avg", torch.float32, (64,), (1,))
    piece = Piece((0, 0), "w", 128, 192, (128, 192), False, (tensor,))
    assert piece.tensor_label(tensor) == "w.exp_avg[128:192]"


@EXAMPLES
@given(st.data())
def test_dense_is_every_order_of_dimensions_without_gaps(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), max_size=4))
    order = data.draw(st.permutations(range(len(shape))))
    tensor = torch.empty([shape[i] for i in order]).permute([order.index(i) for i in range(len(order))])
    assert tuple(tensor.shape) == tuple(shape)
    assert is_dense(tensor.shape, tensor.stride())
    if tensor.numel() > 1:
        assert not is_dense(tensor.shape, [2 * step for step in tensor.stride()])
        assert not is_dense((*tensor.shape, 3), (*tensor.stride(), 0))


def test_only_the_steps_of_the_table_are_allowed() -> None:
    for begin in UnitState:
        for end in UnitState:
            unit = SwapUnit(3, (), PAGE, CPU, state=begin)
            if end in TRANSITIONS[begin]:
                unit.move_to(end)
                assert unit.state is end
            else:
                with pytest.raises(AssertionError, match=f"unit 3 cannot go from {begin.value} to {end.value}"):
                    unit.move_to(end)
                assert unit.state is begin


def test_the_table_has_the_round_of_a_unit() -> None:
    unit = SwapUnit(0, (), PAGE, CPU)
    for state in (UnitState.READING, UnitState.RESIDENT, UnitState.WRITING, UnitState.ON_DISK):
        unit.move_to(state)
    assert UnitState.RESIDENT not in TRANSITIONS[UnitState.ON_DISK]  # nothing is updated that was not read
    for begin in UnitState:  # nothing that was updated is dropped
        with pytest.raises(AssertionError, match="cannot go"):
            SwapUnit(0, (), PAGE, CPU, state=begin, is_dirty=True).move_to(UnitState.ON_DISK)


# Spreading over folders.


@st.composite
def spreads(draw: st.DrawFn) -> tuple[list[int], list[float]]:
    """Sizes of units, and bandwidths of folders."""
    sizes = draw(st.lists(st.integers(1, 1 << 25), min_size=1, max_size=100))
    return sizes, draw(st.lists(st.floats(1, 1e10), min_size=1, max_size=5))


@given(spreads())
def test_folders_get_their_share(spread: tuple[list[int], list[float]]) -> None:
    sizes, bandwidths = spread
    assigned = [0] * len(bandwidths)
    free = [1 << 60] * len(bandwidths)
    for size in sizes:
        index = least_loaded(size, assigned, bandwidths, free)
        assert index is not None
        assigned[index] += size
    share = [sum(sizes) * bandwidth / sum(bandwidths) for bandwidth in bandwidths]
    slack = 1 + 1e-6 * sum(sizes)  # rounding
    for amount, ideal, bandwidth in zip(assigned, share, bandwidths, strict=True):
        assert amount >= ideal - max(sizes) - slack
        # Nor is any through later than it had to be by more than a unit for each of the others.
        most = (len(bandwidths) - 1) * max(sizes) * bandwidth / sum(bandwidths)
        assert amount <= ideal + most + slack


def test_consecutive_units_take_turns() -> None:
    assigned = [0, 0]
    order = []
    for _ in range(16):
        index = least_loaded(100, assigned, [3e9, 1e9], [10**6] * 2)
        assert index is not None
        assigned[index] += 100
        order.append(index)
    assert all(sum(order[start : start + 4]) == 1 for start in range(13))


@given(spreads(), st.data())
def test_no_folder_gets_more_than_it_has_room_for(spread: tuple[list[int], list[float]], data: st.DataObject) -> None:
    sizes, bandwidths = spread
    free = data.draw(st.lists(st.integers(0, 1 << 27), min_size=len(bandwidths), max_size=len(bandwidths)))
    assigned = [0] * len(bandwidths)
    for size in sizes:
        index = least_loaded(size, assigned, bandwidths, free)
        if index is None:
            assert max(free) < size
            continue
        assert free[index] >= size
        free[index] -= size
        assigned[index] += size
