"""host_memory bounds what the optimizer state takes: the benchmark of it, at a smaller size."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import scripts

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(benchmark: str, folder: Path, *options: str) -> Any:
    """What a benchmark measured."""
    command = [sys.executable, BENCHMARKS / benchmark, folder, *options, "--no-save"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_peak_memory_stays_within_host_memory_and_32_mib(tmp_path: Path) -> None:
    growth = run("memory.py", tmp_path, "--state", "256MiB", "--host-memory", "32MiB")["growth_bytes"]
    assert growth["offloaded"] <= (32 + 32) << 20
    assert growth["memory"] > 256 << 20, "the run in memory is to show that the measurement sees the state"


def test_saving_and_loading_take_hardly_any_memory(tmp_path: Path) -> None:
    peak = run("store.py", tmp_path, "--only", "memory", "--saved", "256MiB")["memory"]
    assert peak["save"] <= 64 << 20
    assert peak["load"] <= 64 << 20
    assert peak["hold"] > 256 << 20, "the run that holds the state is to show that the measurement sees it"


OWN_MALLOC = platform.libc_ver()[0] != "glibc" or platform.machine() == "aarch64"  # torch brings mimalloc there


@pytest.mark.skipif(OWN_MALLOC, reason="other allocators are left to themselves")
def test_temporary_tensors_use_memory_again(tmp_path: Path) -> None:
    """glibc mapped them, or gave their pages back when they were freed: 31,744 faults in each of these steps."""
    code = """
        import ctypes, mmap, resource, sys
        import torch, offload_opt
        ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a fault is one page
        torch.set_num_threads(2)
        parameters = [torch.nn.Parameter(torch.zeros(1 << 20)) for _ in range(16)]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        adamw = torch.optim.AdamW(parameters, fused=False)
        with offload_opt.OffloadOptimizer(adamw, sys.argv[1], host_memory="1GiB") as optimizer:
            for _ in range(2):
                optimizer.step()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(4):
                optimizer.step()
            print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * mmap.PAGESIZE)
    """
    faulted = int(scripts.run_well(code, tmp_path).stdout)
    temporaries = 2 * (16 << 20) * 4  # bytes in a step: AdamW has two for each parameter
    assert faulted < temporaries, "less in four steps than in one"


def test_copies_of_gradients_are_not_made_ahead(tmp_path: Path) -> None:
    """Units are prepared several at a time: but what is laid out otherwise than its parameter is copied for that."""
    code = """
        import re, sys
        import torch, offload_opt
        def status(name):
            return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
        parameters = [torch.nn.Parameter(torch.zeros(1024, 1026, dtype=torch.bfloat16)) for _ in range(32)]
        for parameter in parameters:
            parameter.grad = torch.ones(1026, 1024, dtype=torch.bfloat16).t()
        fields = {"host_memory": "256MiB", "unit_size": "5MiB", "state_dtype": "int8", "master_weights": True}
        adamw = torch.optim.AdamW(parameters, fused=True)
        with offload_opt.OffloadOptimizer(adamw, sys.argv[1], **fields) as optimizer:
            for _ in range(2):
                optimizer.step()
            offload_opt.aio.trim_heap()  # of what the first steps have freed
            before = status("VmRSS")
            open("/proc/self/clear_refs", "w").write("5")
            optimizer.step()
            print(status("VmHWM") - before)
    """
    grown = int(scripts.run_well(code, tmp_path).stdout)
    assert grown < 12 << 10, "KiB; the copies of 16 units are 32 MiB"


INFO = """
import ctypes
class Info(ctypes.Structure):  # mallinfo(3)
    _fields_ = [(name, ctypes.c_int) for name in "arena ordblks smblks hblks hblkhd a b c d e".split()]
libc = ctypes.CDLL(None)
libc.mallinfo.restype = Info
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
def maps(size):
    mapped = libc.mallinfo().hblks
    assert libc.malloc(size)
    return libc.mallinfo().hblks > mapped
"""


@pytest.mark.skipif(OWN_MALLOC, reason="other allocators are left to themselves")
@pytest.mark.parametrize("fused", [True, False])
def test_the_heap_is_settled_for_temporaries_only(tmp_path: Path, fused: bool) -> None:
    """What is no longer mapped breaks up the heap: a model's gradients took 170 MiB more, for nothing where fused."""
    code = """
        import sys
        import torch, offload_opt
        exec(sys.argv[1])
        print(maps(6 << 20))
        parameter = torch.nn.Parameter(torch.zeros(1 << 10))
        parameter.grad = torch.ones_like(parameter)
        adamw = torch.optim.AdamW([parameter], fused=sys.argv[3] == "True")
        with offload_opt.OffloadOptimizer(adamw, sys.argv[2], host_memory="1MiB") as optimizer:
            optimizer.step()
        print(maps(6 << 20))
    """
    before, after = scripts.run_well(code, INFO, tmp_path, fused).stdout.split()
    assert after == (before if fused else "False")


@pytest.mark.skipif(OWN_MALLOC, reason="other allocators are left to themselves")
@pytest.mark.parametrize("size", [32 << 20, 1 << 30])
def test_a_heap_can_be_settled_for_as_much_as_glibc_lets_it_keep(size: int) -> None:
    """A freed block above 32 MiB has no effect at all: machines with 64 threads asked for such ones."""
    code = """
        import sys
        from offload_opt.aio import settle_heap
        exec(sys.argv[1])
        settle_heap(int(sys.argv[2]))
        print(maps(24 << 20))
    """
    assert scripts.run_well(code, INFO, size).stdout == "False\n"
