// Talk to a job's model: one prompt to the base and to steps of training, side by side, each answer as it comes, with the
// scores of the job's own rewards beneath. The address says what was asked, so that a link repeats it.

import { Asking, Problem, get, post, query as queryString } from "./api.js";
import { MOST_TRAINED, addressOf, bodyOf, changes, isSame, partsOf, read, referenceIn, scoringOf } from "./asked.js";
import { chat } from "./chat.js";
import { fill, h, raw, redraw } from "./dom.js";
import { clock, fixed, has, number, t } from "./i18n.js";
import { copyButton, failureCard, jobName, problemCard } from "./parts.js";
import { RowPicker, recorded, rowOf } from "./rowpicker.js";
import { MOST_STEPS, Serving, modelName } from "./serving.js";
import { completionText } from "./text.js";

/** @typedef {{part: string, row: any, trouble: HTMLElement | null, recalled: {question: string, answer: string} | null}} Source */

export async function playgroundView({ id }, query, holder) {
  const [job, checkpoints, first] = await Promise.all([get(`/jobs/${id}`), get(`/jobs/${id}/checkpoints`), sourceIn(id, query)]);
  const steps = checkpoints.data.map((one) => `step-${one.step}`);
  const known = ["base", "trained", ...steps];
  const mayWrite = holder.scopes.includes("jobs:write");
  /** Where the prompt is from: a row of the data set, or nowhere. */
  /** @type {Source} */
  let source = first;
  let asked = readAddress(query);
  /** @type {Answer[]} */
  let answers = [];
  const scoring = new Asking();
  const opening = new Asking();
  /** Whether the address asks for an answer that nobody has had yet. */
  let isDue = Boolean(asked.prompt);
  let drawn = "";

  const state = h("div", { class: "notes", id: "serving", role: "status" });
  const prompt = h("textarea", { id: "prompt", rows: 3, required: true, translate: "no", oninput: () => drawEdited() });
  const answer = h("textarea", { id: "answer", rows: 1, autocomplete: "off", spellcheck: "false", translate: "no", oninput: () => drawEdited() });
  const system = h("textarea", { id: "system", rows: 4, spellcheck: "false", translate: "no", oninput: () => drawEdited() });
  const seed = h("input", { id: "seed", type: "number", min: 0, max: 2 ** 31 - 1, step: 1, required: true });
  const temperature = h("input", { id: "temperature", type: "number", min: 0, max: 2, step: "any", required: true });
  const most = h("input", { id: "tokens", type: "number", min: 1, max: 8192, step: 1, required: true });
  const models = h("fieldset", { class: "plain-set talk-models" });
  const ask = h("button", { type: "submit", class: "primary", id: "ask" }, t("talk.ask"));
  const stop = h("button", { type: "button", id: "stop", onclick: () => answers.forEach((one) => one.stop()) }, t("talk.stop"));
  const link = h("span", {});
  const picker = new RowPicker(id, {
    chosen: (part, row) => take({ part, row, trouble: null, recalled: null }),
    recalled: (question, right) => take({ part: "own", row: null, trouble: null, recalled: { question, answer: right } }),
    own: () => take({ part: "own", row: null, trouble: null, recalled: null }, { keeps: true }),
  });
  const from = h("div", { class: "talk-source", role: "status" });
  const editedNote = h("span", {});
  const columns = h("div", { class: "talk-columns" });
  const scores = h("div", { role: "status" });
  const form = h(
    "form",
    { class: "card talk-form", onsubmit: (event) => (event.preventDefault(), submit()) },
    picker.element,
    from,
    labelled("prompt", prompt),
    labelled("answer", answer, t("talk.answer.hint")),
    models,
    h("details", { class: "advanced" }, h("summary", {}, t("talk.more")), h("div", { class: "fields" }, h("div", { class: "wide" }, labelled("system", system)), labelled("temperature", temperature), labelled("seed", seed), labelled("tokens", most))),
    h("div", { class: "actions" }, ask, stop, link),
  );
  const element = h("div", { class: "talk" }, h("p", { class: "crumbs" }, h("a", { href: `#/jobs/${id}` }, raw(jobName(job)))), h("h1", { tabindex: "-1" }, t("talk.title")), state, form, columns, scores);
  const serving = new Serving(id, draw);

  function labelled(name, control, hint = null) {
    if (hint) control.setAttribute("aria-describedby", `${name}-hint`);
    return h("div", { class: "field" }, h("label", { for: name }, t(`talk.${name}`)), control, hint ? h("p", { class: "hint", id: `${name}-hint` }, hint) : null);
  }

  function readAddress(values) {
    const { row, recalled } = source;
    const found = read(values, job, known, row);
    return row || !recalled || found.prompt ? found : { ...found, prompt: recalled.question, answer: recalled.answer };
  }

  function write() {
    prompt.value = asked.prompt;
    answer.value = asked.answer;
    system.value = asked.system;
    seed.value = asked.seed;
    temperature.value = asked.temperature;
    most.value = asked.tokens;
    picker.turnTo(source.row ? source.part : "own", { place: source.row ? source.row.row : -1 });
    drawSource();
    drawModels();
  }

  /** Ask this row, or a prompt of one's own, which begins with what was there. */
  function take(next, { keeps = false } = {}) {
    const was = source.row;
    source = next;
    const own = next.row ? partsOf(next.row) : next.recalled ? { prompt: next.recalled.question, answer: next.recalled.answer } : {};
    if (!keeps) Object.assign(own, { system: own.system ?? job.spec.data.system_prompt });
    else if (was && system.value === partsOf(was).system) own.system = job.spec.data.system_prompt;
    prompt.value = own.prompt ?? prompt.value;
    answer.value = own.answer ?? answer.value;
    system.value = own.system ?? system.value;
    drawSource();
  }

  /** What of the row is not in the fields: its number, earlier turns, other columns. */
  function drawSource() {
    const { row, part, trouble } = source;
    if (!row) {
      redraw(from, trouble);
      return;
    }
    drawEdited();
    const { question_column: question, answer_column: right } = job.spec.data;
    const others = Object.entries(row.values).filter(([name]) => name !== question && name !== right);
    const before = row.messages.slice(0, -1).filter((one) => one.role !== "system");
    redraw(
      from,
      trouble,
      h("p", { class: "hint" }, t(`talk.from.${part}`, { n: row.row + 1 }), " ", editedNote),
      before.length ? h("details", { class: "advanced" }, h("summary", {}, t("talk.before", { n: before.length })), before.map(({ role, content }) => h("div", { class: `turn ${role}` }, h("span", { class: "sub" }, t(`role.${role}`)), raw(content, { class: "said" })))) : null,
      others.length ? h("details", { class: "advanced" }, h("summary", {}, t("talk.columns", { n: others.length })), h("dl", { class: "row-columns" }, others.map(([name, value]) => [h("dt", {}, raw(name)), h("dd", {}, raw(typeof value === "string" ? value : JSON.stringify(value)))]))) : null,
    );
  }

  /** Whether the fields still say what the row says. */
  function drawEdited() {
    editedNote.textContent = source.row && changes({ ...asked, ...typedNow() }, source.row).length ? t("talk.from.edited") : "";
  }

  function typedNow() {
    return { prompt: prompt.value, answer: answer.value, system: system.value };
  }

  function drawModels() {
    const trained = asked.models.filter((one) => one !== "base").length;
    redraw(
      models,
      h("legend", {}, t("talk.models")),
      h(
        "div",
        { class: "chips" },
        known.map((which) => {
          const isOn = asked.models.includes(which);
          const isFull = !isOn && which !== "base" && trained >= MOST_TRAINED;
          return h("label", { class: "talk-model" }, h("input", { type: "checkbox", name: which, data: { focus: which }, checked: isOn, disabled: isFull, onchange: () => toggle(which) }), label(which));
        }),
      ),
    );
  }

  function toggle(which) {
    asked.models = known.filter((one) => (one === which) !== asked.models.includes(one));
    drawModels();
    draw();
  }

  function label(which) {
    return which === "base" || which === "trained" ? t(`talk.${which}`) : t("talk.step", { step: number(Number(which.slice(5))) });
  }

  /** The steps to load: those that are asked for, then the last ones. */
  function toLoad() {
    const chosen = asked.models.filter((one) => one.startsWith("step-"));
    const others = steps.filter((one) => !chosen.includes(one)).slice(-(MOST_STEPS - chosen.length) || undefined);
    return [...chosen, ...(chosen.length < MOST_STEPS ? others : [])].map((one) => Number(one.slice(5))).sort((a, b) => a - b);
  }

  function draw() {
    const missing = serving.state === "ready" ? asked.models.filter((one) => !serving.models.has(modelName(id, one))) : [];
    const isBusy = answers.some((one) => one.isOpen);
    ask.disabled = serving.state !== "ready" || isBusy || !asked.models.length;
    stop.disabled = !isBusy;
    const mark = JSON.stringify([serving.state, serving.record?.status, serving.record?.phase, serving.record?.waiting, serving.ends, missing, serving.reason, String(serving.trouble)]);
    if (mark !== drawn) {
      drawn = mark;
      redraw(state, serving.trouble ? problemCard(serving.trouble, { again: () => serving.look() }) : null, drawState(), missing.length ? drawUnloaded(missing) : null);
    }
    if (isDue && serving.state === "ready") {
      isDue = false;
      run();
    }
  }

  function startButton(text, start) {
    return mayWrite ? h("button", { type: "button", class: "primary", id: "serve", data: { focus: "serve" }, onclick: start }, text) : h("p", { class: "hint" }, t("talk.read.only"));
  }

  function drawState() {
    const { record } = serving;
    const start = () => serving.start(toLoad());
    if (serving.state === "off") return h("div", { class: "card" }, h("p", { class: "strong" }, t("talk.off")), h("p", { class: "hint" }, t("talk.off.hint")), startButton(t("talk.start"), start));
    if (serving.state === "starting") return h("div", { class: "card", "aria-busy": "true" }, h("p", { class: "strong" }, t("talk.starting")), h("p", {}, where(record), record ? [" ", h("a", { href: `#/jobs/${record.id}` }, t("talk.serving.job"))] : null));
    if (serving.state === "ready") return h("p", { class: "ready" }, t("talk.ready"), serving.ends ? [" ", t("talk.until"), " ", clock(serving.ends)] : null, record ? [" ", h("a", { href: `#/jobs/${record.id}` }, t("talk.serving.job"))] : null);
    if (serving.state === "ended") return h("div", { class: "card warning" }, h("p", { class: "strong" }, t("talk.ended")), record?.error ? failureCard(record.error) : h("p", {}, whyEnded(serving.reason)), startButton(t("talk.again"), start));
    return h("p", { class: "hint" }, t("busy"));
  }

  /** What keeps a model that is asked for from answering. */
  function where(record) {
    if (!record) return t("talk.asked");
    if (record.status !== "queued") return record.phase ? t(`phase.${record.phase}`) : t(`status.${record.status}`);
    const waiting = record.waiting;
    if (!waiting) return t("wait.turn");
    if (!waiting.workers) return t(`wait.${waiting.reason}`);
    return t(waiting.ahead ? "tile.waiting.ahead" : "tile.waiting.next", { jobs: waiting.ahead, n: waiting.workers });
  }

  function drawUnloaded(missing) {
    return h("div", { class: "card warning" }, h("p", {}, t("talk.missing"), " ", missing.map((one, place) => [place ? ", " : "", label(one)])), startButton(t("talk.load"), () => serving.restart(toLoad())));
  }

  function submit() {
    asked = { ...asked, ...typedNow(), seed: Number(seed.value), temperature: Number(temperature.value), tokens: Number(most.value) };
    isDue = false;
    const address = `/talk/${id}${queryString(addressOf(asked, job, source.row, source.part))}`;
    if (location.hash !== `#${address}`) location.hash = address;
    run();
  }

  async function run() {
    answers.forEach((one) => one.stop());
    scoring.stop();
    fill(scores);
    answers = asked.models.filter((one) => serving.models.has(modelName(id, one))).map((which) => new Answer(modelName(id, which), label(which)));
    fill(columns, answers.map((one) => one.element));
    fill(link, copyButton(location.href, t("talk.link")));
    draw();
    const mine = answers;
    const { row } = source;
    const body = bodyOf(asked, job, row);
    const scored = (whole) => scoringOf(asked, job, row, whole.map((one) => one.text));
    await Promise.all(mine.map((one) => one.ask(body)));
    if (mine !== answers) return;
    draw();
    const lost = mine.find((one) => one.error instanceof Problem && one.error.status === 409);
    if (lost) serving.lost();
    const whole = mine.filter((one) => one.text && !one.error);
    if (whole.length) score(whole, scored(whole), Boolean(row));
  }

  /** What the job's graders pay; `isRow`: with all columns of a row, as in training. */
  function score(whole, request, isRow) {
    if (!mayWrite) {
      fill(scores, h("p", { class: "hint" }, t("talk.scores.read.only")));
      return;
    }
    whole.forEach((one) => one.showScores(h("p", { class: "hint" }, t("talk.scoring"))));
    scoring.ask(() => post("/graders/score", request), {
      answered: (found) => (whole.forEach((one, place) => one.showScores(drawScores(found.data[place], isRow))), fill(scores, drawMissing(found, isRow))),
      refused: (error) => (whole.forEach((one) => one.showScores(null)), fill(scores, needsAnswer(error) ? h("p", { class: "hint" }, t("talk.unscored")) : problemCard(error))),
    });
  }

  /** Show what another address asks; its row is read first, unless it is there. */
  function open(values) {
    const wanted = referenceIn(values);
    const isHere = wanted ? source.row && source.part === wanted.part && source.row.row === wanted.row && isSame(wanted, source.row) : !source.row && !values.has("question");
    opening.ask(async () => (isHere ? source : sourceIn(id, values)), {
      answered: (found) => {
        source = found;
        const next = readAddress(values);
        if (isHere && JSON.stringify(next) === JSON.stringify(asked)) return;
        asked = next;
        write();
        draw();
      },
      refused: (error) => fill(from, problemCard(error)),
    });
  }

  write();
  draw();
  serving.look();
  return {
    element,
    go(parameters, values) {
      if (parameters.id !== id) return false;
      open(values);
      return true;
    },
    close() {
      answers.forEach((one) => one.stop());
      scoring.stop();
      opening.stop();
      picker.close();
      serving.close();
    },
  };
}

