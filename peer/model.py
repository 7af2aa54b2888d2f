"""The model of a run: built from plain configuration values, counted, and mapped to one flat float32 vector.

Training, loss and optimizers are elsewhere; nothing here is loaded from a network or executed from a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from numpy.typing import NDArray
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from peer.adapters import adapted, deviation, is_first
from peer.architectures import attention_of, check_kind, check_looks_back
from peer.buffers import buffers
from peer.data import tree_path
from peer.nf4 import BYTES_PER_WEIGHT, Nf4Linear, layers_of, pack_layers
from peer.pretrained import read_weights
from swarm import manifest
from swarm.errors import DataInvalid

Vector = NDArray[np.float32]

MAX_LAYERS = 1000
SAMPLED_VALUES = 64
FORBIDDEN_KEYS = frozenset(
    {
        "attn_implementation",  # a name with a slash would load a kernel from a hub
        "experts_implementation",
        "auto_map",
        "custom_pipelines",
        "quantization_config",
        "trust_remote_code",
        "use_kernels",
    }
)
EXPERT_COUNT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
VISITED_KEYS = ("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k")


@dataclass(frozen=True)
class TensorEntry:
    """Where one parameter lies in the flat vector."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape, dtype=np.int64))


def build_model(model: manifest.Model, files: Path | None = None) -> nn.Module:
    """A causal language model in fp32 on the CPU, whose initial weights are the same bits on every processor.

    With an adapter the frozen weights are the base's, out of `files`, where it lies by its root; None leaves them out, for who
    only measures. What is trained of a base itself is for `initial_theta` to read. Raises `DataInvalid` for an architecture that
    transformers doesn't have, for values that it refuses, for a base or an adapter that doesn't fit, and for a number of trained
    parameters other than the manifest's.
    """
    check_parameters(model)
    if model.base is None:
        return _random_model(model)
    network = _packed_model(model) if model.base.stored == "nf4" else _instantiate(model.config, seed=model.seed)
    if model.adapter is not None:
        if files is not None:
            read_weights(network, tree_path(files, model.base))
        network = adapted(network, model.adapter, model.base.name)
        _initialise_adapter(network, model.seed)
    return network


def frozen_base(model: manifest.Model, files: Path) -> nn.Module:
    """The base as it is, in fp32 on the CPU, for what trains nothing. Raises `DataInvalid` for one that doesn't fit."""
    if model.base is None:
        raise DataInvalid("there is no base", "name one with --base")
    network: nn.Module = _instantiate(model.config, seed=model.seed)
    refuse_changing_buffers(network)
    read_weights(network, tree_path(files, model.base))
    return network.requires_grad_(False).eval()


def store_frozen(network: nn.Module, dtype: torch.dtype) -> None:
    """Keep the frozen weights of linear layers in the precision that autocast would turn them into for every product."""
    if dtype == torch.float32:
        return
    for module in network.modules():
        if isinstance(module, nn.Linear) and not isinstance(module, Nf4Linear) and not module.weight.requires_grad:
            module.weight.data = module.weight.data.to(dtype)


def check_parameters(model: manifest.Model) -> None:
    """Raise `DataInvalid` unless the model can be built and has as many trained parameters as the manifest says.

    One that is only used as it is trains none, whatever it has.
    """
    network = skeleton(model.config)
    refuse_changing_buffers(network)
    if model.base is not None and model.base.stored == "nf4":
        layers_of(network)
    if model.is_frozen:
        return
    found = _count(network, model.adapter)
    if found != model.parameters:
        trained = "trains" if model.adapter is not None else "has"
        raise DataInvalid(f"the model {trained} {found} parameters, the manifest says {model.parameters}")


