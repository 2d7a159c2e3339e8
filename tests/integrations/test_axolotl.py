"""axolotl's plugin and trainer of distillation where it is installed, which asks for Python 3.12; else a stand-in with
the signatures and the formula of 0.21.0."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from eopd_kernels import EntropyGate, Objective, TopK, TopKTeacher, entropy_aware_kl
from eopd_kernels.integrations import hooks
from eopd_kernels.integrations.axolotl import LOSS, LOSS_CLASS, PLUGIN, TRAINER, kd_plugin
from tests.conftest import relative_error

from .conftest import tiny_pair

K = 5
INSTALLED = importlib.util.find_spec("axolotl") is not None
GATED = Objective(gate=EntropyGate(1.0), reverse="none", forward=TopK())


class Loss:
    """axolotl's divergence over a top k, of which its own class shows T² times, with this one's gradient."""

    def __init__(self, temperature: float, beta: float, normalize_topk: bool | None) -> None:
        self.temperature, self.beta, self.normalize_topk = temperature, beta, normalize_topk

    def forward(
        self,
        lm_head_weight: Tensor,
        student_hidden_states: Tensor,
        target_token_ids: Tensor,
        target_logprobs: Tensor,
        target_mask: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
    ) -> Tensor:
        p = (student_hidden_states @ lm_head_weight.T / self.temperature).log_softmax(-1).gather(-1, target_token_ids)
        if self.normalize_topk:
            p = p.log_softmax(-1)
        a, b = (p, target_logprobs) if self.beta else (target_logprobs, p)
        return (a.exp() * (a - b))[target_mask.bool()].sum()

    __call__ = forward


class Trainer:
    """What axolotl's trainer does with its loss."""

    def __init__(self) -> None: ...

    def log(self: Any, logs: dict[str, float], start_time: float | None = None) -> None:
        self.lines.append(logs)

    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        hidden = model(input_ids=inputs["input_ids"], output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
        targets = (inputs[name] for name in ("target_token_ids", "target_logprobs", "target_mask"))
        loss = self._kd_loss_fn(model.lm_head.weight, hidden, *targets, true_labels=inputs["labels"])
        return loss / num_items_in_batch


class KDPlugin:
    def get_trainer_cls(self, cfg: Any) -> Any:
        return sys.modules[TRAINER].AxolotlKDTrainer if cfg.kd_trainer else None


def published(monkeypatch: pytest.MonkeyPatch) -> None:
    """axolotl 0.21.0's modules, as far as the adapter knows them."""
    for name in ("axolotl", "axolotl.integrations", PLUGIN, TRAINER, LOSS.rpartition(".")[0], LOSS):
        module: Any = ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    modules: Any = sys.modules
    modules[LOSS].LigerFusedLinearKLTopKLogprobLoss = type(LOSS_CLASS, (), dict(vars(Loss)))
    modules[TRAINER].AxolotlKDTrainer = type("AxolotlKDTrainer", (), dict(vars(Trainer)))
    modules[PLUGIN].KDPlugin = type("KDPlugin", (), dict(vars(KDPlugin)))


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """axolotl's trainer class, which a test makes without the arguments of a training."""
    if not INSTALLED:
        published(monkeypatch)
    trainer: Any = importlib.import_module(TRAINER).AxolotlKDTrainer

    def made(self: Any, model: Any, args: Any) -> None:
        self.model, self.args, self.lines = model, args, []
        self.accelerator = SimpleNamespace(num_processes=1)

    monkeypatch.setattr(trainer, "__init__", made)
    monkeypatch.setattr(
        trainer, "log", lambda self, logs, start_time=None: self.lines.append(logs), raising="log" in vars(trainer)
    )
    yield trainer


def trainer_of(objective: Objective | None, model: Any = None, served: bool = True, **options: Any) -> Any:
    """A trainer as the plugin's class makes it from a configuration."""
    given = {"kd_alpha": 0.7, "kd_ce_alpha": 0, "kd_temperature": 1.0, "kd_beta": 0.0, "kd_normalize_topk": None}
    given |= options
    cfg = SimpleNamespace(kd_trainer=True, kd_online_server_base_url="http://x" if served else None, **given)
    how = {"backend": "torch"} if objective is None else {}
    return kd_plugin(objective, **how)().get_trainer_cls(cfg)(
        tiny_pair()[0] if model is None else model, SimpleNamespace(**given)
    )


def batch(normalized: bool) -> dict[str, Tensor]:
    """Two sequences, and what a teacher says of some of their tokens."""
    generator = torch.Generator().manual_seed(9)
    ids = torch.randint(3, 24, (2, 8), generator=generator)
    with torch.no_grad():
        top = tiny_pair()[1](input_ids=ids).logits.float().log_softmax(-1).topk(K)
    counted = (torch.arange(8) >= torch.tensor([[3], [1]])).long()
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(counted == 0, -100),
        "target_token_ids": top.indices.masked_fill(counted.unsqueeze(-1) == 0, 0),
        "target_logprobs": top.values.log_softmax(-1) if normalized else top.values,
        "target_mask": counted.unsqueeze(-1).expand(2, 8, K).int(),
    }


