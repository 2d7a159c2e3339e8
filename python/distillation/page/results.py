"""The results of a run: rates with their intervals, agreement with the teacher, differences between models."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np

from ..success import LEVEL, Interval, bootstrap, outcomes, paired_difference, pass_rates
from .plots import pass_at_k_curves
from .records import Record, Records, number
from .text import escaped, figure_text, table, tag

AGREEMENT = (
    ("student_entropy_uncertain", "H<sub>s</sub> where H<sub>t</sub> &gt; τ"),
    ("forward_kl_uncertain", "forward KL where H<sub>t</sub> &gt; τ"),
    ("forward_kl_certain", "forward KL elsewhere"),
)
Graded = list[tuple[str, np.ndarray]]  # models whose samples were checked, with the matrix of outcomes


def models_of(records: Records) -> list[Record]:
    models = records.results.get("models")
    return [model for model in models if isinstance(model, dict)] if isinstance(models, list) else []


def graded(models: list[Record]) -> Graded:
    return [(str(model.get("name")), outcomes(model["correct"])) for model in models if model.get("correct")]


def shown_ks(samples: int) -> list[int]:
    """The powers of two from 2 on, and the number of samples itself."""
    return sorted({2**i for i in range(1, samples.bit_length()) if 2**i <= samples} | ({samples} - {1}))


def results_table(models: list[Record]) -> str:
    matrices = dict(graded(models))
    samples = min((matrix.shape[1] for matrix in matrices.values()), default=0)
    ks = shown_ks(samples) if samples else []
    rates = [f"Avg@{samples}", *(f"Pass@{k}" for k in ks)] if samples else []
    rows = []
    for model in models:
        name = str(model.get("name"))
        cells = ["–"] * len(rates)
        if (matrix := matrices.get(name)) is not None:
            columns = np.stack([pass_rates(matrix, k) for k in (1, *ks)], axis=1)
            cells = [rate(interval) for interval in bootstrap(columns)]
        agreement = model.get("agreement") or {}
        cells += [figure_text(number(agreement, key), ".3f") for key, _ in AGREEMENT]
        rows.append([escaped(name), *cells])
    return table(["", *rates, *(heading for _, heading in AGREEMENT)], rows)


def rate(interval: Interval) -> str:
    return f"{interval.estimate:.1%}<small>{interval.low:.1%} to {interval.high:.1%}</small>".replace("%", " %")


def points(interval: Interval) -> str:
    estimate, low, high = (100 * number for number in interval)
    return f"{estimate:+.1f}<small>{low:+.1f} to {high:+.1f}</small>"


def differences(matrices: Graded) -> str:
    """Every trained model against the student's start, and against each other, on the same prompts."""
    students = [(name, matrix) for name, matrix in matrices if name != "teacher"]
    # Of a pair the later one comes first: what was trained, less what it started from.
    pairs = [(after, before) for before, after in combinations(students, 2) if len(after[1]) == len(before[1])]
    if not pairs:
        return ""
    samples = min(matrix.shape[1] for _, matrix in students)
    rows = [
        [
            f"{escaped(ours)} − {escaped(theirs)}",
            points(paired_difference(pass_rates(mine, 1), pass_rates(yours, 1))),
            points(paired_difference(pass_rates(mine, samples), pass_rates(yours, samples))),
        ]
        for (ours, mine), (theirs, yours) in pairs
    ]
    note = (
        "Paired over the same prompts, in percentage points. An interval that holds 0 leaves open which of the two is "
        "better."
    )
    heading = tag("h3", "Differences")
    return heading + tag("p", note, class_="quiet") + table(["", f"Avg@{samples}", f"Pass@{samples}"], rows)


def by_set(records: Records) -> dict[str, Records]:
    """What the records are about each set of prompts, as if there were no other."""
    models = models_of(records)
    sizes = records.results.get("sets") or {}
    found = {}
    for name in dict.fromkeys(str(model.get("set", "held-out")) for model in models):
        mine = [model for model in models if model.get("set", "held-out") == name]
        found[name] = replace(records, results={**records.results, "prompts": sizes.get(name), "models": mine})
    return found


def section(records: Records, name: str) -> str:
    models = models_of(records)
    matrices = graded(models)
    said = [
        f"{count:,} {one}{'s' * (count != 1)}{rest}"
        for key, one, rest in COUNTS
        if isinstance(count := records.results.get(key), int)
    ]
    said += [f"{LEVEL:.0%} bootstrap intervals over prompts below each rate".replace("%", " %")] if matrices else []
    reference = models[-1].get("agreement") or {}
    share, tokens = number(reference, "uncertain_fraction"), number(reference, "tokens")
    tau = f"τ = {records.tau:g} nats" if records.tau is not None else "τ"
    entropies = (
        f"Entropy and forward KL are means in nats over {figure_text(tokens, ',.0f')} tokens of the teacher's own "
        f"samples; {figure_text(share, '.0%')} of them have a teacher entropy above {tau}."
    )
    unchecked = "" if matrices else " Nothing says whether an answer of this task is right, so that there are no rates."
    parts = [
        tag("h3", f"{escaped(name)} prompts"),
        tag("p", escaped("; ".join(said)) + ".", class_="quiet") if said else "",
        results_table(models),
        tag("p", escaped(entropies + unchecked), class_="quiet"),
        differences(matrices),
    ]
    return "".join(parts)


COUNTS = (("prompts", "prompt", ""), ("samples", "sample", " of each model for each prompt"))


def pass_curves(records: Records, name: str, colours: dict[str, int]) -> tuple[str, list[tuple[str, int, bool]]]:
    """The plot and the lines of its legend."""
    matrices = graded(models_of(records))
    lines = [(escaped(name), colours[name], name == "teacher") for name, _ in matrices]
    return pass_at_k_curves(
        f"pass-at-k-{name}", [(colours[name], name == "teacher", matrix) for name, matrix in matrices]
    ), lines
