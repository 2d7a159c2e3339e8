"""The counted flops, beside those that torch counts as they are done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from distillation.flops import StepFlops
from distillation.models import hidden_states
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from eopd_kernels import LMHead, entropy_aware_kl

from .conftest import VOCABULARY, tiny_model

SEQUENCES, LENGTH = 3, 10


def done(function: Callable[[], Any]) -> Counter[str]:
    """Flops by kind of product."""
    in_place = {torch.ops.aten.addmm_: lambda out, a, b, **kwargs: 2 * a[0] * a[1] * b[1]}
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    with counter:
        function()
    kinds: Counter[str] = Counter()
    for packet, flops in counter.get_flop_counts()["Global"].items():
        kinds["attention" if "bmm" in str(packet) else "matrices"] += flops
    return kinds


def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    student, teacher = tiny_model("llama"), tiny_model("gpt2")
    for model in (student, teacher):
        model.set_attn_implementation("eager")  # products that torch counts
    return student, teacher.requires_grad_(False)


def hidden(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(3, VOCABULARY, (SEQUENCES, LENGTH))
    return hidden_states(model, ids, torch.ones_like(ids))


@pytest.mark.parametrize("frozen", [False, True])
def test_the_models_take_what_torch_counts(frozen: bool) -> None:
    student, teacher = models()
    if frozen:
        for layer in cast(Any, student.base_model).layers:
            layer.mlp.requires_grad_(False)
    found = done(lambda: (hidden(teacher), hidden(student).sum().backward()))
    flops = StepFlops(student, teacher, VOCABULARY)
    flops.add(SEQUENCES, LENGTH)
    # torch's attention is the whole square, of which half is needed.
    assert flops.models == found["matrices"] + found["attention"] / 2


def test_checkpointing_runs_the_student_forward_once_more() -> None:
    student, teacher = models()
    plain, checkpointed = StepFlops(student, teacher, VOCABULARY), StepFlops(student, teacher, VOCABULARY)
    plain.add(SEQUENCES, LENGTH)
    student.gradient_checkpointing_enable()
    checkpointed.add(SEQUENCES, LENGTH)
    once = done(lambda: hidden(student))
    assert checkpointed.models - plain.models == once["matrices"] + once["attention"] / 2


@pytest.mark.parametrize("frozen", [False, True])
def test_the_loss_takes_what_torch_counts(frozen: bool) -> None:
    student, teacher = models()
    student.get_output_embeddings().weight.requires_grad_(not frozen)
    states, of_teacher = (hidden(model).detach().flatten(0, 1) for model in (student, teacher))
    found = done(
        lambda: entropy_aware_kl(
            states.requires_grad_(),
            of_teacher,
            student_head=LMHead.from_model(student),
            teacher_head=LMHead.from_model(teacher),
        ).loss.backward()
    )
    flops = StepFlops(student, teacher, VOCABULARY)
    assert flops.loss(SEQUENCES * LENGTH) == sum(found.values())
    flops.add(SEQUENCES, LENGTH)
    share = flops.loss_share(SEQUENCES * LENGTH)
    assert share == pytest.approx(sum(found.values()) / (sum(found.values()) + flops.models))


def test_experts_and_convolutions_are_not_counted() -> None:
    student, teacher = models()
    teacher.experts = torch.nn.Conv1d(4, 4, 3)
    flops = StepFlops(student, teacher, VOCABULARY)
    flops.add(SEQUENCES, LENGTH)
    assert flops.loss_share(5) is None
