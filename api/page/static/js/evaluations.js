// The curve of a job's evaluations on held-out questions: before, while and after it trains.
//
// Its points come with `evaluation` events, and not with a step's metrics. Invariant: each step has one point, the latest.

import { percent, number, t } from "./i18n.js";
import { shares } from "./plot.js";

const ACCURACY = "strict_accuracy";

/** The events that have a point of the curve; those of older workers have none. */
function pointsOf(events) {
  const points = new Map();
  for (const { type, time, data } of events) if (type === "evaluation" && data.curve) points.set(data.curve.step, { ...data.curve, time });
  return points;
}

/** Rows of metrics with the evaluation of their step; an evaluation of a step that was not logged is a row of its own. */
export function withEvaluations(metrics, events) {
  const points = pointsOf(events);
  const rows = metrics.map((row) => {
    const evaluation = points.get(row.step);
    points.delete(row.step);
    return evaluation ? { ...row, evaluation } : row;
  });
  const alone = [...points.values()].map((evaluation) => ({ step: evaluation.step, time: evaluation.time, evaluation }));
  return [...rows, ...alone].sort((a, b) => a.step - b.step);
}

/** The chart of these rows, or null where nothing was evaluated: accuracy, or the reward that the job is judged by. */
export function evaluationChart(rows) {
  const last = rows.findLast((row) => row.evaluation)?.evaluation;
  if (!last) return null;
  const read = (field) => (row) => row.evaluation?.[field];
  const isAccuracy = last.metric === ACCURACY;
  const accuracy = (name) => ({ label: `${name}_accuracy`, name: t(`evaluation.${name}`), text: t(`evaluation.${name}`), value: read(`${name}_accuracy`) });
  return {
    name: "evaluation",
    title: t("curves.evaluation"),
    hint: t("curves.evaluation.hint", { n: last.questions }),
    format: isAccuracy ? (value) => percent(value, 1) : number,
    range: isAccuracy ? shares : null,
    series: isAccuracy ? [accuracy("strict"), accuracy("lenient")] : [{ label: last.metric, value: (row) => (row.evaluation?.metric === last.metric ? row.evaluation.value : null) }],
    band: { low: (row) => row.evaluation?.interval?.[0], high: (row) => row.evaluation?.interval?.[1] },
  };
}

/** The step whose evaluation was best so far, or null. */
export function bestStep(events) {
  return events.findLast((event) => event.type === "evaluation" && event.data.best_step)?.data.best_step ?? null;
}
