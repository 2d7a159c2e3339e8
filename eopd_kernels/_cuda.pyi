"""The CUDA kernels of csrc/cuda, as its bindings.cpp offers them: addresses and sizes in, results written there."""

from collections.abc import Sequence
from typing import TypedDict

Matrix = tuple[int, int, int]  # address, dtype code, row stride in elements
Plan = tuple[int, int, int, int]  # where a row is kept, CTAs of a cluster, threads of a CTA, most clusters
Task = tuple[
    tuple[Matrix, Matrix, Matrix],  # student, teacher, out
    Sequence[int],  # rows, columns
    Sequence[float],  # scale, softcap, temperature of the student, then of the teacher
    Plan,
    tuple[int, int],  # device, stream
]

class Properties(TypedDict):
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    threads_per_block: int
    largest_cluster: int
    shared_per_block: int
    shared_per_multiprocessor: int
    shared_reserved: int

def row_statistics(task: Task, statistics: int) -> None: ...
def row_gradient(task: Task, statistics: int, a: int, b: int, c: int) -> None: ...
def row_loss_and_gradient(
    task: Task, weights: int, gate_threshold: float, combine: Sequence[float], statistics: int, gate: int, loss: int
) -> None: ...
def row_mixture(task: Task, statistics: int, skews: Sequence[float], mixture: int) -> None: ...
def row_mixture_gradient(task: Task, statistics: int, a: int, b: int, c: int, skews: Sequence[float]) -> None: ...
def shared_bytes(student_dtype: int, teacher_dtype: int, columns: int, plan: Plan) -> int: ...
def device_count() -> int: ...
def properties(device: int) -> Properties: ...
