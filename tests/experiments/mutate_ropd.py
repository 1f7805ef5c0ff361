"""By hand: does the suite notice a wrong line in ropd.py's training loop or in its reward?

    python tests/experiments/mutate_ropd.py [WORD ...]          only the mutations with a WORD in their name

Each mutation is a replacement of text in a copy of the sources, and the quick tests of ropd.py run on it.
Prints which of them fails first. Exit code 1 if a mutation goes unnoticed, an error if its text is not found exactly once.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QUICK = "by_hand or worked or come_back or every_method or selection or once or three_tries or sft or premise"

MUTATIONS = {  # name -> (text of ropd.py, what it becomes)
    "no mutation": ("", ""),
    "Eq. 4: mean for sum": (
        "points_won(points, verdict) / sum(points)", "points_won(points, verdict) / len(points)"),
    "Eq. 4: points of the criteria that fail": (
        "zip(points, verdict, strict=True) if yes)", "zip(points, verdict, strict=True) if not yes)"),
    "Eq. 4: points ignored": (
        "elif not method.points:", "else:"),
    "equal_points: points count": (
        "dict.fromkeys(rubric, 1)", "rubric"),
    "Eq. 2: the rubricator sees no student": (
        "if contrast:", "if False:"),
    "uniform_rubric: the rubricator sees students": (
        "if contrast:", "if True:"),
    "Eq. 3: pool order not undone": (
        "zip(group.pool, verdicts)", "zip(group.teachers + group.students, verdicts)"),
    "Eq. 3: verdicts of another answer": (
        "zip(group.pool, verdicts)", "zip(group.pool, verdicts[1:] + verdicts[:1])"),
    "reward of the teacher for the student": (
        "rewards += rewards_of(group, group.students) or",
        "rewards += rewards_of(group, group.teachers * n)[:n] or"),
    "reward of the student for the teacher": (
        "teacher_rewards += rewards_of(group, group.teachers)",
        "teacher_rewards += rewards_of(group, group.students)"),
    "answer key for the rubric": (
        "reward = torch.tensor(rewards, dtype=torch.double)", "reward = correct.double()"),
    "rollouts of another question": (
        "rollouts.texts[n * i:n * (i + 1)]", "rollouts.texts[i::len(tasks)]"),
    "teacher's answers to another question": (
        "answers[i], students", "answers[i - 1], students"),
    "Eq. 6: wrong group": (
        "common.group_advantages(reward, n,", "common.group_advantages(reward.view(n, -1).T.flatten(), n,"),
    "Eq. 6: no mean subtracted": (
        "common.group_advantages(reward, n, std=config.std)", "reward.float()"),
    "Eq. 6: divided by std": (
        "std=config.std", "std=True"),
    "Eq. 7: sign": (
        "advantages.to(device)[:, None]", "-advantages.to(device)[:, None]"),
    "left-out groups kept with reward 0": (
        "[not group.left_out for group in groups]", "[True for group in groups]"),
    "left-out groups stay in the denominator": (
        "replace(rollouts, mask=mask)", "rollouts"),
    "left-out groups in the logged reward": (
        "float(reward[kept].mean())", "float(reward.mean())"),
    "the others left out": (
        "[not group.left_out for group in groups]", "[bool(group.left_out) for group in groups]"),
    "group of unread verdicts not left out": (
        'group.left_out = "verdict"', 'group.left_out = ""'),
    "sft: sign": (
        "-logps.sum() / mask.sum()", "logps.sum() / mask.sum()"),
    "sft: loss on the prompt": (
        "[0] * len(prompt)", "[1] * len(prompt)"),
    "sft: mean over a micro-batch": (
        "-logps.sum() / mask.sum()", "-logps.sum() / mask[rows].sum()"),
}


def mutated(source: str, old: str, new: str) -> str:
    if not old:
        return source
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in ropd.py"
    return source.replace(old, new)


def run(old: str, new: str, cache: str) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory() as folder:
        not_needed = shutil.ignore_patterns(".git", "runs", "*cache*")
        shutil.copytree(ROOT, folder, dirs_exist_ok=True, ignore=not_needed)
        file = Path(folder, "ropd.py")
        file.write_text(mutated(file.read_text(), old, new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-p", "no:cacheprovider",
                   "-k", QUICK, "tests/test_ropd.py"]
        env = {**os.environ, "TEST_CACHE": cache}
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def main() -> int:
    source = (ROOT / "ropd.py").read_text()
    for old, new in MUTATIONS.values():
        mutated(source, old, new)  # all texts are there, before time is spent
    unnoticed = []
    with tempfile.TemporaryDirectory() as fits:
        for name, (old, new) in MUTATIONS.items():
            if sys.argv[1:] and not any(word in name for word in sys.argv[1:]):
                continue
            result = run(old, new, os.environ.get("TEST_CACHE") or fits)
            caught = re.findall(r"^FAILED \S+?::(.+?)(?: - |$)", result.stdout, re.M)
            print(f"{name}: {result.stdout.strip().splitlines()[-1]}", *caught, sep="\n    ", flush=True)
            if result.returncode not in (0, 1) or bool(caught) != bool(old):  # unmutated, nothing may fail
                unnoticed.append(name)
    print("unnoticed or broken: " + ", ".join(unnoticed) if unnoticed else "every mutation was noticed")
    return bool(unnoticed)


if __name__ == "__main__":
    raise SystemExit(main())
