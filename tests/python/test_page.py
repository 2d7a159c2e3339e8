"""The page of a run folder: whole, interrupted, hostile; nothing loaded from elsewhere, nothing unescaped."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distillation.page import write_page
from distillation.page.plots import POINTS, running_mean, thinned
from distillation.page.text import escaped, table

BOTH = ("reverse-kl", "entropy-aware")
HOSTILE = "</pre><script>alert(1)</script> & \u202egnihton\x00 \ud800"
PYTHON = Path(__file__).resolve().parents[2] / "python"
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """The tags that were opened, whether each was closed in its turn, all attributes and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.stack):
            self.text += data


def write_run(folder: Path, runs: tuple[str, ...] = BOTH, steps: int = 60, results: bool = True) -> None:
    """A run folder with plausible numbers out of a generator."""
    generator = np.random.default_rng(0)
    models = [("teacher", 0.8), ("student at start", 0.3), *((run, 0.45 + 0.1 * i) for i, run in enumerate(runs))]
    options = {"objective": "both", "tau": 0.8, "seed": 7, "task": "coins", "steps": steps, "learning_rate": 3e-4}
    (folder / "config.json").write_text(json.dumps({**options, "versions": {"torch": "2.13.0", "python": "3.11"}}))
    for run in runs:
        for step in range(1, steps + 1):
            falling, noise = float(np.exp(-3 * step / steps)), float(generator.normal(1, 0.08))
            metrics = {
                **{"run": run, "step": step, "loss": 0.9 * falling * noise, "grad_norm": 2 * falling * noise},
                **{f"{k}_kl": falling * noise for k in ("forward", "reverse")},
                **{f"{k}_kl_open": 1.4 * falling * noise for k in ("forward", "reverse")},
                **{f"{k}_kl_closed": 0.2 * falling * noise**2 for k in ("forward", "reverse")},
                **{"teacher_entropy": 0.62 * noise, "student_entropy": 0.8 * noise - 0.2 * (1 - falling)},
                **{"gate_fraction": 0.38 * noise if run != "reverse-kl" else 0.0, "clipped_fraction": 0.1 * falling},
                **{"completion_length": 10 + 2 * noise, "tokens": 1300, "tokens_per_second": 900 * noise},
                **{"rollout_seconds": 0.9 * noise, "teacher_seconds": 0.1, "student_seconds": 0.4, "loss_seconds": 0.1},
                **{"optimizer_seconds": 0.02, "learning_rate": 3e-4 * falling, "peak_memory_mib": 700 + step % 7},
            }
            append(folder / "metrics.jsonl", metrics)
            if step in (1, steps // 2, steps):
                edges = np.linspace(0, 5, 26)
                shares = {
                    "teacher_entropy": np.exp(-edges[:-1]) * 900,
                    "student_entropy": np.exp(-edges[:-1] * (0.7 + (1 - falling) / 2)) * 900,
                }
                counts = {side: generator.poisson(values).tolist() for side, values in shares.items()}
                append(folder / "histograms.jsonl", {"run": run, "step": step, "edges": edges.tolist(), **counts})
                for sample in range(3):
                    text = {"prompt": "pay 47 with 4 no 5p 30p :", "completion": "20p 27 15p 12 10p 2 2p 0"}
                    verdict = {"correct": (True, False, None)[sample], "ended": sample != 1}
                    append(folder / "completions.jsonl", {"run": run, "step": step, **text, **verdict})
    if results:
        ease = generator.beta(1, 1, size=80)
        graded: list[dict[str, Any]] = []
        for name, rate in models:
            chance = ease ** (1 / rate - 1)
            agreement = {"tokens": 5000, "uncertain_fraction": 0.4, "student_entropy_uncertain": rate}
            agreement |= {"teacher_entropy_uncertain": 1.4, "forward_kl_uncertain": 1 - rate, "forward_kl_certain": 0.1}
            correct = (generator.random((80, 8)) < chance[:, None]).astype(int).tolist()
            graded.append({"name": name, "correct": correct, "agreement": agreement})
        content = {"task": "coins", "prompts": 80, "samples": 8, "tau": 0.8, "models": graded}
        (folder / "results.json").write_text(json.dumps(content))


def append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as stream:
        stream.write(json.dumps(record) + "\n")


def written(folder: Path) -> Page:
    return Page(write_page(folder).read_text(encoding="utf-8"))


def test_a_whole_run_is_on_the_page_and_nothing_is_loaded(tmp_path: Path) -> None:
    write_run(tmp_path)
    page = written(tmp_path)
    assert not list(tmp_path.glob("*.part")) and page.stack == []
    assert page.tags.count("svg") == 11 and not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "Not complete" not in page.text
    for part in (
        "Avg@8",
        "Pass@4",
        "95 % bootstrap",
        "entropy-aware − reverse-kl",
        "Independent replications",
        "2.13.0",
    ):
        assert part in page.text, part
    links = {value for name, value in page.attributes if name in ("src", "href", "xlink:href")}
    ids = [f"#{value}" for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) and links and links <= set(ids)
    assert not re.search(r"url\((?!#)|@import", (tmp_path / "report.html").read_text())


def test_the_rates_are_those_of_the_matrix(tmp_path: Path) -> None:
    write_run(tmp_path)
    models = json.loads((tmp_path / "results.json").read_text())["models"]
    page = written(tmp_path)
    for model in models:
        matrix = np.array(model["correct"])
        assert f"{matrix.mean():.1%}".replace("%", " %") in page.text
        assert f"{matrix.any(axis=1).mean():.1%}".replace("%", " %") in page.text
    difference = 100 * (np.mean(models[3]["correct"]) - np.mean(models[2]["correct"]))
    assert f"entropy-aware − reverse-kl{difference:+.1f}" in page.text


def test_one_run_of_a_task_without_answers(tmp_path: Path) -> None:
    write_run(tmp_path, runs=("forward-kl",), steps=2)
    content = json.loads((tmp_path / "results.json").read_text())
    for model in content["models"]:
        model["correct"] = None
    (tmp_path / "results.json").write_text(json.dumps(content))
    page = written(tmp_path)
    assert "Nothing says whether an answer" in page.text and "Avg@" not in page.text
    assert "0.550" in page.text and page.tags.count("svg") == 9


@pytest.mark.parametrize("left", ["config.json", "metrics.jsonl", "completions.jsonl", "histograms.jsonl"])
def test_an_interrupted_run_says_what_is_missing(tmp_path: Path, left: str) -> None:
    write_run(tmp_path, steps=2, results=False)
    names = {path.name for path in tmp_path.iterdir()} | {"results.json"}
    for name in names - {left}:
        (tmp_path / name).unlink(missing_ok=True)
    page = written(tmp_path)
    assert "Not complete" in page.text
    assert {name for name in names if f"{name} is missing" in page.text} == names - {left}


def test_half_a_line_a_repeated_step_and_numbers_that_are_none(tmp_path: Path) -> None:
    for rate in (100, 300, 500):  # the second step is logged again by the run that resumed
        record = {"run": "a", "step": min(2, rate // 100), "tokens_per_second": rate, "rollout_seconds": 1.0}
        append(tmp_path / "metrics.jsonl", {**record, "loss": float("inf"), "forward_kl_open": None, "grad_norm": 2.0})
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"run": "a", "st')
    page = written(tmp_path)
    assert "metrics.jsonl has 1 unreadable line, left out" in page.text
    assert "100 %–––300" not in page.text and "300–" in page.text  # tokens/s: the mean of 100 and 500; no peak memory
    assert page.tags.count("svg") == 1 and "Gradient norm" in page.text


def test_what_a_model_emits_stays_text(tmp_path: Path) -> None:
    write_run(tmp_path, runs=(HOSTILE,), steps=2)
    append(
        tmp_path / "completions.jsonl", {"run": "b", "step": 1, "prompt": HOSTILE, "completion": HOSTILE + "x" * 9999}
    )
    (tmp_path / "config.json").write_text(json.dumps({"tau": "<b>", "prompt": HOSTILE, "nested": {HOSTILE: [HOSTILE]}}))
    page = written(tmp_path)
    assert "script" not in page.tags and page.stack == []
    assert "</pre><script>alert(1)</script> & \\u202egnihton\\u0000 \\ud800" in page.text
    assert not set("\u202e\x00") & set(page.text)
    assert "characters left out" in page.text and "x" * 5000 not in page.text
    assert escaped("\"'<") == "&quot;&#x27;&lt;"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "the student's own samples"),
        ({"off_policy_fraction": 0.5}, "the completions of a step, 50 % of them the teacher's"),
        ({"completion_column": "answer"}, "the given completions"),
    ],
)
def test_it_says_whose_completions_a_step_learned_from(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    write_run(tmp_path, runs=("a",), steps=2)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | options))
    for writer in ("student", "teacher", "data"):
        text = {"prompt": "p", "completion": "c", "writer": writer}
        append(tmp_path / "completions.jsonl", {"run": "b", "step": 1, **text})
    page = written(tmp_path)
    assert page.text.count(said) == 5  # two divergences, entropies, histograms, and how to read it
    assert page.text.count("cnot checked") == 3 and "cnot checkedthe teacher's" in page.text
    assert "cnot checkedgiven" in page.text


