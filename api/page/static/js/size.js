// The step of the size: how long, how many completions, how many held-out questions, and what such a run costs and shows.

import { fill, h, raw, redraw } from "./dom.js";
import { compact, fixed, gpuMemory, number, percent, roughly, t } from "./i18n.js";
import { advanced } from "./fields.js";
import { problemCard, tile } from "./parts.js";

/** The sections of a spec that are set here. */
export const SECTIONS = ["training", "sampling", "optimizer", "loss", "evaluation", "guards", "audits"];
const SIZES = { look: 50, usual: 250, long: 1000 };
const MAIN = ["/training/steps", "/sampling/prompts_per_step", "/sampling/generations", "/sampling/max_completion_tokens", "/evaluation/questions", "/evaluation/max_completion_tokens"];
const ELSEWHERE = ["/sampling/response_format", "/evaluation/metric", "/evaluation/dataset"];

/** @returns {import("./newjob.js").Step} */
export function sizeStep(guide) {
  const { draft, fields } = guide;
  const facts = h("div", { role: "status" });
  const chips = h("div", { class: "chips", role: "group", "aria-label": t("size.presets") });
  const main = h("div", { class: "fields" }, MAIN.map((pointer) => fields.field(pointer)));
  const rest = [...MAIN, ...ELSEWHERE];
  const element = h("div", {}, chips, main, facts, advanced(t("new.advanced"), SECTIONS.map(group)));

  function group(section) {
    return h("fieldset", { class: "wide" }, h("legend", {}, t(`section.${section}`)), h("div", { class: "fields" }, fields.all(`/${section}`, rest)));
  }

  function choose(steps) {
    const { control } = fields.bound.get("/training/steps");
    control.value = steps;
    control.dispatchEvent(new Event("input"));
  }

  function update() {
    const steps = draft.value("/training/steps");
    redraw(chips, Object.entries(SIZES).map(([name, count]) => h("button", { type: "button", class: "chip", data: { focus: name }, "aria-pressed": String(steps === count), onclick: () => choose(count) }, t(`size.${name}`, { n: count }))));
    fill(facts, guide.estimate ? costs(guide.estimate) : guide.refusal ? refused(guide.refusal) : h("p", { class: "hint" }, t("size.later")));
  }

  /** Without a valid spec nothing can be estimated: what stands in the way. */
  function refused(error) {
    return [h("p", { class: "strong" }, t("size.refused")), problemCard(error)];
  }

  function costs(estimate) {
    const share = estimate.epoch_share;
    return [
      h(
        "dl",
        { class: "tiles sizes" },
        tile(t("size.time"), estimate.training_seconds === null ? "–" : roughly(estimate.training_seconds), estimate.training_seconds === null ? t("size.time.unknown") : t("size.time.note", { gpu: estimate.gpu })),
        tile(t("size.memory"), estimate.gpu_memory_bytes && draft.value("/resources/gpus") > 0 ? gpuMemory(estimate.gpu_memory_bytes["4bit"]) : "–", estimate.gpu_memory_bytes ? t("size.memory.note") : t("size.memory.unknown")),
        tile(t("size.completions"), compact(estimate.completions), t("size.completions.note", { questions: compact(estimate.prompts), tokens: compact(estimate.max_completion_tokens) })),
        tile(t("size.passes"), share === null ? "–" : number(share, 2), t("size.passes.note")),
      ),
      onGpus(estimate.gpus ?? []),
      shows(estimate),
    ];
  }

  /** Time and memory on each kind of GPU: those of connected workers, and common ones. */
  function onGpus(gpus) {
    if (!gpus.length) return null;
    const { currency, of } = guide.costs;
    const line = (one) =>
      h(
        "tr",
        {},
        h("th", { scope: "row" }, raw(one.gpu)),
        h("td", { class: "number" }, one.training_seconds === null ? "–" : roughly(one.training_seconds)),
        h("td", { class: "number" }, !one.fits ? t("size.gpus.no.room") : one.peak_memory_bytes === null ? "–" : gpuMemory(one.peak_memory_bytes)),
        currency ? h("td", { class: "number" }, of.has(one.gpu) ? fixed(of.get(one.gpu), 2) : "–") : null,
        h("td", {}, one.has_worker ? t("size.gpus.here") : ""),
      );
    return h(
      "div",
      { class: "scroll" },
      h(
        "table",
        { class: "plain", id: "size-gpus" },
        h("caption", {}, t("size.gpus")),
        h("thead", {}, h("tr", {}, ["size.gpus.gpu", "size.gpus.time", "size.gpus.memory", currency ? "usage.cost" : null, "size.gpus.worker"].map((key) => key && h("th", { scope: "col" }, t(key, { currency }))))),
        h("tbody", {}, gpus.map(line)),
      ),
    );
  }

  /** What a run of this size can and cannot tell. */
  function shows(estimate) {
    const found = estimate.detectable_difference;
    const sentences = [found === null ? t("size.shows.none") : t("size.shows", { points: number(100 * found, 2), questions: draft.value("/evaluation/questions") })];
    if (estimate.evaluation_share) sentences.push(t("size.shows.evaluations", { share: percent(estimate.evaluation_share) }));
    if (estimate.epoch_share > 20) sentences.push(t("size.shows.by.heart", { n: Math.round(estimate.epoch_share) }));
    if (draft.value("/training/steps") < 30) sentences.push(t("size.shows.short"));
    return h("div", { class: "card" }, h("p", { class: "strong" }, t("size.shows.title")), sentences.map((text) => h("p", { class: "hint" }, text)));
  }

  return { element, update, summary: () => raw(t("size.summary", { steps: draft.value("/training/steps"), n: draft.value("/sampling/prompts_per_step") * draft.value("/sampling/generations") }), { translate: null }) };
}
