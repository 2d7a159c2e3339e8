"""LMHead: the three products, its panels, and its checks."""

from typing import Any

import pytest
import torch

from eopd_kernels import LMHead
from eopd_kernels.heads import lm_head, products
from eopd_kernels.heads.lm_head import grad_weight
from tests.conftest import relative_error


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def weight(request: pytest.FixtureRequest) -> torch.Tensor:
    return torch.randn(50, 12, generator=torch.Generator().manual_seed(0)).to(request.param)


@pytest.mark.parametrize("panel_rows", [1, 7, 50, 1000])
@pytest.mark.parametrize("columns", [slice(0, 50), slice(11, 38)])
def test_products_do_not_depend_on_the_panels(
    weight: torch.Tensor, columns: slice, panel_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eopd_kernels.heads.lm_head.PANEL_BYTES", panel_rows * 12 * 4)
    generator = torch.Generator().manual_seed(1)
    hidden, k = torch.randn(9, 12, generator=generator), columns.stop - columns.start
    bias = torch.randn(50, generator=generator)
    lm_head = LMHead(weight, bias)

    logits = lm_head.logits(hidden, columns, out=torch.empty(9, k))
    exact = hidden.double() @ weight[columns].double().t() + bias[columns]
    assert relative_error(logits, exact) < 1e-6

    gradient = torch.randn(9, k, generator=generator)
    grad_hidden = torch.ones(9, 12)
    lm_head.grad_hidden(gradient, columns, out=grad_hidden)
    assert relative_error(grad_hidden, 1 + gradient.double() @ weight[columns].double()) < 1e-6

    accumulated = torch.ones(k, 12)
    grad_weight(gradient, hidden, out=accumulated)
    assert relative_error(accumulated, 1 + gradient.double().t() @ hidden.double()) < 1e-6


def test_a_low_precision_head_is_never_upcast_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eopd_kernels.heads.lm_head.PANEL_BYTES", 31 * 12 * 4)
    panels = [w.clone() for _, w in LMHead(torch.ones(50, 12).bfloat16())._panels(slice(0, 50), torch.float32)]
    assert [len(p) for p in panels] == [16, 16, 16, 2]
    (whole,) = LMHead(full := torch.ones(50, 12))._panels(slice(0, 50), torch.float32)
    assert whole[1].data_ptr() == full.data_ptr()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "says"),
    [
        ((torch.ones(3),), {}, ValueError, r"LMHead.weight must have the shape \[V, D\] with V >= 1, got \(3,\)"),
        ((torch.ones(4, 3).int(),), {}, TypeError, "LMHead.weight must be a floating-point tensor, got a int32 tensor"),
        (("weight",), {}, TypeError, "LMHead.weight must be a floating-point tensor, got 'weight'"),
        (
            (torch.ones(4, 3), torch.ones(3)),
            {},
            ValueError,
            r"LMHead.bias must have the shape \[V\] = \[4\], got \(3,\)",
        ),
        ((torch.ones(4, 3), torch.ones(4).long()), {}, TypeError, "LMHead.bias"),
        ((torch.ones(4, 3),), {"scale": float("nan")}, ValueError, "LMHead.scale must be a finite number, got nan"),
        ((torch.ones(4, 3),), {"scale": 0}, ValueError, "LMHead.scale must not be 0"),
        ((torch.ones(4, 3),), {"softcap": 0.0}, ValueError, "LMHead.softcap must be a finite number above 0, got 0.0"),
    ],
)
def test_bad_heads_are_refused_by_name(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        LMHead(*arguments, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_weights_gradient_is_rounded_once_a_panel_at_a_time(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_head, "PANEL_BYTES", 16 * 8 * 16)
    gradient, hidden = torch.randn(5, 50, dtype=dtype), torch.randn(5, 8, dtype=dtype)
    exact = gradient.double().t() @ hidden.double()
    out = torch.full((50, 8), torch.nan, dtype=torch.bfloat16)
    if dtype == torch.bfloat16 and not products.widening(gradient.device, dtype):
        gradient, hidden = gradient.float(), hidden.float()
    grad_weight(gradient, hidden, out, add=False)
    torch.testing.assert_close(out.double(), exact, atol=1e-6, rtol=2**-8)
    assert (out == exact.to(torch.bfloat16)).float().mean() > 0.98  # but for sums that lie between two of them
