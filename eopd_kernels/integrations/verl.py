"""verl: the paper's loss, or an entropy-gated top-k forward KL, among its distillation losses.

A module of your own, named in VERL_USE_EXTERNAL_MODULES, registers it in every process of verl:

    from eopd_kernels import Objective
    from eopd_kernels.integrations.verl import register
    register(Objective.eopd_paper())

and ``distillation.distillation_loss.loss_mode=entropy_aware_kl`` selects it, with ``use_policy_gradient=false``,
``use_task_rewards=false`` and ``loss_max_clamp=null`` beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import Objective, Sampled, TopK, TopKTeacher, entropy_aware_kl
from .hooks import check_caller, check_parameters, find

TESTED = "0.9.1"
LOSSES, FSDP = "verl.trainer.distillation.losses", "verl.trainer.distillation.fsdp.losses"
PADDING = "verl.workers.utils.padding"
TOP_K_PARAMETERS = ("config", "distillation_config", "data", "student_logits", "data_format")
STRATEGIES = ("fsdp", "fsdp2", "veomni")
SHOWN = ("gate", "teacher_entropy", "student_entropy", "token_known")  # per token, beside the loss


def register(objective: Objective | None = None, name: str = "entropy_aware_kl") -> None:
    """Registers a distillation loss with verl, for this process.

    verl's teacher is an inference server that hands out the top k log-probabilities, and its registered top-k losses
    are all computed by one function of the student's logits. That function is replaced by one that computes ours where
    ``loss_mode`` is ``name``, and calls verl's own otherwise.

    Args:
        objective: what each token's loss is: a top-k forward half under any gate, and a reverse half that is sampled
            (``Objective.eopd_paper()``), over the same top k, or none. Default: the served top k, renormalised, where
            its entropy is above 0.8 nats, and no reverse half. The server gives no entropy, so that the gate uses the
            lower bound that the top k allow. Nor does it give log q of a sampled token outside of its top k: such a
            token has no sampled half, and ``distillation/token_known`` logs the share that has one;
            :func:`with_sampled_token` mends it.
        name: the ``loss_mode``. Default ``"entropy_aware_kl"``.

    Raises:
        HookMoved: verl is not as this was written for (0.9.1); the message says what has moved.
        ValueError: the objective needs more than a sampled token and the top k; or verl has a loss of this name
            already. When verl trains: a setting under which the loss would not be what it says.
    """
    objective = Objective(reverse="none", forward=TopK(16)) if objective is None else objective
    served = (
        isinstance(objective, Objective) and isinstance(objective.forward, TopK) and "student" not in objective.top_k
    )
    if not served or not (objective.reverse == "none" or isinstance(objective.reverse, Sampled | TopK)):
        raise ValueError(
            "verl's distillation loss has the sampled token and the teacher's top k alone: objective must be "
            f"Objective(reverse=Sampled(), TopK(...) or 'none', forward=TopK(...)), got {objective!r}"
        )
    settings = find("verl", TESTED, LOSSES, "DistillationLossSettings")
    decorator = find("verl", TESTED, LOSSES, "register_distillation_loss")
    check_parameters("verl", TESTED, f"{LOSSES}.register_distillation_loss", decorator, ["loss_settings"])
    original = find("verl", TESTED, LOSSES, "compute_topk_loss")
    check_parameters("verl", TESTED, f"{LOSSES}.compute_topk_loss", original, TOP_K_PARAMETERS)
    caller = find("verl", TESTED, LOSSES, "distillation_ppo_loss")
    check_caller("verl", TESTED, f"{LOSSES}.distillation_ppo_loss", caller, "compute_topk_loss")
    unpack = find("verl", TESTED, PADDING, "no_padding_2_padding")
    check_parameters("verl", TESTED, f"{PADDING}.no_padding_2_padding", unpack, ["tensor", "data"])
    for helper in ("get_ulysses_sequence_parallel_world_size", "slice_input_tensor"):
        find("verl", TESTED, FSDP, helper)

    def compute_topk_loss(
        config: Any, distillation_config: Any, data: Any, student_logits: Tensor, data_format: str
    ) -> Any:
        if distillation_config.distillation_loss.loss_mode != name:
            return original(config, distillation_config, data, student_logits, data_format)
        check_settings(config, distillation_config.distillation_loss, name, objective)
        return token_losses(student_logits, data, objective, distillation_config.distillation_loss.topk)

    decorator(settings(names=[name], use_topk=True))(collected)
    sys.modules[LOSSES].compute_topk_loss = compute_topk_loss  # type: ignore[attr-defined]


def check_settings(config: Any, loss: Any, name: str, objective: Objective) -> None:
    """Refuses the settings of verl under which the loss would not be what it says."""
    if config.strategy not in STRATEGIES:
        raise NotImplementedError(f"loss_mode {name!r} supports the strategies {STRATEGIES}, got {config.strategy!r}")
    if loss.use_policy_gradient:
        raise ValueError(
            f"loss_mode {name!r} needs distillation_loss.use_policy_gradient=false, got true: verl would take the loss "
            "as a constant advantage, so that the forward KL had no gradient and no reverse half appeared"
        )
    if loss.loss_max_clamp is not None and isinstance(objective.reverse, Sampled):
        raise ValueError(
            f"loss_mode {name!r} needs distillation_loss.loss_max_clamp=null with a sampled reverse half, got "
            f"{loss.loss_max_clamp}: a token beyond it would have no gradient, and those disagree most"
        )


def token_losses(student_logits: Tensor, data: Any, objective: Objective, k: int) -> dict[str, Tensor]:
    """What verl's logits processor expects of each token, ``[1, n]``: its loss, and what is to be logged.

    Args:
        student_logits: ``[1, n, V]``: all sequences of the micro-batch, packed; with sequence parallelism a slice.
        data: the micro-batch. Of verl's: ``teacher_logprobs`` and ``teacher_ids`` ``[B, (T), k]``, nested, row t about
            token t + 1; ``input_ids`` ``[B, (T)]``, nested; ``response_mask`` and ``old_log_probs`` of the responses.
            With a column more than k, the last is that of the sampled token.
        objective: see :func:`register`.
        k: verl's ``topk``.
    """
    verl: Any = sys.modules[FSDP]
    log_probs, ids = data["teacher_logprobs"].values().float(), data["teacher_ids"].values()
    tokens = data["input_ids"].values().roll(-1)  # of row t the token t + 1; a sequence's last row predicts nothing
    inputs = {"log_probs": log_probs, "ids": ids, "tokens": tokens, "mask": packed(data["response_mask"], data)}
    if isinstance(objective.reverse, Sampled):
        inputs["old_log_probs"] = packed(data["old_log_probs"], data)
    rows = {field: tensor.unsqueeze(0) for field, tensor in inputs.items()}
    if verl.get_ulysses_sequence_parallel_world_size() > 1:
        rows = {field: verl.slice_input_tensor(tensor, dim=1) for field, tensor in rows.items()}
    known, of_token = of_sampled_token(rows["log_probs"], rows["ids"], rows["tokens"], k)
    top_log_probs, top_ids = rows["log_probs"][..., :k], rows["ids"][..., :k].long()
    out = entropy_aware_kl(
        student_logits,
        TopKTeacher(top_ids, top_log_probs, token_log_probs=of_token),
        objective=objective,
        reduction="none",
        mask=rows["mask"],
        token_ids=rows["tokens"],
        old_log_probs=rows.get("old_log_probs"),
        reverse_weights=known.to(of_token.dtype) if "old_log_probs" in rows else None,
    )
    return {
        "distillation_losses": out.loss,
        "token_known": known.float(),
        **{name: getattr(out, name) for name in SHOWN if name != "token_known"},
    }


def of_sampled_token(log_probs: Tensor, ids: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns whether log q of the sampled token is known, and log q itself, 0 where it is not: ``[1, n]`` each."""
    if ids.shape[-1] > k:
        return torch.ones_like(tokens, dtype=torch.bool), log_probs[..., -1]
    hit = ids == tokens.unsqueeze(-1)
    return hit.any(-1), torch.where(hit, log_probs, 0.0).sum(-1)


