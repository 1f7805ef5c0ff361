"""Each training script, killed with -9 at random moments and resumed, must end with the metrics of a run that
was never stopped, times excepted.

    python tests/stress_resume.py [KILLS [SCRIPT ...]]      20 kills each by default, some minutes a script
"""
import contextlib
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import ROOT, timeless

FLAGS = ["--steps", "30", "--prompts_per_step", "4", "--group_size", "4", "--eval_tasks", "20",
         "--eval_every", "4", "--save_every", "3", "--threads", "1"]


def execute(script: str, folder: Path, flag: str, seconds: float | None = None) -> None:
    """Runs the script, or kills it (-9) after so many seconds."""
    command = [sys.executable, str(ROOT / script), *FLAGS, "--out", str(folder), flag]
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True, timeout=seconds)


def stress(script: str, kills: int, root: Path) -> None:
    rng, whole, killed, resumed = random.Random(script), root / "whole", 0, 0
    execute(script, whole, "--overwrite")  # fits what is not in the cache yet
    started = time.time()
    execute(script, whole, "--overwrite")
    seconds = time.time() - started
    for i in range(kills):
        folder = root / f"killed-{i}"
        execute(script, folder, "--overwrite", rng.uniform(0.5, 0.95) * seconds)
        killed += not (folder / "summary.json").exists()  # or it was faster this time
        flag = "--resume" if (folder / "state.pt").exists() else "--overwrite"
        execute(script, folder, flag)
        assert timeless(folder) == timeless(whole), f"{folder} differs from {whole}"
        resumed += flag == "--resume"
    print(f"{script}: {killed} of {kills} killed, {resumed} resumed; the metrics are the same", flush=True)


if __name__ == "__main__":
    count, *scripts = sys.argv[1:] or ["20"]
    with tempfile.TemporaryDirectory() as folder:
        for name in scripts or ["common.py", "sod.py", "srpo.py", "ropd.py"]:
            stress(name, int(count), Path(folder, name))
