"""Conversations in sequences of one length: several in one, none in two."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

IGNORED = -100  # label of a token that nobody is trained on, as transformers has it


@dataclass(frozen=True)
class Conversation:
    """One conversation as tokens.

    Args:
        tokens: ``[n]`` int32.
        answers: ``[n]`` bool, which of them a model is trained to say.
    """

    tokens: NDArray[np.int32]
    answers: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.tokens)

    def cut(self, length: int) -> Conversation:
        """Its beginning."""
        return Conversation(self.tokens[:length], self.answers[:length])

    def trained(self) -> NDArray[np.int32]:
        """Tokens that are somebody's target: answers, but for what nothing stands in front of."""
        return self.tokens[1:][self.answers[1:]]


class PackedConversations(Dataset[dict[str, Tensor]]):
    """Sequences of ``seq_len`` tokens: ``input_ids``, ``labels`` and ``position_ids``, ``[seq_len]`` int64 each.

    Labels are at their own tokens, as transformers has them, and -100 outside of answers. Positions begin with 0 at
    every conversation, by which attention keeps them apart. What is left of a sequence is filled, as one more.

    Args:
        conversations: none longer than ``seq_len``.
        seq_len: tokens of one sequence.
        pad: token to fill with.
    """

    def __init__(self, conversations: Sequence[Conversation], seq_len: int, pad: int) -> None:
        self.conversations, self.seq_len, self.pad = conversations, seq_len, pad
        self.sequences = best_fit([len(conversation) for conversation in conversations], seq_len)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = np.full(self.seq_len, self.pad, np.int64)
        labels = np.full(self.seq_len, IGNORED, np.int64)
        positions = np.zeros(self.seq_len, np.int64)
        begin = 0
        for number in self.sequences[index]:
            conversation = self.conversations[number]
            end = begin + len(conversation)
            ids[begin:end] = conversation.tokens
            labels[begin:end] = np.where(conversation.answers, conversation.tokens, IGNORED)
            labels[begin] = IGNORED  # it would be the target of another conversation's last token
            positions[begin:end] = np.arange(end - begin)
            begin = end
        positions[begin:] = np.arange(self.seq_len - begin)
        arrays = {"input_ids": ids, "labels": labels, "position_ids": positions}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which items go into which bin: the longest first, each to where least room is left for it.

    "Best-fit decreasing", as for training sequences in arXiv 2404.10830. Equal lengths keep their order.

    Args:
        lengths: of items, none above ``room``.
        room: of every bin.

    Returns:
        Numbers of items by bin.
    """
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # bins by the room left in them
    rooms: list[int] = []  # of those, sorted
    for item in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        place = bisect_left(rooms, lengths[item])
        if place == len(rooms):
            left, found = room, len(bins)
            bins.append([])
        else:
            left = rooms[place]
            found = with_room[left].pop()
            if not with_room[left]:
                del with_room[left], rooms[place]
        bins[found].append(item)
        left -= lengths[item]
        if left not in with_room:
            with_room[left] = []
            insort(rooms, left)
        with_room[left].append(found)
    return bins
