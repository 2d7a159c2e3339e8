"""LMHead.from_model with PEFT on the output layer: the logits are the adapted model's, gradients reach the adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from eopd_kernels import LMHead, entropy_aware_kl
from tests.conftest import relative_error
from tests.heads.tiny_models import built, logits_of, seen

peft = pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def unpoisoned(poisoned_memory: None) -> None:
    torch.use_deterministic_algorithms(False)


def adapted(name: str = "PhiForCausalLM", trained: bool = True, **options: Any) -> Any:
    """A tiny model with LoRA on its output layer; the adapter is not at its start, where it changes nothing."""
    options = {"r": 4, "lora_alpha": 12, "target_modules": ["lm_head"], **options}
    model = peft.get_peft_model(built(name), peft.LoraConfig(**options)).eval()
    if trained:
        shake(model)
    return model


@torch.no_grad()
def shake(model: Any, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def check_logits(model: Any) -> LMHead:
    _, hidden, logits = seen(model)
    head = LMHead.from_model(model)
    assert relative_error(logits_of(hidden, head), logits) < 1e-5
    return head


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_bias": True}], ids=str)
def test_lora_on_the_output_layer_is_the_merged_weight(options: dict[str, Any]) -> None:
    model = adapted(**options)
    head = check_logits(model)
    base = model.get_base_model().lm_head.base_layer
    assert relative_error(head.weight, base.weight) > 0.1
    with model.disable_adapter():
        assert check_logits(model).weight is base.weight
    model.merge_adapter()
    assert check_logits(model).weight is base.weight


def test_gradients_reach_the_adapter() -> None:
    def gradients(model: Any, student: Tensor, head: LMHead | None) -> list[Tensor]:
        model.zero_grad()
        (1.7 * entropy_aware_kl(student, teacher, student_head=head).loss).backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    model = adapted(target_modules=["lm_head", "q_proj"])
    ids = torch.arange(9).view(1, 9)
    out = model(input_ids=ids, output_hidden_states=True)
    teacher = 3 * torch.randn(out.logits.shape, generator=torch.Generator().manual_seed(5))
    expected = gradients(model, out.logits, None)
    again = model(input_ids=ids, output_hidden_states=True)
    found = gradients(model, again.hidden_states[-1], LMHead.from_model(model))
    assert len(found) == len(expected) == 6  # A and B of the head, of q_proj in two layers
    for mine, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 0 and relative_error(mine, theirs) < 1e-5


def test_entries_of_an_adapted_head() -> None:
    model = adapted()
    ids = torch.tensor([40, 3, 17])
    _, hidden, logits = seen(model)
    head = LMHead.from_model(model).select(ids)
    assert relative_error(logits_of(hidden, head), logits[..., ids]) < 1e-5
    head.weight.square().sum().backward()
    adapter = [p for p in model.parameters() if p.requires_grad]
    assert len(adapter) == 2 and all(p.grad is not None and p.grad.any() for p in adapter)


def test_several_adapters_and_which_of_them_is_active() -> None:
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["lm_head"]))
    model.set_adapter("second")
    shake(model, seed=4)
    second = check_logits(model).weight
    model.base_model.set_adapter(["default", "second"])
    assert relative_error(check_logits(model).weight, second) > 0.1


def test_an_adapter_elsewhere_leaves_the_weight_alone() -> None:
    model = adapted(target_modules=["q_proj"])
    assert check_logits(model).weight is model.get_base_model().lm_head.weight


def test_modules_to_save_gives_the_copy_that_is_trained() -> None:
    model = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
    wrapper = model.get_base_model().lm_head
    head = check_logits(model)
    assert head.weight is wrapper.modules_to_save["default"].weight and head.weight.requires_grad
    with model.disable_adapter():
        assert check_logits(model).weight is wrapper.original_module.weight


def test_a_tied_head_with_an_adapter() -> None:
    model = adapted("Qwen2ForCausalLM")
    head = check_logits(model)
    assert relative_error(head.weight, model.get_base_model().get_input_embeddings().weight) > 0.1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"use_dora": True}, r"that is more than LoRA \(DoraLinearVariant\); merge it first"),
        ({"lora_dropout": 0.1}, "with dropout 0.1 on its output layer, in training; set lora_dropout=0"),
    ],
)
def test_what_is_no_merged_weight_is_refused(options: dict[str, Any], says: str) -> None:
    model = adapted(**options).train()
    with pytest.raises(ValueError, match=f"cannot express PhiForCausalLM: it has an adapter 'default' .*{says}"):
        LMHead.from_model(model)


def test_dropout_matters_in_training_only() -> None:
    check_logits(adapted(lora_dropout=0.1))
