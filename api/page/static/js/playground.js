// Talk to a job's model: one prompt to the base and to steps of training, side by side, each answer as it comes, with the
// scores of the job's own rewards beneath. The address says what was asked, so that a link repeats it.

import { Asking, Problem, get, post, query as queryString } from "./api.js";
import { chat } from "./chat.js";
import { fill, h, raw, redraw } from "./dom.js";
import { clock, fixed, has, number, t } from "./i18n.js";
import { copyButton, failureCard, jobName, problemCard } from "./parts.js";
import { MOST_STEPS, Serving, modelName } from "./serving.js";
import { completionText } from "./text.js";

/** Models beside the base that are asked at once. */
const MOST_TRAINED = 3;

export async function playgroundView({ id }, query, holder) {
  const [job, checkpoints] = await Promise.all([get(`/jobs/${id}`), get(`/jobs/${id}/checkpoints`)]);
  const questions = await heldOut(id);
  const steps = checkpoints.data.map((one) => `step-${one.step}`);
  const known = ["base", "trained", ...steps];
  const mayWrite = holder.scopes.includes("jobs:write");
  let asked = withQuestion(read(query, job, known), query, questions);
  /** @type {Answer[]} */
  let answers = [];
  const scoring = new Asking();
  /** Whether the address asks for an answer that nobody has had yet. */
  let isDue = Boolean(asked.prompt);
  let drawn = "";

  const state = h("div", { class: "notes", id: "serving", role: "status" });
  const prompt = h("textarea", { id: "prompt", rows: 3, required: true, maxlength: 20_000 });
  const answer = h("input", { id: "answer", type: "text", autocomplete: "off", spellcheck: "false", translate: "no" });
  const system = h("textarea", { id: "system", rows: 4, spellcheck: "false", translate: "no" });
  const seed = h("input", { id: "seed", type: "number", min: 0, max: 2 ** 31 - 1, step: 1, required: true });
  const temperature = h("input", { id: "temperature", type: "number", min: 0, max: 2, step: "any", required: true });
  const most = h("input", { id: "tokens", type: "number", min: 1, max: 8192, step: 1, required: true });
  const models = h("fieldset", { class: "plain-set talk-models" });
  const ask = h("button", { type: "submit", class: "primary", id: "ask" }, t("talk.ask"));
  const stop = h("button", { type: "button", id: "stop", onclick: () => answers.forEach((one) => one.stop()) }, t("talk.stop"));
  const link = h("span", {});
  const picker = h("select", { id: "question", onchange: () => choose(picker.value) }, h("option", { value: "" }, t("talk.own")), questions.map((one, place) => h("option", { value: String(place), translate: "no" }, one.question.slice(0, 80))));
  const columns = h("div", { class: "talk-columns" });
  const scores = h("div", { role: "status" });
  const form = h(
    "form",
    { class: "card talk-form", onsubmit: (event) => (event.preventDefault(), submit()) },
    questions.length ? labelled("question", picker) : null,
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

  function write() {
    prompt.value = asked.prompt;
    answer.value = asked.answer;
    system.value = asked.system;
    seed.value = asked.seed;
    temperature.value = asked.temperature;
    most.value = asked.tokens;
    picker.value = String(Math.max(-1, questions.findIndex((one) => one.question === asked.prompt)));
    if (!picker.value || picker.value === "-1") picker.value = "";
    drawModels();
  }

  function choose(value) {
    const one = questions[Number(value)];
    if (value === "" || !one) return;
    prompt.value = one.question;
    answer.value = one.answer;
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
      redraw(state, serving.trouble ? problemCard(serving.trouble, { again: () => serving.look() }) : null, drawState(), missing.length ? drawMissing(missing) : null);
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

  function drawMissing(missing) {
    return h("div", { class: "card warning" }, h("p", {}, t("talk.missing"), " ", missing.map((one, place) => [place ? ", " : "", label(one)])), startButton(t("talk.load"), () => serving.restart(toLoad())));
  }

  function submit() {
    asked = { ...asked, prompt: prompt.value, answer: answer.value, system: system.value, seed: Number(seed.value), temperature: Number(temperature.value), tokens: Number(most.value) };
    isDue = false;
    const address = `/talk/${id}${queryString(addressOf(asked, job))}`;
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
    await Promise.all(mine.map((one) => one.ask(bodyOf(asked, job))));
    if (mine !== answers) return;
    draw();
    const lost = mine.find((one) => one.error instanceof Problem && one.error.status === 409);
    if (lost) serving.lost();
    score(mine.filter((one) => one.text && !one.error));
  }

  function score(whole) {
    if (!whole.length || !mayWrite) return;
    if (!asked.answer.trim()) {
      fill(scores, h("p", { class: "hint" }, t("talk.unscored")));
      return;
    }
    whole.forEach((one) => one.showScores(h("p", { class: "hint" }, t("talk.scoring"))));
    scoring.ask(() => post("/graders/score", { spec: rewardsOf(job), rows: whole.map((one) => ({ item: itemOf(asked, job), model_sample: one.text })) }), {
      answered: (found) => whole.forEach((one, place) => one.showScores(drawScores(found.data[place]))),
      refused: (error) => (whole.forEach((one) => one.showScores(null)), fill(scores, problemCard(error))),
    });
  }

  write();
  draw();
  serving.look();
  return {
    element,
    go(parameters, values) {
      if (parameters.id !== id) return false;
      const next = withQuestion(read(values, job, known), values, questions);
      if (JSON.stringify(next) !== JSON.stringify(asked)) {
        asked = next;
        write();
        draw();
      }
      return true;
    },
    close() {
      answers.forEach((one) => one.stop());
      scoring.stop();
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

function drawScores(row) {
  const errors = Object.entries(row.errors);
  return [
    h("p", { class: "score" }, raw(fixed(row.reward_total, 2), { class: "reward", title: t("metric.reward") }), " ", h("span", { class: "hint" }, t("metric.reward"))),
    h("ul", { class: "rewards" }, Object.entries(row.rewards).map(([name, value]) => h("li", { class: value > 0 ? "paid" : value < 0 ? "charged" : "" }, raw(name), raw(fixed(value, 2), { class: "value" })))),
    errors.length ? h("ul", {}, errors.map(([name, error]) => h("li", {}, raw(`${name}: ${error.message}`, { lang: "en", class: "error" })))) : null,
  ];
}

/** Held-out questions with their answers, as far as the report shows them. */
async function heldOut(id) {
  const report = await get(`/page/reports/${id}`).catch(() => null);
  const samples = report?.evaluation?.samples ?? [];
  if (samples.length) return samples;
  const drawn = await get(`/jobs/${id}/rollouts${queryString({ limit: 50 })}`).catch(() => ({ data: [] }));
  const seen = new Map(drawn.data.map((one) => [one.prompt, { question: one.prompt, answer: one.answer }]));
  return [...seen.values()].slice(0, 10);
}

function read(query, job, known) {
  const models = (query.get("models") ?? "base,trained").split(",").filter((one) => known.includes(one));
  const others = models.filter((one) => one !== "base").slice(0, MOST_TRAINED);
  return {
    prompt: query.get("prompt") ?? "",
    answer: query.get("answer") ?? "",
    system: query.get("system") ?? job.spec.data.system_prompt,
    seed: numberOf(query.get("seed"), 1),
    temperature: numberOf(query.get("temperature"), 0),
    tokens: numberOf(query.get("tokens"), job.spec.sampling.max_completion_tokens),
    models: known.filter((one) => (one === "base" && models.includes(one)) || others.includes(one)),
  };
}

/** The held-out question of this number, where the address names one in place of a prompt. */
function withQuestion(asked, query, questions) {
  const one = questions[Number(query.get("question") ?? "-1")];
  return one && !asked.prompt ? { ...asked, prompt: one.question, answer: one.answer } : asked;
}

function numberOf(text, otherwise) {
  const value = Number(text);
  return text === null || text === "" || !Number.isFinite(value) ? otherwise : value;
}

/** What a link must say; the job's own system prompt is left out. */
function addressOf(asked, job) {
  return { prompt: asked.prompt, answer: asked.answer, models: asked.models.join(","), seed: asked.seed, temperature: asked.temperature, tokens: asked.tokens, ...(asked.system === job.spec.data.system_prompt ? {} : { system: asked.system }) };
}

function bodyOf(asked, job) {
  const examples = (job.spec.data.examples ?? []).flatMap((one) => [{ role: "user", content: one.question }, { role: "assistant", content: one.answer }]);
  // Without a system message the service sends the job's own.
  const isOwn = asked.system || job.spec.data.system_prompt;
  const system = isOwn ? [{ role: "system", content: asked.system }] : [];
  return { messages: [...system, ...examples, { role: "user", content: asked.prompt }], seed: asked.seed, temperature: asked.temperature, max_tokens: asked.tokens };
}

/** The job's rewards; the answer is given as such, so it is not looked for in a column. */
function rewardsOf(job) {
  const data = { ...job.spec.data };
  delete data.answer_path;
  delete data.answer_pattern;
  return { data, rewards: job.spec.rewards, ...(job.spec.sampling.response_format ? { sampling: { response_format: job.spec.sampling.response_format } } : {}) };
}

function itemOf(asked, job) {
  const { format, question_column: question, answer_column: answer } = job.spec.data;
  return { [question]: format === "messages" ? [{ role: "user", content: asked.prompt }] : asked.prompt, [answer]: asked.answer };
}
