"""LMHead.from_model: its logits are the model's own, for every family that changes them; the rest is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eopd_kernels import EntropyGate, LMHead, Objective, entropy_aware_kl, reference
from eopd_kernels.model_head import INEXPRESSIBLE, SUSPICIOUS, TRANSFORMS
from tests.conftest import relative_error

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

VOCAB_SIZE = 64
SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDTH = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
HEADS = {"head_dim": 8}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
# What differs from SMALL; the values of interest are far from neutral.
FAMILIES: dict[str, dict[str, Any]] = {
    # Nothing but a product, with a bias or without.
    "LlamaForCausalLM": {},
    "Qwen2ForCausalLM": {"tie_word_embeddings": True},
    "PhiForCausalLM": {},
    "GPTJForCausalLM": WIDTH,
    "GPT2LMHeadModel": WIDTH,
    "BloomForCausalLM": {"n_layer": 2, "n_head": 4},
    "OPTForCausalLM": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "MptForCausalLM": {"d_model": 32, "n_layers": 2, "n_heads": 4, "logit_scale": 0.37},
    "Gemma2ForCausalLM": {**HEADS, "final_logit_softcapping": 0.7},
    "Gemma3ForCausalLM": {**HEADS, "final_logit_softcapping": 0.7},
    "Gemma4ForCausalLM": {**HEADS, "final_logit_softcapping": 0.7, "vocab_size_per_layer_input": VOCAB_SIZE},
    "VaultGemmaForCausalLM": {**HEADS, "final_logit_softcapping": 0.7},
    "NanoChatForCausalLM": {"final_logit_softcapping": 0.7},
    "RecurrentGemmaForCausalLM": {"logits_soft_cap": 0.7, "lru_width": 32, "block_types": ["recurrent", "attention"]},
    "xLSTMForCausalLM": {"output_logit_soft_cap": 0.7, "num_heads": 4},
    "CohereForCausalLM": {"logit_scale": 0.37},
    "Cohere2ForCausalLM": {"logit_scale": 0.37, **HEADS},
    "GraniteForCausalLM": {"logits_scaling": 3.1},
    "GraniteMoeForCausalLM": {"logits_scaling": 3.1, **EXPERTS},
    "GraniteMoeSharedForCausalLM": {"logits_scaling": 3.1, **EXPERTS},
    "GraniteMoeHybridForCausalLM": {"logits_scaling": 3.1, **EXPERTS, **MAMBA, "layer_types": ["attention", "mamba"]},
    "HyperCLOVAXForCausalLM": {"logits_scaling": 3.1, **HEADS},
    "FalconH1ForCausalLM": {"lm_head_multiplier": 0.41, **HEADS, **MAMBA, "mamba_d_ssm": 64},
    "MiniCPM3ForCausalLM": {"dim_model_base": 8, **LATENT, "num_key_value_heads": 4},
    "InklingForCausalLM": {
        "logits_mup_width_multiplier": 3.0,
        "unpadded_vocab_size": VOCAB_SIZE - 5,
        **HEADS,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
}  # fmt: skip
UNCHANGED = list(FAMILIES)[:8]


def built(name: str, seed: int = 0, **options: Any) -> Any:
    """A tiny random model of a class of transformers, or a skip."""
    kind = getattr(transformers, name, None)
    if kind is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    given = SMALL if name != "xLSTMForCausalLM" else {k: v for k, v in SMALL.items() if "heads" not in k}
    torch.manual_seed(seed)
    model = kind(kind.config_class(**{**given, **FAMILIES.get(name, {}), **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases start at 0, and logits too small to show a softcap
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def seen(model: Any, seed: int = 1) -> tuple[Tensor, Tensor]:
    """The last hidden state and the logits of a few tokens."""
    ids = torch.randint(3, VOCAB_SIZE - 8, (2, 9), generator=torch.Generator().manual_seed(seed))
    out = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    return out.hidden_states[-1], out.logits


def logits_of(hidden: Tensor, head: LMHead) -> Tensor:
    return reference.transformed_logits(hidden, head, len(head.weight), 1.0).view(*hidden.shape[:-1], -1)


@pytest.fixture(autouse=True)
def unpoisoned(poisoned_memory: None) -> None:
    """Models fill their own parameters; under the deterministic mode some of their operations would be refused."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_logits_are_the_models_own(name: str) -> None:
    model = built(name)
    head = LMHead.from_model(model)
    hidden, logits = seen(model)
    assert relative_error(logits_of(hidden, head), logits) < 1e-5

    plain = logits_of(hidden, LMHead(head.weight, head.bias))
    assert (relative_error(plain, logits) > 0.05) == (name not in UNCHANGED)


