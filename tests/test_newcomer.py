"""What a newcomer types: the README's commands are found; its first code and the page of the first loop run alone."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests import newcomer


def test_the_commands_are_those_of_the_readme() -> None:
    found = newcomer.commands(newcomer.ROOT)
    assert found == ["pip install '.[integrations]'", "python -P -m eopd_kernels.info --check"]


def test_both_programs_run_in_interpreters_of_their_own() -> None:
    """With this environment in place of a new one, which takes minutes: ``make newcomer``."""
    paths = [str(newcomer.ROOT), str(newcomer.ROOT / "python")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    assert list(newcomer.programs(newcomer.ROOT)) == ["first_code.py", "first_loop.py"]
    newcomer.run_programs(newcomer.ROOT, Path(sys.executable), environment)
