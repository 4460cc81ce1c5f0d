"""Which state tensors are paged together, and where each byte of them lies. Pure: no I/O, no optimizer is run here.

A parameter's paged state is cut into *pieces*, each a run of the parameter's elements; pieces are packed into *units*,
and a unit is what one read or write moves. Inside its unit a piece keeps each of its state tensors contiguous.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from .codecs import MASTER, granule_of, native_format, stored_parts
from .config import format_bytes, format_exact
from .errors import ConfigError

PAGE = 4096
"""Units are whole pages, so that all of a unit goes past the page cache."""
TENSOR_ALIGNMENT = 64
"""Bytes: what torch gives its own CPU tensors."""
RING_DEPTH = 3
"""The least number of buffers: one being read, one being updated, one being written."""
LARGEST_PIECE = 1 << 30
"""Elements: positions of a master's ties within a piece are of 32 bits."""

# How ATen runs an elementwise CPU kernel over n elements (aten/src/ATen/TensorIterator.cpp, Parallel.h): from _GRAIN
# elements on, each thread gets a contiguous run of ceil(n / threads). A run goes through vector code in steps of at
# most _VECTOR elements, and its last few elements through scalar code. For bf16, and for fused kernels, the two may
# round differently. So a parameter is cut only where that leaves every element in the kind of code that it was in.
_GRAIN = 32768
_VECTOR = 64


class Paging(enum.Enum):
    """How a parameter's state may be cut."""

    ELEMENTWISE = "each element of the state depends on that element alone: any run of elements is updated alike"
    WHOLE = "the update looks at the whole parameter: it stays in one unit"


class UnitState(enum.Enum):
    """Where a unit's state is. TRANSITIONS says what may follow what."""

    ON_DISK = "on disk"
    READING = "being read"
    RESIDENT = "in a buffer, to be updated, or kept there for the next step"
    WRITING = "being written"


TRANSITIONS = {
    UnitState.ON_DISK: {UnitState.READING},
    UnitState.READING: {UnitState.RESIDENT, UnitState.ON_DISK},  # back: read ahead, and then not needed
    UnitState.RESIDENT: {UnitState.WRITING, UnitState.ON_DISK},  # at once: its file has its bytes
    UnitState.WRITING: {UnitState.ON_DISK, UnitState.READING},  # the read is queued behind the write
}


@dataclasses.dataclass(frozen=True)
class StateTensor:
    """One state tensor of a piece: ``shape`` and ``stride`` in elements, ``offset`` in bytes from its unit's start.

    With a ``codec`` (see codecs.py) other tensors are ``stored`` for it, in the order of its memory.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0
    codec: str = "exact"

    @functools.cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    @functools.cached_property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @functools.cached_property
    def stored(self) -> tuple[StateTensor, ...]:
        """What lies in the unit for it, from ``offset`` on: itself or, with a codec, flat tensors."""
        return (self,) if self.codec == "exact" else self._parts(0, self.numel)

    @property
    def end(self) -> int:
        """Where what is stored ends, in bytes from its unit's start."""
        return self.stored[-1].offset + self.stored[-1].nbytes

    def run(self, begin: int, end: int) -> tuple[StateTensor, ...]:
        """What is stored for the elements ``begin`` to ``end``, in the order of its memory; all of it is flat."""
        if self.codec != "exact":
            return self._parts(begin, end)
        offset = self.offset + begin * self.dtype.itemsize
        return (dataclasses.replace(self, shape=(end - begin,), stride=(1,), offset=offset),)

    def _parts(self, begin: int, end: int) -> tuple[StateTensor, ...]:
        wholes, firsts, lasts = (stored_parts(self.codec, self.name, n) for n in (self.numel, begin, end))
        parts, offset = [], self.offset
        for (suffix, dtype, numel), (_, _, first), (_, _, last) in zip(wholes, firsts, lasts, strict=True):
            start = offset + first * dtype.itemsize
            parts.append(StateTensor(self.name + suffix, dtype, (last - first,), (1,), start))
            offset = _aligned(offset + numel * dtype.itemsize)
        return tuple(parts)

    def view(self, data: torch.Tensor) -> torch.Tensor:
        """The tensor inside its unit's bytes: ``data`` is a 1-D uint8 tensor of the unit's size or more."""
        flat = data[self.offset : self.offset + self.nbytes]
        flat = flat if self.dtype == data.dtype else flat.view(self.dtype)
        return flat if self.stride == (1,) else flat.as_strided(self.shape, self.stride, flat.storage_offset())


