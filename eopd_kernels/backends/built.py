"""What setup.py has built and, where it has not, why: eopd_kernels/_build.json."""

from __future__ import annotations

import json
from pathlib import Path

RECORD = Path(__file__).resolve().parents[1] / "_build.json"


def why_not_built(part: str, name: str) -> str | None:
    """None if ``part`` was built, else the reason, of which ``name`` is the subject."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if part not in record:
        return f"{name} were never built (pip install . or python setup.py build_ext --inplace builds them)"
    return None if record[part]["built"] else f"{name} were not built: {record[part]['reason']}"
