// How curves are drawn by uPlot: colours, axes, dashes, bands, points, marks and the ends of shorter runs.
//
// Takes what `lines.js` made of the metrics and gives uPlot's options; keeps nothing. Invariant: the columns are x, the
// measured values of each line, the drawn values of each line, then the band's upper and lower edge.

import { moment, number } from "./i18n.js";
import { isMeasured, lastAt } from "./curve.js";

const COLOURS = 6;
const POINT_PX = 40;
const SPARSE_PX = 14;
const LABEL_PX = 14;
const FONT = "11px system-ui, sans-serif";

/** A colour of the sheet, as it is at an element. */
export function token(name, look = document.documentElement) {
  return getComputedStyle(look).getPropertyValue(name).trim();
}

export function colourOf(place, look) {
  return token(`--series-${(place % COLOURS) + 1}`, look);
}

/** Canvas knows color-mix only in newer browsers; a colour with its own alpha is known to all. */
export function faint(colour, alpha) {
  return `${colour}${Math.round(alpha * 255).toString(16).padStart(2, "0")}`;
}

export const rawPlace = (line) => 1 + line;
export const drawnPlace = (curves, line) => 1 + curves.lines.length + line;

/**
 * uPlot's options. `look` is the element whose colours are taken; `ticks` is told the axes' labels, for pictures.
 *
 * @param {any} curves
 * @param {{width: number, height: number, look?: HTMLElement, cursor?: object, hooks?: Record<string, Function[]>, ticks?: any}} how
 */
export function plotOptions(curves, { width, height, look = document.documentElement, cursor = { show: false }, hooks = {}, ticks = {} }) {
  const axis = { stroke: token("--muted", look), grid: { stroke: token("--grid", look), width: 1 }, ticks: { show: false }, font: FONT };
  const told = (name, labels) => (ticks[name] = labels).map(({ text }) => text);
  const labelsOf = (places, write) => places.filter((at) => at !== null).map((at) => ({ at, text: write(at) }));
  const isTime = curves.axis === "clock";
  const writeX = (increment) => (isTime ? (at) => moment(at, increment) : (at) => (Number.isInteger(at) || curves.axis === "minutes" ? number(at) : ""));
  return {
    width,
    height,
    legend: { show: false },
    padding: [8, 10, 0, 0],
    cursor,
    scales: { x: { time: isTime }, y: curves.isLog ? { distr: 3, range: magnitudes } : { range: curves.range ?? padded } },
    axes: [
      { ...axis, size: 26, space: isTime ? 90 : 50, values: (_, places, __, ___, increment) => told("x", labelsOf(places, writeX(increment))) },
      {
        ...axis,
        size: (_, labels) => Math.max(40, 14 + 6.4 * Math.max(0, ...(labels ?? []).map((label) => label?.length ?? 0))),
        // A logarithmic axis has places without a label.
        values: (_, places) => (told("y", labelsOf(places, curves.format)), places.map((at) => (at === null ? "" : curves.format(at)))),
      },
    ],
    series: seriesOf(curves, look),
    bands: curves.hasBand ? [{ series: [2 * curves.lines.length + 1, 2 * curves.lines.length + 2], fill: faint(colourOf(curves.lines[0].colour, look), 0.14) }] : [],
    hooks: { ...hooks, drawAxes: [(plot) => drawMarks(plot, curves, look)], draw: [(plot) => drawEnds(plot, curves, look), ...(hooks.draw ?? [])] },
  };
}

function seriesOf(curves, look) {
  const raw = (line) => ({ stroke: faint(colourOf(line.colour, look), 0.28), width: 1, show: line.isShown && line.isSmoothed, points: { show: false } });
  const drawn = (line) => ({
    stroke: colourOf(line.colour, look),
    width: 1.75,
    dash: line.dash,
    show: line.isShown,
    // Few measurements are points joined by lines; many are a line.
    points: { show: (plot, place, first, last) => hasPoints(plot, place, first, last, line.isSparse), size: 6 },
  });
  const edge = { stroke: "transparent", width: 0, points: { show: false }, show: curves.lines[0]?.isShown };
  return [{}, ...curves.lines.map(raw), ...curves.lines.map(drawn), ...(curves.hasBand ? [edge, { ...edge }] : [])];
}

