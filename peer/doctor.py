"""Looking a machine over before it joins: each finding is a line, and where something is wrong a hint and an exit code.

It does what joining does, in the same order, and stops where nothing further can be found out. It announces the key to the
coordinator, as joining would, and trains (or generates) a few seconds on random tokens to know how fast this machine is.
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.nn import functional

from peer.admissions import Admissions
from peer.coordination import CLOCK_WARNING_S, Coordination, Standing
from peer.device import autocast, autocast_dtype, choose_devices, free_host_bytes, hardware_class
from peer.finding import Finder
from peer.generating import micro_batch
from peer.materials import check_private, chunks_in, chunks_request, held_in
from peer.model import build_model, frozen_bytes
from peer.network.blobs import BlobStore
from peer.network.dialback import DIAL, port_of
from peer.network.node import Node, PeerFailure
from peer.network.p2pd import P2pdOptions
from peer.network.transfer import Transfer
from peer.rounds.post import PING, SYNC
from swarm import __version__
from swarm.control import ask
from swarm.credits import FLOPS_PER_CREDIT
from swarm.errors import (
    CoordinatorUnreachable,
    DataInvalid,
    DiskFull,
    NetworkBroken,
    NoDevice,
    NotRunning,
    OutOfMemory,
    Rejected,
    SwarmError,
    UsageError,
    VersionTooOld,
)
from swarm.identity import Identity
from swarm.manifest import Data, Manifest
from swarm.messages import JoinLink, parse
from swarm.rpc.client import RunInfo
from swarm.rpc.v1.coordinator_pb2 import AnnounceResponse
from swarm.rpc.v1.peer_pb2 import RelayReply, RelayRequest, SyncReply

NEWEST_PYTHON = (3, 14)
RESERVE_BYTES = 256 << 20
BYTES_PER_PARAMETER = 4 * 8
PROBE_BYTES, PROBES = 1 << 20, 4
CONNECT_S, CALL_S = 10.0, 20.0
SPEED_S = 3.0
SPEED_SAMPLES, SPEED_TOKENS = 4, 32
HOUR_S = 3600


@dataclass(frozen=True)
class Finding:
    """One line. `error` is what joining would end with; without one, all is well or, with a hint, could be better."""

    name: str
    text: str
    hint: str = ""
    error: SwarmError | None = None

    @property
    def status(self) -> str:
        """ok, note or FAIL."""
        return "FAIL" if self.error is not None else "note" if self.hint else "ok"

    @property
    def exit_code(self) -> int:
        """What `swarm` would exit with."""
        return self.error.exit_code if self.error is not None else 0


def failed(name: str, error: SwarmError) -> Finding:
    """The finding behind an error."""
    return Finding(name, error.message, error.hint, error)


@dataclass
class Doctor:
    """Examines one machine for one run."""

    link: JoinLink | None
    directory: Path
    identity_path: Path
    gpu: str = "auto"
    listen: str = "0.0.0.0:0"
    inbound: bool = True
    data: Path | None = None
    served_by_others: bool | None = None
    reachable: bool | None = None
    tokens_per_s: float = 0.0
    _stack: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    async def examine(self) -> AsyncIterator[Finding]:
        """Every finding, as soon as it is known; ends after the first that makes the rest impossible."""
        for finding in self.machine():
            yield finding
        if self.link is None:
            yield Finding(
                "run", "no join link, so only this machine was looked at", "give the link to check the run and the network"
            )
            return
        async with self._stack:
            async for finding in self._network(self.link):
                yield finding

    def machine(self) -> Iterator[Finding]:
        """What needs no network."""
        yield python_version(sys.version_info[:2])
        yield self._device()
        yield self._key()

    def _device(self) -> Finding:
        if self.gpu == "cpu":
            return Finding("device", f"{torch.get_num_threads()} processor threads, {platform.machine()}")
        try:
            devices = choose_devices(self.gpu)
        except SwarmError as error:
            return failed("device", NoDevice(error.message, _driver_hint()))
        for device in devices:
            too_new = architecture_problem(torch.cuda.get_device_capability(device), torch.cuda.get_arch_list())
            if too_new:
                return failed("device", NoDevice(f"{torch.cuda.get_device_name(device)}: {too_new}", "install a newer torch"))
        names = ", ".join(torch.cuda.get_device_name(device) for device in devices)
        return Finding("device", f"{names}, torch {torch.__version__}, CUDA {torch.version.cuda}")

    def _key(self) -> Finding:
        if not self.identity_path.exists():
            return Finding("key", f"none yet; joining makes one at {self.identity_path}")
        try:
            return Finding("key", Identity.load(self.identity_path).peer_id)
        except SwarmError as error:
            return failed("key", error)

    async def _network(self, link: JoinLink) -> AsyncIterator[Finding]:
        finding = await resolve(link)
        yield finding
        if finding.error is None:
            finding = await dial(link)
            yield finding
        if finding.error is not None:
            return
        try:
            self._stack.enter_context(_made_folder(self.directory))
            identity = Identity.load_or_create(self.identity_path)
        except SwarmError as error:
            yield failed("key", error)
            return
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="swarm-doctor-")))
        coordination = Coordination(link, identity, folder, start=b"")
        self._stack.push_async_callback(coordination.close)
        try:
            run = await coordination.describe()
        except SwarmError as error:
            yield failed("coordinator", error)
            return
        yield Finding("coordinator", f"its key is the link's; run {run.manifest.name}, version {run.version}")
        wrong = False
        for finding in self._needs(run.manifest):
            wrong = wrong or finding.error is not None
            yield finding
        if await _is_running(self.directory):
            hint = "for all of it: swarm finish, then swarm doctor; what the peer sees: swarm status"
            yield Finding("running", "a peer runs in this folder, and its key is in use: no further look at the network", hint)
        elif not wrong:
            async for finding in self._swarm(run, coordination, identity):
                yield finding

    def _needs(self, manifest: Manifest) -> Iterator[Finding]:
        yield version(manifest)
        yield memory(manifest, free_host_bytes())
        yield disk(manifest, self.directory)
        if self.data is not None or manifest.data.private_trees:
            yield private_data(manifest.data, self.data)

    async def _swarm(self, run: RunInfo, coordination: Coordination, identity: Identity) -> AsyncIterator[Finding]:
        host, _, port = self.listen.rpartition(":")
        listen = f"/{'ip6' if ':' in host else 'ip4'}/{host.strip('[]') or '0.0.0.0'}/tcp/{port}"  # noqa: S104 - as joining would
        try:
            node = await Node.start(P2pdOptions(self.identity_path, (listen,), (), self.inbound))
        except SwarmError as error:
            yield failed("libp2p", error)
            return
        self._stack.push_async_callback(node.close)
        yield Finding("libp2p", f"listens at {', '.join(node.addresses) or 'nothing: dials out only'}")
        device = torch.device("cpu") if self.gpu == "cpu" else choose_devices(self.gpu)[0]
        standing = Standing(0, "starting", hardware_class(device), self.inbound)
        admissions = Admissions(run.run_id, run.coordinator)
        try:
            answer = await coordination.announce(node, standing)
            admissions.admit(answer.admission)
        except SwarmError as error:
            yield failed("admission", error)
            return
        except Rejected as error:
            yield failed("admission", SwarmError(f"the coordinator says {error}", ""))
            return
        yield Finding("admission", f"{identity.peer_id} is admitted")
        yield clock(coordination.clock_offset_s)
        async for finding in self._peers(run, coordination, node, answer, admissions, identity, standing):
            yield finding
        with contextlib.suppress(SwarmError, Rejected, TimeoutError):
            await asyncio.wait_for(coordination.announce(node, standing, leaving=True), CALL_S)
        self.tokens_per_s = await asyncio.to_thread(measure_tokens_per_s, run.manifest, device)
        work = "generating" if run.manifest.generates else "training"
        yield Finding(work, f"{self.tokens_per_s:,.0f} tokens/s, from {SPEED_S:.0f} s on random tokens")
        yield Finding("verdict", self._verdict(run.manifest))

    async def _peers(
        self,
        run: RunInfo,
        coordination: Coordination,
        node: Node,
        answer: AnnounceResponse,
        admissions: Admissions,
        identity: Identity,
        standing: Standing,
    ) -> AsyncIterator[Finding]:
        others = [peer for peer in answer.peers if peer.peer_id != identity.peer_id]
        if not others:
            yield Finding("peers", "nobody else is there yet", "you would begin the run; inbound and speed can't be measured")
            return
        finder = Finder(node, identity, run.run_id, coordination, lambda: standing, self.inbound, lambda reason: None)
        await finder.start()
        self._stack.push_async_callback(finder.close)
        await finder.meet()
        connected = await node.connected()
        here = [peer.peer_id for peer in others if peer.peer_id in connected]
        if not here:
            text = f"none of {len(others)} peers can be reached"
            yield failed("peers", NetworkBroken(text, "allow outgoing TCP connections to any port"))
            return
        found = len(await finder.discovery.find()) if finder.discovery is not None else 0
        yield Finding("peers", f"{len(here)} of {len(others)} are connected; the DHT knows {found}")
        yield await self._dialled_back(run, node, here, admissions, identity)
        yield self._relays(here, node)
        yield await self._speed(here[0], node)
        yield await self._download_speed(run, here, node, admissions, identity)

    async def _dialled_back(
        self, run: RunInfo, node: Node, peers: list[str], admissions: Admissions, identity: Identity
    ) -> Finding:
        ports = [port_of(address) for address in node.addresses if port_of(address)]
        if not self.inbound or not ports:
            self.reachable = False
            return Finding("inbound", "not wanted: dials out only", "you earn the same; others serve what you have")
        token = admissions.token(identity.peer_id)
        request = RelayRequest(
            run_id=run.run_id, to=identity.peer_id, call=DIAL, payload=ports[0].to_bytes(2, "big"), admission=token
        )
        for peer in peers[:3]:
            with contextlib.suppress(PeerFailure, Rejected):
                reply = parse(RelayReply, await node.call(peer, DIAL, request.SerializeToString(), CALL_S), peer)
                self.reachable = not reply.failed
                if self.reachable:
                    return Finding("inbound", "a peer has dialled back")
        if self.reachable is None:
            return Finding("inbound", "no peer answered the question whether it can dial us", "ask again in a minute")
        return Finding(
            "inbound", "peers can't dial you", f"forward TCP port {ports[0]} (with --listen), or join with --no-inbound"
        )

    def _relays(self, here: list[str], node: Node) -> Finding:
        relays = [peer for peer in here if not node.is_dial_only(peer)]
        self.served_by_others = bool(relays)
        if relays:
            return Finding("relay", f"{len(relays)} peers would pass on what others want from you")
        return Finding("relay", "nobody here accepts connections", "if you don't either, only peers that you dial can be reached")

    async def _speed(self, peer: str, node: Node) -> Finding:
        """How fast a peer takes bytes from us, by calls that it answers with nothing."""
        started = time.monotonic()
        try:
            for _ in range(PROBES):
                await node.call(peer, PING, bytes(PROBE_BYTES), CALL_S)
        except (PeerFailure, Rejected) as error:
            return Finding("upload", f"not measured: {error}", "try again in a minute")
        rate = PROBES * PROBE_BYTES / (time.monotonic() - started)
        return Finding("upload", f"{rate * 8 / 1e6:,.1f} Mbit/s to one peer")

    async def _download_speed(
        self, run: RunInfo, peers: list[str], node: Node, admissions: Admissions, identity: Identity
    ) -> Finding:
        """How fast a peer gives us some of the run's data."""
        token = admissions.token(identity.peer_id)
        transfer = Transfer(node, BlobStore(PROBE_BYTES), run.run_id, admissions.check, lambda: token)
        tree = max([run.manifest.tokenizer, *run.manifest.data.trees], key=lambda tree: tree.size_bytes)
        request = chunks_request(tree, run.run_id, token).SerializeToString()
        problem = "nobody has the run's data"
        for peer in peers[:3]:
            try:
                hashes = chunks_in(parse(SyncReply, await node.call(peer, SYNC, request, CALL_S), peer), tree)
                if not hashes:
                    continue
                sizes = dict.fromkeys(hashes[: max(1, PROBES * PROBE_BYTES // tree.chunk_bytes)], tree.chunk_bytes)
                started = time.monotonic()
                found = await transfer.fetch(peer, sizes)
            except (PeerFailure, Rejected) as error:
                problem = str(error)
                continue
            rate = sum(map(len, found.values())) / (time.monotonic() - started)
            return Finding("download", f"{rate * 8 / 1e6:,.1f} Mbit/s from one peer")
        return Finding("download", f"not measured: {problem}", "try again in a minute")

    def _verdict(self, manifest: Manifest) -> str:
        if self.reachable:
            served = "others can dial you"
        elif self.served_by_others:
            served = "you'd be served by others"
        else:
            served = "you'd dial the others"
        per_hour = self.tokens_per_s * manifest.credit.flops_per_token * HOUR_S / FLOPS_PER_CREDIT
        return f"you can join; {served}; about {per_hour:.3g} credits an hour"


async def _is_running(directory: Path) -> bool:
    try:
        await ask(directory, "status")
    except NotRunning:
        return False
    return True


def python_version(found: tuple[int, int]) -> Finding:
    """Python is one that the libraries have been built for."""
    text = f"Python {found[0]}.{found[1]}, swarm {__version__}"
    if not (3, 11) <= found < NEWEST_PYTHON:
        return failed("python", UsageError(f"{text}: needs Python 3.11, 3.12 or 3.13", "make PYTHON=python3.11 venv"))
    return Finding("python", text)


def architecture_problem(capability: tuple[int, int], built_for: list[str]) -> str:
    """Why this torch can't use a GPU of that compute capability; empty if it can. `built_for` is like `sm_80`, `compute_90`."""
    wanted = capability[0] * 10 + capability[1]
    known = [(name.partition("_")[0], int(name.partition("_")[2].rstrip("af"))) for name in built_for if "_" in name]
    if not known or any(kind == "sm" and number // 10 == capability[0] and number <= wanted for kind, number in known):
        return ""
    if any(kind == "compute" and number <= wanted for kind, number in known):
        return ""
    numbers = [number for _, number in known]
    kind = "too new" if wanted > max(numbers) else "too old"
    return f"compute capability {capability[0]}.{capability[1]} is {kind} for this torch, built for {', '.join(built_for)}"


def _driver_hint() -> str:
    try:
        import pynvml  # noqa: PLC0415 - only where no GPU is usable

        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
    except ImportError:
        return "use --cpu to train on the processor"
    except pynvml.NVMLError:
        return "install NVIDIA's driver, or use --cpu to train on the processor"
    return f"the driver {driver} is there, but torch (CUDA {torch.version.cuda}) can't use it: update the driver or torch"


async def resolve(link: JoinLink) -> Finding:
    """The coordinator's name has an address."""
    loop = asyncio.get_running_loop()
    try:
        found = await asyncio.wait_for(loop.getaddrinfo(link.host, link.port, type=socket.SOCK_STREAM), CONNECT_S)
    except (OSError, TimeoutError) as error:
        why = getattr(error, "strerror", None) or "no answer"
        problem = CoordinatorUnreachable(f"{link.host} has no address: {why}", "check the link, and this machine's DNS")
        return failed("dns", problem)
    return Finding("dns", f"{link.host} is {found[0][4][0]}")


async def dial(link: JoinLink) -> Finding:
    """Something accepts connections there."""
    started = time.monotonic()
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(link.host, link.port), CONNECT_S)
    except (OSError, TimeoutError) as error:
        why = getattr(error, "strerror", None) or "no answer"
        hint = f"is the coordinator running? does a firewall stop outgoing TCP to port {link.port}?"
        return failed("tcp", CoordinatorUnreachable(f"nothing accepts connections at {link.address}: {why}", hint))
    writer.close()
    return Finding("tcp", f"{link.address} answers in {(time.monotonic() - started) * 1000:.0f} ms")


def version(manifest: Manifest) -> Finding:
    """The run takes this version."""

    def parts(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(".")[:3])

    if parts(__version__) < parts(manifest.min_client_version):
        text = f"the run needs version {manifest.min_client_version}, this is {__version__}"
        return failed("version", VersionTooOld(text, "update with: pip install --upgrade swarm-train"))
    return Finding("version", f"{__version__}, the run needs {manifest.min_client_version}")


def memory(manifest: Manifest, free_bytes: int) -> Finding:
    """Weights, gradients, snapshots and optimizer state fit."""
    model = manifest.model
    needed = model.parameters * BYTES_PER_PARAMETER + frozen_bytes(model)
    text = f"{needed / 1e9:.1f} GB needed, {free_bytes / 1e9:.1f} GB free of {psutil.virtual_memory().total / 1e9:.0f} GB"
    if free_bytes < needed:
        return failed("memory", OutOfMemory(text, "close other programs, or join a run with a smaller model"))
    return Finding("memory", text)


def disk(manifest: Manifest, directory: Path) -> Finding:
    """The run's files and two checkpoints fit, and where the run is evaluated that of the best state."""
    checkpoints = 2 if manifest.evaluation is None else 3
    needed = sum(tree.size_bytes for tree in manifest.files) + manifest.model.parameters * 4 * 3 * checkpoints + RESERVE_BYTES
    place = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    text = f"{needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free in {place}"
    if free < needed:
        return failed("disk", DiskFull(text, "free some space, or choose another place with --dir"))
    return Finding("disk", text)


def private_data(data: Data, folder: Path | None) -> Finding:
    """Some of the run's private shards are here, and others are sent none of what lies in the holder's folder."""
    try:
        check_private(data, folder)
        held = held_in(data, folder)
    except DataInvalid as error:
        return failed("private data", error)
    here, all_ = (sum(shard.samples for shard in of.train if shard.private) for of in (held, data))
    return Finding("private data", f"{here:,} of the run's {all_:,} private samples are here")


def clock(offset_s: float) -> Finding:
    """This machine's clock agrees with the coordinator's."""
    text = f"{abs(offset_s):.0f} s {'behind' if offset_s > 0 else 'ahead of'} the coordinator's"
    if abs(offset_s) <= CLOCK_WARNING_S:
        return Finding("clock", text)
    return Finding("clock", text, "set this machine's clock: timedatectl set-ntp true")


def measure_tokens_per_s(manifest: Manifest, device: torch.device, seconds: float = SPEED_S) -> float:
    """How fast the run's model trains on random tokens for a few seconds or, where the run generates, writes them."""
    network = build_model(manifest.model).to(device)
    step = _writing(network, device) if manifest.generates else _training(network, manifest, device)

    def done() -> int:
        with autocast(device, autocast_dtype(device)):
            tokens = step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return tokens

    done()  # warms up
    tokens, started = 0, time.monotonic()
    while not tokens or time.monotonic() - started < seconds:
        tokens += done()
    return tokens / (time.monotonic() - started)


def _training(network: Any, manifest: Manifest, device: torch.device) -> Callable[[], int]:
    """Passes forward and backward; each gives how many tokens it took."""
    network.train()
    length = manifest.data.sequence_length
    batch = torch.randint(_vocabulary(network), (SPEED_SAMPLES, length + 1), device=device)

    def step() -> int:
        logits = network(input_ids=batch[:, :-1], use_cache=False).logits
        torch.autograd.backward(functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten()))
        network.zero_grad(set_to_none=True)
        return SPEED_SAMPLES * length

    return step


def _writing(network: Any, device: torch.device) -> Callable[[], int]:
    """Samples of some tokens, written side by side as `peer.generating` does; each call gives how many tokens it wrote."""
    network.eval()
    batch = micro_batch(device)
    first = torch.randint(_vocabulary(network), (batch, 1), device=device)

    @torch.inference_mode()
    def step() -> int:
        ids, cache = first, None
        for _ in range(SPEED_TOKENS):
            out = network(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids, cache = out.logits[:, -1:].argmax(dim=-1), out.past_key_values
        return batch * SPEED_TOKENS

    return step


def _vocabulary(network: Any) -> int:
    return int(network.get_input_embeddings().num_embeddings)


@contextlib.contextmanager
def _made_folder(directory: Path) -> Iterator[None]:
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UsageError(f"can't write to {directory}: {error.strerror}", "choose another place with --dir") from error
    yield
