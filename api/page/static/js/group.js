// A group of jobs, or any jobs, as one table: which settings differ, and mean and spread over repeats.

import { Asking, get, post, query as queryString } from "./api.js";
import { fill, h, raw } from "./dom.js";
import { fixed, number, percent, signedPoints, t } from "./i18n.js";
import { Overlay, measured, shortName } from "./overlay.js";
import { badge, busy, confirmed, problemCard, progressBar, toast } from "./parts.js";
import { ENDED } from "./feed.js";

const POLL_MS = 10_000;
/** More lines than this cannot be told apart, and each asks for a job's metrics. */
const MOST_CURVES = 12;
/** @type {[string, (value: number) => string, (value: number) => string][]} */
const FIGURES = [
  ["reward", (value) => fixed(value, 2), (value) => fixed(value, 2)],
  ["strict_accuracy", percent, percent],
  ["strict_change", signedPoints, (value) => fixed(100 * value, 1)],
  ["lenient_accuracy", percent, percent],
  ["metric", (value) => number(value, 3), (value) => number(value, 3)],
];

export async function groupView({ id }, query, holder) {
  let jobs = query.getAll("job");
  const title = h("h1", { tabindex: "-1" }, t(id ? "group.title" : "compare.title"));
  const actions = h("div", { class: "actions" });
  const refusal = h("div", {});
  const body = h("div", {}, busy());
  const curves = h("div", {});
  const element = h("div", {}, h("div", { class: "title-row" }, title, actions), id ? h("p", { class: "hint" }, raw(id, { class: "code" })) : null, refusal, body, curves);
  const asking = new Asking();
  const askingCurves = new Asking();
  /** @type {Overlay | null} */
  let overlay = null;
  let drawn = "";
  let shownJobs = "";
  /** @type {number | undefined} */
  let timer;

  function load() {
    clearTimeout(timer);
    asking.ask(() => get(id ? `/groups/${id}` : `/comparison${queryString({ job: jobs })}`), { answered: draw, refused: (error) => fill(body, problemCard(error, { again: load })) });
  }

  function draw(table) {
    const isOver = table.rows.every((row) => row.jobs.every((job) => ENDED.has(job.status)));
    fill(actions, id && !isOver && holder.scopes.includes("jobs:write") ? h("button", { type: "button", class: "danger", onclick: cancel }, t("group.cancel")) : null);
    fill(body, cautions(table, isOver), settingsTable(table), jobsTable(table));
    loadCurves(table);
    if (!isOver) timer = setTimeout(load, POLL_MS);
  }

  /** Jobs that differ by seed only have one colour. */
  function loadCurves(table) {
    const all = table.rows.flatMap((row, colour) => row.jobs.map((job) => ({ job, colour })));
    const started = all.filter(({ job }) => job.step > 0).slice(0, MOST_CURVES);
    const steps = started.map(({ job }) => `${job.id} ${job.step}`).join();
    if (steps === drawn) return;
    askingCurves.ask(() => Promise.all(started.map(({ job }) => measured(job.id))), {
      answered(found) {
        const runs = found.map((run, place) => ({ ...run, key: started[place].job.id, label: shortName(started[place].job), colour: started[place].colour }));
        const keys = runs.map(({ key }) => key).join();
        // What is zoomed stays while the same jobs go on.
        if (keys !== shownJobs) show(runs, all.length);
        overlay?.draw(runs);
        [drawn, shownJobs] = [steps, keys];
      },
      refused: (error) => fill(curves, problemCard(error, { again: load })),
    });
  }

  function show(runs, all) {
    overlay?.close();
    overlay = runs.length ? new Overlay(runs) : null;
    const some = runs.length === MOST_CURVES && all > MOST_CURVES ? h("p", { class: "hint" }, t("group.curves.some", { n: MOST_CURVES })) : null;
    fill(curves, overlay ? [h("h2", {}, t("tab.curves")), h("p", { class: "hint" }, t("group.curves")), some, overlay.element] : null);
  }

  async function cancel() {
    fill(refusal);
    const isSure = await confirmed({ title: t("group.cancel.title"), text: t("group.cancel.text"), action: t("group.cancel"), danger: true });
    if (!isSure) return;
    try {
      await post(`/groups/${id}/cancel`);
      toast(t("done.cancel"));
      load();
    } catch (error) {
      fill(refusal, problemCard(error));
    }
  }

  load();
  return {
    element,
    go(parameters, next) {
      if (parameters.id !== id) return false;
      jobs = next.getAll("job");
      load();
      return true;
    },
    close() {
      asking.stop();
      askingCurves.stop();
      clearTimeout(timer);
      overlay?.close();
    },
    repaint: () => overlay?.repaint(),
  };
}

