"""Chat templates of other people's making, rendered by the real library: a good one is read, a bad one is bounded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

RENDER = """
import json, resource, sys
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from grpo_core.datasets import templates
from grpo_core.errors import JobFailure

templates.SECONDS, templates.ROOM_BYTES = 1, 256 * 1024**2
words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
told = []
for template in json.loads(sys.argv[1]):
    tokenizer.chat_template = template
    try:
        told.append(templates.encode(tokenizer, [[{"role": "user", "content": c}] for c in ("a b", "b")]))
    except JobFailure as failure:
        told.append([failure.report.failure_class, failure.report.code, failure.report.hint != ""])
# Not getrusage's, which begins with the peak of the process that started this one.
status = open("/proc/self/status").read()
grown = int(status.partition("VmHWM:")[2].split()[0])
limits = resource.getrlimit(resource.RLIMIT_AS)
print(json.dumps([told, grown, limits[0] == resource.RLIM_INFINITY]))
"""

GOOD = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}b{% endif %}"
LARGE = [
    "{{ 'a' * 10**10 }}",
    "{{ 'a'.center(10**10) }}",
    "{{ '%10000000000d' % 1 }}",
    "{% set ns = namespace(x='a' * 1000) %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{{ ('a' * 100000) | replace('a', 'a' * 100000) }}",
    "{{ 'a' * 10**7 }}",
]
SLOW = ["{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"]
BROKEN = [
    "{{ raise_exception('no system message, please') }}",
    "{% for %}",
    "{{ 1 + 'a' }}",
    "{{ messages.x.y }}",
    "{% include '/etc/passwd' %}",
    "{% import 'http://127.0.0.1/x' as x %}",
    "{{ ''.__class__.__mro__ }}",
]


def test_a_template_takes_a_bounded_amount_of_memory_and_time() -> None:
    templates = [GOOD, *LARGE, *SLOW, *BROKEN, GOOD]
    done = subprocess.run(
        [sys.executable, "-c", RENDER, json.dumps(templates)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    told, kilobytes, is_unlimited = json.loads(done.stdout.splitlines()[-1])
    good = [[0, 1, 1], [1, 1]]
    large, slow, broken = told[1:7], told[7:8], told[8:-1]
    assert told[0] == told[-1] == good
    assert large == [["user_config", "chat_template_too_large", True]] * len(LARGE)
    assert slow == [["user_config", "chat_template_too_large", True]]
    # What is not defined is empty text in a template, and no error.
    assert [one for one in broken if one != [[], []]] == [["user_config", "chat_template_failed", True]] * len(BROKEN)
    assert kilobytes < 1_500_000
    assert is_unlimited
