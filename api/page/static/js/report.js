// The tab of the report: did it answer better on questions it was never trained on, and is that more than chance.

import { Asking, get } from "./api.js";
import { fill, h, raw } from "./dom.js";
import { duration, fixed, number, percent, serviceWords, t } from "./i18n.js";
import { busy, empty, problemCard } from "./parts.js";
import { ENDED } from "./feed.js";
import { completionText } from "./text.js";
import { diffDialog } from "./rollouts.js";

const READINGS = ["strict", "lenient"];

export function reportTab(feed) {
  const element = h("div", { class: "report" }, busy());
  const asking = new Asking();
  let mark = "";

  function load() {
    asking.ask(() => Promise.all([get(`/page/reports/${feed.id}`), get(`/jobs/${feed.id}/artifacts`)]), { answered: show, refused: (error) => fill(element, problemCard(error, { again: load })) });
  }

  function show([report, files]) {
    const whole = files.data.find((file) => file.path === "report.html");
    fill(element, draw(report, feed), whole ? h("p", { class: "hint" }, h("a", { href: whole.url, download: "report.html", rel: "noopener" }, t("report.whole")), " ", t("report.whole.hint")) : null);
  }

  return {
    element,
    update() {
      const now = `${feed.job.status} ${feed.events.filter((event) => event.type === "evaluation").length}`;
      if (now === mark) return;
      mark = now;
      load();
    },
  };
}

function draw(report, feed) {
  const evaluation = report?.evaluation ?? null;
  if (evaluation) return [verdicts(evaluation), sides(evaluation), pairs(evaluation), samples(evaluation), selfTest(report.selftest)];
  const before = feed.events.find((event) => event.type === "evaluation" && event.data.stage === "before");
  const isOver = ENDED.has(feed.job.status);
  if (before && isOver) return [empty(t("report.unfinished"), h("p", {}, t("report.unfinished.hint")), h("p", {}, t("report.before", { accuracy: percent(before.data.strict_accuracy) })))];
  if (before) return [empty(t("report.waiting"), h("p", {}, t("report.before", { accuracy: percent(before.data.strict_accuracy) })))];
  if (report) return [empty(t("report.off"), h("p", {}, t("report.off.hint")), h("p", {}, raw('{"evaluation": {"questions": 200}}', { class: "code" }))), selfTest(report.selftest)];
  return isOver ? empty(t("report.unfinished"), h("p", {}, t("report.unfinished.hint"))) : empty(t("report.none"), h("p", {}, t("report.none.hint")));
}

/** The comparisons: of a job from a checkpoint first with that, then with the base model. */
function comparisons(evaluation) {
  const base = { stage: "before", paired: evaluation.paired };
  return evaluation.paired_start ? [{ stage: "start", paired: evaluation.paired_start }, base] : [base];
}

function stages(evaluation) {
  return ["before", "start", "after"].filter((stage) => evaluation[stage]);
}

/** What a comparison is with, where there are two. */
function sinceHeading(evaluation, stage) {
  return evaluation.paired_start ? h("h2", {}, t("report.compared", { stage: t(`evaluation.${stage}`) })) : null;
}

/** The verdict on the reward that a job with rewards of its own names. */
function ownVerdict(evaluation, own) {
  const kind = own.p_value >= 0.05 ? "same" : own.difference > 0 ? "better" : "worse";
  return h(
    "div",
    { class: "verdicts" },
    h(
      "section",
      { class: `card verdict ${kind}` },
      h("p", { class: "label" }, raw(evaluation.metric)),
      h("p", { class: "difference" }, raw(`${own.difference > 0 ? "+" : ""}${own.difference.toPrecision(3)}`)),
      h("p", { class: "strong" }, t(`verdict.${kind}`)),
      h("p", { class: "hint" }, raw(own.verdict, { lang: "en" })),
    ),
  );
}

function verdicts(evaluation) {
  return comparisons(evaluation).map(({ stage, paired }) => [sinceHeading(evaluation, stage), paired.metric ? ownVerdict(evaluation, paired.metric) : readingVerdicts(evaluation, stage, paired)]);
}

function readingVerdicts(evaluation, stage, comparison) {
  return h(
    "div",
    { class: "verdicts" },
    READINGS.filter((reading) => comparison[reading]).map((reading) => {
      const paired = comparison[reading];
      const isClear = paired.p_value < 0.05;
      const kind = !isClear ? "same" : paired.difference > 0 ? "better" : "worse";
      return h(
        "section",
        { class: `card verdict ${kind}` },
        h("p", { class: "label" }, t(`evaluation.${reading}`)),
        h("p", { class: "difference" }, raw(points(paired.difference)), h("span", { class: "unit" }, " ", t("report.points"))),
        h("p", { class: "strong" }, t(`verdict.${kind}`)),
        h("p", { class: "hint" }, verdictText(evaluation, stage, reading, paired) ?? raw(paired.verdict, { lang: "en" })),
      );
    }),
  );
}

/** The service's sentence in the reader's language, or null. */
function verdictText(evaluation, stage, reading, { interval, p_value: p }) {
  return serviceWords("verdict", {
    before: percent(evaluation[stage][`${reading}_accuracy`]),
    after: percent(evaluation.after[`${reading}_accuracy`]),
    low: points(interval[0]),
    high: points(interval[1]),
    p: p < 0.001 ? "p < 0.001" : `p = ${number(p, 2)}`,
    questions: evaluation.questions,
  });
}

function points(share) {
  return (share >= 0 ? "+" : "−") + fixed(Math.abs(share) * 100, 1);
}

