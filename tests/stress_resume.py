"""Each training script, killed with -9 at random moments and resumed, must end with the metrics of a run that
was never stopped, times excepted.

    python tests/stress_resume.py [KILLS [SCRIPT ...]]      20 kills each by default, some minutes a script
"""
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import ROOT, timeless

FLAGS = ["--steps", "30", "--prompts_per_step", "4", "--group_size", "4", "--eval_tasks", "20",
         "--eval_every", "4", "--save_every", "3", "--threads", "1"]


def ends(script: str, folder: Path, flag: str, seconds: float | None = None) -> bool:
    """Runs the script; False if it had to be killed after so many seconds."""
    command = [sys.executable, str(ROOT / script), *FLAGS, "--out", str(folder), flag]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        if child.wait(seconds):
            sys.exit(f"{script} {flag} failed")
        return True
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return False


def stress(script: str, kills: int, root: Path) -> None:
    rng, whole = random.Random(script), root / "whole"
    ends(script, whole, "--overwrite")  # fits what is not in the cache yet
    started = time.time()
    ends(script, whole, "--overwrite")
    seconds, done, resumed = time.time() - started, 0, 0
    while done < kills:
        folder = root / f"killed-{done}"
        if ends(script, folder, "--overwrite", rng.uniform(0.5, 1) * seconds):
            continue  # it was faster this time
        flag = "--resume" if (folder / "state.pt").exists() else "--overwrite"
        ends(script, folder, flag)
        assert timeless(folder) == timeless(whole), f"{folder} differs from {whole}"
        done, resumed = done + 1, resumed + (flag == "--resume")
    print(f"{script}: {done} kills, {resumed} after a checkpoint; the metrics are the same", flush=True)


if __name__ == "__main__":
    count, *scripts = sys.argv[1:] or ["20"]
    with tempfile.TemporaryDirectory() as folder:
        for name in scripts or ["common.py", "sod.py", "srpo.py", "ropd.py"]:
            stress(name, int(count), Path(folder, name))
