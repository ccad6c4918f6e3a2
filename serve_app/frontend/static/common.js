// What the tabs share: elements, figures, and the service.

/** Below this label mass the model would say something else than the labels. */
export const WEAK = 0.01;

export const $ = (id) => document.getElementById(id);

export function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

/** A copy of what a template of the page holds. */
export const copied = (template) => $(template).content.firstElementChild.cloneNode(true);

export const count = (number, what) => `${number.toLocaleString("en")} ${what}${number === 1 ? "" : "s"}`;

export function percent(share) {
  if (share > 0 && share < 0.00001) return "<0.001%";
  return share === 0 || share >= 0.0005 ? `${(100 * share).toFixed(1)}%` : `${(100 * share).toPrecision(1)}%`;
}

export const lines = (text) => text.split("\n").filter((line) => line.trim());

/** A list of bars: for each a name, what stands behind it, its share of the width, and a colour or class. */
export function bars(rows) {
  const list = document.createElement("dl");
  for (const {name, value, share, colour, top} of rows) {
    const bar = element("div", "bar");
    const filled = bar.appendChild(element("div", top ? "top" : ""));
    filled.style.width = `${100 * share}%`;
    if (colour) filled.style.background = colour;
    const label = element("dt", "", name);
    label.title = name;
    list.append(label, bar, element("dd", "", value));
  }
  return list;
}

/** A form that cannot be sent as it is: what is missing or wrong, and the field, if one is. */
export class Unsendable extends Error {
  constructor(message, field) {
    super(message);
    this.field = field;
  }
}

/** Return the service's answer, or throw its error. The body is JSON text. */
export const ask = async (path, body, signal) => (await reached(path, body, signal)).json().catch(() => ({}));

/** Yield the lines of a streamed answer, each as its value; an error among them is thrown. */
export async function* askEach(path, body, signal) {
  const reader = (await reached(path, body, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let {value, done} = await reader.read(); !done; {value, done} = await reader.read()) {
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const read = JSON.parse(line);
      if (read.object === "error") throw Object.assign(new Error(read.message), {status: read.code, places: []});
      yield read;
    }
  }
}

async function reached(path, body, signal) {
  const headers = {"content-type": "application/json"};
  if ($("key").value) headers.authorization = `Bearer ${$("key").value}`;
  let response;
  try {
    response = await fetch(path, {method: body ? "POST" : "GET", headers, body, signal});
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The service cannot be reached; is it running?");
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({}));
  const {message, param, error, detail} = answer;
  throw Object.assign(new Error(message ?? error?.message ?? detail?.message ?? `HTTP ${response.status}`), {
    status: response.status,
    param,
    places: Array.isArray(detail) ? detail.map(({loc, msg}) => ({place: loc.slice(1), message: msg})) : [],
  });
}
