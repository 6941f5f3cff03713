// The tables, of which only the rows in sight are in the page, and the panel of one layer.

function table(element, columns, rows, { height = 34, open, empty }) {
  const head = make("div", { class: "row head", role: "row" }), body = make("div", { class: "body", role: "rowgroup" });
  const template = columns.map((column) => column.width).join(" ");
  const wide = columns.reduce((sum, column) => sum + parseInt(/\d+/.exec(column.width)[0], 10) + 14, 14);
  element.style.setProperty("--wide", `${wide}px`);
  element.replaceChildren(head, body);
  const state = { shown: rows, by: null, down: false, opened: null };
  const cells = columns.map((column, index) => {
    const button = make("button", { type: "button" }, column.title);
    const cell = make("span", { role: "columnheader", class: column.number ? "number" : "", "aria-sort": "none", title: column.about ?? "" }, button);
    button.addEventListener("click", () => {
      state.down = state.by === index ? !state.down : Boolean(column.number);
      state.by = index;
      arrange();
    });
    return cell;
  });
  head.style.gridTemplateColumns = template;
  head.append(...cells);

  function arrange() {
    cells.forEach((cell, index) => {
      cell.setAttribute("aria-sort", index === state.by ? (state.down ? "descending" : "ascending") : "none");
      $("button", cell).textContent = columns[index].title + (index === state.by ? (state.down ? " ↓" : " ↑") : "");
    });
    if (state.by !== null) {
      const { sort } = columns[state.by], sign = state.down ? -1 : 1;
      state.shown = [...state.shown].sort((one, two) => {
        const [x, y] = [sort(one), sort(two)], [noX, noY] = [x === null || Number.isNaN(x), y === null || Number.isNaN(y)];
        if (noX || noY) return noX - noY; // what is not known is last, whichever way
        return sign * (typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y);
      });
    }
    element.scrollTop = 0;
    fill();
  }

  const nodes = new Map(); // by place: while one scrolls, only what comes into sight is made
  function fill({ anew = true } = {}) {
    const from = Math.max(0, Math.floor(element.scrollTop / height) - 8);
    const to = Math.min(state.shown.length, from + Math.ceil((element.clientHeight || 560) / height) + 16);
    body.style.height = state.shown.length ? `${state.shown.length * height}px` : "";
    for (const [place, node] of nodes) if (anew || place < from || place >= to) [node.remove(), nodes.delete(place)];
    for (let place = from; place < to; place++) {
      if (!nodes.has(place)) nodes.set(place, body.appendChild(made(state.shown[place], place)));
    }
    if (!state.shown.length) body.replaceChildren(make("p", { class: "empty quiet" }, empty));
    else $(".empty", body)?.remove();
  }

  function made(row, place) {
    const node = make("div", { class: `row${row === state.opened ? " open" : ""}`, role: "row", "aria-rowindex": place + 2 });
    node.style.cssText = `top: ${place * height}px; grid-template-columns: ${template}`;
    node.append(...columns.map((column) => {
      const cell = make("span", { role: "cell", class: column.number ? "number" : "" }), content = column.show(row);
      cell.append(content);
      if (typeof content === "string") cell.title = content;
      return cell;
    }));
    if (open) node.addEventListener("click", () => open(row));
    return node;
  }

  let waiting = false;
  element.addEventListener("scroll", () => {
    if (!waiting) requestAnimationFrame(() => [(waiting = false), fill({ anew: false })]);
    waiting = true;
  }, { passive: true });
  arrange();
  return {
    keep(test) { state.shown = rows.filter(test); arrange(); return state.shown.length; },
    opened(row) { state.opened = row; fill(); },
  };
}

function nameButton(text, open) {
  const button = make("button", { type: "button", class: "layer" }, make("bdi", {}, text));
  button.addEventListener("click", (event) => [event.stopPropagation(), open()]);
  return button;
}

// How much a value of B differs from that of A, coloured where one is the healthier.
function difference(a, b, better) {
  const gap = b - a, node = make("span", {}, Number.isNaN(gap) ? "–" : `${gap > 0 ? "+" : gap < 0 ? "−" : "±"}${figure(Math.abs(gap))}`);
  const sign = Number.isNaN(gap) ? 0 : better(a, b);
  if (sign) node.className = sign > 0 ? "better" : "worse";
  return node;
}

const outside = (alpha) => Math.max(0, 2 - alpha, alpha - 6);
const HEALTHIER = {
  alpha: (a, b) => Math.trunc(4 * (outside(a) - outside(b))), // a quarter is not worth a colour
  trap_headroom: (a, b) => (Math.max(a, b) > 0.8 ? Math.sign(a - b) : 0),
  num_traps: (a, b) => Math.sign(a - b),
};

