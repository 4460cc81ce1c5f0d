"""The update of units by the inner optimizer: what it sees of a unit's parameters, and what becomes of it.

Exact state, and a master that is stored whole, the inner optimizer updates in place: it sees views of the page-locked
buffer. What has a codec is decoded before and encoded after, a chunk at a time, in memory that stays in the processor's
cache and is used again for the next chunks.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .aio import trim_heap
from .checksums import Checksum
from .codecs import MASTER, NativeCoding, decode, decode_native, native_format
from .coding import coding_of, encode_run, flat, in_memory_order, native_coding_of, rounding_keys
from .errors import OffloadError
from .inner import InnerOptimizer, settled
from .units import Chunk, CodedRun, Piece, SwapUnit, is_dense

_BF16 = native_format("bf16", "gradient")

Key = tuple[int, int]
"""A parameter by its place: group, and position in the group. Frameworks replace parameters, but keep their places."""


class Space(NamedTuple):
    """Of a Scratch: 1-D fp32 ``values`` and, on the CPU, their ``address``."""

    values: torch.Tensor
    address: int


class Scratch:
    """fp32 memory for the time of a batch. On the CPU it is kept: what malloc takes back costs page faults."""

    _MOST_KEPT = 64  # tensors; batches are alike, and those of one parameter after the other take the same

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.float32, device="cpu")
        self._used = 0
        self._kept: dict[tuple[int, int], Space] = {}

    def take(self, numel: int, device: torch.device) -> Space:
        """``numel`` elements, with whatever is in there."""
        if device.type != "cpu":
            return Space(torch.empty(numel, dtype=torch.float32, device=device), 0)
        start = self._used
        self._used += -(-numel // 16) * 16  # whole cache lines
        kept = self._kept.get((start, numel))
        return self._keep(start, numel) if kept is None else kept

    def _keep(self, start: int, numel: int) -> Space:
        if self._used > len(self._memory):
            # What was taken keeps the memory from before.
            self._memory = torch.empty(2 * self._used, dtype=torch.float32, device="cpu")
            self._kept.clear()
        if len(self._kept) == self._MOST_KEPT:
            self._kept.clear()
        values = self._memory[start : start + numel]
        space = self._kept[start, numel] = Space(values, values.data_ptr())
        return space

    def reset(self) -> None:
        """All that was taken may be used again."""
        self._used = 0


@dataclasses.dataclass(slots=True)
class _Open:
    """A piece that is being updated, and what all its chunks need.

    ``parameter`` and ``gradient`` have the parameter's elements, flat, or where the piece is whole as they are. They
    lie at ``address`` and, where it can be decoded with the state, ``bf16_gradient``; 0 where nothing goes by address.
    State tensors that have a codec are ``coded``, and rounded by ``keys``.
    """

    piece: Piece
    parameter: torch.Tensor
    gradient: torch.Tensor
    address: int = 0
    bf16_gradient: int = 0
    coded: list[str] = dataclasses.field(default_factory=list)
    keys: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(slots=True)
class _Loaded:
    """A chunk as the inner optimizer sees it: a parameter, and the tensors that are its state.

    ``paged`` is its state in memory: the unit's bytes, or the values of ``codings``, to be encoded after the update.
    What it sees of that is ``lent``: an optimizer may put other memory into a tensor (by ``.data``). So it is with the
    parameter that it updates, ``target``, and its ``memory``.
    """

    opened: _Open
    chunk: Chunk
    target: torch.Tensor
    paged: dict[str, torch.Tensor]
    memory: torch.Tensor | None = None
    codings: list[Any] = dataclasses.field(default_factory=list)
    lent: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    state: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def piece(self) -> Piece:
        return self.opened.piece

    def run_of(self, elements: torch.Tensor) -> torch.Tensor:
        """The chunk's part of what is as the opened piece's parameter is."""
        return elements if self.piece.is_whole else elements[self.chunk.begin : self.chunk.end]


class UnitUpdate:
    """One step of ``inner`` over the parameters of ``groups`` that have a gradient, unit by unit.

    The groups are looked at as they are now, and changed by ``finish`` only. ``step`` is the number of the step, by
    which stored values are rounded.
    """

    def __init__(self, inner: InnerOptimizer, groups: Sequence[Mapping[str, Any]], step: int, scratch: Scratch) -> None:
        self._inner = inner
        self._step = step
        self._scratch = scratch
        self._groups = [settled(group) for group in groups]
        self._groups_after: dict[int, dict[str, Any]] = {}
        # How often each group lists a parameter, by id: torch steps it that often.
        self._listed = [Counter(map(id, group["params"])) for group in groups]
        self._ties: list[torch.Tensor] = []  # of the piece that is under way

    def update(self, unit: SwapUnit, data: torch.Tensor, checksum: Checksum | None) -> None:
        """Update the parameters of a resident unit, whose bytes are ``data``; ``checksum`` is of what they become."""
        on_cpu = unit.device.type == "cpu"
        work = data if on_cpu else data[: unit.nbytes].to(unit.device)
        batch: list[_Loaded] = []
        elements, enough = 0, self._inner.batch_elements(unit.device)
        for loaded in self._load_chunks(unit, work):
            batch.append(loaded)
            elements += loaded.target.numel()
            if elements >= enough:
                self._update_batch(batch, checksum if on_cpu else None)
                batch, elements = [], 0
        self._update_batch(batch, checksum if on_cpu else None)
        if not on_cpu:
            data[: unit.nbytes].copy_(work)  # waits for the device
        if unit.is_blank:
            # The optimizer made its state in memory of its own, and small tensors that stay among it: without this,
            # what it freed between them adds up to the size of the whole state (measured with glibc).
            trim_heap()

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
        self._step_inner(targets, state)
        return {key: state[target] for key, target in seen.items() if target in state}

    def finish(self, groups: Sequence[dict[str, Any]]) -> None:
        """Take over what the step did to the groups' options."""
        for index, after in self._groups_after.items():
            for name, value in after.items():
                if self._groups[index].get(name) is not value:
                    groups[index][name] = value

    def _load_chunks(self, unit: SwapUnit, data: torch.Tensor) -> Iterator[_Loaded]:
        start = data.data_ptr() if _by_address(data) else None
        for piece in unit.pieces:
            parameter = self._parameter(piece.key)
            if parameter.grad is not None:
                opened = self._open(piece, parameter, parameter.grad)
                for chunk in piece.chunks:
                    yield self._load(opened, chunk, data, start)

    def _open(self, piece: Piece, parameter: torch.Tensor, gradient: torch.Tensor) -> _Open:
        if not piece.is_whole:
            parameter, gradient = flat(parameter), in_memory_order(gradient, parameter)
        elif piece.master is not None:
            parameter, gradient = parameter.detach(), gradient.detach()
        opened = _Open(piece, parameter, gradient)
        if _by_address(parameter):
            opened.address = parameter.data_ptr()
            if gradient.dtype == torch.bfloat16 and gradient.dim() == 1 and gradient.is_contiguous():
                opened.bf16_gradient = gradient.data_ptr()
        opened.coded = [tensor.name for tensor in piece.tensors if tensor.codec != "exact"]
        opened.keys = rounding_keys(piece, opened.coded, self._step)
        return opened

    def _load(self, opened: _Open, chunk: Chunk, data: torch.Tensor, start: int | None) -> _Loaded:
        """``data`` is the unit's bytes, which begin at ``start`` where they are coded by address."""
        piece, parameter = opened.piece, opened.parameter
        small = piece.resident  # the value before this step, for every chunk of the piece
        paged = {tensor.name: tensor.view(data) for tensor in chunk.exact}
        loaded = _Loaded(opened, chunk, parameter, paged)
        if start is None:
            self._note_codings(loaded, data)
        else:
            self._note_native_codings(loaded, start)
        casts: list[Any] = []
        if piece.master is not None:
            loaded.memory = paged.pop(MASTER)
            # Detached: what an optimizer may note on a parameter is not to be found on the next one.
            loaded.target = loaded.memory.detach()
            loaded.target.grad, casts = self._cast(loaded)
        elif not piece.is_whole:
            loaded.target = loaded.run_of(parameter)
            loaded.target.grad = loaded.run_of(opened.gradient)
            loaded.memory = loaded.target.detach()
        codings = [*loaded.codings, *casts] if small is not None else casts
        if codings:
            if start is None:
                decode(codings)
            else:
                decode_native(codings)
        if small is not None:
            # The last chunk may have the values themselves.
            is_last = chunk.end == piece.stop
            loaded.state.update(small if is_last else {name: copy_value(value) for name, value in small.items()})
            loaded.lent = {name: value.detach() for name, value in paged.items()}
            loaded.state.update(loaded.lent)
        elif piece.master is not None:
            loaded.target.copy_(loaded.run_of(parameter))
        return loaded

    def _note_codings(self, loaded: _Loaded, data: torch.Tensor) -> None:
        """Note what the unit has of the chunk's state with a codec, and where its values go."""
        piece, chunk, parameter = loaded.piece, loaded.chunk, loaded.opened.parameter
        for run in chunk.coded:
            values = self._space_for(loaded, run).values
            stored = [part.view(data) for part in run.stored]
            own = None if piece.master is None else flat(loaded.run_of(parameter))
            loaded.codings.append(coding_of(piece, run.tensor, stored, values, chunk.begin, own))

    def _note_native_codings(self, loaded: _Loaded, start: int) -> None:
        """The same by addresses."""
        piece, chunk = loaded.piece, loaded.chunk
        weight = loaded.opened.address + chunk.begin * loaded.opened.parameter.element_size()
        for run in chunk.coded:
            values = self._space_for(loaded, run).address
            loaded.codings.append(native_coding_of(piece, run, values, start, chunk.begin, weight))

    def _space_for(self, loaded: _Loaded, run: CodedRun) -> Space:
        """For the values of a run, which are to be paged."""
        tensor, space = run.tensor, self._scratch.take(run.numel, loaded.opened.parameter.device)
        is_whole = loaded.piece.is_whole
        loaded.paged[tensor.name] = space.values.as_strided(tensor.shape, tensor.stride) if is_whole else space.values
        return space

    def _cast(self, loaded: _Loaded) -> tuple[torch.Tensor, list[NativeCoding]]:
        """The gradient's run in fp32, laid out as the parameter's where that has no gaps, once the codings beside it
        are decoded: on the CPU bf16 is decoded as by the codec of this name, in one loop with the state."""
        opened = loaded.opened
        begin, numel = loaded.chunk.begin, loaded.chunk.end - loaded.chunk.begin
        cast, place = self._scratch.take(numel, opened.gradient.device)
        if opened.bf16_gradient:
            address = opened.bf16_gradient + 2 * begin
            # Detached: an optimizer may put other memory into a gradient, and this one is kept.
            return cast.detach(), [NativeCoding(_BF16, numel, place, address, address)]
        own = loaded.run_of(opened.parameter)
        cast = cast.as_strided(own.shape, own.stride()) if is_dense(own.shape, own.stride()) else cast.view(own.shape)
        return cast.copy_(loaded.run_of(opened.gradient)), []

    def _update_batch(self, batch: list[_Loaded], checksum: Checksum | None) -> None:
        if not batch:
            return
        state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
        targets: dict[int, list[torch.Tensor]] = defaultdict(list)
        for loaded in batch:
            group = loaded.piece.key[0]
            state[loaded.target] = loaded.state
            times = self._listed[group][id(self._parameter(loaded.piece.key))]
            targets[group].extend([loaded.target] * times)
        self._step_inner(targets, state)
        for loaded in batch:
            self._adopt(loaded, state[loaded.target])
            self._encode(loaded, checksum)
        if checksum is not None:
            exact = (tensor for loaded in batch for tensor in loaded.chunk.exact)
            checksum.add([(tensor.offset, tensor.nbytes) for tensor in exact])
        self._scratch.reset()

    def _step_inner(self, targets: Mapping[int, list[torch.Tensor]], state: defaultdict[Any, dict[str, Any]]) -> None:
        lent = {index: {**self._groups[index], "params": params} for index, params in sorted(targets.items())}
        self._inner.step_on(list(lent.values()), state)
        for group in lent.values():
            group.pop("params", None)  # their gradients would outlive zero_grad()
        self._groups_after.update(lent)

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
