// A chart of one or more runs: the figure with its legend, plot, keyboard, table and summary in words.
//
// `lines.js` says what is drawn, `plot.js` how, and the board what was chosen. Invariant: the table, the summary and what
// is read out are the values as they were measured, whatever smoothing or axis the picture has.

import { append, fill, h, raw } from "./dom.js";
import { duration, moment, number, percent, t } from "./i18n.js";
import { Board } from "./board.js";
import { extremes, isMeasured, isSparse, lastAt, measured } from "./curve.js";
import { linesOf } from "./lines.js";
import { savePng, saveSvg } from "./picture.js";
import { colourOf, plotOptions } from "./plot.js";

const SYNC = "steps";
const TABLE_ROWS = 200;
const DOUBLE_CLICK_MS = 300;
const DRAG_PX = 8;

export class Chart {
  /**
   * `series` are the lines: `value(row)` of the metrics of run `run`, `key` for what is remembered of it (else its
   * label), `colour` as a place among the series' colours. `band` are functions of a row, around the first line. `marks`
   * gives steps that something happened at. `onStep(step)` is what a click opens. Charts with the same `group` hide the
   * same lines. `remark` gives a sentence below the plot.
   *
   * @param {{
   *   name?: string, title: string, hint?: string, series: any[], band?: {low: Function, high: Function} | null,
   *   marks?: (() => {step: number, kind: string}[]) | null, onStep?: ((step: number) => void) | null, group?: string,
   *   height?: number, format?: (value: any) => string, big?: boolean, range?: any, board?: Board, remark?: () => string,
   * }} how
   */
  constructor({ title, name = title, hint = "", series, band = null, marks = null, onStep = null, group = name, height = 180, format = number, big = false, range = null, board = new Board(), remark = () => "" }) {
    this.definition = { name, series, band, marks, format, range };
    this.title = title;
    this.series = series;
    this.onStep = onStep;
    this.group = group;
    this.height = height;
    this.format = format;
    this.board = board;
    this.remark = remark;
    /** @type {any[][]} */
    this.runs = [[]];
    /** @type {any} */
    this.curves = null;
    /** @type {any} */
    this.plot = null;
    /** @type {any[] | null} */
    this.entries = null;
    this.shape = "";
    this.drawElement(hint, big);
    this.resize = new ResizeObserver(() => this.fit());
    this.resize.observe(this.canvas);
    board.charts.add(this);
  }

  drawElement(hint, big) {
    const { title } = this;
    this.legend = h("ul", { class: "legend" });
    this.canvas = h("div", { class: "plot", tabindex: "0", role: "group", "aria-roledescription": t("chart.role"), onkeydown: (event) => this.onKey(event) });
    this.canvas.style.setProperty("min-height", `${this.height}px`);
    this.whole = h("button", { type: "button", class: "quiet whole", hidden: true, onclick: () => this.showWhole() }, t("chart.whole"));
    this.note = h("p", { class: "hint chart-note" });
    this.summary = h("p", { class: "sr-only" });
    this.live = h("p", { class: "sr-only", "aria-live": "polite" });
    this.tableBody = h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": title });
    this.table = h("details", { class: "chart-table", ontoggle: () => this.fillTable() }, h("summary", {}, t("chart.table")), this.tableBody);
    this.logButton = h("button", { type: "button", class: "quiet", "aria-label": t("chart.log.of", { title }), onclick: () => this.board.toggleLog(this.definition.name) }, t("chart.log"));
    const save = (kind, call) => h("button", { type: "button", class: "quiet", "aria-label": t("chart.save", { kind, title }), onclick: () => (this.refresh(), call(this)) }, raw(kind));
    this.element = h(
      "figure",
      { class: big ? "chart big" : "chart" },
      h("figcaption", {}, h("h3", {}, title), hint && h("p", { class: "hint" }, hint), h("div", { class: "chart-tools" }, this.whole, this.logButton, save("PNG", savePng), save("SVG", saveSvg))),
      this.legend,
      this.canvas,
      this.note,
      this.summary,
      this.live,
      this.table,
    );
  }

  /** Draw these metrics: the rows of one run, or a list of rows for each run. */
  update(metrics) {
    this.runs = Array.isArray(metrics[0]) ? metrics : [metrics];
    this.refresh();
  }

