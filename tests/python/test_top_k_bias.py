"""What docs/guides/top_k.md says of the top-k halves holds in a short run of the experiment."""

from __future__ import annotations

from pathlib import Path

import pytest
from top_k_bias import TOP, VARIANTS, descend, draw, table, teachers

from eopd_kernels import TopK

STEPS = 60


@pytest.mark.parametrize("name", VARIANTS)
def test_which_halves_have_the_teacher_as_a_fixed_point(name: str) -> None:
    track = descend(VARIANTS[name].forward, VARIANTS[name].reverse, steps=STEPS)
    outside = teachers().softmax(1)[:, TOP:].sum(1)
    if name in ("raw with tail", "full vocabulary", "reverse, raw with tail"):
        assert (track.forward_kl.abs() < 1e-9).all() and ((track.outside - outside).abs() < 1e-9).all()
        return
    flat, peaked = range(2)
    if (
        name == "reverse, raw, no tail"
    ):  # the other way: the student's mass leaves the top k, the faster the more it has
        assert (track.forward_kl.diff(dim=0) > 0).all() and (track.outside.diff(dim=0) > 0).all()
        return
    # It leaves at once, goes on, and the more mass the teacher has outside the top k, the faster.
    assert (track.forward_kl.diff(dim=0) > 0).all() and (track.outside.diff(dim=0) < 0).all()
    held = name == "renormalised, beside reverse KL"
    assert track.outside[-1, flat] < (0.75 if held else 0.6) * outside[flat]
    assert track.forward_kl[-1, flat] > (0.01 if held else 0.03)
    assert track.outside[-1, peaked] > 0.8 * outside[peaked] and track.forward_kl[-1, peaked] < 0.001


def test_the_raw_half_is_the_renormalised_one_with_a_smaller_step() -> None:
    """Its gradient is that of the renormalised teacher times the teacher's mass in the top k."""
    mass = teachers().softmax(1)[:, :TOP].sum(1)
    raw = descend(TopK(TOP, teacher="raw"), steps=20)
    for teacher in range(2):
        slower = descend(TopK(TOP), steps=20, rate=float(mass[teacher]))
        assert raw.outside[:, teacher] == pytest.approx(slower.outside[:, teacher], rel=1e-9)


def test_both_renormalised_say_nothing_of_the_rest() -> None:
    track = descend(TopK(TOP, student="renormalized"), steps=STEPS)
    assert (track.forward_kl.abs() < 1e-9).all()


def test_the_table_and_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    tracks = {name: descend(variant.forward, variant.reverse, steps=2) for name, variant in VARIANTS.items()}
    header, rule, *rows = table(tracks).splitlines()
    assert len(rows) == 2 * len(VARIANTS) and {line.count("|") for line in (header, rule, *rows)} == {5}
    draw(tracks, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