def test_the_loss_share_is_stated_where_it_was_measured(tmp_path: Path) -> None:
    record = {"student_seconds": 3.0, "teacher_seconds": 0.0, "rollout_seconds": 1.0}
    for step, seconds in ((1, 0.5), (2, 1.5)):  # of all steps together: 2 of 8
        measured = {"step": step, "loss_seconds": seconds}
        append(tmp_path / "metrics.jsonl", {"run": "a", **record, **measured})
    append(tmp_path / "metrics.jsonl", {"run": "b", "step": 1, **record})
    nothing = dict.fromkeys(("student_seconds", "teacher_seconds", "loss_seconds"), 0.0)
    append(tmp_path / "metrics.jsonl", {"run": "c", "step": 1, "rollout_seconds": 1.0, **nothing})
    page = written(tmp_path)
    assert "took 25.0 % of a step's forward and backward passes." in page.text
    assert "360 %" in page.text and "120 %" in page.text  # seconds and share in one cell
    assert "b: heads" not in page.text and "c: heads" not in page.text


def test_without_matplotlib_there_is_a_page_without_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, steps=3)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    page = written(tmp_path)
    assert "svg" not in page.tags and "matplotlib is not installed" in page.text and "Avg@8" in page.text


def test_long_runs_are_thinned_to_means() -> None:
    steps, values = np.arange(1.0, 10 * POINTS + 1), np.arange(10.0 * POINTS)
    kept, means = thinned(list(steps), list(values))
    assert len(kept) == len(means) == POINTS
    assert means[0] == pytest.approx(4.5) and kept[-1] == pytest.approx(steps[-10:].mean())
    assert running_mean(np.array([0.0, 3.0, 6.0, 0.0]), 3) == pytest.approx([1.5, 3, 3, 3])


