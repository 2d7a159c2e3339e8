"""LMHead.from_model: the output layer of a model, and what the model does to its logits afterwards.

What happens after the output layer is code, not configuration: Granite divides by ``logits_scaling`` and HyperCLOVA X
multiplies by it; MPT has a ``logit_scale`` that transformers ignores. So the class decides which fields count, as read
in the transformers of :data:`VERIFIED`, and a class that is not listed but has such a field is refused.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..arguments import described
from ..distributed.data_parallel import check_not_partitioned, is_dtensor
from . import lora

VERIFIED = "5.24"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class ConfigFields(NamedTuple):
    """Which fields of a config change the logits: softcap·tanh(scale/divisor·logits/softcap), its first entries."""

    scale: str | None = None
    divisor: str | None = None
    softcap: str | None = None
    entries: str | None = None  # any rest of the output layer is padding, which the model cuts off
    # Where the output layer may have fewer rows; if it has them all, the model may cut some off.
    rows: str | None = None
    of_hidden: bool = False  # the factor is applied to the hidden states, before a bias is added


PLAIN = ConfigFields()
SOFTCAP = ConfigFields(softcap="final_logit_softcapping")
LOGIT_SCALE = ConfigFields(scale="logit_scale")
DIVIDED = ConfigFields(divisor="logits_scaling")
MULTIPLIED = ConfigFields(scale="logits_scaling")
MUSE = ConfigFields(scale="output_multiplier", softcap="final_logit_softcapping")
INKLING = ConfigFields(divisor="logits_mup_width_multiplier", entries="unpadded_vocab_size", of_hidden=True)
INKLING2 = ConfigFields(softcap="final_logit_softcapping", rows="unpadded_vocab_size")
TRANSFORMS = {
    "BeamForCausalLM": SOFTCAP,
    "Gemma2ForCausalLM": SOFTCAP,
    "Gemma3ForCausalLM": SOFTCAP,
    "Gemma3nForCausalLM": SOFTCAP,
    "Gemma3nForConditionalGeneration": SOFTCAP,
    "Gemma4ForCausalLM": SOFTCAP,
    "Gemma4ForConditionalGeneration": SOFTCAP,
    "Gemma4UnifiedForCausalLM": SOFTCAP,
    "Gemma4UnifiedForConditionalGeneration": SOFTCAP,
    "MistralLarge4ForConditionalGeneration": SOFTCAP,
    "NanoChatForCausalLM": SOFTCAP,
    "PaliGemmaForConditionalGeneration": SOFTCAP,
    "VaultGemmaForCausalLM": SOFTCAP,
    "RecurrentGemmaForCausalLM": ConfigFields(softcap="logits_soft_cap"),
    "xLSTMForCausalLM": ConfigFields(softcap="output_logit_soft_cap"),
    "CohereForCausalLM": LOGIT_SCALE,
    "Cohere2ForCausalLM": LOGIT_SCALE,
    "Cohere2MoeForCausalLM": LOGIT_SCALE,
    "CohereCompassForCausalLM": LOGIT_SCALE,
    "CohereCompassForConditionalGeneration": LOGIT_SCALE,
    "FalconH1ForCausalLM": ConfigFields(scale="lm_head_multiplier"),
    "GraniteForCausalLM": DIVIDED,
    "GraniteSWAForCausalLM": DIVIDED,
    "GraniteMoeForCausalLM": DIVIDED,
    "GraniteMoeSWAForCausalLM": DIVIDED,
    "GraniteMoeSharedForCausalLM": DIVIDED,
    "GraniteMoeHybridForCausalLM": DIVIDED,
    "Granite4VisionForConditionalGeneration": DIVIDED,
    "GraniteDoclingForConditionalGeneration": DIVIDED,
    "HyperCLOVAXForCausalLM": MULTIPLIED,
    "HyperCLOVAXVisionV2ForConditionalGeneration": MULTIPLIED,
    "MiniCPM3ForCausalLM": ConfigFields(divisor="logits_scaling", of_hidden=True),
    "MuseGlimmerForConditionalGeneration": MUSE,
    "MuseSparkForConditionalGeneration": MUSE,
    "InklingForCausalLM": INKLING,
    "InklingForConditionalGeneration": INKLING,
    "Inkling2ForCausalLM": INKLING2,
    "Inkling2ForConditionalGeneration": INKLING2,
    "Inkling2LoopForCausalLM": INKLING2,
    "Inkling2LoopForConditionalGeneration": INKLING2,
    # These have such a field in their config, and their forward leaves it alone.
    "AyaVisionForConditionalGeneration": PLAIN,
    "Cohere2VisionForConditionalGeneration": PLAIN,
    "Gemma3ForConditionalGeneration": PLAIN,
    "GraniteSpeechForConditionalGeneration": PLAIN,
    "GraniteSpeechPlusForConditionalGeneration": PLAIN,
    "MptForCausalLM": PLAIN,
}
# Classes whose last hidden state is not what their output layer gets, or whose logits are changed in another way.
INEXPRESSIBLE = {
    "ChameleonForConditionalGeneration": "sets the logits of its image tokens to the smallest number",
    "ElectraForCausalLM": "has a layer and a norm before its output layer",
    "Gemma4AssistantForCausalLM": "may mask its embeddings before the product",
    "Gemma4UnifiedAssistantForCausalLM": "may mask its embeddings before the product",
    "ModernBertDecoderForCausalLM": "has a layer and a norm before its output layer",
    "ProphetNetForCausalLM": "predicts from several streams",
}
# Fields that change the logits in the classes above, or in models that bring code of their own (BTLM, Grok, Jais,
# MiniCPM, Phi-3-small).
SUSPICIOUS = (
    *dict.fromkeys(field for transform in TRANSFORMS.values() for field in transform[:-1] if field is not None),
    "dim_model_base",
    "logits_scale",
    "mup_output_alpha",
    "mup_width_multiplier",
    "mup_width_scale",
    "output_logits_scale",
    "output_multiplier_scale",
    "width_scale",
)


class Parts(NamedTuple):
    """The arguments of an LMHead."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    scale: float
    softcap: float | None


