// Checks an entry of the ledger: its hash, its inclusion proof, and the checkpoint's signature. Believes nothing that it is given.
"use strict";

const HASH_BYTES = 32;
const BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz";
const PEER_ID_PREFIX = [0x00, 0x24, 0x08, 0x01, 0x12, 0x20]; // identity multihash of protobuf {type: Ed25519, data: 32 bytes}
const SIGNATURE_PREFIX = "\u2014 ";
const utf8 = new TextEncoder();

export function bytesOf(base64) {
  const text = atob(base64);
  if (btoa(text) !== base64) throw new Error("not canonical base64");
  return Uint8Array.from(text, (character) => character.charCodeAt(0));
}

export const hex = (bytes) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");

export const equal = (one, other) => one.length === other.length && one.every((byte, place) => byte === other[place]);

function joined(...parts) {
  const whole = new Uint8Array(parts.reduce((size, part) => size + part.length, 0));
  let place = 0;
  for (const part of parts) {
    whole.set(part, place);
    place += part.length;
  }
  return whole;
}

// SHA-256 by the browser, or where it hides that from pages without HTTPS, by FIPS 180-4 below.
export async function sha256(bytes) {
  return globalThis.crypto?.subtle ? new Uint8Array(await crypto.subtle.digest("SHA-256", bytes)) : plainSha256(bytes);
}

const fraction = (root) => Math.floor((root % 1) * 2 ** 32) >>> 0;
const PRIMES = [];
for (let number = 2; PRIMES.length < 64; number++) if (PRIMES.every((prime) => number % prime)) PRIMES.push(number);
const START = PRIMES.slice(0, 8).map((prime) => fraction(Math.sqrt(prime)));
const ROUND = PRIMES.map((prime) => fraction(Math.cbrt(prime)));

export function plainSha256(bytes) {
  const padded = new Uint8Array(((bytes.length + 8) >> 6 << 6) + 64);
  padded.set(bytes);
  padded[bytes.length] = 0x80;
  const view = new DataView(padded.buffer);
  view.setUint32(padded.length - 8, Math.floor(bytes.length / 2 ** 29));
  view.setUint32(padded.length - 4, (bytes.length << 3) >>> 0);
  const turn = (word, by) => (word >>> by) | (word << (32 - by));
  const sum = Uint32Array.from(START), words = new Uint32Array(64);
  for (let block = 0; block < padded.length; block += 64) {
    for (let t = 0; t < 16; t++) words[t] = view.getUint32(block + 4 * t);
    for (let t = 16; t < 64; t++) {
      const before = words[t - 15], late = words[t - 2];
      words[t] = words[t - 16] + (turn(before, 7) ^ turn(before, 18) ^ (before >>> 3))
        + words[t - 7] + (turn(late, 17) ^ turn(late, 19) ^ (late >>> 10));
    }
    let [a, b, c, d, e, f, g, h] = sum;
    for (let t = 0; t < 64; t++) {
      const one = (h + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) + ((e & f) ^ (~e & g)) + ROUND[t] + words[t]) >>> 0;
      const two = ((turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) + ((a & b) ^ (a & c) ^ (b & c))) >>> 0;
      [h, g, f, e, d, c, b, a] = [g, f, e, (d + one) >>> 0, c, b, a, (one + two) >>> 0];
    }
    [a, b, c, d, e, f, g, h].forEach((word, place) => { sum[place] += word; });
  }
  const digest = new DataView(new ArrayBuffer(HASH_BYTES));
  sum.forEach((word, place) => digest.setUint32(4 * place, word));
  return new Uint8Array(digest.buffer);
}

export const leafHash = (entry) => sha256(joined([0], entry)); // RFC 6962, 2.1
const nodeHash = (left, right) => sha256(joined([1], left, right));

// The root that a leaf's proof leads to in a tree of so many leaves (RFC 9162, 2.1.3.2); null where the proof doesn't fit.
export async function rootFrom(leaf, index, size, proof) {
  let position = BigInt(index), last = BigInt(size) - 1n, value = leaf;
  if (position < 0n || position > last) return null;
  for (const sibling of proof) {
    if (last === 0n || sibling.length !== HASH_BYTES) return null;
    if (position & 1n || position === last) {
      value = await nodeHash(sibling, value);
      while (!(position & 1n) && position) [position, last] = [position >> 1n, last >> 1n];
    } else {
      value = await nodeHash(value, sibling);
    }
    [position, last] = [position >> 1n, last >> 1n];
  }
  return last === 0n ? value : null;
}

