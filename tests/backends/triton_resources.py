"""``python -m tests.backends.triton_resources FILE``: writes what the Triton kernels take of each GPU, as JSON.

A covering choice of dtypes and options on every GPU, and every option on one. Not under ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from eopd_kernels.testing.absent_gpu import DEVICES
from eopd_kernels.testing.kernel_resources import CHOICE, every_call, every_kernel


def main() -> None:
    found = every_kernel(CHOICE, list(DEVICES), print) | every_kernel(list(every_call()), ["sm_90"], print)
    Path(sys.argv[1]).write_text(json.dumps([asdict(kernel) for kernel in found]))


if __name__ == "__main__":
    main()
