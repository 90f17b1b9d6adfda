// One job: what it is doing now, what can be done with it, and a tab for each thing there is to know.

import { post, query as queryString, request } from "./api.js";
import { fill, h, raw, redraw } from "./dom.js";
import { duration, fixed, number, percent, signed, t, time } from "./i18n.js";
import { exportDialog } from "./export.js";
import { badge, confirmed, copyButton, failureCard, jobName, nowhere, problemCard, progressBar, prose, tile, toast } from "./parts.js";
import { ENDED, JobFeed } from "./feed.js";
import { curvesTab } from "./curves.js";
import { eventsTab } from "./events.js";
import { filesTab } from "./files.js";
import { reportTab } from "./report.js";
import { rolloutsTab } from "./rollouts.js";
import { canTalk } from "./serving.js";
import { specTab } from "./spec.js";
import { overBy, warningCard } from "./warning.js";

const MOVING = new Set(["running", "pausing", "cancelling"]);
const TABS = { curves: curvesTab, rollouts: rolloutsTab, events: eventsTab, report: reportTab, files: filesTab, spec: specTab };

export async function jobView({ id, tab = "curves" }, query, holder) {
  const feed = new JobFeed(id);
  await feed.open();
  const mayWrite = holder.scopes.includes("jobs:write");

  const head = h("div", { class: "job-head" });
  const tiles = h("dl", { class: "tiles" });
  const refusal = h("div", { class: "notes" });
  const trouble = h("div", { class: "notes" });
  const notes = h("div", { class: "notes" });
  const navigation = h("nav", { class: "tabs", "aria-label": t("job.tabs") });
  const panel = h("section", { class: "panel" });
  const actions = h("div", { class: "actions" });
  const state = h("div", { class: "state" });
  const live = h("span", { class: "live" });
  const spent = h("span", { id: "spent" });
  fill(
    head,
    h("p", { class: "crumbs" }, h("a", { href: "#/" }, t("nav.jobs"))),
    h("div", { class: "title-row" }, h("h1", { tabindex: "-1" }, raw(jobName(feed.job))), actions),
    h("div", { class: "facts" }, state, live, spent, h("span", { class: "id" }, raw(id, { class: "code" }), copyButton(id, t("copy"))), raw(feed.job.spec.model.name), feed.job.group ? h("a", { class: "tag", href: `#/groups/${feed.job.group}` }, t("group.title")) : null, h("span", {}, t("job.submitted"), " ", time(feed.job.created_at))),
  );

  let shownTab = null;
  /** @type {import("./parts.js").View | null} */
  let opened = null;
  let drawnActions = "";

  function drawTabs() {
    const counts = { events: feed.events.filter((event) => event.type === "warning").length || "" };
    redraw(
      navigation,
      Object.keys(TABS).map((name) => h("a", { href: `#/jobs/${id}/${name}`, data: { focus: name }, "aria-current": name === shownTab ? "page" : null }, t(`tab.${name}`), counts[name] ? raw(String(counts[name]), { class: "count" }) : null)),
    );
    const here = navigation.querySelector("[aria-current]");
    if (here) navigation.scrollLeft = here.offsetLeft - navigation.offsetLeft - 40;
  }

  function openTab(name, values) {
    const wanted = name in TABS ? name : "curves";
    if (wanted === shownTab && opened?.go?.(values)) return;
    opened?.close?.();
    shownTab = wanted;
    drawTabs();
    // What is said here is said once: the other tabs begin with their own.
    showTiles();
    drawNotes(feed.job);
    panel.setAttribute("aria-label", t(`tab.${wanted}`));
    const made = TABS[wanted](feed, values, (path, parameters = {}) => (location.hash = `/jobs/${id}/${path}${queryString(parameters)}`));
    opened = made;
    fill(panel, made.element);
    made.update?.();
  }

  /** A row of dashes tells nothing: before the first step only the progress is there. */
  function showTiles() {
    tiles.hidden = shownTab !== "curves" || (ENDED.has(feed.job.status) && !feed.metrics.length);
    tiles.classList.toggle("bare", !feed.metrics.length);
  }

  function draw() {
    const { job } = feed;
    if (feed.state === "gone") {
      opened?.close?.();
      opened = null;
      fill(element, nowhere());
      return;
    }
    fill(state, badge(job.status, MOVING.has(job.status) ? job.phase : null));
    const isTold = feed.state === "broken" || (feed.state === "live" && MOVING.has(job.status));
    fill(live, isTold ? h("span", { class: feed.state, title: t(`live.${feed.state}.hint`) }, t(`live.${feed.state}`)) : null);
    fill(spent, use(job.use));
    drawActions(job);
    drawTiles(job);
    showTiles();
    drawNotes(job);
    const warnings = feed.events.filter((event) => event.type === "warning").length;
    if (String(warnings) !== navigation.dataset.warnings) {
      navigation.dataset.warnings = String(warnings);
      drawTabs();
    }
    opened?.update?.();
  }

  function drawTiles(job) {
    const last = feed.metrics.at(-1);
    const first = feed.metrics.slice(0, Math.max(1, Math.min(5, Math.floor(feed.metrics.length / 2))));
    const begun = mean(first.map((metric) => metric.reward));
    const now = mean(feed.metrics.slice(-5).map((metric) => metric.reward));
    const change = begun !== null && now !== null && feed.metrics.length > 5 ? t("tile.since", { change: signed(now - begun, 2) }) : null;
    fill(
      tiles,
      tile(t("metric.reward"), fixed(last?.reward, 2), change),
      h("div", { class: "tile progress-tile" }, h("dt", {}, t("jobs.progress")), h("dd", {}, progressBar(job)), h("dd", { class: "note" }, pace(job))),
      tile(t("tile.length"), number(last?.completion_tokens_mean, 3), t("tile.length.unit")),
      tile(t("tile.truncated"), percent(last?.truncated_share, 0), t("tile.truncated.note")),
      tile(t("tile.zero_variance"), percent(last?.zero_variance_share, 0), t("tile.zero_variance.note")),
      tile(t("tile.speed"), number(last?.completions_per_s, 3), t("tile.speed.unit"), { class: "tile speed" }),
    );
  }

  /** What the progress means in time, and from where the job could go on. */
  function pace(job) {
    const saved = job.checkpoint_step;
    const left = feed.eta();
    const took = job.started_at ? (Date.parse(job.finished_at ?? new Date().toISOString()) - Date.parse(job.started_at)) / 1000 : null;
    if (job.status === "queued") return [waitsFor(job.waiting), saved ? [" · ", t("tile.goes.on", { step: saved })] : null];
    if (job.status === "paused") return t(saved ? "tile.goes.on" : "tile.begins", { step: saved });
    if (job.status === "succeeded") return t("tile.took", { time: duration(took) });
    const where = saved ? t("job.saved", { step: saved }) : null;
    const when = ENDED.has(job.status) ? (took === null ? null : t("tile.took", { time: duration(took) })) : left !== null ? t("tile.left", { time: duration(left) }) : took !== null ? t("tile.running", { time: duration(took) }) : null;
    return [when, when && where ? " · " : null, where];
  }

  function drawNotes(job) {
    const failure = job.error ? JSON.stringify(job.error) : "";
    if ((trouble.dataset.mark ?? "") !== failure) {
      trouble.dataset.mark = failure;
      fill(trouble, job.error ? failureCard(job.error) : null);
    }
    const cards = [];
    const after = feed.events.findLast((event) => event.type === "evaluation" && event.data.paired);
    if (shownTab === "curves" && job.status === "succeeded" && after) cards.push(...verdictCards(after.data, id));
    if (shownTab === "curves" && job.result) cards.push(trialCard(job.result, id));
    if (shownTab === "curves" && job.spec.kind === "export") cards.push(...exportCards(feed));
    const latest = new Map(feed.events.filter((event) => event.type === "warning").map((event) => [event.data.code, event]));
    const isOverview = shownTab === "curves";
    for (const event of isOverview ? [...latest.values()].slice(-3) : []) cards.push(warningCard(event, id, overBy(event, feed.events)));
    if (isOverview && latest.size > 3) cards.push(h("p", { class: "hint" }, h("a", { href: `#/jobs/${id}/events` }, t("job.all.warnings", { n: latest.size }))));
    const mark = cards.map((card) => card.textContent).join("|");
    if (notes.dataset.mark !== mark) {
      notes.dataset.mark = mark;
      fill(notes, cards);
    }
  }

  function drawActions(job) {
    const shown = `${job.status} ${canTalk(job)}`;
    if (drawnActions === shown) return;
    drawnActions = shown;
    const button = (action, isDanger = false) => h("button", { type: "button", class: isDanger ? "danger" : null, onclick: () => act(action, isDanger) }, t(`action.${action}`));
    fill(
      actions,
      mayWrite && ["queued", "running"].includes(job.status) ? button("pause") : null,
      mayWrite && job.status === "paused" ? button("resume") : null,
      mayWrite && !ENDED.has(job.status) && job.status !== "cancelling" ? button("cancel", true) : null,
      hasAdapter(job) ? h("a", { class: "button", href: `/page/adapters/${id}`, download: `${id}-adapter.tar`, title: t("action.adapter.hint") }, t("action.adapter")) : null,
      mayWrite && hasAdapter(job) ? h("button", { type: "button", onclick: () => exportDialog(feed.job) }, t("action.export")) : null,
      canTalk(job) ? h("a", { class: "button", href: `#/talk/${id}` }, t("action.talk")) : null,
      h("a", { class: "button", href: `#/compare?a=${id}` }, t("nav.compare")),
      mayWrite ? h("a", { class: "button", href: `#/new?from=${id}` }, t("action.clone")) : null,
      mayWrite && ENDED.has(job.status) ? button("delete", true) : null,
    );
  }

  async function act(action, danger) {
    fill(refusal);
    const isSure = await confirmed({ title: t(`confirm.${action}.title`), text: t(`confirm.${action}.text`), action: t(`action.${action}`), danger });
    if (!isSure) return;
    try {
      if (action === "delete") {
        await request(`/jobs/${id}`, { method: "DELETE" });
        toast(t("done.delete"));
        location.hash = "/";
        return;
      }
      feed.job = await post(`/jobs/${id}/${action}`);
      toast(t(`done.${action}`));
      draw();
    } catch (error) {
      fill(refusal, problemCard(error));
    }
  }

  const element = h("div", { class: "job" }, head, refusal, trouble, tiles, notes, navigation, panel);
  const stop = feed.listen(draw);
  openTab(tab, query);
  draw();
  return {
    element,
    go(parameters, values) {
      if (parameters.id !== id) return false;
      openTab(parameters.tab ?? "curves", values);
      return true;
    },
    repaint: () => opened?.repaint?.(),
    close() {
      stop();
      opened?.close?.();
      feed.close();
    },
  };
}

