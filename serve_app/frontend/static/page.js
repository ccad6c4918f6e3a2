// The tabs: what they send, what comes back, and the address that leads back to a filled form.

import {$, Unsendable, ask, copied, element} from "./common.js";
import {decide} from "./decide.js";
import {rerank} from "./rerank.js";
import {score} from "./score.js";
import {curl, json, python} from "./snippets.js";

/**
 * Each tab's form. `read` returns what its fields hold, `fill` puts it back, and `fields` makes it of a request; `body`
 * makes the request of it or throws Unsendable; `fit` shows the fields that a model needs; `live` says whether the form
 * is sent while one types; `show` shows an answer and returns what the status says; `mark` marks the fields that an
 * error is about. A form may have an `ask` of its own, which shows rows as they come.
 */
const FORMS = {decide, score, rerank};
const PAUSE_MS = 250;  // pause in typing before the form is scored, or the address written
const LONGEST = 100_000;  // characters of an address, at most, that holds a form

let current;  // the name of the tab that is shown
let facts = {};  // of the chosen model
let greeting;
const running = {};
const opened = new Set();
const EXAMPLES = await (await fetch("static/examples.json")).json();  // requests, by tab and title

const panel = (name) => document.querySelector(`main[data-tab=${name}]`);
const within = (name, selector) => panel(name).querySelector(selector);

/** The chosen model; none is before the service has told their names. */
const model = () => ($("model").value ? {model: $("model").value} : {});

/** JSON text of the request that a form's fields make. */
const request = (name, asked) => json({...model(), ...FORMS[name].body(asked, facts)});

async function send(name) {
  await greeting;
  running[name]?.abort();
  const {signal} = running[name] = new AbortController();
  const rows = within(name, ".rows");
  remember(name);
  try {
    const asked = FORMS[name].read();
    const body = request(name, asked);
    rows.ariaBusy = "true";
    const started = performance.now();
    const said = (text) => { within(name, ".status").textContent = text; };
    const answer = await (FORMS[name].ask ?? ask)(FORMS[name].path, body, signal, {asked, facts, said});
    const milliseconds = performance.now() - started;
    fail(name, null);
    within(name, ".status").textContent = FORMS[name].show({asked, answer, facts}, `${milliseconds.toFixed(0)} ms`);
  } catch (error) {
    if (signal.aborted) return;
    fail(name, error);
  }
  rows.ariaBusy = "false";
}

