// The tab of the spec: every value, those that are not the default standing out.

import { fill, h, raw } from "./dom.js";
import { t } from "./i18n.js";
import { Asking, specSchema } from "./api.js";
import { busy, copyButton, problemCard } from "./parts.js";

export function specTab(feed) {
  const element = h("div", {});
  const asking = new Asking();

  function load() {
    fill(element, busy());
    asking.ask(specSchema, { answered: draw, refused: (error) => fill(element, problemCard(error, { again: load })) });
  }

  function draw(schema) {
    const defaults = flatten(defaultsOf(schema, schema));
    const values = flatten(feed.job.spec);
    const sections = new Map();
    for (const [pointer, value] of values) {
      const [section, ...rest] = keysOf(pointer);
      const name = rest.length ? section : "";
      if (!sections.has(name)) sections.set(name, []);
      sections.get(name).push([rest.join(".") || section, value, !isSame(defaults.get(pointer), value)]);
    }
    const text = JSON.stringify(feed.job.spec, null, 2);
    fill(
      element,
      h("div", { class: "title-row" }, h("p", { class: "hint" }, t("spec.hint")), h("div", { class: "actions" }, copyButton(text, t("spec.copy")))),
      h("p", { class: "hint" }, t("spec.digest"), " ", raw(feed.job.spec_sha256, { class: "code breaks" })),
      h("div", { class: "spec" }, [...sections].sort(([a], [b]) => a.localeCompare(b)).map(([name, rows]) => h("section", { class: "card" }, h("h2", {}, name ? raw(name, { class: "code" }) : t("spec.general")), h("dl", { class: "values" }, rows.map(([key, value, isChanged]) => h("div", { class: isChanged ? "changed" : "" }, h("dt", {}, raw(key, { class: "code" })), h("dd", { translate: "no" }, shown(value), isChanged ? h("span", { class: "sr-only" }, t("spec.changed")) : null))))))),
    );
  }

  load();
  return { element, close: () => asking.stop() };
}

/** The keys that a JSON pointer (RFC 6901) goes through. */
export function keysOf(pointer) {
  return pointer.split("/").slice(1).map((key) => key.replaceAll("~1", "/").replaceAll("~0", "~"));
}

/** A spec as pointer and value pairs; lists and empty objects are values. */
export function flatten(value, pointer = "", found = new Map()) {
  if (value !== null && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length) {
    for (const [key, inner] of Object.entries(value)) flatten(inner, `${pointer}/${key.replaceAll("~", "~0").replaceAll("/", "~1")}`, found);
  } else found.set(pointer, value);
  return found;
}

/** Whether two values of a spec are the same JSON. */
export function isSame(one, other) {
  return JSON.stringify(one) === JSON.stringify(other);
}

export function shown(value) {
  if (value === null) return "null";
  if (typeof value === "string") return value === "" ? '""' : value;
  if (typeof value === "number" && value !== 0 && Math.abs(value) < 1e-3) return value.toExponential();
  return JSON.stringify(value);
}

/** What a schema gives where nothing is said. A section's own default leaves out fields that older workers do not know. */
export function defaultsOf(schema, root) {
  const found = resolve(schema, root);
  const given = "default" in schema ? schema.default : undefined;
  if (found.properties && given !== null) {
    const each = Object.entries(found.properties).map(([name, one]) => [name, defaultsOf(one, root)]);
    return { ...Object.fromEntries(each), ...given };
  }
  return given !== undefined ? given : "default" in found ? found.default : null;
}

export function resolve(schema, root) {
  return schema.$ref ? root.$defs[schema.$ref.split("/").at(-1)] : schema;
}
