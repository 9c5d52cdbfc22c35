// Several training runs: curves over each other, validation and samples side by side, options that differ.

function comparedSamples(source, given) {
  if (!given.samples.length) return el("p", { class: "muted", text: "No generated samples." });
  const loads = new AbortController();
  const cell = (row, title, value) => {
    const clip = typeof value === "string" ? { clip: value } : value;
    const props = { role: "cell", "data-label": title };
    const step = clip?.step ? el("p", { class: "muted", text: clip.step }) : null;
    if (!clip?.clip) return el("td", props, step, clip?.text ? bdi(clip.text, "p", "said") : el("span", { class: "muted", text: "none" }), clipFacts(clip));
    return el("td", props, step, player(source, clip.clip, `${title} of ${row.key}`, loads.signal).box, clipFacts(clip));
  };
  const titles = ["Reference", "Target", "Base model", ...given.names];
  return el("div", { class: "scroll" }, el("table", { class: "samples generated", role: "table", style: `--clips: ${titles.length}` }, el("caption", { class: "hidden", text: "Samples of each run" }),
    el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, ...["Key", "Text", ...titles].map((title) => el("th", { scope: "col", role: "columnheader" }, bdi(title))))),
    el("tbody", { role: "rowgroup" }, ...given.samples.map((row) => el("tr", { role: "row" },
      el("th", { scope: "row", role: "rowheader" }, bdi(row.key)), el("td", { role: "cell", "data-label": "Text" }, bdi(row.text, "p", "said")),
      ...[row.reference, row.target, row.base, ...row.runs].map((value, at) => cell(row, titles[at], value)))))));
}

function comparisonSection(source, given) {
  const beside = (caption, first, rows, none) => rows.length
    ? table(caption, [first, ...given.names], rows.map((row) => [row[0], ...row.slice(1).map((value) => bdi(value))]))
    : el("p", { class: "muted", text: none });
  return section("run", `${number(given.names.length)} training runs`,
    el("p", {}, ...given.names.flatMap((name, at) => [at ? ", " : null, bdi(name)])),
    charts(given.charts),
    el("h3", { text: "Validation" }), el("p", { class: "muted", text: "Base model → best and last of the run." }),
    beside("Validation", "Metric", given.validation, "No validation lines in metrics.jsonl."),
    el("h3", { text: "Samples" }), comparedSamples(source, given),
    el("h3", { text: "Options that differ" }), beside("Options that differ", "Option", given.options, "None but the output folders."));
}
