"""The CUDA kernels without torch: every place that a row is kept in and every cluster size, in place and not.

    python tests/gpu/driver.py              # the gradient against fp64
    python tests/gpu/driver.py racecheck    # the same under compute-sanitizer, by one of its tools

The module and its plans are loaded by their paths: the package would bring torch, whose kernels a sanitizer would look
at too. The arrays are cupy's or, where EOPD_CUDA_EMULATION names a module for a CPU, numpy's.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

PACKAGE = Path(__file__).resolve().parents[2] / "eopd_kernels"
EMULATION = os.environ.get("EOPD_CUDA_EMULATION")
SANITIZER = "compute-sanitizer"
MISSING = 77  # of eopd_kernels/testing/steps.py
FLOAT32, BFLOAT16 = 0, 1  # dtype codes
# Rows that begin anywhere, and rows that begin aligned. An emulated device has little shared memory.
COLUMNS = (301, 1003, 2048) if EMULATION else (5003, 33_000)
# Logits, gradient, and whether the gradient overwrites the student.
CALLS = [(FLOAT32, FLOAT32, True), (FLOAT32, BFLOAT16, False), (BFLOAT16, BFLOAT16, True), (BFLOAT16, FLOAT32, False)]
WEIGHTS = np.array([0.3, 0.0, -1.2], np.float32)
THRESHOLD, COMBINE, TRANSFORMS = 3.0, [1.0, 0.0, 0.0, 0.7], [1.0, 0.0, 1.0] * 2


def loaded(name: str, path: Path) -> ModuleType:
    """Imports a file by itself."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Arrays:
    """Memory for the kernels, in numpy or in cupy, where an array is an allocation of exactly its size."""

    def __init__(self, xp: Any) -> None:
        self.xp = xp
        if xp is not np:
            xp.cuda.set_allocator(None)

    def of(self, values: np.ndarray, dtype: int = FLOAT32) -> Any:
        return self.xp.asarray(values if dtype == FLOAT32 else rounded(values))

    def host(self, array: Any) -> np.ndarray:
        values = array if self.xp is np else self.xp.asnumpy(array)
        return values if values.dtype == np.float32 else (values.astype(np.uint32) << 16).view(np.float32)

    def at(self, array: Any) -> int:
        return array.ctypes.data if self.xp is np else array.data.ptr

    def matrix(self, array: Any) -> tuple[int, int, int]:
        """Address, dtype code and row stride."""
        return self.at(array), FLOAT32 if array.dtype == np.float32 else BFLOAT16, array.shape[1]


