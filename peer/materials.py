"""The run's files (tokenizer, data shards): found locally, or fetched by hash from other peers, verified and resumable."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from peer.data import chunk_hashes, chunk_roots_match, present, tree_path, verify_tree_file
from peer.mirror import Mirror
from peer.network.node import PeerFailure
from peer.network.transfer import MissingBlob, Transfer
from peer.rounds.post import Post
from swarm.errors import DataInvalid, DiskFull, Rejected
from swarm.manifest import Data, Shard, Tree
from swarm.merkle import blob_hash
from swarm.messages import split_hashes
from swarm.rpc.v1.peer_pb2 import SyncReply, SyncRequest
from swarm.rpc.v1.signed_pb2 import Signed

log = structlog.get_logger(__name__)


@dataclass
class Materials:
    """Files by root in `directory`; `extra` is where the user said that files may lie already.

    What lies in `private` stays there, and nobody is sent a byte of it. `mirror` is asked before peers are.
    """

    directory: Path
    extra: Path | None = None
    private: Path | None = None
    mirror: Mirror | None = None
    _hashes: dict[bytes, tuple[bytes, ...]] = field(default_factory=dict)
    _chunks: dict[bytes, tuple[Path, int, int]] = field(default_factory=dict)

    def path(self, tree: Tree) -> Path:
        """Where the file lies, once it is here."""
        return tree_path(self.directory, tree)

    def take_local(self, tree: Tree) -> bool:
        """Whether the file is here and whole; from then on it is served to others. Not for private shards."""
        _check_shared(tree)
        path = self.path(tree)
        if not path.exists() and self.extra is not None and tree_path(self.extra, tree).exists():
            with _full_disk(self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)
                partial = path.with_suffix(".copy")
                shutil.copyfile(tree_path(self.extra, tree), partial)
                partial.replace(path)
        if not path.exists():
            return False
        try:
            verify_tree_file(path, tree)
        except DataInvalid as error:
            log.warning("file_damaged", path=str(path), error=error.message)
            path.unlink()
            return False
        self._serve(tree, chunk_hashes(path, tree.chunk_bytes))
        return True

    def take_private(self, data: Data) -> None:
        """Use the private shards that lie in `private`, where they are.

        Raises `DataInvalid` where one is damaged, where the run would have others fetch what lies there, and where there is
        nothing at all to train on.
        """
        check_private(data, self.private)
        self.directory.mkdir(parents=True, exist_ok=True)
        for tree in data.private_trees:
            path = self.path(tree)
            if path.is_symlink():
                path.unlink()
            if not path.exists() and self.private is not None and tree_path(self.private, tree).exists():
                path.symlink_to(tree_path(self.private, tree).absolute())
            if path.exists():
                verify_tree_file(path, tree)
        held = held_in(data, self.directory)
        if data.private_trees:
            log.info("private_shards", samples=sum(shard.samples for shard in held.train if shard.private))

    def hashes(self, root: bytes) -> tuple[bytes, ...]:
        """The chunk hashes of a file that is here; empty if it isn't."""
        return self._hashes.get(root, ())

    def lookup(self, name: bytes) -> bytes | None:
        """A chunk by its hash."""
        place = self._chunks.get(name)
        if place is None:
            return None
        path, offset, size = place
        try:
            with path.open("rb") as file:
                file.seek(offset)
                content = file.read(size)
        except OSError:
            return None
        return content if blob_hash(content) == name else None

    def check_space(self, trees: Sequence[Tree], reserve_bytes: int) -> None:
        """Raise `DiskFull` unless what is missing fits on the disk, with `reserve_bytes` to spare."""
        needed = sum(tree.size_bytes for tree in trees if not self.path(tree).exists()) + reserve_bytes
        self.directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise DiskFull(
                f"{self.directory} has {free / 1e9:.1f} GB free, the run needs {needed / 1e9:.1f} GB",
                "free some space or choose another place with --dir",
            )

    async def fetch_mirrored(self, tree: Tree, transfer: Transfer) -> bool:
        """Whether the file has come from the web, where somebody has named a mirror that has it."""
        if self.mirror is None:
            return False
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = self.path(tree).with_suffix(".web")
        with _full_disk(self.directory):
            if await self.mirror.fetch(tree, partial, transfer):
                partial.replace(self.path(tree))
                return True
        return False

    async def fetch(
        self,
        tree: Tree,
        peers: Sequence[str],
        post: Post,
        transfer: Transfer,
        token: Signed | None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Fetch a file from all `peers` that have it. Raises `MissingBlob` while nobody has it. Not for private shards."""
        _check_shared(tree)
        hashes, holders = await self._holders(tree, peers, post, transfer.run_id, token)
        partial = self.path(tree).with_suffix(".part")
        self.directory.mkdir(parents=True, exist_ok=True)
        have = _present_chunks(partial, tree, hashes)
        sizes = {name: _chunk_size(tree, index) for index, name in enumerate(hashes) if index not in have}
        positions: dict[bytes, list[int]] = {}
        for index, name in enumerate(hashes):
            positions.setdefault(name, []).append(index)
        done = len(have)
        log.info("file_fetch", file=tree.root[:12], chunks=len(hashes), here=done, sources=len(holders))
        with _full_disk(self.directory), partial.open("r+b" if partial.exists() else "w+b") as file:
            file.truncate(tree.size_bytes)

            def keep(name: bytes, content: bytes) -> None:
                nonlocal done
                for index in positions[name]:
                    file.seek(index * tree.chunk_bytes)
                    file.write(content)
                    done += 1
                progress(done, len(hashes))

            if sizes:
                await transfer.download_all(holders, sizes, keep)
        await asyncio.to_thread(verify_tree_file, partial, tree)
        partial.replace(self.path(tree))
        self._serve(tree, hashes)

    async def _holders(
        self, tree: Tree, peers: Sequence[str], post: Post, run_id: bytes, token: Signed | None
    ) -> tuple[list[bytes], list[str]]:
        request = chunks_request(tree, run_id, token)

        async def ask(peer: str) -> list[bytes]:
            try:
                return chunks_in(await post.sync(peer, request), tree)
            except (PeerFailure, Rejected):
                return []

        answers = await asyncio.gather(*(ask(peer) for peer in peers[:32]))
        holders = [peer for peer, hashes in zip(peers, answers, strict=False) if hashes]
        if not holders:
            raise MissingBlob("any peer", f"nobody has {tree.root[:12]}")
        return next(hashes for hashes in answers if hashes), holders

    def _serve(self, tree: Tree, hashes: Sequence[bytes]) -> None:
        self._hashes[bytes.fromhex(tree.root)] = tuple(hashes)
        for index, name in enumerate(hashes):
            self._chunks[name] = (self.path(tree), index * tree.chunk_bytes, _chunk_size(tree, index))


def check_private(data: Data, folder: Path | None) -> None:
    """Raise `DataInvalid` where the run would have others fetch what lies in a holder's folder: the holder's word counts."""
    shown = next((tree for tree in data.trees if folder is not None and tree_path(folder, tree).exists()), None)
    if folder is not None and shown is not None:
        raise DataInvalid(
            f"{tree_path(folder, shown)} is not private in this run: others would fetch it",
            "ask the run's owner to mark it private, or name the folder with --files if others may have it",
        )


def held_in(data: Data, folder: Path | None) -> Data:
    """The data without the private shards that aren't in a folder. Raises `DataInvalid` where nothing is left to train on."""
    held = data.held(lambda tree: False) if folder is None else present(data, folder)
    if not held.train:
        raise DataInvalid("none of the run's private shards are here", "name the folder that has some with --data")
    return held


def _check_shared(tree: Tree) -> None:
    if isinstance(tree, Shard) and tree.private:
        raise ValueError(f"{tree.root[:12]} is private")


def chunks_request(tree: Tree, run_id: bytes, token: Signed | None) -> SyncRequest:
    """Asks a peer for the chunk hashes of one of the run's files."""
    return SyncRequest(run_id=run_id, admission=token, state_root=bytes.fromhex(tree.root))


def chunks_in(reply: SyncReply, tree: Tree) -> list[bytes]:
    """The file's chunk hashes, as a peer has answered; empty where it lacks the file or names others. Raises `Rejected`."""
    hashes = split_hashes(reply.chunk_hashes)
    return hashes if chunk_roots_match(hashes, tree) else []


@contextlib.contextmanager
def _full_disk(directory: Path) -> Iterator[None]:
    """`DiskFull` for the operating system's error."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFull(f"no space left in {directory}", "free some space or choose another place with --dir") from error


def _chunk_size(tree: Tree, index: int) -> int:
    return min(tree.chunk_bytes, tree.size_bytes - index * tree.chunk_bytes)


def _present_chunks(partial: Path, tree: Tree, hashes: Sequence[bytes]) -> set[int]:
    """Chunks of a broken-off download that are whole."""
    if not partial.exists() or partial.stat().st_size != tree.size_bytes:
        return set()
    with partial.open("rb") as file:
        return {index for index, name in enumerate(hashes) if blob_hash(file.read(_chunk_size(tree, index))) == name}
