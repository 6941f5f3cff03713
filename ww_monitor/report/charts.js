// Figures by plotly: what each shows, in the colours of the theme.

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
// plotly reads a few tags in texts: a name is shown as it is
const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const RUN = ["a", "b"];
const CALM = { __proto__: null, alpha: [2, 6], trap_headroom: [0, 1] };
const NAMES = { // without a prototype: a metric may be called "constructor"
  __proto__: null, alpha: "alpha", alpha_hat: "alpha-hat", alpha_weighted: "alpha-hat", trap_headroom: "trap headroom", num_traps: "correlation traps",
  num_spikes: "spikes", stable_rank: "stable rank", log_spectral_norm: "log10 λmax", verdict: "share of layers by verdict",
};
const POSITIVE = new Set(["alpha", "trap_headroom", "num_traps", "num_spikes", "stable_rank"]);
const titled = (metric) => NAMES[metric] ?? metric;

const drawn = new Map(); // element → how to draw it again, in other colours

function draw(element, build) {
  drawn.set(element, build);
  const [traces, layout] = build();
  const axis = {
    gridcolor: css("line"), linecolor: css("line"), zerolinecolor: css("line"), tickfont: { color: css("quiet"), size: 11 },
    title: { font: { color: css("quiet") } }, automargin: true, exponentformat: "power",
  };
  const full = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 8, r: 12, t: 8, b: 8 }, height: 200,
    font: { family: "system-ui, sans-serif", size: 12, color: css("ink") }, showlegend: false, hovermode: "closest",
    hoverlabel: { bgcolor: css("card"), bordercolor: css("line"), font: { color: css("ink") }, align: "left" },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { color: css("ink") }, bgcolor: "rgba(0,0,0,0)" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: css("quiet"), activecolor: css("link") },
    ...layout,
    xaxis: { ...axis, ...layout.xaxis, title: { ...axis.title, ...layout.xaxis?.title } },
    yaxis: { ...axis, ...layout.yaxis, title: { ...axis.title, ...layout.yaxis?.title } },
  };
  const buttons = { displaylogo: false, responsive: true, toImageButtonOptions: { filename: "ww-report", scale: 2 } };
  return Plotly.react(element, traces, full, { ...buttons, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] });
}

const line = (shape, color, dash = "dot") => ({ type: "line", line: { color, width: 1, dash }, ...shape });

function calm(metric) {
  const band = CALM[metric];
  if (!band) return [];
  const shape = { type: "rect", xref: "paper", x0: 0, x1: 1, y0: band[0], y1: band[1], layer: "below", line: { width: 0 } };
  const edges = metric === "alpha" ? band : [1];
  return [{ ...shape, fillcolor: css("calm") }, ...edges.map((y) => line({ xref: "paper", x0: 0, x1: 1, y0: y, y1: y }, css("bulk")))];
}

const filled = (color, share = 0.16) => color + Math.round(255 * share).toString(16).padStart(2, "0");

// What lies between two curves: a closed outline for every stretch without a gap.
function between(steps, [low, high]) {
  const x = [], y = [], known = (i) => Number.isFinite(low[i] ?? NaN) && Number.isFinite(high[i] ?? NaN);
  for (let from = 0; from < steps.length; from++) {
    if (!known(from)) continue;
    let to = from;
    while (to + 1 < steps.length && known(to + 1)) to++;
    const along = Array.from({ length: to - from + 1 }, (_, i) => from + i), back = [...along].reverse();
    x.push(...along.map((i) => steps[i]), ...back.map((i) => steps[i]), null);
    y.push(...along.map((i) => low[i]), ...back.map((i) => high[i]), null);
    from = to;
  }
  return { x, y };
}

// Values over the steps; `spread` is what a band is drawn between.
function curve(steps, values, run, { name = "", spread = null, at = null } = {}) {
  const color = css(RUN[run]), traces = [];
  if (spread) {
    const area = { mode: "lines", line: { width: 0 }, fill: "toself", fillcolor: filled(color) };
    traces.push({ ...area, ...between(at ?? steps, spread), hoverinfo: "skip", showlegend: false });
  }
  const mode = steps.length < 40 ? "lines+markers" : "lines";
  traces.push({
    x: steps, y: values, mode, name, line: { color, width: 2 }, marker: { size: 5, color },
    hovertemplate: "step %{x:,}: %{y:,.4~r}<extra></extra>",
  });
  return traces;
}

const SEVERITIES = { __proto__: null, critical: "triangle-up", warning: "diamond", info: "circle" };

