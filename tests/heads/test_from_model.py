"""LMHead.from_model: which tensors it takes, through which wrappers, and what it refuses. Families of models have a
test of their own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eopd_kernels import EntropyGate, LMHead, Objective, entropy_aware_kl
from eopd_kernels.heads.from_model import INEXPRESSIBLE, SUSPICIOUS, TRANSFORMS, VERIFIED
from tests.conftest import relative_error
from tests.heads.tiny_models import VOCAB_SIZE, built, logits_of, seen

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def unpoisoned(poisoned_memory: None) -> None:
    """Models fill their own parameters; under the deterministic mode some of their operations would be refused."""
    torch.use_deterministic_algorithms(False)


def test_every_class_that_is_known_exists_or_is_newer() -> None:
    """A name misspelt in the table would only ever be skipped above."""
    if tuple(map(int, transformers.__version__.split(".")[:2])) < tuple(map(int, VERIFIED.split("."))):
        pytest.skip(f"the table was read in transformers {VERIFIED}")
    for name in INEXPRESSIBLE:
        assert hasattr(transformers, name)
    for name, transform in TRANSFORMS.items():
        # PaliGemma's language model is a Gemma of the first generation unless its config says otherwise.
        of_text = {"text_config": {"model_type": "gemma2"}} if name.startswith("PaliGemma") else {}
        config = getattr(transformers, name).config_class(**of_text).get_text_config()
        assert [field for field in transform[:-1] if field is not None and not hasattr(config, field)] == []


def test_the_weight_is_the_models_parameter_and_gets_its_gradient() -> None:
    model = built("PhiForCausalLM")
    head = LMHead.from_model(model)
    assert head.weight is model.lm_head.weight and head.bias is model.lm_head.bias

    tied = built("Qwen2ForCausalLM", tie_word_embeddings=True)
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
    _, hidden, logits = seen(inner)

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
    (_, student_hidden, student_logits), (_, teacher_hidden, teacher_logits) = seen(student), seen(teacher)
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


@pytest.mark.parametrize(("vocab_size", "world_size", "gathers"), [(14, 2, True), (14, 1, False), (6, 2, False)])
def test_rows_are_called_a_part_only_where_they_can_be_one(
    monkeypatch: pytest.MonkeyPatch, vocab_size: int, world_size: int, gathers: bool
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world_size)
    with pytest.raises(ValueError, match=f"of 7 rows, and a config with vocab_size={vocab_size}") as refused:
        LMHead.from_model(Fake(linear(), vocab_size=vocab_size))
    assert ("gather the weight" in str(refused.value)) == gathers


def test_a_head_shorter_than_the_vocabulary_is_taken_where_its_class_has_one_and_after_it_was_resized() -> None:
    config = {"vocab_size": 14, "unpadded_vocab_size": 7, "final_logit_softcapping": None}
    assert len(LMHead.from_model(named("Inkling2ForCausalLM", linear(), **config)).weight) == 7
    # Its forward cuts nothing off, whatever unpadded_vocab_size says.
    config = {"vocab_size": 7, "unpadded_vocab_size": 5, "final_logit_softcapping": None}
    assert len(LMHead.from_model(named("Inkling2ForCausalLM", linear(), **config)).weight) == 7


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
        (
            Fake(linear(), vocab_size=14),
            "of 7 rows, and a config with vocab_size=14; set config.vocab_size to 7",
        ),
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
