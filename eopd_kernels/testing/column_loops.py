"""Counts what a column costs a CUDA kernel: the instructions of the usual way round its loops over columns.

A way is usual that copies groups of 16 bytes whole and takes as many exponentials as there are logits: it passes by
softcaps, misaligned rows, centres that move and groups that are done again. Of such ways the shortest is counted, with
instructions whose predicate is off, which take their turn too.
"""

from __future__ import annotations

import heapq

from .control_flow import Instruction, successors

EXPONENTIAL, COPY, STORE = "MUFU.EX2", "LDGSTS.E.BYPASS.128", "STG"


def per_column(instructions: list[Instruction], columns: int, gradient: str) -> tuple[float, float] | None:
    """Returns the instructions per column of the visit for sums and of the one for the gradient, of a kernel that keeps
    float32 rows of both sides in shared memory in groups of ``columns``; ``gradient`` is how the store of a group ends.
    """
    counted = {EXPONENTIAL: 2 * columns, COPY: 2, STORE: 0}
    sums = shortest_way(instructions, counted)
    stores = {EXPONENTIAL: 2 * columns, COPY: 0, STORE: 1}
    write = shortest_way(instructions, stores, gradient)
    return None if sums is None or write is None else (sums / columns, write / columns)


def shortest_way(code: list[Instruction], counted: dict[str, int], ending: str = "", most: int = 600) -> int | None:
    """Returns the length of the shortest cycle with exactly so many instructions of each name, stores ending so."""
    following = successors(code)
    names = list(counted)
    wanted = tuple(counted.values())
    passes = [tuple(name.startswith(one) for one in names) for _, name, *_ in code]
    barred = {i for i, (_, name, *_) in enumerate(code) if name.startswith(STORE) and not name.endswith(ending)}
    lengths = []
    for head in sorted({to for i, ends in enumerate(following) for to in ends if i - to > 2 * sum(wanted)}):
        seen: set[tuple[int, tuple[int, ...]]] = set()
        queue = [(0, head, (0,) * len(names))]
        while queue:
            length, i, passed = heapq.heappop(queue)
            if length and (i, passed) == (head, wanted):
                lengths.append(length)
                break
            if (i, passed) in seen or length > most or i in barred or (length and i == head):
                continue
            seen.add((i, passed))
            now = tuple(a + b for a, b in zip(passed, passes[i], strict=True))
            if all(a <= b for a, b in zip(now, wanted, strict=True)):
                for to in following[i]:
                    heapq.heappush(queue, (length + 1, to, now))
    return min(lengths, default=None)
