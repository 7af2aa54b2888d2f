"""Chats out of files, and which of their tokens count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peer.chats import CHATML, TEMPLATE_FILE, Format, asked_in, format_of, messages_of, read_chats, texts_in
from peer.corpus import END_OF_TEXT, TOKENIZER, byte_level_tokenizer
from peer.dataset import Plan, build
from peer.documents import Counts, Shuffled, read_records
from peer.marks import NO_LOSS, STARTS, token_ids
from swarm.errors import DataInvalid

HELLO = [{"role": "user", "content": "hi?"}, {"role": "assistant", "content": "hello"}]
TWO_TURNS = [*HELLO, {"role": "user", "content": "more?"}, {"role": "assistant", "content": "enough"}]


def chat(messages: list[dict[str, str]]) -> str:
    return json.dumps(messages)


def chatml() -> Format:
    return format_of(byte_level_tokenizer(), None, None)


def learned(form: Format, values: np.ndarray) -> str:
    """The text of the tokens that count."""
    ids = token_ids(values)[values & NO_LOSS == 0]
    return str(form.tokenizer.decode(ids.tolist(), skip_special_tokens=False))


def chats_in(paths: list[Path], counts: Counts) -> list[str]:
    """What is read from files."""
    return list(read_chats(read_records(paths, counts), counts))


def packed(form: Format, *chats: str, longest: int = 1000) -> tuple[list[np.ndarray], Counts]:
    counts = Counts()
    return list(form.documents(chats, longest, counts)), counts


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"messages": HELLO}, ["hi?", "hello"]),
        ({"conversations": [{"from": "human", "value": "hi?"}, {"from": "gpt", "value": "hello"}]}, ["hi?", "hello"]),
        ({"prompt": "hi?", "response": "hello", "system": "be kind"}, ["be kind", "hi?", "hello"]),
        ({"question": "1+1?", "answer": "2"}, ["1+1?", "2"]),
        ({"question": "1+1?", "thinking": " one more ", "answer": "2", "other": 5}, ["1+1?", "<think>\none more\n</think>\n\n2"]),
    ],
)
def test_chats_have_many_forms(record: dict[str, Any], said: list[str]) -> None:
    """All of them become the same messages."""
    found = messages_of(record)
    assert [message["content"] for message in found] == said
    assert [message["role"] for message in found][-2:] == ["user", "assistant"]


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "x"}',
        "[1]",
        "no json",
        '{"messages": "x"}',
        '{"messages": []}',
        '{"messages": [3]}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "owner", "content": "x"}]}',
        '{"messages": [{"role": [], "content": "x"}]}',
        '{"prompt": "x"}',
        '{"prompt": "x", "response": 3}',
        "[" * 100_000,
    ],
)
def test_a_line_that_is_no_chat_is_named(tmp_path: Path, line: str) -> None:
    """With its file and number."""
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": HELLO}) + "\n" + line + "\n")
    with pytest.raises(DataInvalid, match="line 2"):
        chats_in([path], Counts())


def test_chats_without_an_answer_are_counted(tmp_path: Path) -> None:
    """Blank answers, no answers, and answers before a question; files of other kinds are skipped."""
    path, other = tmp_path / "chats.jsonl", tmp_path / "notes.txt"
    other.write_text("nothing")
    records = [
        {"messages": HELLO},
        {"messages": HELLO[:1]},
        {"messages": HELLO[::-1]},
        {"prompt": "x", "response": " \n"},
        {"question": "x", "thinking": "long", "answer": ""},
    ]
    path.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    counts = Counts()
    assert [json.loads(text) for text in chats_in([path, other], counts)] == [HELLO]
    assert (counts.documents, counts.empty, counts.unreadable) == (1, 4, [str(other)])


def test_parquet_rows_are_chats(tmp_path: Path) -> None:
    """As data sets of chats are mostly published."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "chats.parquet"
    parquet.write_table(pyarrow.table({"messages": [HELLO, TWO_TURNS], "source": ["a", "b"]}), path)
    assert [json.loads(text) for text in chats_in([path], Counts())] == [HELLO, TWO_TURNS]
    parquet.write_table(pyarrow.table({"text": ["a"]}), path)
    with pytest.raises(DataInvalid, match="row 1"):
        chats_in([path], Counts())


