// The page itself: what is shown when, and what a click does.

let runs, meta, layers;
const chosen = { layer: null, open: 0, moved: false };
const pause = () => new Promise((done) => { setTimeout(done, 0); });
const short = (row) => Math.min(row.shape[1] ?? 1, row.shape[2] ?? 1);
const ROLES = ["embed", "q", "k", "v", "qkv", "o", "gate", "up", "down", "conv", "head"];
const UNKNOWN = { row: () => [], columns: [], values: [] };

// Every layer of either run, paired by name: `at[run]` is its place there.
function paired() {
  const byName = new Map();
  runs.forEach((run, index) => run.layers.forEach(([name, kind, role, shape], place) => {
    if (!byName.has(name)) byName.set(name, { name, kind, role, shape, group: role || "other", at: [] });
    byName.get(name).at[index] = place;
  }));
  const rows = [...byName.values()];
  rows.forEach((row, depth) => { row.depth = depth; });
  runs.forEach((run, index) => run.spans.forEach(([rule, layer, , , , end]) => {
    const row = byName.get(layer);
    if (row && end === null && row.at[index] !== undefined) (row.holding ??= new Set()).add(rule);
  }));
  return rows;
}

function grouped(rows) {
  const place = ({ group }) => (ROLES.includes(group) ? ROLES.indexOf(group) : ROLES.length);
  return [...rows].sort((one, two) => place(one) - place(two) || one.group.localeCompare(two.group) || one.depth - two.depth);
}

// --- the model

function shownCurves() {
  const log = $("#log-steps").checked;
  const known = (metric) => runs.some((run) => run.summary[metric]?.some((value) => value !== null));
  const cards = meta.key.filter(known).map((metric) => [metric, meta.metrics[metric].model, () => modelCurve(runs, metric, log)]);
  runs.forEach((run, index) => {
    if (run.layers.length) cards.push(["verdict", runs.length > 1 ? `run ${"AB"[index]}` : "", () => shares(run, log, runs), run.verdicts]);
  });
  return cards;
}

async function showCurves() {
  const cards = shownCurves();
  $("#curves").replaceChildren(...cards.map(([metric, how, , words]) => {
    const heading = make("h3", {}, titled(metric), " ", make("small", {}, how));
    if (runs.length > 1 && metric === "alpha") heading.append(" ", legend());
    heading.title = meta.metrics[metric]?.definition ?? "";
    if (words) heading.append(...words.map((word) => make("small", { class: "key", title: meta.verdicts[word] ?? "" }, make("i", { style: `background: ${shareColour(word)}` }), word)));
    return make("div", { class: "card", "data-metric": metric }, heading, make("div"));
  }));
  for (const [index, [, , build]] of cards.entries()) {
    draw($("#curves").children[index].lastChild, build);
    await pause();
  }
}

function legend() {
  const item = (index) => make("small", { style: `color: var(--${RUN[index]})` }, `▬ ${"AB"[index]} `);
  return make("span", {}, item(0), item(1));
}

// --- the map

// The snapshots of A that B has too: the nearest one within half of A's spacing.
function common(a, b) {
  return a.flatMap((step, i) => {
    const j = nearest(b, step), gap = Math.min(step - (a[i - 1] ?? -Infinity), (a[i + 1] ?? Infinity) - step);
    return Math.abs(b[j] - step) <= (Number.isFinite(gap) ? gap / 2 : 0) ? [[i, j]] : [];
  });
}

const HERE = "A row a layer, the first on top; a column a snapshot. Point at a cell to read it, click it to open its layer.";
const stepsOf = (run, of) => of.columns.map((number) => run.steps[number]);

