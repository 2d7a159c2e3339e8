"""NeMo AutoModel's class of this name where it is installed, else one with the signature and the formula of 0.7.0."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from eopd_kernels import EntropyGate, Objective, entropy_aware_kl
from eopd_kernels.integrations import hooks
from eopd_kernels.integrations.nemo import MODULE, KDLoss
from tests.conftest import logits_like, relative_error
from tests.distributed.processes import run_ranks

V, IGNORED = 40, -7


class Published(nn.Module):
    """What NeMo AutoModel 0.7.0 documents: the forward KL at T, times T², of the tokens that are not ignored."""

    def __init__(
        self,
        ignore_index: int = -100,
        temperature: float = 1.0,
        fp32_upcast: bool = True,
        tp_group: Any = None,
        chunk_size: int = 0,
    ) -> None:
        super().__init__()
        self.ignore_index, self.temperature = ignore_index, temperature

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, num_batch_labels: int | None = None
    ) -> Tensor:
        counted = labels != self.ignore_index
        p, q = ((z[counted].float() / self.temperature).log_softmax(-1) for z in (student_logits, teacher_logits))
        kl = (q.exp() * (q - p)).sum() * self.temperature**2
        return kl / (counted.sum() if num_batch_labels is None else num_batch_labels)


def published(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the class, as far as the adapter knows it."""
    parts = MODULE.split(".")
    for n in range(1, len(parts) + 1):
        module: Any = ModuleType(".".join(parts[:n]))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    module.KDLoss = Published
    return module


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """NeMo's module of its distillation loss."""
    if importlib.util.find_spec("nemo_automodel") is None:
        return published(monkeypatch)
    return importlib.import_module(MODULE)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    student, teacher = logits_like(generator, 2, 7, V), logits_like(generator, 2, 7, V)
    labels = torch.randint(0, V, (2, 7), generator=generator)
    labels[0, :3] = labels[1, 5] = IGNORED
    return student.requires_grad_(), teacher, labels


@pytest.mark.parametrize("num_batch_labels", [None, 23])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_without_an_objective_it_is_theirs(theirs: Any, temperature: float, num_batch_labels: int | None) -> None:
    """Also with logits that were flattened and labels that were not."""
    results = []
    for loss in (theirs.KDLoss, KDLoss):
        student, teacher, labels = batch()
        value = loss(ignore_index=IGNORED, temperature=temperature, fp32_upcast=True, chunk_size=3)(
            student.flatten(0, 1), teacher.flatten(0, 1), labels.flatten(), num_batch_labels=num_batch_labels
        )
        results.append((value, *torch.autograd.grad(1.7 * value, student)))
    for expected, found in zip(*results, strict=True):
        assert relative_error(found, expected) < 2e-5
    student, teacher, labels = batch()
    shaped = KDLoss(IGNORED, temperature)(student, teacher, labels, num_batch_labels)
    assert relative_error(shaped, results[0][0]) < 2e-5


def test_a_batch_without_a_label_gives_zero_and_a_gradient(theirs: Any) -> None:
    student, teacher, labels = batch()
    loss = KDLoss(IGNORED)(student, teacher, torch.full_like(labels, IGNORED), 5)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss == 0 and not gradient.any()


def test_an_objective_takes_the_place_of_the_forward_kl(theirs: Any) -> None:
    objective = Objective(gate=EntropyGate(0.5), temperature=2.0)
    loss = KDLoss(IGNORED, objective=objective, backend="torch", schedule="recompute")
    student, teacher, labels = batch()
    value = loss(student, teacher.requires_grad_(), labels, num_batch_labels=9)
    expected = entropy_aware_kl(
        student, teacher.detach(), labels=labels, ignore_index=IGNORED, num_items=9, objective=objective
    )
    assert relative_error(value, expected.loss) < 1e-5
    value.backward()
    assert teacher.grad is None
    assert loss.temperature == 2.0 and loss.ignore_index == IGNORED  # which the recipe reads
    with torch.no_grad():
        loss(student, teacher, labels)
    means = {name: float(mean) for name, mean in expected.means().items()}
    assert loss.figures.means() == pytest.approx(means, rel=1e-5)
    assert loss.figures.means(training=False) == pytest.approx(means, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"objective": Objective(), "temperature": 2.0}, "objective replaces temperature"),
        ({"objective": Objective.eopd_paper()}, "old log-probabilities"),
        ({"objective": "eopd"}, "objective must be an Objective"),
        ({"chunks": 2}, "KDLoss"),
    ],
)
def test_what_would_not_be_what_it_says_is_refused(theirs: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        KDLoss(**options)


def test_what_moved_is_said(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> None: ...

    monkeypatch.setattr(theirs, "KDLoss", SimpleNamespace(forward=forward))
    with pytest.raises(hooks.HookMoved, match=r"takes \(student_logits, teacher_logits, targets\), expected"):
        KDLoss()
    monkeypatch.delattr(theirs, "KDLoss")
    with pytest.raises(hooks.HookMoved, match=r"has no KDLoss"):
        KDLoss()


PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"


def made(node: Any) -> Any:
    """What a recipe's targets make, where NeMo's own loader is not installed."""
    if not isinstance(node, dict):
        return node
    options = {name: made(value) for name, value in node.items() if name != "_target_"}
    return pkgutil.resolve_name(node["_target_"])(**options) if "_target_" in node else options


def test_the_pages_recipe_makes_it(theirs: Any) -> None:
    """By NeMo's own loader where it is installed."""
    (block,) = re.findall(r"^```yaml\n(kd_loss_fn:.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    recipe: Any = yaml.safe_load(block)
    if theirs.KDLoss is Published:
        loss = made(recipe)["kd_loss_fn"]
    else:
        loader: Any = importlib.import_module("nemo_automodel.components.config.loader")
        loss = loader.ConfigNode(recipe).kd_loss_fn.instantiate()
        utils: Any = importlib.import_module("nemo_automodel.components.loss.utils")
        assert utils._get_loss_ignore_index(loss) == -100
    assert isinstance(loss, KDLoss) and loss.objective == Objective(gate=EntropyGate(0.5), alpha=0.3)


def over_ranks(placement: str) -> tuple[float, float, str]:
    """The errors of loss and gradient with logits that are DTensors, and what is said of a whole teacher."""
    with pytest.MonkeyPatch.context() as patch:
        published(patch)
        mesh = init_device_mesh("cpu", (2,))
        student, teacher, labels = batch()
        whole = KDLoss(IGNORED, 2.0)(student, teacher, labels, 9)
        (gradient,) = torch.autograd.grad(1.7 * whole, student)
        placed = Shard(2) if placement == "vocabulary" else Replicate()
        ours: Any = distribute_tensor(student.detach(), mesh, [placed]).requires_grad_()
        other = distribute_tensor(teacher, mesh, [placed])
        loss = KDLoss(IGNORED, 2.0)(ours, other, labels, 9)
        (found,) = torch.autograd.grad(1.7 * loss, ours)
        assert isinstance(found, DTensor) and not isinstance(loss, DTensor)
        says = ""
        try:
            KDLoss(IGNORED, 2.0)(ours, teacher, labels, 9)
        except ValueError as error:
            says = str(error)
        dist.barrier()
        return float(relative_error(loss, whole)), float(relative_error(found.full_tensor(), gradient)), says


@pytest.mark.parametrize("placement", ["vocabulary", "replicated"])
def test_logits_that_are_dtensors(placement: str) -> None:
    for loss, gradient, says in run_ranks(2, over_ranks, placement):
        assert loss < 1e-5 and gradient < 1e-5
        assert bool(says) == (placement == "vocabulary"), says
