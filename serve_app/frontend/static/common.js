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
export async function ask(path, body, signal) {
  const headers = {"content-type": "application/json"};
  if ($("key").value) headers.authorization = `Bearer ${$("key").value}`;
  let response;
  try {
    response = await fetch(path, {method: body ? "POST" : "GET", headers, body, signal});
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The service cannot be reached; is it running?");
  }
  const answer = await response.json().catch(() => ({}));
  if (response.ok) return answer;
  const {message, param, error, detail} = answer;
  throw Object.assign(new Error(message ?? error?.message ?? detail?.message ?? `HTTP ${response.status}`), {
    status: response.status,
    param,
    places: Array.isArray(detail) ? detail.map(({loc, msg}) => ({place: loc.slice(1), message: msg})) : [],
  });
}