// The findings of a run on its time axis, and a dotted line where a critical one begins.
function marks(runs) {
  const places = new Map();
  runs.forEach((run, index) => run.spans.forEach(([rule, layer, severity, message, begin, end]) => {
    const tell = (number, over) => {
      const kind = severity in SEVERITIES ? severity : "info", step = run.steps[number], key = `${step} ${kind} ${over}`;
      if (!places.has(key)) places.set(key, { step, kind, over, told: [] });
      places.get(key).told.push(`${runs.length > 1 ? `${"AB"[index]}: ` : ""}${rule}${over ? " is over" : ""}: ${message}`);
    };
    tell(begin, false);
    if (end !== null) tell(end, true);
  }));
  const traces = Object.entries(SEVERITIES).reverse().map(([kind, symbol]) => { // the most severe on top
    const here = [...places.values()].filter((place) => place.kind === kind);
    const texts = here.map(({ step, told }) => {
      const lines = told.slice(0, 6).map((text) => plain(text.length > 90 ? `${text.slice(0, 89)}…` : text));
      return [`step ${step.toLocaleString("en")}`, ...lines, ...(told.length > 6 ? [`and ${told.length - 6} more`] : [])].join("<br>");
    });
    return {
      x: here.map((place) => place.step), y: here.map(() => 0.05), yaxis: "y2", mode: "markers", cliponaxis: false, text: texts,
      marker: { symbol: here.map((place) => symbol + (place.over ? "-open" : "")), size: 9, color: css(kind), line: { width: 1, color: css(kind) } },
      hovertemplate: "%{text}<extra></extra>", name: kind,
    };
  }).filter((trace) => trace.x.length);
  const begun = [...places.values()].filter((place) => place.kind === "critical" && !place.over).slice(0, 60);
  const shapes = begun.map(({ step }) => line({ x0: step, x1: step, yref: "paper", y0: 0, y1: 1 }, css("critical")));
  return { traces, shapes, axis: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true } };
}

function overSteps(runs, log) {
  const steps = new Set(runs.flatMap((run) => run.steps)), one = steps.size === 1 ? { tickvals: [...steps] } : {};
  return { title: { text: "optimizer step" }, ...(log ? { type: "log" } : { type: "linear", tickformat: "~s", ...one }) };
}
const overValues = (metric) => ({ rangemode: POSITIVE.has(metric) ? "nonnegative" : "normal" });

function modelCurve(runs, metric, log) {
  const { traces: found, shapes, axis } = marks(runs);
  const traces = runs.flatMap((run, index) => {
    if (!run.summary[metric]) return [];
    const at = run.columns[run.metrics[metric].columns].map((number) => run.steps[number]);
    return curve(run.steps, run.summary[metric], index, { name: "AB"[index], at, spread: runs.length === 1 ? run.bands[metric] : null });
  });
  const layout = { xaxis: overSteps(runs, log), yaxis: overValues(metric), yaxis2: axis, shapes: [...calm(metric), ...shapes], height: 204 };
  return [[...traces, ...found], layout];
}

const SHARE = {
  __proto__: null, ok: "#0072b2", poor_fit: "#d55e00", few_eigenvalues: "#e69f00", random_like: "#999999", rank_deficient: "#cc79a7",
  degenerate: "#56b4e9", zero: "#7f7f00", not_finite: "#b00020", solver_failed: "#b00020", error: "#b00020",
};
const shareColour = (word) => SHARE[word] ?? "#009e73";

function shares(run, log, runs) {
  const ends = [Math.min, Math.max].map((end) => runs.map((one) => end(one.steps[0], one.steps.at(-1))).reduce((one, two) => end(one, two)));
  const range = runs.length > 1 && ends[0] < ends[1] && !log ? { range: ends } : {};
  const traces = run.shares.map((share, code) => {
    const word = run.verdicts[code], color = shareColour(word);
    const kind = share.length > 1 ? { stackgroup: "all", mode: "lines" } : { type: "bar", marker: { color } };
    return {
      ...kind, x: run.columns.all.map((number) => run.steps[number]), y: share.map((value) => 100 * value), text: plain(word),
      line: { width: 0.5, color }, fillcolor: filled(color, 0.8), hovertemplate: "%{text}: %{y:.0f} % of the layers at step %{x:,}<extra></extra>",
    };
  });
  return [traces, { xaxis: { ...overSteps(runs, log), ...range }, yaxis: { range: [0, 100], ticksuffix: " %" }, barmode: "stack", height: 204 }];
}