function sides(evaluation) {
  return h(
    "section",
    { class: "card" },
    h("h2", {}, t("report.accuracy")),
    h("p", { class: "hint" }, t("report.accuracy.hint", { questions: evaluation.questions, tokens: evaluation.max_completion_tokens })),
    READINGS.map((reading) =>
      h(
        "div",
        { class: "interval-group" },
        h("h3", {}, t(`evaluation.${reading}`), h("span", { class: "hint" }, " ", t(`evaluation.${reading}.hint`))),
        stages(evaluation).map((stage) => intervalRow(t(`evaluation.${stage}`), stage, evaluation[stage][`${reading}_accuracy`], evaluation[stage][`${reading}_interval`])),
      ),
    ),
    h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": t("report.accuracy") }, otherFigures(evaluation)),
  );
}

function intervalRow(name, stage, value, interval) {
  const [low, high] = interval ?? [value, value];
  return h(
    "div",
    { class: `interval ${stage}` },
    h("span", { class: "name" }, name),
    h("div", { class: "track", "aria-hidden": "true" }, h("div", { class: "range", css: { left: `${low * 100}%`, width: `${(high - low) * 100}%` } }), h("div", { class: "point", css: { left: `${value * 100}%` } })),
    h("span", { class: "figure" }, raw(percent(value)), h("span", { class: "hint" }, " ", raw(`${percent(low)} – ${percent(high)}`))),
  );
}

function otherFigures(evaluation) {
  /** @type {[string, string, (value: any) => string][]} */
  const figures = [
    ["format", "strict_format_share", percent],
    ["truncated", "truncated_share", percent],
    ["reward", "reward", (value) => fixed(value, 2)],
    ["tokens", "completion_tokens", (value) => number(value, 3)],
    ["seconds", "seconds", duration],
  ];
  const rows = figures.filter(([, key]) => evaluation.before[key] !== undefined);
  const head = h("tr", {}, h("td", {}), stages(evaluation).map((stage) => h("th", { scope: "col", class: "number" }, t(`evaluation.${stage}`))));
  return h("table", { class: "plain" }, h("thead", {}, head), h("tbody", {}, rows.map(([name, key, format]) => h("tr", {}, h("th", { scope: "row" }, t(`report.${name}`)), stages(evaluation).map((stage) => h("td", { class: "number", translate: "no" }, format(evaluation[stage][key])))))));
}

function pairs(evaluation) {
  return h(
    "section",
    { class: "card" },
    h("h2", {}, t("report.pairs")),
    h("p", { class: "hint" }, t("report.pairs.hint")),
    comparisons(evaluation).map(({ stage, paired }) => [evaluation.paired_start ? h("h3", {}, t("report.compared", { stage: t(`evaluation.${stage}`) })) : null, h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": t("report.pairs") }, pairTable(paired))]),
  );
}

function pairTable(comparison) {
  const columns = ["both", "gained", "lost", "neither"];
  const head = h("tr", {}, h("td", {}), columns.map((name) => h("th", { scope: "col", class: "number" }, t(`pairs.${name}`))), h("th", { scope: "col", class: "number" }, t("report.difference")), h("th", { scope: "col", class: "number" }, t("report.interval")), h("th", { scope: "col", class: "number" }, t("report.p")));
  const readings = [...READINGS.map((reading) => [reading, t(`evaluation.${reading}`)]), ["format", t("report.format")]];
  const rows = readings.filter(([reading]) => comparison[reading]).map(([reading, name]) => {
    const paired = comparison[reading];
    const cell = (text) => h("td", { class: "number", translate: "no" }, text);
    return h("tr", {}, h("th", { scope: "row" }, name), columns.map((column) => cell(number(paired.counts[column]))), cell(points(paired.difference)), cell(paired.interval.map(points).join(" … ")), cell(number(paired.p_value, 2)));
  });
  return h("table", { class: "plain" }, h("thead", {}, head), h("tbody", {}, rows));
}

function samples(evaluation) {
  return h(
    "section",
    { class: "samples" },
    h("h2", {}, t("report.samples")),
    h("p", { class: "hint" }, t("report.samples.hint", { n: evaluation.samples.length })),
    evaluation.samples.map((sample) =>
      h(
        "article",
        { class: "group" },
        h("header", {}, h("p", { class: "question" }, raw(sample.question)), h("p", { class: "meta" }, t("rollouts.answer"), " ", raw(String(sample.answer), { class: "gold" }), " ", h("button", { type: "button", class: "quiet", onclick: () => diffDialog(["before", "after"].map((stage) => ({ heading: t(`evaluation.${stage}`), text: sample[stage] })), sample.question) }, t("diff.show")))),
        h("div", { class: "cards two" }, ["before", "after"].map((stage) => h("section", { class: "card rollout" }, h("p", { class: "label" }, t(`evaluation.${stage}`)), completionText(sample[stage])))),
      ),
    ),
  );
}

function selfTest(result) {
  if (!result) return null;
  const effect = result.adapter_effect?.mean;
  return h(
    "section",
    { class: "card" },
    h("h2", {}, t("evaluation.selftest")),
    h("p", { class: "hint" }, t("report.selftest.hint")),
    h("dl", { class: "facts-list" }, [["report.selftest.peft", result.peft?.mean], ["report.selftest.bound", result.peft?.bound], ["report.selftest.effect", effect]].filter(([, value]) => value !== undefined).map(([key, value]) => h("div", {}, h("dt", {}, t(key)), h("dd", { translate: "no" }, number(value, 3))))),
  );
}
