"""The pages in a real browser: what its scripts check and change, and what is left without them."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal

import pytest
import pytest_asyncio
from playwright.async_api import Browser, BrowserContext, Page, Route, async_playwright, expect

from coordinator.server import Coordinator
from swarm.clock import ManualClock
from swarm.ledger import Checkpoint, origin_of, sign_checkpoint
from swarm.merkle import MerkleTree, leaf_hash
from tests.coordinator.conftest import Serve, connected
from tests.coordinator.test_web import ALICE, BOB, train
from tests.world import NOW_S, World, identity, manifest

CHROMIUM = shutil.which("chromium")
PHONE, DESKTOP = {"width": 375, "height": 700}, {"width": 1280, "height": 800}
ENTRY = 4
WRITTEN = "<script>document.title = 'mine'</script>" + "x" * 300
DRAWN, PROVEN = ("/", "/?by=time"), (f"/ledger/{ENTRY}", "/ledger/0")
PAGES = (*DRAWN, *PROVEN, "/leaderboard", "/audits", "/badges", "/ledger", f"/account/{ALICE.peer_id}")


pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is missing: apt-get install chromium"),
]

Json = dict[str, Any]
Change = Callable[[Json], Json]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    """Debian's Chromium."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        await browser.close()


@pytest.fixture
def world() -> World:
    """A run that is evaluated."""
    return World(manifest(evaluation={"every": 1, "evaluators": 2, "prompts": ["def "]}))


@pytest_asyncio.fixture(loop_scope="module")
async def site(serve: Serve, world: World) -> AsyncIterator[Coordinator]:
    """A coordinator with a few rounds of two peers, who agree on the held-out loss of all but the last."""
    async with serve(ManualClock(NOW_S), metrics="127.0.0.1:0") as coordinator, connected(coordinator) as client:
        await train(client, world, 3, (ALICE, BOB))
        for number, apart in ((0, 0.0), (1, 0.001), (2, 5.0)):
            for peer, loss in ((ALICE, 2.5), (BOB, 2.5 + apart)):
                await client.submit_evaluation(world.evaluation(peer, number, loss, texts=[WRITTEN]))
        yield coordinator


@asynccontextmanager
async def opened(browser: Browser, **options: Any) -> AsyncIterator[tuple[BrowserContext, Page, list[str]]]:
    """A page of its own, and what it has to complain about."""
    context = await browser.new_context(**{"viewport": DESKTOP, **options})
    page, complaints = await context.new_page(), list[str]()
    page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    try:
        yield context, page, complaints
    finally:
        await context.close()


def at(coordinator: Coordinator, path: str) -> str:
    return f"http://{coordinator.metrics_address}{path}"


async def test_a_proof_is_verified_in_the_browser(browser: Browser, site: Coordinator) -> None:
    """Hash, inclusion and signature of every entry; and at a later visit that the ledger has only grown since."""
    async with opened(browser) as (_, page, complaints):
        for index in range(len(site.journal.tree)):
            await page.goto(at(site, f"/ledger/{index}"))
            await expect(page.locator("#verdict")).to_have_attribute("data-state", "valid")
            await expect(page.locator("#verdict")).to_contain_text("Verified in your browser")
            checked = page.locator('#checks li[data-state="yes"]')
            await expect(checked).to_have_count(3 if index == 0 else 4)
        await expect(checked.last).to_contain_text("Nothing that was there")
        await expect(page.locator('#checks li[data-state="open"]').first).to_contain_text("Not checked")
    assert complaints == []


async def test_a_ledger_that_has_grown_is_still_the_same(browser: Browser, site: Coordinator, world: World) -> None:
    """Between two visits entries come, and the browser checks that they were only added."""
    async with opened(browser) as (_, page, _), connected(site) as client:
        await page.goto(at(site, f"/ledger/{ENTRY}"))
        await expect(page.locator("#verdict")).to_have_attribute("data-state", "valid")
        for number in range(5):
            await client.announce(world.announcement(identity(10 + number)))
            await page.reload()
            await expect(page.locator('#checks li[data-state="yes"]')).to_have_count(4)


