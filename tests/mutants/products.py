# ruff: noqa: E501 (a mutant is a line)
"""What is broken of the products of bf16 matrices on a CPU."""

from __future__ import annotations

from .mutant import Mutant

SOURCE, TESTS = "csrc/cpu/products.cpp", ("tests/heads/test_native_products.py",)

MUTANTS = [
    Mutant("products: the last of an odd depth is left out", SOURCE, "p < pairs + odd", "p < pairs", TESTS),
    Mutant("products: an odd depth reads beyond the row", SOURCE, "read<uint16_t>(from[i] + at)", "read<int32_t>(from[i] + at)", TESTS),
    Mutant("products: a second panel overwrites the first", SOURCE, "product.add || start > 0", "product.add", TESTS),
    Mutant("products: a second slice overwrites the first", SOURCE, "product.add || start > 0", "product.add || start > first", TESTS),
    Mutant("products: what was there counts", SOURCE, "product.add || start > 0", "true", TESTS),
    Mutant("products: the last register is stored whole", SOURCE, "first_lanes((width - 1) % WIDTH + 1)", "first_lanes(WIDTH)", TESTS),
    Mutant("products: rows beyond the last are loaded", SOURCE, "p + 1 < depth ? mask : 0", "mask", TESTS),
    Mutant("products: columns beyond the last are loaded", SOURCE, "_mm512_maskz_loadu_epi16(mask, from", "_mm512_maskz_loadu_epi16(~__mmask32(0), from", TESTS),
    Mutant("products: rows left over by eights are left out", SOURCE, "        tiles(Constant<1>(), vectors);\n", "", TESTS),
    Mutant("products: nothing is not zero", SOURCE, "if (depth == 0 && !product.add)", "if (false)", TESTS),
    Mutant("products: a thread copies into another's memory", SOURCE, "lines * omp_get_thread_num()", "0", TESTS),
    Mutant("products: strides of neither matrix are looked at", "native_mm", "matrix if 1 in matrix.stride() else matrix.contiguous()", "matrix", TESTS),
    Mutant("products: fake tensors are multiplied", "native_mm", "if not tensors.has_numbers(out):", "if False:", TESTS),
    Mutant("products: fp16 is taken for bf16", "widening", "dtype == torch.bfloat16 and extension", "extension", TESTS),
    Mutant("products: narrower kernels have them", "csrc/cpu/dispatch.cpp", "&chosen_kernels() == &kernels_avx512 && ", "", TESTS),
    Mutant("products: autocast rounds what it has not", "operand_dtype", "autocast is None or tensors.on_host(hidden.device)", "autocast is None", ("tests/test_function.py",)),
]  # fmt: skip
