"""``python -m benchmarks.traffic``: the bytes and flops of the loss and of the installed peers, counted on a CPU."""

from __future__ import annotations

import argparse
import importlib.util
import os
import warnings
from pathlib import Path

SUMMARY = "Bytes per logit and flops per token of the loss and of its installed peers, counted in Triton's interpreter."
# Long enough that the figures of a row do not show, short enough for the interpreter; a multiple of no peer's tile.
TOKENS, VOCAB, STUDENT_DIM, TEACHER_DIM = 16, 8_200, 24, 40


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic", description=SUMMARY)
    parser.add_argument("--only", default="", metavar="TEXT", help="contenders whose name contains TEXT")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the generated block of this page")
    arguments = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        parser.exit(2, "Triton is not installed: there is nothing that its interpreter could count.\n")
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

    from ..machine import command
    from ..page import block, replace_block
    from .contenders import CONTENDERS, count
    from .counter import Shape
    from .tables import bytes_table, kernels_table, l2_table, model_table

    warnings.simplefilter("ignore")  # peers warn of the missing GPU
    shape = Shape(arguments.tokens, arguments.vocab, STUDENT_DIM, TEACHER_DIM)
    counts = {c: count(c, shape) for c in CONTENDERS if arguments.only in c.name}
    facts = {
        "command": f"`{command('benchmarks.traffic')}`",
        "counted on": f"{shape.tokens} tokens, V = {shape.vocab:,}, D_s = {STUDENT_DIM}, D_t = {TEACHER_DIM}",
    }
    parts = [
        "Bytes per logit (a token and an entry of the vocabulary), F = 2·N·V:",
        bytes_table(counts),
        "By kernel:",
        kernels_table(counts),
        "Roofline, a model and no measurement: N = 8,192, V = 151,936, D_s = 1,024, D_t = 4,096, data-sheet rates, "
        "every byte from memory, no launches, no overlap:",
        model_table(counts),
        "What of the second visit's loads L2 can hold, a model as well (fp32 logits; the visit walks back):",
        l2_table(),
    ]
    text = block(facts, parts)
    print(text)
    if arguments.write:
        replace_block(arguments.write, "traffic", text)


if __name__ == "__main__":
    main()
