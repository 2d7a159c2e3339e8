"""The GPUs and vocabularies that the CUDA backend's plans are checked and tabulated for."""

from __future__ import annotations

from ..backends.cuda.plan import Device

KIB = 1024
# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; multiprocessors from the data sheets.
DEVICES = {
    "A100": Device("A100", (8, 0), 108, 1024, 1, 163 * KIB, 164 * KIB),
    "H100": Device("H100", (9, 0), 132, 1024, 16, 227 * KIB, 228 * KIB),
    "B200": Device("B200", (10, 0), 148, 1024, 16, 227 * KIB, 228 * KIB),
    "RTX 5090": Device("RTX 5090", (12, 0), 170, 1024, 8, 99 * KIB, 100 * KIB),
}
VOCABULARIES = (32_000, 128_256, 151_936, 262_144)
