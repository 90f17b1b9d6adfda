// The words of the page in the reader's language, and numbers and times as that language writes them.

import { h } from "./dom.js";

export const LANGUAGES = { en: "English", zh: "中文" };
const STORED = "grpo.language";

let words = {};
let fallback = {};
let formats = {};
let service = {};
/** What there is to draw of a job's metrics, as the service describes it: see `metrics.js`. */
export let charts = [];
export let language = "en";

/** Load the catalogue of the language that was chosen, or else of the first one the browser asks for that there is. */
export async function loadWords() {
  const asked = [localStorage.getItem(STORED), ...(navigator.languages ?? [])].filter((tag) => typeof tag === "string");
  language = asked.map((tag) => tag.toLowerCase().split("-")[0]).find((tag) => tag in LANGUAGES) ?? "en";
  const isOther = language !== "en";
  const [chosen, english, told, drawn] = await Promise.all([catalogue(language), isOther ? catalogue("en") : null, isOther ? catalogue(`${language}.service`) : {}, file("charts")]);
  service = told;
  charts = drawn;
  words = chosen;
  fallback = english ?? chosen;
  formats = {};
  document.documentElement.lang = language;
}

/** What a field is for: in the reader's language where that says what the schema says now, else as the schema has it. */
export function fieldWords(pointer, description) {
  const known = service.fields?.[pointer];
  return known && known.en === description ? { text: known.text, lang: language } : { text: description, lang: "en" };
}

/** A sentence of the service made again from the numbers it is made of; null where it speaks the reader's language. */
export function serviceWords(name, values) {
  const found = service.sentences?.[name];
  return found === undefined ? null : filled(found, values);
}

/** What the service advises, by its code, in the reader's language; null where it speaks that, or the code is not known. */
export function adviceWords(code) {
  return service.advice?.[code] ?? null;
}

const catalogue = (name) => file(`locale/${name}`);

async function file(name) {
  return (await fetch(`/page/${name}.json`)).json();
}

export function chooseLanguage(name) {
  localStorage.setItem(STORED, name);
}

/**
 * The words for a key, `{name}` replaced by values; `{n, plural}` forms are keys ending in `.one` and `.other`.
 *
 * @param {string} key
 * @param {Record<string, any>} [values]
 */
export function t(key, values = {}) {
  let found = words[key] ?? fallback[key];
  if (found === undefined && "n" in values) {
    const form = new Intl.PluralRules(language).select(values.n);
    found = words[`${key}.${form}`] ?? words[`${key}.other`] ?? fallback[`${key}.other`];
  }
  if (found === undefined) throw new Error(`no words for ${key}`);
  return filled(found, values);
}

function filled(text, values) {
  return text.replace(/\{(\w+)\}/g, (_, name) => (typeof values[name] === "number" ? number(values[name]) : values[name] ?? ""));
}

/** Whether there are words for a key: codes that the server may add to have none yet. */
export function has(key) {
  return key in words || key in fallback;
}

function format(options) {
  const key = JSON.stringify(options);
  formats[key] ??= new Intl.NumberFormat(language, options);
  return formats[key];
}

/** A number with so many digits that matter. */
export function number(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e7)) return value.toExponential(2);
  return format({ maximumSignificantDigits: Math.max(digits, Math.ceil(Math.log10(Math.abs(value) + 1))) }).format(value);
}

/** A large count in few characters, for sentences. */
export function compact(value) {
  return format({ notation: "compact", maximumSignificantDigits: 3 }).format(value);
}

/** A number with a fixed count of decimals, for columns. */
export function fixed(value, decimals = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  return format({ minimumFractionDigits: decimals, maximumFractionDigits: decimals }).format(value);
}

export function signed(value, decimals = 3) {
  if (value === null || value === undefined) return "–";
  return format({ minimumFractionDigits: decimals, maximumFractionDigits: decimals, signDisplay: "always" }).format(value);
}

export function percent(value, decimals = 1) {
  if (value === null || value === undefined) return "–";
  return format({ style: "percent", minimumFractionDigits: decimals, maximumFractionDigits: decimals }).format(value);
}

