"""The gate in front of every method: table, rates, ceilings, deadlines, and the only place where exceptions become gRPC statuses.

A caller that is slow to send its request or to take an answer is cut off after a while: we stop working for it and its place is
free. gRPC itself keeps such a call until its connection ends, which is what the connection's greatest age is for (`server`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any
from urllib.parse import unquote

import grpc
import structlog
from prometheus_client import Histogram

from coordinator.auth import Rule, rule_for, signed_part
from coordinator.errors import answer_to
from coordinator.limits import (
    CALL_DEADLINE_S,
    STREAM_DEADLINE_S,
    CallsInProgress,
    Ceilings,
    NewKeys,
    Rate,
    RateLimiter,
    network_of,
)
from coordinator.metrics import CallMetrics
from swarm.clock import Clock
from swarm.errors import Rejected
from swarm.identity import verify
from swarm.rpc.client import REASON_KEY
from swarm.tracing import NO_SPAN, TRACEPARENT, Span, Tracer

ADDRESS_BURST_S = 2.0  # at once, as much as in so many seconds
KEY_BURST_S = 10.0
PER_ADDRESS = Rate(per_s=2000, burst=4000)  # before any signature is checked; many peers may share an address
NEW_KEYS_PER_HOUR = 256  # of one network, and of one account
PER_KEY = Rate(per_s=50, burst=500)  # after a day without coordinator a peer hands in many reports at once

FOLLOWED = Rate(per_s=5, burst=50)  # traces of one peer: what it has signed can be read in the ledger and sent again by others

DEFAULT_CEILINGS = Ceilings()
CUT_OFF = grpc.StatusCode.CANCELLED  # by its caller, or by us where its caller is too slow
OURS = "replicas"
CALLER_KEY = "swarm-caller"

_receiving: ContextVar[asyncio.TimerHandle] = ContextVar("receiving")

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class Guard:
    """Wraps every handler of a service that is added to what `before` returns."""

    def __init__(
        self,
        clock: Clock,
        metrics: CallMetrics,
        is_admitted: Callable[[str], bool],
        per_address: Rate = PER_ADDRESS,
        per_key: Rate = PER_KEY,
        is_ours: Callable[[Context], bool] = lambda context: False,
        ceilings: Ceilings = DEFAULT_CEILINGS,
        new_keys_per_network: int = NEW_KEYS_PER_HOUR,
        new_keys_per_account: int = NEW_KEYS_PER_HOUR,
    ) -> None:
        self._clock = clock
        self._metrics = metrics
        self._is_admitted = is_admitted
        self._addresses = RateLimiter(per_address)
        self._keys = RateLimiter(per_key)
        self._new_of_network = NewKeys(new_keys_per_network)
        self._new_of_account = NewKeys(new_keys_per_account)
        self._is_ours = is_ours
        self._calls = CallsInProgress(ceilings)
        self._slow_call_s = ceilings.slow_call_s
        self._wrapped: dict[str, Any] = {}
        self.tracer: Tracer | None = None
        self.traced: frozenset[str] = frozenset()
        self._traces = RateLimiter(FOLLOWED)

    def before(self, server: grpc.aio.Server) -> Any:
        """Where to add services that this guard shall stand before."""
        return _Guarded(self, server)

    def handler(self, details: grpc.HandlerCallDetails, handlers: grpc.GenericRpcHandler[Any, Any]) -> Any:
        """The wrapped handler of a call that begins now, in the task of the call. A method's handler is wrapped once."""
        wrapped = self._wrapped.get(details.method)
        if wrapped is None:
            handler = handlers.service(details)
            if handler is None:
                return None
            wrapped = self._wrapped[details.method] = self._wrap(details.method, handler)
        _receiving.set(self._cut_off_when_slow())
        return wrapped

    def _wrap(self, method: str, handler: Any) -> Any:
        make = grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        wrap = self._streaming if handler.response_streaming else self._unary
        behaviour = handler.unary_stream if handler.response_streaming else handler.unary_unary
        return make(wrap(method, behaviour), handler.request_deserializer, handler.response_serializer)

    @property
    def calls_in_progress(self) -> int:
        """How many calls hold a place."""
        return len(self._calls)

    def take(self, key: str) -> None:
        """Count one signed message of a key, whose signature was checked. Raises `Rejected` when it sends too many."""
        self._keys.take(key, self._clock.monotonic_s())

    def take_new_key(self, context: Context, account: str) -> None:
        """Count a key that is about to be admitted for the first time, for an account or, where that is empty, for itself.

        Raises `Rejected` when its account or its network brings too many.
        """
        now_s = self._clock.monotonic_s()
        if account:
            self._new_of_account.take(account, now_s)
        self._new_of_network.take(network_of(address_of(context, trusted=self._is_ours(context))), now_s)

    def _unary(self, method: str, behaviour: Callable[[Any, Any], Awaitable[Any]]) -> Any:
        name, seconds = self._measured(method)

        async def call(request: Any, context: Context) -> Any:
            started_s, code = time.perf_counter(), CUT_OFF
            _received()
            with self._traced(method, request, context) as span:
                try:
                    with self._counted(context):
                        rule = rule_for(method)
                        self._take_further(rule, request, context)
                        signed_part(rule, request, self._is_admitted)
                        async with asyncio.timeout(CALL_DEADLINE_S):
                            answer = await behaviour(request, context)
                    code = grpc.StatusCode.OK
                    return answer
                except grpc.aio.AbortError:
                    raise
                except Exception as error:  # noqa: BLE001 - the outermost boundary of a call; counted, logged and answered
                    code = answer_to(error).status
                    await self._refuse(name, error, context, span)
                finally:
                    seconds.observe(time.perf_counter() - started_s)
                    self._metrics.calls_total.labels(name, code.name).inc()

        return call

    def _streaming(self, method: str, behaviour: Callable[[Any, Any], AsyncIterator[Any]]) -> Any:
        name, seconds = self._measured(method)

        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            started_s, code = time.perf_counter(), CUT_OFF
            _received()
            with self._traced(method, request, context, attach=False) as span:
                try:
                    with self._counted(context):
                        signed_part(rule_for(method), request, self._is_admitted)
                        async for answer in behaviour(request, context):
                            slow = self._cut_off_when_slow()
                            yield answer
                            slow.cancel()
                            if time.perf_counter() - started_s > STREAM_DEADLINE_S:
                                raise TimeoutError
                    code = grpc.StatusCode.OK
                except grpc.aio.AbortError:
                    raise
                except Exception as error:  # noqa: BLE001 - the outermost boundary of a call; counted, logged and answered
                    code = answer_to(error).status
                    await self._refuse(name, error, context, span)
                finally:
                    seconds.observe(time.perf_counter() - started_s)
                    self._metrics.calls_total.labels(name, code.name).inc()

        return call

    def _traced(self, method: str, request: Any, context: Context, *, attach: bool = True) -> AbstractContextManager[Span]:
        """The call's span, where calls are traced: part of the caller's trace only where the operator has named the caller."""
        if self.tracer is None:
            return nullcontext(NO_SPAN)
        parent = metadata_of(context, TRACEPARENT)
        return self.tracer.serve(method, parent, lambda: self._is_followed(method, request, context), attach)

    def _is_followed(self, method: str, request: Any, context: Context) -> bool:
        if self._is_ours(context):
            return True
        try:
            signed = signed_part(rule_for(method), request, self.traced.__contains__)
            if signed is None or signed.signer not in self.traced:
                return False
            verify(signed.signer, signed.kind, signed.payload, signed.signature)
            self._traces.take(signed.signer, self._clock.monotonic_s())
        except Rejected:
            return False
        return True

    def _cut_off_when_slow(self) -> asyncio.TimerHandle:
        """End this call in a while, unless the handle is cancelled."""
        return asyncio.get_running_loop().call_later(self._slow_call_s, self._cut_off, asyncio.current_task())

    def _cut_off(self, call: asyncio.Task[Any] | None) -> None:
        if call is not None and not call.done():
            self._metrics.rejected_messages_total.labels("too_slow").inc()
            call.cancel()

    def _measured(self, method: str) -> tuple[str, Histogram]:
        name = method.rpartition("/")[2]
        return name, self._metrics.request_duration_seconds.labels(name)

    @contextmanager
    def _counted(self, context: Context) -> Iterator[None]:
        """Count the call while it is in progress. Raises `Rejected` when there are too many, or too many in a short time."""
        address = address_of(context)
        if self._is_ours(context):
            address = OURS
        else:
            self._addresses.take(address, self._clock.monotonic_s())
        self._calls.enter(address)
        try:
            yield
        finally:
            self._calls.leave(address)

    def _take_further(self, rule: Rule, request: Any, context: Context) -> None:
        """Many messages in a call count as many calls, as each of them costs as much to look at."""
        further = len(getattr(request, rule.many)) - 1 if rule.many else 0
        if further > 0 and not self._is_ours(context):
            self._addresses.take(address_of(context), self._clock.monotonic_s(), further)

    async def _refuse(self, method: str, error: Exception, context: Context, span: Span) -> None:
        answer = answer_to(error)
        span.set({"rpc.grpc.status_code": answer.status.value[0], "swarm.reason": answer.reason})
        if answer.private:
            span.fail()
        self._metrics.rejected_messages_total.labels(answer.reason).inc()
        if answer.private:
            log.error("call_failed", method=method, reason=answer.reason, exc_info=error)
        else:
            sender = error.sender if isinstance(error, Rejected) else ""
            log.info("call_refused", method=method, reason=answer.reason, sender=sender)
        await context.abort(answer.status, answer.message, ((REASON_KEY, answer.reason),))


