// Who used what: limits with what is left, and GPU-hours by owner and kind of GPU, as a table and as CSV.

import { Asking, get, pagesOf, query as queryString } from "./api.js";
import { fill, h, raw, redraw } from "./dom.js";
import { bytes, fixed, number, t } from "./i18n.js";
import { busy, empty, everyoneBox, listTable, moreButton, problemCard, tile } from "./parts.js";
import { teamTabs } from "./team.js";

const PAGE = 200;
const DAY_MS = 86_400_000;
const PERIODS = ["total", "week", "day"];

export async function usageView(_parameters, query, holder) {
  const isOperator = holder.scopes.includes("operator");
  let filters = read(query);
  let pages = 1;
  const asking = new Asking();
  const bar = h("div", { class: "filters" });
  const limits = h("div", {}, busy());
  const report = h("div", { id: "usage" }, busy());
  const element = h("div", {}, h("h1", { tabindex: "-1" }, t("team.title")), teamTabs("usage"), limits, h("h2", {}, t("usage.hours")), bar, report);

  function drawFilters() {
    const go = (changes) => (location.hash = address({ ...filters, ...changes }));
    const day = (name) => {
      const input = h("input", { type: "date", id: name, value: filters[name], data: { focus: name }, onchange: () => go({ [name]: input.value }) });
      return h("label", {}, h("span", { class: "sub" }, t(`usage.${name}`)), " ", input);
    };
    const periods = h("select", { id: "by", class: "quiet", data: { focus: "by" }, "aria-label": t("usage.by"), onchange: () => go({ by: periods.value }) }, PERIODS.map((name) => h("option", { value: name, selected: name === filters.by }, t(`usage.by.${name}`))));
    const everyone = isOperator ? everyoneBox(filters.owner === "*", (owner) => go({ owner })) : null;
    const csv = h("a", { class: "button quiet", href: `/usage/gpu-hours${queryString({ ...filters, format: "csv" })}`, download: "" }, t("usage.csv"));
    redraw(bar, day("since"), day("until"), periods, everyone, csv);
  }

  async function load() {
    const isEveryone = isOperator && filters.owner === "*";
    const [own, rows] = await Promise.all([isEveryone ? pagesOf("/usage/owners", { limit: 100 }, pages) : get("/usage"), pagesOf("/usage/gpu-hours", { ...filters, limit: PAGE }, pages)]);
    return { own, rows, isEveryone };
  }

  function refresh() {
    asking.ask(load, { answered: draw, refused: (error) => (fill(limits), fill(report, problemCard(error, { again: refresh }))) });
  }

  function draw({ own, rows, isEveryone }) {
    redraw(limits, isEveryone ? ownersTable(own.data) : ownTiles(own));
    if (!rows.data.length) {
      fill(report, empty(t("usage.none"), h("p", {}, t("usage.none.hint"))));
      return;
    }
    const isMore = rows.has_more || (isEveryone && own.has_more);
    redraw(report, hoursTable(rows, filters.by), moreButton(isMore, () => ((pages += 1), refresh())));
  }

  drawFilters();
  refresh();
  return {
    element,
    go(_ignored, next) {
      filters = read(next);
      pages = 1;
      drawFilters();
      refresh();
      return true;
    },
    close: () => asking.stop(),
  };
}

function read(query) {
  const today = new Date();
  const day = (date) => date.toISOString().slice(0, 10);
  const by = query.get("by") ?? "";
  return {
    since: query.get("since") || day(new Date(today.getTime() - 29 * DAY_MS)),
    until: query.get("until") || day(today),
    by: PERIODS.includes(by) ? by : "total",
    owner: query.get("owner") ?? "",
  };
}

function address(filters) {
  return `#/usage${queryString(filters)}`;
}

function ownTiles({ gpu_hours: gpu, stored_bytes: stored, unfinished_jobs: jobs }) {
  const of = (limit, left, write) => (limit === null ? t("usage.unlimited") : t("usage.left", { left: write(left), limit: write(limit) }));
  const hours = (value) => number(value, 3);
  return h(
    "dl",
    { class: "tiles sizes" },
    tile(t("usage.hours.days", { n: gpu.window_days }), hours(gpu.used), of(gpu.limit, gpu.left, hours)),
    tile(t("usage.stored"), bytes(stored.used), of(stored.limit, stored.left, bytes)),
    tile(t("usage.unfinished"), number(jobs.used), of(jobs.limit, jobs.left, number)),
  );
}

function ownersTable(owners) {
  const heads = [t("usage.owner"), [t("usage.hours"), true], [t("usage.hours.left"), true], [t("usage.stored"), true], [t("usage.stored.left"), true], [t("usage.unfinished"), true]];
  const left = (value, write) => raw(value === null ? "∞" : write(value), value === null ? { title: t("usage.unlimited") } : {});
  const row = ({ owner, gpu_hours: gpu, stored_bytes: stored, unfinished_jobs: jobs }) =>
    h("tr", { data: { owner } }, h("td", {}, raw(owner, { class: "strong breaks" })), h("td", { class: "num" }, raw(fixed(gpu.used, 2))), h("td", { class: "num" }, left(gpu.left, (value) => fixed(value, 2))), h("td", { class: "num" }, raw(bytes(stored.used))), h("td", { class: "num" }, left(stored.left, bytes)), h("td", { class: "num" }, raw(number(jobs.used))));
  return listTable("usage", t("usage.owners"), heads, owners.map(row));
}

function hoursTable({ data, currency }, by) {
  const heads = [by === "total" ? null : t(`usage.start.${by}`), t("usage.owner"), t("usage.gpu"), [t("usage.hours"), true], [t("usage.jobs"), true], currency ? [t("usage.cost", { currency }), true] : null];
  const row = (one) =>
    h(
      "tr",
      { data: { owner: one.owner, gpu: one.gpu ?? "" } },
      by === "total" ? null : h("td", {}, raw(one.start)),
      h("td", {}, raw(one.owner, { class: "breaks" })),
      h("td", {}, one.gpu === null ? h("span", { class: "hint" }, t("usage.gpu.unknown")) : raw(one.gpu)),
      h("td", { class: "num" }, raw(fixed(one.gpu_hours, 2))),
      h("td", { class: "num" }, raw(number(one.jobs))),
      currency ? h("td", { class: "num" }, raw(fixed(one.cost, 2))) : null,
    );
  return listTable("usage", t("usage.hours"), heads, data.map(row));
}
