// Puts new figures into the page as the coordinator tells them, and fetches the parts that follow from a new round.
"use strict";

const RETRY_MS = 30_000; // after a refusal; a stream that ends is taken up again by the browser itself
const REFRESH_MS = 10_000; // at most so often, so that a thousand readers don't all come back with every round

const state = document.getElementById("live");
let shownRound = document.querySelector('[data-live="round"]')?.textContent;
let refreshing = null;

function tell(name, text) {
  if (!state || state.dataset.state === name) return;
  state.hidden = false;
  state.dataset.state = name;
  state.textContent = text;
}

function show(figures) {
  for (const element of document.querySelectorAll("[data-live]")) {
    const text = figures[element.dataset.live];
    if (typeof text !== "string" || element.textContent === text) continue;
    element.textContent = text;
    element.classList.remove("changed");
    void element.offsetWidth; // so that the animation starts again
    element.classList.add("changed");
  }
  if (shownRound === undefined) shownRound = figures.round;
  if (figures.round !== shownRound) {
    shownRound = figures.round;
    refreshing ??= setTimeout(refresh, REFRESH_MS * (0.1 + 0.9 * Math.random()));
  }
}

async function refresh() {
  refreshing = null;
  const answer = await fetch(location.href).catch(() => null);
  if (!answer?.ok) return;
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const old of document.querySelectorAll("[data-refresh]")) {
    const next = fresh.getElementById(old.id);
    if (!next || old.contains(document.activeElement)) continue; // nobody's place is taken away
    for (const [index, details] of old.querySelectorAll("details").entries()) {
      const same = next.querySelectorAll("details")[index];
      if (same) same.open = details.open;
    }
    old.replaceWith(document.adoptNode(next));
  }
}

function listen() {
  const source = new EventSource(new URL("../events", import.meta.url));
  source.addEventListener("open", () => tell("live", "live"));
  source.addEventListener("figures", (event) => show(JSON.parse(event.data)));
  source.addEventListener("error", () => {
    tell("waiting", "reconnecting");
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, RETRY_MS);
  });
}

listen();
