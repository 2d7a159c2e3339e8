"""The folder of a run: what it was asked, what it saw, what came out; it grows, and a resumed run goes on in it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from .errors import RunError, UsageError

# Each line has its "run" and "step".
RECORDS = ("metrics.jsonl", "completions.jsonl", "histograms.jsonl", "evaluations.jsonl")


class RunFolder:
    """``config.json``, the records, ``results.json``, the models, and ``checkpoints/<objective>/``.

    Args:
        path: new or empty; with ``resumed`` one that holds a run. It is made when the first file is written.
        writes: whether this process is the one that writes; the others only read.
    """

    def __init__(self, path: Path, *, resumed: bool, writes: bool = True) -> None:
        self.path = path
        self.writes = writes
        if not writes:
            return
        above = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        if not (above.is_dir() and os.access(above, os.W_OK)):
            raise UsageError("--output-dir", f"cannot use {str(path)!r} as a run folder: {str(above)!r} is not for it")
        if path.exists() and any(path.iterdir()) and not resumed:
            raise UsageError(
                "--output-dir",
                f"{str(path)!r} is not empty; a run needs a folder of its own (--resume goes on with one)",
            )

    def checkpoints(self, objective: str) -> Path:
        return self.path / "checkpoints" / objective

    def write(self, name: str, content: Any) -> None:
        """A JSON file, replaced as a whole."""
        if self.writes:
            path = self.path / name
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                aside = path.with_suffix(".partial")
                aside.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
                os.replace(aside, path)
            except OSError as error:
                raise RunError(f"cannot write {path}: {error.strerror}") from error

    def read(self, name: str) -> Any:
        """What :meth:`write` wrote, or None."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def log(self, name: str, record: dict[str, Any]) -> None:
        """One more line; opened for each, so that an interrupted run loses none."""
        path = self.path / name
        try:
            with path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror}") from error

    def forget_after(self, run: str, step: int) -> None:
        """Takes out what ``run`` recorded after ``step``, from where it will be repeated, and torn last lines."""
        if not self.writes:
            return
        for name in RECORDS:
            path = self.path / name
            if path.exists():
                kept = [line for line in path.read_text(encoding="utf-8").splitlines() if stays(line, run, step)]
                aside = path.with_suffix(".partial")
                aside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
                os.replace(aside, path)

    def save_model(self, name: str, save: Any) -> None:
        """A model's folder, there as a whole or not at all; ``save(folder)`` is called on every process."""
        partial = self.path / f"{name}.partial"
        if self.writes:
            shutil.rmtree(partial, ignore_errors=True)
        try:
            save(str(partial))
            if self.writes:
                os.replace(partial, self.path / name)
        except OSError as error:
            raise RunError(f"cannot write {self.path / name}: {error.strerror or error}") from error

    def save_pretrained(self, name: str, *parts: Any) -> None:
        """What ``from_pretrained`` will load: a model and its tokenizer."""
        self.save_model(name, lambda folder: [part.save_pretrained(folder) for part in parts])


def stays(line: str, run: str, step: int) -> bool:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return False
    return bool(record["run"] != run or record["step"] <= step)
