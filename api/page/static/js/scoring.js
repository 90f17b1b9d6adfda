// Tries the rewards of a draft on a row: answers that somebody would want and would not, with the score of each reward,
// errors and times. Nothing of it is part of the job.

import { Asking, post, Problem } from "./api.js";
import { promptOf } from "./dataset.js";
import { fill, h, raw } from "./dom.js";
import { choice } from "./fields.js";
import { number, t } from "./i18n.js";
import { busy, problemCard } from "./parts.js";

const FIVE = ["correctness", "integer", "strict_format", "soft_format", "xml_count"];
const PASTED = "pasted";

export function tryPanel(guide) {
  const { draft, fields, holder } = guide;
  const asking = new Asking();
  let place = 0;
  const picker = h("div", {});
  const shown = h("div", {});
  const pasted = h("textarea", { class: "code", id: "try-row", rows: 3, spellcheck: "false", translate: "no", value: '{"question": "6+6=?", "answer": "12"}' });
  const results = h("div", { class: "scores", role: "status" });
  const wanted = sample("wanted");
  const unwanted = sample("unwanted");
  const score = h("button", { type: "button", class: "primary", disabled: !holder.scopes.includes("jobs:write"), onclick: () => run(false) }, t("try.score"));
  const all = h("button", { type: "button", disabled: !holder.scopes.includes("jobs:write"), onclick: () => run(true) }, "");
  const element = h(
    "section",
    { class: "card try", "aria-labelledby": "try-title" },
    h("h3", { id: "try-title" }, t("try.title")),
    h("p", { class: "hint" }, t("try.hint")),
    picker,
    shown,
    h("div", { class: "samples-typed" }, wanted.element, unwanted.element),
    h("div", { class: "actions" }, score, all),
    results,
  );
  /** @type {any} */
  let drawnRows;

  /** An answer that is typed; until it is, it follows the row. */
  function sample(name) {
    const id = `try-${name}`;
    const control = h("textarea", { id, rows: 4, spellcheck: "false", translate: "no", oninput: () => (one.isTyped = true) });
    const one = { control, isTyped: false, element: h("div", { class: "field" }, h("label", { for: id }, t(`try.${name}`)), control) };
    return one;
  }

  function rows() {
    return (guide.rows?.data ?? []).filter((row) => !row.problem);
  }

  function update() {
    if (drawnRows !== guide.rows) {
      drawnRows = guide.rows;
      place = rows().length ? 0 : -1;
      drawPicker();
    }
    begin();
  }

  function drawPicker() {
    const options = [...rows().map((row, index) => [String(index), `${row.row + 1} · ${row.messages.at(-1).content.slice(0, 60)}`, { translate: "no" }]), [PASTED, t("try.pasted")]];
    const select = choice(options, place < 0 ? PASTED : String(place), { id: "try-pick", onchange: () => pick(select.value) });
    fill(picker, h("div", { class: "field" }, h("label", { for: "try-pick" }, t("try.row")), select));
    all.textContent = t("try.all", { n: rows().length });
    all.hidden = !rows().length;
    drawRow();
  }

  function pick(value) {
    place = value === PASTED ? -1 : Number(value);
    drawRow();
    begin();
    fill(results);
  }

  function drawRow() {
    fill(shown, place < 0 ? h("div", { class: "field" }, h("label", { for: "try-row" }, t("try.paste")), pasted) : promptOf(rows()[place]));
  }

  /** Answers to begin with: the row's own as the rewards want it, and another row's. */
  function begin() {
    if (!wanted.isTyped) wanted.control.value = place < 0 ? "" : formed(rows()[place].answer);
    if (!unwanted.isTyped) unwanted.control.value = place < 0 ? "" : otherAnswer();
  }

  function otherAnswer() {
    const { answer } = rows()[place];
    return formed(rows().find((row) => row.answer !== answer)?.answer ?? "");
  }

  /** An answer within the tags, where the recipe's rewards are paid. */
  function formed(answer) {
    if (!FIVE.some((name) => draft.value(`/rewards/weights/${name}`) !== 0)) return answer;
    const tags = draft.value("/rewards/tags") ?? {};
    const reasoning = tags.reasoning === undefined ? "reasoning" : tags.reasoning;
    const inside = tags.answer === undefined ? "answer" : tags.answer;
    const thought = reasoning === null ? "" : `<${reasoning}>\n…\n</${reasoning}>\n`;
    if (inside === "boxed") return `${thought}\\boxed{${answer}}`;
    return inside === null ? `${thought}${answer}` : `${thought}<${inside}>\n${answer}\n</${inside}>\n`;
  }

  /** The sections that rewards need; the rest of the spec may be unfinished. */
  function spec() {
    const format = draft.at("/sampling/response_format");
    return { data: draft.at("/data") ?? {}, rewards: draft.at("/rewards") ?? {}, ...(format ? { sampling: { response_format: format } } : {}) };
  }

  function item() {
    if (place >= 0) return rows()[place].values;
    try {
      return JSON.parse(pasted.value);
    } catch {
      return pasted.value;
    }
  }

  function run(isAll) {
    fields.clear();
    fill(results, busy());
    const samples = isAll ? rows().map((row) => ({ model_sample: formed(row.answer), item: row.values })) : [wanted, unwanted].map((one) => ({ model_sample: one.control.value, item: item() }));
    asking.ask(() => post("/graders/score", { spec: spec(), rows: samples }), { answered: (found) => fill(results, isAll ? overall(found) : compared(found)), refused });
  }

  function refused(error) {
    const problems = error instanceof Problem ? error.errors : [];
    const left = problems.filter((one) => !one.pointer.startsWith("/spec") || !fields.show(one.pointer.slice("/spec".length), `${one.detail}. ${one.remedy}`));
    if (problems.length && !left.length) {
      fill(results, h("p", { class: "error", role: "alert" }, t("new.refused", { n: problems.length })));
      const first = [...fields.bound.values()].find(({ control }) => control.isConnected && control.getAttribute("aria-invalid"));
      first?.control.focus();
      return;
    }
    fill(results, problemCard(error));
  }

  function compared(found) {
    const [good, bad] = found.data.map((one) => one.reward_total);
    const isKnown = good !== null && bad !== null;
    const verdict = !isKnown ? null : good > bad ? ["good", t("try.better", { good: number(good), bad: number(bad) })] : good === bad ? ["warning", t("try.same", { good: number(good) })] : ["danger", t("try.worse", { good: number(good), bad: number(bad) })];
    return [verdict ? h("div", { class: `card ${verdict[0]}` }, h("p", { class: "strong" }, verdict[1])) : null, table(found), troublesOf(found), printedBy(found)];
  }

  /** One line a reward: what each answer scored, and the time for both. */
  function table(found) {
    const names = Object.keys(found.data[0].rewards).filter((name) => draft.graderNames().includes(name) || draft.at("/rewards/formula") || draft.value(`/rewards/weights/${name}`) !== 0);
    const line = (head, values, seconds) => h("tr", {}, h("th", { scope: "row" }, head), values.map((value) => h("td", { class: "number", translate: "no" }, value === null ? "–" : number(value))), h("td", { class: "number", translate: "no" }, seconds === undefined ? "" : milliseconds(seconds)));
    return h(
      "div",
      { class: "scroll" },
      h(
        "table",
        { class: "plain" },
        h("thead", {}, h("tr", {}, h("th", { scope: "col" }, t("try.reward")), h("th", { scope: "col", class: "number" }, t("try.wanted.short")), h("th", { scope: "col", class: "number" }, t("try.unwanted.short")), h("th", { scope: "col", class: "number" }, t("try.time")))),
        h("tbody", {}, names.map((name) => line(FIVE.includes(name) ? t(`field.rewards.weights.${name}`) : raw(name), found.data.map((one) => one.rewards[name]), secondsOf(found, name))), line(t("try.total"), found.data.map((one) => one.reward_total), found.execution_time)),
      ),
    );
  }

  function secondsOf(found, name) {
    const members = Object.entries(found.seconds).filter(([key]) => key === name || key.startsWith(`${name}.`));
    return members.length ? members.reduce((sum, [, seconds]) => sum + seconds, 0) : undefined;
  }

  /** What of it could not be scored, and why. */
  function troublesOf(found) {
    const away = new Set(found.unavailable.map((one) => one.grader));
    const errors = found.data.flatMap((one, index) => Object.entries(one.errors).filter(([name]) => !away.has(name)).map(([name, error]) => h("li", {}, raw(name, { class: "code" }), " ", t(index ? "try.unwanted.short" : "try.wanted.short"), ": ", raw(error.message, { lang: "en" }))));
    const missing = found.unavailable.map((one) => h("li", {}, raw(one.grader, { class: "code" }), " ", raw(`${one.message} ${one.remedy}`, { lang: "en" })));
    return errors.length + missing.length ? h("div", { class: "card danger" }, h("p", { class: "strong" }, t("try.errors")), h("ul", {}, missing, errors)) : null;
  }

  function printedBy(found) {
    const texts = Object.entries(found.printed).filter(([, text]) => text);
    return texts.length ? h("details", { class: "card" }, h("summary", {}, t("try.printed")), texts.map(([name, text]) => h("pre", { class: "code", translate: "no" }, `${name}: ${text}`))) : null;
  }

  /** The data set's own answers, scored: they should be paid the most. */
  function overall(found) {
    const totals = found.data.map((one) => one.reward_total).filter((one) => one !== null);
    const failed = found.data.filter((one) => Object.keys(one.errors).length);
    const kinds = [...new Set(failed.flatMap((one) => Object.entries(one.errors).map(([name, error]) => `${name}: ${error.message}`)))].slice(0, 5);
    const low = Math.min(...totals);
    const high = Math.max(...totals);
    return [
      totals.length ? h("div", { class: `card ${low === high ? "good" : "warning"}` }, h("p", { class: "strong" }, low === high ? t("try.all.same", { n: totals.length, high: number(high) }) : t("try.all.differ", { n: totals.length, low: number(low), high: number(high) }))) : null,
      failed.length ? h("div", { class: "card danger" }, h("p", { class: "strong" }, t("try.all.failed", { n: failed.length })), h("ul", {}, kinds.map((text) => h("li", {}, raw(text, { lang: "en" }))))) : null,
      found.unavailable.length ? troublesOf({ data: [], unavailable: found.unavailable }) : null,
      h("p", { class: "hint" }, t("try.took", { time: milliseconds(found.execution_time) })),
    ];
  }

  return { element, update, close: () => asking.stop() };
}

function milliseconds(seconds) {
  return `${number(1000 * seconds, 3)} ms`;
}
