"""Causal language models as the loss sees them: hidden states and a head, never logits."""

from __future__ import annotations

import importlib.util
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    TorchAoConfig,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.peft_utils import find_adapter_config_file

from eopd_kernels import LMHead, entropy_aware_kl

from .errors import UsageError
from .prompts import on_hub
from .rollouts import end_of_sequence_ids, without_wrapper


def small_llama(
    tokenizer: Tokenizer, hidden_size: int, layers: int, max_positions: int, device: torch.device
) -> PreTrainedModel:
    """A randomly initialised Llama with a tied head, of the tokenizer's vocabulary."""
    shape: dict[str, Any] = {"vocab_size": len(tokenizer), "max_position_embeddings": max_positions}
    shape |= {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": 4, "tie_word_embeddings": True, "bos_token_id": None}
    shape |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return moved(LlamaForCausalLM(LlamaConfig(**shape)), device)


def load_model(
    argument: str,
    name: str,
    dtype: str,
    device: torch.device,
    attn_implementation: str | None = None,
    quantization: str | None = None,
) -> PreTrainedModel:
    """The causal language model in a folder or on the hub, in eval mode. ``argument`` is the option an error names."""
    placed = {"quantization_config": quantized(quantization), "device_map": {"": device}} if quantization else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=attn_implementation,
            trust_remote_code=False,
            use_safetensors=True,  # no pickles
            **placed,
        )
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise UsageError(argument, f"cannot load a causal language model from {name!r}: {first_line(error)}") from error
    return moved(model, device).eval()


def quantized(kind: str) -> Any:
    """How transformers is to load the linear layers, but not the head; their products are in the model's dtype."""
    if kind == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    bits = kind.removeprefix("bitsandbytes-")
    return BitsAndBytesConfig(**{f"load_in_{bits}": True}, bnb_4bit_quant_type="nf4")


def base_of(argument: str, name: str) -> str:
    """The model that an adapter is for, or ``name`` itself where it is none."""
    if (found := find_adapter_config_file(name)) is None:
        return name
    adapter = json.loads(Path(found).read_text(encoding="utf-8"))
    base = str(adapter["base_model_name_or_path"])
    if adapter["peft_type"] != "LORA" or importlib.util.find_spec("peft") is None:
        raise UsageError(argument, f"{name!r} is an adapter ({adapter['peft_type']}); possible is LORA, with peft")
    if not known(base):
        raise UsageError(argument, f"{name!r} is an adapter to {base!r}, which is no folder here, nor a hub name")
    return base


def known(name: str) -> bool:
    """Whether there is such a folder, or the hub could have something of this name."""
    return Path(name).exists() or on_hub(name)


def with_adapter(student: PreTrainedModel, folder: str | None, lora_r: int | None) -> PreTrainedModel:
    """A student of whose weights only a LoRA adapter's are trained, in float32: the one in ``folder``, or a new one of
    rank ``lora_r`` on all linear layers but the head, scaled by 2. Neither: the student as it is."""
    if folder is not None:
        from peft import PeftModel

        return PeftModel.from_pretrained(student, folder, is_trainable=True).eval()
    if lora_r is None:
        return student
    from peft import LoraConfig, get_peft_model

    shape: dict[str, Any] = {"r": lora_r, "lora_alpha": 2 * lora_r, "target_modules": "all-linear"}
    return get_peft_model(student, LoraConfig(**shape, task_type="CAUSAL_LM")).eval()


