"""The manifests in this folder, one for each recipe, made by the commands that its page shows: `python examples/make.py`.

With `--to FOLDER` they and everything that they name are made there, ready for `swarm coordinator` and `swarm join --files`; with
`--check` nothing is written. Data are arithmetic, and what is to be a pretrained model has random weights: small enough for any
machine.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from peer.corpus import END_OF_TEXT, TOKENIZER, byte_level_tokenizer
from peer.model import FlatParameters, count_parameters, flops_per_token, initial_theta
from peer.recipes import llama_config
from swarm.cli.drafting import commented
from swarm.cli.main import run
from swarm.manifest import Manifest, Model

FOLDER = Path(__file__).resolve().parent
LENGTH, WIDTH = 64, 64
MARKERS = ["<|im_start|>", "<|im_end|>"]
SMALL = ("--hidden-size", str(WIDTH), "--layers", "2")
BUDGET = ("--tokens", "2000000", "--peers", "2", "--step-s", "0.1")
SAMPLES = ("--sequence-length", str(LENGTH), "--held-out", "0.1", "--license", "CC0-1.0")
EXPERTS = {
    "model_type": "qwen3_moe",
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "moe_intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.001,
    "max_position_embeddings": LENGTH,
}


@dataclass(frozen=True)
class Kitchen:
    """A folder in which one recipe is made; `run.yaml` and its `data` come out."""

    folder: Path

    def swarm(self, *command: str) -> None:
        """A command in this folder; what it prints is left out. Raises `SystemExit` where it fails."""
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(io.StringIO()):
            if code := run(list(command)):
                sys.exit(code)

    def build(self, source: str, *options: str, to: str = "data") -> None:
        """`swarm data build`."""
        self.swarm("data", "build", source, *SAMPLES, *options, "--to", to)

    def init(self, *options: str, data: str = "data") -> None:
        """`swarm run init`."""
        self.swarm("run", "init", "run.yaml", "--data", data, *BUDGET, *options)

    def write_texts(self, name: str = "texts") -> str:
        """Products of numbers, JSON lines; other ones under another name."""
        seed = sum(name.encode())
        lines = [{"text": "\n".join(f"{a} x {b} = {a * b}" for b in range(20))} for a in range(seed, seed + 40)]
        (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return f"{name}.jsonl"

    def write_traces(self) -> str:
        """Sums, with what is thought before the answer."""
        lines = [
            {"question": f"{a}+{b}?", "thinking": f"{a}+{b}={a + b}", "answer": f"{a + b}"} for a in range(20) for b in range(20)
        ]
        (self.folder / "traces.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return "traces.jsonl"

    def write_model(self, name: str, width: int) -> None:
        """A Llama in bytes, with ChatML's markers, as transformers saves it: the same bits on all machines."""
        tokenizer = byte_level_tokenizer()
        tokenizer.add_special_tokens(MARKERS)
        config = llama_config(tokenizer.get_vocab_size(), 2 * LENGTH, width, layers=2, end_of_text=256)
        values = dict(config)
        network = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
        FlatParameters(network).write(network, initial_theta(Model(config=config, parameters=count_parameters(config))))
        network.save_pretrained(self.folder / name)
        tokenizer.save(str(self.folder / name / TOKENIZER))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
        (self.folder / name / "tokenizer_config.json").write_text(json.dumps(settings))

    def make_base(self) -> None:
        """A model from elsewhere, as what a run begins with: `base`."""
        self.write_model("pretrained", WIDTH)
        self.swarm("run", "base", "pretrained", "--to", "base")

    def change(self, **sections: Any) -> None:
        """Other values for some of the manifest's sections."""
        path = self.folder / "run.yaml"
        path.write_text(commented({**yaml.safe_load(path.read_text()), **sections}))


def pretraining(kitchen: Kitchen) -> None:
    """A small Llama from nothing, with a tokenizer of its own."""
    kitchen.build(kitchen.write_texts(), "--tokenizer", "bpe:300")
    kitchen.init(*SMALL)


def finetuning(kitchen: Kitchen, *options: str) -> None:
    """All weights of a pretrained model."""
    kitchen.make_base()
    kitchen.build(kitchen.write_texts(), "--tokenizer", "base/tokenizer.json")
    kitchen.init("--base", "base", *options)


def lora(kitchen: Kitchen) -> None:
    """A low-rank adapter on a pretrained model."""
    finetuning(kitchen, "--lora", "8")