const VIRIDIS = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];
const evenly = (colors, from, to) => colors.map((color, i) => [from + ((to - from) * i) / (colors.length - 1), color]);
const BELOW = ["#8f2d00", "#e8743b"], ABOVE = ["#b8bec6", "#dfe3e7"];
const AWAY = ["#b35806", "#f1a340", "#fee0b6", "#f7f7f7", "#d8daeb", "#998ec3", "#542788"];

function coloured(metric, finite, difference) {
  if (difference) {
    const most = Math.max(1e-6, quantile(finite.map(Math.abs), 0.98));
    return { zmin: -most, zmax: most, colorscale: evenly(AWAY.toReversed(), 0, 1) };
  }
  if (metric === "alpha") return { zmin: 0, zmax: 10, colorscale: [...evenly(BELOW, 0, 0.2), ...evenly(VIRIDIS, 0.2, 0.6), ...evenly(ABOVE, 0.6, 1)] };
  if (metric === "trap_headroom") return { zmin: 0, zmax: 2, colorscale: [...evenly(VIRIDIS.slice(0, 8), 0, 0.5), ...evenly(BELOW.toReversed(), 0.5, 1)] };
  let [zmin, zmax] = [quantile(finite, 0.02), quantile(finite, 0.98)];
  if (!(zmax > zmin)) [zmin, zmax] = [zmin, Math.max(quantile(finite, 1), zmin + 1)];
  return { zmin, zmax, colorscale: evenly(VIRIDIS, 0, 1) };
}

// At most so many of the values that are known, evenly taken.
function some(values, most) {
  const stride = Math.max(1, Math.floor(values.length / most)), found = [];
  for (let i = 0; i < values.length; i += stride) if (Number.isFinite(values[i])) found.push(values[i]);
  return found;
}

function quantile(values, share) {
  const sorted = [...values].sort((one, two) => one - two);
  return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] : 0;
}

// Layers by snapshots: `z` a list of rows, `steps` of the columns, `order` the layers of the rows with their groups.
function map({ z, steps, order, metric, difference, grouped, finite, width }) {
  const many = order.length > 40, most = width < 600 ? 14 : 34, ticks = [], names = [], shapes = [];
  order.forEach((row, place) => {
    const begins = grouped && (place === 0 || order[place - 1].group !== row.group);
    if (begins && place) shapes.push(line({ xref: "paper", x0: 0, x1: 1, y0: place - 0.5, y1: place - 0.5 }, css("card"), "solid"));
    if (!many) [ticks.push(place), names.push(shortened(row.name, most))];
    else if (begins) {
      const end = order.findIndex((other, i) => i > place && other.group !== row.group);
      ticks.push((place + (end < 0 ? order.length : end) - 1) / 2);
      names.push(plain(row.group));
    }
  });
  if (many && !grouped) order.forEach((row, place) => place % Math.ceil(order.length / 25) || [ticks.push(place), names.push(shortened(row.name, most))]);
  const every = Math.ceil(steps.length / Math.max(2, Math.min(10, (width - 260) / 80))), columns = steps.map((_, i) => i).filter((i) => i % every === 0);
  const texts = order.map((row) => plain(row.name));
  const trace = {
    type: "heatmap", z, x: steps.map((_, i) => i), y: order.map((_, i) => i), ...coloured(metric, finite, difference), zsmooth: false,
    xgap: steps.length * order.length < 3000 ? 1 : 0, ygap: order.length < 60 ? 1 : 0, hoverongaps: false, hoverinfo: "none",
    customdata: texts, colorbar: { thickness: 12, outlinewidth: 0, tickfont: { color: css("quiet") }, ...(metric === "alpha" && !difference ? { tickvals: [0, 2, 6, 10], ticktext: ["0", "2", "6", "≥ 10"] } : {}) },
  };
  const layout = {
    height: Math.max(180, Math.min(620, 60 + (many ? 500 : 26 * order.length))), shapes,
    xaxis: { tickvals: columns, ticktext: columns.map((i) => steps[i].toLocaleString("en")), title: { text: "optimizer step" }, showgrid: false, zeroline: false },
    yaxis: { tickvals: ticks, ticktext: names, autorange: "reversed", showgrid: false, zeroline: false, ticks: many ? "" : "outside" },
  };
  return [[trace], layout];
}

const shortened = (name, most) => plain(name.length > most ? `…${name.slice(1 - most)}` : name);
