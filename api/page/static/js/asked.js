// What is asked of a job's models: a row of its data set or a prompt of one's own, and how it is sampled. Owns the form of
// the address, of the request to a model and of the one to the graders; asks nobody itself. A row in the address is its
// part, number and the start of its SHA-256; what was changed of it stands beside it.

/** Models beside the base that are asked at once. */
export const MOST_TRAINED = 3;
const HASH = 12;

/**
 * @typedef {{row: number, sha256: string, values: Record<string, any>, messages: {role: string, content: string}[], answer: string, problem: any}} Row
 * @typedef {{part: string, row: number, hash: string}} Reference
 * @typedef {{prompt: string, answer: string, system: string, seed: number, temperature: number, tokens: number, models: string[]}} Asked
 */

/**
 * What an address asks: of a row, what it does not change is the row's.
 *
 * @param {URLSearchParams} query
 * @param {any} job
 * @param {string[]} known
 * @param {Row | null} row
 * @returns {Asked}
 */
export function read(query, job, known, row) {
  const models = (query.get("models") ?? "base,trained").split(",").filter((one) => known.includes(one));
  const others = models.filter((one) => one !== "base").slice(0, MOST_TRAINED);
  const own = row ? partsOf(row) : { prompt: "", answer: "", system: job.spec.data.system_prompt };
  return {
    prompt: query.get("prompt") ?? own.prompt,
    answer: query.get("answer") ?? own.answer,
    system: query.get("system") ?? own.system,
    seed: numberOf(query.get("seed"), 1),
    temperature: numberOf(query.get("temperature"), 0),
    tokens: numberOf(query.get("tokens"), job.spec.sampling.max_completion_tokens),
    models: known.filter((one) => (one === "base" && models.includes(one)) || others.includes(one)),
  };
}

/**
 * The row that an address names; null where it names none.
 *
 * @param {URLSearchParams} query
 * @returns {Reference | null}
 */
export function referenceIn(query) {
  const row = query.get("row");
  if (!/^\d{1,7}$/.test(row ?? "")) return null;
  return { part: query.get("part") === "held_out" ? "held_out" : "train", row: Number(row), hash: query.get("hash") ?? "" };
}

/** @returns {Reference} */
export function referenceTo(part, row) {
  return { part, row: row.row, hash: row.sha256.slice(0, HASH) };
}

/** Whether it is still the row that the address was made for. */
export function isSame(reference, row) {
  return row.sha256.startsWith(reference.hash);
}

/**
 * What a person can change of a row, as text fields hold it.
 *
 * @param {Row} row
 */
export function partsOf(row) {
  const systems = row.messages.slice(0, systemTurns(row)).map((one) => one.content);
  return { prompt: typed(row.messages.at(-1)?.content ?? ""), answer: typed(row.answer), system: typed(systems.join("\n\n")) };
}

/**
 * The names of what differs from the row.
 *
 * @param {Asked} asked
 * @param {Row} row
 */
export function changes(asked, row) {
  return Object.entries(partsOf(row)).filter(([name, text]) => asked[name] !== text).map(([name]) => name);
}

/**
 * What a link must say: the row's own texts and the job's system prompt are left out.
 *
 * @param {Asked} asked
 * @param {any} job
 * @param {Row | null} row
 * @param {string} part
 */
export function addressOf(asked, job, row, part) {
  const { prompt, answer, system } = asked;
  const changed = row ? changes(asked, row) : ["prompt", "answer", ...(system === job.spec.data.system_prompt ? [] : ["system"])];
  const texts = Object.fromEntries(Object.entries({ prompt, answer, system }).filter(([name]) => changed.includes(name)));
  return { ...(row ? referenceTo(part, row) : {}), ...texts, models: asked.models.join(","), seed: asked.seed, temperature: asked.temperature, tokens: asked.tokens };
}

/**
 * The request to a model, with the turns that training would show it.
 *
 * @param {Asked} asked
 * @param {any} job
 * @param {Row | null} row
 */
export function bodyOf(asked, job, row) {
  return { messages: sent(row ? turnsOfRow(asked, row) : ownTurns(asked, job), job), seed: asked.seed, temperature: asked.temperature, max_tokens: asked.tokens };
}

/**
 * The request to the graders, of one answer of each model; without a row, there are the question and the answer.
 *
 * @param {Asked} asked
 * @param {any} job
 * @param {Row | null} row
 * @param {string[]} texts
 */
export function scoringOf(asked, job, row, texts) {
  const { data, rewards, sampling } = job.spec;
  const changed = row ? changes(asked, row) : ["prompt", "answer"];
  const isAnswer = changed.includes("answer");
  // An answer that is typed is the answer itself: nothing is looked for in it.
  const plain = { ...data };
  delete plain.answer_path;
  delete plain.answer_pattern;
  const item = { ...(row ? row.values : {}) };
  if (changed.includes("prompt")) item[data.question_column] = data.format === "messages" ? turnsWith(item[data.question_column], asked.prompt) : asked.prompt;
  if (isAnswer) delete item[data.answer_column];
  if (isAnswer && asked.answer.trim()) item[data.answer_column] = asked.answer;
  const spec = { data: isAnswer ? plain : data, rewards, ...(sampling.response_format ? { sampling: { response_format: sampling.response_format } } : {}) };
  return { spec, rows: texts.map((text) => ({ item, model_sample: text })) };
}

function turnsWith(turns, prompt) {
  return [...(Array.isArray(turns) ? turns.slice(0, -1) : []), { role: "user", content: prompt }];
}

function turnsOfRow(asked, row) {
  const changed = changes(asked, row);
  const rest = row.messages.slice(systemTurns(row), -1);
  const last = changed.includes("prompt") ? { role: "user", content: asked.prompt } : row.messages.at(-1);
  const systems = changed.includes("system") ? [{ role: "system", content: asked.system }] : row.messages.slice(0, systemTurns(row));
  return [...systems, ...rest, last];
}

function ownTurns(asked, job) {
  const examples = (job.spec.data.examples ?? []).flatMap((one) => [{ role: "user", content: one.question }, { role: "assistant", content: one.answer }]);
  const isSystem = asked.system || job.spec.data.system_prompt;
  return [...(isSystem ? [{ role: "system", content: asked.system }] : []), ...examples, { role: "user", content: asked.prompt }];
}

/** The turns to send: to those without a system turn the service adds the job's worked examples itself. */
function sent(turns, job) {
  return turns[0].role === "system" ? turns : turns.slice(2 * (job.spec.data.examples ?? []).length);
}

function systemTurns(row) {
  const first = row.messages.findIndex((one) => one.role !== "system");
  return first < 0 ? 0 : first;
}

/** A text as a text field gives it back. */
function typed(text) {
  return text.replace(/\r\n?/g, "\n");
}

function numberOf(text, otherwise) {
  const value = Number(text);
  return text === null || text === "" || !Number.isFinite(value) ? otherwise : value;
}
