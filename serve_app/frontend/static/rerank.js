// Documents by their relevance to a query: POST /v1/rerank.

import {$, Unsendable, bars, count, element, lines} from "./common.js";

const FIELDS = {query: "wanted", documents: "documents"};

const panel = document.querySelector("main[data-tab=rerank]");

export const rerank = {
  path: "v1/rerank",
  read: () => ({query: $("wanted").value, documents: $("documents").value}),

  fill({query = "", documents = ""}) {
    $("wanted").value = query;
    $("documents").value = documents;
  },

  fields: ({query, documents}) => ({query, documents: documents.join("\n")}),

  body({query, documents}) {
    if (!lines(documents).length) throw new Unsendable("Write some documents.");
    return {query, documents: lines(documents)};
  },

  live: () => false,

  show({asked, answer}, time) {
    const texts = lines(asked.documents);
    const {warnings} = answer.meta;
    const warning = panel.querySelector(".warning");
    warning.hidden = !warnings;
    warning.textContent = (warnings ?? []).join(" ");
    panel.querySelector(".rows").replaceChildren(...answer.results.map(({index, relevance_score}) => {
      const row = document.createElement("li");
      const bar = {name: `document ${index + 1}`, value: relevance_score.toFixed(4), share: relevance_score, top: true};
      row.append(element("p", "item", texts[index]), bars([bar]));
      return row;
    }));
    return `${count(texts.length, "document")} in ${time} · ${count(answer.usage.prompt_tokens, "prompt token")}, ` +
      `${answer.usage.prompt_tokens_details.cached_tokens.toLocaleString("en")} cached`;
  },

  mark(error) {
    if (Object.hasOwn(FIELDS, error?.param)) $(FIELDS[error.param]).setAttribute("aria-invalid", "true");
  },
};