def parts_of(model: Any) -> Parts:
    """What :meth:`eopd_kernels.LMHead.from_model` reads of ``model``; its errors are documented there."""
    model = unwrapped(model)
    if not callable(getattr(model, "get_output_embeddings", None)) or not hasattr(model, "config"):
        raise TypeError(
            "LMHead.from_model takes a language model with get_output_embeddings() and a config, "
            f"got one of type {type(model).__name__}"
        )
    layer = model.get_output_embeddings()
    if layer is None:
        refuse(model, "has no output embeddings", "give the model with its language modelling head")
    if getattr(model.config, "is_encoder_decoder", False):
        refuse(model, "is an encoder-decoder", "build an LMHead by hand: LMHead(weight, bias, scale=..., softcap=...)")
    owner = owner_of(layer, model)
    try:
        layer = lora.in_use(layer)
        adapted = hasattr(layer, "base_layer")
        updates = lora.updates_of(layer) if adapted else []
    except lora.NotExpressible as why:
        refuse(owner, why.found, why.remedy)
    weight, bias = lora.merged(*checked_layer(layer.base_layer if adapted else layer, owner), updates)
    config = text_config(owner)
    transform = transform_of(owner, config)

    def value(field: str | None) -> Any:
        return None if field is None else getattr(config, field, None)

    check_rows(owner, len(weight), value("vocab_size"), value(transform.rows))
    # Inkling 2 of transformers 5.23 cuts its padding off in forward, that of 5.24 has none.
    cut = transform.entries or (transform.rows if reads(owner, transform.rows) else None)
    entries = value(cut)
    multiplier, divisor = value(transform.scale), value(transform.divisor)
    scale = (1.0 if multiplier is None else multiplier) / (1.0 if divisor is None else divisor)
    if transform.of_hidden and bias is not None and scale != 1:
        refuse(owner, "scales its hidden states and then adds a bias", "divide the bias by the scale: LMHead by hand")
    if entries is not None and entries < len(weight):
        weight, bias = weight[:entries], None if bias is None else bias[:entries]
    return Parts(weight, bias, scale, value(transform.softcap))