@dataclasses.dataclass(frozen=True)
class StateTemplate:
    """What state an optimizer keeps for one parameter, found by a probe.

    ``paged`` has, for ELEMENTWISE, tensors of the shape of the probe, of which only name and dtype count; for WHOLE,
    the tensors as they are. ``resident`` has the names and values of what stays in memory: small tensors and other
    objects.
    """

    paging: Paging
    paged: tuple[StateTensor, ...]
    resident: Mapping[str, Any]
    names: tuple[str, ...]
    """All names, in the optimizer's order."""

    @property
    def granule(self) -> int:
        """Pieces are cut at multiples of so many elements, but for what the arithmetic asks for."""
        return max([_VECTOR, *(granule_of(tensor.codec, tensor.name) for tensor in self.paged)])


@dataclasses.dataclass(frozen=True)
class ParameterPlan:
    """What planning needs to know of a parameter. ``key`` is (group, position in the group)."""

    key: tuple[int, int]
    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    template: StateTemplate
    device: torch.device
    chunking: Chunking

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def whole_tensors(self, stride: tuple[int, ...] | None = None) -> list[StateTensor]:
        """The parameter's paged state tensors as they are when not cut; ``stride`` in place of the parameter's."""
        if self.template.paging is Paging.WHOLE:
            return list(self.template.paged)
        stride = self.stride if stride is None else stride
        return [dataclasses.replace(t, shape=self.shape, stride=stride) for t in self.template.paged]


@dataclasses.dataclass(frozen=True, eq=False)
class CodedRun:
    """A run of a state tensor that has a codec, or all of it, and what is ``stored`` for it in the unit."""

    tensor: StateTensor
    stored: tuple[StateTensor, ...]

    @functools.cached_property
    def numel(self) -> int:
        """Of the values."""
        return self.stored[0].numel

    @functools.cached_property
    def native(self) -> tuple[int, int, int, int]:
        """The format's number, that of the values, and where the first and the last stored part lie, in bytes from the
        unit's start."""
        form = native_format(self.tensor.codec, self.tensor.name)
        return form, self.numel, self.stored[0].offset, self.stored[-1].offset


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """Elements ``begin`` to ``end`` of a parameter, updated in one call, and what their piece's unit has of them.

    ``exact`` are their state tensors that are stored as they are, ``coded`` the others.
    """

    begin: int
    end: int
    exact: tuple[StateTensor, ...]
    coded: tuple[CodedRun, ...]

    @functools.cached_property
    def numels(self) -> tuple[int, ...]:
        """Of the values of each of ``coded``."""
        return tuple(run.numel for run in self.coded)


