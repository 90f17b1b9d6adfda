// A completion as it is read: its tags set apart, white space kept, and two of them compared word by word.

import { h } from "./dom.js";

const DIFF_MS = 1000;
const TAGS = /(<\/?(?:reasoning|answer|think|thinking)>)/g;

/** The text with its tags marked; everything goes in as text, whatever it holds. */
export function completionText(text) {
  const parts = text.split(TAGS).map((part) => {
    TAGS.lastIndex = 0;
    return /^<\/?(?:reasoning|answer|think|thinking)>$/.test(part) ? h("span", { class: `tag-mark ${part.includes("answer") ? "answer" : "reasoning"}` }, part) : part;
  });
  return h("div", { class: "completion", translate: "no" }, parts);
}

/** The words of both texts in order, those of one alone marked as taken away or put in. */
export function diffText(before, after) {
  // Languages without spaces between words have words all the same.
  const segmenter = Intl.Segmenter && /[\u3040-\u30ff\u3400-\u9fff]/.test(before + after) ? new Intl.Segmenter("zh", { granularity: "word" }) : undefined;
  const changes = Diff.diffWordsWithSpace(before, after, { timeout: DIFF_MS, ...(segmenter ? { intlSegmenter: segmenter } : {}) });
  // Long texts with little in common would hold the window for seconds: they are shown as they are.
  return changes ?? [{ value: before, removed: true }, { value: after, added: true }];
}

export function diffView(before, after) {
  const parts = diffText(before, after).map((part) => (part.added ? h("ins", {}, part.value) : part.removed ? h("del", {}, part.value) : part.value));
  return h("div", { class: "completion diff", translate: "no" }, parts);
}

/** Side by side: each text whole, with what only it has marked. */
export function diffColumns(before, after) {
  const changes = diffText(before, after);
  const column = (skipped, mark) => h("div", { class: "completion diff", translate: "no" }, changes.filter((part) => !part[skipped]).map((part) => (part.added || part.removed ? h(mark, {}, part.value) : part.value)));
  return [column("added", "del"), column("removed", "ins")];
}
