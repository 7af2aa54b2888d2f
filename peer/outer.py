"""The outer step: the merged update turns `theta_r` into `theta_{r+1}`, with the same bits on every machine.

Only separate additions, multiplications, divisions and square roots on float32, element by element in cache-sized
blocks; the outcome depends neither on the block size nor on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from peer.buffers import buffers
from peer.merge import arithmetic_is_ieee, norm
from peer.optimizer import lr_factor
from peer.spikes import Recent
from swarm import manifest
from swarm.errors import SwarmError

Vector = NDArray[np.float32]

BLOCK_VALUES = 1 << 15
THETA = "theta"
FIRST_MOMENT = "first_moment"
SECOND_MOMENT = "second_moment"
MOMENTUM = "momentum"


@dataclass(frozen=True)
class OuterState:
    """Weights, outer buffers and counters after a round. Arrays become read-only.

    `theta` and every buffer are float32 [parameters]; `beta1_power` and `beta2_power` are beta^step of AdamW, 1 where
    there is none. `recent` is what spikes are told by, in runs that skip them.
    """

    theta: Vector
    buffers: Mapping[str, Vector] = field(default_factory=dict)
    round: int = 0
    tokens: int = 0
    step: int = 0
    beta1_power: float = 1.0
    beta2_power: float = 1.0
    recent: Recent = Recent()

    def __post_init__(self) -> None:
        object.__setattr__(self, "buffers", MappingProxyType(dict(self.buffers)))
        for _, array in self.arrays():
            if array.shape != self.theta.shape or array.ndim != 1 or array.dtype != np.float32:
                raise ValueError("the arrays of a state are float32 vectors of one length")
            array.setflags(write=False)

    def arrays(self) -> list[tuple[str, Vector]]:
        """Every array with its name: `theta` first, then the buffers by name."""
        return [(THETA, self.theta), *sorted(self.buffers.items(), key=lambda item: item[0])]


def buffer_names(strategy: manifest.Strategy) -> tuple[str, ...]:
    """The outer buffers that a strategy keeps, in order."""
    match strategy:
        case manifest.Sync():
            return (FIRST_MOMENT, SECOND_MOMENT)
        case manifest.DiLoCo():
            return (MOMENTUM,) if strategy.outer.momentum > 0 else ()
        case manifest.Generate():
            return ()


def initial_state(strategy: manifest.Strategy, theta: Vector) -> OuterState:
    """The state before the first round."""
    return OuterState(theta, {name: np.zeros_like(theta) for name in buffer_names(strategy)})


def advance(strategy: manifest.Strategy, state: OuterState, merged: Vector | None, tokens: int, loss: float) -> OuterState:
    """The state after a round, whether or not it changes the weights. `loss` is the round's, in nats per token.

    None is merged where nobody contributed. A spike, where the run skips them, leaves weights and buffers as they are; its tokens
    count, as they have been used.
    """
    if merged is None:
        return replace(state, round=state.round + 1)
    if isinstance(strategy, manifest.Generate) or strategy.skip_spikes is None:
        return apply(strategy, state, merged, tokens)
    recent = state.recent.after(strategy.skip_spikes, loss, norm(merged))
    if recent.skipped > state.recent.skipped:
        return replace(state, round=state.round + 1, tokens=state.tokens + tokens, recent=recent)
    return replace(apply(strategy, state, merged, tokens), recent=recent)


def apply(
    strategy: manifest.Strategy,
    state: OuterState,
    merged: Vector,
    tokens: int,
    *,
    threads: int = 1,
    block_values: int = BLOCK_VALUES,
) -> OuterState:
    """The next state: `merged`, [parameters], is the round's merged update and `tokens` the number of tokens behind it.

    Raises `SwarmError` where this process doesn't compute as IEEE 754 says.
    """
    if not arithmetic_is_ieee():
        raise SwarmError("this process flushes subnormal numbers to zero", "a library switched it on; peers would disagree")
    if merged.shape != state.theta.shape or merged.dtype != np.float32:
        raise ValueError(f"an update of {merged.shape} {merged.dtype} for {state.theta.size} parameters")
    blocks = _Blocks(state.theta.size, threads, block_values)
    match strategy:
        case manifest.Sync():
            return _adamw(strategy, state, merged, tokens, blocks)
        case manifest.DiLoCo():
            return _averaging(strategy.outer, state, merged, tokens, blocks)
        case manifest.Generate():
            return replace(state, round=state.round + 1, tokens=state.tokens + tokens)


@dataclass(frozen=True)
class _Blocks:
    size: int
    threads: int
    block_values: int

    def each(self, function: Callable[[slice], None]) -> None:
        spans = [slice(start, min(start + self.block_values, self.size)) for start in range(0, self.size, self.block_values)]
        if self.threads == 1:
            for span in spans:
                _quietly(function, span)
            return
        with ThreadPoolExecutor(self.threads) as pool:
            for _ in pool.map(lambda span: _quietly(function, span), spans):
                pass


def _quietly(function: Callable[[slice], None], span: slice) -> None:
    with np.errstate(all="ignore"):
        function(span)


def _adamw(strategy: manifest.Sync, state: OuterState, merged: Vector, tokens: int, blocks: _Blocks) -> OuterState:
    """AdamW (Loshchilov and Hutter, 2019) on the merged gradient, clipped to `clip_norm`."""
    settings = strategy.optimizer
    rate = settings.lr * lr_factor(strategy.schedule, state.tokens + tokens)
    length = norm(merged)
    clip = np.float32(strategy.clip_norm / length if length > strategy.clip_norm else 1.0)
    power1, power2 = state.beta1_power * settings.beta1, state.beta2_power * settings.beta2
    beta1, beta2 = np.float32(settings.beta1), np.float32(settings.beta2)
    rest1, rest2 = np.float32(1 - settings.beta1), np.float32(1 - settings.beta2)
    correction1, correction2 = np.float32(1 - power1), np.float32(1 - power2)
    epsilon, decay, step_size = np.float32(settings.epsilon), np.float32(rate * settings.weight_decay), np.float32(rate)
    theta, first, second = (buffers.empty(state.theta.size) for _ in range(3))
    old_first, old_second = state.buffers[FIRST_MOMENT], state.buffers[SECOND_MOMENT]

    def block(span: slice) -> None:
        gradient = merged[span] * clip
        np.add(old_first[span] * beta1, gradient * rest1, out=first[span])
        np.multiply(gradient, gradient, out=gradient)
        np.add(old_second[span] * beta2, gradient * rest2, out=second[span])
        denominator = np.sqrt(second[span] / correction2) + epsilon
        direction = first[span] / correction1 / denominator
        old = state.theta[span]
        np.subtract(old - old * decay, direction * step_size, out=theta[span])

    blocks.each(block)
    return OuterState(
        theta,
        {FIRST_MOMENT: first, SECOND_MOMENT: second},
        state.round + 1,
        state.tokens + tokens,
        state.step + 1,
        power1,
        power2,
    )


def _averaging(outer: manifest.Outer, state: OuterState, merged: Vector, tokens: int, blocks: _Blocks) -> OuterState:
    """`theta - lr * update`, with Nesterov momentum where the manifest asks for it (DiLoCo, 2311.08105)."""
    rate, momentum = np.float32(outer.lr), np.float32(outer.momentum)
    theta = buffers.empty(state.theta.size)
    arrays = {name: buffers.empty(array.size) for name, array in state.buffers.items()}

    def block(span: slice) -> None:
        update = merged[span]
        if MOMENTUM in arrays:
            velocity = arrays[MOMENTUM]
            np.add(state.buffers[MOMENTUM][span] * momentum, update, out=velocity[span])
            update = update + velocity[span] * momentum
        np.subtract(state.theta[span], update * rate, out=theta[span])

    blocks.each(block)
    return OuterState(theta, arrays, state.round + 1, state.tokens + tokens, state.step + 1)