def test_every_class_that_is_known_exists_or_is_newer() -> None:
    """A name misspelt in the table would only ever be skipped above."""
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
        pytest.skip("the table was read in transformers 5.23")
    for name in INEXPRESSIBLE:
        assert hasattr(transformers, name)
    for name, transform in TRANSFORMS.items():
        # PaliGemma's language model is a Gemma of the first generation unless its config says otherwise.
        of_text = {"text_config": {"model_type": "gemma2"}} if name.startswith("PaliGemma") else {}
        config = getattr(transformers, name).config_class(**of_text).get_text_config()
        assert [field for field in transform[:4] if field is not None and not hasattr(config, field)] == []


def test_the_weight_is_the_models_parameter_and_gets_its_gradient() -> None:
    model = built("PhiForCausalLM")
    head = LMHead.from_model(model)
    assert head.weight is model.lm_head.weight and head.bias is model.lm_head.bias

    tied = built("Qwen2ForCausalLM")
    assert LMHead.from_model(tied).weight is tied.get_input_embeddings().weight


def test_a_padded_head_is_cut_and_stays_attached() -> None:
    model = built("InklingForCausalLM")
    head = LMHead.from_model(model)
    assert len(head.weight) == VOCAB_SIZE - 5
    for _ in range(2):  # the same head serves several steps
        model.zero_grad()
        head.weight.sum().backward()
        grad = model.lm_head.weight.grad
        assert torch.equal(grad.sum(1), 32.0 * (torch.arange(VOCAB_SIZE) < VOCAB_SIZE - 5))


def test_a_model_that_is_part_of_a_larger_one() -> None:
    """PaliGemma has the head itself and the softcap in its text_config; others leave both to the model inside."""
    inner = built("Gemma2ForCausalLM")
    hidden, logits = seen(inner)

    class Delegating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.language_model = inner
            self.config = SimpleNamespace(vocab_size=None, get_text_config=lambda: inner.config)

        def get_output_embeddings(self) -> Any:
            return self.language_model.get_output_embeddings()

    assert relative_error(logits_of(hidden, LMHead.from_model(Delegating())), logits) < 1e-5

    class PaliGemmaForConditionalGeneration(Delegating):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = inner.lm_head

    assert LMHead.from_model(PaliGemmaForConditionalGeneration()).softcap == 0.7


@pytest.mark.parametrize("wrapper", [nn.DataParallel, torch.compile, lambda model: WithAdapter(model)])
def test_wrappers_and_subclasses_are_seen_through(wrapper: Any) -> None:
    model = built("Gemma2ForCausalLM")
    model.__class__ = type("MyGemma", (type(model),), {})
    head = LMHead.from_model(wrapper(model))
    assert head.weight is model.lm_head.weight and head.softcap == 0.7


def test_two_models_give_the_loss_of_their_logits() -> None:
    student, teacher = built("Gemma2ForCausalLM"), built("CohereForCausalLM", seed=2).requires_grad_(False)
    (student_hidden, student_logits), (teacher_hidden, teacher_logits) = seen(student), seen(teacher)
    # Half-way between two tokens' entropies: on one of them rounding would decide.
    below, above = reference_entropy(teacher_logits).flatten().sort().values[[5, 6]].tolist()
    objective = Objective(gate=EntropyGate((below + above) / 2))
    out = entropy_aware_kl(
        student_hidden,
        teacher_hidden,
        student_head=LMHead.from_model(student),
        teacher_head=LMHead.from_model(teacher),
        objective=objective,
    )
    expected = entropy_aware_kl(student_logits, teacher_logits, objective=objective)
    assert 0 < out.gate.mean() < 1
    assert relative_error(out.loss, expected.loss) < 1e-5
    out.loss.backward()
    assert student.lm_head.weight.grad.abs().max() > 0


