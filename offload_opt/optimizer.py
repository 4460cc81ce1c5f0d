"""OffloadOptimizer: the torch.optim.Optimizer face of the package."""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from .aio import AioHandle
from .checkpoint import Checkpointer, check_directory, warn_of_others
from .config import OffloadConfig
from .errors import ConfigError, OffloadError, UnsupportedOptimizerError
from .folders import check_folders, check_space, rank_folder
from .inner import InnerOptimizer, register
from .pager import ParameterPager
from .parameters import check_state_names, parameters_of, plan_parameters, plan_states
from .state_dict import PagedState, Unconverted, export_state, hide_from_conversion
from .store import SwapStore
from .swap_manager import Failure, SwapManager
from .trace import SwapStats
from .tuning import bandwidths_of, settings_for
from .units import Paging, ParameterPlan, check_memory, state_bytes
from .weights import weight_bytes

# Inner optimizers that an open OffloadOptimizer holds: two of them would update the same parameters twice.
_wrapped: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


class OffloadOptimizer(torch.optim.Optimizer):
    """Keeps the state of ``optimizer`` on disk, and is used in its place.

    >>> optimizer = OffloadOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-4), "/mnt/nvme/run1")

    A step reads each unit of state into a page-locked buffer, lets ``optimizer`` update the parameters that it belongs
    to, and writes it back, with several units under way at a time. As many units as ``host_memory`` has room for stay
    in memory. Parameters and ``state_dict()`` are bit for bit those of ``optimizer`` by itself. Schedulers, hooks,
    closures, ``add_param_group`` and GradScaler work as on any optimizer.

    State is made room for when a parameter first has a gradient; a parameter that never has one takes no space.
    ``snapshot()`` commits the state, and ``restore()`` takes it up again, also after a crash; see ``durability`` and
    ``persist_params`` in OffloadConfig. A store that holds committed state is never silently started over.

    Args:
        optimizer: Any torch optimizer whose update of one parameter needs no other parameter. It must not be stepped
            itself any more. State that it has already is moved to the disk at the first step.
        path: An existing folder on the drive that is to hold the state; a list of folders on several drives, over which
            it is spread by their bandwidths; or an OffloadConfig with everything in it.
        discard: Start over where the store holds committed state, which is deleted.
        **fields: The other fields of OffloadConfig, such as ``host_memory="512MiB"``.

    Raises:
        ConfigError: A setting or path that cannot work, or memory or disk space that does not suffice.
        UnsupportedOptimizerError: ``optimizer`` cannot be paged; the message says why.
        StoreError: Another process or optimizer uses the same folder.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | OffloadConfig,
        *,
        discard: bool = False,
        **fields: Any,
    ) -> None:
        if isinstance(path, OffloadConfig):
            if fields:
                raise ConfigError("give the options either in the OffloadConfig or as keywords, not in both")
            self.config = path
        else:
            self.config = OffloadConfig.build(path, **fields)
        inner = _check_optimizer(optimizer)
        paths = check_folders(self.config.paths)
        place = _rank_and_world_size()
        folders = [rank_folder(path, *place) for path in paths]
        aio = self.config.aio or settings_for(paths[0])
        plans = _plan_trainable(inner, self.config)
        check_memory(plans, *self.config.memory)
        self._check_space(folders, plans, inner.optimizer.param_groups)
        if not discard:
            warn_of_others(folders[0], *place)
        bandwidths = bandwidths_of(paths, aio, self.config.memory[0])

        self._inner = inner
        self._stats = SwapStats()
        self._failure = Failure()
        handle = AioHandle.from_config(aio, folder=paths[0])
        try:
            durable = self.config.durability != "scratch"
            checksum = self.config.checksum if durable or self.config.checksum == "read" else "off"
            store = SwapStore(folders, handle, bandwidths, durable=durable, checksum=checksum, discard=discard)
        except BaseException:
            handle.close()
            raise
        self._manager = SwapManager(handle, store, self.config.memory[0], self._stats, self._failure)
        self._pager = ParameterPager(inner, self._manager, self.config)
        self._checkpointer = Checkpointer(inner, self._pager, self._manager, store, handle, self.config, place)
        self.extra: Any = {}
        """Any JSON, tuples, bytes and small tensors, which the commits of steps hold and ``restore()`` returns."""
        self._pid = os.getpid()
        self._folders = folders
        self._shut_down = weakref.finalize(self, _shut_down, self._pid, optimizer, self._manager, handle, store)

        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._share_with(optimizer)
        self._pager.bring(self.param_groups, optimizer.state)
        optimizer.state = defaultdict(dict)
        # By a weak reference: without a cycle, what is dropped is closed at once.
        self.state = cast(Any, PagedState(self._pager, weakref.ref(self)))
        _wrapped.add(optimizer)

    def _share_with(self, optimizer: torch.optim.Optimizer) -> None:
        """Groups and hooks are the same objects on both sides, so it does not matter where they are changed."""
        self.param_groups = optimizer.param_groups
        for name, value in vars(optimizer).items():
            if name.endswith("_hooks"):
                setattr(self, name, value)

    @staticmethod
    def register(optimizer_class: type[torch.optim.Optimizer], paging: str) -> None:
        """Say how the state of an optimizer that is not torch's may be cut; only if no update needs another parameter.

        Args:
            optimizer_class: The class; subclasses that inherit its ``step`` are meant too.
            paging: ``"elementwise"`` where each element is updated by itself (as in Adam), so that a large parameter
                may be spread over several units; ``"whole"`` where the update looks at all of it (as in Muon).
        """
        if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)):
            raise ConfigError(f"optimizer_class must be a subclass of torch.optim.Optimizer, not {optimizer_class!r}")
        if not isinstance(paging, str) or paging.upper() not in Paging.__members__:
            raise ConfigError(f"paging must be 'elementwise' or 'whole', not {paging!r}")
        register(optimizer_class, Paging[paging.upper()])

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The wrapped optimizer."""
        return self._inner.optimizer

    @property
    def stats(self) -> SwapStats:
        """Bytes, seconds and steps so far: a copy."""
        return self._stats.copy()

    # Reading and writing files cannot be traced: one clean graph break.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient. Returns what ``closure`` returned.

        When it returns, the parameters are updated, and some units may still be being written. So may the commit of
        ``durability="step"``: see ``committed_epoch`` and ``synchronize()``.

        Raises:
            OSError: A transfer failed, also one of an earlier step. After it, StepFailedError until restore() or
                load_state_dict().
        """
        self._check_usable("step")
        self._manager.check()
        self._checkpointer.check_started()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._alone("step"):
            started = time.perf_counter()
            commits = self.config.durability == "step"
            if commits:
                self._checkpointer.check_storable(self.param_groups, self.extra)
            self._pager.step(self.param_groups)
            if commits:
                self._checkpointer.commit(self.param_groups, self.extra, wait=False)
            self._stats.step_seconds += time.perf_counter() - started
            self._stats.steps += 1
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as on the wrapped optimizer. Its state gets its place at the next step with gradients."""
        if not isinstance(self.state, PagedState):  # from Optimizer.__init__, with the wrapped optimizer's own groups
            super().add_param_group(param_group)
            return
        with self._alone("add_param_group"):
            self._inner.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's ``state_dict()``, on the CPU; its tensors are mapped from a file.

        The file, which lies in the store and has no name, is a copy of the state as it is now: later steps do not
        change it. It goes with the tensors. So ``torch.save(optimizer.state_dict(), file)`` takes room on the drive for
        a while, but hardly any memory.

        Raises:
            StoreError: There is no space for the copy.
        """
        with self._alone("state_dict"):
            self._manager.check()
            paged = cast(PagedState, self.state)
            try:
                self.state = cast(Any, paged.load())
                return super().state_dict()
            finally:
                self.state = cast(Any, paged)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a ``state_dict()`` of this or of an unwrapped optimizer, and move its state to the disk at once.

        Raises:
            ValueError: The groups do not match, as in torch. ConfigError: the state does not match the optimizer's.
        """
        self._check_usable("load_state_dict")
        # The last pre-hook: those of the user see the state as it is.
        hook = self.register_load_state_dict_pre_hook(hide_from_conversion)
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            hook.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Torch's ``load_state_dict`` hands over the new groups, and the state by parameter."""
        with self._alone("load_state_dict"):
            self._set_state(state)

    def _set_state(self, state: dict[str, Any]) -> None:
        hidden: dict[Any, Any] = state["state"]
        states = {p: value.state for p, value in hidden.items() if isinstance(value, Unconverted) and value.state}
        if states:
            self._checkpointer.check_started()
        # Everything that can be refused is, before the old state is given up.
        plans = plan_states(self._inner, state["param_groups"], states, self.config)
        check_memory(plans, *self.config.memory)
        self._check_space(self._folders, plans, state["param_groups"], self._checkpointer.committed_files())
        optimizer = self._inner.optimizer
        with self._manager.failing():
            optimizer.__setstate__({"state": defaultdict(dict), "param_groups": state["param_groups"]})
            self.param_groups = optimizer.param_groups
            self._checkpointer.replace_state(self.param_groups, states)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("an OffloadOptimizer cannot be pickled or copied, as its state is on disk: use state_dict()")

    @property
    def epoch(self) -> int:
        """Steps that the state has been through, over all runs: ``restore()`` brings the number back."""
        return self._pager.epoch

    @property
    def committed_epoch(self) -> int | None:
        """The epoch of the store's last commit, which ``restore()`` goes back to; None where there is none."""
        return self._checkpointer.committed_epoch

    def snapshot(
        self, directory: str | os.PathLike[str] | None = None, extra: Any = None, *, keep: int | None = None
    ) -> None:
        """Commit the state as it is now and, with a ``directory``, make a snapshot there that never changes.

        On the same file system a snapshot is hard links, and costs no copying; on another one the state is copied. It
        can be read when the store is gone. Each rank makes a folder of its own in ``directory``.

        Args:
            directory: Where the snapshot is to be made; its parents are made where they are missing. None: commit only.
            extra: What ``restore()`` is to return: any JSON, and tuples, bytes and small tensors. None: ``self.extra``.
            keep: Delete older snapshots of this run in the same parent folder, all but so many of the newest.

        Raises:
            ConfigError: Bad arguments, or a commit alone with ``durability="scratch"``.
            StoreError: There is a snapshot in ``directory``, or no space. The last commit and the state are unharmed.
            OSError: A transfer failed.
        """
        self._check_usable("snapshot")
        if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
            raise ConfigError(f"keep must be the number of snapshots to keep, 1 or more, not {keep!r}")
        if directory is None and (self.config.durability == "scratch" or keep is not None):
            raise ConfigError(
                "name a directory: without one, snapshot() only commits, which durability='scratch' rules out"
            )
        place = None if directory is None else check_directory(directory)
        with self._alone("snapshot"):
            self._manager.check()
            self._checkpointer.check_started()
            self._checkpointer.snapshot(place, self.param_groups, self.extra if extra is None else extra, keep)

    def restore(self, directory: str | os.PathLike[str] | None = None) -> Any:
        """Go back to the store's last commit or, with a ``directory``, to the snapshot there. Returns its ``extra``.

        Every byte of it that has a checksum is read and checked first.

        State and options of the param groups are as they were, bit for bit, and so are the weights where the commit
        holds them (``persist_params``); else they must be set to those of the same step. What came after the commit is
        discarded. A learning rate scheduler is not part of it.

        Raises:
            StoreError: There is no commit or snapshot, or it is damaged; the message says what and where.
            ConfigError: It is not of this optimizer or of these parameters. In both cases nothing is changed.
            OSError: Bytes are not those that were written, or cannot be read: nothing is changed. Or a transfer failed
                later on (a StoreError where there is no room for copies of a snapshot's files): the optimizer cannot be
                used before another ``restore()``.
        """
        self._check_usable("restore")
        place = None if directory is None else check_directory(directory)
        with self._alone("restore"):
            self.extra = self._checkpointer.restore(place, self.param_groups)
            self._checkpointer.remove_remains()
        return self.extra

    def export_safetensors(self, file: str | os.PathLike[str]) -> None:
        """Write all state to one safetensors file that other tools read: tensors are named "parameter.state".

        What is not a tensor, and the options of the param groups, is in the file's metadata, as JSON. Nothing of it is
        held in memory whole.

        Raises:
            StoreError: There is no space for it. OSError: writing failed.
        """
        path = check_directory(file)
        with self._alone("export_safetensors"):
            self._manager.check()
            export_state(path, self._pager, self._manager, self._inner.name, self.param_groups)

    def synchronize(self) -> None:
        """Wait for all that is under way: writes, and the commit where every step has one.

        Raises OSError where a transfer failed.
        """
        with self._alone("synchronize"):
            self._manager.synchronize()

    def close(self) -> None:
        """Finish what is under way, free the memory and let go of the folder. The optimizer cannot be used any more.

        The wrapped optimizer has no state then: to go on with it, load the ``state_dict()`` from before into it. Raises
        OSError where a transfer of the last step failed, after everything has been let go of.
        """
        if not self._shut_down.alive:
            return
        with self._pager.alone("close()"):
            try:
                if not self._manager.has_failed:
                    self._manager.synchronize()
            finally:
                self._shut_down()

    def __enter__(self) -> OffloadOptimizer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"OffloadOptimizer({self.config.path!r}, {self._inner.optimizer!r})"

    def _check_space(
        self,
        folders: Sequence[Path],
        plans: Sequence[ParameterPlan],
        groups: Sequence[dict[str, Any]],
        stay: Collection[Path] = (),
    ) -> None:
        weights = weight_bytes(groups) if self.config.holds_weights else 0
        slots = 1 if self.config.durability == "scratch" else 2
        check_space(folders, slots * (state_bytes(plans) + weights), stay)

    @contextlib.contextmanager
    def _alone(self, call: str) -> Iterator[None]:
        """``call`` is under way: no other may begin before it has ended, and none where the optimizer is not open."""
        self._check_usable(call)
        with self._pager.alone(f"{call}()"):
            yield

    def _check_usable(self, call: str) -> None:
        self._pager.check_alone(f"{call}()")
        self._check_open()

    def _check_open(self) -> None:
        if not self._shut_down.alive:
            raise OffloadError("this OffloadOptimizer is closed")
        if not isinstance(self.state, PagedState):
            raise OffloadError("the optimizer's state attribute was replaced; change the state with load_state_dict()")
        if os.getpid() != self._pid:
            raise OffloadError(
                "this OffloadOptimizer was made before fork(), in the parent process, and works only there"
            )
        inner = self._inner.optimizer
        if inner.state or inner.param_groups is not self.param_groups:
            raise OffloadError(
                "the wrapped optimizer was stepped or loaded by itself, or its groups were replaced: use the "
                "OffloadOptimizer's step() and load_state_dict() instead"
            )


