"""Keep a PyTorch model's optimizer state on NVMe: wrap the optimizer that you have.

>>> optimizer = offload_opt.OffloadOptimizer(torch.optim.AdamW(model.parameters()), "/mnt/nvme/run1")
"""

from importlib.metadata import version as _version

from .aio import AioHandle, IoFuture
from .config import AioConfig, OffloadConfig
from .errors import (
    ConfigError,
    OffloadError,
    OffloadWarning,
    StepFailedError,
    StoreError,
    UnsupportedOptimizerError,
)
from .optimizer import OffloadOptimizer
from .trace import SwapStats

__version__ = _version("offload_opt")

__all__ = [
    "AioConfig",
    "AioHandle",
    "ConfigError",
    "IoFuture",
    "OffloadConfig",
    "OffloadError",
    "OffloadOptimizer",
    "OffloadWarning",
    "StepFailedError",
    "StoreError",
    "SwapStats",
    "UnsupportedOptimizerError",
    "__version__",
]