def test_only_what_the_assistant_says_counts() -> None:
    """Each answer with its end token; neither questions nor what the template writes around them."""
    form = chatml()
    (values,), _ = packed(form, chat(TWO_TURNS))
    assert learned(form, values) == "hello<|im_end|>enough<|im_end|>"
    whole = form.tokenizer.decode(token_ids(values).tolist(), skip_special_tokens=False)
    assert whole.startswith("<|im_start|>user\nhi?<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n<|im_start|>user")
    assert np.flatnonzero(values & STARTS).tolist() == [0]


def test_long_chats_are_left_out_whole() -> None:
    """None is cut, and they are counted."""
    form = chatml()
    (values,), _ = packed(form, chat(HELLO))
    found, counts = packed(form, chat(HELLO), chat(TWO_TURNS), longest=values.size)
    assert [len(item) for item in found] == [values.size]
    assert counts.too_long == 1


def test_a_template_that_rewrites_what_was_said_before_is_noticed() -> None:
    """Such chats would teach what nobody sees when the model is used."""
    forgets = "{% for m in messages %}{{ m.content if loop.last else '-' }}\n{% endfor %}"
    found, counts = packed(Format(byte_level_tokenizer(), forgets), chat(TWO_TURNS))
    assert (found, counts.not_split) == ([], 1)


@pytest.mark.parametrize("template", ["{% for", "{{ messages.nothing.at.all }}", "{{ raise_exception('no') }}"])
def test_a_broken_template_is_named(template: str) -> None:
    """Whatever is wrong with it."""
    with pytest.raises(DataInvalid, match="template"):
        packed(Format(byte_level_tokenizer(), template), chat(HELLO))


def test_a_tokenizers_own_template_is_used(tmp_path: Path) -> None:
    """Of either file beside it, with its special tokens; a file that is named goes before."""
    path, tokenizer = tmp_path / "tokenizer.json", byte_level_tokenizer()
    own = "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}"
    own += "{% if add_generation_prompt %}a:{% endif %}"
    settings = {"chat_template": own, "bos_token": {"content": END_OF_TEXT}, "eos_token": END_OF_TEXT}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    form = format_of(tokenizer, path, None)
    (values,), _ = packed(form, chat(HELLO))
    assert form.tokenizer.decode(token_ids(values).tolist(), skip_special_tokens=False) == (
        f"{END_OF_TEXT}u:hi?{END_OF_TEXT}a:hello{END_OF_TEXT}"
    )
    assert learned(form, values) == f"hello{END_OF_TEXT}"
    (tmp_path / "chat_template.jinja").write_text(own.replace("a:", "A:"))
    assert "A:" in format_of(tokenizer, path, None).template
    (tmp_path / "other").write_text("{{ messages }}")
    assert format_of(tokenizer, path, tmp_path / "other").template == "{{ messages }}"
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text("no")
    with pytest.raises(DataInvalid, match="no JSON"):
        format_of(tokenizer, path, None)


def test_a_given_tokenizer_needs_the_markers(tmp_path: Path) -> None:
    """Its vocabulary is the model's, so none are added; with them ChatML does."""
    path, tokenizer = tmp_path / "tokenizer.json", byte_level_tokenizer()
    with pytest.raises(DataInvalid, match="no chat template") as caught:
        format_of(tokenizer, path, None)
    assert "--chat-template" in caught.value.hint
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    assert format_of(tokenizer, path, None).template == CHATML


def test_what_is_said_and_what_is_asked() -> None:
    """A tokenizer learns from what is said, and chats with the same question belong together."""
    assert list(texts_in([chat(HELLO)])) == ["hi?", "hello"]
    other = [HELLO[0], {"role": "assistant", "content": "go away"}]
    assert asked_in(chat(HELLO)) == asked_in(chat(other)) != asked_in(chat([{"role": "system", "content": "x"}, *HELLO]))


def test_prompts_take_the_template_in_a_tokenizers_folder(tmp_path: Path) -> None:
    """A tokenizer that is named by its folder has its template there, for prompts as for chats."""
    folder, template = tmp_path / "tokenizer", "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    folder.mkdir()
    byte_level_tokenizer().save(str(folder / TOKENIZER))
    (folder / TEMPLATE_FILE).write_text(template)
    asked = (json.dumps([{"content": f"what is {number}?", "role": "user"}]) for number in range(5))
    with Shuffled(asked, 0, tmp_path) as prompts:
        made = build(prompts, tmp_path / "data", Plan(str(folder), sequence_length=31, kind="prompts"), Counts())
    assert (made.data.chat_template, made.data.train_samples) == (template, 5)
