// One job as it happens: the record, every step's metrics, every event that is no metric. One stream; no polling, but
// of a queued job, whose place changes by what happens to others.
//
// What was comes whole first, the stream then goes on from the last event read; steps that come twice are one step.
// There is one stream at most, and none while the window is hidden or once the job is left.

import { Asking, Problem, get, query } from "./api.js";
import { throttle } from "./dom.js";

export const ENDED = new Set(["succeeded", "failed", "cancelled"]);
const TOLD = ["status", "checkpoint", "evaluation", "warning", "log", "error"];
const REDRAW_MS = 500;
const RETRY_MS = 3000;
const SAVED_MS = 4000;
const QUEUED_MS = 5000;

export class JobFeed {
  constructor(id) {
    this.id = id;
    this.job = null;
    this.metrics = [];
    this.events = [];
    this.after = 0;
    /** `live`, `broken`, `ended`; `gone` where the job was deleted. */
    this.state = "live";
    this.listeners = new Set();
    this.steps = new Map();
    this.source = null;
    this.closed = false;
    /** @type {number | undefined} */
    this.timer = undefined;
    /** @type {number | undefined} */
    this.retry = undefined;
    this.comingBack = new Asking();
    this.readingJob = new Asking();
    this.rereading = new Asking();
    this.tell = throttle(() => this.listeners.forEach((listen) => listen()), REDRAW_MS);
    this.refresh = throttle(() => this.readJob(), 1000);
    this.onVisibility = () => this.followWhenSeen();
  }

  /** Read what there is, then follow. Raises what the requests raise. */
  async open() {
    // The events first: the stream goes on behind them, so no metric may be older than they are.
    await this.readEvents();
    const [job, metrics] = await Promise.all([get(`/jobs/${this.id}`), get(`/jobs/${this.id}/metrics`)]);
    this.job = job;
    this.takeMetrics(metrics.data);
    if (ENDED.has(job.status)) {
      await this.readEvents(); // the last ones may have come meanwhile
      this.state = "ended";
    } else {
      this.follow();
      this.timer = setInterval(() => this.job.status === "queued" && !this.isOver() && !document.hidden && this.readJob(), QUEUED_MS);
      document.addEventListener("visibilitychange", this.onVisibility);
    }
  }

  /** A browser has six connections to a service for all its tabs: one that nobody looks at gives its own back. */
  followWhenSeen() {
    if (this.isOver()) return;
    if (document.hidden) this.unfollow();
    else if (!this.source || this.source.readyState === EventSource.CLOSED) this.comeBack();
  }

  async readEvents() {
    for (;;) {
      const page = await get(`/jobs/${this.id}/events${query({ after: this.after, limit: 1000, type: TOLD })}`);
      page.data.forEach((event) => this.takeEvent(event));
      if (page.data.length < 1000) return;
    }
  }

  isOver() {
    return this.closed || this.state === "ended" || this.state === "gone";
  }

  readJob() {
    if (this.closed) return;
    const refused = (error) => {
      if (isGone(error)) this.leave();
      // Else the stream says whether the service is there; behind the last event there is none any more.
      else if (this.state === "ended") this.retry = setTimeout(() => this.readJob(), RETRY_MS);
    };
    this.readingJob.ask(() => get(`/jobs/${this.id}`), { answered: (job) => ((this.job = job), this.tell()), refused });
  }

  /** The job was deleted: there is nothing more to ask. */
  leave() {
    this.unfollow();
    this.setState("gone");
  }

  takeMetrics(list) {
    for (const metric of list) this.steps.set(metric.step, metric);
    this.sortMetrics();
  }

  sortMetrics() {
    this.metrics = [...this.steps.values()].sort((a, b) => a.step - b.step);
  }

  takeMetric(event) {
    const metric = { ...event.data, step: event.step, epoch: event.epoch, time: event.time };
    const last = this.metrics.at(-1);
    this.steps.set(metric.step, metric);
    if (!last || metric.step > last.step) this.metrics.push(metric);
    else this.sortMetrics();
    if (this.job && event.step >= this.job.step) {
      this.job = { ...this.job, step: event.step, reward: metric.reward, progress: this.job.total_steps ? event.step / this.job.total_steps : 0 };
    }
  }