/** How far an export is, or how its check went; and where its files are. */
function exportCards({ job, events, id }) {
  const told = events.findLast((event) => event.type === "log" && ["export_progress", "export"].includes(event.data.code));
  if (!told) return [];
  const isDone = job.status === "succeeded";
  const files = isDone ? h("p", {}, h("a", { href: `#/jobs/${id}/files` }, t("tab.files"))) : null;
  return [h("div", { class: isDone ? "card good" : "card" }, h("p", {}, raw(told.data.message ?? "", { lang: "en" })), files)];
}

/** Whether it has trained to its end. */
function hasAdapter(job) {
  return job.status === "succeeded" && (job.spec.kind ?? "training") === "training";
}

/** What a queued job waits for: a worker at all, or that those before it are done. */
function waitsFor(waiting) {
  if (!waiting) return t("wait.turn");
  if (waiting.reason === "newer_worker")
    return [t("wait.newer_worker"), " · ", t("tile.waiting.formats", { needs: waiting.spec_format, reads: waiting.workers_spec_format })];
  if (waiting.reason === "hosts" || waiting.reason === "few_hosts")
    return [
      t(`wait.${waiting.reason}`),
      " · ",
      t("tile.waiting.hosts", { hosts: waiting.hosts, gpus: waiting.gpus, found: waiting.hosts_found }),
    ];
  if (!waiting.workers) return [t(`wait.${waiting.reason}`), " · ", raw(waiting.queue, { class: "code" })];
  return t(waiting.ahead ? "tile.waiting.ahead" : "tile.waiting.next", { jobs: waiting.ahead, n: waiting.workers });
}

