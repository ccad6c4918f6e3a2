// Typed questions about a state: POST /v1/systemone.

import {$, Unsendable, bars, copied, count, element, percent} from "./common.js";
import {Raw} from "./snippets.js";

const LOW = 0.5;  // label mass; below it the model would rather say something else
const MOST_BARS = 12;  // of a question, before the rest is folded away
const ADD = {choice: "Add an option", score: "Add a level"};

const panel = document.querySelector("main[data-tab=decide]");
const list = $("questions");
const within = (card, name) => card.querySelector(`.${name}`);

export const decide = {
  path: "v1/systemone",

  read: () => ({
    state: $("state").value,
    permutations: $("permutations").value,
    questions: [...list.children].map((card) => ({
      id: within(card, "id").value,
      type: within(card, "type").value,
      instructions: within(card, "instructions").value,
      yes: within(card, "yes").value,
      no: within(card, "no").value,
      options: options(card).map((row) => [within(row, "name").value, within(row, "description").value]),
    })),
  }),

  fill({state = "", permutations = 1, questions = []}) {
    $("state").value = state;
    $("permutations").value = permutations;
    list.replaceChildren(...questions.map(question));
    number();
  },

  fields: ({state, questions, permutations}) => ({
    state: typeof state === "string" ? state : JSON.stringify(state, null, 2),
    permutations,
    questions: Object.entries(questions).map(([id, {type, instructions, criteria}]) => ({
      id,
      type,
      instructions,
      yes: type === "noul" ? criteria?.true : "",
      no: type === "noul" ? criteria?.false : "",
      options: type === "choice" ? Object.entries(criteria) : type === "score" ? criteria.map((level) => [level, ""]) : [],
    })),
  }),

  body({state, permutations, questions}) {
    if (!questions.length) throw new Unsendable("Add a question.");
    const names = questions.map(({id}) => id);
    const twice = names.findIndex((id, at) => names.indexOf(id) < at);
    if (twice >= 0) throw wrong(twice, "id", `Two questions are called ${names[twice]}; give each a name of its own.`);
    return {
      state: isJson(state) ? new Raw(state.trim()) : state,
      questions: new Map(questions.map((question, at) => [question.id, typed(question, at)])),
      ...(permutations !== "1" && {permutations: new Raw(permutations || "null")}),
      on_error: "item",  // a question without an answer leaves the others theirs
    };
  },

  live: () => false,

  show({asked, answer}, time) {
    panel.querySelector(".rows").replaceChildren(...asked.questions.map((question) => answered(question, answer.answers[question.id])));
    const {usage: {input_tokens}, x_cached_tokens: cached} = answer;
    return `${count(asked.questions.length, "question")} in ${time} · ${count(input_tokens, "input token")}` +
      (cached === undefined ? "" : `, ${cached.toLocaleString("en")} cached`);
  },

  /** Put each message beside what it is about. */
  mark(error) {
    for (const card of list.children) within(card, "error").hidden = true;
    for (const {place: [field, id, ...inside], message} of error?.places ?? []) {
      if (field !== "questions") {
        $(field)?.setAttribute("aria-invalid", "true");
        continue;
      }
      const card = [...list.children].find((each) => within(each, "id").value === id);
      if (!card) continue;
      const said = within(card, "error");
      said.textContent = message;
      said.hidden = false;
      const wrong = about(card, inside);
      wrong.setAttribute("aria-invalid", "true");
      wrong.focus();
    }
  },
};

/** The part of a question's card that a place in the question is about. */
function about(card, [field, part]) {
  if (field === "type") return within(card, "type");
  if (field !== "criteria") return within(card, "instructions");
  if (within(card, "type").value === "noul") return within(card, part === "false" ? "no" : "yes");
  const rows = options(card).filter((row) => within(row, "name").value.trim());
  const row = rows.find((each) => within(each, "name").value === part) ?? rows[part];
  return row ? within(row, "name") : within(card, "add");
}

