"""``ChatData``: conversations as batches for instruction tuning."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from lightning_swiftmoe.arguments import check_choice
from lightning_swiftmoe.data.corpus import SPLITS, Document, unigram_entropy
from lightning_swiftmoe.data.corpus_data import CorpusData
from lightning_swiftmoe.data.packing import Conversation, PackedConversations
from lightning_swiftmoe.data.sources import Source

_EXPECTED = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


class ChatData(CorpusData):
    """Batches of ``input_ids``, ``labels`` and ``position_ids``, ``[B, seq_len]`` int64 each: ``PackedConversations``.

    A document is a conversation, ``{"messages": [{"role": ..., "content": ...}, ...]}`` in JSON, with ``"tools"`` where
    a template is told of any. The chat template of the tokenizer writes it, and the assistant's turns alone are
    trained, with the token that ends each. Every rank reads and packs all of them, and comes to the same.

    Args:
        source: where conversations come from.
        tokenizer: folder with the tokenizer of a transformers model, and its chat template.
        seq_len: tokens of one sequence.
        batch_size: sequences of one step over **all** ranks.
        overlong: what becomes of a conversation of more than ``seq_len`` tokens. ``"cut"``: its end goes; what is
            kept has all that stood in front of it, so nothing wrong is learnt; and long answers are learnt at all.
            ``"drop"``: it is left out, and every answer has its end.
        num_workers: loader processes of each rank.
        seed: of the shuffle.

    Raises:
        ImportError: transformers is not installed.
        ValueError: a bad argument; when conversations are read, one that is none, that the template refuses, or a split
            in which nothing is trained.
    """

    packs = True

    def __init__(
        self,
        source: Source,
        tokenizer: str | None,
        seq_len: int = 2048,
        batch_size: int = 64,
        overlong: str = "cut",
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(source, seq_len, batch_size, num_workers, seed)
        check_choice("overlong", overlong, ("cut", "drop"))
        if tokenizer is None:
            raise ValueError("data=chat needs a chat template: choose model=hf, or data.tokenizer=FOLDER that has one")
        from lightning_swiftmoe.hf.tokenizer import FolderTokenizer

        self.overlong = overlong
        self._tokenizer = FolderTokenizer(tokenizer)
        self.vocab_size = self._tokenizer.vocab_size
        self._packed: dict[str, PackedConversations] = {}
        self._overlong = dict.fromkeys(SPLITS, 0)
        self._without_answer = dict.fromkeys(SPLITS, 0)

    def manifest(self) -> dict[str, Any]:
        """Without a line for every conversation."""
        return {key: value for key, value in super().manifest().items() if key != "files"}

    def dataset(self, split: str) -> PackedConversations:
        """The conversations of a split, packed. Those of all splits are read the first time, mistakes among them.

        Raises:
            ValueError: one cannot be read, or there is none with an answer.
        """
        if not self._packed:
            kept = self._read_all()
            self._packed = {name: PackedConversations(kept[name], self.seq_len, self._tokenizer.pad) for name in SPLITS}
        if not len(self._packed[split]):
            raise ValueError(
                f"{self.source!r} has no {split} conversation of {self.seq_len} tokens with an answer: "
                f"{self._overlong[split]} are longer, {self._without_answer[split]} have nothing to train on"
            )
        return self._packed[split]

    def unigram_entropy(self) -> float:
        """Nats per trained token of the training split; see ``corpus.unigram_entropy``."""
        return unigram_entropy(np.concatenate([one.trained() for one in self.dataset("train").conversations]))

    def remarks(self) -> dict[str, str]:
        """How conversations of the training split are packed, and what is left out."""
        packed = self.dataset("train")
        tokens = sum(map(len, packed.conversations))
        trained = sum(len(one.trained()) for one in packed.conversations)
        said = (
            f"{len(packed.conversations):,} of {tokens:,} tokens ({trained / tokens:.0%} trained) in {len(packed):,} "
            f"sequences, {1 - tokens / len(packed) / self.seq_len:.1%} of them filling"
        )
        if number := self._overlong["train"]:
            said += f"; {number:,} longer than {self.seq_len:,} {'cut' if self.overlong == 'cut' else 'left out'}"
        if number := self._without_answer["train"]:
            said += f"; {number:,} without an answer left out"
        return {"conversations": said}

    def _read_all(self) -> dict[str, list[Conversation]]:
        """By split; counts what is cut or left out."""
        kept: dict[str, list[Conversation]] = {split: [] for split in SPLITS}
        for document in self.documents:
            conversation = self._read(document)
            if len(conversation) > self.seq_len:
                self._overlong[document.split] += 1
                if self.overlong == "drop":
                    continue
                conversation = conversation.cut(self.seq_len)
            if len(conversation.trained()):
                kept[document.split].append(conversation)
            else:
                self._without_answer[document.split] += 1
        return kept

    def _read(self, document: Document) -> Conversation:
        try:
            record = json.loads(document.content)
            _check(record)
            return Conversation(*self._tokenizer.encode_conversation(record["messages"], record.get("tools")))
        except ValueError as error:
            raise ValueError(f"{document.name}: {error}") from error


def _check(record: Any) -> None:
    """Raise a ValueError for what is no conversation."""
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"got no list of messages, expected {_EXPECTED}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {number} has no role, expected {_EXPECTED}")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise ValueError(f"message {number} has no text as its content, expected {_EXPECTED}")
