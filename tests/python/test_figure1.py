"""The synthetic set-up of figure 1: entropies, the measure, what exact and sampled reverse KL do, its files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import figure1
import pytest
import torch
from figure1 import TOP, VARIANTS, Track, descend, problem, summary

from eopd_kernels import entropy_aware_kl

ENTROPIES = torch.tensor([0.3, 0.6, 3.5, 4.0], dtype=torch.float64)
EXACT, SAMPLED = VARIANTS["reverse KL, exact"], VARIANTS["reverse KL, 1 sampled token"]


def test_teachers_have_the_entropies_and_seeds_differ() -> None:
    teacher, start = problem(2, 200, ENTROPIES)
    assert teacher.shape == start.shape == (2, 4, 200)
    found = entropy_aware_kl(start, teacher).teacher_entropy
    torch.testing.assert_close(found, ENTROPIES.float().expand(2, 4), atol=1e-4, rtol=0)
    assert not torch.equal(start[0], start[1])
    assert torch.equal(problem(1, 200, ENTROPIES)[1][0], start[0])


def test_the_change_rate_is_the_share_of_new_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    start = torch.arange(40.0).flip(0).expand(1, 1, 40)  # the top ten are 0 to 9
    rise = torch.zeros(40).index_fill(0, torch.tensor([20, 21, 22]), 100.0)

    def raise_three(variant: object, student: torch.Tensor, *_: object) -> object:
        return SimpleNamespace(loss=-(student * rise).sum())

    monkeypatch.setattr(figure1, "loss", raise_three)
    assert descend(EXACT, start, start, steps=2, rate=1.0).change.flatten().tolist() == pytest.approx([0.3, 0.0])


def test_sampled_reverse_kl_has_the_gradient_of_the_exact_one_on_average() -> None:
    teacher, start = (logits[0, 1:3] for logits in problem(1, 30, ENTROPIES.clamp(max=2.5)))
    many = SAMPLED._replace(samples=4_000)
    gradients = []
    for variant in (EXACT, many):
        student = start.clone().requires_grad_()
        figure1.loss(variant, student, teacher, torch.Generator().manual_seed(0)).loss.backward()
        assert student.grad is not None
        gradients.append(student.grad)
    assert gradients[0].abs().max() > 0.05
    torch.testing.assert_close(gradients[1], gradients[0], atol=0.03, rtol=0)


def test_sampled_reverse_kl_is_restless_on_flat_teachers_and_exact_reverse_kl_settles() -> None:
    teacher, start = problem(1, 200, ENTROPIES)
    settled = {}
    for name, variant in (("exact", EXACT), ("sampled", SAMPLED)):
        settled[name] = descend(variant, teacher, start, steps=200).change[100:].mean((0, 1))
    assert settled["sampled"][2:].min() > 0.005
    assert settled["sampled"][2:].mean() > 5 * settled["sampled"][:2].mean()
    assert settled["sampled"][2:].mean() > 5 * settled["exact"][2:].mean()


def test_the_summary_is_by_group_with_the_range_of_the_seeds() -> None:
    change = torch.zeros(4, 2, 4)
    change[2:, 0, 2:], change[2:, 1, 2:], change[:2] = 0.2, 0.4, 0.9  # the first half does not count
    rows = summary({"a": Track(change, torch.ones(2, 4), ENTROPIES.expand(2, 4) - 0.5)}, ENTROPIES)
    low, high = rows
    assert low["settled_change"] == [0, 0, 0]
    assert high["settled_change"] == pytest.approx([0.3, 0.2, 0.4])
    assert high["reverse_kl"] == [1, 1, 1] and high["entropy_gap"] == pytest.approx([-0.5] * 3)


def test_the_program_writes_plot_and_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(figure1, "VOCAB_SIZE", 50)
    monkeypatch.setattr(figure1, "ENTROPIES", torch.linspace(0.2, 3.6, 6, dtype=torch.float64))
    figure1.main(["--steps", "40", "--seeds", "2", "--write", str(tmp_path / "figure")])
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "figure.json").read_text())
    assert len(content["rows"]) == 2 * len(VARIANTS) and content["settings"]["top"] == TOP
    assert all(f"{row['settled_change'][0]:.3%}" in printed for row in content["rows"])
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="2"):
        figure1.main(["--seeds", "0"])
    assert "--seeds: must be 1 or more, got 0" in capsys.readouterr().err
