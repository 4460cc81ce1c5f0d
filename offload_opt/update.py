"""The update of units by the inner optimizer: what it sees of a unit's parameters, and what becomes of it.

Exact state, and a master that is stored whole, the inner optimizer updates in place: it sees views of the page-locked
buffer. What has a codec is decoded before and encoded after, a chunk at a time, in memory that stays in the processor's
cache and is used again for the next chunks; adam.py does it for Adam all at once.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .adam import NativeAdam, NativeUpdate
from .checksums import Checksum
from .codecs import MASTER, NativeCoding, bf16_gradient, decode, decode_native
from .coding import coding_of, encode_run, flat, in_memory_order, is_laid_out_as, native_coding_of, rounding_keys
from .errors import OffloadError
from .heap import Heap
from .inner import InnerOptimizer, settled
from .units import Chunk, Piece, SwapUnit, is_dense

Key = tuple[int, int]
"""A parameter by its place: group, and position in the group. Frameworks replace parameters, but keep their places."""


class Space(NamedTuple):
    """Of a Scratch: 1-D fp32 ``values`` and, on the CPU, their ``address``."""

    values: torch.Tensor
    address: int


class Scratch:
    """fp32 memory for the time of a batch. On the CPU it is kept: what malloc takes back costs page faults."""

    _MOST_KEPT = 64  # chunks; batches are alike, and those of one chunk after the other take the same

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.float32, device="cpu")
        self._used = 0
        self._kept: dict[tuple[int, tuple[int, ...]], list[Space]] = {}

    def take(self, numels: tuple[int, ...], device: torch.device) -> list[Space]:
        """Spaces of so many elements, with whatever is in there."""
        if device.type != "cpu":
            return [Space(torch.empty(numel, dtype=torch.float32, device=device), 0) for numel in numels]
        kept = self._kept.get((self._used, numels))
        if kept is None:
            kept = self._keep(numels)
        self._used += sum(map(_in_lines, numels))
        return kept

    def _keep(self, numels: tuple[int, ...]) -> list[Space]:
        end = self._used + sum(map(_in_lines, numels))
        if end > len(self._memory):
            # What was taken keeps the memory from before.
            self._memory = torch.empty(2 * end, dtype=torch.float32, device="cpu")
            self._kept.clear()
        if len(self._kept) == self._MOST_KEPT:
            self._kept.clear()
        starts = itertools.accumulate(map(_in_lines, numels), initial=self._used)
        values = [self._memory[start : start + numel] for start, numel in zip(starts, numels, strict=False)]
        spaces = self._kept[self._used, numels] = [Space(part, part.data_ptr()) for part in values]
        return spaces

    def reset(self) -> None:
        """The next batch gets the same memory: one must be done before the next is filled."""
        self._used = 0


@dataclasses.dataclass(slots=True)
class _Open:
    """A piece that is being updated, and what all its chunks need.

    ``parameter`` and ``gradient`` have the parameter's elements, flat, or where the piece is whole as they are. They
    lie at ``address`` and, where it can be decoded with the state, ``bf16_gradient``; 0 where nothing goes by address.
    ``small`` is its state that stays in memory, from before this step. State tensors that have a codec are ``coded``,
    and rounded by ``keys``.
    """

    piece: Piece
    parameter: torch.Tensor
    gradient: torch.Tensor
    small: dict[str, Any] | None
    coded: list[str]
    keys: list[int]
    address: int = 0
    bf16_gradient: int = 0


@dataclasses.dataclass(slots=True)
class _Loaded:
    """A chunk as the inner optimizer sees it: a parameter, and the tensors that are its state.

    ``paged`` is its state in memory: the unit's bytes, or the values of ``codings``, to be encoded after the update.
    ``cast`` decodes the gradient beside them. What the optimizer sees of ``paged`` is ``lent``: it may put other memory
    into a tensor (by ``.data``). So it is with the parameter that it updates, ``target``, and its ``memory``.
    """

    opened: _Open
    chunk: Chunk
    target: torch.Tensor
    paged: dict[str, torch.Tensor]
    memory: torch.Tensor | None = None
    codings: list[Any] = dataclasses.field(default_factory=list)
    cast: NativeCoding | None = None
    lent: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    state: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def piece(self) -> Piece:
        return self.opened.piece

    def run_of(self, elements: torch.Tensor) -> torch.Tensor:
        """The chunk's part of what is as the opened piece's parameter is."""
        return elements if self.piece.is_whole else elements[self.chunk.begin : self.chunk.end]


class _Batch(NamedTuple):
    """Chunks that are updated in one call, with the groups and the state that the inner optimizer is lent for it."""

    chunks: list[_Loaded]
    groups: dict[int, dict[str, Any]]
    state: defaultdict[Any, dict[str, Any]]


class _Ready(NamedTuple):
    """The pieces of a unit that are to be updated.

    ``native`` are the updates that the native loop takes, prepared; ``late`` the pieces that it takes, too, but whose
    gradients must be copied: one at a time. The ``rest`` is the inner optimizer's.
    """

    native: deque[NativeUpdate]
    late: list[Piece]
    rest: list[Piece]


_LOT = 16
"""Units that are prepared together."""


class UnitUpdate:
    """One step of ``inner`` over the parameters of ``groups`` that have a gradient, unit by unit.

    The groups are looked at as they are now, and changed by ``finish`` only. ``step`` is the number of the step, by
    which stored values are rounded.
    """

    def __init__(
        self, inner: InnerOptimizer, groups: Sequence[Mapping[str, Any]], step: int, scratch: Scratch, heap: Heap
    ) -> None:
        self._inner = inner
        self._step = step
        self._scratch = scratch
        self._heap = heap
        self._groups = [settled(group) for group in groups]
        self._native = [NativeAdam.of(inner, group) for group in groups]
        self._has_temporaries = not all(group.get("fused") for group in groups)  # of some MiB: fused kernels have none
        self._groups_after: dict[int, dict[str, Any]] = {}
        self._lots: dict[SwapUnit, Sequence[SwapUnit]] = {}  # of units that are not prepared yet
        self._ready: dict[SwapUnit, _Ready] = {}
        # How often each group lists a parameter, by id: torch steps it that often.
        self._listed = [Counter(map(id, group["params"])) for group in groups]
        self._ties: list[torch.Tensor] = []  # of the piece that is under way

    @contextlib.contextmanager
    def expecting(self, units: Sequence[SwapUnit]) -> Iterator[None]:
        """These are updated here, up or down in their order: they may be prepared several at a time.

        An error is kept, and its traceback with it, but what was prepared is given up: it holds gradients.
        """
        for first in range(0, len(units), _LOT):
            lot = units[first : first + _LOT]
            self._lots.update(dict.fromkeys(lot, lot))
        try:
            yield
        finally:
            self._lots.clear()
            for ready in self._ready.values():
                ready.native.clear()
            self._ready.clear()

    def update(self, unit: SwapUnit, data: torch.Tensor, checksum: Checksum | None) -> None:
        """Update the parameters of an expected unit, whose bytes are ``data``; ``checksum`` is of what they become."""
        ready = self._ready_for(unit)
        while ready.native:
            ready.native.popleft().run(data.data_ptr(), checksum)
        for piece in ready.late:
            self._prepare_native(piece).run(data.data_ptr(), checksum)
        if ready.rest and unit.device.type == "cpu":
            with self._heap.watched(has_temporaries=self._has_temporaries):
                self._update_by_inner(ready.rest, unit.device, data, checksum)
        elif ready.rest:
            work = data[: unit.nbytes].to(unit.device)
            self._update_by_inner(ready.rest, unit.device, work, None)
            data[: unit.nbytes].copy_(work)  # waits for the device
        del self._ready[unit]

    def update_unpaged(
        self, states: Mapping[Key, dict[str, Any] | None], with_master: Collection[Key], busy: set[int]
    ) -> dict[Key, dict[str, Any]]:
        """Update parameters of which there is nothing to page, and return their state where they have some.

        Those ``with_master`` are empty: there are no values, but the state is to have the master's dtype. Groups that
        are not ``busy`` have no gradient at all. They come along with no parameters, for what a step may do to the
        groups themselves.
        """
        state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
        targets: dict[int, list[torch.Tensor]] = defaultdict(list)
        targets.update((index, []) for index in range(len(self._groups)) if index not in busy)
        if not states and not targets:
            return {}
        seen: dict[Key, torch.Tensor] = {}
        for key, resident in states.items():
            parameter = seen[key] = self._parameter(key)
            if key in with_master:
                seen[key] = parameter.detach().float()
                seen[key].grad = torch.zeros_like(seen[key])
            if resident is not None:
                state[seen[key]] = resident
            targets[key[0]].extend([seen[key]] * self._listed[key[0]][id(parameter)])
        self._step_inner(self._lent_groups(targets), state)
        return {key: state[target] for key, target in seen.items() if target in state}

    def finish(self, groups: Sequence[dict[str, Any]]) -> None:
        """Take over what the step did to the groups' options."""
        for index, after in self._groups_after.items():
            for name, value in after.items():
                if self._groups[index].get(name) is not value:
                    groups[index][name] = value

    def _ready_for(self, unit: SwapUnit) -> _Ready:
        """A unit's pieces, prepared now or before.

        With those of a lot: a loop over a unit leaves nothing in the processor's nearest caches, and after it the same
        Python takes up to ten times as long.
        """
        if unit not in self._ready:
            for each in self._lots[unit]:
                del self._lots[each]
                self._ready[each] = self._prepare(each)
        return self._ready[unit]

    def _prepare(self, unit: SwapUnit) -> _Ready:
        ready = _Ready(deque(), [], [])
        for piece in unit.pieces:
            parameter = self._parameter(piece.key)
            gradient = parameter.grad
            if gradient is None:
                continue
            native = self._native[piece.key[0]] if unit.device.type == "cpu" else None
            is_listed_once = self._listed[piece.key[0]][id(parameter)] == 1
            if native is None or not is_listed_once or not native.takes(piece, parameter, gradient):
                ready.rest.append(piece)
            elif is_laid_out_as(gradient, parameter):
                ready.native.append(self._prepare_native(piece))
            else:
                ready.late.append(piece)
        return ready

    def _prepare_native(self, piece: Piece) -> NativeUpdate:
        native, parameter = self._native[piece.key[0]], self._parameter(piece.key)
        assert native is not None
        assert parameter.grad is not None
        return native.prepare(piece, parameter, parameter.grad, self._step)

    def _update_by_inner(
        self, pieces: Sequence[Piece], device: torch.device, data: torch.Tensor, checksum: Checksum | None
    ) -> None:
        batches = self._batches(pieces, device, data)
        while batches:  # each is given up when it is done: it has what the optimizer made
            self._update_batch(batches.popleft(), checksum)

    def _batches(self, pieces: Sequence[Piece], device: torch.device, data: torch.Tensor) -> deque[_Batch]:
        """All of the pieces' chunks but their values, which ``_fill`` puts in. ``data`` is their unit's bytes.

        All of them before the first is updated, as in ``_ready_for``.
        """
        start = data.data_ptr() if _by_address(data) else None
        batches: deque[_Batch] = deque()
        chunks: list[_Loaded] = []
        elements, enough = 0, self._inner.batch_elements(device)
        for piece in pieces:
            parameter = self._parameter(piece.key)
            if parameter.grad is None:
                continue
            opened = self._open(piece, parameter, parameter.grad)
            for chunk in piece.chunks:
                chunks.append(self._load(opened, chunk, data, start))
                elements += chunks[-1].target.numel()
                if elements >= enough:
                    batches.append(self._batch(chunks))
                    chunks, elements = [], 0
        if chunks:
            batches.append(self._batch(chunks))
        return batches

    def _batch(self, chunks: list[_Loaded]) -> _Batch:
        targets: dict[int, list[torch.Tensor]] = defaultdict(list)
        for loaded in chunks:
            group = loaded.piece.key[0]
            times = self._listed[group][id(self._parameter(loaded.piece.key))]
            targets[group].extend([loaded.target] * times)
        state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
        state.update((loaded.target, loaded.state) for loaded in chunks)
        self._scratch.reset()  # the next batch has the same memory, when this one is done
        return _Batch(chunks, self._lent_groups(targets), state)

    def _open(self, piece: Piece, parameter: torch.Tensor, gradient: torch.Tensor) -> _Open:
        if not piece.is_whole:
            parameter, gradient = flat(parameter), in_memory_order(gradient, parameter)
        elif piece.master is not None:
            parameter, gradient = parameter.detach(), gradient.detach()
        coded = [tensor.name for tensor in piece.tensors if tensor.codec != "exact"]
        opened = _Open(piece, parameter, gradient, piece.resident, coded, rounding_keys(piece, coded, self._step))
        if _by_address(parameter):
            opened.address = parameter.data_ptr()
            if gradient.dtype == torch.bfloat16 and gradient.dim() == 1 and gradient.is_contiguous():
                opened.bf16_gradient = gradient.data_ptr()
        return opened

    def _load(self, opened: _Open, chunk: Chunk, data: torch.Tensor, start: int | None) -> _Loaded:
        """``data`` is the unit's bytes, which begin at ``start`` where they are coded by address."""
        piece, parameter = opened.piece, opened.parameter
        loaded = _Loaded(opened, chunk, parameter, {tensor.name: tensor.view(data) for tensor in chunk.exact})
        if piece.master is None:
            self._note_codings(loaded, self._scratch.take(chunk.numels, parameter.device), data, start)
            if not piece.is_whole:
                loaded.target = loaded.run_of(parameter)
                loaded.target.grad = loaded.run_of(opened.gradient)
                loaded.memory = loaded.target.detach()
        else:
            *spaces, cast = self._scratch.take((*chunk.numels, chunk.end - chunk.begin), parameter.device)
            self._note_codings(loaded, spaces, data, start)
            loaded.memory = loaded.paged.pop(MASTER)
            # Detached: what an optimizer may note on a parameter is not to be found on the next one.
            loaded.target = loaded.memory.detach()
            loaded.target.grad = self._gradient_in(cast, loaded)
        if opened.small is not None:
            # The last chunk may have the values themselves.
            is_last = chunk.end == piece.stop
            small = opened.small if is_last else {name: copy_value(value) for name, value in opened.small.items()}
            loaded.lent = {name: value.detach() for name, value in loaded.paged.items()}
            loaded.state.update(small)
            loaded.state.update(loaded.lent)
        return loaded

    def _note_codings(self, loaded: _Loaded, spaces: list[Space], data: torch.Tensor, start: int | None) -> None:
        """Note what the unit has of the chunk's state with a codec, and that its values go into ``spaces``."""
        opened, piece, chunk = loaded.opened, loaded.piece, loaded.chunk
        for run, space in zip(chunk.coded, spaces, strict=True):
            tensor, values = run.tensor, space.values
            loaded.paged[tensor.name] = values.as_strided(tensor.shape, tensor.stride) if piece.is_whole else values
            if start is None:
                stored = [part.view(data) for part in run.stored]
                own = None if piece.master is None else flat(loaded.run_of(opened.parameter))
                loaded.codings.append(coding_of(piece, tensor, stored, values, chunk.begin, own))
            else:
                weight = opened.address + chunk.begin * opened.parameter.element_size()
                loaded.codings.append(native_coding_of(piece, run, space.address, start, chunk.begin, weight))

    def _gradient_in(self, space: Space, loaded: _Loaded) -> torch.Tensor:
        """Where the chunk's gradient is to be in fp32, laid out as the parameter's where that has no gaps. On the CPU
        bf16 is decoded as by the codec of this name, in one loop with the state."""
        opened, values = loaded.opened, space.values
        if opened.bf16_gradient:
            address = opened.bf16_gradient + 2 * loaded.chunk.begin
            loaded.cast = bf16_gradient(len(values), space.address, address)
            # Detached: an optimizer may put other memory into a gradient, and this one is kept.
            return values.detach()
        own = loaded.run_of(opened.parameter)
        return (
            values.as_strided(own.shape, own.stride()) if is_dense(own.shape, own.stride()) else values.view(own.shape)
        )

    def _fill(self, loaded: _Loaded) -> None:
        """The values of a chunk: its state, and what a master needs of the parameter and the gradient."""
        opened = loaded.opened
        codings = [] if opened.small is None else loaded.codings
        if loaded.cast is not None:
            codings = [*codings, loaded.cast]
        if codings:
            (decode_native if isinstance(codings[0], NativeCoding) else decode)(codings)
        if opened.piece.master is not None:
            if loaded.cast is None:
                assert loaded.target.grad is not None
                loaded.target.grad.copy_(loaded.run_of(opened.gradient))
            if opened.small is None:
                loaded.target.copy_(loaded.run_of(opened.parameter))

    def _update_batch(self, batch: _Batch, checksum: Checksum | None) -> None:
        for loaded in batch.chunks:
            self._fill(loaded)
        self._step_inner(batch.groups, batch.state)
        for loaded in batch.chunks:
            self._adopt(loaded, batch.state[loaded.target])
            self._encode(loaded, checksum)
        if checksum is not None:
            exact = (tensor for loaded in batch.chunks for tensor in loaded.chunk.exact)
            checksum.add([(tensor.offset, tensor.nbytes) for tensor in exact])

    def _lent_groups(self, targets: Mapping[int, list[torch.Tensor]]) -> dict[int, dict[str, Any]]:
        return {index: {**self._groups[index], "params": params} for index, params in sorted(targets.items())}

    def _step_inner(self, groups: Mapping[int, dict[str, Any]], state: defaultdict[Any, dict[str, Any]]) -> None:
        self._inner.step_on(list(groups.values()), state)
        for group in groups.values():
            group.pop("params", None)  # their gradients would outlive zero_grad()
        self._groups_after.update(groups)

    def _adopt(self, loaded: _Loaded, state: dict[str, Any]) -> None:
        """Take over what the inner optimizer left as a chunk's state."""
        small: dict[str, Any] = {}
        piece = loaded.piece
        if loaded.memory is not None and loaded.memory.data_ptr() != loaded.target.data_ptr():
            loaded.memory.copy_(loaded.target)
        for name, value in state.items():
            if name not in loaded.paged:
                if is_large(value):
                    raise OffloadError(
                        f"{self._inner.name} made a new state tensor {name!r} for {piece.name}, which it did not "
                        "keep when the parameter's place was planned: the options that decide it must stay as they were"
                    )
                small[name] = value
                continue
            lent = loaded.lent.get(name)
            if value is not lent or lent.data_ptr() != loaded.paged[name].data_ptr():
                loaded.paged[name].copy_(value)
        if loaded.chunk.end == piece.stop:
            piece.resident = _updated(piece.resident or {}, small)

    def _encode(self, loaded: _Loaded, checksum: Checksum | None) -> None:
        """Store what has a codec, and round a master to its weight."""
        piece, begin = loaded.piece, loaded.chunk.begin
        if piece.master is not None and piece.master.codec == "exact":
            loaded.run_of(loaded.opened.parameter).copy_(loaded.target)
        if loaded.codings:
            opened = loaded.opened
            ties = encode_run(piece, opened.coded, loaded.codings, opened.keys, begin, checksum)
            if ties is not None:
                self._ties.append(ties)
        if loaded.chunk.end == piece.stop:
            piece.ties, self._ties = (torch.cat(self._ties), []) if self._ties else (None, [])

    def _parameter(self, key: Key) -> torch.Tensor:
        parameter = self._groups[key[0]]["params"][key[1]]
        assert isinstance(parameter, torch.Tensor)
        return parameter


def _in_lines(numel: int) -> int:
    """fp32 elements in whole cache lines."""
    return -(-numel // 16) * 16


def _by_address(tensor: torch.Tensor) -> bool:
    """Whether codings of memory like this are native ones: a tensor for each would cost a tenth of the update."""
    return tensor.is_cpu


def is_large(value: Any) -> bool:
    """Whether a value of an optimizer's state is to be paged: a tensor with dimensions and elements."""
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.numel() > 0


def copy_value(value: Any) -> Any:
    """A copy of a value of an optimizer's state."""
    return value.clone() if isinstance(value, torch.Tensor) else copy.copy(value)


def _updated(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """``new``, in the tensors of ``old`` where they fit: small tensors that outlive a step would break up the heap."""
    for name, value in new.items():
        kept = old.get(name)
        if not (isinstance(kept, torch.Tensor) and isinstance(value, torch.Tensor)) or kept is value:
            continue
        if (kept.shape, kept.dtype, kept.device) == (value.shape, value.dtype, value.device):
            new[name] = kept.copy_(value)
    return new