/** Why a model is no longer served: in the reader's language where that is known. */
function whyEnded(reason) {
  if (!reason) return t("talk.ended.hint");
  return has(`talk.ended.${reason.reason}`) ? t(`talk.ended.${reason.reason}`) : raw(reason.message, { lang: "en" });
}

/** One column: a model's answer. */
class Answer {
  constructor(model, label) {
    this.model = model;
    this.text = "";
    /** @type {unknown} */
    this.error = null;
    this.isOpen = true;
    this.aborting = new AbortController();
    this.body = h("div", { class: "completion", translate: "no" });
    this.facts = h("p", { class: "hint", role: "status" });
    this.scores = h("div", { class: "talk-scores" });
    this.element = h("section", { class: "card talk-answer", "aria-label": label, "aria-busy": "true" }, h("h2", {}, label), this.facts, this.body, this.scores);
  }

  async ask(body) {
    const began = performance.now();
    this.facts.textContent = t("talk.waiting");
    try {
      const { first, finish } = await chat({ ...body, model: this.model }, { signal: this.aborting.signal, take: (text) => this.take(text, began) });
      fill(this.body, completionText(this.text));
      this.say(first, performance.now() - began, finish);
    } catch (error) {
      if (this.aborting.signal.aborted) this.facts.textContent = t("talk.stopped");
      else {
        this.error = error;
        fill(this.facts);
        this.body.after(problemCard(error));
      }
    } finally {
      this.isOpen = false;
      this.element.removeAttribute("aria-busy");
    }
  }

