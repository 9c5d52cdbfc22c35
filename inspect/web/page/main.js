// The page: summary, run, charts of the data, codes, samples.

function tiles(info) {
  const items = [
    ["Samples", number(info.samples), `${number(info.validation_samples)} for validation`],
    ["Audio", info.hours < 1 ? `${number(60 * info.hours, 1)} min` : `${number(info.hours, info.hours < 10 ? 2 : 0)} h`, "references included"],
    ["Speakers", number(info.speakers), info.validation_samples ? `${number(info.speakers_in_both_splits)} in both splits` : ""],
    ["Positions", number(info.positions), `${number(info.positions / Math.max(info.samples, 1))} a sample`],
    ...(Object.keys(info.layouts).length ? [["Prompt layouts", number(Object.values(info.layouts).filter(Boolean).length),
      Object.entries(info.layouts).filter(([, count]) => count).map(([name, count]) => `${number(count)} ${name}`).join(", ")]] : []),
    ["Rejected", number(info.rejects), info.rejects ? "by reason below" : "no sample was rejected"],
  ];
  return el("dl", { class: "tiles" }, ...items.map(([name, value, note]) =>
    el("div", {}, el("dt", { text: name }), el("dd", {}, el("b", { text: value }), note ? el("span", { class: "muted", text: note }) : null))));
}

function summary(info) {
  const rejects = Object.entries(info.rejects_by_reason);
  return section("summary", "Summary", tiles(info),
    info.notes.length ? el("ul", { class: "notes" }, ...info.notes.map((note) => el("li", { text: note }))) : null,
    rejects.length ? table("Rejects by reason", ["Reason", "Samples"], rejects.map(([reason, count]) => [bdi(reason), number(count)])) : null,
    el("details", {}, el("summary", { text: "Provenance" }), pairs(Object.entries(info.provenance).filter(([, value]) => value))));
}

/** Sections whose charts come later. */
function chartSection(id, title, loaded, pick, note) {
  const place = el("div", {}, el("p", { class: "muted", role: "status", text: "counting …" }));
  loaded.then((all) => place.replaceChildren(charts(pick(all))))
    .catch((error) => place.replaceChildren(el("p", { class: "notice", text: `no charts: ${error.message}` })));
  return section(id, title, note ? el("p", { class: "muted", text: note }) : null, place);
}

function start() {
  const info = JSON.parse(document.getElementById("info").textContent);
  const source = info.served ? new Served(info) : new Embedded(info);
  const theme = document.getElementById("theme");
  theme.addEventListener("change", () => {
    document.documentElement.style.colorScheme = theme.value;
    themeChanged();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", themeChanged);
  document.getElementById("name").textContent = info.name;
  const loaded = source.charts();
  const shown = info.served ? info.samples : info.rows.length;
  const note = shown < info.samples ? `${number(shown)} of ${number(info.samples)} samples, spread evenly over the set. ` : "";
  const audio = info.audio ? "Audio is decoded from the stored codes: the model gets the same." : "This page has no audio.";
  const sections = [
    summary(info),
    info.run ? runSection(source, info.run) : null,
    info.comparison ? comparisonSection(source, info.comparison) : null,
    chartSection("data", "Data", loaded, (all) => all.data, null),
    chartSection("codes", "Codes", loaded, (all) => all.codes, info.scanned < info.samples ? `Counted over ${number(info.scanned)} samples.` : null),
    section("samples", "Samples", el("p", { class: "muted", text: note + audio }), new SampleTable(source).node),
  ].filter(Boolean);
  document.getElementById("main").append(...sections);
  document.getElementById("nav").append(...sections.map((part) => el("a", { href: `#${part.id}`, text: part.querySelector("h2").textContent })));
}

start();
