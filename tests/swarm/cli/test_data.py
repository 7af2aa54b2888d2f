"""`swarm data build`, from somebody's own texts to a manifest that can be signed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from peer.data import ShardReader
from peer.dataset import read
from peer.recipes import llama_config
from swarm.cli.main import run
from swarm.manifest import Distillation, Manifest


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Forty different texts, and one of them twice."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(f"text {number}: " + " ".join(str(number * factor) for factor in range(80)))
    (folder / "copy.txt").write_text((folder / "07.txt").read_text())
    return folder


def built(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    """What a build reports."""
    assert run(["data", "build", *arguments, "--json"]) == 0
    answer: dict[str, object] = json.loads(capsys.readouterr().out)
    return answer


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_from_texts_to_a_signed_run(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tokenizer: str
) -> None:
    """The manifest that follows is valid as it is, and its shards hold each text once, none of them on both sides."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    answer = built(
        capsys, str(texts), "--tokenizer", tokenizer, "--held-out", "0.3", "--license", "CC0-1.0", "--sequence-length", "32"
    )
    assert (answer["documents"], answer["copies"], answer["directory"]) == (41, 1, str(tmp_path / "data"))
    assert run(["run", "init", "--data", "data", "--hidden-size", "64", "--layers", "2", "--tokens", "1000000"]) == 0
    assert run(["run", "validate", "run.yaml"]) == 0
    assert run(["run", "sign", "run.yaml", "--owner-key", str(tmp_path / "owner.key")]) == 0
    values = yaml.safe_load((tmp_path / "run.yaml").read_text())
    manifest = Manifest.model_validate(values)
    assert manifest.data.license == "CC0-1.0"
    assert manifest.model.config["vocab_size"] == answer["vocabulary_size"] == (257 if tokenizer == "bytes" else 300)
    assert "CC0-1.0" in (tmp_path / "data" / "README.md").read_text()
    if tokenizer == "bytes":
        sides = [_texts_in(manifest, tmp_path / "data", side) for side in ("train", "validation")]
        assert sum(side.count("text 7: ") for side in sides) == 1
        assert all(side.count("text ") > 3 for side in sides)