function fail(name, error) {
  for (const field of panel(name).querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
  const waits = error instanceof Unsendable && !error.field;  // nothing is wrong: something is still to be written
  const shown = within(name, "section .error");
  shown.hidden = !error || waits;
  FORMS[name].mark(error);
  if (!error) return;
  const warning = within(name, "section > .warning");
  if (warning) warning.hidden = true;
  within(name, ".status").textContent = waits ? error.message : "";
  shown.textContent = error.message;
  error.field?.setAttribute("aria-invalid", "true");
  error.field?.focus();
  if (error.status === 401) {
    $("locked").hidden = false;
    $("key").focus();
  }
}

/** Put the form into the address, and the request into the snippets. */
function remember(name) {
  const asked = FORMS[name].read();
  const packed = pack(JSON.stringify({...model(), ...asked}));
  if (name === current) history.replaceState(null, "", packed.length > LONGEST ? `#${name}` : `#${name}=${packed}`);
  const url = new URL(FORMS[name].path, location.href.split("#")[0]).href;
  const locked = !$("locked").hidden || $("key").value !== "";
  for (const [language, written] of [["curl", curl], ["python", python]]) {
    within(name, `pre.${language}`).textContent = attempt(() => written(url, request(name, asked), locked));
  }
}

/** A text, or why there is none. */
function attempt(made) {
  try {
    return made();
  } catch (error) {
    if (error instanceof Unsendable) return error.message;
    throw error;
  }
}

/** Text in characters that an address takes as they are. */
function pack(text) {
  const bytes = new TextEncoder().encode(text);
  let letters = "";
  for (const byte of bytes) letters += String.fromCharCode(byte);
  return btoa(letters).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

function unpack(packed) {
  const letters = atob(packed.replaceAll("-", "+").replaceAll("_", "/"));
  return new TextDecoder().decode(Uint8Array.from(letters, (letter) => letter.charCodeAt(0)));
}

/** Show the tab that the address names, with the form that it holds, if it holds one. */
async function follow() {
  const [name, packed] = location.hash.slice(1).split("=");
  const saved = packed && saidBy(packed);
  if (saved?.model) greeting = greet(saved.model);
  await greeting;
  current = Object.hasOwn(FORMS, name) ? name : facts.classes ? "score" : "decide";
  for (const each of Object.keys(FORMS)) {
    panel(each).hidden = each !== current;
    document.querySelector(`nav a[href="#${each}"]`).ariaCurrent = each === current ? "page" : null;
  }
  try {
    if (saved) return fill(current, saved);
  } catch {}  // an address that something else has written
  if (opened.has(current)) remember(current);
  else fill(current, FORMS[current].fields(Object.values(EXAMPLES[current])[0]));
}

/** The form that an address holds, or undefined: it may have been cut short. */
function saidBy(packed) {
  try {
    return JSON.parse(unpack(packed));
  } catch {
    return undefined;
  }
}

function fill(name, saved) {
  FORMS[name].fill(saved);
  opened.add(name);
  send(name);
}

/** Fetch the models' names and the chosen model's facts, and show the fields that this model needs. */
async function greet(model) {
  try {
    if (!$("model").value) $("model").append(...(await ask("v1/models")).data.map(({id}) => new Option(id)));
    if (model && [...$("model").options].some((option) => option.value === model)) $("model").value = model;
    facts = await ask(`v1/info?model=${encodeURIComponent($("model").value)}`);
    for (const form of Object.values(FORMS)) form.fit?.(facts);
    $("facts").textContent = `${facts.dtype} · ${facts.context_length.toLocaleString("en")} tokens`;
  } catch (error) {
    fail(current ?? "decide", error);
  }
}

/** Copy a text; without the clipboard, which browsers give to secure pages only, by a selection. */
async function copy(text, button) {
  if (navigator.clipboard) await navigator.clipboard.writeText(text);
  else {
    const held = document.body.appendChild(element("textarea", ""));
    held.value = text;
    held.select();
    document.execCommand("copy");
    held.remove();
    button.focus();
  }
  const {textContent} = button;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = textContent; }, 1500);
}

for (const [name, form] of Object.entries(FORMS)) {
  const field = within(name, "form");
  for (const [title, example] of Object.entries(EXAMPLES[name])) {
    const button = element("button", "", title);
    button.type = "button";
    button.addEventListener("click", () => fill(name, form.fields(example)));
    within(name, ".examples").append(button);
  }
  within(name, "section").append(copied("snippets"));
  let pause;
  field.addEventListener("input", () => {
    clearTimeout(pause);
    pause = setTimeout(() => (form.live() ? send(name) : remember(name)), PAUSE_MS);
  });
  field.addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(pause);
    if (!facts.model) greeting = greet();
    send(name);
  });
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) field.requestSubmit();
  });
  panel(name).addEventListener("click", ({target}) => {
    const what = target.dataset?.copy;
    if (!what) return;
    remember(name);
    copy(what === "link" ? location.href : within(name, `pre.${what}`).textContent, target);
  });
}
$("locked").addEventListener("submit", (event) => {
  event.preventDefault();
  greeting = greet();
  send(current);
});
$("key").addEventListener("input", () => sessionStorage.setItem("key", $("key").value));
$("model").addEventListener("change", () => {
  greeting = greet();
  greeting.then(() => remember(current));
});
addEventListener("hashchange", follow);
$("key").value = sessionStorage.getItem("key") ?? "";
greeting = greet();
follow();
