"""``python -m benchmarks.gpu.parts PART``: what a step consists of on the first size: kernels, chunks, launches."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import torch
from torch._C._autograd import DeviceType

from eopd_kernels.testing.steps import MISSING

from ..contenders import our
from ..measure import significant
from ..page import markdown_table
from ..problems import HiddenProblem, hidden_problem
from ..steps import Step, chunk_tokens, products
from ..truth import largest_error
from .step import DEVICE, METER, REHEARSED, SHAPES, conclude, gpu, report

CHUNKS = (2, 3) if REHEARSED else (512, 1024, 2048, 4096, 8192)
BACKENDS = ("cuda", "triton")
KERNELS = 12  # lines of a profile
ROUNDS = 1 if REHEARSED else 5


def milliseconds(step: Step) -> float:
    return 1e3 * statistics.median(METER.seconds(step) for _ in range(ROUNDS))


def profile(given: HiddenProblem) -> int:
    """What each kernel of a step takes, and how many launches there are."""
    kind, column = (DeviceType.CPU, "cpu") if REHEARSED else (DeviceType.CUDA, "device")
    words = []
    for backend in BACKENDS:
        step = our(backend).step(given)
        step()
        with torch.profiler.profile() as profiled:
            METER.seconds(step)  # which waits for its end
        events = [event for event in profiled.key_averages() if event.device_type == kind and "spin" not in event.key]
        if not events:
            print("the profiler sees no kernels here")
            return MISSING
        spent = {e.key: (e.count, getattr(e, f"self_{column}_time_total") / 1e3) for e in events}
        lines = sorted(spent.items(), key=lambda one: -one[1][1])
        launches, total = (sum(one) for one in zip(*spent.values(), strict=True))
        words.append(f"{backend} {total:.1f} ms in {launches} launches")
        rows = [[key[:100].replace("|", "/"), f"{count}", f"{ms:.3f}"] for key, (count, ms) in lines[:KERNELS]]
        report(f"## Kernels of a step: {words[-1]}", markdown_table(("kernel", "launches", "ms"), rows))
    return conclude([], ", ".join(words))


def sweep(given: HiddenProblem) -> int:
    """A step under budgets for the blocks of logits, and its four products alone in the same chunks."""
    rows, times = [], {}
    for tokens in CHUNKS:
        budget = tokens * SHAPES[0].vocab * (4 + 4 + 2)
        step, alone = our("cuda", workspace_bytes=budget).step(given), products(given, workspace_bytes=budget)
        for each in (step, alone):
            each()
        chunk, ms, least = chunk_tokens(given, budget), milliseconds(step), milliseconds(alone)
        times[chunk], peak = ms, METER.peak_bytes(step) / 2**20
        rows.append([f"{chunk:,}", f"{budget:,}", f"{ms:.2f}", f"{least:.2f}", significant(ms / least), f"{peak:,.0f}"])
        print(rows[-1], flush=True)
    header = ("tokens per chunk", "workspace_bytes", "ms", "four products alone, ms", "ratio", "peak MiB")
    report(f"## Chunks, {SHAPES[0]}", markdown_table(header, rows))
    best, usual = min(times, key=lambda chunk: times[chunk]), chunk_tokens(given)
    return conclude([], f"chunks of {best:,} tokens are the quickest, {times[best]:.1f} ms; the default is {usual:,}")


def graph(given: HiddenProblem) -> int:
    """A step as a CUDA graph: a replay gives the same gradients, and what it takes beside the eager step."""
    if REHEARSED:
        print("a graph needs a GPU")
        return MISSING
    failed, words = [], []
    for backend in BACKENDS:
        step, side = our(backend).step(given), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            expected = [step(), step()][1]
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            found = step()
        captured.replay()
        assert isinstance(found, list) and isinstance(expected, list)
        if max(map(largest_error, found, expected)) > 2**-7:
            failed.append(f"{backend}: a replay gives other gradients")
        words.append(f"{backend} {milliseconds(captured.replay):.2f} ms, eager {milliseconds(step):.2f}")
        del captured, found, expected
    return conclude(failed, "a replay takes " + "; ".join(words))


PARTS: dict[str, Callable[[HiddenProblem], int]] = {part.__name__: part for part in (profile, sweep, graph)}

if __name__ == "__main__":
    with gpu():
        sys.exit(PARTS[sys.argv[1]](hidden_problem(SHAPES[0], torch.bfloat16, device=DEVICE)))
