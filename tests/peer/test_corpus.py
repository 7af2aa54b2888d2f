"""Making tokenizers and shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from peer.corpus import (
    ENDS_OF_TEXT,
    build_marked_shards,
    build_shards,
    byte_level_tokenizer,
    encode_bytes,
    encode_documents,
    end_of_text_id,
    is_held_out,
    load_tokenizer,
    save_tokenizer,
    split_documents,
    standard_library_documents,
    train_bpe_tokenizer,
)
from peer.data import ShardReader, tree_path, verify_tree_file
from peer.marks import NO_LOSS, STARTS, marked, token_ids
from swarm.errors import DataInvalid


@given(st.lists(st.text(max_size=40), max_size=5))
@settings(max_examples=60, deadline=None)
def test_byte_level_ids_are_the_bytes_themselves(documents: list[str]) -> None:
    """The fast path equals the tokenizer for any text, and decoding gives the text back."""
    tokenizer = byte_level_tokenizer()
    ids = list(encode_documents(tokenizer, documents))
    assert ids == [document.tolist() for document in encode_bytes(documents)]
    assert [tokenizer.decode(item) for item in ids] == documents


def test_a_byte_level_tokenizer_has_256_bytes_and_an_end() -> None:
    """The vocabulary is 257 ids, the last one the end of a text."""
    tokenizer = byte_level_tokenizer()
    assert tokenizer.get_vocab_size() == 257
    assert end_of_text_id(tokenizer) == 256


def test_a_saved_tokenizer_loads_in_transformers(tmp_path: Path) -> None:
    """The file is named by its root and gives the same ids through transformers."""
    tree = save_tokenizer(byte_level_tokenizer(), tmp_path)
    path = tree_path(tmp_path, tree)
    verify_tree_file(path, tree)
    tokenizer = load_tokenizer(path)
    assert tokenizer("né")["input_ids"] == list("né".encode())
    assert tokenizer.eos_token_id == 256
    assert [item.name for item in tmp_path.iterdir()] == [tree.root]


def test_a_trained_tokenizer_merges_and_round_trips() -> None:
    """BPE makes text shorter, keeps every byte, and has the size asked for."""
    documents = [f"the quick brown fox {number} jumps" for number in range(50)]
    tokenizer = train_bpe_tokenizer(documents, 300)
    ids = next(encode_documents(tokenizer, ["the quick brown fox ☃"]))
    assert len(ids) < len("the quick brown fox ☃".encode())
    assert tokenizer.decode(ids) == "the quick brown fox ☃"
    assert tokenizer.get_vocab_size() <= 300
    assert end_of_text_id(tokenizer) < 300


@pytest.mark.parametrize("content", [b"not json", b"{}", b"\xff\xfe", b'{"model": {"type": "no such"}}'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes) -> None:
    """Nonsense instead of a tokenizer is invalid data."""
    path = tmp_path / "tokenizer"
    path.write_bytes(content)
    with pytest.raises(DataInvalid, match="not a tokenizer"):
        load_tokenizer(path)


def test_documents_are_packed_with_an_end_between_them(tmp_path: Path) -> None:
    """Rows follow one another through the documents; an incomplete last row is dropped."""
    documents = [[1, 2, 3], list(range(10, 20)), [4] * 20]
    shards = build_shards(documents, tmp_path, sequence_length=8, end_of_text=99, vocabulary_size=100, samples_per_shard=2)
    reader = ShardReader.open(shards, tmp_path, 8, 100)
    stream = [1, 2, 3, 99, *range(10, 20), 99, *[4] * 20, 99]
    assert [shard.samples for shard in shards] == [2, 2]
    assert reader.batch(range(4)).flatten().tolist() == stream[:36]


@given(st.lists(st.lists(st.integers(0, 98), max_size=30), min_size=1, max_size=8), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_no_token_is_lost_or_moved_by_sharding(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], per_shard: int
) -> None:
    """Whatever the shard size, the rows are the packed stream."""
    stream = [token for document in documents for token in (*document, 99)]
    directory = tmp_path_factory.mktemp("shards")
    if len(stream) < 9:
        with pytest.raises(DataInvalid, match="don't fill one row"):
            build_shards(documents, directory, sequence_length=8, end_of_text=99, vocabulary_size=100)
        return
    shards = build_shards(
        documents, directory, sequence_length=8, end_of_text=99, vocabulary_size=100, samples_per_shard=per_shard
    )
    rows = ShardReader.open(shards, directory, 8, 100).batch(range(len(stream) // 9))
    assert rows.flatten().tolist() == stream[: len(stream) // 9 * 9]


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    """An id above 65535 survives."""
    document = np.full(20, 70_000)
    shards = build_shards([document], tmp_path, sequence_length=8, end_of_text=1, vocabulary_size=80_000)
    assert shards[0].token_bytes == 4
    assert ShardReader.open(shards, tmp_path, 8, 80_000).sample(0).tolist() == [70_000] * 9


@pytest.mark.parametrize("token", [-1, 100])
def test_an_id_outside_the_vocabulary_isnt_written(tmp_path: Path, token: int) -> None:
    """A wrong tokenizer shows when shards are made, not when volunteers train."""
    with pytest.raises(DataInvalid, match="outside the vocabulary"):
        build_shards([[token] * 20], tmp_path, sequence_length=8, end_of_text=99, vocabulary_size=100)


def test_the_held_out_split_depends_on_content_only() -> None:
    """Copies of a document fall on the same side, and about the asked share is held out."""
    documents = [f"document {number}" for number in range(2000)]
    train, validation = split_documents([*documents, *documents], 0.1)
    assert not set(train) & set(validation)
    assert 120 < len(set(validation)) < 280
    assert all(is_held_out(document, 0.1) for document in validation)


def test_the_standard_library_is_read_in_order_and_bounded(tmp_path: Path) -> None:
    """Files come by name as long as they fit; installed packages and tests are left out, undecodable files skipped."""
    for name, content in {
        "b.py": b"bb",
        "a/z.py": b"az",
        "a/bad.py": b"\xff",
        "c.py": b"ccc",
        "test/t.py": b"tt",
        "site-packages/s.py": b"ss",
        "notes.txt": b"no",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert list(standard_library_documents(100, root=tmp_path)) == ["az", "bb", "ccc"]
    assert list(standard_library_documents(5, root=tmp_path)) == ["az", "bb"]
    assert list(standard_library_documents(6, root=tmp_path)) == ["az", "bb"]
    assert list(standard_library_documents(100, tests=True, root=tmp_path)) == ["az", "bb", "ccc", "tt"]


def test_the_real_standard_library_gives_source() -> None:
    """The default root is this Python's own library."""
    documents = list(standard_library_documents(200_000))
    assert 100_000 < sum(len(document.encode()) for document in documents) <= 200_000
    assert any("import" in document for document in documents)


