"""The control socket: one line in, one line out, for its owner only."""

from __future__ import annotations

import asyncio
import contextlib
import json
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from peer.control import MAX_LINE_BYTES, ControlServer
from swarm.control import ask, history, last_status, socket_path
from swarm.errors import AlreadyRunning, NotRunning, SwarmError


async def echo(verb: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"verb": verb, "arguments": arguments}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ControlServer]:
    """A server in `tmp_path` that says what it was asked."""
    made = ControlServer(tmp_path, echo)
    await made.start()
    yield made
    await made.close()


async def send(folder: Path, line: bytes) -> dict[str, Any]:
    """The answer to a raw line."""
    reader, writer = await asyncio.open_unix_connection(str(socket_path(folder)))
    writer.write(line)
    writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    return dict(json.loads(answer))


async def test_verbs_reach_the_daemon(tmp_path: Path, server: ControlServer) -> None:
    """A verb comes with its arguments, and several callers are served at once."""
    answers = await asyncio.gather(*(ask(tmp_path, "status", number=index) for index in range(10)))
    assert [answer["arguments"] for answer in answers] == [{"number": index} for index in range(10)]


async def test_only_the_owner_may_connect(tmp_path: Path, server: ControlServer) -> None:
    """The socket has mode 0600."""
    assert stat.S_IMODE(socket_path(tmp_path).stat().st_mode) == 0o600


async def test_a_folder_with_a_long_path(tmp_path: Path) -> None:
    """Longer than an address holds: it listens, answers, notices a second daemon, and leaves nothing behind."""
    folder = tmp_path / ("deep/" * 40)
    folder.mkdir(parents=True)
    server = ControlServer(folder, echo)
    await server.start()
    with pytest.raises(AlreadyRunning):
        await ControlServer(folder, echo).start()
    assert (await ask(folder, "status"))["verb"] == "status"
    await server.close()
    assert list(folder.iterdir()) == []
    with pytest.raises(NotRunning):
        await ask(folder, "status")


@pytest.mark.parametrize(
    "line", [b"\n", b"nonsense\n", b"[]\n", b"{}\n", b"\xff\xfe\n", b'{"verb": "x", "arguments": 3}\n', b"half"]
)
async def test_bad_lines_get_an_answer(tmp_path: Path, server: ControlServer, line: bytes) -> None:
    """What isn't a request is answered with an error, and the next request is served."""
    assert "bad request" in (await send(tmp_path, line))["error"]
    assert (await ask(tmp_path, "status"))["verb"] == "status"


async def test_an_endless_line_is_cut_off(tmp_path: Path, server: ControlServer) -> None:
    """A line above the limit ends with an error instead of filling memory."""
    reader, writer = await asyncio.open_unix_connection(str(socket_path(tmp_path)))
    with contextlib.suppress(OSError):
        writer.write(b"x" * (MAX_LINE_BYTES * 4))
        await writer.drain()
    await asyncio.wait_for(reader.read(), 10)
    writer.close()
    assert (await ask(tmp_path, "status"))["verb"] == "status"


async def test_an_error_of_the_daemon_is_an_answer(tmp_path: Path) -> None:
    """A verb that fails says why instead of breaking the connection off."""

    async def fail(verb: str, arguments: dict[str, Any]) -> dict[str, Any]:
        raise SwarmError("the peer is still starting", "try again")

    server = ControlServer(tmp_path, fail)
    await server.start()
    try:
        assert "still starting" in (await ask(tmp_path, "checkpoint"))["error"]
    finally:
        await server.close()


async def test_a_live_socket_is_not_taken_and_a_dead_one_is(tmp_path: Path, server: ControlServer) -> None:
    """A second server in the folder is refused; after a crash the leftover socket is replaced."""
    second = ControlServer(tmp_path, echo)
    with pytest.raises(AlreadyRunning):
        await second.start()
    assert (await ask(tmp_path, "status"))["verb"] == "status"
    await server.close()
    assert not socket_path(tmp_path).exists()
    socket_path(tmp_path).touch()
    await second.start()
    assert (await ask(tmp_path, "status"))["verb"] == "status"
    await second.close()


async def test_nobody_there(tmp_path: Path) -> None:
    """Without a daemon `ask` says so, and what a daemon left behind can still be read."""
    with pytest.raises(NotRunning):
        await ask(tmp_path, "status")
    assert last_status(tmp_path) == {}
    assert history(tmp_path) == []
    (tmp_path / "status.json").write_text("{broken")
    (tmp_path / "history.jsonl").write_text('{"round": 1}\n{"round": 2}\n{"rou')
    assert last_status(tmp_path) == {}
    assert [line["round"] for line in history(tmp_path)] == [1, 2]


async def test_a_daemon_that_hangs_is_given_up(tmp_path: Path) -> None:
    """An answer that doesn't come in time is `NotRunning` with a hint, not a wait for ever."""
    never = asyncio.Event()

    async def hang(verb: str, arguments: dict[str, Any]) -> dict[str, Any]:
        await never.wait()
        return {}

    server = ControlServer(tmp_path, hang)
    await server.start()
    with pytest.raises(NotRunning, match="doesn't answer"):
        await ask(tmp_path, "status", timeout_s=0.2)
    never.set()
    await server.close()
