"""``TextData``: a text corpus as batches of next-token sequences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from numpy.typing import NDArray
from torch.utils.data.distributed import DistributedSampler

from lightning_swiftmoe.data.corpus import (
    SPLITS,
    Document,
    Encoder,
    encode_bytes,
    join_tokens,
    manifest,
    read_documents,
    unigram_entropy,
)
from lightning_swiftmoe.data.loader import ResumableLoader, Windows
from lightning_swiftmoe.data.sources import Source


class TextData(pl.LightningDataModule):
    """Batches ``[B, seq_len + 1]`` int32 from a source of documents.

    Args:
        source: where the text comes from.
        seq_len: tokens of one sequence.
        batch_size: sequences of one step over **all** ranks.
        tokenizer: ``"bytes"`` (256 tokens), or ``"bpe"``, trained on the training split.
        vocab_size: tokens of a BPE; must be 256 for bytes.
        num_workers: loader processes of each rank.
        seed: of the shuffle.
        limit_bytes: use only so much text of each split; None: all.

    Raises:
        ValueError: a bad argument; on ``fit``, a batch size that the ranks do not divide.
    """

    def __init__(
        self,
        source: Source,
        seq_len: int = 512,
        batch_size: int = 64,
        tokenizer: str = "bytes",
        vocab_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
        limit_bytes: int | None = None,
    ) -> None:
        super().__init__()
        if tokenizer not in ("bytes", "bpe"):
            raise ValueError(f"tokenizer must be bytes or bpe, got {tokenizer!r}")
        if tokenizer == "bytes" and vocab_size != 256:
            raise ValueError(f"byte tokens have a vocab_size of 256, got {vocab_size}; set tokenizer=bpe")
        if tokenizer == "bpe" and vocab_size < 256:
            raise ValueError(f"a byte-level BPE has a vocab_size of at least 256, got {vocab_size}")
        if seq_len < 1 or batch_size < 1:
            raise ValueError(f"seq_len and batch_size must be positive, got {seq_len} and {batch_size}")
        self.source, self.seq_len, self.batch_size = source, seq_len, batch_size
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.num_workers, self.seed, self.limit_bytes = num_workers, seed, limit_bytes
        self._documents: list[Document] | None = None
        self._tokens: dict[str, NDArray[Any]] = {}

    @property
    def documents(self) -> list[Document]:
        """All documents, read once."""
        if self._documents is None:
            self._documents = read_documents(self.source)
        return self._documents

    def manifest(self) -> dict[str, Any]:
        """What the corpus is made of; see ``corpus.manifest``."""
        return manifest(self.documents)

    def tokens(self, split: str) -> NDArray[Any]:
        """All tokens of a split, one-dimensional, uint8 (bytes) or uint16/uint32 (BPE)."""
        if not self._tokens:
            encode = encode_bytes if self.tokenizer == "bytes" else train_bpe(self.documents, self.vocab_size)
            self._tokens = {s: join_tokens(self.documents, s, encode)[: self.limit_bytes] for s in SPLITS}
        return self._tokens[split]

    def unigram_entropy(self) -> float:
        """Nats per token of the training split; see ``corpus.unigram_entropy``."""
        return unigram_entropy(self.tokens("train"))

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled by the seed, another way in every epoch; the last incomplete batch is left out.

        A step sees the same sequences whatever the number of ranks that share them.
        """
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> ResumableLoader:
        """In order."""
        return self._loader("val")

    def test_dataloader(self) -> ResumableLoader:
        """In order."""
        return self._loader("test")

    predict_dataloader = test_dataloader

    def _loader(self, split: str, shuffle: bool = False) -> ResumableLoader:
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)
        check_batch_size(self.batch_size, world)
        windows = Windows(self.tokens(split), self.seq_len)
        # Lightning deals out the others itself. Torch's own shuffle would depend on the process's random state.
        sampler: DistributedSampler[Any] | None = (
            DistributedSampler(windows, world, rank, seed=self.seed, drop_last=True) if shuffle else None
        )
        return ResumableLoader(
            windows, self.batch_size // world, sampler=sampler, num_workers=self.num_workers, drop_last=shuffle
        )


def check_batch_size(batch_size: int, num_ranks: int) -> None:
    """Raise a ValueError for a global batch that the ranks cannot share evenly."""
    if batch_size % num_ranks:
        raise ValueError(f"batch_size = {batch_size} is for all ranks together and must divide by {num_ranks}")


def train_bpe(documents: list[Document], vocab_size: int) -> Encoder:
    """A byte-level BPE trained on the training split; deterministic, so every rank trains the same.

    Raises:
        ImportError: ``tokenizers`` is not installed.
    """
    try:
        from tokenizers import ByteLevelBPETokenizer
    except ImportError as error:
        raise ImportError(
            "tokenizer=bpe needs the tokenizers package: pip install 'lightning-swiftmoe[bpe]'"
        ) from error
    tokenizer = ByteLevelBPETokenizer()
    texts = (d.content.decode(errors="replace") for d in documents if d.split == "train")
    tokenizer.train_from_iterator(texts, vocab_size=vocab_size, show_progress=False)
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    return lambda content: np.array(tokenizer.encode(content.decode(errors="replace")).ids, dtype=dtype)


def write_manifest(data: TextData, path: Path) -> None:
    """Write the manifest as JSON beside a run's other results."""
    path.write_text(json.dumps(data.manifest(), indent=1))
