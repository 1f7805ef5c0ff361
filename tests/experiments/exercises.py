"""README's exercises, applied to the methods as a reader would, on two seeds each; prints the tables.

    python tests/experiments/exercises.py [NAME ...] [--seeds 2]      minutes a run; no name: all of them

A run that is a cell of `--compare` lies in runs/<script>-compare, every other one in runs/exercises. A
finished run of an unchanged method is taken if flags and code are the same; a changed method is always
trained again.
The exercises of dcpm.py take two sets of 24 personas.
"""
import argparse
import contextlib
import json
import math
import random
import sys
from pathlib import Path
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common
import dcpm
import ropd
import sod
import srpo


# ------------------------------------------------------------------------------- what a reader changes
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
    """A quarter of KL(student || teacher), (n, V) each -> (n,): close to the teacher as steep as the JSD, so
    that GRPO's part of the sum keeps its share. A smaller rate would not do it: Adam divides by the size."""
    return 0.25 * (logps.exp() * (logps - teacher_logps.clamp(min=-1e4))).sum(-1)


def without(bank: dict, words: str) -> dict:
    return {sentence: check for sentence, check in bank.items() if words not in sentence}


def repeats_a_digit(answer) -> bool:
    return any(answer.text.count(digit) > 3 for digit in "0123456789")


DECOY = {"Some digit appears more than three times.": repeats_a_digit}
NOISY = turned_around(ropd.symbolic_judge)
KNOWS = {"teacher_knows_timeouts": True}
# exercise: script, [(row of its table, flags, (owner, attribute, what it becomes) or None)]
EXERCISES = {
    "sod-weights": (sod, [
        ("`divergence_ratio`: SOD", {}, None),
        ("`uniform`: opd_grpo", {"method": "opd_grpo"}, None),
        ("exp(-d_k)", {}, (sod.METHODS, "sod", (exponential, 1, 1)))]),
    "sod-teacher": (sod, [
        ("SOD, blind teacher", {}, None), ("uniform, blind teacher", {"method": "opd_grpo"}, None),
        ("SOD, the teacher knows time-outs", KNOWS, None),
        ("uniform, the teacher knows time-outs", {**KNOWS, "method": "opd_grpo"}, None)]),
    "sod-outcome": (sod, [("SOD", {}, None), ("SOD without the outcome", {"method": "sod_no_grpo"}, None)]),
    "ropd-truth": (ropd, [
        ("as it is", {}, None),
        ("no criterion asks for the truth", {}, (ropd, "BANK", without(ropd.BANK, "is true modulo")))]),
    "ropd-noise": (ropd, [
        ("as it is", {}, None),
        ("a quarter of the verdicts turned around", {}, (ropd, "symbolic_judge", NOISY))]),
    "ropd-decoy": (ropd, [
        ("as it is", {}, None),
        ("a criterion that means nothing", {}, (ropd, "BANK", {**ropd.BANK, **DECOY}))]),
    "srpo-teacher": (srpo, [
        ("SRPO", {}, None), ("frozen teacher", {"ema": 0.0}, None), ("live teacher", {"ema": 1.0}, None)]),
    "srpo-divergence": (srpo, [
        ("SRPO", {}, None), ("reverse KL, a quarter of it", {}, (srpo, "jsd", reverse_kl))]),
    "srpo-rate": (srpo, [
        ("SRPO", {}, None), ("GRPO at SRPO's rate", {"method": "grpo", "lr": 2e-4}, None),
        ("GRPO at its own", {"method": "grpo"}, None)]),
}
COLOUR = "favourite_colour | one | + my favourite colou?r is VALUE | favourite colou?r"
# exercise of dcpm.py: (owner, attribute, what it becomes)
OF_MEMORY = {"dcpm-nothing-collides": (dcpm.LIMITS, "words", dcpm.LIMITS["words"]._replace(alike=1.1)),
             "dcpm-one-line": (dcpm, "SCHEMA_LINES", 1),
             "dcpm-colour": (dcpm, "ATTRIBUTES", {**dcpm.read_table(COLOUR), **dcpm.ATTRIBUTES})}


@contextlib.contextmanager
def changed(patch):
    owner, name, value = patch or ({}, "nothing", None)
    if isinstance(owner, dict):
        how = mock.patch.dict(owner, {name: value})
    else:
        how = mock.patch.object(owner, name, value)
    with how:
        yield


def folder_of(script, name: str, row: str, flags: dict, patch, seed: int) -> Path:
    if patch is None and set(flags) <= {"method", "lr"}:  # as `--compare` names it
        method = flags.get("method", script.__name__)
        rate = f"-lr-{flags['lr']:g}".replace(".", "-") if "lr" in flags else ""
        return Path(f"runs/{script.__name__}-compare", f"{method}{rate}-s{seed}")
    words = "-".join("".join(c if c.isalnum() else " " for c in row).split())
    return Path("runs/exercises", f"{name}-{words}-s{seed}")


def run(script, flags: dict, patch, seed: int, folder: Path) -> dict:
    gate = {"gate_tasks": 0} if script is srpo else {}
    config = script.Config(**{**flags, **gate, "seed": seed, "show_every": 0, "out": str(folder)})
    if patch is None:
        finished = common.finished_cell(config, script.__name__)
        if finished:
            return finished
    else:
        config.overwrite = True  # a fingerprint does not know what this file changes
    with changed(patch):
        return script.train(config)


def training_exercise(name: str, seeds: int) -> str:
    columns = {"accuracy_after": "T = 1", "greedy_accuracy_after": "greedy", "accuracy_best": "best, T = 1",
               "last_reward": "reward, last 10 steps"}
    script, rows = EXERCISES[name]
    summaries = {}
    for row, flags, patch in rows:
        summaries[row] = []
        for seed in range(seeds):
            folder = folder_of(script, name, row, flags, patch, seed)
            summary = run(script, flags, patch, seed, folder)
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            rewards = [line.get("reward", line["solved"]) for line in lines if "grad" in line]
            summaries[row].append({**summary, "last_reward": np.mean(rewards[-10:])})
    return common.seed_table(summaries, columns)


def memory_exercise(name: str, seeds: int) -> str:
    if name == "dcpm-colour":
        lines = []
        for row, patch in (("as it is", None), ("with the row", OF_MEMORY[name])):
            memory = dcpm.Memory()
            with changed(patch):
                memory.observe("My favourite colour is green.", "2024-01-08")
                memory.observe("My favourite colour is blue.", "2024-03-02")
                lines.append(f"{row}: {memory.answer('What is my favourite colour?', '2024-03-04')[0]}")
        return "\n".join(lines)
    import bench_dcpm
    columns = {"unseen": "unseen domain, %", "seen": "seen domain, %"}
    summaries = {}
    for row, patch in (("as it is", None), (name, OF_MEMORY[name])):
        summaries[row] = []
        for seed in range(seeds):
            with changed(patch):
                table, _ = bench_dcpm.run_benchmark(bench_dcpm.BANKS["development"], 24, 120, seed)
            seen, unseen = 100 * table["System1+2"].mean(0)[-2:]
            summaries[row].append({"seen": seen, "unseen": unseen})
    return common.seed_table(summaries, columns)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join([*EXERCISES, *OF_MEMORY]))
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    for name in args.names or [*EXERCISES, *OF_MEMORY]:
        do = memory_exercise if name in OF_MEMORY else training_exercise
        print(f"\n{name}, {args.seeds} seeds\n{do(name, args.seeds)}", flush=True)


if __name__ == "__main__":
    main()
