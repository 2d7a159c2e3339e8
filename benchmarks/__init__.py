"""Time and memory of eopd_kernels beside its peers, as ratios taken in one run; results in docs/benchmarks.md."""
