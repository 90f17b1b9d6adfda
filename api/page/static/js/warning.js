// A warning of a job, as its overview and its list of events show it.

import { query as queryString } from "./api.js";
import { h, raw } from "./dom.js";
import { has, number, percent, serviceWords, t } from "./i18n.js";
import { prose } from "./parts.js";

/** A warning with the way to the rollouts that show it. */
export function warningCard(event, id) {
  const { code, message, audit, rollouts, steps, values } = event.data;
  // An audit's sentence is made of its numbers, so it can be said in any language; the rest is as the service says it.
  const said = audit && values ? serviceWords(audit, shownValues(values)) : null;
  const title = has(`warning.${audit ?? code}`) ? t(`warning.${audit ?? code}`) : null;
  const where = steps ? t("warning.steps", { first: number(steps[0]), last: number(steps[1]) }) : event.step ? t("chart.step", { step: number(event.step) }) : null;
  return h(
    "div",
    { class: "card warning" },
    h("p", { class: "warning-head" }, h("span", { class: "strong" }, title ?? t(audit ? "warning.audit" : "warning.title")), raw(audit ?? code, { class: "code" }), where ? h("span", { class: "hint" }, where) : null, rollouts ? h("a", { href: `#/jobs/${id}/rollouts${queryString(rollouts)}` }, t("warning.rollouts")) : null),
    h("p", {}, said ?? prose(message ?? "", { lang: "en" })),
  );
}

function shownValues(values) {
  return Object.fromEntries(Object.entries(values).map(([name, value]) => [name, name.endsWith("_share") ? percent(value, 0) : number(value, 3)]));
}