  takeEvent(event) {
    if (event.seq <= this.after) return;
    this.after = event.seq;
    this.events.push(event);
  }

  follow() {
    this.unfollow();
    if (this.closed || document.hidden) return; // being seen begins it
    const types = ["metric", ...TOLD];
    const source = new EventSource(`/jobs/${this.id}/events${query({ after: this.after, type: types })}`);
    this.source = source;
    source.onopen = () => this.setState("live");
    for (const type of types) {
      source.addEventListener(type, (message) => {
        if (message.data === undefined) return; // the browser's own `error`: the connection broke
        this.take(type, JSON.parse(message.data));
      });
    }
    // An event named `error` that the service sent has data; the browser's own has none.
    source.onerror = (/** @type {Event & {data?: string}} */ message) => {
      if (message.data !== undefined || this.source !== source) return;
      if (this.job && ENDED.has(this.job.status)) {
        this.unfollow();
        this.setState("ended");
        return;
      }
      this.setState("broken");
      // CONNECTING: the browser comes back by itself, with Last-Event-ID. CLOSED: it was refused, or all was read.
      if (source.readyState === EventSource.CLOSED) this.comeBackLater();
    };
  }

  unfollow() {
    clearTimeout(this.retry);
    this.comingBack.stop();
    this.source?.close();
    this.source = null;
  }

  comeBack() {
    this.unfollow();
    // A session that is over ends here, with the log-in.
    this.comingBack.ask(() => get(`/jobs/${this.id}`), {
      answered: (job) => ((this.job = job), this.follow(), this.tell()),
      refused: (error) => (isGone(error) ? this.leave() : this.comeBackLater()),
    });
  }

  comeBackLater() {
    clearTimeout(this.retry);
    this.retry = setTimeout(() => this.comeBack(), RETRY_MS);
  }

  take(type, event) {
    if (type === "metric") {
      if (event.seq > this.after) this.after = event.seq;
      this.takeMetric(event);
    } else {
      this.takeEvent(event);
      // It is safe once it is in storage, a moment after the run has written it.
      if (type === "checkpoint") setTimeout(() => this.readJob(), SAVED_MS);
      if (type === "log" && event.data.code === "resumed") this.reread();
      if (type === "status" && ENDED.has(event.data.status)) {
        this.unfollow();
        this.job = { ...this.job, status: event.data.status };
        this.state = "ended";
      }
      this.refresh();
    }
    this.tell();
  }

  /** After a resume steps may count again that were taken back: what the service says is right, and what came since. */
  reread() {
    const known = new Map(this.steps);
    const answered = ({ data }) => {
      const since = [...this.steps].filter(([step, metric]) => known.get(step) !== metric);
      this.steps = new Map([...data.map((metric) => [metric.step, metric]), ...since]);
      this.sortMetrics();
      this.tell();
    };
    this.rereading.ask(() => get(`/jobs/${this.id}/metrics`), { answered, refused: () => {} });
  }

  setState(state) {
    if (this.state === state) return;
    this.state = state;
    this.tell();
  }

  listen(call) {
    this.listeners.add(call);
    return () => this.listeners.delete(call);
  }

  close() {
    this.closed = true;
    this.unfollow();
    clearInterval(this.timer);
    [this.readingJob, this.rereading].forEach((asking) => asking.stop());
    document.removeEventListener("visibilitychange", this.onVisibility);
    this.listeners.clear();
  }

  /** Seconds until training ends at the pace of the last steps, or null. */
  eta() {
    const job = this.job;
    if (!job || job.status !== "running" || job.step >= job.total_steps) return null;
    const recent = this.metrics.slice(-20).map((metric) => metric.seconds?.total).filter((value) => value > 0);
    if (!recent.length) return null;
    return (recent.reduce((sum, value) => sum + value, 0) / recent.length) * Math.max(0, job.total_steps - job.step);
  }
}

function isGone(error) {
  return error instanceof Problem && error.status === 404;
}
