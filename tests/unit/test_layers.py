"""DESIGN.md section 2, "Who may know whom", read from the imports and includes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "offload_opt"

# From the bottom up. Within a layer, too, a module imports only those before it.
LAYERS = [
    ["errors", "config", "trace", "drives"],
    ["checksums", "reference", "codecs", "units", "coding", "planner", "inner", "adam"],
    ["aio", "heap", "buffers", "folders", "manifest", "unit_file", "snapshots", "state_file"],
    ["slots", "commit", "store", "bandwidth", "tuning"],
    ["swap_manager"],
    ["update", "parameters", "pager", "state_dict", "weights", "checkpoint", "optimizer"],
    ["distributed", "integrations"],
    [
        "doctor",
        "inspection",
        "verification",
        "screens",
        "arguments",
        "terminal",
        "model_sizes",
        "planning",
        "plan_command",
        "cli",
    ],
]
ORDER = [module for layer in LAYERS for module in layer]
# Importer and imported: for type annotations only.
TYPES_ONLY = {("buffers", "aio")}
# aio is the face of the native handle; codecs, checksums and adam are those of the native loops, which know no handle
# and no file.
IMPORTERS_OF_NATIVE = ("aio", "codecs", "checksums", "adam")


class Imports(ast.NodeVisitor):
    """The package's modules that a module imports anywhere in its text, and whether that is for type-checking only."""

    def __init__(self, module: str) -> None:
        self.found: list[tuple[str, bool]] = []
        self._parents = module.split(".")[:-1]
        self._types_only = False

    def visit_If(self, node: ast.If) -> None:
        outer = self._types_only
        name = node.test.attr if isinstance(node.test, ast.Attribute) else getattr(node.test, "id", None)
        self._types_only = outer or name == "TYPE_CHECKING"
        for child in node.body:
            self.visit(child)
        self._types_only = outer
        for child in node.orelse:
            self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            parts = alias.name.split(".")
            if parts[0] == PACKAGE:
                self._add(parts[1:])

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        parts = (node.module or "").split(".") if node.module else []
        if node.level:
            parts = self._parents[: len(self._parents) - (node.level - 1)] + parts
        elif parts[:1] == [PACKAGE]:
            parts = parts[1:]
        else:
            return
        if parts:
            self._add(parts)
        else:
            for alias in node.names:  # "from . import name": a module, or one of the package's public names
                self._add([alias.name] if alias.name in [*ORDER, "_C"] else [])

    def _add(self, parts: list[str]) -> None:
        self.found.append((parts[0] if parts else "__init__", self._types_only))


def import_violations(module: str, source: str) -> list[str]:
    """What a module, "store" or "integrations.lightning" for example, imports although it must not."""
    imports = Imports(module)
    imports.visit(ast.parse(source))
    own = module.split(".")[0]
    if own not in ORDER:
        return [f"{module} has no place in the layers"]
    violations = []
    for imported, types_only in imports.found:
        if imported == "_C":
            if own not in IMPORTERS_OF_NATIVE and not types_only:
                violations.append(f"{module} imports _C")
        elif imported not in ORDER:
            violations.append(f"{module} imports {imported}, which has no place in the layers")
        elif ORDER.index(imported) > ORDER.index(own) or (imported == own and "." not in module):
            violations.append(f"{module} imports {imported}, which is not below it")
        elif (own, imported) in TYPES_ONLY and not types_only:
            violations.append(f"{module} imports {imported} at run time")
    return violations


def init_violations(source: str) -> list[str]:
    """What ``__init__`` does besides re-exporting: anything but a docstring, imports and assignments to dunders."""
    violations = []
    for number, node in enumerate(ast.parse(source).body):
        is_docstring = number == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_dunder = isinstance(node, ast.Assign) and all(
            isinstance(target, ast.Name) and re.fullmatch("__[a-z]+__", target.id) for target in node.targets
        )
        if not (is_docstring or is_dunder or isinstance(node, (ast.Import, ast.ImportFrom))):
            violations.append(f"__init__ line {node.lineno}: {type(node).__name__}")
        if isinstance(node, ast.ImportFrom) and node.module == "_C":
            violations.append("__init__ imports _C")
    return violations


def includes(source: str) -> Iterator[tuple[str, bool]]:
    """(header, whether it is in quotes) of each include."""
    for match in re.finditer(r'^[ \t]*#[ \t]*include[ \t]*(?:<([^>]+)>|"([^"]+)")', source, re.MULTILINE):
        yield match[1] or match[2], match[2] is not None


def native_violations(file: str, source: str) -> list[str]:
    """What a file of csrc includes or mentions although it must not."""
    violations = []
    for header, is_own in includes(source):
        if file != "bindings.cpp" and (header.startswith("pybind11/") or header == "Python.h"):
            violations.append(f"{file} includes {header}")
        if file.startswith("engine_") and is_own:
            allowed = {"io_engine.h"} | ({"engine_fault.h"} if file == "engine_fault.cpp" else set())
            if header not in allowed:
                violations.append(f"{file} includes {header}")
    violations += [f"{file} mentions {word}" for word in ("torch", "cuda") if re.search(word, source, re.IGNORECASE)]
    return violations


