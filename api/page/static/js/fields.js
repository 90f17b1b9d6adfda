// The controls of a draft: each is bound to a pointer of the spec, has a label in words, and shows what the service says
// of that pointer. What a control is made of comes from the spec's JSON Schema.

import { h, raw } from "./dom.js";
import { fieldWords, has, t } from "./i18n.js";
import { prose } from "./parts.js";
import { isSame, keysOf, resolve, shown } from "./spec.js";

export class Fields {
  /** Each bound control by its pointer. */
  bound = new Map();

  constructor(draft) {
    this.draft = draft;
  }

  /** A field as the schema describes it. */
  field(pointer, { label = labelOf(pointer), hint = true, rows = undefined } = {}) {
    const kind = kindOf(this.schemaAt(pointer), this.draft.schema);
    const value = this.draft.value(pointer);
    const preset = this.draft.preset(pointer);
    const control = controlOf(pointer, kind, { value, preset, rows });
    const words = hint ? fieldWords(pointer, kind.description ?? "") : null;
    return this.bind(pointer, {
      control,
      label,
      hint: words ? prose(readable(words.text, pointer), { lang: words.lang }) : null,
      isWide: kind.isLong || kind.type === "json",
      preset,
      read: () => readControl(control, kind, preset),
    });
  }

  /** Bind a control: what is read from it goes to its pointer. `write` is told of a value instead. */
  bind(pointer, { control, label, hint = null, isWide = false, preset = undefined, read = () => control.value, write = (value) => this.draft.give(pointer, value) }) {
    const id = idOf(pointer);
    control.id = id;
    const trouble = h("p", { class: "error", id: `${id}-error` });
    const note = h("p", { class: "note" });
    const wrapper = h("div", { class: `field ${isWide ? "wide" : ""}` }, h("label", { for: id }, label), control, preset === undefined ? null : h("p", { class: "default" }, t("new.default"), " ", raw(short(preset))), hint ? h("p", { class: "hint", id: `${id}-hint` }, hint) : null, trouble, note);
    control.setAttribute("aria-describedby", hint ? `${id}-hint ${id}-error` : `${id}-error`);
    const mark = () => preset !== undefined && wrapper.classList.toggle("changed", !isSame(read(), preset));
    control.addEventListener("input", () => {
      trouble.replaceChildren();
      note.replaceChildren();
      control.removeAttribute("aria-invalid");
      if (!control.validity?.badInput) write(read());
      mark();
    });
    this.bound.set(pointer, { control, trouble, note, wrapper });
    mark();
    return wrapper;
  }

  /** All fields of a part of the spec but these, those within objects set apart. */
  all(pointer, without = []) {
    const part = resolve(this.schemaAt(pointer), this.draft.schema);
    return Object.entries(part.properties)
      .filter(([key, one]) => !without.includes(`${pointer}/${key}`) && key !== "schema_version" && (pointer || !("$ref" in one)))
      .map(([key, one]) => {
        const inner = resolve(one, this.draft.schema);
        const here = `${pointer}/${key}`;
        if (!inner.properties || inner.required) return this.field(here);
        return h("fieldset", { class: "wide" }, h("legend", {}, labelOf(here)), h("div", { class: "fields" }, this.all(here, without)));
      });
  }

  schemaAt(pointer) {
    return keysOf(pointer).reduce((part, key) => resolve(part, this.draft.schema).properties[key], this.draft.schema);
  }

  /** Forget the fields at and below a pointer, which are drawn anew. */
  forget(pointer) {
    for (const one of [...this.bound.keys()]) if (one === pointer || one.startsWith(`${pointer}/`)) this.bound.delete(one);
  }

  /** Show what is wrong at its field; null where no field is near. */
  show(pointer, text) {
    const field = this.near(pointer);
    field?.control.setAttribute("aria-invalid", "true");
    field?.trouble.append(raw(`${text} `, { lang: "en" }));
    return field;
  }

  /** Show what may surprise at its field; null where no field is near. */
  note(pointer, content) {
    const field = this.near(pointer);
    field?.note.append(content, " ");
    return field;
  }

  /** The field of a pointer, unfolded; what is inside a list or an object belongs to the field that holds it. */
  near(pointer) {
    let near = pointer;
    while (near && !this.bound.has(near)) near = near.slice(0, near.lastIndexOf("/"));
    const field = this.bound.get(near);
    if (!field || !field.control.isConnected) return null;
    openAround(field.wrapper);
    return field;
  }

  /** The browser gives no value for what is no number: it would be sent as the default. */
  mistyped() {
    const found = [...this.bound.values()].filter(({ control }) => control.isConnected && control.validity?.badInput);
    for (const { control, trouble, wrapper } of found) {
      openAround(wrapper);
      control.setAttribute("aria-invalid", "true");
      trouble.append(t("new.no.number"));
    }
    return found;
  }

