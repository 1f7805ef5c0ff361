"""Each training script, killed with -9 at random moments and resumed, must end with the metrics of a run that
was never stopped, times excepted.

    python tests/experiments/stress_resume.py [KILLS [SCRIPT ...]]      20 kills each; minutes a script
"""
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import ROOT, timeless

FLAGS = ["--steps", "12", "--prompts_per_step", "4", "--group_size", "4", "--eval_tasks", "20",
         "--eval_every", "3", "--save_every", "2", "--threads", "1"]


def execute(script: str, folder: Path, flag: str, lines: int = 0, more: float = 0.0) -> bool:
    """Runs the script; with `lines`, kills it (-9) when its log has so many and `more` seconds have gone by:
    a moment that does not depend on how busy the machine is. -> was it killed?"""
    child = subprocess.Popen([sys.executable, str(ROOT / script), *FLAGS, "--out", str(folder), flag],
                             stdout=subprocess.DEVNULL)
    log = folder / "metrics.jsonl"
    while lines and child.poll() is None:
        if log.exists() and log.read_bytes().count(b"\n") >= lines:
            time.sleep(more)
            child.kill()
            break
        time.sleep(0.01)
    assert child.wait() in (0, -9), f"{script} failed"
    return child.returncode == -9


def stress(script: str, kills: int, root: Path) -> None:
    rng, whole, killed, resumed = random.Random(script), root / "whole", 0, 0
    execute(script, whole, "--overwrite")
    for i in range(kills):
        folder = root / f"killed-{i}"
        killed += execute(script, folder, "--overwrite", rng.randrange(2, 16), rng.uniform(0, 0.3))
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
