"""Chats for supervised fine-tuning: reading them from files, and their tokens, of which those count that the assistant says.

A chat travels through `peer.documents` as one line of JSON, a list of messages, so that copies meet. Templates are Jinja in
transformers' sandbox; only a run's owner renders them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from jinja2 import TemplateError
from numpy.typing import NDArray
from tokenizers import Tokenizer

from peer.corpus import END_OF_TEXT
from peer.documents import Counts, Record
from peer.marks import Values, marked
from swarm.errors import DataInvalid

MARKERS = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""How chats become text where the tokenizer brings no template."""
TEMPLATE_FILE, SETTINGS_FILE = "chat_template.jinja", "tokenizer_config.json"
SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
THINKING = "<think>\n{}\n</think>\n\n{}"
FORMS = "messages, conversations, prompt and response, or question and answer"

Message = dict[str, str]


@dataclass(frozen=True)
class Format:
    """How chats become tokens."""

    tokenizer: Tokenizer
    template: str
    special: Mapping[str, str] = field(default_factory=dict)

    def renderer(self) -> Callable[[list[Message], bool], str]:
        """What writes messages as text, with or without what asks the assistant to go on."""
        fast: Any = transformers.PreTrainedTokenizerFast(tokenizer_object=self.tokenizer, **self.special)
        fast.chat_template = self.template
        return lambda messages, ask: fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)

    def documents(self, chats: Iterable[str], longest: int, counts: Counts) -> Iterator[Values]:
        """Each chat's marked values, [tokens].

        Those of more than `longest` tokens are left out, and those whose beginning the template writes unlike in the whole.
        Raises `DataInvalid` for a template that is none.
        """
        render = self.renderer()
        for chat in chats:
            pieces = _pieces(json.loads(chat), render)
            if pieces is None:
                counts.not_split += 1
                continue
            values = self._values(pieces)
            if values.size > longest:
                counts.too_long += 1
                continue
            yield values

    def _values(self, pieces: list[tuple[str, bool]]) -> Values:
        encoded = self.tokenizer.encode_batch([text for text, _ in pieces], add_special_tokens=False)
        ids = np.concatenate([np.asarray(piece.ids, dtype=np.int64) for piece in encoded])
        said: NDArray[np.bool_] = np.repeat([says for _, says in pieces], [len(piece.ids) for piece in encoded])
        return marked(ids, said)


def _pieces(messages: list[Message], render: Callable[[list[Message], bool], str]) -> list[tuple[str, bool]] | None:
    """The chat's text in pieces, each with whether the assistant says it; None where its beginning isn't that of the whole."""
    try:
        whole = render(messages, False)
        said = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        spans = [(render(messages[:index], True), render(messages[: index + 1], False)) for index in said]
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise DataInvalid(f"the chat template fails: {error}", "another one is taken with --chat-template FILE") from error
    pieces, done = [], 0
    for before, after in spans:
        if not (whole.startswith(after) and after.startswith(before) and done <= len(before)):
            return None
        end = len(after.rstrip())
        pieces += [(whole[done : len(before)], False), (whole[len(before) : end], True)]
        done = end
    return [piece for piece in (*pieces, (whole[done:], False)) if piece[0]]


def format_of(tokenizer: Tokenizer, path: Path | None, template: Path | None) -> Format:
    """How to write chats for a tokenizer that lies at `path`, or that was made here.

    `template` names a file; else it is the tokenizer's own, in files beside it, else ChatML, for which a tokenizer made here gets
    the markers. Raises `DataInvalid` where a given tokenizer has no template and lacks the markers.
    """
    settings = _settings(path)
    if template is not None:
        return Format(tokenizer, _text(template), _special(settings))
    own = path.with_name(TEMPLATE_FILE) if path is not None else None
    if own is not None and own.is_file():
        return Format(tokenizer, _text(own), _special(settings))
    if isinstance(settings.get("chat_template"), str):
        return Format(tokenizer, settings["chat_template"], _special(settings))
    if path is None:
        tokenizer.add_special_tokens(list(MARKERS))
    missing = [marker for marker in MARKERS if tokenizer.token_to_id(marker) is None]
    if missing:
        hint = f"put {TEMPLATE_FILE} or {SETTINGS_FILE} beside it, or name a template with --chat-template FILE"
        raise DataInvalid(f"the tokenizer has no chat template, and no {' or '.join(missing)} for ChatML", hint)
    return Format(tokenizer, CHATML, _special(settings))


