// Sources of the page's data: this file (the report), or the server that sent it (higgs-inspect serve).

const fromBase64 = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0)).buffer;

/** A text in the form that search compares: lower case, no accents, no vowel signs. pages.py does the same. */
const folded = (text) => text.replaceAll("\u0640", "").normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();

/** All data stands in this file, in script elements that are parsed on demand. */
class Embedded {
  constructor(info) {
    this.info = info;
  }

  /** The text of a script element; those further down may not have arrived yet. */
  async text(id) {
    if (!document.getElementById(id) && document.readyState === "loading") {
      await new Promise((done) => document.addEventListener("DOMContentLoaded", done, { once: true }));
    }
    const node = document.getElementById(id);
    if (!node) throw new Error(`nothing here is named ${id}`);
    return node.textContent;
  }

  /** One page of the table: {rows, total}. */
  async page({ query, split, sort, descending, offset, count }) {
    const words = folded(query).split(/\s+/).filter(Boolean);
    const rows = this.info.rows.filter((row) =>
      (!split || row.split === split) && words.every((word) => row.search.includes(word)));
    const order = new Intl.Collator(undefined, { numeric: true }).compare;
    const sign = descending ? -1 : 1;
    rows.sort((a, b) => sign * (typeof a[sort] === "number" ? a[sort] - b[sort] : order(a[sort], b[sort])) || a.row - b.row);
    return { rows: rows.slice(offset, offset + count), total: rows.length };
  }

  async sample(row) {
    return JSON.parse(await this.text(`sample-${row}`));
  }

  async codes(id) {
    return new Uint16Array(fromBase64(await this.text(`codes-${id}`)));
  }

  async clip(id) {
    return fromBase64(await this.text(`clip-${id}`));
  }

  async charts() {
    return this.info.charts;
  }
}

/** All data comes from the server, on demand. */
class Served {
  constructor(info) {
    this.info = info;
  }

  async get(path, signal) {
    const answer = await fetch(path, { signal });
    if (!answer.ok) throw new Error((await answer.text()).slice(0, 500) || answer.statusText);
    return answer;
  }

  async page(wanted) {
    const { query, split, sort, descending, offset, count } = wanted;
    const parameters = new URLSearchParams({ query, split, sort, descending: Number(descending), offset, count });
    return (await this.get(`api/samples?${parameters}`)).json();
  }

  async sample(row) {
    return (await this.get(`api/sample/${row}`)).json();
  }

  async codes(id) {
    return new Uint16Array(await (await this.get(`api/codes/${id}`)).arrayBuffer());
  }

  async clip(id, signal) {
    return (await this.get(`api/clip/${id}`, signal)).arrayBuffer();
  }

  async charts() {
    return (await this.get("api/charts")).json();
  }
}
