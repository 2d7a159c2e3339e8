"""The files around the package: one version, workflows that call what is there, a citation, an sdist."""

from __future__ import annotations

import datetime
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import eopd_kernels

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_the_version_is_written_once_and_the_changelog_has_it() -> None:
    assert "version" in PROJECT["dynamic"]
    versions = re.findall(r"^## \[([^\]]+)\](?: - (\S+))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == ("Unreleased", "") and versions[1][0] == eopd_kernels.__version__
    dates = [datetime.date.fromisoformat(date) for _, date in versions[1:]]
    assert dates == sorted(dates, reverse=True)


def test_the_changelog_has_no_other_kind_of_change() -> None:
    kinds = set(re.findall(r"^### (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_do_their_work_by_ci_run(workflow: Path) -> None:
    """Of nothing that fails there should it be unknown how to repeat it."""
    targets = set(re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    for name, job in jobs.items():
        commands = [step["run"] for step in job["steps"] if "run" in step]
        assert commands, name
        for command in commands:
            program, *arguments = command.split()
            assert program == ".ci/run" and set(arguments) <= targets, command
        for row in job.get("strategy", {}).get("matrix", {}).get("include", ()):
            if "constraints" in row:
                assert (ROOT / row["constraints"]).exists(), row


def test_the_matrix_has_every_set_of_versions() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]
    tested = {(row["python"], row["constraints"]) for row in jobs["suite"]["strategy"]["matrix"]["include"]}
    sets = {f"constraints/{path.name}" for path in (ROOT / "constraints").glob("*.txt")} | {"constraints.txt"}
    assert {constraints for _, constraints in tested} == sets
    assert {python for python, _ in tested} == {
        line.rsplit(" ", 1)[1] for line in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", line)
    }
    for file, python in re.findall(r"^versions-(\S+): PYTHON := python(.+)$", (ROOT / "Makefile").read_text(), re.M):
        assert (python, f"constraints/{file}.txt") in tested


def test_the_citation_is_that_of_the_readme() -> None:
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"title = {{{paper['title']}}}" in readme
    assert " and ".join(f"{author['given-names']} {author['family-names']}" for author in paper["authors"]) in readme
    assert paper["url"] == PROJECT["urls"]["Paper"] and paper["url"] in readme


@pytest.mark.parametrize(
    "form", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda path: path.name
)
def test_every_issue_form_asks_for_the_output_of_info(form: Path) -> None:
    fields = {field["id"]: field for field in yaml.safe_load(form.read_text())["body"]}
    assert "python -m eopd_kernels.info" in fields["info"]["attributes"]["label"]
    assert fields["info"]["validations"]["required"] is True


def test_a_commit_is_checked_by_the_ruff_of_make_lint() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repository["repo"] for repository in hooks] == ["local"]
    assert {hook["entry"].split()[0] for hook in hooks[0]["hooks"]} == {".venv/bin/ruff"}
