// A chart as a file: an SVG with title, legend and axes on a light background, or the same as a PNG.
//
// uPlot lays it out off screen, at one size whatever the window is, and the SVG is made of its places. Invariant: the
// picture shows what the chart shows: the same lines, stretch, axis and smoothing.

import { h } from "./dom.js";
import { fixed, t } from "./i18n.js";
import { isMeasured, thinned } from "./curve.js";
import { colourOf, drawnPlace, endsOf, hasPoints, markColour, plotOptions, rawPlace, token } from "./plot.js";

const WIDTH = 960;
const PLOT_HEIGHT = 420;
const MARGIN = 24;
const SCALE = 2;
const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'PingFang SC', 'Microsoft YaHei', 'Noto Sans CJK SC', sans-serif";

export async function saveSvg(chart) {
  download(new Blob([await svgText(chart)], { type: "image/svg+xml" }), `${fileName(chart)}.svg`);
}

export async function savePng(chart) {
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(await svgText(chart))}`;
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth * SCALE;
  canvas.height = image.naturalHeight * SCALE;
  /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d")).drawImage(image, 0, 0, canvas.width, canvas.height);
  canvas.toBlob((blob) => blob && download(blob, `${fileName(chart)}.png`), "image/png");
}

function fileName(chart) {
  const name = [chart.board.name, chart.title].filter(Boolean).join(" ");
  return name.replace(/[^\p{Letter}\p{Number}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 100);
}

function download(blob, name) {
  const address = URL.createObjectURL(blob);
  h("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

/** Laid out with the light colours, whatever the window has. */
async function svgText(chart) {
  const { curves, board } = chart;
  const look = h("div", { class: "light sr-only", "aria-hidden": "true" });
  document.body.append(look);
  const ticks = { x: [], y: [] };
  let plot;
  try {
    await new Promise((drawn) => {
      plot = new uPlot(plotOptions(curves, { width: WIDTH - 2 * MARGIN, height: PLOT_HEIGHT, look, ticks, hooks: { draw: [drawn] } }), curves.columns, look);
      if (board.zoom) plot.setScale("x", board.zoom);
    });
    return new XMLSerializer().serializeToString(drawing(chart, plot, ticks, look));
  } finally {
    plot?.destroy();
    look.remove();
  }
}

function drawing(chart, plot, ticks, look) {
  const { curves, board } = chart;
  const legend = legendOf(chart, look);
  const box = Object.fromEntries(Object.entries(plot.bbox).map(([side, length]) => [side, length / devicePixelRatio]));
  const top = 56 + legend.height;
  const height = top + PLOT_HEIGHT + 34;
  const left = MARGIN + box.left;
  const muted = token("--muted", look);
  const label = (attributes, text) => h("text", { fill: muted, "font-size": 12, ...attributes }, text);
  const within = (ends) => ends.filter(({ at }) => at >= -0.5);
  const xTicks = within(ticks.x.map(({ at, text }) => ({ at: plot.valToPos(at, "x"), text }))).filter(({ at }) => at <= box.width + 0.5);
  const yTicks = within(ticks.y.map(({ at, text }) => ({ at: plot.valToPos(at, "y"), text }))).filter(({ at }) => at <= box.height + 0.5);
  const grid = { stroke: token("--grid", look), "stroke-width": 1 };
  const settings = [curves.lines.some((line) => line.isShown && line.isSmoothed) ? t("chart.picture.smoothing", { weight: fixed(board.smoothing, 2) }) : "", curves.isLog ? t("chart.picture.log") : ""].filter(Boolean).join(" · ");
  return h(
    "svg",
    { width: WIDTH, height, viewBox: `0 0 ${WIDTH} ${height}`, "font-family": FONT },
    h("rect", { width: WIDTH, height, fill: token("--surface", look) }),
    h("text", { x: MARGIN, y: 36, "font-size": 19, "font-weight": 650, fill: token("--text", look) }, titleOf(chart)),
    legend.elements,
    xTicks.map(({ at, text }) => [h("line", { x1: left + at, x2: left + at, y1: top + box.top, y2: top + box.top + box.height, ...grid }), label({ x: left + at, y: top + box.top + box.height + 17, "text-anchor": "middle" }, text)]),
    yTicks.map(({ at, text }) => [h("line", { x1: left, x2: left + box.width, y1: top + box.top + at, y2: top + box.top + at, ...grid }), text && label({ x: left - 8, y: top + box.top + at + 4, "text-anchor": "end" }, text)]),
    h("svg", { x: left, y: top + box.top, width: box.width, height: box.height, overflow: "hidden" }, linesIn(curves, plot, box, look)),
    endsIn(curves, plot, left, top + box.top, look),
    label({ x: left + box.width / 2, y: height - 14, "text-anchor": "middle" }, t(`chart.axis.${curves.axis}`)),
    settings && label({ x: WIDTH - MARGIN, y: height - 14, "text-anchor": "end" }, settings),
  );
}

function titleOf({ title, board }) {
  const name = board.name.length > 60 ? `${board.name.slice(0, 60)}…` : board.name;
  return [title, name].filter(Boolean).join(" · ");
}

/** The lines that are shown with their names and last values, in as many rows as they need. */
function legendOf(chart, look) {
  const { curves, series, format } = chart;
  const pen = /** @type {CanvasRenderingContext2D} */ (document.createElement("canvas").getContext("2d"));
  pen.font = "13px system-ui, sans-serif";
  let [x, row] = [MARGIN, 0];
  const elements = curves.lines.flatMap((line, place) => {
    if (!line.isShown) return [];
    const values = curves.drawn[place].filter(isMeasured);
    const same = chart.sameAs(line);
    const text = `${chart.nameOf(series[place]).slice(0, 90)}  ${format(values.at(-1))}${same && `  (${same})`}`;
    const width = 34 + pen.measureText(text).width;
    if (x + width > WIDTH - MARGIN && x > MARGIN) [x, row] = [MARGIN, row + 1];
    const at = x;
    x += width + 20;
    const y = 60 + row * 20;
    const dash = line.dash ? { "stroke-dasharray": line.dash.map((length) => length / 2.5).join(" ") } : {};
    return [h("line", { x1: at, x2: at + 24, y1: y - 4, y2: y - 4, stroke: colourOf(line.colour, look), "stroke-width": 2.5, ...dash }), h("text", { x: at + 32, y, "font-size": 13, fill: token("--text", look) }, text)];
  });
  return { elements, height: (row + 1) * 20 };
}

function linesIn(curves, plot, box, look) {
  const pathOf = (place) => segments(plot, plot.data[place]).map(pathText).join("");
  const line = (place, attributes) => h("path", { d: pathOf(place), fill: "none", "stroke-linejoin": "round", ...attributes });
  const count = curves.lines.length;
  const band = curves.hasBand && curves.lines[0].isShown ? bandIn(plot, [2 * count + 1, 2 * count + 2], colourOf(curves.lines[0].colour, look)) : null;
  const shown = curves.lines.map((one, place) => ({ ...one, place })).filter((one) => one.isShown);
  return [
    band,
    curves.marks.map(({ x, kind }) => {
      const at = plot.valToPos(x, "x");
      return h("line", { x1: at, x2: at, y1: 0, y2: box.height, stroke: markColour({ kind }, look), "stroke-opacity": 0.7, "stroke-dasharray": "3 4" });
    }),
    shown.filter((one) => one.isSmoothed).map((one) => line(rawPlace(one.place), { stroke: colourOf(one.colour, look), "stroke-opacity": 0.28 })),
    shown.map((one) => line(drawnPlace(curves, one.place), { stroke: colourOf(one.colour, look), "stroke-width": 1.75, "stroke-dasharray": one.dash?.join(" ") })),
    shown.map((one) => dotsIn(plot, drawnPlace(curves, one.place), one.isSparse, colourOf(one.colour, look))),
  ];
}

/** Parts of a line between the places where nothing can be drawn, as points in pixels; only what is near the stretch. */
function segments(plot, values) {
  const xs = plot.data[0];
  const { min, max } = plot.scales.x;
  /** @type {{x: number, y: number}[][]} */
  const parts = [[]];
  for (let index = 0; index < xs.length; index += 1) {
    const value = values[index];
    if (value === null) parts.push([]);
    if (!isMeasured(value)) continue;
    const point = { x: plot.valToPos(xs[index], "x"), y: plot.valToPos(value, "y"), at: xs[index] };
    const part = parts[parts.length - 1];
    // Of those before the stretch the last one is enough.
    if (xs[index] < min && part.length) part.pop();
    part.push(point);
    if (xs[index] > max) break;
  }
  return parts.filter((part) => part.length).map(thinned);
}

function pathText(points) {
  return points.map(({ x, y }, index) => `${index ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
}

function bandIn(plot, [high, low], colour) {
  const [above, below] = [segments(plot, plot.data[high]).flat(), segments(plot, plot.data[low]).flat()];
  if (!above.length || !below.length) return null;
  return h("path", { d: `${pathText(above)}${pathText([...below].reverse()).replace("M", "L")}Z`, fill: colour, "fill-opacity": 0.14 });
}

function dotsIn(plot, place, isSparse, colour) {
  const [first, last] = plot.series[0].idxs;
  if (!hasPoints(plot, place, first, last, isSparse)) return [];
  return segments(plot, plot.data[place]).flat().map(({ x, y }) => h("circle", { cx: x.toFixed(1), cy: y.toFixed(1), r: 3, fill: colour }));
}

function endsIn(curves, plot, left, top, look) {
  return endsOf(plot, curves).map((end) => {
    const fill = colourOf(end.colour, look);
    return [
      h("circle", { cx: left + end.x, cy: top + end.y, r: 3.5, fill }),
      end.text && h("text", { x: left + end.textX, y: top + end.textY + 4, "font-size": 12, "font-weight": 600, fill, stroke: token("--surface", look), "stroke-width": 3, "paint-order": "stroke" }, end.text),
    ];
  });
}
