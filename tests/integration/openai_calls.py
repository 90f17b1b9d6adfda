"""Every call of OpenAI's package that the service answers, with the version that is on the path; prints what it read.

Run as a process: `python openai_calls.py URL KEY sync|async`. Written with what all tested majors of the package have.
"""

from __future__ import annotations

import asyncio
import inspect
import io
import json
import sys
from typing import Any

import openai

MODEL = "tiny-arithmetic"
EXACT = {
    "type": "string_check",
    "name": "exact",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "operation": "eq",
}
SIMILAR = {**EXACT, "name": "similar", "operation": "ilike"}
MULTI: Any = {
    "type": "multi",
    "name": "both",
    "graders": {"exact": EXACT, "similar": SIMILAR},
    "calculate_output": "0.5 * exact + 0.5 * similar",
}
HYPERPARAMETERS: Any = {
    "batch_size": 4,
    "compute_multiplier": 2,
    "eval_interval": 5,
    "eval_samples": 2,
    "learning_rate_multiplier": 1.5,
    "n_epochs": 2,
    "reasoning_effort": "medium",
}


def rows(first: int, count: int) -> bytes:
    each = [
        {"messages": [{"role": "user", "content": f"{n} + 1 ="}], "answer": str(n + 1)}
        for n in range(first, first + count)
    ]
    return "".join(json.dumps(one) + "\n" for one in each).encode()


async def settled(value: Any) -> Any:
    """What a call returns, of either client."""
    return await value if inspect.isawaitable(value) else value


async def everything(pages: Any) -> list[Any]:
    """All items of a list, page after page, by the client's own paging."""
    if hasattr(pages, "__aiter__"):
        return [item async for item in pages]
    return list(pages)


async def calls(client: Any) -> dict[str, Any]:
    """Call everything once; returns what was read."""
    found: dict[str, Any] = {"version": openai.__version__}
    train = rows(0, 200)
    files = [
        await settled(client.files.create(file=(name, io.BytesIO(body)), purpose="fine-tune"))
        for name, body in (("train.jsonl", train), ("valid.jsonl", rows(500, 20)), ("spare.jsonl", rows(900, 5)))
    ]
    waited = await settled(client.files.wait_for_processing(files[0].id))
    found["file"] = [waited.status, waited.filename, waited.purpose, waited.bytes == len(train)]
    listed = await everything(client.files.list(limit=2, purpose="fine-tune"))
    found["files"] = {one.id for one in files} <= {one.id for one in listed}
    content = await settled(client.files.content(files[0].id))
    found["content"] = content.read() == train
    deleted = await settled(client.files.delete(files[2].id))
    found["deleted"] = [deleted.deleted, deleted.id == files[2].id]

    jobs = client.fine_tuning.jobs
    asked: Any = {
        "model": MODEL,
        "training_file": files[0].id,
        "validation_file": files[1].id,
        "suffix": "sums",
        "seed": 11,
        "metadata": {"run": files[0].id},
        "integrations": [{"type": "wandb", "wandb": {"project": "p", "tags": ["x"]}}],
        "method": {
            "type": "reinforcement",
            "reinforcement": {"grader": MULTI, "hyperparameters": HYPERPARAMETERS},
        },
        "extra_body": {"grpo": {"lora": {"rank": 16}}},
    }
    job = await settled(jobs.create(**asked))
    found["job"] = [job.object, job.status, job.model, job.seed, job.validation_file == files[1].id]
    given = job.method.to_dict()["reinforcement"]
    found["grader"] = given["grader"] == MULTI
    found["hyperparameters"] = given["hyperparameters"]
    found["warnings"] = sorted(one["code"] for one in job.to_dict()["warnings"])
    others = [await settled(jobs.create(**{**asked, "seed": n})) for n in range(3)]
    read = await settled(jobs.retrieve(job.id))
    found["retrieved"] = [read.id == job.id, read.to_dict()["grpo"], read.integrations[0].type]
    mine = await everything(jobs.list(limit=2, extra_query={"metadata[run]": files[0].id}))
    found["listed"] = [one.id for one in mine] == [one.id for one in reversed([job, *others])]
    found["orders"] = [(await settled(getattr(jobs, order)(job.id))).status for order in ("pause", "resume", "cancel")]
    events = await everything(jobs.list_events(job.id, limit=2))
    found["events"] = [[one.level, one.type] for one in events]
    found["checkpoints"] = await everything(jobs.checkpoints.list(job.id))

    graders = client.fine_tuning.alpha.graders
    run = await settled(graders.run(grader=MULTI, model_sample="12", item={"answer": "12"}))
    found["run"] = [run.reward, run.sub_rewards, run.metadata.errors.python_grader_runtime_error]
    checked = await settled(graders.validate(grader=EXACT))
    found["validated"] = checked.grader.to_dict() == EXACT
    listed_members = {**MULTI, "graders": [EXACT, SIMILAR]}
    typed = await settled(graders.run(grader=listed_members, model_sample="12", item={"answer": "12"}))
    found["typed"] = typed.sub_rewards

    found["errors"] = [
        await refused(jobs.retrieve, "job-none"),
        await refused(jobs.cancel, job.id),
        await refused(jobs.create, **{**asked, "method": {"type": "supervised"}}),
        await refused(jobs.create, **{**asked, "seed": -1}),
        await refused(jobs.create, **{**asked, "extra_body": {"grpo": {"sampling": {"prompts_per_step": 8}}}}),
        await refused(client.files.retrieve, "file-none"),
        await refused(client.files.create, file=("x.jsonl", io.BytesIO(b"nope")), purpose="fine-tune"),
        await refused(graders.validate, grader={**EXACT, "operation": "neq"}),
    ]
    return found


async def refused(call: Any, *arguments: Any, **named: Any) -> list[Any]:
    """The error of a call as the package raises it."""
    try:
        await settled(call(*arguments, **named))
    except openai.APIStatusError as error:
        return [type(error).__name__, error.status_code, error.code, error.param, error.type, bool(error.request_id)]
    return ["accepted"]


async def main(url: str, key: str, which: str) -> None:
    client = {"sync": openai.OpenAI, "async": openai.AsyncOpenAI}[which](base_url=f"{url}/v1", api_key=key)
    sys.stdout.write(json.dumps(await calls(client)))
    await settled(client.close())


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
