// A new job, written in steps or as JSON: model, data, reward, size, review. Both ways show and change one draft. Owns the
// frame, the check (a dry run) and the submission; each step is a module of its own.

import { Asking, get, post, specSchema, Problem } from "./api.js";
import { datasetStep } from "./dataset.js";
import { fill, h, raw, redraw as refill } from "./dom.js";
import { Draft, different, isObject, readObject } from "./draft.js";
import { Fields } from "./fields.js";
import { t } from "./i18n.js";
import { advice, busy, problemCard, toast } from "./parts.js";
import { presetStep } from "./presets.js";
import { reviewStep } from "./review.js";
import { rewardStep } from "./graders.js";
import { SECTIONS, sizeStep } from "./size.js";
import { keysOf } from "./spec.js";

const STEPS = ["model", "data", "reward", "size", "review"];
const STEP_OF = { model: "model", lora: "model", engine: "model", resources: "model", from_checkpoint: "model", data: "data", rewards: "reward", ...Object.fromEntries(SECTIONS.map((name) => [name, "size"])) };
const STEP_OF_FIELD = { "/sampling/response_format": "reward", "/evaluation/metric": "reward", "/evaluation/dataset": "data" };
const PAUSE_MS = 600;

/** What was typed when the session ended or the language was changed. */
let kept = /** @type {{owner: string, from: string | null, spec: any, text: string | null, step: string} | null} */ (null);

/**
 * What a step is given, and what it gives back.
 *
 * @typedef {{
 *   draft: Draft, fields: Fields, offers: any, holder: any, rows: any, estimate: any, costs: {currency: string | null, of: Map<string, number>}, refusal: any, resolved: any, fresh: boolean, mapped: boolean, rewarded: string, suggested: [string, any][],
 *   tryFirst: () => void, redraw: (name: string) => void, visit: (name: string) => void, changed: () => void,
 * }} Guide
 * @typedef {{element: HTMLElement, summary: () => any, update?: () => void, close?: () => void}} Step
 */

