// The list of jobs: what each is doing, how its reward goes, when it will be done. One request every few seconds.

import { Asking, get, post, query as queryString, Problem } from "./api.js";
import { fill, h, raw, redraw } from "./dom.js";
import { duration, fixed, has, t, time } from "./i18n.js";
import { sparkline } from "./sparkline.js";
import { badge, busy, confirmed, empty, jobName, moreButton, problemCard, progressBar, toast } from "./parts.js";

const POLL_MS = 4000;
const PAGE = 25;
const PAIR = /^([^=]+)=(.+)$/;
const KINDS = ["training", "try", "serving", "export"];
const SORTS = ["-created", "-updated", "name", "status", "-priority", "-reward", "owner"];
/** What a row shows of a job: the rest of its spec is not sent. */
const FIELDS = ["id", "name", "owner", "status", "phase", "metadata", "spec.kind", "spec.model.name", "epoch", "step", "total_steps", "progress", "checkpoint_step", "reward", "created_at", "updated_at", "started_at", "finished_at", "group", "priority", "error"].join(",");
const STATUSES = ["queued", "running", "paused", "succeeded", "failed", "cancelled"];

export async function jobsView(_, query, holder) {
  const isOperator = holder.scopes.includes("operator");
  const mayWrite = holder.scopes.includes("jobs:write");
  let filters = read(query);
  let pages = 1;
  const curves = {};
  const drawnAt = {};
  let chosen = new Set();
  const asking = new Asking();
  /** @type {number | undefined} */
  let timer;

  const list = h("div", { id: "list" }, busy());
  const bar = h("div", { class: "filters" });
  const refusal = h("div", { class: "notes" });
  const compare = h("div", { class: "compare-bar", "aria-live": "polite" });
  const element = h("div", {}, h("div", { class: "title-row" }, h("h1", { tabindex: "-1" }, t("nav.jobs")), h("a", { class: "button primary", href: "#/new" }, t("nav.new"))), bar, compare, refusal, list);

  function drawFilters() {
    const chip = (status, text) => h("a", { class: "chip", data: { focus: `status-${status}` }, href: address({ ...filters, status }), "aria-current": filters.status === status ? "true" : null }, text);
    const field = h("input", { type: "search", id: "metadata", data: { focus: "metadata" }, value: filters.metadata, placeholder: t("jobs.metadata.example"), "aria-label": t("jobs.metadata"), title: t("jobs.metadata"), onchange: () => (location.hash = address({ ...filters, metadata: field.value.trim() })) });
    const search = h("input", { type: "search", id: "search", data: { focus: "search" }, value: filters.search, placeholder: t("jobs.search.example"), "aria-label": t("jobs.search"), title: t("jobs.search"), maxlength: 100, onchange: () => (location.hash = address({ ...filters, search: search.value.trim() })) });
    const priorities = ["", "high", "normal", "low"].map((name) => h("option", { value: name, selected: name === filters.priority }, name ? t(`priority.${name}`) : t("jobs.priority.all")));
    const priority = h("select", { id: "priority", class: "quiet", data: { focus: "priority" }, "aria-label": t("jobs.priority"), onchange: () => (location.hash = address({ ...filters, priority: priority.value })) }, priorities);
    const kind = h("select", { id: "kind", class: "quiet", data: { focus: "kind" }, "aria-label": t("jobs.kind"), onchange: () => (location.hash = address({ ...filters, kind: kind.value })) }, ["", ...KINDS].map((name) => h("option", { value: name, selected: name === filters.kind }, t(`jobs.kind.${name || "all"}`))));
    const sorts = SORTS.filter((name) => name !== "owner" || isOperator);
    const sort = h("select", { id: "sort", class: "quiet", data: { focus: "sort" }, "aria-label": t("jobs.sort"), onchange: () => (location.hash = address({ ...filters, sort: sort.value === SORTS[0] ? "" : sort.value })) }, sorts.map((name) => h("option", { value: name, selected: name === (filters.sort || SORTS[0]) }, t(`jobs.sort.${name.replace("-", "")}`))));
    const everyone = isOperator ? h("label", { class: "everyone" }, h("input", { type: "checkbox", id: "everyone", checked: filters.owner === "*", data: { focus: "everyone" }, onchange: (event) => (location.hash = address({ ...filters, owner: event.target.checked ? "*" : "" })) }), " ", t("jobs.everyone")) : null;
    redraw(bar, h("div", { class: "chips", role: "group", "aria-label": t("jobs.status") }, chip("", t("jobs.all")), STATUSES.map((status) => chip(status, t(`status.${status}`)))), everyone, kind, priority, sort, search, field);
  }

  async function load() {
    const data = [];
    let cursor = null;
    let more = false;
    const pair = PAIR.exec(filters.metadata);
    if (filters.metadata && !pair) return { data, more };
    for (let page = 0; page < pages; page += 1) {
      const values = { limit: PAGE, cursor, status: filters.status, search: filters.search, kind: filters.kind, priority: filters.priority, owner: filters.owner, sort: filters.sort, fields: FIELDS };
      if (pair) values[`metadata[${pair[1].trim()}]`] = pair[2].trim();
      const answer = await get(`/jobs${queryString(values)}`);
      data.push(...answer.data);
      cursor = answer.next_cursor;
      more = answer.has_more;
      if (!more) break;
    }
    return { data, more };
  }

  async function loadCurves(jobs) {
    const found = {};
    for (let place = 0; place < jobs.length; place += 50) {
      Object.assign(found, await get(`/page/curves${queryString({ job: jobs.slice(place, place + 50).map((job) => job.id) })}`));
    }
    return found;
  }

  /** The jobs first, then the curves of those that moved; a round that begins meanwhile takes its place. */
  function refresh() {
    clearTimeout(timer);
    if (document.hidden) return; // being seen again begins a round
    asking.ask(load, { answered: (jobs) => (draw(jobs), refreshCurves(jobs)), refused });
  }

  function refreshCurves(jobs) {
    const changed = jobs.data.filter((job) => job.step > 0 && drawnAt[job.id] !== `${job.status} ${job.step}`);
    if (!changed.length) {
      later();
      return;
    }
    const answered = (found) => {
      Object.assign(curves, found);
      for (const job of changed) drawnAt[job.id] = `${job.status} ${job.step}`;
      draw(jobs);
      later();
    };
    asking.ask(() => loadCurves(changed), { answered, refused });
  }

  function refused(error) {
    list.removeAttribute("aria-busy");
    if (error instanceof Problem && error.status < 500 && error.status !== 429) {
      fill(list, problemCard(error));
      return;
    }
    if (!list.querySelector(".card.danger")) list.prepend(problemCard(error));
    later();
  }

  function later() {
    timer = setTimeout(refresh, POLL_MS);
  }

  function draw({ data, more }) {
    list.removeAttribute("aria-busy");
    if (!data.length) {
      const isFiltered = filters.status || filters.metadata || filters.search || filters.priority || filters.kind;
      const isMisread = filters.metadata && !PAIR.test(filters.metadata);
      fill(list, isFiltered ? empty(t(isMisread ? "jobs.metadata.misread" : "jobs.none.filtered"), h("p", {}, h("a", { href: "#/" }, t("jobs.all")))) : empty(t("jobs.none"), h("p", {}, t("jobs.none.hint")), h("p", {}, h("a", { class: "button primary", href: "#/new" }, t("nav.new")))));
      return;
    }
    const head = h(
      "tr",
      {},
      h("th", { scope: "col", class: "pick" }, h("span", { class: "sr-only" }, t("nav.compare"))),
      ["name", "state", "progress", "reward", "eta", "age"].map((name) => h("th", { scope: "col" }, t(`jobs.${name}`))),
    );
    redraw(
      list,
      h("div", { class: "card flush" }, h("table", { class: "jobs" }, h("caption", { class: "sr-only" }, t("nav.jobs")), h("thead", {}, head), h("tbody", {}, data.map(row)))),
      moreButton(more, () => ((pages += 1), refresh())),
    );
  }

  function row(job) {
    const box = h("input", { type: "checkbox", checked: chosen.has(job.id), "aria-label": t("jobs.pick", { name: jobName(job) }), data: { focus: `pick-${job.id}` }, onchange: () => pick(job.id, box.checked) });
    const tags = Object.entries(job.metadata).slice(0, 3);
    return h(
      "tr",
      { data: { job: job.id } },
      h("td", { class: "pick" }, box),
      h("td", { class: "name" }, h("a", { href: `#/jobs/${job.id}`, data: { focus: job.id } }, raw(jobName(job))), h("div", { class: "sub" }, raw(job.spec.model.name), job.spec.kind && job.spec.kind !== "training" ? h("span", { class: "tag kind" }, t(`jobs.kind.${job.spec.kind}`)) : null, filters.owner ? raw(job.owner, { class: "tag" }) : null, job.priority && job.priority !== "normal" ? h("span", { class: `tag priority-${job.priority}` }, t(`priority.${job.priority}`)) : null, job.group ? h("a", { class: "tag", href: `#/groups/${job.group}`, data: { focus: `group-${job.id}` } }, t("group.title")) : null, tags.map(([key, value]) => raw(`${key}=${value}`, { class: "tag" })))),
      h("td", { class: "state" }, badge(job.status, job.status === "running" ? job.phase : null), job.error ? h("div", { class: "sub" }, has(`class.${job.error.class}`) ? t(`class.${job.error.class}`) : raw(job.error.class)) : null),
      h("td", { class: "steps" }, progressBar(job)),
      h("td", { class: "reward" }, raw(fixed(job.reward, 2), { class: "value" }), sparkline(curves[job.id])),
      h("td", { class: "eta" }, eta(job)),
      h("td", { class: "age" }, time(job.created_at)),
    );
  }

  function pick(id, isPicked) {
    if (isPicked) chosen.add(id);
    else chosen.delete(id);
    drawCompare();
  }

  function drawCompare() {
    if (!chosen.size) return fill(compare);
    const [a, b] = chosen;
    return fill(
      compare,
      h("span", {}, t("jobs.picked", { n: chosen.size })),
      chosen.size > 1 ? h("a", { class: "button", href: chosen.size === 2 ? `#/compare?a=${a}&b=${b}` : `#/comparison${queryString({ job: [...chosen] })}` }, t("nav.compare")) : h("span", { class: "hint" }, t("jobs.pick.two")),
      mayWrite ? ["cancel", "pause", "resume", "delete"].map((action) => h("button", { type: "button", class: action === "delete" ? "quiet danger" : "quiet", data: { action }, onclick: () => act(action) }, t(`action.${action}`))) : null,
      h("button", { type: "button", class: "quiet", onclick: () => ((chosen = new Set()), drawCompare(), refresh()) }, t("clear")),
    );
  }

  /** One request for all that are chosen; what was refused is said for each, and stays chosen. */
  async function act(action) {
    fill(refusal);
    const isSure = await confirmed({ title: t("jobs.act.title", { n: chosen.size, action: t(`action.${action}`) }), text: t(`confirm.${action}.text`), action: t(`action.${action}`), danger: action === "delete" || action === "cancel" });
    if (!isSure) return;
    try {
      const ids = [...chosen];
      const results = [];
      for (let place = 0; place < ids.length; place += 100) results.push(...(await post("/jobs/actions", { action, jobs: ids.slice(place, place + 100) })).data);
      const left = results.filter((result) => !result.done);
      chosen = new Set(left.map((result) => result.id));
      if (left.length) fill(refusal, h("div", { class: "card danger", role: "alert" }, h("p", { class: "strong" }, t("jobs.act.refused", { n: left.length })), h("ul", {}, left.map((result) => h("li", {}, raw(result.detail, { lang: "en" }))))));
      if (left.length < results.length) toast(t("jobs.act.done", { n: results.length - left.length }));
    } catch (error) {
      fill(refusal, problemCard(error));
    }
    drawCompare();
    refresh();
  }

  drawFilters();
  refresh();
  const onVisible = () => !document.hidden && refresh();
  document.addEventListener("visibilitychange", onVisible);

  return {
    element,
    go(_parameters, next) {
      filters = read(next);
      pages = 1;
      drawFilters();
      list.setAttribute("aria-busy", "true");
      refresh();
      return true;
    },
    close() {
      asking.stop();
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", onVisible);
    },
    repaint() {},
  };
}

function read(query) {
  const status = query.get("status") ?? "";
  const text = (name) => query.get(name) ?? "";
  return { status: STATUSES.includes(status) ? status : "", metadata: text("metadata"), search: text("search"), priority: text("priority"), kind: KINDS.includes(text("kind")) ? text("kind") : "", sort: SORTS.includes(text("sort")) ? text("sort") : "", owner: text("owner") };
}

function address(filters) {
  return `#/${queryString(filters)}`;
}

/** What is left of a running job at its pace so far; how long an ended one took. */
function eta(job) {
  if (job.finished_at && job.started_at) return raw(duration((Date.parse(job.finished_at) - Date.parse(job.started_at)) / 1000), { class: "took" });
  // It has run since `started_at` only where it was neither paused nor lost; of the questions after the last step nothing is known.
  if (job.status !== "running" || !job.step || !job.started_at || job.epoch > 1 || job.step >= job.total_steps) return raw("–");
  const seconds = ((Date.parse(job.updated_at) - Date.parse(job.started_at)) / 1000 / job.step) * (job.total_steps - job.step);
  return t("jobs.left", { time: duration(seconds) });
}