def _packed_model(model: manifest.Model) -> nn.Module:
    """A model of zeros whose linear layers are in 4 bits; its weights have never been there in full."""
    with init_empty_weights(include_buffers=False):
        network = _instantiate(model.config, seed=model.seed)
    network.tie_weights()
    pack_layers(network)
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in made:
                made[parameter] = nn.Parameter(torch.zeros(parameter.shape))
            setattr(module, name, made[parameter])
    return network  # type: ignore[no-any-return]


def _random_model(model: manifest.Model) -> nn.Module:
    samples = [value.clone() for _, value in _samples(_instantiate(model.config, seed=model.seed ^ 1))]
    network: nn.Module = _instantiate(model.config, seed=model.seed)
    random_names = {
        name for (name, value), other in zip(_samples(network), samples, strict=True) if not torch.equal(value, other)
    }
    _initialise(network, random_names, model.seed)
    return network


def initial_theta(model: manifest.Model, files: Path | None = None) -> Vector:
    """The weights that every peer starts a new run with, [parameters]. Raises `DataInvalid` as `build_model`."""
    if model.is_frozen:
        check_parameters(model)
        return np.zeros(1, dtype=np.float32)
    if model.base is not None and files is None:
        raise DataInvalid("the run begins with a pretrained model, whose file isn't here")
    network = build_model(model, files)
    if model.base is not None and model.adapter is None and files is not None:
        read_weights(network, tree_path(files, model.base))
    return FlatParameters(network).read(network)


def count_parameters(config: Mapping[str, Any], adapter: manifest.Lora | None = None) -> int:
    """Number of trained parameters, tied ones once: the adapter's where there is one. Allocates nothing."""
    return _count(skeleton(config), adapter)


def _count(network: Any, adapter: manifest.Lora | None) -> int:
    if adapter is not None:
        with torch.device("meta"):
            network = adapted(network, adapter)
    return sum(parameter.numel() for _, parameter in _trained(network))


def generation_flops_per_token(config: Mapping[str, Any], sequence_length: int) -> int:
    """FLOPs of a forward pass per token, a third of what `flops_per_token` counts for training on it."""
    return flops_per_token(config, sequence_length) // 3


def flops_per_token(config: Mapping[str, Any], sequence_length: int, adapter: manifest.Lora | None = None) -> int:
    """Training FLOPs per token: 6 x active matrix parameters + 12 x layers x heads x head size x sequence length.

    PaLM (2204.02311), appendix B, and Chinchilla (2203.15556), appendix F, with the embedding look-up counted as free
    and the output head counted even where it is tied. Of a mixture of experts only those that a token visits count. With an
    adapter the frozen parameters count 4 times, as they have no gradients of their own, and those of the adapter 6 times.
    """
    network = skeleton(config)
    settings = network.config.get_text_config()
    attention = 12 * _attention_width(settings) * sequence_length
    active = _active_matrix_parameters(network, settings)
    if adapter is not None:
        return 4 * active + 6 * count_parameters(config, adapter) + attention
    return 6 * active + attention


def frozen_bytes(model: manifest.Model) -> int:
    """What the frozen weights beneath an adapter take in memory, before a device halves them; 0 where everything is trained."""
    if model.base is None or model.adapter is None:
        return 0
    network = skeleton(model.config)
    layers = layers_of(network).values() if model.base.stored == "nf4" else ()
    packed = sum(layer.weight.numel() for layer in layers)
    whole = sum(parameter.numel() for parameter in network.parameters()) - packed
    return int(4 * whole + BYTES_PER_WEIGHT * packed)


