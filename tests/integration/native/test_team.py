"""What ranks tell each other besides their results: how long each one computed, and the texts that each one decoded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.clock import patience

RANK = """
import json, sys, time
import torch
from grpo_core.engines.team import Team
from grpo_core.ranks import Rank
number, address = int(sys.argv[1]), sys.argv[2]
team = Team(Rank(number, 2, address), torch.device("cpu"))
with team.working():
    with team.working():
        time.sleep(0.4 if number else 0.0)
    team.exchange(0)
    with team.apart():
        time.sleep(0.0 if number else 0.6)
    team.exchange(0)
team.agree(False, [])
first = team.worked
team.agree(False, [])
rows = [[104, 228], [], [0x20ac], [0xd800], [98] * 5]
texts = team.texts(rows, lambda rows: ["".join(map(chr, row)) for row in rows])
print(json.dumps([first, team.worked, texts, team.texts([[]], lambda rows: [""] * len(rows))]))
"""


def test_every_rank_knows_how_long_each_one_computed_and_every_text(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(number), f"file://{tmp_path}/meeting"], stdout=subprocess.PIPE
        )
        for number in range(2)
    ]
    told = [json.loads(rank.communicate(timeout=patience(60))[0]) for rank in ranks]
    assert told[0] == told[1]
    (quick, slow), after, texts, none = told[0]
    assert quick < 0.3 < 0.4 <= slow < 0.7, "waiting for the other is not work, and what one does alone neither"
    assert after == [0.0, 0.0]
    assert (texts, none) == (["hä", "", "€", "\ud800", "bbbbb"], [""])
