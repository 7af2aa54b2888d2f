"""A key as words: written down and typed in again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import KeyFileError
from swarm.identity import Identity
from swarm.words import WORDS, from_words, to_words

ZEROS = "abandon " * 23 + "art"  # BIP-39's own test vector


@given(st.binary(min_size=32, max_size=32))
def test_words_bring_the_key_back(seed: bytes) -> None:
    """24 words stand for every key, however they are typed."""
    identity = Identity.from_seed(seed)
    words = to_words(identity)
    assert len(words) == WORDS
    typed = "\n".join(f"{place}. {word.upper()}" for place, word in enumerate(words, 1))
    assert from_words(typed).peer_id == identity.peer_id


def test_they_are_the_words_of_bip_39() -> None:
    """The published vector, so that other tools read them too."""
    assert to_words(Identity.from_seed(bytes(32))) == ZEROS.split()


@pytest.mark.parametrize(
    "text", ["", "abandon " * 24, ZEROS.replace("art", "zoo"), ZEROS.replace("art", "swarm"), ZEROS + " art", "art " + ZEROS[8:]]
)
def test_mistakes_are_told(text: str) -> None:
    """A missing, unknown, wrong or exchanged word is noticed."""
    with pytest.raises(KeyFileError):
        from_words(text)
