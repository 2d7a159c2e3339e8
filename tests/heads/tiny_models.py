"""Tiny random models of any class of transformers: a config whose sizes are set by their names, and what needs more."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eopd_kernels import LMHead, reference
from eopd_kernels.heads.backbone import backbone_of

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

VOCAB_SIZE = 64
MOST_PARAMETERS = 40_000_000  # a tower for images that cannot be made smaller; more would take seconds
PERTURBED = 100_000  # parameters larger than this are part of such a tower

# Sizes by the names that configs have for them.
SIZES: dict[int, str] = {
    0: "pad_token_id pad_index",
    1: "bos_token_id n_group topk_group n_shared_experts num_nextn_predict_layers first_k_dense_replace",
    2: """eos_token_id num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth
        num_encoder_layers num_decoder_layers num_key_value_heads swa_num_key_value_heads num_kv_heads n_head_kv
        kv_n_heads linear_num_key_heads linear_num_value_heads num_experts_per_tok num_experts_per_token top_k moe_top_k
        moe_topk num_global_layers""",
    4: """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_query_heads
        swa_num_attention_heads linear_num_heads num_local_experts num_experts n_routed_experts moe_num_experts
        rotary_dim""",
    8: """head_dim swa_head_dim swa_v_head_dim global_head_dim d_head dim_head attention_head_dim v_head_dim
        qk_rope_head_dim qk_nope_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim kda_head_dim
        index_head_dim index_topk mamba_d_head mamba_head_dim mamba_headdim mamba_d_state state_size ssm_state_size
        mamba_n_heads mamba_num_heads""",
    16: "q_lora_rank kv_lora_rank image_size moe_hidden_size",
    32: """hidden_size d_model n_embd dim hidden_dim embed_dim emb_dim d_embed model_dim embedding_size
        text_hidden_size out_hidden_size projection_dim projection_hidden_dim projector_hidden_size mm_embed_dim
        output_proj_dims hidden_size_per_layer_input cross_attention_hidden_size hidden_size_global
        vision_hidden_size lru_width backbone_hidden_size text_embed_dim mm_posemb_size pronunciation_embed_dim
        shape_embed_dim""",
    48: """intermediate_size ffn_dim d_ff dim_ff ffn_hidden_size encoder_ffn_dim decoder_ffn_dim moe_intermediate_size
        shared_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size
        expert_ffn_hidden_size intermediate_size_mlp dense_intermediate_size""",
    64: "max_position_embeddings n_positions n_ctx max_seq_len mamba_d_ssm",
    VOCAB_SIZE: "vocab_size text_vocab_size vocab_size_per_layer_input shape_vocab_size pronunciation_vocab_size",
}  # fmt: skip
# What changes the logits, far from neutral.
LOGITS: dict[str, float] = {
    "final_logit_softcapping": 0.7,
    "logits_soft_cap": 0.7,
    "output_logit_soft_cap": 0.7,
    "logit_scale": 0.37,
    "lm_head_multiplier": 0.41,
    "output_multiplier": 0.53,
    "logits_scaling": 3.1,
    "logits_mup_width_multiplier": 3.0,
    "unpadded_vocab_size": VOCAB_SIZE - 5,
    "dim_model_base": 8,
}
FIELDS: dict[str, float] = {name: size for size, names in SIZES.items() for name in names.split()} | LOGITS

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
BY_AXES: dict[str, Any] = {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}}
ONE_KEY_PER_QUERY = {"num_key_value_heads": 4}
# By the name of a config's class: what its sizes cannot say.
OTHERWISE: dict[str, dict[str, Any]] = {
    "ChameleonConfig": {"vocabulary_map": {"<image>": 3, "IMGIMGAAZ": 4, "IMGIMGABZ": 5}},
    "CohereCompassTextConfig": {"rope_parameters": {"full_attention": ROPE}},
    "BltConfig": {"encoder_hash_byte_group_vocab": 16},
    "Cosmos3EdgeTextConfig": BY_AXES,
    "DbrxConfig": {"rope_parameters": ROPE, "attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "Emu3Config": {"vocabulary_map": {"<image>": 3}},
    "Ernie4_5_MoeConfig": {"moe_k": 2},
    "Ernie4_5_VLMoeTextConfig": {"moe_intermediate_size": [48, 48], "moe_k": 2, **BY_AXES},
    "FalconH1Config": {"mamba_d_ssm": 64},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3nTextConfig": {"num_kv_shared_layers": 0},
    "Gemma4AssistantConfig": {
        "text_config": {
            "model_type": "gemma4_text",
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    },
    "Glm4vTextConfig": BY_AXES,
    "Glm4vMoeTextConfig": BY_AXES,
    "Glm46VTextConfig": BY_AXES,
    "GlmOcrTextConfig": BY_AXES,
    "Granite4VisionConfig": {
        "deepstack_layer_map": [],
        "downsample_rate": "1/2",
        "vision_config": {"hidden_size": 64, "patch_size": 4},
    },
    "HYV4VLTextConfig": BY_AXES,
    "HunYuanVLTextConfig": BY_AXES,
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "Mamba2Config": {"num_heads": 8, "n_groups": 1},
    "MuseSparkAudioConfig": {"num_hidden_layers": 4},
    "PaddleOCRTextConfig": BY_AXES,
    "PaliGemmaConfig": {"text_config": {"model_type": "gemma2"}},  # the first Gemma has no softcap
    "Qwen2VLTextConfig": BY_AXES,
    "Qwen2_5_VLTextConfig": BY_AXES,
    "Qwen2_5OmniTextConfig": BY_AXES,
    "ReformerConfig": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "Step3p7TextConfig": {"sliding_window": 16},
    "XmodConfig": {"default_language": "en_XX"},
    "Zamba2Config": {"layers_block_type": ["mamba", "hybrid"]},
    "ZambaConfig": {"layers_block_type": ["mamba", "hybrid", "hybrid"], "num_hidden_layers": 3, "n_mamba_heads": 2},
    "ZayaConfig": {"num_experts_per_tok": 1},
}

# Parts of models that text does not reach, and that need a package or cannot be made small.
LEFT_OUT = {
    "Emu3ForConditionalGeneration": "Emu3VQVAE",
    "Gemma3nForConditionalGeneration": "AutoModel",
    "InklingForConditionalGeneration": "InklingVisionModel",
    "MuseSparkForConditionalGeneration": "MuseSparkAudioModel",
}


def config_of(kind: type, **options: Any) -> Any:
    """A config of class ``kind`` with tiny sizes, its parts as well; ``options`` are what to set instead."""
    known = set(inspect.signature(kind).parameters)
    given = {name: value for name, value in FIELDS.items() if name in known}
    if "kv_lora_rank" in known:  # latent attention has a key for each query
        given |= ONE_KEY_PER_QUERY
    otherwise = OTHERWISE.get(kind.__name__, {}) | options
    for name, part in getattr(kind, "sub_configs", {}).items():
        of_part = dict(otherwise.pop(name, {}))
        if part is transformers.AutoConfig:
            other = of_part.pop("model_type", None)
            part = transformers.CONFIG_MAPPING[other] if other else type(getattr(kind(), name, None))
        if part is not type(None):
            given[name] = config_of(part, **of_part)
    return kind(**given | otherwise)


def without(part: Any) -> type[nn.Module]:
    """A module that does nothing for a part of a model; for ``AutoModel`` one for all that is not text."""

    class LeftOut(nn.Module):
        def __init__(self, *_: Any, **__: Any) -> None:
            super().__init__()

        @classmethod
        def from_config(cls, config: Any, **options: Any) -> nn.Module:
            return part.from_config(config, **options) if "Text" in type(config).__name__ else cls()

        _from_config = from_config

    return LeftOut


def built(name: str, seed: int = 0, **options: Any) -> Any:
    """A tiny random model of a class of transformers, or a skip where this transformers has none of that name."""
    kind = getattr(transformers, name, None)
    if kind is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        if (part := LEFT_OUT.get(name)) is not None:
            module = inspect.getmodule(kind)
            patch.setattr(module, part, without(getattr(module, part)))
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in kind(config_of(kind.config_class, **options)).parameters())
        assert size <= MOST_PARAMETERS, f"{name} has {size} parameters"
        model = kind(config_of(kind.config_class, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases start at 0, and logits too small to show a softcap
            if parameter.numel() <= PERTURBED:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def seen(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The backbone's last_hidden_state, the last of hidden_states, and the logits."""
    taken: list[Any] = []
    ids = torch.randint(3, VOCAB_SIZE - 8, (2, 9), generator=torch.Generator().manual_seed(1))
    with backbone_of(model).register_forward_hook(lambda module, given, out: taken.append(out)):
        out = model(input_ids=ids, output_hidden_states=True, use_cache=False, return_dict=True)
    return taken[-1].last_hidden_state, out.hidden_states[-1], out.logits


def logits_of(hidden: Tensor, head: LMHead) -> Tensor:
    return reference.transformed_logits(hidden, head, len(head.weight), 1.0).view(*hidden.shape[:-1], -1)
