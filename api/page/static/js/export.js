// The dialog that exports a trained model: in which form, of which step; what it makes is a job.

import { get, post } from "./api.js";
import { fill, h } from "./dom.js";
import { number, t } from "./i18n.js";
import { problemCard, toast } from "./parts.js";

/** Of the weights, by form; the first one is what most want. */
const TYPES = { merged: ["auto", "bf16", "f16"], gguf: ["f16", "bf16", "q8_0"] };

export async function exportDialog(job) {
  const key = crypto.randomUUID?.() ?? String(Math.random());
  const trouble = h("div", { class: "notes" });
  const format = select("export-format", [["merged", t("export.merged")], ["gguf", t("export.gguf")]]);
  const type = select("export-type", []);
  const step = select("export-step", [["", t("export.step.main")]]);
  const start = h("button", { type: "submit", class: "primary" }, t("export.start"));
  const form = h(
    "form",
    {},
    h("h2", { id: "export-title" }, t("export.title")),
    h("p", {}, t("export.text")),
    field(t("export.format"), format),
    field(t("export.type"), type),
    field(t("export.step"), step),
    trouble,
    h("div", { class: "actions" }, h("button", { type: "button", onclick: () => dialog.close() }, t("confirm.no")), start),
  );
  const dialog = h("dialog", { class: "confirm", "aria-labelledby": "export-title" }, form);
  const allow = () => fill(type, options(TYPES[format.value].map((name) => [name, t(`export.type.${name}`)])));
  format.addEventListener("change", allow);
  form.addEventListener("submit", submit);
  dialog.addEventListener("close", () => dialog.remove());
  allow();
  document.body.append(dialog);
  dialog.showModal();
  await addSteps();

  /** Without the list of checkpoints there is still the main adapter. */
  async function addSteps() {
    try {
      const { data } = await get(`/jobs/${job.id}/checkpoints`);
      step.append(...data.map((checkpoint) => h("option", { value: String(checkpoint.step) }, t("chart.step", { step: number(checkpoint.step) }))));
    } catch (error) {
      fill(trouble, problemCard(error));
    }
  }

  async function submit(event) {
    event.preventDefault();
    start.disabled = true;
    const body = { job: job.id, format: format.value, type: type.value, ...(step.value ? { step: Number(step.value) } : {}) };
    try {
      // The same key for every try: an export whose answer was lost is not made twice.
      const made = await post("/exports", body, { headers: { "Idempotency-Key": `${key}-${format.value}-${type.value}-${step.value}` } });
      dialog.close();
      toast(t("done.export"));
      location.hash = `/jobs/${made.id}`;
    } catch (error) {
      fill(trouble, problemCard(error));
      start.disabled = false;
    }
  }
}

/** @returns {HTMLSelectElement} */
function select(id, choices) {
  const made = h("select", { id }, options(choices));
  return /** @type {HTMLSelectElement} */ (made);
}

function options(choices) {
  return choices.map(([value, text]) => h("option", { value }, text));
}

function field(text, control) {
  return h("p", { class: "field" }, h("label", { for: control.id }, text), control);
}
