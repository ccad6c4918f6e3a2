// Labels' probabilities for every item: POST /v1/score.

import {$, Unsendable, WEAK, ask, askEach, bars, count, element, lines, percent} from "./common.js";
import * as csv from "./csv.js";

const COLOURS = ["#2f6fed", "#e07b1a", "#1a9c6b", "#b04bd6", "#c93d54", "#0e93b5", "#8a7a14", "#6b6f7b"];
const ROWS = 200;  // rows shown at first
const STREAMED = 50;  // items from which on rows are shown as they come
const DRAWN_MS = 300;  // between two drawings of rows that come
const FIELDS = ["query", "items", "labels"];

const panel = document.querySelector("main[data-tab=score]");
const rows = panel.querySelector(".rows");
const warning = panel.querySelector(".warning");
let shown = null;

export const score = {
  path: "v1/score",

  read: () => ({
    query: $("query").value,
    items: $("items").value,
    item_first: $("item_first").checked,
    labels: $("labels").value,
    spaced: $("spaced").checked,
    softmax: $("softmax").checked,
  }),

  fill({query = "", items = "", item_first = false, labels = "", spaced = true, softmax = true}) {
    $("query").value = query;
    $("items").value = items;
    $("item_first").checked = item_first;
    $("labels").value = labels;
    $("spaced").checked = spaced;
    $("softmax").checked = softmax;
    $("sort").value = "";
  },

  fields: ({query, items, item_first, labels, apply_softmax}) => ({
    query,
    items: items.join("\n"),
    item_first,
    labels: labels.map((label) => label.trim()).join(", "),
    spaced: labels[0].startsWith(" "),
    softmax: apply_softmax,
  }),

  body({query, items, item_first, labels, spaced, softmax}, {classes}) {
    const words = written(labels, spaced);
    if (!lines(items).length || !(words.length || classes)) throw new Unsendable("Write some items and some labels.");
    const asked = {query, items: lines(items), item_first, apply_softmax: softmax};
    return classes ? asked : {...asked, labels: words, return_label_mass: true};
  },

  fit: ({classes}) => { $("words").hidden = classes > 0; },

  live: () => $("live").checked,

  async ask(path, body, signal, {asked, facts, said}) {
    const request = JSON.parse(body);
    const total = request.items.length;
    if (total < STREAMED) return ask(path, body, signal);
    const answer = {scores: Array(total).fill(null), ...(request.return_label_mass && {label_mass: Array(total).fill(null)})};
    let drawn = -Infinity;
    let done = 0;
    for await (const {index, scores, label_mass, ...end} of askEach(path, JSON.stringify({...request, stream: true}), signal)) {
      if (index === undefined) {
        Object.assign(answer, end);
        continue;
      }
      answer.scores[index] = scores;
      if (answer.label_mass) answer.label_mass[index] = label_mass;
      done++;
      if (performance.now() - drawn < DRAWN_MS) continue;
      drawn = performance.now();
      said(`${done.toLocaleString("en")} of ${count(total, "item")}`);
      prepare(asked, answer, facts);
      show();
    }
    if (!answer.usage) throw new Error("The answer ended too early; ask again.");
    return answer;
  },

  show({asked, answer, facts}, time) {
    prepare(asked, answer, facts);
    show();
    const {prompt_tokens, prompt_tokens_details: {cached_tokens}} = answer.usage;
    return `${count(shown.asked.items.length, "item")} in ${time} · ${count(prompt_tokens, "prompt token")}, ` +
      `${cached_tokens.toLocaleString("en")} cached`;
  },

  mark(error) {
    if (FIELDS.includes(error?.param)) $(error.param).setAttribute("aria-invalid", "true");
  },
};

function written(labels, spaced) {
  return labels.split(",").map((word) => word.trim()).filter(Boolean).map((word) => (spaced ? " " : "") + word);
}

function prepare(asked, answer, {classes}) {
  const words = classes ? [...Array(classes).keys()].map((number) => `class ${number}`) : written(asked.labels, asked.spaced);
  shown = {asked: {...asked, items: lines(asked.items), words}, answer, logits: classes && !asked.softmax, limit: ROWS};
}

function show() {
  const {asked, answer, limit} = shown;
  const sorts = asked.words.map((word, label) => new Option(word.trim(), label));
  const kept = $("sort").selectedOptions[0]?.text;
  $("sort").replaceChildren(new Option("given order", ""), ...sorts);
  for (const option of $("sort").options) option.selected = option.text === kept;
  const order = [...asked.items.keys()].filter((item) => answer.scores[item]);  // while they come, not all are there
  const by = $("sort").value;
  if (by !== "") order.sort((a, b) => answer.scores[b][by] - answer.scores[a][by]);
  const opened = new Set([...rows.querySelectorAll("details[open]")].map((details) => details.dataset.item));
  warn((answer.label_mass ?? []).filter((mass) => mass !== null && mass < WEAK), asked.items.length, asked.words);
  $("save").hidden = !answer.usage;
  rows.replaceChildren(...order.slice(0, limit).map((item) => row(item, opened.has(String(item)))));
  $("more").hidden = order.length <= limit;
  $("more").textContent = `Show all ${order.length.toLocaleString("en")}`;
}

