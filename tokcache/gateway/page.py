"""The page at `/`: one self-contained file that shows the figures of /status.json."""

from __future__ import annotations

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>tokcache</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #667; --line: #d9dce1; --back: #fff;
  --card: #f6f7f9; --good: #1a7f4b; --busy: #b35900; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e9ec; --soft: #9aa0ab; --line: #353941;
  --back: #17191d; --card: #1f2227; --good: #5fce94; --busy: #f0a860; --bad: #ff8a80 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 64rem; padding: 1rem; background: var(--back);
  color: var(--ink); font: 15px/1.45 system-ui, sans-serif }
h1 { font-size: 1.25rem; margin: 0 } h2 { font-size: 1rem; margin: 1.5rem 0 .5rem }
header { display: flex; justify-content: space-between; align-items: baseline; gap: 1rem }
.soft { color: var(--soft) } .bad { color: var(--bad) }
.tiles { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr));
  margin-top: 1rem }
.tile, .server { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .6rem .8rem }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums }
.slots { display: grid; gap: .4rem; margin-top: .5rem;
  grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)) }
.slot { border-left: .25rem solid var(--line); padding: .1rem .5rem; font-size: .9rem }
.slot.held { border-color: var(--good) } .slot.busy { border-color: var(--busy) }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .25rem .5rem; border-bottom: 1px solid var(--line);
  white-space: nowrap }
th { color: var(--soft); font-weight: 500 } th:first-child, td:first-child { text-align: left }
svg { width: 100%; height: 4rem; display: block } polyline { fill: none; stroke: var(--good);
  stroke-width: 2; vector-effect: non-scaling-stroke }
form { margin-top: 1rem } input { font: inherit; padding: .3rem; width: 100%; max-width: 24rem }
</style>
<header><h1>tokcache</h1><span id="state" class="soft" role="status">loading</span></header>
<form id="login" hidden><label>This gateway needs a key with is_admin:
<input id="key" type="password" autocomplete="off"></label> <button>Show</button></form>
<main id="main" hidden>
<div class="tiles" id="tiles"></div>
<h2>Share of prompt tokens reused, last requests, newest on the right</h2>
<svg id="chart" viewBox="0 0 100 40" preserveAspectRatio="none" role="img"
 aria-label="share of prompt tokens reused in each of the last requests"><polyline points=""/></svg>
<h2>Servers</h2><div id="servers"></div>
<h2>Why less was reused</h2><div class="wide"><table id="misses"></table></div>
<h2>Refusals</h2><div class="wide"><table id="reasons"></table></div>
<h2>Last requests</h2><div class="wide"><table id="recent"></table></div>
</main>
<script>
"use strict";
const by = id => document.getElementById(id);
const number = new Intl.NumberFormat("en");
let key = "";
function node(tag, text, name) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}
function size(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (n >= 1024 && at < 4) { n /= 1024; at += 1; }
  return (at ? n.toFixed(1) : n) + " " + units[at];
}
function percent(part, whole) { return whole ? (100 * part / whole).toFixed(1) + "%" : "0%"; }
function fill(table, head, rows, none) {
  const top = node("tr");
  head.forEach(each => top.append(node("th", each)));
  table.replaceChildren(top);
  rows.forEach(cells => {
    const row = node("tr");
    cells.forEach(each => row.append(node("td", each)));
    table.append(row);
  });
  if (!rows.length) {
    const cell = node("td", none, "soft");
    cell.colSpan = head.length;
    table.append(node("tr"));
    table.lastChild.append(cell);
  }
}
function show(found) {
  const t = found.totals;
  by("tiles").replaceChildren(...[
    ["Requests", number.format(t.requests)],
    ["Prompt tokens reused", percent(t.cached_tokens, t.prompt_tokens)],
    ["of these from files", number.format(t.restored_tokens)],
    ["Waiting", number.format(t.queue)],
    ["Saved slots", number.format(t.files)],
    ["Bytes of " + size(t.max_bytes), size(t.file_bytes)],
  ].map(([label, value]) => {
    const tile = node("div", label, "tile");
    tile.prepend(node("b", value));
    return tile;
  }));
  const shares = found.recent.map(r => r.n_prompt ? r.n_cached / r.n_prompt : 0).reverse();
  const step = 100 / Math.max(1, shares.length - 1);
  by("chart").firstElementChild.setAttribute("points",
    shares.map((y, x) => (x * step).toFixed(1) + "," + (38 - 36 * y).toFixed(1)).join(" "));
  by("servers").replaceChildren(...found.servers.map(server => {
    const card = node("div", undefined, "server");
    card.append(node("strong", server.model || "unknown model"), " ",
      node("span", server.url, "soft"), " ",
      server.is_up ? node("span", number.format(server.tokens_per_s) + " tokens/s", "soft")
        : node("span", "down", "bad"));
    if (server.is_up && !server.can_save) card.append(node("div",
      "slots can't be saved: start it with --slot-save-path", "bad"));
    const slots = node("div", undefined, "slots");
    server.slots.forEach(slot => {
      const kind = slot.is_busy ? " busy" : slot.n_tokens ? " held" : "";
      const made = node("div", "slot " + slot.id + (slot.is_busy ? ", busy" : ""), "slot" + kind);
      made.append(node("div", number.format(slot.n_tokens) + " tokens"
        + (slot.is_saved ? ", saved" : "") + (slot.is_side ? ", side" : ""), "soft"));
      slots.append(made);
    });
    card.append(slots);
    return card;
  }));
  ["misses", "reasons"].forEach(kind => fill(by(kind), ["reason", "times"],
    Object.entries(found[kind]).sort((a, b) => b[1] - a[1])
      .map(([name, n]) => [name.replaceAll("_", " "), number.format(n)]), "nothing yet"));
  fill(by("recent"), ["path", "from", "prompt", "reused", "answer", "first token", "reason"],
    found.recent.map(r => [r.api, r.plan, number.format(r.n_prompt),
      percent(r.n_cached, r.n_prompt), number.format(r.n_predicted),
      (1000 * r.first_s).toFixed(0) + " ms", (r.detail || r.reason).replaceAll("_", " ")]),
    "no request yet");
}
async function update() {
  let found = null, status = 0;
  try {
    const headers = key ? {"x-api-key": key} : {};
    const answer = await fetch("status.json", {headers, cache: "no-store"});
    status = answer.status;
    if (answer.ok) found = await answer.json();
  } catch { status = 0; }
  by("login").hidden = status !== 401 && status !== 403;
  by("main").hidden = !found;
  by("state").textContent = found ? "live" : status ? "no access" : "out of reach";
  if (found) show(found);
  if (by("login").hidden) setTimeout(update, 2000);
}
by("login").addEventListener("submit", event => {
  event.preventDefault();
  key = by("key").value;
  update();
});
update();
</script>
"""