def _flip(text: str) -> str:
    raw = base64.b64decode(text)
    return base64.b64encode(raw[:-1] + bytes([raw[-1] ^ 1])).decode()


def _resigned(note: str) -> str:
    """The note with another signature under the same name and key."""
    before, _, signature = note.rstrip("\n").rpartition(" ")
    return f"{before} {_flip(signature)}\n"


def _grown(note: str) -> str:
    """The note of a ledger that is longer by one and has the same root."""
    origin, size, *rest = note.split("\n")
    return "\n".join([origin, str(int(size) + 1), *rest])


def _forged_note(said: Json) -> str:
    """A checkpoint over a tree in which the entry stands, signed by somebody else's key."""
    tree = MerkleTree()
    tree.append(leaf_hash(base64.b64decode(said["entry"])))
    return sign_checkpoint(identity(99), Checkpoint(origin_of(bytes.fromhex(said["run_id"])), 1, tree.root()))


TAMPERED: dict[str, tuple[Change, str]] = {
    "entry": (lambda said: said | {"entry": _flip(said["entry"])}, "doesn't lead"),
    "proof": (lambda said: said | {"proof": [_flip(said["proof"][0]), *said["proof"][1:]]}, "doesn't lead"),
    "longer proof": (lambda said: said | {"proof": [*said["proof"], said["proof"][0]]}, "doesn't lead"),
    "shorter proof": (lambda said: said | {"proof": said["proof"][:-1]}, "doesn't lead"),
    "endless proof": (lambda said: said | {"proof": said["proof"] * 30}, "too long"),
    "place": (lambda said: said | {"index": said["index"] + 1}, "another entry"),
    "run": (lambda said: said | {"run_id": "00" * 32}, "another entry"),
    "coordinator": (lambda said: said | {"coordinator": identity(99).peer_id}, "another entry"),
    "size": (lambda said: said | {"checkpoint": _grown(said["checkpoint"])}, "isn't signed|doesn't lead"),
    "signature": (lambda said: said | {"checkpoint": _resigned(said["checkpoint"])}, "isn't signed"),
    "signer": (lambda said: said | {"checkpoint": _forged_note(said), "proof": [], "index": 0}, "isn't signed"),
    "note": (lambda said: said | {"checkpoint": "<b>nonsense</b>"}, "not a signed note"),
    "base64": (lambda said: said | {"entry": "%%%"}, "."),
    "types": (lambda said: said | {"proof": None, "checkpoint": 7}, "."),
}


@pytest.mark.parametrize("what", TAMPERED)
async def test_what_was_tampered_with_is_shown_as_invalid(browser: Browser, site: Coordinator, what: str) -> None:
    """A server that lies about one of the parts is found out by the reader's browser."""
    change, complaint = TAMPERED[what]

    async def tamper(route: Route) -> None:
        answer = await route.fetch()
        await route.fulfill(response=answer, body=json.dumps(change(await answer.json())))

    path = "/ledger/0" if what == "signer" else f"/ledger/{ENTRY}"
    async with opened(browser) as (_, page, _):
        await page.route("**/api/ledger/*", tamper)
        await page.goto(at(site, path))
        await expect(page.locator("#verdict")).to_have_attribute("data-state", "invalid")
        await expect(page.locator("#verdict")).to_contain_text("Not valid")
        failed = page.locator('#checks li[data-state="no"]')
        await expect(failed).to_have_count(1)
        text = await failed.inner_text()
        assert any(each in text for each in complaint.split("|")), text
        assert await page.locator("#checks b").count() == 0


