"""A loop of one's own: hidden states and heads into the loss, and gradient accumulation with the right denominator."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eopd_kernels import EntropyGate, LMHead, Objective, entropy_aware_kl

VOCAB_SIZE, STEPS, MICRO_BATCHES = 64, 20, 2


def model(hidden_size: int) -> LlamaForCausalLM:
    shape = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, num_attention_heads=2, initializer_range=0.3, **shape))


def main() -> list[float]:
    torch.manual_seed(0)
    student, teacher = model(16), model(32).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    objective = Objective(gate=EntropyGate(0.8))
    losses = []
    for _ in range(STEPS):
        # Sample from the student in an on-policy run; the prompts' positions are masked.
        input_ids = torch.randint(VOCAB_SIZE, (4, 12))
        mask = torch.rand(4, 11) < 0.7
        num_items = mask.sum()  # of the whole step: a micro-batch's own count would weigh short completions more
        optimizer.zero_grad()
        total = 0.0
        for ids, valid in zip(input_ids.chunk(MICRO_BATCHES), mask.chunk(MICRO_BATCHES), strict=True):
            with torch.no_grad():
                teacher_hidden = teacher.model(ids).last_hidden_state
            out = entropy_aware_kl(
                student.model(ids).last_hidden_state[:, :-1],  # position t is about token t + 1
                teacher_hidden[:, :-1],
                student_head=LMHead.from_model(student),
                teacher_head=LMHead.from_model(teacher),
                mask=valid,
                num_items=num_items,
                objective=objective,
            )
            out.loss.backward()
            total += out.loss.item()
        optimizer.step()
        losses.append(total)
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per token in {len(losses)} steps")
