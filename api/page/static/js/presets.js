// The step of the model: presets with what they need, any other model by name, and what is set of it.

import { fill, h, raw } from "./dom.js";
import { bytes, gpuMemory, roughly, t } from "./i18n.js";
import { advanced } from "./fields.js";
import { flatten, isSame } from "./spec.js";

/** @returns {import("./newjob.js").Step} */
export function presetStep(guide) {
  const { draft, fields, offers } = guide;
  const cards = h("div", { class: "presets" });
  const cost = h("div", { class: "cost", role: "status" });
  const model = fields.field("/model/name", { hint: false });
  const element = h(
    "div",
    {},
    h("fieldset", { class: "plain-set" }, h("legend", {}, t("model.presets")), cards),
    h("div", { class: "fields" }, model),
    h("p", { class: "hint" }, t("model.other.hint")),
    cost,
    advanced(t("new.advanced"), fields.all("/model", ["/model/name"]), fields.all("/resources"), fields.field("/engine"), fields.all("/lora"), fields.field("/from_checkpoint")),
  );

  function draw() {
    const chosen = chosenPreset(guide);
    fill(cards, offers.presets.map((preset) => card(preset, preset === chosen)));
  }

  function card(preset, isChosen) {
    const steps = preset.spec.training?.steps ?? draft.preset("/training/steps");
    const facts = [
      preset.gpu_gb === null ? t("model.cpu") : t("model.gpu", { gb: preset.gpu_gb }),
      preset.training_seconds === null ? t("model.seconds") : t("model.time", { time: roughly(preset.training_seconds), steps, gpu: preset.gpu }),
    ];
    return h(
      "label",
      { class: "preset" },
      h("input", { type: "radio", name: "preset", value: preset.name, checked: isChosen, onchange: () => choose(preset) }),
      h("span", {}, h("span", { class: "strong" }, raw(preset.model)), h("span", { class: "hint" }, t(`preset.${preset.name}`)), h("span", { class: "sub" }, facts.join(" · ")), h("span", { class: preset.has_worker ? "sub ready" : "sub waits" }, preset.has_worker ? t("model.worker") : t("model.no.worker"))),
    );
  }

  function choose(preset) {
    const before = chosenPreset(guide);
    const quiet = draft.onchange;
    draft.onchange = () => {};
    for (const [pointer, value] of flatten(before?.spec ?? {})) if (isSame(draft.at(pointer), value)) draft.remove(pointer);
    for (const [pointer, value] of flatten(preset.spec)) draft.give(pointer, value);
    if (!preset.spec.model?.name) draft.remove("/model/name");
    draft.onchange = quiet;
    ["model", "size", "review"].forEach(guide.redraw);
    guide.changed();
    /** @type {HTMLElement | null} */ (document.querySelector(`input[name=preset][value=${preset.name}]`))?.focus();
  }

  function update() {
    const chosen = chosenPreset(guide);
    /** @type {NodeListOf<HTMLInputElement>} */
    const inputs = cards.querySelectorAll("input");
    for (const input of inputs) input.checked = input.value === chosen?.name;
    fill(cost, costOf(guide.estimate));
  }

  draw();
  return { element, update, summary: () => raw(String(draft.value("/model/name")).split("/").at(-1)) };
}

/** The preset that a draft still follows: the one that says most of those whose every value stands. */
function chosenPreset({ draft, offers }) {
  const fits = offers.presets.filter(({ model, spec }) => model === draft.value("/model/name") && [...flatten(spec)].every(([pointer, value]) => isSame(draft.value(pointer), value)));
  return fits.sort((a, b) => flatten(b.spec).size - flatten(a.spec).size)[0] ?? null;
}

/** What the service estimates of a model: which cards it fits. */
export function costOf(estimate) {
  if (!estimate?.gpu_memory_bytes) return null;
  const { gpu_memory_bytes: room, weight_bytes: weights } = estimate;
  return h("p", { class: "hint" }, t("model.memory", { weights: bytes(weights["16bit"]), four: gpuMemory(room["4bit"]), sixteen: gpuMemory(room["16bit"]) }));
}
