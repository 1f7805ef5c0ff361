"""The figures of README, from runs on disk; SVG, readable in black and white.

    python sod.py --compare --seeds 5 --methods sod opd_grpo grpo
    python ropd.py --compare --methods ropd; python srpo.py --compare --methods srpo sdpo
    python tests/experiments/exercises.py ropd-truth; python tests/experiments/bench_srpo_worlds.py unripe
    python tests/experiments/figures.py [NAME ...]      into tests/experiments/figures/; no name: all of them
"""
import json
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common
import sod

matplotlib.use("svg")
plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                     "grid.color": "0.9", "savefig.facecolor": "white", "svg.fonttype": "none",
                     "svg.hashsalt": "figures"})
OUT = Path(__file__).parent / "figures"
STYLES = [{"color": "black", "ls": "-"}, {"color": "tab:blue", "ls": "--"}, {"color": "tab:red", "ls": ":"},
          {"color": "tab:green", "ls": "-."}]


def curve(pattern: str, key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Step, mean and standard deviation over the seeds' runs of a figure in metrics.jsonl."""
    runs = []
    for folder in sorted(path.parent for path in Path("runs").glob(f"{pattern}/summary.json")):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        wanted = [line for line in lines if line.get(key) is not None and line.get("eval") != "after"]
        wanted = [line for line in wanted if ("eval" in line) == (key == "accuracy")]
        runs.append({line["step"]: line[key] for line in wanted})
    if not runs:
        sys.exit(f"no run in runs/{pattern}; the docstring of figures.py says what makes it")
    steps = sorted(set.intersection(*map(set, runs)))
    values = np.array([[run[step] for step in steps] for run in runs])
    return np.array(steps), values.mean(0), values.std(0)


def smooth(values: np.ndarray, width: int = 10) -> np.ndarray:
    """Mean of the last ten steps."""
    return np.array([values[max(0, i - width + 1):i + 1].mean() for i in range(len(values))])


def draw(axis, pattern: str, key: str, label: str, style: dict, width: int = 1) -> None:
    steps, mean, spread = curve(pattern, key)
    some = slice(None, None, max(1, len(steps) // 40))  # for the file's size
    axis.plot(steps[some], smooth(mean, width)[some], label=label, lw=1.6, **style)
    axis.fill_between(steps[some], smooth(mean - spread, width)[some], smooth(mean + spread, width)[some],
                      color=style["color"], alpha=0.12, lw=0)


def sod_rollout() -> None:
    """One rollout as a strip: sampled and given tokens, turns with d_k and w_k, the failed call."""
    config = sod.Config()
    teacher, tok, tasks, rollouts = sod.first_rollouts(config, 200)
    teacher_logps, _ = common.score(teacher, rollouts)

    def shows(i):  # the first in which one call times out, not the first one, and the next turn counts less
        status = rollouts.tool_status[i]
        failed = [k for k in range(len(status)) if status[k] not in ("ok", "none")]
        d = sod.step_divergence(rollouts.logps[i], teacher_logps[i], rollouts.turns[i])
        if len(failed) != 1 or not 0 < failed[0] < len(d) - 1 or status[failed[0]] != "timeout":
            return False
        return sod.step_weights(d)[failed[0] + 1] < 0.8
    i = next(i for i in range(len(tasks)) if shows(i))
    turns, status = rollouts.turns[i], rollouts.tool_status[i]
    d = sod.step_divergence(rollouts.logps[i], teacher_logps[i], turns)
    weights = sod.step_weights(d, config.delta)
    gap = (teacher_logps - rollouts.logps)[i].tolist()
    begin, end = turns[0][0], turns[-1][1]
    top = max(abs(g) for g in gap[begin:end])
    figure, axis = plt.subplots(figsize=(9, 2.6), layout="tight")
    axis.grid(False)
    for t in range(begin, end):
        sampled = bool(rollouts.mask[i, t])
        axis.bar(t - begin, abs(gap[t]) if sampled else 0.0, width=0.8, color="0.35")
        look = {"color": "white"} if sampled else {"color": "0.8", "hatch": "////"}
        axis.bar(t - begin, -0.1 * top, width=0.9, edgecolor="0.4", lw=0.6, **look)
    for k, (start, stop) in enumerate(turns):
        failed = "\ntimes out" if status[k] in ("error", "timeout") else ""
        text = f"turn {k + 1}{failed}\n$d$ = {d[k]:.2f}\n$w$ = {weights[k]:.2f}"
        axis.text((start + stop) / 2 - begin - 0.5, 1.7 * top, text, ha="center", va="top",
                  weight="bold" if failed else "normal")
    axis.set(ylim=(-0.12 * top, 1.75 * top), xlim=(-1, end - begin), ylabel="|teacher - student|, nats",
             xlabel="token (white: sampled, hatched: the tool's message)")
    save(figure, "sod-rollout")


def sod_curves() -> None:
    figure, axis = plt.subplots(figsize=(5, 3), layout="tight")
    for (method, label), style in zip((("sod", "SOD"), ("opd_grpo", "OPD + GRPO"), ("grpo", "GRPO")), STYLES):
        draw(axis, f"sod-compare/{method}-s*", "solved", label, style, width=10)
    axis.set(xlabel="step", ylabel="solved (mean of ten steps)", ylim=(0, 1))
    axis.legend(frameon=False)
    save(figure, "sod-curves")


def ropd_truth() -> None:
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.8), layout="tight", sharey=True)
    patterns = ("ropd-compare/ropd-s[01]", "exercises/ropd-truth-no-criterion-asks-for-the-truth-s[01]")
    titles = ("the rubric as it is", "no criterion asks for the truth")
    for axis, pattern, title in zip(axes, patterns, titles):
        for key, style in zip(("reward", "solved"), STYLES):
            draw(axis, pattern, key, key, style, width=10)
        axis.set(xlabel="step", title=title, ylim=(0, 1.02))
    axes[0].legend(frameon=False)
    save(figure, "ropd-truth")


def srpo_collapse() -> None:
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), layout="tight")
    for axis, folder, key, title in zip(axes, ("srpo-compare", "worlds/unripe", "worlds/unripe"),
                                        ("accuracy", "accuracy", "teacher H"),
                                        ("accuracy: the base only slips", "accuracy: it lacks knowledge",
                                         "then: teacher's entropy, nats")):
        for (cell, label), style in zip((("srpo", "SRPO"), ("sdpo", "SDPO")), STYLES):
            name = cell if folder == "srpo-compare" else f"{cell}-*"
            draw(axis, f"{folder}/{name}-s?", key, label, style, width=1 if key == "accuracy" else 5)
        axis.set(xlabel="step", title=title, ylim=(0, 1 if key == "accuracy" else None))
    axes[0].legend(frameon=False)
    save(figure, "srpo-collapse")


def save(figure, name: str) -> None:
    OUT.mkdir(exist_ok=True)
    path = OUT / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


FIGURES = {"sod-rollout": sod_rollout, "sod-curves": sod_curves, "ropd-truth": ropd_truth,
           "srpo-collapse": srpo_collapse}

if __name__ == "__main__":
    for name in sys.argv[1:] or FIGURES:
        FIGURES[name]()