def packed(of_responses: Tensor, data: Any) -> Tensor:
    """Returns numbers of the responses' tokens ``[B, R]`` where their logits are in the packed batch: ``[n]``, else 0.

    verl's own ``no_padding_2_padding`` says where that is.
    """
    verl: Any = sys.modules[PADDING]
    if of_responses.is_nested:
        of_responses = of_responses.to_padded_tensor(0)
    n = len(data["input_ids"].values())
    places = verl.no_padding_2_padding(torch.arange(1, n + 1, device=of_responses.device), data)  # 0: padding
    width = min(places.shape[1], of_responses.shape[1])
    out = of_responses.new_zeros(n + 1)
    out[places[:, :width]] = of_responses[:, :width]
    return out[1:]


def collected(config: Any, distillation_config: Any, model_output: Any, data: Any) -> tuple[Tensor, dict[str, Any]]:
    """Returns the responses' losses ``[B, R]`` and what verl logs: means over the responses' tokens.

    Not verl's own collector, which sets losses below 0 to 0: those of a policy gradient are, and would lose theirs.
    """
    verl: Any = sys.modules[PADDING]
    losses = verl.no_padding_2_padding(model_output["distillation_losses"], data)
    mask = data["response_mask"]
    mask = (mask.to_padded_tensor(0) if mask.is_nested else mask).bool()
    figures = {name: verl.no_padding_2_padding(model_output[name], data)[mask] for name in SHOWN}
    return losses, {f"distillation/{name}": figure.mean().item() for name, figure in figures.items()}


def with_sampled_token(extract: Callable[..., None]) -> Callable[..., None]:
    """Makes verl's ``extract_prompt_logprobs`` hand out the sampled token's log-probability too, as column k + 1.

    vLLM gives it, and verl drops it where the token is not among the top k. For the teacher's server, in its process,
    before it starts; every ``loss_mode`` then gets k + 1 columns, which only this module's knows how to read:

        from verl.workers.rollout.vllm_rollout import vllm_async_server as server
        server.extract_prompt_logprobs = with_sampled_token(server.extract_prompt_logprobs)

    Args:
        extract: verl's function of ``(output, num_prompt_logprobs, result_dict)``.
    """

    def extract_prompt_logprobs(output: Any, num_prompt_logprobs: int | None, result_dict: dict[str, Any]) -> None:
        extract(output, num_prompt_logprobs, result_dict)
        if not num_prompt_logprobs:
            return
        tokens = output.prompt_token_ids[1:]
        sampled = [row[token].logprob for row, token in zip(output.prompt_logprobs[1:], tokens, strict=True)]
        # verl ends with a row that stands for the token after the last.
        for row, token in zip(result_dict["prompt_ids"], [*tokens, 0], strict=True):
            row.append(token)
        for row, log_prob in zip(result_dict["prompt_logprobs"], [*sampled, 0.0], strict=True):
            row.append(log_prob)

    return extract_prompt_logprobs
