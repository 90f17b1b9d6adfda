// One answer of a model, as it comes: a request for a streamed chat completion and the reading of its lines.

import { Problem, Unreachable } from "./api.js";

/**
 * Ask, calling `take` with each piece. Resolves to the milliseconds to the first piece and why it ended.
 *
 * @param {object} body
 * @param {{signal: AbortSignal, take: (text: string) => void}} how
 * @returns {Promise<{first: number | null, finish: string | null}>}
 */
export async function chat(body, { signal, take }) {
  const began = performance.now();
  /** @type {number | null} */
  let first = null;
  /** @type {string | null} */
  let finish = null;
  const answer = await send(body, signal);
  for await (const line of lines(answer)) {
    if (!line.startsWith("data:")) continue;
    const text = line.slice(5).trim();
    if (text === "[DONE]") break;
    const part = JSON.parse(text);
    if (part.error) throw refusal(500, part);
    const [choice] = part.choices ?? [];
    if (choice?.delta?.content) {
      first ??= performance.now() - began;
      take(choice.delta.content);
    }
    finish = choice?.finish_reason ?? finish;
  }
  return { first, finish };
}

async function send(body, signal) {
  let answer;
  try {
    answer = await fetch("/v1/chat/completions", { method: "POST", signal, credentials: "same-origin", cache: "no-store", headers: { "Content-Type": "application/json", Accept: "text/event-stream, application/json", "X-GRPO-Page": "1" }, body: JSON.stringify({ ...body, stream: true }) });
  } catch (error) {
    throw signal.aborted ? error : new Unreachable(String(error));
  }
  if (answer.ok) return answer;
  throw refusal(answer.status, await answer.json().catch(() => null), Number(answer.headers.get("Retry-After")) || null);
}

/**
 * OpenAI's error object as a problem.
 *
 * @param {number} status
 * @param {any} document
 * @param {number | null} [retryAfter]
 */
function refusal(status, document, retryAfter = null) {
  const error = document?.error;
  return new Problem(status, error ? { detail: error.message, code: error.code ?? error.type } : document, retryAfter);
}

async function* lines(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    held += value;
    const found = held.split(/\r?\n/);
    held = found.pop() ?? "";
    yield* found;
  }
  if (held) yield held;
}
