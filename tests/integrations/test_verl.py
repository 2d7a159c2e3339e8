"""verl's registry and the function behind its top-k losses: the real ones where verl is installed, which asks for other
versions of transformers than the rest of the suite; else modules with the signatures that verl 0.9.1 publishes."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from eopd_kernels import EntropyGate, Objective, Sampled, TopK, TopKTeacher, reference
from eopd_kernels.integrations import hooks
from eopd_kernels.integrations.verl import FSDP, LOSSES, PADDING, register, with_sampled_token
from tests.conftest import logits_like

OBJECTIVE = Objective(gate=EntropyGate(0.5), reverse="none", forward=TopK(4))


@dataclass
class DistillationLossSettings:
    names: list[str] = field(default_factory=list)
    use_topk: bool = False
    use_estimator: bool = False


def published(monkeypatch: pytest.MonkeyPatch) -> Any:
    """verl 0.9.1's modules as far as the adapter knows them."""
    for name in (
        "verl",
        "verl.trainer",
        "verl.trainer.distillation",
        "verl.trainer.distillation.fsdp",
        LOSSES,
        FSDP,
        "verl.workers",
        "verl.workers.utils",
        PADDING,
    ):
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
    padding: Any = sys.modules[PADDING]
    padding.no_padding_2_padding = no_padding_2_padding
    return losses


