"""What setup.py has built and, where it has not, why: eopd_kernels/_build.json."""

from __future__ import annotations

import json
from pathlib import Path

RECORD = Path(__file__).resolve().parents[1] / "_build.json"


def why_not_built(part: str, name: str, error: ImportError) -> str:
    """Why importing ``part`` gave ``error``, in a sentence of which ``name`` is the subject.

    Whether a part is there, only its import tells: the record is of the last build, and where a package is built in
    place, by several Pythons, of that one's.
    """
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if part not in record:
        return f"{name} were never built (pip install . or python setup.py build_ext --inplace builds them)"
    if record[part]["built"]:
        return f"{name} were built but cannot be loaded: {error}"
    return f"{name} were not built: {record[part]['reason']}"
