// The calls of OpenAI's package for JavaScript, another client than the Python one: `node openai_calls.mjs PACKAGE URL KEY`.
const [folder, url, key] = process.argv.slice(2);
const { default: OpenAI, toFile } = await import(`${folder}/node_modules/openai/index.mjs`);
const { VERSION } = await import(`${folder}/node_modules/openai/version.mjs`);

const exact = {
  type: "string_check",
  name: "exact",
  input: "{{sample.output_text}}",
  reference: "{{item.answer}}",
  operation: "eq",
};
const lines = Array.from({ length: 40 }, (_, n) =>
  JSON.stringify({ messages: [{ role: "user", content: `${n} + 1 =` }], answer: String(n + 1) }),
);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key });
const found = { version: VERSION };

const file = await client.files.create({ file: await toFile(Buffer.from(lines.join("\n")), "train.jsonl"), purpose: "fine-tune" });
found.file = [file.status, file.filename, file.purpose];
found.content = (await (await client.files.content(file.id)).text()) === lines.join("\n");

const asked = {
  model: "tiny-arithmetic",
  training_file: file.id,
  seed: 11,
  suffix: "node",
  metadata: { client: file.id },
  method: { type: "reinforcement", reinforcement: { grader: exact, hyperparameters: { batch_size: 4, n_epochs: 2 } } },
};
const jobs = client.fineTuning.jobs;
const job = await jobs.create(asked);
for (let n = 0; n < 3; n++) await jobs.create({ ...asked, seed: n });
found.job = [job.status, job.seed, job.method.reinforcement.hyperparameters.n_epochs];
found.listed = 0;
for await (const one of jobs.list({ limit: 1, metadata: { client: file.id } })) found.listed += one.id ? 1 : 0;
found.orders = [];
for (const order of ["pause", "resume", "cancel"]) found.orders.push((await jobs[order](job.id)).status);
found.events = [];
for await (const event of jobs.listEvents(job.id, { limit: 1 })) found.events.push(event.message);
found.checkpoints = (await jobs.checkpoints.list(job.id)).data;
const run = await client.fineTuning.alpha.graders.run({ grader: exact, model_sample: "12", item: { answer: "12" } });
found.reward = run.reward;
try {
  await jobs.create({ ...asked, seed: -1 });
} catch (error) {
  found.error = [error.constructor.name, error.status, error.param, Boolean(error.requestID)];
}
console.log(JSON.stringify(found));