async def test_another_history_is_found_out(browser: Browser, site: Coordinator) -> None:
    """A coordinator that rewrites what the browser has seen before can't prove that it only added to it."""

    async def another(route: Route) -> None:
        answer = await route.fetch()
        await route.fulfill(response=answer, body=json.dumps({"proof": [base64.b64encode(bytes(32)).decode()]}))

    async with opened(browser) as (_, page, _):
        await page.goto(at(site, f"/ledger/{ENTRY}"))
        await expect(page.locator("#verdict")).to_have_attribute("data-state", "valid")
        await page.route("**/api/consistency*", another)
        await page.reload()
        await expect(page.locator("#verdict")).to_have_attribute("data-state", "invalid")
        await expect(page.locator('#checks li[data-state="no"]')).to_contain_text("entries were changed or removed")


async def test_where_the_browser_hides_its_cryptography(browser: Browser, site: Coordinator) -> None:
    """On a page without HTTPS hashes are computed all the same, and the signature is said not to be checked."""
    async with opened(browser) as (context, page, complaints):
        await context.add_init_script("Object.defineProperty(crypto, 'subtle', {value: undefined})")
        await page.goto(at(site, f"/ledger/{ENTRY}"))
        await expect(page.locator("#verdict")).to_have_attribute("data-state", "partial")
        await expect(page.locator('#checks li[data-state="open"]').first).to_contain_text("the checkpoint's signature")
    assert complaints == []


async def test_hashes_are_the_same_with_and_without_the_browsers(browser: Browser, site: Coordinator) -> None:
    """Our SHA-256 and the browser's agree on every length around the block's."""
    async with opened(browser) as (_, page, _):
        await page.goto(at(site, "/ledger/0"))
        differ = await page.evaluate(
            """async () => {
                const { hex, plainSha256, sha256 } = await import("/static/proof.js");
                const differ = [];
                for (const length of [...Array(200).keys(), 4096, 70001]) {
                    const bytes = Uint8Array.from({ length }, (_, place) => (place * 7 + length) & 255);
                    if (hex(plainSha256(bytes)) !== hex(await sha256(bytes))) differ.push(length);
                }
                return differ;
            }"""
        )
    assert differ == []


async def test_figures_change_without_a_reload(browser: Browser, site: Coordinator, world: World) -> None:
    """A new round shows in figures and charts while somebody looks, and nothing is fetched anew by the page itself."""
    async with opened(browser) as (_, page, complaints), connected(site) as client:
        await page.goto(at(site, "/"))
        await expect(page.locator("#live")).to_have_text("live")
        await expect(page.locator('dd[data-live="round"]')).to_have_text("2")
        await page.evaluate("window.stayed = true")
        proposal, reports = world.round((ALICE, BOB), 3)
        for report in reports:
            await client.submit_report(report, proposal)
        await expect(page.locator('dd[data-live="round"]')).to_have_text("3")
        await expect(page.locator('dd[data-live="tokens"]')).to_have_text("2,048")
        await expect(page.locator("#tokens-text")).to_contain_text("at round 4", timeout=30_000)
        assert await page.evaluate("window.stayed")
        assert await page.locator("meta[http-equiv=refresh]").count() == 0
    assert complaints == []


async def test_the_page_outlives_the_stream(browser: Browser, site: Coordinator) -> None:
    """When the stream is refused the page stands as it was, says so, and takes the stream up again."""
    async with opened(browser) as (_, page, _):
        await page.add_init_script("const later = setTimeout; window.setTimeout = (work, ms) => later(work, Math.min(ms, 100));")
        await page.route("**/events", lambda route: route.fulfill(status=503, body="too many listeners"))
        await page.goto(at(site, "/"))
        await expect(page.locator("#live")).to_have_text("reconnecting")
        await expect(page.locator('dd[data-live="round"]')).to_have_text("2")
        await page.unroute("**/events")
        await expect(page.locator("#live")).to_have_text("live")


