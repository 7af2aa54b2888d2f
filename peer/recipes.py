"""Ready-made runs: everything that a demonstration needs, made from what is on the machine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peer.corpus import (
    build_shards,
    byte_level_tokenizer,
    encode_bytes,
    end_of_text_id,
    save_tokenizer,
    split_documents,
    standard_library_documents,
)
from peer.model import count_parameters, flops_per_token
from swarm.auto import AUTO, Draft, plan
from swarm.manifest import UNAUDITED, Manifest, Shard

DEMO_DATA_BYTES = 8_000_000
HELD_OUT_FRACTION = 0.05


def demo_manifest(
    directory: Path,
    seed: int = 0,
    *,
    sequence_length: int = 128,
    data_bytes: int = DEMO_DATA_BYTES,
    peers: int = 3,
    rounds: int = 20,
    inner_steps: int = 20,
    batch_samples: int = 8,
    hidden_size: int = 128,
    layers: int = 4,
    strategy: str = "diloco",
    pinned: bool = False,
    name: str = "demo",
) -> Manifest:
    """A byte-level Llama of 0.87 M parameters on the Python standard library: `diloco` with Muon, `sync` with AdamW, or `auto`.

    Writes the tokenizer and the shards into `directory`, each named by its root. The schedule ends when `peers` peers
    have done `rounds` rounds; the first round waits for them. In `sync` a round is one step of `peers * batch_samples`. `auto`
    spends the tokens of `rounds` rounds of `inner_steps` steps in rounds of its own choice, unless they are `pinned`.
    """
    tokenizer = byte_level_tokenizer()
    vocabulary_size = tokenizer.get_vocab_size()
    end_of_text = end_of_text_id(tokenizer)

    def shards(documents: Iterable[str]) -> tuple[Shard, ...]:
        return build_shards(
            encode_bytes(documents),
            directory,
            sequence_length=sequence_length,
            end_of_text=end_of_text,
            vocabulary_size=vocabulary_size,
        )

    train_documents, held_out_documents = split_documents(standard_library_documents(data_bytes), HELD_OUT_FRACTION)
    train, validation = shards(train_documents), shards(held_out_documents)
    config = llama_config(vocabulary_size, sequence_length, hidden_size, layers, end_of_text)
    manifest = Manifest.model_validate(
        {
            "name": name,
            "description": "A byte-level Llama on the Python standard library's own source.",
            "model": {"config": config, "seed": seed, "parameters": count_parameters(config)},
            "tokenizer": save_tokenizer(tokenizer, directory),
            "data": {
                "sequence_length": sequence_length,
                "train": train,
                "validation": validation,
                "license": "PSF-2.0",
                "description": "Source files of the Python standard library.",
            },
            "strategy": _strategy(strategy, peers, rounds, inner_steps, batch_samples, sequence_length),
            "rounds": {"total": rounds, "min_peers": peers},
            "credit": {"flops_per_token": flops_per_token(config, sequence_length)},
        }
    )
    if strategy != AUTO:
        return manifest
    draft = Draft(
        parameters=manifest.model.parameters,
        sequence_length=sequence_length,
        tokens=peers * batch_samples * sequence_length * rounds * inner_steps,
        batch_samples=batch_samples,
        peers=peers,
        inner_steps=inner_steps if pinned else None,
    )
    return Manifest.model_validate(plan(draft).applied(manifest.model_dump(mode="json")))


def tiny_manifest(directory: Path, peers: int, **rounds: Any) -> Manifest:
    """A run whose rounds take a fraction of a second, for tests and benchmarks: it goes on until it is stopped; nobody audits."""
    manifest = demo_manifest(
        directory, peers=peers, inner_steps=4, hidden_size=32, layers=2, sequence_length=32, data_bytes=400_000, name="tiny"
    )
    values = {**manifest.rounds.model_dump(), "total": 0, "min_peers": peers, **rounds}
    codec = {**manifest.codec.model_dump(), "part_values": 4096}
    changes = {"rounds": values, "codec": codec, "audit": UNAUDITED}
    return Manifest.model_validate({**manifest.model_dump(mode="json"), **changes})


def _strategy(kind: str, peers: int, rounds: int, inner_steps: int, batch_samples: int, sequence_length: int) -> dict[str, Any]:
    tokens_per_step = peers * batch_samples * sequence_length
    if kind == "sync":
        schedule = {"total_tokens": tokens_per_step * rounds, "final_fraction": 0.1}
        optimizer = {"kind": "adamw", "lr": 2e-3}
        return {"kind": "sync", "batch_samples": peers * batch_samples, "optimizer": optimizer, "schedule": schedule}
    return {
        "kind": "diloco",
        "inner_steps": inner_steps,
        "batch_samples": batch_samples,
        "inner": {"kind": "muon", "lr": 4e-3, "adamw": {"lr": 2e-3}},
        "outer": {"lr": 1.0, "momentum": 0.0},
        "schedule": {"total_tokens": tokens_per_step * rounds * inner_steps, "final_fraction": 0.1},
    }


def llama_config(vocabulary_size: int, sequence_length: int, hidden_size: int, layers: int, end_of_text: int) -> dict[str, Any]:
    """A small Llama's configuration by value, with heads of 32 units and separate input and output embeddings."""
    return {
        "model_type": "llama",
        "vocab_size": vocabulary_size,
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, hidden_size // 32),
        "num_key_value_heads": max(1, hidden_size // 32),
        "max_position_embeddings": sequence_length,
        "tie_word_embeddings": False,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
    }
