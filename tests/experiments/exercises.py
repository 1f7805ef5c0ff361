"""README's exercises, applied to the methods as a reader would, on two seeds each; prints the tables.

    python tests/experiments/exercises.py [NAME ...] [--seeds 2]      one to three minutes a run; no name: all of them

A run's folder is runs/exercises/NAME-...; finished runs are taken if flags and code are the same.
"""
import argparse
import contextlib
import dataclasses
import functools
import json
import math
import random
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common
import ropd
import sod
import srpo


# ----------------------------------------------------------------------------------------- what a reader changes
def exponential(d: list[float], first_error: int, delta: float) -> list[float]:
    """w_k = exp(-d_k), not relative to the first turn."""
    return [math.exp(-d_k) for d_k in d]


def turned_around(judge, share: float = 0.25):
    """The judge, with so many of its verdicts turned around."""
    def noisy(conversations, **sampling):
        replies = []
        for reply in map(json.loads, judge(conversations, **sampling)):
            rng = random.Random(json.dumps(reply))
            for answer in reply.get("answers", []):
                answer["judgement"] = [yes != (rng.random() < share) for yes in answer["judgement"]]
            replies.append(json.dumps(reply))
        return replies
    return noisy


def reverse_kl(logps, teacher_logps):
    """KL(student || teacher), (n, V) each -> (n,)."""
    return (logps.exp() * (logps - teacher_logps.clamp(min=-1e4))).sum(-1)


def without(bank: dict, words: str) -> dict:
    return {sentence: check for sentence, check in bank.items() if words not in sentence}


DECOY = {"Some digit appears more than three times.": lambda answer: any(answer.text.count(c) > 3 for c in "0123456789")}
# exercise: script, [(row of its table, flags, (owner, attribute, what it becomes) or None)]
EXERCISES = {
    "sod-weights": (sod, [
        ("`divergence_ratio`: SOD", {}, None),
        ("`uniform`: every turn alike", {}, (sod.METHODS, "sod", (sod.uniform, 1, 1))),
        ("exp(-d_k)", {}, (sod.METHODS, "sod", (exponential, 1, 1)))]),
    "sod-teacher": (sod, [
        ("SOD, the teacher knows time-outs", {"teacher_knows_timeouts": True}, None),
        ("uniform, the teacher knows time-outs", {"teacher_knows_timeouts": True, "method": "opd_grpo"}, None)]),
    "sod-outcome": (sod, [("SOD without the outcome", {"method": "sod_no_grpo"}, None)]),
    "ropd-truth": (ropd, [
        ("as it is", {}, None),
        ("no criterion asks for the truth", {}, (ropd, "BANK", without(ropd.BANK, "is true modulo")))]),
    "ropd-noise": (ropd, [
        ("a quarter of the verdicts turned around", {}, (ropd, "symbolic_judge", turned_around(ropd.symbolic_judge)))]),
    "ropd-decoy": (ropd, [("a criterion that means nothing", {}, (ropd, "BANK", {**ropd.BANK, **DECOY}))]),
    "srpo-teacher": (srpo, [
        ("SRPO", {}, None), ("frozen teacher", {"ema": 0.0}, None), ("live teacher", {"ema": 1.0}, None)]),
    "srpo-divergence": (srpo, [("reverse KL, a quarter of the rate", {"lr": 5e-5}, (srpo, "jsd", reverse_kl))]),
    "srpo-rate": (srpo, [("GRPO at SRPO's rate", {"method": "grpo", "lr": 2e-4}, None)]),
}


@contextlib.contextmanager
def changed(patch):
    owner, name, value = patch or ({}, "nothing", None)
    how = mock.patch.dict(owner, {name: value}) if isinstance(owner, dict) else mock.patch.object(owner, name, value)
    with how:
        yield


def run(script, row: str, flags: dict, patch, seed: int, folder: Path) -> dict:
    config = script.Config(**{**flags, "seed": seed, "show_every": 0, "out": str(folder)})
    finished = common.finished_cell(config, script.__name__)
    if finished:
        return finished
    with changed(patch):
        return script.train(config)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(EXERCISES))
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    columns = {"accuracy_after": "T = 1", "greedy_accuracy_after": "greedy", "accuracy_best": "best, T = 1",
               "last_reward": "reward of the last step"}
    for name in args.names or EXERCISES:
        script, rows = EXERCISES[name]
        summaries = {}
        for row, flags, patch in rows:
            summaries[row] = []
            for seed in range(args.seeds):
                words = "-".join("".join(c if c.isalnum() else " " for c in row).split())
                folder = Path("runs/exercises", f"{name}-{words}-s{seed}")
                summary = run(script, row, flags, patch, seed, folder)
                lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
                rewards = [line["reward"] for line in lines if line.get("reward") is not None]
                summaries[row].append({**summary, "last_reward": rewards[-1] if rewards else None})
        print(f"\n{name}, {args.seeds} seeds\n{common.seed_table(summaries, columns)}", flush=True)


if __name__ == "__main__":
    main()