/** A difference of shares, in points. */
export function signedPoints(value) {
  return signed(100 * value, 1);
}

export function bytes(value) {
  const units = ["byte", "kilobyte", "megabyte", "gigabyte", "terabyte"];
  let place = 0;
  while (value >= 1000 && place < units.length - 1) {
    value /= 1000;
    place += 1;
  }
  if (place === 0) return `${format({}).format(value)} B`;
  return format({ style: "unit", unit: units[place], unitDisplay: "short", maximumSignificantDigits: 3 }).format(value);
}

/** A length of time in its two largest units. */
export function duration(seconds) {
  if (seconds === null || !Number.isFinite(seconds)) return "–";
  /** @type {[string, number][]} */
  const units = [["day", 86400], ["hour", 3600], ["minute", 60], ["second", 1]];
  let rest = Math.max(0, seconds < 10 ? Math.round(seconds * 10) / 10 : Math.round(seconds));
  const parts = [];
  for (const [unit, length] of units) {
    const count = unit === "second" ? rest : Math.floor(rest / length);
    if (count >= 1 || (unit === "second" && parts.length === 0)) {
      parts.push(format({ style: "unit", unit, unitDisplay: "narrow", maximumFractionDigits: 1 }).format(count));
    } else if (parts.length) break;
    rest -= count * length;
    if (parts.length === 2) break;
  }
  return parts.join(language === "zh" ? "" : " ");
}

/** The same for an estimate: no seconds once there are minutes. */
export function roughly(seconds) {
  return duration(seconds < 60 ? seconds : 60 * Math.round(seconds / 60));
}

/** Memory in the unit that GPUs are sold in. */
export function gpuMemory(size) {
  return `${format({}).format(Math.ceil(size / 2 ** 30))} GB`;
}

function ago(date) {
  const seconds = (date.getTime() - Date.now()) / 1000;
  const relative = new Intl.RelativeTimeFormat(language, { numeric: "auto", style: "short" });
  /** @type {[Intl.RelativeTimeFormatUnit, number][]} */
  const units = [["day", 86400], ["hour", 3600], ["minute", 60]];
  for (const [unit, length] of units) {
    if (Math.abs(seconds) >= length) return relative.format(Math.trunc(seconds / length), unit);
  }
  return relative.format(Math.trunc(seconds / 10) * 10, "second");
}

function absolute(date) {
  return new Intl.DateTimeFormat(language, { dateStyle: "medium", timeStyle: "long" }).format(date);
}

/** A moment: how long ago, with the whole of it as the title. */
export function time(iso, attributes = {}) {
  if (!iso) return "–";
  const date = new Date(iso);
  return h("time", { datetime: iso, title: absolute(date), translate: "no", ...attributes }, ago(date));
}

/** Bring every moment on the page up to date. */
export function refreshTimes() {
  /** @type {NodeListOf<HTMLTimeElement>} */
  const moments = document.querySelectorAll("time[datetime]:not([data-clock])");
  for (const element of moments) {
    element.textContent = ago(new Date(element.dateTime));
  }
}

/** A moment on an axis whose labels are so many seconds apart; with the date where they are hours apart. */
export function moment(seconds, apart) {
  /** @type {Intl.DateTimeFormatOptions} */
  const options = apart >= 86400 ? { month: "short", day: "numeric" } : apart >= 3600 ? { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" } : apart >= 60 ? { hour: "2-digit", minute: "2-digit" } : { hour: "2-digit", minute: "2-digit", second: "2-digit", ...(apart < 1 ? { fractionalSecondDigits: 2 } : {}) };
  return new Intl.DateTimeFormat(language, { ...options, hourCycle: "h23" }).format(new Date(1000 * seconds));
}

/** The time of day, with the date where it is not today. */
export function clock(iso) {
  const date = new Date(iso);
  const isToday = date.toDateString() === new Date().toDateString();
  const text = new Intl.DateTimeFormat(language, isToday ? { timeStyle: "medium" } : { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", second: "2-digit" }).format(date);
  return h("time", { datetime: iso, title: absolute(date), translate: "no", data: { clock: "1" } }, text);
}
