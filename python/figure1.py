"""How restless a student's likeliest tokens are under reverse KL, by the entropy of the teacher.

    python python/figure1.py --write docs/images/figure1

A small set-up after the first figure of arXiv 2603.07079, whose own is not published. Each context is a teacher over
1,000 entries, a softmax of normally distributed logits scaled to a given entropy, and a student of free logits that
starts at the teacher's logits plus normal noise. Plain gradient descent minimises one objective. At every step the
student's ten likeliest entries are compared with those of the step before; the share that is new is the change rate.
Nothing is shared between contexts, so that the entropy of a context's teacher is all that tells it from the others.

It prints a table, and writes the plot (PNG) and every figure behind it (JSON).
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eopd_kernels import Objective, Sampled, entropy_aware_kl

SUMMARY = "Top-10 change rate of a student under sampled and exact reverse KL, by the entropy of the teacher."
VOCAB_SIZE, TOP = 1_000, 10
ENTROPIES = torch.linspace(0.1, 6.0, 60, dtype=torch.float64)  # nats; log 1,000 is 6.9
LOW, HIGH = 0.8, 3.0  # teachers of the two panels over time: below the paper's threshold, and far above
START_NOISE = 1.0  # of the student's logits
STEPS, RATE, SEEDS = 400, 2.0, 5
SETTLED = 0.5  # the share of the steps, at the end, that a settled rate is the mean of
WINDOW = 20  # steps that a point of a curve over time is the mean of


class Variant(NamedTuple):
    """What is minimised, with how many sampled tokens per context and step, and how its line is drawn."""

    objective: Objective
    samples: int  # 0: the objective needs none
    colour: str  # of Okabe and Ito: told apart by the colour-blind
    style: str


VARIANTS = {
    "reverse KL, 1 sampled token": Variant(Objective.on_policy_distillation(), 1, "#D55E00", "-"),
    "reverse KL, 16 sampled tokens": Variant(Objective.on_policy_distillation(), 16, "#E69F00", "-"),
    "reverse KL, exact": Variant(Objective.reverse_kl(), 0, "#000000", "-"),
    "entropy-aware, exact": Variant(Objective(), 0, "#0072B2", "--"),
    "entropy-aware, reverse half sampled": Variant(Objective(reverse=Sampled()), 1, "#56B4E9", "-."),
    "entropy-aware, the paper's (top 16)": Variant(Objective.eopd_paper(), 1, "#CC79A7", ":"),
}


class Track(NamedTuple):
    """What an objective did to every student, for each seed and each teacher."""

    change: Tensor  # [steps, seeds, teachers]: share of the top 10 that was not there one step before
    reverse_kl: Tensor  # [seeds, teachers]: KL(p ‖ q) after the last step, nats
    student_entropy: Tensor  # [seeds, teachers]: after the last step, nats


def scaled_to_entropy(logits: Tensor, entropies: Tensor) -> Tensor:
    """Each row of ``logits`` ``[n, V]`` times the factor that gives its softmax the entropy ``[n]``, by bisection."""
    low, high = torch.zeros_like(entropies), torch.full_like(entropies, 1e3)
    for _ in range(60):
        middle = (low + high) / 2
        log_q = (logits * middle[..., None]).log_softmax(-1)
        flat = -(log_q.exp() * log_q).sum(-1) > entropies
        low, high = torch.where(flat, middle, low), torch.where(flat, high, middle)
    return logits * low[..., None]


def problem(seeds: int, vocab_size: int, entropies: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the teachers and of the students' starts, ``[seeds, n, V]`` each, one generator per seed.

    The quantiles of a normal distribution stand for a draw from it: where the two likeliest entries of a draw are
    almost alike, no factor gives it a low entropy.
    """
    quantiles = torch.special.ndtri((torch.arange(vocab_size, dtype=torch.float64) + 0.5) / vocab_size)
    teacher = scaled_to_entropy(quantiles.expand(len(entropies), vocab_size), entropies).float()
    noise = [torch.randn(teacher.shape, generator=torch.Generator().manual_seed(seed)) for seed in range(seeds)]
    return teacher.expand(seeds, -1, -1), teacher + START_NOISE * torch.stack(noise)


