"""``python -m tests.gpu [WORDS FOR PYTEST]``: the tests of this folder, and whether they passed or only skipped.

A skip for a reason that is not expected is a failure, and so is a backend of which most tests did not pass.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from eopd_kernels.testing.steps import MISSING, ROOT

REQUIRED = ("cuda", "triton", "torch")
NO_GPU = "needs a GPU"
ALLOWED = re.compile(
    "backend='cpu' takes CPU tensors"
    "|backend 'cpu' is not available"
    "|needs two GPUs"
    "|does not fit on this device"
    "|for kernels, and wants 24 GB"
)
SHOWN = 3  # names of tests that went wrong, on the last line


class Result(NamedTuple):
    """One test: "passed", "failed" or "skipped", and the reason of a skip."""

    name: str
    outcome: str
    reason: str = ""

    @property
    def backends(self) -> set[str]:
        """The backends among the parameters, and the one that a file is about."""
        words = set(re.split(r"[\[\],-]", self.name))
        return {name for name in REQUIRED if name in words or f"test_{name}_on_a_gpu" in self.name}


def main(words: list[str]) -> int:
    report = Path(os.environ.get("OUT", ROOT / "build"), "smoke.xml" if "smoke" in words else "tests.xml")
    report.unlink(missing_ok=True)
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    # Asked for by torch's deterministic algorithms, under which the suite runs.
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    subprocess.run([*pytest, "tests/gpu", *words], cwd=ROOT, env=environment, check=False)
    if not report.exists():
        print("pytest has left no report")
        return 1
    status, text = judge(list(results(report)))
    print(text)
    return status


def results(report: Path) -> Iterator[Result]:
    """Reads the JUnit report."""
    for case in ElementTree.parse(report).iter("testcase"):
        name, outcomes = f"{case.get('classname')}.{case.get('name')}", {child.tag: child for child in case}
        if outcomes.keys() & {"failure", "error"}:
            yield Result(name, "failed")
        elif "skipped" in outcomes:
            yield Result(name, "skipped", outcomes["skipped"].get("message") or "")
        else:
            yield Result(name, "passed")


def judge(found: list[Result]) -> tuple[int, str]:
    """Returns the status, and the line that says why."""
    counts = Counter(result.outcome for result in found)
    text = ", ".join(f"{number} {outcome}" for outcome, number in counts.items()) or "no test was found"
    if found and all(NO_GPU in result.reason for result in found):
        return MISSING, f"{text}: {NO_GPU}"
    wrong = [result.name for result in found if result.outcome == "failed"]
    wrong += [f"{r.name} ({r.reason})" for r in found if r.outcome == "skipped" and not ALLOWED.search(r.reason)]
    for backend in REQUIRED:
        of_it = [result.outcome == "passed" for result in found if backend in result.backends]
        text += f", {backend} {sum(of_it)} of {len(of_it)}"
        if 2 * sum(of_it) <= len(of_it) or not of_it:
            wrong.append(f"{backend} passed {sum(of_it)} of {len(of_it)}")
    more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    return (1, f"{text}; wrong: {', '.join(wrong[:SHOWN])}{more}") if wrong else (0, text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