async function showMap() {
  const metric = $("#map-metric").value, which = runs.length > 1 ? $("#map-run").value : "a", both = which === "difference";
  const tables = (await Promise.all(runs.map((run) => metricOf(run, metric)))).map((of) => of ?? UNKNOWN);
  const about = meta.metrics[metric];
  const colours = metric === "alpha" && !both ? " Orange: below 2; violet to yellow: 2 to 6; grey: above 6." : both ? " B less A." : "";
  $("#map-about").textContent = `${about.definition} ${about.read ? `How to read it: ${about.read}.` : ""}${colours}`;
  const first = both ? 0 : "ab".indexOf(which), byRole = $("#map-order").value === "role";
  const here = layers.filter((row) => (both ? row.at[0] !== undefined && row.at[1] !== undefined : row.at[first] !== undefined));
  const order = byRole ? grouped(here) : here;
  const pairs = both ? common(stepsOf(runs[0], tables[0]), stepsOf(runs[1], tables[1])) : tables[first].columns.map((_, i) => [i, i]);
  const z = order.map((row) => {
    if (!both) return tables[first].row(row.at[first]);
    const [one, two] = tables.map((of, index) => of.row(row.at[index]));
    return Float32Array.from(pairs, ([i, j]) => two[j] - one[i]);
  });
  const finite = (both ? z : tables.map((one) => one.values)).flatMap((values) => some(values, 20000 / (both ? z.length : 1)));
  const steps = pairs.map(([i]) => runs[first].steps[tables[first].columns[i]]);
  const element = $("#map"), groups = new Set(order.map((row) => row.group)).size;
  const lacking = both ? "No layer of A has a partner of its name in B." : "This run has no layer.";
  const none = !order.length ? lacking : !steps.length ? "No step of A is near one of B." : "";
  element.hidden = Boolean(none);
  if (none) drawn.delete(element);
  $("#map-here").textContent = none || HERE;
  if (!none) await draw(element, () => map({ z, steps, order, metric, finite, difference: both, grouped: byRole && groups > 1, width: element.clientWidth }));
  element.dataset.metric = metric;
  if (none) return;
  element.removeAllListeners("plotly_click");
  element.removeAllListeners("plotly_hover");
  element.on("plotly_click", ({ points: [point] }) => openLayer(order[point.y], steps[point.x]));
  element.on("plotly_hover", ({ points: [point] }) => {
    $("#map-here").textContent = `${order[point.y].name}, step ${steps[point.x].toLocaleString("en")}: ${titled(metric)} ${figure(point.z)}`;
  });
}

// --- the table

function showLayers() {
  const numbers = meta.key.filter((metric) => runs.some((run) => run.metrics[metric]) && metric !== "log_spectral_norm");
  const compared = numbers.filter((metric) => HEALTHIER[metric]);
  const value = (row, metric, index) => runs[index].last[metric]?.[row.at[index]] ?? NaN;
  const number = (title, read, about) => ({ title, about, number: true, width: `minmax(${Math.max(60, 10 * title.length)}px, 0.3fr)`, sort: read, show: (row) => figure(read(row)) });
  const words = (index) => (row) => (row.at[index] === undefined ? "not in this run" : runs[index].judged[row.at[index]]);
  const longest = Math.max(0, ...layers.map((row) => row.name.length));
  const columns = [
    { title: "layer", width: `minmax(${Math.min(300, Math.max(160, 9 * longest))}px, 1.5fr)`, sort: (row) => row.depth, show: (row) => nameButton(row.name, () => openLayer(row)), about: "in the order of the model" },
    { title: "role", width: "minmax(56px, 0.4fr)", sort: (row) => row.role, show: (row) => row.role || "–" },
    ...runs.map((_, index) => ({
      title: runs.length > 1 ? `verdict ${"AB"[index]}` : "verdict", width: "minmax(230px, 1.6fr)", sort: words(index), show: words(index),
    })),
  ];
  if (runs.length > 1) {
    for (const metric of compared) {
      const name = titled(metric) === "correlation traps" ? "traps" : titled(metric).replace("trap ", "");
      columns.push(number(`${name} A`, (row) => value(row, metric, 0)), number(`${name} B`, (row) => value(row, metric, 1)));
      const gap = (row) => value(row, metric, 1) - value(row, metric, 0);
      columns.push({ ...number("B − A", gap), show: (row) => difference(value(row, metric, 0), value(row, metric, 1), HEALTHIER[metric]) });
    }
  } else {
    columns.push({ title: "shape", width: "minmax(92px, 0.5fr)", sort: (row) => row.shape.reduce((a, b) => a * b, 1), show: (row) => shapeOf(row) });
    for (const metric of numbers) columns.push(number(titled(metric).replace("correlation ", "").replace("trap ", ""), (row) => value(row, metric, 0), meta.metrics[metric].definition));
    columns.push(number("findings", (row) => row.holding?.size ?? 0, "that hold at the end"));
  }
  const list = table($("#layers"), columns, layers, { open: (row) => openLayer(row), empty: "No layer." });
  const steps = runs.map((run) => run.steps[run.until]), healthier = "; B − A is blue where B looks healthier, red where A does";
  const when = runs.length === 1 ? "at the end" : (steps[0] === steps[1] ? `at step ${steps[0].toLocaleString("en")}, the last that both have` : "at the end of each") + healthier;
  const find = () => {
    const wanted = $("#find").value.trim().toLowerCase(), text = (row) => [row.name, row.role, ...runs.map((_, index) => words(index)(row))].join(" ").toLowerCase();
    const count = list.keep((row) => text(row).includes(wanted));
    $("#shown").textContent = `${count.toLocaleString("en")} of ${layers.length.toLocaleString("en")} layers, as they are ${when}`;
  };
  $("#find").addEventListener("input", find);
  find();
  chosen.list = list;
}

