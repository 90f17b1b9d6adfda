"""A serving process on one CUDA GPU, through the socket that its worker uses: what it answers, how fast, and its end.

`GRPO_TEST_MODEL` names the folder of a chat model in 16 bits. The figures that it prints are for the documentation
(`-s`). With `GRPO_TEST_DEVICE=cpu` the native engine is tried on a CPU, in 32 bits.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from grpo_core.adapters import LocalAdapter, write_index
from grpo_core.hardware.gpus import find_gpus
from grpo_core.run_dir.layout import RunFolder
from grpo_core.serving.wire import SOCKET_VARIABLE, ChatRequest
from grpo_core.spec import JobSpec, parse_spec

MODEL = os.environ.get("GRPO_TEST_MODEL", "")
ON_CPU = os.environ.get("GRPO_TEST_DEVICE") == "cpu"
ENGINES = ("native", "vllm")
RANK = 16
NEAR = 0.25
"""Two likeliest tokens that are nearer than this may change places by rounding to 16 bits."""
QUESTIONS = (
    "What is 17 + 25?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "小明有12个苹果，给了小红5个，还剩几个？",
    "Name three prime numbers above 100.",
)
CLIENTS = (1, 20, 60 if ON_CPU else 100)
TOKENS = 64

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not MODEL, reason="needs GRPO_TEST_MODEL"),
    pytest.mark.skipif(not ON_CPU and len(find_gpus()) == 0, reason="no CUDA GPU"),
]


def spec_for(engine: str) -> JobSpec:
    return parse_spec(
        {
            "kind": "serving",
            "serving": {"engine": engine},
            "model": {"name": Path(MODEL).name, "max_sequence": 512, "precision": "auto" if ON_CPU else "16bit"},
            "lora": {"rank": RANK, "alpha": RANK},
            "sampling": {"max_prompt_tokens": 128, "max_completion_tokens": 64},
            "data": {"system_prompt": ""},
            "resources": {"gpus": 0 if ON_CPU else 1},
        }
    )


def make_adapters(folder: Path, spec: JobSpec) -> list[LocalAdapter]:
    """Two adapters of random values, as PEFT stores them."""
    import torch
    from safetensors.torch import save_file

    from grpo_core.engines.native.adapter import Adapter
    from grpo_core.engines.native.architecture import read_architecture

    architecture = read_architecture(Path(MODEL))
    made = Adapter(architecture, rank=RANK, scale=1.0, targets=spec.lora.target_modules, device=torch.device("cpu"))
    generator, adapters = torch.Generator().manual_seed(0), list[LocalAdapter]()
    for name, step in (("main", None), ("step-25", 25)):
        tensors = {
            key: torch.randn(view.shape, generator=generator) * (0.02 if ".lora_B." in key else view.shape[1] ** -0.5)
            for layer in range(architecture.layers)
            for key, view in made.named(layer).items()
        }
        adapter = LocalAdapter(name=name, step=step, folder=folder / name)
        adapter.folder.mkdir(parents=True)
        save_file(tensors, adapter.weights)
        adapters.append(adapter)
    write_index(folder, adapters)
    return adapters


@dataclass
class Answer:
    """What came back for one request."""

    first: float
    """Seconds until the first piece."""
    seconds: float
    pieces: list[dict[str, Any]]

    @property
    def text(self) -> str:
        return "".join(piece.get("text", "") for piece in self.pieces)

    @property
    def tokens(self) -> int:
        assert "done" in self.pieces[-1], self.pieces[-1]
        return self.pieces[-1]["done"]["completion_tokens"]


class Session:
    """A serving process, and this end of its socket."""

    def __init__(self, engine: str, root: Path) -> None:
        self.spec, self.folder = spec_for(engine), RunFolder(root)
        self.adapters = make_adapters(self.folder.adapters, self.spec)
        (root / "spec.json").write_text(json.dumps(self.spec.as_dict()))
        self.free_before = free_memory()
        self._socket, theirs = socket.socketpair()
        command = [sys.executable, "-m", "grpo_core", "train", str(root / "spec.json"), "--out", str(root)]
        environment = {
            **os.environ,
            SOCKET_VARIABLE: str(theirs.fileno()),
            "GRPO_MODEL_DIR": str(Path(MODEL).parent),
            "PYTHONUNBUFFERED": "1",
        }
        self.began = time.perf_counter()
        self.process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
        theirs.close()
        self.queues: defaultdict[str, queue.SimpleQueue[dict[str, Any]]] = defaultdict(queue.SimpleQueue)
        waiting = self.queues["ready"]
        self._lock, self._asked = threading.Lock(), 0
        self.begun = threading.Event()
        """Set by the first piece of an answer since it was cleared."""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.ready = waiting.get(timeout=300)
        if "error" in self.ready:
            self.close()
            raise AssertionError(f"the process ended: {self.folder.events.read_text()[-3000:]}")
        self.seconds = time.perf_counter() - self.began

    def _read(self) -> None:
        with self._socket.makefile("rb") as lines:
            for line in lines:
                message = json.loads(line)
                if "ready" in message:
                    self.queues["ready"].put(message["ready"])
                for piece in message.get("pieces", ()):
                    self.begun.set()
                    self.queues[piece["id"]].put(piece)
        for waiting in list(self.queues.values()):
            waiting.put({"error": "the process has ended"})

    def send(self, message: dict[str, Any]) -> None:
        with self._lock:
            self._socket.sendall(f"{json.dumps(message)}\n".encode())

    def ask(self, question: str, adapter: str = "base", **options: Any) -> Answer:
        with self._lock:
            self._asked += 1
            name = f"r{self._asked}"
        given: dict[str, Any] = {"temperature": 0.0, "max_tokens": TOKENS, **options}
        request = ChatRequest(id=name, adapter=adapter, messages=({"role": "user", "content": question},), **given)
        began, pieces = time.perf_counter(), list[dict[str, Any]]()
        self.send({"ask": request.as_dict()})
        first = 0.0
        while not pieces or not ("done" in pieces[-1] or "error" in pieces[-1]):
            pieces.append(self.queues[name].get(timeout=120))
            first = first or time.perf_counter() - began
        return Answer(first, time.perf_counter() - began, pieces)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self._socket.close()

    def end(self) -> int:
        self.send({"end": {"reason": "ttl", "message": "", "seconds": 10}})
        return self.process.wait(timeout=60)


def free_memory() -> int:
    if ON_CPU:
        return 0
    first = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0]
    asked = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", f"--id={first}"]
    return int(subprocess.run(asked, capture_output=True, text=True, check=True).stdout) * 2**20


def own_memory() -> int:
    """What this process holds of the GPU, but for its context."""
    import torch

    return 0 if ON_CPU else torch.cuda.memory_reserved()


@pytest.fixture(scope="module", params=ENGINES)
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    engine: str = request.param
    if engine == "vllm" and (ON_CPU or importlib.util.find_spec("vllm") is None):
        pytest.skip("needs vllm and a GPU")
    session = Session(engine, tmp_path_factory.mktemp(engine))
    print(f"\n{engine}: ready after {session.seconds:.1f} s, context {session.ready['context']}")
    try:
        yield session
        require_a_clean_end(session)
    finally:
        session.close()


def require_a_clean_end(session: Session) -> None:
    """At its end a session finishes what is under way, exits with 0 and leaves nothing on the GPU."""
    answers = list[Answer]()
    asking = threading.Thread(target=lambda: answers.append(session.ask(QUESTIONS[1])))
    used = session.free_before - free_memory()
    session.begun.clear()
    asking.start()
    session.begun.wait(60)
    assert session.end() == 0
    asking.join()
    assert answers[0].tokens > 0
    given_back = used - (session.free_before - free_memory())
    print(f"\n{given_back / 2**30:.1f} GiB given back at the end")
    assert ON_CPU or given_back > 2**30


def test_it_says_what_it_serves(session: Session) -> None:
    assert session.ready["engine"] == session.spec.serving.engine
    assert session.ready["models"] == ["main", "step-25", "base"]


def ask_together(session: Session, clients: int) -> tuple[list[Answer], float]:
    """The answers to so many clients at once, and the seconds until the last one ended."""
    adapters = ("base", "main", "step-25")

    def ask(at: int) -> Answer:
        return session.ask(f"Count from {at} to 500, one number a line.", adapters[at % 3])

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(ask, range(clients)))
    return answers, time.perf_counter() - began


def test_how_fast_it_answers(session: Session) -> None:
    for clients in CLIENTS:
        ask_together(session, clients)  # kernels are compiled and graphs captured
        answers, seconds = ask_together(session, clients)
        firsts = sorted(answer.first for answer in answers)
        rate = sum(answer.tokens for answer in answers) / seconds
        print(
            f"\n{clients} clients: {rate:.0f} tokens/s; first token after "
            f"{1000 * statistics.median(firsts):.0f} ms (median), {1000 * firsts[-1]:.0f} ms (last)"
        )
    print(f"\n{(session.free_before - free_memory() - own_memory()) / 2**30:.1f} GiB of the GPU in use")


@pytest.fixture(scope="module")
def reference(session: Session) -> Iterator[Any]:
    """Transformers and PEFT with the same adapters."""
    import torch
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if ON_CPU else torch.bfloat16
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(session.spec.lora.target_modules))
    model: Any = get_peft_model(base, config, adapter_name="main")
    model.add_adapter("step-25", config)
    for adapter in session.adapters:
        set_peft_model_state_dict(model, load_file(adapter.weights), adapter_name=adapter.name)
    model = model.to("cpu" if ON_CPU else "cuda", dtype).eval()
    yield model
    del model, base
    if not ON_CPU:
        torch.cuda.empty_cache()


def test_greedy_answers_are_those_of_transformers_and_peft(session: Session, reference: Any) -> None:
    import torch

    from grpo_core.datasets.templates import encode
    from grpo_core.engines.pretrained import load_tokenizer
    from grpo_core.hardware.models import ModelFiles

    tokenizer = load_tokenizer(ModelFiles("model", None, "folder", Path(MODEL), 0))
    differences, whole, texts = list[float](), 0, defaultdict[str, list[str]](list)
    for adapter in ("base", "main", "step-25"):
        if adapter != "base":
            reference.set_adapter(adapter)
        for question in QUESTIONS:
            answer = session.ask(question, adapter, logprobs=2)
            texts[adapter].append(answer.text)
            told = [one for piece in answer.pieces for one in piece.get("logprobs", ())]
            (prompt,) = encode(tokenizer, [[{"role": "user", "content": question}]])
            ids, same = list(prompt), True
            for one in told:
                if one["bytes"] is None:
                    break  # a part of a character does not say which token it is
                given = torch.tensor([ids], device=reference.device)
                with torch.no_grad():
                    if adapter == "base":
                        with reference.disable_adapter():
                            logits = reference(input_ids=given, logits_to_keep=1).logits[0, -1].float()
                    else:
                        logits = reference(input_ids=given, logits_to_keep=1).logits[0, -1].float()
                logprobs = logits.log_softmax(0)
                best = logprobs.topk(8)
                chosen = next((t for t in best.indices.tolist() if tokenizer.decode([t]) == one["token"]), None)
                assert chosen is not None, (adapter, question, one)
                same = same and chosen == int(best.indices[0])
                assert float(best.values[0] - logprobs[chosen]) < NEAR, (adapter, question, one)
                differences.append(abs(float(logprobs[chosen]) - one["logprob"]))
                ids.append(chosen)
            whole += same
    assert texts["base"] != texts["main"]
    assert texts["main"] != texts["step-25"]
    mean, most = statistics.mean(differences), max(differences)
    print(f"\n{whole} of {3 * len(QUESTIONS)} answers token for token")
    print(f"log-probabilities {mean:.4f} apart, at most {most:.3f}")
    assert mean < (1e-3 if ON_CPU else 0.03)
    assert whole >= len(QUESTIONS)


def test_choices_are_those_of_their_seed_and_end_at_a_stop_text(session: Session) -> None:
    first = session.ask(QUESTIONS[1], "main", n=3, seed=7, temperature=1.0)
    again = session.ask(QUESTIONS[1], "main", n=3, seed=7, temperature=1.0)
    texts = [[p.get("text", "") for p in answer.pieces if p.get("index") == 1] for answer in (first, again)]
    assert "".join(texts[0])[:20] == "".join(texts[1])[:20]  # later tokens may differ by rounding
    assert len({tuple(p["text"] for p in first.pieces if p.get("index") == at) for at in range(3)}) == 3
    whole = session.ask(QUESTIONS[0], "step-25").text
    stop = whole[len(whole) // 2 :][:3]
    cut = session.ask(QUESTIONS[0], "step-25", stop=(stop,))
    assert cut.text == whole[: whole.index(stop)]


def test_a_cancelled_answer_ends_and_others_go_on(session: Session) -> None:
    request = ChatRequest(id="gone", adapter="base", messages=({"role": "user", "content": "x"},), max_tokens=400, n=8)
    session.send({"ask": request.as_dict()})
    session.queues["gone"].get(timeout=60)
    session.send({"cancel": "gone"})
    assert session.ask(QUESTIONS[0]).tokens > 0
