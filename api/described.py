"""The prose of the OpenAPI document by name: meanings that a field's type does not have, and an example of each value.

Owns what a name means wherever it stands, and its example; a field that says more itself keeps its own words
(`api.schemas`, the sections of the spec). Invariant: after `describe` every property and every parameter has a
description and, unless it is another schema, an example that is valid for it; a test walks the document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

Schema = dict[str, Any]

JOB: Final = "job-01ARZ3NDEKTSV4RRFFQ69G5FAV"
DATASET: Final = "ds-01JDZ5T1E4Q8Y7M2N3P4R5S6T7"
KEY: Final = "key-01JDZ5T1E4Q8Y7M2N3P4R5S6T7"
GROUP: Final = "group-01ARZ3NDEKTSV4RRFFQ69G5FAW"
TIME: Final = "2026-11-29T09:30:00.000Z"
SECONDS: Final = 1_795_944_600
_SHA256: Final = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"

MEANINGS: Final = {
    "object": "What kind of object this is",
    "data": "The entries of this page",
    "has_more": "Whether more entries follow this page",
    "id": "Its id",
    "owner": "The owner of the API key that made it",
    "name": "Its label; null without one",
    "metadata": "Pairs of text that you gave it",
    "status": "Its state",
    "spec": "The resolved job spec, every value explicit",
    "spec_sha256": "SHA-256 of the resolved spec: equal specs have equal ones",
    "sha256": "SHA-256 of the content, in hexadecimal",
    "size": "Bytes",
    "bytes": "Bytes",
    "rows": "Number of rows",
    "row": "Row of the data set, from 0",
    "step": "The last trained step",
    "total_steps": "Number of steps",
    "progress": "Share of the steps that are done",
    "epoch": "The run that did it: a job that is resumed has several",
    "created_at": "When it was made",
    "updated_at": "When it last changed",
    "started_at": "When its first run began; null before",
    "finished_at": "When it ended; null before",
    "expires_at": "When the link stops working",
    "error": "Why it failed; null if it has not",
    "links": "Addresses of what belongs to it",
    "files": "Its files, with links",
    "jobs": "The jobs",
    "warnings": "Settings that were accepted and are probably not meant",
    "code": "Stable name",
    "message": "The same in words",
    "detail": "What is wrong",
    "remedy": "What to do",
    "pointer": "RFC 6901 pointer to the field",
    "param": "The field",
    "type": "Which kind",
    "level": "How serious it is",
    "url": "The URL that is called",
    "events": "Names of the events",
    "used": "How much you have used",
    "prompts": "Number of prompts",
    "completions": "Number of completions",
    "description": "What it is for",
    "mean": "Mean",
    "least": "The smallest value",
    "most": "The largest value",
    "first_id": "Id of the first entry; null without one",
    "last_id": "Id of the last entry; null without one; send it as `after` for the next page",
    "model": "The model",
    "JobLinks.self": "The job itself",
    "JobLinks.events": "Its events",
    "JobLinks.metrics": "Its metrics",
    "JobLinks.rollouts": "Its completions",
    "JobLinks.checkpoints": "Its checkpoints",
    "JobLinks.artifacts": "Its files",
    "JobError.code": "Stable name of the failure",
    "JobError.message": "What happened",
    "Comparison.rows": "A row for each setting",
    "Group.rows": "A row for each setting",
    "GroupRow.jobs": "The jobs with this setting",
    "DatasetPreview.columns": "The columns",
    "DatasetPreview.data": "The first rows",
    "PreviewColumn.name": "Its name",
    "PreviewTurn.role": "Who says it",
    "PreviewTurn.content": "What is said",
    "Checkpoint.step": "The step that it was written after",
    "Event.v": "Version of the event's format",
    "Event.epoch": "The run that wrote it; 0: no run",
    "Event.type": "What happened: see `type` of the request",
    "Event.time": "When it happened",
    "Event.step": "The step that it belongs to; 0: none",
    "Event.data": "What happened, by type",
    "MetricList.data": "One object per step, with the metrics by name",
    "RolloutStep.step": "The step",
    "RolloutStep.reward_mean": "Mean total reward of its completions; null: none is known",
    "RolloutStep.reward_min": "The smallest total reward",
    "RolloutStep.reward_max": "The largest total reward",
    "Rollout.step": "The step that it was generated in",
    "Rollout.answer": "The reference answer that rewards compare with",
    "Rollout.completion": "What the model wrote",
    "Rollout.advantage": "How much better it is than its group, as trained on; null: it was skipped",
    "RowScores.data": "The scores, in the order of the rows",
    "GraderRun.metadata": "How it ran",
    "GraderRun.model_grader_token_usage_per_model": "Tokens of each judge by its name",
    "GraderRunMetadata.name": "The grader's name",
    "GraderRunMetadata.type": "The grader's type",
    "GraderRunMetadata.errors": "What went wrong, as flags",
    "formula_parse_error": "The formula of a `multi` could not be computed",
    "sample_parse_error": "The completion could not be read",
    "truncated_observation_error": "The completion was cut off",
    "unresponsive_reward_error": "The grader did not answer in time",
    "invalid_variable_error": "A template names what the row does not have",
    "other_error": "Another error",
    "python_grader_server_error": "The process of a `python` grader failed",
    "python_grader_server_error_type": "Which error that was; null: none",
    "python_grader_runtime_error": "The code of a `python` grader raised an error",
    "python_grader_runtime_error_details": "That error; null: none",
    "model_grader_server_error": "A judge's server failed",
    "model_grader_refusal_error": "A judge refused to answer",
    "model_grader_parse_error": "A judge's answer could not be read",
    "model_grader_server_error_details": "What the judge's server said; null: none",
    "UnavailableGrader.grader": "The grader's name",
    "Trial.prompts": "Number of questions",
    "Trial.completions": "Number of completions",
    "Trial.reward_mean": "Mean total reward",
    "Trial.completion_tokens_mean": "Mean length of the completions",
    "Trial.completion_tokens_max": "Length of the longest completion",
    "UsageReport.owner": "Whose usage it is",
    "UsageReport.gpu_hours": "GPU-hours of the window",
    "UsageReport.stored_bytes": "Bytes in storage",
    "UsageReport.unfinished_jobs": "Jobs that have not ended",
    "Webhook.disabled_at": "When it was disabled; null: it is enabled",
    "WebhookDelivery.attempts": "How often it was sent",
    "WebhookDelivery.last_attempt_at": "When it was last sent; null: not yet",
    "Health.status": "Always `ok`",
    "Readiness.status": "Whether jobs are accepted",
    "Reward.name": "Its name, as in `rewards.weights`",
    "Reward.mode": "Which of the two versions it is",
    "Reward.most": "The largest value that it gives",
    "ProblemDocument.type": "The problem's type: `urn:grpo:problem:` and the code",
    "ProblemDocument.title": "The type in words",
    "ProblemDocument.status": "The HTTP status",
    "ProblemDocument.instance": "The path of the request",
    "ProblemDocument.request_id": "Finds the request in the service's log",
    "ProblemDocument.errors": "Every wrong field; empty unless fields are at fault",
    "FieldProblem.code": "Stable name of the error",
    "OpenAIError.error": "What went wrong",
    "OpenAIErrorBody.type": "OpenAI's kind of the error",
    "OpenAICheckpoint.fine_tuning_job_id": "The job",
    "OpenAICheckpoint.metrics": "Metrics of the step by OpenAI's names",
    "OpenAICheckpoint.step_number": "The step",
    "OpenAIDeletedFile.deleted": "Whether it is gone",
    "OpenAIEvent.data": "The event's own fields",
    "OpenAIFile.filename": "Its name",
    "OpenAIFile.status_details": "Always null",
    "OpenAIFile.expires_at": "Always null: files stay",
    "OpenAIJob.hyperparameters": "Always empty, as for OpenAI's method `reinforcement`; see `method`",
    "OpenAIJob.trained_tokens": "Always null",
    "OpenAIJob.training_file": "The file that it trains on",
    "OpenAIJob.validation_file": "The file that evaluations use; null: rows of the training file",
    "OpenAIJob.seed": "Seed of its random generator",
    "OpenAIJob.estimated_finish": "Always null",
    "OpenAIJob.integrations": "Where it reports metrics",
    "OpenAIJob.method": "OpenAI's method `reinforcement` with its grader and hyperparameters",
    "OpenAIJob.user_provided_suffix": "The `suffix` of the request; null without one",
    "ServedModel.owned_by": "The owner of the session",
    "DryRun.spec": "The resolved spec, every value explicit",
    "Estimate.completions_per_step": "Completions in one step",
    "Estimate.micro_batch": "Completions in one forward and backward pass",
    "Estimate.prompts": "Questions asked in all, repeats included",
    "Estimate.completions": "Completions in all",
    "Estimate.max_completion_tokens_per_step": "Tokens of the completions of a step, at most",
    "Estimate.max_tokens_per_step": "Tokens of prompts and completions of a step, at most",
    "Estimate.max_completion_tokens": "Tokens of all completions, at most",
    "Estimate.max_tokens": "Tokens of all prompts and completions, at most",
    "Estimate.epoch_share": "How often the job goes through the data set; null where its rows are not known",
    "Estimate.checkpoints": "Checkpoints from which a lost run could resume",
    "Estimate.parameters": "Parameters of the model, guessed from its name; null: not known",
    "Estimate.weight_bytes": "The base model's weights alone, for each precision; null: not known",
    "Estimate.gpu_memory_bytes": "The smallest GPU, about, that trains this model in each precision; null: not known",
    "Estimate.gpu": "The GPU that time and peak memory are estimated for; null on a CPU",
    "Estimate.step_seconds": "One step, about, on that GPU; null: not known",
    "Estimate.training_seconds": "All steps, about, on that GPU, without loading and evaluation; null: not known",
    "Estimate.evaluations": "Evaluations during training, beside those before and after it; null: not known",
    "Estimate.evaluation_seconds": "All evaluations together, about, on that GPU; null: not known",
    "Estimate.evaluation_share": "The same as a share of `training_seconds`; null: not known",
    "Estimate.peak_memory_bytes": "Peak memory of each such GPU, about; null: not known",
    "Estimate.weight_parts": (
        "In how many parts such GPUs hold the weights (`model.sharding`): 1 if each holds all of them; null: not known"
    ),
    "Estimate.weight_bytes_per_gpu": "The weights on each such GPU, about; null: not known",
    "Estimate.gpus": "The same for GPUs of connected workers and some common ones, smallest first",
    "Estimate.detectable_difference": (
        "The smallest change in held-out accuracy that such a run finds in 8 of 10 cases; null without such questions"
    ),
    "GpuEstimate.gpu": "Its name",
    "GpuEstimate.has_worker": "Whether a connected worker has one",
    "GpuEstimate.fits": "Whether the model trains on it, and the job allows its size",
    "GpuEstimate.precision": "Precision of the weights there; null where it does not fit",
    "GpuEstimate.step_seconds": "One step there, about; null: not known",
    "GpuEstimate.training_seconds": "All steps there, about; null: not known",
    "GpuEstimate.peak_memory_bytes": "Peak memory there, about; null: not known",
    "GpuEstimate.weight_parts": (
        "In how many parts the job's GPUs hold the weights there: 1 if each holds all; null where it does not fit"
    ),
    "GpuEstimate.weight_bytes_per_gpu": "The weights on each of them, about; null where it does not fit",
    "EvaluationSection.stop_when": "Rules that end training early.",
    "RewardsSection.on_error": "What becomes of a completion that a grader failed to score.",
    "JobSpec.model": "The base model and its precision.",
    "JobSpec.lora": "The adapter.",
    "JobSpec.optimizer": "The optimizer and its schedule.",
    "JobSpec.training": "Steps, batches, checkpoints and logging.",
    "JobSpec.sampling": "How completions are generated.",
    "JobSpec.loss": "The loss.",
    "JobSpec.rewards": "How completions are scored.",
    "JobSpec.data": "The data set and how its rows become prompts.",
    "JobSpec.evaluation": "Questions that measure progress.",
    "JobSpec.guards": "Rules that end a run that goes wrong.",
    "JobSpec.audits": "Checks during training.",
    "JobSpec.resources": "GPUs and hosts.",
    "JobSpec.trial": "With kind `try`: what to try.",
    "JobSpec.serving": "With kind `serving`: what to serve.",
    "JobSpec.export": "With kind `export`: what to export.",
    "createFineTuningJob.suffix": "A label of the model",
    "createFineTuningJob.validation_file": "The id of a file for evaluations",
    "createFineTuningJob.seed": "Seed of the random generator",
    "createFineTuningJob.integrations": "Where to report metrics",
    "createFineTuningJob.method": "OpenAI's method; only `reinforcement` is known",
    "createFineTuningJob.type": "The method",
    "createFineTuningJob.reinforcement": "Grader, form of the answers and hyperparameters",
    "createFineTuningJob.response_format": "The form of the answers, as JSON Schema",
    "createFineTuningJob.hyperparameters": "OpenAI's hyperparameters",
    "createFineTuningJob.grpo": "Sections of a job spec that OpenAI has no field for",
    "createOpenAIFile.file": "The file",
    "createOpenAIFile.purpose": "What it is for",
    "scoreRows.rows": "Rows, each with a completion",
    "finish": "Only completions that ended this way",
    "mode": "Only rewards of this version",
    "status?": "Only those with this status",
}
"""By name, or by schema or operation and name. A parameter's name may end in a question mark."""

