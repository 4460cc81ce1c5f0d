"""The values of a piece's state, and what is stored for them in its unit. Pure: of tensors that are in memory."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import torch

from .codecs import REMAINDER, codec_for, join_master, rounding_key, split_master
from .errors import OffloadError
from .units import Piece, StateTensor


def encode_run(
    piece: Piece,
    tensor: StateTensor,
    stored: Sequence[torch.Tensor],
    values: torch.Tensor,
    begin: int,
    step: int,
    weight: torch.Tensor | None,
) -> torch.Tensor | None:
    """Store fp32 ``values`` of a state tensor, from element ``begin`` of the parameter on; all of it is 1-D.

    ``stored`` is what ``tensor.run`` names. With a ``weight`` they are a master, which is rounded to it. Returns its
    ties by their positions in the piece, or None where there are none.
    """
    if weight is not None:
        ties = split_master(values, weight, stored[0])
        return ties + (begin - piece.start) if len(ties) else None
    codec = codec_for(tensor.codec, tensor.name)
    assert codec is not None
    group, position = piece.key
    try:
        codec.encode(values, stored, rounding_key(step, (group << 32) + position, tensor.name), begin)
    except ValueError as error:
        message = f"{tensor.name} of {piece.name} cannot be stored as {tensor.codec}: {error}"
        raise OffloadError(message) from error
    return None


def decode_run(
    piece: Piece,
    tensor: StateTensor,
    stored: Sequence[torch.Tensor],
    begin: int,
    weight: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """The values of a state tensor, from element ``begin`` of the parameter on, into ``out``; all of it is 1-D.

    ``stored`` is what ``tensor.run`` names, and ``weight`` the parameter's run, which a master's remainder needs.
    """
    if tensor.codec == REMAINDER:
        if weight is None:
            raise OffloadError(f"the master of {piece.name} cannot be read, since the parameter is gone")
        join_master(weight.to(out.device), stored[0], _ties_of(piece, begin, begin + len(out), out.device), out)
        return
    codec = codec_for(tensor.codec, tensor.name)
    if codec is None:
        out.copy_(stored[0])
    else:
        codec.decode(stored, out)


def _ties_of(piece: Piece, begin: int, end: int, device: torch.device) -> torch.Tensor:
    """The ties of elements ``begin`` to ``end`` of the parameter, by their positions from ``begin`` on."""
    if piece.ties is None:
        return torch.empty(0, dtype=torch.int32, device=device)
    positions = piece.ties.tolist()  # few: one value in 2^17 has one
    first, last = (bisect.bisect_left(positions, bound - piece.start) for bound in (begin, end))
    return (piece.ties[first:last] - (begin - piece.start)).to(device)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor's elements in the order of its memory."""
    detached = tensor.detach()
    return detached.as_strided((detached.numel(),), (1,), detached.storage_offset())


def in_memory_order(tensor: torch.Tensor, like: torch.Tensor | StateTensor) -> torch.Tensor:
    """A tensor's elements in the order of the memory of ``like``, flat; a copy where it is laid out otherwise."""
    stride = like.stride if isinstance(like, StateTensor) else like.stride()
    tensor = tensor.detach().reshape(like.shape)
    if tensor.stride() != tuple(stride):
        ordered = torch.empty_strided(tuple(like.shape), tuple(stride), dtype=tensor.dtype, device=tensor.device)
        tensor = ordered.copy_(tensor)
    return flat(tensor)
