"""A pretrained model that a run begins with, or adapts: one safetensors file under the names of transformers, and its tokenizer.

Whoever makes a run takes it from a hub, a directory or a GGUF file; peers get the file by its hash, like the data.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from peer.corpus import save_tokenizer
from peer.data import tree_of_file, tree_path
from swarm.errors import DataInvalid
from swarm.manifest import FORBIDDEN_MODEL_KEYS, Base, Tree

FILE, TOKENIZER, TEMPLATE, GGUF = "base.yaml", "tokenizer.json", "chat_template.jinja", ".gguf"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STORED = frozenset({"F32", "F16", "BF16"})
DESCRIBES_THE_FILE = frozenset(
    {"architectures", "dtype", "torch_dtype", "transformers_version", "name_or_path", *FORBIDDEN_MODEL_KEYS}
)
"""Keys of a configuration that say how a checkpoint was made, not what the model is."""
SOURCE_HINT = "name a hub's model, a folder with config.json and safetensors, or a .gguf file"


class Pretrained(BaseModel):
    """What `swarm run base` leaves for `swarm run init`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: dict[str, Any]
    base: Base
    tokenizer: Tree


def read_weights(network: torch.nn.Module, path: Path) -> None:
    """Copy a base's weights into a network of its architecture. Raises `DataInvalid` for whatever doesn't fit."""
    parameters = dict(network.named_parameters())
    try:
        with safe_open(path, framework="pt") as file:
            _check_names(set(file.keys()), set(parameters))
            for name, parameter in parameters.items():
                stored = file.get_slice(name)
                if stored.get_dtype() not in STORED or tuple(stored.get_shape()) != tuple(parameter.shape):
                    shape = tuple(stored.get_shape())
                    raise DataInvalid(f"the base's {name} is {stored.get_dtype()} {shape} and not {tuple(parameter.shape)}")
                value = file.get_tensor(name)
                if not bool(torch.isfinite(value).all()):
                    raise DataInvalid(f"the base's {name} has values that are not finite")
                with torch.no_grad():
                    parameter.copy_(value)
    except (OSError, SafetensorError) as error:
        raise DataInvalid(f"the base {path} can't be read: {error}", "delete it; it will be fetched again") from error


def import_pretrained(source: str, to: Path, dtype: str = "") -> Pretrained:
    """Write weights, tokenizer and `base.yaml` of a model into `to`, all or nothing.

    `dtype` is what weights are stored in; by default what they have, and float16 for those of a GGUF file. Raises `DataInvalid`.
    """
    disable_progress_bar()
    network, tokenizer = _load(source)
    stored = DTYPES[dtype] if dtype else _stored(network, source)
    with tempfile.TemporaryDirectory(prefix=f".{to.name}-", dir=to.parent) as temporary:
        unfinished = Path(temporary) / to.name
        unfinished.mkdir()
        weights = unfinished / "weights"
        named = {name: value.detach().to(stored).contiguous() for name, value in network.named_parameters()}
        save_file(named, weights)
        tree = tree_of_file(weights)
        weights.rename(tree_path(unfinished, tree))
        made = Pretrained(
            config=_plain_config(network.config),
            base=Base(**tree.model_dump(), name=_name(source)),
            tokenizer=save_tokenizer(tokenizer.backend_tokenizer, unfinished),
        )
        (unfinished / TOKENIZER).symlink_to(made.tokenizer.root)
        if tokenizer.chat_template:
            (unfinished / TEMPLATE).write_text(tokenizer.chat_template)
        (unfinished / FILE).write_text(yaml.safe_dump(made.model_dump(mode="json"), sort_keys=False))
        if to.exists():
            to.rmdir()
        unfinished.rename(to)
    return made


def read_pretrained(folder: Path) -> Pretrained:
    """What `import_pretrained` has left in a folder. Raises `DataInvalid`."""
    try:
        return Pretrained.model_validate(yaml.safe_load((folder / FILE).read_text()))
    except FileNotFoundError as error:
        raise DataInvalid(f"{folder} has no {FILE}", f"make it with: swarm run base MODEL --to {folder}") from error
    except (OSError, yaml.YAMLError, ValidationError, UnicodeDecodeError) as error:
        raise DataInvalid(f"{folder / FILE} is damaged: {error}", "import the model anew") from error


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


def _plain_config(config: Any) -> dict[str, Any]:
    """The configuration by value, without what describes the file. Raises `DataInvalid` for what isn't plain."""
    values = {key: value for key, value in config.to_diff_dict().items() if key not in DESCRIBES_THE_FILE and key[:1] != "_"}
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


def _check_names(found: set[str], wanted: set[str]) -> None:
    if found == wanted:
        return
    missing, unknown = sorted(wanted - found), sorted(found - wanted)
    problem = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which the model hasn't"
    raise DataInvalid(f"the base doesn't fit the model: it {problem}", "model.config and model.base must be of one model")
