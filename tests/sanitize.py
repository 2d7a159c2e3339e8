"""``python -m tests.sanitize``, or ``make sanitize``: the emulated CUDA kernels under ASan and UBSan.

Tensors and each CTA's shared memory are heap blocks of exactly their size. First the suite, which must be clean; then
kernels that are broken on purpose, which must not be.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from eopd_kernels.testing import emulation

ROOT = emulation.ROOT
SUITE = [
    "tests/backends/test_cuda_rows.py",
    *(f"tests/test_{room}.py" for room in "rows rows_mixture oracle function".split()),
]
# What is broken, the file of csrc/cuda, what it says and what it says then.
SHAPE = "task.plan.threads, bytes"
BROKEN = [
    ("16 bytes of shared memory too few", "launchers.cuh", f"{SHAPE}}}", f"{SHAPE} - 16}}"),
    (
        "one column beyond the row",
        "row.cuh",
        "= of.columns - all_groups * columns;",
        "= of.columns - all_groups * columns + 1;",
    ),
]


def run(module: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """The tests on a module. ASan has to be the first library of the process, and Python leaks."""
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = os.environ | {
        emulation.VARIABLE: str(module),
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-s", "-p", "no:cacheprovider", "-k", "cuda", *tests]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def main() -> int:
    healthy = run(emulation.build(flags=emulation.SANITIZERS), *SUITE)
    print(healthy.stdout[-3000:] + healthy.stderr[-6000:])
    if healthy.returncode != 0:
        return 1
    for name, file, original, broken in BROKEN:
        text = (ROOT / "csrc" / "cuda" / file).read_text()
        if text.count(original) != 1:
            raise ValueError(f"{name}: {original!r} occurs {text.count(original)} times in {file}")
        with tempfile.TemporaryDirectory() as folder:
            module = emulation.variant(Path(folder), file, text.replace(original, broken), emulation.SANITIZERS)
        found = (
            "AddressSanitizer: heap-buffer-overflow"
            in run(module, "tests/test_rows.py::test_a_row_of_weight_zero_is_not_read").stderr
        )
        print(f"{'noticed' if found else 'NOT NOTICED'}: {name}")
        if not found:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
