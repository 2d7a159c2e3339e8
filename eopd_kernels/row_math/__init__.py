"""The numbers of a row and the formulas of its columns: the Python twin of csrc/row_math.h
and backends/triton/row_math.py."""
