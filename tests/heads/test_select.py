"""LMHead.select: the loss of a head's rows is that of these columns of its logits, and gradients reach all of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eopd_kernels import EntropyGate, LMHead, Objective, Sampled, TopK, entropy_aware_kl
from eopd_kernels.testing import pretend
from tests.conftest import relative_error
from tests.reports.plain import plain

V, V_T, D, D_T, N = 60, 75, 8, 12, 20
K = 23
TRANSFORM: dict[str, float] = {"scale": 1.3, "softcap": 4.0}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def order(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:K]


IDS, IDS_T = order(V, 1), order(V_T, 2)
TOKENS = torch.arange(N) % K  # places in the selection
OLD = -1 - TOKENS / K


def student(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves: hidden states, weight and bias."""
    tensors = normal(N, D, seed=3), normal(V, D, seed=4), normal(V, seed=5)
    return tuple(t.to(dtype).requires_grad_() for t in tensors)  # type: ignore[return-value]


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    z = TRANSFORM["scale"] * (hidden.double() @ weight.double().t() + bias.double())
    return TRANSFORM["softcap"] * torch.tanh(z / TRANSFORM["softcap"])


TEACHER, TEACHER_WEIGHT = normal(N, D_T, seed=6), normal(V_T, D_T, seed=7)


@pytest.mark.parametrize("schedule", ["chunked", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "objective",
    [
        Objective(gate=EntropyGate(2.0), alpha=0.7),
        Objective(gate=EntropyGate(2.0), reverse=Sampled(), forward=TopK(5, teacher="raw", tail=True)),
    ],
    ids=["full", "sampled and top k"],
)
def test_it_is_the_loss_of_these_columns(objective: Objective, dtype: torch.dtype, schedule: str) -> None:
    tokens: dict[str, Any] = {"token_ids": TOKENS, "old_log_probs": OLD}
    hidden, weight, bias = student(dtype)
    head = LMHead(weight, bias, **TRANSFORM)
    teacher_head = LMHead(TEACHER_WEIGHT.to(dtype))
    out = entropy_aware_kl(
        hidden,
        TEACHER.to(dtype),
        student_head=head.select(IDS),
        teacher_head=teacher_head.select(IDS_T),
        objective=objective,
        schedule=schedule,
        workspace_bytes=1,
        **tokens,
    )
    out.loss.backward()

    exact = student()
    columns = logits_of(*exact)[:, IDS]
    of_teacher = (TEACHER @ TEACHER_WEIGHT.t())[:, IDS_T]
    expected = entropy_aware_kl(columns, of_teacher, objective=objective, **tokens)
    if objective.reverse == "full":
        truth = plain(columns, of_teacher)
        of_gates = (truth.teacher_entropy > 2.0).double()
        torch.testing.assert_close(expected.loss, (truth.reverse_kl + 0.7 * of_gates * truth.forward_kl).mean())
    expected.loss.backward()
    bound = 1e-9 if dtype == torch.float64 else 2e-5
    assert relative_error(out.loss, expected.loss) < bound
    assert relative_error(out.teacher_entropy, expected.teacher_entropy) < bound
    assert out.student_log_probs is not None and expected.student_log_probs is not None
    assert relative_error(out.student_log_probs, expected.student_log_probs) < bound
    rest = torch.ones(V, dtype=torch.bool)
    rest[IDS] = False
    for mine, theirs in zip((hidden, weight, bias), exact, strict=True):
        assert mine.grad is not None and theirs.grad is not None and mine.grad.shape == theirs.shape
        assert relative_error(mine.grad, theirs.grad) < bound
        if mine is not hidden:
            assert not mine.grad[rest].any() and mine.grad[IDS].any()


def test_a_selection_of_a_selection_and_of_everything() -> None:
    _, weight, bias = student()
    head = LMHead(weight, bias, **TRANSFORM)
    twice, once = head.select(IDS).select(torch.tensor([4, 0])), head.select(IDS[[4, 0]])
    assert torch.equal(twice.weight, once.weight) and torch.equal(twice.bias, once.bias)  # type: ignore[arg-type]
    assert (twice.scale, twice.softcap) == (1.3, 4.0)
    assert torch.equal(head.select(torch.arange(V)).weight, weight)
    assert LMHead(weight).select(IDS).bias is None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32], ids=str)
def test_ids_of_any_integer_dtype(dtype: torch.dtype) -> None:
    _, weight, _ = student()
    assert torch.equal(LMHead(weight).select(IDS.to(dtype)).weight, weight[IDS])


def test_a_second_step_must_select_again() -> None:
    """The copy is of the weight as it was: autograd refuses to go through it twice."""
    hidden, weight, bias = student()
    head, teacher = LMHead(weight, bias).select(IDS), torch.zeros(N, K, dtype=torch.float64)
    for _ in range(2):
        first = entropy_aware_kl(hidden, teacher, student_head=LMHead(weight, bias).select(IDS)).loss
        first.backward()
    entropy_aware_kl(hidden, teacher, student_head=head).loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        entropy_aware_kl(hidden, teacher, student_head=head).loss.backward()


