"""Formats the lines of the CSV as Markdown tables. A measurement that failed is a line that says why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .contenders import ALL_OURS, COMPILED, FLOOR, LIGER, NO_PEER, OURS, OURS_EXACT, PLAIN, PRODUCTS, TRL
from .matrix import GROWTH_TOKENS, LEVELS, TARGETS
from .measure import Sample, significant
from .page import markdown_table
from .records import Record
from .targets import bound_table, goals, ratio_table, rows

UNKNOWN = "not measured"
# Objectives whose gradient is that of another, though the loss is not.
NEAREST = {"soft cross-entropy": "forward"}
ERRORS = ("loss_error", "student_error", "weight_error")
FRONT = (PLAIN, COMPILED, TRL, LIGER, PRODUCTS)  # what a first reader wants to know of; docs/benchmarks.md has the rest


def target_tables(records: Sequence[Record], level: str) -> list[str]:
    """Formats the targets, and what bounds them."""
    made = rows(goals(LEVELS[level]), records)
    held, bounds = [r for r in made if r.target is not None], [r for r in made if r.target is None]
    parts = [ratio_table(held)] if held else [UNKNOWN]
    return [*parts, "What bounds them:", bound_table(bounds)] if bounds else parts


def case_table(records: Sequence[Record]) -> str:
    """Formats one case, each contender beside ours."""
    measured = ("time, median (min–max)", "of ours", "MiB beyond inputs and gradients", "of ours")
    header = ("what", "computes", *measured, "error of the loss", "of dX or dlogits", "of dW")
    return markdown_table(header, [cells(record, ours_beside(record, records)) for record in records])


def ours_beside(record: Record, records: Iterable[Record]) -> Record | None:
    """Finds ours of the same objective or gradient; where there is none, as for floors, the first of ours."""
    ours = [r for r in records if r.implementation in ALL_OURS or r.implementation.startswith(f"{OURS} ")]
    ran = {r.objective: r for r in reversed(ours) if not r.failure}
    return ran.get(NEAREST.get(record.objective, record.objective), next((r for r in ours if not r.failure), None))


def cells(record: Record, ours: Record | None) -> list[str]:
    name = f"{record.implementation} {record.version}".strip()
    if record.failure:
        return [name, record.objective, record.failure, *["–"] * 6]
    time, memory = record.time, record.memory
    return [
        name,
        record.objective,
        "–" if time is None else str(time),
        share(time, ours.time if ours else None),
        "–" if memory is None else f"{memory.median:,.0f}",
        share(memory, ours.memory if ours else None),
        *(error(getattr(record, field)) for field in ERRORS),
    ]


def share(value: Sample | None, of: Sample | None) -> str:
    """Formats how many times as much as ours it is, the median over the rounds."""
    if value is None or of is None or not of.median:
        return "–"
    return f"{significant((value / of).median)}x"


def error(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def growth_table(records: Sequence[Record], group: str) -> str:
    """Formats time and memory by size, a contender per line, and how much they grow from the first size to the last."""
    letter, field = ("N", "tokens") if group == GROWTH_TOKENS else ("V", "vocab")
    sizes = sorted({getattr(record, field) for record in records})
    lines = []
    for name in dict.fromkeys(record.implementation for record in records):
        found = {getattr(record, field): record for record in records if record.implementation == name}
        ran = [found[size] for size in sizes if size in found]
        grown = [growth([r.time for r in ran]), growth([r.memory for r in ran])]
        lines.append([name, *(growth_cell(found[size]) if size in found else "–" for size in sizes), *grown])
    return markdown_table(("what", *(f"{letter}={size:,}" for size in sizes), "time grows", "memory grows"), lines)


def growth(values: Sequence[Sample | None]) -> str:
    """Formats the growth from the first size to the last that was run."""
    known = [value.median for value in values if value is not None]
    return f"{significant(known[-1] / known[0])}x" if known and known[0] else "–"


def growth_cell(record: Record) -> str:
    if record.failure:
        return record.failure
    time, memory = record.time, record.memory
    spent = "–" if time is None else str(Sample((time.median,), "s"))
    return f"{spent}, {memory.median:,.0f} MiB" if memory is not None else spent


def main_case(records: Sequence[Record], level: str) -> list[Record]:
    """Returns the lines of the case with every peer."""
    tokens = LEVELS[level].main_tokens
    return [r for r in records if r.group == TARGETS and r.tokens == tokens and r.student_dim]


def front_table(mine: Sequence[Record]) -> str:
    """Formats one case for a front page. Where a peer is the better one, its figure is bold."""
    lines = []
    for record in sorted((r for r in mine if r.implementation in FRONT), key=lambda r: FRONT.index(r.implementation)):
        own = ours_beside(record, mine)
        if own is not None:
            memory = record.memory if record.objective != FLOOR else None
            times = ratio(record.time, own.time, "faster", "slower")
            figures = [times, ratio(memory, own.memory, "less", "more"), error_ratio(record, own)]
            name = f"{record.implementation} {record.version}".strip().replace(
                PRODUCTS, "the four products alone, no loss"
            )
            lines.append([name, *([record.failure, "–", "–"] if record.failure else figures)])
    header = ("beside", "ours is", "memory beyond inputs and gradients", "error of dW, theirs / ours")
    return markdown_table(header, lines) if lines else UNKNOWN


def ratio(theirs: Sample | None, ours: Sample | None, better: str, worse: str) -> str:
    if theirs is None or ours is None or not ours.median or not theirs.median:
        return "–"
    times = (theirs / ours).median
    return f"{significant(times)}x {better}" if times >= 1 else f"**{significant(1 / times)}x {worse}**"


def error_ratio(theirs: Record, ours: Record) -> str:
    if theirs.weight_error is None or not ours.weight_error:
        return "–"
    times = theirs.weight_error / ours.weight_error
    return significant(times) if times >= 1 else f"**{significant(times)}**"


def best_peer_table(records: Sequence[Record]) -> str:
    """Formats our errors beside the smallest of any peer with the same objective, in every case that has both."""
    lines, pairs = [], []
    for ours in records:
        peers = [
            r
            for r in records
            if (r.group, r.case, r.objective) == (ours.group, ours.case, ours.objective)
            and r.implementation not in NO_PEER
            and r.student_error is not None
        ]
        if peers and ours.implementation in OURS_EXACT and ours.student_error is not None and not ours.failure:
            kl = "–" if ours.divergence is None else f"{ours.divergence:.2e}"
            errors = [pair(ours, peers, field) for field in ERRORS]
            lines.append([ours.case, ours.implementation, kl, *errors])
            pairs += [cell for cell in errors if cell != "–"]
    smaller = sum("**" not in cell for cell in pairs)
    header = ("case", "what", "reverse KL, nats", "loss", "dX or dlogits", "dW")
    summary = (
        f"Ours is no larger than the smallest of the peers in {smaller} of {len(pairs)} (else the peer's is bold):"
    )
    return f"{summary}\n\n{markdown_table(header, lines)}" if lines else UNKNOWN


def pair(ours: Record, peers: Iterable[Record], field: str) -> str:
    """Formats our error, and the best peer's with its name; bold where the peer's is the smaller."""
    own = getattr(ours, field)
    known = [(value, r.implementation) for r in peers if (value := getattr(r, field)) is not None]
    if own is None or not known:
        return "–"
    theirs, name = min(known, key=lambda one: one[0])
    text = f"{error(theirs)} ({name})"
    return f"{error(own)}; {f'**{text}**' if theirs < own else text}"
