"""Sampling completions, and which of their tokens count.

    input_ids        p p P P P | C C C E p       p padding, P prompt, C completion, E end of sequence
    attention_mask   0 0 1 1 1 | 1 1 1 1 0
    completion_mask              1 1 1 1 0

The mask of a completion ends with its end-of-sequence token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, TopPLogitsWarper
from transformers import PreTrainedTokenizerBase as Tokenizer

from eopd_kernels.tensors import widest_dtype

from .draws import DrawTokens


@dataclass(frozen=True)
class Completion:
    """A prompt and what follows it, as token ids; the last id is an end-of-sequence token where it ``ended``.

    ``log_probs``, in nats, are those of ``ids`` under the model that wrote them, None where nobody knows. ``writer`` is
    "student", "teacher", or "data" where it came with the prompt.
    """

    prompt: list[int]
    ids: list[int]
    ended: bool
    log_probs: list[float] | None = field(default=None, compare=False)  # the last bits depend on the company
    writer: str = "student"


@dataclass(frozen=True)
class Rollouts:
    """B sequences: prompts padded on the left to P tokens, completions padded on the right to C tokens."""

    input_ids: Tensor  # int64 [B, P + C]
    attention_mask: Tensor  # int64 [B, P + C]
    completion_mask: Tensor  # bool [B, C]
    log_probs: Tensor | None = None  # float32 [B, C], nats, of each completion token when it was drawn

    @property
    def completion_ids(self) -> Tensor:
        """int64 [B, C]."""
        return self.input_ids[:, self.prompt_width :]

    @property
    def prompt_width(self) -> int:
        return self.input_ids.shape[1] - self.completion_mask.shape[1]

    @property
    def lengths(self) -> Tensor:
        """Valid completion tokens per sequence, the end-of-sequence token included, int64 [B]."""
        return self.completion_mask.sum(dim=1)

    def rows(self, places: list[int] | slice) -> Rollouts:
        """Some of the sequences, padded as all are."""
        chosen: dict[str, Any] = {name: None if one is None else one[places] for name, one in vars(self).items()}
        return Rollouts(**chosen)

    def sequences(self, eos_ids: list[int]) -> list[Completion]:
        """Each row without its padding."""
        rows = zip(self.input_ids.tolist(), self.attention_mask.tolist(), self.lengths.tolist(), strict=True)
        width, found = self.prompt_width, []
        for i, (ids, attended, length) in enumerate(rows):
            answer = ids[width : width + length]
            log_probs = None if self.log_probs is None else self.log_probs[i, :length].tolist()
            found.append(Completion(ids[attended.index(1) : width], answer, answer[-1] in eos_ids, log_probs))
        return found


def collate(completions: Sequence[Completion], pad_id: int, device: torch.device) -> Rollouts:
    """Sequences of any lengths as one batch, padded no further than the longest prompt and completion in it."""
    input_ids, attention_mask = left_pad([completion.prompt for completion in completions], pad_id, device)
    answers = [torch.tensor(completion.ids, device=device) for completion in completions]
    mask = pad_sequence([torch.ones_like(ids, dtype=torch.bool) for ids in answers], batch_first=True)
    input_ids = torch.cat([input_ids, pad_sequence(answers, batch_first=True, padding_value=pad_id)], dim=1)
    known = [torch.tensor(one.log_probs, device=device) for one in completions if one.log_probs is not None]
    log_probs = pad_sequence(known, batch_first=True) if len(known) == len(completions) else None
    return Rollouts(input_ids, torch.cat([attention_mask, mask.long()], dim=1), mask, log_probs)


def completion_mask(completion_ids: Tensor, eos_ids: list[int]) -> Tensor:
    """True up to and with each row's first end-of-sequence token, bool [B, C] of ids [B, C].

    Only the end of the sequence decides, not the padding token, so that pad == eos costs no row its end and a padding
    token that was sampled before the end still counts as the token it was.
    """
    ends = torch.isin(completion_ids, torch.tensor(eos_ids, device=completion_ids.device))
    return (ends.cumsum(dim=1) - ends.long()) == 0


def without_wrapper(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, its adapter's layers in their places, where peft has wrapped it."""
    return getattr(model, "get_base_model", lambda: model)()


