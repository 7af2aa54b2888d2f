"""The pages about the run: where it stands, who gave what, what is known of one account, and how work is checked."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from heapq import nlargest
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from coordinator.explain import explain
from coordinator.journal import Journal, report_key
from coordinator.store.interface import Store
from coordinator.web.charts import Chart, Row, charts, table
from coordinator.web.evaluations import as_json, shown
from coordinator.web.figures import live
from coordinator.web.rendering import HEADERS, Renderer
from swarm.audits import escape_chance
from swarm.badges import KINDS, Badge, badges_of
from swarm.credits import KEPT, Balance
from swarm.errors import Rejected, SwarmError
from swarm.identity import public_key_of

FRONT_ROWS, LEADERBOARD_ROWS, REPORT_ROWS, KEY_ROWS, SUSPENDED_ROWS = 10, 50, 20, 100, 100
EXPLAINED_KEYS = 5
MOST_KEYS = 1000
HORIZONS = (1, 10, 25, 50, 100, 250, 500, 1000)
TENTH = 0.1
MOST_ROUND = 1 << 48


class Standing(NamedTuple):
    """A line of the leaderboard."""

    place: int
    balance: Balance
    badges: list[Badge]


class Contribution(NamedTuple):
    """A report in the ledger; `entry` is None where the database doesn't have it, which must not be."""

    round: int
    key: str
    entry: int | None


class Course(NamedTuple):
    """The run up to now, in pictures and in figures."""

    charts: list[Chart]
    table: list[Row]


class Escape(NamedTuple):
    """How likely it is to get away with faking for so many rounds."""

    rounds: int
    everything: float
    tenth: float | None


