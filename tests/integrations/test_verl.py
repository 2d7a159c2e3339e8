"""verl's registry and the function behind its top-k losses: the real ones where verl is installed, which asks for other
versions of transformers than the rest of the suite; else modules with the signatures that verl 0.9.1 publishes."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from eopd_kernels import EntropyGate, Objective, TopK, TopKTeacher, entropy_aware_kl
from eopd_kernels.integrations import hooks
from eopd_kernels.integrations.verl import FSDP, LOSSES, register
from tests.conftest import logits_like

OBJECTIVE = Objective(gate=EntropyGate(0.5), reverse="none", forward=TopK(4))


@dataclass
class DistillationLossSettings:
    names: list[str] = field(default_factory=list)
    use_topk: bool = False
    use_estimator: bool = False


def published(monkeypatch: pytest.MonkeyPatch) -> Any:
    """verl 0.9.1's modules as far as the adapter knows them."""
    for name in ("verl", "verl.trainer", "verl.trainer.distillation", "verl.trainer.distillation.fsdp", LOSSES, FSDP):
        module = ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    losses: Any = sys.modules[LOSSES]
    fsdp: Any = sys.modules[FSDP]
    losses.DISTILLATION_LOSS_REGISTRY, losses.DISTILLATION_SETTINGS_REGISTRY = {}, {}
    losses.DistillationLossSettings = DistillationLossSettings
    exec(
        """
def register_distillation_loss(loss_settings):
    def decorator(func):
        for name in loss_settings.names:
            if name in DISTILLATION_LOSS_REGISTRY:
                raise ValueError(f"Distillation loss function with name '{name}' is already registered.")
            DISTILLATION_LOSS_REGISTRY[name] = func
            DISTILLATION_SETTINGS_REGISTRY[name] = loss_settings
        return func
    return decorator

def compute_topk_loss(config, distillation_config, data, student_logits, data_format):
    return "verl's own"

def compute_forward_kl_topk(config, distillation_config, model_output, data):
    return model_output["distillation_losses"], {}

def distillation_ppo_loss(
    config, distillation_config, model_output=None, data=None, dp_group=None, student_logits=None, data_format="thd"
):
    return compute_topk_loss(config, distillation_config, data, student_logits, data_format)
""",
        losses.__dict__,
    )
    fsdp.get_ulysses_sequence_parallel_world_size = lambda group=None: 1
    fsdp.slice_input_tensor = lambda x, dim: x
    fsdp._chunked_topk_log_probs = lambda logits, topk_ids, chunk_size=4096: logits.log_softmax(-1).gather(-1, topk_ids)
    return losses


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """verl's module of distillation losses, restored afterwards."""
    if importlib.util.find_spec("verl") is None:
        yield published(monkeypatch)
        return
    module = importlib.import_module(LOSSES)
    before = {
        name: dict(getattr(module, name)) for name in ("DISTILLATION_LOSS_REGISTRY", "DISTILLATION_SETTINGS_REGISTRY")
    }
    own = module.compute_topk_loss
    yield module
    module.compute_topk_loss = own  # type: ignore[attr-defined]
    for name, entries in before.items():
        registry = getattr(module, name)
        registry.clear()
        registry.update(entries)


def batch() -> tuple[Tensor, dict[str, Tensor]]:
    """Three packed sequences: the student's logits [1, n, V], and the teacher's top four, nested."""
    generator = torch.Generator().manual_seed(4)
    student = logits_like(generator, 1, 12, 50)
    top = logits_like(generator, 12, 50).log_softmax(-1).topk(4)
    offsets = torch.tensor([0, 3, 8, 12])
    data = {
        name: torch.nested.nested_tensor_from_jagged(values, offsets)
        for name, values in (("teacher_logprobs", top.values), ("teacher_ids", top.indices))
    }
    return student.requires_grad_(), data


def ask(losses: Any, student: Tensor, data: Any, mode: str = "entropy_aware_kl", strategy: str = "fsdp2") -> Any:
    """What verl's logits processor asks on a worker."""
    distillation = SimpleNamespace(distillation_loss=SimpleNamespace(loss_mode=mode, log_prob_min_clamp=None))
    config = SimpleNamespace(strategy=strategy)
    return losses.distillation_ppo_loss(config, distillation, data=data, student_logits=student, data_format="thd")


def test_every_tokens_loss_and_gradient_are_ours(losses: Any) -> None:
    register(OBJECTIVE)
    student, data = batch()
    answer = ask(losses, student, data)
    teacher = TopKTeacher(data["teacher_ids"].values()[None], data["teacher_logprobs"].values()[None])
    out = entropy_aware_kl(student, teacher, objective=OBJECTIVE, reduction="none")
    assert 0 < out.gate.mean() < 1
    upstream = torch.linspace(-1, 2, 12)[None]
    torch.testing.assert_close(answer["distillation_losses"], out.loss)
    for loss in (answer["distillation_losses"], out.loss):
        assert loss.shape == (1, 12)
    found, expected = (
        torch.autograd.grad(loss, student, upstream)[0] for loss in (answer["distillation_losses"], out.loss)
    )
    torch.testing.assert_close(found, expected)
    mass = student.log_softmax(-1).gather(-1, teacher.ids).exp().sum(-1)
    torch.testing.assert_close(answer["student_mass"], mass.detach())
    torch.testing.assert_close(answer["teacher_mass"], teacher.log_probs.exp().sum(-1))


def test_it_is_registered_as_a_loss_of_the_top_k(losses: Any) -> None:
    register(name="mine")
    assert losses.DISTILLATION_SETTINGS_REGISTRY["mine"].use_topk
    assert losses.DISTILLATION_LOSS_REGISTRY["mine"] is losses.compute_forward_kl_topk
    with pytest.raises(ValueError, match="'mine' is already registered"):
        register(name="mine")


def test_other_modes_stay_verls(losses: Any) -> None:
    student, data = batch()
    before = ask(losses, student, data, "forward_kl_topk")
    register(OBJECTIVE)
    after = ask(losses, student, data, "forward_kl_topk")
    if isinstance(before, dict):
        before, after = before["distillation_losses"], after["distillation_losses"]
        torch.testing.assert_close(after, before)
    else:
        assert after == before == "verl's own"


def test_a_strategy_whose_logits_are_sharded_is_refused(losses: Any) -> None:
    register(OBJECTIVE)
    with pytest.raises(NotImplementedError, match="got 'megatron'"):
        ask(losses, *batch(), strategy="megatron")


@pytest.mark.parametrize("objective", [Objective(), Objective.forward_kl(), Objective(forward=TopK(4))])
def test_what_the_top_k_do_not_tell_is_refused(losses: Any, objective: Objective) -> None:
    with pytest.raises(ValueError, match="the teacher's top k alone"):
        register(objective)


def test_a_hook_that_has_moved_is_named(losses: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "compute_topk_loss", lambda logits: logits)
    with pytest.raises(hooks.HookMoved, match=r"verl.*0\.9\.1.*compute_topk_loss takes \(logits\), expected \(config"):
        register()
    monkeypatch.delattr(losses, "register_distillation_loss")
    with pytest.raises(hooks.HookMoved, match="has no register_distillation_loss"):
        register()