// Whether a tree with one root is the beginning of another (RFC 9162, 2.1.4.2).
export async function extendsTree(oldSize, oldRoot, size, root, proof) {
  if (oldSize === size) return proof.length === 0 && equal(oldRoot, root);
  if (!(oldSize > 0 && oldSize < size) || !proof.length || proof.some((node) => node.length !== HASH_BYTES)) return false;
  let position = BigInt(oldSize) - 1n, last = BigInt(size) - 1n;
  const nodes = (BigInt(oldSize) & position) === 0n ? [oldRoot, ...proof] : [...proof];
  while (position & 1n) [position, last] = [position >> 1n, last >> 1n];
  let oldValue = nodes[0], value = nodes[0];
  for (const node of nodes.slice(1)) {
    if (last === 0n) return false;
    if (position & 1n || position === last) {
      oldValue = await nodeHash(node, oldValue);
      value = await nodeHash(node, value);
      while (!(position & 1n) && position) [position, last] = [position >> 1n, last >> 1n];
    } else {
      value = await nodeHash(value, node);
    }
    [position, last] = [position >> 1n, last >> 1n];
  }
  return last === 0n && equal(oldValue, oldRoot) && equal(value, root);
}

// The Ed25519 key inside a libp2p peer id.
export function keyOf(peerId) {
  if (peerId.length > 64) throw new Error("not a peer id");
  let number = 0n;
  for (const character of peerId) {
    const digit = BASE58.indexOf(character);
    if (digit < 0) throw new Error("not a peer id");
    number = number * 58n + BigInt(digit);
  }
  const digits = number.toString(16).padStart(2 * (PEER_ID_PREFIX.length - 1 + HASH_BYTES), "0");
  const decoded = Uint8Array.from(["00", ...digits.match(/../g)], (pair) => parseInt(pair, 16)); // a leading 1 is a zero byte
  const fits = peerId[0] === "1" && decoded.length === PEER_ID_PREFIX.length + HASH_BYTES;
  if (!fits || !PEER_ID_PREFIX.every((byte, place) => decoded[place] === byte)) throw new Error("not a peer id");
  return decoded.slice(PEER_ID_PREFIX.length);
}

// A C2SP signed note as checkpoint: its text, origin, size and root. Throws where it isn't one.
export function readCheckpoint(note) {
  const end = note.lastIndexOf("\n\n");
  if (end < 0 || !note.endsWith("\n")) throw new Error("not a signed note");
  const text = note.slice(0, end + 1), lines = text.split("\n");
  if (lines.length !== 4 || !/^(0|[1-9][0-9]{0,15})$/.test(lines[1])) throw new Error("not a checkpoint");
  const size = Number(lines[1]), root = bytesOf(lines[2]);
  if (!Number.isSafeInteger(size) || root.length !== HASH_BYTES) throw new Error("not a checkpoint");
  return { text, origin: lines[0], size, root, signatures: note.slice(end + 2, -1).split("\n") };
}

// Whether a key has signed a checkpoint under its origin's name; null where this browser can't tell.
export async function isSignedBy(checkpoint, publicKey) {
  const mark = (await sha256(joined(utf8.encode(`${checkpoint.origin}\n`), [1], publicKey))).slice(0, 4);
  for (const line of checkpoint.signatures) {
    if (!line.startsWith(`${SIGNATURE_PREFIX}${checkpoint.origin} `)) continue;
    const marked = bytesOf(line.slice(SIGNATURE_PREFIX.length + checkpoint.origin.length + 1));
    if (!equal(marked.slice(0, 4), mark)) continue;
    return verifies(publicKey, marked.slice(4), utf8.encode(checkpoint.text));
  }
  return false;
}

async function verifies(publicKey, signature, message) {
  let key;
  try {
    key = await crypto.subtle.importKey("raw", publicKey, { name: "Ed25519" }, false, ["verify"]);
  } catch {
    return null; // no HTTPS, or a browser without Ed25519
  }
  return crypto.subtle.verify({ name: "Ed25519" }, key, signature, message);
}
