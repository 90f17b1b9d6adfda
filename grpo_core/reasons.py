"""The words with which a run and a job say how they are: each with the sentence that people read.

A member is written once, as its value, its sentence in English and what the page shows for it in Chinese; API, OpenAPI
document, page and documentation take it from there. Owns no behaviour. Invariant: a member's value is on the wire and
in storage, so it never changes and none is removed.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class Reason(StrEnum):
    """A value that people read."""

    _value_: str
    sentence: str
    chinese: str

    def __new__(cls, value: str, sentence: str, chinese: str) -> Self:
        """A member is written as its value, its sentence and its Chinese."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.sentence, member.chinese = sentence, chinese
        return member

    @property
    def english(self) -> str:
        """What the page shows in English."""
        return self.sentence

    @classmethod
    def described(cls) -> str:
        """Every member with its sentence, as Markdown."""
        return "; ".join(f"`{member.value}`: {member.sentence}" for member in cls)


class Word(Reason):
    """A reason of which the page shows the value itself, since its sentence would be too long there."""

    @property
    def english(self) -> str:
        """The value as a label."""
        return self.value.capitalize()


class FailureClass(Reason):
    """What kind of failure ended a run."""

    USER_CONFIG = (
        "user_config",
        "The spec requires something that this model or worker cannot do",
        "配置无法在此环境执行",
    )
    DATASET = "dataset", "The data cannot be used", "数据不可用"
    REWARD = "reward", "A reward function failed", "奖励函数出错"
    OOM = "oom", "Memory ran out", "内存或显存不足"
    NO_SIGNAL = "no_signal", "Nothing was learnt", "没有学习信号"
    DIVERGED = "diverged", "Training diverged", "训练发散"
    STALLED = "stalled", "Training made no progress", "训练停滞"
    PREEMPTED = "preempted", "The training process was stopped from outside", "训练进程被外部停止"
    INFRA = "infra", "The training process, its host or a server failed", "进程、主机或服务器故障"
    INTERNAL = "internal", "An error of the service", "服务内部错误"


