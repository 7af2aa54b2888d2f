"""Models as transformers saves them, for what takes such a directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from peer.corpus import END_OF_TEXT, TOKENIZER

SETTINGS = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}


def save_checkpoint(folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer) -> Path:
    """A model with random weights, drawn from torch's generator as it is, and its tokenizer."""
    values = dict(config)
    settings = AutoConfig.for_model(values.pop("model_type"), **values)
    AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    tokenizer.save(str(folder / TOKENIZER))
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    return folder
