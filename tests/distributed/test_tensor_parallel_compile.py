"""A call with a group under torch.compile: the graph breaks, and what comes out is what comes out without it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from eopd_kernels import Objective, entropy_aware_kl
from tests.distributed.processes import run_ranks
from tests.distributed.shards import halves_of
from tests.test_objectives import case_of


def compiled() -> tuple[bool, str]:
    """Whether loss and gradients are the same bits, and what fullgraph=True says."""
    part = halves_of(case_of(Objective(), masked=True))
    hidden: Any = part.student

    def loss(hidden: Tensor) -> Tensor:
        options = {**part.arguments, "tensor_parallel_group": dist.group.WORLD}
        return 2 * entropy_aware_kl(1.5 * hidden, part.teacher, **options).loss

    results = []
    for function in (loss, torch.compile(loss, backend="eager")):
        value = function(hidden)
        results.append([value, *torch.autograd.grad(value, part.leaves)])
    torch._dynamo.reset()  # or the code that broke the graph would be taken again
    try:
        torch.compile(loss, backend="eager", fullgraph=True)(hidden)
        says = ""
    except torch._dynamo.exc.Unsupported as error:
        says = str(error)
    return all(map(torch.equal, *results)), says


def test_a_call_with_a_group_breaks_the_graph_and_no_more() -> None:
    for same, says in run_ranks(2, compiled):
        assert same and "checked_among_ranks" in says
