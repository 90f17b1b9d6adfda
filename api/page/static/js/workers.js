// The fleet: what each worker is doing; and for operators, buttons that drain one.

import { Asking, get, post, request, query as queryString } from "./api.js";
import { fill, h, raw, redraw } from "./dom.js";
import { has, number, t, time } from "./i18n.js";
import { busy, confirmed, empty, listTable, moreButton, problemCard, toast } from "./parts.js";
import { teamTabs } from "./team.js";

const POLL_MS = 4000;
const PAGE = 100;

export async function workersView(_parameters, _query, holder) {
  const mayDrain = holder.scopes.includes("operator");
  const list = h("div", { id: "workers" }, busy());
  const refusal = h("div", { class: "notes" });
  const element = h("div", {}, h("h1", { tabindex: "-1" }, t("team.title")), teamTabs("workers"), refusal, list);
  const asking = new Asking();
  let pages = 1;
  /** @type {number | undefined} */
  let timer;

  async function load() {
    const data = [];
    let cursor = null;
    for (let page = 0; page < pages; page += 1) {
      const answer = await get(`/workers${queryString({ limit: PAGE, cursor })}`);
      data.push(...answer.data);
      cursor = answer.next_cursor;
      if (!cursor) break;
    }
    return { data, more: Boolean(cursor) };
  }

  function refresh() {
    clearTimeout(timer);
    if (document.hidden) return;
    asking.ask(load, { answered: draw, refused });
  }

  function refused(error) {
    fill(list, problemCard(error, { again: refresh }));
    timer = setTimeout(refresh, POLL_MS);
  }

  function draw({ data, more }) {
    timer = setTimeout(refresh, POLL_MS);
    if (!data.length) {
      fill(list, empty(t("workers.none"), h("p", {}, t("workers.none.hint"), " ", raw("grpo worker", { class: "code" }))));
      return;
    }
    const heads = ["name", "state", "machine", "job", "version", "seen"].map((name) => t(`workers.${name}`));
    const last = mayDrain ? h("span", { class: "sr-only" }, t("workers.drain")) : null;
    redraw(
      list,
      listTable("workers", t("tab.workers"), [...heads, last], data.map(row)),
      moreButton(more, () => ((pages += 1), refresh())),
    );
  }

  function row(worker) {
    return h(
      "tr",
      { data: { worker: worker.name } },
      h("td", { class: "name" }, raw(worker.name, { class: "strong breaks" }), h("div", { class: "sub" }, worker.host && worker.host !== worker.name ? raw(worker.host) : null, worker.queues.length ? h("details", {}, h("summary", {}, t("workers.queues", { n: worker.queues.length })), raw(worker.queues.join(", "), { class: "code" })) : null)),
      h("td", { class: "state" }, h("span", { class: `badge worker-${worker.state}` }, h("i", { class: "dot", "aria-hidden": "true" }), t(`worker.${worker.state}`)), worker.drain ? h("div", { class: "sub" }, t(`workers.drain.${worker.drain.mode}`, { by: worker.drain.by })) : null),
      h("td", {}, raw(worker.device ?? "–"), h("div", { class: "sub" }, raw(facts(worker).join(" · ")))),
      h("td", {}, job(worker.job)),
      h("td", {}, raw(worker.version ?? "–")),
      h("td", { class: "age" }, worker.last_seen_at ? time(worker.last_seen_at) : raw("–")),
      mayDrain ? h("td", {}, h("div", { class: "actions" }, buttons(worker))) : null,
    );
  }

  function buttons(worker) {
    const button = (name, call) => h("button", { type: "button", class: "quiet", data: { focus: `${name}-${worker.name}`, action: name }, onclick: call }, t(`workers.${name}`));
    if (!worker.drain) return [button("drain", () => order(worker, "finish"))];
    const isBusy = worker.job && worker.drain.mode === "finish";
    return [isBusy ? button("checkpoint", () => order(worker, "checkpoint")) : null, button("undrain", () => order(worker, null))];
  }

  async function order(worker, mode) {
    fill(refusal);
    const isSure = mode === null || (await confirmed({ title: t(`workers.confirm.${mode}`, { name: worker.name }), text: t(`workers.confirm.${mode}.text`), action: t(mode === "finish" ? "workers.drain" : "workers.checkpoint") }));
    if (!isSure) return;
    const path = `/workers/${encodeURIComponent(worker.name)}/drain`;
    try {
      await (mode === null ? request(path, { method: "DELETE" }) : post(path, { mode }));
      toast(t(mode === null ? "workers.done.undrain" : "workers.done.drain"));
    } catch (error) {
      fill(refusal, problemCard(error));
    }
    refresh();
  }

  refresh();
  const onVisible = () => !document.hidden && refresh();
  document.addEventListener("visibilitychange", onVisible);
  return {
    element,
    close() {
      asking.stop();
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", onVisible);
    },
  };
}

function facts(worker) {
  const memory = (value) => `${number(value, 0)} GB`;
  return [worker.gpu_memory_gb && memory(worker.gpu_memory_gb), worker.memory_gb && `RAM ${memory(worker.memory_gb)}`, ...worker.engines].filter(Boolean);
}

/** Whose job it is is known to that owner and to operators. */
function job(found) {
  if (!found) return raw("–");
  const phase = found.phase && has(`phase.${found.phase}`) ? h("div", { class: "sub" }, t(`phase.${found.phase}`), " ", raw(`${number(found.step)} / ${number(found.total_steps)}`)) : null;
  if (!found.id) return [h("span", { class: "hint" }, t("workers.job.hidden")), phase];
  return [h("a", { href: `#/jobs/${found.id}` }, raw(found.name || found.id)), h("div", { class: "sub" }, raw(found.owner)), phase];
}