def test_a_teacher_that_is_trained_is_refused_as_ever() -> None:
    weight = TEACHER_WEIGHT.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"teacher_head\.weight requires grad"):
        entropy_aware_kl(torch.zeros(N, K).double(), TEACHER, teacher_head=LMHead(weight).select(IDS_T))


def test_a_token_outside_of_the_selection_is_refused_where_it_counts() -> None:
    """As docs/guides/teachers.md makes places of token ids: −1 where a token is not common."""
    hidden, weight, _ = student()
    places = torch.full((V,), -1)
    places[IDS] = torch.arange(K)
    tokens = torch.arange(N)
    call: dict[str, Any] = {"student_head": LMHead(weight).select(IDS), "token_ids": places[tokens]}
    teacher = torch.zeros(N, K).double()
    with pytest.raises(ValueError, match=rf"token_ids must be in \[0, {K}\) where they count, got -1"):
        entropy_aware_kl(hidden, teacher, **call)
    common = torch.isin(tokens, IDS)
    out = entropy_aware_kl(hidden, teacher, mask=places[tokens] >= 0, **call)
    assert torch.equal(out.valid, common) and 0 < common.sum() < N
    of_all = (hidden @ weight.t()).log_softmax(-1)
    expected = of_all.gather(1, tokens[:, None])[:, 0] - of_all[:, IDS].logsumexp(1)  # renormalised
    assert out.student_log_probs is not None
    assert relative_error(out.student_log_probs, torch.where(common, expected, 0.0)) < 1e-12


NAME = "ids of LMHead.select must"


@pytest.mark.parametrize(
    ("ids", "error", "says"),
    [
        ([1, 2], TypeError, f"{NAME} be an integer tensor, got a list of length 2"),
        (torch.tensor([1.0, 2.0]), TypeError, f"{NAME} be an integer tensor, got a float32 tensor"),
        (torch.ones(V).bool(), TypeError, f"{NAME} be an integer tensor, got a bool tensor"),
        (torch.ones(2).long().to_sparse(), TypeError, f"{NAME} be a dense tensor"),
        (torch.tensor(3), ValueError, rf"{NAME} have the shape \[k\] with k >= 1, got \(\)"),
        (torch.ones(1, 2).long(), ValueError, rf"{NAME} have the shape \[k\] with k >= 1, got \(1, 2\)"),
        (torch.ones(0).long(), ValueError, rf"{NAME} have the shape \[k\] with k >= 1, got \(0,\)"),
        (torch.tensor([0, V]), ValueError, rf"{NAME} be from 0 to {V - 1}, .* got a int64 tensor of shape \(2,\)"),
        (torch.tensor([0, -1]), ValueError, f"{NAME} be from 0 to {V - 1}, .* leave out what a tokenizer has beyond"),
        (torch.tensor([5, 3, 5]), ValueError, f"{NAME} name each entry once, got a int64 tensor .* with repetitions"),
    ],
)
def test_what_is_refused(ids: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        LMHead(student()[1]).select(ids)


def test_a_weight_that_zero_3_has_partitioned_meanwhile_is_refused() -> None:
    head = LMHead(student()[1])
    partitioned: Any = nn.Parameter(torch.empty(0))
    partitioned.ds_id = 7
    head.weight = partitioned
    with pytest.raises(ValueError, match=r"LMHead\.weight is partitioned by DeepSpeed ZeRO-3"):
        head.select(IDS)


def test_no_device_is_waited_for() -> None:
    hidden, weight, bias = student(torch.float32)
    with pretend.gpu(), pretend.Watch():
        head = LMHead(weight, bias).select(IDS)
        entropy_aware_kl(hidden, torch.zeros(N, K), student_head=head, wait_free=True).loss.backward()
        LMHead(weight).select(IDS.clone())
    assert weight.grad is not None and weight.grad.any()


def test_tensors_without_numbers_are_not_looked_at() -> None:
    head = LMHead(torch.empty(V, D, device="meta"))
    for ids in (IDS, torch.empty(K, dtype=torch.int64, device="meta")):
        selected = head.select(ids).weight
        assert selected.is_meta and selected.shape == (K, D)


def test_compiled_without_a_break() -> None:
    hidden, weight, bias = student(torch.float32)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
        return entropy_aware_kl(hidden, torch.zeros(N, K), student_head=LMHead(weight, bias).select(ids)).loss

    torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, weight, bias, IDS).backward()
    gradient, weight.grad = weight.grad, None
    loss(hidden, weight, bias, IDS).backward()
    torch.testing.assert_close(gradient, weight.grad)


def test_of_a_model_with_what_it_does_to_its_logits() -> None:
    class CohereForCausalLM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = nn.Linear(D, V, bias=False)
            self.config = SimpleNamespace(vocab_size=V, logit_scale=0.0625)

        def get_output_embeddings(self) -> nn.Module:
            return self.lm_head

    model = CohereForCausalLM()
    head = LMHead.from_model(model).select(IDS)
    assert head.scale == 0.0625 and torch.equal(head.weight, model.lm_head.weight[IDS])
