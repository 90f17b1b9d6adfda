// Starts the page: words, session, the frame around every view, and which view an address after `#` names.

import { logOut, who, whenLoggedOut, Problem } from "./api.js";
import { fill, h, raw } from "./dom.js";
import { LANGUAGES, chooseLanguage, language, loadWords, refreshTimes, t } from "./i18n.js";
import { busy, closeDialogs, nowhere, problemCard, toast } from "./parts.js";
import { compareView } from "./compare.js";
import { datasetView, datasetsView } from "./data.js";
import { groupView } from "./group.js";
import { jobView } from "./job.js";
import { jobsView } from "./jobs.js";
import { logInView } from "./login.js";
import { keysView } from "./keys.js";
import { newJobView } from "./newjob.js";
import { usageView } from "./usage.js";
import { workersView } from "./workers.js";
import { playgroundView } from "./playground.js";

const app = /** @type {HTMLElement} */ (document.getElementById("app"));
/** @type {{owner: string, scopes: string[]} | null} */
let holder = null;
/** @type {(Partial<import("./parts.js").View> & {view: Function}) | null} */
let current = null;
/** @type {HTMLElement} */
let main;

const TEAM = new Set(["/workers", "/usage", "/keys"]);

/** @type {[RegExp, (parameters: any, query: URLSearchParams, holder: any) => Promise<any>][]} */
const VIEWS = [
  [/^\/$/, jobsView],
  [/^\/jobs\/(?<id>job-[0-9A-Z]{26})(?:\/(?<tab>[a-z]+))?$/, jobView],
  [/^\/talk\/(?<id>job-[0-9A-Z]{26})$/, playgroundView],
  [/^\/compare$/, compareView],
  [/^\/groups\/(?<id>group-[0-9A-Z]{26})$/, groupView],
  [/^\/comparison$/, groupView],
  [/^\/new$/, newJobView],
  [/^\/datasets$/, datasetsView],
  [/^\/datasets\/(?<id>ds-[0-9A-Z]{26})$/, datasetView],
  [/^\/workers$/, workersView],
  [/^\/usage$/, usageView],
  [/^\/keys$/, keysView],
];

/** What the address after `#` says: a path and its query. */
function place() {
  const [path, search = ""] = (location.hash.slice(1) || "/").split("?");
  return { path: path || "/", query: new URLSearchParams(search) };
}

/** The view that a path names, and the parts of the path that it takes. */
function viewOf(path) {
  for (const [pattern, view] of VIEWS) {
    const found = pattern.exec(path);
    if (found) return { view, parameters: { ...found.groups } };
  }
  return { view: null, parameters: {} };
}

async function show() {
  if (!holder) return;
  closeDialogs();
  const { path, query } = place();
  const { view, parameters } = viewOf(path);
  // A view that can go there itself keeps what it has: the tabs of a job, the filters of a list.
  if (current && view === current.view && current.go?.(parameters, query)) return;
  current?.close?.();
  current = null;
  if (!view) {
    fill(main, nowhere());
    return;
  }
  fill(main, busy());
  /** @type {Partial<import("./parts.js").View> & {view: Function}} */
  const opened = { view };
  current = opened;
  try {
    const shown = await view(parameters, query, holder);
    if (current !== opened) {
      shown.close?.();
      return;
    }
    Object.assign(opened, shown);
    fill(main, shown.element);
  } catch (error) {
    if (current !== opened) return;
    console.error(error);
    fill(main, h("h1", { tabindex: "-1" }, error instanceof Problem && error.status === 404 ? t("nowhere.title") : t("problem.title")), problemCard(error, { again: restart }), h("p", {}, h("a", { href: "#/" }, t("nav.jobs"))));
  }
  title();
  markNavigation(path);
  window.scrollTo(0, 0);
  main.querySelector("h1")?.focus({ preventScroll: true });
}

function title() {
  const heading = main.querySelector("h1")?.textContent;
  document.title = heading ? `${heading} · GRPO jobs` : "GRPO jobs";
}