EXAMPLES: Final[dict[str, Any]] = {
    "id": JOB,
    "job": JOB,
    "job_id": JOB,
    "jobs": [JOB],
    "dataset_id": DATASET,
    "file_id": DATASET,
    "training_file": DATASET,
    "group": GROUP,
    "webhook_id": "webhook-01ARZ3NDEKTSV4RRFFQ69G5FAV",
    "cursor": JOB,
    "next_cursor": JOB,
    "first_id": JOB,
    "last_id": JOB,
    "after": JOB,
    "code": "no_such_dataset",
    "detail": "does not exist",
    "remedy": "Upload it first.",
    "hint": "Lower training.prompts_per_step.",
    "message": "Memory ran out in step 12.",
    "pointer": "/data/dataset",
    "parameter": "limit",
    "param": "method.reinforcement.grader",
    "path": "adapter/adapter_model.safetensors",
    "key": f"jobs/{JOB}/e1/adapter/adapter_model.safetensors",
    "url": "https://example.com/hooks",
    "sha256": _SHA256,
    "spec_sha256": _SHA256,
    "owner": "ann",
    "by": "ann",
    "owned_by": "ann",
    "organization_id": "ann",
    "name": "first try",
    "metadata": {"team": "maths"},
    "fields": ["optimizer.learning_rate"],
    "settings": {"optimizer.learning_rate": 1e-5},
    "cautions": ["The jobs answered different held-out questions."],
    "columns": ["question", "answer"],
    "chats": ["messages"],
    "gpu": "NVIDIA H200",
    "gpus": 1,
    "device": "1 x NVIDIA H200",
    "precision": "16bit",
    "weight_bytes": {"16bit": 15_200_000_000},
    "gpu_memory_bytes": {"16bit": 48_000_000_000},
    "data": {"reward": 1.25},
    "time": TIME,
    "type": "metric",
    "class": "oom",
    "kind": "sample_parse_error",
    "phase": "training",
    "stopped": "No better for 3 evaluations.",
    "self": f"/jobs/{JOB}",
    "events": f"/jobs/{JOB}/events",
    "metrics": f"/jobs/{JOB}/metrics",
    "rollouts": f"/jobs/{JOB}/rollouts",
    "checkpoints": f"/jobs/{JOB}/checkpoints",
    "artifacts": f"/jobs/{JOB}/artifacts",
    "sub_rewards": {"exact": 1.0},
    "scores": {"exact": 1.0},
    "model_grader_token_usage_per_model": {"judge": 120},
    "sampled_model_name": "judge",
    "messages": ["the completion is not JSON"],
    "printed": "checking 12",
    "python_grader_server_error_type": "killed",
    "python_grader_runtime_error_details": "ValueError: no number",
    "model_grader_server_error_details": "503",
    "requested_spec": {"name": "first try"},
    "fine_tuned_model_checkpoint": f"{JOB}:step-50",
    "fine_tuned_model": JOB,
    "fine_tuning_job_id": JOB,
    "filename": "questions.jsonl",
    "purpose": "fine-tune",
    "status_details": "",
    "hyperparameters": {"n_epochs": 2},
    "model": "Qwen/Qwen2.5-7B-Instruct",
    "result_files": [f"{JOB}-metrics"],
    "status": "running",
    "validation_file": DATASET,
    "integrations": [{"type": "wandb", "wandb": {"project": "maths"}}],
    "method": {"type": "reinforcement", "reinforcement": {}},
    "suffix": "maths",
    "user_provided_suffix": "maths",
    "grpo": {"training": {"steps": 100}},
    "values": {"question": "6+6=?", "answer": "12"},
    "question": "6+6=?",
    "prompt": "6+6=?",
    "answer": "12",
    "completion": "<reasoning>\n6+6\n</reasoning>\n<answer>\n12\n</answer>\n",
    "role": "user",
    "content": "6+6=?",
    "title": "Not found",
    "instance": f"/jobs/{JOB}",
    "request_id": "req-01ARZ3NDEKTSV4RRFFQ69G5FAV",
    "checks": {"valkey": "ok", "storage": "ok"},
    "warnings": ["valkey_evicts"],
    "description": "2 if the answer is right",
    "prompt_id": "p-000012",
    "rewards": {"correctness": 2.0, "integer": 0.5},
    "finish_reason": "stop",
    "details": {"exact": {"score": 1.0}},
    "seconds": {"exact": 0.01},
    "session": JOB,
    "engine": "native",
    "engines": ["native", "trl"],
    "sentence": "Yes: completions of 14 of 20 questions got different rewards.",
    "grader": {"type": "string_check", "name": "exact", "input": "{{sample.output_text}}", "operation": "eq"},
    "queue": "grpo.gpu1",
    "queues": ["grpo.gpu1"],
    "disabled_reason": "It has failed for a day.",
    "secret": "whsec_…",
    "event_id": "msg-01ARZ3NDEKTSV4RRFFQ69G5FAV",
    "last_error": "no answer within 15 seconds",
    "last_status": 200,
    "host": "box1",
    "grader_isolation": "namespaces",
    "version": "1.0.0",
    "subset": "main",
    "revision": "main",
    "answer_path": "final.value",
    "answer_pattern": "#### (.*)",
    "headers": {"X-Key": "secret://judge"},
    "dataset": DATASET,
    "metric": "exact",
    "reasoning_effort": "low",
    "labels": ["good", "bad"],
    "passing_labels": ["good"],
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "calculate_output": "exact + length",
    "source": "def grade(sample, item):\n    return 1.0\n",
    "image_tag": "2025-05-08",
    "pattern": "^[0-9]+$",
    "formula": "exact + length",
    "range": [0, 1],
    "steps": [50],
    "report_to": ["tensorboard"],
    "search": "maths",
    "Idempotency-Key": "6f1c2d0a-6c0c-4d6e-9a53-0d6d8d9d4f6b",
    "Last-Event-ID": "7",
    "item": {"answer": "12"},
    "model_sample": "12",
    "file": "",
    "reinforcement": {"grader": {"type": "string_check"}},
    "response_format": {"type": "json_object"},
    "reward_lt": 0.5,
    "reward_gt": 0.5,
    "spec_format": 2,
    "workers_spec_format": 2,
    "gpu_memory_gb": 141.0,
    "memory_gb": 128.0,
    "min_gpu_memory_gb": 80,
    "max_rows": 1000,
    "target": 0.8,
    "temperature": 0.0,
    "top_p": 1.0,
    "created": SECONDS,
    "ends_at": SECONDS,
    "GpuUsage.limit": 100.0,
    "StorageUsage.limit": 10**12,
    "JobUsage.limit": 100,
    "progress": 0.2,
    "attempts": 0,
    "Worker.name": "box1-7f3a",
    "RowScores.printed": {"exact": "checking 12"},
    "RewardTags.answer": "answer",
    "SamplingSection.temperature": 0.9,
    "ModelSection.name": "Qwen/Qwen2.5-7B-Instruct",
    "MetricList.data": [{"step": 12, "reward": 1.25, "rewards": {"correctness": 1.0}}],
    "Worker.gpus": ["NVIDIA H200"],
    "Dataset.id": DATASET,
    "Group.id": GROUP,
    "SubmittedGroup.id": GROUP,
    "Webhook.id": "webhook-01ARZ3NDEKTSV4RRFFQ69G5FAV",
    "ArtifactFile.url": "https://s3.example.com/grpo/jobs/…?X-Amz-Signature=…",
    "Webhook.events": ["fine_tuning.job.succeeded"],
    "createWebhook.events": ["fine_tuning.job.succeeded"],
    "Estimate.checkpoints": 10,
    "RolloutStep.prompts": ["p-000012"],
    "Trial.rewards": {"correctness": 0.6},
    "OpenAICheckpoint.metrics": {"step": 50, "train_reward_mean": 1.25},
    "ProblemDocument.type": "urn:grpo:problem:not_found",
    "ProblemDocument.status": 404,
    "ProblemDocument.code": "not_found",
    "ProblemDocument.detail": "There is no such job.",
    "WebhookDelivery.type": "fine_tuning.job.succeeded",
    "GraderRunMetadata.type": "string_check",
    "GraderRunMetadata.name": "exact",
    "OpenAIErrorBody.type": "invalid_request_error",
    "UnavailableGrader.grader": "exact",
    "UnavailableGrader.code": "graders_not_confined",
    "Reward.name": "correctness",
    "PreviewColumn.name": "question",
    "listEvents.type": ["metric"],
    "createChatCompletion.messages": [{"role": "user", "content": "3+4="}],
    "createChatCompletion.seed": 7,
    "submitGroup.grid": {"optimizer.learning_rate": [1e-5, 3e-5]},
    "submitGroup.repeat": 2,
    "listEvents.cursor": "MQ",
    "listEvents.fields": "seq,type,data",
    "listMetrics.fields": "step,reward",
    "listCheckpoints.fields": "step,created_at",
    "listArtifacts.fields": "path,size",
    "listRollouts.fields": "step,completion,reward_total",
    "listRolloutSteps.fields": "step,reward_mean",
    "listRewards.fields": "name,most",
    "listWorkers.fields": "name,state",
    "listWebhooks.fields": "id,url",
    "listWebhookDeliveries.fields": "type,state",
    "listDatasets.fields": "id,rows",
    "listRows.fields": "row,values",
    "listJobRows.fields": "row,sha256",
    "listDatasetJobs.fields": "id,status",
    "listKeys.fields": "id,name,status",
    "listGpuHours.fields": "owner,gpu_hours",
    "listOwnersUsage.fields": "owner,gpu_hours.left",
    "listJobs.fields": "id,status,spec.model.name",
    "getJob.fields": "status,step,total_steps",
    "compareJobs.job": [JOB],
    "listFineTuningEvents.after": "ftevent-7",
    "listRollouts.cursor": "eyJzdGVwIjogNX0",
    "listDatasets.cursor": DATASET,
    "listOpenAIFiles.after": DATASET,
    "listFineTuningCheckpoints.after": f"{JOB}:step-50",
    "listWorkers.cursor": "box1-7f3a",
    "listKeys.cursor": KEY,
    "listRows.cursor": "20-2480",
    "revokeKey.key": KEY,
    "listOwnersUsage.cursor": "ann",
    "listGpuHours.cursor": "2026-11-30~ann~NVIDIA H200",
    "listGpuHours.since": "2026-11-01",
    "listGpuHours.until": "2026-11-30",
    "getWorker.name": "box1-7f3a",
    "drainWorker.name": "box1-7f3a",
    "undrainWorker.name": "box1-7f3a",
    "scoreRows.rows": [{"item": {"answer": "12"}, "model_sample": "12"}],
}
"""By name, or by schema or operation and name; numbers and words with a list or a default need none."""


