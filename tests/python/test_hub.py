"""python/hub.py: the folder is what the loader of the Hub's kernels expects, and what it loads trains alike."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import hub
import pytest

from tests.test_compile import fresh_compiler
from tests.test_two_copies import check_apart, train_in_turns

__all__ = ["fresh_compiler"]  # a fixture, which takes effect by being here
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    hub.write(folder)
    return folder


@pytest.fixture(scope="module")
def kernel(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """What the program of the page loads, from a folder that is laid out as the Hub's cache: all files are links."""
    if importlib.util.find_spec("kernels") is None:
        pytest.skip("kernels is not installed: pip install '.[test]'")
    cache = tmp_path_factory.mktemp("cache")
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        link, blob = cache / file.relative_to(folder), cache / "blobs" / str(len(list(cache.glob("blobs/*"))))
        for path in (link, blob):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(file.read_bytes())
        link.symlink_to(blob)
    program = re.findall(r"```python\n(.*?)```", (ROOT / "docs/guides/hub.md").read_text(), re.DOTALL)
    names: dict[str, ModuleType] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("LOCAL_KERNELS", f"your-org/eopd-kernels={cache}")
        with pytest.warns(UserWarning, match="the native kernels were not built: a folder from the Hub has none"):
            exec("\n".join(program), names)
    return names["eopd"]


def test_the_loader_takes_it_for_what_it_is(kernel: ModuleType, folder: Path) -> None:
    from kernels import get_loaded_kernels
    from kernels._rust import Digest, DigestAlgorithm

    (loaded,) = get_loaded_kernels()
    metadata = loaded.metadata
    assert loaded.module is kernel and kernel.__name__ == metadata.id
    assert (str(metadata.name), metadata.version) == ("eopd-kernels", int(kernel.__version__.split(".")[0]))
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, folder / "build" / "torch-universal"))


def test_it_trains_like_the_package(kernel: ModuleType) -> None:
    check_apart(kernel)
    for options in ({}, {"schedule": "recompute"}):
        train_in_turns(kernel, {"backend": "torch", **options}, compiled=False)
        train_in_turns(kernel, {"backend": "torch", **options}, compiled=True)


def test_every_content_has_a_name_of_its_own(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "build" / "torch-universal").mkdir(parents=True)
    (tmp_path / "build" / "torch-universal" / "removed.py").touch()
    again = hub.write(tmp_path)
    build = folder / "build" / "torch-universal"
    assert again == json.loads((build / "metadata.json").read_text())
    assert set(again["digest"]["files"]) == {
        path.relative_to(build).as_posix() for path in build.rglob("*") if path.is_file()
    } - {"metadata.json"}
    assert {"LICENSE", "rows.py", "backends/triton/launch.py"} <= set(again["digest"]["files"])
    assert not any(file.startswith(("testing", "integrations")) for file in again["digest"]["files"])
    files = again["digest"]["files"]
    assert again["id"] == hub.identifier(files) and again["id"].isidentifier()
    assert again["id"] != hub.identifier({**files, "rows.py": files["loss.py"]})
