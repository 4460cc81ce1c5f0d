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
from itertools import pairwise
from typing import Any

import torch

from .aio import trim_heap
from .codecs import MASTER
from .coding import decode_run, encode_run, flat, in_memory_order
from .errors import OffloadError
from .inner import InnerOptimizer
from .units import Piece, StateTensor, SwapUnit, is_dense

Key = tuple[int, int]
"""A parameter by its place: group, and position in the group. Frameworks replace parameters, but keep their places."""


class Scratch:
    """fp32 memory for the time of a batch. On the CPU it is kept: what malloc takes back costs page faults."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.float32)
        self._used = 0

    def take(self, numel: int, device: torch.device) -> torch.Tensor:
        """1-D, of ``numel`` elements, with whatever is in there."""
        if device.type != "cpu":
            return torch.empty(numel, dtype=torch.float32, device=device)
        start = self._used
        self._used += -(-numel // 16) * 16  # whole cache lines
        if self._used > len(self._memory):
            # What was taken keeps the memory from before.
            self._memory = torch.empty(2 * self._used, dtype=torch.float32)
        return self._memory[start : start + numel]

    def reset(self) -> None:
        """All that was taken may be used again."""
        self._used = 0


@dataclasses.dataclass
class _Chunk:
    """A run of a parameter's elements as the inner optimizer sees it: a parameter, and the tensors that are its state.

    ``views`` are of the unit's bytes; ``decoded`` are values of what has a codec, to be encoded after the update.
    ``runs`` are what is stored for these. ``weight`` is the parameter's run where ``target`` is a master.
    """

    piece: Piece
    begin: int
    end: int
    target: torch.Tensor
    views: dict[str, torch.Tensor]
    decoded: dict[str, torch.Tensor]
    runs: dict[str, tuple[StateTensor, ...]]
    weight: torch.Tensor | None
    data: torch.Tensor
    state: dict[str, Any] = dataclasses.field(default_factory=dict)


class UnitUpdate:
    """One step of ``inner`` over the parameters of ``groups`` that have a gradient, unit by unit.

    The groups are looked at as they are now, and changed by ``finish`` only. ``step`` is the number of the step, by
    which stored values are rounded.
    """

    def __init__(self, inner: InnerOptimizer, groups: Sequence[Mapping[str, Any]], step: int, scratch: Scratch) -> None:
        self._inner = inner
        self._step = step
        self._scratch = scratch
        self._groups = [dict(group) for group in groups]
        self._groups_after: dict[int, dict[str, Any]] = {}
        # How often each group lists a parameter, by id: torch steps it that often.
        self._listed = [Counter(map(id, group["params"])) for group in groups]
        self._ties: list[torch.Tensor] = []  # of the piece that is under way

    def update(self, unit: SwapUnit, data: torch.Tensor) -> None:
        """Update the parameters of a resident unit, whose bytes are ``data``."""
        on_cpu = unit.device.type == "cpu"
        work = data if on_cpu else data[: unit.nbytes].to(unit.device)
        batch: list[_Chunk] = []
        elements = 0
        for chunk in self._chunks(unit, work):
            batch.append(chunk)
            elements += chunk.target.numel()
            if elements >= self._inner.batch_elements(unit.device):
                self._update_batch(batch)
                batch, elements = [], 0
        self._update_batch(batch)
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
                if groups[index].get(name) is not value:
                    groups[index][name] = value

    def _chunks(self, unit: SwapUnit, data: torch.Tensor) -> Iterator[_Chunk]:
        for piece in unit.pieces:
            parameter = self._parameter(piece.key)
            if parameter.grad is None:
                continue
            if not piece.is_whole:
                elements, gradient = flat(parameter), in_memory_order(parameter.grad, parameter)
            for begin, end in pairwise(piece.cuts):
                if piece.is_whole:
                    target, grad = parameter, parameter.grad
                else:
                    target, grad = elements[begin:end], gradient[begin:end]
                    if piece.master is None:
                        target.grad = grad
                yield self._chunk(piece, begin, end, target, grad, data)

    def _chunk(
        self, piece: Piece, begin: int, end: int, own: torch.Tensor, grad: torch.Tensor, data: torch.Tensor
    ) -> _Chunk:
        """``own`` is the parameter's run, or the parameter, and ``grad`` its gradient."""
        small = piece.resident  # the value before this step, for every chunk of the piece
        views = piece.chunk_views(data, begin, end)
        weight = None if piece.master is None else own.detach()
        chunk = _Chunk(piece, begin, end, own, views, {}, {}, weight, data)
        for tensor in piece.tensors:
            if tensor.codec != "exact":
                run = tensor.stored if piece.is_whole else tensor.run(begin - piece.start, end - piece.start)
                values = self._scratch.take(tensor.numel if piece.is_whole else end - begin, own.device)
                chunk.runs[tensor.name] = run
                chunk.decoded[tensor.name] = (
                    values.as_strided(tensor.shape, tensor.stride) if piece.is_whole else values
                )
                if small is not None:
                    own_run = None if weight is None else flat(weight)
                    decode_run(piece, tensor, [part.view(data) for part in run], begin, own_run, values)
        if weight is not None:
            chunk.target = views.pop(MASTER) if MASTER in views else chunk.decoded[MASTER]
            if small is None:
                chunk.target.copy_(weight)
            chunk.target.grad = self._cast(grad, own)
        if small is not None:
            is_cut = len(piece.cuts) > 2
            chunk.state.update({name: copy_value(value) for name, value in small.items()} if is_cut else small)
            chunk.state.update(views)
            chunk.state.update({name: value for name, value in chunk.decoded.items() if name != MASTER})
        return chunk

    def _cast(self, grad: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """The gradient in fp32, laid out as ``own`` where that has no gaps."""
        cast = self._scratch.take(own.numel(), own.device)
        cast = cast.as_strided(own.shape, own.stride()) if is_dense(own.shape, own.stride()) else cast.view(own.shape)
        return cast.copy_(grad)

    def _update_batch(self, batch: list[_Chunk]) -> None:
        if not batch:
            return
        state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
        targets: dict[int, list[torch.Tensor]] = defaultdict(list)
        for chunk in batch:
            group = chunk.piece.key[0]
            state[chunk.target] = chunk.state
            targets[group].extend([chunk.target] * self._listed[group][id(self._parameter(chunk.piece.key))])
        self._step_inner(targets, state)
        for chunk in batch:
            self._adopt(chunk, state[chunk.target])
            self._encode(chunk)
        self._scratch.reset()

    def _step_inner(self, targets: Mapping[int, list[torch.Tensor]], state: defaultdict[Any, dict[str, Any]]) -> None:
        lent = {index: {**self._groups[index], "params": params} for index, params in sorted(targets.items())}
        self._inner.step_on(list(lent.values()), state)
        for index, group in lent.items():  # without the parameters: their gradients would outlive zero_grad()
            self._groups_after[index] = {name: value for name, value in group.items() if name != "params"}

    def _adopt(self, chunk: _Chunk, state: dict[str, Any]) -> None:
        """Take over what the inner optimizer left as a chunk's state."""
        small: dict[str, Any] = {}
        paged = {**chunk.views, **chunk.decoded}
        for name, value in state.items():
            if name not in paged:
                if is_large(value):
                    raise OffloadError(
                        f"{self._inner.name} made a new state tensor {name!r} for {chunk.piece.name}, which it did not "
                        "keep when the parameter's place was planned: the options that decide it must stay as they were"
                    )
                small[name] = value
            elif value is not paged[name]:
                paged[name].copy_(value)
        if chunk.end == chunk.piece.stop:
            chunk.piece.resident = _updated(chunk.piece.resident or {}, small)

    def _encode(self, chunk: _Chunk) -> None:
        """Store what has a codec, and round a master to its weight."""
        piece = chunk.piece
        if chunk.weight is not None and MASTER not in chunk.decoded:
            chunk.weight.copy_(chunk.target.detach())
        for name, values in chunk.decoded.items():
            weight = flat(chunk.weight) if name == MASTER and chunk.weight is not None else None
            ties = encode_run(piece, name, chunk.runs[name], flat(values), chunk.data, chunk.begin, self._step, weight)
            if ties is not None:
                self._ties.append(ties)
        if chunk.end == piece.stop:
            piece.ties, self._ties = (torch.cat(self._ties).cpu(), []) if self._ties else (None, [])

    def _parameter(self, key: Key) -> torch.Tensor:
        parameter = self._groups[key[0]]["params"][key[1]]
        assert isinstance(parameter, torch.Tensor)
        return parameter


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
