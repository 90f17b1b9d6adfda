// Pieces that several views are made of: states, problems, bars, dialogs.

import { Problem, Unreachable } from "./api.js";
import { fill, h, raw } from "./dom.js";
import { adviceWords, has, number, percent, t } from "./i18n.js";

/**
 * What a view gives: its element, and what it can do by itself.
 *
 * @typedef {{
 *   element: Node, go?: (...values: any[]) => unknown, update?: () => void, repaint?: () => void, keep?: () => void,
 *   close?: () => void,
 * }} View
 */

export function busy() {
  return h("p", { class: "busy", role: "status" }, t("busy"));
}

/**
 * What went wrong, in words; fields that are at fault each with the remedy. `again` is what a button tries again.
 *
 * @param {unknown} error
 * @param {{again?: (() => unknown) | null, skipFields?: boolean}} [how]
 */
export function problemCard(error, { again = null, skipFields = false } = {}) {
  const card = h("div", { class: "card danger", role: "alert" });
  const button = again ? h("p", {}, h("button", { type: "button", onclick: again }, t("problem.again"))) : null;
  if (error instanceof Unreachable) return fill(card, h("p", {}, t("problem.unreachable")), button);
  if (!(error instanceof Problem)) return fill(card, h("p", {}, t("problem.unforeseen")));
  const known = has(`problem.${error.code}`) ? h("p", { class: "strong" }, t(`problem.${error.code}`)) : null;
  const fields = skipFields ? [] : error.errors.map((one) => h("li", {}, raw(one.pointer || one.parameter || "/", { class: "code" }), " ", raw(`${one.detail}. ${one.remedy}`, { lang: "en" })));
  return fill(
    card,
    known,
    h("p", {}, raw(error.message, { lang: "en" })),
    error.retryAfter ? h("p", {}, t("problem.retry", { seconds: error.retryAfter })) : null,
    fields.length ? h("ul", {}, fields) : null,
    error.status >= 500 || error.status === 429 ? button : null,
    error.status >= 500 && error.requestId ? h("p", { class: "hint" }, t("problem.request"), " ", raw(error.requestId, { class: "code" })) : null,
  );
}

export function badge(status, phase = null) {
  return h("span", { class: `badge ${status}` }, h("i", { class: "dot", "aria-hidden": "true" }), t(`status.${status}`), phase && has(`phase.${phase}`) ? h("span", { class: "phase" }, t(`phase.${phase}`)) : null);
}

/** How far a job is; the tick is the step that is safe in storage. */
export function progressBar(job) {
  const saved = job.checkpoint_step > 0 && job.total_steps > 0 && job.status !== "succeeded" ? h("i", { class: "saved", title: t("job.saved", { step: job.checkpoint_step }), css: { left: `${(100 * job.checkpoint_step) / job.total_steps}%` } }) : null;
  return h(
    "div",
    { class: "progress" },
    h("div", { class: "track" }, h("div", { class: `bar ${job.status}`, role: "progressbar", "aria-label": t("jobs.progress"), "aria-valuemin": "0", "aria-valuemax": "100", "aria-valuenow": String(Math.round(job.progress * 100)) }, h("div", { css: { width: `${job.progress * 100}%` } })), saved),
    raw(`${number(job.step)} / ${number(job.total_steps)}`, { class: "count", title: percent(job.progress, 0) }),
  );
}

/** A sentence of the service's, with what it sets in backticks as code. */
export function prose(text, attributes = {}) {
  return h("span", { translate: "no", ...attributes }, text.split("`").map((part, place) => (place % 2 ? h("code", { class: "code" }, part) : part)));
}

/** Advice of the service: in the reader's language, then as it was sent if that has numbers; else only as it was sent. */
export function advice({ code, message }) {
  const said = adviceWords(code);
  if (!said) return prose(message, { lang: "en" });
  return h("span", {}, said, /\d/.test(message) ? [" ", prose(message, { lang: "en", class: "hint" })] : null);
}

/** What could not be fetched, or else the class of the failure. */
function failureHeading(error) {
  if (has(`fetch.${error.code}`)) return t(`fetch.${error.code}`);
  return has(`class.${error.class}`) ? t(`class.${error.class}`) : t("job.failed");
}

