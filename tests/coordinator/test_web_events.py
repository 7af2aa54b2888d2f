"""Server-sent events: whoever listens is told what has changed, and costs no more than a place."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from coordinator.web import events as module
from coordinator.web.events import HEARTBEAT, Events
from swarm.clock import ManualClock
from tests.coordinator.conftest import Serve, connected
from tests.coordinator.test_web import train
from tests.waiting import eventually
from tests.world import NOW_S, World

LONG_S = 3600.0


class Figures:
    """Figures that a test changes."""

    def __init__(self) -> None:
        self.round = 0
        self.asked = 0

    def __call__(self) -> dict[str, str]:
        self.asked += 1
        return {"round": str(self.round)}


def told(message: bytes) -> object:
    """What a message says."""
    return json.loads(message.decode().partition("data: ")[2])


async def test_figures_come_at_first_and_when_they_change(serve: Serve, world: World) -> None:
    """Over a real connection, with a type that browsers listen to."""
    async with (
        serve(ManualClock(NOW_S), metrics="127.0.0.1:0") as coordinator,
        connected(coordinator) as client,
        httpx.AsyncClient(timeout=30) as browser,
        browser.stream("GET", f"http://{coordinator.metrics_address}/events") as stream,
    ):
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert "default-src 'none'" in stream.headers["content-security-policy"]
        data = (json.loads(line.removeprefix("data: ")) async for line in stream.aiter_lines() if line.startswith("data: "))
        first = await anext(data)
        assert (first["round"], first["entries"]) == ("none yet", "1")
        await train(client, world, 1)
        async for figures in data:
            if figures["round"] == "0":
                break
        assert (figures["tokens"], figures["loss"]) == ("256", "2.5000")


async def test_all_streams_end_with_the_server(serve: Serve) -> None:
    """Nobody has to be thrown out: readers see the end, and the server stops."""
    async with httpx.AsyncClient(timeout=30) as browser:
        async with serve(metrics="127.0.0.1:0") as coordinator:
            request = browser.build_request("GET", f"http://{coordinator.metrics_address}/events")
            streams = [await browser.send(request, stream=True) for _ in range(3)]
            lines = [stream.aiter_lines() for stream in streams]
            assert [await anext(each) for each in lines] == ["retry: 3000"] * 3
        for each in lines:
            assert [line async for line in each][-1:] in ([""], [])


async def test_listeners_are_bounded() -> None:
    """Who comes too late is told to come back; a place that becomes free is given away again."""
    events = Events(Figures(), most=2)
    listeners = [events.messages() for _ in range(2)]
    for each in listeners:
        await anext(each)
    refused = events.response()
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "30")
    await listeners[0].aclose()
    assert events.response().status_code == 200
    await listeners[1].aclose()
    assert events.listeners == 0


async def test_a_slow_reader_gets_the_newest_only() -> None:
    """What has changed several times meanwhile is told once; without a change there is a sign of life."""
    figures = Figures()
    events = Events(figures, heartbeat_s=0.001)
    messages = events.messages()
    assert told(await anext(messages)) == {"round": "0"}
    for figures.round in range(1, 6):
        events._refresh()
    assert told(await anext(messages)) == {"round": "5"}
    assert await anext(messages) == HEARTBEAT
    events._refresh()
    assert await anext(messages) == HEARTBEAT
    await messages.aclose()


async def test_one_look_serves_all_and_nobody_costs_nothing() -> None:
    """Figures are computed at intervals, however many listen, and not at all while nobody does."""
    figures = Figures()
    events = Events(figures, every_s=LONG_S, heartbeat_s=LONG_S)
    async with events.looking():
        assert figures.asked == 0
        listeners = [events.messages() for _ in range(50)]
        for each in listeners:
            await anext(each)
        assert figures.asked <= 2
        for each in listeners:
            await each.aclose()
    assert events.response().status_code == 503


async def test_a_change_wakes_who_waits() -> None:
    """Without waiting for a sign of life."""
    figures = Figures()
    events = Events(figures, every_s=0.001, heartbeat_s=LONG_S)
    async with events.looking():
        messages = events.messages()
        await anext(messages)
        waiting = asyncio.ensure_future(anext(messages))
        figures.round = 7
        assert told(await waiting) == {"round": "7"}
        ending = asyncio.ensure_future(anext(messages, None))
        await eventually(lambda: not ending.done(), "it waits")
        events.close()
        assert await ending is None


async def test_who_takes_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader whose connection is full loses its place."""
    monkeypatch.setattr(module, "SEND_TIMEOUT_S", 0.01)
    events = Events(Figures())
    sent = list[str]()

    async def send(message: Any) -> None:
        sent.append(message["type"])
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    await events.response()({"type": "http"}, asyncio.Event().wait, send)  # type: ignore[arg-type]
    assert sent == ["http.response.start", "http.response.body"]
    assert events.listeners == 0


async def test_who_goes_is_forgotten() -> None:
    """A reader that closes its connection gives its place back at once."""
    events = Events(Figures(), heartbeat_s=LONG_S)

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        pass

    await events.response()({"type": "http"}, receive, send)  # type: ignore[arg-type]
    assert events.listeners == 0


async def test_streams_dont_last_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A browser comes back by itself, and what it holds here is bounded in time as well."""
    monkeypatch.setattr(module, "LONGEST_S", 0.0)
    events = Events(Figures(), heartbeat_s=LONG_S)
    assert len([message async for message in events.messages()]) == 1
