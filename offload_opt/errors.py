"""The package's own errors and warnings. I/O failures are plain ``OSError`` with errno and path."""

from __future__ import annotations


class OffloadError(RuntimeError):
    """Base of the package's own errors."""


class ConfigError(OffloadError, ValueError):
    """A setting, path or argument that cannot work. Raised before anything is touched."""


class UnsupportedOptimizerError(OffloadError, TypeError):
    """An optimizer, parameter or optimizer option whose state cannot be paged. The message gives the reason."""


class StoreError(OffloadError):
    """A store that cannot be used: another process or optimizer owns it, or the disk is full."""


class StepFailedError(OffloadError):
    """An earlier error, of a transfer or an update, left the state on disk incomplete.

    The message says how to go on; the cause is chained.
    """


class OffloadWarning(UserWarning):
    """Something works, but not as well as it could: memory that could not be locked, for example."""
