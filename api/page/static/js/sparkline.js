// A small curve for a table's cell, with its meaning in words.

import { h } from "./dom.js";
import { number, t } from "./i18n.js";
import { extremes } from "./curve.js";

/** A small curve of [step, value] pairs. */
export function sparkline(points, { width = 96, height = 26 } = {}) {
  if (!points || points.length < 2) return h("span", { class: "spark empty", "aria-hidden": "true" });
  const values = points.map(([, value]) => value);
  const [low, high] = extremes(values) ?? [0, 0];
  const [first, last] = [points[0][0], points.at(-1)[0]];
  const x = (step) => 2 + ((step - first) / (last - first || 1)) * (width - 6);
  const y = (value) => height - 3 - ((value - low) / (high - low || 1)) * (height - 6);
  const path = points.map(([step, value], place) => `${place ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("");
  const label = t("jobs.spark", { first: number(values[0], 3), last: number(values.at(-1), 3) });
  return h(
    "svg",
    { class: "spark", viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label },
    h("path", { d: path, class: "line" }),
    h("circle", { cx: x(last).toFixed(1), cy: y(values.at(-1)).toFixed(1), r: 2.2, class: "end" }),
  );
}
