"""Which objective a name or a block is, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import distill as program
import pytest
from distillation.command_line import parse_options
from distillation.errors import UsageError
from distillation.objectives import PRESETS

from eopd_kernels import EntropyGate, Objective, QuantileGate, Sampled, Skewed, TopK

from .small_run import arguments, lines

pytestmark = pytest.mark.usefixtures("undrawn")

TAIL = TopK(8, teacher="raw", tail=True)


def chosen(tmp_path: Path, text: str, *words: str) -> dict[str, Objective]:
    """From a YAML file, whose entry ``objective`` is ``text``."""
    file = tmp_path / "options.yaml"
    file.write_text(f"objective: {text}\n")
    return parse_options(["--config", str(file), "--use-cpu", *words]).loss.objectives


def test_every_preset_of_the_library_has_its_name(tmp_path: Path) -> None:
    names = [name for name, member in vars(Objective).items() if isinstance(member, classmethod)]
    assert len(names) > 9
    for name in names:
        hyphens = name.replace("_", "-")
        assert chosen(tmp_path, hyphens) == {hyphens: getattr(Objective, name)()}
    assert set(PRESETS) - {name.replace("_", "-") for name in names} == {"entropy-aware", "paper"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("both", {"reverse-kl": Objective.reverse_kl(), "entropy-aware": Objective()}),
        ("paper", {"paper": Objective.eopd_paper()}),
        ("{preset: jsd, beta: 0.1}", {"jsd": Objective.jsd(0.1)}),
        ("\n  preset: gkd\n  beta: 0.25\n  temperature: 2", {"gkd": Objective.gkd(0.25, 2.0)}),
        ("{preset: skewed-forward-kl, skew: 0.2, name: skl-2}", {"skl-2": Objective.skewed_forward_kl(0.2)}),
        (
            "{gate: {threshold: 1.5, of: student, sharpness: 4}}",
            {"own": Objective(gate=EntropyGate(1.5, "student", False, 4))},
        ),
        ("{gate: {quantile: 0.9}, alpha: 0.5}", {"own": Objective(gate=QuantileGate(0.9), alpha=0.5)}),
        ("{gate: always, forward: {k: 8, teacher: raw, tail: true}}", {"own": Objective(gate="always", forward=TAIL)}),
        ("{reverse: sampled, forward: none}", {"own": Objective(reverse="sampled", forward="none")}),
        ("{reverse: {clip_low: 0.1}, forward: {k: 4}}", {"own": Objective(reverse=Sampled(0.1), forward=TopK(4))}),
        ("{reverse: {skew: 0.3}, combine: blend}", {"own": Objective(reverse=Skewed(0.3), combine="blend")}),
        ("{temperature: [1, 2], reverse_weight: 0.5}", {"own": Objective(temperature=(1, 2), reverse_weight=0.5)}),
    ],
)
def test_names_and_blocks(tmp_path: Path, text: str, expected: dict[str, Objective]) -> None:
    assert chosen(tmp_path, text) == expected
    echoed = parse_options(["--config", str(tmp_path / "options.yaml"), "--use-cpu"]).given["objective"]
    assert parse_options([f"--objective={echoed}", "--use-cpu"]).loss.objectives == expected


def test_the_options_beside_it_change_what_has_a_gate(tmp_path: Path) -> None:
    words = ("--tau=1.5", "--alpha=0.5", "--combine=switch", "--temperature=2")
    gated = Objective(gate=EntropyGate(1.5), alpha=0.5, combine="switch", temperature=2.0)
    assert chosen(tmp_path, "both", *words) == {"reverse-kl": Objective.reverse_kl(2.0), "entropy-aware": gated}
    assert chosen(tmp_path, "eopd-paper", "--tau=1.5")["eopd-paper"].gate == EntropyGate(1.5)
    assert chosen(tmp_path, "reverse-kl", "--tau=1.5") == {"reverse-kl": Objective.reverse_kl()}  # splits the metrics


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("jsf", [], "argument --objective: 'jsf' is no preset, those are both, "),
        ("{preset: jsf}", [], "argument --objective: 'jsf' is no preset"),
        ("{preset: jsd, skew: 0.1}", [], "jsd takes no 'skew', but beta, temperature"),
        ("{gait: always}", [], "a block takes no 'gait', but gate, alpha, combine"),
        ("{gate: {treshold: 1}}", [], "gate takes no block of treshold, but of some of [['threshold', 'of', "),
        ("{alpha: {k: 1}}", [], "alpha takes no block of k"),
        ("{preset: jsd, beta: 2}", [], "argument --objective: beta must be"),
        ("{alpha: -1}", [], "argument --objective: Objective.alpha must be"),
        ("{alpha: 1, name: ../x}", [], "the name '../x' is more than letters in a block"),
        ("[1]", [], "is no preset"),
        ("'{a'", [], "argument --objective: while parsing"),
        ("{alpha: 1}", ["--temperature=2"], "--temperature has no effect on a block"),
        (
            "forward-kl",
            ["--alpha=0.5"],
            "argument --alpha: has no effect on the objective 'forward-kl', which has no gate",
        ),
        (
            "{reverse: sampled, temperature: 2}",
            [],
            "argument --temperature: 2.0 is not 1, at which completions are sampled",
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        chosen(tmp_path, text, *words)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_sampled_half_needs_sampled_completions(tmp_path: Path) -> None:
    words = ["--teacher=a", "--student=b", "--prompts=p.txt", "--completion-column=reply"]
    with pytest.raises(UsageError, match="needs completions that are sampled"):
        chosen(tmp_path, "{reverse: {clip_low: 0.1}}", *words)


def test_a_run_minimises_what_the_block_says(tmp_path: Path) -> None:
    """Half of the forward KL alone, so that the loss is half of that metric; the run has its name."""
    block = "{name: half, gate: always, reverse: none, alpha: 0.5}"
    run = tmp_path / "run"
    assert program.main(arguments(tmp_path, f"--objective={block}", "--max-steps=1", f"--output-dir={run}")) == 0
    [record] = lines(run)
    assert record["run"] == "half" and record["loss"] == pytest.approx(0.5 * record["forward_kl"], rel=1e-5)
    assert (run / "student-half").is_dir()
    results: Any = (run / "results.json").read_text()
    assert '"name": "half"' in results
