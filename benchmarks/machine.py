"""Describes the machine that a figure was taken on, and imitates one without AVX-512 on one that has it."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import eopd_kernels
from eopd_kernels.backends import cpu

from .measure import THREADS

# All of these are read when a process starts, or at the first product.
ENVIRONMENTS = {
    "avx2": {
        "EOPD_CPU_CAPABILITY": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
}
LOAD = Path("/proc/loadavg")
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def imitate(capability: str, module: str) -> None:
    """Runs ``python -m module`` once more, in the environment of this capability, and exits as it does; in that
    environment it does nothing.

    torch.compile gets an empty cache there: from its usual one it takes kernels that were compiled for other vectors,
    and what they compute is wrong (torch 2.13).
    """
    environment = {**os.environ, **ENVIRONMENTS[capability]}
    if environment == dict(os.environ):
        return
    with tempfile.TemporaryDirectory(prefix=f"torch-compile-{capability}-") as cache:
        environment["TORCHINDUCTOR_CACHE_DIR"] = cache
        raise SystemExit(subprocess.run([sys.executable, "-m", module, *sys.argv[1:]], env=environment).returncode)


def command(module: str, without: Sequence[str] = ()) -> str:
    """Returns what to type to repeat the run, without where its measurements were kept, which says nothing to others.

    Args:
        without: further options, each with a value, to leave out.
    """
    words = sys.argv[1:]
    for option in ("--json", "--out", *without):
        while option in words:
            at = words.index(option)
            del words[at : at + 2]
    return shlex.join(["python", "-m", module, *words])


def others_running() -> float:
    """Counts the threads that run or wait for a core beside this one, over a second, or in the last minute where the
    system does not tell: its load average, which remembers what ran before."""
    if not LOAD.exists():
        return os.getloadavg()[0]
    counts = []
    for _ in range(20):
        counts.append(int(LOAD.read_text().split()[3].partition("/")[0]) - 1)
        time.sleep(0.05)
    return sum(counts) / len(counts)


def description(module: str, capability: str | None, others: float, device: str = "cpu") -> dict[str, str]:
    """Lists what one needs to compare a figure with one's own; ``others``: threads that ran before the run began."""
    reason = cpu.unavailable()
    ours = cpu.description() if reason is None else f"plain-torch backend, {reason}"
    described = {
        "command": f"`{command(module)}`",
        "date": datetime.date.today().isoformat(),
        "CPU": f"{cpu_model()}, {os.cpu_count()} cores ({', '.join(instruction_sets())})",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "threads": f"{THREADS}, OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}; {others:.1f} of others before the run"
        f"{': the machine was busy' * (others > (os.cpu_count() or 1) / 4)}",
        "torch": f"{torch.__version__}, kernels for {torch.backends.cpu.get_cpu_capability()}",
        "eopd_kernels": f"{eopd_kernels.__version__}, {ours}",
        "system": system(),
    }
    if device == "cuda":
        described |= gpu_facts()
    if capability is not None:
        described["restricted by"] = ", ".join(f"`{k}={v}`" for k, v in ENVIRONMENTS[capability].items())
    return described


def gpu_facts() -> dict[str, str]:
    """Describes the current GPU and the software that runs on it."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "not installed"
    facts = {"torch": str(torch.__version__), "Triton": triton, "system": system()}
    if not torch.cuda.is_available():
        return {"GPU": "none: a CPU stood in for it, no figure here means anything", **facts}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    memory, multiprocessors = properties.total_memory / 2**30, properties.multi_processor_count
    return {
        "GPU": f"{properties.name}, {memory:.0f} GiB, {multiprocessors} multiprocessors",
        "runtime": f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}",
        **facts,
    }


def system() -> str:
    return f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"


def available_memory() -> int:
    """Returns the bytes that processes can still take, or all there are where the system does not tell."""
    path = Path("/proc/meminfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cpu_model() -> str:
    """Returns the processor's name as the system gives it."""
    return next(iter(cpuinfo("model name")), platform.processor() or platform.machine())


def instruction_sets() -> list[str]:
    flags = next(iter(cpuinfo("flags")), "").split()
    return [name for name in INSTRUCTION_SETS if name in flags]


def cpuinfo(field: str) -> list[str]:
    """Returns the values of a field of /proc/cpuinfo, one per core; none where there is no such file."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field]
