"""Data of several people for one run, some of which stays with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from peer.combining import combine
from peer.corpus import train_bpe_tokenizer
from peer.dataset import FILE, Dataset, Plan, build, read
from peer.documents import Counts, Shuffled
from swarm.errors import DataInvalid


def made_by(folder: Path, name: str, **plan: object) -> Dataset:
    """Somebody's data in a folder of their own."""
    texts = [f"{name} says {number}: " + " ".join(str(number * factor) for factor in range(60)) for number in range(30)]
    settings = Plan(**{"sequence_length": 32, "held_out": 0.3, "license": name, **plan})  # type: ignore[arg-type]
    with Shuffled(texts, 0, folder) as documents:
        return build(documents, folder / name, settings, Counts())


def test_private_shards_are_only_named(tmp_path: Path) -> None:
    """A description alone is enough for them; what is public is copied, and counts and licences are those of all."""
    anna, ben, club = [made_by(tmp_path, name, private=name != "club") for name in ("anna", "ben", "club")]
    sources = [tmp_path / "anna" / FILE, tmp_path / "ben" / FILE, tmp_path / "club"]
    for shard in (*anna.data.train, *ben.data.train):
        (tmp_path / ("anna" if shard in anna.data.train else "ben") / shard.root).unlink()
    made = combine(sources, tmp_path / "all")
    assert read(tmp_path / "all") == made
    assert made.data.train_samples == sum(part.data.train_samples for part in (anna, ben, club))
    assert made.data.license == "anna, ben, club"
    assert {tree.root for tree in made.data.private_trees} == {
        tree.root for part in (anna, ben) for tree in part.data.private_trees
    }
    roots = {made.tokenizer.root, *(tree.root for tree in club.data.trees)}
    assert {path.name for path in (tmp_path / "all").iterdir()} == {*roots, FILE, "README.md"}
    assert f"{anna.data.train_samples + ben.data.train_samples:,} of them private" in (tmp_path / "all/README.md").read_text()


def test_a_description_that_came_alone(tmp_path: Path) -> None:
    """Its tokenizer is named; it has to be the very one."""
    anna = made_by(tmp_path, "anna", private=True)
    sent = tmp_path / "sent.yaml"
    sent.write_bytes((tmp_path / "anna" / FILE).read_bytes())
    with pytest.raises(DataInvalid, match="none of the folders has") as caught:
        combine([sent], tmp_path / "all")
    assert "--tokenizer" in caught.value.hint
    assert combine([sent], tmp_path / "all", "bytes") == anna
    assert (tmp_path / "all" / anna.tokenizer.root).exists()


def test_what_does_not_fit_together_is_named(tmp_path: Path) -> None:
    """Another length of samples, the same shard twice, and a public shard without its file."""
    made_by(tmp_path, "anna")
    made_by(tmp_path, "ben", sequence_length=16)
    club = made_by(tmp_path, "club")
    with pytest.raises(DataInvalid, match="sequence length"):
        combine([tmp_path / "anna", tmp_path / "ben"], tmp_path / "all")
    with pytest.raises(DataInvalid, match="there twice"):
        combine([tmp_path / "anna", tmp_path / "anna" / FILE], tmp_path / "all")
    (tmp_path / "club" / club.data.train[0].root).unlink()
    with pytest.raises(DataInvalid, match="isn't private"):
        combine([tmp_path / "anna", tmp_path / "club"], tmp_path / "all")
    train_bpe_tokenizer(["another"], 257).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataInvalid, match="isn't the tokenizer of"):
        combine([tmp_path / "anna"], tmp_path / "all", str(tmp_path / "tokenizer.json"))
    assert not (tmp_path / "all").exists()
