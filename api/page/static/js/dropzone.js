// A place to drop a file with rows, or to choose one.

import { h } from "./dom.js";
import { t } from "./i18n.js";

/** The type of a file by its suffix. */
export const TYPES = { csv: "text/csv", tsv: "text/tab-separated-values", parquet: "application/vnd.apache.parquet", json: "application/json", jsonl: "application/x-ndjson", ndjson: "application/x-ndjson" };

/**
 * @param {string} id
 * @param {(file: File) => void} take
 */
export function dropZone(id, take) {
  const given = (files) => files?.[0] && take(files[0]);
  const picker = h("input", { type: "file", id, accept: Object.keys(TYPES).map((name) => `.${name}`).join(","), onchange: () => (given(picker.files), (picker.value = "")) });
  const zone = h("div", { class: "drop" }, h("label", { for: id, class: "strong" }, t("data.drop")), picker, h("p", { class: "hint" }, t("data.drop.hint")));
  const over = (isOver) => (event) => {
    event.preventDefault();
    zone.classList.toggle("over", isOver);
  };
  zone.addEventListener("dragover", over(true));
  zone.addEventListener("dragleave", over(false));
  zone.addEventListener("drop", (event) => {
    over(false)(event);
    given(event.dataTransfer?.files);
  });
  return zone;
}