  take(text, began) {
    if (!this.text) this.facts.textContent = t("talk.first", { seconds: fixed((performance.now() - began) / 1000, 2) });
    this.text += text;
    this.body.append(text);
  }

  say(first, took, finish) {
    this.facts.textContent = first === null ? t("talk.nothing") : t("talk.took", { first: fixed(first / 1000, 2), seconds: fixed(took / 1000, 2) });
    if (finish === "length") this.facts.append(" · ", h("span", { class: "cut" }, t("finish.length")));
  }

  showScores(content) {
    fill(this.scores, content);
  }

  stop() {
    this.aborting.abort();
  }
}

/** What each grader paid for one answer; one whose columns the prompt does not have is left open. */
function drawScores(row, isRow) {
  const open = isRow ? new Set() : new Set(Object.keys(row.missing_columns).map((name) => name.split(".")[0]));
  const errors = Object.entries(row.errors).filter(([name]) => !open.has(name.split(".")[0]));
  const total = open.size ? null : row.reward_total;
  const line = ([name, value]) => h("li", { class: open.has(name) || value === null ? "" : value > 0 ? "paid" : value < 0 ? "charged" : "" }, raw(name), raw(fixed(open.has(name) ? null : value, 2), { class: "value" }));
  return [
    h("p", { class: "score" }, raw(fixed(total, 2), { class: "reward", title: t("metric.reward") }), " ", h("span", { class: "hint" }, t("metric.reward"))),
    h("ul", { class: "rewards" }, Object.entries(row.rewards).map(line)),
    errors.length ? h("ul", {}, errors.map(([name, error]) => h("li", {}, raw(`${name}: ${error.message}`, { lang: "en", class: "error" })))) : null,
  ];
}

