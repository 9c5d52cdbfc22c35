// Codes, the delay pattern, and the expanded sequence. shards/sequence.py defines them; tests/test_page.py compares both.

const IGNORE = -100;

/** Positions of a segment of `frames` frames. */
const widthOf = (frames, ids) => frames + 2 + ids.codebooks - 1;

/** The content of codebook k at column j of a segment: BOS, a code, EOS. */
function delayed(codes, frames, ids, k, j) {
  const frame = j - k - 1;
  if (frame < 0) return ids.stream_bos;
  return frame < frames ? codes[k * frames + frame] : ids.stream_eos;
}

/** The label of codebook k at column j: its codes, and its EOS once. */
function delayedLabel(codes, frames, ids, k, j) {
  const frame = j - k - 1;
  return frame >= 0 && frame <= frames ? delayed(codes, frames, ids, k, j) : IGNORE;
}

/** Every position: {at, modality, id, text, label, codes, labels, segment}; a label stands at its token's position. */
function sequence(sample, codes, ids) {
  const rows = [];
  let next = 0;
  const books = [...Array(ids.codebooks).keys()];
  sample.ids.forEach((id, token) => {
    if (id !== ids.audio_in && id !== ids.audio_out) {
      const label = sample.labels[token];
      rows.push({ at: rows.length, modality: "text", id, text: sample.texts[token], label: label >= 0 ? label : null });
      return;
    }
    const segment = sample.segments[next], raw = codes[next];
    next += 1;
    for (let i = 0; i < segment.whisper; i++) rows.push({ at: rows.length, modality: "whisper", segment });
    for (let j = 0; j < widthOf(segment.frames, ids); j++) {
      rows.push({
        at: rows.length,
        modality: id === ids.audio_out ? "audio_out" : "audio_in",
        segment,
        codes: books.map((k) => delayed(raw, segment.frames, ids, k, j)),
        labels: books.map((k) => (segment.trained ? delayedLabel(raw, segment.frames, ids, k, j) : IGNORE)),
      });
    }
  });
  return rows;
}

/** A colour for each code; neighbouring codes differ clearly. */
const codeColor = (code) => `hsl(${(code * 137.508) % 360} 50% ${42 + (code % 7) * 4}%)`;

/** A grid of `columns` by codebooks; `get(k, j)` gives a code, or IGNORE for an empty cell. */
function grid(label, ids, columns, get) {
  return picture(ids.codebooks * 9, label, (canvas, pen) => {
    const special = new Map([[IGNORE, color("line")], [ids.stream_bos, color("muted")], [ids.stream_eos, color("accent")]]);
    const width = canvas.width / columns, height = canvas.height / ids.codebooks;
    for (let k = 0; k < ids.codebooks; k++) {
      for (let j = 0; j < columns; j++) {
        const code = get(k, j);
        pen.fillStyle = special.get(code) ?? codeColor(code);
        pen.fillRect(Math.floor(j * width), Math.floor(k * height), Math.ceil(width), Math.ceil(height) - 1);
      }
    }
  });
}

const MODALITY = { text: "text", whisper: "Whisper features", audio_in: "audio in", audio_out: "audio out" };
const ENDS = 10; // positions of a segment that show at each end until it is opened

function sequenceRow(row, ids) {
  const trained = row.label !== null && row.label !== undefined || (row.labels ?? []).some((label) => label >= 0);
  const codeCell = (code) => el("td", { class: code === ids.stream_bos ? "bos" : code === ids.stream_eos ? "eos" : null, text: code });
  const labelCell = (label) => label >= 0
    ? el("td", { class: label === ids.stream_eos ? "label eos" : "label", text: label })
    : el("td", { class: "masked", text: "·" });
  const blank = () => Array.from({ length: ids.codebooks }, () => el("td"));
  return el("tr", { class: `${row.modality} ${trained ? "trained" : "untrained"}` },
    el("th", { scope: "row", text: row.at }),
    el("td", { text: MODALITY[row.modality] }),
    el("td", { text: row.id ?? "" }),
    el("td", {}, row.text === undefined ? "" : bdi(row.text, "bdi", "token")),
    row.modality !== "text" ? el("td") : row.label === null ? el("td", { class: "masked", text: "·" }) : el("td", { class: "label", text: row.label }),
    ...(row.codes ? row.codes.map(codeCell) : blank()),
    ...(row.labels ? row.labels.map(labelCell) : blank()));
}

/** The sequence as a table; the middle of a long segment opens on demand. */
function sequenceTable(rows, ids) {
  const body = el("tbody");
  for (let from = 0; from < rows.length;) {
    let to = from + 1;
    while (to < rows.length && rows[to].segment && rows[to].segment === rows[from].segment) to += 1;
    const run = rows.slice(from, to), hidden = run.slice(ENDS, -ENDS);
    if (hidden.length <= 2 * ENDS) body.append(...run.map((row) => sequenceRow(row, ids)));
    else {
      const button = el("button", { type: "button", text: `show ${hidden.length} more positions of segment ${run[0].segment.number}` });
      const more = el("tr", { class: "more" }, el("td", { colspan: 5 + 2 * ids.codebooks }, button));
      button.addEventListener("click", () => more.replaceWith(...hidden.map((row) => sequenceRow(row, ids))));
      body.append(...run.slice(0, ENDS).map((row) => sequenceRow(row, ids)), more, ...run.slice(-ENDS).map((row) => sequenceRow(row, ids)));
    }
    from = to;
  }
  const head = (text, more = {}) => el("th", { scope: "col", ...more, text });
  const books = (name) => [...Array(ids.codebooks).keys()].map((k) => head(String(k), { "aria-label": `${name} of codebook ${k}` }));
  const group = (text) => head(text, { scope: "colgroup", colspan: ids.codebooks, class: "group" });
  return el("div", { class: "scroll tall", tabindex: "0", role: "region", "aria-label": "Sequence" },
    el("table", { class: "sequence" },
      el("caption", { class: "hidden", text: "Every position of the sequence, with its labels" }),
      el("thead", {},
        el("tr", {}, ...["position", "modality", "id", "token", "label"].map((text) => head(text, { rowspan: 2 })), group("codes"), group("labels")),
        el("tr", {}, ...books("code"), ...books("label"))),
      body));
}
