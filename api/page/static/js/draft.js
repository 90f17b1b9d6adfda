// The spec of a new job while it is written: the one place that holds it. The guide and the JSON both read and change
// this, so neither loses what the other cannot show.

import { defaultsOf, flatten, isSame, keysOf } from "./spec.js";

const FIVE = ["correctness", "integer", "strict_format", "soft_format", "xml_count"];

export class Draft {
  /** @type {() => void} */
  onchange = () => {};

  /** `spec` holds only what was asked for. */
  constructor(schema, spec) {
    this.schema = schema;
    this.defaults = defaultsOf(schema, schema);
    this.spec = spec;
  }

  /** What was asked for at a pointer; undefined where nothing was. */
  at(pointer) {
    return at(this.spec, pointer);
  }

  /** What counts at a pointer: what was asked for, else the default. */
  value(pointer) {
    const asked = this.at(pointer);
    return asked === undefined ? this.preset(pointer) : asked;
  }

  /** The default of a pointer, which may depend on the rest of the spec. */
  preset(pointer) {
    const own = this.dependent(pointer);
    return own === undefined ? at(this.defaults, pointer) : own;
  }

  dependent(pointer) {
    const isChat = this.at("/data/format") === "messages";
    const isFile = !["hub", undefined].includes(this.at("/data/source"));
    if (pointer === "/data/question_column" && (isChat || isFile)) return isChat ? "messages" : "question";
    if (pointer === "/data/answer_column" && (isChat || isFile)) return "answer";
    if (pointer === "/data/system_prompt" && isChat) return "";
    const [section, weights, name] = keysOf(pointer);
    if (section === "rewards" && weights === "weights" && name !== undefined) {
      const isOwn = this.graderNames().length > 0 || Boolean(this.at("/rewards/formula"));
      return FIVE.includes(name) && !isOwn ? 1 : FIVE.includes(name) ? 0 : 1;
    }
    return undefined;
  }

  graderNames() {
    const graders = this.at("/rewards/graders");
    return isObject(graders) ? Object.keys(graders) : [];
  }

  /** Ask for a value, or for the default if that is what it is. */
  give(pointer, value) {
    if (isSame(value, this.preset(pointer))) this.remove(pointer);
    else this.set(pointer, value);
  }

  set(pointer, value) {
    put(this.spec, pointer, value);
    this.onchange();
  }

  /** Ask for nothing at a pointer, and drop the objects that are empty without it. */
  remove(pointer) {
    const keys = keysOf(pointer);
    const last = keys.pop();
    const way = [this.spec];
    for (const key of keys) {
      if (!isObject(way.at(-1)[key])) return;
      way.push(way.at(-1)[key]);
    }
    delete way.at(-1)[last];
    for (let place = way.length - 1; place > 0 && !Object.keys(way[place]).length; place -= 1) delete way[place - 1][keys[place - 1]];
    this.onchange();
  }

  /** Everything at once, as the JSON has it. */
  replace(spec) {
    this.spec = spec;
    this.onchange();
  }

  /** How many values differ from the default. */
  changes() {
    return [...flatten(this.spec)].filter(([pointer, value]) => !isEmpty(value) && !isSame(at(this.defaults, pointer), value)).length;
  }
}

/** What of a resolved spec is not the default. */
export function different(schema, spec) {
  const defaults = defaultsOf(schema, schema);
  const found = {};
  for (const [pointer, value] of flatten(spec)) if (!isSame(at(defaults, pointer), value)) put(found, pointer, value);
  return found;
}

/** JSON that is an object; raises `SyntaxError` with `refusal` for any other. */
export function readObject(text, refusal) {
  const value = JSON.parse(text);
  if (!isObject(value)) throw new SyntaxError(refusal);
  return value;
}

export function isObject(value) {
  return value !== null && typeof value === "object" && !Array.isArray(value);
}

function isEmpty(value) {
  return isObject(value) && !Object.keys(value).length;
}

export function at(value, pointer) {
  return keysOf(pointer).reduce((inner, key) => (inner === null || inner === undefined ? undefined : inner[key]), value);
}

function put(target, pointer, value) {
  const keys = keysOf(pointer);
  const last = keys.pop();
  let inner = target;
  for (const key of keys) {
    if (!isObject(inner[key])) inner[key] = {};
    inner = inner[key];
  }
  inner[last] = value;
}