/** Which graders say nothing of these answers, why, and what to do. */
function drawMissing(found, isRow) {
  const missing = isRow ? [] : Object.entries(found.data[0].missing_columns);
  if (!missing.length && !found.unavailable.length) return null;
  return h(
    "div",
    { class: "card warning", id: "unscored" },
    missing.length ? [h("p", { class: "strong" }, t("talk.missing.columns")), h("ul", {}, missing.map(([name, columns]) => h("li", {}, raw(name, { class: "code" }), ": ", columns.map((one, place) => [place ? ", " : "", raw(one, { class: "code" })])))), h("p", {}, t("talk.missing.remedy"))] : null,
    found.unavailable.length ? h("ul", {}, found.unavailable.map((one) => h("li", {}, raw(one.grader, { class: "code" }), " ", raw(`${one.message} ${one.remedy}`, { lang: "en" })))) : null,
  );
}

/** Whether a request for scores was refused only because there is no right answer to compare with. */
function needsAnswer(error) {
  return error instanceof Problem && error.errors.length > 0 && error.errors.every((one) => one.code === "no_value");
}

/**
 * Where an address has its prompt from. An address of an earlier release has the question and the answer themselves.
 *
 * @param {string} id
 * @param {URLSearchParams} query
 * @returns {Promise<Source>}
 */
