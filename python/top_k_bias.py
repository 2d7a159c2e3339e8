"""Where the top-k halves take a student that starts at the teacher.

Two fixed teachers over 1,000 entries, each a power of the rank, one flat and one peaked. The student's logits are free
and start as the teacher's; plain gradient descent minimises one half at a time. Where the teacher is a fixed point, the
student stays.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eopd_kernels import Objective, TopK, entropy_aware_kl

SUMMARY = "Gradient descent from the teacher on each top-k half: full KL and mass outside the top k by step."
VOCAB_SIZE, TOP = 1_000, 16
TEACHERS = {"flat": 1.48, "peaked": 2.5}  # q of the entry of rank r is proportional to r^-exponent
STEPS, RATE = 2_000, 1.0


class Variant(NamedTuple):
    """What is minimised, and how its line is drawn."""

    forward: Any
    colour: str  # of Okabe and Ito: told apart by the colour-blind
    style: str
    reverse: Any = "none"


VARIANTS = {
    "renormalised teacher (paper)": Variant(TopK(TOP), "#D55E00", "-"),
    "renormalised, beside reverse KL": Variant(TopK(TOP), "#CC79A7", "-.", "full"),
    "raw, no tail": Variant(TopK(TOP, teacher="raw"), "#E69F00", "--"),
    "raw with tail": Variant(TopK(TOP, teacher="raw", tail=True), "#0072B2", "-"),
    "full vocabulary": Variant("full", "#000000", ":"),
    "reverse, raw, no tail": Variant("none", "#009E73", "--", TopK(TOP, teacher="raw")),
    "reverse, raw with tail": Variant("none", "#56B4E9", ":", TopK(TOP, teacher="raw", tail=True)),
}


class Track(NamedTuple):
    """What an objective did to the students: ``[steps + 1, teachers]`` each, the start included."""

    forward_kl: Tensor  # KL(q ‖ p) over the whole vocabulary, nats
    outside: Tensor  # the student's mass outside the teacher's top k


def teachers() -> Tensor:
    """Returns the teachers' logits ``[teachers, V]``, in descending order."""
    ranks = torch.arange(1, VOCAB_SIZE + 1, dtype=torch.float64)
    return torch.stack([-exponent * ranks.log() for exponent in TEACHERS.values()])


def descend(forward: Any, reverse: Any = "none", *, steps: int = STEPS, rate: float = RATE) -> Track:
    """Descends from the teacher, with the gate open, on a forward half, a reverse half or both."""
    teacher = teachers()
    student = teacher.clone().requires_grad_()
    objective = Objective(gate="always", reverse=reverse, forward=forward)
    forward_kl, outside = [], []
    for _ in range(steps + 1):
        out = entropy_aware_kl(student, teacher, objective=objective, reduction="sum")
        (gradient,) = torch.autograd.grad(out.loss, student)
        forward_kl.append(out.forward_kl)
        outside.append(student.detach().softmax(1)[:, TOP:].sum(1))
        with torch.no_grad():
            student -= rate * gradient
    return Track(torch.stack(forward_kl), torch.stack(outside))


def table(tracks: dict[str, Track]) -> str:
    """Formats the end of every track as a Markdown table."""
    log_q = teachers().log_softmax(1)
    lines = ["| teacher | minimised | KL(q ‖ p), nats | student's mass outside the top 16 |", "|---|---|---|---|"]
    for column, (kind, entropy) in enumerate(zip(TEACHERS, -(log_q.exp() * log_q).sum(1), strict=True)):
        outside = log_q.exp()[column, TOP:].sum()
        teacher = f"{kind}: {entropy:.2f} nats, {outside:.2%} outside"
        lines += [
            f"| {teacher} | {name} | {abs(track.forward_kl[-1, column]):.4f} | {track.outside[-1, column]:.2%} |"
            for name, track in tracks.items()
        ]
    return "\n".join(lines)


def draw(tracks: dict[str, Track], path: Path) -> None:
    """Draws KL and outside mass in two rows of panels, with a column for each teacher."""
    from matplotlib.figure import Figure
    from PIL import Image  # matplotlib brings it

    log_q = teachers().log_softmax(1)
    entropies = -(log_q.exp() * log_q).sum(1)
    figure = Figure(figsize=(8, 5.6), layout="constrained", facecolor="white")
    panels = figure.subplots(2, 2, sharex=True)
    for column, kind in enumerate(TEACHERS):
        above, below = panels[:, column]
        for name, track in tracks.items():
            line = {"color": VARIANTS[name].colour, "linestyle": VARIANTS[name].style, "linewidth": 2, "label": name}
            above.plot(track.forward_kl[:, column], **line)
            below.plot(100 * track.outside[:, column], **line)
        above.set_title(f"{kind} teacher: H = {entropies[column]:.1f} nats")
        above.set_yscale("symlog", linthresh=1e-3)  # the halves' biases are orders of magnitude apart
        below.set_yscale("log")
        below.yaxis.set_major_formatter("{x:g}")
        below.set_xlabel("steps of gradient descent, from the teacher")
        for panel in (above, below):
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("KL(q ‖ p), nats")
    panels[1, 0].set_ylabel("student's mass outside\nthe teacher's top 16, %")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)
    with Image.open(path) as image:
        image.convert("RGB").quantize(48).save(path, optimize=True)  # a third of the size


def main() -> None:
    parser = argparse.ArgumentParser(prog="python python/top_k_bias.py", description=SUMMARY)
    parser.add_argument("--write", type=Path, metavar="PNG", help="draw the plot (needs matplotlib)")
    arguments = parser.parse_args()
    tracks = {name: descend(variant.forward, variant.reverse) for name, variant in VARIANTS.items()}
    print(table(tracks))
    if arguments.write:
        draw(tracks, arguments.write)


if __name__ == "__main__":
    main()
