"""trl: its on-policy DistillationTrainer with the entropy-aware loss; the one line is ``with patch_trl(...)``."""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DistillationConfig, DistillationTrainer

from eopd_kernels import EntropyGate, Objective
from eopd_kernels.integrations.trl import patch_trl

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(3, 64))]
STEPS = 20


def model(hidden_size: int) -> LlamaForCausalLM:
    shape = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "num_hidden_layers": 1}
    tokens = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, initializer_range=0.3, **tokens, **shape))


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def main() -> list[float]:
    torch.manual_seed(0)
    prompts = [{"prompt": " ".join(f"w{3 + (5 * i + j) % 60}" for j in range(4))} for i in range(4 * STEPS)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            model=model(16),
            teacher_model=model(32),
            args=DistillationConfig(
                output_dir=folder,
                max_steps=STEPS,
                per_device_train_batch_size=4,
                max_completion_length=8,
                learning_rate=1e-2,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(prompts),
            processing_class=tokenizer(),
        )
        with patch_trl(Objective(gate=EntropyGate(0.8))):
            trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per token in {len(losses)} steps")
