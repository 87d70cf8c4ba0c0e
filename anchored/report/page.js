// Draws the curves and pages through the pairs, which pair.js shows. Everything from the run is data in #page-data, and
// reaches the page as text (textContent) only; Plotly gets labels that the report has escaped.
"use strict";

const pageData = JSON.parse(document.getElementById("page-data").textContent);

// ---- curves ----

const root = document.documentElement;

/** The colours of the page as it looks now, under the names that the figures use for them. */
function resolved(value) {
  if (Array.isArray(value)) return value.map(resolved);
  if (value !== null && typeof value === "object")
    return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, resolved(inner)]));
  const name = typeof value === "string" && value.match(/^var\((--[a-z-]+)\)$/);
  return name ? getComputedStyle(root).getPropertyValue(name[1]).trim() : value;
}

function template() {
  const axis = {
    gridcolor: "var(--line)", linecolor: "var(--line)", zerolinecolor: "var(--line)", tickcolor: "var(--line)",
    automargin: true, title: { standoff: 12, font: { size: 13, color: "var(--muted)" } }, tickfont: { size: 12 },
  };
  return resolved({
    layout: {
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: "var(--ink)" },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 58, r: 14, t: 14, b: 46 },
      xaxis: { ...axis, showgrid: false, showline: true }, yaxis: { ...axis, zeroline: true },
      legend: { orientation: "h", x: 1, xanchor: "right", y: 1.02, yanchor: "bottom", font: { size: 12.5 } },
      hoverlabel: { bgcolor: "var(--surface)", bordercolor: "var(--line)", font: { color: "var(--ink)" } },
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    },
  });
}

function drawCharts() {
  const look = template();
  for (const chart of pageData.charts) {
    const layout = { ...resolved(chart.layout), template: look };
    Plotly.react(chart.id, resolved(chart.data), layout, { displayModeBar: false, responsive: true });
  }
}

if (pageData.charts.length) {
  drawCharts();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCharts);
  // paper is white whatever the screen is
  addEventListener("beforeprint", () => { root.classList.add("paper"); drawCharts(); });
  addEventListener("afterprint", () => { root.classList.remove("paper"); drawCharts(); });
}

// ---- pairs ----

const rows = pageData.rows;

function wholeText(row, without) {
  return row.parts.filter(([kind]) => kind !== without).map(([, text]) => text).join("");
}

function searchable(row) {
  row.searchable ??= [
    row.id, row.detail, row.rational, ...row.prompt.map(([, text]) => text), wholeText(row, ADDED), wholeText(row, REMOVED),
  ].join("\n").toLowerCase();
  return row.searchable;
}

const ORDERS = {
  drawn: null,
  unlike: (a, b) => (a.jaccard ?? 101) - (b.jaccard ?? 101),
  alike: (a, b) => (b.jaccard ?? -1) - (a.jaccard ?? -1),
  long: (a, b) => length(b) - length(a),
};

function length(row) {
  return row.parts.reduce((sum, [, text]) => sum + text.length, 0);
}

function startBrowser() {
  const [group, order, search, list, pair, place, previous, next] =
    ["group", "order", "search", "list", "pair", "place", "previous", "next"].map((id) => document.getElementById(id));
  let shown = [], at = 0;

  function select() {
    const wanted = search.value.trim().toLowerCase();
    const inGroup = (row) => group.value === "all" || row.groups.includes(group.value);
    shown = rows.filter((row) => inGroup(row) && (!wanted || searchable(row).includes(wanted)));
    if (ORDERS[order.value]) shown.sort(ORDERS[order.value]);
    list.replaceChildren(...shown.map(entry));
    list.scrollTop = 0;
    go(0);
  }

  function entry(row, index) {
    const button = make("button");
    button.type = "button";
    const alike = row.jaccard === null ? "" : ` · Jaccard ${row.jaccard.toFixed(0)}`;
    button.append(make("span", "", row.prompt.at(-1)?.[1].slice(0, 80) || row.id), make("span", "", row.outcome + alike));
    button.addEventListener("click", () => go(index));
    const item = make("li");
    item.append(button);
    return item;
  }

  function go(index) {
    list.children[at]?.firstChild.removeAttribute("aria-current");
    at = Math.max(0, Math.min(index, shown.length - 1));
    place.textContent = shown.length ? `${at + 1} of ${shown.length}` : "0 of 0";
    previous.disabled = at === 0;
    next.disabled = at >= shown.length - 1;
    pair.replaceChildren(...(shown.length ? pairView(shown[at]) : [make("p", "empty", "No row holds these words.")]));
    const here = list.children[at];
    if (here) {
      here.firstChild.setAttribute("aria-current", "true");
      const over = here.offsetTop - list.offsetTop;
      if (over < list.scrollTop || over + here.offsetHeight > list.scrollTop + list.clientHeight)
        list.scrollTop = over - list.clientHeight / 2;
    }
    markHits(pair, search.value);
  }

  group.addEventListener("change", select);
  order.addEventListener("change", select);
  search.addEventListener("input", select);
  /** Another row, from its beginning: after a long one the reader is far below it. */
  function turn(by) {
    go(at + by);
    const browser = document.getElementById("browser");
    if (browser.getBoundingClientRect().top < 0) browser.scrollIntoView({ behavior: "instant" });
  }

  previous.addEventListener("click", () => turn(-1));
  next.addEventListener("click", () => turn(1));
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target === search) {
      if (event.key === "Escape") search.blur();
      if (event.key === "Enter") turn(1);
      return;
    }
    // arrows belong to a menu, or to a table that scrolls, while it has the focus
    if (event.target.closest?.("select, .scroll")) return;
    if (event.key === "ArrowRight" || event.key === "j") turn(1);
    else if (event.key === "ArrowLeft" || event.key === "k") turn(-1);
    else if (event.key === "/") search.focus();
    else return;
    event.preventDefault();
  });
  select();
}

if (rows.length) startBrowser();
