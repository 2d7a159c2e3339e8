"""The pages that show code: it runs, every Objective they name exists, and links and anchors lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from eopd_kernels import Objective
from tests.integrations.conftest import in_a_folder_of_its_own, require

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += [ROOT / "examples" / "README.md", ROOT / "python" / "README.md"]
# Lines of programs whose other parts are not on the page, or in a folder: tests and examples run what these show.
FRAGMENTS = {"integrations.md", "distributed.md", "hub.md"}
RUN = [page for page in PAGES if "```python\n" in page.read_text() and page.name not in FRAGMENTS | {"README.md"}]
INTERNALS = {
    "benchmarks.md",
    "cuda.md",
    "decisions.md",
    "design.md",
    "distributed.md",
    "gpu.md",
    "math.md",
    "results.md",
}

__all__ = ["in_a_folder_of_its_own"]  # a fixture, which takes effect by being here


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(page: Path) -> None:
    """One after the other, as a reader would paste them."""
    text = "\n".join(blocks(page, "python"))
    for library in set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)):
        require(library)
    exec(compile(text, str(page), "exec"), {"__name__": "page"})


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```bash\n" in page.read_text()], ids=lambda page: page.stem
)
def test_commands_are_there(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for line in "".join(blocks(page, "bash")).splitlines():
        words = [word for word in line.split() if not re.fullmatch(r"[A-Z_]+=\S+", word)]
        match words:
            case ["make", *named]:
                assert set(named) <= targets, line
            case ["python", "-m", module, *_]:
                assert importlib.util.find_spec(module) is not None, line
            case ["python", file, *_]:
                assert (ROOT / file).exists(), line
            case ["pip", "install", what, *_]:
                extra = re.fullmatch(r"'?\.(?:\[(\w+)\])?'?", what)
                assert what == "torch" or (extra is not None and extra[1] in {None, *extras}), line
            case _:
                pytest.fail(f"unknown command: {line}")


@pytest.mark.parametrize(
    "file", ["docs/objectives.md", "README.md", "docs/guides/objective.md", "docs/guides/methods.md"]
)
def test_every_objective_on_a_line_of_its_own_exists(file: str) -> None:
    names: dict[str, object] = {}
    exec("from eopd_kernels import *", names)
    found = re.findall(r"`(Objective(?:\.\w+)?\([^`]*\))`", (ROOT / file).read_text())
    assert len(found) > 3
    for line in found:
        if re.search(r"[…ταβ]", line):  # a pattern, not code
            continue
        assert isinstance(eval(line, names | {"beta": 0.5}), Objective), line


def anchors(page: Path) -> set[str]:
    """Those that a forge gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link, anchor in re.findall(r"\]\((?!http)([^)#\s]*)(?:#([^)]+))?\)", page.read_text()):
            target = page.parent / link if link else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}#{anchor}"


def test_pages_for_users_are_short() -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        if page.name not in INTERNALS:
            assert len(page.read_text().splitlines()) <= 250, page


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Every link, anchor and name of the API resolves, and every page is in the navigation."""
    for module in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "site" / "reference" / "loss.html").read_text()
    assert 'id="eopd_kernels.entropy_aware_kl"' in reference and ":class:" not in reference
