"""``python -m tests.backends.triton_resources PART FILE``: writes what Triton kernels take of GPUs, as JSON.

``choice`` is a covering choice of dtypes and options on every GPU; the other parts are every option on one. Not under
``TRITON_INTERPRET``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from eopd_kernels.testing import machine_code
from eopd_kernels.testing.absent_gpu import DEVICES, WHOLE_ROWS, call, compiling_for
from eopd_kernels.testing.kernel_resources import CHOICE, READ, Call, Resources, every_call, resources
from tests.backends import disassembly


def part_of(one: Call) -> str:
    """The part of a call; those that launch the same kernels are together."""
    function, _, rows = one
    if function.startswith("row_mixture"):
        return "mixtures"
    return "fused" if function == "row_loss_and_gradient" and rows == WHOLE_ROWS else "apart"


def read_together(calls: Sequence[Call], devices: Sequence[str]) -> dict[Resources, None]:
    """As ``every_kernel`` does in two processes: in this process, because the suite keeps the other cores busy, and
    with one start of the disassembler for all kernels of an NVIDIA GPU."""
    found: dict[Resources, None] = {}
    for device in devices:
        if DEVICES[device].target.backend == "hip":  # whose code is text
            for one in calls:
                found |= dict.fromkeys(resources(*one, device))
            continue
        cubins: dict[str, bytes] = {}
        texts: dict[str, str] = {}
        for function, variant, rows in calls:
            with compiling_for(DEVICES[device]) as compiled:
                call(function, variant, rows)
            cubins |= {kernel.hash: kernel.asm["cubin"] for kernel in compiled}
            texts |= {kernel.hash: kernel.asm["ptx"] for kernel in compiled}
        codes = disassembly.codes(list(cubins.values()), DEVICES[device].target.arch)
        READ.update(zip(cubins, codes, strict=True))
        smallest = min(cubins, key=lambda name: len(cubins[name]))
        assert READ[smallest] == machine_code.of_cubin(cubins[smallest]), "read with others a kernel is another"
        if device == devices[0]:
            largest = max(cubins, key=lambda name: len(cubins[name]))
            spills = disassembly.assembled(texts[largest], DEVICES[device].target.arch, registers=24)
            (code,) = disassembly.codes([spills], DEVICES[device].target.arch)
            assert code == machine_code.of_cubin(spills) and code.stack > 0, "spills are not seen"
        for function, variant, rows in calls:
            found |= dict.fromkeys(resources(function, variant, rows, device))
    return found


def main() -> None:
    part, file = sys.argv[1:]
    if part == "choice":
        found = read_together(CHOICE, list(DEVICES))
    else:
        found = read_together([one for one in every_call() if part_of(one) == part], ["sm_90"])
    Path(file).write_text(json.dumps([asdict(kernel) for kernel in found]))


if __name__ == "__main__":
    main()
