"""`swarm run`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from peer.corpus import byte_level_tokenizer
from swarm.cli.drafting import COMMENTS, FILL_IN
from swarm.cli.main import run
from swarm.cli.run import read_run
from swarm.errors import ManifestInvalid
from swarm.identity import Identity
from swarm.ledger import open_manifest
from swarm.manifest import Manifest, SkipSpikes
from swarm.messages import payload_hash
from swarm.rpc.v1.signed_pb2 import Signed
from swarm.tickets import from_text, open_ticket
from tests import world
from tests.checkpoints import save_checkpoint
from tests.world import BUILDABLE, LLAMA


def manifest(**changes: object) -> Manifest:
    """A manifest that passes every check."""
    return world.manifest(**{"model": BUILDABLE, **changes})


@pytest.fixture
def path(home: Path) -> Path:
    """A valid run.yaml."""
    (home / "run.yaml").write_text(yaml.safe_dump(manifest().model_dump(mode="json")))
    return home / "run.yaml"


def test_template_is_complete(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The template is commented and valid as soon as the hashes are filled in; before, every missing one is listed."""
    assert run(["run", "init", "new.yaml"]) == 0
    text = (home / "new.yaml").read_text()
    assert run(["run", "validate", "new.yaml"]) == 20
    assert capsys.readouterr().err.count("root: string should match") == text.count(FILL_IN) == 3
    filled = text.replace(FILL_IN, f"'{'a' * 64}'")
    filled_in = Manifest.parse(filled.encode())
    assert (filled_in.name, filled_in.strategy.skip_spikes) == ("my-run", SkipSpikes())
    assert all(comment in text for name, comment in COMMENTS.items() if f"\n{name}:" in text)
    assert set(COMMENTS) == set(Manifest.model_fields)


def test_init_overwrites_nothing(path: Path) -> None:
    """An existing file stays."""
    before = path.read_text()
    assert run(["run", "init", "run.yaml"]) == 2
    assert path.read_text() == before