def describe(document: Schema) -> None:
    """Give every property and parameter of the document what its type does not say."""
    schemas: dict[str, Schema] = document["components"]["schemas"]
    for name, schema in schemas.items():
        _describe_properties(name, schema, schemas)
    for operation in operations(document):
        name = operation["operationId"]
        for content in operation.get("requestBody", {}).get("content", {}).values():
            _describe_properties(name, content["schema"], schemas)
        for parameter in operation.get("parameters", []):
            _describe_parameter(name, parameter, schemas)


def operations(document: Schema) -> Iterator[Schema]:
    """Every operation of the document."""
    for path in document["paths"].values():
        yield from path.values()


def parts_of(schema: Schema) -> Iterator[Schema]:
    """The schemas inside a schema, besides its properties."""
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            yield schema[name]
    for name in ("oneOf", "anyOf", "allOf"):
        yield from schema.get(name) or []
    yield from schema.get("patternProperties", {}).values()


def is_reference(schema: Schema) -> bool:
    """Whether a value consists of another component, whose own properties have the examples."""
    return "$ref" in schema or any(map(is_reference, parts_of(schema)))


def _describe_properties(where: str, schema: Schema, schemas: dict[str, Schema]) -> None:
    for name, found in schema.get("properties", {}).items():
        if not found.get("description") and (meaning := _named(MEANINGS, where, name)):
            found["description"] = meaning
        if not is_reference(found) and "examples" not in found:
            example = _example(where, name, found, schemas)
            found |= {} if example is None else {"examples": [example]}
        _describe_properties(where, found, schemas)
    for part in parts_of(schema):
        _describe_properties(where, part, schemas)


