"""Data sets of a hub: a local folder in the same layout, a hub that isn't there, and one that answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from peer.hub import open_data
from swarm.errors import DataInvalid

NOBODY = "http://127.0.0.1:1"


def write_set(folder: Path) -> Path:
    """Two splits of JSON lines, and a card."""
    folder.mkdir()
    for split, count in (("train", 5), ("test", 3)):
        rows = [{"text": f"{split} {number}", "number": number} for number in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "README.md").write_text("---\nlicense:\n- cc-by-4.0\n- mit\n---\n# A set\n")
    return folder


class Hub(BaseHTTPRequestHandler):
    """A hub that knows nothing."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Keep quiet."""


@pytest.fixture
def hub() -> Iterator[str]:
    """Its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_folder_is_read_as_a_hubs_set_would_be(tmp_path: Path) -> None:
    """Rows of the split that is asked for, as many as are wanted, and the licences of the card."""
    found = open_data(str(write_set(tmp_path / "set")), split="test")
    assert [row["text"] for _, row in found.records()] == ["test 0", "test 1", "test 2"]
    assert [place.rpartition(", ")[2] for place, _ in found.records(2)] == ["row 1", "row 2"]
    assert found.license == "cc-by-4.0, mit"
    assert found.origin.endswith("set, split test")


def test_configurations_are_told_apart(tmp_path: Path) -> None:
    """Those that a card names, here of Parquet files; without one of them it is asked for."""
    folder = tmp_path / "set"
    for name in ("english", "german"):
        (folder / name).mkdir(parents=True)
        parquet.write_table(pa.table({"text": [f"{name} text"]}), folder / name / "train-00000.parquet")
    configs = [f"- config_name: {name}\n  data_files: {name}/*.parquet" for name in ("english", "german")]
    (folder / "README.md").write_text("---\nconfigs:\n" + "\n".join(configs) + "\n---\n")
    assert [row["text"] for _, row in open_data(str(folder), "german").records()] == ["german text"]
    with pytest.raises(DataInvalid, match="german") as caught:
        open_data(str(folder))
    assert "--config" in caught.value.hint


def test_what_is_wrong_with_a_set_is_named(tmp_path: Path) -> None:
    """An unknown split or configuration, a damaged file, and code: which is not run."""
    folder = write_set(tmp_path / "set")
    with pytest.raises(DataInvalid, match="Available splits"):
        open_data(str(folder), split="nowhere")
    with pytest.raises(DataInvalid, match="Available"):
        open_data(str(folder), "other")
    (folder / "train.jsonl").write_text('{"text": ')
    with pytest.raises(DataInvalid, match="can't be read"):
        list(open_data(str(folder)).records())
    code = tmp_path / "code"
    code.mkdir()
    (code / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(DataInvalid, match="no longer supported") as caught:
        open_data(str(code))
    assert "never run" in caught.value.hint
    assert not (tmp_path / "ran").exists()


def test_no_hub_and_no_such_set(hub: str) -> None:
    """Each has its own words, with what to do."""
    cases = {
        ("owner/name", NOBODY): "no hub answers",
        ("owner/name", hub): "has no data set owner/name",
        ("a b/c/d", hub): "neither",
    }
    for (name, endpoint), words in cases.items():
        with pytest.raises(DataInvalid, match=words) as caught:
            open_data(name, endpoint=endpoint)
        assert caught.value.hint