def rounded(values: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def places(plans: ModuleType, device: Any, columns: int, bytes_per_logit: int) -> Iterator[Any]:
    """The plans that hold such a row on the device, and those that keep nothing."""
    row = plans.Row(columns, bytes_per_logit, bytes_per_logit)
    wanted = [*((plans.NOTHING, cluster) for cluster in (1, 2, 4, 8)), *plans.PREFERENCES]
    for kept, cluster in wanted:
        plan = plans.Plan(kept, cluster, plans.threads(kept, device))
        fits = kept == plans.NOTHING or (device.capability >= (9, 0) and plan.per_multiprocessor(row, device) > 0)
        if fits and cluster <= device.largest_cluster:
            yield plan


def exact(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """The gradient in fp64."""
    log_p, log_q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (student.astype(float), teacher.astype(float)))
    p, q = np.exp(log_p), np.exp(log_q)
    gate = -(q * log_q).sum(1) > THRESHOLD
    reverse, forward = (WEIGHTS * c for c in (COMBINE[0], COMBINE[3] * gate))
    a = forward - reverse * (p * (log_p - log_q)).sum(1)
    return p * (a[:, None] + reverse[:, None] * (log_p - log_q)) - forward[:, None] * q


def call(kernels: ModuleType, arrays: Arrays, plan: Any, columns: int, logits: int, out: int, in_place: bool) -> float:
    """Calls all five functions; returns how far the gradient of the third is off, of its largest entry."""
    rows, generator = len(WEIGHTS), np.random.default_rng(columns)
    shared = np.array([[0.5], [2.0], [6.0]]) * generator.standard_normal((rows, columns))
    values = [shared, shared + generator.standard_normal((rows, columns))]
    student, teacher = (arrays.of(side.astype(np.float32), logits) for side in values)
    truth = exact(arrays.host(student), arrays.host(teacher))
    gradient = student if in_place else arrays.xp.empty((rows, columns), np.float32 if out == FLOAT32 else np.uint16)
    statistics, single = (arrays.of(np.zeros((rows, 8), np.float32)) for _ in range(2))
    mixture, per_row = arrays.of(np.zeros((rows, 4), np.float32)), arrays.of(WEIGHTS)
    gate, loss = (arrays.of(np.zeros(rows, np.float32)) for _ in range(2))
    weights = arrays.at(per_row)
    matrices = tuple(map(arrays.matrix, (student, teacher, gradient)))
    task = (matrices, (rows, columns), TRANSFORMS, plan.arguments, (0, 0))
    streamed = (matrices, (rows, columns), TRANSFORMS, (0, *plan.arguments[1:]), (0, 0))
    skews, coefficients = [0.3, 0.1], [weights] * 3
    kernels.row_statistics(streamed, arrays.at(single))
    kernels.row_mixture(streamed, arrays.at(single), skews, arrays.at(mixture))
    written = [arrays.at(array) for array in (statistics, gate, loss)]
    kernels.row_loss_and_gradient(task, weights, THRESHOLD, COMBINE, *written)
    found = arrays.host(gradient).copy()
    kernels.row_gradient(streamed, arrays.at(single), *coefficients)
    kernels.row_mixture_gradient(streamed, arrays.at(single), *coefficients, skews)
    assert np.isfinite(arrays.host(gradient)).all() and np.array_equal(arrays.host(per_row), WEIGHTS)
    assert np.array_equal(arrays.host(loss) > 0, WEIGHTS != 0)
    return float(np.abs(found - truth).max() / np.abs(truth).max())


def sanitize(tool: str) -> int:
    """Starts over under compute-sanitizer, whose status says whether it has found an error."""
    for name, there in ((SANITIZER, shutil.which(SANITIZER)), ("cupy", importlib.util.find_spec("cupy"))):
        if not there:
            print(f"not installed: {name}")
            return MISSING
    os.execvp(SANITIZER, [SANITIZER, "--error-exitcode", "1", "--tool", tool, sys.executable, __file__])


def main() -> int:
    try:
        arrays = Arrays(np if EMULATION else importlib.import_module("cupy"))
    except ImportError as why:
        print(f"no arrays on a GPU: {why}")
        return MISSING
    plans = loaded("plan", PACKAGE / "backends" / "cuda" / "plan.py")
    built = [path for suffix in EXTENSION_SUFFIXES if (path := PACKAGE / f"_cuda{suffix}").exists()]
    kernels = loaded("_cuda", Path(EMULATION) if EMULATION else built[0])
    device = plans.Device(**kernels.properties(0))
    called, wrong = set(), []
    for columns in COLUMNS:
        for logits, out, in_place in CALLS:
            for plan in places(plans, device, columns, 4 if logits == FLOAT32 else 2):
                error = call(kernels, arrays, plan, columns, logits, out, in_place)
                called.add((plan.kept, plan.cluster))
                if not error < (1e-4 if out == FLOAT32 else 2**-8):
                    wrong.append(f"{plan}, {columns} columns, {logits} to {out}: off by {error:.1e}")
    left_out = [place for place in plans.PREFERENCES if place not in called and place[1] <= device.largest_cluster]
    wrong += [f"nothing was kept by {place}" for place in left_out]
    print("\n".join([*wrong, f"{len(called)} places and cluster sizes, {len(wrong)} wrong, on {device.name}"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(sanitize(sys.argv[1]) if len(sys.argv) > 1 else main())