/** Whether training would learn anything, by what a trial drew. */
function trialCard(result, id) {
  const facts = [
    ["trial.signal", percent(result.signal_share, 0)],
    ["metric.reward", number(result.reward_mean)],
    ["report.format", percent(result.format_share, 0)],
    ["trial.length", number(result.completion_tokens_mean, 3)],
    ["report.truncated", percent(result.truncated_share, 0)],
    ["trial.step", duration(result.step_seconds)],
  ];
  return h(
    "div",
    { class: `card ${{ yes: "good", slowly: "warning" }[result.will_learn] ?? "danger"}` },
    h("p", { class: "strong" }, t(`trial.${result.will_learn}`)),
    h("p", {}, prose(result.sentence, { lang: "en" })),
    h("dl", { class: "facts-list" }, facts.map(([name, value]) => h("div", {}, h("dt", {}, t(name)), h("dd", {}, raw(value))))),
    h("div", { class: "actions" }, h("a", { class: "button", href: `#/new?from=${id}` }, t("trial.train")), h("a", { class: "button", href: `#/jobs/${id}/rollouts` }, t("trial.read"))),
  );
}

/** How it ended: against the base model and, of a job from a checkpoint, first against that. */
function verdictCards({ paired, paired_start: start, ...after }, id) {
  return start ? [verdictCard(start, after, id, "start"), verdictCard(paired, after, id, "before")] : [verdictCard(paired, after, id)];
}