const shapeOf = ({ shape }) => (shape.length === 3 && shape[0] === 1 ? shape.slice(1) : shape).join(" × ");

// --- findings

function showFindings(element, spans) {
  const letter = ({ index }) => "AB"[index], step = ({ index }, number) => runs[index].steps[number];
  const columns = [
    { title: "severity", width: "minmax(84px, 0.3fr)", sort: (row) => ["critical", "warning", "info"].indexOf(row.severity), show: (row) => make("span", { class: row.severity in SEVERITIES ? row.severity : "info" }, row.severity) },
    { title: "finding", width: "minmax(160px, 0.5fr)", sort: (row) => row.rule, show: (row) => row.rule.replaceAll("_", " ") },
    { title: "from step", number: true, width: "minmax(80px, 0.3fr)", sort: (row) => step(row, row.begin), show: (row) => step(row, row.begin).toLocaleString("en") },
    { title: "to step", number: true, width: "minmax(80px, 0.3fr)", sort: (row) => (row.end === null ? Infinity : step(row, row.end)), show: (row) => (row.end === null ? "still so" : step(row, row.end).toLocaleString("en")) },
    { title: "what was found", width: "minmax(360px, 4fr)", sort: (row) => row.message, show: (row) => row.message },
  ];
  if (runs.length > 1) columns.unshift({ title: "run", width: "minmax(36px, 0.1fr)", sort: letter, show: letter });
  const open = (row) => openLayer(layers.find((layer) => layer.name === row.layer), step(row, row.begin));
  table(element, columns, spans, { open, empty: "There are none." });
}

const allSpans = () => runs.flatMap((run, index) => run.spans.map(([rule, layer, severity, message, begin, end]) => ({ index, rule, layer, severity, message, begin, end })));

// --- one layer

async function openLayer(row, step) {
  if (!row) return;
  chosen.layer = row;
  const ticket = ++chosen.open, panel = $("#layer");
  if (panel.hidden) chosen.before = document.activeElement;
  panel.hidden = false;
  panel.scrollTop = 0;
  $("#layer-name").replaceChildren(make("bdi", {}, row.name));
  $("#layer-about").textContent = [row.role && `role ${row.role}`, row.kind, shapeOf(row)].filter(Boolean).join(", ");
  $("#layer-verdict").textContent = runs.flatMap((run, index) => (row.at[index] === undefined ? [] : [`${runs.length > 1 ? `${"AB"[index]}: ` : ""}${run.judged[row.at[index]]}`])).join("; ");
  $("#close").focus();
  chosen.list?.opened(row);
  const spectra = await Promise.all(runs.map((run, index) => spectraOf(run, row.at[index])));
  const fitted = await Promise.all(runs.map((run) => Promise.all(FITTED.map((name) => metricOf(run, name)))));
  if (ticket !== chosen.open) return;
  Object.assign(chosen, { spectra, fitted, ranges: spectra.flat().length ? rangesOf(spectra) : null });
  showSlider(step);
  const mine = allSpans().filter((span) => span.layer === row.name);
  $("#layer-findings").replaceChildren(...(mine.length ? mine.map(findingItem) : [make("li", {}, "There are none.")]));
  await showSeries($("#layer-headroom"), "trap_headroom");
  await showSeries($("#layer-alpha"), "alpha");
  await showOther();
}

