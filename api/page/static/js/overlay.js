// The curves of several jobs laid over each other, a line for each job.

import { get, query as queryString } from "./api.js";
import { Board } from "./board.js";
import { Chart } from "./charts.js";
import { h } from "./dom.js";
import { withEvaluations } from "./evaluations.js";
import { overlaid } from "./metrics.js";
import { jobName } from "./parts.js";

/** A job's metrics, with its evaluations, as `Overlay` draws them. */
export async function measured(id) {
  const evaluations = `/jobs/${id}/events${queryString({ type: "evaluation", limit: 1000 })}`;
  const [metrics, events] = await Promise.all([get(`/jobs/${id}/metrics`), get(evaluations)]);
  return { metrics: metrics.data, rows: withEvaluations(metrics.data, events.data) };
}

export class Overlay {
  /** @param {{key: string, label: string, colour?: number, metrics: any[], rows: any[]}[]} runs */
  constructor(runs) {
    this.board = new Board({ name: runs.map(({ label }) => label).join(", ") });
    this.board.allowClock(runs.some(({ metrics }) => metrics.some(({ time }) => time)));
    this.charts = overlaid(runs).map((definition) => new Chart({ ...definition, ...(definition.name === "reward" ? { big: true, height: 260 } : {}), board: this.board }));
    this.element = h("div", { class: "charts" }, this.board.element, this.charts.map(({ element }) => element));
  }

  /** Once `element` is in the document. */
  draw(runs) {
    this.charts.forEach((chart) => chart.update(runs.map(({ rows }) => rows)));
  }

  repaint() {
    this.charts.forEach((chart) => chart.repaint());
  }

  close() {
    this.charts.forEach((chart) => chart.destroy());
    this.board.close();
  }
}

/** What a job is called where several are: many have the same name. */
export function shortName(job) {
  const name = jobName(job);
  return name === job.id ? job.id : `${name} · ${job.id.slice(-6)}`;
}
