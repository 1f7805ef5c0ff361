"""By hand: a pretrained language model of 135 M parameters, trained by srpo.py's own loop on a CPU.

    python tests/experiments/real_training.py --model HuggingFaceTB/SmolLM2-135M-Instruct [--seeds 1]

The problem: which is the largest of five two-digit numbers? Two solved ones stand in the prompt. GRPO, SDPO
and SRPO at the paper's ratio of learning rates, 1 : 10 : 5, and GRPO once more at SRPO's rate, 4 problems x 8
rollouts a step. Prints the gates, a table, and the share solved as training goes on. A minute a step on
a laptop without a GPU; what is finished is taken from --out when the command is repeated.

So small a model does not understand srpo.py's prompt for the teacher (--usual_prompt shows it: see its gate).
It does understand a solution in brackets, which is what the teacher gets here, and at temperature 1 every
answer of six tokens has a good chance to go astray: rollouts are drawn at 0.7.
"""
import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common
import srpo

CELLS = {"grpo 5e-6": {"method": "grpo", "lr": 5e-6}, "srpo 2.5e-5": {"method": "srpo", "lr": 2.5e-5},
         "sdpo 5e-5": {"method": "sdpo", "lr": 5e-5}, "grpo 2.5e-5": {"method": "grpo", "lr": 2.5e-5}}


def write_problems(path, count=2000):
    """Two solved problems, then the one to solve, as chat messages: without them the model talks."""
    rng, rows = random.Random(0), []
    for _ in range(count):
        talk = [{"role": "system", "content": "Answer in \\boxed{}."}]  # shorter than the template's own
        for _ in range(3):
            numbers = rng.sample(range(10, 100), 5)
            talk += [{"role": "user", "content": f"Largest of {', '.join(map(str, numbers))}?"},
                     {"role": "assistant", "content": f"\\boxed{{{max(numbers)}}}"}]
        rows.append(json.dumps({"prompt": talk[:-1], "answer": str(max(numbers))}))
    path.write_text("\n".join(rows) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="Hugging Face id or folder of a small chat model")
    parser.add_argument("--out", default="runs/real_training")
    parser.add_argument("--steps", default="20")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", default="1")
    parser.add_argument("--usual_prompt", action="store_true", help="show the teacher what srpo.py shows it")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    write_problems(out / "problems.jsonl")
    if not args.usual_prompt:
        srpo.HEADING, srpo.CLOSING = " (", ")"
    config = common.parse(srpo.Config, [
        "--model", args.model, "--data", str(out / "problems.jsonl"), "--out", str(out), "--save_every", "0",
        "--steps", args.steps, "--threads", args.threads, "--prompts_per_step", "4", "--group_size", "8",
        "--max_new_tokens", "12", "--eval_tasks", "64", "--eval_every", "0", "--gate_tasks", "16",
        "--temperature", "0.7"])
    found = {name: [] for name in CELLS}
    for seed in range(args.seeds):  # seed by seed: a table that is cut short is a table of fewer seeds
        config.seed, config.seeds = seed, 1
        for name, summaries in common.compared(srpo.train, config, CELLS, "srpo").items():
            found[name] += summaries
    print(common.seed_table(found, {"accuracy_before": "before, T = 1", "accuracy_after": "after",
                                    "greedy_accuracy_before": "before, greedy",
                                    "greedy_accuracy_after": "after", "length_after": "length",
                                    "seconds_per_step": "s/step"}))
    print("share solved in training, mean of five steps and of the seeds")
    for name in CELLS:
        slug = name.replace(" ", "-").replace(".", "-")
        curves = [[r["solved"] for r in map(json.loads, (out / f"{slug}-s{seed}" / "metrics.jsonl").open())
                   if "solved" in r] for seed in range(args.seeds)]                 # [seeds][steps]
        means = np.mean(curves, 0)                                                  # (steps,)
        print(f"{name:12}", *(f"{means[i:i + 5].mean():.2f}" for i in range(0, len(means), 5)))


if __name__ == "__main__":
    main()