def _settings(path: Path | None) -> dict[str, Any]:
    beside = path.with_name(SETTINGS_FILE) if path is not None else None
    if beside is None or not beside.is_file():
        return {}
    try:
        values = json.loads(beside.read_bytes())
    except (OSError, ValueError) as error:
        raise DataInvalid(f"{beside} is no JSON: {error}") from error
    return values if isinstance(values, dict) else {}


def _special(settings: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that templates refer to by name."""
    found = {name: settings.get(name) for name in SPECIAL_NAMES}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    return {"eos_token": END_OF_TEXT} | {name: text for name, text in texts.items() if isinstance(text, str)}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataInvalid(f"{path} is no template: {error}") from error


def read_chats(records: Iterable[Record], counts: Counts) -> Iterator[str]:
    """The chats in records, each as one line of JSON; those without an answer are counted as empty.

    Raises `DataInvalid`, with the place, for what is no chat.
    """
    for place, record in records:
        try:
            messages = messages_of(record)
        except (KeyError, TypeError, ValueError) as error:
            raise DataInvalid(f"{place} is no chat: {error}", f"a chat has {FORMS}: see docs/recipes/sft.md") from error
        if not is_answered(messages):
            counts.empty += 1
            continue
        text = json.dumps(messages, ensure_ascii=False, sort_keys=True)
        counts.documents += 1
        counts.bytes_read += len(text.encode())
        yield text


def is_answered(messages: list[Message]) -> bool:
    """Whether somebody asks, and the assistant says something after it; each time that it speaks."""
    roles = [message["role"] for message in messages]
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    return "user" in roles and bool(answers) and all(map(str.strip, answers)) and roles.index("user") < roles.index("assistant")


def messages_of(record: Mapping[str, Any]) -> list[Message]:
    """A record's messages, of whichever form. Raises `KeyError`, `TypeError` or `ValueError` for one that is no chat."""
    for name, read in READERS.items():
        if record.get(name) is not None:
            return read(record)
    raise ValueError(f"it has none of {FORMS}")


def _listed(record: Mapping[str, Any], *, under: str, role: str, content: str) -> list[Message]:
    said = record[under]
    if not isinstance(said, list) or not said:
        raise TypeError(f"{under} is no list of messages")
    return [*_system(record), *(_message(item[role], item[content]) for item in said)]


def _asked(record: Mapping[str, Any], *, question: str, answer: str) -> list[Message]:
    thinking = record.get("thinking") or ""
    content = THINKING.format(_string(thinking).strip(), _string(record[answer]).strip()) if thinking else record[answer]
    return [*_system(record), _message("user", record[question]), _message("assistant", content if _said(record[answer]) else "")]


def _said(answer: Any) -> bool:
    return bool(_string(answer).strip())


def _system(record: Mapping[str, Any]) -> list[Message]:
    return [_message("system", record["system"])] if record.get("system") else []


def _message(role: Any, content: Any) -> Message:
    if role not in ROLES:
        raise ValueError(f"unknown role {role!r}")
    return {"role": ROLES[role], "content": _string(content)}


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]!r} is no text")
    return value


def texts_in(chats: Iterable[str]) -> Iterator[str]:
    """What is said in chats, to train a tokenizer on."""
    return (message["content"] for chat in chats for message in json.loads(chat))


def asked_in(chat: str) -> str:
    """What a chat begins with, up to the first answer: chats that share it belong on the same side of the held-out split."""
    messages = json.loads(chat)
    first = next(index for index, message in enumerate(messages) if message["role"] == "assistant")
    return json.dumps(messages[:first], ensure_ascii=False)


READERS: dict[str, Callable[[Mapping[str, Any]], list[Message]]] = {
    "messages": partial(_listed, under="messages", role="role", content="content"),
    "conversations": partial(_listed, under="conversations", role="from", content="value"),
    "prompt": partial(_asked, question="prompt", answer="response"),
    "question": partial(_asked, question="question", answer="answer"),
}
