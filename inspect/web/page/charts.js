// Charts: plotly.js draws them when they come into view, in the colours of the theme.

// Okabe and Ito's colours, told apart by colour-blind people; darker or lighter where a theme needs it
const LINES = {
  light: ["#0072b2", "#d55e00", "#008563", "#b0508a", "#8a6d00", "#2b8cbe", "#6b4a3a", "#5f5f5f"],
  dark: ["#56b4e9", "#f0803c", "#2fc79c", "#e39bc4", "#e6c229", "#9fd3f5", "#c9a08c", "#b5b5b5"],
};

function chartLayout(chart) {
  const ink = color("ink"), line = color("line");
  const axis = (given) => ({ automargin: true, gridcolor: line, zerolinecolor: line, linecolor: line, ...given });
  return {
    autosize: true,
    height: chartHeight(chart),
    margin: { l: 48, r: 20, t: 8, b: 40 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: ink, family: getComputedStyle(document.body).fontFamily, size: 12 },
    colorway: LINES[isDark() ? "dark" : "light"],
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 } },
    hoverlabel: { align: "left" },
    bargap: 0.1,
    ...chart.layout,
    xaxis: axis(chart.layout.xaxis),
    yaxis: axis(chart.layout.yaxis),
  };
}

/** In pixels; horizontal bars grow downwards. */
function chartHeight(chart) {
  const bars = chart.data.find((part) => part.orientation === "h");
  return bars ? 70 + 24 * bars.y.length : 320;
}

/** Traces in the theme's colours: heat maps run from the background to the ink, lines of one tone look alike. */
function chartData(chart) {
  const lines = LINES[isDark() ? "dark" : "light"];
  return chart.data.map((part) => {
    if (part.tone !== undefined) return { ...part, line: { ...part.line, color: lines[part.tone] }, marker: { color: lines[part.tone] } };
    if (part.type === "heatmap") return { ...part, colorscale: [[0, color("panel")], [1, color("spectrum")]], colorbar: { tickformat: ".2~%", thickness: 12 } };
    return part;
  });
}

/** The numbers behind a chart, for those who cannot see it. */
function chartNumbers(chart) {
  const rows = chart.data.flatMap((part, at) => part.z
    ? part.z.map((values, row) => [String(part.y[row]), `${percent(Math.max(...values))} at most in a group`, ""])
    : part.x.map((x, i) => [part.name || chart.title, String(x), String(part.y[i] ?? "")]));
  const details = el("details", { class: "numbers" }, el("summary", { text: "Numbers" }));
  details.addEventListener("toggle", () => {
    if (details.children.length > 1) return;
    details.append(table(`Numbers of ${chart.title}`, ["series", "x", "y"], rows.slice(0, 2000)));
  });
  return details;
}

function chartFigure(chart) {
  const plot = el("div", { class: "plot", role: "img", "aria-label": `${chart.title}. ${chart.note}`, style: `min-height: ${chartHeight(chart)}px` });
  const draw = () => Plotly.react(plot, chartData(chart), chartLayout(chart), { displayModeBar: false, responsive: true });
  new IntersectionObserver((entries, observer) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    observer.disconnect();
    onTheme(plot, draw);
  }, { rootMargin: "300px" }).observe(plot);
  return el("figure", { class: "chart", id: `chart-${chart.id}` },
    el("figcaption", {}, el("strong", { text: chart.title }), chart.note ? ` ${chart.note}` : null), plot, chartNumbers(chart));
}

const charts = (list) => el("div", { class: "charts" }, ...list.map(chartFigure));