// ρ(λ) of one histogram: geometric middles of its bins, density, and the bins' edges.
function density({ low, high, counts, zeros }) {
  const width = (high - low) / counts.length, total = counts.reduce((sum, count) => sum + count, 0);
  const x = [], y = [];
  counts.forEach((count, i) => {
    const [from, to] = [10 ** (low + i * width), 10 ** (low + (i + 1) * width)];
    if (count) [x.push(Math.sqrt(from * to)), y.push(count / total / (to - from))];
  });
  return { x, y, total, zeros, width };
}

function tail({ alpha, xmin }, spectrum, { total }) {
  if (!(alpha > 1 && xmin > 0)) return null;
  const width = (spectrum.high - spectrum.low) / spectrum.counts.length;
  const cut = (Math.log10(xmin) - spectrum.low) / width;
  const above = spectrum.counts.reduce((sum, count, i) => sum + count * Math.min(1, Math.max(0, i + 1 - cut)), 0);
  const end = Math.max(10 ** spectrum.high, 1.01 * xmin), x = Array.from({ length: 40 }, (_, i) => xmin * (end / xmin) ** (i / 39));
  return { x, y: x.map((l) => ((above / total) * (alpha - 1) * (l / xmin) ** -alpha) / xmin) };
}

// The Marchenko–Pastur law of WᵀW, not divided by N, for all but the spikes.
function bulk({ bulk_min: low, bulk_max: high, bulk_std: std, num_spikes: spikes }, short, { total }) {
  if (!(high > 0 && std > 0)) return null;
  const from = Math.max(low, 1e-4 * high), share = Math.max(0, 1 - (spikes > 0 ? spikes / total : 0));
  const x = Array.from({ length: 200 }, (_, i) => from * (high / from) ** ((i + 0.5) / 200));
  return { x, y: x.map((l) => (share * Math.sqrt(Math.max(0, (high - l) * (l - low)))) / (2 * Math.PI * std ** 2 * short * l)) };
}

const FITTED = ["alpha", "sigma", "xmin", "bulk_min", "bulk_max", "bulk_std", "num_spikes", "erg_lambda", "detX_val_unrescaled"];

// One histogram a run, with the fit, xmin, the bulk and its edge, and the boundary of detX.
function spectrumFigure(shown, ranges) {
  const traces = [], spikes = [];
  shown.forEach(({ spectrum, fitted, short, index }) => {
    const letter = shown.length > 1 ? ` ${"AB"[index]}` : "", points = density(spectrum), color = css(RUN[index]);
    traces.push({
      x: points.x, y: points.y, mode: "markers", name: `eigenvalues${letter}`, marker: { color, size: 6, symbol: index ? "diamond" : "circle" },
      hovertemplate: "λ = %{x:.3g}, density %{y:.3g}<extra></extra>",
    });
    const lawful = (law, name, tint) => law && traces.push({ ...law, mode: "lines", name: name + letter, line: { color: tint, width: 2, dash: index ? "dash" : "solid" }, hoverinfo: "name" });
    const sigma = fitted.sigma > 0 ? ` ± ${fitted.sigma.toFixed(2)}` : "";
    lawful(tail(fitted, spectrum, points), `power law, alpha ${figure(fitted.alpha)}${sigma}`, css("xmin"));
    lawful(bulk(fitted, short, points), "Marchenko–Pastur bulk", css("bulk"));
    const upright = (at, name, tint) => at > 0 && spikes.push({
      x: [at, at], y: ranges.y.map((value) => 10 ** value), mode: "lines", name: `${name}${letter} = ${at.toPrecision(3)}`,
      line: { color: tint, width: 1.5, dash: index ? "dashdot" : "dash" }, hoverinfo: "name",
    });
    upright(fitted.xmin, "xmin", css("xmin"));
    upright(fitted.bulk_max, "Marchenko–Pastur edge", css("bulk"));
    upright(fitted.erg_lambda > 0 ? fitted.erg_lambda : fitted.detX_val_unrescaled, "detX", css("space"));
  });
  const axis = (text, range) => ({ type: "log", range, title: { text } });
  const layout = { height: shown.length > 1 ? 480 : 420, showlegend: true, xaxis: axis("eigenvalue λ", ranges.x), yaxis: axis("density ρ(λ)", ranges.y) };
  return [[...traces, ...spikes], { ...layout, hovermode: "closest" }];
}

// Axes that stand still while the slider moves: they hold all spectra but the smallest eigenvalues of the odd one.
function rangesOf(lists) {
  const all = lists.flat(), low = quantile(all.map((one) => one.low), 0.1), high = quantile(all.map((one) => one.high), 1);
  const y = all.flatMap((one) => {
    const points = density(one);
    return points.y.filter((_, i) => Math.log10(points.x[i]) >= low).map(Math.log10);
  });
  const padded = (from, to) => [from - 0.06 * (to - from) - 0.1, to + 0.06 * (to - from) + 0.1];
  return { x: padded(low, high), y: padded(quantile(y, 0), quantile(y, 1)) };
}