def _describe_parameter(where: str, parameter: Schema, schemas: dict[str, Schema]) -> None:
    name = parameter["name"]
    if not parameter.get("description"):
        parameter["description"] = MEANINGS.get(f"{name}?") or _named(MEANINGS, where, name) or ""
    if "example" not in parameter and "examples" not in parameter:
        parameter["example"] = _example(where, name, parameter["schema"], schemas)


def _named(table: dict[str, Any], where: str, name: str) -> Any:
    return table.get(f"{where}.{name}", table.get(name))


def _example(where: str, name: str, schema: Schema, schemas: dict[str, Schema]) -> Any:
    """What the table has, if the value may be that; otherwise the first that the schema allows."""
    kinds = [kind for kind in _kinds(schema, schemas) if kind.get("type") != "null"]
    given = _named(EXAMPLES, where, name)
    if f"{where}.{name}" in EXAMPLES or (given is not None and any(_takes(kind, given) for kind in kinds)):
        return given
    return next((found for kind in kinds if (found := _first(kind)) is not None), None)


def _kinds(schema: Schema, schemas: dict[str, Schema]) -> Iterator[Schema]:
    """The alternatives that a schema allows."""
    options = schema.get("oneOf") or schema.get("anyOf")
    if options is None:
        yield _resolved(schema, schemas)
    for option in options or []:
        yield from _kinds(schema | {"oneOf": None, "anyOf": None} | option, schemas)


