// Curves over steps, drawn by uPlot: shared cursor, live data, a click or Enter opens the step. With a summary in
// words and a table for those who do not see the picture.

import { append, fill, h, raw } from "./dom.js";
import { number, t } from "./i18n.js";

const SYNC = "steps";
const TABLE_ROWS = 200;

function token(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** The colour of the nth series; those of a comparison are the first two. */
export function seriesColour(place) {
  return token(`--series-${(place % 6) + 1}`);
}

function withAlpha(colour, alpha) {
  return `color-mix(in srgb, ${colour} ${alpha * 100}%, transparent)`;
}

// Canvas knows color-mix only in newer browsers; where it does not, the plain colour with an alpha of the canvas does.
function canvasAlpha(colour, alpha) {
  const hex = /^#([0-9a-f]{6})$/i.exec(colour);
  return hex ? `${colour}${Math.round(alpha * 255).toString(16).padStart(2, "0")}` : withAlpha(colour, alpha);
}

/**
 * One chart.
 *
 * `series`: [{label, value(metric) -> number, colour?}], the colour as a place among the series' colours, else its own;
 * `band`: {low, high} functions of metrics, around the first series; `marks`: () => [{step, kind}]; `onStep(step)`: what
 * a click opens.
 */
export class Chart {
  /**
   * @param {{
   *   title: string, hint?: string, series: any[], band?: {low: Function, high: Function} | null,
   *   marks?: (() => {step: number, kind: string}[]) | null, onStep?: ((step: number) => void) | null,
   *   height?: number, format?: (value: any) => string, big?: boolean, range?: any,
   * }} how
   */
  constructor({ title, hint = "", series, band = null, marks = null, onStep = null, height = 180, format = number, big = false, range = null }) {
    this.title = title;
    this.series = series;
    this.band = band;
    this.marks = marks;
    this.onStep = onStep;
    this.height = height;
    this.format = format;
    this.range = range;
    this.hidden = new Set();
    this.data = [[]];
    this.sources = [];
    this.legend = h("ul", { class: "legend" });
    this.canvas = h("div", {
      class: "plot",
      tabindex: "0",
      role: "group",
      "aria-roledescription": t("chart.role"),
      onkeydown: (event) => this.onKey(event),
    });
    this.canvas.style.setProperty("min-height", `${height}px`);
    this.summary = h("p", { class: "sr-only" });
    this.live = h("p", { class: "sr-only", "aria-live": "polite" });
    this.table = h("details", { class: "chart-table", ontoggle: () => this.fillTable() }, h("summary", {}, t("chart.table")));
    this.tableBody = h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": title });
    this.table.append(this.tableBody);
    this.element = h(
      "figure",
      { class: big ? "chart big" : "chart" },
      h("figcaption", {}, h("h3", {}, title), hint && h("p", { class: "hint" }, hint)),
      this.legend,
      this.canvas,
      this.summary,
      this.live,
      this.table,
    );
    this.plot = null;
    this.resize = new ResizeObserver(() => this.fit());
    this.resize.observe(this.canvas);
  }

  /** Draw these metrics: one list for each series' source, or one for all. */
  update(metrics) {
    this.metrics = metrics;
    this.data = this.columns(metrics);
    if (this.plot && this.plot.data.length === this.data.length) this.show();
    else this.draw();
    // Drawn once: a button of it that has the keyboard keeps it.
    if (this.values) this.showAt(this.plot?.cursor.idx ?? null);
    else this.drawLegend();
    this.describe();
  }

  /** A part of the steps that was chosen stays, whatever comes; a double click shows all again. */
  show() {
    const [steps] = this.plot.data;
    const { min, max } = this.plot.scales.x;
    const isZoomed = steps.length > 1 && (min > steps[0] || max < steps.at(-1));
    this.plot.batch(() => {
      this.plot.setData(this.data);
      if (isZoomed) this.plot.setScale("x", { min, max });
    });
  }

  columns(metrics) {
    const steps = metrics.map((metric) => metric.step);
    const columns = [steps, ...this.series.map((one) => metrics.map((metric) => one.value(metric) ?? null))];
    const { band } = this;
    if (band) columns.push(metrics.map((metric) => band.high(metric) ?? null), metrics.map((metric) => band.low(metric) ?? null));
    return columns;
  }

  isEmpty() {
    return this.data.slice(1).every((column) => column.every((value) => value === null));
  }

  draw() {
    this.plot?.destroy();
    this.plot = null;
    const width = this.canvas.clientWidth;
    if (!width) return;
    this.plot = new uPlot(this.options(width), this.data, this.canvas);
    this.plot.over.addEventListener("click", () => this.openAt(this.plot.cursor.idx));
  }

  options(width) {
    const grid = { stroke: token("--grid"), width: 1 };
    const font = "11px system-ui, sans-serif";
    const axis = { stroke: token("--muted"), grid, ticks: { show: false }, font };
    const series = [{}, ...this.series.map((one, place) => this.seriesOptions(one, place))];
    const bands = [];
    if (this.band) {
      const edge = { stroke: "transparent", width: 0, points: { show: false } };
      series.push(edge, { ...edge });
      bands.push({ series: [series.length - 2, series.length - 1], fill: canvasAlpha(this.colour(0), 0.14) });
    }
    return {
      width,
      height: this.height,
      legend: { show: false },
      padding: [8, 10, 0, 0],
      cursor: {
        sync: { key: SYNC, setSeries: false },
        points: { size: 7 },
        drag: { x: true, y: false },
        y: false,
        // A click is a click only where nothing was dragged; uPlot zooms otherwise.
        bind: { dblclick: (u, target, handler) => handler },
      },
      scales: { x: { time: false }, y: { range: this.range ?? padded } },
      axes: [
        { ...axis, size: 26, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? number(tick) : "")) },
        { ...axis, size: (_, labels) => Math.max(40, 14 + 6.4 * Math.max(0, ...(labels ?? []).map((label) => label.length))), values: (_, ticks) => ticks.map((tick) => this.format(tick)) },
      ],
      series,
      bands,
      hooks: { setCursor: [(u) => this.showAt(u.cursor.idx)], drawAxes: [(u) => this.drawMarks(u)] },
    };
  }

  colour(place) {
    return seriesColour(this.series[place].colour ?? place);
  }

  seriesOptions(one, place) {
    return {
      stroke: this.colour(place),
      width: 1.75,
      dash: one.dash,
      show: !this.hidden.has(one.label),
      spanGaps: true,
      points: { show: (u) => u.data[0].length < 3, size: 6 },
    };
  }

  drawMarks(u) {
    const marks = this.marks?.() ?? [];
    const { ctx } = u;
    ctx.save();
    for (const mark of marks) {
      const x = Math.round(u.valToPos(mark.step, "x", true)) + 0.5;
      if (x < u.bbox.left || x > u.bbox.left + u.bbox.width) continue;
      ctx.strokeStyle = canvasAlpha(token(mark.kind === "warning" ? "--warning" : "--muted"), 0.7);
      ctx.setLineDash([3, 4]);
      ctx.lineWidth = 1;
      ctx.beginPath();
      ctx.moveTo(x, u.bbox.top);
      ctx.lineTo(x, u.bbox.top + u.bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  }

  fit() {
    const width = this.canvas.clientWidth;
    if (!width) return;
    if (!this.plot) this.draw();
    else if (this.plot.width !== width) this.plot.setSize({ width, height: this.height });
  }

  /** The legend shows the values under the cursor, and else those of the last step. */
  drawLegend() {
    fill(this.legend);
    this.values = this.series.map((one, place) => {
      const value = raw("", { class: "value" });
      const isShown = !this.hidden.has(one.label);
      const label = [h("i", { css: { background: this.colour(place) }, class: one.dash ? "swatch dashed" : "swatch" }), one.text ?? raw(one.label)];
      const toggle =
        this.series.length > 1
          ? h("button", { type: "button", "aria-pressed": String(isShown), onclick: () => this.toggle(place) }, ...label)
          : h("span", {}, ...label);
      this.legend.append(h("li", {}, toggle, value));
      return value;
    });
    this.step = raw("", { class: "step" });
    append(this.legend, [h("li", { class: "at" }, this.step)]);
    this.showAt(this.plot?.cursor.idx ?? null);
  }

  showAt(place) {
    const { values } = this;
    if (!values) return;
    const at = place ?? this.data[0].length - 1;
    const step = this.data[0][at];
    this.step.textContent = step === undefined ? "" : t("chart.step", { step: number(step) });
    this.series.forEach((_, index) => {
      values[index].textContent = step === undefined ? "–" : this.format(this.data[index + 1][at]);
    });
  }

  toggle(place) {
    const { label } = this.series[place];
    if (this.hidden.has(label)) this.hidden.delete(label);
    else this.hidden.add(label);
    this.plot?.setSeries(place + 1, { show: !this.hidden.has(label) });
    this.drawLegend();
    this.legend.querySelectorAll("button")[place]?.focus();
  }

  openAt(place) {
    if (place === null || place === undefined || !this.onStep) return;
    const step = this.data[0][place];
    if (step !== undefined) this.onStep(step);
  }

  onKey(event) {
    const last = this.data[0].length - 1;
    if (!this.plot || last < 0) return;
    const at = this.plot.cursor.idx ?? last;
    const stride = event.shiftKey ? Math.max(1, Math.round(last / 20)) : 1;
    const moves = { ArrowLeft: at - stride, ArrowRight: at + stride, Home: 0, End: last };
    if (event.key === "Enter") {
      event.preventDefault();
      this.openAt(at);
      return;
    }
    if (!(event.key in moves)) return;
    event.preventDefault();
    const next = Math.min(last, Math.max(0, moves[event.key]));
    this.plot.setCursor({ left: this.plot.valToPos(this.data[0][next], "x"), top: 10 });
    const values = this.series.map((one, place) => `${one.name ?? one.label} ${this.format(this.data[place + 1][next])}`);
    this.live.textContent = `${t("chart.step", { step: number(this.data[0][next]) })}: ${values.join(", ")}`;
  }

  describe() {
    const steps = this.data[0];
    this.canvas.setAttribute("aria-label", this.onStep ? t("chart.label", { title: this.title }) : this.title);
    const sentences = this.series.map((one, place) => {
      const values = this.data[place + 1].filter((value) => value !== null);
      if (!values.length) return t("chart.none", { name: one.name ?? one.label });
      const [low, high] = extremes(values);
      return t("chart.summary", {
        name: one.name ?? one.label,
        first: this.format(values[0]),
        from: number(steps[0]),
        last: this.format(values.at(-1)),
        to: number(steps.at(-1)),
        low: this.format(low),
        high: this.format(high),
      });
    });
    this.summary.textContent = sentences.join(" ");
    if (this.table.open) this.fillTable();
  }

  fillTable() {
    if (!this.table.open) return;
    const steps = this.data[0];
    const stride = Math.ceil(steps.length / TABLE_ROWS) || 1;
    const rows = steps.map((_, place) => place).filter((place) => place % stride === 0 || place === steps.length - 1);
    const head = h("tr", {}, h("th", { scope: "col", class: "number" }, t("metric.step")), this.series.map((one) => h("th", { scope: "col", class: "number" }, one.name ?? raw(one.label))));
    const body = rows.map((place) =>
      h(
        "tr",
        {},
        h("th", { scope: "row", class: "number", translate: "no" }, number(steps[place])),
        this.series.map((_, index) => h("td", { class: "number", translate: "no" }, this.format(this.data[index + 1][place]))),
      ),
    );
    fill(this.tableBody, h("table", { class: "plain" }, h("thead", {}, head), h("tbody", {}, body)));
  }

  /** After a change of colours. */
  repaint() {
    if (!this.plot) return;
    this.draw();
    this.drawLegend();
  }

  destroy() {
    this.resize.disconnect();
    this.plot?.destroy();
  }
}

function extremes(values) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

function padded(_, low, high) {
  if (low === null || high === null) return [0, 1];
  const room = high > low ? (high - low) * 0.08 : Math.abs(high) * 0.1 || 0.5;
  // A share or a length that touches zero should not show a negative axis.
  return [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
}

/** A small curve of [step, value] pairs, with its meaning in words. */
export function sparkline(points, { width = 96, height = 26 } = {}) {
  if (!points || points.length < 2) return h("span", { class: "spark empty", "aria-hidden": "true" });
  const values = points.map(([, value]) => value);
  const [low, high] = extremes(values);
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