  /** Draw again, after metrics or choices have changed. */
  refresh() {
    this.curves = linesOf(this.definition, this.runs, this.board, (one) => !this.board.isHidden(this.hiddenKey(one)));
    const { axis, isLog, lines, isOverlay, marks } = this.curves;
    // A plot draws the marks that it was made with.
    const shape = JSON.stringify([axis, isLog, isOverlay, marks, lines.map(({ dash, isShown, isSmoothed }) => [dash, isShown, isSmoothed])]);
    if (this.plot && shape === this.shape) this.showData();
    else this.draw();
    this.shape = shape;
    // Drawn once: a button of it that has the keyboard keeps it.
    if (!this.entries) this.drawLegend();
    this.tellLegend();
    this.logButton.setAttribute("aria-pressed", String(this.board.isLog(this.definition.name)));
    this.tellNote();
    this.describe();
  }

  isInView() {
    const { top, bottom } = this.element.getBoundingClientRect();
    return bottom > 0 && top < innerHeight;
  }

  hiddenKey(one) {
    return `${this.group}/${one.key ?? one.label}`;
  }

  /** A stretch that was chosen stays, whatever comes. */
  showData() {
    this.plot.batch(() => {
      this.plot.setData(this.curves.columns);
      if (this.board.zoom) this.plot.setScale("x", this.board.zoom);
    });
    this.whole.hidden = !this.board.zoom;
  }

  showZoom() {
    if (this.plot) this.showData();
  }

  showWhole() {
    this.board.zoomTo(null);
    this.canvas.focus({ preventScroll: true });
  }

  draw() {
    this.plot?.destroy();
    this.plot = null;
    const width = this.canvas.clientWidth;
    if (!width || !this.curves) return;
    const cursor = {
      sync: { key: SYNC, setSeries: false, filters: { pub: (type) => type === "mousemove" || type === "mouseleave" } },
      points: { size: 7, show: true },
      // What is measured at few places only shows the last measurement.
      hover: { bias: -1, skip: [null] },
      drag: { x: true, y: false, setScale: false, dist: DRAG_PX },
      y: false,
      bind: { dblclick: () => null },
    };
    const hooks = { setCursor: [() => this.tellValues()], setSelect: [(plot) => this.zoomToSelection(plot)] };
    this.plot = new uPlot(plotOptions(this.curves, { width, height: this.height, cursor, hooks }), this.curves.columns, this.canvas);
    this.listen(this.plot.over);
    if (this.board.zoom) this.plot.setScale("x", this.board.zoom);
    this.whole.hidden = !this.board.zoom;
  }

  /** A click opens a step, a double click shows everything again; a finger drags as a mouse does. */
  listen(over) {
    /** @type {number | undefined} */
    let opening;
    over.addEventListener("click", () => {
      const place = this.plot.cursor.idx;
      clearTimeout(opening);
      opening = setTimeout(() => this.openAt(place), this.board.zoom ? DOUBLE_CLICK_MS : 0);
    });
    over.addEventListener("dblclick", () => {
      clearTimeout(opening);
      this.board.zoomTo(null);
    });
    /** @type {number | null} */
    let from = null;
    const select = (event, fire) => {
      if (from === null) return;
      const [left, right] = [from, event.offsetX].sort((a, b) => a - b);
      this.plot.setSelect({ left, width: right - left, top: 0, height: over.clientHeight }, fire);
    };
    const end = (fire) => (event) => {
      if (from !== null && !fire) this.plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
      select(event, fire);
      from = null;
    };
    over.addEventListener("pointerdown", (event) => (from = event.pointerType === "mouse" ? null : event.offsetX));
    over.addEventListener("pointermove", (event) => select(event, false));
    over.addEventListener("pointerup", end(true));
    over.addEventListener("pointercancel", end(false));
  }

  zoomToSelection(plot) {
    const { left, width } = plot.select;
    if (width >= DRAG_PX) this.board.zoomTo({ min: plot.posToVal(left, "x"), max: plot.posToVal(left + width, "x") });
    if (width) plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
  }

  fit() {
    const width = this.canvas.clientWidth;
    if (!width) return;
    if (!this.plot) this.draw();
    else if (this.plot.width !== width) this.plot.setSize({ width, height: this.height });
  }

