// A job's model while it is served: asks for it, follows it until it answers, and knows why it ended. Owns the serving
// job; what is said to the model is not its business. There is one request at a time.

import { Asking, Problem, get, post, query, request } from "./api.js";
import { ENDED } from "./feed.js";

const STARTING_MS = 1000;
const READY_MS = 10_000;
const AWAY_MS = 3000;
/** The most steps that one serving job loads. */
export const MOST_STEPS = 8;

/** The name of a model: the trained one, the base, or a step. */
export function modelName(job, which) {
  return which === "trained" ? job : `${job}:${which}`;
}

/** Whether a job has an adapter to serve. */
export function canTalk(job) {
  return (job.spec.kind ?? "training") === "training" && (job.status === "succeeded" || job.checkpoint_step > 0);
}

export class Serving {
  /**
   * @param {string} job
   * @param {() => void} tell
   */
  constructor(job, tell) {
    this.job = job;
    this.tell = tell;
    /** `unknown`, `off`, `starting`, `ready`, `ended`. */
    this.state = "unknown";
    /** The job that serves; null where another window started it. */
    /** @type {any} */
    this.record = null;
    /** Names of models that answer. */
    /** @type {Set<string>} */
    this.models = new Set();
    /** When it ends at the latest, in ISO 8601; null while it does not answer. */
    /** @type {string | null} */
    this.ends = null;
    /** Why the last request failed. */
    /** @type {unknown} */
    this.trouble = null;
    /** What the service says of the end. */
    /** @type {{reason: string, message: string} | null} */
    this.reason = null;
    this.asking = new Asking();
    /** @type {number | undefined} */
    this.timer = undefined;
  }

  /** Find out whether it is served now, by whoever started it. */
  look() {
    return this.ask(async () => {
      const session = await this.readModels();
      this.record = session ? await get(`/jobs/${session}`) : await this.unfinished();
    });
  }

  /** Ask for it, with these steps. */
  start(steps, ttl = 900) {
    this.reason = null;
    this.state = "starting";
    this.models = new Set();
    this.tell();
    return this.ask(async () => {
      this.record = await post("/serving", { job: this.job, steps, ttl_seconds: ttl });
    });
  }

  /** End it, then ask for it with other steps. */
  async restart(steps) {
    if (this.record && !ENDED.has(this.record.status)) await request(`/jobs/${this.record.id}/cancel`, { method: "POST" }).catch(() => null);
    return this.start(steps);
  }

  /** A request was refused, since nothing answers any more. */
  lost() {
    if (this.state === "ready") this.ask(() => this.read());
  }

  close() {
    clearTimeout(this.timer);
    this.asking.stop();
  }

  /** The serving job of this model that has not ended. */
  async unfinished() {
    const pages = await Promise.all(["queued", "running"].map((status) => get(`/jobs${query({ status, kind: "serving", limit: 100 })}`)));
    return pages.flatMap((page) => page.data).find((one) => one.spec.kind === "serving" && one.spec.serving?.job === this.job) ?? null;
  }

  /** What answers now, and the job that serves it. */
  async readModels() {
    const all = await get("/v1/models");
    const found = all.data.filter(({ id }) => id === this.job || id.startsWith(`${this.job}:`));
    this.models = new Set(found.map((one) => one.id));
    this.ends = found.length ? new Date(1000 * found[0].ends_at).toISOString() : null;
    return found[0]?.session ?? null;
  }

  async read() {
    if (this.record) this.record = await get(`/jobs/${this.record.id}`);
    await this.readModels();
    if (this.record && ENDED.has(this.record.status)) await this.readReason();
  }

  /** What the serving job said last: `{reason, message}`. */
  async readReason() {
    const page = await get(`/jobs/${this.record.id}/events${query({ type: ["log"], limit: 1000 })}`);
    this.reason = page.data.findLast((event) => event.data.code === "serving_ended")?.data ?? null;
  }

  ask(question) {
    clearTimeout(this.timer);
    return this.asking.ask(question, {
      answered: () => ((this.trouble = null), this.settle()),
      refused: (error) => this.refused(error),
    });
  }

  settle() {
    const isOver = this.record && ENDED.has(this.record.status);
    const was = this.state;
    if (this.models.size && !isOver) this.state = "ready";
    else if (this.record && !isOver) this.state = "starting";
    else this.state = isOver || was === "ready" || was === "ended" ? "ended" : "off";
    if (this.state === "starting" || this.state === "ready") this.again(this.state === "ready" ? READY_MS : STARTING_MS);
    this.tell();
  }

  /** A service that is away for a moment is asked again; what was refused stays so until something is done. */
  refused(error) {
    this.trouble = error;
    if (error instanceof Problem && error.status < 500) {
      if (!this.record) this.state = "off";
    } else this.again(AWAY_MS);
    this.tell();
  }

  again(ms) {
    this.timer = setTimeout(() => this.ask(() => (this.record || this.state === "ready" ? this.read() : this.readModels())), ms);
  }
}
