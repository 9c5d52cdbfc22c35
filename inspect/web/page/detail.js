// One opened sample: its index row, its messages, its segments with their pictures, its sequence.

function turnBlock(turn, sample) {
  const parts = turn.parts.map((part) => typeof part === "string"
    ? bdi(part, "p", "said")
    : el("p", { class: "said muted" }, `♪ segment ${part}, ${sample.segments[part].kind === "target" ? "target" : "reference"}`));
  return el("li", { class: `turn ${turn.trained ? "trained" : ""}` },
    el("span", { class: "role" }, turn.role, turn.trained ? el("span", { class: "tag", text: "trained" }) : null), ...parts);
}

function segmentBlock(source, segment, codes, signal) {
  const ids = source.info.ids;
  const name = segment.kind === "target" ? "Target" : "Reference";
  const stack = el("div", { class: "stack" });
  const seconds = segment.frames / source.info.frame_rate_hz;
  const block = el("figure", { class: `segment ${segment.kind}` },
    el("figcaption", {}, el("strong", { text: `${name}, segment ${segment.number}` }),
      ` ${number(seconds, 2)} s, ${segment.frames} frames `, bdi(segment.source, "bdi", "muted")));
  if (source.info.audio) {
    const play = player(source, segment.clip, `${name}, segment ${segment.number}`, signal);
    play.audio.classList.add("wide");
    block.append(play.box);
    follow(play.audio, stack);
    play.ready.then(samplesOf).then((samples) => stack.prepend(waveform(samples), spectrogram(samples)))
      .catch((error) => { if (!signal.aborted) stack.prepend(el("p", { class: "muted", text: `no pictures: ${error.message}` })); });
  }
  const frames = segment.frames, width = widthOf(frames, ids);
  stack.append(grid(`Codes of ${name}: ${ids.codebooks} codebooks by ${frames} frames`, ids, frames, (k, j) => codes[k * frames + j]));
  const pattern = el("details", { class: "pattern" }, el("summary", { text: "Delay pattern and labels" }));
  pattern.addEventListener("toggle", () => {
    if (pattern.children.length > 1) return;
    const label = (k, j) => (segment.trained ? delayedLabel(codes, frames, ids, k, j) : IGNORE);
    pattern.append(
      el("p", { class: "muted", text: "The input of the model: codebook k starts k positions late, after BOS (grey), and ends with EOS (orange)." }),
      grid("Delayed codes", ids, width, (k, j) => delayed(codes, frames, ids, k, j)),
      el("p", { class: "muted", text: segment.trained ? "Labels; pale: no label." : "This segment has no labels." }),
      grid("Labels", ids, width, label));
  });
  block.append(stack, pattern);
  return block;
}

const LEGEND = [["text", "text"], ["audio_in", "audio in"], ["audio_out", "audio out"], ["whisper", "Whisper features"]];

function legend() {
  return el("p", { class: "legend" },
    ...LEGEND.map(([cls, name]) => el("span", { class: `swatch ${cls}`, text: name })),
    el("span", { class: "swatch label", text: "label" }), el("span", { class: "swatch masked", text: "·  no label" }));
}

/** The opened sample; `signal` aborts its downloads. */
async function detailBlock(source, row, signal) {
  const sample = await source.sample(row);
  const codes = await Promise.all(sample.segments.map((segment) => source.codes(segment.clip)));
  const facts = Object.entries(sample.facts).filter(([, value]) => value !== null && value !== "")
    .map(([name, value]) => [name.replaceAll("_", " "), String(value)]);
  if (sample.misc) facts.push(["misc", JSON.stringify(sample.misc)]);
  const opener = el("details", { class: "sequence-box" }, el("summary", { text: "Sequence: ids, labels, codes by position" }));
  opener.addEventListener("toggle", () => {
    if (opener.children.length > 1) return;
    const note = "A label stands at the position of the token that it names; the position before predicts it.";
    opener.append(legend(), el("p", { class: "muted", text: note }), sequenceTable(sequence(sample, codes, source.info.ids), source.info.ids));
  });
  return el("div", { class: "detail" },
    el("div", { class: "columns" },
      el("div", {}, el("h3", { text: "Messages" }), el("ol", { class: "turns" }, ...sample.turns.map((turn) => turnBlock(turn, sample)))),
      el("div", {}, el("h3", { text: "Index row" }), pairs(facts))),
    el("h3", { text: "Audio and codes" }),
    el("div", { class: "segments" }, ...sample.segments.map((segment, at) => segmentBlock(source, segment, codes[at], signal))),
    opener);
}