@dataclasses.dataclass(eq=False)
class Piece:
    """Elements ``start`` to ``stop`` of a parameter, in memory order, with the state that belongs to them.

    ``cuts`` are the elements at which the update of the piece is cut into chunks, ``start`` and ``stop`` included.
    ``resident`` is its state that stays in memory; None until the optimizer has made any state for it. ``ties`` belong
    to a master's remainder: see codecs.Master; positions count from ``start``, and None is none.
    """

    key: tuple[int, int]
    name: str
    start: int
    stop: int
    cuts: tuple[int, ...]
    is_whole: bool
    tensors: tuple[StateTensor, ...]
    resident: dict[str, Any] | None = None
    ties: torch.Tensor | None = None

    @functools.cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """The chunks, in order; kept, since every step needs them."""
        return tuple(self._chunk(begin, end) for begin, end in itertools.pairwise(self.cuts))

    def _chunk(self, begin: int, end: int) -> Chunk:
        first, last = begin - self.start, end - self.start
        runs = [(tensor, tensor.stored if self.is_whole else tensor.run(first, last)) for tensor in self.tensors]
        exact = tuple(run[0] for tensor, run in runs if tensor.codec == "exact")
        return Chunk(begin, end, exact, tuple(CodedRun(*run) for run in runs if run[0].codec != "exact"))

    @functools.cached_property
    def whole_runs(self) -> dict[str, CodedRun]:
        """All of each state tensor that has a codec, by its name; kept, since every step needs them."""
        return {tensor.name: CodedRun(tensor, tensor.stored) for tensor in self.tensors if tensor.codec != "exact"}

    @functools.cached_property
    def master(self) -> StateTensor | None:
        """The fp32 master, where there is one."""
        return next((tensor for tensor in self.tensors if tensor.name == MASTER), None)

    def tensor_label(self, tensor: StateTensor) -> str:
        """The name of a stored tensor in the unit file."""
        return f"{self.name}.{tensor.name}" + ("" if self.is_whole else f"[{self.start}:{self.stop}]")


@dataclasses.dataclass(eq=False)
class SwapUnit:
    """Pieces that are paged together: one file, one transfer."""

    index: int
    pieces: tuple[Piece, ...]
    nbytes: int
    device: torch.device
    state: UnitState = UnitState.ON_DISK
    is_blank: bool = True  # it has no bytes yet, so there is nothing to read
    is_dirty: bool = False  # RESIDENT with bytes that its file does not have

    def move_to(self, state: UnitState) -> None:
        """Change the state; a step that TRANSITIONS does not have is a bug, and raises. So is one that drops bytes."""
        if state not in TRANSITIONS[self.state] or (self.is_dirty and state is UnitState.ON_DISK):
            raise AssertionError(f"unit {self.index} cannot go from {self.state.value} to {state.value}")
        self.state = state


