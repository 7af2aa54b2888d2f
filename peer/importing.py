"""Taking a pretrained model from a hub, a directory or a GGUF file, for a run to begin with. Only a run's owner needs this."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from peer.architectures import DESCRIBES_THE_FILE, QUANTISED
from peer.chats import TEMPLATE_FILE
from peer.corpus import TOKENIZER, name_by_root, save_tokenizer
from peer.data import tree_path
from peer.folders import appearing, describe
from peer.model import check_parameters, skeleton
from peer.nf4 import layers_of, packed_weights
from peer.pretrained import FILE, LARGEST, PACKED, Pretrained
from peer.progress import Bar, no_bar
from swarm.errors import DataInvalid
from swarm.manifest import Base, Model

GGUF = ".gguf"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SOURCE_HINT = "name a hub's model, a folder with config.json and safetensors, or a .gguf file"


def import_pretrained(source: str, to: Path, dtype: str = "") -> Pretrained:
    """Write weights, tokenizer and `base.yaml` of a model into `to`, all or nothing.

    `dtype` is what weights are stored in; by default what they have, and float16 for those of a GGUF file. Raises `DataInvalid`.
    """
    disable_progress_bar()
    network, tokenizer = _load(source)
    config, stored = _plain_config(network.config, source), DTYPES[dtype] if dtype else _stored(network, source)
    with appearing(to) as unfinished:
        weights = unfinished / "weights"
        named = {name: value.detach().to(stored).contiguous() for name, value in network.named_parameters()}
        check_parameters(Model(config=config, parameters=sum(value.numel() for value in named.values())))
        save_file(named, weights)
        weights.chmod(0o644)
        tree = name_by_root(weights, unfinished)
        made = Pretrained(
            config=config,
            base=Base(**tree.model_dump(), name=_name(source)),
            tokenizer=save_tokenizer(tokenizer.backend_tokenizer, unfinished),
        )
        (unfinished / TOKENIZER).symlink_to(made.tokenizer.root)
        if tokenizer.chat_template:
            (unfinished / TEMPLATE_FILE).write_text(tokenizer.chat_template)
        describe(unfinished / FILE, made)
    return made


def in_four_bits(made: Pretrained, folder: Path, to: Path, bar: Bar = no_bar) -> Base:
    """Write a base, which lies in `folder`, into `to` with its linear layers in 4 bits; `bar` is moved on by each tensor.

    Raises `DataInvalid` for a model whose layers don't fit, or that is in 4 bits already.
    """
    if made.base.stored != "plain":
        raise DataInvalid(f"{made.base.name} is in 4 bits already")
    layers = {f"{name}.weight" for name in layers_of(skeleton(made.config))}
    values: dict[str, torch.Tensor] = {}
    with safe_open(tree_path(folder, made.base), framework="pt") as file, tempfile.TemporaryDirectory(dir=to) as temporary:
        names = sorted(file.keys())
        advance = bar("quantising", len(names))
        for name in names:
            if name in layers:
                stem = name.removesuffix("weight")
                values[stem + PACKED], values[stem + LARGEST] = packed_weights(file.get_tensor(name))
            else:
                values[name] = file.get_tensor(name)
            advance()
        weights = Path(temporary) / "weights"
        save_file(values, weights)
        weights.chmod(0o644)
        return Base(**name_by_root(weights, to).model_dump(), name=made.base.name, stored="nf4")


def _load(source: str) -> tuple[Any, Any]:
    path = Path(source)
    place: dict[str, Any] = {"pretrained_model_name_or_path": source}
    if path.suffix == GGUF:
        place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        network = AutoModelForCausalLM.from_pretrained(**place, use_safetensors=True, trust_remote_code=False, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(**place, trust_remote_code=False)
    except Exception as error:  # what transformers and its readers raise has no common base
        problem = " ".join(str(error).split())[:200]
        raise DataInvalid(f"can't load {source}: {problem}", SOURCE_HINT) from error
    return network, tokenizer


def _stored(network: Any, source: str) -> torch.dtype:
    if Path(source).suffix == GGUF:
        return torch.float16
    dtype: torch.dtype = network.dtype
    return dtype if dtype in DTYPES.values() else torch.float32


def _plain_config(config: Any, source: str) -> dict[str, Any]:
    """The configuration by value, without what describes the file. Raises `DataInvalid` for what isn't plain."""
    values = {key: value for key, value in config.to_diff_dict().items() if key not in DESCRIBES_THE_FILE and key[:1] != "_"}
    if Path(source).suffix == GGUF:  # its values are numbers again
        values.pop(QUANTISED, None)
    if QUANTISED in values:
        raise DataInvalid(f"{source} is quantised", "take the model that it was made from, or its GGUF file")
    values = {"model_type": config.model_type, **values}
    try:
        plain: dict[str, Any] = json.loads(json.dumps(values, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise DataInvalid(f"the model's configuration isn't plain: {error}") from error
    return plain


def _name(source: str) -> str:
    """What the export calls it: a hub's name as it is, of a path only the last part."""
    path = Path(source)
    return path.name if path.exists() else source
