"""Publishing to a hub that stands here: what it is sent, and what is said where it refuses or isn't there."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from peer.publishing import Parcel, publish
from swarm.errors import SwarmError, UsageError

NAME = "owner/model"
TOKEN = "hf_of_nobody"
NOBODY = "http://127.0.0.1:1"


class Hub(ThreadingHTTPServer):
    """Knows repositories by name, with whether they are private, and keeps what is committed to them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.private: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    """The part of the hub's interface that a commit of small files needs."""

    server: Hub

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/")
        if name in self.server.private:
            self._say(200, {"id": name, "private": self.server.private[name]})
        else:
            self._say(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        token = self.headers.get("Authorization", "")
        if token != f"Bearer {TOKEN}":
            self._say(403, {"error": "this token may not write"})
        elif self.path == "/api/repos/create":
            asked = json.loads(raw)
            private = bool(asked.get("private") or asked.get("visibility") == "private")
            self.server.private.setdefault(f"{asked['organization']}/{asked['name']}", private)
            self._say(200, {"url": f"{self.server.address}/{NAME}"})
        elif self.path == "/api/validate-yaml":
            self._say(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(raw)["files"]]
            self._say(200, {"files": files})
        else:
            for line in map(json.loads, raw.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._say(200, {"commitUrl": f"{self.server.address}/{NAME}/commit/1", "commitOid": "1"})

    def _say(self, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
        raw = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(raw)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *arguments: object) -> None:
        """Keep quiet."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What an export looks like, and the token of somebody who may write."""
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("README.md", "config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text(f"the {name}")
    return folder


def test_an_export_is_sent_to_a_private_repository(hub: Hub, model: Path) -> None:
    """All its files as they are, and again to the one that is there now."""
    for _ in range(2):
        assert publish(Parcel.of(model), NAME, endpoint=hub.address) == f"{hub.address}/{NAME}/commit/1"
    assert hub.private == {NAME: True}
    assert hub.files == {path.name: path.read_bytes() for path in model.iterdir()}


def test_nothing_private_lands_in_public(hub: Hub, model: Path) -> None:
    """A repository that is public already takes a model only from somebody who says so."""
    publish(Parcel.of(model), NAME, public=True, endpoint=hub.address)
    assert hub.private == {NAME: False}
    hub.files.clear()
    with pytest.raises(UsageError, match="is public") as caught:
        publish(Parcel.of(model), NAME, endpoint=hub.address)
    assert "--public" in caught.value.hint
    assert hub.files == {}


def test_other_files_stay(model: Path) -> None:
    """Only what an export writes is sent: no key, no hidden file, no link, no folder; and a folder without a model is none."""
    (model / "identity.key").write_text("secret")
    (model / ".hidden.json").write_text("secret")
    (model / "linked.json").symlink_to(model / "identity.key")
    (model / "folder.json").mkdir()
    parcel = Parcel.of(model)
    assert sorted(parcel.files) == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(parcel.left_out) == [".hidden.json", "folder.json", "identity.key", "linked.json"]
    (model / "config.json").unlink()
    with pytest.raises(UsageError, match="has no config") as caught:
        Parcel.of(model)
    assert "swarm export" in caught.value.hint
    with pytest.raises(UsageError, match="no exported model"):
        Parcel.of(model / "nowhere")


def test_what_stands_in_the_way_is_named(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No such name, no hub, a token that isn't enough, none at all: each with what to do, and without the token."""
    cases: list[tuple[str, str, type[SwarmError], str]] = [
        ("a b/c/d", hub.address, UsageError, "no name of a repository"),
        (NAME, NOBODY, SwarmError, "no hub answers"),
    ]
    parcel = Parcel.of(model)
    for name, address, kind, words in cases:
        with pytest.raises(kind, match=words) as caught:
            publish(parcel, name, endpoint=address)
        assert caught.value.hint
        assert TOKEN not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_may_not_write")
    with pytest.raises(SwarmError, match="may not write") as caught:
        publish(parcel, NAME, endpoint=hub.address)
    assert "hf_may_not_write" not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UsageError, match="no token") as caught:
        publish(parcel, NAME, endpoint=hub.address)
    assert "hf auth login" in caught.value.hint
    assert hub.files == {}
