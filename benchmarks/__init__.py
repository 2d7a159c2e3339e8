"""Time and memory of eopd_kernels beside its peers, as ratios taken in one run; results in docs/benchmarks.md."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for everyone: spinning threads measure what else the machine does
