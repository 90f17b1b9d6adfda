// Data sets: which there are, their rows, the jobs that use them; an upload that shows how far it is; and the end of one.

import { Asking, Problem, get, pagesOf, query as queryString, request, upload } from "./api.js";
import { TYPES, dropZone } from "./dropzone.js";
import { fill, h, raw, redraw } from "./dom.js";
import { bytes, number, percent, t, time } from "./i18n.js";
import { badge, busy, confirmed, copyButton, empty, everyoneBox, jobName, listTable, moreButton, problemCard, tile, toast } from "./parts.js";

const PAGE = 25;
const ROWS = 20;

export async function datasetsView(_parameters, query, holder) {
  const isOperator = holder.scopes.includes("operator");
  const mayWrite = holder.scopes.includes("datasets:write");
  let whose = query.get("owner") ?? "";
  let pages = 1;
  const asking = new Asking();
  const leaving = new AbortController();
  const status = h("div", { class: "upload-status", role: "status" });
  const bar = h("div", { class: "filters" });
  const list = h("div", { id: "datasets" }, busy());
  const element = h("div", {}, h("h1", { tabindex: "-1" }, t("nav.data")), mayWrite ? dropZone("upload", take) : null, status, bar, list);

  async function take(file) {
    const meter = h("progress", { max: 1, value: 0, "aria-label": t("datasets.sending", { name: file.name }) });
    const words = h("span", { class: "sub" });
    const stop = new AbortController();
    leaving.signal.addEventListener("abort", () => stop.abort());
    const progress = (sent, all) => {
      meter.value = all ? sent / all : 1;
      // The service reads every row before it answers.
      words.textContent = sent < all ? `${bytes(sent)} / ${bytes(all)} · ${percent(sent / all, 0)}` : t("datasets.checking");
    };
    fill(status, h("div", { class: "card uploading" }, h("p", {}, raw(file.name, { class: "strong breaks" })), meter, words, h("button", { type: "button", class: "quiet", onclick: () => stop.abort() }, t("datasets.stop"))));
    try {
      const made = await upload(`/datasets${queryString({ name: file.name.slice(0, 100) })}`, file, { type: TYPES[file.name.split(".").at(-1).toLowerCase()] ?? TYPES.jsonl, progress, signal: stop.signal });
      fill(status, h("p", { class: "ready" }, t("data.stored", { name: made.name ?? made.id, n: made.rows })));
      refresh();
    } catch (error) {
      fill(status, stop.signal.aborted ? null : problemCard(error));
    }
  }

  function drawFilters() {
    if (!isOperator) return;
    redraw(bar, everyoneBox(whose === "*", (owner) => (location.hash = `#/datasets${queryString({ owner })}`)));
  }

  function refresh() {
    asking.ask(() => pagesOf("/datasets", { owner: whose, limit: PAGE }, pages), { answered: draw, refused: (error) => fill(list, problemCard(error, { again: refresh })) });
  }

  function draw({ data, has_more: more }) {
    if (!data.length) {
      fill(list, empty(t("datasets.none"), h("p", {}, t("datasets.none.hint"))));
      return;
    }
    const heads = [t("datasets.name"), [t("datasets.rows"), true], [t("datasets.size"), true], t("datasets.created")];
    redraw(
      list,
      listTable("datasets", t("nav.data"), heads, data.map(row)),
      moreButton(more, () => ((pages += 1), refresh())),
    );
  }

  function row(dataset) {
    return h(
      "tr",
      { data: { dataset: dataset.id } },
      h("td", { class: "name" }, h("a", { href: `#/datasets/${dataset.id}`, data: { focus: dataset.id }, class: "breaks" }, raw(dataset.name ?? dataset.id)), h("div", { class: "sub" }, raw(dataset.columns.join(", ")), whose ? raw(dataset.owner, { class: "tag" }) : null)),
      h("td", { class: "num" }, raw(number(dataset.rows))),
      h("td", { class: "num" }, raw(bytes(dataset.bytes))),
      h("td", { class: "age" }, time(dataset.created_at)),
    );
  }

  drawFilters();
  refresh();
  return {
    element,
    go(_ignored, next) {
      whose = next.get("owner") ?? "";
      pages = 1;
      drawFilters();
      refresh();
      return true;
    },
    close() {
      asking.stop();
      leaving.abort();
    },
  };
}