async function sourceIn(id, query) {
  const recalled = await questionWith(id, query);
  const reference = recalled ? { part: "held_out", row: recalled.row, hash: "" } : referenceIn(query);
  if (!reference) return { part: "own", row: null, trouble: null, recalled: null };
  const { row, unavailable } = await rowOf(id, reference);
  // A question of the report whose row cannot be read, or is another by now.
  if (recalled && row?.messages.at(-1).content !== recalled.question) return { part: "own", row: null, trouble: null, recalled };
  const trouble = row ? (isSame(reference, row) ? null : troubleCard(t("talk.row.changed", { n: row.row + 1 }))) : troubleCard(t("talk.row.gone", { n: reference.row + 1 }), unavailable);
  return { part: row ? reference.part : "own", row, trouble, recalled: null };
}

/** @param {any} [why] */
function troubleCard(text, why) {
  return h("div", { class: "card warning", id: "row-trouble" }, h("p", { class: "strong" }, text), why ? h("p", {}, raw(`${why.detail}. ${why.remedy}`, { lang: "en" })) : null);
}

/** The held-out question of this number in the report, where the address names one in place of a prompt. */
async function questionWith(id, query) {
  if (!query.has("question") || query.has("prompt")) return null;
  return (await recorded(id, "held_out"))[Number(query.get("question"))] ?? null;
}