function findingItem({ index, rule, layer, severity, message, begin, end }) {
  const steps = runs[index].steps, when = `from step ${steps[begin].toLocaleString("en")}${end === null ? " on" : ` to ${steps[end].toLocaleString("en")}`}`;
  const mark = make("b", { class: severity in SEVERITIES ? severity : "info" }, `${runs.length > 1 ? `${"AB"[index]}, ` : ""}${rule.replaceAll("_", " ")}`);
  return make("li", {}, mark, ` ${when}: ${message.startsWith(`${layer}: `) ? message.slice(layer.length + 2) : message}`);
}

function showSlider(step) {
  const steps = [...new Set(chosen.spectra.flatMap((list, index) => list.map(({ column }) => runs[index].steps[column])))].sort((a, b) => a - b);
  const slider = $("#esd-step");
  chosen.steps = steps;
  $("#esd-bar").hidden = !steps.length;
  $("#esd").hidden = !steps.length;
  $("#esd-note").textContent = steps.length ? "" : "The history has no spectrum of this layer.";
  slider.max = Math.max(0, steps.length - 1);
  slider.value = step === undefined ? steps.length - 1 : nearest(steps, step);
  slider.disabled = steps.length < 2;
  showStep();
}

function showStep() {
  const step = chosen.steps.length ? chosen.steps[Number($("#esd-step").value)] : Infinity;
  showEntries(step);
  if (!chosen.steps.length) return;
  const shown = chosen.spectra.flatMap((list, index) => {
    if (!list.length) return [];
    const spectrum = list[nearest(list.map(({ column }) => runs[index].steps[column]), step)];
    const place = chosen.layer.at[index], fitted = {};
    FITTED.forEach((name, i) => {
      const of = chosen.fitted[index][i];
      fitted[name] = of ? of.row(place)[upTo(of.columns, spectrum.column)] : NaN;
    });
    return [{ spectrum, fitted, index, short: short(chosen.layer), step: runs[index].steps[spectrum.column] }];
  });
  const told = shown.map((one) => `${runs.length > 1 ? `${"AB"[one.index]}: ` : ""}step ${one.step.toLocaleString("en")}`).join(", ");
  $("#esd-label").textContent = `${told} (${Number($("#esd-step").value) + 1} of ${chosen.steps.length})`;
  const zeros = shown.reduce((sum, { spectrum }) => sum + spectrum.zeros, 0);
  $("#esd-note").textContent = zeros ? `${zeros.toLocaleString("en")} eigenvalues are numerically zero and not shown.` : "";
  draw($("#esd"), () => spectrumFigure(shown, chosen.ranges));
}

function showEntries(step) {
  const parts = runs.flatMap((run, index) => {
    const place = chosen.layer.at[index], columns = Object.keys(run.entries).map(Number).filter((column) => run.steps[column] <= step);
    const column = columns.at(-1), entries = (column !== undefined && run.entries[column][place]) || [];
    if (!entries.length) return [];
    const head = ["slice", "row", "column", "value", "headroom"].map((title) => make("th", {}, title));
    const body = entries.map((entry) => make("tr", {}, ...entry.map((value, i) => make("td", {}, i < 3 ? String(value) : figure(value)))));
    const where = `${runs.length > 1 ? `${"AB"[index]}, ` : ""}step ${run.steps[column].toLocaleString("en")}`;
    return [make("p", { class: "quiet" }, where), make("table", {}, make("tr", {}, ...head), ...body)];
  });
  $("#entries").replaceChildren(...(parts.length ? parts : [make("p", { class: "quiet" }, "There are none at this step.")]));
}

