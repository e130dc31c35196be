"""Corpora: splits, manifests, tokens, and what the sources say when something is missing."""

import hashlib
import json
import math
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from lightning_swiftmoe.data import FileSource, HuggingFaceSource, StdlibSource, TextData
from lightning_swiftmoe.data.corpus import encode_bytes, join_tokens, manifest, read_documents, unigram_entropy
from lightning_swiftmoe.data.corpus_data import write_manifest
from lightning_swiftmoe.data.text import train_bpe


@dataclass(frozen=True)
class Texts:
    """Documents given by the test."""

    texts: tuple[str, ...]

    def documents(self):
        for number, text in enumerate(self.texts):
            yield f"{number}.txt", text.encode()


MANY = Texts(tuple(f"document {number}\n" * 3 for number in range(1000)))


def test_splits_follow_from_the_content_alone():
    forward = {d.content: d.split for d in read_documents(MANY)}
    backward = {d.content: d.split for d in read_documents(Texts(MANY.texts[::-2]))}
    assert all(forward[content] == split for content, split in backward.items())
    sizes = [list(forward.values()).count(split) for split in ("train", "val", "test")]
    assert sizes == pytest.approx([900, 50, 50], abs=25)


def test_splits_are_those_of_every_other_machine():
    """Pinned: a change here makes every earlier result incomparable."""
    texts = ("alpha", "x1", "beta")
    assert [d.split for d in read_documents(Texts(texts))] == [by_hash(text) for text in texts]
    assert [by_hash(text) for text in texts] == ["train", "val", "test"]


def by_hash(text):
    share = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32
    return "train" if share < 0.9 else "val" if share < 0.95 else "test"


def test_a_copy_stays_with_its_original():
    first, _, copy = read_documents(Texts(("beta", "alpha", "beta")))
    assert first.split == copy.split


def test_every_document_in_exactly_one_split():
    documents = read_documents(MANY)
    parts = [bytes(join_tokens(documents, split, encode_bytes)).decode() for split in ("train", "val", "test")]
    lines = [line for part in parts for line in part.splitlines()]
    assert sorted(lines) == sorted(line for text in MANY.texts for line in text.splitlines())


def test_manifest(tmp_path):
    data = TextData(Texts(("alpha", "beta")), seq_len=2)
    write_manifest(data, tmp_path / "manifest.json")
    found = json.loads((tmp_path / "manifest.json").read_text())
    assert (found["num_files"], found["num_bytes"]) == (2, 9)
    alpha = hashlib.sha256(b"alpha").hexdigest()
    assert found["files"][0] == {"name": "0.txt", "num_bytes": 5, "sha256": alpha, "split": "train"}
    assert found["sha256"] == hashlib.sha256((alpha + hashlib.sha256(b"beta").hexdigest()).encode()).hexdigest()
    for other in (("alpha", "betA"), ("alpha",), ("beta", "alpha")):
        assert manifest(read_documents(Texts(other)))["sha256"] != found["sha256"]


@pytest.mark.parametrize(
    ("text", "nats"),
    [
        (b"aaaa", 0.0),
        (b"abab", math.log(2)),
        (b"aaab", 0.75 * math.log(4 / 3) + 0.25 * math.log(4)),
        (bytes(range(256)), math.log(256)),
    ],
)
def test_unigram_entropy(text, nats):
    assert unigram_entropy(encode_bytes(text)) == pytest.approx(nats)


def test_limit_cuts_every_split():
    whole, cut = TextData(MANY, seq_len=4), TextData(MANY, seq_len=4, limit_bytes=100)
    for split in ("train", "val", "test"):
        assert np.array_equal(cut.tokens(split), whole.tokens(split)[:100])


def test_stdlib_is_real_and_has_no_tests_in_it():
    documents = list(StdlibSource().documents())
    names = [name for name, _ in documents]
    assert {"os.py", "json/decoder.py", "asyncio/base_events.py"} <= set(names)
    assert names == sorted(names, key=lambda name: name.split("/"))
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert sum(len(content) for _, content in documents) > 5_000_000


# -- sources of the user's ---------------------------------------------------------------------------------------------


def test_files_and_folders(tmp_path):
    (tmp_path / "book").mkdir()
    for name, text in {"book/b.txt": "b", "book/a.txt": "a", "book/skip.md": "m", "note.md": "n"}.items():
        (tmp_path / name).write_text(text)
    paths = [str(tmp_path / "note.md"), str(tmp_path / "book")]
    assert [content for _, content in FileSource(paths).documents()] == [b"n", b"a", b"b"]
    assert [content for _, content in FileSource(paths, pattern="*.md").documents()] == [b"n", b"m"]


def test_no_paths():
    with pytest.raises(ValueError, match=r"data=text needs data\.source\.paths="):
        read_documents(FileSource([]))


def test_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is no file, and no folder with files like '\*\.txt'"):
        read_documents(FileSource([str(tmp_path / "nowhere")]))


def test_a_folder_without_such_files(tmp_path):
    with pytest.raises(ValueError, match=r"no folder with files like '\*\.rst'"):
        read_documents(FileSource([str(tmp_path)], pattern="*.rst"))


def test_an_empty_source():
    with pytest.raises(ValueError, match="has no documents"):
        read_documents(Texts(()))


def test_hugging_face_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-swiftmoe\[hf\]'"):
        read_documents(HuggingFaceSource("cais/mmlu"))


def test_hugging_face_rows(monkeypatch):
    def load_dataset(name, config, split):
        assert (name, config, split) == ("some/set", "all", "train")
        return [{"question": "why?", "answer": 3, "hint": "so"}, {"question": "how?", "answer": 1, "hint": "thus"}]

    monkeypatch.setitem(sys.modules, "datasets", type("datasets", (), {"load_dataset": staticmethod(load_dataset)}))
    assert [c for _, c in HuggingFaceSource("some/set", "all").documents()] == [b"why?\nso", b"how?\nthus"]
    one = HuggingFaceSource("some/set", "all", column="hint")
    assert list(one.documents()) == [("some/set/0", b"so"), ("some/set/1", b"thus")]


# -- byte pairs --------------------------------------------------------------------------------------------------------


def test_bpe_round_trip():
    tokenizers = pytest.importorskip("tokenizers")
    documents = read_documents(MANY)
    encode = train_bpe(documents, 300)
    same = tokenizers.ByteLevelBPETokenizer()
    train_texts = [d.content.decode() for d in documents if d.split == "train"]
    same.train_from_iterator(train_texts, vocab_size=300, show_progress=False)
    for text in ("document 7\n", "Größe: 5 µm → ∞\t🙂", "def f(x):\n    return x\n"):
        tokens = encode(text.encode())
        assert same.decode(tokens.tolist()) == text
        assert tokens.max() < 300
        assert tokens.dtype == np.uint16
    assert encode(MANY.texts[0].encode()).size < len(MANY.texts[0]) / 2


def test_bpe_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-swiftmoe\[bpe\]'"):
        train_bpe(read_documents(MANY), 300)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenizer": "words"}, "tokenizer must be bytes or bpe, or a folder that has one, got 'words'"),
        ({"vocab_size": 300}, "byte tokens have a vocab_size of 256, got 300; set tokenizer=bpe"),
        ({"tokenizer": "bpe", "vocab_size": 100}, "a byte-level BPE has a vocab_size of at least 256, got 100"),
        ({"seq_len": 0}, "must be positive, got 0"),
        ({"batch_size": -4}, "must be positive, got .* -4"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TextData(MANY, **arguments)