/** Whether a state is sent as the JSON that it is. Any other text is sent as text, a number too. */
function isJson(text) {
  if (!/^\s*[[{]/.test(text)) return false;
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}

const wrong = (at, name, message) => new Unsendable(message, within(list.children[at], name));

/** The question as the route takes it. */
function typed({type, instructions, yes, no, options}, at) {
  const made = {type, ...(instructions && {instructions})};
  if (type === "noul") return yes || no ? {...made, criteria: {...(yes && {true: yes}), ...(no && {false: no})}} : made;
  const named = options.filter(([name]) => name.trim());
  if (type === "score") return {...made, criteria: named.map(([name]) => name)};
  const criteria = new Map(named.map(([name, description]) => [name, description || null]));
  if (criteria.size < named.length) throw wrong(at, "options input", "Two options have one name; give each its own.");
  return {...made, criteria};
}

// The cards

const options = (card) => [...within(card, "options").children];

function question({id, type = "noul", instructions, yes, no, options: given = []}) {
  const card = copied("question");
  const values = {id, type, instructions, yes, no};
  for (const [name, value] of Object.entries(values)) within(card, name).value = value ?? "";
  within(card, "options").append(...given.map(option));
  return card;
}

function option([name, description] = []) {
  const row = copied("option");
  within(row, "name").value = name ?? "";
  within(row, "description").value = description ?? "";
  return row;
}

/** Say to each part of the cards which it is. */
function number() {
  const cards = [...list.children];
  for (const [at, card] of cards.entries()) {
    const type = within(card, "type").value;
    card.dataset.type = type;
    card.ariaLabel = `Question ${at + 1}`;
    for (const [what, title] of [["up", "Move up"], ["down", "Move down"], ["remove", "Remove"]]) {
      const button = card.querySelector(`[data-do=${what}]`);
      button.ariaLabel = `${title}: question ${at + 1}`;
      button.disabled = (what === "up" && at === 0) || (what === "down" && at === cards.length - 1);
    }
    within(card, "add").textContent = ADD[type] ?? "";
    for (const [place, row] of options(card).entries()) {
      const called = type === "score" ? `Level ${place}` : `Option ${place + 1}`;
      within(row, "name").ariaLabel = called;
      within(row, "name").placeholder = called.toLowerCase();
      within(row, "description").ariaLabel = `${called}, description`;
      row.querySelector("button").ariaLabel = `Remove ${called.toLowerCase()}`;
    }
  }
  $("kind").textContent = isJson($("state").value) ? "sent as JSON" : "sent as text";
}

/** The cards were changed by a button: say so as a field does. */
function changed() {
  number();
  list.dispatchEvent(new Event("input", {bubbles: true}));
}

function add(type) {
  const taken = new Set([...list.children].map((card) => within(card, "id").value));
  let free = list.children.length + 1;
  while (taken.has(`question_${free}`)) free++;
  const card = question({id: `question_${free}`, type, options: type === "noul" ? [] : [[], []]});
  list.append(card);
  changed();
  within(card, "instructions").focus();
}

const MOVES = {
  up: (card) => card.previousElementSibling?.before(card),
  down: (card) => card.nextElementSibling?.after(card),
};

list.addEventListener("click", ({target}) => {
  const what = target.dataset?.do;
  if (!what) return;
  const card = target.closest(".card");
  const row = target.closest(".options > li");
  let next = target;
  if (what === "add") next = within(after(card, null), "name");
  else if (what === "drop") next = gone(row) ? within(gone(row), "name") : within(card, "add");
  else if (what === "remove") next = gone(card) ? within(gone(card), "id") : panel.querySelector("[data-add]");
  else MOVES[what](card);
  if (what === "drop") row.remove();
  if (what === "remove") card.remove();
  changed();
  if (next.disabled) next = card.querySelector(`[data-do=${what === "up" ? "down" : "up"}]`);
  next.focus();
});

/** What is beside a thing that goes away. */
const gone = (thing) => thing.nextElementSibling ?? thing.previousElementSibling;

/** Add an option after another, or as the last. */
function after(card, row, values) {
  const made = option(values);
  if (row) row.after(made);
  else within(card, "options").append(made);
  return made;
}

list.addEventListener("change", ({target}) => {
  if (!target.classList.contains("type")) return;
  const card = target.closest(".card");
  while (target.value !== "noul" && options(card).length < 2) after(card, null);
  changed();
});

// Enter goes on to the next option, and makes one after the last; a pasted list becomes options.
list.addEventListener("keydown", (event) => {
  const row = event.target.closest(".options > li");
  if (event.key !== "Enter" || event.ctrlKey || event.metaKey || event.isComposing || event.target.tagName !== "INPUT" || !row) return;
  event.preventDefault();
  within(row.nextElementSibling ?? after(row.closest(".card"), row), "name").focus();
  changed();
});
list.addEventListener("paste", (event) => {
  const row = event.target.closest(".options > li");
  const [first, ...rest] = event.clipboardData.getData("text").split(/\r?\n/).map((line) => line.trim()).filter(Boolean);
  if (!row || !event.target.classList.contains("name") || !rest.length) return;
  event.preventDefault();
  event.target.setRangeText(first, event.target.selectionStart, event.target.selectionEnd, "end");
  const last = rest.reduce((before, name) => after(row.closest(".card"), before, [name]), row);
  within(last, "name").focus();
  changed();
});
$("state").addEventListener("input", number);
panel.addEventListener("click", ({target}) => target.dataset?.add && add(target.dataset.add));

// The answers

function answered(question, answer) {
  const row = document.createElement("li");
  const head = element("div", "row");
  head.append(element("h3", "", question.id), element("span", "outcome end", outcome(answer)));
  row.append(head, element("p", "soft", question.instructions));
  if (answer.type === "error") {
    row.append(element("p", "refused", answer.x_error.message));
    return row;
  }
  const drawn = probabilities(question, answer)
    .map(([name, share]) => ({name, share, value: percent(share)}));
  const most = Math.max(...drawn.map(({share}) => share));
  for (const bar of drawn) bar.top = bar.share === most;
  if (drawn.length > MOST_BARS) row.append(...folded(drawn));
  else row.append(bars(drawn));
  row.append(element("p", "soft note", facts(answer)));
  if (answer.x_label_mass < LOW) {
    row.append(element("p", "low", "Low label mass: the model would rather say something else. Try other words for the question."));
  }
  return row;
}

/** Each answer's name and probability, in the order of the form. */
function probabilities({type, options}, {noul, probabilities}) {
  if (type === "noul") return [["yes", noul], ["no", 1 - noul]];
  const names = options.map(([name]) => name).filter((name) => name.trim());
  return names.map((name, level) => [name, probabilities[type === "score" ? level : name]]);
}

function outcome({type, noul, choice, score, probabilities}) {
  if (type === "error") return "no answer";
  if (type === "noul") return noul < 0.5 ? "no" : "yes";
  return type === "choice" ? choice : `${score.toFixed(2)} of ${Object.keys(probabilities).length - 1}`;
}

function facts({confidence, x_label_mass: mass, x_permutations: orders}) {
  return [
    confidence !== undefined && `confidence ${percent(confidence)}`,
    mass !== undefined && `label mass ${percent(mass)}`,
    orders > 1 && `${orders} orders`,
  ].filter(Boolean).join(" · ");
}

/** The most probable first, and the rest behind a line. */
function folded(drawn) {
  const sorted = drawn.toSorted((a, b) => b.share - a.share);
  const rest = document.createElement("details");
  rest.append(element("summary", "soft", `${sorted.length - MOST_BARS} more options`), bars(sorted.slice(MOST_BARS)));
  return [bars(sorted.slice(0, MOST_BARS)), rest];
}
