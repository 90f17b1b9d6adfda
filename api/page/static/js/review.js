// The last step: a name, what was chosen in each step, and the spec as the service reads it.

import { fill, h, raw } from "./dom.js";
import { roughly, t } from "./i18n.js";
import { advanced } from "./fields.js";

/** @returns {import("./newjob.js").Step} */
export function reviewStep(guide) {
  const { draft, fields } = guide;
  const list = h("dl", { class: "review" });
  const resolved = h("div", {});
  const mayWrite = guide.holder.scopes.includes("jobs:write");
  const trial = h("div", { class: "card" }, h("p", { class: "strong" }, t("review.try.title")), h("p", { class: "hint" }, t("review.try.hint")), h("p", { class: "actions" }, h("button", { type: "button", disabled: !mayWrite, onclick: guide.tryFirst }, t("review.try"))));
  const element = h("div", {}, h("div", { class: "fields" }, fields.field("/name")), list, trial, resolved, advanced(t("new.advanced"), fields.field("/metadata"), fields.field("/kind"), fields.all("/trial")));

  function update() {
    const { estimate } = guide;
    const five = ["correctness", "integer", "strict_format", "soft_format", "xml_count"].filter((name) => draft.value(`/rewards/weights/${name}`) !== 0);
    const rewards = [...(five.length ? [t("reward.five.short")] : []), ...draft.graderNames()];
    const time = estimate?.training_seconds ? t("review.time", { time: roughly(estimate.training_seconds), gpu: estimate.gpu }) : "";
    const rows = [
      ["model", raw(draft.value("/model/name"))],
      ["data", raw(guide.rows?.name ?? draft.value("/data/dataset"))],
      ["reward", draft.at("/rewards/formula") ? raw(draft.at("/rewards/formula"), { class: "code" }) : rewards.join(", ")],
      ["size", `${t("review.size", { steps: draft.value("/training/steps"), completions: draft.value("/sampling/prompts_per_step") * draft.value("/sampling/generations"), questions: draft.value("/evaluation/questions") })} ${time}`],
    ];
    fill(list, rows.map(([name, words]) => h("div", {}, h("dt", {}, t(`new.step.${name}`)), h("dd", {}, words), h("dd", { class: "change" }, h("button", { type: "button", class: "quiet", "aria-label": t("review.change.of", { step: t(`new.step.${name}`) }), onclick: () => guide.visit(name) }, t("review.change"))))));
    fill(resolved, guide.resolved ? h("details", { class: "card" }, h("summary", {}, t("new.resolved"), " ", h("span", { class: "hint" }, t("new.changed", { n: draft.changes() }))), h("pre", { class: "code", tabindex: "0", translate: "no" }, JSON.stringify(guide.resolved, null, 2))) : null);
  }

  return { element, update, summary: () => raw(draft.at("/name") ?? "") };
}
