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


class Phase(Word):
    """What the run of a job is doing."""

    PREPARING = "preparing", "fetching the data and the checkpoint to start from", "准备中"
    LOADING = "loading", "loading the model", "加载模型"
    TRAINING = "training", "generating completions, scoring them and updating the adapter", "训练中"
    EVALUATING = "evaluating", "answering held-out questions, or testing the saved adapter", "评估中"
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
    TRACKER_FAILED = (
        "tracker_failed",
        "A tracker failed and receives nothing more; the job's own files are complete",
        "实验跟踪器出错，不再接收数据；任务自身的文件是完整的",
    )
