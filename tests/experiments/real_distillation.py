"""By hand: a real teacher and a real student on sod.py's own path, `--method opd`: do they come closer?

    python tests/experiments/real_distillation.py --model DIR --teacher DIR --data gsm8k.jsonl [--steps 20]

Two models of one tokenizer, for instance Qwen2.5-Coder-0.5B-Instruct and -1.5B-Instruct. 2 problems x 4
rollouts of at most 128 tokens a step. Measured is what on-policy distillation descends on, the mean over
tokens of log pi_student - log pi_teacher on the student's own rollouts: in every step, and on 16 held-out
problems before and after. Nothing is claimed about accuracy. Minutes a step and 17 GB of memory on a CPU;
--resume goes on from the last checkpoint, to more steps as well.
"""
import argparse
import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common
import sod


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for flag in ("model", "teacher", "data"):
        parser.add_argument(f"--{flag}", required=True)
    for flag, default in (("steps", "20"), ("tokens", "128"), ("held_out", "16"), ("lr", "1e-5"),
                          ("out", "runs/real_distillation"), ("threads", "1"), ("save_every", "5")):
        parser.add_argument(f"--{flag}", default=default)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    config = common.parse(sod.Config, [
        "--method", "opd", "--model", args.model, "--teacher", args.teacher, "--data", args.data,
        "--lr", args.lr, "--steps", args.steps, "--prompts_per_step", "2", "--group_size", "4",
        "--max_new_tokens", args.tokens, "--eval_tasks", args.held_out, "--save_every", args.save_every,
        "--show_every", "5", "--threads", args.threads, "--micro_batch", "4", "--out", args.out,
        "--resume" if args.resume else "--overwrite"])
    loaded = []
    load_teacher = sod.load_teacher

    def remembered(*arguments):
        loaded.append(load_teacher(*arguments))
        return loaded[0]

    def distance(student, tok, tasks, config):
        """In place of an evaluation: the distance from the teacher, on rollouts of the same dice."""
        generator = torch.Generator(student.device).manual_seed(0)
        rollouts = common.rollout(student, tok, tasks, tool=common.TOOLS[config.tool], generator=generator,
                                  temperature=config.temperature, **config.sampling)
        teacher_logps, _ = common.score(loaded[0], rollouts, config.temperature, config.micro_batch)
        difference = (rollouts.logps - teacher_logps) * rollouts.mask               # (B, T)
        gaps = (difference.sum(1) / rollouts.mask.sum(1)).tolist()  # one number a problem
        right = common.rewards(rollouts, tasks)                                     # (B,)
        return {"accuracy": float(right.mean()), "se": float(right.std() / len(right) ** 0.5), "gaps": gaps,
                "greedy_accuracy": float("nan"), "length": float(rollouts.mask.sum(1).float().mean())}

    with mock.patch.multiple(sod, load_teacher=remembered, evaluate=distance):
        sod.train(config)
    lines = [json.loads(line) for line in (Path(args.out) / "metrics.jsonl").read_text().splitlines()]
    before, *_, after = [line["gaps"] for line in lines if "gaps" in line]
    own = [line["kl(teacher)"] for line in lines if "kl(teacher)" in line]
    change = np.subtract(after, before)
    print("student - teacher, nats a token, own rollouts, step by step:", *(f"{gap:.3f}" for gap in own))
    half = (len(own) + 1) // 2
    print(f"first half {np.mean(own[:half]):.3f}, second half {np.mean(own[-half:]):.3f}")
    print(f"{len(change)} held-out problems: {np.mean(before):.3f} before, {np.mean(after):.3f} after, "
          f"paired difference {change.mean():+.3f} ± {change.std(ddof=1) / len(change) ** 0.5:.3f} (s.e.)")


if __name__ == "__main__":
    main()