def _attention_width(settings: Any) -> int:
    """Layers x heads x head size; 0 for an architecture without attention."""
    heads = int(getattr(settings, "num_attention_heads", None) or 0)
    if not heads:
        return 0
    return int(settings.num_hidden_layers) * heads * int(getattr(settings, "head_dim", None) or settings.hidden_size // heads)


def experts_of(settings: Any) -> tuple[int, int]:
    """How many experts a layer has, and how many of them a token visits; both 1 for a model without."""
    places = [place for place in (settings, getattr(settings, "ffn_config", None)) if place is not None]
    experts, visited = (
        next((int(getattr(place, key)) for place in places for key in keys if getattr(place, key, None)), 1)
        for keys in (EXPERT_COUNT_KEYS, VISITED_KEYS)
    )
    return (experts, visited) if experts > 1 else (1, 1)


def _active_matrix_parameters(network: Any, settings: Any) -> int:
    experts, visited = experts_of(settings)
    lookups = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    head = network.get_output_embeddings().weight
    total = head.numel()
    for name, parameter in network.named_parameters():
        if parameter.ndim < 2 or id(parameter) in lookups or parameter is head:
            continue
        is_expert = ".experts." in name or (parameter.ndim == 3 and parameter.shape[0] == experts)
        total += parameter.numel() * visited // experts if is_expert else parameter.numel()
    return int(total)


def skeleton(config: Mapping[str, Any]) -> Any:
    """The network of a configuration without memory for its weights. Raises `DataInvalid` as `build_model`."""
    with torch.device("meta"):
        return _instantiate(config, seed=0)


def _instantiate(config: Mapping[str, Any], seed: int) -> Any:
    _check_values(config)
    values = dict(config)
    kind = values.pop("model_type", None)
    check_kind(kind)
    try:
        settings = AutoConfig.for_model(kind, **values)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = AutoModelForCausalLM.from_config(settings, attn_implementation=attention_of(settings), dtype=torch.float32)
    except Exception as error:  # what transformers raises for nonsense has no common base
        problem = " ".join(str(error).split())[:200]
        raise DataInvalid(
            f"transformers can't build a {kind!r} model: {problem}", "check model.config in the manifest"
        ) from error
    check_looks_back(network.config)
    return network


def _check_values(config: Mapping[str, Any]) -> None:
    for key, value in _walk(config):
        if key in FORBIDDEN_KEYS or key.startswith("_"):
            raise DataInvalid(f"model.config.{key} is not allowed: a manifest can't make a peer run code")
        if key.endswith("layers") and isinstance(value, int) and value > MAX_LAYERS:
            raise DataInvalid(f"model.config.{key} is larger than {MAX_LAYERS}")


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key), item
            yield from _walk(item)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for item in value:
            yield from _walk(item)


def _samples(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in network.named_parameters():
        yield name, parameter.detach().flatten()[:SAMPLED_VALUES]


def _initialise(network: nn.Module, random_names: set[str], seed: int) -> None:
    """Replace the parameters that torch drew at random: its normal generator gives other bits on other processors."""
    for index, (name, parameter) in enumerate(sorted(network.named_parameters())):
        if name not in random_names:
            continue
        drawn = torch.from_numpy(_bell(seed, index, parameter.numel(), _deviation(parameter))).view(parameter.shape)
        empty_rows = (parameter.detach().reshape(parameter.shape[0], -1) == 0).all(dim=1)
        drawn[empty_rows] = 0
        with torch.no_grad():
            parameter.copy_(drawn)


def _initialise_adapter(network: nn.Module, seed: int) -> None:
    """First matrices at random, second ones zero: the adapted model begins as the base."""
    for index, (name, parameter) in enumerate(_trained(network)):
        if is_first(name):
            drawn = torch.from_numpy(_bell(seed, index, parameter.numel(), deviation(parameter))).view(parameter.shape)
            with torch.no_grad():
                parameter.copy_(drawn)


def _deviation(parameter: torch.Tensor) -> float:
    """The standard deviation that torch drew with, to two digits, so that last bits don't show."""
    return float(f"{parameter.detach().double().std().item():.1e}")


def _bell(seed: int, index: int, count: int, deviation: float) -> Vector:
    """`count` float32 values with mean 0: sums of four uniform 16-bit integers (Irwin-Hall), exact on every machine."""
    words = np.random.Philox(key=np.array([seed, index], dtype=np.uint64)).random_raw(count)  # [count] uint64
    quarters = np.asarray(words, dtype="<u8").view("<u2").reshape(count, 4)
    centred = quarters.sum(axis=1, dtype=np.int64) - 2 * 65535
    scale = np.float32(deviation / ((65536**2 - 1) / 3) ** 0.5)
    values: Vector = np.multiply(centred.astype(np.float32), scale, dtype=np.float32)
    return values


def refuse_changing_buffers(network: nn.Module) -> None:
    """Raise `DataInvalid` for persistent float buffers, such as running statistics.

    Training changes them and no update carries them.
    """
    parameters = dict(network.named_parameters(remove_duplicate=False))
    for name, value in network.state_dict().items():
        if name not in parameters and value.is_floating_point():
            raise DataInvalid(f"the model keeps {name} outside its parameters; such models can't be trained together")


class FlatParameters:
    """The fixed mapping between a model's trained parameters and one flat float32 vector.

    Order: by name, in code point order, each tied parameter once under the name that `named_parameters` gives it;
    values row-major.
    """

    def __init__(self, network: nn.Module) -> None:
        refuse_changing_buffers(network)
        entries: list[TensorEntry] = []
        offset = 0
        for name, parameter in _trained(network):
            entries.append(TensorEntry(name, tuple(parameter.shape), offset))
            offset += parameter.numel()
        self.table = tuple(entries)
        self.size = offset

    def read(self, network: nn.Module) -> Vector:
        """A copy of the parameters as one vector, [size]."""
        return self._gather([parameter for _, parameter in _trained(network)])

    def read_gradients(self, network: nn.Module) -> Vector:
        """A copy of the gradients as one vector, [size]; zero where there is none."""
        return self._gather([parameter.grad for _, parameter in _trained(network)])

    def read_difference(self, theta: Vector, network: nn.Module) -> Vector:
        """`theta` minus the parameters, [size], tensor by tensor on the model's device."""
        self._check_shape(theta)
        out = buffers.empty(self.size)
        with torch.no_grad():
            for entry, (_, parameter) in zip(self.table, _trained(network), strict=True):
                piece = self._piece(theta, entry).to(parameter.device)
                self._piece(out, entry).copy_(piece - parameter)
        return out

    def pieces(self, network: nn.Module, *, gradients: bool = False) -> Iterator[tuple[int, torch.Tensor | None]]:
        """The parameters, or their gradients, where they lie, each with its place in the vector."""
        for entry, (_, parameter) in zip(self.table, _trained(network), strict=True):
            yield entry.offset, parameter.grad if gradients else parameter

    def write(self, network: nn.Module, vector: Vector) -> None:
        """Copy `vector`, [size], into the model's parameters in place."""
        self._check_shape(vector)
        with torch.no_grad():
            for entry, (_, parameter) in zip(self.table, _trained(network), strict=True):
                parameter.copy_(self._piece(vector, entry))

    def _gather(self, tensors: Sequence[torch.Tensor | None]) -> Vector:
        out = buffers.empty(self.size)
        for entry, tensor in zip(self.table, tensors, strict=True):
            if tensor is not None:
                self._piece(out, entry).copy_(tensor.detach())
            else:
                self._piece(out, entry).zero_()
        return out

    @staticmethod
    def _piece(vector: Vector, entry: TensorEntry) -> torch.Tensor:
        """One tensor of a vector, in its shape; a view where the vector may be written to."""
        piece = vector[entry.offset : entry.offset + entry.size]
        return torch.from_numpy(piece if piece.flags.writeable else piece.copy()).view(entry.shape)

    def _check_shape(self, vector: Vector) -> None:
        if vector.shape != (self.size,) or vector.dtype != np.float32:
            raise DataInvalid(f"a vector of {vector.shape} {vector.dtype} doesn't fit a model of {self.size} parameters")


def _trained(network: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return sorted((item for item in network.named_parameters() if item[1].requires_grad), key=lambda item: item[0])