/** In a line: did it answer better. The report has the rest. */
function verdictCard(paired, after, id, stage = "") {
  const { p_value: p, difference } = paired.metric ?? paired.strict;
  const kind = p >= 0.05 ? "same" : difference > 0 ? "better" : "worse";
  return h(
    "div",
    { class: `card ended ${{ better: "good", worse: "danger", same: "" }[kind]}` },
    h("p", { class: "warning-head" }, stage ? h("span", {}, t("report.compared", { stage: t(`evaluation.${stage}`) })) : null, h("span", { class: "strong" }, t(`verdict.${kind}`)), paired.metric ? raw(`${number(paired.metric.before)} → ${number(paired.metric.after)}`) : h("span", {}, t("evaluation.strict"), " ", raw(`${percent(after.strict_accuracy - difference)} → ${percent(after.strict_accuracy)}`)), h("a", { href: `#/jobs/${id}/report` }, t("verdict.more"))),
  );
}

function mean(values) {
  return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
}

/** What its runs have used of GPUs, and cost. */
function use(found) {
  if (!found?.gpu_hours) return null;
  const hours = t("job.gpu.hours", { hours: number(found.gpu_hours, 3) });
  return raw(found.cost === null ? hours : `${hours} · ${fixed(found.cost, 2)} ${found.currency}`, { title: found.by_gpu.map((one) => `${one.gpu ?? t("usage.gpu.unknown")}: ${fixed(one.gpu_hours, 2)}`).join(", "), translate: null });
}
