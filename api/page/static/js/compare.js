// Two jobs beside each other: their curves in one picture, what was asked differently, and how each ended.

import { Asking, get, query as queryString } from "./api.js";
import { fill, h, raw, redraw } from "./dom.js";
import { duration, fixed, number, percent, t } from "./i18n.js";
import { Overlay, measured, shortName } from "./overlay.js";
import { badge, busy, empty, jobName, problemCard } from "./parts.js";
import { flatten, isSame, keysOf, shown } from "./spec.js";

const IGNORED = new Set(["/name", "/schema_version"]);

export async function compareView(_, query) {
  const list = await get("/jobs?limit=100");
  /** @type {Overlay | null} */
  let overlay = null;
  const body = h("div", {});
  const form = h("div", { class: "filters compare-picks" });
  const element = h("div", {}, h("h1", { tabindex: "-1" }, t("compare.title")), form, body);
  let ids = idsIn(query);
  const asking = new Asking();

  function load() {
    asking.stop();
    drawForm();
    clear();
    if (!ids.a || !ids.b) {
      fill(body, empty(t("compare.none"), h("p", {}, t("compare.none.hint"))));
      return;
    }
    fill(body, busy());
    asking.ask(() => Promise.all(["a", "b"].map((key) => side(ids[key]))), { answered: draw, refused: (error) => fill(body, problemCard(error, { again: load })) });
  }

  function drawForm() {
    const known = new Map(list.data.map((job) => [job.id, shortName(job)]));
    for (const id of Object.values(ids)) if (id && !known.has(id)) known.set(id, id);
    const select = (key) =>
      h(
        "label",
        { class: "field" },
        h("span", {}, h("i", { class: "swatch", css: { background: `var(--series-${key === "a" ? 1 : 3})` } }), t(`compare.${key}`)),
        h("select", { data: { focus: key }, onchange: (event) => (location.hash = `/compare${queryString({ ...ids, [key]: event.target.value })}`) }, h("option", { value: "" }, t("compare.choose")), [...known].map(([id, name]) => h("option", { value: id, selected: ids[key] === id, translate: "no" }, name))),
      );
    redraw(form, select("a"), select("b"));
  }

  function draw(sides) {
    // Each job's colour is the one beside its name above.
    const runs = sides.map((one, place) => ({ ...one, key: one.job.id, label: `${place ? "B" : "A"} · ${jobName(one.job)}`, colour: place * 2 }));
    overlay = new Overlay(runs);
    fill(
      body,
      results(sides),
      differences(sides),
      h("h2", {}, t("tab.curves")),
      overlay.element,
    );
    overlay.draw(runs);
  }

  function clear() {
    overlay?.close();
    overlay = null;
  }

  load();
  return {
    element,
    go(_parameters, next) {
      ids = idsIn(next);
      load();
      return true;
    },
    repaint: () => overlay?.repaint(),
    close() {
      asking.stop();
      clear();
    },
  };
}

function idsIn(query) {
  return { a: query.get("a") ?? "", b: query.get("b") ?? "" };
}

async function side(id) {
  const [job, report, run] = await Promise.all([get(`/jobs/${id}`), get(`/page/reports/${id}`), measured(id)]);
  return { ...run, job, evaluation: report?.evaluation ?? null };
}

function results(sides) {
  const tail = (one) => one.metrics.slice(-Math.max(1, Math.round(one.metrics.length / 10))).map((metric) => metric.reward);
  /** @type {[string, (one: any) => unknown][]} */
  const rows = [
    ["jobs.state", ({ job }) => badge(job.status)],
    ["metric.step", ({ job }) => number(job.step)],
    ["compare.reward", (one) => fixed(average(tail(one)), 3)],
    ["compare.best", (one) => fixed(one.metrics.length ? one.metrics.reduce((best, metric) => Math.max(best, metric.reward), -Infinity) : null, 3)],
    ["jobs.took", ({ job }) => duration(job.started_at ? (Date.parse(job.finished_at ?? job.updated_at) - Date.parse(job.started_at)) / 1000 : null)],
    ["compare.strict", ({ evaluation }) => (evaluation ? change(evaluation, "strict") : "–")],
    ["compare.lenient", ({ evaluation }) => (evaluation ? change(evaluation, "lenient") : "–")],
  ];
  return h(
    "section",
    { class: "card" },
    h("h2", {}, t("compare.results")),
    h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": t("compare.results") }, h("table", { class: "plain" }, h("thead", {}, heads(sides)), h("tbody", {}, rows.map(([key, read]) => h("tr", {}, h("th", { scope: "row" }, t(key)), sides.map((one) => h("td", { translate: "no" }, read(one)))))))),
  );
}

function change(evaluation, reading) {
  return `${percent(evaluation.before[`${reading}_accuracy`])} → ${percent(evaluation.after[`${reading}_accuracy`])}`;
}

function heads(sides) {
  return h("tr", {}, h("td", {}), sides.map((one, place) => h("th", { scope: "col" }, raw(place ? "B" : "A"), " ", h("a", { href: `#/jobs/${one.job.id}` }, raw(jobName(one.job))))));
}

function differences(sides) {
  const [a, b] = sides.map((one) => flatten(one.job.spec));
  const pointers = [...new Set([...a.keys(), ...b.keys()])].filter((pointer) => !IGNORED.has(pointer) && !isSame(a.get(pointer), b.get(pointer))).sort();
  const cell = (value) => h("td", { translate: "no", class: "breaks" }, value === undefined ? "–" : shown(value));
  return h(
    "section",
    { class: "card" },
    h("h2", {}, t("compare.spec")),
    pointers.length
      ? h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": t("compare.spec") }, h("table", { class: "plain" }, h("thead", {}, heads(sides)), h("tbody", {}, pointers.map((pointer) => h("tr", {}, h("th", { scope: "row" }, raw(keysOf(pointer).join("."), { class: "code" })), cell(a.get(pointer)), cell(b.get(pointer)))))))
      : h("p", { class: "hint" }, t("compare.spec.same")),
  );
}

function average(values) {
  return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
}
