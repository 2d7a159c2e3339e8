"""A formula has one name in Python, Triton and C++: what only one of them has is listed here, with its reason."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = [ROOT / f"eopd_kernels/row_math/{name}.py" for name in ("statistics", "mixture", "formulas")]
TRITON = [ROOT / "eopd_kernels/backends/triton/row_math.py"]
CPP = ROOT / "csrc/row_math.h"

ONLY = {
    "Python": {
        # RowStatistics and MixtureStatistics are classes of the public API, with their fields as properties.
        "empty": "the kernels' records begin empty",
        "of": "adds all columns at once: add_columns, add_mixture_columns",
        "probabilities": "p and q themselves, which no kernel needs: column_coefficients has the sums folded in",
        "student_log_probs": "single columns of a row, for the halves of a few columns",
        "teacher_log_probs": "single columns of a row, for the halves of a few columns",
        "with_token": "single columns of a row, for the figures of the sampled token",
        "student_token_log_prob": "a figure of those rows",
        "teacher_token_log_prob": "a figure of those rows",
        "_token_log_prob": "a figure of those rows",
        "unknown_where": "the gates of Objective, which masked tokens must not reach",
        "centred_on": "sums that have travelled between ranks",
        "student_entropy": "no kernel reports it",
        "gated_halves": "figures, which are computed when they are read; a kernel adds them up",
        "__call__": "Combine of a tensor of gates",
        "take": "some rows of a tensor",
        "exceeds": "the gates of Objective, which look at other entropies too",
    },
    "Triton": {
        "forward_terms": "C++ and Python call mixture_terms with the sides in order",
        "reverse_terms": "C++ and Python call mixture_terms with the sides in order",
        "half_weights": "methods of Combine: __call__ in Python, of_reverse and of_forward in C++",
        "tanh": "Triton's own does not run in its interpreter; C++ has csrc/cpu/vector.h and hardware.cuh",
    },
    "C++": {
        "larger_or_nan": "torch.maximum; in Triton a NaN stays in the sum",
        "add_sums": "the others add the six sums one by one",
        "over_sums": "what column_coefficients and mixture_coefficients share",
        "combine_of": "from an array of Python's",
        "skew_of": "a skew with its complement",
        "skews_of": "from an array of Python's",
        "normalised": "the others divide in place",
    },
}


def python_names(files: list[Path]) -> set[str]:
    """Classes, functions and the methods that are no plain field of a record."""
    names = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                names.add(node.name)
            if isinstance(node, ast.FunctionDef) and not re.fullmatch(r"self\.packed\[:, \d\]", body_of(node)):
                names.add(node.name)
    return names


def body_of(function: ast.FunctionDef) -> str:
    """What a function of one line returns, else nothing."""
    statement = function.body[-1]
    return ast.unparse(statement.value) if isinstance(statement, ast.Return) and statement.value else ""


def cpp_names(text: str) -> set[str]:
    """Structs, and functions at the beginning of a line."""
    functions = re.findall(r"^(?:EOPD_HD )?[A-Z]?\w+(?:<\w+>)? (\w+)\(", text, re.MULTILINE)
    return {*functions, *re.findall(r"^struct (\w+)", text, re.MULTILINE)}


NAMES = {"Python": python_names(PYTHON), "Triton": python_names(TRITON), "C++": cpp_names(CPP.read_text())}
# Records that hold what is passed along, and have no formula.
RECORDS = {"ColumnSums", "Skew"}


def test_every_language_has_its_formulas_read() -> None:
    assert {"times_or_zero", "merge", "recentre", "mixture_terms", "Coefficients"} <= set.intersection(*NAMES.values())
    assert min(map(len, NAMES.values())) > 20


def test_what_one_language_has_alone_is_listed_with_its_reason() -> None:
    languages = Counter(name for names in NAMES.values() for name in names)
    for language, names in NAMES.items():
        alone = {name for name in names if languages[name] == 1} - RECORDS
        assert alone == set(ONLY[language]), language
