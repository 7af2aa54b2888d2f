"""The gate in front of every method: table, rate, deadline, and the only place where exceptions become gRPC statuses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import structlog
from prometheus_client import Histogram

from coordinator.auth import HEALTH, Policy, Rule, rule_for, signed_part
from coordinator.errors import answer_to
from coordinator.limits import CALL_DEADLINE_S, Rate, RateLimiter
from coordinator.metrics import Metrics
from swarm.clock import Clock
from swarm.errors import Rejected
from swarm.rpc.client import REASON_KEY

ADDRESS_BURST_S = 2.0  # at once, as much as in so many seconds
KEY_BURST_S = 10.0
PER_ADDRESS = Rate(per_s=2000, burst=4000)  # before any signature is checked; many peers may share an address
PER_KEY = Rate(per_s=50, burst=500)  # after a day without coordinator a peer hands in many reports at once

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg] # generic in the stubs only
    """Wraps every handler."""

    def __init__(
        self,
        clock: Clock,
        metrics: Metrics,
        is_admitted: Callable[[str], bool],
        per_address: Rate = PER_ADDRESS,
        per_key: Rate = PER_KEY,
        is_ours: Callable[[Context], bool] = lambda context: False,
    ) -> None:
        self._clock = clock
        self._metrics = metrics
        self._is_admitted = is_admitted
        self._addresses = RateLimiter(per_address)
        self._keys = RateLimiter(per_key)
        self._is_ours = is_ours
        self._wrapped: dict[str, Any] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The wrapped handler of one call; a method's handler is wrapped once."""
        method = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is None:
            handler = await continuation(handler_call_details)
            if handler is None or method.startswith(HEALTH):
                return handler
            wrapped = self._wrapped[method] = self._wrap(method, handler)
        return wrapped

    def _wrap(self, method: str, handler: Any) -> Any:
        make = grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        wrap = self._streaming if handler.response_streaming else self._unary
        behaviour = handler.unary_stream if handler.response_streaming else handler.unary_unary
        return make(wrap(method, behaviour), handler.request_deserializer, handler.response_serializer)

    def take(self, key: str) -> None:
        """Count one signed message of a key, whose signature was checked. Raises `Rejected` when it sends too many."""
        self._keys.take(key, self._clock.monotonic_s())

    def _unary(self, method: str, behaviour: Callable[[Any, Any], Awaitable[Any]]) -> Any:
        name, seconds = self._measured(method)

        async def call(request: Any, context: Context) -> Any:
            started_s = time.perf_counter()
            try:
                self._admit(rule_for(method), request, context)
                async with asyncio.timeout(CALL_DEADLINE_S):
                    return await behaviour(request, context)
            except grpc.aio.AbortError:
                raise
            except Exception as error:  # noqa: BLE001 - the outermost boundary of a call; counted, logged and answered
                await self._refuse(name, error, context)
            finally:
                seconds.observe(time.perf_counter() - started_s)

        return call

    def _streaming(self, method: str, behaviour: Callable[[Any, Any], AsyncIterator[Any]]) -> Any:
        name, seconds = self._measured(method)

        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            started_s = time.perf_counter()
            try:
                self._admit(rule_for(method), request, context)
                async for answer in behaviour(request, context):
                    yield answer
            except grpc.aio.AbortError:
                raise
            except Exception as error:  # noqa: BLE001 - the outermost boundary of a call; counted, logged and answered
                await self._refuse(name, error, context)
            finally:
                seconds.observe(time.perf_counter() - started_s)

        return call

    def _measured(self, method: str) -> tuple[str, Histogram]:
        name = method.rpartition("/")[2]
        return name, self._metrics.request_duration_seconds.labels(name)

    def _admit(self, rule: Rule, request: Any, context: Context) -> None:
        if not self._is_ours(context):
            self._addresses.take(_address(context.peer()), self._clock.monotonic_s())
        if rule.policy is not Policy.PUBLIC:
            signed_part(rule, request, self._is_admitted)

    async def _refuse(self, method: str, error: Exception, context: Context) -> None:
        answer = answer_to(error)
        self._metrics.rejected_messages_total.labels(answer.reason).inc()
        if answer.private:
            log.error("call_failed", method=method, reason=answer.reason, exc_info=error)
        else:
            sender = error.sender if isinstance(error, Rejected) else ""
            log.info("call_refused", method=method, reason=answer.reason, sender=sender)
        await context.abort(answer.status, answer.message, ((REASON_KEY, answer.reason),))


def _address(peer: str) -> str:
    """The caller's address without its port."""
    return peer.rpartition(":")[0]
