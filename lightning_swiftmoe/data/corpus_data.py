"""``CorpusData``: what text and conversations have in common as batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from lightning_swiftmoe.data.corpus import Document, manifest, read_documents
from lightning_swiftmoe.data.loader import ResumableLoader
from lightning_swiftmoe.data.sources import Source


class CorpusData(pl.LightningDataModule):
    """Sequences of a corpus, dealt out to ranks. A subclass says what the sequences of a split are: ``dataset``.

    Args:
        source: where documents come from.
        seq_len: tokens of one sequence.
        batch_size: sequences of one step over **all** ranks.
        num_workers: loader processes of each rank.
        seed: of the shuffle.

    Attributes:
        vocab_size: one more than the largest token there can be.
        packs: sequences hold several documents that must not see each other.

    Raises:
        ValueError: a bad argument; on ``fit``, a batch size that the ranks do not divide.
    """

    vocab_size: int
    packs = False

    def __init__(self, source: Source, seq_len: int, batch_size: int, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        if seq_len < 1 or batch_size < 1:
            raise ValueError(f"seq_len and batch_size must be positive, got {seq_len} and {batch_size}")
        self.source, self.seq_len, self.batch_size = source, seq_len, batch_size
        self.num_workers, self.seed = num_workers, seed
        self._documents: list[Document] | None = None

    @property
    def documents(self) -> list[Document]:
        """All documents, read once."""
        if self._documents is None:
            self._documents = read_documents(self.source)
        return self._documents

    def manifest(self) -> dict[str, Any]:
        """What the corpus is made of; see ``corpus.manifest``."""
        return manifest(self.documents)

    def dataset(self, split: str) -> Dataset[Any]:
        """All sequences of a split.

        Raises:
            ValueError: there is none.
        """
        raise NotImplementedError

    def unigram_entropy(self) -> float:
        """Nats per trained token of the training split; see ``corpus.unigram_entropy``."""
        raise NotImplementedError

    def remarks(self) -> dict[str, str]:
        """What a user should know before training, by a name of a few words."""
        return {}

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
        sequences = self.dataset(split)
        # Lightning deals out the others itself. Torch's own shuffle would depend on the process's random state.
        sampler: DistributedSampler[Any] | None = (
            DistributedSampler(sequences, world, rank, seed=self.seed, drop_last=True) if shuffle else None
        )
        return ResumableLoader(
            sequences, self.batch_size // world, sampler=sampler, num_workers=self.num_workers, drop_last=shuffle
        )


def check_batch_size(batch_size: int, num_ranks: int) -> None:
    """Raise a ValueError for a global batch that the ranks cannot share evenly."""
    if batch_size % num_ranks:
        raise ValueError(f"batch_size = {batch_size} is for all ranks together and must divide by {num_ranks}")


def write_manifest(data: CorpusData, path: Path) -> None:
    """Write the manifest as JSON beside a run's other results."""
    path.write_text(json.dumps(data.manifest(), indent=1))
