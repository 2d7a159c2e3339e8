"""The plots: memory against N × V, time against N, error against KL. On white, for light and for dark pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .implementations import BUDGETED, FLOOR, OURS_REVERSE, PRODUCTS
from .matrix import DIVERGENCE, GROWTH_TOKENS, GROWTH_VOCAB, REAL, REVERSE
from .records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers, and a marker each for those who see none; the same in
# every plot.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#7F7F7F")
MARKERS = "osD^vP*"
STYLES = {name: (COLOURS[i], MARKERS[i]) for i, name in enumerate((*REVERSE, PRODUCTS))}
STYLES[BUDGETED] = (COLOURS[0], ".")
END = "x"  # where one ran last
Point = tuple[float, float]


def draw(records: Sequence[Record], folder: Path, stem: str) -> list[Path]:
    """Writes what there is data for; the paths of the PNG files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = stem  # the same data gives the same file
    return [
        *memory(records, folder / f"{stem}-memory"),
        *time(records, folder / f"{stem}-time"),
        *error(records, folder / f"{stem}-error"),
    ]


def memory(records: Sequence[Record], path: Path) -> list[Path]:
    """Memory beyond inputs and gradients against N × V: more tokens, and larger vocabularies."""
    panels = [(GROWTH_TOKENS, "more tokens"), (GROWTH_VOCAB, "larger vocabulary")]
    shown = [(group, title) for group, title in panels if any(r.group == group for r in records)]
    if not shown:
        return []
    figure, axes = panel(len(shown))
    for at, (group, title) in zip(axes, shown, strict=True):
        mine = [r for r in records if r.group == group and r.objective != FLOOR]
        curves(at, mine, lambda r: (r.tokens * r.vocab, r.memory.median if r.memory else 0))
        label(at, f"{title}: {shape(mine, group)}", "tokens × vocabulary (logits)", "MiB beyond inputs and gradients")
    return save(figure, axes, path)


def time(records: Sequence[Record], path: Path) -> list[Path]:
    """Seconds of loss and gradients against the number of tokens, and of each token: flat where time is linear."""
    mine = [r for r in records if r.group == GROWTH_TOKENS]
    if not mine:
        return []
    figure, axes = panel(2)
    curves(axes[0], mine, lambda r: (r.tokens, r.time.median if r.time else 0))
    label(axes[0], f"Loss, dX and dW: {shape(mine, GROWTH_TOKENS)}", "tokens N", "seconds (median)")
    curves(axes[1], mine, lambda r: (r.tokens, 1e6 * r.time.median / r.tokens if r.time else 0))
    label(axes[1], "The same for each token", "tokens N", "microseconds per token (median)")
    return save(figure, axes, path)


def error(records: Sequence[Record], path: Path) -> list[Path]:
    """The relative error of both gradients against the divergence of the problem."""
    mine = [r for r in records if r.group in (DIVERGENCE, REAL) and r.divergence and r.objective == "reverse"]
    if not mine:
        return []
    figure, axes = panel(2)
    distance = "mean reverse KL of the problem (nats)"
    dots(axes[0], mine, lambda r: (r.divergence or 0, r.student_error or 0))
    label(axes[0], "Gradient of the hidden states", distance, "relative error of dX, to fp64")
    dots(axes[1], mine, lambda r: (r.divergence or 0, r.weight_error or 0))
    label(axes[1], "Gradient of the head", distance, "relative error of dW, to fp64")
    return save(figure, axes, path)


def curves(axes: Axes, records: Sequence[Record], point: Callable[[Record], Point]) -> None:
    """A line per implementation; one that failed ends in a cross where it ran last."""
    for name, (colour, marker) in STYLES.items():
        mine = [r for r in records if r.implementation == name]
        points = sorted(p for r in mine if not r.failure and min(p := point(r)) > 0)
        if not points:
            continue
        width = 2.4 if name == OURS_REVERSE else 1.3
        (line,) = axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=5, linewidth=width)
        line.set(label=name, linestyle="--" if name == BUDGETED else "-")
        if any(r.failure.startswith("out of") for r in mine):
            x, y = points[-1]
            axes.plot(x, y, color=colour, marker=END, markersize=12, markeredgewidth=2.4, linestyle="none")


def dots(axes: Axes, records: Sequence[Record], point: Callable[[Record], Point]) -> None:
    """A dot per case, filled where the data is real: unlike problems do not lie on one curve."""
    for name, (colour, marker) in STYLES.items():
        for real in (True, False):
            mine = [r for r in records if r.implementation == name and r.case.startswith("random") != real]
            points = [p for r in mine if not r.failure and min(p := point(r)) > 0]
            if points:
                (line,) = axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=7)
                line.set(linestyle="none", markerfacecolor=colour if real else "none")
                line.set_label(f"{name}, {'real data' if real else 'random data'}")


def shape(records: Sequence[Record], group: str) -> str:
    """What stays the same along a curve."""
    first = records[0]
    kept = f"V = {first.vocab:,}" if group == GROWTH_TOKENS else f"N = {first.tokens:,}"
    return f"{kept}, D = {first.student_dim:,}, {first.dtype}"


def panel(count: int) -> tuple[Figure, list[Axes]]:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, count, figsize=(6.0 * count, 5.2), squeeze=False)
    return figure, list(axes[0])


def label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)


def save(figure: Figure, axes: Sequence[Axes], path: Path) -> list[Path]:
    """One legend below all panels; the cross is explained where there is one."""
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    handles = {text: line for at in axes for line, text in zip(*at.get_legend_handles_labels(), strict=True)}
    if any(line.get_marker() == END for at in axes for line in at.get_lines()):
        handles["beyond this: out of memory or time"] = Line2D(
            [], [], color="#444444", marker=END, markersize=10, markeredgewidth=2.4, linestyle="none"
        )
    columns = 1 + len(axes)
    rows = -(-len(handles) // columns)
    bottom = 0.04 * rows + 0.02
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=columns, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, bottom, 1, 1))
    figure.savefig(path.with_suffix(".png"), dpi=110, facecolor="white")
    figure.savefig(path.with_suffix(".svg"), facecolor="white", metadata={"Date": None})
    plt.close(figure)
    return [path.with_suffix(".png")]