/** The page has words for what it can see itself; the service's own sentences are English. */
function cautions(table, isOver) {
  const left = isOver ? null : h("p", { class: "hint" }, t("group.unfinished"));
  const said = isOver ? table.cautions : table.cautions.slice(0, -1);
  return [left, said.map((sentence) => h("div", { class: "card warning" }, h("p", {}, raw(sentence, { lang: "en" }))))];
}

function settingsTable(table) {
  const names = FIGURES.filter(([name]) => table.rows.some((row) => row.figures[name]));
  const head = h(
    "tr",
    {},
    table.fields.map((field) => h("th", { scope: "col" }, raw(field, { class: "code" }))),
    h("th", { scope: "col", class: "number" }, t("group.jobs")),
    names.map(([name]) => h("th", { scope: "col", class: "number" }, t(`group.${name}`))),
  );
  const rows = table.rows.map((row) =>
    h(
      "tr",
      {},
      table.fields.map((field) => h("td", {}, raw(JSON.stringify(row.settings[field] ?? null), { class: "code" }))),
      h("td", { class: "number" }, number(row.jobs.length)),
      names.map((figure) => h("td", { class: "number" }, spread(row, figure))),
    ),
  );
  return h(
    "section",
    { class: "card" },
    h("h2", {}, t("group.settings")),
    h("p", { class: "hint" }, t("group.spread")),
    h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": t("group.settings") }, h("table", { class: "plain" }, h("thead", {}, head), h("tbody", {}, rows))),
  );
}

/** Mean ± standard deviation, with the range, and the number of jobs where not all have the figure. */
function spread(row, [name, show, showSpread]) {
  const figure = row.figures[name];
  if (!figure) return "–";
  const about = figure.sd === null ? "" : ` ± ${showSpread(figure.sd)}`;
  const some = figure.n < row.jobs.length ? ` (${figure.n})` : "";
  const range = figure.n > 1 ? h("div", { class: "hint" }, raw(`${show(figure.least)} … ${show(figure.most)}`)) : null;
  return [raw(`${show(figure.mean)}${about}${some}`), range];
}

function jobsTable(table) {
  const head = h("tr", {}, table.fields.map((field) => h("th", { scope: "col" }, raw(field, { class: "code" }))), ["jobs.name", "field.training.seed", "jobs.state", "jobs.progress"].map((key) => h("th", { scope: "col" }, t(key))));
  const rows = table.rows.flatMap((row) =>
    row.jobs.map((job) =>
      h(
        "tr",
        {},
        table.fields.map((field) => h("td", {}, raw(JSON.stringify(row.settings[field] ?? null), { class: "code" }))),
        h("td", {}, h("a", { href: `#/jobs/${job.id}` }, raw(shortName(job)))),
        h("td", { class: "number" }, number(job.spec.training.seed)),
        h("td", {}, badge(job.status, job.status === "running" ? job.phase : null)),
        h("td", {}, progressBar(job)),
      ),
    ),
  );
  return h(
    "section",
    { class: "card" },
    h("h2", {}, t("nav.jobs")),
    h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": t("nav.jobs") }, h("table", { class: "plain" }, h("thead", {}, head), h("tbody", {}, rows))),
  );
}
