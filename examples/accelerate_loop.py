"""accelerate: gradients accumulated with one denominator over all micro-batches and processes.

Run it as it is, or with ``accelerate launch``.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from eopd_kernels import LMHead, Objective, entropy_aware_kl

VOCAB_SIZE, MICRO_BATCHES, STEPS = 64, 2, 20


def model(hidden_size: int) -> LlamaForCausalLM:
    shape = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, num_attention_heads=2, initializer_range=0.3, **shape))


class Distillation(nn.Module):
    """Student and loss in one forward, so that data parallelism sees every parameter used, the head's too."""

    def __init__(self, student: LlamaForCausalLM) -> None:
        super().__init__()
        self.student = student
        self.objective = Objective()

    def forward(self, ids: Tensor, teacher: LlamaForCausalLM, num_items: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_hidden = teacher.model(ids).last_hidden_state
        return entropy_aware_kl(
            self.student.model(ids).last_hidden_state[:, :-1],  # position t is about token t + 1
            teacher_hidden[:, :-1],
            student_head=LMHead.from_model(self.student),
            teacher_head=LMHead.from_model(teacher),
            num_items=num_items,
            objective=self.objective,
        ).loss


def main() -> list[float]:
    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=MICRO_BATCHES)
    teacher = model(32).eval().requires_grad_(False).to(accelerator.device)
    student = Distillation(model(16))
    data = torch.randint(VOCAB_SIZE, (2 * MICRO_BATCHES * STEPS * accelerator.num_processes, 12))
    student, optimizer, loader = accelerator.prepare(
        student, torch.optim.AdamW(student.parameters(), lr=1e-2), DataLoader(data, batch_size=2)
    )
    losses, batches = [], iter(loader)
    for _ in range(STEPS):
        step = [next(batches) for _ in range(MICRO_BATCHES)]
        own = torch.tensor(sum(ids[:, 1:].numel() for ids in step), device=accelerator.device)
        num_items = accelerator.reduce(own, "sum")  # every valid token of the optimizer step
        total = torch.zeros((), device=accelerator.device)
        for ids in step:
            with accelerator.accumulate(student):
                loss = student(ids, teacher, num_items)
                # accelerate divides by the micro-batches, and data parallelism averages over processes: neither must
                # happen to a sum that num_items has divided already.
                accelerator.backward(loss * MICRO_BATCHES * accelerator.num_processes)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.detach()
        losses.append(accelerator.reduce(total, "sum").item())
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per token in {len(losses)} steps")
