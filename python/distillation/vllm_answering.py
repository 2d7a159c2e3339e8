"""Completions by vLLM: an engine in the training process, on its device, given the weights in each rollout."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from eopd_kernels import LMHead, entropy_aware_kl

from .answering import SampledAnswers
from .draws import seed_of
from .errors import RunError, UsageError
from .models import hidden_states
from .rollouts import Completion, collate
from .stream import Draw

HEAD = "lm_head.weight"
# Between the log-probability of a token to the engine and to the model that is trained, nats, a mean over a completion.
# Their kernels round otherwise: in bfloat16 that is some hundredths. Stale weights grow beyond it within some steps.
LARGEST_GAP = 0.3
COMPARED = 64  # tokens of that completion: each costs a row of the vocabulary


class SampledByVLLM(SampledAnswers):
    """The student's completions by vLLM, the teacher's share by ``generate``.

    The engine samples from the weights as they are when a rollout begins, at temperature 1, each draw with a seed
    of its own. Its kernels round otherwise than the model that is trained, so that the completions are those of
    ``generate`` in distribution only, and a resumed run repeats itself as far as vLLM does.

    Args:
        start: the folder or hub name that the student was loaded from, for its architecture.
        eos_ids: what ends a completion.
        longest: tokens of a prompt and its completion.
        memory: share of the device's memory that the engine may take, weights and cache; of a GPU.
    """

    def __init__(
        self, *parts: Any, start: str, eos_ids: list[int], longest: int, memory: float, **options: Any
    ) -> None:
        super().__init__(*parts, **options)
        self.vllm = imported()
        self.engine = engine_of(start, str(self.student.dtype).removeprefix("torch."), longest, memory)
        self.eos_ids = eos_ids
        beyond = self.vocab_size < len(self.student.get_output_embeddings().weight)
        self.allowed = list(range(self.vocab_size)) if beyond else None

    def __call__(self, draws: Sequence[Draw]) -> list[Completion]:
        self.hand_over()
        found = super().__call__(draws)
        own = [completion for completion, draw in zip(found, draws, strict=True) if not self.for_teacher(draw)]
        if own and not self.synced:
            self.compare(own[0])
        return found

    def hand_over(self) -> None:
        """The student's weights as they are now."""
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights_of(self.student)})

    def answers(self, model: PreTrainedModel, draws: Sequence[Draw], synced: bool) -> list[Completion]:
        if model is not self.student:
            return super().answers(model, draws, synced)
        answered = self.engine.generate(
            [{"prompt_token_ids": draw.prompt.ids} for draw in draws],
            [self.sampling(draw) for draw in draws],
            use_tqdm=False,
        )
        found = []
        for draw, answer in zip(draws, answered, strict=True):
            ids = list(answer.outputs[0].token_ids)
            log_probs = [of[i].logprob for i, of in zip(ids, answer.outputs[0].logprobs, strict=True)]
            found.append(Completion(draw.prompt.ids, ids, ids[-1] in self.eos_ids, log_probs))
        return found

    def sampling(self, draw: Draw) -> Any:
        return self.vllm.SamplingParams(
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_tokens=self.max_new_tokens,
            stop_token_ids=self.eos_ids,
            allowed_token_ids=self.allowed,
            seed=seed_of("tokens", self.seed, draw.number),
            logprobs=0,  # of what is drawn
            detokenize=False,
        )

    def compare(self, completion: Completion) -> None:
        """Refuses an engine that samples from other weights than those of the model that is trained.

        Raises:
            RunError: the completion's tokens have other log-probabilities there.
        """
        assert completion.log_probs is not None
        own = log_probs_of(self.student, replace(completion, ids=completion.ids[:COMPARED]))
        gap = (own - torch.tensor(completion.log_probs[:COMPARED], device=own.device)).abs().mean().item()
        if not gap <= LARGEST_GAP:
            raise RunError(
                f"vllm {self.vllm.__version__} does not sample from the student's weights: its tokens' "
                f"log-probabilities are {gap:.3g} nats away from the student's; use --rollout-engine generate"
            )


@functools.cache
def engine_of(start: str, dtype: str, longest: int, memory: float) -> Any:
    """One in a program, for the student of every objective: each is handed over as the next step's weights are."""
    # In this process, so that weights are handed over as they are, not sent to another one.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    return imported().LLM(
        model=start,
        skip_tokenizer_init=True,
        load_format="dummy",  # all weights are handed over before the first completion
        # A head that is tied to the embedding keeps its old weights in a reload (vLLM 0.32): it gets its own.
        hf_overrides={"tie_word_embeddings": False},
        dtype=dtype,
        max_model_len=longest,
        gpu_memory_utilization=memory,
        enable_prefix_caching=False,  # what it holds is of the weights before
        # Under torchrun each process has an engine of its own.
        **({} if alone else {"distributed_executor_backend": "external_launcher"}),
    )


@torch.no_grad()
def log_probs_of(model: PreTrainedModel, completion: Completion) -> Tensor:
    """Of a completion's tokens, nats, [C]."""
    batch = collate([replace(completion, log_probs=None)], 0, model.device)
    hidden = hidden_states(model, batch.input_ids, batch.attention_mask)[0, batch.prompt_width - 1 : -1]
    head = LMHead.from_model(model)
    seen = entropy_aware_kl(hidden, hidden, student_head=head, teacher_head=head, token_ids=batch.completion_ids[0])
    assert seen.student_log_probs is not None
    return seen.student_log_probs


def imported() -> Any:
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise UsageError("--rollout-engine", f"vllm cannot be imported here ({error}); leave it 'generate'") from error


@torch.no_grad()
def weights_of(student: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors; of a student that is shared out each one is gathered in its turn, on every process."""
    named: dict[str, Any] = dict(student.named_parameters())
    if (head := student.get_output_embeddings().weight) is student.get_input_embeddings().weight:
        named[HEAD] = head
    for name, parameter in named.items():
        yield name, parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
