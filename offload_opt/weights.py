"""The parameters themselves in the store, in units of their own, so that a committed epoch holds the weights too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .aio import AioHandle
from .checksums import Checksum
from .coding import flat
from .errors import ConfigError
from .manifest import DTYPES, Layout, ParameterRecord, tensor_records
from .parameters import name_of, parameters_of
from .store import SwapStore
from .swap_manager import SwapManager
from .unit_file import CHUNK_BYTES
from .units import (
    Chunking,
    Paging,
    ParameterPlan,
    StateTemplate,
    StateTensor,
    SwapUnit,
    is_dense,
    plan_units,
    row_major,
)
from .update import Key

# Weights are copied, not computed with: any cut will do.
_CHUNKING = Chunking(threads=1, cuts_anywhere=True, max_elements=1 << 62)


class PersistedWeights:
    """Writes all parameters of the optimizer to units of their own at each commit, and reads them back."""

    def __init__(self, manager: SwapManager, host_memory: int, unit_size: int | None) -> None:
        self._manager = manager
        self._host_memory = host_memory
        self._unit_size = unit_size
        self._plans: list[ParameterPlan] = []
        self.units: list[SwapUnit] = []

    def write(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Start to write every parameter as it is now. When it returns, they may be changed again."""
        plans = plan_weights(groups)
        if plans != self._plans:
            self._manager.forget(self.units)
            self.forget()
            units = plan_units(plans, self._host_memory, self._unit_size, self._manager.next_index)
            self._manager.add(units)
            self._plans, self.units = plans, units
        parameters = parameters_of(groups)

        def fill(unit: SwapUnit, data: torch.Tensor, _: Checksum | None) -> None:
            for piece in unit.pieces:
                parameter = parameters[piece.key].detach()
                for tensor in piece.tensors:
                    source = parameter if piece.is_whole else flat(parameter)[piece.start : piece.stop]
                    tensor.view(data).copy_(source)

        self._manager.write_out(self.units, fill)

    def forget(self) -> None:
        """The units are gone."""
        self._plans, self.units = [], []

    def layout(self, store: SwapStore) -> Layout:
        """What a manifest says of the weights."""
        parameters = [
            ParameterRecord(
                key=plan.key,
                name=plan.name,
                shape=plan.shape,
                stride=plan.stride,
                dtype=DTYPES[plan.dtype],
                tensors=tensor_records(plan.template.paged),
                chunking=(_CHUNKING.threads, _CHUNKING.cuts_anywhere, _CHUNKING.max_elements),
                resident=None,
            )
            for plan in self._plans
        ]
        numbers = {plan.key: number for number, plan in enumerate(self._plans)}
        return Layout(parameters=parameters, units=store.records(self.units, numbers))


def plan_weights(groups: Sequence[Mapping[str, Any]]) -> list[ParameterPlan]:
    """Plans by which the parameters' own bytes are paged. Raises ConfigError for a dtype that cannot be stored."""
    plans = []
    for key, parameter in parameters_of(groups).items():
        name = name_of(groups, key)
        if parameter.dtype not in DTYPES:
            raise ConfigError(f"persist_params: {name} has dtype {parameter.dtype}, which cannot be stored")
        shape, stride = tuple(parameter.shape), tuple(parameter.stride())
        dense = is_dense(shape, stride)
        kept = StateTensor("parameter", parameter.dtype, shape, stride if dense else row_major(shape))
        template = StateTemplate(
            Paging.ELEMENTWISE if dense else Paging.WHOLE, (kept,) if parameter.numel() else (), {}, (kept.name,)
        )
        plans.append(ParameterPlan(key, name, shape, stride, parameter.dtype, template, parameter.device, _CHUNKING))
    return plans


def check_weights(layout: Layout, groups: Sequence[Mapping[str, Any]], where: Path) -> None:
    """Raise ConfigError unless the layout has just the parameters of ``groups``, in their shapes and dtypes."""
    now = {plan.key: (plan.shape, plan.stride, DTYPES[plan.dtype]) for plan in plan_weights(groups)}
    then: dict[Key, Any] = {record.key: (record.shape, record.stride, record.dtype) for record in layout.parameters}
    names = {record.key: record.name for record in layout.parameters}
    for key in sorted(now.keys() | then.keys()):
        if now.get(key) != then.get(key):
            name = names.get(key) or name_of(groups, key)
            raise ConfigError(
                f"{where} does not hold these weights: (shape, stride, dtype) of {name} are {then.get(key)} there and "
                f"{now.get(key)} in the optimizer"
            )


@torch.no_grad()
def read_weights(
    layout: Layout, folders: Sequence[Path], handle: AioHandle, groups: Sequence[Mapping[str, Any]], where: Path
) -> None:
    """Set the parameters to what a manifest's layout holds, through a small buffer."""
    parameters = parameters_of(groups)
    buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8, device="cpu")
    for unit, record in zip(layout.swap_units(where), layout.units, strict=True):
        path = folders[record.folder] / "units" / record.file
        for piece in unit.pieces:
            parameter = parameters[piece.key].detach()
            for tensor in piece.tensors:
                start = record.data_start + tensor.offset
                if is_dense(parameter.shape, parameter.stride()):
                    _read_run(handle, path, start, flat(parameter)[piece.start : piece.stop], buffer)
                else:  # stored in the order of its dimensions, and never cut
                    whole = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    handle.sync_pread(whole, path, start)
                    parameter.copy_(whole)


def _read_run(handle: AioHandle, path: Path, start: int, target: torch.Tensor, buffer: torch.Tensor) -> None:
    """Read the elements of the 1-D ``target``, which may be on a GPU, from byte ``start`` on."""
    staged = buffer.view(target.dtype)
    for run in torch.split(target, len(staged)):
        handle.sync_pread(staged[: len(run)], path, start)
        run.copy_(staged[: len(run)])
        start += run.nbytes


def weight_bytes(groups: Sequence[Mapping[str, Any]]) -> int:
    """Bytes that the weights take in the store."""
    return sum(tensor.nbytes for plan in plan_weights(groups) for tensor in plan.whole_tensors())
