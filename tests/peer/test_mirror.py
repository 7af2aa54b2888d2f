"""The run's files from a web folder: a real server, what breaks off, and what is wrong there."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from peer.materials import Materials
from peer.mirror import Mirror
from peer.network.blobs import BlobStore
from peer.network.node import Node
from peer.network.transfer import Transfer
from swarm.cli.join import check_address
from swarm.errors import UsageError
from swarm.identity import Identity
from swarm.manifest import Tree
from tests.peer.test_materials import make_file
from tests.peer_network import loopback
from tests.waiting import eventually

RUN = b"\x07" * 32


@pytest.fixture
async def transfer(tmp_path: Path) -> AsyncIterator[Transfer]:
    """A peer's own, by which bytes are counted."""
    path = tmp_path / "peer.key"
    Identity.generate().save(path)
    node = await Node.start(loopback(path))
    yield Transfer(node, BlobStore(1 << 20), RUN, lambda peer, token: True, lambda: None)
    await node.close()


@pytest.fixture
async def folder(tmp_path: Path) -> Path:
    """What the server shows."""
    (tmp_path / "web").mkdir()
    return tmp_path / "web"


class Site:
    """A web server that can go on in a file, and what it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.ranges: list[str] = []
        static = StaticFiles(directory=folder)

        async def serve(scope: dict[str, object], receive: object, send: object) -> None:
            self.ranges.append(Request(scope).headers.get("range", ""))
            await static(scope, receive, send)  # type: ignore[arg-type]

        self.server = uvicorn.Server(uvicorn.Config(Starlette(routes=[Mount("/run", serve)]), port=0, log_level="error"))

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}/run"


@pytest.fixture
async def site(folder: Path) -> AsyncIterator[Site]:
    """A running one."""
    made = Site(folder)
    task = asyncio.create_task(made.server.serve())
    await eventually(lambda: made.server.started, "the server", 10)
    yield made
    made.server.should_exit = True
    await task


@contextmanager
def simple_server(folder: Path) -> Iterator[str]:
    """The standard library's server, which always begins at the start."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def received(transfer: Transfer) -> int:
    """Bytes that were counted as from the web."""
    return transfer.node.traffic.received["web"]


async def test_a_file_comes_from_the_web_and_is_counted(tmp_path: Path, folder: Path, site: Site, transfer: Transfer) -> None:
    """It is taken for the run's once its root is right; after that others can be served from it."""
    tree = make_file(folder)
    materials = Materials(tmp_path / "mine", mirror=Mirror(site.address))
    assert await materials.fetch_mirrored(tree, transfer)
    assert materials.take_local(tree)
    assert received(transfer) == tree.size_bytes
    assert not await Materials(tmp_path / "other").fetch_mirrored(tree, transfer)


async def test_what_broke_off_goes_on(tmp_path: Path, folder: Path, site: Site, transfer: Transfer) -> None:
    """From a server that can go on only the rest comes; from one that can't, all of it."""
    tree = make_file(folder)
    content = (folder / tree.root).read_bytes()
    for number in (1, 2):
        mine = tmp_path / f"mine-{number}"
        mine.mkdir()
        (mine / f"{tree.root}.web").write_bytes(content[:70_000])
    assert await Materials(tmp_path / "mine-1", mirror=Mirror(site.address)).fetch_mirrored(tree, transfer)
    assert site.ranges == ["bytes=70000-"]
    assert received(transfer) == tree.size_bytes - 70_000
    with simple_server(folder) as address:
        assert await Materials(tmp_path / "mine-2", mirror=Mirror(address)).fetch_mirrored(tree, transfer)
    assert (tmp_path / "mine-2" / tree.root).read_bytes() == content


@pytest.mark.parametrize("wrong", [b"other bytes" * 40_000, b"x" * 100, b""], ids=["longer", "shorter", "empty"])
async def test_another_file_under_the_name_is_not_taken(
    tmp_path: Path, folder: Path, site: Site, transfer: Transfer, wrong: bytes
) -> None:
    """No more than the file's size is read, nothing of it is kept as the run's, and peers are asked instead."""
    tree = make_file(folder)
    (folder / tree.root).write_bytes(wrong)
    materials = Materials(tmp_path / "mine", mirror=Mirror(site.address))
    assert not await materials.fetch_mirrored(tree, transfer)
    assert not materials.path(tree).exists()
    assert received(transfer) <= tree.size_bytes + (1 << 17)


async def test_wrong_bytes_of_the_right_size_are_asked_for_once(
    tmp_path: Path, folder: Path, site: Site, transfer: Transfer
) -> None:
    """A file with another root is given up, and so is one that isn't there."""
    tree, absent = make_file(folder), Tree(root="ab" * 32, size_bytes=10, chunk_bytes=1 << 16)
    path = folder / tree.root
    path.write_bytes(bytes(tree.size_bytes))
    materials = Materials(tmp_path / "mine", mirror=Mirror(site.address))
    for asked in (tree, absent, tree, absent):
        assert not await materials.fetch_mirrored(asked, transfer)
    assert len(site.ranges) == 2
    assert list((tmp_path / "mine").iterdir()) == []


async def test_a_server_that_is_away_or_a_spent_quota_costs_nothing(tmp_path: Path, folder: Path, transfer: Transfer) -> None:
    """Nobody answers, a name that there isn't, a quota that is used up: other peers are asked, and later the server again."""
    tree = make_file(folder)
    with simple_server(folder) as address:
        transfer.may_move = lambda: False
        assert not await Materials(tmp_path / "mine", mirror=Mirror(address)).fetch_mirrored(tree, transfer)
        transfer.may_move = lambda: True
    materials = Materials(tmp_path / "mine", mirror=Mirror(address))
    assert not await materials.fetch_mirrored(tree, transfer)
    assert received(transfer) == 0


@pytest.mark.parametrize(
    "address", ["ftp://example.org/run", "example.org", "https://", "https://example.org/?q=1", "http://[::1"]
)
def test_addresses_that_are_none(address: str) -> None:
    """Told before anything is started."""
    with pytest.raises(UsageError):
        check_address(address)
    assert check_address("https://example.org/run/") == "https://example.org/run"
