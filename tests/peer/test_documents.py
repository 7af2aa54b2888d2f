"""Texts out of files, without copies, in an order of their own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.documents import Counts, Shuffled, files_of, read_documents
from swarm.errors import DataInvalid


def texts_of(*sources: Path, field: str = "text") -> tuple[list[str], Counts]:
    """Everything that is read, and what was counted."""
    counts = Counts()
    return list(read_documents(files_of(sources), field, counts)), counts


def test_a_folder_is_read_whole_and_in_order(tmp_path: Path) -> None:
    """Files by name, folders within; hidden ones, empty ones and those that are no text are left out, the last two counted."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.txt").write_text("second")
    (tmp_path / "a.md").write_text("first: größer")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    texts, counts = texts_of(tmp_path)
    assert texts == ["first: größer", "second"]
    assert (counts.files, counts.documents, counts.empty) == (4, 2, 1)
    assert counts.unreadable == [str(tmp_path / "picture.png")]
    assert counts.bytes_read == sum(len(text.encode()) for text in texts)


def test_json_lines_have_a_text_each(tmp_path: Path) -> None:
    """Under any name; blank lines are none."""
    path = tmp_path / "texts.jsonl"
    path.write_text('{"body": "one"}\n\n{"body": "two", "other": 3}\n')
    assert texts_of(path, field="body")[0] == ["one", "two"]


@pytest.mark.parametrize("line", ['{"other": "x"}', '{"text": 3}', "[1]", "no json", '"text"'])
def test_a_line_without_text_is_named(tmp_path: Path, line: str) -> None:
    """With its file and number, and what could be done."""
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataInvalid, match="line 2") as caught:
        texts_of(path)
    assert "--field" in caught.value.hint


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    """Nulls are none; a column that isn't there is named."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "texts.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", None, "two"], "id": [1, 2, 3]}), path)
    assert texts_of(path)[0] == ["one", "two"]
    with pytest.raises(DataInvalid, match="body"):
        texts_of(path, field="body")
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(DataInvalid):
        texts_of(path)


def test_a_source_that_isnt_there(tmp_path: Path) -> None:
    """Named before anything is read."""
    with pytest.raises(DataInvalid, match="nowhere"):
        files_of([tmp_path / "nowhere"])


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1), max_size=60), st.integers(-5, 5), st.randoms())
def test_the_order_follows_from_contents_and_seed(texts: list[str], seed: int, random: object) -> None:
    """However they come, copies once, and the same as often as one looks."""

    def shuffled(given_texts: Sequence[str], given_seed: int) -> list[str]:
        with Shuffled(given_texts, given_seed) as documents:
            first, again = list(documents), list(documents)
            assert first == again
            assert documents.copies == len(given_texts) - len(set(given_texts))
        return first

    found = shuffled(texts, seed)
    random.shuffle(texts)  # type: ignore[attr-defined]
    assert shuffled(texts, seed) == found
    assert sorted(found) == sorted(set(texts))


def test_another_seed_is_another_order() -> None:
    """And nothing is left on disk."""
    texts = [json.dumps(number) for number in range(50)]
    with Shuffled(texts, 1) as one, Shuffled(texts, 2) as other:
        assert list(one) != list(other) != texts
        folder = Path(one._directory.name)
        assert folder.exists()
    assert not folder.exists()
