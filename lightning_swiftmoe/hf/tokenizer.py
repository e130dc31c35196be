"""The tokenizer in the folder of a model: documents and conversations as tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_swiftmoe.hf._transformers import AutoTokenizer

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json", "*.tiktoken")
_GENERATION = re.compile(r"\{%-?\s*generation\b")  # templates that say themselves what a model answers


class FolderTokenizer:
    """Of one folder. Nothing is downloaded.

    Args:
        folder: with a ``tokenizer.json``.

    Attributes:
        vocab_size: one more than the largest token.
        pad: token to fill sequences with; nobody is trained on it.

    Raises:
        ValueError: there is none that transformers reads, or one without an end-of-sequence token.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"tokenizer = {folder} is no folder: give one with the tokenizer files of a model")
        if not any(file for name in VOCABULARIES for file in self.folder.glob(name)):
            # transformers would make one without a word.
            raise ValueError(f"{folder} has no tokenizer: none of {', '.join(VOCABULARIES)} is there")
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} has no tokenizer that transformers reads: {_first_line(error)}") from error
        self._encoder: Any = getattr(self._tokenizer, "backend_tokenizer", None)
        if self._encoder is None:
            raise ValueError(f"{folder} has a tokenizer without a tokenizer.json, which says where tokens begin")
        self._encoder.no_truncation()
        self._encoder.no_padding()
        self.eos = self._tokenizer.eos_token_id
        if self.eos is None:
            raise ValueError(f"the tokenizer of {folder} has no eos_token, to end documents: name one in its config")
        self.pad = self.eos if self._tokenizer.pad_token_id is None else self._tokenizer.pad_token_id
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values())

    def encode_document(self, content: bytes) -> NDArray[Any]:
        """uint16 or uint32 tokens of a text, and the token that ends it; nothing is put in front."""
        ids = self._encoder.encode(content.decode(errors="replace"), add_special_tokens=False).ids
        return np.array([*ids, self.eos], dtype=np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def encode_conversation(
        self, messages: Sequence[dict[str, Any]], tools: Any = None
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Tokens of a conversation as the folder's chat template writes it, and which of them a model answers.

        Answers are what the template writes of the assistant's turns behind its generation prompt, the token that ends
        a turn included. Where it says so itself, by ``{% generation %}``, they are that.

        Args:
            messages: ``{"role": ..., "content": ...}`` each.
            tools: what the template is told of them.

        Returns:
            ``[n]`` int32 and ``[n]`` bool.

        Raises:
            ValueError: there is no template, it refuses the conversation, or answers cannot be told from the rest.
        """
        if self._tokenizer.chat_template is None:
            raise ValueError(f"the tokenizer of {self.folder} has no chat template: add a chat_template.jinja to it")
        messages = list(messages)
        if _GENERATION.search(str(self._tokenizer.get_chat_template())):
            options = {"return_dict": True, "return_assistant_tokens_mask": True}
            found = self._apply(messages, tools, tokenize=True, **options)
            return np.array(found["input_ids"], np.int32), np.array(found["assistant_masks"], np.bool_)
        text = self._apply(messages, tools)
        spans = [(0, 0)] + [  # the first is empty: nothing in front of an answer is one
            self._span_of_answer(messages, tools, number, text)
            for number, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        encoding = self._encoder.encode(text, add_special_tokens=False)
        starts, ends = np.array(spans).T
        begins = np.array([begin for begin, _ in encoding.offsets], np.int64)
        answers = begins < ends[np.searchsorted(starts, begins, side="right") - 1]
        return np.array(encoding.ids, np.int32), answers

    def _span_of_answer(self, messages: list[dict[str, Any]], tools: Any, number: int, text: str) -> tuple[int, int]:
        """Where an answer stands in the text of the whole conversation."""
        before = self._apply(messages[:number], tools, add_generation_prompt=True)
        as_last = self._apply(messages[: number + 1], tools)
        if text.startswith(before) and as_last.startswith(before):
            written, rest = as_last[len(before) :], text[len(before) :]
            last_word = (str(messages[number].get("content") or "").split() or [""])[-1]
            # Some templates put thoughts in front of the last answer, and leave them out of earlier ones.
            for first in range(len(written) - len(last_word)):
                if rest.startswith(written[first : first + 9]) and rest.startswith(written[first:]):
                    if last_word not in written[first:]:
                        break
                    return len(before), len(before) + len(written) - first
        raise ValueError(
            f"the chat template of {self.folder} writes turn {number + 1} otherwise once others follow, so that its "
            "answer cannot be found: mark answers in the template by {% generation %} and {% endgeneration %}"
        )

    def _apply(self, messages: list[dict[str, Any]], tools: Any, tokenize: bool = False, **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=tokenize, **options)
        except ImportError:
            raise
        except Exception as error:  # of jinja, or of whatever a template does to what it is given
            raise ValueError(f"the chat template of {self.folder} refuses it: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
