"""The whole loss as a custom op, under torch's own checks: schema, fake, autograd, aliasing, dynamic shapes.

The row functions of every backend are checked in test_rows.py and test_rows_mixture.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eopd_kernels import EntropyGate, Objective, TopKTeacher
from eopd_kernels.compiled import Arguments, seen_tensors
from eopd_kernels.inputs.check import checked
from eopd_kernels.inputs.keywords import with_defaults
from tests.conftest import interpreted, make_case

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
CASES: dict[str, dict[str, Any]] = {
    "logits": {"student": "logits", "teacher": "logits"},
    "fp16 logits": {"student": "logits", "teacher": "logits", "dtype": torch.float16},
    "every token": {"student": "logits", "reduction": "none"},
    "masked": {"masked": True, "bias": True},
    "recompute": {"masked": True, "bias": True, "schedule": "recompute"},
    "bf16": {"dtype": torch.bfloat16, "reduction": "sum"},
    "shut rows": {"objective": Objective(gate=EntropyGate(2.0), reverse="none"), "schedule": "recompute"},
    "mixture": {"objective": Objective.jsd(0.3)},
    "sparse": {"objective": Objective.eopd_paper(), "schedule": "recompute"},
    "served": {"objective": Objective.eopd_paper(), "served": True},
    "sampled tokens": {"token_ids": True, "masked": True},
    "frozen": {"frozen": True},
}


def arguments(options: dict[str, Any], backend: str) -> Arguments:
    options = dict(options)
    call = {name: options.pop(name) for name in ("reduction", "schedule", "objective") if name in options}
    served, frozen = options.pop("served", False), options.pop("frozen", False)
    sampled = {"token_ids": torch.arange(6).view(2, 3)} if options.pop("token_ids", False) else {}
    case = make_case(leading=(2, 3), vocab_size=1300 if interpreted(backend) else 67, **options)
    if frozen:
        for leaf in case.leaves:
            leaf.requires_grad_(False)
    if call.get("objective") == Objective.eopd_paper():
        sampled = {"token_ids": torch.arange(6).view(2, 3), "old_log_probs": torch.full((2, 3), -2.0)}
    given = case.arguments | call | sampled | {"backend": backend}
    teacher = case.teacher
    if served:
        ids = torch.arange(24).view(2, 3, 4)
        teacher = TopKTeacher(ids, torch.full((2, 3, 4), -1.5), token_log_probs=torch.full((2, 3), -2.5))
        given["teacher_head"] = None
    return Arguments.of(checked(case.student, teacher, with_defaults("entropy_aware_kl", given)))


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_the_loss_is_a_sound_custom_op(options: dict[str, Any], backend: str) -> None:
    given = arguments(options, backend)
    loss: Any = torch.ops.eopd_kernels.loss.default
    # To opcheck a NaN is not itself, and figures of tokens that were not visited are NaN: there test_compile.py, which
    # compares compiled with eager, stands for its last check.
    with torch.no_grad():
        unknown = any(t.isnan().any() for t in loss(*given))
    torch.library.opcheck(loss, tuple(given), test_utils=CHECKS[:3] if unknown else CHECKS)
    if given.options.schedule != "recompute":
        return
    with torch.no_grad():
        value, packed, *rest, _anchor = loss(*given)
        kept = rest[seen_tensors(given.token_ids) - 1 :]
    detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in given]
    backward: Any = torch.ops.eopd_kernels.loss_backward.default
    torch.library.opcheck(backward, (torch.full_like(value, 1.3), packed, kept, *detached))