export async function datasetView({ id }, _query, holder) {
  const [dataset, jobs] = await Promise.all([get(`/datasets/${id}`), get(`/datasets/${id}/jobs${queryString({ limit: 20 })}`)]);
  const notes = h("div", { class: "notes" });
  const rows = h("div", { id: "rows" }, busy());
  const asking = new Asking();
  const remove = holder.scopes.includes("datasets:write") ? h("button", { type: "button", class: "danger", data: { action: "delete" }, onclick: erase }, t("datasets.delete")) : null;
  const element = h(
    "div",
    {},
    h("div", { class: "title-row" }, h("h1", { tabindex: "-1" }, raw(dataset.name ?? dataset.id, { class: "breaks" })), remove),
    h("div", { class: "facts" }, h("span", { class: "id" }, raw(dataset.id, { class: "code" }), copyButton(dataset.id, t("copy"))), raw(dataset.owner), h("span", {}, t("datasets.created"), " ", time(dataset.created_at))),
    notes,
    h("dl", { class: "tiles sizes" }, tile(t("datasets.rows"), number(dataset.rows)), tile(t("datasets.size"), bytes(dataset.bytes)), tile(t("datasets.columns"), dataset.columns.join(", ") || "–")),
    h("p", { class: "hint" }, "SHA-256 ", raw(dataset.sha256, { class: "code breaks" })),
    h("h2", {}, t("datasets.users")),
    users(),
    h("h2", {}, t("datasets.rows")),
    rows,
  );

  function users() {
    if (!jobs.data.length) return h("p", { class: "hint" }, t("datasets.unused"));
    const line = (job) => h("li", { data: { job: job.id } }, h("a", { href: `#/jobs/${job.id}` }, raw(jobName(job))), " ", badge(job.status));
    return h("ul", { class: "card users" }, jobs.data.map(line), jobs.has_more ? h("li", { class: "hint" }, t("datasets.users.more")) : null);
  }

  /** @param {string | null} cursor */
  function more(cursor) {
    asking.ask(() => get(`/datasets/${id}/rows${queryString({ limit: ROWS, cursor })}`), { answered: (page) => draw(page, cursor === null), refused: (error) => fill(rows, problemCard(error, { again: () => more(cursor) })) });
  }

  function draw({ data, next_cursor: next }, isFirst) {
    if (isFirst) {
      const names = [...new Set(data.flatMap((one) => Object.keys(one.values)))];
      fill(rows, h("div", { class: "card flush scroll" }, h("table", { class: "jobs rows", data: { names: JSON.stringify(names) } }, h("caption", { class: "sr-only" }, t("datasets.rows")), h("thead", {}, h("tr", {}, h("th", { scope: "col", class: "num" }, "#"), names.map((name) => h("th", { scope: "col" }, raw(name))))), h("tbody", {}))), h("div", {}));
    }
    const names = JSON.parse(/** @type {HTMLElement} */ (rows.querySelector("table")).dataset.names ?? "[]");
    const text = (value) => (value === undefined ? "" : typeof value === "string" ? value : JSON.stringify(value));
    rows.querySelector("tbody")?.append(...data.map((one) => h("tr", { data: { row: String(one.row) } }, h("td", { class: "num" }, raw(number(one.row + 1))), names.map((name) => h("td", {}, h("div", { class: "cell" }, raw(text(one.values[name]))))))));
    const button = next ? h("button", { type: "button", onclick: () => more(next) }, t("more")) : null;
    fill(/** @type {Element} */ (rows.lastElementChild), button && h("p", { class: "more" }, button));
  }

  async function erase() {
    const name = dataset.name ?? dataset.id;
    if (!(await confirmed({ title: t("datasets.delete.title", { name }), text: t("datasets.delete.text"), action: t("datasets.delete"), danger: true }))) return;
    fill(notes);
    try {
      await request(`/datasets/${id}`, { method: "DELETE" });
      toast(t("datasets.deleted", { name }));
      location.hash = "#/datasets";
    } catch (error) {
      if (error instanceof Problem && error.status === 404) location.hash = "#/datasets";
      else fill(notes, problemCard(error));
    }
  }

  more(null);
  return { element, close: () => asking.stop() };
}
