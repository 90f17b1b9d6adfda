// The tab of curves: what the job's metrics say, step by step.

import { fill, h } from "./dom.js";
import { number, t } from "./i18n.js";
import { Board } from "./board.js";
import { Chart } from "./charts.js";
import { bestStep, withEvaluations } from "./evaluations.js";
import { drawable } from "./metrics.js";
import { empty, jobName } from "./parts.js";

const BIG = { reward: { big: true, height: 280 }, evaluation: { big: true, height: 220 }, rewards: { big: true, height: 220 } };

export function curvesTab(feed, _query, go) {
  const element = h("div", { class: "charts" });
  const onStep = (step) => go("rollouts", { step });
  const board = new Board({ name: jobName(feed.job), hint: t("curves.hint") });
  const marks = () => feed.events.filter((event) => event.step > 0 && (event.type === "warning" || event.data.code === "resumed")).map((event) => ({ step: event.step, kind: event.type }));
  const best = () => bestStep(feed.events);
  const evaluation = () => ({ marks: () => (best() === null ? marks() : [...marks(), { step: best(), kind: "best" }]), remark: () => (best() === null ? "" : t("curves.evaluation.best", { step: number(best()) })) });
  let charts = [];
  let shape = "";

  function build(definitions) {
    charts.forEach((chart) => chart.destroy());
    charts = definitions.map((one) => new Chart({ ...one, ...BIG[one.name], marks, onStep, board, ...(one.name === "evaluation" ? evaluation() : {}) }));
    fill(element, board.element, charts.map((chart) => chart.element));
  }

  return {
    element,
    update() {
      if (!feed.metrics.length) {
        const nothing = feed.state === "ended" ? "curves.none.ended" : "curves.none.hint";
        if (shape !== nothing) fill(element, empty(t("curves.none"), h("p", {}, t(nothing))));
        shape = nothing;
        return;
      }
      const rows = withEvaluations(feed.metrics, feed.events);
      const definitions = drawable(rows);
      const now = JSON.stringify(definitions.map(({ name, series }) => [name, series.map(({ label }) => label)]));
      if (now !== shape) {
        shape = now;
        build(definitions);
      }
      board.allowClock(feed.metrics.some((metric) => metric.time));
      for (const chart of charts) chart.update(chart.definition.name === "evaluation" ? rows : feed.metrics);
    },
    repaint: () => charts.forEach((chart) => chart.repaint()),
    close() {
      charts.forEach((chart) => chart.destroy());
      board.close();
    },
  };
}
