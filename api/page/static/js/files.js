// The tab of files: checkpoints on the way, and what a finished job left, each with its size, hash and a link.

import { Asking, get } from "./api.js";
import { fill, h, raw } from "./dom.js";
import { bytes, number, t, time } from "./i18n.js";
import { busy, copyButton, empty, problemCard } from "./parts.js";

export function filesTab(feed) {
  const checkpoints = new Part(`/jobs/${feed.id}/checkpoints`, drawCheckpoints);
  const artifacts = new Part(`/jobs/${feed.id}/artifacts`, drawArtifacts);
  let mark = "";

  return {
    element: h("div", {}, h("h2", {}, t("files.checkpoints")), checkpoints.element, h("h2", {}, t("files.artifacts")), artifacts.element),
    update() {
      const now = `${feed.job.status} ${feed.events.filter((event) => event.type === "checkpoint").length}`;
      if (now === mark) return;
      mark = now;
      checkpoints.load();
      artifacts.load();
    },
  };
}

/** One of the lists, asked for anew whenever there may be more. */
class Part {
  constructor(path, draw) {
    this.path = path;
    this.draw = draw;
    this.element = h("div", {}, busy());
    this.asking = new Asking();
  }

  load() {
    this.asking.ask(() => get(this.path), { answered: ({ data }) => fill(this.element, this.draw(data)), refused: (error) => fill(this.element, problemCard(error, { again: () => this.load() })) });
  }
}

function drawCheckpoints(list) {
  if (!list.length) return empty(t("files.checkpoints.none"));
  return h("div", { class: "card flush checkpoints" }, [...list].reverse().map((checkpoint) => {
    const size = checkpoint.files.reduce((sum, file) => sum + file.size, 0);
    return h(
      "details",
      { class: "checkpoint" },
      h("summary", {}, h("span", { class: "strong" }, t("chart.step", { step: number(checkpoint.step) })), time(checkpoint.created_at), raw(bytes(size)), h("span", {}, t("files.epoch", { epoch: checkpoint.epoch }))),
      table(checkpoint.files, t("files.checkpoints")),
    );
  }));
}

function drawArtifacts(list) {
  if (!list.length) return empty(t("files.artifacts.none"));
  const total = list.reduce((sum, file) => sum + file.size, 0);
  return [h("p", { class: "hint" }, t("files.total", { n: list.length, size: bytes(total) })), h("div", { class: "card flush" }, table(list, t("files.artifacts")))];
}

function table(files, caption) {
  const head = h("tr", {}, h("th", { scope: "col" }, t("files.path")), h("th", { scope: "col", class: "number" }, t("files.size")), h("th", { scope: "col" }, t("files.sha256")), h("th", { scope: "col" }, h("span", { class: "sr-only" }, t("files.download"))));
  const rows = files.map((file) =>
    h(
      "tr",
      {},
      h("td", { class: "path" }, raw(file.path, { class: "code" })),
      h("td", { class: "number" }, raw(bytes(file.size))),
      h("td", { class: "hash" }, raw(`${file.sha256.slice(0, 12)}…`, { class: "code", title: file.sha256 }), copyButton(file.sha256, t("copy"))),
      h("td", {}, h("a", { href: file.url, download: file.path.split("/").at(-1), rel: "noopener", "aria-label": t("files.download.name", { name: file.path }) }, t("files.download"))),
    ),
  );
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, h("table", { class: "plain files" }, h("thead", {}, head), h("tbody", {}, rows)));
}