def unwrapped(model: Any) -> Any:
    """The model inside torch.compile, (distributed) data parallelism and PEFT."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif callable(getattr(type(model), "get_base_model", None)):
            model = model.get_base_model()
        elif isinstance(model, nn.Module) and isinstance(inner := model._modules.get("module"), nn.Module):
            model = inner
        else:
            return model


def owner_of(layer: Any, model: Any) -> Any:
    """The model that applies ``layer``: ``model``, or the language model inside of it whose head it is."""
    if not isinstance(model, nn.Module) or any(layer is child for child in model.children()):
        return model
    for parent in model.modules():
        if any(layer is child for child in parent.children()):
            if callable(getattr(parent, "get_output_embeddings", None)) and hasattr(parent, "config"):
                return parent
            refuse(
                model,
                f"has its output layer inside a {type(parent).__name__}, which may change the hidden states first",
                "apply what comes before to the hidden states yourself, and build an LMHead of the layer by hand",
            )
    return model


def text_config(model: Any) -> Any:
    """The config of the language model, also of one that is part of something larger."""
    get_text_config = getattr(model.config, "get_text_config", None)
    return get_text_config() if callable(get_text_config) else model.config


def checked_layer(layer: Any, owner: Any) -> tuple[Tensor, Tensor | None]:
    """The weight and the bias of an output layer that is nothing but hidden · weightᵀ + bias."""
    kind = type(layer).__name__
    if not isinstance(layer, nn.Module) or type(layer).forward is not nn.Linear.forward:
        refuse(
            owner,
            f"has a {kind} as its output layer, which is not nn.Linear (quantised layers are not, either)",
            "build an LMHead by hand of a weight [V, D] that is what the layer multiplies by",
        )
    weight: Any = layer.weight
    bias: Any = layer.bias
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, nn.Parameter):
            refuse(owner, f"computes the {name} of its output layer", f"build an LMHead by hand of its {name}")
        check_not_partitioned(f"the {name} of {type(owner).__name__}'s output layer", tensor)
        if type(tensor) is not nn.Parameter and not is_dtensor(tensor):
            refuse(
                owner,
                f"has an output layer whose {name} is a {type(tensor).__name__}, quantised or sharded",
                "gather or dequantise it, and build an LMHead by hand",
            )
        if tensor.dtype not in DTYPES or tensor.is_meta:
            refuse(
                owner,
                f"has an output layer whose {name} is {described(tensor)}: quantised, or not loaded",
                "load or dequantise it, and build an LMHead by hand",
            )
        shape = (layer.out_features, layer.in_features)[: 2 if name == "weight" else 1]
        if tuple(tensor.shape) != shape:
            refuse(
                owner,
                f"has an output layer of the shape {shape} whose {name} has the shape {tuple(tensor.shape)}, a shard",
                "call the loss in the forward of the wrapped model, where its parameters are whole (FSDP1, ZeRO-3)",
            )
    return weight, bias


def reads(model: Any, field: str | None) -> bool:
    """Returns whether the forward of a model's class reads a field of its config."""
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    return code is not None and field in code.co_names


def check_rows(model: Any, found: int, vocab_size: int | None, fewer: int | None) -> None:
    """Refuses an output layer that has neither a row for each entry of the vocabulary nor as many as its class has.

    transformers' tensor parallelism may leave a part of the rows here without a sign of it on the layer.
    """
    if vocab_size is None or found in (vocab_size, fewer):
        return
    by_hand = "build an LMHead by hand of the rows that are tokens"
    remedy = f"set config.vocab_size to {found} if the layer was resized and all its rows are tokens, else {by_hand}"
    if found < vocab_size and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        remedy = f"gather the weight if this is a rank's part of it; else {remedy}"
    refuse(model, f"has an output layer of {found} rows, and a config with vocab_size={vocab_size}", remedy)


def transform_of(model: Any, config: Any) -> ConfigFields:
    """Which fields of ``config`` count: the class says, or the first of its bases that is known."""
    for base in type(model).__mro__:
        if base.__name__ in INEXPRESSIBLE:
            refuse(model, INEXPRESSIBLE[base.__name__], "no LMHead gives its logits: pass the logits themselves")
        if base.__name__ in TRANSFORMS:
            return TRANSFORMS[base.__name__]
    found = {field: getattr(config, field, None) for field in SUSPICIOUS}
    found = {field: value for field, value in found.items() if value is not None and value != 1}
    if found:
        fields = ", ".join(f"{field}={value!r}" for field, value in found.items())
        refuse(
            model,
            f"is not known here, and its config has {fields}",
            "see in its forward what happens to the logits, and build that by hand: LMHead(weight, bias, scale=..., "
            "softcap=...)",
        )
    return PLAIN


def refuse(model: Any, found: str, remedy: str) -> NoReturn:
    raise ValueError(f"LMHead.from_model cannot express {type(model).__name__}: it {found}; {remedy}")
