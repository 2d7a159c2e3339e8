"""The options of a command that writes one block of a page, and where its result goes."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .machine import ENVIRONMENTS, description, imitate
from .page import block, replace_block

QUICK_LABEL = "**Quick run: small shapes and few rounds. These are not the published figures.**"


def parse(module: str, summary: str, cases: Sequence[str]) -> argparse.Namespace:
    """The options; with ``--capability`` the command continues in a new process that is restricted to it."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=summary)
    parser.add_argument("--only", action="append", choices=cases, metavar="CASE", help=f"of {', '.join(cases)}")
    parser.add_argument("--quick", action="store_true", help="small shapes, half a minute; not the published figures")
    parser.add_argument("--seconds", type=float, help="how long rounds are repeated in each case (at least 3 rounds)")
    parser.add_argument("--capability", choices=list(ENVIRONMENTS), help="keep torch and eopd_kernels to these vectors")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every single measurement")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the generated block of this page")
    arguments = parser.parse_args()
    if arguments.write and (arguments.quick or arguments.only):
        parser.error("what is written is of whole runs only: leave out --quick and --only")
    if arguments.capability:
        imitate(arguments.capability, module)
    arguments.load = os.getloadavg()[0]
    return arguments


def publish(
    module: str, name: str, arguments: argparse.Namespace, parts: Sequence[str], records: Sequence[dict[str, Any]]
) -> None:
    """Prints the result, and writes it where the options say."""
    machine = description(module, arguments.capability, arguments.load)
    text = block(machine, [*([QUICK_LABEL] if arguments.quick else []), *parts])
    print(text)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "quick": arguments.quick, "rows": records}, indent=1))
    if arguments.write:
        replace_block(arguments.write, f"{name} {arguments.capability}" if arguments.capability else name, text)
