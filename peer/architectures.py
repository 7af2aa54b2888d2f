"""Which of transformers' architectures a run may name, and a configuration as others publish it, made to fit a run's data."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from swarm.errors import DataInvalid
from swarm.manifest import FORBIDDEN_MODEL_KEYS

MAX_CONFIG_BYTES = 1 << 20
DESCRIBES_THE_FILE = frozenset(
    {"architectures", "dtype", "torch_dtype", "transformers_version", "name_or_path", "use_cache", *FORBIDDEN_MODEL_KEYS}
)
"""Keys of a configuration that say how a checkpoint was made, not what the model is."""
QUANTISED = "quantization_config"
CAUSAL_ANYWAY = frozenset({"gpt_neox", "gpt_neox_japanese"})
"""Architectures that look back only although their configuration says that they are no decoder."""
BOTH_WAYS = frozenset({"xlm", "xlnet"})
"""Architectures that no setting keeps from looking ahead."""
NEAREST = 3
HINT = "model_type names one of transformers' causal language models, such as llama, qwen3, gemma, gpt2 or mixtral"


def check_kind(kind: object) -> None:
    """Raise `DataInvalid` unless transformers has a causal language model of this name; similar names are named."""
    names = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - BOTH_WAYS
    if kind in names:
        return
    similar = difflib.get_close_matches(str(kind), sorted(names), NEAREST)
    meant = f"; did you mean {' or '.join(similar)}?" if similar else ""
    raise DataInvalid(f"transformers can't build a {kind!r} model: it has no causal language model of that name{meant}", HINT)


def attention_of(settings: Any) -> str:
    """The implementation of attention: torch's own, or where an architecture can't use that (Gemma 2, Bloom) plain products."""
    return "sdpa" if getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)], "_supports_sdpa", True) else "eager"


def check_looks_back(settings: Any) -> None:
    """Raise `DataInvalid` for a model that sees the tokens that it is to tell, as BERT does unless it is made a decoder."""
    if getattr(settings, "is_decoder", True) is False and settings.model_type not in CAUSAL_ANYWAY:
        raise DataInvalid(
            f"a {settings.model_type} model sees the tokens that it is to tell", "set is_decoder to true in model.config"
        )


def check_positions(settings: Any, sequence_length: int) -> None:
    """Raise `DataInvalid` where samples are longer than the model was made for."""
    most = getattr(settings, "max_position_embeddings", None)
    if isinstance(most, int) and most < sequence_length:
        raise DataInvalid(
            f"samples have {sequence_length} tokens, the model has positions for {most} (max_position_embeddings)",
            "raise it in model.config, or build data with a smaller --sequence-length",
        )


def read_config(path: Path) -> dict[str, Any]:
    """A `config.json` by value, without what describes a checkpoint. Raises `DataInvalid`."""
    hint = "name a config.json of transformers, such as those on a hub"
    try:
        raw = path.read_bytes()
        values = json.loads(raw[: MAX_CONFIG_BYTES + 1])
    except (OSError, ValueError, RecursionError) as error:
        raise DataInvalid(f"{path} can't be read: {' '.join(str(error).split())[:200]}", hint) from error
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise DataInvalid(f"{path} names no model_type", hint)
    return described_model(values)


def described_model(values: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration says what the model is; of weights that aren't taken it doesn't matter how they are stored."""
    dropped = DESCRIBES_THE_FILE | {QUANTISED}
    return {key: value for key, value in values.items() if key not in dropped and key[:1] != "_"}


def fitted(config: Mapping[str, Any], vocabulary_size: int, end_of_text: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The configuration for a tokenizer's tokens, and what had to be changed in it, a line each.

    Raises `DataInvalid` for an architecture that there isn't, and for a vocabulary that is smaller than the tokenizer's.
    """
    kind, values = config["model_type"], dict(config)
    check_kind(kind)
    size = values.setdefault("vocab_size", vocabulary_size)
    if not isinstance(size, int) or size < vocabulary_size:
        raise DataInvalid(
            f"the tokenizer has {vocabulary_size} tokens, the model's vocab_size is {size}",
            "raise it in the configuration, or leave it out; or build data with a smaller tokenizer",
        )
    values |= {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    for key in [key for key, value in values.items() if key.endswith("_token_id") and isinstance(value, int) and value >= size]:
        del values[key]
    if _pad_token(kind, values) >= size:
        values["pad_token_id"] = None
    changed = (key for key in config if config[key] != values.get(key))
    return values, tuple(f"{key} is {values.get(key)} instead of {config[key]}, for the data's tokenizer" for key in changed)


def _pad_token(kind: str, values: Mapping[str, Any]) -> int:
    """What fills up short samples, perhaps by the architecture's default; -1 where nothing does, or nobody can tell."""
    try:
        settings = AutoConfig.for_model(kind, **{key: value for key, value in values.items() if key != "model_type"})
        found = getattr(settings.get_text_config(), "pad_token_id", None)
    except Exception:  # noqa: BLE001 - what transformers raises for nonsense has no common base; building the model names it
        return -1
    return found if isinstance(found, int) else -1
