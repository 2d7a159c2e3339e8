"""A student that FSDP2 has shared out: the loss inside its forward, its gradients, and sampling from it.

The trainer's step without the Trainer; test_distill_processes.py has the whole program.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from distillation.draws import uniforms
from distillation.forward import inside_forward
from distillation.rollouts import Completion, Rollouts, collate, sample
from distillation.training import score
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel

from eopd_kernels import Objective
from tests.distributed.processes import run_ranks

from .conftest import PAD, VOCABULARY, tiny_model, tiny_tokenizer, tiny_words

COMPLETIONS = [Completion([3 + i] * (1 + i), [9 + i] * (5 - i), True) for i in range(4)]


def models() -> tuple[Any, PreTrainedModel]:
    torch.manual_seed(0)
    return tiny_model("llama"), tiny_model("gpt2").requires_grad_(False)


def loss_of(student: Any, teacher: PreTrainedModel, rollouts: Rollouts) -> torch.Tensor:
    def forward() -> tuple[torch.Tensor, Any]:
        num_items = sum(len(completion.ids) for completion in COMPLETIONS)
        seen = score(student, teacher, rollouts, Objective(), num_items=num_items, vocab_size=VOCABULARY)
        return seen.loss, seen

    return inside_forward(student, student, forward)[0]


def on_a_rank() -> tuple[float, dict[str, torch.Tensor], list[list[int]]]:
    student, teacher = models()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in student.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(student, mesh=mesh)
    register_fsdp_forward_method(student, "generate")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = collate(COMPLETIONS[rank::ranks], PAD, torch.device("cpu"))
    loss = loss_of(student, teacher, mine)
    (loss * ranks).backward()  # gradients are averaged over the ranks
    gradients = {name: parameter.grad.full_tensor() for name, parameter in student.named_parameters()}
    # The first rank's prompt is the one whose completion is longer, if any is: both keep at it.
    drawn = sample(
        student,
        tiny_tokenizer(tiny_words()),
        [COMPLETIONS[rank].prompt],
        max_new_tokens=6,
        numbers=uniforms([rank], 6),
        synced=True,
    )
    return float(loss.detach()), gradients, drawn.input_ids.tolist()


def test_a_shared_out_student_learns_and_samples_as_a_whole_one() -> None:
    student, teacher = models()
    loss = loss_of(student, teacher, collate(COMPLETIONS, PAD, torch.device("cpu")))
    loss.backward()
    expected = {name: parameter.grad for name, parameter in student.named_parameters()}
    results = run_ranks(2, on_a_rank)
    assert abs(sum(share for share, _, _ in results) - float(loss.detach())) < 1e-5
    for rank, (_, gradients, drawn) in enumerate(results):
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)
        alone = sample(
            student,
            tiny_tokenizer(tiny_words()),
            [COMPLETIONS[rank].prompt],
            max_new_tokens=6,
            numbers=uniforms([rank], 6),
        )
        assert drawn == alone.input_ids.tolist()