async function showSeries(element, metric) {
  const row = chosen.layer, of = await Promise.all(runs.map((run) => metricOf(run, metric)));
  const sigma = metric === "alpha" && runs.length === 1 ? await metricOf(runs[0], "sigma") : null;
  if (row !== chosen.layer) return;
  draw(element, () => {
    const traces = of.flatMap((one, index) => {
      if (!one || row.at[index] === undefined) return [];
      const steps = stepsOf(runs[index], one), values = Array.from(one.row(row.at[index]));
      return curve(steps, values.map((value) => (Number.isNaN(value) ? null : value)), index, sigma ? { spread: around(one, sigma, row.at[0]), at: stepsOf(runs[0], sigma) } : {});
    });
    const mine = { ...marks(runs.map((run) => ({ ...run, spans: run.spans.filter(([, layer]) => layer === row.name) }))) };
    return [[...traces, ...mine.traces], { height: 190, xaxis: overSteps(runs, $("#log-steps").checked), yaxis: { title: { text: titled(metric) }, ...overValues(metric) }, yaxis2: mine.axis, shapes: [...calm(metric), ...mine.shapes] }];
  });
}

function around(alpha, sigma, place) {
  const [center, width] = [alpha.row(place), sigma.row(place)];
  const edge = (sign) => sigma.columns.map((column, i) => center[upTo(alpha.columns, column)] + sign * width[i]);
  return [edge(-1), edge(1)];
}

const showOther = () => showSeries($("#layer-other"), $("#layer-metric").value);

function closeLayer() {
  $("#layer").hidden = true;
  chosen.layer = null;
  chosen.open++;
  chosen.list?.opened(null);
  chosen.before?.focus?.();
}

// --- all of it

function choices(select, names, value = names[0]) {
  select.replaceChildren(...names.map((name) => make("option", { value: name }, titled(name))));
  select.value = value;
}

function listen() {
  $("#theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    redraw();
  });
  night.addEventListener("change", () => [setTheme(), redraw()]);
  for (const control of ["#map-metric", "#map-order", "#map-run"]) $(control).addEventListener("change", showMap);
  $("#log-steps").addEventListener("change", showCurves);
  $("#layer-metric").addEventListener("change", showOther);
  $("#esd-step").addEventListener("input", showStep);
  $("#close").addEventListener("click", closeLayer);
  document.addEventListener("keydown", ({ key }) => key === "Escape" && !$("#layer").hidden && closeLayer());
  $("#lead").addEventListener("click", ({ target }) => {
    const button = target.closest("button.layer");
    if (button) openLayer(layers.find((row) => row.name === button.dataset.layer));
  });
}

function redraw() {
  for (const [element, build] of drawn) element.isConnected ? draw(element, build) : drawn.delete(element);
}

async function start() {
  meta = JSON.parse(await textOf("meta"));
  runs = meta.runs;
  runs.forEach((run, index) => { run.prefix = `${RUN[index]}-`; });
  layers = paired();
  showLayers();
  showFindings($("#findings"), allSpans());
  $("#band-note").hidden = runs.length > 1;
  $("#notes-section").hidden = !$("#notes").children.length;
  await pause();
  performance.mark("table");
  document.head.append(make("script", {}, await textOf("plotly")));
  await showCurves();
  const names = Object.keys(meta.metrics), main = meta.key.filter((name) => names.includes(name));
  const ordered = [...main, ...names.filter((name) => !main.includes(name))];
  if (runs.length > 1) {
    $("#map-run").replaceChildren(...[["a", "A"], ["b", "B"], ["difference", "B − A"]].map(([value, text]) => make("option", { value }, text)));
    $("#map-run-label").hidden = false;
  }
  choices($("#map-metric"), ordered);
  choices($("#layer-metric"), ordered, ordered.includes("num_spikes") ? "num_spikes" : ordered[0]);
  listen();
  if (layers.length && ordered.length) await showMap();
  else $("#map-section").hidden = true;
  performance.mark("ready");
  document.documentElement.dataset.ready = "yes";
}

start();
