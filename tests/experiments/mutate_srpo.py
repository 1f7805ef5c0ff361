"""By hand: does the suite notice an error in srpo.py?

    python tests/experiments/mutate_srpo.py [WORD ...]      only the mutations with one of these words

Each mutation replaces one passage of srpo.py in a copy of the sources; one of the quick tests of srpo.py must
then fail. Prints the first that does. Exit code 1 if a mutation goes unnoticed. About ten minutes.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SLOW = ("solves", "resume", "compare", "every_method", "precision", "command_line")
QUICK = "not " + " and not ".join(SLOW)

MUTATIONS = {  # name -> (what stands in srpo.py, exactly once; what takes its place)
    "sign of l_grpo": ("l_grpo = -A[rows, None] * rho", "l_grpo = A[rows, None] * rho"),
    "sign in the weights": ("torch.softmax(-beta *", "torch.softmax(beta *"),
    "rho without detach": ("(logps - logps.detach()).exp()", "(logps - logps).exp()"),
    "weights without detach": ("teacher_entropy.detach()", "teacher_entropy"),
    "mean for sum": ("(loss.sum() / N).backward()", "loss.mean().backward()"),
    "mean over a micro-batch": ("(loss.sum() / N).backward()",
                                "(loss.sum() / rollouts.mask[rows].sum()).backward()"),
    "sibling of any group": ("start = i - i % group_size", "start = 0"),
    "sibling = the rollout itself": ("if j != i and rewards[j] >= 0.5", "if rewards[j] >= 0.5"),
    "wrong siblings": ("if j != i and rewards[j] >= 0.5", "if j != i"),
    "right ones distilled": ('"wrong": ~correct', '"wrong": correct'),
    "advantage over the batch": ("common.group_advantages(reward, config.group_size, std=False)",
                                 "reward - reward.mean()"),
    "advantage divided by std": ("config.group_size, std=False)", "config.group_size)"),
    "weights over micro-batches": (
        "* w[rows, columns] * divergence",
        "* w[rows, columns] / w[rows][distilled[rows]].mean() * divergence"),
    "beta ignored": ("config.beta if method.weighted else 0.0", "1.0 if method.weighted else 0.0"),
    "srpo_no_weight weighted": ("config.beta if method.weighted else 0.0", "config.beta"),
    "N without rollouts that have no gradient": (
        "N = rollouts.mask[counted].sum()", "N = rollouts.mask[z_sdpo + (z_grpo * A).abs() > 0].sum()"),
    "teacher and student exchanged": ("divergences(student, teacher, ours, theirs, temperature)",
                                      "divergences(teacher, student, theirs, ours, temperature)"),
    "teacher = student's states": ("divergences(student, teacher, ours, theirs, temperature)",
                                   "divergences(student, teacher, ours, ours.detach(), temperature)"),
    "teacher shares the student's storage": ("copy.deepcopy(student).requires_grad_(False)", "student"),
    "student follows the teacher": ("ema_update(teacher, student, config.ema)",
                                    "ema_update(student, teacher, config.ema)"),
    "EMA rate inverted": ("old.lerp_(new, rate)", "old.lerp_(new, 1 - rate)"),
    "EMA moves when the step is skipped": ("if teacher is not None and math.isfinite(norm):",
                                           "if teacher is not None:"),
    "a step without signal": ("        if active:  #", "        if True:  #"),
    "response columns off by one": ("masks.append([0] * len(prompt) + [1] * len(response))",
                                    "masks.append([0] * (len(prompt) - 1) + [1] * len(response) + [0])"),
    "another row's response": ("response = rollouts.ids[i][rollouts.mask[i].bool()].tolist()",
                               "response = rollouts.ids[i - 1][rollouts.mask[i].bool()].tolist()"),
    "teacher sees the plain prompt": (
        "prompts.append(reprompt(tasks[i // config.group_size].messages, sibling))",
        "prompts.append(tasks[i // config.group_size].messages)"),
    "wrong rollout as demonstration": ("solution_text(tok, rollouts, demos[i])",
                                       "solution_text(tok, rollouts, i)"),
    "problem of another group": ("reprompt(tasks[i // config.group_size].messages, sibling)",
                                 "reprompt(tasks[i % len(tasks)].messages, sibling)"),
    "demonstration can end a turn": ("return common.defused(tok, answer.strip())", "return answer.strip()"),
    "temperature of H ignored": ("common.entropy_of(F.log_softmax(logits / config.temperature, -1))",
                                 "common.entropy_of(F.log_softmax(logits, -1))"),
    "temperature of q ignored": ("q = F.log_softmax(teacher_logits(states) / temperature, -1)",
                                 "q = F.log_softmax(teacher_logits(states), -1)"),
    "JSD without its half": ("return 0.5 * (from_student + from_teacher)",
                             "return from_student + from_teacher"),
}


def failures(name: str) -> list[str]:
    """The first test that fails when srpo.py is mutated, if one does; "" = as it is."""
    with tempfile.TemporaryDirectory() as folder:
        for file in ROOT.glob("*.py"):
            shutil.copy(file, folder)
        shutil.copytree(ROOT / "tests", Path(folder, "tests"), ignore=shutil.ignore_patterns("experiments"))
        if name:
            old, new = MUTATIONS[name]
            source = Path(folder, "srpo.py").read_text()
            assert source.count(old) == 1, f"{name}: '{old}' stands {source.count(old)} times in srpo.py"
            Path(folder, "srpo.py").write_text(source.replace(old, new))
        command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-x", "tests/test_srpo.py", "-k", QUICK]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if run.returncode not in (0, 1):
        raise SystemExit(f"{name}: the tests did not run\n{run.stdout}{run.stderr}")
    return re.findall(r"^(?:FAILED|ERROR) \S+?::(.+?)(?: - |$)", run.stdout, re.M)


def main():
    words = sys.argv[1:]
    names = [name for name in MUTATIONS if not words or any(word in name for word in words)]
    broken = failures("")
    if broken:
        raise SystemExit(f"without a mutation, too, these fail: {', '.join(broken)}")
    unnoticed = []
    for name in names:
        caught = failures(name)
        print(f"{name}: {'; '.join(caught) or 'UNNOTICED'}", flush=True)
        if not caught:
            unnoticed.append(name)
    print("unnoticed: " + ", ".join(unnoticed) if unnoticed else f"all {len(names)} mutations were noticed")
    return bool(unnoticed)


if __name__ == "__main__":
    # A folder of its own for the tiny models, fitted once
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TEST_CACHE", cache)
        raise SystemExit(main())