def qlora(kitchen: Kitchen) -> None:
    """A low-rank adapter on a pretrained model in 4 bits."""
    finetuning(kitchen, "--lora", "8", "--base-bits", "4")


def traces(kitchen: Kitchen) -> None:
    """A pretrained model learns to think before it answers."""
    kitchen.make_base()
    kitchen.build(kitchen.write_traces(), "--kind", "chat", "--tokenizer", "base/tokenizer.json", "--sequence-length", "96")
    kitchen.init("--base", "base")


def distillation(kitchen: Kitchen) -> None:
    """A small model learns from the logits of a larger one."""
    kitchen.write_model("teacher", WIDTH)
    kitchen.build(kitchen.write_texts(), "--tokenizer", "teacher/tokenizer.json", to="plain")
    kitchen.swarm("data", "teach", "plain", "--teacher", "teacher", "--top-k", "8", "--to", "data")
    kitchen.init("--hidden-size", str(WIDTH // 2), "--layers", "1")


def experts(kitchen: Kitchen) -> None:
    """A mixture of eight experts, of which each token visits two."""
    kitchen.build(kitchen.write_texts(), "--tokenizer", "bytes")
    kitchen.init(*SMALL)
    made = Manifest.read(kitchen.folder / "run.yaml")
    ends = {name: made.model.config[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    config = {**EXPERTS, **ends}
    model = Model(config=config, parameters=count_parameters(config))
    credit = made.credit.model_copy(update={"flops_per_token": flops_per_token(config, LENGTH)})
    kitchen.change(model=model.model_dump(mode="json"), credit=credit.model_dump(mode="json"))


def synthetic(kitchen: Kitchen) -> None:
    """A pretrained model writes samples for prompts, which become another run's data."""
    kitchen.make_base()
    lines = [{"prompt": f"{a} x {b} ="} for a in range(20) for b in range(10)]
    (kitchen.folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ("--kind", "prompts", "--tokenizer", "base/tokenizer.json", "--sequence-length", "15", "--license", "CC0-1.0")
    kitchen.swarm("data", "build", "prompts.jsonl", *options, "--to", "data")
    kitchen.init("--base", "base")


def private(kitchen: Kitchen) -> None:
    """Two people's shards, which stay with them."""
    for name in ("anna", "ben"):
        kitchen.build(kitchen.write_texts(name), "--private", to=name)
    kitchen.swarm("data", "combine", "anna/dataset.yaml", "ben/dataset.yaml", "--to", "data")
    kitchen.init(*SMALL)


RECIPES: dict[str, Callable[[Kitchen], None]] = {
    recipe.__name__: recipe
    for recipe in (pretraining, finetuning, lora, qlora, traces, distillation, experts, synthetic, private)
}


def make(name: str, to: Path) -> str:
    """The manifest of a recipe, as text; it and all that it names are in the folder then."""
    to.mkdir(parents=True)
    kitchen, recipe = Kitchen(to), RECIPES[name]
    recipe(kitchen)
    kitchen.change(name=f"example-{name}", description=recipe.__doc__)
    return (to / "run.yaml").read_text()


def comparable(text: str) -> str:
    """Without what differs between machines in its last bits: a teacher's arithmetic, and random weights."""
    values = yaml.safe_load(text)
    for tree in (*(values["data"].get("teacher") or {}).get("shards", []), values["model"].get("base") or {}):
        tree.pop("root", None)
    return yaml.safe_dump(values)


def main(arguments: list[str] | None = None) -> int:
    """Write what has changed, or with `--check` name it; 1 where something has."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", nargs="*", choices=[[], *RECIPES], help="all of them by default")
    parser.add_argument("--to", type=Path, help="where to leave data and manifests, a folder for each; new")
    parser.add_argument("--check", action="store_true", help="only name those that aren't what the commands make")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)  # these models are too small for more
    stale = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in asked.recipe or RECIPES:
            text, path = make(name, (asked.to or Path(temporary)).absolute() / name), FOLDER / f"{name}.yaml"
            if asked.to is None and not (path.exists() and comparable(path.read_text()) == comparable(text)):
                stale.append(path.name)
                if not asked.check:
                    path.write_text(text)
    for name in stale:
        sys.stdout.write(f"{name} {'is stale: python examples/make.py' if asked.check else 'written'}\n")
    return int(asked.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