class Pages:
    """The handlers, over what the journal knows."""

    def __init__(self, journal: Journal, store: Store, renderer: Renderer, link: str) -> None:
        self._journal = journal
        self._store = store
        self._renderer = renderer
        self._link = link
        self._course: dict[bool, tuple[tuple[int, int, int], Course]] = {}

    async def index(self, request: Request) -> Response:
        """Progress, and the best."""
        journal, by_time = self._journal, request.query_params.get("by") == "time"
        ledger, run_id = journal.credits, journal.run_id
        return self._renderer.page(
            "index.html",
            live=live(journal),
            link=self._link,
            by_time=by_time,
            course=self._drawn(by_time),
            evaluations=shown(ledger, run_id),
            leaderboard=self._standings(0, FRONT_ROWS),
            share=progress_share(ledger.progress(run_id).tokens, journal),
        )

    async def leaderboard(self, request: Request) -> Response:
        """Who earned most, page by page."""
        number = whole(request.query_params.get("page"), 1, KEPT // LEADERBOARD_ROWS) or 1
        first = (number - 1) * LEADERBOARD_ROWS
        accounts = self._journal.credits.account_count(self._journal.run_id)
        return self._renderer.page(
            "leaderboard.html",
            leaderboard=self._standings(first, LEADERBOARD_ROWS),
            number=number,
            first=first,
            accounts=accounts,
            last=max(1, -(-min(accounts, KEPT) // LEADERBOARD_ROWS)),
            kept=KEPT,
        )

    async def find(self, request: Request) -> Response:
        """From the search field to an account's page."""
        peer_id = request.query_params.get("id", "").strip()
        if not is_peer_id(peer_id):
            return self._renderer.sorry(404, "Not a peer id", "A peer id begins with 12D3KooW; swarm identity show prints yours.")
        return RedirectResponse(f"{self._renderer.base}/account/{peer_id}", 303, HEADERS)

    async def account(self, request: Request) -> Response:
        """One account: what it has, what it did, and why it isn't earning."""
        journal, peer_id = self._journal, request.path_params["peer_id"]
        if not is_peer_id(peer_id):
            return self._renderer.sorry(404, "Not a peer id", "A peer id begins with 12D3KooW; swarm identity show prints yours.")
        ledger, run_id = journal.credits, journal.run_id
        balance = ledger.balance(run_id, peer_id)
        account, deeds = balance.account, ledger.deeds(run_id, balance.account)
        keys = ledger.keys(run_id, account)
        asked_about = [peer_id] if ledger.is_admitted(run_id, peer_id) or not keys else keys[:EXPLAINED_KEYS]
        before = whole(request.query_params.get("before"), 0, MOST_ROUND)
        shown_keys = [peer_id] if peer_id != account else keys
        try:
            contributions = await self._contributions(shown_keys[:MOST_KEYS], before)
        except SwarmError:
            return self._renderer.sorry(503, "The ledger can't be read", "The database doesn't answer. Try again in a moment.")
        return self._renderer.page(
            "account.html",
            peer_id=peer_id,
            balance=balance,
            explained=[(key, explain(journal.state, key)) for key in asked_about],
            account=account,
            keys=keys[:KEY_ROWS],
            key_count=len(keys),
            suspended=ledger.suspended(run_id),
            badges=badges_of(deeds),
            deeds=deeds,
            contributions=contributions,
            older=contributions[-1].round if len(contributions) == REPORT_ROWS else None,
            before=before,
        )

    async def audits(self, _: Request) -> Response:
        """How work is checked, what was found, and how long a faker lasts."""
        journal = self._journal
        totals = journal.credits.audit_totals(journal.run_id)
        suspended = journal.credits.suspended(journal.run_id)
        return self._renderer.page(
            "audits.html",
            totals=totals,
            rate=journal.audit_rate,
            share=totals.done / totals.contributions if totals.contributions else 0.0,
            escapes=escapes(journal.audit_rate, journal.manifest.is_replayed),
            suspended=list(suspended.items())[: -SUSPENDED_ROWS - 1 : -1],
            suspended_count=len(suspended),
            ordered=list(journal.orders.suspended.items())[: -SUSPENDED_ROWS - 1 : -1],
        )

    async def evaluations(self, _: Request) -> Response:
        """The held-out losses, who told them, and what the model wrote, as JSON."""
        return JSONResponse(as_json(self._journal.credits, self._journal.run_id), headers=HEADERS)

    async def badges(self, _: Request) -> Response:
        """What badges there are, and by which rule."""
        return self._renderer.page("badges.html", kinds=[(kind, [kind.at(level) for level in kind.levels]) for kind in KINDS])

    def _drawn(self, by_time: bool) -> Course:
        """The course of the run, drawn anew when the history has changed."""
        history = self._journal.credits.history(self._journal.run_id)
        held_out = self._journal.credits.agreed_evaluations(self._journal.run_id)
        version = (history.rounds, sum(point.weight for point in history.points), hash(tuple(held_out)))
        known = self._course.get(by_time)
        if known is None or known[0] != version:
            self._course[by_time] = known = (version, Course(charts(history, by_time, held_out), table(history)))
        return known[1]

    def _standings(self, first: int, limit: int) -> list[Standing]:
        ledger, run_id = self._journal.credits, self._journal.run_id
        balances = ledger.leaderboard(run_id, limit, first)
        return [
            Standing(place, each, badges_of(ledger.deeds(run_id, each.account))) for place, each in enumerate(balances, first + 1)
        ]

    async def _contributions(self, keys: Sequence[str], before: int | None) -> list[Contribution]:
        """The newest reports of some keys, found by their names: by round and key."""
        ledger, run_id = self._journal.credits, self._journal.run_id
        reported = [(number, key) for key in keys for number in ledger.newest_reports(run_id, key, REPORT_ROWS, before)]
        newest = nlargest(REPORT_ROWS, reported)
        names = [report_key(run_id, number, key) for number, key in newest]
        places = await asyncio.to_thread(self._store.positions, names) if names else {}
        return [Contribution(number, key, places.get(name)) for (number, key), name in zip(newest, names, strict=True)]


def escapes(rate: float, is_replayed: bool) -> list[Escape]:
    """The chances at this rate; who fakes a tenth isn't found by what its update does to the loss."""
    return [
        Escape(rounds, escape_chance(rate, 1.0, rounds), escape_chance(rate, TENTH, rounds) if is_replayed else None)
        for rounds in HORIZONS
    ]


def progress_share(tokens: int, journal: Journal) -> float | None:
    """Which share of the schedule's tokens is verified."""
    total = journal.manifest.planned_tokens
    return min(1.0, tokens / total) if total else None


def is_peer_id(text: str) -> bool:
    """Whether somebody could have this name."""
    try:
        public_key_of(text)
    except Rejected:
        return False
    return True


def whole(text: str | None, least: int, most: int) -> int | None:
    """A whole number from a query, brought within its bounds; None where there is none."""
    if text is None or not text.isascii() or not text.isdigit():
        return None
    return max(least, min(most, int(text[:20])))
