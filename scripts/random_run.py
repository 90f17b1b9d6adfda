"""`python -m grpo_core train` on a base of random weights, with the time of each part of a step.

    python scripts/random_run.py --models FOLDER qwen7b ...            # folders of bases: their files have no values
    GRPO_MODEL_DIR=... python scripts/random_run.py train SPEC --out DIR --ranks 8

Owns such bases (shapes, random values, folders), and what a run of one writes beside the product's own records:
`DIR/times-RANK.jsonl` has a line `loaded` and a line for each step. Everything else is the product's: launcher,
trainer, rewards, records and checkpoints. Invariant: the weights, which are made on the GPU, depend on the base's shape
alone, so that every rank and every resumed run makes the same.

Variables: BENCH_INSTANT=TOKENS draws and trains without a model, completions of at most this number of tokens, so that
a step is what no GPU does; BENCH_SLOW=RANK:FACTOR lets a rank draw and train that many times slower; BENCH_SHARED=1
lets ranks share the base out where a spec cannot ask for it, which is on one host's CPU.
"""

# ruff: noqa: SLF001 - the times are those of the product's inner parts

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Final

BEGAN: Final = time.time()
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SHAPES: Final[dict[str, dict[str, Any]]] = {
    "qwen7b": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "qwen32b": {
        "model_type": "qwen2",
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
    },
    "llama70b": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        # Or its 80 layers would amplify rounding to more than an engine accepts of its two modes before it trains.
        "initializer_range": 0.007,
    },
    "tiny": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}
SHAPES["instant"] = {**SHAPES["tiny"], "vocab_size": SHAPES["qwen7b"]["vocab_size"]}
TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL: Final = ("<|im_end|>", "<|im_start|>", "<|pad|>")


# The base


def shape_of(name: str, **changes: Any) -> Any:
    """Return a shape, with changes of its sizes."""
    from transformers import AutoConfig

    from grpo_core.engines.native.architecture import of_config

    sizes = {**SHAPES[name], **changes}
    kind = sizes.pop("model_type")
    config = AutoConfig.for_model(
        kind, **sizes, max_position_embeddings=8192, tie_word_embeddings=False, eos_token_id=0, bos_token_id=None
    )
    config.architectures = ["Qwen2ForCausalLM" if kind == "qwen2" else "LlamaForCausalLM"]
    return of_config(config)


def biases(shape: Any) -> list[str]:
    """Return the names of its biases, which decide whether a layer has any."""
    if shape.config.model_type != "qwen2":
        return []
    return [f"model.layers.{at}.self_attn.{x}_proj.bias" for at in range(shape.layers) for x in "qkv"]


