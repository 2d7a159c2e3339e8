"""The numbers of a row and the formulas of its columns in PyTorch, under the names of their twins: csrc/row_math.h and
backends/triton/row_math.py."""
