"""Where text comes from: documents with a name, as bytes."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Source(Protocol):
    """Yields ``(name, content)`` of every document, in the same order on every machine."""

    def documents(self) -> Iterator[tuple[str, bytes]]:
        """All documents."""
        ...


@dataclass(frozen=True)
class StdlibSource:
    """The sources of the running Python's own standard library: real text with nothing to download.

    Tests, installed packages and caches are left out.
    """

    def documents(self) -> Iterator[tuple[str, bytes]]:
        """Every ``.py`` file by its path within the library."""
        root = Path(sysconfig.get_paths()["stdlib"])
        skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root)
            if skipped.isdisjoint(name.parts):
                yield name.as_posix(), path.read_bytes()


@dataclass(frozen=True)
class FileSource:
    """The user's files, and all files below the user's folders.

    Args:
        paths: files or folders, or a single one.
        pattern: which files of a folder, as for ``Path.rglob``.

    Raises:
        ValueError: no paths, a path that does not exist, or a folder without such files.
    """

    paths: str | Sequence[str]
    pattern: str = "*.txt"

    def documents(self) -> Iterator[tuple[str, bytes]]:
        """Every file by its path as given."""
        if not self.paths:
            raise ValueError("data=text needs data.source.paths=[FILE or FOLDER, ...], got none")
        for given in map(Path, [self.paths] if isinstance(self.paths, str) else self.paths):
            files = sorted(p for p in given.rglob(self.pattern) if p.is_file()) if given.is_dir() else [given]
            if not files or not files[0].is_file():
                raise ValueError(f"{given} is no file, and no folder with files like {self.pattern!r}")
            for path in files:
                yield path.as_posix(), path.read_bytes()


@dataclass(frozen=True)
class JsonLinesSource(FileSource):
    """Every line of the user's files of JSON lines is a document; empty ones are none.

    Args and errors are those of ``FileSource``.
    """

    pattern: str = "*.jsonl"

    def documents(self) -> Iterator[tuple[str, bytes]]:
        """Every line by its file and number, which counts from 1."""
        if not self.paths:
            raise ValueError("data=chat needs data.source.paths=[FILE or FOLDER, ...] with JSON lines, got none")
        for name, content in super().documents():
            for number, line in enumerate(content.splitlines(), 1):
                if line.strip():
                    yield f"{name}:{number}", line


@dataclass(frozen=True)
class HuggingFaceSource:
    """A dataset by name, through the ``datasets`` package.

    Args:
        name: for example ``"cais/mmlu"``.
        config: the dataset's configuration, such as ``"all"``.
        split: which split to read; we cut our own from it.
        column: column with the text; None joins all text columns of a row.

    Raises:
        ImportError: ``datasets`` is not installed.
    """

    name: str
    config: str | None = None
    split: str = "train"
    column: str | None = None

    def documents(self) -> Iterator[tuple[str, bytes]]:
        """Every row, named by its number."""
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ImportError("data=hf needs the datasets package: pip install 'lightning-swiftmoe[hf]'") from error
        for number, row in enumerate(load_dataset(self.name, self.config, split=self.split)):
            texts = [row[self.column]] if self.column else [value for value in row.values() if isinstance(value, str)]
            yield f"{self.name}/{number}", "\n".join(texts).encode()
