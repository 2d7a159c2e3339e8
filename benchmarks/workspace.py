"""``python -m benchmarks.workspace``: time and memory under budgets for the blocks of logits, behind the default of
``workspace_bytes``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from .cli import parse, publish
from .losses import fused_hidden
from .measure import MIB, THREADS, Sample, fresh_process, interleaved, peak_memory, progress
from .problems import HiddenProblem, hidden_problem
from .results import markdown_table
from .steps import Step, chunk_tokens, of_loss, products

MODULE = "benchmarks.workspace"
BUDGETS = (32, 64, 96, 128, 192, 256)  # MiB


@dataclass(frozen=True)
class Shape:
    """N, V and D of both sides."""

    tokens: int
    vocab: int
    dim: int

    def __str__(self) -> str:
        return f"N={self.tokens:,}, V={self.vocab:,}, D={self.dim:,}"


SHAPES = {"small": Shape(2_048, 49_152, 576), "large": Shape(512, 151_936, 1_024)}
QUICK_SHAPES = {"small": Shape(512, 8_192, 128), "large": Shape(256, 16_384, 128)}


def time_budgets(shape: Shape, seconds: float) -> tuple[dict[str, Sample], dict[int, int]]:
    """The times by budget, beside the four products over all tokens at once; and the tokens of a chunk."""
    problem = hidden_problem(shape.tokens, shape.vocab, shape.dim)
    tokens = {budget: chunk_tokens(problem, budget * MIB) for budget in BUDGETS}
    steps = {f"{budget} MiB": within(problem, budget * MIB) for budget in BUDGETS}
    return interleaved({"products": products(problem, shape.tokens), **steps}, seconds), tokens


def within(problem: HiddenProblem, workspace_bytes: int) -> Step:
    return of_loss(partial(fused_hidden, workspace_bytes=workspace_bytes), problem)


def peak_beyond_results(shape: Shape, workspace_bytes: int) -> int:
    """Bytes beyond inputs and gradients."""
    torch.set_num_threads(THREADS)
    within(hidden_problem(8, 64, 16), workspace_bytes)()  # thread pools and the products' buffers are there from now on
    problem = hidden_problem(shape.tokens, shape.vocab, shape.dim)
    return peak_memory(within(problem, workspace_bytes)) - sum(leaf.nbytes for leaf in problem.leaves)


def main() -> None:
    arguments = parse(MODULE, "Time and memory by workspace budget.", list(SHAPES))
    shapes = QUICK_SHAPES if arguments.quick else SHAPES
    seconds = arguments.seconds if arguments.seconds is not None else 1 if arguments.quick else 90
    parts, records = [], []
    for name in arguments.only or shapes:
        shape = shapes[name]
        progress(f"{name}:")
        times, tokens = fresh_process(time_budgets, shape, seconds)
        rows = []
        for budget in BUDGETS:
            time = times[f"{budget} MiB"]
            ratio = time / times["products"]
            peak = Sample((fresh_process(peak_beyond_results, shape, budget * MIB) / MIB,), "MiB")
            progress(f"  {budget} MiB: {peak}")
            rows.append([f"{budget} MiB", str(tokens[budget]), str(ratio), str(time), str(peak)])
            records.append({"shape": str(shape), "budget": budget, "times": time.values, "peak": peak.values})
        header = ("workspace_bytes", "tokens per chunk", "of the products' time", "time", "peak memory")
        parts += [f"{shape}; the four products over all tokens at once take {times['products']}:"]
        parts += [markdown_table(header, rows)]
    publish(MODULE, "workspace", arguments, parts, records)


if __name__ == "__main__":
    main()
