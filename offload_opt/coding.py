"""The values of a piece's state, and what is stored for them in its unit. Pure: of tensors that are in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .checksums import Checksum
from .codecs import (
    REMAINDER,
    BelowZeroError,
    Coding,
    NativeCoding,
    codec_for,
    decode,
    encode,
    encode_native,
    native_ties,
    rounding_key,
)
from .errors import OffloadError
from .units import CodedRun, Piece, StateTensor


def coding_of(
    piece: Piece,
    tensor: StateTensor,
    stored: Sequence[torch.Tensor],
    values: torch.Tensor,
    begin: int,
    weight: torch.Tensor | None,
) -> Coding:
    """A state tensor that has a codec, from element ``begin`` of the parameter on, as codecs.py takes it; all is 1-D.

    ``stored`` is what ``tensor.run`` names; ``weight`` the parameter's run, which a master's remainder needs.
    """
    codec = codec_for(tensor.codec, tensor.name)
    assert codec is not None
    if tensor.codec != REMAINDER:
        return Coding(codec, stored, values)
    if weight is None:
        raise OffloadError(f"the master of {piece.name} cannot be read, since the parameter is gone")
    return Coding(codec, stored, values, weight, piece.ties, begin - piece.start)


def native_coding_of(piece: Piece, run: CodedRun, values: int, data: int, begin: int, weight: int) -> NativeCoding:
    """The same by addresses: of the run's values, of the unit's bytes, and of the run of the parameter."""
    form, numel, first, last = run.native
    if run.tensor.codec != REMAINDER:
        return NativeCoding(form, numel, values, data + first, data + last)
    ties, count = native_ties(piece.ties)
    return NativeCoding(form, numel, values, data + first, weight, ties, count, begin - piece.start)


def rounding_keys(piece: Piece, names: Sequence[str], step: int) -> list[int]:
    """By which state tensors of these names are rounded in a step."""
    group, position = piece.key
    return [rounding_key(step, (group << 32) + position, name) for name in names]


def encode_run(
    piece: Piece,
    names: Sequence[str],
    codings: Sequence[Coding] | Sequence[NativeCoding],
    keys: Sequence[int],
    begin: int,
    checksum: Checksum | None = None,
) -> torch.Tensor | None:
    """Store the values of ``codings``, state tensors of these names, from element ``begin`` of the parameter on.

    What is stored is added to ``checksum``. Returns the ties of a master that is among them, if there are any, by their
    positions in the piece.
    """
    store: Any = encode_native if isinstance(codings[0], NativeCoding) else encode
    try:
        ties: torch.Tensor | None = store(codings, keys, begin, checksum)
    except BelowZeroError as error:
        name = names[error.index]
        codec = next(tensor.codec for tensor in piece.tensors if tensor.name == name)
        raise OffloadError(f"{name} of {piece.name} cannot be stored as {codec}: {error}") from error
    return ties


def decode_run(
    piece: Piece,
    tensor: StateTensor,
    stored: Sequence[torch.Tensor],
    begin: int,
    weight: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """The values of any state tensor into ``out``; the arguments are as for ``coding_of``."""
    if tensor.codec == "exact":
        out.copy_(stored[0])
    else:
        decode([coding_of(piece, tensor, stored, out, begin, None if weight is None else weight.to(out.device))])


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor's elements in the order of its memory."""
    detached = tensor.detach()
    return detached.as_strided((detached.numel(),), (1,), detached.storage_offset())


def is_laid_out_as(tensor: torch.Tensor, like: torch.Tensor) -> bool:
    """Whether both have the same elements in the same order of memory."""
    return tensor.shape == like.shape and tensor.stride() == like.stride()


def in_memory_order(tensor: torch.Tensor, like: torch.Tensor | StateTensor) -> torch.Tensor:
    """A tensor's elements in the order of the memory of ``like``, flat; a copy where it is laid out otherwise."""
    stride = like.stride if isinstance(like, StateTensor) else like.stride()
    if tensor.shape != like.shape:
        tensor = tensor.reshape(like.shape)
    tensor = tensor.detach()
    if tensor.stride() != tuple(stride):
        ordered = torch.empty_strided(tuple(like.shape), tuple(stride), dtype=tensor.dtype, device=tensor.device)
        tensor = ordered.copy_(tensor)
    return flat(tensor)