class FailureCode(StrEnum):
    """What exactly ended a run. The message of a failure has the names and numbers, and its hint what to do."""

    _value_: str
    failure_class: FailureClass
    """The class of its failures, unless the place that raises one knows better."""
    sentence: str

    def __new__(cls, value: str, failure_class: FailureClass, sentence: str) -> Self:
        """A member is written as its value, its class and its sentence."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.failure_class, member.sentence = failure_class, sentence
        return member

    MODEL_NOT_FOUND = "model_not_found", FailureClass.USER_CONFIG, "The hub has no such model, or it is private"
    MODEL_GATED = "model_gated", FailureClass.USER_CONFIG, "The hub gives the model only to a token"
    REVISION_NOT_FOUND = "revision_not_found", FailureClass.USER_CONFIG, "The model has no such revision"
    BAD_NAME = "bad_name", FailureClass.USER_CONFIG, "This is not the name of a model"
    MODEL_OUTSIDE_FOLDER = "model_outside_folder", FailureClass.USER_CONFIG, "The name leads out of the model folder"
    MODEL_UNREADABLE = "model_unreadable", FailureClass.USER_CONFIG, "The model's files are missing or invalid"
    NO_CHAT_TEMPLATE = "no_chat_template", FailureClass.USER_CONFIG, "The tokenizer has no chat template"
    CHAT_TEMPLATE_FAILED = "chat_template_failed", FailureClass.USER_CONFIG, "The chat template raises an error"
    CHAT_TEMPLATE_TOO_LARGE = "chat_template_too_large", FailureClass.USER_CONFIG, "The chat template needs too much"
    ADAPTER_UNREADABLE = "adapter_unreadable", FailureClass.USER_CONFIG, "The adapter's files do not fit the job"
    NO_SUCH_MODULE = "no_such_module", FailureClass.USER_CONFIG, "The model lacks modules that the spec adapts"
    SEQUENCE_TOO_LONG = "sequence_too_long", FailureClass.USER_CONFIG, "The model's context is too short"
    TOO_FEW_GPUS = "too_few_gpus", FailureClass.USER_CONFIG, "The worker has fewer GPUs than the job asks for"
    ENGINE_NOT_AVAILABLE = "engine_not_available", FailureClass.USER_CONFIG, "The engine cannot run this job"
    PRECISION_NEEDS_GPU = "precision_needs_gpu", FailureClass.USER_CONFIG, "This precision needs a GPU"
    EGRESS_REFUSED = "egress_refused", FailureClass.USER_CONFIG, "The run needed a host that is not allowed"
    TIME_LIMIT = "time_limit", FailureClass.USER_CONFIG, "The job's runs together took longer than allowed"
    TRACKER_NOT_INSTALLED = "tracker_not_installed", FailureClass.USER_CONFIG, "The worker lacks the tracker"
    BAD_SCHEMA = "bad_schema", FailureClass.USER_CONFIG, "A JSON schema is invalid"
    CHECKPOINT_DOES_NOT_FIT = "checkpoint_does_not_fit", FailureClass.USER_CONFIG, "The checkpoint has other settings"
    EXPORT_NOT_POSSIBLE = "export_not_possible", FailureClass.USER_CONFIG, "The model has no such form"
    TOO_MANY_HELD_OUT = "too_many_held_out", FailureClass.DATASET, "Too few rows are left to train on"
    NO_ROWS_LEFT = "no_rows_left", FailureClass.DATASET, "Every row to train on repeats a held-out question"
    ALL_PROMPTS_TOO_LONG = "all_prompts_too_long", FailureClass.DATASET, "All prompts are longer than the limit"
    TOO_FEW_PROMPTS = "too_few_prompts", FailureClass.DATASET, "Fewer prompts are left than a step needs"
    INPUT_GONE = "input_gone", FailureClass.DATASET, "The upload or checkpoint to start from was deleted"
    INPUT_DAMAGED = "input_damaged", FailureClass.DATASET, "The upload or checkpoint to start from has changed"
    REWARD_FAILED = "reward_failed", FailureClass.REWARD, "A reward function raised an error"
    REWARD_NOT_FINITE = "reward_not_finite", FailureClass.REWARD, "A reward is NaN or infinite"
    GRADER_NOT_LOADED = "grader_not_loaded", FailureClass.REWARD, "The source of a grader raises an error"
    GRADERS_NOT_CONFINED = "graders_not_confined", FailureClass.REWARD, "The grader's process cannot be confined"
    GRADER_NOT_AVAILABLE = "grader_not_available", FailureClass.REWARD, "A package that the grader needs is missing"
    TOO_MANY_GRADERS = "too_many_graders", FailureClass.REWARD, "Too many graders need a separate process"
    RUNS_ON_WORKERS = "runs_on_workers", FailureClass.REWARD, "Only workers run this grader"
    NO_SUCH_JUDGE = "no_such_judge", FailureClass.REWARD, "The judge is not registered on the worker"
    NO_JUDGE_KEY = "no_judge_key", FailureClass.REWARD, "The judge's key is not set on the worker"
    ENDPOINT_NOT_ALLOWED = "endpoint_not_allowed", FailureClass.REWARD, "The endpoint's host is not allowed"
    NO_GRADER_SECRET = "no_grader_secret", FailureClass.REWARD, "A secret that the grader needs is not set"
    BAD_REGISTRATION = "bad_registration", FailureClass.REWARD, "The registration of judges or hosts is invalid"
    GRADERS_FAILED = "graders_failed", FailureClass.REWARD, "Graders failed more often than the spec allows"
    OUT_OF_MEMORY = "out_of_memory", FailureClass.OOM, "Memory ran out while a step was trained"
    OUT_OF_MEMORY_IN_ROLLOUT = (
        "out_of_memory_in_rollout",
        FailureClass.OOM,
        "Memory ran out while completions were generated",
    )
    NO_ROOM_FOR_ROLLOUTS = (
        "no_room_for_rollouts",
        FailureClass.OOM,
        "The weights leave too little memory for completions",
    )
    KILLED_FOR_MEMORY = "killed_for_memory", FailureClass.OOM, "The kernel killed the training process"
    MEMORY_LIMIT = "memory_limit", FailureClass.OOM, "The run used more memory than the worker allows"
    NO_REWARD_VARIANCE = "no_reward_variance", FailureClass.NO_SIGNAL, "All completions of a prompt had the same reward"
    ZERO_UPDATE = "zero_update", FailureClass.NO_SIGNAL, "Training changed no weight"
    NOT_FINITE = "not_finite", FailureClass.DIVERGED, "The loss, gradient or probabilities are not finite"
    RUNAWAY = "runaway", FailureClass.DIVERGED, "The loss or the gradient grew without bound"
    ROLLOUTS_DIFFER = "rollouts_differ", FailureClass.DIVERGED, "Rollout engine and trainer compute other probabilities"
    NO_PROGRESS = "no_progress", FailureClass.STALLED, "The training process made no progress"
    STOPPED_FROM_OUTSIDE = "stopped_from_outside", FailureClass.PREEMPTED, "Something else asked the run to stop"
    RANK_LOST = "rank_lost", FailureClass.INFRA, "One of the processes that train together was lost"
    WORKER_LOST = "worker_lost", FailureClass.INFRA, "The worker or its host died"
    CHILD_DIED = "child_died", FailureClass.INFRA, "The training process ended without a message"
    WORKER_ERROR = "worker_error", FailureClass.INFRA, "The worker itself failed"
    DISK_FULL = "disk_full", FailureClass.INFRA, "The worker's scratch disk is full"
    RUN_TOO_LARGE = "run_too_large", FailureClass.INFRA, "A file of the run was not uploaded"
    CHECKPOINT_UNREADABLE = "checkpoint_unreadable", FailureClass.INFRA, "A checkpoint cannot be resumed from"
    HUB_UNREACHABLE = "hub_unreachable", FailureClass.INFRA, "The hub did not answer"
    ATTEMPTS_USED_UP = "attempts_used_up", FailureClass.INFRA, "Three runs in a row were lost without a checkpoint"
    UNEXPECTED = "unexpected", FailureClass.INTERNAL, "An unexpected error"
    RANKS_DIFFER = "ranks_differ", FailureClass.INTERNAL, "The ranks computed different adapters"
    SETTINGS_DIFFER = "settings_differ", FailureClass.INTERNAL, "A library has other settings than the spec"
    LIBRARY_CHANGED = "library_changed", FailureClass.INTERNAL, "A library lacks an internal part that is used"
    BASE_CHANGED = "base_changed", FailureClass.INTERNAL, "Training changed the base model"
    ADAPTER_NOT_FP32 = "adapter_not_fp32", FailureClass.INTERNAL, "The adapter is not in 32 bits"
    UNTRAINED_MODULE = "untrained_module", FailureClass.INTERNAL, "A part of the adapter was never trained"
    ADAPTER_DIFFERS = "adapter_differs", FailureClass.INTERNAL, "The saved adapter is not the trained one"
    PEFT_CANNOT_LOAD = "peft_cannot_load", FailureClass.INTERNAL, "Stock PEFT cannot load the adapter"
    PEFT_DISAGREES = "peft_disagrees", FailureClass.INTERNAL, "Stock PEFT computes something else"
    SERVER_DISAGREES = "server_disagrees", FailureClass.INTERNAL, "The rollout server computes something else"
    ADAPTER_NOT_SERVED = "adapter_not_served", FailureClass.INTERNAL, "The rollout server ignores the adapter"
    EXPORT_DIFFERS = "export_differs", FailureClass.INTERNAL, "The exported model answers otherwise than the adapter"


class FetchFailure(Reason):
    """What could not be fetched, by the code of the failure: it is shown so, and not as a failure of a process."""

    HUB_UNREACHABLE = (
        "hub_unreachable",
        "The model or the data set could not be fetched: the hub did not answer",
        "无法获取模型或数据集：Hub 没有响应",
    )
    MODEL_NOT_FOUND = "model_not_found", "The model could not be fetched", "无法获取模型"
    MODEL_GATED = "model_gated", "The model could not be fetched: it is gated", "无法获取模型：模型受限"
    REVISION_NOT_FOUND = "revision_not_found", "This revision of the model could not be fetched", "无法获取模型的该版本"
    DATASET_NOT_FOUND = "dataset_not_found", "The data set could not be fetched", "无法获取数据集"
    DATASET_GATED = "dataset_gated", "The data set could not be fetched: it is gated", "无法获取数据集：数据集受限"
    INPUT_GONE = (
        "input_gone",
        "The upload or the checkpoint to start from could not be fetched: it was deleted",
        "无法获取上传的数据或起点检查点：已被删除",
    )

    @classmethod
    def sentence_of(cls, code: str | None) -> str | None:
        """The heading of a failure with this code; None if nothing was fetched."""
        return next((one.sentence for one in cls if one.value == code), None)


class Phase(Word):
    """What the run of a job is doing."""

    PREPARING = "preparing", "fetching the data and the checkpoint to start from", "准备中"
    LOADING = "loading", "loading the model", "加载模型"
    TRAINING = "training", "generating completions, scoring them and updating the adapter", "训练中"
    EVALUATING = "evaluating", "answering held-out questions, or testing the saved adapter", "评估中"
    SERVING = "serving", "answering requests", "服务中"
    EXPORTING = "exporting", "writing the adapter in another form", "导出中"
    UPLOADING = "uploading", "uploading its last files", "上传中"

    @property
    def english(self) -> str:
        """The page shows it behind the status."""
        return self.value


class EventType(Word):
    """What an event is about."""

    STATUS = "status", "the job's status or phase changed", "状态"
    METRIC = "metric", "the metrics of a logged step", "指标"
    SAMPLE = "sample", "a completion of a logged step", "采样"
    CHECKPOINT = "checkpoint", "a checkpoint was written", "检查点"
    EVALUATION = "evaluation", "held-out questions were answered, or the self-test finished", "评估"
    WARNING = "warning", "something may be wrong; training continues", "警告"
    LOG = "log", "a message", "日志"
    ERROR = "error", "the job failed; the last event before the status", "错误"


class FinishReason(Reason):
    """Why a completion ended."""

    STOP = "stop", "by itself", "正常结束"
    LENGTH = "length", "cut off", "被截断"

    @classmethod
    def of(cls, ended: bool) -> FinishReason:
        """By whether the model ended it."""
        return cls.STOP if ended else cls.LENGTH


class WarningCode(Reason):
    """What a warning event is about. Audits have their own names, and warnings about a spec those of a dry run."""

    RUN_LOST = (
        "run_lost",
        "A run was lost; the job resumes from its last checkpoint, and the attempt counts",
        "一次运行中断；任务将从最近的检查点继续，并计为一次尝试",
    )
    MICRO_BATCH_LOWERED = (
        "micro_batch_lowered",
        "Memory ran out; each step continues in more parts, which changes nothing but the time",
        "内存或显存不足；此后每步分更多份训练，只影响耗时",
    )
    SLOW_RANK = (
        "slow_rank",
        "One of the processes that train together is slower than the others, which wait for it",
        "共同训练的进程中有一个比其他的慢，其余进程在等它",
    )
    NOT_SAVED = (
        "not_saved",
        "A run that was to pause or to stop took too long to save",
        "运行未能在暂停或停止前及时保存",
    )
    CHECKPOINT_SKIPPED = (
        "checkpoint_skipped",
        "A checkpoint cannot be read; the previous one is used",
        "检查点无法读取，改用上一个",
    )
    BASE_DIFFERS = (
        "base_differs",
        "The base model is not the one that the checkpoint was made with",
        "基座模型与生成检查点时不同",
    )
    DATA_CHANGED = (
        "data_changed",
        "The questions are not those that the checkpoint was made with",
        "题目与生成检查点时不同",
    )
    HUB_AWAY = "hub_away", "The hub does not answer; the run tries again", "Hub 没有响应，正在重试"
    REVISION_IGNORED = (
        "revision_ignored",
        "The revision is ignored: what it names is a folder on the worker",
        "已忽略 revision：所指的是工作进程上的文件夹",
    )
    ROWS_WITHOUT_VALUES = (
        "rows_without_values",
        "Rows without a question or an answer were skipped",
        "已跳过缺少问题或答案的行",
    )
    PROMPTS_DROPPED = "prompts_dropped", "Prompts that are too long were dropped", "已丢弃过长的提示词"
    OPENAI_FIELD = (
        "openai_field",
        "A field of the request in OpenAI's format has no effect here, or another one",
        "OpenAI 格式请求中的某个字段在此无效，或作用不同",
    )
    FEWER_QUESTIONS = (
        "fewer_questions",
        "The evaluation split has fewer questions than requested",
        "评估集的题目少于所需数量",
    )
    HELD_OUT_REPEATS = (
        "held_out_repeats",
        "Rows that repeat a held-out question are not trained on",
        "与留出题目重复的行不参与训练",
    )
    ROLLOUTS_DIFFER = (
        "rollouts_differ",
        "Rollout engine and trainer drift apart, but not far enough to end the job",
        "采样引擎与训练器出现偏差，但尚不足以终止任务",
    )
    EVENT_INVALID = (
        "event_invalid",
        "The training process wrote a line that is not a valid event; it was skipped",
        "训练进程写入了一行无效事件，已跳过",
    )
    EVENT_TOO_LONG = (
        "event_too_long",
        "The training process wrote an event of more than 256 KiB; it was skipped",
        "训练进程写入的事件超过 256 KiB，已跳过",
    )
    SAMPLES_LEFT_OUT = (
        "samples_left_out",
        "The run wrote more than 64 MiB of events; later samples and logs are skipped",
        "本次运行的事件超过 64 MiB，此后的采样与日志不再记录",
    )
    EVENTS_LEFT_OUT = (
        "events_left_out",
        "The run wrote more than 128 MiB of events; later ones are skipped, except the phase",
        "本次运行的事件超过 128 MiB，此后只记录阶段",
    )
    LITTLE_KEPT = (
        "little_kept",
        "Rounding loses much of what the adapter changes",
        "舍入使适配器的改动损失较多",
    )
    TRACKER_FAILED = (
        "tracker_failed",
        "A tracker failed and receives nothing more; the job's own files are complete",
        "实验跟踪器出错，不再接收数据；任务自身的文件是完整的",
    )
