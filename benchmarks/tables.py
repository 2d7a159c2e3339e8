"""The lines of the CSV as Markdown. A measurement that failed is a line that says why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .implementations import ALL_OURS, FLOOR, NO_PEER, OURS_EXACT
from .matrix import GROWTH_TOKENS, GROWTH_VOCAB, LEVELS, TARGETS
from .measure import Sample, significant
from .records import Record
from .results import bound_table, markdown_table, ratio_table
from .targets import goals, objectives, rows

CASE_HEADER = (
    "what",
    "computes",
    "time, median (min–max)",
    "of ours",
    "MiB beyond inputs and gradients",
    "of ours",
    "error of the loss",
    "of dX or dlogits",
    "of dW",
)
# The front page shows the lines of the case with every peer.
FRONT_HEADER = ("against", "compared", "time", "memory beyond inputs and gradients", "error of dW, theirs / ours")
UNKNOWN = "not measured"
# Whose gradient is the same, though the loss is not.
NEAREST = {"soft cross-entropy": "forward"}


def target_tables(records: Sequence[Record], level: str) -> list[str]:
    """The targets, and what bounds them."""
    made = rows(goals(LEVELS[level]), records)
    held, bounds = [r for r in made if r.target is not None], [r for r in made if r.target is None]
    parts = [ratio_table(held)] if held else [UNKNOWN]
    return [*parts, "What bounds them:", bound_table(bounds)] if bounds else parts


def case_table(records: Sequence[Record]) -> str:
    """One case, each implementation beside ours."""
    return markdown_table(CASE_HEADER, [cells(record, ours_beside(record, records)) for record in records])


def ours_beside(record: Record, records: Iterable[Record]) -> Record | None:
    """Ours of the same objective or gradient in the case; where there is none, floors among them, the first of ours."""
    ran = {r.objective: r for r in records if r.implementation in ALL_OURS and not r.failure}
    return ran.get(NEAREST.get(record.objective, record.objective), next(iter(ran.values()), None))


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
        *map(error, (record.loss_error, record.student_error, record.weight_error)),
    ]


def share(value: Sample | None, of: Sample | None) -> str:
    """How many times as much as ours: the median over the rounds."""
    if value is None or of is None or not of.median:
        return "–"
    return f"{significant((value / of).median)}x"


def error(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def growth_table(records: Sequence[Record], group: str) -> str:
    """Time and memory by size, an implementation per line, and by how much they grow."""
    of_size = (lambda r: r.tokens) if group == GROWTH_TOKENS else (lambda r: r.vocab)
    mine = [r for r in records if r.group == group]
    sizes = sorted({of_size(r) for r in mine})
    lines = []
    for name in dict.fromkeys(r.implementation for r in mine):
        found = {of_size(r): r for r in mine if r.implementation == name}
        ran = [found[size] for size in sizes if size in found]
        grown = [growth([r.time for r in ran]), growth([r.memory for r in ran])]
        lines.append([name, *(growth_cell(found[size]) if size in found else "–" for size in sizes), *grown])
    letter = "N" if group == GROWTH_TOKENS else "V"
    return markdown_table(("what", *(f"{letter}={size:,}" for size in sizes), "time grows", "memory grows"), lines)


def growth(values: Sequence[Sample | None]) -> str:
    """From the first size to the last that was run."""
    known = [value.median for value in values if value is not None]
    return f"{significant(known[-1] / known[0])}x" if known and known[0] else "–"


def growth_cell(record: Record) -> str:
    if record.failure:
        return record.failure
    time, memory = record.time, record.memory
    spent = "–" if time is None else str(Sample((time.median,), "s"))
    return f"{spent}, {memory.median:,.0f} MiB" if memory is not None else spent


def main_case(records: Sequence[Record], level: str) -> list[Record]:
    """The case with every peer."""
    tokens = LEVELS[level].main_tokens
    return [r for r in records if r.group == TARGETS and r.tokens == tokens and r.student_dim]


def front_table(mine: Sequence[Record]) -> str:
    """One case for a front page. Where a peer is the better one, its figure is bold."""
    lines = []
    for record in mine:
        own = ours_beside(record, mine)
        if record.implementation in ALL_OURS or own is None:
            continue
        compared = objectives(own, record)
        if record.failure:
            lines.append([record.implementation, compared, record.failure, "–", "–"])
            continue
        lines.append(
            [
                record.implementation,
                compared,
                ratio(record.time, own.time, "faster", "slower"),
                ratio(record.memory, own.memory, "less", "more") if record.objective != FLOOR else "–",
                error_ratio(record, own),
            ]
        )
    return markdown_table(FRONT_HEADER, lines) if lines else UNKNOWN


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
    """The errors of ours beside the smallest of any peer with the same objective, in every case that has both."""
    lines, smaller, compared = [], 0, 0
    for ours in records:
        if ours.implementation not in OURS_EXACT or ours.student_error is None or ours.failure:
            continue
        peers = [
            r
            for r in records
            if (r.group, r.case, r.objective) == (ours.group, ours.case, ours.objective)
            and r.implementation not in NO_PEER
            and r.student_error is not None
        ]
        if peers:
            kl = "–" if ours.divergence is None else f"{ours.divergence:.2e}"
            errors = [pair(ours, peers, field) for field in ("loss_error", "student_error", "weight_error")]
            lines.append([ours.case, ours.implementation, kl, *errors])
            compared += sum(cell != "–" for cell in errors)
            smaller += sum(cell != "–" and "**" not in cell for cell in errors)
    header = ("case", "what", "reverse KL, nats", "loss", "dX or dlogits", "dW")
    summary = f"Ours is no larger than the smallest of the peers in {smaller} of {compared} (else the peer's is bold):"
    return f"{summary}\n\n{markdown_table(header, lines)}" if lines else UNKNOWN


def pair(ours: Record, peers: Iterable[Record], field: str) -> str:
    """Ours, and the best of the peers with its name; bold where the peer's is the smaller."""
    own = getattr(ours, field)
    known = [r for r in peers if getattr(r, field) is not None]
    if own is None or not known:
        return "–"
    best = min(known, key=lambda r: getattr(r, field))
    theirs = getattr(best, field)
    text = f"{error(theirs)} ({best.implementation})"
    return f"{error(own)}; {f'**{text}**' if theirs < own else text}"


def case_titles(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The lines of each case, in order, apart from the growth of cost, which has tables of its own."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if record.group not in (GROWTH_TOKENS, GROWTH_VOCAB):
            title = f"{record.case}, {record.scale}" if record.scale else record.case
            found.setdefault(title, []).append(record)
    return found
