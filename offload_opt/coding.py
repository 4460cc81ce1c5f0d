"""The values of a piece's state, and what is stored for them in its unit. Pure: of tensors that are in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .checksums import Checksum
from .codecs import REMAINDER, BelowZeroError, Coding, codec_for, decode, encode, rounding_key
from .errors import OffloadError
from .units import Piece, StateTensor


def coding_of(
    piece: Piece,
    tensor: StateTensor,
    stored: Sequence[torch.Tensor] | Sequence[int],
    values: torch.Tensor,
    begin: int,
    weight: torch.Tensor | None,
) -> Coding:
    """A state tensor that has a codec, from element ``begin`` of the parameter on, as codecs.py takes it; all is 1-D.

    ``stored`` is what ``tensor.run`` names, or where that lies: see ``Coding.laid_out``. ``weight`` is the parameter's
    run, which a master's remainder needs.
    """
    codec = codec_for(tensor.codec, tensor.name)
    assert codec is not None
    make: Callable[..., Coding] = Coding.laid_out if isinstance(stored[0], int) else Coding
    if tensor.codec != REMAINDER:
        return make(codec, stored, values)
    if weight is None:
        raise OffloadError(f"the master of {piece.name} cannot be read, since the parameter is gone")
    return make(codec, stored, values, weight, piece.ties, begin - piece.start)


def encode_run(
    piece: Piece,
    names: Sequence[str],
    codings: Sequence[Coding],
    begin: int,
    step: int,
    checksum: Checksum | None = None,
) -> torch.Tensor:
    """Store the values of ``codings``, state tensors of these names, from element ``begin`` of the parameter on.

    What is stored is added to ``checksum``. Returns the ties of a master that is among them, by their positions in the
    piece.
    """
    group, position = piece.key
    keys = [rounding_key(step, (group << 32) + position, name) for name in names]
    try:
        return encode(codings, keys, begin, checksum)
    except BelowZeroError as error:
        name, codec = names[error.index], codings[error.index].codec.name
        raise OffloadError(f"{name} of {piece.name} cannot be stored as {codec}: {error}") from error


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


def in_memory_order(tensor: torch.Tensor, like: torch.Tensor | StateTensor) -> torch.Tensor:
    """A tensor's elements in the order of the memory of ``like``, flat; a copy where it is laid out otherwise."""
    stride = like.stride if isinstance(like, StateTensor) else like.stride()
    tensor = tensor.detach().reshape(like.shape)
    if tensor.stride() != tuple(stride):
        ordered = torch.empty_strided(tuple(like.shape), tuple(stride), dtype=tensor.dtype, device=tensor.device)
        tensor = ordered.copy_(tensor)
    return flat(tensor)
