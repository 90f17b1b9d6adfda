"""What ranks tell each other besides their results: how long each one computed."""

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
    time.sleep(0.4 if number else 0.0)
team.agree(False, [])
first = team.worked
team.agree(False, [])
print(json.dumps([first, team.worked]))
"""


def test_every_rank_knows_how_long_each_one_computed(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(number), f"file://{tmp_path}/meeting"], stdout=subprocess.PIPE
        )
        for number in range(2)
    ]
    told = [json.loads(rank.communicate(timeout=patience(60))[0]) for rank in ranks]
    assert told[0] == told[1]
    (quick, slow), after = told[0]
    assert quick < 0.3 < 0.4 <= slow, "waiting for the other is not work"
    assert after == [0.0, 0.0]
