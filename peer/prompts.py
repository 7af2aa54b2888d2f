"""What samples are generated from: texts to go on from, and chats to answer; one a row, marked as in `peer.marks`.

A prompt travels through `peer.documents` as one line of JSON, so that copies meet: a text, or a list of messages.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from tokenizers import Tokenizer

from peer.chats import Format, Message, messages_of
from peer.data import Indices, ShardReader, sample_indices
from peer.documents import Counts, Record
from peer.marks import MAX_ID, STARTS, Values, marked
from swarm.errors import DataInvalid

FORMS = "prompt, question, messages, or conversations"
EVERYBODY = ""
"""In whose name prompts are drawn: samples are numbered over the whole run, whoever writes them."""

Ids = NDArray[np.int64]


def read_prompts(records: Iterable[Record], counts: Counts) -> Iterator[str]:
    """The prompts in records, each as one line of JSON; empty ones are counted.

    `prompt` is a text to go on from, `question` what a user says; of a chat the last answer is left out. Raises `DataInvalid`,
    with the place, for what is no prompt.
    """
    for place, record in records:
        try:
            prompt = _prompt_of(record)
        except (KeyError, TypeError, ValueError) as error:
            hint = f"a prompt has {FORMS}: see docs/recipes/synthetic.md"
            raise DataInvalid(f"{place} is no prompt: {error}", hint) from error
        if not prompt:
            counts.empty += 1
            continue
        text = json.dumps(prompt, ensure_ascii=False, sort_keys=True)
        counts.documents += 1
        counts.bytes_read += len(text.encode())
        yield text


def _prompt_of(record: Mapping[str, Any]) -> str | list[Message]:
    """A text, or messages that end with one that isn't the assistant's; empty where nothing is asked."""
    if isinstance(record.get("prompt"), str):
        text: str = record["prompt"]
        return text if text.strip() else ""
    if record.get("question") is not None:
        record = {**record, "answer": record.get("answer") or ""}
    messages = messages_of(record)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return messages if any(message["role"] == "user" and message["content"].strip() for message in messages) else ""


def is_chat(prompt: str) -> bool:
    """Whether a line of `read_prompts` is a chat."""
    return prompt.startswith("[")


def texts_of_prompts(prompts: Iterable[str]) -> Iterator[str]:
    """What is said in them, to train a tokenizer on."""
    for prompt in map(json.loads, prompts):
        yield from [prompt] if isinstance(prompt, str) else (message["content"] for message in prompt)


def encoded_prompts(
    prompts: Iterable[str], tokenizer: Tokenizer, chats: Format | None, longest: int, counts: Counts
) -> Iterator[Values]:
    """Each prompt's marked values, [tokens]; those of more than `longest` tokens are left out and counted.

    Raises `DataInvalid` for a chat template that is none.
    """
    render = chats.renderer() if chats is not None else None
    for prompt in map(json.loads, prompts):
        try:
            text = render(prompt, True) if render is not None and not isinstance(prompt, str) else prompt
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise DataInvalid(f"the chat template fails: {error}", "another one is taken with --chat-template FILE") from error
        ids = np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)
        if not 0 < ids.size <= longest:
            counts.too_long += 1
            continue
        yield marked(ids, np.zeros(ids.size, dtype=np.bool_))


def prompt_in(row: Values) -> Ids:
    """The prompt in a row of marked values, [tokens]: what stands before the second document."""
    starts = np.flatnonzero(row & STARTS)
    end = int(starts[1]) if starts.size > 1 else row.size
    return row[:end] & MAX_ID


class Prompts:
    """A run's prompts: sample `index` of the run goes on from one of them, each in turn in an order that the run's key gives."""

    def __init__(self, reader: ShardReader, order_key: str, samples_per_prompt: int) -> None:
        self._reader, self._order_key = reader, order_key
        self.samples = len(reader) * samples_per_prompt

    def places(self, first: int, count: int) -> Indices:
        """Which prompts the samples from `first` on go on from, [count]."""
        return sample_indices(self._order_key, 0, EVERYBODY, first, count, len(self._reader))

    def of(self, first: int, count: int) -> list[Ids]:
        """The prompts of `count` samples from `first` on. Raises `DataInvalid` for an unknown token."""
        rows = self._reader.batch(self.places(first, count)).numpy()
        return [prompt_in(row) for row in rows]
