// Chooses a row of a job's data set as a prompt: those it trains on, or those it holds out, by number or by a text in them.
// Where the rows cannot be shown it says why, and offers the questions that the job's records have.

import { Asking, get, query as queryString } from "./api.js";
import { fill, h, raw, redraw } from "./dom.js";
import { number, t } from "./i18n.js";
import { busy, problemCard } from "./parts.js";

const PAGE = 6;
const PARTS = ["own", "train", "held_out"];
/** Rollouts in which questions are looked for, and how many of these are shown. */
const LOOKED_AT = 50;

/**
 * The row of this number; null where the part has none, and why where no row can be shown.
 *
 * @returns {Promise<{row: any, unavailable: any}>}
 */
export async function rowOf(id, { part, row }) {
  const page = await get(`/jobs/${id}/rows${queryString({ part, first: row, limit: 1 })}`);
  const [found] = page.data;
  return { row: found?.row === row && !found.problem ? found : null, unavailable: page.unavailable ?? found?.problem ?? null };
}

/**
 * The questions of a job's records, with their rows' numbers: of the report, or of its completions.
 *
 * @returns {Promise<{row: number, question: string, answer: string}[]>}
 */
export async function recorded(id, part) {
  if (part === "held_out") {
    const report = await get(`/page/reports/${id}`).catch(() => null);
    return report?.evaluation?.samples ?? [];
  }
  const drawn = await get(`/jobs/${id}/rollouts${queryString({ limit: LOOKED_AT })}`).catch(() => ({ data: [] }));
  return [...new Map(drawn.data.map((one) => [one.prompt_id, { row: Number(one.prompt_id), question: one.prompt, answer: one.answer }])).values()];
}

export class RowPicker {
  /**
   * @param {string} id of the job
   * @param {{chosen: (part: string, row: any) => void, recalled: (question: string, answer: string) => void, own: () => void}} tell
   */
  constructor(id, tell) {
    this.id = id;
    this.tell = tell;
    this.part = "own";
    this.first = 0;
    this.search = "";
    /** The number that was looked for last. */
    this.gone = "";
    /** Cursors of the pages before this one. */
    /** @type {(string | null)[]} */
    this.way = [null];
    /** @type {any} */
    this.page = null;
    /** The row that is asked now. */
    this.place = -1;
    this.asking = new Asking();
    this.select = h("select", { id: "part", onchange: () => this.turnTo(this.select.value, { isNew: true }) }, PARTS.map((part) => h("option", { value: part }, t(`talk.part.${part}`))));
    this.numbered = h("input", { id: "row-number", type: "number", min: 1, step: 1, inputmode: "numeric", onchange: () => this.goTo(), onkeydown: (event) => this.enter(event, () => this.goTo()) });
    this.searched = h("input", { id: "row-search", type: "search", maxlength: 200, autocomplete: "off", onchange: () => this.find(), onkeydown: (event) => this.enter(event, () => this.find()) });
    this.count = h("p", { class: "hint" });
    this.list = h("div", { class: "row-list", role: "status" });
    this.choice = h("div", { class: "row-choice", hidden: true }, h("div", { class: "row-search" }, field("row-number", this.numbered), field("row-search", this.searched)), this.count, this.list);
    this.element = h("div", { class: "row-picker" }, field("part", this.select), this.choice);
  }

  /** Enter in these fields looks for rows, and asks nobody. */
  enter(event, act) {
    if (event.key !== "Enter") return;
    event.preventDefault();
    act();
  }

  /** Show a part from the start, or what is asked now without a change of it. */
  turnTo(part, { isNew = false, place = -1 } = {}) {
    this.select.value = part;
    this.place = place;
    this.choice.hidden = part === "own";
    if (part === "own") {
      this.part = part;
      if (isNew) this.tell.own();
      return;
    }
    if (part === this.part && this.page) {
      this.draw();
      return;
    }
    this.part = part;
    this.first = Math.max(0, place);
    this.search = this.searched.value = "";
    this.gone = this.numbered.value = "";
    this.load();
  }

  /** The row whose number is typed is shown, and asked. */
  goTo() {
    const wanted = Number(this.numbered.value);
    // Leaving the field after Enter is no other wish.
    if (!Number.isInteger(wanted) || wanted < 1 || this.numbered.value === this.gone) return;
    this.gone = this.numbered.value;
    this.first = wanted - 1;
    this.search = this.searched.value = "";
    this.load((page) => page.data[0]?.row === this.first && this.take(page.data[0]));
  }

