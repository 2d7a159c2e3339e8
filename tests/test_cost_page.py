"""What docs/guides/cost.md predicts, against what was measured."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from eopd_kernels.heads import products
from tests.processes import fresh_process
from tests.test_docs import blocks
from tests.test_memory import few_tokens

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "guides" / "cost.md"


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The functions of the page."""
    names: dict[str, Any] = {"__name__": "cost"}
    exec(compile("\n".join(blocks(PAGE, "python")), PAGE, "exec"), names)
    return names


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", [64, 1000])
def test_memory(n: int, dtype: str, page: dict[str, Any]) -> None:
    itemsize = getattr(torch, dtype).itemsize
    if itemsize == 2 and not products.widening(torch.device("cpu"), torch.bfloat16):
        pytest.skip("this processor brings bf16 to fp32, which the page does not predict")
    predicted = page["peak_bytes"](n, 65_536, 256, 256, page["cpu"], itemsize)
    panels = 8 * 2**20 * (itemsize == 2 and n == 64)  # of dW on its way to bf16: a constant, of a small case much
    assert fresh_process(few_tokens, n, dtype, "cpu") == pytest.approx(predicted + panels, rel=0.15)


@pytest.mark.parametrize(("table", "beside"), [("workspace", 1), ("workspace older", 0)])
def test_chunks_of_any_size(table: str, beside: int, page: dict[str, Any]) -> None:
    """As the tables "Workspace" have it: N, V, D of six budgets each, and how much longer than the products it took."""
    text, errors = (DOCS / "benchmarks.md").read_text(), []
    text = text.partition(f"<!-- begin {table} -->")[2].partition("<!-- end ")[0]
    for part in re.split(r"\nN=", text)[1:]:
        n, v, d = (int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", part)[:3])
        for mib, tokens, ratio in re.findall(r"\| (\d+) MiB \| (\d+) \| ([\d.]+)x \(", part):
            machine = page["cpu"]._replace(budget=int(mib) * 2**20, fewest=32)
            assert page["chunk_tokens"](n, v, 4, machine) == int(tokens)
            times = page["seconds"](n, v, d, d, machine) * machine.rate / (2 * n * v * 4 * d)
            errors.append(abs(times / float(ratio) - 1))
    assert len(errors) == 12 and sum(error > 0.06 for error in errors) == beside and max(errors) < 0.15


def published(stem: str, group: str) -> dict[tuple[int, int, int, int], float]:
    """The quickest time of reverse KL in fp32, by tokens, vocabulary and both dimensions."""
    found: dict[tuple[int, int, int, int], float] = {}
    with (DOCS / "benchmarks" / f"{stem}.csv").open() as file:
        for row in csv.DictReader(file):
            ours = row["implementation"] == "eopd_kernels, reverse KL" and row["dtype"] == "fp32"
            if ours and row["group"] == group and int(row["student_dim"]) > 0:
                size = tuple(int(row[name]) for name in ("tokens", "vocab", "student_dim", "teacher_dim"))
                found[size] = min(map(float, row["seconds"].split()))  # type: ignore[index]
    return found


@pytest.mark.parametrize(
    ("stem", "group", "beside"),
    [("cpu", "tokens", 0), ("cpu", "vocabulary", 0), ("cpu-older", "tokens", 0), ("cpu-older", "vocabulary", 1)],
)
def test_time_grows_as_predicted(stem: str, group: str, beside: int, page: dict[str, Any]) -> None:
    measured, points = published(stem, group), 6
    assert len(measured) == points
    ratios = [seconds / page["seconds"](*size, page["cpu"]) for size, seconds in measured.items()]
    rate = math.exp(sum(map(math.log, ratios)) / points)
    assert sum(abs(ratio / rate - 1) > 0.15 for ratio in ratios) == beside


def test_the_table_is_what_the_functions_say(page: dict[str, Any]) -> None:
    rows = re.findall(r"\| 10(.) \| ([\d,]+|[\d.]+) ms \| ([\d.]+) GiB \| ([\d,.]+) GiB \|", PAGE.read_text())
    assert len(rows) == 5
    for exponent, (_, *said) in zip(range(3, 8), rows, strict=True):
        step = (10**exponent, 151_936, 1024, 4096)
        ms, gib, logits = (float(number.replace(",", "")) for number in said)
        assert 1e3 * page["seconds"](*step, page["gpu"], 2) == pytest.approx(ms, rel=0.02)
        assert page["peak_bytes"](*step, page["gpu"], 2) / 2**30 == pytest.approx(gib, rel=0.02)
        assert 2 * 2 * 10**exponent * 151_936 / 2**30 == pytest.approx(logits, rel=0.06)


def test_it_is_the_arithmetic_of_the_page_about_gpus(page: dict[str, Any]) -> None:
    said = re.search(r"\| together \| +\| ([\d.]+) \(", (DOCS / "gpu.md").read_text())
    assert said is not None
    ms = 1e3 * page["seconds"](8192, 128_256, 2048, 4096, page["gpu"], 2)
    assert ms == pytest.approx(float(said[1]), rel=0.02)
