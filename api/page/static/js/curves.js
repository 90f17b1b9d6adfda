// The tab of curves: what the job's metrics say, step by step.

import { fill, h } from "./dom.js";
import { bytes, fixed, number, percent, t } from "./i18n.js";
import { Chart } from "./charts.js";
import { empty } from "./parts.js";

const share = (value) => percent(value, 0);

/** The charts of one job or of two: `pick` wraps a metric's reader for each of them. */
export function curvesTab(feed, _query, go) {
  const element = h("div", { class: "charts" });
  const onStep = (step) => go("rollouts", { step });
  const marks = () => feed.events.filter((event) => event.step > 0 && (event.type === "warning" || event.data.code === "resumed")).map((event) => ({ step: event.step, kind: event.type }));
  let charts = [];
  let shape = "";

  function build() {
    charts.forEach((chart) => chart.destroy());
    charts = definitions(feed.metrics).map((definition) => new Chart({ ...definition, marks, onStep }));
    fill(element, h("p", { class: "hint chart-hint" }, t("curves.hint")), charts.map((chart) => chart.element));
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
      const now = JSON.stringify(presence(feed.metrics));
      if (now !== shape) {
        shape = now;
        build();
      }
      for (const chart of charts) chart.update(feed.metrics);
    },
    repaint: () => charts.forEach((chart) => chart.repaint()),
    close: () => charts.forEach((chart) => chart.destroy()),
  };
}

/** Which metrics there are at all: a CPU has no GPU memory, a run without KL term no KL. */
function presence(metrics) {
  const sample = metrics.length > 100 ? metrics.slice(0, 50).concat(metrics.slice(-50)) : metrics;
  const has = (read) => sample.some((metric) => Number.isFinite(read(metric)));
  return {
    rewards: [...new Set(sample.flatMap((metric) => Object.keys(metric.rewards ?? {})))],
    kl: has((m) => m.kl),
    entropy: has((m) => m.entropy),
    gpu: has((m) => m.gpu_memory_gb),
    length: has((m) => m.completion_tokens_mean),
    truncated: has((m) => m.truncated_share),
    zero: has((m) => m.zero_variance_share),
    seconds: has((m) => m.seconds?.total),
    loss: has((m) => m.loss),
    gradient: has((m) => m.grad_norm),
    rate: has((m) => m.learning_rate),
    difference: has((m) => m.logprob_diff_mean),
  };
}

export function definitions(metrics) {
  const there = presence(metrics);
  const one = (read, text) => [{ label: text, name: text, text, value: read }];
  const memory = (value) => (value === null || value === undefined ? "–" : bytes(value * 1e9));
  return [
    {
      title: t("metric.reward"),
      hint: t("curves.reward.hint"),
      big: true,
      height: 280,
      format: (value) => fixed(value, 2),
      series: one((m) => m.reward, t("curves.mean")),
      band: { high: (m) => (m.reward_std === undefined ? null : m.reward + m.reward_std), low: (m) => (m.reward_std === undefined ? null : m.reward - m.reward_std) },
    },
    there.rewards.length && {
      title: t("metric.rewards"),
      hint: t("curves.rewards.hint"),
      big: true,
      height: 220,
      format: (value) => fixed(value, 2),
      series: there.rewards.map((name) => ({ label: name, value: (m) => m.rewards?.[name] })),
    },
    there.length && {
      title: t("metric.length"),
      hint: t("curves.length.hint"),
      format: (value) => number(value, 3),
      series: one((m) => m.completion_tokens_mean, t("curves.mean")),
      band: { high: (m) => m.completion_tokens_max, low: (m) => m.completion_tokens_min },
    },
    there.truncated && { title: t("metric.truncated"), hint: t("curves.truncated.hint"), format: share, range: shares, series: one((m) => m.truncated_share, t("metric.truncated.short")) },
    there.zero && { title: t("metric.zero_variance"), hint: t("curves.zero_variance.hint"), format: share, range: shares, series: one((m) => m.zero_variance_share, t("metric.zero_variance.short")) },
    there.kl && { title: t("metric.kl"), hint: t("curves.kl.hint"), series: one((m) => m.kl, t("metric.kl.short")) },
    there.entropy && { title: t("metric.entropy"), hint: t("curves.entropy.hint"), series: one((m) => m.entropy, t("metric.entropy")) },
    there.loss && { title: t("metric.loss"), hint: t("curves.loss.hint"), series: one((m) => m.loss, t("metric.loss")) },
    there.gradient && { title: t("metric.grad_norm"), hint: t("curves.grad_norm.hint"), series: one((m) => m.grad_norm, t("metric.grad_norm")) },
    there.rate && { title: t("metric.learning_rate"), hint: t("curves.learning_rate.hint"), series: one((m) => m.learning_rate, t("metric.learning_rate")) },
    there.seconds && {
      title: t("metric.seconds"),
      hint: t("curves.seconds.hint"),
      format: (value) => number(value, 3),
      series: ["total", "generation", "update", "reward"].map((name) => ({ label: name, name: t(`seconds.${name}`), text: t(`seconds.${name}`), value: (m) => m.seconds?.[name] })),
    },
    there.gpu && { title: t("metric.gpu_memory"), hint: t("curves.gpu_memory.hint"), format: memory, series: one((m) => m.gpu_memory_gb, t("metric.gpu_memory")) },
    there.difference && { title: t("metric.logprob_diff"), hint: t("curves.logprob_diff.hint"), series: one((m) => m.logprob_diff_mean, t("curves.mean")) },
  ].filter(Boolean);
}

function shares(_, low, high) {
  return [0, Math.max(0.1, Math.min(1, (high ?? 0) * 1.15))];
}
