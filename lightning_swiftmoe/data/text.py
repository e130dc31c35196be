"""``TextData``: a text corpus as batches of next-token sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_swiftmoe.data.corpus import SPLITS, Document, Encoder, encode_bytes, join_tokens, unigram_entropy
from lightning_swiftmoe.data.corpus_data import CorpusData
from lightning_swiftmoe.data.loader import Windows
from lightning_swiftmoe.data.sources import Source


class TextData(CorpusData):
    """Batches ``[B, seq_len + 1]`` int32 from a source of documents.

    Args:
        source: where the text comes from.
        seq_len: tokens of one sequence.
        batch_size: sequences of one step over **all** ranks.
        tokenizer: ``"bytes"`` (256 tokens); ``"bpe"``, trained on the training split; or a folder with the tokenizer of
            a transformers model, whose end-of-sequence token then ends every document.
        vocab_size: tokens of a BPE; must be 256 for bytes, and a folder's tokenizer has its own. None: 256, or its own.
        num_workers: loader processes of each rank.
        seed: of the shuffle.
        limit_bytes: use only so much text of each split; None: all.

    Raises:
        ImportError: a folder's tokenizer without transformers.
        ValueError: a bad argument; on ``fit``, a batch size that the ranks do not divide.
    """

    def __init__(
        self,
        source: Source,
        seq_len: int = 512,
        batch_size: int = 64,
        tokenizer: str = "bytes",
        vocab_size: int | None = 256,
        num_workers: int = 0,
        seed: int = 0,
        limit_bytes: int | None = None,
    ) -> None:
        super().__init__(source, seq_len, batch_size, num_workers, seed)
        self.tokenizer, self.limit_bytes = tokenizer, limit_bytes
        self._of_folder: Any = None
        if tokenizer not in ("bytes", "bpe"):
            if not Path(tokenizer).is_dir():
                raise ValueError(f"tokenizer must be bytes or bpe, or a folder that has one, got {tokenizer!r}")
            from lightning_swiftmoe.hf.tokenizer import FolderTokenizer

            self._of_folder = FolderTokenizer(tokenizer)
            vocab_size = self._of_folder.vocab_size
        vocab_size = 256 if vocab_size is None else vocab_size
        if tokenizer == "bytes" and vocab_size != 256:
            raise ValueError(f"byte tokens have a vocab_size of 256, got {vocab_size}; set tokenizer=bpe")
        if tokenizer == "bpe" and vocab_size < 256:
            raise ValueError(f"a byte-level BPE has a vocab_size of at least 256, got {vocab_size}")
        self.vocab_size = vocab_size
        self._tokens: dict[str, NDArray[Any]] = {}

    def tokens(self, split: str) -> NDArray[Any]:
        """All tokens of a split, one-dimensional, uint8 (bytes) or uint16/uint32."""
        if not self._tokens:
            encode = self._encoder()
            self._tokens = {s: join_tokens(self.documents, s, encode)[: self.limit_bytes] for s in SPLITS}
        return self._tokens[split]

    def dataset(self, split: str) -> Windows:
        """Windows of ``seq_len + 1`` tokens."""
        return Windows(self.tokens(split), self.seq_len)

    def unigram_entropy(self) -> float:
        """Nats per token of the training split; see ``corpus.unigram_entropy``."""
        return unigram_entropy(self.tokens("train"))

    def _encoder(self) -> Encoder:
        if self._of_folder is not None:
            return self._of_folder.encode_document
        return encode_bytes if self.tokenizer == "bytes" else train_bpe(self.documents, self.vocab_size)


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
