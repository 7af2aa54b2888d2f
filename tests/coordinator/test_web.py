"""The pages, their headers, the JSON behind them, metrics and health."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import httpx
import pytest

from coordinator.errors import StoreFailed
from coordinator.orders import Orders
from coordinator.server import Coordinator
from coordinator.web.explorer import ENTRY_ROWS
from coordinator.web.pages import LEADERBOARD_ROWS, REPORT_ROWS
from swarm.accounts import certify
from swarm.audits import escape_chance
from swarm.badges import KINDS
from swarm.clock import ManualClock
from swarm.credits import KEPT
from swarm.entry_proof import ProvenEntry
from swarm.errors import DatabaseCorrupt, Rejected
from swarm.identity import Identity
from swarm.ledger import origin_of, verify_checkpoint
from swarm.merkle import verify_consistency
from swarm.messages import seal
from swarm.rpc.client import CoordinatorClient
from swarm.rpc.v1.signed_pb2 import HeldCertificate
from tests.coordinator.conftest import Serve, connected
from tests.world import NOW_S, World, identity, manifest

PEERS = [identity(number) for number in range(3)]
ALICE, BOB = PEERS[:2]
ACCOUNT = identity(70)
PAGES = ("/", "/?by=time", "/leaderboard", "/audits", "/badges", "/ledger", "/ledger/0", f"/account/{ALICE.peer_id}", "/nothing")
VOID = frozenset({"meta", "link", "input", "img", "br", "line", "circle", "polyline", "polygon"})


async def get(coordinator: Coordinator, path: str, **headers: str) -> httpx.Response:
    """Fetch a path from the coordinator's page."""
    async with httpx.AsyncClient() as client:
        return await client.get(f"http://{coordinator.metrics_address}{path}", headers=headers)


async def train(client: CoordinatorClient, world: World, rounds: int, peers: tuple[Identity, ...] = (ALICE,)) -> None:
    """Admit the peers and let them report so many rounds."""
    for peer in peers:
        await client.announce(world.announcement(peer))
    for number in range(rounds):
        proposal, reports = world.round(peers, number)
        for report in reports:
            await client.submit_report(report, proposal)


class Outline(HTMLParser):
    """What accessibility depends on, as far as it can be read off the markup."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.faults: list[str] = []
        self.feed(text)
        self.faults += self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


async def test_page_shows_progress_and_leaderboard(serve: Serve, world: World) -> None:
    """The page shows the run, the join command, who earned what, and where the checkpoint is."""
    async with serve(ManualClock(NOW_S), metrics="127.0.0.1:0") as coordinator, connected(coordinator) as client:
        empty = await get(coordinator, "/")
        assert "Nobody has contributed yet" in empty.text
        assert empty.text.count("nothing yet</text>") == 4
        await train(client, world, 1)
        page = await get(coordinator, "/")
        note = await get(coordinator, "/checkpoint")
    assert ALICE.peer_id in page.text
    assert f"swarm join {coordinator.link}" in page.text
    assert "0.256" in page.text
    assert "Pioneer" in page.text
    verify_checkpoint(note.text, origin_of(world.run_id), coordinator.identity.peer_id)


async def test_charts_show_the_ledgers_rounds(serve: Serve, world: World) -> None:
    """Every chart has a line, a title, a description and axes; by round or by time; and a table with the same figures."""
    clock = ManualClock(NOW_S)
    async with serve(clock, metrics="127.0.0.1:0") as coordinator, connected(coordinator) as client:
        for number in range(3):
            clock.advance(30)
            proposal, reports = world.round([ALICE], number)
            await client.announce(world.announcement(ALICE, clock.wall_s()))
            await client.submit_report(reports[0], proposal)
        by_round, by_time = await get(coordinator, "/"), await get(coordinator, "/?by=time")
    for page in (by_round.text, by_time.text):
        assert page.count('<svg class="chart"') == page.count("</title><desc") == page.count('role="img"') == 4
        assert page.count('<polyline class="line"') == 4
        assert "768" in page  # tokens of three rounds
        assert "From 2.5 to 2.5 nats per token" in page
        assert "30 seconds, mean" in page
    assert "confirmed rounds</text>" in by_round.text
    assert "time, UTC</text>" in by_time.text
    assert '<th scope="row">3</th><td>1970-01-12 13:48:10 UTC</td><td>2.5000</td><td>256</td><td>1.0</td>' in by_round.text


async def test_the_course_survives_a_restart(serve: Serve, world: World) -> None:
    """What is drawn comes from the ledger: the same page after a restart, but for who is alive."""
    async with serve(ManualClock(NOW_S), metrics="127.0.0.1:0") as coordinator, connected(coordinator) as client:
        await train(client, world, 3)
        before = (await get(coordinator, "/")).text
    async with serve(ManualClock(NOW_S), metrics="127.0.0.1:0") as coordinator:
        after = (await get(coordinator, "/")).text
    charts = re.compile(r'<svg class="chart".*?</svg>', re.DOTALL)
    assert charts.findall(before) == charts.findall(after) != []


async def test_what_strangers_write_is_escaped(serve: Serve) -> None:
    """Text from a manifest can't become markup, nor can what is asked for."""
    world = World(manifest(description="<script>alert(1)</script>"))
    async with serve(ManualClock(NOW_S), world, metrics="127.0.0.1:0") as coordinator:
        page = await get(coordinator, "/")
        entry = await get(coordinator, "/ledger/0", host="<script>")
        asked = [await get(coordinator, path) for path in ("/account?id=<script>", "/account/<script>", "/<script>")]
    for text in (page.text, entry.text, *(answer.text for answer in asked)):
        assert "<script>" not in text
    assert "&lt;script&gt;" in page.text
    assert "&lt;script&gt;" in entry.text
    assert {answer.status_code for answer in asked} == {404}