def moved(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    torch.nn.Module.to(model, device)
    return model


def load_tokenizer(argument: str, name: str) -> Tokenizer:
    """The tokenizer beside a model, padding on the left (with its end-of-sequence token if it has no padding token)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(argument, f"cannot load a tokenizer from {name!r}: {first_line(error)}") from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def without_dropout(model: PreTrainedModel) -> None:
    """Turns dropout off for good, so that a model in training mode, which activation checkpointing needs, computes what
    it computes when it is sampled from."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def align_ends(
    student: PreTrainedModel, teacher: PreTrainedModel, tokenizer: Tokenizer, teacher_tokenizer: Tokenizer, shared: int
) -> list[int]:
    """Has both models end a sequence at whatever ends one for either of them; the ids.

    A chat model ends its turns with another token than a base model its documents (<|im_end|> and <|endoftext|>). The
    loss compares the distributions as they are, so that the student learns to end where the teacher would.
    """
    ends = end_of_sequence_ids(student, tokenizer) + end_of_sequence_ids(teacher, teacher_tokenizer)
    known = sorted({i for i in ends if i < shared})
    for model in (student, teacher):
        model.generation_config.eos_token_id = known
    return known


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def position_ids(attention_mask: Tensor) -> Tensor:
    """0, 1, 2, ... from each row's first attended token on, [B, L]: left padding does not shift a sequence."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def hidden_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """What the head would read, [B, L, D], of token ids and a mask [B, L]. Position i is about token i + 1."""
    base = without_wrapper(model).base_model
    extra = {}
    if "position_ids" in inspect.signature(base.forward).parameters:
        extra["position_ids"] = position_ids(attention_mask)
    return base(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **extra).last_hidden_state


@torch.no_grad()
def check_head(argument: str, model: PreTrainedModel, token_ids: list[int]) -> None:
    """Refuses a model whose distribution is not what its ``LMHead`` makes of its hidden states, on one short text.

    An architecture may scale, cap or transform in ways its config does not tell; distilling without that would
    silently train another model.
    """
    try:
        head = LMHead.from_model(model)
    except (TypeError, ValueError) as error:
        raise UsageError(argument, str(error)) from error
    input_ids = torch.tensor([token_ids[:16]], device=model.device)
    attention_mask = torch.ones_like(input_ids)
    hidden = hidden_states(model, input_ids, attention_mask)
    expected = model(input_ids=input_ids, attention_mask=attention_mask).logits
    seen = entropy_aware_kl(hidden, expected, student_head=head, vocab_size=expected.shape[-1])
    tolerance = 1e-4 if head.weight.dtype == torch.float32 else 5e-2
    if not (difference := seen.reverse_kl.max().item()) <= tolerance:
        raise UsageError(
            argument,
            f"the logits of {type(model).__name__} are not softcap(scale * (head of its hidden states)) as far as its "
            f"config tells (their KL is {difference:.3g} nats); this architecture is not supported",
        )


def shared_vocabulary(
    student: PreTrainedModel, teacher: PreTrainedModel, student_tokenizer: Tokenizer, teacher_tokenizer: Tokenizer
) -> int:
    """min(V_student, V_teacher), after making sure that an id below it means the same token to both tokenizers."""
    sizes = [len(model.get_output_embeddings().weight) for model in (student, teacher)]
    shared = min(sizes)
    ours, theirs = (
        {i: token for token, i in tokenizer.get_vocab().items() if i < shared}
        for tokenizer in (student_tokenizer, teacher_tokenizer)
    )
    # An id that only one of them knows is a padding row or an unused special token of the other.
    differing = [i for i in sorted(ours.keys() & theirs.keys()) if ours[i] != theirs[i]]
    if differing:
        first = differing[0]
        raise UsageError(
            "--teacher/--student",
            f"the tokenizers disagree, so their probabilities cannot be compared: the student has {sizes[0]} ids and "
            f"the teacher {sizes[1]}; of the {shared} shared ones {len(differing)} differ, first id {first}: "
            f"{ours[first]!r} for the student, {theirs[first]!r} for the teacher",
        )
    return shared


def described(model: PreTrainedModel) -> str:
    count, trained = (
        sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad or not only)
        for only in (False, True)
    )
    size = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
    adapter = f", of which {trained / 1e6:.2f} M are trained" if 0 < trained < count else ""
    return f"{type(without_wrapper(model)).__name__} of {size} parameters{adapter}"
