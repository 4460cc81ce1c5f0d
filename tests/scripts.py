"""Tests that need a process of their own."""

from __future__ import annotations

import subprocess
import sys
import textwrap

# Under `python -O` the package runs without its assertions; those of a test must hold all the same.
LOADER = "import sys; exec(compile(sys.argv.pop(1), '<script>', 'exec', optimize=0))"


def command(code: str, *arguments: object) -> list[str]:
    """What runs ``code`` in a Python of its own; ``sys.argv[1:]`` are the arguments there."""
    return [sys.executable, "-c", LOADER, textwrap.dedent(code), *map(str, arguments)]


def run(
    code: str, *arguments: object, timeout: float = 120, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``code``, however it ends. Raises ``TimeoutExpired`` after ``timeout`` seconds."""
    return subprocess.run(
        command(code, *arguments), capture_output=True, text=True, timeout=timeout, check=False, env=env
    )


def run_well(code: str, *arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run ``code``; it must end well, and in silence."""
    result = run(code, *arguments, timeout=timeout)
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stderr or result.stdout}"
    assert result.stderr == ""
    return result