def test_tokens_are_coloured_by_entropy_and_underlined_at_open_gates(tmp_path: Path) -> None:
    write_run(tmp_path, runs=("a",), steps=2)
    figures = [[0.5, 0.1, 0.2, 0.0], [2.0, 0.25, 1.5, 1.0], [None, None, None, None], [1.0, 0.0, 0.0, 0.3]]
    logged = {"run": "b", "step": 1, "prompt": "p", "completion": "x", "tokens": ["w3", HOSTILE, "", "\n"]}
    append(tmp_path / "completions.jsonl", {**logged, "figures": figures})
    long = {**logged, "run": "c", "tokens": [f" t{i}" for i in range(1500)], "figures": [figures[0]] * 1500}
    append(tmp_path / "completions.jsonl", long)
    page = written(tmp_path)
    assert page.stack == [] and "script" not in page.tags
    told = [value for name, value in page.attributes if name == "data-figures"]
    assert told[:4] == [
        "H_t 0.50, reverse KL 0.10, forward KL 0.20 nats; gate 0.00",
        "H_t 2.00, reverse KL 0.25, forward KL 1.50 nats; gate 1.00",
        "H_t –, reverse KL –, forward KL – nats; gate –",
        "H_t 1.00, reverse KL 0.00, forward KL 0.00 nats; gate 0.30",
    ]
    depths = [value for name, value in page.attributes if name == "style" and value and value.startswith("--h:")]
    assert depths[:4] == ["--h:0.25", "--h:1.00", "--h:0.00", "--h:0.50"]  # of the largest on the page
    html = (tmp_path / "report.html").read_text()
    assert re.findall(r'<span class="(\w*)" style', html)[:4] == ["", "gate", "", "gate"]
    assert "w3</pre><script>alert(1)</script> &" in page.text and "·↵\n" in page.text
    assert "02.00 nats" in page.text and "the mark is τ = 0.8" in page.text and "left:40.0%" in html
    assert "Ht 1.17 nats on average, at most 2.00; gate open at 2 of 4 tokens" in page.text
    assert len(told) == 4 + 1000 and "500 tokens left out" in page.text and " t499\n[" in page.text
    assert " t999" not in page.text and " t1000" in page.text


