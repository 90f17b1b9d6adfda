// The step of the data: a file that is dropped, its columns mapped, and its rows as the prompts they become.

import { Asking, get, post, request } from "./api.js";
import { fill, h, raw } from "./dom.js";
import { TYPES, dropZone } from "./dropzone.js";
import { advanced, choice } from "./fields.js";
import { number, t } from "./i18n.js";
import { busy, problemCard } from "./parts.js";
import { forgetSuggestions, suggest } from "./suggestions.js";

const LOOKED_AT = 50;
const SHOWN = 3;
const LONGEST = 1000;
const QUESTION = /^(question|prompt|input|query|problem|instruction|text|review|sentence|message|messages|body|content|title|问题|题目|提问|文本|评论|内容)s?$/i;
const ANSWER = /^(answer|label|output|target|expected|gold|solution|ground_?truth|reference|response|completion|category|class|sentiment|result|答案|标签|类别|结果|回答)s?$/i;

/** @returns {import("./newjob.js").Step} */
export function datasetStep(guide) {
  const { draft, fields, holder } = guide;
  const asking = new Asking();
  const status = h("div", { class: "upload-status", role: "status" });
  const mapping = h("div", {});
  const preview = h("div", { class: "preview" });
  let asked = "";
  /** The data set whose columns are drawn, so that typing in a field does not take the field away. */
  let drawn = "";

  const isFile = () => ["upload", "s3"].includes(draft.at("/data/source"));
  const element = h("div", {}, holder.scopes.includes("datasets:write") ? dropZone("upload", take) : null, status, earlier(), mapping, preview, others(), more());

  async function take(file) {
    fill(status, busy());
    const type = TYPES[file.name.split(".").at(-1).toLowerCase()] ?? TYPES.jsonl;
    try {
      use(await request(`/datasets?${new URLSearchParams({ name: file.name.slice(0, 100) })}`, { method: "POST", body: file, type }));
    } catch (error) {
      fill(status, problemCard(error));
    }
  }

  /** Train on an upload: what was said of another data set goes. */
  function use(dataset) {
    const quiet = draft.onchange;
    draft.onchange = () => {};
    for (const name of ["subset", "split", "revision", "format", "question_column", "answer_column", "answer_path", "answer_pattern", "max_rows"]) draft.remove(`/data/${name}`);
    forgetSuggestions(guide);
    draft.set("/data/source", "upload");
    draft.set("/data/dataset", dataset.id);
    draft.onchange = quiet;
    guide.rows = null;
    guide.rewarded = "";
    guide.fresh = true;
    guide.redraw("data");
    guide.changed();
  }

  function earlier() {
    const place = h("div", {});
    get("/datasets?limit=100").then(({ data }) => {
      if (!data.length || !place.isConnected) return;
      const options = [["", t("data.earlier.choose")], ...data.map((one) => [one.id, `${one.name ?? one.id} · ${number(one.rows)}`, { translate: "no" }])];
      const chosen = draft.at("/data/source") === "upload" ? draft.at("/data/dataset") : "";
      const select = choice(options, chosen, { id: "earlier", onchange: () => select.value && use(data.find((one) => one.id === select.value)) });
      fill(place, h("div", { class: "field earlier" }, h("label", { for: "earlier" }, t("data.earlier")), select));
    }, () => {});
    return place;
  }

  /** Public data sets, and objects in storage. */
  function others() {
    const source = fields.field("/data/source", { hint: false });
    fields.bound.get("/data/source").control.addEventListener("change", () => guide.redraw("data"));
    const names = ["dataset", ...(isFile() ? [] : ["subset", "split", "revision", "format", "question_column", "answer_column", "system_prompt"])];
    const isOther = Object.keys(draft.at("/data") ?? {}).length > 0 && draft.at("/data/source") !== "upload";
    return h("details", { class: "advanced", open: isOther }, h("summary", {}, t("data.others")), h("div", { class: "fields" }, source, names.map((name) => fields.field(`/data/${name}`))));
  }

  function more() {
    return advanced(t("new.advanced"), ["answer_pattern", "answer_path", "max_rows", "examples"].map((name) => fields.field(`/data/${name}`)), fields.field("/evaluation/dataset"));
  }

  /** Show the rows that the draft names now, unless they are shown. */
  function update() {
    const wanted = JSON.stringify([draft.at("/data"), draft.at("/rewards/tags")]);
    if (!isFile()) {
      if (wanted === asked) return;
      guide.rows = null;
      guide.rewarded = "";
      asked = "";
      fill(mapping);
      fill(preview, h("p", { class: "hint" }, t("data.none"), " ", raw(draft.value("/data/dataset"), { class: "code" })), look(wanted));
      return;
    }
    if (wanted === asked || !draft.at("/data/dataset")) return;
    asked = wanted;
    if (!guide.rows) fill(preview, busy());
    asking.ask(load, { answered: show, refused: (error) => fill(preview, problemCard(error)) });
  }

  /** Rows of a public data set are fetched on request: that may take a while, or not be possible from here. */
  function look(wanted) {
    if (!draft.at("/data/dataset")) return null;
    return h("button", { type: "button", onclick: () => {
      asked = wanted;
      fill(preview, busy());
      asking.ask(load, { answered: show, refused: (error) => fill(preview, problemCard(error)) });
    } }, t("data.look"));
  }

  async function load() {
    const tags = draft.at("/rewards/tags");
    const id = draft.at("/data/dataset");
    const question = post(`/datasets/preview?limit=${LOOKED_AT}`, { data: draft.at("/data"), ...(tags ? { rewards: { tags } } : {}) });
    const [dataset, found] = await Promise.all([draft.at("/data/source") === "upload" ? get(`/datasets/${id}`) : { name: id, rows: null }, question]);
    return { id, name: dataset.name ?? id, count: dataset.rows, columns: found.columns, data: found.data };
  }

  function show(rows) {
    guide.rows = rows;
    const isNew = guide.fresh;
    guide.fresh = false;
    fill(status, h("p", { class: "ready" }, rows.count === null ? raw(rows.name) : t("data.stored", { name: rows.name, n: rows.count })));
    if (isNew && guess(rows)) return;
    if (isNew || guide.mapped) {
      guide.mapped = false;
      suggest(guide);
      guide.changed();
    }
    fill(preview, rowsOf(rows));
    if (drawn === rows.id) return;
    drawn = rows.id;
    fill(mapping, columns(rows));
    // Once for a data set: what somebody has scored meanwhile stays.
    if (guide.rewarded === rows.id) return;
    guide.rewarded = rows.id;
    guide.redraw("reward");
  }

  /** Map the columns by their names and what they hold; whether that changed anything. */
  function guess({ columns: found }) {
    const texts = found.filter((one) => one.holds === "text").map((one) => one.name);
    const chat = found.find((one) => one.holds === "chat");
    const question = chat?.name ?? texts.find((name) => QUESTION.test(name)) ?? texts[0];
    const answer = texts.find((name) => name !== question && ANSWER.test(name)) ?? texts.filter((name) => name !== question).at(-1);
    if (question === undefined) return false;
    const before = JSON.stringify(draft.at("/data"));
    guide.mapped = true;
    map(question, Boolean(chat));
    if (answer !== undefined) draft.give("/data/answer_column", answer);
    return before !== JSON.stringify(draft.at("/data"));
  }

  function map(question, isChat) {
    if (isChat) draft.set("/data/format", "messages");
    else draft.remove("/data/format");
    draft.give("/data/question_column", question);
  }

  function columns({ columns: found }) {
    const texts = found.filter((one) => one.holds === "text");
    const chats = found.filter((one) => one.holds === "chat");
    const named = (list, words) => list.map((one) => [one.name, words ? t(words, { name: one.name }) : one.name, { translate: "no" }]);
    const question = choice([...named(texts), ...named(chats, "data.chat")], draft.value("/data/question_column"));
    const answer = choice([["", t("data.no.answer")], ...named(texts)], draft.value("/data/answer_column"));
    const prompt = h("textarea", { rows: 4, spellcheck: "false", value: draft.value("/data/system_prompt"), translate: "no" });
    const write = (value) => {
      prompt.value = value;
      prompt.dispatchEvent(new Event("input"));
    };
    const chip = (name, text) => h("button", { type: "button", class: "chip", onclick: () => write(text) }, t(`prompt.${name}`));
    return h(
      "div",
      { class: "fields" },
      fields.bind("/data/question_column", { control: question, label: t("data.question"), hint: t("data.question.hint"), write: (name) => map(name, chats.some((one) => one.name === name)) }),
      fields.bind("/data/answer_column", { control: answer, label: t("data.answer"), hint: t("data.answer.hint"), write: (name) => (name ? draft.give("/data/answer_column", name) : draft.remove("/data/answer_column")) }),
      h("div", { class: "wide" }, fields.bind("/data/system_prompt", { control: prompt, label: t("data.prompt"), hint: t("data.prompt.hint"), isWide: true }), h("div", { class: "chips", role: "group", "aria-label": t("data.prompt.fill") }, chip("none", ""), chip("en", guide.offers.prompts.en), chip("zh", guide.offers.prompts.zh))),
    );
  }

  function rowsOf({ data, count }) {
    const rest = count === null ? 0 : count - Math.min(SHOWN, data.length);
    return [h("h3", {}, t("data.preview")), h("div", { class: "prompts" }, data.slice(0, SHOWN).map(promptOf)), rest > 0 ? h("p", { class: "hint" }, t("data.more", { n: rest })) : null];
  }

  return {
    element,
    update,
    close: () => asking.stop(),
    summary: () => (guide.rows ? raw(guide.rows.name) : isFile() ? "" : raw(String(draft.value("/data/dataset")).split("/").at(-1))),
  };
}

/** A row as the model is asked it, with its right answer. */
export function promptOf(row) {
  if (row.problem) return h("div", { class: "card warning" }, h("p", { class: "sub" }, t("data.row", { n: row.row + 1 })), h("p", {}, raw(`${row.problem.detail}. ${row.problem.remedy}`, { lang: "en" })));
  const turns = row.messages.map(({ role, content }) => h("div", { class: `turn ${role}` }, h("span", { class: "sub" }, t(`role.${role}`)), raw(content.length > LONGEST ? `${content.slice(0, LONGEST)}…` : content, { class: "said" })));
  return h("div", { class: "card prompt" }, h("p", { class: "sub" }, t("data.row", { n: row.row + 1 })), turns, h("p", { class: "meta" }, t("data.right"), " ", row.answer ? raw(row.answer, { class: "gold" }) : t("data.no.answer")));
}