def _resolved(schema: Schema, schemas: dict[str, Schema]) -> Schema:
    for part in [schema, *schema.get("allOf", [])]:
        if "$ref" in part:
            return schemas[part["$ref"].rpartition("/")[2]]
    return schema


_TYPES: Final = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "array": list,
    "object": dict,
    "boolean": bool,
}


def _kind(schema: Schema) -> str:
    kind = schema.get("type", "")
    return next((one for one in kind if one != "null"), "") if isinstance(kind, list) else kind


def _takes(schema: Schema, value: Any) -> bool:
    """Whether a table's example is of this type, and no word or time stands in its place."""
    if "enum" in schema or "const" in schema or schema.get("format") == "date-time":
        return False
    return isinstance(value, _TYPES.get(_kind(schema), ())) and not (
        isinstance(value, bool) and _kind(schema) != "boolean"
    )


def _first(schema: Schema) -> Any:
    """A value that a schema allows, by what it says itself."""
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    if schema.get("default") not in (None, "", [], {}):
        return schema["default"]
    if schema.get("format") == "date-time":
        return TIME
    return _FIRST.get(_kind(schema), _nothing)(schema)


def _array(schema: Schema) -> Any:
    first = _first(schema.get("items", {}))
    return None if first is None else [first]


def _integer(schema: Schema) -> int:
    return int(schema.get("minimum", 0)) or int(min(schema.get("maximum", 1), 1))


def _number(schema: Schema) -> float:
    return float(min(schema.get("maximum", 0.5), max(schema.get("minimum", 0.5), 0.5)))


def _boolean(_schema: Schema) -> bool:
    return True


def _nothing(_schema: Schema) -> None:
    return None


_FIRST: Final[dict[str, Callable[[Schema], Any]]] = {
    "boolean": _boolean,
    "integer": _integer,
    "number": _number,
    "array": _array,
}
