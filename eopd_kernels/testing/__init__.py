"""Emulated devices and meters, for the tests and the benchmarks. The wheel does not contain this package.

emulation.py          the CUDA kernels, compiled for a CPU, and the bytes that they move
interpreter.py        Triton's interpreter, made faster and exact in bfloat16
pretend.py            CPU tensors that take the branches of a GPU, what would wait for it, and the memory it needs
absent_gpu.py         Triton's kernels, compiled for GPUs that are not there
kernel_resources.py   which of these kernels to look at, and what each takes of its GPU
machine_code.py       registers, spills and load widths, read from compiled kernels
control_flow.py       what comes after which instruction
column_loops.py       what a column costs a CUDA kernel, counted in its machine code
data_sheets.py        the GPUs and vocabularies that plans are checked for
messages.py           the bytes that each collective of the loss carries
processes.py          a function in a new process, and the peak of this one's memory
"""
