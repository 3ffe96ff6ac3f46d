"""Every benchmark in turn; each writes JSON into build/bench.

Run as: python benchmarks/run.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
OUT = HERE.parent / "build" / "bench"


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, HERE / "expert_gemv.py", "--out", OUT / "expert_gemv.json"], check=True)
    artifact = OUT / "demo-moe-13m"
    cfmoe = [sys.executable, "-m", "cfmoe.cli"]
    subprocess.run([*cfmoe, "compile", HERE.parent / "assets" / "demo-moe-13m", "--out", artifact, "--force"], check=True)
    budgets = "100%,50%,25%"
    command = [*cfmoe, "bench", artifact, "--memory-budget", budgets, "--threads", "1,2", "--prompt-tokens", "512", "--json"]
    result = subprocess.run(command, check=True, capture_output=True)
    (OUT / "engine.json").write_bytes(result.stdout)
    print(f"wrote {OUT}/expert_gemv.json and {OUT}/engine.json")


if __name__ == "__main__":
    main()