  find() {
    if (this.searched.value.trim() === this.search) return;
    this.search = this.searched.value.trim();
    this.first = 0;
    this.gone = this.numbered.value = "";
    this.load();
  }

  /** @param {(page: any) => void} [then] */
  load(then = () => {}) {
    this.way = [null];
    this.ask(then);
  }

  /** @param {(page: any) => void} [then] */
  ask(then = () => {}) {
    fill(this.list, busy());
    const asked = { part: this.part, first: this.first || null, search: this.search, limit: PAGE, cursor: this.way.at(-1) };
    this.asking.ask(() => this.read(asked), {
      answered: (page) => ((this.page = page), this.draw(), then(page)),
      refused: (error) => fill(this.list, problemCard(error, { again: () => this.ask(then) })),
    });
  }

  async read(asked) {
    const page = await get(`/jobs/${this.id}/rows${queryString(asked)}`);
    return page.unavailable ? { ...page, recorded: await recorded(this.id, this.part) } : page;
  }

  move(cursor) {
    if (cursor === null) this.way.pop();
    else this.way.push(cursor);
    this.ask();
  }

  take(row) {
    if (row.problem) return;
    this.place = row.row;
    this.draw();
    this.tell.chosen(this.part, row);
  }

  draw() {
    const { data, unavailable, rows, first_row: first, next_cursor: next } = this.page;
    this.numbered.disabled = this.searched.disabled = Boolean(unavailable);
    fill(this.count, unavailable ? null : rows === null ? t("talk.rows.start") : rows ? t("talk.rows.range", { first: number(first + 1), last: number(first + rows) }) : null);
    if (unavailable) {
      redraw(this.list, this.drawUnavailable(unavailable));
      return;
    }
    redraw(this.list, data.length ? h("ul", { class: "rows-found" }, data.map((row) => this.line(row))) : this.drawNone(), this.pager(next));
  }

  drawNone() {
    const more = this.page.next_cursor ? t("talk.rows.more") : null;
    return h("p", { class: "hint" }, this.search ? [t("talk.rows.unfound"), " ", more] : t(this.page.rows === 0 ? `talk.rows.none.${this.part}` : "talk.rows.beyond"));
  }

  pager(next) {
    const button = (name, isOn, act) => h("button", { type: "button", class: "quiet", data: { focus: `rows-${name}` }, disabled: !isOn, onclick: act }, t(`talk.rows.${name}`));
    if (!next && this.way.length === 1) return null;
    return h("div", { class: "actions" }, button("back", this.way.length > 1, () => this.move(null)), button("on", Boolean(next), () => this.move(next)));
  }

  line(row) {
    if (row.problem) return h("li", { class: "hint" }, raw(number(row.row + 1), { class: "place" }), " ", raw(`${row.problem.detail}.`, { lang: "en" }));
    return this.button(row.row, row.messages.at(-1).content, () => this.take(row));
  }

  button(place, text, act) {
    return h("li", {}, h("button", { type: "button", class: "quiet row", data: { row: String(place), focus: `row-${place}` }, "aria-pressed": String(place === this.place), onclick: act }, h("span", { class: "sr-only" }, t("data.row", { n: place + 1 })), raw(number(place + 1), { class: "place", "aria-hidden": "true" }), raw(text.slice(0, 300), { class: "said" })));
  }

  drawUnavailable(why) {
    const questions = this.page.recorded;
    const recall = (one) => () => ((this.place = one.row), this.draw(), this.tell.recalled(one.question, one.answer));
    return [
      h("div", { class: "card warning", id: "rows-unavailable" }, h("p", { class: "strong" }, t("talk.rows.unavailable")), h("p", {}, raw(`${why.detail}. ${why.remedy}`, { lang: "en" }))),
      questions.length ? [h("p", { class: "hint" }, t("talk.rows.recorded")), h("ul", { class: "rows-found" }, questions.map((one) => this.button(one.row, one.question, recall(one))))] : h("p", { class: "hint" }, t("talk.rows.unrecorded")),
    ];
  }

  close() {
    this.asking.stop();
  }
}

function field(name, control) {
  return h("div", { class: "field" }, h("label", { for: name }, t(`talk.${name}`)), control);
}