@pytest.mark.parametrize("path", PAGES)
async def test_nothing_runs_but_our_own_files(serve: Serve, world: World, path: str) -> None:
    """The policy allows scripts and styles from this server's files only, and the markup has none inside."""
    async with serve(ManualClock(NOW_S), metrics="127.0.0.1:0") as coordinator, connected(coordinator) as client:
        await train(client, world, 2)
        page = await get(coordinator, path)
        outline = Outline(page.text)
        for name in re.findall(r'(?:src|href)="(/static/[^"]+)"', page.text):
            assert (await get(coordinator, name)).status_code == 200
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in policy
    assert "*" not in policy
    assert not outline.all("style")
    for _, attributes in outline.tags:
        assert not {name for name in attributes if name.startswith("on") or name == "style"}
    assert {script["src"] for script in outline.all("script")} <= {"/static/live.js", "/static/check.js"}


@pytest.mark.parametrize("path", PAGES)
async def test_pages_can_be_read_by_everybody(serve: Serve, world: World, path: str) -> None:
    """Landmarks, one heading, a caption and scopes for tables, names for fields and pictures, and no tag left open."""
    async with serve(ManualClock(NOW_S), metrics="127.0.0.1:0") as coordinator, connected(coordinator) as client:
        await train(client, world, 2)
        outline = Outline((await get(coordinator, path)).text)
    assert outline.faults == []
    for landmark in ("main", "header", "footer", "nav", "h1"):
        assert outline.all(landmark)
    assert len(outline.all("h1")) == len(outline.all("main")) == 1
    assert [html["lang"] for html in outline.all("html")] == ["en"]
    assert len(outline.all("caption")) == len(outline.all("table"))
    assert all("scope" in cell for cell in outline.all("th"))
    assert all("alt" in picture for picture in outline.all("img"))
    assert all("aria-labelledby" in picture for picture in outline.all("svg"))
    assert all("aria-label" in landmark for landmark in outline.all("nav"))
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    labelled = [name for _, attributes in outline.tags for name in (attributes.get("aria-labelledby") or "").split()]
    assert {*labelled, *(label["for"] for label in outline.all("label"))} <= {*ids}


async def test_static_files_are_asked_for_once(serve: Serve) -> None:
    """A browser that has a file already isn't sent it again; others don't exist."""
    async with serve(metrics="127.0.0.1:0") as coordinator:
        style = await get(coordinator, "/static/style.css")
        again = await get(coordinator, "/static/style.css", **{"if-none-match": style.headers["etag"]})
        missing = await get(coordinator, "/static/..%2Fapp.py")
    assert style.headers["content-type"].startswith("text/css")
    assert (again.status_code, again.content) == (304, b"")
    assert missing.status_code == 404