def no_padding_2_padding(tensor: Tensor, data: Any) -> Tensor:
    """Of packed rows those about the responses' tokens, padded: what verl's function of this name returns."""
    ends = (data["prompts"].offsets().diff() + data["responses"].offsets().diff()).cumsum(0).tolist()
    lengths = data["responses"].offsets().diff().tolist()
    rows = [tensor[end - n - 1 : end - 1] for end, n in zip(ends, lengths, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


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


K = 4
PROMPTS, RESPONSES = (1, 3, 2), (2, 2, 2)  # the lengths of three sequences


def jagged(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Sequences one after another as a nested tensor, made as verl makes it."""
    return torch.nested.as_nested_tensor(list(values.split(list(lengths))), layout=torch.jagged)


def batch(sampled_column: bool = False) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Three packed sequences: the student's logits [1, n, V], what verl says of them, and the teacher's log-probs."""
    generator = torch.Generator().manual_seed(4)
    n = sum(PROMPTS) + sum(RESPONSES)
    student = logits_like(generator, 1, n, 50)
    teacher = logits_like(generator, n, 50).log_softmax(-1)
    tokens = torch.randint(0, 50, (n,), generator=generator)
    tokens[1] = teacher[0].argmax()  # among the top k of the row before, as most tokens are
    top = teacher.topk(K)
    ids, log_probs = top.indices, top.values
    if sampled_column:
        next_token = tokens.roll(-1).unsqueeze(1)
        ids, log_probs = torch.cat([ids, next_token], 1), torch.cat([log_probs, teacher.gather(1, next_token)], 1)
    old_log_probs = -4.0 * torch.rand(sum(RESPONSES), generator=generator)
    old_log_probs[0] = -12.0  # far less likely than the teacher has it: a loss below 0
    lengths = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    mask = torch.tensor([[1, 1], [1, 0], [1, 1]])
    data = {
        "teacher_logprobs": jagged(log_probs, lengths),
        "teacher_ids": jagged(ids.int(), lengths),
        "input_ids": jagged(tokens, lengths),
        "prompts": jagged(torch.zeros(sum(PROMPTS)), PROMPTS),
        "responses": jagged(torch.zeros(sum(RESPONSES)), RESPONSES),
        "response_mask": jagged(mask.flatten(), RESPONSES),
        "old_log_probs": jagged(old_log_probs, RESPONSES),
    }
    return student.requires_grad_(), data, teacher


def places() -> list[int]:
    """The rows whose logits are about the responses' tokens."""
    starts = [sum(PROMPTS[:i]) + sum(RESPONSES[:i]) for i in range(3)]
    return [start + p - 1 + i for start, p, r in zip(starts, PROMPTS, RESPONSES, strict=True) for i in range(r)]


def expected(student: Tensor, data: Any, teacher: Tensor, objective: Objective, known: Tensor) -> Any:
    """The loss of the responses' tokens by the specification."""
    rows = places()
    sampled = {}
    tokens = data["input_ids"].values().roll(-1)[rows]
    top = teacher[rows].topk(K)
    if objective.reverse != "none":
        sampled = {"token_ids": tokens, "old_log_probs": data["old_log_probs"].values(), "reverse_weights": known}
    served = TopKTeacher(top.indices, top.values, token_log_probs=teacher[rows].gather(1, tokens[:, None]).squeeze(1))
    return reference.entropy_aware_kl(
        student[0, rows],
        served,
        objective=objective,
        reduction="none",
        mask=data["response_mask"].values(),
        **sampled,
    )


def ask(losses: Any, student: Tensor, data: Any, mode: str = "entropy_aware_kl", **settings: Any) -> Any:
    """What verl's logits processor asks on a worker."""
    usual = {"loss_mode": mode, "log_prob_min_clamp": None, "loss_max_clamp": None, "topk": K}
    strategy = settings.pop("strategy", "fsdp2")
    distillation = SimpleNamespace(
        distillation_loss=SimpleNamespace(**{**usual, "use_policy_gradient": False, **settings})
    )
    config = SimpleNamespace(strategy=strategy)
    return losses.distillation_ppo_loss(config, distillation, data=data, student_logits=student, data_format="thd")


PAPER = dataclasses.replace(Objective.eopd_paper(), gate=EntropyGate(0.5), forward=TopK(K))


@pytest.mark.parametrize("sampled_column", [False, True])
@pytest.mark.parametrize("objective", [OBJECTIVE, PAPER], ids=["forward", "paper"])
def test_every_tokens_loss_and_gradient_are_those_of_the_specification(
    losses: Any, objective: Objective, sampled_column: bool
) -> None:
    register(objective)
    student, data, teacher = batch(sampled_column)
    answer = ask(losses, student, data)
    rows = places()
    tokens = data["input_ids"].values().roll(-1)
    known = (teacher.topk(K).indices == tokens[:, None]).any(1) | sampled_column
    assert sampled_column or 0 < known[rows].float().mean() < 1
    truth = expected(student, data, teacher, objective, known[rows].float())
    assert 0 < truth.gate.mean() < 1
    elsewhere = torch.ones(len(tokens), dtype=torch.bool).index_fill(0, torch.tensor(rows), False)
    assert (answer["distillation_losses"][0, elsewhere] == 0).all()
    torch.testing.assert_close(answer["distillation_losses"][0, rows], truth.loss)
    torch.testing.assert_close(answer["gate"][0, rows], truth.gate)
    assert torch.equal(answer["token_known"][0], known.float())
    upstream = torch.linspace(-1, 2, len(rows))
    (found,) = torch.autograd.grad(answer["distillation_losses"][0, rows], student, upstream)
    (gradient,) = torch.autograd.grad(truth.loss, student, upstream)
    torch.testing.assert_close(found, gradient)
    assert (found != 0).any()


def test_losses_below_0_are_collected_as_they_are(losses: Any) -> None:
    register(PAPER)
    student, data, _ = batch(sampled_column=True)
    answer = ask(losses, student, data)
    found, metrics = losses.DISTILLATION_LOSS_REGISTRY["entropy_aware_kl"](
        config=None, distillation_config=None, model_output={k: v[0] for k, v in answer.items()}, data=data
    )
    assert found.shape == (3, 2) and (found < 0).any()
    assert torch.equal(found.flatten(), answer["distillation_losses"][0, places()])
    masked = data["response_mask"].values().bool()
    share = answer["gate"][0, places()][masked].mean()
    assert metrics["distillation/gate"] == pytest.approx(share.item())
    assert metrics["distillation/token_known"] == 1


def test_verl_itself_takes_the_mean_over_the_responses(losses: Any) -> None:
    if not hasattr(losses, "agg_loss"):
        pytest.skip("verl is not installed")
    register(PAPER)
    student, data, _ = batch(sampled_column=True)
    answer = ask(losses, student, data)
    settings = SimpleNamespace(
        loss_mode="entropy_aware_kl", use_task_rewards=False, use_policy_gradient=False, loss_max_clamp=None
    )
    config = SimpleNamespace(loss_agg_mode="token-mean", global_batch_info={}, loss_scale_factor=None)
    loss, metrics = losses.distillation_ppo_loss(
        config,
        SimpleNamespace(distillation_loss=settings),
        model_output={name: values[0] for name, values in answer.items()},
        data={**data, "dp_size": 1, "batch_num_tokens": 5, "global_batch_size": 3},
    )
    torch.testing.assert_close(loss, answer["distillation_losses"].sum() / 5)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.isfinite().all() and "distillation/token_known" in metrics


@pytest.mark.parametrize(
    ("objective", "settings", "message"),
    [
        (OBJECTIVE, {"use_policy_gradient": True}, "needs distillation_loss.use_policy_gradient=false"),
        (PAPER, {"loss_max_clamp": 10.0}, "needs distillation_loss.loss_max_clamp=null with a sampled reverse half"),
    ],
)
def test_settings_under_which_the_loss_is_another_are_refused(
    losses: Any, objective: Objective, settings: dict[str, Any], message: str
) -> None:
    register(objective)
    student, data, _ = batch()
    with pytest.raises(ValueError, match=message):
        ask(losses, student, data, **settings)


def test_the_server_hands_out_the_sampled_token_too() -> None:
    """vLLM gives a prompt's token its entry wherever it ranks; verl drops it beyond the top k."""

    def extract(output: Any, num_prompt_logprobs: int | None, result_dict: dict[str, Any]) -> None:
        if num_prompt_logprobs is None:
            return
        ranked = [sorted(row.items(), key=lambda item: item[1].rank)[:2] for row in output.prompt_logprobs[1:]]
        result_dict["prompt_ids"] = [[token for token, _ in row] for row in ranked] + [[0, 0]]
        result_dict["prompt_logprobs"] = [[entry.logprob for _, entry in row] for row in ranked] + [[0.0, 0.0]]

    def entry(rank: int, logprob: float) -> SimpleNamespace:
        return SimpleNamespace(rank=rank, logprob=logprob)

    rows = [{7: entry(1, -0.1), 8: entry(2, -3.0)}, {5: entry(1, -0.5), 6: entry(2, -1.0), 9: entry(31, -8.0)}]
    output = SimpleNamespace(prompt_token_ids=[3, 8, 9], prompt_logprobs=[None, *rows])
    result: dict[str, Any] = {}
    with_sampled_token(extract)(output, 2, result)
    assert result["prompt_ids"] == [[7, 8, 8], [5, 6, 9], [0, 0, 0]]
    assert result["prompt_logprobs"] == [[-0.1, -3.0, -3.0], [-0.5, -1.0, -8.0], [0.0, 0.0, 0.0]]
    nothing: dict[str, Any] = {}
    with_sampled_token(extract)(output, None, nothing)
    assert nothing == {}


def test_it_is_registered_as_a_loss_of_the_top_k(losses: Any) -> None:
    register(name="mine")
    assert losses.DISTILLATION_SETTINGS_REGISTRY["mine"].use_topk
    with pytest.raises(ValueError, match="'mine' is already registered"):
        register(name="mine")


def test_other_modes_stay_verls(losses: Any) -> None:
    student, data, _ = batch()
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
        ask(losses, *batch()[:2], strategy="megatron")


@pytest.mark.parametrize(
    "objective", [Objective(), Objective.forward_kl(), Objective(forward=TopK(4)), Objective(reverse=Sampled())]
)
def test_what_the_top_k_do_not_tell_is_refused(losses: Any, objective: Objective) -> None:
    with pytest.raises(ValueError, match="the sampled token and the teacher's top k alone"):
        register(objective)


def test_a_hook_that_has_moved_is_named(losses: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "compute_topk_loss", lambda logits: logits)
    with pytest.raises(hooks.HookMoved, match=r"verl.*0\.9\.1.*compute_topk_loss takes \(logits\), expected \(config"):
        register()
    monkeypatch.delattr(losses, "register_distillation_loss")
    with pytest.raises(hooks.HookMoved, match="has no register_distillation_loss"):
        register()
