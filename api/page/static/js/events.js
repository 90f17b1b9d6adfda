// The tab of events: what happened, newest first, with warnings and errors standing out.

import { fill, h, raw } from "./dom.js";
import { clock, fixed, has, number, percent, t } from "./i18n.js";
import { empty, failureCard } from "./parts.js";
import { overBy, warningCard } from "./warning.js";

const SHOWN = 1000;
const TYPES = ["warning", "error", "status", "checkpoint", "evaluation", "log"];

export function eventsTab(feed) {
  const wanted = new Set(TYPES);
  const list = h("ol", { class: "events", reversed: true });
  const bar = h("div", { class: "chips", role: "group", "aria-label": t("events.types") });
  let drawn = -1;

  function drawBar() {
    fill(bar, TYPES.map((type) => h("button", { type: "button", class: "chip", "aria-pressed": String(wanted.has(type)), onclick: (event) => toggle(type, event.currentTarget) }, t(`event.${type}`))));
  }

  function toggle(type, button) {
    if (wanted.has(type)) wanted.delete(type);
    else wanted.add(type);
    button.setAttribute("aria-pressed", String(wanted.has(type)));
    drawn = -1;
    update();
  }

  function update() {
    if (drawn === feed.events.length) return;
    drawn = feed.events.length;
    const shown = feed.events.filter((event) => wanted.has(event.type)).reverse();
    if (!shown.length) fill(list, h("li", {}, empty(t("events.none"))));
    else fill(list, shown.slice(0, SHOWN).map((event) => row(event, feed)), shown.length > SHOWN ? h("li", { class: "hint" }, t("events.more", { n: shown.length - SHOWN })) : null);
  }

  drawBar();
  return { element: h("div", {}, bar, list), update };
}

function row(event, feed) {
  return h(
    "li",
    { class: `event ${event.type}` },
    h("div", { class: "when" }, clock(event.time)),
    h("div", { class: "kind" }, t(`event.${event.type}`)),
    h("div", { class: "at" }, event.step ? t("chart.step", { step: number(event.step) }) : null),
    h("div", { class: "what" }, what(event, feed)),
  );
}

function what(event, { id, events }) {
  const { data } = event;
  if (event.type === "warning") return warningCard(event, id, overBy(event, events));
  if (event.type === "error") return failureCard(data);
  if (event.type === "status") {
    if (data.status) return has(`status.${data.status}`) ? t(`status.${data.status}`) : raw(data.status);
    return has(`phase.${data.phase}`) ? t(`phase.${data.phase}`) : raw(data.phase ?? "");
  }
  if (event.type === "checkpoint") return [t("events.checkpoint"), " ", raw(data.path ?? "", { class: "code" })];
  if (event.type === "evaluation" && data.stage !== "selftest") {
    return t("events.evaluation", { side: has(`evaluation.${data.stage}`) ? t(`evaluation.${data.stage}`) : data.stage, strict: percent(data.strict_accuracy), lenient: percent(data.lenient_accuracy) });
  }
  if (event.type === "evaluation") return [t("evaluation.selftest"), " ", raw(data.peft ? fixed(data.peft.mean, 6) : "", { class: "code" })];
  return raw(data.message ?? JSON.stringify(data), { lang: "en" });
}