def descend(
    variant: Variant, teacher: Tensor, start: Tensor, *, steps: int = STEPS, rate: float = RATE, seed: int = 0
) -> Track:
    """Gradient descent on each context's own loss, for all ``[seeds, n]`` contexts at once."""
    generator = torch.Generator().manual_seed(seed)
    student = start.clone().requires_grad_()
    before = student.detach().topk(TOP, -1).indices
    change = []
    for _ in range(steps):
        out = loss(variant, student, teacher, generator)
        (gradient,) = torch.autograd.grad(out.loss, student)
        with torch.no_grad():
            student -= rate * gradient
            after = student.topk(TOP, -1).indices
        stayed = (after[..., :, None] == before[..., None, :]).any(-1)
        change.append(1 - stayed.float().mean(-1))
        before = after
    out = entropy_aware_kl(student.detach(), teacher)
    return Track(torch.stack(change), out.reverse_kl, out.student_entropy)


def loss(variant: Variant, student: Tensor, teacher: Tensor, generator: torch.Generator) -> Any:
    """The sum over contexts of the objective's loss, the mean over sampled tokens where there are several."""
    if variant.samples == 0:
        return entropy_aware_kl(student, teacher, objective=variant.objective, reduction="sum")
    log_p = student.detach().log_softmax(-1)
    drawn = torch.multinomial(log_p.exp().flatten(0, -2), variant.samples, replacement=True, generator=generator)
    token_ids = drawn.unflatten(0, student.shape[:-1]).movedim(-1, 0)  # [samples, seeds, n]
    copies = (variant.samples, *student.shape)
    return entropy_aware_kl(
        student.expand(copies),
        teacher.expand(copies),
        objective=variant.objective,
        token_ids=token_ids,
        old_log_probs=log_p.expand(copies).gather(-1, token_ids[..., None]).squeeze(-1),
        reduction="mean",
        num_items=variant.samples,
    )


def summary(tracks: dict[str, Track], entropies: Tensor) -> list[dict[str, Any]]:
    """For each objective and each group of teachers: means over contexts, as ``[mean, least, most]`` of the seeds."""
    rows = []
    for name, track in tracks.items():
        settled = track.change[-max(1, round(SETTLED * len(track.change))) :].mean(0)
        for group, members in groups(entropies).items():
            figures = {"settled_change": settled, "reverse_kl": track.reverse_kl, "entropy_gap": track.student_entropy}
            row: dict[str, Any] = {"objective": name, "teachers": group}
            for figure, values in figures.items():
                per_context = values - entropies if figure == "entropy_gap" else values
                of_seeds = per_context[:, members].double().mean(1)
                row[figure] = [float(of_seeds.mean()), float(of_seeds.min()), float(of_seeds.max())]
            rows.append(row)
    return rows


def groups(entropies: Tensor) -> dict[str, Tensor]:
    """Which teachers count as low and as high, bool ``[n]``."""
    return {f"H <= {LOW:g} nats": entropies <= LOW, f"H >= {HIGH:g} nats": entropies >= HIGH}


