// A request as JSON, as a curl command and as Python.

const WIDTH = 100;  // of a line of JSON, at most, where a list or an object can be broken

/** JSON text that stands for itself. */
export class Raw {
  constructor(text) {
    this.text = text;
  }
}

/**
 * JSON text of a value. A Map is an object whose entries keep their order: a plain object would move names such as
 * "10" to its beginning.
 */
export function json(value, indent = "") {
  if (value instanceof Raw) return value.text;
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  const deeper = `${indent}  `;
  const parts = Array.isArray(value)
    ? value.map((each) => json(each, deeper))
    : [...(value instanceof Map ? value : Object.entries(value))]
      .map(([name, each]) => `${JSON.stringify(name)}: ${json(each, deeper)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const line = open + parts.join(", ") + close;
  if (indent.length + line.length <= WIDTH && !line.includes("\n")) return line;
  return `${open}\n${deeper}${parts.join(`,\n${deeper}`)}\n${indent}${close}`;
}

export function curl(url, body, locked) {
  const key = locked ? ' \\\n  -H "Authorization: Bearer $SCORE_SERVE_API_KEY"' : "";
  return `curl ${quoted(url)} -H 'Content-Type: application/json'${key} -d ${quoted(body)}`;
}

/** A word of a shell command. */
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

export function python(url, body, locked) {
  const key = locked ? `    headers={"Authorization": f"Bearer {os.environ['SCORE_SERVE_API_KEY']}"},\n` : "";
  const imports = locked ? "import os\n\nimport httpx" : "import httpx";
  const value = literal(body).replaceAll("\n", "\n    ");
  return `${imports}\n\nanswer = httpx.post(\n    ${JSON.stringify(url)},\n${key}    json=${value},\n    timeout=60,\n)\n` +
    "answer.raise_for_status()\nprint(answer.json())\n";
}

const NAMES = {true: "True", false: "False", null: "None"};

/** JSON text as Python. Strings are written anew: Python does not know every escape of JSON's. */
function literal(text) {
  return text.replaceAll(/"(?:[^"\\]|\\.)*"|true|false|null/g, (part) => NAMES[part] ?? JSON.stringify(JSON.parse(part)));
}
