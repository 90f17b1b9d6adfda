// What the charts of a view share: smoothing, the horizontal axis, the zoom, and which lines are hidden.
//
// Owns the bar of controls above the charts, and keeps the choices in the browser, so that they are there after a reload.
// Draws nothing itself. Invariant: all charts of a board show the same stretch of the same axis.

import { fill, h } from "./dom.js";
import { fixed, t } from "./i18n.js";
import { AXES } from "./curve.js";

const STORED = "grpo.charts";
const MOST_SMOOTHING = 0.99;
const MOST_HIDDEN = 200;
const REST_MS = 150;

/** What was chosen earlier; nothing where the browser has no readable choice. */
function stored() {
  try {
    const found = JSON.parse(localStorage.getItem(STORED) ?? "{}");
    return found && typeof found === "object" ? found : {};
  } catch {
    return {};
  }
}

export class Board {
  /** @param {{name?: string, hint?: string}} [how] `name` is in the title of saved pictures: whose curves these are. */
  constructor({ name = "", hint = "" } = {}) {
    const { smoothing, axis, log, hidden } = stored();
    this.name = name;
    this.hint = hint;
    this.smoothing = Number.isFinite(smoothing) ? Math.min(MOST_SMOOTHING, Math.max(0, smoothing)) : 0;
    this.chosenAxis = AXES.includes(axis) ? axis : "step";
    this.log = new Set(Array.isArray(log) ? log : []);
    this.hidden = new Set(Array.isArray(hidden) ? hidden : []);
    /** @type {{min: number, max: number} | null} */
    this.zoom = null;
    this.hasClock = true;
    this.charts = new Set();
    this.onEscape = (event) => {
      if (event.key === "Escape" && this.zoom && !document.querySelector("dialog[open]")) this.zoomTo(null);
    };
    document.addEventListener("keydown", this.onEscape);
    this.element = h("div", { class: "chart-bar" });
    this.drawBar();
  }

  /** Wall clock needs times; without them it is steps. */
  get axis() {
    return this.chosenAxis === "clock" && !this.hasClock ? "step" : this.chosenAxis;
  }

  drawBar() {
    this.weight = h("output", { class: "weight", translate: "no" });
    const slider = h("input", { type: "range", id: "smoothing", min: 0, max: MOST_SMOOTHING, step: 0.01, value: String(this.smoothing), oninput: () => this.smoothTo(Number(slider.value)) });
    this.slider = slider;
    this.clockOption = h("option", { value: "clock", selected: this.axis === "clock" }, t("chart.axis.clock"));
    const options = [...AXES.slice(0, 2).map((axis) => h("option", { value: axis, selected: axis === this.axis }, t(`chart.axis.${axis}`))), this.clockOption];
    const axes = h("select", { id: "axis", onchange: () => this.changeAxis(axes.value) }, options);
    this.axes = axes;
    this.meaning = h("span", { class: "hint" });
    fill(
      this.element,
      h("label", { for: "smoothing" }, t("chart.smoothing"), slider, this.weight, this.meaning),
      h("label", { for: "axis" }, t("chart.axis"), axes),
      h("p", { class: "hint" }, t("chart.zoom.hint"), " ", this.hint),
    );
    this.tellWeight();
  }

  tellWeight() {
    this.weight.textContent = fixed(this.smoothing, 2);
    this.slider.setAttribute("aria-valuetext", fixed(this.smoothing, 2));
    this.meaning.textContent = this.smoothing ? t("chart.smoothing.on") : "";
  }

  smoothTo(weight) {
    this.smoothing = weight;
    this.tellWeight();
    this.changed();
  }

  changeAxis(axis) {
    this.chosenAxis = axis;
    this.zoom = null;
    this.changed();
  }

  /** Whether the runs that are shown know when their steps were. */
  allowClock(hasClock) {
    if (this.hasClock === hasClock) return;
    this.hasClock = hasClock;
    this.clockOption.disabled = !hasClock;
    this.axes.value = this.axis;
  }

  /** @param {{min: number, max: number} | null} zoom null shows everything. */
  zoomTo(zoom) {
    this.zoom = zoom;
    this.charts.forEach((chart) => chart.showZoom());
  }

  isLog(chart) {
    return this.log.has(chart);
  }

  toggleLog(chart) {
    toggle(this.log, chart);
    this.changed();
  }

  isHidden(key) {
    return this.hidden.has(key);
  }

  toggleHidden(key) {
    toggle(this.hidden, key);
    this.changed();
  }

  changed() {
    const hidden = [...this.hidden].slice(-MOST_HIDDEN);
    localStorage.setItem(STORED, JSON.stringify({ smoothing: this.smoothing, axis: this.chosenAxis, log: [...this.log], hidden }));
    this.stop();
    this.frame = requestAnimationFrame(() => this.refresh());
  }

  /** What is in view at once, so that a slider can be drawn along; the rest when it has come to rest. */
  refresh() {
    const [seen, others] = [true, false].map((isSeen) => [...this.charts].filter((chart) => chart.isInView() === isSeen));
    seen.forEach((chart) => chart.refresh());
    this.rest = setTimeout(() => others.forEach((chart) => chart.refresh()), REST_MS);
  }

  stop() {
    cancelAnimationFrame(this.frame ?? 0);
    clearTimeout(this.rest);
  }

  close() {
    this.stop();
    document.removeEventListener("keydown", this.onEscape);
  }
}

function toggle(set, one) {
  if (!set.delete(one)) set.add(one);
}
