"""Epochs of an optimizer: what a commit, a snapshot and a restore do with its state, groups and weights."""

from __future__ import annotations

import datetime
import logging
import os
import uuid
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .aio import AioHandle
from .config import OffloadConfig, format_bytes
from .errors import ConfigError, OffloadWarning, StoreError
from .folders import rank_folder, unused
from .inner import InnerOptimizer
from .manifest import (
    DTYPES,
    MANIFEST,
    Layout,
    Manifest,
    ParameterRecord,
    UnitRecord,
    decode_mapping,
    decode_value,
    encode_mapping,
    encode_value,
    read_manifest,
    tensor_records,
)
from .pager import ParameterPager, whole_tensors
from .parameters import ParameterState, parameters_of, plan_parameters, resident_from
from .snapshots import Snapshot, delete_older
from .state_file import map_state
from .store import SwapStore
from .swap_manager import SwapManager
from .unit_file import check_bytes, check_files, stored_units
from .units import RING_DEPTH, ParameterPlan, SwapUnit
from .update import Key
from .weights import PersistedWeights, check_weights, read_weights

_log = logging.getLogger(__name__)

Groups = Sequence[dict[str, Any]]


class _Found(NamedTuple):
    """A manifest that fits the optimizer, with what is made of it; nothing has been changed yet."""

    manifest: Manifest
    where: Path
    folders: Sequence[Path]
    units: list[SwapUnit]
    groups: list[dict[str, Any]]  # the options as they were
    states: dict[Key, tuple[ParameterPlan, dict[str, Any] | None]]
    extra: Any


