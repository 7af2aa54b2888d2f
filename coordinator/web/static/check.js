// Shows on an entry's page what this browser has checked about it, and what it hasn't.
"use strict";

import { bytesOf, equal, extendsTree, hex, isSignedBy, keyOf, leafHash, readCheckpoint, rootFrom } from "./proof.js";

const MOST_SIBLINGS = 64;
const FORMAT = "swarm-entry-1";
const verdict = document.getElementById("verdict");
const list = document.getElementById("checks");
const { index, coordinator, run } = verdict.dataset;

function check(state, text, detail = "") {
  const item = document.createElement("li");
  item.dataset.state = state;
  const words = document.createElement("span");
  words.textContent = { yes: "", no: "Failed: ", open: "Not checked: " }[state] + text;
  if (detail) {
    const small = document.createElement("small");
    small.textContent = detail;
    words.append(small);
  }
  item.append(words);
  list.append(item);
  return state;
}

async function answerOf(path) {
  const answer = await fetch(new URL(path, import.meta.url));
  if (!answer.ok) throw new Error(`the coordinator answers ${answer.status}`);
  return answer.json();
}

// The key and the checkpoint that this browser was shown before under this address, if it remembers any.
const remembered = {
  name: `swarm ledger ${run}`,
  get() {
    try {
      const { coordinator, size, root, at } = JSON.parse(localStorage.getItem(this.name));
      return { coordinator: String(coordinator), size: Number(size), root: bytesOf(root), at: String(at) };
    } catch {
      return null;
    }
  },
  set(size, root) {
    try {
      const at = new Date().toISOString().slice(0, 10);
      localStorage.setItem(this.name, JSON.stringify({ coordinator, size, root: btoa(String.fromCharCode(...root)), at }));
    } catch {
      // a browser that keeps nothing
    }
  },
};

async function checkAll() {
  const said = await answerOf(`../api/ledger/${index}`);
  const same = said.format === FORMAT && said.index === Number(index) && said.coordinator === coordinator && said.run_id === run;
  if (!same) throw new Error("the answer is about another entry, run or coordinator than this page");
  const entry = bytesOf(said.entry), leaf = await leafHash(entry);
  const states = [check("yes", `The entry's ${entry.length.toLocaleString("en")} bytes were hashed here.`, `SHA-256 leaf ${hex(leaf)}`)];
  const checkpoint = readCheckpoint(said.checkpoint);
  if (said.proof.length > MOST_SIBLINGS) throw new Error("the proof is too long");
  const root = await rootFrom(leaf, said.index, checkpoint.size, said.proof.map(bytesOf));
  const leads = root !== null && equal(root, checkpoint.root);
  const size = checkpoint.size.toLocaleString("en");
  states.push(
    leads
      ? check("yes", `${said.proof.length} hashes lead from it to the root over all ${size} entries.`, `root ${hex(root)}`)
      : check("no", "the inclusion proof doesn't lead from this entry to the checkpoint's root."),
  );
  states.push(await signature(checkpoint));
  if (states.includes("no")) return states;
  states.push(await history(checkpoint));
  check("open", "whether others are shown the same ledger. Witnesses tell: swarm ledger verify --witness.");
  check("open", "whether this page itself is honest: its script comes from the coordinator, too. swarm ledger check doesn't.");
  check("open", "the signatures inside the entry, and whether it may stand here. swarm ledger verify checks all of them.");
  return states;
}

async function signature(checkpoint) {
  if (checkpoint.origin !== originOf(run)) return check("no", "the checkpoint is of another log.");
  const signed = await isSignedBy(checkpoint, keyOf(coordinator));
  if (signed === null) {
    return check("open", "the checkpoint's signature: this browser has no Ed25519, or hides it from pages without HTTPS.");
  }
  return signed
    ? check("yes", "The coordinator's key has signed this root.", `Ed25519 key ${coordinator}`)
    : check("no", "the checkpoint isn't signed by the coordinator's key.");
}

async function history(checkpoint) {
  const before = remembered.get();
  if (!before) {
    remembered.set(checkpoint.size, checkpoint.root);
    return check("open", "whether the key is the right one, as this browser hasn't seen it before. It remembers it from now on; compare it with what somebody else was shown.");
  }
  if (before.coordinator !== coordinator) return check("no", `on ${before.at} this run had another coordinator's key, ${before.coordinator}.`);
  const [old, now] = [before, checkpoint].sort((one, other) => one.size - other.size);
  const { proof } = await answerOf(`../api/consistency?old=${old.size}&size=${now.size}`);
  if (!(await extendsTree(old.size, old.root, now.size, now.root, proof.map(bytesOf)))) {
    return check("no", `the ledger isn't the one that this browser saw on ${before.at}: entries were changed or removed.`);
  }
  if (checkpoint.size > before.size) remembered.set(checkpoint.size, checkpoint.root);
  return check("yes", `Nothing that was there when this browser looked on ${before.at} was changed, and the key is the same.`);
}

// The log's name: base32 of the run id (RFC 4648, lower case, no padding).
function originOf(runId) {
  const bits = runId.match(/../g).map((pair) => parseInt(pair, 16).toString(2).padStart(8, "0")).join("");
  const digits = bits.match(/.{1,5}/g).map((five) => parseInt(five.padEnd(5, "0"), 2));
  return `swarm/${digits.map((digit) => "abcdefghijklmnopqrstuvwxyz234567"[digit]).join("")}`;
}

const WORDS = {
  valid: "Verified in your browser: the entry is in the ledger that the coordinator has signed.",
  partial: "Partly verified: the entry is under the root below, but its signature wasn't checked.",
  invalid: "Not valid: don't believe this entry.",
};

list.hidden = false;
verdict.textContent = "Checking…";
let states;
try {
  states = await checkAll();
} catch (error) {
  states = [check("no", `${error.message}.`)];
}
const outcome = states.includes("no") ? "invalid" : states[2] === "yes" ? "valid" : "partial";
verdict.textContent = WORDS[outcome];
verdict.dataset.state = outcome;
