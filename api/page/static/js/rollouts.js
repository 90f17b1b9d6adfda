// The tab of rollouts: every completion with its rewards, filtered, in groups of one prompt, two of them compared.

import { Asking, get, query as queryString } from "./api.js";
import { fill, h, raw, redraw } from "./dom.js";
import { fixed, number, signed, t } from "./i18n.js";
import { ENDED } from "./feed.js";
import { busy, empty, problemCard } from "./parts.js";
import { canTalk } from "./serving.js";
import { completionText, diffColumns, diffView } from "./text.js";

const ORDERS = ["step", "-step", "reward", "-reward", "advantage", "-advantage", "length", "-length"];
const FIELDS = ["step", "prompt", "reward_gt", "reward_lt", "finish", "order"];
const PAGE = 48;

export function rolloutsTab(feed, query, go) {
  let filters = read(query);
  /** What is shown; null while it is asked for. */
  /** @type {any[] | null} */
  let loaded = null;
  let cursor = null;
  const asking = new Asking();
  let picked = [];
  /** What there was when the list was asked for. */
  let mark = "";
  let moves = [];

  const form = h("form", { class: "filters rollouts-filters", onsubmit: (event) => (event.preventDefault(), apply()) });
  const list = h("div", { class: "groups", "aria-live": "off" });
  const tray = h("div", { class: "tray", role: "region", "aria-label": t("diff.title") });
  const element = h("div", {}, form, list, tray);

  function lastStep() {
    return feed.metrics.at(-1)?.step ?? feed.job.step;
  }

  function field(name, attributes = {}) {
    return h("label", { class: `field ${name}` }, h("span", {}, t(`rollouts.${name}`)), h("input", { name, data: { focus: name }, value: filters[name] ?? "", ...attributes }));
  }

  function select(name, options) {
    return h("label", { class: `field ${name}` }, h("span", {}, t(`rollouts.${name}`)), h("select", { name, data: { focus: name }, onchange: apply }, options.map(([value, text]) => h("option", { value, selected: (filters[name] ?? "") === value }, text))));
  }

  /** On a phone the filters would fill the window: all but the step wait behind a button. */
  function fold(isFolded) {
    form.classList.toggle("folded", isFolded);
    form.querySelector(".unfold")?.setAttribute("aria-expanded", String(!isFolded));
  }

  function moveTo(by) {
    const step = Number(filters.step) + by;
    return Number(filters.step) && step >= 1 && step <= lastStep() ? step : null;
  }

  function drawForm() {
    const move = (by, says, text) => h("button", { type: "button", class: "icon", data: { focus: `move${by}` }, "aria-label": says, title: says, disabled: !moveTo(by), onclick: () => go("rollouts", { ...filters, step: moveTo(by) }) }, text);
    moves = [[-1, move(-1, t("rollouts.previous"), "‹")], [1, move(1, t("rollouts.next"), "›")]];
    redraw(
      form,
      h("div", { class: "stepper" }, moves[0][1], field("step", { type: "number", min: 1, max: lastStep() || null, inputmode: "numeric", placeholder: t("rollouts.any") }), moves[1][1]),
      h("button", { type: "button", class: "unfold", "aria-expanded": String(!form.classList.contains("folded")), onclick: () => fold(!form.classList.contains("folded")) }, t("rollouts.filters")),
      field("prompt", { type: "text", spellcheck: "false", placeholder: t("rollouts.any") }),
      field("reward_gt", { type: "number", step: "any", placeholder: "–" }),
      field("reward_lt", { type: "number", step: "any", placeholder: "–" }),
      select("finish", [["", t("rollouts.any")], ["stop", t("finish.stop")], ["length", t("finish.length")]]),
      select("order", ORDERS.map((order) => [order, t(`order.${order}`)])),
      h("div", { class: "form-actions" }, h("button", { type: "submit", class: "primary" }, t("rollouts.show")), h("button", { type: "button", class: "quiet", onclick: () => go("rollouts") }, t("clear"))),
    );
  }

  function apply() {
    const values = Object.fromEntries(FIELDS.map((name) => [name, form.elements[name].value.trim()]));
    if (values.order === "step") delete values.order;
    go("rollouts", values);
  }

  function ask(after = null) {
    return get(`/jobs/${feed.id}/rollouts${queryString({ ...filters, limit: PAGE, cursor: after })}`);
  }

  function take(rollouts, answer) {
    loaded = rollouts;
    cursor = answer.has_more ? answer.next_cursor : null;
    drawList();
  }

  function load() {
    loaded = null;
    fill(list, busy());
    loadQuietly();
  }

  function loadQuietly() {
    asking.ask(() => ask(), { answered: (answer) => take(answer.data, answer), refused: (error) => fill(list, problemCard(error, { again: load })) });
  }

  /** What is there stays, also where the rest cannot be had. */
  function loadMore() {
    list.querySelector(":scope > .danger")?.remove();
    asking.ask(() => ask(cursor), { answered: (answer) => take([...(loaded ?? []), ...answer.data], answer), refused: (error) => list.append(problemCard(error, { again: loadMore })) });
  }

  function drawList() {
    if (!loaded) return;
    if (!loaded.length) {
      fill(list, empty(t("rollouts.none"), h("p", {}, t(feed.metrics.length ? "rollouts.none.filtered" : ENDED.has(feed.job.status) ? "curves.none.ended" : "rollouts.none.yet"))));
      return;
    }
    redraw(
      list,
      isRanked() ? h("div", { class: "cards" }, loaded.map((rollout) => card(rollout, null, null, true))) : groups(loaded).map((one, place, all) => group(one, Boolean(cursor) && place === all.length - 1)),
      cursor ? h("p", { class: "more" }, h("button", { type: "button", data: { focus: "more" }, onclick: loadMore }, t("more"))) : null,
    );
  }

  /** Ordered by something else than steps, neighbours have nothing in common: each says itself what it answers. */
  function isRanked() {
    return Boolean(filters.order) && !filters.order.endsWith("step") && !(filters.step && filters.prompt);
  }

  /** The completions of one prompt at one step; where more of them may follow, there is no best and no worst yet. */
  function group(rollouts, isCut) {
    const [first] = rollouts;
    const rewards = rollouts.map((rollout) => rollout.reward_total).filter((value) => value !== null);
    const [worst, best] = isCut || !rewards.length ? [null, null] : [Math.min(...rewards), Math.max(...rewards)];
    const across = filters.prompt ? h("a", { href: address({ step: first.step }) }, t("rollouts.whole.step", { step: number(first.step) })) : h("a", { href: address({ prompt: first.prompt_id, order: "step" }) }, t("rollouts.across"));
    return h(
      "article",
      { class: "group" },
      h(
        "header",
        {},
        h("h3", {}, h("a", { href: address({ step: first.step }) }, t("chart.step", { step: number(first.step) })), " · ", t("rollouts.prompt"), " ", raw(first.prompt_id, { class: "code" })),
        h("p", { class: "question" }, raw(first.prompt)),
        h("p", { class: "meta" }, t("rollouts.answer"), " ", raw(first.answer, { class: "gold" }), " · ", rollouts.length > 1 && best !== null ? t("rollouts.spread", { worst: fixed(worst, 2), best: fixed(best, 2) }) : null, " ", across, canTalk(feed.job) && /^\d+$/.test(first.prompt_id) ? [" · ", h("a", { href: `#/talk/${feed.id}${queryString({ row: first.prompt_id })}`, data: { ask: first.prompt_id } }, t("rollouts.ask"))] : null),
      ),
      h("div", { class: "cards" }, rollouts.map((rollout) => card(rollout, best, worst))),
    );
  }

  function heading(rollout) {
    return h(
      "header",
      {},
      h("h3", {}, h("a", { href: address({ step: rollout.step }) }, t("chart.step", { step: number(rollout.step) })), " · ", h("a", { href: address({ prompt: rollout.prompt_id, order: "step" }), title: t("rollouts.across"), "aria-label": t("rollouts.across") }, raw(rollout.prompt_id, { class: "code" }))),
      h("p", { class: "question short" }, raw(rollout.prompt)),
      h("p", { class: "meta" }, t("rollouts.answer"), " ", raw(rollout.answer, { class: "gold" })),
    );
  }

  function card(rollout, best, worst, isAlone = false) {
    const standing = best === worst ? "" : rollout.reward_total === best ? "best" : rollout.reward_total === worst ? "worst" : "";
    const key = keyOf(rollout);
    const isPicked = picked.some((one) => keyOf(one) === key);
    const button = h("button", { type: "button", class: "quiet", data: { focus: key }, "aria-pressed": String(isPicked), onclick: () => pick(rollout) }, t("diff.pick"));
    return h(
      "section",
      { class: `card rollout ${standing}`, "aria-label": t("rollouts.card", { step: rollout.step, sample: rollout.sample }) },
      isAlone ? heading(rollout) : null,
      h("div", { class: "score" }, raw(fixed(rollout.reward_total, 2), { class: "reward", title: t("metric.reward") }), h("span", { class: `advantage ${rollout.advantage > 0 ? "up" : rollout.advantage < 0 ? "down" : ""}`, title: t("rollouts.advantage") }, h("span", { class: "sr-only" }, t("rollouts.advantage")), raw(signed(rollout.advantage, 2))), rollout.finish_reason === "length" ? h("span", { class: "cut" }, t("finish.length")) : null, button),
      completionText(rollout.completion),
      h("ul", { class: "rewards" }, Object.entries(rollout.rewards).map(([name, value]) => h("li", { class: value > 0 ? "paid" : value < 0 ? "charged" : "" }, raw(name), raw(fixed(value, 2), { class: "value" }))), h("li", { class: "tokens" }, t("rollouts.tokens", { n: rollout.completion_tokens }))),
    );
  }

  function pick(rollout) {
    const key = keyOf(rollout);
    const isPicked = picked.some((one) => keyOf(one) === key);
    picked = isPicked ? picked.filter((one) => keyOf(one) !== key) : [...picked, rollout].slice(-2);
    drawTray();
    drawList();
    if (picked.length === 2 && !isPicked) showDiff();
  }

  function drawTray() {
    if (!picked.length) return fill(tray);
    return fill(
      tray,
      h("div", { class: "card tray-card" }, picked.map((one) => h("span", {}, label(one))), picked.length === 2 ? h("button", { type: "button", class: "primary", onclick: showDiff }, t("diff.show")) : h("span", { class: "hint" }, t("diff.pick.other")), h("button", { type: "button", class: "quiet", onclick: () => ((picked = []), drawTray(), drawList()) }, t("clear"))),
    );
  }

  function label(rollout) {
    return [t("chart.step", { step: number(rollout.step) }), " · ", raw(`#${rollout.sample}`), " · ", raw(fixed(rollout.reward_total, 2))];
  }

  function showDiff() {
    const [before, after] = [...picked].sort((a, b) => a.step - b.step || a.sample - b.sample);
    diffDialog(
      [before, after].map((one) => ({ heading: label(one), text: one.completion })),
      before.prompt === after.prompt ? before.prompt : null,
    );
  }

  drawForm();
  fold(!FIELDS.some((name) => name !== "step" && filters[name]));
  load();
  return {
    element,
    go(next) {
      filters = read(next);
      drawForm();
      load();
      return true;
    },
    update() {
      for (const [by, button] of moves) button.disabled = !moveTo(by);
      form.elements.step.max = lastStep() || "";
      const now = `${lastStep()} ${feed.job.status}`;
      if (now === mark) return;
      mark = now;
      if (loaded && !loaded.length) loadQuietly();
    },
    close() {
      asking.stop();
    },
  };

  function address(values) {
    return `#/jobs/${feed.id}/rollouts${queryString(values)}`;
  }
}

