// What a chart draws of the metrics of one or more runs: columns for uPlot, with what is known of each line.
//
// Owns neither picture nor choices. Invariant: `raw` has the values as they were measured, whatever is drawn of them.

import { coinciding, dashes, isSparse, lane, leftOut, measured, positive, smooth } from "./curve.js";

const COLOURS = 6;

/**
 * @param {{name: string, series: any[], band: {low: Function, high: Function} | null, format: Function, range: any, marks: (() => any[]) | null}} definition
 * @param {any[][]} runs rows of metrics, one list for each run
 * @param {import("./board.js").Board} board
 * @param {(series: any) => boolean} isShown
 */
export function linesOf(definition, runs, board, isShown) {
  const { series, band, format, range } = definition;
  const lanes = runs.map((rows) => lane(rows, board.axis));
  const isOverlay = runs.length > 1;
  const values = series.map((one) => lanes[one.run ?? 0].rows.map((row) => measured(one.value(row))));
  // Of a run's own rows: beside those of other runs each has few.
  const isFew = values.map(isSparse);
  const isSmoothed = isFew.map((few) => board.smoothing > 0 && !few);
  const { xs, columns: raw } = aligned(series, lanes, values);
  const smoothed = (column, place) => (isSmoothed[place] ? smooth(column, board.smoothing) : column);
  const drawn = raw.map(smoothed);
  const overlaps = overlapsOf(drawn.map((column, place) => (isShown(series[place]) ? column : [])), isOverlay);
  const dash = dashes(overlaps);
  const lines = series.map((one, place) => ({
    colour: one.colour ?? place,
    // More runs than colours: those of the second round are dashed.
    dash: dash[place] ?? (one.colour === undefined && place >= COLOURS ? [8, 4] : undefined),
    overlap: overlaps[place] ?? null,
    isShown: isShown(one),
    isSparse: isFew[place],
    isSmoothed: isSmoothed[place],
  }));
  const out = leftOut(raw.filter((_, place) => lines[place].isShown));
  const isLog = board.isLog(definition.name) && 2 * out.count <= out.of;
  const scaled = (column) => (isLog ? positive(column) : column);
  const edges = band && !isOverlay ? [band.high, band.low].map((edge) => smoothed(lanes[0].rows.map((row) => measured(edge(row))), 0)) : [];
  return {
    axis: board.axis,
    isOverlay,
    isLog,
    leftOut: out,
    format,
    range,
    lines,
    raw,
    drawn,
    hasBand: edges.length > 0,
    rows: isOverlay ? null : lanes[0].rows,
    marks: marksOf(definition.marks?.() ?? [], lanes[0]),
    columns: [xs, ...raw.map(scaled), ...drawn.map(scaled), ...edges.map(scaled)],
  };
}

/** Runs are told apart by their colours, and cross now and then: those that are equal throughout are of interest. */
function overlapsOf(columns, isOverlay) {
  const found = columns.length > 1 ? coinciding(columns) : [null];
  return found.map((one) => (isOverlay && !one?.isEqual ? null : one));
}

/** One list of places for all runs; where a run has no row of its own, nothing was measured. */
function aligned(series, lanes, values) {
  if (lanes.length === 1) return { xs: lanes[0].xs, columns: values };
  const places = lanes.map((_, run) => series.map((__, place) => place).filter((place) => (series[place].run ?? 0) === run));
  const [xs, ...joined] = uPlot.join(lanes.map(({ xs: own }, run) => [own, ...places[run].map((place) => values[place])]));
  const columns = [];
  places.flat().forEach((place, index) => (columns[place] = joined[index]));
  return { xs, columns };
}

/** Where steps that something happened at are on the axis. */
function marksOf(marks, { xs, rows }) {
  return marks.flatMap(({ step, kind }) => {
    const place = rows.findIndex((row) => row.step >= step);
    return place < 0 ? [] : [{ x: xs[place], kind }];
  });
}
