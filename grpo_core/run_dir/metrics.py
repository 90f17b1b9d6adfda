"""The metrics of a training step: name, unit, bounds and meaning of each, written once at its field.

The page's charts, the terminal, the report, trackers, the client and the documentation take them from here. Owns no
value: `step_recorder` fills them in. Invariant: a field that is added has a default, so that older files can be read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Final, Literal

from grpo_core.shown import Shown, plain_type, shown_fields


@dataclass(frozen=True, kw_only=True)
class Metric(Shown):
    """What a metric is."""

    unit: str = ""
    """`points` are rewards; `share` is from 0 to 1."""
    better: Literal["", "higher", "lower"] = ""
    absent: str = ""
    """When it is null."""
    trl: str = ""
    """What TRL calls it; of a mapping, `{}` is the name."""

    def sentence(self, *, with_unit: bool = True) -> str:
        """The meaning, with unit and the reason for null."""
        unit = f", in {self.unit}" if with_unit and self.unit not in ("", "points", "share", "1/s") else ""
        return f"{self.meaning}{unit}{f'; null: {self.absent}' if self.absent else ''}"


@dataclass(frozen=True)
class Short:
    """The name of a metric where there is little room."""

    english: str
    chinese: str
    is_watched: bool = False
    """Whether the terminal and the report's table have it."""


@dataclass(frozen=True)
class Chart:
    """A chart of a metric; the others belong to the chart that names them."""

    english: str
    chinese: str
    chinese_meaning: str
    band: tuple[str, ...] = ()
    """The fields of the lower and upper edge, or the field of the width to either side."""