async def test_everything_is_there_without_scripts(browser: Browser, site: Coordinator) -> None:
    """Charts, tables, proofs and links work; what only a script does is hidden, or said not to be done."""
    async with opened(browser, java_script_enabled=False) as (_, page, _):
        for path in PAGES:
            answer = await page.goto(at(site, path))
            assert answer is not None
            assert answer.ok, path
            await expect(page.locator("h1")).to_be_visible()
            for scripted in await page.locator("#live, #checks").all():
                await expect(scripted).to_be_hidden()
            await expect(page.locator("svg.chart .line")).to_have_count(4 if path in DRAWN else 0)
            if path in PROVEN:
                await expect(page.locator("#verdict")).to_contain_text("has checked nothing")
                await expect(page.get_by_text("swarm ledger check entry.json")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_a_phone_shows_all_of_it(browser: Browser, site: Coordinator, scheme: Literal["light", "dark"]) -> None:
    """At 375 pixels nothing sticks out sideways, letters can be read, and the browser has nothing to complain about."""
    async with opened(browser, viewport=PHONE, color_scheme=scheme) as (_, page, complaints):
        for path in PAGES:
            await page.goto(at(site, path))
            for details in await page.locator("summary").all():
                await details.click()
            assert await page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], path
            for letters in (await page.locator("svg.chart text").all())[:2]:
                box = await letters.bounding_box()
                assert box is not None
                assert box["height"] >= 10
            assert await page.evaluate(CONTRAST) == [], path
    assert complaints == []


CONTRAST = """() => {
    const channels = (colour) => colour.match(/[0-9.]+/g).map(Number);
    const light = (colour) => {
        const [red, green, blue] = channels(colour).map((part) => part / 255)
            .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
    };
    const ground = (element) => {
        for (let each = element; each; each = each.parentElement) {
            const colour = getComputedStyle(each).backgroundColor;
            if ((channels(colour)[3] ?? 1) === 1) return colour;
        }
        return "rgb(255, 255, 255)";
    };
    const weak = new Set();
    for (const element of document.querySelectorAll("main *, header *, footer *")) {
        const own = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
        if (!own || !element.checkVisibility()) continue;
        const style = getComputedStyle(element);
        const ink = element.closest("svg") ? style.fill : style.color;
        const [one, other] = [light(ink), light(ground(element))].sort((first, second) => second - first);
        if ((one + 0.05) / (other + 0.05) < 4.5) weak.add(`${element.tagName} ${element.className.baseVal ?? element.className}`);
    }
    return [...weak];
}"""


async def test_a_keyboard_is_enough(browser: Browser, site: Coordinator) -> None:
    """The first stop skips the navigation, every stop can be seen, and links are followed by Enter."""
    async with opened(browser) as (_, page, _):
        await page.goto(at(site, "/leaderboard"))
        await page.keyboard.press("Tab")
        skip = page.get_by_text("Skip to the content")
        await expect(skip).to_be_focused()
        await expect(skip).to_be_in_viewport()
        await page.locator(f'main a[href="/account/{ALICE.peer_id}"]').focus()
        assert await page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        await page.keyboard.press("Enter")
        await expect(page).to_have_url(at(site, f"/account/{ALICE.peer_id}"))


async def test_what_evaluators_say_is_text(browser: Browser, site: Coordinator) -> None:
    """Their markup stands there to be read and does nothing; rounds without an agreement say so; dots are in the chart."""
    async with opened(browser) as (_, page, complaints):
        await page.goto(at(site, "/"))
        await expect(page.locator("pre.written")).to_contain_text("def <script>document.title = 'mine'</script>")
        assert "mine" not in await page.title()
        await expect(page.locator("#evaluations-section tbody tr")).to_have_count(3)
        await expect(page.locator("#evaluations-section tbody tr").first).to_contain_text("not agreed")
        await expect(page.locator("circle.held-out")).to_have_count(2)
        await expect(page.locator('dd[data-live="held-out"]')).to_have_text("2.5005")
    assert complaints == []


async def test_who_wants_no_motion_has_none(browser: Browser, site: Coordinator) -> None:
    """Figures that change don't flash."""
    async with opened(browser, reduced_motion="reduce") as (_, page, _):
        await page.goto(at(site, "/"))
        figure = page.locator('dd[data-live="round"]')
        await figure.evaluate("element => element.classList.add('changed')")
        assert await figure.evaluate("element => getComputedStyle(element).animationName") == "none"