def modules() -> dict[str, Path]:
    folder = ROOT / PACKAGE
    found = {".".join(file.relative_to(folder).with_suffix("").parts): file for file in folder.rglob("*.py")}
    return {name: file for name, file in found.items() if name != "__init__"}


def native_files() -> list[Path]:
    return sorted(file for file in (ROOT / "csrc").rglob("*") if file.is_file())


def test_modules_import_only_what_is_below_them() -> None:
    assert {"errors", "aio", "optimizer"} <= set(modules())
    assert [v for name, file in modules().items() for v in import_violations(name, file.read_text())] == []


def test_init_only_re_exports() -> None:
    assert init_violations((ROOT / PACKAGE / "__init__.py").read_text()) == []


def test_native_files_know_only_what_they_may() -> None:
    assert {"bindings.cpp", "engine_threads.cpp", "io_engine.h"} <= {file.name for file in native_files()}
    assert [v for file in native_files() for v in native_violations(file.name, file.read_text())] == []


# Each rule is able to fail.


WRONG_IMPORTS = [
    ("units", "from .store import SwapStore"),
    ("units", "from .inner import InnerOptimizer"),
    ("config", "from . import trace"),
    ("store", "import offload_opt.pager"),
    ("store", "from offload_opt.pager import ParameterPager"),
    ("store", "from offload_opt import optimizer"),
    ("store", "from offload_opt import OffloadOptimizer"),
    ("store", "from . import OffloadOptimizer"),
    ("store", "def f():\n    from .swap_manager import SwapManager"),
    ("store", "try:\n    import torch\nexcept ImportError:\n    from .pager import ParameterPager"),
    ("store", "if TYPE_CHECKING:\n    from .pager import ParameterPager"),
    ("store", "if TYPE_CHECKING:\n    pass\nelse:\n    from .pager import ParameterPager"),
    ("integrations.lightning", "from ..cli import main"),
    ("integrations.lightning", "from .. import OffloadOptimizer"),
    ("buffers", "from .aio import AioHandle"),
    ("store", "from . import _C"),
    ("units", "from . import _C"),
    ("store", "import offload_opt._C"),
    ("store", "from ._C import Handle"),
    ("store", "from offload_opt._C import Handle"),
    ("store", "if x:\n    from . import _C"),
    ("newcomer", ""),
    ("optimizer", "from .newcomer import x"),
]


def test_a_wrong_import_is_found() -> None:
    for module, source in WRONG_IMPORTS:
        assert len(import_violations(module, source)) == 1, (module, source)


RIGHT_IMPORTS = [
    ("units", "import torch\nfrom .config import format_bytes\nfrom .errors import ConfigError"),
    ("config", "from .errors import ConfigError"),
    ("buffers", "if TYPE_CHECKING:\n    from .aio import AioHandle"),
    ("buffers", "if typing.TYPE_CHECKING:\n    from .aio import AioHandle"),
    ("aio", "from . import _C"),
    ("codecs", "from . import _C"),
    ("store", "if TYPE_CHECKING:\n    from . import _C"),
    ("integrations.lightning", "from ..optimizer import OffloadOptimizer\nfrom .accelerate import x"),
    ("store", "import offload_optimal\nfrom offload_optimal.pager import x"),
]


def test_a_right_import_is_let_through() -> None:
    for module, source in RIGHT_IMPORTS:
        assert import_violations(module, source) == [], (module, source)


CODE_IN_INIT = [
    "def f(): ...",
    "class C: ...",
    '"""Docstring."""\nimport os\nos.environ["A"] = "B"',
    "debug = True",
    "if True:\n    from .aio import AioHandle",
    "print()",
    "from ._C import Handle",
]


def test_code_in_init_is_found() -> None:
    for source in CODE_IN_INIT:
        assert len(init_violations(source)) == 1, source


WRONG_INCLUDES = [
    ("aio_handle.cpp", "#include <pybind11/pybind11.h>"),
    ("aio_handle.h", "  #  include <Python.h>"),
    ("engine_threads.cpp", '#include "io_file.h"'),
    ("engine_threads.cpp", '#include "engine_fault.h"'),
    ("engine_fault.h", '#include "aio_handle.h"'),
    ("io_file.cpp", "// as torch does it"),
    ("bindings.cpp", "#include <cuda_runtime.h>"),
    ("CMakeLists.txt", "find_package(CUDAToolkit)"),
]


def test_a_wrong_include_is_found() -> None:
    for file, source in WRONG_INCLUDES:
        assert len(native_violations(file, source)) == 1, (file, source)


RIGHT_INCLUDES = [
    ("bindings.cpp", '#include <pybind11/stl.h>\n#include "aio_handle.h"'),
    ("engine_fault.cpp", '#include "engine_fault.h"\n#include "io_engine.h"\n#include <vector>'),
    ("aio_handle.cpp", '#include "block_pump.h"\n// no #include <Python.h> here'),
]


def test_a_right_include_is_let_through() -> None:
    for file, source in RIGHT_INCLUDES:
        assert native_violations(file, source) == [], (file, source)
