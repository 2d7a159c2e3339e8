"""Plots as inline SVG, by matplotlib, in the page's font and in CSS variables for colours: light and dark in one."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..success import bootstrap, pass_rates
from .records import Record, column

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, LINE = "#010201", "#010202"  # stand-ins that become CSS variables in the SVG
SERIES = [f"#0103{i:02x}" for i in range(8)]
VARIABLES = {INK: "var(--ink)", LINE: "var(--line)", **{c: f"var(--c{i})" for i, c in enumerate(SERIES)}}
FEW = 8  # points of a curve that are marked
POINTS = 300  # of a curve at most; beyond that a point is the mean of its neighbours


class Curve(NamedTuple):
    """One series of numbers over the steps; ``colour`` is an index of SERIES."""

    steps: Sequence[float]
    values: Sequence[float]
    colour: int
    dashed: bool = False


def over_steps(name: str, curves: list[Curve], percent: bool = False) -> str:
    """Curves over the steps: every step faint, a running mean on top; a log scale where values span two decades."""
    known = [v for curve in curves for v in curve.values if math.isfinite(v)]
    if not known:
        return ""

    def draw(axes: Axes) -> None:
        for curve in curves:
            steps, values = thinned(curve.steps, curve.values)
            style: Any = {"color": SERIES[curve.colour], "linestyle": (0, (4, 2)) if curve.dashed else "-"}
            smooth = running_mean(values, max(1, len(values) // 20))
            if len(values) > 20:
                axes.plot(steps, values, color=SERIES[curve.colour], alpha=0.25, linewidth=0.8)
            axes.plot(steps, smooth, linewidth=1.7, marker="o" if len(values) <= FEW else "", markersize=4, **style)
        axes.set_xlabel("step")
        positive = min(known) > 0
        if positive and max(known) > 100 * min(known) and not percent:
            axes.set_yscale("log")
        elif min(known) >= 0:
            axes.set_ylim(bottom=0)
        if percent:
            axes.set_ylim(0, max(0.01, min(1.0, 1.15 * max(known))))
            as_percent(axes)
        whole_numbers(axes)

    return svg(name, draw)


def pass_at_k_curves(name: str, models: list[tuple[int, bool, np.ndarray]]) -> str:
    """Pass@k over k with bootstrap bands, from (colour, dashed, matrix of outcomes) of each model; it takes two k."""
    if max((matrix.shape[1] for _, _, matrix in models), default=0) < 2:
        return ""

    def draw(axes: Axes) -> None:
        most = max(matrix.shape[1] for _, _, matrix in models)
        for colour, dashed, matrix in models:
            ks = np.arange(1, matrix.shape[1] + 1)
            ks = ks if len(ks) <= 64 else np.unique(np.geomspace(1, len(ks), 64).round().astype(int))
            mean, low, high = zip(*bootstrap(np.stack([pass_rates(matrix, k) for k in ks], axis=1)), strict=True)
            axes.fill_between(ks, low, high, color=SERIES[colour], alpha=0.13, linewidth=0)
            axes.plot(
                ks, mean, color=SERIES[colour], linestyle=(0, (4, 2)) if dashed else "-", marker="o", markersize=3
            )
        axes.set_xscale("log", base=2)
        ticks = [2**i for i in range(int(math.log2(most)) + 1)]
        axes.set_xticks(ticks, [str(k) for k in ticks])
        axes.set_xlim(0.93, most * 1.07)
        axes.set_xlabel("k")
        axes.set_ylim(0, 1.02)
        as_percent(axes)

    return svg(name, draw)


def histogram(name: str, first: Record, last: Record, tau: float | None, teacher: int, student: int) -> str:
    """Shares of tokens by entropy, teacher and student, dashed at the ``first`` record and solid at the ``last``."""

    def draw(axes: Axes) -> None:
        for record, style, width in ((first, (0, (3, 2)), 1.2), (last, "-", 1.8)):
            edges = np.asarray(record["edges"], dtype=float)
            for side, colour in (("teacher_entropy", teacher), ("student_entropy", student)):
                counts = np.asarray(record[side], dtype=float)
                if len(counts) == len(edges) - 1 and counts.sum() > 0:
                    shares = np.where(counts > 0, counts / counts.sum(), np.nan)
                    axes.stairs(shares, edges, color=SERIES[colour], linestyle=style, linewidth=width, baseline=None)
        if tau is not None:
            axes.axvline(tau, color=INK, linewidth=0.8, alpha=0.6)
            axes.annotate("τ", (tau, 1), (3, -9), xycoords=("data", "axes fraction"), textcoords="offset points")
        axes.set_yscale("log")
        axes.set_ylim(top=min(axes.get_ylim()[1], 1.0))
        axes.set_xlabel("entropy, nats")
        as_percent(axes)

    return svg(name, draw)


def thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The points that are numbers, at most POINTS of them: means of neighbours where there are more."""
    table = np.array([steps, values], dtype=float)
    table = table[:, np.isfinite(table).all(axis=0)]
    if table.shape[1] > POINTS:
        table = np.stack([part.mean(axis=1) for part in np.array_split(table, POINTS, axis=1)], axis=1)
    return table[0], table[1]


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Centred; a shorter window at the ends."""
    window = np.ones(2 * (width // 2) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def as_percent(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.4g} %"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def svg(name: str, draw: Callable[[Axes], None]) -> str:
    """A figure of one panel as the text of an ``<svg>`` element; ``name`` keeps its ids apart from other figures'."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        **{"svg.fonttype": "none", "svg.hashsalt": ascii(name), "font.size": 9, "font.family": "sans-serif"},
        **{f"{part}.color": INK for part in ("text", "xtick", "ytick")},
        **{"axes.labelcolor": INK, "axes.edgecolor": LINE, "xtick.color": LINE, "ytick.color": LINE},
        **{"xtick.labelcolor": INK, "ytick.labelcolor": INK, "grid.color": LINE, "grid.linewidth": 0.6},
        **{"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True},
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.0, 2.9), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[A-Za-z0-9]+_\d+"| id="matplotlib\.axis_\d+"', "", text)  # of groups; nothing refers to them
    opening, rest = text.split(">", 1)
    text = re.sub(r' (width|height)="[^"]*"', "", opening) + ">" + rest  # the card says how wide, viewBox how high
    text = re.sub(r"\n\s*", "\n", text)
    text = re.sub("|".join(VARIABLES), lambda match: VARIABLES[match.group()], text)
    return text.replace("<svg", '<svg role="img"', 1)


def first_and_last(records: list[Record]) -> tuple[Record, Record] | None:
    """The histograms of the first and of the last step that have some."""
    lists = ("edges", "teacher_entropy", "student_entropy")
    usable = [record for record in records if all(isinstance(record.get(name), list) for name in lists)]
    return (usable[0], usable[-1]) if usable else None


def curves_of(metrics: dict[str, list[Record]], names: Sequence[str], colours: dict[str, int]) -> list[Curve]:
    """The series ``names`` of every run: the first solid, the second dashed; none that has no numbers."""
    return [
        Curve(column(records, "step"), column(records, name), colours[run], dashed=i > 0)
        for run, records in metrics.items()
        for i, name in enumerate(names)
        if any(map(math.isfinite, column(records, name)))
    ]
