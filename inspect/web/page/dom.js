// Building blocks of the page. Every string becomes a text node or an attribute's value, never markup.

/** An element. Properties: class, text, on<event>, and attributes; children: elements and strings. */
function el(name, properties = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "class") node.className = value;
    else if (key === "text") node.textContent = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Text of unknown direction, inside a line. */
const bdi = (text, name = "bdi", cls = null) => el(name, { dir: "auto", class: cls, text: String(text) });

const number = (value, digits = 0) =>
  Number(value).toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });

const percent = (value) => `${number(100 * value, 1)} %`;

/** A plain table; cells are strings or elements. */
function table(caption, heads, rows, cls = "plain") {
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    el("table", { class: cls },
      el("caption", { class: "hidden", text: caption }),
      el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col", text: head })))),
      el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((cell, at) =>
        at === 0 ? el("th", { scope: "row" }, cell) : el("td", {}, cell)))))));
}

/** Names and values. */
function pairs(items) {
  return el("dl", { class: "pairs" }, ...items.flatMap(([name, value]) =>
    [el("dt", { text: name }), el("dd", {}, value instanceof Node ? value : bdi(value))]));
}

function section(id, title, ...children) {
  return el("section", { id, "aria-labelledby": `${id}-title` }, el("h2", { id: `${id}-title`, text: title }), ...children);
}

/** A colour of the style sheet in the current theme. */
function color(name) {
  const probe = el("span", { style: `color: var(--${name})`, hidden: true });
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}

/** Whether the page is dark now, by the system's setting or the reader's choice. */
const isDark = () => color("page").match(/\d+/g).slice(0, 3).every((part) => Number(part) < 128);

const themeListeners = new Set();

/** Call now, and again whenever the theme changes, for as long as the node is on the page. */
function onTheme(node, draw) {
  draw();
  themeListeners.add([node, draw]);
}

function themeChanged() {
  for (const entry of themeListeners) {
    if (entry[0].isConnected) entry[1]();
    else themeListeners.delete(entry);
  }
}
