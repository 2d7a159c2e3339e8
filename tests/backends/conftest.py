"""The instruction sets of the native kernels, for the tests that go through all of them."""

from __future__ import annotations

import pytest

from eopd_kernels.backends import cpu

CAPABILITIES = cpu.kernels().capabilities() if cpu.unavailable() is None else ()


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each in turn, switched on."""
    monkeypatch.setenv("EOPD_CPU_CAPABILITY", request.param)
    return request.param
