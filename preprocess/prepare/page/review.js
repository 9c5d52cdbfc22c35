"use strict";
// The list in which a person decides. Every string becomes a text node or a property, never markup.

const section = document.getElementById("review");
const token = section.dataset.token;
const state = { offset: 0, count: 25, show: "", speaker: "", sort: "", query: "" };
const selected = new Set();
const unsaved = new Map(); // texts that were typed and not saved yet; rows are drawn anew around them

/** An element. Properties: class, text, on<event>, and attributes. */
function el(name, properties = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "class") node.className = value;
    else if (key === "text") node.textContent = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

const option = (value, text) => el("option", { value, text });
const field = (text, control, cls = "field") => el("label", { class: cls }, el("span", { class: "muted", text }), control);

const show = el("select", { onchange: () => restart("show", show.value) }, ...[
  ["", "all segments"], ["kept", "kept"], ["rejected", "not kept"], ["decided", "decided by a person"],
  ...["quality", "snr", "clipping", "sound", "pace", "language", "agreement", "duplicate", "speaker", "text", "review"]
    .map((step) => [step, `left out by ${step}`])].map(([value, text]) => option(value, text)));
const sort = el("select", { onchange: () => restart("sort", sort.value) }, ...[
  ["", "as recorded"], ["cer", "worst agreement first"], ["quality", "lowest quality first"], ["pace", "slowest first"],
  ["longest", "longest first"]].map(([value, text]) => option(value, text)));
const speaker = el("select", { onchange: () => restart("speaker", speaker.value) }, option("", "all speakers"));
const query = el("input", { type: "search", dir: "auto", placeholder: "words, recording", oninput: later(() => restart("query", query.value)) });
const names = el("datalist", { id: "speaker-names" });
const newName = el("input", { list: "speaker-names", dir: "auto", placeholder: "name of the speaker", id: "new-name" });
const mergeFrom = el("select", { multiple: true, size: 5, id: "merge-from" });
const mergeName = el("input", { list: "speaker-names", dir: "auto", placeholder: "name of the speaker", id: "merge-name" });
const status = el("p", { class: "notice", role: "status", id: "status" });
const rows = el("ul", { class: "rows" });
const pager = el("div", { class: "tools" });

function later(work) {
  let timer = 0;
  return () => { clearTimeout(timer); timer = setTimeout(work, 250); };
}

function restart(key, value) {
  Object.assign(state, { [key]: value, offset: 0 });
  load();
}

async function load() {
  const answer = await fetch(`/api/segments?${new URLSearchParams(state)}`);
  if (!answer.ok) return tell(await answer.text());
  const given = await answer.json();
  rows.replaceChildren(...given.rows.map(row));
  listSpeakers(given.speakers);
  count(given.decided);
  const end = Math.min(state.offset + state.count, given.total);
  pager.replaceChildren(
    el("button", { type: "button", text: "Back", disabled: state.offset === 0, onclick: () => turn(-1) }),
    el("span", { class: "muted", text: given.total ? `${state.offset + 1} to ${end} of ${given.total}` : "no segments" }),
    el("button", { type: "button", text: "On", disabled: end >= given.total, onclick: () => turn(1) }));
}

function turn(by) {
  state.offset = Math.max(0, state.offset + by * state.count);
  load();
}

function listSpeakers(all) {
  names.replaceChildren(...all.map((name) => option(name, name)));
  speaker.replaceChildren(option("", "all speakers"), ...all.map((name) => option(name, name)));
  speaker.value = state.speaker;
  mergeFrom.replaceChildren(...all.map((name) => option(name, name)));
}

function tell(text) {
  status.textContent = text;
}

function count(decided) {
  const text = decided === 1 ? "1 segment is decided." : `${decided} segments are decided.`;
  tell(`${text} A run with --from applies it.`);
}

async function decide(body) {
  const headers = { "Content-Type": "application/json", "X-Token": token };
  let answer;
  try {
    answer = await fetch("/api/decide", { method: "POST", headers, body: JSON.stringify(body) });
  } catch {
    return tell("Not written: the server does not answer."), null;
  }
  if (!answer.ok) return tell(`Not written: ${await answer.text()}`), null;
  const given = await answer.json();
  count(given.decided);
  return given;
}

