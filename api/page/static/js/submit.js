// A new job: a form made from the spec's JSON Schema, or JSON as it is. Only what is changed is sent.

import { get, post, request, specSchema, Problem } from "./api.js";
import { fill, h, raw } from "./dom.js";
import { compact, fieldWords, number, t, has } from "./i18n.js";
import { busy, problemCard, prose, toast } from "./parts.js";
import { defaultsOf, flatten, keysOf, resolve, shown } from "./spec.js";

// Those that most jobs set, in this order; others follow as the schema has them.
const ORDER = ["", "model", "data", "evaluation", "training", "sampling", "rewards", "loss", "optimizer", "lora", "guards", "audits", "resources"];
const OPEN = new Set(["", "model", "data", "training", "sampling"]);

/** What was typed when the session ended or the language was changed: `{owner, from, spec, isForm}`. */
let kept = null;

export async function submitView(_, query, holder) {
  const schema = await specSchema();
  const defaults = defaultsOf(schema, schema);
  const from = query.get("from");
  const draft = kept?.owner === holder.owner && kept.from === from ? kept : null;
  kept = null;
  const given = from && !draft ? (await get(`/jobs/${from}`)).spec : {};
  let spec = draft ? draft.spec : different(given, defaults);
  let isForm = draft?.isForm ?? true;

  const place = h("div", {});
  const outcome = h("div", { class: "outcome", "aria-live": "polite" });
  const modes = h("div", { class: "chips", role: "group", "aria-label": t("submit.mode") });
  const check = h("button", { type: "button", onclick: () => send(true) }, t("submit.check"));
  const submit = h("button", { type: "submit", class: "primary", disabled: !holder.scopes.includes("jobs:write") }, t("submit.action"));
  const form = h("form", { novalidate: true, onsubmit: (event) => (event.preventDefault(), send(false)) }, place, h("div", { class: "submit-bar" }, submit, check, h("span", { class: "hint" }, t("submit.hint"))), outcome);
  const element = h("div", { class: "submit" }, h("div", { class: "title-row" }, h("h1", { tabindex: "-1" }, t("nav.new")), modes), h("p", { class: "hint" }, from ? t("submit.from", { id: from }) : t("submit.intro")), form);

  const fields = new Map();
  let json = null;
  /** The job that was sent and not answered: sent again it is the same one. */
  let unanswered = { text: "", key: "" };

  function drawModes() {
    const chip = (name, isThis) => h("button", { type: "button", class: "chip", "aria-pressed": String(isForm === isThis), onclick: () => change(isThis) }, t(`submit.${name}`));
    fill(modes, chip("form", true), chip("json", false));
  }

  function change(toForm) {
    if (toForm === isForm) return;
    try {
      spec = collect();
    } catch (error) {
      fill(outcome, badJson(error));
      return;
    }
    isForm = toForm;
    fill(outcome);
    draw();
    if (isForm) keepWhatTheFormCannotShow();
  }

  /** A form has the fields of the schema and no other: what it would lose stays as JSON, for the service to look at. */
  function keepWhatTheFormCannotShow() {
    const shownThere = collect();
    const seen = (pointer) => (at(shownThere, pointer) === undefined ? at(defaults, pointer) : at(shownThere, pointer));
    const lost = [...flatten(spec)].filter(([pointer, value]) => !isEmpty(value) && !isSame(seen(pointer), value));
    if (!lost.length) return;
    isForm = false;
    draw();
    fill(outcome, h("div", { class: "card danger", role: "alert" }, h("p", { class: "strong" }, t("submit.only.json")), h("ul", {}, lost.map(([pointer]) => h("li", {}, raw(pointer, { class: "code" }))))));
  }

  function draw() {
    drawModes();
    fields.clear();
    json = null;
    if (isForm) fill(place, sections());
    else {
      json = h("textarea", { id: "json", class: "code", rows: 24, spellcheck: "false", "aria-label": t("submit.json"), value: JSON.stringify(spec, null, 2) });
      fill(place, json);
    }
  }

  function sections() {
    const names = Object.entries(schema.properties).filter(([, one]) => isSection(one)).map(([name]) => name);
    const order = [...ORDER.filter((name) => name === "" || names.includes(name)), ...names.filter((name) => !ORDER.includes(name))];
    return order.map((name) => {
      const part = name ? resolve(schema.properties[name], schema) : schema;
      const entries = Object.entries(part.properties).filter(([key, one]) => (name || !isSection(one)) && key !== "schema_version");
      const isTouched = name ? name in spec : false;
      return h(
        "details",
        { class: "card section", open: OPEN.has(name) || isTouched },
        h("summary", {}, h("h2", {}, has(`section.${name || "general"}`) ? t(`section.${name || "general"}`) : raw(name)), name ? raw(name, { class: "code" }) : null),
        h("div", { class: "fields" }, name === "data" ? upload() : null, entries.map(([key, one]) => fieldsOf(name ? `/${name}/${key}` : `/${key}`, key, one))),
      );
    });
  }

  function fieldsOf(pointer, key, one) {
    const part = resolve(one, schema);
    if (part.properties && !part.required) return h("fieldset", { class: "wide" }, h("legend", {}, raw(key, { class: "code" })), h("div", { class: "fields" }, Object.entries(part.properties).map(([inner, of]) => fieldsOf(`${pointer}/${inner}`, inner, of))));
    return fieldOf(pointer, key, one);
  }

  function fieldOf(pointer, key, one) {
    const kind = kindOf(one, schema);
    const preset = at(defaults, pointer);
    const id = `field${pointer.replaceAll("/", "-")}`;
    const value = at(spec, pointer);
    const control = controlOf(kind, { id, value: value === undefined ? preset : value, preset });
    const trouble = h("p", { class: "error", id: `${id}-error` });
    const { text, lang } = fieldWords(pointer, one.description ?? kind.description ?? "");
    const hint = h("p", { class: "hint", id: `${id}-hint` }, prose(text, { lang }));
    control.setAttribute("aria-describedby", `${id}-hint ${id}-error`);
    const mark = () => wrapper.classList.toggle("changed", JSON.stringify(readControl(control, kind, preset)) !== JSON.stringify(preset));
    const wrapper = h(
      "div",
      { class: `field ${kind.isLong || kind.plain.items?.$ref ? "wide" : ""}` },
      h("label", { for: id }, raw(key, { class: "code" })),
      control,
      h("p", { class: "default" }, t("submit.default"), " ", raw(short(preset), { class: "code" })),
      hint,
      trouble,
    );
    control.addEventListener("input", () => (mark(), trouble.replaceChildren(), control.removeAttribute("aria-invalid")));
    fields.set(pointer, { control, kind, preset, trouble, wrapper });
    mark();
    return wrapper;
  }

  function upload() {
    if (!holder.scopes.includes("datasets:write")) return null;
    const status = h("span", { class: "hint", role: "status" }, t("submit.upload.hint"));
    const picker = h("input", { type: "file", id: "upload", accept: ".jsonl,.ndjson", onchange: take });
    async function take() {
      const [file] = picker.files;
      if (!file) return;
      fill(status, t("submit.uploading"));
      try {
        const dataset = await request(`/datasets?${new URLSearchParams({ name: file.name.slice(0, 100) })}`, { method: "POST", body: file, type: "application/x-ndjson" });
        setField("/data/source", "upload");
        setField("/data/dataset", dataset.id);
        for (const column of ["question", "answer"]) if (dataset.columns.includes(column)) setField(`/data/${column}_column`, column);
        fill(status, t("submit.uploaded", { rows: dataset.rows }), " ", raw(dataset.id, { class: "code" }));
      } catch (error) {
        fill(status, problemCard(error));
      }
    }
    return h("div", { class: "field wide upload" }, h("label", { for: "upload" }, t("submit.upload")), picker, status);
  }

  function setField(pointer, value) {
    const field = fields.get(pointer);
    if (!field) return;
    field.control.value = value;
    field.control.dispatchEvent(new Event("input"));
  }

  /** The spec as it stands, without what is default. Raises `SyntaxError`, also where it is JSON and no object. */
  function collect() {
    if (json) return readObject(json.value || "{}");
    const found = {};
    for (const [pointer, { control, kind, preset }] of fields) {
      const value = readControl(control, kind, preset);
      if (JSON.stringify(value) !== JSON.stringify(preset)) put(found, pointer, value);
    }
    return found;
  }

  async function send(isDry) {
    clearErrors();
    if (markMistyped()) return;
    let body;
    try {
      body = collect();
    } catch (error) {
      fill(outcome, badJson(error));
      return;
    }
    [submit, check].forEach((button) => (button.disabled = true));
    fill(outcome, busy());
    try {
      if (isDry) fill(outcome, checked(await post("/jobs?dry_run=true", body), body));
      else {
        const answer = await post("/jobs", body, { headers: { "Idempotency-Key": keyFor(body) } });
        toast(t("submit.done"));
        location.hash = `/jobs/${answer.id}`;
      }
    } catch (error) {
      refused(error);
    } finally {
      [submit, check].forEach((button) => (button.disabled = false));
      submit.disabled = !holder.scopes.includes("jobs:write");
    }
  }

  function keyFor(body) {
    const text = JSON.stringify(body);
    if (unanswered.text !== text) unanswered = { text, key: crypto.randomUUID?.() ?? String(Math.random()) };
    return unanswered.key;
  }

  function refused(error) {
    const left = error instanceof Problem ? error.errors.filter((one) => !showAt(one)) : [];
    const isPlaced = error instanceof Problem && error.errors.length > 0;
    fill(outcome, isPlaced ? h("div", { class: "card danger", role: "alert" }, h("p", { class: "strong" }, t("submit.refused", { n: error.errors.length })), left.length ? h("ul", {}, left.map((one) => h("li", {}, raw(one.pointer || "/", { class: "code" }), " ", raw(`${one.detail}. ${one.remedy}`, { lang: "en" })))) : null) : problemCard(error));
    const first = [...fields.values()].find(({ control }) => control.getAttribute("aria-invalid"));
    first?.control.focus();
  }

  function showAt(one) {
    // A problem inside a list or an object belongs to the field that holds it.
    let { pointer } = one;
    while (pointer && !fields.has(pointer)) pointer = pointer.slice(0, pointer.lastIndexOf("/"));
    const field = fields.get(pointer);
    if (!field) return false;
    field.wrapper.closest("details")?.setAttribute("open", "");
    field.control.setAttribute("aria-invalid", "true");
    field.trouble.append(raw(`${one.detail}. ${one.remedy} `, { lang: "en" }));
    return true;
  }

  /** The browser gives no value for what is no number: it would be sent as the default. */
  function markMistyped() {
    const mistyped = [...fields.values()].filter(({ control }) => control.validity?.badInput);
    for (const { control, trouble, wrapper } of mistyped) {
      wrapper.closest("details")?.setAttribute("open", "");
      control.setAttribute("aria-invalid", "true");
      trouble.append(t("submit.no.number"));
    }
    if (mistyped.length) fill(outcome, h("div", { class: "card danger", role: "alert" }, h("p", { class: "strong" }, t("submit.refused", { n: mistyped.length }))));
    mistyped[0]?.control.focus();
    return mistyped.length > 0;
  }

  function clearErrors() {
    for (const { control, trouble } of fields.values()) {
      control.removeAttribute("aria-invalid");
      trouble.replaceChildren();
    }
  }

  function checked(answer, body) {
    const asked = [...flatten(body)].filter(([pointer, value]) => !isEmpty(value) && !isSame(at(defaults, pointer), value));
    return [
      h("div", { class: "card good" }, h("p", { class: "strong" }, t("submit.valid")), answer.warnings.length ? null : h("p", { class: "hint" }, t("submit.no.warnings")), h("p", { class: "hint" }, size(answer.estimate))),
      answer.warnings.map((one) => h("div", { class: "card warning" }, h("p", {}, raw(one.pointer, { class: "code" }), " ", raw(one.code, { class: "code" })), h("p", {}, raw(one.message, { lang: "en" })))),
      h("details", { class: "card" }, h("summary", {}, t("submit.resolved"), " ", h("span", { class: "hint" }, t("submit.changed", { n: asked.length }))), h("pre", { class: "code", tabindex: "0", translate: "no" }, JSON.stringify(answer.spec, null, 2))),
    ];
  }

  draw();
  return {
    element,
    keep() {
      try {
        kept = { owner: holder.owner, from, spec: collect(), isForm };
      } catch {
        kept = null; // text that is no JSON is nothing to begin from
      }
    },
  };
}