/** Why a job failed: what kind of thing it is, what happened, and what to do about it. */
export function failureCard(error) {
  return h(
    "div",
    { class: "card danger failure" },
    h("p", { class: "warning-head" }, h("span", { class: "strong" }, failureHeading(error)), raw(`${error.class} · ${error.code}`, { class: "code" })),
    h("p", {}, prose(error.message ?? "", { lang: "en" })),
    error.hint ? h("p", {}, h("span", { class: "label" }, t("job.remedy")), " ", prose(error.hint, { lang: "en" })) : null,
    error.retryable ? h("p", { class: "hint" }, t("job.retryable")) : null,
  );
}

export function jobName(job) {
  return job.name || job.id;
}

export function tile(label, value, note = null, attributes = {}) {
  return h("div", { class: "tile", ...attributes }, h("dt", {}, label), h("dd", {}, raw(value)), note ? h("dd", { class: "note" }, note) : null);
}

export function copyButton(text, label) {
  const button = h("button", { type: "button", class: "quiet copy", onclick: copy }, label);
  async function copy() {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = t("copied");
    } catch {
      button.textContent = t("copy.failed");
    }
    setTimeout(() => (button.textContent = label), 1500);
  }
  return button;
}

/** Ask before something that cannot be undone; resolves to whether the answer was yes. */
export function confirmed({ title, text, action, danger = false }) {
  return new Promise((resolve) => {
    const dialog = h(
      "dialog",
      { class: "confirm", "aria-labelledby": "confirm-title" },
      h("h2", { id: "confirm-title" }, title),
      h("p", {}, text),
      h("div", { class: "actions" }, h("button", { type: "button", onclick: () => dialog.close("no") }, t("confirm.no")), h("button", { type: "button", class: danger ? "danger" : "primary", onclick: () => dialog.close("yes") }, action)),
    );
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "yes");
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** Instead of a view: what the address names is not there. */
export function nowhere() {
  return [h("h1", { tabindex: "-1" }, t("nowhere.title")), h("p", {}, h("a", { href: "#/" }, t("nav.jobs")))];
}

/** What was asked in a view that is left is not asked any more. */
export function closeDialogs() {
  /** @type {NodeListOf<HTMLDialogElement>} */
  const dialogs = document.querySelectorAll("dialog[open]");
  dialogs.forEach((dialog) => dialog.close());
}

/** A short message that goes away, also read aloud. */
export function toast(message) {
  document.querySelectorAll(".toast").forEach((earlier) => earlier.remove());
  const element = h("div", { class: "toast", role: "status" }, message);
  document.body.append(element);
  setTimeout(() => element.remove(), 6000);
}

export function empty(title, ...rest) {
  return h("div", { class: "empty-state" }, h("p", { class: "strong" }, title), ...rest);
}

/** An operator's choice between their own rows and those of all owners; `choose` gets the filter's new value. */
export function everyoneBox(checked, choose) {
  return h("label", { class: "everyone" }, h("input", { type: "checkbox", id: "everyone", checked, data: { focus: "everyone" }, onchange: (event) => choose(event.target.checked ? "*" : "") }), " ", t("usage.everyone"));
}

/** A list as a table. A head is what it says, or that and whether its column has numbers; null: no column. */
export function listTable(kind, caption, heads, rows) {
  const cells = heads.filter((one) => one !== null).map((one) => (Array.isArray(one) ? h("th", { scope: "col", class: one[1] ? "num" : null }, one[0]) : h("th", { scope: "col" }, one)));
  return h("div", { class: "card flush scroll" }, h("table", { class: `jobs ${kind}` }, h("caption", { class: "sr-only" }, caption), h("thead", {}, h("tr", {}, cells)), h("tbody", {}, rows)));
}

/** The button behind a list that has more; null where it has not. */
export function moreButton(hasMore, show) {
  return hasMore ? h("p", { class: "more" }, h("button", { type: "button", data: { focus: "more" }, onclick: show }, t("more"))) : null;
}