def _share(meaning: str, *, absent: str = "", trl: str = "") -> Metric:
    return Metric(meaning, 0, 1, unit="share", better="lower", absent=absent, trl=trl)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSeconds:
    """Where the time of a step went."""

    generation: Annotated[float, Metric("Generating completions", 0, unit="s"), Short("generation", "生成")]
    reward: Annotated[float, Metric("Scoring them", 0, unit="s"), Short("reward", "奖励计算")]
    update: Annotated[
        float, Metric("The rest: computing and applying the update", 0, unit="s"), Short("update", "参数更新")
    ]
    total: Annotated[float, Metric("The whole step", 0, unit="s"), Short("seconds", "合计", is_watched=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """One optimizer step: a line of `metrics.jsonl` and the data of a `metric` event."""

    step: int
    reward: Annotated[
        float,
        Metric("Mean weighted total", unit="points", better="higher", trl="reward"),
        Short("reward", "奖励", is_watched=True),
        Chart("Reward", "奖励", "加权总分的均值", band=("reward_std",)),
    ]
    reward_std: Annotated[
        float,
        Metric("Mean over groups of the standard deviation within the group", unit="points", trl="reward_std"),
        Short("spread", "组内标准差", is_watched=True),
    ]
    rewards: Annotated[
        Mapping[str, float],
        Metric(
            "Mean of each raw reward, before weights, over the completions that have it",
            unit="points",
            better="higher",
            trl="rewards/{}/mean",
        ),
        Chart("Reward functions", "各奖励函数", "加权前的原始均值"),
    ]
    rewards_std: Annotated[
        Mapping[str, float],
        Metric("Standard deviation of each raw reward over the completions", unit="points", trl="rewards/{}/std"),
    ]
    zero_variance_share: Annotated[
        float,
        _share("Share of groups in which all rewards are equal, so that nothing is learnt", trl="frac_reward_zero_std"),
        Short("no variance", "零方差", is_watched=True),
        Chart("Groups without variance", "零方差组比例", "组内奖励全部相同、无可学习的组的比例"),
    ]
    completion_tokens_mean: Annotated[
        float,
        Metric("Mean length of a completion", 0, unit="tokens", trl="completions/mean_length"),
        Short("tokens", "词元", is_watched=True),
        Chart(
            "Completion length", "回答长度", "回答的平均词元数", band=("completion_tokens_min", "completion_tokens_max")
        ),
    ]
    completion_tokens_min: Annotated[
        int, Metric("Shortest completion", 0, unit="tokens", trl="completions/min_length"), Short("shortest", "最短")
    ]
    completion_tokens_max: Annotated[
        int, Metric("Longest completion", 0, unit="tokens", trl="completions/max_length"), Short("longest", "最长")
    ]
    truncated_share: Annotated[
        float,
        _share("Share of completions cut off at the token limit", trl="completions/clipped_ratio"),
        Short("cut off", "截断", is_watched=True),
        Chart("Cut off at the limit", "截断比例", "达到词元上限的回答占比"),
    ]
    kl: Annotated[
        float | None,
        Metric(
            "How far the policy has moved from the base model",
            unit="nats per token",
            absent="`loss.beta` is 0",
            trl="kl",
        ),
        Short("KL", "KL", is_watched=True),
        Chart("KL from the base model", "相对基座模型的 KL 散度", "策略偏离基座的程度"),
    ]
    entropy: Annotated[
        float | None,
        Metric("Uncertainty about the next token", 0, unit="nats", trl="entropy"),
        Short("entropy", "熵", is_watched=True),
        Chart("Entropy", "熵", "下一个词元的不确定性"),
    ]
    loss: Annotated[
        float,
        Metric("Near zero by design; not a measure of progress", trl="loss"),
        Short("loss", "损失"),
        Chart("Loss", "损失", "理论上接近零，不反映训练进展"),
    ]
    grad_norm: Annotated[
        float,
        Metric("Norm of the gradient, before clipping", 0, trl="grad_norm"),
        Short("norm", "范数"),
        Chart("Gradient norm", "梯度范数", "裁剪之前"),
    ]
    learning_rate: Annotated[
        float,
        Metric("After warm-up and schedule", 0, trl="learning_rate"),
        Short("rate", "学习率"),
        Chart("Learning rate", "学习率", "含预热与衰减"),
    ]
    seconds: Annotated[
        StepSeconds,
        Metric("Duration of the step and of its parts", 0, unit="s", better="lower"),
        Chart("Seconds per step", "每步秒数", "每步及其各阶段的时长"),
    ]
    completions_per_s: Annotated[
        float,
        Metric("Completions per second, over the whole step", 0, unit="1/s", better="higher"),
        Short("speed", "速度"),
        Chart("Completions per second", "每秒回答数", "速度"),
    ]
    gpu_memory_gb: Annotated[
        float | None,
        Metric("Peak memory so far", 0, unit="GB", absent="on a CPU"),
        Short("memory", "显存"),
        Chart("GPU memory", "显存", "迄今峰值"),
    ]
    logprob_diff_mean: Annotated[
        float | None,
        Metric(
            "Mean absolute difference of their log-probabilities over the step's tokens",
            0,
            unit="nats",
            better="lower",
            absent="they are the same program, or were not compared in this step",
        ),
        Short("mean", "均值"),
        Chart("Rollout engine vs. trainer", "采样引擎与训练器的对数概率差", "对数概率之差的绝对值的均值"),
    ] = None
    logprob_diff_max: Annotated[
        float | None, Metric("The largest of these differences", 0, unit="nats", absent="as for the mean")
    ] = None
    duplicate_share: Annotated[
        float | None,
        _share("Share of completions with the same text as another of their group"),
        Short("repeated", "重复", is_watched=True),
        Chart("Repeated completions", "重复回答比例", "与同组其他回答文本相同的回答占比"),
    ] = None
    unscored_share: Annotated[
        float | None,
        _share("Share of completions that a grader failed to score", absent="in a job without graders"),
        Short("unscored", "未评分"),
        Chart("Unscored completions", "未评分回答比例", "评分器未能评分的回答占比"),
    ] = None
    skipped_share: Annotated[
        float | None,
        _share(
            "Share of groups that were paid one value because of that, so that nothing is learnt",
            absent="in a job without graders",
        ),
        Short("skipped", "跳过"),
        Chart("Skipped groups", "跳过的组比例", "因此按同一分值计分、无可学习的组的占比"),
    ] = None

    eval_strict: Annotated[
        float | None,
        Metric(
            "Share of held-out questions answered correctly in the required format",
            0,
            1,
            unit="share",
            better="higher",
            absent="the step was not evaluated",
        ),
        Short("held-out strict", "留出题严格"),
    ] = None
    eval_strict_low: Annotated[
        float | None,
        Metric("Lower end of its 95 % interval", 0, 1, unit="share", absent="as for the share"),
        Short("95 % from", "95 % 下限"),
    ] = None
    eval_strict_high: Annotated[
        float | None,
        Metric("Upper end of its 95 % interval", 0, 1, unit="share", absent="as for the share"),
        Short("95 % to", "95 % 上限"),
    ] = None
    eval_lenient: Annotated[
        float | None,
        Metric(
            "Share of held-out questions of which the last number in the answer is right",
            0,
            1,
            unit="share",
            better="higher",
            absent="the step was not evaluated",
        ),
        Short("held-out lenient", "留出题宽松"),
    ] = None
    eval_metric: Annotated[
        float | None,
        Metric(
            "Mean of `evaluation.metric`, or of the total reward, over held-out questions",
            better="higher",
            absent="the step was not evaluated, or the job has neither `evaluation.metric` nor graders",
        ),
        Short("held-out metric", "留出题指标"),
    ] = None

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def metrics_of_evaluation(point: Mapping[str, Any]) -> dict[str, Any]:
    """What an evaluation's `curve` adds to the metrics of its step, which were written before it."""
    low, high = point["strict_interval"]
    own = {} if point["metric"] == "strict_accuracy" else {"eval_metric": point["value"]}
    return {
        "eval_strict": point["strict_accuracy"],
        "eval_strict_low": low,
        "eval_strict_high": high,
        "eval_lenient": point["lenient_accuracy"],
        **own,
    }


FORMATS: Final[Mapping[str, str]] = {"points": ".3f", "share": ".0%", "tokens": ".0f", "s": ".2f"}
"""How numbers of a unit are written in plain text; others as `.3g`."""


@dataclass(frozen=True, kw_only=True)
class Described:
    """A metric with its place in a line of `metrics.jsonl`."""

    path: tuple[str, ...]
    metric: Metric
    short: Short | None
    chart: Chart | None
    is_by_name: bool
    """Whether there is one number for each reward."""

    @property
    def name(self) -> str:
        """The path as one word, such as `seconds.total`."""
        return ".".join(self.path)

    @property
    def format(self) -> str:
        """How its numbers are written in plain text."""
        return FORMATS.get(self.metric.unit, ".3g")


def described(record: type = StepMetrics, *above: str) -> dict[str, Described]:
    """Every metric by its name, those inside another behind it."""
    found: dict[str, Described] = {}
    for name, field in shown_fields(record).items():
        assert isinstance(field.mark, Metric), name
        one = Described(
            path=(*above, name),
            metric=field.mark,
            short=next((mark for mark in field.marks if isinstance(mark, Short)), None),
            chart=next((mark for mark in field.marks if isinstance(mark, Chart)), None),
            is_by_name=plain_type(field.type) is Mapping,
        )
        found[one.name] = one
        if plain_type(field.type) is StepSeconds:
            found |= described(StepSeconds, *above, name)
    return found


def charts() -> list[tuple[Described, Chart, list[Described]]]:
    """The metrics that are drawn, in order, each with its lines, the most important first."""
    every = described().values()
    drawn = [(one, one.chart) for one in every if one.chart]
    return [
        (one, chart, [part for part in reversed(every) if part.path[:-1] == one.path] or [one]) for one, chart in drawn
    ]


def short_names() -> dict[str, Short]:
    """The short names of metrics by their names."""
    return {name: one.short for name, one in described().items() if one.short}


def watched() -> list[tuple[Described, Short]]:
    """The metrics of the terminal and of the report's table."""
    return [(one, one.short) for one in described().values() if one.short and one.short.is_watched]