def reference_entropy(logits: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=logits).entropy()


class Fake(nn.Module):
    """A model with code of its own."""

    def __init__(self, layer: Any, **config: Any) -> None:
        super().__init__()
        self.lm_head = layer
        self.config = SimpleNamespace(**{"vocab_size": 7, **config})

    def get_output_embeddings(self) -> Any:
        return self.lm_head


class WithAdapter(nn.Module):
    """As PEFT wraps a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def get_base_model(self) -> nn.Module:
        return self.base_model


class OtherAdapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(5, 7)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight


class Packed(Tensor):
    """As torchao holds a weight: it says to have the usual shape and dtype."""


class NormHead(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, nn.functional.normalize(self.weight))


def linear(dtype: torch.dtype = torch.float32, weight: Tensor | None = None, **options: Any) -> nn.Linear:
    layer = nn.Linear(5, 7, **options)
    if weight is not None:
        layer.weight = nn.Parameter(weight, requires_grad=weight.dtype.is_floating_point)
    return layer.to(dtype)


def parametrized() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(linear())


def inside(layer: nn.Module) -> Fake:
    """A model whose output layer comes after another one, as BERT's."""
    model = Fake(nn.Sequential(nn.LayerNorm(5), layer))
    model.get_output_embeddings = lambda: layer  # type: ignore[method-assign]
    return model


def named(name: str, layer: Any, **config: Any) -> Fake:
    return type(name, (Fake,), {})(layer, **config)


def test_a_class_that_is_not_known_is_taken_at_its_config() -> None:
    layer = linear()
    for neutral in ({}, {"logit_scale": 1.0}, {"final_logit_softcapping": None}):
        head = LMHead.from_model(Fake(layer, **neutral))
        assert (head.weight is layer.weight, head.bias is layer.bias, head.scale, head.softcap) == (True, True, 1, None)
    for field in SUSPICIOUS:
        with pytest.raises(ValueError, match=rf"Fake: it is not known here, and its config has {field}=2.5"):
            LMHead.from_model(Fake(layer, **{field: 2.5}))


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Fake(None), "has no output embeddings; give the model with its language modelling head"),
        (Fake(linear(), is_encoder_decoder=True), "is an encoder-decoder"),
        (Fake(linear(), vocab_size=14), "an output layer of 7 entries and a vocabulary of 14; gather the weight if"),
        (Fake(linear(weight=torch.zeros(0))), r"shape \(7, 5\) whose weight has the shape \(0,\), a shard"),
        (Fake(linear(weight=torch.zeros(35).byte())), "a uint8 tensor of shape .*: quantised, or not loaded"),
        (Fake(linear(weight=torch.zeros(7, 5).as_subclass(Packed))), "weight is a Packed, quantised or sharded"),
        (Fake(linear(torch.float8_e4m3fn)), "a float8_e4m3fn tensor of shape .*: quantised, or not loaded"),
        (Fake(linear(device="meta")), "on meta: quantised, or not loaded"),
        (Fake(OtherAdapter()), r"an adapter on its output layer that is not LoRA \(a OtherAdapter\); merge it first"),
        (Fake(NormHead(5, 7)), "has a NormHead as its output layer, which is not nn.Linear"),
        (Fake(parametrized()), "computes the weight of its output layer"),
        (inside(linear()), "has its output layer inside a Sequential"),
        (named("ModernBertDecoderForCausalLM", linear()), "a layer and a norm before its output layer"),
        (named("MiniCPM3ForCausalLM", linear(), logits_scaling=2.0), "scales its hidden states and then adds a bias"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(model: Any, says: str) -> None:
    with pytest.raises(ValueError, match=f"LMHead.from_model cannot express {type(model).__name__}: it .*{says}"):
        LMHead.from_model(model)


def test_what_is_no_language_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"takes a language model with .*, got one of type Linear"):
        LMHead.from_model(linear())