class Checkpointer:
    """Makes manifests of the optimizer's state and takes the state up from them; borrows everything."""

    def __init__(
        self,
        inner: InnerOptimizer,
        pager: ParameterPager,
        manager: SwapManager,
        store: SwapStore,
        handle: AioHandle,
        config: OffloadConfig,
        place: tuple[int, int],
    ) -> None:
        self._inner = inner
        self._pager = pager
        self._manager = manager
        self._store = store
        self._handle = handle
        self._config = config
        self._rank, self._world_size = place
        self._weights = PersistedWeights(manager, *config.memory)
        self._run = uuid.uuid4().hex
        self._snapshots: list[str] = []
        self._is_durable = config.durability != "scratch"
        # What the store was opened with, and nobody has decided about.
        self._undecided = store.committed is not None

    @property
    def committed_epoch(self) -> int | None:
        """Of the last commit that has ended; None before the first."""
        return None if self._store.committed is None else self._store.committed.epoch

    def committed_files(self) -> set[Path]:
        """The unit files of the last commit, which stay until the next one."""
        return self._store.named_by_commit()

    def check_started(self) -> None:
        """Raise StoreError while the store has a committed epoch that nobody has decided about."""
        if self._undecided and self._store.committed is not None:
            raise StoreError(
                f"{self._store.folders[0]} has a committed epoch, {self._store.committed.epoch}, which this run would "
                "replace: call restore() to go on from it, or wrap the optimizer with discard=True to start over"
            )

    def check_storable(self, groups: Groups, extra: Any) -> None:
        """Raise ConfigError where a commit could not hold the groups' options or ``extra``."""
        encode_value({} if extra is None else extra, "extra")
        _encode_groups(groups)

    def commit(self, groups: Groups, extra: Any, *, wait: bool) -> Manifest:
        """Commit the state as it is now. Without ``wait``, beside the caller, who may change everything meanwhile."""
        self._pager.page_out_brought(groups)  # a step may have made state that had no place before
        manifest = self._manifest(groups, extra)
        self._store.start_commit(manifest, self._manager.writes())
        if wait:
            self._manager.synchronize()
        return manifest

    def snapshot(self, directory: Path | None, groups: Groups, extra: Any, keep: int | None) -> None:
        """Commit and, with a directory, make a snapshot in it."""
        if directory is None:
            self.commit(groups, extra, wait=True)
            return
        snapshot = Snapshot(directory, self._rank, self._world_size)
        snapshot.check()
        # Named by the commit before anything is made there, so that restore() finds what a kill leaves of it.
        listed = os.fsencode(directory).decode(errors="replace")  # a path may be no Unicode; a manifest is
        self._snapshots = [path for path in self._snapshots if Path(path).exists()] + [listed]
        if self._is_durable:
            manifest = self.commit(groups, extra, wait=True)
        else:
            self._pager.page_out_brought(groups)
            manifest = self._manifest(groups, extra)
            self._manager.synchronize()
        with self._manager.failing():
            self._store.bring_to_device()
        with snapshot as folder:
            self._store.snapshot(folder, manifest)
        if keep is not None:
            for deleted in delete_older(directory, manifest, keep):
                _log.info("snapshot %s is deleted: %d newer ones are kept", deleted, keep)

    def replace_state(self, groups: Groups, states: Mapping[torch.Tensor, ParameterState]) -> None:
        """Drop all state and store the given one; the weights are written anew at the next commit."""
        self._weights.forget()
        self._pager.replace_all(groups, states)

    def restore(self, directory: Path | None, groups: Groups) -> Any:
        """Take up the last commit, or the snapshot in ``directory``. Returns its extra."""
        if directory is None:
            return self._restore(None, groups)
        with unused(rank_folder(directory, self._rank, self._world_size)):
            return self._restore(directory, groups)

    def _restore(self, directory: Path | None, groups: Groups) -> Any:
        found = self._find(directory, groups)
        if directory is None:
            self._say_what_is_discarded(found.manifest)
        with self._manager.failing():
            self._manager.forget_all()
            self._weights.forget()
            self._store.retire_all()
            if found.manifest.weights is not None:  # first: a master is stored as what its weight lacks
                read_weights(found.manifest.weights, found.folders, self._handle, groups, found.where)
            # Before state is stored anew: its rounding goes by the epoch.
            self._continue(found.manifest, is_own=directory is None)
            self._take_up(found, directory, groups)
            for group, then in zip(groups, found.groups, strict=True):
                group.update({name: value for name, value in then.items() if name != "params"})
            if self._is_durable and directory is not None:
                self.commit(groups, found.extra, wait=True)
            self._undecided = False
        return found.extra

    def _say_what_is_discarded(self, manifest: Manifest) -> None:
        later = self._store.uncommitted()
        if later:
            _log.warning(
                "%s: back to epoch %d; what %d unit files (%s) got after its commit is discarded",
                self._store.folders[0],
                manifest.epoch,
                len(later),
                format_bytes(sum(path.stat().st_size for path in later)),
            )

    def _continue(self, manifest: Manifest, *, is_own: bool) -> None:
        """Go on as the run that made ``manifest`` or, from a snapshot of another store, as a run of our own.

        Two stores may go on from one snapshot: neither may take the other's later snapshots for its own, and delete
        them by ``keep``.
        """
        if is_own or manifest.store == self._store.identity:
            self._run, self._snapshots = manifest.run, list(manifest.snapshots)
        else:
            self._run, self._snapshots = uuid.uuid4().hex, []
        self._pager.epoch = manifest.epoch

    def remove_remains(self) -> None:
        """After ``restore``: delete what a kill has left of snapshots of this run. It harms nothing if that fails."""
        for path in self._snapshots:
            try:
                Snapshot(Path(path), self._rank, self._world_size).remove_remains()
            except (OSError, StoreError) as error:
                _log.warning("what was left of the snapshot %s could not be deleted: %s", path, error)

    def _take_up(self, found: _Found, directory: Path | None, groups: Groups) -> None:
        records: dict[SwapUnit, UnitRecord] = dict(zip(found.units, found.manifest.state.units, strict=True))
        if not self._fits(found):
            self._lay_out_anew(found, groups)
        elif directory is None:
            self._store.adopt(records)
            self._manager.adopt(found.units)
            self._pager.adopt(groups, found.states, found.units)
        else:
            self._store.bring(records, found.folders[0])
            self._manager.adopt(found.units)
            self._pager.adopt(groups, found.states, found.units)

    def _find(self, directory: Path | None, groups: Groups) -> _Found:
        """Read and check what is to be restored. Raises StoreError, ConfigError or OSError; changes nothing."""
        if directory is None:
            manifest = self._store.reload()
            folders: Sequence[Path] = self._store.folders
            if manifest is None:
                raise StoreError(
                    f"{folders[0]} has no committed epoch to go back to{_beside(folders[0].parent)}: name the folder "
                    "of a snapshot"
                )
        else:
            folders = [rank_folder(directory, self._rank, self._world_size)]
            try:
                manifest = read_manifest(folders[0] / MANIFEST)
            except (FileNotFoundError, NotADirectoryError):
                if not directory.exists():
                    raise StoreError(f"the snapshot {directory} does not exist") from None
                raise StoreError(
                    f"{directory} has no snapshot of rank {self._rank} of {self._world_size}{_beside(directory)}"
                ) from None
        where = folders[0] / MANIFEST
        if (manifest.rank, manifest.world_size) != (self._rank, self._world_size):
            raise StoreError(
                f"{where} is of rank {manifest.rank} of {manifest.world_size}, and this is rank {self._rank} of "
                f"{self._world_size}"
            )
        layouts = [manifest.state] + ([manifest.weights] if manifest.weights else [])
        for layout in layouts:
            check_files(layout.units, folders)
        units = manifest.state.swap_units(where)
        groups_then = self._groups_of(manifest, groups, where)
        if manifest.weights is not None:
            check_weights(manifest.weights, groups, where)
        plans = self._plans_of(manifest.state, groups_then, where)
        states: dict[Key, tuple[ParameterPlan, dict[str, Any] | None]] = {}
        for plan, record in zip(plans, manifest.state.parameters, strict=True):
            resident = decode_mapping(record.resident)
            states[plan.key] = plan, None if resident is None else resident_from(plan, resident)
        for piece in (piece for unit in units for piece in unit.pieces):
            if piece.resident is not None:
                piece.resident = resident_from(states[piece.key][0], piece.resident)
        extra = decode_value(manifest.extra)
        # Last, since it takes the longest: every byte, before anything is given up for it.
        for layout in layouts:
            check_bytes(self._handle, stored_units(layout.swap_units(where), layout.units, folders))
        return _Found(manifest, where, folders, units, groups_then, states, extra)

    def _groups_of(self, manifest: Manifest, groups: Groups, where: Path) -> list[dict[str, Any]]:
        """The groups with the options of the manifest. Raises ConfigError where they cannot be the same."""
        if manifest.optimizer != self._inner.name:
            raise ConfigError(f"{where} has the state of {manifest.optimizer}, and the optimizer is {self._inner.name}")
        sizes = [len(group["params"]) for group in groups]
        if manifest.group_sizes != sizes or len(manifest.groups) != len(sizes):
            raise ConfigError(
                f"{where} is of param_groups with {manifest.group_sizes} parameters, and the optimizer's have {sizes}: "
                "make them as they were (add_param_group() comes before restore())"
            )
        decoded = [{name: decode_value(value) for name, value in group.items()} for group in manifest.groups]
        _check_names(decoded, groups, where)
        result = []
        for group, then in zip(groups, decoded, strict=True):
            for name, value in then.items():
                now = group.get(name)
                if isinstance(value, torch.Tensor) and isinstance(now, torch.Tensor):
                    then[name] = value.to(now.device)
            result.append({**group, **then, "params": group["params"]})
        return result

    def _plans_of(self, layout: Layout, groups: Groups, where: Path) -> list[ParameterPlan]:
        """Plans for the parameters that have state in the layout. Raises ConfigError unless they match it."""
        there = parameters_of(groups)
        missing = [record.name for record in layout.parameters if record.key not in there]
        if missing:
            raise ConfigError(
                f"{where} has state of {missing[0]}, and there is no parameter at its place in the groups"
            )
        plans = plan_parameters(self._inner, groups, [record.key for record in layout.parameters], self._config)
        for plan, record in zip(plans, layout.parameters, strict=True):
            then = (record.shape, record.dtype, [(t.name, t.dtype, t.shape) for t in record.tensors])
            tensors = tensor_records(plan.whole_tensors())
            now = (plan.shape, DTYPES.get(plan.dtype), [(t.name, t.dtype, t.shape) for t in tensors])
            if now != then:
                raise ConfigError(
                    f"{where} does not fit {plan.name}: (shape, dtype, state) are {then} there and {now} here"
                )
        return plans

    def _fits(self, found: _Found) -> bool:
        """Whether the units can be used as they are: cut as this machine's arithmetic allows, within host_memory."""
        largest = max((unit.nbytes for unit in found.units), default=0)
        host_memory, unit_size = self._config.memory
        if largest * RING_DEPTH > host_memory or largest > (unit_size or largest):
            return False
        for record in found.manifest.state.parameters:
            plan, _ = found.states[record.key]
            chunking = plan.chunking
            now = (chunking.threads, chunking.cuts_anywhere, chunking.max_elements)
            if [tensor.codec for tensor in plan.whole_tensors()] != [tensor.codec for tensor in record.tensors]:
                return False
            if record.chunking != now or record.stride != plan.stride or record.name != plan.name:
                return False
        return all(unit.device == found.states[piece.key][0].device for unit in found.units for piece in unit.pieces)

    def _lay_out_anew(self, found: _Found, groups: Groups) -> None:
        """Read the state from the files that hold it into units that suit this run."""
        pieces: dict[Key, list[Any]] = {}
        for unit in found.units:
            for piece in unit.pieces:
                pieces.setdefault(piece.key, []).append((unit, piece))
        stored = stored_units(found.units, found.manifest.state.units, found.folders)
        places = {each.unit: (each.path, each.data_start) for each in stored}
        wholes, keys, parameters = [], [], parameters_of(groups)
        for parameter in found.manifest.state.parameters:
            plan, _ = found.states[parameter.key]
            owner = parameters[parameter.key]
            for whole in whole_tensors(plan, pieces.get(parameter.key, []), owner, parameter.stride):
                wholes.append(whole)
                keys.append(parameter.key)
        tensors = map_state(wholes, places.__getitem__, self._store.folders[0])
        states: dict[torch.Tensor, ParameterState] = {}
        for key, whole, tensor in zip(keys, wholes, tensors, strict=True):
            state = states.setdefault(parameters[key], dict(pieces[key][0][1].resident or {}))
            state[whole.spec.name] = tensor  # type: ignore[index]
        for key, (_, resident) in found.states.items():
            if key not in pieces and resident is not None:
                states[parameters[key]] = resident
        self._pager.replace_all(found.groups, states)

    def _manifest(self, groups: Groups, extra: Any) -> Manifest:
        """What there is to commit, all of it on its way; what cannot be stored is refused before the weights are."""
        self._pager.check_masters(groups)
        encoded_groups, encoded_extra = _encode_groups(groups), encode_value({} if extra is None else extra, "extra")
        self._manager.flush()
        keys = self._pager.stored_keys()
        records = []
        for key in keys:
            entry = self._pager.entries[key]
            plan = entry.plan
            records.append(
                ParameterRecord(
                    key=key,
                    name=plan.name,
                    shape=plan.shape,
                    stride=plan.stride,
                    dtype=DTYPES[plan.dtype],
                    tensors=tensor_records(plan.whole_tensors()),
                    chunking=(plan.chunking.threads, plan.chunking.cuts_anywhere, plan.chunking.max_elements),
                    resident=encode_mapping(entry.resident, plan.name),
                )
            )
        numbers = {key: number for number, key in enumerate(keys)}
        state = Layout(parameters=records, units=self._store.records(self._pager.units(), numbers))
        weights = None
        if self._config.holds_weights:
            self._weights.write(groups)
            weights = self._weights.layout(self._store)
        return Manifest(
            store=self._store.identity,
            run=self._run,
            epoch=self._pager.epoch,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="microseconds"),
            rank=self._rank,
            world_size=self._world_size,
            folders=len(self._store.folders),
            optimizer=self._inner.name,
            groups=encoded_groups,
            group_sizes=[len(group["params"]) for group in groups],
            state=state,
            weights=weights,
            extra=encoded_extra,
            snapshots=list(self._snapshots),
        )


