"""The run's files: found, fetched, verified, served."""

from __future__ import annotations

import asyncio
import errno
from collections import namedtuple
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from peer import doctor
from peer.data import chunk_hashes, tree_of_file
from peer.materials import Materials
from peer.network.blobs import BlobStore
from peer.network.node import Node
from peer.network.transfer import MissingBlob, Transfer
from peer.rounds.post import SYNC, Post
from swarm.errors import DataInvalid, DiskFull
from swarm.identity import Identity
from swarm.manifest import Data, Shard, Tree
from swarm.merkle import root_of
from swarm.messages import parse
from swarm.rpc.v1.peer_pb2 import SyncReply, SyncRequest
from tests.peer_network import loopback

RUN = b"\x07" * 32
CHUNK = 1 << 16
Holder = namedtuple("Holder", "node materials transfer post")


def make_file(folder: Path, chunks: int = 5, tail: int = 100) -> Tree:
    """A file of some chunks in a folder, named by its root."""
    folder.mkdir(parents=True, exist_ok=True)
    content = b"".join(bytes([index]) * CHUNK for index in range(chunks)) + b"z" * tail
    path = folder / "new"
    path.write_bytes(content)
    tree = Tree(root=root_of(chunk_hashes(path, CHUNK)).hex(), size_bytes=len(content), chunk_bytes=CHUNK)
    path.rename(Materials(folder).path(tree))
    return tree


@pytest.fixture
async def network(tmp_path: Path) -> AsyncIterator[object]:
    """Makes peers with a folder of files each: `await make(folder)` gives their parts."""
    async with AsyncExitStack() as stack:

        async def make(folder: Path, *, lies: bool = False) -> Holder:
            path = tmp_path / f"{folder.name}.key"
            Identity.generate().save(path)
            node = await Node.start(loopback(path))
            stack.push_async_callback(node.close)
            materials, store = Materials(folder), BlobStore(64 << 20)
            store.provide(materials.lookup)
            transfer = Transfer(node, store, RUN, lambda peer, token: True, lambda: None, stall_s=5.0)
            await transfer.start()

            async def answer(peer: str, raw: bytes) -> bytes:
                hashes = materials.hashes(parse(SyncRequest, raw).state_root)
                if lies:
                    hashes = tuple(reversed(hashes))
                return bytes(SyncReply(chunk_hashes=b"".join(hashes)).SerializeToString())

            await node.serve_calls(SYNC, answer)
            post = Post(node)
            stack.push_async_callback(post.close)
            return Holder(node, materials, transfer, post)

        yield make


def introduce(one: Holder, *others: Holder) -> list[str]:
    for other in others:
        one.node.learn(other.node.peer_id, other.node.addresses)
    return [other.node.peer_id for other in others]


async def test_a_file_comes_from_those_who_have_it(tmp_path: Path, network) -> None:
    """A newcomer fetches a file by its root from the holder among others, checks it, and serves it then."""
    tree = make_file(tmp_path / "a")
    holder, empty, liar = [await network(tmp_path / name) for name in ("a", "b", "c")]
    newcomer = await network(tmp_path / "d")
    assert holder.materials.take_local(tree)
    assert not newcomer.materials.take_local(tree)
    peers = introduce(newcomer, empty, holder, liar)
    seen: list[tuple[int, int]] = []
    await newcomer.materials.fetch(tree, peers, newcomer.post, newcomer.transfer, None, lambda *done: seen.append(done))
    assert newcomer.materials.path(tree).read_bytes() == holder.materials.path(tree).read_bytes()
    assert seen[-1] == (6, 6)
    assert newcomer.materials.hashes(bytes.fromhex(tree.root)) == holder.materials.hashes(bytes.fromhex(tree.root))
    last = await network(tmp_path / "e")
    await last.materials.fetch(tree, introduce(last, newcomer), last.post, last.transfer, None)
    assert last.materials.take_local(tree)


