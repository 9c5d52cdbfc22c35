// A training run: curves, validation, generated samples, trained modules.

function generatedBlock(source, run) {
  const { steps, rows } = run.generated;
  if (!rows.length) return el("p", { class: "muted", text: "No generated samples." });
  const later = steps.filter((step) => step !== "base");
  const shown = el("select", { id: "step" }, ...later.map((step) => el("option", { value: step, text: step })));
  const columns = [["Reference", (row) => row.reference], ["Target", (row) => row.target]];
  if (steps.includes("base")) columns.push(["Base model", (row) => row.steps.base]);
  const body = el("tbody", { role: "rowgroup" });
  let loads = new AbortController();
  const cell = (row, title, given) => {
    const clip = typeof given === "string" ? { clip: given } : given;
    const props = { role: "cell", "data-label": title };
    if (!clip?.clip) return el("td", props, clip?.text ? bdi(clip.text, "p", "said") : el("span", { class: "muted", text: "none" }), clipFacts(clip));
    return el("td", props, player(source, clip.clip, `${title} of ${row.key}`, loads.signal).box, clipFacts(clip));
  };
  const fill = () => {
    loads.abort();
    loads = new AbortController();
    const all = shown.value ? [...columns, [shown.value, (row) => row.steps[shown.value]]] : columns;
    samples.style.setProperty("--clips", all.length);
    head.replaceChildren(...["Key", "Text", ...all.map(([title]) => title)].map((title) => el("th", { scope: "col", role: "columnheader", text: title })));
    body.replaceChildren(...rows.map((row) => el("tr", { role: "row" },
      el("th", { scope: "row", role: "rowheader" }, bdi(row.key)), el("td", { role: "cell", "data-label": "Text" }, bdi(row.text, "p", "said")),
      ...all.map(([title, get]) => cell(row, title, get(row))))));
  };
  const head = el("tr", { role: "row" });
  const samples = el("table", { class: "samples generated", role: "table" },
    el("caption", { class: "hidden", text: "Generated samples" }), el("thead", { role: "rowgroup" }, head), body);
  shown.addEventListener("change", fill);
  if (later.length) shown.value = later.at(-1);
  fill();
  return el("div", {},
    later.length ? el("label", { class: "field" }, "Step", shown) : null,
    el("div", { class: "scroll" }, samples));
}

/** How a generated clip ended, its length, its silence; what judges heard in it. */
function clipFacts(clip) {
  if (!clip || clip.reached_eos === undefined) return null;
  const parts = [clip.reached_eos ? "ended by itself" : "did not end"];
  if (clip.duration_ratio != null) parts.push(`${number(clip.duration_ratio, 2)} × the target's length`);
  if (clip.silence_ratio != null) parts.push(`${percent(clip.silence_ratio)} silence`);
  if (clip.cer != null) parts.push(`${percent(clip.cer)} character errors`);
  if (clip.similarity != null) parts.push(`similarity ${number(clip.similarity, 3)}`);
  const facts = el("p", { class: clip.reached_eos ? "muted" : "warn", text: parts.join(", ") });
  return clip.heard ? el("div", {}, facts, el("p", { class: "muted", text: "heard:" }), bdi(clip.heard, "p", "said")) : facts;
}

/** A name that may break after its dots. */
const dotted = (name) => el("span", {}, ...name.split(/(?<=\.)/).flatMap((part) => [part, el("wbr")]));

function runSection(source, run) {
  const heads = ["Metric", "Base model", "Best", "Last"];
  const validation = run.validation.length
    ? table("Validation", heads, run.validation)
    : el("p", { class: "muted", text: "No validation lines in metrics.jsonl." });
  const { rows, parameters } = run.trained;
  const trained = rows.length
    ? table("Trained modules", ["Module", "Shape", "Tensors", "Parameters"], rows.map((row) => [dotted(row[0]), row[1], number(row[2]), number(row[3])]), "plain figures")
    : el("p", { class: "muted", text: "No trainable.json." });
  return section("run", "Training run",
    el("p", {}, bdi(run.name), run.every > 1 ? ` (one in ${number(run.every)} logged steps is drawn)` : null),
    charts(run.charts),
    run.warnings.length ? el("h3", { text: "Warnings" }) : null,
    run.warnings.length ? table("Warnings", ["Step", "Warning"], run.warnings.map(([step, text]) => [step, bdi(text)])) : null,
    el("h3", { text: "Validation" }), validation,
    el("h3", { text: "Predictions" }), predictionsBlock(run.predictions),
    el("h3", { text: "Generated samples" }), generatedBlock(source, run),
    el("h3", { text: rows.length ? `Trained modules: ${number(parameters)} parameters` : "Trained modules" }), trained,
    el("details", {}, el("summary", { text: "Options of the run" }), pairs(run.config)));
}
