// Predictions beside targets, step by step: text, and the first and last frames of every codebook.

function predictionsBlock(looks) {
  if (!looks.length) return el("p", { class: "muted", text: "No diagnostics.jsonl." });
  const shown = el("select", { id: "look" }, ...looks.map((look, at) =>
    el("option", { value: at, text: `step ${look.step}${look.source ? `, ${look.source}` : ""}` })));
  const place = el("div", { class: "looks" });
  const fill = () => place.replaceChildren(...lookContent(looks[Number(shown.value)]));
  shown.addEventListener("change", fill);
  shown.value = String(looks.length - 1);
  fill();
  return el("div", {}, el("label", { class: "field" }, "Step", shown), place);
}

/** A text of tokens: special tokens stand apart from the script around them, and marks that pile up get circles. */
function tokenText(text) {
  const pieces = String(text).split(/(<\|\w+\|>)/);
  const circled = (words) => words.replace(/(\p{M}{3})(\p{M}+)/gu, (_, base, more) => base + [...more].map((mark) => `\u25cc${mark}`).join(""));
  return el("bdi", { dir: "auto" }, ...pieces.map((piece, at) => at % 2 ? el("bdi", { dir: "ltr", class: "special", text: piece }) : circled(piece)));
}

function lookContent(look) {
  const texts = [["Text", look.text], ["Predicted text", look.predicted_text]].filter(([, value]) => value !== undefined);
  const parts = [pairs([["Sample", look.key], ...texts.map(([name, text]) => [name, tokenText(text)])])];
  if (!look.codes) return parts;
  if (!Array.isArray(look.predicted_eos)) return [...parts, el("p", { class: "muted", text: "Codes in an earlier form are not shown." })];
  const row = (codes, other) => el("span", { class: "frames" }, ...codes.map((code, at) =>
    el("span", { class: code === other[at] ? "right" : null, text: String(code) })));
  const accuracy = look.accuracy_per_codebook || [];
  const rows = look.codes.first.map((codes, k) => [
    String(k),
    row(codes, look.predicted_codes.first[k]), row(look.predicted_codes.first[k], codes),
    row(look.codes.last[k], look.predicted_codes.last[k]), row(look.predicted_codes.last[k], look.codes.last[k]),
    String(look.predicted_eos[k] ?? ""),
    accuracy[k] === undefined ? "" : percent(accuracy[k]),
  ]);
  const heads = ["Codebook", "First frames", "Predicted", "Last frames", "Predicted", "At the end", "Right"];
  parts.push(el("p", { class: "muted", text: `The first and the last frames of ${number(look.frames)}, without delay; bold: predicted right. Each prediction sees the true frames before it.` }));
  parts.push(table("Codes and predictions", heads, rows, "plain codes-beside"));
  return parts;
}