async def test_metrics(serve: Serve, world: World) -> None:
    """Every promised metric is exposed, with the work that was done."""
    async with serve(ManualClock(NOW_S), metrics="127.0.0.1:0") as coordinator, connected(coordinator) as client:
        await train(client, world, 1)
        text = (await get(coordinator, "/metrics")).text
    values = dict(re.findall(r"^swarm_coordinator_(\S+) (\S+)$", text, re.MULTILINE))
    assert values["ledger_entries"] == "5.0"
    assert values['reports_total{outcome="confirmed"}'] == "1.0"
    assert values['admissions_total{outcome="admitted"}'] == "1.0"
    assert values["tokens_verified_total"] == "256.0"
    assert float(values["flops_verified_total"]) == 256e12
    assert values["train_loss_nats"] == "2.5"
    assert values['request_duration_seconds_count{method="SubmitReport"}'] == "1.0"
    assert values['calls_total{code="OK",method="SubmitReport"}'] == "1.0"
    assert (values["queue_events"], values["calls_in_progress"], values["writer"]) == ("0.0", "0.0", "1.0")
    assert [values[f'suspended_keys{{by="{by}"}}'] for by in ("audits", "operator")] == ["0.0", "0.0"]
    assert re.search(r"^process_resident_memory_bytes \S+$", text, re.MULTILINE)
    assert float(values["commit_duration_seconds_count"]) == 2
    assert 'build_info{version="0.1.0"}' in values


async def test_audits_and_suspensions_are_measured(serve: Serve) -> None:
    """What was drawn, what is open, and at which rate; a refused call counts by its status."""
    world = World(manifest(audit={"rate": 0.25, "first": 2}))
    async with serve(ManualClock(NOW_S), world, metrics="127.0.0.1:0") as coordinator, connected(coordinator) as client:
        for peer in PEERS:
            await client.announce(world.announcement(peer))
        proposal, reports = world.round(PEERS, 0)
        for report in reports:
            await client.submit_report(report, proposal)
        coordinator.journal.orders = Orders(suspended={ALICE.peer_id: "tests"})
        with pytest.raises(Rejected, match="suspended"):
            await client.announce(world.announcement(ALICE, NOW_S + 1))
        text = (await get(coordinator, "/metrics")).text
    values = dict(re.findall(r"^swarm_coordinator_(\S+) (\S+)$", text, re.MULTILINE))
    audits = ("audits_drawn_total", "audits_open", "audits_overdue", "audit_ratio")
    assert [values[name] for name in audits] == ["3.0", "3.0", "0.0", "0.25"]
    assert values['suspended_keys{by="operator"}'] == "1.0"
    assert values['calls_total{code="PERMISSION_DENIED",method="Announce"}'] == "1.0"


