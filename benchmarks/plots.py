"""Draws memory against N × V, time against N and error against KL, on white, for light and for dark pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .contenders import BUDGETED, FLOOR, OURS_REVERSE, PRODUCTS, REVERSE
from .matrix import DIVERGENCE, GROWTH_TOKENS, GROWTH_VOCAB, REAL
from .records import Record

# Okabe and Ito's colours, told apart by colour-blind readers, and a marker each for those who see none; the same in
# every plot.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#7F7F7F")
MARKERS = "osD^vP*"
STYLES = {name: (COLOURS[i], MARKERS[i]) for i, name in enumerate((*REVERSE, PRODUCTS))}
STYLES[BUDGETED] = (COLOURS[0], ".")
END = "x"  # where one ran last
Point = tuple[float, float]


def draw(records: Sequence[Record], folder: Path, stem: str) -> None:
    """Writes the plots that there is data for, as PNG and SVG."""
    matplotlib.rcParams["svg.hashsalt"] = stem  # the same data gives the same file
    memory(records, folder / f"{stem}-memory")
    if growing := [r for r in records if r.group == GROWTH_TOKENS]:
        time(growing, folder / f"{stem}-time")
    groups = (DIVERGENCE, REAL)
    if compared := [r for r in records if r.group in groups and r.divergence and r.objective == "reverse"]:
        error(compared, folder / f"{stem}-error")


def memory(records: Sequence[Record], path: Path) -> None:
    """Draws memory beyond inputs and gradients against N × V: more tokens, and larger vocabularies."""
    titles = {GROWTH_TOKENS: "more tokens", GROWTH_VOCAB: "larger vocabulary"}
    shown = [group for group in titles if any(r.group == group for r in records)]
    if shown:
        figure, axes = panels(len(shown))
        for at, group in zip(axes, shown, strict=True):
            mine = [r for r in records if r.group == group and r.objective != FLOOR]
            curves(at, mine, lambda r: (r.tokens * r.vocab, r.memory.median if r.memory else 0))
            title = f"{titles[group]}: {shape(mine, group)}"
            label(at, title, "tokens × vocabulary (logits)", "MiB beyond inputs and gradients")
        save(figure, axes, path)


def time(records: Sequence[Record], path: Path) -> None:
    """Draws the time of loss and gradients against the number of tokens, and per token: flat where time is linear."""
    figure, axes = panels(2)
    curves(axes[0], records, lambda r: (r.tokens, r.time.median if r.time else 0))
    label(axes[0], f"Loss, dX and dW: {shape(records, GROWTH_TOKENS)}", "tokens N", "seconds (median)")
    curves(axes[1], records, lambda r: (r.tokens, 1e6 * r.time.median / r.tokens if r.time else 0))
    label(axes[1], "The same for each token", "tokens N", "microseconds per token (median)")
    save(figure, axes, path)


def error(records: Sequence[Record], path: Path) -> None:
    """Draws the relative error of both gradients against the divergence of the problem."""
    figure, axes = panels(2)
    distance = "mean reverse KL of the problem (nats)"
    dots(axes[0], records, lambda r: (r.divergence or 0, r.student_error or 0))
    label(axes[0], "Gradient of the hidden states", distance, "relative error of dX, to fp64")
    dots(axes[1], records, lambda r: (r.divergence or 0, r.weight_error or 0))
    label(axes[1], "Gradient of the head", distance, "relative error of dW, to fp64")
    save(figure, axes, path)


def curves(axes: Axes, records: Sequence[Record], point: Callable[[Record], Point]) -> None:
    """Draws a line per contender; one that failed ends in a cross where it ran last."""
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
    """Draws a dot per case, filled where the data is real: unlike problems do not lie on one curve."""
    for name, (colour, marker) in STYLES.items():
        for real in (True, False):
            mine = [r for r in records if r.implementation == name and r.case.startswith("random") != real]
            points = [p for r in mine if not r.failure and min(p := point(r)) > 0]
            if points:
                (line,) = axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=7)
                line.set(linestyle="none", markerfacecolor=colour if real else "none")
                line.set_label(f"{name}, {'real data' if real else 'random data'}")


def shape(records: Sequence[Record], group: str) -> str:
    """Says what stays the same along a curve."""
    first = records[0]
    kept = f"V = {first.vocab:,}" if group == GROWTH_TOKENS else f"N = {first.tokens:,}"
    return f"{kept}, D = {first.student_dim:,}, {first.dtype}"


def panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(6.0 * count, 5.2))
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set(xlabel=x, ylabel=y, xscale="log", yscale="log")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)


def save(figure: Figure, axes: Sequence[Axes], path: Path) -> None:
    """Saves a figure with one legend below all panels, which explains the cross where there is one."""
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
