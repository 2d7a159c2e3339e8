"""Where a row is kept between its visits, and how many CTAs share it: arithmetic, with its reasons. Knows no torch.

A cluster that keeps its row on the chip reads each logit once. It should leave room for a second one on the same
multiprocessors, so that one loads while the other computes: that decides between the places and sizes below.
docs/cuda.md has the result for each GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

# csrc/cuda/on_chip.cuh.
NOTHING, SHARED, REGISTERS = 0, 1, 2
KEPT = {NOTHING: "nothing", SHARED: "shared memory", REGISTERS: "shared memory and registers"}
THREADS = {NOTHING: 320, SHARED: 320, REGISTERS: 192}
# Vectors of the teacher that a thread keeps in registers, by the columns of a group.
VECTORS_IN_REGISTERS = {4: 25, 8: 24}
VECTOR_BYTES = 16
# csrc/cuda/merge.cuh: partial rows of 32 warps and of 16 CTAs.
SCRATCH_BYTES = (32 + 16) * 32
# The smallest cluster that will do: a barrier of fewer CTAs, and more rows side by side. More than 8 CTAs are not
# granted everywhere. A side in registers comes last, because there the registers leave room for 12 warps only.
PREFERENCES = [*((SHARED, cluster) for cluster in (1, 2, 4, 8, 16)), (REGISTERS, 8), (REGISTERS, 16)]
# A CTA of a split row should have a few columns per thread.
LEAST_COLUMNS = 4096


@dataclass(frozen=True)
class Device:
    """A GPU, as far as the choice depends on it.

    Sizes of shared memory are in bytes; ``shared_reserved`` is what a CTA costs on top.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    threads_per_block: int
    largest_cluster: int
    shared_per_block: int
    shared_per_multiprocessor: int
    shared_reserved: int = 1024


@dataclass(frozen=True)
class Row:
    """A row of both sides: its columns, and the bytes of a logit."""

    vocab_size: int
    student_bytes: int
    teacher_bytes: int

    @property
    def group_columns(self) -> int:
        """Columns that are moved together: 16 bytes of the narrower side."""
        return VECTOR_BYTES // min(self.student_bytes, self.teacher_bytes)

    def groups(self, cluster: int) -> int:
        """The most groups that any CTA of a cluster holds."""
        return -(-(self.vocab_size // self.group_columns) // cluster)


@dataclass(frozen=True)
class Plan:
    """How a row is kept and shared out: ``kept`` where, by ``cluster`` CTAs of ``threads`` threads each."""

    kept: int
    cluster: int
    threads: int

    @property
    def arguments(self) -> tuple[int, int, int]:
        """The plan as the extension takes it."""
        return self.kept, self.cluster, self.threads

    def shared_bytes(self, row: Row) -> int:
        """The shared memory of one CTA that keeps its part of a row (not NOTHING)."""
        sides = row.student_bytes + (row.teacher_bytes if self.kept == SHARED else 0)
        return SCRATCH_BYTES + row.groups(self.cluster) * row.group_columns * sides

    def holds(self, row: Row) -> bool:
        """Whether the teacher's part finds room in the threads' registers, where it has to."""
        if self.kept != REGISTERS:
            return True
        vectors = row.group_columns * row.teacher_bytes // VECTOR_BYTES
        return row.groups(self.cluster) <= VECTORS_IN_REGISTERS[row.group_columns] // vectors * self.threads

    def per_multiprocessor(self, row: Row, device: Device) -> int:
        """CTAs that share a multiprocessor, 0 where the row does not fit. Registers allow two: __launch_bounds__."""
        shared = self.shared_bytes(row)
        if self.cluster > device.largest_cluster or shared > device.shared_per_block or not self.holds(row):
            return 0
        return min(2, device.shared_per_multiprocessor // (shared + device.shared_reserved))


def resident(row: Row, device: Device) -> Plan | None:
    """The plan that keeps a row: the first of ``PREFERENCES`` of which two share a multiprocessor, else the first that
    fits, or None."""
    if device.capability < (9, 0) or max(row.student_bytes, row.teacher_bytes) > 4:
        return None
    plans = [Plan(kept, cluster, threads(kept, device)) for kept, cluster in PREFERENCES]
    fitting = [plan for plan in plans if plan.per_multiprocessor(row, device) >= 1]
    return next((plan for plan in fitting if plan.per_multiprocessor(row, device) >= 2), next(iter(fitting), None))


def streaming(n: int, vocab_size: int, device: Device) -> Plan:
    """The plan for rows that no cluster keeps, and for one visit: a CTA per row, and a cluster where rows are few."""
    cluster = 1
    while (
        2 * cluster <= min(8, device.largest_cluster)
        and 2 * cluster * n <= device.multiprocessors
        and 2 * cluster * LEAST_COLUMNS <= vocab_size
    ):
        cluster *= 2
    return Plan(NOTHING, cluster, threads(NOTHING, device))


def threads(kept: int, device: Device) -> int:
    """The threads of a CTA."""
    return min(THREADS[kept], device.threads_per_block)
