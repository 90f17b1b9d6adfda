// What the rows of a new file suggest: where the answer is, a reward that fits the answers, a system prompt in the rows'
// language. Owns the guess alone: everything it writes is in the draft, where the next steps show it.

import { isSame } from "./spec.js";

const CHINESE = /[\u3400-\u9fff]/;
const NUMBER = /^[^\d]{0,12}[+-]?[\d,]+(\.\d+)?(\/\d+)?[^\d]{0,12}$/;
const SOLUTION = /####\s*\S/;
const SOLUTION_PATTERN = "#### *(.+)";
const MOST_LABELS = 10;
const LONGEST_LABEL = 40;
const COMPLETION = "{{sample.output_text}}";

/** What a file may suggest. */
const PLACES = ["/rewards", "/data/system_prompt"];

/** Take back what an earlier file suggested, unless somebody changed it since. */
export function forgetSuggestions(guide) {
  for (const [pointer, value] of guide.suggested) if (isSame(guide.draft.at(pointer), value)) guide.draft.remove(pointer);
  guide.suggested = [];
}

/** Change what was not chosen yet. */
export function suggest(guide) {
  const { draft } = guide;
  const before = new Map(PLACES.map((pointer) => [pointer, draft.at(pointer)]));
  change(guide);
  const now = PLACES.map((pointer) => [pointer, structuredClone(draft.at(pointer))]);
  guide.suggested = now.filter(([pointer, value]) => value !== undefined && before.get(pointer) === undefined);
}

function change(guide) {
  const { draft, rows } = guide;
  const usable = rows.data.filter((row) => !row.problem);
  if (!usable.length) return;
  const answers = usable.map((row) => row.answer).filter(Boolean);
  if (answers.length && answers.every((answer) => SOLUTION.test(answer))) {
    if (draft.at("/data/answer_pattern") === undefined) draft.set("/data/answer_pattern", SOLUTION_PATTERN);
    prompt(guide, usable, null);
    return;
  }
  const kind = draft.at("/rewards") === undefined ? kindOf(answers) : null;
  if (kind) reward(draft, kind);
  prompt(guide, usable, kind);
}

/** `labels`, `names` (short texts) or `texts`; null for numbers and where there are no answers. */
function kindOf(answers) {
  if (!answers.length || answers.every((answer) => NUMBER.test(answer))) return null;
  const found = labelsOf(answers);
  if (found) return { name: "labels", labels: found };
  return { name: answers.every((answer) => answer.length <= LONGEST_LABEL) ? "names" : "texts" };
}

/** The few short texts that all answers are; null for any other. */
function labelsOf(answers) {
  const found = [...new Set(answers)];
  const isFew = found.length > 1 && found.length <= MOST_LABELS && found.length < answers.length;
  return isFew && found.every((label) => label.length <= LONGEST_LABEL) ? found.sort() : null;
}

function reward(draft, { name }) {
  const reference = columnTemplate(draft.value("/data/answer_column"));
  if (name === "labels") draft.set("/rewards/graders", { exact: { type: "string_check", input: COMPLETION, reference, operation: "eq" } });
  if (name === "names") draft.set("/rewards/weights/integer", 0);
  if (name === "texts") draft.set("/rewards/graders", { similar: { type: "text_similarity", input: COMPLETION, reference, evaluation_metric: "rouge_l" } });
}

function prompt({ draft, offers }, usable, kind) {
  if (draft.at("/data/system_prompt") !== undefined || draft.at("/data/format") === "messages") return;
  const isChinese = usable.some((row) => CHINESE.test(row.messages.at(-1).content));
  if (kind?.name === "labels") draft.set("/data/system_prompt", offers.label_prompts[isChinese ? "zh" : "en"].replace("{labels}", () => kind.labels.join(isChinese ? "、" : ", ")));
  else if (kind?.name === "texts") draft.set("/data/system_prompt", "");
  else if (!isChinese) draft.set("/data/system_prompt", offers.prompts.en);
}

/** The template of a column, however it is called. */
export function columnTemplate(name) {
  return /^[A-Za-z_][A-Za-z0-9_-]*$/.test(name) ? `{{item.${name}}}` : `{{item['${name}']}}`;
}