/** Whether there is room for a point at each measurement between two places: more so where most places have none. */
export function hasPoints(plot, place, first, last, isSparse) {
  const values = plot.data[place];
  const most = plot.bbox.width / devicePixelRatio / (isSparse ? SPARSE_PX : POINT_PX);
  let count = 0;
  for (let index = first; index <= last && count <= most; index += 1) if (isMeasured(values[index])) count += 1;
  return count <= most;
}

function padded(_, low, high) {
  if (low === null || high === null) return [0, 1];
  // Smoothing leaves a constant constant up to rounding, which is no range to look at.
  const room = high - low > Math.abs(high) * 1e-9 ? (high - low) * 0.08 : Math.abs(high) * 0.1 || 0.5;
  // A share or a length that touches zero should not show a negative axis.
  return [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
}

/** A range for shares: from 0, with room above the highest. */
export function shares(_, low, high) {
  return [0, Math.max(0.1, Math.min(1, (high ?? 0) * 1.15))];
}

function magnitudes(_, low, high) {
  return low === null || high === null ? [0.1, 1] : uPlot.rangeLog(low, high, 10, false);
}

export function markColour({ kind }, look) {
  return token({ warning: "--warning", best: "--good" }[kind] ?? "--muted", look);
}

function drawMarks(plot, curves, look) {
  const { ctx, bbox } = plot;
  ctx.save();
  for (const mark of curves.marks) {
    const x = Math.round(plot.valToPos(mark.x, "x", true)) + 0.5;
    if (x < bbox.left || x > bbox.left + bbox.width) continue;
    ctx.strokeStyle = faint(markColour(mark, look), 0.7);
    ctx.setLineDash([3, 4]);
    ctx.lineWidth = 1;
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
  }
  ctx.restore();
}

/**
 * Where each of several runs ends, in pixels of the plot; a run that ends before others has its last value as `text`.
 *
 * @returns {{x: number, y: number, text: string, textX: number, textY: number, colour: number}[]}
 */
export function endsOf(plot, curves) {
  if (!curves.isOverlay) return [];
  const { min, max } = plot.scales.x;
  const width = plot.bbox.width / devicePixelRatio;
  const xs = plot.data[0];
  const end = curves.lines.reduce((latest, line, place) => (line.isShown ? Math.max(latest, lastAt(plot.data[drawnPlace(curves, place)], xs.length - 1)) : latest), 0);
  const found = curves.lines.flatMap((line, place) => {
    const values = plot.data[drawnPlace(curves, place)];
    const last = lastAt(values, xs.length - 1);
    if (!line.isShown || last < 0 || xs[last] < min || xs[last] > max) return [];
    const [x, y] = [plot.valToPos(xs[last], "x"), plot.valToPos(values[last], "y")];
    const text = last < end ? curves.format(values[last]) : "";
    const isNearEdge = x + 9 + 7 * text.length > width;
    return [{ x, y, text, textX: isNearEdge ? x - 10 - 6.6 * text.length : x + 9, textY: y, colour: line.colour }];
  });
  const labelled = found.filter(({ text }) => text).sort((a, b) => a.textY - b.textY);
  labelled.forEach((one, index) => {
    const above = labelled.slice(0, index).filter((other) => Math.abs(other.textX - one.textX) < 60).at(-1);
    if (above) one.textY = Math.max(one.textY, above.textY + LABEL_PX);
  });
  return found;
}

function drawEnds(plot, curves, look) {
  const { ctx, bbox } = plot;
  const dpr = devicePixelRatio;
  ctx.save();
  ctx.font = `600 ${11 * dpr}px system-ui, sans-serif`;
  ctx.textAlign = "left";
  ctx.textBaseline = "middle";
  for (const end of endsOf(plot, curves)) {
    ctx.fillStyle = colourOf(end.colour, look);
    ctx.beginPath();
    ctx.arc(bbox.left + end.x * dpr, bbox.top + end.y * dpr, 3.5 * dpr, 0, 2 * Math.PI);
    ctx.fill();
    if (!end.text) continue;
    ctx.strokeStyle = token("--surface", look);
    ctx.lineWidth = 3 * dpr;
    ctx.strokeText(end.text, bbox.left + end.textX * dpr, bbox.top + end.textY * dpr);
    ctx.fillText(end.text, bbox.left + end.textX * dpr, bbox.top + end.textY * dpr);
  }
  ctx.restore();
}