class _Guarded:
    """Takes services as a server does, and adds them to it behind the guard.

    An interceptor would do the same at a higher price: gRPC builds the chain of interceptors for every call.
    """

    def __init__(self, guard: Guard, server: grpc.aio.Server) -> None:
        self._guard = guard
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler[Any, Any]]) -> None:
        """What generated code calls."""
        self._server.add_generic_rpc_handlers([_GuardedHandlers(self._guard, each) for each in handlers])

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Nothing: a server would look these up first, and so pass the guard by."""


class _GuardedHandlers(grpc.GenericRpcHandler):  # type: ignore[type-arg] # generic in the stubs only
    def __init__(self, guard: Guard, handlers: grpc.GenericRpcHandler[Any, Any]) -> None:
        self._guard = guard
        self._handlers = handlers

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return self._guard.handler(handler_call_details, self._handlers)


def _received() -> None:
    """The request has come in time."""
    receiving = _receiving.get(None)
    if receiving is not None:
        receiving.cancel()


def metadata_of(context: Context, wanted: str) -> str:
    """What a call's metadata say under a key; empty if they don't."""
    return next((value for key, value in context.invocation_metadata() or () if key == wanted and isinstance(value, str)), "")


def address_of(context: Context, *, trusted: bool = False) -> str:
    """The caller's IP address; where another replica passes a call on, which is `trusted`, that of whom it came from."""
    if trusted and (caller := metadata_of(context, CALLER_KEY)):
        return caller
    _, _, address = context.peer().rpartition(":")[0].partition(":")
    return unquote(address).strip("[]")
