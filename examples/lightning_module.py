"""Lightning: a LightningModule whose training step is the loss; the teacher is kept out of its checkpoints."""

from __future__ import annotations

import logging
import tempfile
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from eopd_kernels import EntropyAwareKLLoss, EntropyGate, LMHead, Objective

VOCAB_SIZE, STEPS = 64, 20


def model(hidden_size: int) -> LlamaForCausalLM:
    shape = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, num_attention_heads=2, initializer_range=0.3, **shape))


class Distillation(lightning.LightningModule):
    def __init__(self, student: LlamaForCausalLM, teacher: LlamaForCausalLM) -> None:
        super().__init__()
        self.student = student
        self.teacher = [teacher.eval().requires_grad_(False)]  # in a list: no submodule, so in no checkpoint
        self.loss = EntropyAwareKLLoss(Objective(gate=EntropyGate(0.8)))
        self.losses: list[float] = []

    def on_fit_start(self) -> None:
        self.teacher[0].to(self.device)

    def training_step(self, ids: Tensor, index: int) -> Tensor:
        teacher = self.teacher[0]
        with torch.no_grad():
            teacher_hidden = teacher.model(ids).last_hidden_state
        out = self.loss(
            self.student.model(ids).last_hidden_state[:, :-1],  # position t is about token t + 1
            teacher_hidden[:, :-1],
            student_head=LMHead.from_model(self.student),
            teacher_head=LMHead.from_model(teacher),
        )
        self.log_dict({"loss": out.loss, **{name: mean.float() for name, mean in out.means().items()}})
        self.losses.append(out.loss.item())
        return out.loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.student.parameters(), lr=1e-2)


def main() -> list[float]:
    lightning.seed_everything(0, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = Distillation(model(16), model(32))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_steps=STEPS, accelerator="cpu", devices=1, default_root_dir=folder, enable_model_summary=False, **quiet
        )
        trainer.fit(module, DataLoader(torch.randint(VOCAB_SIZE, (4 * STEPS, 12)), batch_size=4))
    return module.losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per token in {len(losses)} steps")