  clear() {
    for (const { control, trouble, note } of this.bound.values()) {
      control.removeAttribute("aria-invalid");
      trouble.replaceChildren();
      note.replaceChildren();
    }
  }
}

export function idOf(pointer) {
  return `field${pointer.replaceAll(/[^A-Za-z0-9_/]/g, "_").replaceAll("/", "-")}`;
}

/** What a field is called: a name in the catalogue, else the words of its key. */
export function labelOf(pointer) {
  const name = keysOf(pointer).join(".");
  return has(`field.${name}`) ? t(`field.${name}`) : raw(keysOf(pointer).at(-1).replaceAll("_", " "));
}

/** Fields that few need, folded away. */
export function advanced(title, ...children) {
  return h("details", { class: "advanced" }, h("summary", {}, title), h("div", { class: "fields" }, children));
}

/** A choice among `[value, label]` pairs. */
export function choice(options, value, attributes = {}) {
  return h("select", attributes, options.map(([one, label, given = {}]) => h("option", { value: one, selected: one === value, ...given }, label)));
}

function openAround(element) {
  for (let details = element.closest("details"); details; details = details.parentElement?.closest("details")) details.setAttribute("open", "");
}

/** A description as the form has it: null is a field left empty, and fields and choices have the names that are seen. */
function readable(text, pointer) {
  const named = text.replaceAll(/`([\w.]+)`/g, (whole, word) => {
    const key = [`field.${word}`, ...keysNear(pointer, word)].find(has);
    return key ? `“${t(key)}”` : whole;
  });
  return named.replaceAll(/`?\bnull\b`?/g, t("field.empty"));
}

/** Keys in the catalogue of a word in the description of a field: its own choice, a field beside it, or a choice of one. */
function keysNear(pointer, word) {
  const [name, above] = [keysOf(pointer), keysOf(pointer).slice(0, -1)].map((keys) => keys.join("."));
  return [`option.${name}.${word}`, `field.${above}.${word}`, `option.${above}.source.${word}`, `option.${above}.format.${word}`];
}

/** What control a field needs: `{type, options?, isNullable, isLong}`. */
function kindOf(one, root) {
  const options = one.anyOf ?? [one];
  const isNullable = options.some((option) => option.type === "null");
  const plain = resolve(options.find((option) => option.type !== "null") ?? {}, root);
  const type = plain.enum ? "enum" : ["string", "integer", "number", "boolean"].includes(plain.type) ? plain.type : "json";
  return { type, isNullable, options: plain.enum, description: one.description ?? plain.description, isLong: type === "string" && plain.maxLength >= 2000, plain };
}

function controlOf(pointer, kind, { value, preset, rows }) {
  const text = value === null || value === undefined ? "" : value;
  const none = kind.isNullable ? t("field.none") : "";
  if (kind.type === "enum") {
    const name = keysOf(pointer).join(".");
    const options = kind.options.map((option) => (has(`option.${name}.${option}`) ? [option, t(`option.${name}.${option}`)] : [option, option, { translate: "no" }]));
    return choice(kind.isNullable ? [["", none], ...options] : options, text);
  }
  if (kind.type === "boolean") return choice([["true", t("field.yes")], ["false", t("field.no")]], String(value));
  if (kind.type === "json") return h("textarea", { class: "code", rows: rows ?? 2, spellcheck: "false", value: text === "" ? "" : JSON.stringify(value), placeholder: short(preset), translate: "no" });
  if (kind.isLong) return h("textarea", { rows: rows ?? 5, spellcheck: "false", value: text });
  if (kind.type === "string") return h("input", { type: "text", spellcheck: "false", autocomplete: "off", value: text, placeholder: none });
  const { minimum, maximum } = kind.plain;
  return h("input", { type: "number", step: kind.type === "integer" ? "1" : "any", min: minimum, max: maximum, value: text, placeholder: none });
}

/** What a control holds, as JSON has it; what cannot be read goes as it is, for the service to say what is wrong. */
function readControl(control, kind, preset) {
  const text = control.value;
  if (kind.type === "string") return text === "" && kind.isNullable ? null : text;
  if (kind.type === "enum") return text === "" ? null : text;
  if (kind.type === "boolean") return text === "true";
  if (text.trim() === "") return kind.isNullable ? null : preset;
  if (kind.type === "json") return readJson(text);
  return Number.isFinite(Number(text)) ? Number(text) : text;
}

function readJson(text) {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

function short(value) {
  const text = value === null || value === undefined ? t("field.none") : value === "" ? t("field.empty") : shown(value);
  return text.length > 60 ? `${text.slice(0, 60)}…` : text;
}
