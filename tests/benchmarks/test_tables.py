"""From the CSV to the pages: failures stay visible, ratios point where their targets do, whole blocks are replaced."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import report, tables
from benchmarks.__main__ import main
from benchmarks.contenders import FILTERED, HIDDEN, OURS, OURS_REVERSE, PLAIN, PRODUCTS, TRL
from benchmarks.machine import ENVIRONMENTS, command
from benchmarks.matrix import GROUPS, LEVELS, QUICK, REAL, TARGETS, cases
from benchmarks.measure import Sample
from benchmarks.page import replace_block
from benchmarks.records import Case, Record, append, read, write_facts
from benchmarks.targets import Row, Target, compared, goals, ratio_table, rows
from benchmarks.workspace import parse
from eopd_kernels.testing.processes import MIB

FACTS = {"command": "`python -m benchmarks --quick`", "date": "2026-01-02", "CPU": "a CPU", "level": "quick"}


def record(case: Case, name: str, seconds: float, mebibytes: int, error: float) -> Record:
    return replace(
        case.record(next(i for i in case.contenders if i.name == name)),
        seconds=(seconds, 2 * seconds, seconds),
        peak_bytes=mebibytes * MIB,
        student_error=error,
        weight_error=error,
        loss_error=error,
        divergence=0.5,
        error_tokens=7,
    )


@pytest.fixture
def main_case() -> Case:
    return next(case for case in cases(QUICK, "cpu") if case.shape.tokens == QUICK.main_tokens)


@pytest.fixture
def records(main_case: Case) -> list[Record]:
    """Plain takes 3 times ours and 10 times its memory; trl is faster than ours and more exact; Liger failed."""
    failed = next(i for i in main_case.contenders if i.name.startswith("Liger chunked"))
    return [
        replace(main_case.record(HIDDEN[PRODUCTS]), seconds=(0.9, 1.8, 0.9)),
        record(main_case, OURS, 1.0, 10, 1e-6),
        record(main_case, PLAIN, 3.0, 100, 2e-6),
        record(main_case, OURS_REVERSE, 1.0, 10, 1e-6),
        record(main_case, TRL, 0.5, 40, 0.5e-6),
        replace(main_case.record(failed), failure="out of memory: more than 3.0 GiB"),
    ]


def lines(table: str) -> Iterator[list[str]]:
    for line in table.splitlines()[2:]:
        yield [cell.strip() for cell in line.strip("|").split(" | ")]


def test_a_case_shows_everyone_beside_ours_of_the_same_objective(records: list[Record]) -> None:
    found = {cells[0].split("  ")[0].strip(): cells for cells in lines(tables.case_table(records))}
    assert found[PLAIN][1:6] == ["gated", "3.00 s (3.00–6.00)", "3.00x", "100", "10.0x"]
    trl = next(cells for name, cells in found.items() if name.startswith(TRL))
    assert trl[3] == "0.500x" and trl[5] == "4.00x" and trl[7] == "5.0e-07"
    failed = next(cells for name, cells in found.items() if name.startswith("Liger"))
    assert failed[2] == "out of memory: more than 3.0 GiB" and set(failed[3:]) == {"–"}
    assert found[PRODUCTS][4:] == ["–"] * 5


def test_targets_name_both_objectives_and_failures(records: list[Record]) -> None:
    made = rows(goals(QUICK), records)
    by_peer = {(row.against, row.target.kind if row.target else ""): row for row in made}
    assert by_peer["plain PyTorch (gated)", "faster"].met is True
    assert by_peer[f"{TRL} (reverse)", "faster"].met is False
    assert by_peer[f"{PRODUCTS} (no loss)", "its time"].reached == Sample((1 / 0.9,) * 3, "x")
    failed = by_peer["Liger chunked JSD, β = 1 (reverse)", "less memory"]
    assert failed.met is None and failed.peer == "out of memory: more than 3.0 GiB"
    assert "| – | out of memory" not in ratio_table(made) and "out of memory: more than 3.0 GiB |" in ratio_table(made)


def test_no_ratio_to_memory_that_is_not_seen(records: list[Record]) -> None:
    unseen = [replace(r, peak_bytes=0) if r.implementation == OURS else r for r in records]
    made = {(row.against, row.target.kind if row.target else ""): row for row in rows(goals(QUICK), unseen)}
    found = made["plain PyTorch (gated)", "less memory"]
    assert found.reached is None and found.met is None and str(found.ours) == "0.00 MiB"
    assert tables.case_table(unseen) and tables.front_table(unseen)


def test_the_front_page_shows_where_a_peer_is_better(records: list[Record]) -> None:
    found = {cells[0]: cells for cells in lines(tables.front_table(tables.main_case(records, "quick")))}
    assert found[PLAIN] == [PLAIN, "3.00x faster", "10.0x less", "2.00"]
    (trl,) = (cells for name, cells in found.items() if name.startswith(TRL))
    assert trl[1:] == ["**2.00x slower**", "4.00x less", "**0.500**"]
    assert next(cells for name, cells in found.items() if name.startswith("Liger"))[1].startswith("out of memory")
    assert OURS not in found


def test_the_best_peer_s_errors_stand_beside_ours(records: list[Record]) -> None:
    summary, table = tables.best_peer_table(records).split("\n\n")
    assert "in 3 of 6 " in summary
    gated, reverse = lines(table)
    assert gated[3] == f"1.0e-06; 2.0e-06 ({PLAIN})" and reverse[3] == f"1.0e-06; **5.0e-07 ({TRL})**"


def test_a_filtered_gradient_is_no_peer(records: list[Record]) -> None:
    filtered = replace(records[1], implementation=FILTERED[12], student_error=1e-7)
    assert tables.best_peer_table([*records, filtered]) == tables.best_peer_table(records)


def test_targets_on_real_hidden_states_stand_with_the_others(records: list[Record]) -> None:
    late = next(case for case in cases(QUICK, "cpu") if case.group == REAL)
    real = [record(late, FILTERED[12], 1.0, 10, 1e-3), replace(late.record(HIDDEN[PRODUCTS]), seconds=(2.0,) * 3)]
    table = report.section(TARGETS, records, "quick", [*records, *real])[0]
    (line,) = (cells for cells in lines(table) if FILTERED[12] in cells[0])
    assert line[1:5] == [f"{PRODUCTS} (no loss)", "≤ 0.6x its time", "0.500x (0.500–1.00)", "yes"]


def test_from_the_csv_to_both_pages(records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    growing = [case for case in cases(QUICK, "cpu") if case.group in ("tokens", "vocabulary")]
    folder, page, front = tmp_path / "benchmarks", tmp_path / "benchmarks.md", tmp_path / "README.md"
    folder.mkdir()
    append(folder / "cpu.csv", records)
    append(folder / "cpu.csv", [record(case, OURS_REVERSE, 1.0, 10, 1e-6) for case in growing])
    write_facts(folder / "cpu.json", FACTS)
    page.write_text("above\n<!-- begin results cpu -->\n<!-- end results cpu -->\nbelow\n")
    front.write_text("<!-- begin figures -->\n<!-- end figures -->\n")
    for name, value in (("RESULTS", folder), ("PAGE", page), ("FRONT_PAGE", front)):
        monkeypatch.setattr(report, name, value)
    monkeypatch.setattr(sys, "argv", ["report"])
    report.main()
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("\nbelow\n") and "2026-01-02" in text and "a CPU" in text
    assert "### What it must reach" in text and "errors of the first 7 tokens, mean reverse KL 0.5 nats" in text
    summary = front.read_text()
    assert "N=256, V=4,096, D=128 fp32; 2026-01-02, a CPU" in summary and "3.00x faster" in summary
    images = re.findall(r"\]\((.*?\.png)\)", text + summary.replace("docs/", ""))
    assert len(images) == 3
    for image in images:
        assert (tmp_path / image).stat().st_size > 10_000 and (tmp_path / image).with_suffix(".svg").exists()
    before = {path: path.read_bytes() for path in (page, front, *folder.iterdir())}
    report.main()
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize("stem", [stem for stem in report.STEMS if (report.RESULTS / f"{stem}.csv").exists()])
def test_the_committed_pages_are_those_of_the_committed_csv(stem: str) -> None:
    assert report.report(report.RESULTS, stem, "benchmarks") in report.PAGE.read_text()
    if stem == report.FRONT:
        assert report.front_page(report.RESULTS, stem, "docs/benchmarks") in report.FRONT_PAGE.read_text()


def test_a_run_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run(case: Case, *rest: object) -> list[Record]:
        ran.append(case.name)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return [replace(case.record(i), seconds=(1.0,)) for i in case.contenders]

    monkeypatch.setattr("benchmarks.__main__.run", run)
    monkeypatch.setattr("benchmarks.__main__.draw", lambda file, stem: None)
    options = ["benchmarks", "--quick", "--only", "tokens", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", options)
    with pytest.raises(KeyboardInterrupt):
        main()
    assert main() == 0
    first, second = (case.name for case in cases(QUICK, "cpu") if case.group == "tokens")
    assert ran == [first, second, second]
    assert {r.case for r in read(tmp_path / "cpu.csv")} == {first, second} and (tmp_path / "cpu.md").exists()
    assert "2 of 2 cases are" not in capsys.readouterr().err and main() == 0 and len(ran) == 3
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--quick", "--again", "--only", "models", "--out", str(tmp_path)])
    assert main() == 0 and len(ran) == 4 and len({r.case for r in read(tmp_path / "cpu.csv")}) == 3
    monkeypatch.setattr(sys, "argv", [*options, "--again"])
    assert main() == 0 and len(ran) == 6 and len({r.case for r in read(tmp_path / "cpu.csv")}) == 3
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--full", "--out", str(tmp_path)])
    assert main() == 2 and "--again" in capsys.readouterr().err


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_matrix(level: str, device: str) -> None:
    made = cases(LEVELS[level], device)
    assert {case.group for case in made} == set(GROUPS)
    assert len({(case.group, case.name) for case in made}) == len(made)
    wanted = {(goal.case, goal.ours) for goal in goals(LEVELS[level])}
    wanted |= {(goal.case, goal.against) for goal in goals(LEVELS[level]) if goal.against}
    if device == "cpu":
        assert wanted <= {(case.name, i.name) for case in made for i in case.contenders}
    every = {i.name for case in made for i in case.contenders}
    elsewhere = {name for name in HIDDEN if "product behind" in name} if device == "cuda" else set()
    if level == "quick":
        elsewhere |= {name for exponent, name in FILTERED.items() if exponent != 12}
    assert every >= set(HIDDEN) - elsewhere


def test_where_measurements_were_kept_is_no_part_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--full", "--out", "somewhere", "--json", "file", "--again"])
    assert command("benchmarks") == "python -m benchmarks --full --again"
    monkeypatch.setattr(sys, "argv", ["x", "--only", "real", "--full", "--only", "tokens"])
    assert command("benchmarks", without=["--only"]) == "python -m benchmarks --full"


@pytest.mark.parametrize("partial", [["--quick"], ["--only", "small"]])
def test_a_page_is_written_by_whole_runs_only(partial: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["workspace", *partial, "--write", "page.md"])
    with pytest.raises(SystemExit):
        parse()


def test_a_capability_restarts_the_command_once(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
        started.append((command, env))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["workspace", "--capability", "avx2"])
    with pytest.raises(SystemExit):
        parse()
    (command, environment), *others = started
    assert command[1:] == ["-m", "benchmarks.workspace", "--capability", "avx2"] and not others
    assert environment.items() >= ENVIRONMENTS["avx2"].items()

    for name, value in ENVIRONMENTS["avx2"].items():
        monkeypatch.setenv(name, value)
    parse()
    assert len(started) == 1


@pytest.mark.parametrize(
    ("target", "reached", "met"),
    [
        (Target("faster", 25), 25.0, True),
        (Target("faster", 25), 24.9, False),
        (Target("its time", 1.8), 1.8, True),
        (Target("its time", 1.8), 1.81, False),
        (Target("MiB", 160), 161.0, False),
    ],
)
def test_targets(target: Target, reached: float, met: bool) -> None:
    sample = Sample((reached,), "x")
    assert Row("case", "peer", target, sample, sample).met is met


def test_the_ratio_points_where_the_target_does() -> None:
    ours, peer = Sample((1.0,), "s"), Sample((4.0,), "s")
    assert compared("c", "p", Target("faster", 2), ours, peer).reached == Sample((4.0,), "x")
    assert compared("c", "p", Target("its time", 2), ours, peer).reached == Sample((0.25,), "x")
    assert "| **no** |" in ratio_table([compared("c", "p", Target("faster", 5), ours, peer)])


def test_a_generated_block_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- begin a -->\nold\n<!-- end a -->\nbelow\n<!-- begin b -->\nkept\n<!-- end b -->\n")
    replace_block(page, "a", "new")
    assert page.read_text() == (
        "above\n<!-- begin a -->\n\nnew\n\n<!-- end a -->\nbelow\n<!-- begin b -->\nkept\n<!-- end b -->\n"
    )
    with pytest.raises(ValueError, match="begin c"):
        replace_block(page, "c", "new")