const number = (name, value, digits, unit = "") => value === null ? null : `${name} ${value.toFixed(digits)}${unit}`;

function facts(one) {
  const { quality, snr, cer, seconds_per_char: pace } = one.measured;
  return [one.keep ? `kept (${one.split})` : `left out: ${one.reason}`, `${one.seconds.toFixed(1)} s`, number("quality", quality, 2),
    number("SNR", snr, 0, " dB"), cer === null ? null : `CER ${(100 * cer).toFixed(0)} %`,
    pace === null ? null : `${(1000 * pace).toFixed(0)} ms a character`].filter(Boolean).join(", ");
}

/** One segment. */
function row(one) {
  const text = el("textarea", { class: "said", dir: "auto", rows: 2, "aria-label": "transcript", oninput: () => {
    save.disabled = text.value.trim() === (one.text ?? "");
    if (save.disabled) unsaved.delete(one.id); else unsaved.set(one.id, text.value);
  } });
  text.value = unsaved.get(one.id) ?? one.text ?? "";
  const save = el("button", { type: "button", class: "save", text: "Save the text", disabled: !unsaved.has(one.id), onclick: () => send({ text: text.value }) });
  const verdict = (name, label) => el("button", { type: "button", class: name === "reject" ? "no" : "yes", text: label,
    "aria-pressed": String(one.verdict === name), onclick: () => send({ verdict: name }) });
  const tick = el("input", { type: "checkbox", "aria-label": "select", onchange: () => tick.checked ? selected.add(one.id) : selected.delete(one.id) });
  tick.checked = selected.has(one.id);
  const node = el("li", { class: "row", "data-id": one.id },
    tick,
    el("div", {}, el("audio", { controls: true, preload: "none", src: `/clip/${encodeURIComponent(one.id)}` }),
      el("p", { class: "muted" }, el("bdi", { text: one.recording }), ` at ${one.start.toFixed(1)} s`),
      el("p", { class: "muted speaker" }, el("bdi", { text: one.speaker ?? "no speaker" }))),
    el("div", {}, text, one.asr_text === null ? null : el("p", { class: "muted" }, "heard: ", el("bdi", { class: "said", dir: "auto", text: one.asr_text })),
      el("p", { class: "muted", text: facts(one) })),
    el("div", { class: "tools" }, verdict("accept", "Accept"), verdict("reject", "Reject"), save));

  async function send(decision) {
    const given = await decide({ decisions: [{ id: one.id, ...decision }] });
    if (!given) return;
    if (unsaved.get(one.id) === decision.text) unsaved.delete(one.id);
    node.replaceWith(row(given.rows[0]));
  }
  return node;
}

async function decideSelected(decision) {
  if (!selected.size) return tell("No segment is selected.");
  if (await decide({ decisions: [...selected].map((id) => ({ id, ...decision })) })) {
    selected.clear();
    newName.value = "";
    await load();
  }
}

async function merge() {
  const chosen = [...mergeFrom.selectedOptions].map((one) => one.value);
  if (await decide({ merge: chosen, speaker: mergeName.value })) {
    mergeName.value = "";
    restart("speaker", "");
  }
}

document.getElementById("review-body").append(
  status,
  el("div", { class: "tools" }, field("Show", show), field("of", speaker), field("Sort", sort), field("Find", query, "field grow")),
  el("details", {}, el("summary", { text: "Merge speakers" }),
    el("div", { class: "tools" }, mergeFrom, field("as", mergeName), el("button", { type: "button", id: "merge", text: "Merge", onclick: merge }))),
  el("div", { class: "tools" }, el("span", { class: "muted", text: "The selected:" }),
    el("button", { type: "button", text: "Accept", onclick: () => decideSelected({ verdict: "accept" }) }),
    el("button", { type: "button", text: "Reject", onclick: () => decideSelected({ verdict: "reject" }) }),
    field("are spoken by", newName), el("button", { type: "button", id: "assign", text: "Assign", onclick: () => decideSelected({ speaker: newName.value }) })),
  names, rows, pager);
load();