@dataclasses.dataclass(frozen=True)
class Chunking:
    """How the update of an elementwise parameter may be cut on its device."""

    threads: int  # of torch's intra-op pool: they decide where a kernel has scalar code
    cuts_anywhere: bool  # a fused CPU kernel cuts between threads on vector boundaries; on a GPU all elements are alike
    max_elements: int

    def largest(self, limit: int) -> int:
        """As many elements, at most ``limit``, as form a chunk with no scalar code inside or at its end. 0: none."""
        length = min(limit, self.max_elements)
        while length > 0:
            step = _VECTOR * self._runs(length)
            even = length // step * step
            if even == length:
                break
            length = even
        return length

    def cut(self, numel: int, limit: int) -> list[int]:
        """Cut 0..numel into chunks of at most ``limit`` elements that are updated bit for bit as the whole would be."""
        if numel <= min(limit, self.max_elements):
            return [0, numel]
        chunk = self.largest(limit)
        cuts = [0]
        runs = 1 if self.cuts_anywhere else self._runs(numel)
        run = -(-numel // runs)
        for begin in range(0, numel, run):
            end = min(begin + run, numel)
            cuts.extend(range(begin + chunk, end, chunk))
            rest = end - cuts[-1]
            even = rest if self.cuts_anywhere or rest < _GRAIN else self.largest(rest)
            if 0 < even < rest:
                cuts.append(cuts[-1] + even)
            cuts.append(end)
        return cuts

    def _runs(self, numel: int) -> int:
        return max(1, min(self.threads, -(-numel // _GRAIN)))


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether a tensor's elements fill a run of memory without gaps or overlaps, in whatever order of dimensions."""
    expected = 1
    for step, size in sorted((st, sz) for st, sz in zip(stride, shape, strict=True) if sz != 1):
        if step != expected:
            return False
        expected *= size
    return True


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor whose elements lie in the order of its dimensions."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def is_row_major(tensor: StateTensor) -> bool:
    """Whether the elements lie in memory in the order of the dimensions, without gaps."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def least_host_memory(parameters: Iterable[ParameterPlan]) -> tuple[int, str]:
    """The least host_memory in bytes with which these parameters can be paged, and the parameter that decides it."""
    least, name = RING_DEPTH * PAGE, ""
    for parameter in parameters:
        if parameter.template.paging is Paging.WHOLE:
            unit = _pages(_end_of_tensors(parameter.template.paged, 0)[1])
        else:
            unit = _pages(_piece_bytes(parameter, min(parameter.numel, parameter.template.granule)))
        if RING_DEPTH * unit > least:
            least, name = RING_DEPTH * unit, parameter.name
    return least, name


def check_memory(parameters: Sequence[ParameterPlan], host_memory: int, unit_size: int | None) -> int:
    """The size in bytes that units of ``parameters`` get at most.

    Args:
        parameters: What is to be paged.
        host_memory: Bytes that the ring of buffers may take.
        unit_size: Bytes of a unit, or None for an eighth of ``host_memory`` up to 8 MiB and a 32nd up to 16 MiB, and
            at least the largest state that cannot be cut and a 256th of ``host_memory``. (A step begins with an update
            and ends with one, while the drive waits: the more units there are, the shorter. But each costs calls and
            a file.)

    Raises:
        ConfigError: ``host_memory`` or ``unit_size`` is too small; the message says the least that works.
    """
    least, name = least_host_memory(parameters)
    if host_memory < least:
        why = f"the state of {name} cannot be cut, and " if name else ""
        raise ConfigError(
            f"host_memory={format_exact(host_memory)} is too small: {why}at least {format_exact(least)} are needed "
            f"({RING_DEPTH} buffers of {format_bytes(least // RING_DEPTH)})"
        )
    largest_unit = host_memory // RING_DEPTH // PAGE * PAGE
    if unit_size is None:
        suited = min(max(host_memory // 32, min(host_memory // 8, 8 << 20)), 16 << 20)
        unit_size = max(suited, least // RING_DEPTH, host_memory // 256)
    elif unit_size < least // RING_DEPTH or unit_size > largest_unit:
        raise ConfigError(
            f"unit_size={format_exact(unit_size)} must lie between {format_exact(least // RING_DEPTH)} and "
            f"{format_exact(largest_unit)}, a third of host_memory"
        )
    return max(min(unit_size, largest_unit) // PAGE * PAGE, PAGE)


def state_bytes(parameters: Iterable[ParameterPlan]) -> int:
    """Bytes of paged state, without the padding of units."""
    return sum(_bytes_of(parameter, 0, parameter.numel) for parameter in parameters)


def plan_units(
    parameters: Sequence[ParameterPlan], host_memory: int, unit_size: int | None, first_index: int = 0
) -> list[SwapUnit]:
    """Pack the paged state of ``parameters`` into units, in order; units never mix devices.

    ``host_memory``, ``unit_size`` and ConfigError are as for ``check_memory``; ``first_index`` is the first unit's.
    """
    unit_size = check_memory(parameters, host_memory, unit_size)
    packer = _Packer(unit_size, first_index)
    for parameter in parameters:
        packer.add(parameter)
    return packer.finish()


def least_loaded(nbytes: int, assigned: Sequence[int], bandwidths: Sequence[float], free: Sequence[int]) -> int | None:
    """Which of several folders is to hold the next unit. None: it has room in none.

    It is the folder that would be through first with all of its bytes, this unit's among them. So consecutive units
    take turns between the folders in proportion to their bandwidths, and each folder gets, as far as it has room, what
    it can move in the time of the others: at least that less one unit.

    Args:
        nbytes: Size of the unit.
        assigned: Bytes of units that each folder holds already.
        bandwidths: Of each folder, in any unit of measure.
        free: Bytes that each folder still has room for.
    """
    roomy = [index for index, room in enumerate(free) if room >= nbytes]
    return min(roomy, key=lambda index: (assigned[index] + nbytes) / bandwidths[index], default=None)


class _Packer:
    """Fills one unit after another."""

    def __init__(self, unit_size: int, first_index: int) -> None:
        self._unit_size = unit_size
        self._first_index = first_index
        self._units: list[SwapUnit] = []
        self._pieces: list[Piece] = []
        self._used = 0
        self._device: torch.device | None = None

    def add(self, parameter: ParameterPlan) -> None:
        """Place all chunks of a parameter: as many in a unit as it still has room for."""
        if not parameter.template.paged:
            return
        if parameter.device != self._device:
            self._close_unit()
            self._device = parameter.device
        cuts = _chunks_of(parameter, self._unit_size)
        size_of = functools.cache(lambda elements: _bytes_of(parameter, 0, elements))  # there are few lengths
        begin = 0
        while begin < len(cuts) - 1:
            end = begin
            while end + 1 < len(cuts) and (length := cuts[end + 1] - cuts[begin]) <= LARGEST_PIECE:
                if self._used + size_of(length) > self._unit_size:
                    break
                end += 1
            if end > begin:
                piece, self._used = _place(parameter, cuts[begin : end + 1], self._used)
                self._pieces.append(piece)
                begin = end
            elif self._pieces:
                self._close_unit()
            else:
                raise AssertionError(f"a chunk of {parameter.name} is larger than a unit")

    def finish(self) -> list[SwapUnit]:
        """The units, the last one closed."""
        self._close_unit()
        return self._units

    def _close_unit(self) -> None:
        if self._pieces:
            assert self._device is not None
            index = self._first_index + len(self._units)
            self._units.append(SwapUnit(index, tuple(self._pieces), _pages(self._used), self._device))
        self._pieces, self._used = [], 0


def _chunks_of(parameter: ParameterPlan, unit_size: int) -> list[int]:
    """The elements at which a parameter may be cut, so that each chunk's state fits a unit."""
    if parameter.template.paging is Paging.WHOLE:
        return [0, parameter.numel]
    if _piece_bytes(parameter, parameter.numel) <= unit_size:
        limit = parameter.numel
    else:
        limit = _largest_run(parameter, unit_size)
    return parameter.chunking.cut(parameter.numel, min(limit, LARGEST_PIECE))


def _largest_run(parameter: ParameterPlan, unit_size: int) -> int:
    """The most elements, in whole granules, whose state fits into a unit."""
    granule = parameter.template.granule
    low, high = 0, parameter.numel // granule + 1  # granules: as many as low fit, as many as high do not
    while high - low > 1:
        middle = (low + high) // 2
        fits = _piece_bytes(parameter, middle * granule) <= unit_size
        low, high = (middle, high) if fits else (low, middle)
    return low * granule


def _bytes_of(parameter: ParameterPlan, start: int, stop: int) -> int:
    if parameter.template.paging is Paging.WHOLE:
        return _end_of_tensors(parameter.template.paged, 0)[1]
    return _piece_bytes(parameter, stop - start)


def _piece_bytes(parameter: ParameterPlan, elements: int) -> int:
    flat = (dataclasses.replace(tensor, shape=(elements,), stride=(1,)) for tensor in parameter.template.paged)
    return _end_of_tensors(flat, 0)[1]


def _place(parameter: ParameterPlan, cuts: list[int], offset: int) -> tuple[Piece, int]:
    """The piece for these chunks at ``offset`` in its unit, and where it ends."""
    start, stop = cuts[0], cuts[-1]
    is_whole = start == 0 and stop == parameter.numel and len(cuts) == 2
    tensors = parameter.template.paged
    if parameter.template.paging is Paging.ELEMENTWISE:
        shape, stride = (parameter.shape, parameter.stride) if is_whole else ((stop - start,), (1,))
        tensors = tuple(dataclasses.replace(tensor, shape=shape, stride=stride) for tensor in tensors)
    tensors, end = _end_of_tensors(tensors, offset)
    return Piece(parameter.key, parameter.name, start, stop, tuple(cuts), is_whole, tensors), end


def _end_of_tensors(tensors: Iterable[StateTensor], offset: int) -> tuple[tuple[StateTensor, ...], int]:
    placed = []
    for tensor in tensors:
        placed.append(dataclasses.replace(tensor, offset=offset))
        offset = _aligned(placed[-1].end)
    return tuple(placed), offset


def _aligned(size: int) -> int:
    return -(-size // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE
