"""What a mixture of experts costs in traffic against a dense model of as many active parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.report import Report, workspace
from bench.single import one_thread
from peer.codec import decode, make_codec
from peer.codec.feedback import ErrorFeedback
from peer.model import count_parameters, flops_per_token, initial_theta
from peer.recipes import demo_manifest
from peer.trainer import Trainer
from swarm import auto
from swarm.manifest import Codec, Manifest

EXPERTS, VISITED = 4, 2
WIDTH, LAYERS, SEQUENCE_LENGTH = 128, 2, 128
STEPS, ROUNDS, QUICK_ROUNDS = 10, 4, 1
DATA_BYTES = 300_000
CPU = torch.device("cpu")


@one_thread()
def measure_mixture(out: Report) -> None:
    """Real rounds of one peer each, encoded as they would be sent."""
    rounds = out.choose(ROUNDS, QUICK_ROUNDS)
    with workspace() as folder:
        dense = demo_manifest(
            folder, data_bytes=DATA_BYTES, peers=1, inner_steps=STEPS, hidden_size=WIDTH, layers=LAYERS, name="dense"
        )
        runs = {"dense": dense, f"{EXPERTS} experts": _mixture(dense)}
        costs = {name: _bytes_per_active_parameter(out, name, run, folder, rounds) for name, run in runs.items()}
    per_dense, per_mixture = costs.values()
    totals = [run.model.parameters / active_parameters(run.model.config) for run in runs.values()]
    how = (
        f"bytes of encoded updates per round and active parameter, {per_mixture:.4f} over {per_dense:.4f}: `sparse`, "
        f"{rounds} rounds of {STEPS} steps; {EXPERTS} experts, of which a token visits {VISITED}, against a Llama of as many "
        f"active parameters; what travels follows all parameters: the mixture has {totals[1]:.2f} of them per active one, the "
        f"Llama {totals[0]:.2f}"
    )
    out.figure("moe_bytes_per_active_parameter_over_dense", per_mixture / per_dense, how, f"<= {EXPERTS / VISITED:g}")


def active_parameters(config: dict[str, Any]) -> int:
    """Those in whose products a token takes part: what credit counts."""
    return flops_per_token(config, 0) // 6


def _mixture(dense: Manifest) -> Manifest:
    """The same run with experts that together have as many active parameters."""
    config = dense.model.config | {"model_type": "mixtral", "num_local_experts": EXPERTS, "num_experts_per_tok": VISITED}
    config["intermediate_size"] //= VISITED
    model = {"config": config, "seed": dense.model.seed, "parameters": count_parameters(config)}
    return Manifest.model_validate(dense.model_dump(mode="json") | {"model": model})


def _bytes_per_active_parameter(out: Report, name: str, run: Manifest, files: Path, rounds: int) -> float:
    """The mean over rounds, each of which goes on from what the others would have decoded."""
    parameters = run.model.parameters
    settings = Codec(kind="sparse", part_values=auto.part_values("sparse", parameters), leave_out_zeros=name != "dense")
    codec = make_codec(settings, parameters)
    feedback, trainer, theta = ErrorFeedback(codec), Trainer.open(run, CPU, files), initial_theta(run.model)
    sizes, active = [], active_parameters(run.model.config)
    for number in range(rounds):
        made = trainer.train_round(theta, number + 1, "bench", STEPS, 0)
        parts = feedback.encode(made.update)
        sizes.append(sum(map(len, parts)))
        theta = theta - decode(codec, parts)
        load = {} if made.experts is None else {"busiest": made.experts.busiest, "idlest": made.experts.idlest}
        out.row("mixture", model=name, round=number + 1, parameters=parameters, active=active, bytes=sizes[-1], **load)
    return float(np.mean(sizes)) / active
