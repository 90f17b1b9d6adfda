"""A launcher for workers that serve both: the real engine for jobs whose metadata say so, else the fake trainer."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    arguments = sys.argv[1:]
    spec = json.loads(Path(arguments[0]).read_text())
    fake = Path(__file__).resolve().parents[1] / "fake_trainer.py"
    program = ["-m", "grpo_core", "train"] if spec["metadata"].get("trainer") == "real" else [str(fake)]
    os.execv(sys.executable, [sys.executable, *program, *arguments])