def test_one_sample_of_each_prompt_has_no_curve(tmp_path: Path) -> None:
    write_run(tmp_path, runs=("a",), steps=2)
    content = json.loads((tmp_path / "results.json").read_text())
    for model in content["models"]:
        model["correct"] = [outcomes[:1] for outcomes in model["correct"]]
    (tmp_path / "results.json").write_text(json.dumps({**content, "samples": 1}))
    page = written(tmp_path)
    assert "Avg@1" in page.text and "Pass@k" not in page.text


def test_every_set_has_a_table_and_what_was_evaluated_between_steps_a_curve(tmp_path: Path) -> None:
    write_run(tmp_path)
    content = json.loads((tmp_path / "results.json").read_text())
    models = [{**model, "set": name} for name in ("held-out", "AMC23") for model in content["models"]]
    for model in models[4:]:
        model["correct"] = model["correct"][:40]
    (tmp_path / "results.json").write_text(
        json.dumps({**content, "models": models, "sets": {"held-out": 80, "AMC23": 40}})
    )
    for run, step, rate in (("reverse-kl", 20, 0.25), ("reverse-kl", 40, 0.5), ("entropy-aware", 20, 0.4)):
        figures = {"AMC23/pass@1": rate, "AMC23/pass@8": rate, "held-out/forward_kl_uncertain": 1 - rate}
        append(tmp_path / "evaluations.jsonl", {"run": run, "step": step, **figures, "AMC23/tokens": 9})
    page = written(tmp_path)
    for part in ("held-out prompts80 prompts; 8 samples", "AMC23 prompts40 prompts; 8 samples"):
        assert part in page.text
    assert page.text.count("entropy-aware − reverse-kl") == 2
    for title in ("Pass@k: held-out", "Pass@k: AMC23", "AMC23: Pass@1", "held-out: forward KL, Ht > τ"):
        assert page.text.count(title) == 1
    assert page.tags.count("svg") == 11 + 3
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_a_table_says_where_it_scrolls(tmp_path: Path) -> None:
    """By its width, which is that of the longest line of each column: the browser compares it with the screen's."""
    narrow, wide = (table(["", *["H<sub>t</sub>"] * n], [["a", *["0.5<small>0.1 to 0.2</small>"] * n]]) for n in (1, 9))
    for text, need in ((narrow, 7.4 + 0.9 + 0.48 * 10), (wide, 7.4 + 9 * (0.9 + 0.48 * 10))):
        assert f"--need:{need:.1f}rem" in text and "scrolls sideways" in Page(text).text
    write_run(tmp_path, steps=2)
    page = written(tmp_path)
    boxes = [value for name, value in page.attributes if name == "role" and value == "region"]
    assert len(boxes) == page.tags.count("table") == 3


def test_the_command_needs_no_torch_and_names_a_wrong_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run", steps=2)
    program = (
        "import sys; from distillation.page.__main__ import main; sys.exit(main() or 3 * ('torch' in sys.modules))"
    )
    for folder, status, said in ((tmp_path / "run", 0, "report.html"), (tmp_path, 1, "holds none of a run's files")):
        found = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, cwd=PYTHON)
        assert found.returncode == status and said in found.stdout + found.stderr, found.stderr
        assert "Traceback" not in found.stderr
