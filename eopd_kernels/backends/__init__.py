"""One module per backend: the row functions of eopd_kernels.rows, and why it is unavailable if it is."""