/**
 * Two texts compared, in a dialog: as one text with changes, or side by side.
 *
 * @param {{heading: any, text: string}[]} texts
 */
export function diffDialog([before, after], question = null) {
  const body = h("div", { class: "diff-body" });
  let isColumns = window.innerWidth >= 900;
  const toggle = h("button", { type: "button", onclick: () => ((isColumns = !isColumns), draw()) });
  const dialog = h(
    "dialog",
    { class: "diff-dialog", "aria-labelledby": "diff-title" },
    h("div", { class: "title-row" }, h("h2", { id: "diff-title" }, t("diff.title")), h("div", { class: "actions" }, toggle, h("button", { type: "button", onclick: () => dialog.close() }, t("close")))),
    question ? h("p", { class: "question" }, raw(question)) : null,
    body,
  );
  function draw() {
    toggle.textContent = t(isColumns ? "diff.one" : "diff.columns");
    const columns = isColumns ? diffColumns(before.text, after.text) : null;
    fill(
      body,
      columns
        ? h("div", { class: "columns" }, [before, after].map((side, place) => h("section", {}, h("h3", {}, side.heading), columns[place])))
        : [h("p", { class: "hint" }, h("del", {}, before.heading), " → ", h("ins", {}, after.heading)), diffView(before.text, after.text)],
    );
  }
  draw();
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}

function read(query) {
  return Object.fromEntries(FIELDS.map((name) => [name, query.get(name)]).filter(([, value]) => value));
}

function keyOf(rollout) {
  return `${rollout.epoch}/${rollout.step}/${rollout.prompt_id}/${rollout.row}/${rollout.sample}`;
}

/** Neighbours with the same step and prompt belong together. */
function groups(rollouts) {
  const found = [];
  for (const rollout of rollouts) {
    const last = found.at(-1);
    if (last && last[0].step === rollout.step && last[0].prompt_id === rollout.prompt_id) last.push(rollout);
    else found.push([rollout]);
  }
  return found;
}