def table(rows: list[dict[str, Any]]) -> str:
    """The summary as a Markdown table: the mean over seeds, and the least and the most of them."""
    lines = [
        "| teacher | minimised | top-10 change per step | KL(p ‖ q) at the end, nats | H_s − H_t, nats |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["teachers"]):
        change, kl, gap = row["settled_change"], row["reverse_kl"], row["entropy_gap"]
        lines.append(
            f"| {row['teachers']} | {row['objective']} "
            f"| {change[0]:.3%} ({change[1]:.3%} to {change[2]:.3%}) "
            f"| {abs(kl[0]):.3f} ({abs(kl[1]):.3f} to {abs(kl[2]):.3f}) "
            f"| {gap[0]:+.3f} ({gap[1]:+.3f} to {gap[2]:+.3f}) |"
        )
    return "\n".join(lines)


def draw(tracks: dict[str, Track], entropies: Tensor, path: Path) -> None:
    """Two panels over time, for low and for high entropies, and one over the entropy; bands from seed to seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image  # matplotlib brings it

    figure, panels = pyplot.subplots(1, 3, figsize=(12, 4.6), sharey=True, layout="constrained", facecolor="white")
    for name, track in tracks.items():
        line = {"color": VARIANTS[name].colour, "linestyle": VARIANTS[name].style, "linewidth": 2, "label": name}
        windows = len(track.change) // WINDOW
        smooth = track.change[: windows * WINDOW].unflatten(0, (windows, WINDOW)).mean(1)  # [windows, seeds, n]
        middles = WINDOW * (torch.arange(windows) + 0.5)
        for panel, members in zip(panels, groups(entropies).values(), strict=False):
            band(panel, middles, smooth[:, :, members].mean(2), line)
        settled = track.change[-max(1, round(SETTLED * len(track.change))) :].mean(0)  # [seeds, n]
        neighbours = settled.unflatten(1, (-1, 3)).mean(2).T  # three teachers of almost one entropy
        band(panels[2], entropies.unflatten(0, (-1, 3)).mean(1), neighbours, line)
    for panel, group in zip(panels, groups(entropies), strict=False):
        panel.set_title(f"teachers of {group.replace('<=', '≤').replace('>=', '≥')}")
        panel.set_xlabel("step")
    panels[2].set_title(f"last {SETTLED:.0%} of the steps")
    panels[2].set_xlabel("entropy of the teacher, nats")
    panels[2].axvline(LOW, color="#7F7F7F", linewidth=1)
    panels[2].annotate(
        "0.8", (LOW, 1), (3, -11), xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=9
    )
    panels[0].set_ylabel("share of the top 10\nthat changes in a step")
    panels[0].yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    for panel in panels:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    with Image.open(path) as image:
        image.convert("RGB").quantize(64).save(path, optimize=True)  # a third of the size


def band(panel: Any, x: Tensor, of_seeds: Tensor, line: dict[str, Any]) -> None:
    """The mean of ``[points, seeds]`` as a line, least and most as a band around it."""
    panel.plot(x, of_seeds.mean(1), **line)
    panel.fill_between(x, of_seeds.amin(1), of_seeds.amax(1), color=line["color"], alpha=0.15, linewidth=0)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="figure1.py", description=SUMMARY)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of gradient descent (default: {STEPS})")
    parser.add_argument("--rate", type=float, default=RATE, help=f"learning rate (default: {RATE:g})")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"starts and samples drawn anew (default: {SEEDS})")
    parser.add_argument("--write", type=Path, metavar="STEM", help="write STEM.png (needs matplotlib) and STEM.json")
    options = parser.parse_args(arguments)
    for name, least in (("steps", 2 * WINDOW), ("seeds", 1)):
        if getattr(options, name) < least:
            parser.error(f"argument --{name}: must be {least} or more, got {getattr(options, name)}")
    teacher, start = problem(options.seeds, VOCAB_SIZE, ENTROPIES)
    tracks = {
        name: descend(variant, teacher, start, steps=options.steps, rate=options.rate)
        for name, variant in VARIANTS.items()
    }
    rows = summary(tracks, ENTROPIES)
    print(table(rows))
    if options.write:
        draw(tracks, ENTROPIES, options.write.with_suffix(".png"))
        entropies = [round(h, 6) for h in ENTROPIES.tolist()]
        settings: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "top": TOP, "start_noise": START_NOISE}
        settings |= {"torch": torch.__version__, "python": platform.python_version(), "entropies": entropies}
        settings |= {"steps": options.steps, "rate": options.rate, "settled": SETTLED, "seeds": options.seeds}
        content = {"settings": settings, "columns": ["mean of seeds", "least", "most"], "rows": rows}
        options.write.with_suffix(".json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
