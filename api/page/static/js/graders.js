// The step of the reward: the recipe's five, and graders by kind, each in words; below them the rows to try them on.

import { fill, h, raw } from "./dom.js";
import { isObject } from "./draft.js";
import { advanced, choice } from "./fields.js";
import { t } from "./i18n.js";
import { tryPanel } from "./scoring.js";
import { isSame } from "./spec.js";
import { columnTemplate } from "./suggestions.js";

const FIVE = ["correctness", "integer", "strict_format", "soft_format", "xml_count"];
const TEXT = "{{sample.output_text}}";
const NAME = /^[a-z][a-z0-9_]{0,31}$/;
const SOURCE = `def grade(sample, item):
    text = sample["output_text"]
    return 1.0 if len(text.split()) < 50 else 0.0
`;

/** Each kind that can be added: what it is called at first, what it begins as, and the fields it has in words. */
const KINDS = {
  string_check: { name: "exact", begin: (reference) => ({ type: "string_check", input: TEXT, reference, operation: "eq" }), fields: ["operation", "reference"] },
  math: { name: "number", begin: (reference) => ({ type: "math", input: TEXT, reference }), fields: ["reference"] },
  regex: { name: "pattern", begin: () => ({ type: "regex", input: TEXT, pattern: "(?s)<answer>.+</answer>", match: "search" }), fields: ["pattern", "match"] },
  json_schema: { name: "json", begin: () => ({ type: "json_schema", input: TEXT, schema: { type: "object", properties: { answer: { type: "string" } }, required: ["answer"] } }), fields: ["schema"] },
  length: { name: "length", begin: () => ({ type: "length", input: TEXT, unit: "words", maximum: 50, falloff: 20 }), fields: ["unit", "minimum", "maximum", "falloff"] },
  text_similarity: { name: "similar", begin: (reference) => ({ type: "text_similarity", input: TEXT, reference, evaluation_metric: "fuzzy_match" }), fields: ["evaluation_metric", "reference"] },
  python: { name: "code", begin: () => ({ type: "python", source: SOURCE }), fields: ["source"] },
  score_model: { name: "judge", begin: (_, judge) => ({ type: "score_model", model: judge, input: [{ role: "user", content: t("grader.judge.prompt") }], range: [0, 1] }), fields: ["model", "question"] },
};
const CHOICES = {
  operation: ["eq", "like", "ilike", "ne"],
  match: ["search", "full"],
  unit: ["words", "characters", "lines"],
  evaluation_metric: ["fuzzy_match", "bleu", "gleu", "rouge_1", "rouge_2", "rouge_l"],
};

