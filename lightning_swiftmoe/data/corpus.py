"""A corpus: tokens of three splits, and a manifest that says what they are made of."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_swiftmoe.data.sources import Source

SPLITS = ("train", "val", "test")

Encoder = Callable[[bytes], NDArray[Any]]


@dataclass(frozen=True)
class Document:
    """One document and where it belongs.

    Args:
        name: its name.
        content: its bytes.
        sha256: their hash, which decides the split.
        split: one of ``SPLITS``.
    """

    name: str
    content: bytes
    sha256: str
    split: str


def read_documents(source: Source) -> list[Document]:
    """All documents of a source, 90 % for training, 5 % each for validation and test.

    The split follows from the content alone: a document never changes sides, and a copy stays with its original.

    Raises:
        ValueError: the source is empty.
    """
    documents = []
    for name, content in source.documents():
        digest = hashlib.sha256(content).hexdigest()
        share = int(digest[:8], 16) / 16**8
        split = "train" if share < 0.9 else "val" if share < 0.95 else "test"
        documents.append(Document(name, content, digest, split))
    if not documents:
        raise ValueError(f"{source!r} has no documents")
    return documents


def encode_bytes(content: bytes) -> NDArray[np.uint8]:
    """One token a byte."""
    return np.frombuffer(content, dtype=np.uint8)


def join_tokens(documents: list[Document], split: str, encode: Encoder) -> NDArray[Any]:
    """The tokens of one split, documents one after the other."""
    parts = [encode(document.content) for document in documents if document.split == split]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint8)


def manifest(documents: list[Document]) -> dict[str, Any]:
    """Files with size, hash and split, their sums, and one hash over all: equal hashes mean equal corpora."""
    whole = hashlib.sha256("".join(document.sha256 for document in documents).encode()).hexdigest()
    return {
        "num_files": len(documents),
        "num_bytes": sum(len(document.content) for document in documents),
        "sha256": whole,
        "files": [
            {"name": d.name, "num_bytes": len(d.content), "sha256": d.sha256, "split": d.split} for d in documents
        ],
    }


def unigram_entropy(tokens: NDArray[Any]) -> float:
    """Nats per token that a model which knows frequencies only would need: the loss to beat."""
    counts = np.bincount(tokens)
    share = counts[counts > 0] / tokens.size
    return float(-(share * np.log(share)).sum())