async def test_health(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Health is what the ledger's writer says."""
    async with serve(metrics="127.0.0.1:0") as coordinator:
        assert (await get(coordinator, "/healthz")).status_code == 200
        monkeypatch.setattr(coordinator.journal, "_behind", True)
        assert (await get(coordinator, "/healthz")).status_code == 503
        assert (await get(coordinator, "/nothing")).status_code == 404


async def test_account_page(serve: Serve, world: World) -> None:
    """An account's page shows what it has and why it isn't earning, step by step; what isn't a peer id has no page."""
    async with serve(ManualClock(NOW_S), metrics="127.0.0.1:0") as coordinator, connected(coordinator) as client:
        path = f"/account/{ALICE.peer_id}"
        assert "never admitted" in (await get(coordinator, path)).text
        await client.announce(world.announcement(ALICE))
        assert "train yet" in (await get(coordinator, path)).text
        proposal, reports = world.round([ALICE], 0)
        await client.submit_report(reports[0], proposal)
        await client.announce(world.announcement(ALICE, state="training", round=1))
        page = await get(coordinator, path)
        assert "Nothing is in the way" in page.text
        assert "0.256" in page.text
        assert f'href="{path}"' in (await get(coordinator, "/")).text
        found = await get(coordinator, f"/account?id=+{ALICE.peer_id}+")
        assert (found.status_code, found.headers["location"]) == (303, path)
        coordinator.journal.presence.forget(ALICE.peer_id)
        assert "Nothing was heard" in (await get(coordinator, path)).text
        for nobody in ("/account/nobody", "/account/%3Cscript%3E"):
            assert (await get(coordinator, nobody)).status_code == 404


async def test_an_accounts_contributions_lead_to_their_entries(serve: Serve, world: World) -> None:
    """Page after page, the newest first, every report is a link to the entry that holds it."""
    rounds = REPORT_ROWS + 3
    async with serve(ManualClock(NOW_S), metrics="127.0.0.1:0") as coordinator, connected(coordinator) as client:
        await train(client, world, rounds)
        path, found = f"/account/{ALICE.peer_id}", []
        while path:
            text = (await get(coordinator, path)).text
            found += re.findall(r'<tr><th scope="row">(\d+)</th>.*?href="/ledger/(\d+)"', text)
            older = re.search(r'rel="next" href="([^"]+)"', text)
            path = older[1] if older else ""
        assert [int(number) for number, _ in found] == list(range(rounds))[::-1]
        for number, entry in found[:: REPORT_ROWS // 2]:
            page = (await get(coordinator, f"/ledger/{entry}")).text
            assert ALICE.peer_id in page
            assert f"<dt>Round</dt><dd>{number}</dd>" in page


async def test_an_account_with_several_keys(serve: Serve, world: World) -> None:
    """The account's page has all of its keys and their contributions; a key's page leads to the account."""
    async with serve(ManualClock(NOW_S), metrics="127.0.0.1:0") as coordinator, connected(coordinator) as client:
        for peer in (ALICE, BOB):
            certificate = certify(ACCOUNT, peer.peer_id, NOW_S, 30)
            await client.announce(world.announcement(peer, held=seal(peer, HeldCertificate(certificate=certificate))))
        proposal, reports = world.round([ALICE, BOB], 0)
        for report in reports:
            await client.submit_report(report, proposal)
        account = (await get(coordinator, f"/account/{ACCOUNT.peer_id}")).text
        key = (await get(coordinator, f"/account/{ALICE.peer_id}")).text
        board = (await get(coordinator, "/leaderboard")).text
    assert "0.512" in account
    for peer in (ALICE, BOB):
        assert account.count(f'href="/account/{peer.peer_id}"') == 3
        assert f'href="/account/{peer.peer_id}"' not in board
    assert f'href="/account/{ACCOUNT.peer_id}"' in key
    assert f'href="/account/{ACCOUNT.peer_id}"' in board
    assert "never admitted" not in account


async def test_the_leaderboard_goes_on_page_by_page(serve: Serve, world: World) -> None:
    """Places go on where the page before ended; pages that don't exist are the last one that may."""
    peers = tuple(identity(number) for number in range(LEADERBOARD_ROWS + 2))
    async with serve(ManualClock(NOW_S), metrics="127.0.0.1:0") as coordinator, connected(coordinator) as client:
        await train(client, world, 1, peers)
        pages = [(await get(coordinator, f"/leaderboard{query}")).text for query in ("", "?page=2", "?page=x", "?page=0")]
        far = await get(coordinator, f"/leaderboard?page={10**30}")
    places = [re.findall(r'<td class="place">(\d+)</td>', page) for page in pages]
    assert [len(each) for each in places] == [LEADERBOARD_ROWS, 2, LEADERBOARD_ROWS, LEADERBOARD_ROWS]
    assert places[1] == [str(LEADERBOARD_ROWS + 1), str(LEADERBOARD_ROWS + 2)]
    assert {peer.peer_id for peer in peers} == set(re.findall(r'title="(12D3KooW\w+)"', pages[0] + pages[1]))
    assert f"Page {KEPT // LEADERBOARD_ROWS} of 2" in far.text


async def test_badges_have_their_rules_on_a_page(serve: Serve) -> None:
    """Every level of every badge."""
    async with serve(metrics="127.0.0.1:0") as coordinator:
        page = (await get(coordinator, "/badges")).text
    for kind in KINDS:
        for level in kind.levels:
            assert kind.at(level).rule in page


async def test_how_long_a_faker_lasts(serve: Serve) -> None:
    """The chances are those of the rate that holds; where audits go by the loss, no figure is given for a tenth."""
    audited = World(manifest(audit={"rate": 0.05, "first": 3}))
    async with serve(ManualClock(NOW_S), audited, metrics="127.0.0.1:0") as coordinator, connected(coordinator) as client:
        await train(client, audited, 1, (ALICE, BOB))
        page = (await get(coordinator, "/audits")).text
    assert "5 % of the contributions are drawn at present, and all of a new key's first 3" in page
    assert f"<td>{escape_chance(0.05, 1.0, 10) * 100:.3g} %</td><td>{escape_chance(0.05, 0.1, 10) * 100:.3g} %</td>" in page
    assert "<dt>Audits asked for</dt><dd>2</dd>" in page


async def test_a_run_without_audits_says_so(serve: Serve) -> None:
    """No chance is made up."""
    async with serve(metrics="127.0.0.1:0") as coordinator:
        page = (await get(coordinator, "/audits")).text
    assert "audit.rate and audit.first are 0" in page
    assert "How long would a faker last" not in page


async def test_the_ledger_entry_by_entry(serve: Serve, world: World) -> None:
    """All entries are listed, the newest first, page by page, each with its kind and who is behind it."""
    async with serve(ManualClock(NOW_S), metrics="127.0.0.1:0") as coordinator, connected(coordinator) as client:
        await train(client, world, ENTRY_ROWS)
        size, path, seen = len(coordinator.journal.tree), "/ledger", list[int]()
        while path:
            text = (await get(coordinator, path)).text
            seen += [int(number) for number in re.findall(r'<tr><th scope="row"><a href="/ledger/(\d+)">', text)]
            older = re.search(r'rel="next" href="([^"]+)"', text)
            path = older[1] if older else ""
        assert seen == list(range(size))[::-1]
        for query in ("?entry=3", "?before=4", f"?entry=3&before={size}"):
            assert 'href="/ledger/3">3</a>' in (await get(coordinator, f"/ledger{query}")).text
        for beyond in ("?entry=99999999999999999999", "?before=x"):
            assert f'href="/ledger/{size - 1}">' in (await get(coordinator, f"/ledger{beyond}")).text
        for nothing in (f"/ledger/{size}", "/ledger/-1", "/ledger/x", f"/api/ledger/{size}"):
            assert (await get(coordinator, nothing)).status_code == 404


async def test_every_entry_is_proven_to_strangers(serve: Serve, world: World) -> None:
    """The JSON of every entry holds up to the checks that a stranger makes, and the page shows the same proof."""
    async with serve(ManualClock(NOW_S), metrics="127.0.0.1:0") as coordinator, connected(coordinator) as client:
        await train(client, world, 2)
        for index in range(len(coordinator.journal.tree)):
            answer = await get(coordinator, f"/api/ledger/{index}")
            proven = ProvenEntry.parse(answer.content)
            checkpoint, _ = proven.verify(coordinator.identity.peer_id)
            assert (proven.index, checkpoint.size) == (index, len(coordinator.journal.tree))
            page = (await get(coordinator, f"/ledger/{index}")).text
            assert all(sibling.hex() in page for sibling in proven.proof)
            assert f"swarm ledger check entry.json --coordinator {coordinator.identity.peer_id}" in page


async def test_the_ledger_only_grows(serve: Serve, world: World) -> None:
    """Who kept a root is shown that it is the beginning of the ledger; what no ledger has is refused."""
    async with serve(ManualClock(NOW_S), metrics="127.0.0.1:0") as coordinator, connected(coordinator) as client:
        await client.announce(world.announcement(ALICE))
        tree = coordinator.journal.tree
        old_size, old_root = len(tree), tree.root()
        await train(client, world, 2)
        answer = (await get(coordinator, f"/api/consistency?old={old_size}&size={len(tree)}")).json()
        proof = [base64.b64decode(node) for node in answer["proof"]]
        assert verify_consistency(old_size, old_root, len(tree), tree.root(), proof)
        for wrong in ("", "?old=0&size=1", "?old=2&size=1", "?old=1&size=9999", "?old=-1&size=2", "?old=x&size=2"):
            assert (await get(coordinator, f"/api/consistency{wrong}")).status_code == 400


@pytest.mark.parametrize("failure", [DatabaseCorrupt("gone", "look"), StoreFailed("gone")])
async def test_a_database_that_is_away(
    serve: Serve, world: World, monkeypatch: pytest.MonkeyPatch, failure: DatabaseCorrupt | StoreFailed
) -> None:
    """Pages that need it say so; the others go on."""

    def fail(*_: object) -> None:
        raise failure

    async with serve(ManualClock(NOW_S), metrics="127.0.0.1:0") as coordinator, connected(coordinator) as client:
        await train(client, world, 1)
        for method in ("entries", "positions"):
            monkeypatch.setattr(coordinator.journal._store, method, fail)
        statuses = [
            (await get(coordinator, path)).status_code
            for path in ("/", "/ledger", "/ledger/0", "/api/ledger/0", f"/account/{ALICE.peer_id}")
        ]
        monkeypatch.undo()
    assert statuses == [200, 503, 503, 503, 503]
