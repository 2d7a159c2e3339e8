"""The page: what came out, how training went, some completions, what was run. It loads nothing."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from pathlib import Path
from statistics import fmean

from . import plots, results
from .records import Record, Records, column, number, read_records
from .text import escaped, figure_text, table, tag
from .tokens import completions

NAME = "report.html"
STYLE = Path(__file__).with_name("style.css")
TEACHER, START, FIRST_RUN, COLOURS = 0, 1, 2, len(plots.SERIES)
OPEN, SHUT = "H<sub>t</sub> &gt; τ", "elsewhere"
# Title, metrics (the first solid, the second dashed, with what tells them apart), caption.
CARDS: tuple[tuple[str, tuple[tuple[str, str], ...], str], ...] = (
    ("Loss", (("loss", ""),), "Objectives differ, so do their losses: compare a curve with itself."),
    ("Forward KL", (("forward_kl_open", OPEN), ("forward_kl_closed", SHUT)), "KL(teacher ‖ student), {nats_on}."),
    ("Reverse KL", (("reverse_kl_open", OPEN), ("reverse_kl_closed", SHUT)), "KL(student ‖ teacher), {nats_on}."),
    ("Mean entropy", (("student_entropy", "student"), ("teacher_entropy", "teacher")), "In {nats_on}."),
    ("Gate", (("gate_fraction", ""),), "Share of tokens with a forward KL in the loss."),
    ("Clipped ratios", (("clipped_by_ratio", ""),), "Share of tokens whose reverse half a clip of the ratio holds."),
    ("Completion length", (("completion_length", ""),), "Tokens, end of sequence included; mean of a step."),
    ("Clipped completions", (("clipped_fraction", ""),), "Share that reached the longest length without an end."),
    ("Gradient norm", (("grad_norm", ""),), "Before clipping."),
)
EVALUATED = (("/pass@1", "Pass@1"), ("/forward_kl_uncertain", f"forward KL, {OPEN}"))
SHARES = ("Gate", "Clipped ratios", "Clipped completions")
TIMES = (
    ("rollout_seconds", "rollout", 2),
    ("teacher_seconds", "teacher", 4),
    ("student_seconds", "student", 3),
    ("loss_seconds", "loss", 6),
    ("optimizer_seconds", "optimizer", 5),
)


def write_page(folder: Path) -> Path:
    """Writes ``report.html`` into a run folder, from what files there are, and returns its path.

    Raises:
        FileNotFoundError: ``folder`` holds none of a run's files.
    """
    folder = Path(folder)
    content = page(read_records(folder), folder.resolve().name)
    path, half = folder / NAME, folder / (NAME + ".part")
    half.write_text(content, encoding="utf-8")
    os.replace(half, path)  # an older page stays whole until this one is
    return path


def page(records: Records, name: str) -> str:
    """The HTML of a run called ``name``."""
    problems = list(records.problems)
    drawn = importlib.util.find_spec("matplotlib") is not None
    if not drawn:
        problems.append(
            "matplotlib is not installed: there are no plots. python -m distillation.page draws them later."
        )
    colours = colours_of(records)
    task = records.results.get("task", records.config.get("task"))
    runs = ", ".join(records.metrics) or "nothing logged yet"
    body = [
        tag("p", "On-policy distillation", class_="quiet"),
        tag("h1", escaped(name)),
        tag("p", f"Task: {escaped(task)}. " if task else "", f"Objectives: {escaped(runs)}."),
        missing(problems),
        tag("h2", "Results"),
        *(results.section(about, name) for name, about in results.by_set(records).items()),
        "" if results.models_of(records) else tag("p", "None yet: see above."),
        *(training(records, colours) if drawn else []),
        time_split(records.metrics),
        completions(records.completions, records.tau),
        notes(records),
        settings(records.config),
    ]
    style = STYLE.read_text(encoding="utf-8")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(name)}: distillation</title><style>{style}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body><main>{"".join(body)}</main></body></html>\n'


def colours_of(records: Records) -> dict[str, int]:
    """A colour for every model and run, the same in every plot."""
    names = [str(model.get("name")) for model in results.models_of(records)]
    students = [n for n in names if n not in records.metrics and n != "teacher"]
    colours = {"teacher": TEACHER, **dict.fromkeys(students, START)}
    runs = dict.fromkeys([*records.metrics, *records.histograms])
    return colours | {run: FIRST_RUN + i % (COLOURS - FIRST_RUN) for i, run in enumerate(runs)}


def missing(problems: list[str]) -> str:
    if not problems:
        return ""
    return tag("div", tag("b", "Not complete"), tag("ul", *(tag("li", escaped(p)) for p in problems)), class_="missing")


def legend(lines: list[tuple[str, int, bool]]) -> str:
    """Lines of (HTML, colour, dashed). It is no part of the plot, so that it cannot cover it and wraps."""
    items = (
        tag("li", f'<i class="{"dashed" if dashed else "solid"}" style="border-color:var(--c{colour})"></i>', text)
        for text, colour, dashed in lines
    )
    return tag("ul", *items, class_="legend")


def card(title: str, plot: str, lines: list[tuple[str, int, bool]], caption: str) -> str:
    if not plot:
        return ""
    return tag("figure", tag("h3", title), legend(lines), plot, tag("figcaption", caption))


def training(records: Records, colours: dict[str, int]) -> list[str]:
    """All plots: pass@k, the histograms of every run, the curves over the steps."""
    caption = "Chance that one of k samples is right; unbiased estimate, bands over prompts."
    cards = []
    for name, about in results.by_set(records).items():
        cards.append(card(f"Pass@k: {escaped(name)}", *results.pass_curves(about, name, colours), caption))
    trained_on = records.trained_on
    cards += [
        histograms(run, recorded, records.tau, trained_on, colours[run]) for run, recorded in records.histograms.items()
    ]
    logged = {run: mine + records.evaluations.get(run, []) for run, mine in records.metrics.items()}
    names = dict.fromkeys(name for run in records.evaluations.values() for record in run for name in record)
    between = (
        (f"{escaped(name.removesuffix(figure))}: {said}", ((name, ""),), "Evaluated between steps.")
        for figure, said in EVALUATED
        for name in names
        if name.endswith(figure)
    )
    for title, metrics, caption in (*between, *CARDS):
        curves = plots.curves_of(logged, [name for name, _ in metrics], colours)
        dashes = {curve.dashed for curve in curves}
        lines = [(escaped(run), colours[run], False) for run in records.metrics] if len(records.metrics) > 1 else []
        if len(metrics) > 1:
            only = colours[next(iter(records.metrics), "teacher")] if len(records.metrics) == 1 else TEACHER
            lines += [(text, only, i > 0) for i, (_, text) in enumerate(metrics) if (i > 0) in dashes]
        slug = title.lower().replace(" ", "-")
        plot = plots.over_steps(slug, curves, percent=title in SHARES or title.endswith("@1"))
        cards.append(card(title, plot, lines, caption.format(nats_on=f"nats, on {trained_on}")))
    shown = [one for one in cards if one]
    return [tag("h2", "How it went"), tag("div", *shown, class_="grid")] if shown else []


def histograms(run: str, recorded: list[Record], tau: float | None, completions: str, colour: int) -> str:
    ends = plots.first_and_last(recorded)
    if ends is None:
        return ""
    first, last = ends
    plot = plots.histogram(f"histogram-{run}", first, last, tau, TEACHER, colour)
    at = [f"step {figure_text(number(record, 'step'), '.0f')}" for record in ends]
    sides = (("teacher", TEACHER), ("student", colour))
    lines = [(f"{side}, {when}", shown, when == at[0]) for side, shown in sides for when in dict.fromkeys(at)]
    caption = f"Share of tokens by entropy, on {completions}, log scale."
    return card(f"Entropies: {escaped(run)}", plot, lines, caption)


def time_split(metrics: dict[str, list[Record]]) -> str:
    """A bar per run, and a table: where a step's seconds went."""
    bars, rows = [], []
    for run, records in metrics.items():
        seconds = {name: mean(records, name) for name, _, _ in TIMES}
        total = sum(s for s in seconds.values() if math.isfinite(s))
        if total <= 0:
            continue
        pieces = (
            f'<b title="{label}" style="width:{100 * seconds[name] / total:.2f}%;background:var(--c{colour})"></b>'
            for name, label, colour in TIMES
            if math.isfinite(seconds[name])
        )
        bars.append(tag("h3", escaped(run)) + tag("div", *pieces, class_="bar"))
        cells = [
            f"{figure_text(spent, '.3g')}<small>{figure_text(spent / total, '.0%')}</small>"
            for spent in seconds.values()
        ]
        peak = max((v for v in column(records, "peak_memory_mib") if math.isfinite(v)), default=math.nan)
        cells += [figure_text(mean(records, "tokens_per_second"), ",.0f"), figure_text(peak, ",.0f")]
        rows.append([escaped(run), *cells])
    if not rows:
        return ""
    key = "".join(
        f'<li><i style="border-top-width:0.7rem;border-color:var(--c{colour})"></i>{label}</li>'
        for _, label, colour in TIMES
    )
    header = ["seconds, mean of a step", *(label for _, label, _ in TIMES), "tokens/s", "peak MiB"]
    said = "".join(tag("p", loss_share(run, records)) for run, records in metrics.items())
    return "".join(
        [tag("h2", "Where the time went"), tag("ul", key, class_="legend"), *bars, table(header, rows), said]
    )