  drawLegend() {
    fill(this.legend);
    this.entries = this.series.map((one) => {
      const swatch = h("svg", { class: "swatch-line", width: 22, height: 8, viewBox: "0 0 22 8", "aria-hidden": "true" }, h("line", { x1: 1, x2: 21, y1: 4, y2: 4 }));
      const label = [swatch, one.text ?? raw(one.label)];
      const toggle = this.series.length > 1 ? h("button", { type: "button", title: t("chart.toggle"), onclick: () => this.board.toggleHidden(this.hiddenKey(one)) }, ...label) : h("span", {}, ...label);
      const entry = { swatch, toggle, value: raw("", { class: "value" }), measured: raw("", { class: "measured" }), note: h("span", { class: "note" }) };
      this.legend.append(h("li", {}, toggle, entry.value, entry.measured, entry.note));
      return entry;
    });
    this.step = raw("", { class: "step" });
    append(this.legend, [h("li", { class: "at" }, this.step)]);
  }

  /** What may change in the legend while it stays: colours, dashes, what is hidden, and which lines lie on each other. */
  tellLegend() {
    this.curves.lines.forEach((line, place) => {
      const { swatch, toggle, note } = /** @type {any[]} */ (this.entries)[place];
      const stroke = swatch.firstElementChild;
      stroke.style.setProperty("stroke", colourOf(line.colour));
      stroke.setAttribute("stroke-dasharray", (line.dash ?? []).map((length) => length / 2.5).join(" "));
      if (toggle.tagName === "BUTTON") toggle.setAttribute("aria-pressed", String(line.isShown));
      const same = this.sameAs(line);
      if (note.textContent !== same) fill(note, same && raw(same, { lang: document.documentElement.lang }));
    });
    this.tellValues();
  }

  sameAs({ overlap }) {
    if (!overlap) return "";
    const leader = this.nameOf(this.series[overlap.leader]);
    return overlap.isEqual ? t("chart.same", { name: leader }) : t("chart.near", { name: leader, share: percent(overlap.share, 0) });
  }

  nameOf(one) {
    return one.name ?? one.label;
  }

  /** The legend has the values under the cursor, and else the last ones. */
  tellValues() {
    const { entries, curves } = this;
    if (!entries) return;
    const xs = curves.columns[0];
    const at = this.plot?.cursor.idx ?? xs.length - 1;
    this.step.textContent = xs.length ? this.placeWords(at) : "";
    entries.forEach((entry, line) => {
      const index = lastAt(curves.raw[line], at);
      const [value, drawn] = index < 0 ? [null, null] : [curves.raw[line][index], curves.drawn[line][index]];
      entry.value.textContent = this.format(drawn);
      entry.measured.textContent = [curves.lines[line].isSmoothed ? this.format(value) : "", this.sinceWords(line, index, at)].filter(Boolean).map((text) => `(${text})`).join(" ");
    });
  }

  /** Whose value is shown where none was measured: of a run that has ended, or of what is measured now and then. */
  sinceWords(line, index, at) {
    if (index < 0 || index === at) return "";
    const { axis, isOverlay, raw: columns } = this.curves;
    // Several runs on an axis of time have no places in common: there a value holds until the run's next one.
    const isBetween = isOverlay && axis !== "step" && lastAt(columns[line], Infinity) !== index;
    return isBetween ? "" : this.placeWords(index);
  }

  /** Where a place is, in words: its step, and the time on an axis of time. */
  placeWords(index) {
    const x = this.curves.columns[0][index];
    if (x === undefined) return "";
    const step = this.curves.rows?.[index]?.step ?? (this.curves.axis === "step" ? x : null);
    const time = { step: "", minutes: duration(x * 60), clock: moment(x, 1) }[this.curves.axis];
    return [step === null ? "" : t("chart.step", { step: number(step) }), time].filter(Boolean).join(" · ");
  }

  tellNote() {
    const { isLog, leftOut } = this.curves;
    const isAsked = this.board.isLog(this.definition.name);
    const scale = isLog && leftOut.count ? t("chart.log.left", { n: leftOut.count }) : isAsked && !isLog ? t("chart.log.none") : "";
    this.note.textContent = [this.remark(), scale].filter(Boolean).join(" ");
  }

  openAt(place) {
    if (place === null || place === undefined || !this.onStep) return;
    const row = this.curves.rows?.[place];
    if (row) this.onStep(row.step);
  }

