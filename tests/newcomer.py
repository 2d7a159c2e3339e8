"""``python -m tests.newcomer``, or ``make newcomer``: a newcomer's first ten minutes, who has nothing but the README.

From a clone, in an environment of its own: the README's commands for installing and checking, then two files in an
empty folder, each in a new interpreter. One is the README's first code, the other the page of the first loop. The
models that a reader would bring are tiny ones.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 10.0
# What the README says that its reader has: two models, the tokenizer of both, and prompts.
MODELS = """import train_minimal

teacher, student, tokenizer, texts = train_minimal.tiny()
teacher, texts = teacher.requires_grad_(False), texts[:4]
"""


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def programs(clone: Path) -> dict[str, str]:
    """The two files, by name."""
    first = MODELS + blocks(clone / "README.md")[0] + "print(f'loss {out.loss.item():.3f} of {num_items:.0f} tokens')\n"
    return {"first_code.py": first, "first_loop.py": "\n".join(blocks(clone / "docs" / "start" / "first_loop.md"))}


def commands(clone: Path) -> list[str]:
    """What the README has a user type to see that it works, after the install command that its first code needs."""
    section = re.split(r"^## ", (clone / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    (text,) = [part for part in section if part.startswith("Installation\n")]
    found = re.findall(r"^    ((?:pip|python) .*?)(?: +#.*)?$", text, re.MULTILINE)
    return [command for command in found if command != "pip install ."]


def run_programs(clone: Path, python: Path, environment: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, text in programs(clone).items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
            subprocess.run([str(python), name], cwd=folder, env=environment, check=True)


def main() -> int:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        binaries = clone / ".venv" / "bin"
        subprocess.run([sys.executable, "-m", "venv", str(binaries.parent)], check=True)
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment["PATH"] = os.pathsep.join([str(binaries), environment["PATH"]])
        for command in commands(clone):
            print(f"{(time.perf_counter() - started) / 60:.1f} min: {command}", flush=True)
            done = subprocess.run(
                command, shell=True, cwd=clone, env=environment, check=True, stdout=subprocess.PIPE, text=True
            )
            print(done.stdout, flush=True)
        # The last of them is the check.
        kernels = list((clone / ".venv").glob("lib/python*/site-packages/eopd_kernels/*.so"))
        if kernels and not re.search(r"^ *cpu +available", done.stdout, re.MULTILINE):
            raise SystemExit(f"the check did not see {kernels}")
        environment["PYTHONPATH"] = str(clone / "python")  # where the tiny models are
        run_programs(clone, binaries / "python", environment)
    minutes = (time.perf_counter() - started) / 60
    print(f"{minutes:.1f} min: a loop with two models")
    return int(minutes > MINUTES)


if __name__ == "__main__":
    raise SystemExit(main())
