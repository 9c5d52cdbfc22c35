// The table of samples: search, sort, pages, players; a row opens into its details.

const COLUMNS = [
  { name: "key", title: "Key", sort: true },
  { name: "speaker", title: "Speaker", sort: true },
  { name: "text", title: "Text" },
  { name: "ref", title: "Reference", audio: true },
  { name: "target", title: "Target", audio: true },
  { name: "seconds", title: "Seconds", sort: true, numeric: true },
  { name: "positions", title: "Positions", sort: true, numeric: true },
  { name: "split", title: "Split", sort: true },
];

class SampleTable {
  constructor(source) {
    this.source = source;
    this.state = { query: "", split: "", sort: "row", descending: false, offset: 0, count: 25 };
    this.columns = COLUMNS.filter((column) => source.info.audio || !column.audio);
    this.loads = new AbortController();
    this.build();
    this.show();
  }

  build() {
    const search = el("input", { type: "search", id: "search", placeholder: "key, speaker or text", autocomplete: "off" });
    let timer = 0;
    search.addEventListener("input", () => {
      clearTimeout(timer);
      timer = setTimeout(() => this.change({ query: search.value }), 150);
    });
    const options = (pairs) => pairs.map(([value, text]) => el("option", { value, text }));
    const split = el("select", { id: "split", onchange: () => this.change({ split: split.value }) },
      ...options([["", "all"], ["training", "training"], ["validation", "validation"]]));
    const sortable = [["row", "stored order"], ...this.columns.filter((column) => column.sort).map((column) => [column.name, column.title])];
    this.sortBy = el("select", { id: "sort", onchange: () => this.change({ sort: this.sortBy.value, descending: false }) }, ...options(sortable));
    const count = el("select", { id: "count", onchange: () => this.change({ count: Number(count.value) }) },
      ...options([10, 25, 50, 100].map((n) => [n, String(n)])));
    count.value = this.state.count;
    this.status = el("p", { id: "status", class: "muted", role: "status" });
    this.heads = this.columns.map((column) => this.head(column));
    this.body = el("tbody", { role: "rowgroup" });
    this.pager = el("nav", { class: "pager", "aria-label": "Pages of samples" });
    const field = (label, control, cls) => el("label", { class: `field ${cls ?? ""}` }, label, control);
    this.node = el("div", {},
      el("form", { class: "tools", role: "search", onsubmit: (event) => event.preventDefault() },
        field("Search", search, "grow"), field("Split", split), field("Sort by", this.sortBy), field("A page", count)),
      this.status,
      el("table", { class: "samples", role: "table" },
        el("caption", { class: "hidden", text: "Samples" }),
        el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, ...this.heads)), this.body),
      this.pager);
  }

  head(column) {
    const props = { scope: "col", role: "columnheader", class: column.numeric ? "numeric" : null, "data-sort": column.name };
    if (!column.sort) return el("th", props, column.title);
    const button = el("button", { type: "button", class: "sort", text: column.title });
    button.addEventListener("click", () =>
      this.change({ sort: column.name, descending: this.state.sort === column.name && !this.state.descending }));
    return el("th", props, button);
  }

  change(part) {
    this.state = { ...this.state, offset: 0, ...part };
    return this.show();
  }

  /** Show the selected page; a later call replaces this one. */
  async show() {
    this.loads.abort();
    const loads = (this.loads = new AbortController());
    let page;
    try {
      page = await this.source.page(this.state);
    } catch (error) {
      this.status.textContent = `cannot list samples: ${error.message}`;
      return;
    }
    if (loads.signal.aborted) return;
    this.sortBy.value = this.state.sort;
    for (const head of this.heads) {
      const sorted = head.dataset.sort === this.state.sort;
      head.setAttribute("aria-sort", sorted ? (this.state.descending ? "descending" : "ascending") : "none");
    }
    this.body.replaceChildren(...page.rows.map((row) => this.row(row, loads.signal)));
    const { offset, count } = this.state, last = Math.min(offset + count, page.total);
    this.status.textContent = page.total ? `${number(offset + 1)} to ${number(last)} of ${number(page.total)} samples` : "no sample matches";
    if (page.note) this.status.textContent += `; ${page.note}`;
    this.pager.replaceChildren(...this.pagerButtons(page.total));
  }

  row(sample, signal) {
    const id = `detail-${sample.row}`;
    const open = el("button", { type: "button", class: "open", "aria-expanded": "false", "aria-controls": id }, bdi(sample.key));
    const line = el("tr", { role: "row", "data-key": sample.key }, ...this.columns.map((column) => {
      const props = { role: "cell", "data-label": column.title, class: `${column.name} ${column.numeric ? "numeric" : ""}` };
      if (column.name === "key") return el("th", { ...props, role: "rowheader", scope: "row" }, open);
      if (column.audio) return el("td", props, this.clip(sample, column, signal));
      if (column.name === "text") return el("td", props, bdi(sample.text, "p", "said"));
      if (column.numeric) return el("td", { ...props, text: number(sample[column.name], column.name === "seconds" ? 2 : 0) });
      return el("td", props, bdi(sample[column.name]));
    }));
    open.addEventListener("click", () => this.toggle(sample, line, open, id));
    return line;
  }

  clip(sample, column, signal) {
    const clip = sample[column.name];
    return clip ? player(this.source, clip.clip, `${column.title} of ${sample.key}`, signal).box : el("span", { class: "muted", text: "none" });
  }

  async toggle(sample, line, open, id) {
    const existing = document.getElementById(id);
    const closing = existing !== null;
    open.setAttribute("aria-expanded", String(!closing));
    if (closing) {
      existing.loads.abort();
      existing.remove();
      return;
    }
    const cell = el("td", { role: "cell", colspan: this.columns.length }, el("p", { class: "muted", role: "status", text: "loading …" }));
    const more = el("tr", { role: "row", class: "opened", id }, cell);
    more.loads = new AbortController();
    this.loads.signal.addEventListener("abort", () => more.loads.abort(), { once: true });
    line.after(more);
    try {
      cell.replaceChildren(await detailBlock(this.source, sample.row, more.loads.signal));
    } catch (error) {
      cell.replaceChildren(el("p", { class: "notice", text: `cannot show this sample: ${error.message}` }));
    }
  }

  pagerButtons(total) {
    const { offset, count } = this.state;
    const last = Math.max(0, Math.ceil(total / count) - 1), now = Math.floor(offset / count);
    const go = (text, page, enabled) => {
      const button = el("button", { type: "button", text, "aria-label": `${text} page` });
      button.disabled = !enabled;
      button.addEventListener("click", async () => {
        await this.change({ offset: page * count });
        this.node.scrollIntoView({ block: "start" });
        [...this.pager.querySelectorAll("button")].find((other) => other.textContent === text && !other.disabled)?.focus();
      });
      return button;
    };
    return [go("First", 0, now > 0), go("Previous", now - 1, now > 0),
      el("span", { class: "muted", text: `page ${number(now + 1)} of ${number(last + 1)}` }),
      go("Next", now + 1, now < last), go("Last", last, now < last)];
  }
}