def loss_share(run: str, records: list[Record]) -> str:
    """What the loss took, with heads and their gradients, if that was measured."""
    loss, teacher, student = (mean(records, f"{part}_seconds") for part in ("loss", "teacher", "student"))
    if not loss + teacher + student > 0:
        return ""
    share = f"{loss / (loss + teacher + student):.1%}".replace("%", " %")
    return f"{escaped(run)}: heads, loss and their gradients took {share} of a step's forward and backward passes."


def mean(records: list[Record], name: str) -> float:
    known = [v for v in column(records, name) if math.isfinite(v)]
    return fmean(known) if known else math.nan


def notes(records: Records) -> str:
    """What the figures above do not show."""
    seed = f" with seed {escaped(records.config['seed'])}" if "seed" in records.config else ""
    said = [
        f"One run{seed} for each objective. The intervals are about prompts and samples; another seed of the training "
        "can move a result by more. A claim that one objective is better takes several runs.",
        "Forward KL and entropy in the table are on the teacher's samples for held-out prompts, the curves on "
        f"{records.trained_on}. A student that avoids what it does badly looks better on its own samples.",
        "Independent replications of entropy-aware distillation (arXiv 2603.07079) are mixed. Nothing here promises a "
        "gain in accuracy on another task or at another size.",
    ]
    return tag("h2", "How to read this") + tag("ul", *(tag("li", tag("p", text)) for text in said))


def settings(config: Record) -> str:
    """All options and versions, folded."""
    if not config:
        return ""
    options = tag("pre", escaped(json.dumps(config, indent=2, ensure_ascii=False)))
    return tag("h2", "What was run") + tag("details", tag("summary", "Options and versions"), options, class_="sample")