def test_marked_documents_are_packed_whole(tmp_path: Path) -> None:
    """In order, as many as fit into a row; what is left of it has no loss."""
    sizes = [4, 4, 5, 9, 2]
    documents = [marked(np.full(size, size), np.ones(size, dtype=bool)) for size in sizes]
    shards, counted = build_marked_shards(documents, tmp_path, sequence_length=8, end_of_text=99, samples_per_shard=3)
    rows = ShardReader.open(shards, tmp_path, 8, 100, "marked").batch(range(4)).numpy()
    assert [shard.samples for shard in shards] == [3, 1]
    assert token_ids(rows).tolist() == [[4] * 8 + [99], [5] * 5 + [99] * 4, [9] * 9, [2, 2] + [99] * 7]
    assert (rows & STARTS != 0).nonzero()[1].tolist() == [0, 4, 8, 0, 5, 0, 0, 2]
    assert counted == sum(size - 1 for size in sizes) == int((rows[:, 1:] & NO_LOSS == 0).sum())


def test_marked_documents_that_give_no_row(tmp_path: Path) -> None:
    """None at all, none that counts, and one that is too long for whoever forgot to look."""
    silent = marked(np.arange(3), np.zeros(3, dtype=bool))
    for documents in ([], [silent]):
        with pytest.raises(DataInvalid, match="no document"):
            build_marked_shards(documents, tmp_path, sequence_length=8, end_of_text=99)
    with pytest.raises(ValueError, match="fit"):
        build_marked_shards([marked(np.arange(10), np.ones(10, dtype=bool))], tmp_path, sequence_length=8, end_of_text=99)


@pytest.mark.parametrize("name", ENDS_OF_TEXT)
def test_what_ends_a_text_is_found_under_its_usual_names(tmp_path: Path, name: str) -> None:
    """Pretrained tokenizers call it differently; one without such a token is refused."""
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    with pytest.raises(DataInvalid, match="none of"):
        end_of_text_id(tokenizer)
    tokenizer.add_special_tokens([name])
    assert end_of_text_id(tokenizer) == 2
    assert load_tokenizer(tree_path(tmp_path, save_tokenizer(tokenizer, tmp_path))).eos_token == name
