"""Accuracy, solved share, entropy and response length of runs over the step, in one picture.

    python tests/experiments/plot.py FILE.png RUN_FOLDER ...
"""
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt


def plot_runs(png: str, folders: list) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.5), layout="tight")
    for folder in folders:
        lines = Path(folder, "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        for axis, key in zip(axes, ("accuracy", "solved", "entropy", "length")):
            wanted = [r for r in records if key in r and ("eval" in r) == (key == "accuracy")]
            axis.plot([r["step"] for r in wanted], [r[key] for r in wanted])
            axis.set(title=key, xlabel="step")
    axes[0].legend([Path(folder).name for folder in folders])
    figure.savefig(png)


if __name__ == "__main__":
    plot_runs(sys.argv[1], sys.argv[2:])
