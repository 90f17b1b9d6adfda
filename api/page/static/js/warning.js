// A warning of a job, as its overview and its list of events show it.

import { query as queryString } from "./api.js";
import { h, raw } from "./dom.js";
import { has, number, percent, serviceWords, t } from "./i18n.js";
import { advice } from "./parts.js";

/** The event that tells that what an audit warned of is over, if it is. */
export function overBy(event, events) {
  if (!event.data.audit) return null;
  return events.find(({ type, data, seq }) => type === "log" && data.code === "audit_over" && data.audit === event.data.audit && seq > event.seq) ?? null;
}

/**
 * A warning with the way to the rollouts that show it; in the past, where its stretch of training is over.
 *
 * @param {any} event
 * @param {string} id
 * @param {any} over
 */
export function warningCard(event, id, over = null) {
  const { code, cause, message, audit, rollouts, steps, values } = event.data;
  // An audit's sentence is made of its numbers, so it can be said in any language; the rest is as the service says it.
  const said = over ? pastWords(over.data) : audit && values ? serviceWords(audit, shownValues(values)) : null;
  const title = has(`fetch.${cause}`) ? t(`fetch.${cause}`) : has(`warning.${audit ?? code}`) ? t(`warning.${audit ?? code}`) : null;
  const shown = over ? over.data.steps : steps;
  const where = shown ? t("warning.steps", { first: number(shown[0]), last: number(shown[1]) }) : event.step ? t("chart.step", { step: number(event.step) }) : null;
  return h(
    "div",
    { class: over ? "card" : "card warning" },
    h("p", { class: "warning-head" }, h("span", { class: "strong" }, title ?? t(audit ? "warning.audit" : "warning.title")), raw(audit ?? code, { class: "code" }), over ? h("span", { class: "hint" }, t("warning.over")) : null, where ? h("span", { class: "hint" }, where) : null, rollouts ? h("a", { href: `#/jobs/${id}/rollouts${queryString(rollouts)}` }, t("warning.rollouts")) : null),
    h("p", {}, said ?? advice({ code, message: (over?.data.message ?? message) || "" })),
  );
}

function pastWords({ steps: [first, last] }) {
  return serviceWords("over", { first: number(first), last: number(last) });
}

function shownValues(values) {
  return Object.fromEntries(Object.entries(values).map(([name, value]) => [name, name.endsWith("_share") ? percent(value, 0) : number(value, 3)]));
}
