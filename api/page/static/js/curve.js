// The numbers behind a curve: smoothing, horizontal axes, and which curves lie on each other.
//
// Owns no picture and no words. Invariant: pure functions of arrays, in which `undefined` is a place where nothing was
// measured, and `null` a value that cannot be drawn.

export const AXES = ["step", "minutes", "clock"];
const COINCIDES = 0.2;
const NEAR = 0.005;
const DASH = 6;

/**
 * The exponential moving average, `weight` being the share of what came before, from 0 to below 1. Divided by the sum of
 * its weights, as in Adam (Kingma and Ba 2015, section 3), so that the first values are not drawn towards zero.
 *
 * @param {(number | null | undefined)[]} values
 * @param {number} weight
 */
export function smooth(values, weight) {
  let average = 0;
  let rest = 1;
  return values.map((value) => {
    if (value === null || value === undefined) return value;
    average = weight * average + (1 - weight) * value;
    rest *= weight;
    return average / (1 - rest);
  });
}

/** A number as it is; anything else is no measurement. */
export function measured(value) {
  return Number.isFinite(value) ? value : undefined;
}

/**
 * Where each row of metrics stands on an axis, undefined where that is not known. Minutes count training only: the steps
 * between two logged ones are taken to be as long as the later one.
 *
 * @param {any[]} rows
 * @param {string} axis
 * @returns {(number | undefined)[]}
 */
export function axisValues(rows, axis) {
  if (axis === "clock") return rows.map((row) => measured(Date.parse(row.time) / 1000));
  if (axis !== "minutes") return rows.map((row) => row.step);
  let seconds = 0;
  let step = 0;
  return rows.map((row) => {
    const length = measured(row.seconds?.total);
    // A row without a duration is an evaluation of a step that was not logged.
    if (length === undefined) return seconds / 60;
    seconds += length * Math.max(1, row.step - step);
    step = row.step;
    return seconds / 60;
  });
}

/** The rows that have a place on the axis, in its order, with their places. */
export function lane(rows, axis) {
  const places = axisValues(rows, axis);
  const kept = rows.map((_, index) => index).filter((index) => places[index] !== undefined);
  if (axis === "clock") kept.sort((a, b) => Number(places[a]) - Number(places[b]));
  return { xs: kept.map((index) => Number(places[index])), rows: kept.map((index) => rows[index]) };
}

export function isMeasured(value) {
  return value !== null && value !== undefined;
}

/** Whether something is measured at few of the places only: an evaluation while training, for example. */
export function isSparse(values) {
  return values.length > 2 && 2 * values.filter(isMeasured).length < values.length;
}

/** The index of the last measurement at or before a place; -1 where there is none. */
export function lastAt(values, place) {
  let index = Math.min(place, values.length - 1);
  while (index >= 0 && !isMeasured(values[index])) index -= 1;
  return index;
}

/** Lowest and highest measurement, or null. */
export function extremes(values) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (!isMeasured(value)) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low <= high ? [low, high] : null;
}

/** For a logarithmic axis: what is not above zero has no place on it. */
export function positive(values) {
  return values.map((value) => (isMeasured(value) && value <= 0 ? null : value));
}

/** How many measurements a logarithmic axis leaves out, of how many. */
export function leftOut(columns) {
  const all = columns.flat().filter(isMeasured);
  return { count: all.filter((value) => value <= 0).length, of: all.length };
}

/**
 * For each curve the earlier one that it lies on: `{leader, share, isEqual}`, or null. Two lie on each other where they
 * differ by less than half a percent of the height of all, which is about the width of a line.
 *
 * @param {(number | null | undefined)[][]} columns
 * @returns {({leader: number, share: number, isEqual: boolean} | null)[]}
 */
export function coinciding(columns) {
  const heights = columns.map(extremes).filter((pair) => pair !== null);
  const height = heights.length ? Math.max(...heights.map(([, high]) => high)) - Math.min(...heights.map(([low]) => low)) : 0;
  /** @type {({leader: number, share: number, isEqual: boolean} | null)[]} */
  const found = [];
  columns.forEach((column, index) => {
    const nearest = columns
      .slice(0, index)
      .map((other, leader) => ({ leader, ...overlap(column, other, height * NEAR) }))
      .filter((one) => one.share >= COINCIDES)
      .sort((a, b) => b.share - a.share || a.leader - b.leader)[0];
    found.push(nearest ?? null);
  });
  return found;
}

/** In which share of the places where both are measured they lie on each other, and whether they are equal in all. */
function overlap(column, other, tolerance) {
  let both = 0;
  let near = 0;
  let equal = 0;
  for (let index = 0; index < column.length; index += 1) {
    const [a, b] = [column[index], other[index]];
    if (!isMeasured(a) || !isMeasured(b)) continue;
    both += 1;
    if (Math.abs(a - b) <= tolerance) near += 1;
    if (a === b) equal += 1;
  }
  return { share: both > 1 ? near / both : 0, isEqual: both > 1 && equal === both };
}

/**
 * Dashes for curves that lie on each other: of k curves the first is whole, and each later one is drawn above it with
 * longer gaps, so that every colour shows in each period.
 *
 * @param {({leader: number} | null)[]} overlaps
 * @returns {(number[] | undefined)[]}
 */
export function dashes(overlaps) {
  const first = overlaps.map((_, index) => index);
  overlaps.forEach((one, index) => {
    if (one) first[index] = first[one.leader];
  });
  return first.map((leader, index) => {
    const group = first.map((_, other) => other).filter((other) => first[other] === leader);
    const place = group.indexOf(index);
    return place ? [DASH * (group.length - place), DASH * place] : undefined;
  });
}

/**
 * At most first, lowest, highest and last of each pixel's values: the same picture with fewer points.
 *
 * @param {{x: number, y: number}[]} points
 */
export function thinned(points) {
  const kept = [];
  for (let start = 0; start < points.length; ) {
    const pixel = Math.floor(points[start].x);
    let end = start;
    let [low, high] = [start, start];
    while (end < points.length && Math.floor(points[end].x) === pixel) {
      if (points[end].y < points[low].y) low = end;
      if (points[end].y > points[high].y) high = end;
      end += 1;
    }
    const chosen = new Set([start, low, high, end - 1]);
    kept.push(...[...chosen].sort((a, b) => a - b).map((index) => points[index]));
    start = end;
  }
  return kept;
}