def _texts_in(manifest: Manifest, folder: Path, side: str) -> str:
    reader = ShardReader.open(getattr(manifest.data, side), folder, manifest.data.sequence_length, 257)
    tokens = [int(token) for index in range(len(reader)) for token in reader.sample(index)]
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_tokenizer_of_its_own_is_that_of_a_build(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """It is the one that a build with bpe:SIZE trains, and a build takes its folder."""
    monkeypatch.chdir(tmp_path)
    source = str(write_chats(tmp_path / "chats.jsonl") if kind == "chat" else texts)
    options = (source, "--kind", kind, "--held-out", "0.3")
    assert run(["data", "tokenizer", *options, "--vocabulary", "300", "--to", "own", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["vocabulary_size"] == (302 if kind == "chat" else 300)
    length = ("--sequence-length", "64")
    first = built(capsys, *options, *length, "--tokenizer", "bpe:300", "--to", "first")
    second = built(capsys, *options, *length, "--tokenizer", "own", "--to", "second")
    assert first["vocabulary_size"] == second["vocabulary_size"]
    assert read(tmp_path / "first").data == read(tmp_path / "second").data


def test_from_a_hubs_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a split, the licence that its card names, and where they are from; other words only where they are given."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    rows = [{"story": f"story {number}: " + " ".join(str(number * factor) for factor in range(60))} for number in range(50)]
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "set" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    options = ("--hub", "set", "--column", "story", "--held-out", "0.3", "--sequence-length", "32")
    answer = built(capsys, *options, "--limit", "40")
    assert (answer["documents"], answer["license"]) == (40, "cc-by-4.0")
    card = (tmp_path / "data" / "README.md").read_text()
    assert "| licence | cc-by-4.0 |" in card
    assert "| source | set, split train |" in card
    assert built(capsys, *options, "--licence", "mine", "--to", "other")["license"] == "mine"
    wrong = {
        ("--hub", "set"): "it has story",
        ("--hub", "set", "texts"): "name files, or a data set",
        (): "name files, or a data set",
    }
    for arguments, words in wrong.items():
        assert run(["data", "build", *arguments, "--to", "wrong"]) in (2, 22)
        assert words in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


def test_chats_from_a_hubs_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are chats as lines of a file are, and wrong ones are told with their place."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    write_chats(tmp_path / "set" / "train.jsonl")
    options = ("--hub", "set", "--kind", "chat", "--held-out", "0.2", "--sequence-length", "128")
    answer = built(capsys, *options)
    assert (answer["documents"], answer["empty"], answer["too_long"]) == (61, 1, 1)
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "hello"}')
    assert run(["data", "build", *options, "--to", "other"]) == 22
    assert "set, split train, row 1 is no chat" in capsys.readouterr().err


def test_private_data_of_two_people_make_a_run(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their descriptions are enough for a manifest that is by invitation, isn't audited and merges by the mean."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("anna", "1"), ("ben", "2")):
        mine = tmp_path / f"{name}-texts"
        mine.mkdir()
        for path in sorted(texts.glob("*.txt")):
            (mine / path.name).write_text(f"{name}: {path.read_text()}")
        built(capsys, str(mine), "--private", "--to", name, "--seed", seed, "--held-out", "0.3", "--sequence-length", "32")
    assert run(["data", "combine", "anna/dataset.yaml", "ben/dataset.yaml", "--to", "both", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["private_samples"] == answer["train_samples"] > 0
    assert run(["run", "init", "--data", "both", "--hidden-size", "64", "--layers", "2", "--tokens", "1000000"]) == 0
    assert run(["run", "validate", "run.yaml", "--files", "both"]) == 0
    manifest = Manifest.read(tmp_path / "run.yaml")
    assert (manifest.admission.kind, manifest.is_audited, manifest.merge.kind) == ("invitation", False, "mean")
    assert manifest.files == (manifest.tokenizer,)


def write_chats(path: Path, count: int = 60) -> Path:
    """So many chats, one of them too long and one without an answer."""
    records = [{"prompt": f"what is {number}?", "response": f"it is {number}"} for number in range(count)]
    records += [
        {"prompt": "say much", "response": " ".join(str(number**3) for number in range(100))},
        {"prompt": "say nothing", "response": " "},
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_from_chats_to_a_valid_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tokenizer: str
) -> None:
    """The card and standard error say what was left out; what is left makes a manifest of the marked layout."""
    monkeypatch.chdir(tmp_path)
    chats = write_chats(tmp_path / "chats.jsonl")
    options = ("--kind", "chat", "--tokenizer", tokenizer, "--sequence-length", "128", "--held-out", "0.2", "--json")
    assert run(["data", "build", str(chats), *options]) == 0
    told = capsys.readouterr()
    answer = json.loads(told.out)
    assert (answer["documents"], answer["empty"], answer["too_long"], answer["not_split"]) == (61, 1, 1, 0)
    assert "left out 1 of the chats, longer than a sample" in told.err
    assert "1 longer than a sample" in (tmp_path / "data" / "README.md").read_text()
    assert run(["run", "init", "--data", "data", "--hidden-size", "64", "--layers", "2", "--tokens", "1000000"]) == 0
    assert run(["run", "validate", "run.yaml"]) == 0
    manifest = Manifest.model_validate(yaml.safe_load((tmp_path / "run.yaml").read_text()))
    assert manifest.data.layout == "marked"
    assert manifest.model.config["vocab_size"] == answer["vocabulary_size"]
    assert "<|im_start|>" in manifest.data.chat_template
    reader = ShardReader.open(manifest.data.train, tmp_path / "data", 128, answer["vocabulary_size"], "marked")
    assert len(reader) == answer["train_samples"] > 1


def test_wrong_chats_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """No such kind, lines of another form, and chats that all are too long: each with a hint, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    chats, texts = write_chats(tmp_path / "chats.jsonl"), tmp_path / "texts.jsonl"
    texts.write_text('{"text": "hello"}')
    cases = {
        ("data", "build", str(chats), "--kind", "pictures"): "text or chat",
        ("data", "build", str(texts), "--kind", "chat"): "docs/recipes/sft.md",
        ("data", "build", str(chats), "--kind", "chat", "--sequence-length", "16"): "--sequence-length",
    }
    for command, words in cases.items():
        assert run(list(command)) in (2, 22), command
        assert words in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_from_a_teacher_to_a_valid_run(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new folder has everything, and its manifest a section for it; a folder with something in it is left alone."""
    monkeypatch.chdir(tmp_path)
    built(capsys, str(texts), "--sequence-length", "32", "--held-out", "0.3")
    tokenizer = read(tmp_path / "data").tokenizer
    settings = AutoConfig.for_model(**llama_config(257, 32, hidden_size=32, layers=1, end_of_text=256))
    AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "tokenizer.json").write_bytes((tmp_path / "data" / tokenizer.root).read_bytes())
    command = ["data", "teach", "data", "--teacher", "teacher", "--top-k", "4", "--to"]
    assert run([*command, "taught", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["teacher_bytes"] == answer["train_samples"] * 32 * (4 * 4 + 2)
    assert run(["run", "init", "--data", "taught", "--hidden-size", "64", "--layers", "2", "--tokens", "1000000"]) == 0
    assert run(["run", "validate", "run.yaml"]) == 0
    manifest = Manifest.model_validate(yaml.safe_load((tmp_path / "run.yaml").read_text()))
    assert manifest.distillation == Distillation()
    assert all((tmp_path / "taught" / tree.root).stat().st_size == tree.size_bytes for tree in manifest.data.trees)
    assert run([*command, "data"]) == 2
    (tmp_path / "teacher" / "config.json").unlink()
    capsys.readouterr()
    assert run([*command, "again"]) == 22
    assert "safetensors" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_what_goes_wrong_is_named(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with something in it, no texts, too few of them, a wrong tokenizer, no dataset: each with a hint."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("a single text " * 100)
    (tmp_path / "words.json").write_text("{}")
    cases = {
        ("data", "build", str(texts), "--to", str(texts)): "choose another folder",
        ("data", "build", str(tmp_path / "nowhere")): "name text files",
        ("data", "build", str(tmp_path / "one.txt")): "split large files",
        ("data", "build", str(texts), "--tokenizer", "bpe:5"): "bpe:8192",
        ("data", "build", str(texts), "--tokenizer", str(tmp_path / "words.json")): "is not a tokenizer",
        ("run", "init", "--data", str(tmp_path)): "swarm data build",
    }
    for command, words in cases.items():
        assert run(list(command)) in (2, 22), command
        assert words in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "swarm-data"))] == []