async def test_nobody_has_it(tmp_path: Path, network) -> None:
    """While nobody has a file, or only somebody whose hashes don't give the root, that is said, not waited for."""
    tree = make_file(tmp_path / "a")
    liar, empty, newcomer = await network(tmp_path / "a", lies=True), await network(tmp_path / "b"), await network(tmp_path / "c")
    assert liar.materials.take_local(tree)
    peers = introduce(newcomer, liar, empty)
    with pytest.raises(MissingBlob):
        await newcomer.materials.fetch(tree, [*peers, Identity.generate().peer_id], newcomer.post, newcomer.transfer, None)
    assert not newcomer.materials.path(tree).exists()


async def test_a_broken_download_goes_on_where_it_was(tmp_path: Path, network) -> None:
    """Chunks that arrived before are kept, damaged ones among them are fetched again."""
    tree = make_file(tmp_path / "a", chunks=20)
    holder, newcomer = await network(tmp_path / "a"), await network(tmp_path / "b")
    assert holder.materials.take_local(tree)
    content = bytearray(holder.materials.path(tree).read_bytes())
    content[3 * CHUNK] ^= 1
    content[15 * CHUNK :] = bytes(len(content) - 15 * CHUNK)
    newcomer.materials.directory.mkdir(exist_ok=True)
    newcomer.materials.path(tree).with_suffix(".part").write_bytes(content)
    peers = introduce(newcomer, holder)
    await newcomer.materials.fetch(tree, peers, newcomer.post, newcomer.transfer, None)
    assert newcomer.materials.path(tree).read_bytes() == holder.materials.path(tree).read_bytes()
    assert newcomer.node.received_bytes < 8 * CHUNK
    assert not newcomer.materials.path(tree).with_suffix(".part").exists()


def test_local_files_are_used_and_checked(tmp_path: Path) -> None:
    """A file where the user said is copied; one that is damaged is removed and fetched anew."""
    tree = make_file(tmp_path / "given")
    materials = Materials(tmp_path / "mine", tmp_path / "given")
    assert materials.take_local(tree)
    assert materials.path(tree).parent == tmp_path / "mine"
    name = materials.hashes(bytes.fromhex(tree.root))[-1]
    assert materials.lookup(name) == b"z" * 100
    assert materials.lookup(b"\x00" * 32) is None

    with materials.path(tree).open("r+b") as file:
        file.seek(tree.size_bytes - 1)
        file.write(b"!")
    assert materials.lookup(name) is None
    alone = Materials(tmp_path / "mine")
    assert not alone.take_local(tree)
    assert not alone.path(tree).exists()
    assert Materials(tmp_path / "mine", tmp_path / "given").take_local(tree)