def test_validate_lists_all_problems(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All problems come at once, as text and as JSON, with exit code 20."""
    values = manifest().model_dump(mode="json") | {"name": "UPPER", "typo": 1}
    (home / "bad.yaml").write_text(yaml.safe_dump(values))
    assert run(["run", "validate", "bad.yaml", "--json"]) == 20
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)["problems"]) == 2
    assert "bad.yaml has 2 problems" in printed.err
    assert run(["run", "validate", "missing.yaml"]) == 20


def test_sign_and_show(path: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Signing makes the owner's key at first use and gives a file that opens as the same run."""
    assert run(["run", "sign", "run.yaml", "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert fields["run_id"] == manifest().run_id
    assert fields["owner"] == Identity.load(home / ".local/share/swarm/owner.key").peer_id
    assert run(["run", "validate", "run.signed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"valid": True, "run_id": manifest().run_id}
    assert run(["run", "show", "run.signed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["manifest"] == manifest().model_dump(mode="json")
    assert run(["run", "show", "run.yaml"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == manifest().model_dump(mode="json")


def test_show_says_whether_work_is_audited(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """How often, or why not."""
    assert run(["run", "show", "run.yaml"]) == 0
    assert "# contributions are not audited: audit.rate and audit.first are 0" in capsys.readouterr().out
    path.write_text(yaml.safe_dump(manifest(audit={"rate": 0.05, "first": 10}).model_dump(mode="json")))
    assert run(["run", "show", "run.yaml"]) == 0
    assert "# 5% of the contributions are audited by computing them again, and a new key's first 10" in capsys.readouterr().out
    assert run(["run", "show", "run.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["audited"] is True


def test_new_runs_are_evaluated_and_show_says_how(path: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By default every tenth round, more rarely where there are very many; a manifest without it has none."""
    assert run(["run", "show", "run.yaml"]) == 0
    assert "# the held-out loss is not measured" in capsys.readouterr().out
    for rounds, every in ((400, 10), (40_000, 200)):
        steps = ["--strategy", "diloco", "--inner-steps", "1", "--tokens", str(rounds * 4 * 8 * 128)]
        assert run(["run", "init", f"new-{every}.yaml", *steps]) == 0
        values = yaml.safe_load((home / f"new-{every}.yaml").read_text())
        assert (values["rounds"]["total"], values["evaluation"]["every"]) == (rounds, every)
    capsys.readouterr()
    path.write_text(yaml.safe_dump(manifest(evaluation={"every": 5}).model_dump(mode="json")))
    assert run(["run", "show", "run.yaml"]) == 0
    said = "# 3 peers measure the loss on 10 held-out samples every 5 rounds and after the last; it counts where 2 agree"
    assert said in capsys.readouterr().out


def test_read_run(path: Path, home: Path) -> None:
    """A coordinator takes both forms; the signed one keeps its owner."""
    key = Identity.load_or_create(home / "me.key")
    signed = read_run(path, home / "me.key")
    (home / "run.signed").write_bytes(signed.SerializeToString())
    again = read_run(home / "run.signed", None)
    assert again.signer == key.peer_id
    assert open_manifest(again) == manifest()
    again.signature = b"x" * 64
    (home / "forged").write_bytes(again.SerializeToString())
    with pytest.raises(ManifestInvalid, match="signature"):
        read_run(home / "forged", None)


def test_init_says_why(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By default the settings are derived from budget and links, each with its reason; a slower link changes them."""
    assert run(["run", "init", "home.yaml", "--tokens", "10000000", "--step-s", "20"]) == 0
    assert "codec and interval: int4" in capsys.readouterr().out
    assert run(["run", "init", "slow.yaml", "--tokens", "10000000", "--upload-mbit", "5"]) == 0
    assert "because the link demands it" in capsys.readouterr().out
    assert yaml.safe_load((home / "home.yaml").read_text())["codec"]["kind"] == "int4"
    assert yaml.safe_load((home / "slow.yaml").read_text())["codec"]["kind"] == "int2"


def test_init_takes_settings_as_they_are_given(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A strategy by name, a codec and a number of inner steps are written as given, and an unknown one is refused."""
    assert run(["run", "init", "a.yaml", "--strategy", "diloco", "--codec", "int8", "--inner-steps", "7"]) == 0
    assert run(["run", "init", "b.yaml", "--strategy", "sync"]) == 0
    assert run(["run", "init", "c.yaml", "--codec", "int8", "--inner-steps", "7"]) == 0
    fields = [yaml.safe_load((home / name).read_text()) for name in ("a.yaml", "b.yaml", "c.yaml")]
    assert [item["strategy"]["kind"] for item in fields] == ["diloco", "sync", "diloco"]
    assert [item["codec"]["kind"] for item in fields] == ["int8", "fp16", "int8"]
    assert fields[0]["strategy"]["phases"] == []
    assert run(["run", "init", "d.yaml", "--strategy", "other"]) == 2
    assert run(["run", "init", "d.yaml", "--codec", "int3"]) == 2
    assert "codec" in capsys.readouterr().err


def test_a_file_may_leave_its_strategy_to_us(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`strategy: auto` with a budget is validated, shown with costs by phase, and signed as the explicit settings."""
    fields = manifest().model_dump(mode="json") | {"strategy": "auto", "budget": {"tokens": 10**6, "peers": 2}}
    (home / "auto.yaml").write_text(yaml.safe_dump(fields))
    assert run(["run", "validate", "auto.yaml"]) == 0
    assert "inner optimizer: Muon" in capsys.readouterr().out
    assert run(["run", "show", "auto.yaml", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert sum((cost["last_round"] - cost["first_round"] + 1) * cost["inner_steps"] for cost in shown["phases"]) == 977
    assert run(["run", "sign", "auto.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run_id"] == shown["run_id"]
    signed = read_run(home / "run.signed", None)
    assert open_manifest(signed).model_dump(mode="json") == shown["manifest"]
    assert run(["run", "show", "run.signed"]) == 0
    assert "inner steps, int4" in capsys.readouterr().out


def test_show_of_a_missing_budget(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a budget the strategy can't be derived."""
    (home / "auto.yaml").write_text(yaml.safe_dump(manifest().model_dump(mode="json") | {"strategy": "auto"}))
    assert run(["run", "show", "auto.yaml"]) == 20
    assert "budget" in capsys.readouterr().err


def test_invite(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only the owner of a run by invitation makes tickets for it, and `join` reads them."""
    values = manifest(admission={"kind": "invitation"}).model_dump(mode="json")
    Path("run.yaml").write_text(yaml.safe_dump(values))
    assert run(["run", "sign", "run.yaml", "--owner-key", "owner.key"]) == 0
    capsys.readouterr()
    assert run(["run", "invite", "run.signed", "--uses", "3", "--owner-key", "owner.key"]) == 0
    word = capsys.readouterr().out.strip()
    signed = Signed.FromString(Path("run.signed").read_bytes())
    assert open_ticket(from_text(word), payload_hash(signed)).uses == 3
    assert run(["run", "invite", "run.signed", "--owner-key", "other.key"]) == 2
    assert "isn't the run's owner" in capsys.readouterr().err
    Path("open.yaml").write_text(yaml.safe_dump(manifest().model_dump(mode="json")))
    assert run(["run", "invite", "open.yaml", "--owner-key", "owner.key"]) == 2
    assert "isn't by invitation" in capsys.readouterr().err


def test_validate_builds_the_model(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown architecture, or another number of parameters, is named before anybody trains."""
    unknown = manifest(model={"config": {"model_type": "nothing"}, "parameters": 5})
    path.write_text(yaml.safe_dump(unknown.model_dump(mode="json")))
    assert run(["run", "validate", "run.yaml", "--json"]) == 20
    assert "can't build a 'nothing' model" in capsys.readouterr().out
    path.write_text(yaml.safe_dump(manifest(model={"config": LLAMA, "parameters": 5}).model_dump(mode="json")))
    assert run(["run", "validate", "run.yaml"]) == 20
    assert "the model has 728 parameters, the manifest says 5" in capsys.readouterr().err


def test_a_configuration_becomes_a_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Any causal model of transformers on a folder's data, in its tokens; what doesn't fit is told with what to do."""
    Path("texts").mkdir()
    for number in range(40):
        Path(f"texts/{number}.txt").write_text(f"document {number} says something else than the others do\n" * 9)
    assert run(["data", "build", "texts", "--to", "data", "--sequence-length", "16", "--held-out", "0.2"]) == 0
    values = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 16, "eos_token_id": 50256}
    Path("config.json").write_text(json.dumps(values | {"auto_map": {"AutoConfig": "evil.Code"}}))
    assert run(["run", "init", "run.yaml", "--data", "data", "--config", "config.json"]) == 0
    assert "eos_token_id is 256 instead of 50256" in capsys.readouterr().out
    assert run(["run", "validate", "run.yaml", "--files", "data"]) == 0
    made = yaml.safe_load(Path("run.yaml").read_text())["model"]["config"]
    assert (made["model_type"], made["vocab_size"], "auto_map" in made) == ("gpt2", 257, False)
    experts = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "max_position_embeddings": 16, "vocab_size": 257}
    Path("mixture.json").write_text(json.dumps(experts))
    for codec, left_out in (("sparse", True), ("int4", None)):
        chosen = ["--strategy", "diloco", "--codec", codec]
        assert run(["run", "init", f"{codec}.yaml", "--data", "data", "--config", "mixture.json", *chosen]) == 0
        assert yaml.safe_load(Path(f"{codec}.yaml").read_text())["codec"].get("leave_out_zeros") == left_out
    wrong = {
        "did you mean gpt2 or": values | {"model_type": "gpt2x"},
        "the model's vocab_size is 100": values | {"vocab_size": 100},
        "the model has positions for 8": values | {"n_positions": 8},
        "sees the tokens that it is to tell": {**LLAMA, "model_type": "bert", "vocab_size": 300},
    }
    for problem, config in wrong.items():
        Path("config.json").write_text(json.dumps(config))
        assert run(["run", "init", "no.yaml", "--data", "data", "--config", "config.json"]) != 0
        assert problem in " ".join(capsys.readouterr().err.split())
    assert run(["run", "init", "no.yaml", "--config", "config.json"]) == 2
    assert "give --data" in capsys.readouterr().err
    assert not Path("no.yaml").exists()


def test_a_pretrained_model_becomes_a_run_with_an_adapter(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Base, data in its tokens, manifest, and a check of all files; data in other tokens are refused."""
    ends = {"bos_token_id": 256, "eos_token_id": 256}
    save_checkpoint(Path("checkpoint"), {**LLAMA, "vocab_size": 257, **ends}, byte_level_tokenizer())
    Path("texts").mkdir()
    for number in range(40):
        Path(f"texts/{number}.txt").write_text(f"document {number} says something else than the others do\n" * 9)
    assert run(["run", "base", "checkpoint", "--to", "base", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 4584
    length = ["--sequence-length", "16", "--held-out", "0.2"]
    assert run(["data", "build", "texts", "--tokenizer", "base/tokenizer.json", "--to", "data", *length]) == 0
    adapter = ["--lora", "2", "--lora-targets", "q_proj,v_proj"]
    assert run(["run", "init", "run.yaml", "--base", "base", "--data", "data", *adapter]) == 0
    assert run(["run", "validate", "run.yaml", "--files", "data"]) == 0
    made = yaml.safe_load(Path("run.yaml").read_text())["model"]
    assert made["parameters"] == 2 * 2 * (8 + 8)
    assert made["adapter"]["targets"] == ["q_proj", "v_proj"]
    assert run(["run", "init", "small.yaml", "--base", "base", "--data", "data", *adapter, "--base-bits", "4"]) == 0
    assert run(["run", "validate", "small.yaml", "--files", "data"]) == 0
    small = yaml.safe_load(Path("small.yaml").read_text())["model"]
    assert small["base"]["stored"] == "nf4"
    assert small["base"]["root"] != made["base"]["root"]
    assert small["parameters"] == made["parameters"]
    capsys.readouterr()
    assert run(["run", "init", "none.yaml", "--base", "base", "--data", "data", "--base-bits", "4"]) == 2
    assert run(["run", "init", "none.yaml", "--base", "base", "--data", "data", *adapter, "--base-bits", "3"]) == 2
    told = capsys.readouterr().err
    assert "with --lora 8" in told
    assert "can't be held in 3 bits" in told
    assert run(["data", "teach", "data", "--teacher", "checkpoint", "--top-k", "4", "--to", "taught"]) == 0
    assert run(["run", "init", "taught.yaml", "--base", "base", "--data", "taught", *adapter]) == 0
    assert run(["run", "validate", "taught.yaml", "--files", "taught"]) == 0
    assert "distillation" in yaml.safe_load(Path("taught.yaml").read_text())
    capsys.readouterr()
    assert run(["data", "build", "texts", "--tokenizer", "bpe:300", "--to", "other", *length]) == 0
    assert run(["run", "init", "other.yaml", "--base", "base", "--data", "other"]) == 2
    assert "not in the tokens of checkpoint" in capsys.readouterr().err
    assert run(["run", "init", "none.yaml", "--base", "base", "--data", "data", "--lora", "2", "--lora-targets", "nothing"]) != 0
    assert "no layer is called nothing" in capsys.readouterr().err
    shard = max(Path("data").glob("[0-9a-f]*"), key=lambda path: path.stat().st_size)
    shard.write_bytes(b"\x00" + shard.read_bytes()[1:])
    assert run(["run", "validate", "run.yaml", "--files", "data"]) == 20
    assert "is damaged" in capsys.readouterr().err
