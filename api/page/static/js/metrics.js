// What is drawn of a job's metrics: the charts that the service describes, as far as there are numbers for them.

import { evaluationChart } from "./evaluations.js";
import { bytes, charts, fixed, number, percent, t } from "./i18n.js";
import { shares } from "./plot.js";

const SAMPLED = 50;

const FORMATS = {
  points: (value) => fixed(value, 2),
  share: (value) => percent(value, 0),
  tokens: (value) => number(value, 3),
  s: (value) => number(value, 3),
  GB: (value) => (value === null || value === undefined ? "–" : bytes(value * 1e9)),
};

/** The charts of these rows: a CPU has no GPU memory, a run without KL term no KL. Evaluations stand behind the reward. */
export function drawable(rows) {
  const evaluated = evaluationChart(rows);
  const [reward, ...others] = measuredIn(rows);
  return [reward, evaluated, ...others].flatMap((one) => (one ? [one] : []));
}

function measuredIn(metrics) {
  const sample = metrics.length > 2 * SAMPLED ? [...metrics.slice(0, SAMPLED), ...metrics.slice(-SAMPLED)] : metrics;
  // What is measured at few steps may be in none of the sample.
  return charts.map((one) => chart(one, sample)).filter(({ series }) => series.some(({ value }) => metrics.some((metric) => Number.isFinite(value(metric)))));
}

/**
 * The charts of several runs laid over each other: a line for each run, and a chart for each reward function.
 *
 * @param {{key: string, label: string, rows: any[], colour?: number}[]} runs `rows` as `withEvaluations` gives them
 */
export function overlaid(runs) {
  const lines = (value) => runs.map(({ key, label, colour }, run) => ({ key, label, colour, run, value }));
  // Each reward function and each reading of accuracy has a chart; of times and the like the first line is enough.
  const titles = { rewards: (one) => t("compare.reward.of", { name: one.label }), evaluation: (one) => t("compare.evaluation.of", { name: one.name ?? one.label }) };
  return drawable(runs.flatMap(({ rows }) => rows)).flatMap(({ name, title, format, range, series }) =>
    (titles[name] ? series : series.slice(0, 1)).map((one) => ({
      name: titles[name] ? `${name}.${one.label}` : name,
      title: titles[name]?.(one) ?? title,
      format,
      range,
      group: "runs",
      series: lines(one.value),
    })),
  );
}

function chart({ name, unit, by_name: isByName, lines, band }, sample) {
  const read = (field) => {
    const path = field.split(".");
    return (metric) => path.reduce((value, key) => value?.[key], metric);
  };
  const short = (field) => t(`metric.${field}.short`);
  const hint = t(`metric.${name}.hint`);
  return {
    name,
    title: t(`metric.${name}`),
    hint: band.length ? t("curves.band", { meaning: hint, band: band.map(short).join(" – ") }) : hint,
    format: FORMATS[unit] ?? number,
    range: unit === "share" ? shares : null,
    series: isByName ? namesIn(sample, name).map((label) => ({ label, value: (metric) => metric[name]?.[label] })) : lines.map((field) => ({ label: field, name: short(field), text: short(field), value: read(field) })),
    band: band.length ? edges(read(name), band.map(read)) : null,
  };
}

function namesIn(sample, field) {
  return [...new Set(sample.flatMap((metric) => Object.keys(metric[field] ?? {})))];
}

/** Of one field the width to either side, of two the edges. */
function edges(middle, [low, high]) {
  if (high) return { low, high };
  const beside = (sign) => (metric) => (low(metric) === undefined ? null : middle(metric) + sign * low(metric));
  return { low: beside(-1), high: beside(1) };
}
