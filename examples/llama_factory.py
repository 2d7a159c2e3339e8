"""LLaMA-Factory: its supervised fine-tuning with the entropy-aware loss in the place of its cross-entropy.

Takes what ``llamafactory-cli train`` takes, a YAML file and changes to it; ``ref_model`` is the teacher:

    python examples/llama_factory.py train.yaml ref_model=Qwen/Qwen3-8B
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llamafactory.train import tuner
from llamafactory.train.sft import workflow
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
from llamafactory.train.trainer_utils import create_ref_model

from eopd_kernels import EntropyGate, Objective
from eopd_kernels.integrations.transformers import DistillationMixin

OBJECTIVE = Objective(gate=EntropyGate(1.0))


class Distiller(DistillationMixin, CustomSeq2SeqTrainer):
    """LLaMA-Factory's trainer with another loss."""


def run_sft(model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any, *rest: Any) -> None:
    """LLaMA-Factory's ``run_sft``, whose trainer gets the teacher as well."""
    if finetuning_args.ref_model is None:
        raise ValueError("ref_model must name the teacher, got None")
    teacher = create_ref_model(model_args, finetuning_args)
    workflow.CustomSeq2SeqTrainer = partial(Distiller, teacher_model=teacher, objective=OBJECTIVE)
    workflow.run_sft(model_args, data_args, training_args, finetuning_args, *rest)


if __name__ == "__main__":
    tuner.run_sft = run_sft
    tuner.run_exp()
