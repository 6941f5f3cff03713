"use strict";
// Blocks of numbers: base64, deflated, quantised; decoded when they are first asked for, and kept.

const $ = (selector, root = document) => root.querySelector(selector);

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

async function inflated(name) {
  const node = document.getElementById(`block-${name}`);
  const text = atob(node.textContent);
  node.remove();
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const textOf = async (name) => new TextDecoder().decode(await inflated(name));

function joined(bytes, from, count) {
  const codes = new Uint16Array(count);
  for (let i = 0; i < count; i++) codes[i] = bytes[from + i] | (bytes[from + count + i] << 8);
  return codes;
}

function restored(bytes, how) {
  const [layers, columns] = how.shape;
  const codes = joined(bytes, 0, layers * columns);
  const values = new Float32Array(layers * columns);
  for (let row = 0; row < layers; row++) {
    let code = 0;
    for (let i = row * columns; i < (row + 1) * columns; i++) {
      code = (code + codes[i]) & 65535;
      const y = how.low + how.step * (code - 1);
      values[i] = code === 0 ? NaN : how.scale ? how.scale * Math.sinh(y) : y;
    }
  }
  return values;
}

const decoded = new Map();
const once = (key, work) => {
  if (!decoded.has(key)) decoded.set(key, work());
  return decoded.get(key);
};

// One metric of a run: {values, columns}, or null where the run has it not; `row(index)` is one layer's.
function metricOf(run, name) {
  if (!Object.hasOwn(run.metrics, name)) return Promise.resolve(null);
  const how = run.metrics[name];
  return once(how.block, async () => {
    const values = restored(await inflated(how.block), how);
    const columns = run.columns[how.columns];
    return { values, columns, row: (index) => values.subarray(index * columns.length, (index + 1) * columns.length) };
  });
}

const CHUNK = 64;

// The histograms of one layer of a run, one a snapshot that has them: {column, low, high, zeros, counts}.
async function spectraOf(run, index) {
  if (!run.bins || index === undefined) return [];
  const chunk = Math.floor(index / CHUNK), size = Math.min(CHUNK, run.layers.length - chunk * CHUNK);
  const bytes = await once(`${run.prefix}esd-${chunk}`, () => inflated(`${run.prefix}esd-${chunk}`));
  const columns = run.columns.spectra, cells = size * columns.length, place = (index % CHUNK) * columns.length;
  const floats = new Float32Array(bytes.buffer, 0, 3 * cells);
  const used = joined(bytes, 12 * cells, cells);
  const from = 14 * cells, all = cells * run.bins;
  return columns.flatMap((column, number) => {
    const at = place + number;
    if (!used[at]) return [];
    const counts = Array.from({ length: used[at] }, (_, bin) => {
      const i = from + at * run.bins + bin;
      return bytes[i] | (bytes[i + all] << 8);
    });
    return [{ column, low: floats[at], high: floats[cells + at], zeros: floats[2 * cells + at], counts }];
  });
}

// The place in an ascending list of the last number up to `wanted`; -1 where all are larger.
function upTo(list, wanted) {
  let low = 0, high = list.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (list[middle] <= wanted) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

function nearest(list, wanted) {
  const at = Math.max(0, upTo(list, wanted));
  return at + 1 < list.length && list[at + 1] - wanted < wanted - list[at] ? at + 1 : at;
}

function figure(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(1);
  return Number.isInteger(value) || size >= 1000 ? Math.round(value).toLocaleString("en") : value.toFixed(size >= 100 ? 1 : digits - 1);
}