def warn_of_others(folder: Path, rank: int, world_size: int) -> None:
    """Warn where a rank's store, in ``folder``, would begin beside the commits of another number of ranks."""
    others = [name for name in _ranks_in(folder.parent) if not name.endswith(f"-of-{world_size:05d}")]
    if rank == 0 and others and not (folder / MANIFEST).exists():
        warnings.warn(
            f"{folder.parent} has commits of {', '.join(others)}; this is rank {rank} of {world_size}, which starts "
            "over beside them, since a store is gone on with by as many ranks as made it. To go on, run as many, or "
            "load a state_dict() of them; discard=True leaves out this warning",
            OffloadWarning,
            stacklevel=3,
        )


def _ranks_in(folder: Path) -> list[str]:
    """The folders of ranks with commits there."""
    return sorted(path.parent.name for path in folder.glob(f"rank-*-of-*/{MANIFEST}"))


def _beside(folder: Path) -> str:
    others = _ranks_in(folder)
    return f" ({folder} has {', '.join(others)})" if others else ""


def _encode_groups(groups: Groups) -> list[dict[str, Any]]:
    return [
        {name: encode_value(value, f"group {index}'s {name!r}") for name, value in group.items() if name != "params"}
        for index, group in enumerate(groups)
    ]


def _check_names(then: Groups, now: Groups, where: Path) -> None:
    """Raise ConfigError where a parameter that has a name in both has another place: it would get another's state."""
    places: list[dict[str, Key]] = []
    for groups in (then, now):
        keyed = [
            (str(name), (g, i)) for g, group in enumerate(groups) for i, name in enumerate(group.get("param_names", ()))
        ]
        count = Counter(name for name, _ in keyed)
        places.append({name: key for name, key in keyed if count[name] == 1})
    for name in places[0].keys() & places[1].keys():
        (g, i), (h, j) = places[0][name], places[1][name]
        if (g, i) != (h, j):
            raise ConfigError(
                f"{where} has {name} as parameter {i} of group {g}, and the optimizer has it as parameter {j} of group "
                f"{h}: give the parameters in the order that they had"
            )


def check_directory(directory: str | os.PathLike[str]) -> Path:
    """An absolute path. Raises ConfigError where it is not a path."""
    if not isinstance(directory, (str, os.PathLike)):
        raise ConfigError(f"directory must be a path, not {type(directory).__name__}")
    return Path(directory).absolute()
