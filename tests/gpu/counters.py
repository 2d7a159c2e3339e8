"""``python -m tests.gpu.counters``: the bytes that each logit costs in device memory, counted by Nsight Compute."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable

import torch

from eopd_kernels.rows import FUNCTIONS
from eopd_kernels.testing.steps import MISSING

BACKENDS, DEVICE, ROWS, COLUMNS = ("cuda", "triton"), "cuda", 1024, 151_936
READ, WRITTEN, TIME = "dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum"
SHARE = "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed"
NCU = "ncu --clock-control none --csv --page raw --print-units base -k regex:row_loss_and_gradient --metrics".split()
# The CUDA kernel reads the four bytes of either side once. What else it reads is small.
MOST_READ = 1.15 * (4 + 4)


def main() -> int:
    if shutil.which(NCU[0]) is None or not torch.cuda.is_available():
        print("needs a GPU, and ncu")
        return MISSING
    command = [*NCU, ",".join((READ, WRITTEN, TIME, SHARE)), sys.executable, "-m", "tests.gpu.counters", "launch"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, flush=True)
    if "ERR_NVGPUCTRPERM" in done.stdout + done.stderr:
        print("ncu is not permitted to read the counters here")
        return MISSING
    return judge(done.stdout.splitlines())


def launch() -> int:
    """Launches both kernels once, with fp32 logits and a gradient in bf16, as the loss has them."""
    student, teacher = torch.randn(2, ROWS, COLUMNS, device=DEVICE)
    weights, out = student.new_ones(ROWS), torch.empty_like(student, dtype=torch.bfloat16)
    for backend in BACKENDS:
        arguments = (weights, 0.8, [1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 1.0] * 2, out)
        FUNCTIONS[backend].row_loss_and_gradient(student, teacher, *arguments)
    torch.cuda.synchronize()
    return 0


def judge(output: Iterable[str]) -> int:
    """Reads ncu's CSV, whose second line has the units."""
    lines = [line for line in csv.DictReader(line for line in output if line.startswith('"')) if line["ID"]]
    # Triton's name is the function's alone, a C++ template's has its parameters.
    found = {"triton" if re.fullmatch(r"\w+", line["Kernel Name"]) else "cuda": line for line in lines}
    failed, words = [f"{name} was not seen" for name in BACKENDS if name not in found], []
    for name, line in found.items():
        read, written, time, share = (float(line[key].replace(",", "")) for key in (READ, WRITTEN, TIME, SHARE))
        read, written = read / ROWS / COLUMNS, written / ROWS / COLUMNS
        moved = f"{name} reads {read:.2f} and writes {written:.2f} bytes a column"
        words.append(f"{moved}, {time / 1e6:.3f} ms, {share:.0f} % of peak bandwidth")
        if name == "cuda" and read > MOST_READ:
            failed.append(f"cuda reads {read:.2f} bytes a column, at most {MOST_READ:.2f}")
    print("; ".join([*failed, *words]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(launch() if sys.argv[1:] == ["launch"] else main())