def _check_optimizer(optimizer: torch.optim.Optimizer) -> InnerOptimizer:
    if isinstance(optimizer, OffloadOptimizer) or optimizer in _wrapped:
        raise ConfigError("the optimizer is wrapped already: wrap it once, or close() the other OffloadOptimizer")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise UnsupportedOptimizerError(
            "differentiable=True keeps every step in the autograd graph, which cannot be paged"
        )
    return InnerOptimizer(optimizer)


def _plan_trainable(inner: InnerOptimizer, config: OffloadConfig) -> list[ParameterPlan]:
    """Plans for all parameters that may get a gradient, to see beforehand whether everything fits."""
    groups = inner.optimizer.param_groups
    keys = [key for key, parameter in parameters_of(groups).items() if parameter.requires_grad]
    plans = plan_parameters(inner, groups, keys, config)
    check_state_names(plans, config)
    return plans


def _rank_and_world_size() -> tuple[int, int]:
    """Of the process group or, before there is one, of the environment that torchrun sets up."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _shut_down(
    pid: int, inner: torch.optim.Optimizer, manager: SwapManager, handle: AioHandle, store: SwapStore
) -> None:
    """Runs at close(), garbage collection or interpreter exit; not in a forked child: what is open is the parent's."""
    if os.getpid() != pid:
        return
    _wrapped.discard(inner)
    with contextlib.ExitStack() as stack:  # each, whatever becomes of the others
        stack.callback(store.close)
        stack.callback(handle.close)
        stack.callback(manager.close)