/** @returns {import("./newjob.js").Step} */
export function rewardStep(guide) {
  const { draft, fields } = guide;
  const list = h("div", { class: "graders" });
  const add = h("div", { class: "chips", role: "group", "aria-label": t("grader.add") });
  const five = h("div", {});
  const trial = tryPanel(guide);
  const element = h(
    "div",
    {},
    guide.suggested.some(([pointer]) => pointer === "/rewards") ? h("p", { class: "hint" }, t("reward.suggested")) : null,
    list,
    h("div", { class: "card add-grader" }, h("p", { class: "strong" }, t("grader.add")), add, guide.offers.judges.length ? null : h("p", { class: "hint" }, t("grader.no.judge"))),
    five,
    trial.element,
    advanced(t("new.advanced"), fields.field("/rewards/formula"), fields.field("/evaluation/metric"), fields.field("/sampling/response_format"), fields.field("/rewards/mode"), fields.all("/rewards", ["/rewards/formula", "/rewards/mode", "/rewards/graders", "/rewards/weights"])),
  );

  const kinds = Object.entries(KINDS).filter(([type]) => type !== "score_model" || guide.offers.judges.length);
  fill(add, kinds.map(([type, kind]) => h("button", { type: "button", class: "chip", onclick: () => begin(type, kind) }, t(`kind.${type}`))));

  function begin(type, kind) {
    const taken = new Set([...draft.graderNames(), ...FIVE]);
    let name = kind.name;
    for (let count = 2; taken.has(name); count += 1) name = `${kind.name}_${count}`;
    draft.set(`/rewards/graders/${name}`, kind.begin(columnTemplate(draft.value("/data/answer_column")), guide.offers.judges[0]));
    draw();
    /** @type {HTMLElement | null} */ (list.querySelector("section:last-child .fields :is(select, input, textarea)"))?.focus();
  }

  function draw() {
    fields.forget("/rewards/graders");
    fields.forget("/rewards/weights");
    const graders = draft.at("/rewards/graders");
    fill(list, isObject(graders) ? Object.keys(graders).map(card) : null);
    fill(five, recipe());
    trial.update();
  }

  function card(name) {
    const pointer = `/rewards/graders/${name}`;
    const grader = draft.at(pointer);
    const kind = isObject(grader) && Object.hasOwn(KINDS, grader.type) ? KINDS[grader.type] : undefined;
    const title = kind ? t(`kind.${grader.type}`) : t("kind.other");
    const remove = h("button", { type: "button", class: "quiet", "aria-label": t("grader.remove.of", { name }), onclick: () => drop(name) }, t("grader.remove"));
    return h(
      "section",
      { class: "card grader", "aria-label": `${title} ${name}`, translate: null },
      h("div", { class: "title-row" }, h("h3", {}, title), remove),
      kind ? h("p", { class: "hint" }, t(`kind.${grader.type}.hint`)) : null,
      h("div", { class: "fields" }, named(name), kind ? kind.fields.map((key) => graderField(pointer, key, grader)) : null, draft.at("/rewards/formula") ? null : weight(name)),
      details(!kind, t("grader.more"), grader?.input !== undefined && typeof grader.input === "string" ? input(pointer, grader) : null, whole(pointer, grader)),
    );
  }

  function details(isOpen, title, ...children) {
    const element_ = advanced(title, ...children);
    element_.toggleAttribute("open", isOpen);
    return element_;
  }

  function named(name) {
    const id = `grader-name-${name}`;
    const trouble = h("p", { class: "error", id: `${id}-error` });
    const control = h("input", { type: "text", id, value: name, spellcheck: "false", autocomplete: "off", "aria-describedby": `${id}-error`, onchange: () => rename(name, control, trouble) });
    return h("div", { class: "field" }, h("label", { for: id }, t("grader.name")), control, trouble);
  }

  /** Under another name it keeps its place, its weight and its limits. */
  function rename(name, control, trouble) {
    const to = control.value.trim();
    if (to === name) return;
    if (!NAME.test(to) || FIVE.includes(to) || draft.graderNames().includes(to)) {
      control.setAttribute("aria-invalid", "true");
      fill(trouble, t(NAME.test(to) ? "grader.name.taken" : "grader.name.bad"));
      return;
    }
    for (const part of ["graders", "weights", "limits"]) {
      const all = draft.at(`/rewards/${part}`);
      if (isObject(all) && name in all) draft.set(`/rewards/${part}`, Object.fromEntries(Object.entries(all).map(([key, value]) => [key === name ? to : key, value])));
    }
    draw();
  }

  function drop(name) {
    for (const part of ["graders", "weights", "limits"]) draft.remove(`/rewards/${part}/${name}`);
    draw();
    add.querySelector("button")?.focus();
  }

  function weight(name) {
    const pointer = `/rewards/weights/${name}`;
    const control = h("input", { type: "number", step: "any", min: -100, max: 100, value: draft.value(pointer) });
    return fields.bind(pointer, { control, label: t("grader.weight"), hint: t("grader.weight.hint"), read: () => (control.value === "" ? 1 : Number(control.value)) });
  }

  function input(pointer, grader) {
    const control = h("input", { type: "text", value: grader.input, spellcheck: "false", translate: "no" });
    return fields.bind(`${pointer}/input`, { control, label: t("grader.input"), hint: t("grader.input.hint"), write: (value) => draft.set(`${pointer}/input`, value) });
  }

  /** The grader as the spec has it, with what the fields above do not show. */
  function whole(pointer, grader) {
    const control = h("textarea", { class: "code", rows: 6, spellcheck: "false", value: JSON.stringify(grader, null, 2), translate: "no" });
    control.addEventListener("change", draw);
    return fields.bind(pointer, { control, label: t("grader.json"), isWide: true, read: () => parsed(control.value), write: (value) => isObject(value) && draft.set(pointer, value) });
  }

  function graderField(grader, key, value) {
    const pointer = `${grader}/${key}`;
    const label = t(`grader.${key}`);
    const write = (given) => draft.set(pointer, given);
    if (key === "reference") return reference(pointer, value.reference);
    if (key === "model") return fields.bind(pointer, { control: choice(guide.offers.judges.map((judge) => [judge, judge, { translate: "no" }]), value.model), label, write });
    if (key === "question") return question(grader, value);
    if (CHOICES[key]) return fields.bind(pointer, { control: choice(CHOICES[key].map((one) => [one, t(`grader.${key}.${one}`)]), value[key]), label, write });
    if (key === "schema") {
      const control = h("textarea", { class: "code", rows: 8, spellcheck: "false", value: JSON.stringify(value.schema, null, 2), translate: "no" });
      return fields.bind(pointer, { control, label, hint: t("grader.schema.hint"), isWide: true, read: () => parsed(control.value), write });
    }
    if (key === "source") return fields.bind(pointer, { control: h("textarea", { class: "code", rows: 8, spellcheck: "false", value: value.source ?? "", translate: "no" }), label, hint: t("grader.source.hint"), isWide: true, write });
    if (key === "pattern") return fields.bind(pointer, { control: h("input", { type: "text", class: "code", value: value.pattern ?? "", spellcheck: "false", autocomplete: "off" }), label, hint: t("grader.pattern.hint"), write });
    const control = h("input", { type: "number", min: 0, step: 1, value: value[key] ?? "", placeholder: t("field.none") });
    return fields.bind(pointer, { control, label, read: () => (control.value === "" ? null : Number(control.value)), write: (given) => (given === null ? draft.remove(pointer) : draft.set(pointer, given)) });
  }

  /** What a completion is compared with: a column, or a text of one's own with columns in it. */
  function reference(pointer, value) {
    const names = (guide.rows?.columns ?? []).map((one) => one.name);
    const known = names.map((name) => [columnTemplate(name), name, { translate: "no" }]);
    const write = (given) => draft.set(pointer, given);
    const bound = (control) => fields.bind(pointer, { control, label: t("grader.reference"), hint: t("grader.reference.hint"), write });
    const text = () => bound(h("input", { type: "text", value: value ?? "", spellcheck: "false", translate: "no" }));
    if (!known.some(([template]) => template === value)) return text();
    const select = choice([...known, ["", t("grader.reference.other")]], value);
    const place = h("div", {});
    fill(place, fields.bind(pointer, { control: select, label: t("grader.reference"), hint: t("grader.reference.hint"), write: (given) => (given ? write(given) : (fill(place, text()), place.querySelector("input")?.focus())) }));
    return place;
  }

  /** What a judge is asked: its last turn. */
  function question(grader, value) {
    const last = (Array.isArray(value.input) ? value.input.length : 1) - 1;
    const pointer = `${grader}/input/${last}/content`;
    const content = value.input?.[last]?.content;
    const control = h("textarea", { rows: 5, value: typeof content === "string" ? content : "", translate: "no" });
    return fields.bind(pointer, { control, label: t("grader.question"), hint: t("grader.question.hint"), isWide: true, write: (given) => draft.set(`${grader}/input`, value.input.map((one, place) => (place === last ? { ...one, content: given } : one))) });
  }

  function recipe() {
    const isOn = FIVE.some((name) => draft.value(`/rewards/weights/${name}`) !== 0);
    const box = h("input", { type: "checkbox", id: "five", checked: isOn, onchange: () => turn(box.checked) });
    const weights = FIVE.map((name) => fields.field(`/rewards/weights/${name}`));
    return h(
      "div",
      { class: "card recipe" },
      h("div", { class: "check" }, box, h("div", {}, h("label", { for: "five", class: "strong" }, t("reward.five")), h("p", { class: "hint" }, t("reward.five.hint")))),
      isOn && !draft.at("/rewards/formula") ? advanced(t("reward.five.weights"), weights) : null,
    );
  }

  function turn(isOn) {
    const preset = draft.preset("/rewards/weights/correctness");
    for (const name of FIVE) {
      if (isOn === (preset !== 0)) draft.remove(`/rewards/weights/${name}`);
      else draft.set(`/rewards/weights/${name}`, isOn ? 1 : 0);
    }
    draw();
    document.getElementById("five")?.focus();
  }

  draw();
  let formula = draft.at("/rewards/formula");
  return {
    element,
    update() {
      // A formula takes the place of weights.
      if (!isSame(formula, draft.at("/rewards/formula")) && Boolean(formula) !== Boolean(draft.at("/rewards/formula"))) draw();
      formula = draft.at("/rewards/formula");
      trial.update();
    },
    close: () => trial.close(),
    summary: () => raw(draft.graderNames().join(", ") || t("reward.five.short"), { translate: null }),
  };
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}