function size(estimate) {
  const numbers = { completions: compact(estimate.completions), questions: compact(estimate.prompts), tokens: compact(estimate.max_completion_tokens) };
  const parts = [t("submit.size", numbers)];
  if (estimate.epoch_share !== null) parts.push(t("submit.epochs", { n: number(estimate.epoch_share) }));
  return parts.join(" ");
}

function badJson(error) {
  return h("div", { class: "card danger", role: "alert" }, h("p", { class: "strong" }, t("submit.bad.json")), h("p", {}, raw(error.message, { lang: "en" })));
}

function isSection(one) {
  return "$ref" in one;
}

/** What control a field needs: `{type, options?, isNullable, isLong}`. */
function kindOf(one, root) {
  const options = one.anyOf ?? [one];
  const isNullable = options.some((option) => option.type === "null");
  const plain = resolve(options.find((option) => option.type !== "null") ?? {}, root);
  const type = plain.enum ? "enum" : ["string", "integer", "number", "boolean"].includes(plain.type) ? plain.type : "json";
  return { type, isNullable, options: plain.enum, description: plain.description, isLong: type === "string" && plain.maxLength >= 2000, plain };
}

function controlOf(kind, { id, value, preset }) {
  if (kind.type === "enum") return h("select", { id }, kind.isNullable ? h("option", { value: "" }, "null") : null, kind.options.map((option) => h("option", { value: option, selected: option === value, translate: "no" }, option)));
  if (kind.type === "boolean") return h("select", { id }, ["true", "false"].map((option) => h("option", { value: option, selected: option === String(value), translate: "no" }, option)));
  if (kind.type === "json") return h("textarea", { id, class: "code", rows: 2, spellcheck: "false", value: value === null || value === undefined ? "" : JSON.stringify(value), placeholder: short(preset) });
  if (kind.isLong) return h("textarea", { id, rows: 5, spellcheck: "false", value: value ?? "" });
  if (kind.type === "string") return h("input", { id, type: "text", spellcheck: "false", autocomplete: "off", value: value ?? "", placeholder: kind.isNullable ? "null" : "" });
  const { minimum, maximum } = kind.plain;
  return h("input", { id, type: "number", step: kind.type === "integer" ? "1" : "any", min: minimum, max: maximum, value: value ?? "", placeholder: kind.isNullable ? "null" : "" });
}