def private_data(folder: Path) -> Data:
    """Data with two private shards for training, of which the first one's file is in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    row = 9 * 2

    def shard(byte: int, **more: object) -> Shard:
        (folder / "new").write_bytes(bytes([byte, 0]) * 9 * 50)
        tree = tree_of_file(folder / "new")
        (folder / "new").rename(folder / tree.root)
        return Shard(**tree.model_dump(), samples=tree.size_bytes // row, **more)

    held, others, public = shard(1, private=True), shard(2, private=True), shard(3)
    (folder / others.root).unlink()
    (folder / public.root).rename(folder.with_name("public.shard"))
    return Data(sequence_length=8, train=(held, others), validation=(public,))


async def test_a_private_shard_is_served_to_nobody(tmp_path: Path, network) -> None:
    """Its holder uses it where it lies, and has neither the list of its chunks nor a chunk for a peer that asks for them."""
    data = private_data(tmp_path / "mine")
    holder, other = await network(tmp_path / "a"), await network(tmp_path / "b")
    holder.materials.private = tmp_path / "mine"
    holder.materials.take_private(data)
    held = data.train[0]
    assert holder.materials.path(held).resolve() == tmp_path / "mine" / held.root
    assert not holder.materials.path(data.train[1]).exists()
    peers = introduce(other, holder)
    tree = Tree(**held.model_dump(include={"root", "size_bytes", "chunk_bytes"}))
    with pytest.raises(MissingBlob):
        await other.materials.fetch(tree, peers, other.post, other.transfer, None)
    chunk = chunk_hashes(tmp_path / "mine" / held.root, held.chunk_bytes)[0]
    with pytest.raises(MissingBlob):
        await other.transfer.fetch(peers[0], {chunk: held.size_bytes})
    for peer in (holder, other):
        with pytest.raises(ValueError, match="is private"):
            peer.materials.take_local(held)
        with pytest.raises(ValueError, match="is private"):
            await peer.materials.fetch(held, peers, peer.post, peer.transfer, None)
    assert list((tmp_path / "b").glob("*")) == []


def test_a_private_shard_is_used_only_where_its_holder_says(tmp_path: Path) -> None:
    """Without the folder of the start before it is not there any more, damaged it is refused, and its file is never touched."""
    data, mine, files = private_data(tmp_path / "mine"), tmp_path / "mine", tmp_path / "files"
    Materials(files, private=mine).take_private(data)
    Materials(files, private=mine).take_private(data)
    assert [path.name for path in files.iterdir()] == [data.train[0].root]
    with pytest.raises(DataInvalid, match="none of the run's private shards") as caught:
        Materials(files).take_private(data)
    assert "--data" in caught.value.hint
    assert list(files.iterdir()) == []
    Materials(mine, private=mine).take_private(data)
    assert not (mine / data.train[0].root).is_symlink()
    (mine / data.train[0].root).write_bytes(bytes(data.train[0].size_bytes))
    with pytest.raises(DataInvalid, match="damaged"):
        Materials(files, private=mine).take_private(data)


def test_a_holders_word_counts_more_than_the_manifests(tmp_path: Path) -> None:
    """A run in which others would fetch what lies in the holder's folder of private shards isn't joined."""
    data = private_data(tmp_path / "mine")
    shown = data.model_copy(update={"train": tuple(shard.model_copy(update={"private": False}) for shard in data.train)})
    with pytest.raises(DataInvalid, match="others would fetch it"):
        Materials(tmp_path / "files", private=tmp_path / "mine").take_private(shown)


def test_a_doctor_counts_what_is_here(tmp_path: Path) -> None:
    """The private samples in the holder's folder, or what is wrong with it."""
    data, mine = private_data(tmp_path / "mine"), tmp_path / "mine"
    assert doctor.private_data(data, mine).text == "50 of the run's 100 private samples are here"
    assert doctor.private_data(data, None).hint == "name the folder that has some with --data"
    shown = data.model_copy(update={"train": tuple(shard.model_copy(update={"private": False}) for shard in data.train)})
    assert doctor.private_data(shown, mine).exit_code == DataInvalid.exit_code


def test_space_is_checked_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing must fit beside the reserve; what is here needs no room."""
    tree = make_file(tmp_path / "given")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**12, 0, tree.size_bytes + 999))
    with pytest.raises(DiskFull, match="GB free"):
        Materials(tmp_path / "mine").check_space([tree], 1000)
    Materials(tmp_path / "mine").check_space([tree], 999)
    Materials(tmp_path / "given").check_space([tree], tree.size_bytes + 999)


async def test_a_disk_that_fills_meanwhile(tmp_path: Path, network, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills while a file is fetched is `DiskFull`, and nothing takes the file's name."""
    tree = make_file(tmp_path / "a")
    holder, newcomer = await network(tmp_path / "a"), await network(tmp_path / "b")
    assert holder.materials.take_local(tree)
    peers = introduce(newcomer, holder)

    async def full(*arguments: object) -> None:
        await asyncio.sleep(0)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(newcomer.transfer, "download_all", full)
    with pytest.raises(DiskFull, match="no space left"):
        await newcomer.materials.fetch(tree, peers, newcomer.post, newcomer.transfer, None)
    assert not newcomer.materials.path(tree).exists()