def their_loss(inputs: dict[str, Tensor], model: Any, **options: Any) -> Tensor:
    """The stand-in's formula, whichever axolotl there is."""
    hidden = model(input_ids=inputs["input_ids"], output_hidden_states=True).hidden_states[-1]
    targets = (inputs[name] for name in ("target_token_ids", "target_logprobs", "target_mask", "labels"))
    return 0.7 * Loss(**options)(model.lm_head.weight, hidden, *targets)


@pytest.mark.parametrize("normalize", [None, True])
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_without_an_objective_it_is_theirs(
    theirs: Any, temperature: float, beta: float, normalize: bool | None
) -> None:
    trainer = trainer_of(None, kd_temperature=temperature, kd_beta=beta, kd_normalize_topk=normalize)
    inputs = batch(bool(normalize))
    loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=17)
    options: dict[str, Any] = {"temperature": temperature, "beta": beta, "normalize_topk": normalize}
    expected = their_loss(inputs, trainer.model, **options) / 17
    assert relative_error(loss, expected) < 1e-5
    weights = list(trainer.model.parameters())
    grads = [torch.autograd.grad(value, weights, allow_unused=True) for value in (loss, expected)]
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(*grads, strict=True) if a is not None and b is not None)


@pytest.mark.skipif(not INSTALLED, reason="axolotl is not installed")
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_their_gradient_lacks_the_factor_of_their_loss(theirs: Any, temperature: float, normalize: bool) -> None:
    trainer, inputs = trainer_of(None, kd_temperature=temperature, kd_normalize_topk=normalize), batch(normalize)
    ours = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=17)
    real: Any = getattr(importlib.import_module(LOSS), LOSS_CLASS)
    trainer._kd_loss_fn = real(
        0.0, 0.7, temperature, 0.0, compiled=False, compute_ce_loss=False, normalize_topk=normalize
    )
    own = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=17)
    assert relative_error(temperature**2 * ours, own) < 1e-5
    weight = trainer.model.lm_head.weight
    of_ours, of_own = (torch.autograd.grad(value, weight)[0] for value in (ours, own))
    assert relative_error(of_ours, of_own) < 1e-4


def test_an_objective_takes_its_place_and_is_logged(theirs: Any) -> None:
    trainer, inputs = trainer_of(GATED, served=False, kd_normalize_topk=True), batch(True)
    loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=17)
    logits = trainer.model(input_ids=inputs["input_ids"]).logits
    counted = inputs["target_mask"][..., 0] != 0
    teacher = TopKTeacher(inputs["target_token_ids"], inputs["target_logprobs"])
    expected = entropy_aware_kl(logits, teacher, mask=counted, num_items=17, objective=GATED)
    assert relative_error(loss, 0.7 * expected.loss) < 1e-5
    with torch.no_grad():
        trainer.compute_loss(trainer.model, inputs, num_items_in_batch=17)
    trainer.log({"loss": 1.0}, None)
    trainer.log({"eval_loss": 1.0})
    gate = float(expected.means()["gate"])
    assert 0 < gate < 1
    assert trainer.lines[0]["gate"] == pytest.approx(gate) == trainer.lines[1]["eval_gate"]