/** What a control holds, as JSON has it; what cannot be read goes as it is, for the service to say what is wrong. */
function readControl(control, kind, preset) {
  const text = control.value;
  if (kind.type === "string") return text === "" && kind.isNullable ? null : text;
  if (kind.type === "enum") return text === "" ? null : text;
  if (kind.type === "boolean") return text === "true";
  if (text.trim() === "") return kind.isNullable ? null : preset;
  if (kind.type === "json") {
    try {
      return JSON.parse(text);
    } catch {
      return text;
    }
  }
  return Number.isFinite(Number(text)) ? Number(text) : text;
}

/** JSON that is an object; raises `SyntaxError`. */
function readObject(text) {
  const value = JSON.parse(text);
  if (value === null || typeof value !== "object" || Array.isArray(value)) throw new SyntaxError(t("submit.no.object"));
  return value;
}

function isSame(one, other) {
  return JSON.stringify(one) === JSON.stringify(other);
}

/** Whether it is an object that says nothing. */
function isEmpty(value) {
  return value !== null && typeof value === "object" && !Array.isArray(value) && !Object.keys(value).length;
}

function at(value, pointer) {
  return keysOf(pointer).reduce((inner, key) => (inner === null || inner === undefined ? undefined : inner[key]), value);
}

function put(target, pointer, value) {
  const keys = keysOf(pointer);
  const last = keys.pop();
  const inner = keys.reduce((one, key) => (one[key] ??= {}), target);
  inner[last] = value;
}

/** What in a resolved spec is not the default. */
function different(spec, defaults) {
  const found = {};
  for (const [pointer, value] of flatten(spec)) if (JSON.stringify(at(defaults, pointer)) !== JSON.stringify(value)) put(found, pointer, value);
  return found;
}

function short(value) {
  const text = shown(value ?? null);
  return text.length > 60 ? `${text.slice(0, 60)}…` : text;
}