  onKey(event) {
    const xs = this.curves?.columns[0] ?? [];
    const last = xs.length - 1;
    if (!this.plot || last < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const at = this.plot.cursor.idx ?? last;
    const stride = event.shiftKey ? Math.max(1, Math.round(last / 20)) : 1;
    const moves = { ArrowLeft: at - stride, ArrowRight: at + stride, Home: 0, End: last };
    const acts = { Enter: () => this.openAt(at), "+": () => this.magnify(xs[at], 0.5), "=": () => this.magnify(xs[at], 0.5), "-": () => this.magnify(xs[at], 2) };
    if (!(event.key in moves) && !(event.key in acts)) return;
    event.preventDefault();
    if (event.key in acts) {
      acts[event.key]();
      return;
    }
    const next = Math.min(last, Math.max(0, moves[event.key]));
    this.plot.setCursor({ left: this.plot.valToPos(xs[next], "x"), top: 10 });
    const values = this.series.map((one, line) => {
      const index = lastAt(this.curves.raw[line], next);
      const since = this.sinceWords(line, index, next);
      return `${this.nameOf(one)} ${this.format(index < 0 ? null : this.curves.raw[line][index])}${since && ` (${since})`}`;
    });
    this.live.textContent = `${this.placeWords(next)}: ${values.join(", ")}`;
  }

  /** Half or double the stretch that is shown, around a place. */
  magnify(around, factor) {
    const xs = this.curves.columns[0];
    const { min, max } = this.plot.scales.x;
    const [first, last] = [xs[0], xs.at(-1)];
    const width = (max - min) * factor;
    const low = Math.min(Math.max(first, around - width / 2), last - width);
    if (width > 0) this.board.zoomTo(width >= last - first ? null : { min: low, max: low + width });
  }

  describe() {
    this.canvas.setAttribute("aria-label", t(this.onStep ? "chart.label" : "chart.label.only", { title: this.title }));
    const sentences = this.series.map((one, place) => {
      const name = this.nameOf(one);
      const rows = this.runs[one.run ?? 0].filter((row) => isMeasured(measured(one.value(row))));
      const range = extremes(rows.map(one.value));
      if (!range) return t("chart.none", { name });
      const [low, high] = range;
      const [first, last] = [rows[0], rows[rows.length - 1]];
      const told = t("chart.summary", { name, first: this.format(one.value(first)), from: number(first.step), last: this.format(one.value(last)), to: number(last.step), low: this.format(low), high: this.format(high) });
      const same = this.sameAs(this.curves.lines[place]);
      return same ? `${told} ${t("chart.about", { name, what: same })}` : told;
    });
    this.summary.textContent = sentences.join(" ");
    if (this.table.open) this.fillTable();
  }

  fillTable() {
    if (!this.table.open) return;
    const head = h("tr", {}, h("th", { scope: "col", class: "number" }, t("metric.step")), this.series.map((one) => h("th", { scope: "col", class: "number" }, one.name ?? raw(one.label))));
    const body = this.tableRows().map(([step, values]) =>
      h(
        "tr",
        {},
        h("th", { scope: "row", class: "number", translate: "no" }, number(step)),
        values.map((value) => h("td", { class: "number", translate: "no" }, this.format(value))),
      ),
    );
    fill(this.tableBody, h("table", { class: "plain" }, h("thead", {}, head), h("tbody", {}, body)));
  }

  /** Steps that have values, of all runs; of many steps every nth, with those of what is measured at few. */
  tableRows() {
    const bySteps = this.runs.map((rows) => new Map(rows.map((row) => [row.step, row])));
    const steps = [...new Set(this.runs.flatMap((rows) => rows.map((row) => row.step)))].sort((a, b) => a - b);
    const valuesAt = (step) => this.series.map((one) => {
      const row = bySteps[one.run ?? 0].get(step);
      return row ? measured(one.value(row)) : undefined;
    });
    const rows = steps.map((step) => /** @type {[number, (number | undefined)[]]} */ ([step, valuesAt(step)])).filter(([, values]) => values.some(isMeasured));
    const stride = Math.ceil(rows.length / TABLE_ROWS) || 1;
    const sparse = this.series.map((_, place) => place).filter((place) => this.isFew(rows.map(([, values]) => values[place])));
    return rows.filter(([, values], index) => index % stride === 0 || index === rows.length - 1 || sparse.some((place) => isMeasured(values[place])));
  }

  isFew(values) {
    return isSparse(values) && values.filter(isMeasured).length <= TABLE_ROWS;
  }

  /** After a change of colours. */
  repaint() {
    if (!this.plot) return;
    this.draw();
    this.tellLegend();
  }

  destroy() {
    this.board.charts.delete(this);
    this.resize.disconnect();
    this.plot?.destroy();
  }
}