def end_of_sequence_ids(model: PreTrainedModel, tokenizer: Tokenizer) -> list[int]:
    """Every id that ends a sequence according to the model's generation config or the tokenizer; may be empty."""
    stated = model.generation_config.eos_token_id
    ids = set(stated) if isinstance(stated, list) else {stated}
    return sorted(i for i in ids | {tokenizer.eos_token_id} if i is not None)


def left_pad(prompts: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 [B, P] each."""
    width = max(len(prompt) for prompt in prompts)
    input_ids = [[pad_id] * (width - len(prompt)) + prompt for prompt in prompts]
    attention_mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(input_ids, device=device), torch.tensor(attention_mask, device=device)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    vocab_size: int | None = None,
    numbers: Tensor | None = None,
    top_p: float = 1.0,
    synced: bool = False,
) -> Rollouts:
    """One completion per prompt, drawn from the model's own distribution at temperature 1, or from its top ``top_p``.

    Ids from ``vocab_size`` on are never drawn: the other model would not know them. ``numbers`` [B, max_new_tokens]
    decide (see :mod:`distillation.draws`); without them torch's global generator does. ``synced``: keep all processes
    at it until the last has finished, for a model whose parameters are shared out among them.
    """
    if numbers is None:
        numbers = torch.rand(len(prompts), max_new_tokens, dtype=torch.float64)
    eos_ids = end_of_sequence_ids(model, tokenizer)
    head_size = model.get_output_embeddings().out_features  # under ZeRO-3 the weight is empty
    unshared = list(range(vocab_size, head_size)) if vocab_size is not None else []
    plain = GenerationConfig(
        do_sample=False,  # DrawTokens leaves one id to choose
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_ids or None,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=unshared or None,
    )
    input_ids, attention_mask = left_pad(prompts, tokenizer.pad_token_id, model.device)
    draw = DrawTokens(numbers.to(widest_dtype(model.device)).to(model.device), input_ids.shape[1])
    # generate() fills what its argument leaves open from the model's own config: a top-p or repetition penalty from
    # there would make the samples off-policy.
    inner = without_wrapper(model)
    own, inner.generation_config = inner.generation_config, plain
    training = model.training
    model.eval()
    try:
        sequences = cast(Any, model).generate(
            input_ids,
            attention_mask=attention_mask,
            generation_config=plain,
            logits_processor=LogitsProcessorList([*([TopPLogitsWarper(top_p)] if top_p < 1 else []), draw]),
            synced_gpus=synced,
        )
    finally:
        inner.generation_config = own
        model.train(training)
    mask = completion_mask(sequences[:, input_ids.shape[1] :], eos_ids)
    log_probs = torch.stack(draw.log_probs, dim=1)[:, : mask.shape[1]]
    return Rollouts(sequences, torch.cat([attention_mask, mask.long()], dim=1), mask, log_probs)


def text_of(completion: Completion, tokenizer: Tokenizer) -> str:
    """A completion as text, without its end-of-sequence token."""
    ids = completion.ids[:-1] if completion.ended else completion.ids
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def pieces(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    """The text of each token, which together are the text of all; a character of several tokens is the last one's."""
    found: list[str] = []
    begin = end = 0  # the last token that made text, which says whether a space follows it, and what comes after it
    for at in range(1, len(ids) + 1):
        before, text = (str(tokenizer.decode(ids[begin:to], clean_up_tokenization_spaces=False)) for to in (end, at))
        whole = at == len(ids) or not text.endswith("\ufffd")
        found.append(text[len(before) :] if whole else "")
        if whole:
            begin, end = end, at
    return found