function markNavigation(path) {
  for (const link of app.querySelectorAll(".top nav a")) {
    const section = link.getAttribute("data-section");
    const isHere = link.getAttribute("href") === `#${path}` || (section === "team" && TEAM.has(path));
    if (isHere) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

function frame() {
  main = h("main", { id: "main", tabindex: "-1" });
  const skip = h("a", { class: "skip", href: "#/", onclick: (event) => (event.preventDefault(), main.focus()) }, t("nav.skip"));
  const navigation = h(
    "nav",
    { "aria-label": t("nav.label") },
    h("a", { href: "#/" }, t("nav.jobs")),
    h("a", { href: "#/new" }, t("nav.new")),
    h("a", { href: "#/datasets" }, t("nav.data")),
    h("a", { href: "#/compare" }, t("nav.compare")),
    h("a", { href: "#/workers", data: { section: "team" } }, t("nav.team")),
    h("a", { href: "/schema", target: "_blank", rel: "noopener", class: "wide" }, t("nav.api")),
  );
  const account = holder
    ? h("div", { class: "account" }, h("span", { class: "owner", title: holder.scopes.join(", ") }, raw(holder.owner)), h("button", { type: "button", class: "quiet", onclick: leave }, t("nav.leave")))
    : null;
  const header = h(
    "header",
    { class: "top" },
    h("a", { class: "brand", href: "#/", "aria-label": "GRPO jobs" }, h("img", { src: "/page/icon.svg", alt: "", width: 22, height: 22 }), raw("GRPO jobs")),
    holder && navigation,
    h("div", { class: "settings" }, languageSwitch(), themeSwitch(), account),
  );
  fill(app, skip, header, main);
}

function languageSwitch() {
  const options = Object.entries(LANGUAGES).map(([code, name]) => h("option", { value: code, selected: code === language, lang: code, translate: "no" }, name));
  return h("select", { class: "quiet", "aria-label": t("nav.language"), onchange: async (event) => (chooseLanguage(event.target.value), await loadWords(), restart()) }, options);
}

function themeSwitch() {
  const chosen = localStorage.getItem("grpo.theme") ?? "auto";
  const options = ["auto", "light", "dark"].map((name) => h("option", { value: name, selected: name === chosen }, t(`theme.${name}`)));
  return h("select", { class: "quiet", "aria-label": t("nav.theme"), onchange: (event) => chooseTheme(event.target.value) }, options);
}

function chooseTheme(name) {
  if (name === "auto") localStorage.removeItem("grpo.theme");
  else localStorage.setItem("grpo.theme", name);
  window.dispatchEvent(new Event("theme"));
  current?.repaint?.();
}

async function leave() {
  try {
    await logOut();
  } catch (error) {
    if (!(error instanceof Problem && error.status === 401)) return toast(t("nav.leave.failed"));
  }
  holder = null;
  return restart();
}

/** Begin anew with what is known of the session and the language; a form gets back what was typed into it. */
function restart() {
  closeDialogs();
  current?.keep?.();
  current?.close?.();
  current = null;
  frame();
  if (holder) {
    show();
    return;
  }
  fill(main, logInView((found) => ((holder = found), restart())));
  title();
  main.querySelector("input")?.focus();
}

/** Who is logged in; a service that does not answer says nothing of that. */
async function find() {
  try {
    holder = await who();
  } catch (error) {
    if (!(error instanceof Problem && error.status === 401)) {
      frame();
      fill(main, h("h1", { tabindex: "-1" }, t("problem.title")), problemCard(error, { again: find }));
      title();
      return;
    }
    holder = null;
  }
  restart();
}

/** Somebody else may have logged in in another window: what is shown is theirs from now on. */
async function follow() {
  const found = await who().catch(() => null);
  if (!found || !holder || found.owner === holder.owner) return;
  holder = found;
  restart();
}

async function start() {
  await loadWords();
  whenLoggedOut(() => {
    if (!holder) return;
    holder = null;
    restart();
  });
  await find();
  window.addEventListener("hashchange", show);
  document.addEventListener("visibilitychange", () => document.hidden || follow());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => current?.repaint?.());
  setInterval(refreshTimes, 10_000);
}

start();