def make_model(name: str, folder: Path) -> None:
    """Write the folder of a base of this shape: its safetensors file has a header, and a hole in place of values."""
    import torch

    from grpo_core.engines.native.weights import empty_weights

    shape = shape_of(name)
    folder.mkdir(parents=True, exist_ok=True)
    shape.config.save_pretrained(folder)
    shaped = empty_weights(shape, biases(shape), device=torch.device("meta"), dtype=torch.bfloat16).named()
    header: dict[str, Any] = {}
    end = 0
    for tensor_name, tensor in shaped.items():
        header[tensor_name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    _tokenizer(shape.vocabulary).save_pretrained(folder)


def _tokenizer(size: int) -> Any:
    """Return a tokenizer with a text for each of `size` tokens; it reads a text byte by byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    letters = "etaoinshrdlu"
    for at in range(size - len(known)):
        word = "Ġ"
        for _ in range(4):
            at, letter = divmod(at, len(letters))
            word += letters[letter]
        known.append(word + "" if not at else f"{word}{at}")
    vocabulary = {text: at for at, text in enumerate(known)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[2])
    whole.add_special_tokens({"additional_special_tokens": [SPECIAL[1]]})
    whole.chat_template = TEMPLATE
    return whole


def fill(weights: Any) -> None:
    """Give weights random values, by their shape alone; every rank makes each matrix, and keeps its part."""
    import torch

    generator = torch.Generator(weights.device).manual_seed(0)
    spread = weights.architecture.config.initializer_range
    for name, place in weights.places().items():
        if "norm" in name:
            place.tensor.fill_(1)
        else:
            values = torch.empty(place.tensor.shape, device=weights.device, dtype=weights.dtype)
            weights.fill(place, values.normal_(0, spread, generator=generator))


def random_weights(shape: Any, folder: Path, **options: Any) -> Any:
    """Do as `load_weights`, with random values in place of the files' own."""
    import torch

    from grpo_core.engines.native import weights as module

    with contextlib.ExitStack() as stack:
        names: list[str] = []
        for file in sorted(folder.glob("*.safetensors")):
            names += stack.enter_context(module.safe_open(file, "pt")).keys()
    began = time.perf_counter()
    made = module.empty_weights(shape, names, **options)
    fill(made)
    if made.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # of the largest matrix, which each rank makes whole before it keeps its part
    TIMES.facts["weights_s"] = round(time.perf_counter() - began, 2)
    return made


# The time of each part of a step


class Times:
    """Where a process's time goes: each moment counts for the innermost part that is open."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self._open = ["trl, transformers, optimizer"]
        self._wall: dict[str, float] = defaultdict(float)
        self._cpu: dict[str, float] = defaultdict(float)
        self._since = (time.perf_counter(), time.thread_time())
        self._file: Path | None = None

    def begin(self, file: Path) -> None:
        self._file = file

    @contextlib.contextmanager
    def part(self, name: str) -> Generator[None]:
        self._count()
        self._open.append(name)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def write(self, **facts: Any) -> None:
        """Write a line of the parts since the last one."""
        self._count()
        parts = {name: round(seconds, 4) for name, seconds in self._wall.items()}
        cpu = {name: round(seconds, 4) for name, seconds in self._cpu.items()}
        assert self._file is not None
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**facts, "at": round(time.time() - BEGAN, 2), "parts": parts, "cpu": cpu}) + "\n")
        self._wall.clear()
        self._cpu.clear()

    def _count(self) -> None:
        now = (time.perf_counter(), time.thread_time())
        self._wall[self._open[-1]] += now[0] - self._since[0]
        self._cpu[self._open[-1]] += now[1] - self._since[1]
        self._since = now


TIMES: Final = Times()


def timed(owner: Any, method: str, part: str) -> None:
    """Count the time of a method for a part."""
    original = getattr(owner, method)

    @functools.wraps(original)
    def counted(*arguments: Any, **options: Any) -> Any:
        with TIMES.part(part):
            return original(*arguments, **options)

    setattr(owner, method, counted)


def memory() -> dict[str, float]:
    """Return this process's peaks of memory, in GB."""
    import resource

    import torch

    found = {"host_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)}
    if torch.cuda.is_available():
        found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        found["reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
    return found


def instrument(out: Path, rank: int) -> None:
    """Count the parts of each step of this process, and use random weights."""
    from transformers import PreTrainedTokenizerBase

    from grpo_core.checkpoints.writer import CheckpointWriter
    from grpo_core.engines.native import engine, loop
    from grpo_core.engines.native.decode import Decoder
    from grpo_core.engines.team import Team
    from grpo_core.engines.trainer import PaymentTap, RecordingTrainer
    from grpo_core.monitoring.step_recorder import StepRecorder

    TIMES.facts["import_s"] = round(time.time() - BEGAN, 2)
    TIMES.begin(out / f"times-{rank}.jsonl")
    engine.load_weights = random_weights
    slow, _, factor = os.environ.get("BENCH_SLOW", "").partition(":")
    if os.environ.get("BENCH_INSTANT"):
        _be_instant(int(os.environ["BENCH_INSTANT"]))
    if slow == str(rank):
        _be_slow(float(factor))
    if os.environ.get("BENCH_SHARED"):
        engine.NativeEngine._is_sharded = lambda self, *_: self._team.size > 1
    trainer = loop.NativeTrainer
    for owner, method, part in (
        (Decoder, "generate", "draw"),
        (Team, "draw", "completions to all ranks"),
        (trainer, "training_step", "forward and backward"),
        (trainer, "_prepare_inputs", "tensors of a step"),
        (trainer, "_tokenize_prompts", "tokenize"),
        (PreTrainedTokenizerBase, "batch_decode", "text of tokens"),
        (trainer, "compute_rewards", "rewards to all ranks"),
        (PaymentTap, "__call__", "grade"),
        (RecordingTrainer, "_completions", "records of completions"),
        (StepRecorder, "record_rollout", "write completions"),
        (StepRecorder, "record_update", "write metrics"),
        (Team, "sum_joined", "gradients to all ranks"),
        (engine.NativeEngine, "_after_step", "agree on adapter"),
        (CheckpointWriter, "write", "checkpoint"),
    ):
        timed(owner, method, part)
    _write_lines(engine.NativeEngine)


def _write_lines(owner: Any) -> None:
    load, after_step, make_modes = owner.load, owner._after_step, owner._make_modes
    warn, worked = owner._warn_of_a_slow_rank, list[float]()

    def looked(self: Any) -> None:
        worked[:] = self._team.worked  # later agreements of the same step count anew
        warn(self)

    def loaded(self: Any, *arguments: Any) -> None:
        load(self, *arguments)
        TIMES.write(loaded=True, **TIMES.facts, **memory())

    def stepped(self: Any, step: int) -> bool:
        stops = after_step(self, step)
        TIMES.write(step=step, worked=[round(seconds, 4) for seconds in worked], **memory())
        return stops

    def made(self: Any, ends: Any) -> Any:
        from grpo_core.engines.native.memory import USABLE, memory_to_plan

        modes = make_modes(self, ends)
        TIMES.facts |= {"held_gb": round(self._weights.nbytes / 1e9, 2), "sharded": self._weights.shards is not None}
        TIMES.facts |= {"budget_tokens": modes.budget, "sparing": modes.sparing}
        if self._device.type == "cuda":
            import torch

            free, total = torch.cuda.mem_get_info(self._device)
            room = memory_to_plan(total, free + torch.cuda.memory_reserved(self._device))
            TIMES.facts["planned_gb"] = round(USABLE * room / 1e9, 2)
        return modes

    owner.load, owner._after_step, owner._make_modes, owner._warn_of_a_slow_rank = loaded, stepped, made, looked


def _be_instant(tokens: int) -> None:
    """Draw and train without a model: what is left of a step is what no GPU does."""
    import torch

    from grpo_core.engines.completions import Drawn
    from grpo_core.engines.native.decode import Decoder
    from grpo_core.engines.native.packed import Packed

    def generate(self: Any, requests: Any, *, tokens: int = tokens, **_: Any) -> list[Any]:
        if not requests:
            return []
        generator = torch.Generator().manual_seed(requests[0].seed % 2**31)
        vocabulary, shape = self._weights.architecture.vocabulary, (len(requests), tokens)
        said = torch.randint(len(SPECIAL), vocabulary, shape, generator=generator).tolist()
        lengths = torch.randint(max(1, tokens // 2), tokens + 1, shape[:1], generator=generator).tolist()
        told = torch.full(shape, -5.0).tolist()
        return [Drawn(s[:n], t[:n]) for s, t, n in zip(said, told, lengths, strict=True)]

    def logprobs(_: Any, _layout: Any, _tokens: Any, targets: torch.Tensor, adapter: Any, *__: Any, **___: Any) -> Any:
        nothing = 0.0 * adapter.leaves[0].sum() if adapter is not None else torch.zeros(())
        values = torch.full(targets.shape, -5.0) + nothing
        return values, values.detach()

    Decoder.generate, Packed.logprobs = generate, logprobs


def _be_slow(factor: float) -> None:
    from grpo_core.engines.native.decode import Decoder
    from grpo_core.engines.native.packed import Packed

    def slowly(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def slower(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            found = original(*arguments, **options)
            time.sleep((factor - 1) * (time.perf_counter() - began))
            return found

        return slower

    Decoder.generate, Packed.logprobs = slowly(Decoder.generate), slowly(Packed.logprobs)


def main() -> int:
    if sys.argv[1:2] == ["--models"]:
        for name in sys.argv[3:]:
            make_model(name, Path(sys.argv[2]) / name)
        return 0
    from grpo_core import __main__ as command

    launcher = command.Launcher
    command.Launcher = lambda started, *arguments, **options: launcher(
        [sys.executable, __file__, *started[3:]], *arguments, **options
    )
    original = command._train

    def train(options: Any, spec: Any, folder: Any, stop: Any, rank: Any) -> int:
        from grpo_core.training import run

        import_engine = run.import_engine

        def imported(name: Any) -> Any:  # when the GPUs of other ranks are hidden; with torch it is too late
            engine = import_engine(name)
            instrument(folder.root, rank.number)
            return engine

        run.import_engine = imported
        return original(options, spec, folder, stop, rank)

    command._train = train
    return command.main()


if __name__ == "__main__":
    sys.exit(main())
