// Requests to the service. The session is a cookie that scripts cannot read; no key is ever kept here.

export class Problem extends Error {
  constructor(status, document, retryAfter) {
    super(document?.detail ?? String(status));
    this.status = status;
    this.code = document?.code ?? "internal";
    this.errors = document?.errors ?? [];
    this.requestId = document?.request_id ?? "";
    this.retryAfter = retryAfter;
  }
}

export class Unreachable extends Error {}

let onLoggedOut = () => {};

/** What to do when the session is over. */
export function whenLoggedOut(call) {
  onLoggedOut = call;
}

/**
 * @param {string} path
 * @param {{method?: string, body?: any, type?: string, headers?: Record<string, string>, quiet?: boolean}} [how]
 */
export async function request(path, { method = "GET", body, type = "application/json", headers = {}, quiet = false } = {}) {
  /** @type {RequestInit & {headers: Record<string, string>}} */
  const options = { method, headers: { Accept: "application/json", ...headers }, credentials: "same-origin", cache: "no-store" };
  if (method !== "GET") options.headers["X-GRPO-Page"] = "1";
  if (body !== undefined) {
    options.headers["Content-Type"] = type;
    options.body = type === "application/json" && typeof body !== "string" ? JSON.stringify(body) : body;
  }
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    throw new Unreachable(String(error));
  }
  if (answer.ok) return answer.status === 204 ? null : answer.json();
  const problem = new Problem(answer.status, await answer.json().catch(() => null), Number(answer.headers.get("Retry-After")) || null);
  if (problem.status === 401 && !quiet) onLoggedOut();
  throw problem;
}

/**
 * Send a file, and say how much of it was sent: `fetch` does not.
 *
 * @param {string} path
 * @param {Blob} body
 * @param {{type: string, progress: (sent: number, all: number) => void, signal: AbortSignal}} how
 */
export function upload(path, body, { type, progress, signal }) {
  return new Promise((resolve, reject) => {
    const asked = new XMLHttpRequest();
    asked.open("POST", path);
    asked.setRequestHeader("Accept", "application/json");
    asked.setRequestHeader("X-GRPO-Page", "1");
    asked.setRequestHeader("Content-Type", type);
    asked.upload.addEventListener("progress", (event) => progress(event.loaded, body.size));
    asked.addEventListener("load", () => {
      const answer = parsed(asked.responseText);
      if (asked.status >= 200 && asked.status < 300) resolve(answer);
      else {
        if (asked.status === 401) onLoggedOut();
        reject(new Problem(asked.status, answer, Number(asked.getResponseHeader("Retry-After")) || null));
      }
    });
    asked.addEventListener("error", () => reject(new Unreachable("the connection broke")));
    asked.addEventListener("abort", () => reject(new Unreachable("it was stopped")));
    signal.addEventListener("abort", () => asked.abort());
    asked.send(body);
  });
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

export const get = (path) => request(path);
/** @type {(path: string, body?: any, how?: object) => Promise<any>} */
export const post = (path, body, options = {}) => request(path, { method: "POST", body, ...options });

export const logIn = (key) => post("/session", { key }, { quiet: true });
export const logOut = () => request("/session", { method: "DELETE" });
export const who = () => request("/session", { quiet: true });

/** Asks one thing at a time: where something else was asked meanwhile, an answer or problem is told to nobody. */
export class Asking {
  turn = 0;

  async ask(question, { answered, refused }) {
    const mine = (this.turn += 1);
    try {
      const answer = await question();
      if (mine === this.turn) answered(answer);
    } catch (error) {
      if (mine === this.turn) refused(error);
    }
  }

  stop() {
    this.turn += 1;
  }
}

/** The first `pages` pages of a list, as one. */
export async function pagesOf(path, values, pages) {
  let answer = await get(`${path}${query(values)}`);
  const data = [...answer.data];
  for (let page = 1; page < pages && answer.next_cursor; page += 1) {
    answer = await get(`${path}${query({ ...values, cursor: answer.next_cursor })}`);
    data.push(...answer.data);
  }
  return { ...answer, data };
}

/** A query string of the values that are set. */
export function query(values) {
  const pairs = new URLSearchParams();
  for (const [name, value] of Object.entries(values)) {
    for (const one of Array.isArray(value) ? value : [value]) {
      if (one !== "" && one !== null && one !== undefined) pairs.append(name, one);
    }
  }
  const text = pairs.toString();
  return text ? `?${text}` : "";
}

/** @type {any} */
let schema = null;

/** The job spec's JSON Schema, asked for once. */
export async function specSchema() {
  schema ??= await get("/schema/job");
  return schema;
}