export async function newJobView(_, query, holder) {
  const [schema, offers] = await Promise.all([specSchema(), get("/page/guide")]);
  const from = query.get("from");
  const again = kept && kept.owner === holder.owner && kept.from === from ? kept : null;
  let isKept = false;
  const draft = new Draft(schema, again ? again.spec : await template(from, schema));
  const fields = new Fields(draft);
  const asking = new Asking();
  const mayWrite = holder.scopes.includes("jobs:write");
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let soon;
  let current = again?.step ?? "model";
  /** @type {HTMLTextAreaElement | null} */
  let json = null;
  /** The job that was sent and not answered: sent again it is the same one. */
  let unanswered = { text: "", key: "" };

  const guide = /** @type {Guide} */ ({ draft, fields, offers, holder, rows: null, estimate: null, costs: { currency: null, of: new Map() }, refusal: null, resolved: null, fresh: false, mapped: false, rewarded: "", suggested: [], tryFirst: () => send(false, true), redraw, visit, changed });
  const parts = { model: presetStep, data: datasetStep, reward: rewardStep, size: sizeStep, review: reviewStep };
  /** @type {Record<string, Step>} */
  const steps = {};
  const troubles = Object.fromEntries(STEPS.map((name) => [name, h("div", { class: "step-troubles" })]));

  const doors = Object.fromEntries(STEPS.map((name, index) => [name, door(name, index)]));

  const place = h("div", { class: "step-place" });
  const ways = h("nav", { class: "steps", "aria-label": t("new.steps") }, h("ol", {}, STEPS.map((name) => h("li", {}, doors[name].button))));
  const outcome = h("div", { class: "outcome", role: "status", tabindex: "-1" });
  const modes = h("div", { class: "chips", role: "group", "aria-label": t("new.mode") });
  const back = h("button", { type: "button", onclick: () => walk(-1) }, t("new.back"));
  const next = h("button", { type: "button", onclick: () => walk(1) }, t("new.next"));
  const check = h("button", { type: "button", disabled: !mayWrite, onclick: () => send(true) }, t("new.check"));
  const submit = h("button", { type: "submit", disabled: !mayWrite }, t("new.submit"));
  const bar = h("div", { class: "submit-bar" }, outcome, h("div", { class: "actions" }, back, next, h("span", { class: "gap" }), check, submit));
  const form = h("form", { novalidate: true, onsubmit: (event) => (event.preventDefault(), send(false)) }, place, bar);
  const element = h("div", { class: "new-job" }, h("div", { class: "title-row" }, h("h1", { tabindex: "-1" }, t("nav.new")), modes), h("p", { class: "hint" }, from ? t("new.from", { id: from }) : t("new.intro")), ways, form);

  draft.onchange = changed;

  function door(name, index) {
    const count = h("span", {});
    const sub = h("span", { class: "sub" });
    const button = h("button", { type: "button", data: { step: name }, onclick: () => markMistyped() || visit(name) }, h("span", { class: "step-name" }, h("i", { "aria-hidden": "true" }, raw(String(index + 1))), t(`new.step.${name}`), count), sub);
    return { button, count, sub };
  }

  /** Something of the draft is another: what was said of it may be wrong now. */
  function changed() {
    fill(outcome);
    drawWays();
    steps[current]?.update?.();
    clearTimeout(soon);
    soon = setTimeout(measure, PAUSE_MS);
  }

  /** Ask what a job of this size is, where the spec names everything that it needs. */
  function measure() {
    if (json || !mayWrite || !isReady()) return;
    asking.ask(() => post("/jobs?dry_run=true", draft.spec), { answered: measured, refused: (error) => measured({ estimate: null, spec: null, costs: [], currency: null }, error) });
  }

  /** A file that is not chosen yet, or whose columns are not mapped yet, would be refused. */
  function isReady() {
    return draft.at("/data/source") !== "upload" || (Boolean(draft.at("/data/dataset")) && !guide.fresh && !guide.mapped);
  }

  function measured({ estimate, spec, costs = [], currency = null }, error = null) {
    guide.estimate = estimate;
    guide.costs = { currency, of: new Map(costs.map((one) => [one.gpu, one.cost])) };
    guide.refusal = error;
    guide.resolved = spec;
    steps[current]?.update?.();
  }

  function drawModes() {
    const chip = (name, isThis) => h("button", { type: "button", class: "chip", data: { focus: name }, "aria-pressed": String(isThis), onclick: () => isThis || toggle() }, t(`new.${name}`));
    refill(modes, chip("guide", !json), chip("json", Boolean(json)));
  }

  function toggle() {
    if (json ? !readJson() : markMistyped()) return;
    fill(outcome);
    if (json) json = null;
    else json = h("textarea", { id: "json", class: "code", rows: 24, spellcheck: "false", "aria-label": t("new.json.label"), value: JSON.stringify(draft.spec, null, 2), oninput: readJson });
    draw();
  }

  /** Take over what stands in the JSON; false where it cannot be read, which is then said. */
  function readJson() {
    if (!json) return true;
    try {
      draft.replace(readObject(json.value || "{}", t("new.no.object")));
      json.removeAttribute("aria-invalid");
      return true;
    } catch (error) {
      json.setAttribute("aria-invalid", "true");
      fill(outcome, alarm(t("new.bad.json"), h("p", {}, raw(String(error).replace(/^\w+: /, ""), { lang: "en" }))));
      return false;
    }
  }

  function draw() {
    drawModes();
    for (const name of STEPS) {
      steps[name]?.close?.();
      delete steps[name];
    }
    fields.bound.clear();
    ways.hidden = Boolean(json);
    if (json) fill(place, h("p", { class: "hint" }, t("new.json.hint")), json);
    else {
      fill(place, STEPS.map((name) => h("section", { id: `step-${name}`, class: "step", "aria-labelledby": `step-${name}-title`, hidden: true })));
      STEPS.forEach(redraw);
    }
    visit(current, false);
  }

  /** Make a step anew from the draft. */
  function redraw(name) {
    const section = place.querySelector(`#step-${name}`);
    if (!section) return;
    steps[name]?.close?.();
    steps[name] = parts[name](guide);
    fill(section, h("h2", { id: `step-${name}-title`, tabindex: "-1" }, t(`new.step.${name}`)), h("p", { class: "hint" }, t(`new.step.${name}.hint`)), troubles[name], steps[name].element);
    if (name === current) steps[name].update?.();
  }

  function visit(name, doesFocus = true) {
    current = name;
    const at = STEPS.indexOf(name);
    if (!json) {
      for (const one of STEPS) /** @type {HTMLElement} */ (place.querySelector(`#step-${one}`)).hidden = one !== name;
      steps[name].update?.();
      measure();
    }
    back.hidden = next.hidden = Boolean(json);
    back.disabled = at === 0;
    next.hidden ||= at === STEPS.length - 1;
    next.className = "primary";
    submit.className = json || at === STEPS.length - 1 ? "primary" : "";
    drawWays();
    if (!doesFocus || json) return;
    window.scrollTo(0, 0);
    /** @type {HTMLElement} */ (place.querySelector(`#step-${name}-title`)).focus({ preventScroll: true });
  }

  function walk(steps_) {
    if (markMistyped()) return;
    visit(STEPS[STEPS.indexOf(current) + steps_]);
  }

  /** How much of a step is wrong, and how much may surprise, as it stands there. */
  function told(name) {
    const count = (selector) => place.querySelectorAll(`#step-${name} :is(${selector})`).length;
    return { errors: count("[aria-invalid=true], .step-troubles .danger"), notes: count(".field .note:not(:empty), .step-troubles .warning") };
  }

  /** What each step holds and lacks now. The buttons stay, so that a click on one is never lost. */
  function drawWays() {
    if (json) return;
    for (const name of STEPS) {
      const { errors, notes } = told(name);
      const { button, count, sub } = doors[name];
      if (name === current) button.setAttribute("aria-current", "step");
      else button.removeAttribute("aria-current");
      fill(count, errors || notes ? [raw(String(errors || notes)), h("span", { class: "sr-only" }, " ", errors ? t("new.errors", { n: errors }) : t("new.notes", { n: notes }))] : null);
      count.className = errors ? "count danger" : "count";
      fill(sub, steps[name]?.summary() ?? "");
    }
  }

  /** Check or submit the draft; as a trial, only to see whether it would learn. */
  async function send(isDry, isTrial = false) {
    clear();
    if (markMistyped() || !readJson()) return;
    const body = isTrial ? { ...draft.spec, kind: "try" } : draft.spec;
    [submit, check].forEach((button) => (button.disabled = true));
    fill(outcome, busy());
    asking.stop();
    clearTimeout(soon);
    try {
      if (isDry) accepted(await post("/jobs?dry_run=true", body));
      else {
        const answer = await post("/jobs", body, { headers: { "Idempotency-Key": keyFor(body) } });
        toast(t("new.done"));
        location.hash = `/jobs/${answer.id}`;
      }
    } catch (error) {
      refused(error);
    } finally {
      [submit, check].forEach((button) => (button.disabled = !mayWrite));
    }
  }

  function keyFor(body) {
    const text = JSON.stringify(body);
    if (unanswered.text !== text) unanswered = { text, key: crypto.randomUUID?.() ?? String(Math.random()) };
    return unanswered.key;
  }

  /** A dry run that was accepted: its warnings stand at their fields. */
  function accepted(answer) {
    measured(answer);
    const { warnings } = answer;
    for (const one of warnings) note(one);
    const list = warnings.map((one) => h("li", {}, json ? [raw(one.pointer || "/", { class: "code" }), " "] : null, advice(one), json ? null : [" ", link(stepOf(one.pointer))]));
    fill(
      outcome,
      h("div", { class: "card good" }, h("p", { class: "strong" }, t("new.valid")), warnings.length ? null : h("p", { class: "hint" }, t("new.no.warnings"))),
      warnings.length ? h("details", { class: "card warning", open: true }, h("summary", {}, t("new.warnings", { n: warnings.length })), h("ul", {}, list)) : null,
      json ? h("details", { class: "card" }, h("summary", {}, t("new.resolved")), h("pre", { class: "code", tabindex: "0", translate: "no" }, JSON.stringify(answer.spec, null, 2))) : null,
    );
    drawWays();
  }

  function link(name) {
    return name === current ? null : h("button", { type: "button", class: "quiet", onclick: () => visit(name) }, t("new.show", { step: t(`new.step.${name}`) }));
  }

  function note(one) {
    if (!json && !fields.note(one.pointer, advice(one))) troubles[stepOf(one.pointer)].append(h("div", { class: "card warning" }, advice(one)));
  }

  /** What is wrong stands at its field, and the first such field has the keyboard. */
  function refused(error) {
    const problems = error instanceof Problem ? error.errors : [];
    if (!problems.length || json) {
      fill(outcome, problemCard(error));
      outcome.focus({ preventScroll: true });
      return;
    }
    const shown = problems.map(showAt);
    const first = [...problems.keys()].sort((a, b) => STEPS.indexOf(stepOf(problems[a].pointer)) - STEPS.indexOf(stepOf(problems[b].pointer)))[0];
    const counted = STEPS.filter((name) => told(name).errors);
    fill(outcome, alarm(t("new.refused", { n: problems.length }), h("ul", {}, counted.map((name) => h("li", {}, t(`new.step.${name}`), ": ", t("new.errors", { n: told(name).errors }), " ", link(name))))));
    visit(stepOf(problems[first].pointer));
    const control = shown[first]?.control ?? troubles[stepOf(problems[first].pointer)];
    control.focus();
    control.scrollIntoView({ block: "center" });
  }

  function showAt({ pointer, detail, remedy }) {
    const name = stepOf(pointer);
    const text = `${detail}. ${remedy}`;
    const field = fields.show(pointer, text);
    if (field) return field;
    troubles[name].setAttribute("tabindex", "-1");
    troubles[name].append(h("div", { class: "card danger" }, h("p", {}, keysOf(pointer).length ? [raw(pointer, { class: "code" }), " "] : null, raw(text, { lang: "en" }))));
    return null;
  }

  function markMistyped() {
    const found = fields.mistyped();
    if (!found.length) return false;
    visit(found[0].control.closest(".step").id.slice("step-".length), false);
    fill(outcome, alarm(t("new.refused", { n: found.length })));
    found[0].control.focus();
    return true;
  }

  function clear() {
    fields.clear();
    for (const name of STEPS) fill(troubles[name]);
    drawWays();
  }

  draw();
  if (again?.text !== null && again?.text !== undefined) {
    toggle();
    /** @type {any} */ (json).value = again.text;
  }
  return {
    element,
    keep() {
      isKept = true;
      kept = { owner: holder.owner, from, spec: draft.spec, text: json ? json.value : null, step: current };
    },
    close() {
      // Left for another view: a later new job begins anew. One that never was shown leaves it to its successor.
      if (element.isConnected && !isKept) kept = null;
      clearTimeout(soon);
      asking.stop();
      for (const step of Object.values(steps)) step.close?.();
    },
  };
}

/** What another job asked for. A trial becomes the training that it was for. */
async function template(from, schema) {
  if (!from) return {};
  const job = await get(`/jobs/${from}`);
  const asked = isObject(job.requested_spec) ? job.requested_spec : different(schema, job.spec);
  return Object.fromEntries(Object.entries(asked).filter(([name]) => !["kind", "trial"].includes(name)));
}

function stepOf(pointer) {
  const [section] = keysOf(pointer);
  return STEP_OF_FIELD[pointer] ?? STEP_OF[section] ?? "review";
}

/** Why nothing was sent, or the guide not shown. */
function alarm(title, ...rest) {
  return h("div", { class: "card danger", role: "alert" }, h("p", { class: "strong" }, title), ...rest);
}