def test_a_renormalised_top_k_bounds_the_entropy_still() -> None:
    logits = 3 * torch.randn(200, 60, generator=torch.Generator().manual_seed(3))
    top = logits.log_softmax(-1).topk(K)
    of_k, whole = (torch.distributions.Categorical(logits=z).entropy() for z in (top.values, logits))
    assert (of_k <= whole + 1e-5).all()


@pytest.mark.parametrize(
    ("objective", "options", "says"),
    [
        (GATED, {"kd_ce_alpha": 0.1}, "kd_ce_alpha must be 0, got 0.1"),
        (GATED, {"kd_temperature": 2.0}, r"temperature must be \(2.0, 1.0\).*got 1.0"),
        (None, {"kd_beta": 0.5}, "kd_beta must be 0 or 1 without an objective, got 0.5"),
        (Objective(reverse="none", forward=TopK(teacher="raw")), {"kd_normalize_topk": True}, "renormalised top k"),
        (Objective(reverse="none", forward=TopK(teacher="raw", tail=True)), {"served": False}, "renormalised top k"),
        (GATED, {"model": "gemma2"}, "model must have plain logits, got scale=1.0, softcap=0.5"),
        (GATED, {"model": "phi"}, "softcap=None and a bias"),
        (GATED, {"model": "lora"}, "output layer without an adapter"),
        (Objective(), {}, "objective must have TopK"),
        (Objective(reverse="none", forward=TopK(of="student")), {}, "objective must have TopK"),
        (Objective.eopd_paper(), {}, "old log-probabilities"),
        (Objective(reverse="none", forward=TopK(), cross_entropy=0.5), {}, "cross_entropy must be 0"),
    ],
)
def test_what_would_silently_be_wrong_is_refused(
    theirs: Any, objective: Objective | None, options: dict[str, Any], says: str
) -> None:
    made = dict(options)
    if made.get("model") == "lora":
        made["model"] = get_peft_model(tiny_pair()[0], LoraConfig(target_modules=["q_proj", "lm_head"], r=2))
    elif "model" in made:
        made["model"] = tiny_pair(made["model"])[0]
    with pytest.raises(ValueError, match=says):
        trainer_of(objective, **made)


def test_a_raw_top_k_has_a_tail(theirs: Any) -> None:
    assert trainer_of(Objective(reverse="none", forward=TopK(teacher="raw", tail=True)))


def test_without_kd_trainer_there_is_none(theirs: Any) -> None:
    assert kd_plugin()().get_trainer_cls(SimpleNamespace(kd_trainer=None)) is None
    with pytest.raises(TypeError, match="kd_plugin"):
        kd_plugin(chunks=3)


def moved_plugin(self: Any, cfg: Any, args: Any) -> None: ...


def moved_loss(self: Any, hidden: Any) -> None: ...


def moved_trainer(self: Any, *arguments: Any) -> None: ...


@pytest.mark.parametrize(
    ("module", "name", "moved", "says"),
    [
        (PLUGIN, "KDPlugin.get_trainer_cls", moved_plugin, r"takes \(cfg, args\), expected \(cfg\)"),
        (LOSS, f"{LOSS_CLASS}.forward", moved_loss, r"takes \(hidden\), expected \(lm_head_weight"),
        (TRAINER, "AxolotlKDTrainer.compute_loss", moved_trainer, "does not call _kd_loss_fn"),
    ],
)
def test_what_moved_is_said(
    theirs: Any, module: str, name: str, moved: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, _, attribute = name.partition(".")
    monkeypatch.setattr(getattr(importlib.import_module(module), owner), attribute, moved)
    with pytest.raises(hooks.HookMoved, match=says):
        trainer_of(None)
