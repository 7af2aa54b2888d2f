"""A key as 24 words to write down: BIP-39's English list, whose last word checks the others."""

from __future__ import annotations

from mnemonic import Mnemonic

from swarm.errors import KeyFileError
from swarm.identity import Identity

WORDS = 24
HINT = "give the 24 words of `swarm identity backup --words`, in their order"


def to_words(identity: Identity) -> list[str]:
    """The words that stand for the key. Whoever reads them has it."""
    return str(Mnemonic("english").to_mnemonic(identity.seed)).split()


def from_words(text: str) -> Identity:
    """The key that the words stand for; numbers, capitals and line breaks don't matter. Raises `KeyFileError`."""
    words = [word for word in text.lower().replace(".", " ").split() if not word.isdigit()]
    if len(words) != WORDS:
        raise KeyFileError(f"{len(words)} words instead of {WORDS}", HINT)
    mnemonic = Mnemonic("english")
    unknown = [str(place) for place, word in enumerate(words, 1) if word not in mnemonic.wordlist]
    if unknown:
        raise KeyFileError(f"no such word at place {', '.join(unknown)}", HINT)
    if not mnemonic.check(" ".join(words)):
        raise KeyFileError("the words don't belong together: one is wrong or at the wrong place", HINT)
    return Identity.from_seed(bytes(mnemonic.to_entropy(words)))