/** Warn where the label mass is so low that comparing the labels means little. */
function warn(masses, items, words) {
  warning.hidden = !masses.length;
  if (!masses.length) return;
  const [least, most] = [Math.min(...masses), Math.max(...masses)].map(percent);
  const which = masses.length === items ? "The" : `For ${masses.length} of ${items} items the`;
  const space = words.some((word) => word.startsWith(" ")) ? "without" : "with";
  warning.textContent =
    `${which} labels together hold only ${least === most ? least : `${least} to ${most}`} of the probability: the model ` +
    "would say something else, and these scores compare improbable words. Try a query that asks for the labels " +
    `and ends where they begin, the model’s own chat template around it, other labels, or labels ${space} a space ` +
    "before them.";
}

function row(item, open) {
  const {asked, answer, logits} = shown;
  const made = document.createElement("li");
  const drawn = asked.words.map((word, label) => {
    const value = answer.scores[item][label];
    return {
      name: word.trim(),
      value: logits ? value.toFixed(2) : percent(value),
      share: logits ? 1 / (1 + Math.exp(-value)) : value,
      colour: COLOURS[label % COLOURS.length],
    };
  });
  const details = document.createElement("details");
  details.dataset.item = item;
  const mass = answer.label_mass?.[item];
  const summary = element("summary", "soft", "Tokens");
  summary.title = "The tokens that the model read";
  if (mass !== undefined) {
    summary.replaceChildren(element("span", mass < WEAK ? "weak" : "", `Label mass ${percent(mass)}`), " · tokens");
    summary.title = "The share of the whole vocabulary's probability that the labels have, and the tokens that the model read";
  }
  details.append(summary, element("div", "tokens"));
  details.addEventListener("toggle", () => details.open && tokens(details, asked, item));
  details.open = open;
  made.append(element("p", "item", asked.items[item]), bars(drawn), details);
  return made;
}

/** Show the tokens that the model read. */
async function tokens(details, {query, items, item_first}, item) {
  const target = details.lastChild;
  target.tabIndex = 0;
  try {
    const prompt = item_first ? items[item] + query : query + items[item];
    const {tokens, token_strs} = await ask("tokenize", JSON.stringify({prompt, model: $("model").value}));
    target.replaceChildren(...spelt(token_strs).flatMap((piece, at) => {
      const token = element("span", "", piece);
      token.title = `token ${tokens[at]}`;
      return [token, document.createElement("wbr")];
    }));
  } catch (error) {
    target.textContent = error.message;
  }
}

/** Tokens as text: most vocabularies spell bytes as letters, a space as Ġ or ▁ and a line's end as Ċ. */
function spelt(pieces) {
  const visible = (text) => text.replaceAll(/[ ▁]/g, "␣").replaceAll("\n", "⏎");
  if (!pieces.some((piece) => /[ĠĊ]/.test(piece))) return pieces.map(visible);
  return pieces.map((piece) => {
    const bytes = [...piece].map((letter) => BYTES.get(letter));
    return bytes.includes(undefined) ? piece : visible(new TextDecoder().decode(Uint8Array.from(bytes)));
  });
}

/** The letter of each byte in byte-level vocabularies: itself where it is printable, else one from U+0100 on. */
const BYTES = new Map();
for (let byte = 0, next = 256; byte < 256; byte++) {
  const printable = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
  BYTES.set(String.fromCodePoint(printable ? byte : next++), byte);
}

/** The values of a file's column, each on one line. */
function column(rows, name) {
  const at = rows[0].indexOf(name);
  return rows.slice(1).map((row) => (row[at] ?? "").replaceAll(/\s*[\r\n]+\s*/g, " ")).join("\n");
}

/** Make a column of a CSV file the items; of several columns one can choose, and `text` is chosen first. */
$("file").addEventListener("change", async () => {
  const [file] = $("file").files;
  if (!file) return;
  const rows = csv.parse(await file.text());
  const names = rows[0] ?? [];
  const take = () => {
    $("items").value = column(rows, $("column").value);
    $("items").dispatchEvent(new Event("input", {bubbles: true}));
  };
  $("column").replaceChildren(...names.map((name) => new Option(name)));
  if (names.includes("text")) $("column").value = "text";
  $("column").hidden = names.length < 2;
  $("column").onchange = take;
  if (names.length) take();
  $("file").value = "";  // the same file can be chosen again
});

/** Save the scores as they are, with the items, in their order. */
$("save").addEventListener("click", () => {
  const {asked: {items, words}, answer: {scores, label_mass}} = shown;
  const head = ["item", ...words.map((word) => word.trim()), ...(label_mass ? ["label_mass"] : [])];
  const rows = items.map((item, at) => [item, ...scores[at], ...(label_mass ? [label_mass[at]] : [])]);
  csv.save("scores.csv", csv.written([head, ...rows]));
});
$("sort").addEventListener("change", () => shown && show());
$("more").addEventListener("click", () => { shown.limit = Infinity; show(); });
