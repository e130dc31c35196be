"""Folders as on the hub: a tiny model, and a tokenizer with a chat template, made here."""

import json
import random
from pathlib import Path

import tokenizers
import torch
import transformers

from tests.hf.families import config_of, model_of

WORDS = ["one", "two", "three", "four", "five", "six", "red", "green", "blue", "old", "new", "cat", "dog", "tree"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer_of(template: str | None = CHATML):
    """Byte-level byte pairs of a few words."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    texts = [" ".join(WORDS), "user assistant system \n"]
    bpe.train_from_iterator(texts * 3, vocab_size=330, special_tokens=special, show_progress=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", chat_template=template
    )


def save_folder(folder: Path, family: str = "qwen3_moe", *, template: str | None = CHATML, **changes) -> Path:
    """A model of a family with the vocabulary of the tokenizer, in several files."""
    tokenizer = tokenizer_of(template)
    config = config_of(family)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "eos_token_id": 0, **changes}
    for name, value in sizes.items():
        setattr(config, name, value)
    model_of(family, "eager", torch.float32, config=config).save_pretrained(folder, max_shard_size="100KB")
    tokenizer.save_pretrained(folder)
    return folder


def conversation(rng: random.Random, turns: int = 1) -> dict[str, list[dict[str, str]]]:
    """Questions and answers of a few words."""

    def text(most):
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    messages = []
    for _ in range(turns):
        messages += [{"role": "user", "content": text(8)}, {"role": "assistant", "content": text(5)}]
    return {"messages": messages}


def write_conversations(path: Path, number: int) -> Path:
    """Of one or two turns each."""
    rng = random.Random(0)
    lines = [json.dumps(conversation(rng, turns=1 + n % 2)) for n in range(number)]
    path.write_text("\n".join(lines) + "\n")
    return path
