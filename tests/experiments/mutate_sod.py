"""By hand: does the suite notice when the training step of sod.py is wrong?

    python tests/experiments/mutate_sod.py [WORD ...]    only mutations with one of the words in their name

Each mutation replaces text in a copy of the repository, and the quick tests run there until one of them
fails, which is printed. Exit code 1 if a mutation goes unnoticed. Some minutes.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Slow, or about other things:
LEFT_OUT = ("learns", "a_compare", "compare_runs", "resume", "users_command", "cascade", "demonstrations",
            "clean_habits", "bad_", "python_tool", "network", "program", "formats", "cache", "answers")
TESTS = ("tests/test_sod.py", "tests/test_common.py", "-k", "not " + " and not ".join(LEFT_OUT))

MUTATIONS = {  # name -> (file, [(text, what it becomes), ...])
    "sign: student minus teacher": ("sod.py", [
        ("c * weights * (teacher_logps - logps)", "c * weights * (logps - teacher_logps)")]),
    "log-probs of student and teacher exchanged": ("sod.py", [
        ("teacher_logps, _ = common.score(", "logps, _ = common.score(")]),
    "the student is its own teacher": ("sod.py", [
        ("_ = common.score(teacher, rollouts", "_ = common.score(student, rollouts")]),
    "the teacher at another temperature": ("sod.py", [
        ("rollouts, config.temperature, config.micro_batch)", "rollouts, 1.0, config.micro_batch)")]),
    "sampler's log-probs, never rescored": ("sod.py", [
        ("        common.rescore(student, rollouts, config)\n", "")]),
    "no detach": ("sod.py", [("(advantages * mask).detach()", "(advantages * mask)")]),
    "tool's tokens not masked in the advantage": ("sod.py", [
        ("(advantages * mask).detach()", "advantages.detach()")]),
    "tool's tokens not masked in the loss": ("common.py", [
        ("return (loss * mask).sum()", "return loss.sum()")]),
    "group: all rollouts are one": ("sod.py", [
        ("outcome = common.group_advantages(reward, config.group_size)",
         "outcome = common.group_advantages(reward, len(reward))")]),
    "group: half of it": ("sod.py", [
        ("outcome = common.group_advantages(reward, config.group_size)",
         "outcome = common.group_advantages(reward, max(1, config.group_size // 2))")]),
    "group: advantages go to other rollouts": ("sod.py", [
        ("grpo * outcome[:, None]", "grpo * outcome.roll(1)[:, None]")]),
    "group: not divided by std": ("common.py", [("if std and group_size > 1:", "if False:")]),
    "Eq. 6: absolute value outside the sum": ("sod.py", [
        ("gap = (logps - teacher_logps).abs()", "gap = (logps - teacher_logps)"),
        ("float(gap[start:end].mean())", "abs(float(gap[start:end].mean()))")]),
    "Eq. 6: sum for mean": ("sod.py", [("float(gap[start:end].mean())", "float(gap[start:end].sum())")]),
    "Eq. 6: of another rollout": ("sod.py", [
        ("d = step_divergence(logps[i], teacher_logps[i], turns)",
         "d = step_divergence(logps[0], teacher_logps[0], turns)")]),
    "Eq. 7: no cap": ("sod.py", [("weights.append(min(product, 1 + delta))", "weights.append(product)")]),
    "Eq. 7: the product is capped, too": ("sod.py", [
        ("weights.append(min(product, 1 + delta))",
         "product = min(product, 1 + delta)\n        weights.append(product)")]),
    "Eq. 7: upside down": ("sod.py", [
        ("product *= (d[k - 1] + epsilon) / (d_k + epsilon)",
         "product *= (d_k + epsilon) / (d[k - 1] + epsilon)")]),
    "--delta ignored": ("sod.py", [
        ("w = rule(d, first_failed_call(rollouts.tool_status[i]), config.delta)",
         "w = rule(d, first_failed_call(rollouts.tool_status[i]), 0.2)")]),
    "first error of another rollout": ("sod.py", [
        ("w = rule(d, first_failed_call(rollouts.tool_status[i]), config.delta)",
         "w = rule(d, first_failed_call(rollouts.tool_status[0]), config.delta)")]),
    "a time-out is no error": ("sod.py", [('if status in ("error", "timeout"):', 'if status == "error":')]),
    "uniform weights": ("sod.py", [("weights[i, start:end] = w_k", "weights[i, start:end] = 1.0")]),
    "a weight reaches one token only": ("sod.py", [
        ("weights[i, start:end] = w_k", "weights[i, start:start + 1] = w_k")]),
    "no GRPO term": ("sod.py", [("grpo * outcome[:, None]", "0 * outcome[:, None]")]),
    "GRPO term in every method": ("sod.py", [("grpo * outcome[:, None]", "outcome[:, None]")]),
    "--coefficient ignored": ("sod.py", [("c = config.coefficient * distill", "c = distill")]),
    "mean over the rollouts for the sum over tokens": ("common.py", [
        ("/ (mask.sum() if denominator is None else denominator)", "/ len(mask)")]),
    "no denominator": ("common.py", [("/ (mask.sum() if denominator is None else denominator)", "/ 1")]),
    "a denominator for each micro-batch": ("common.py", [("denominator=tokens).backward()", ").backward()")]),
    "no clip of the ratio": ("common.py", [
        ("-advantages * ratio.clamp(1 - clip_low, 1 + clip_high)", "-advantages * ratio")]),
    "no dual clip": ("common.py", [("torch.minimum(loss, -dual_clip * advantages)", "loss")]),
    "minimum for maximum in the clip": ("common.py", [
        ("torch.maximum(-advantages * ratio,", "torch.minimum(-advantages * ratio,")]),
}


def run_tests(copy: Path, cache: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *TESTS]
    env = {**os.environ, "TEST_CACHE": str(cache)}  # the first run, without a mutation, fits the tiny models
    return subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)


def mutated(copy: Path, name: str) -> None:
    file, replacements = MUTATIONS[name]
    text = (copy / file).read_text(encoding="utf-8")
    for old, new in replacements:
        if text.count(old) != 1:
            raise SystemExit(f"'{old}' stands {text.count(old)} times in {file}; mend this script")
        text = text.replace(old, new)
    (copy / file).write_text(text, encoding="utf-8")


def main() -> int:
    words = sys.argv[1:]
    names = [name for name in MUTATIONS if not words or any(word in name for word in words)]
    unnoticed = []
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(["", *names]):
            copy = Path(folder, f"copy-{number}")
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "__pycache__"))
            if name:
                mutated(copy, name)
            run = run_tests(copy, Path(folder, "cache"))
            caught = re.findall(r"^(?:FAILED|ERROR) \S+?::(.+?)(?: - |$)", run.stdout, re.M)
            summary = run.stdout.strip().splitlines()[-1]
            print(f"{name or 'no mutation'}: {', '.join(caught) or summary}", flush=True)
            if run.returncode not in (0, 1) or bool(caught) != bool(name):  # unmutated, nothing may fail
                unnoticed.append(name or "no mutation")
            shutil.rmtree(copy)
    print("unnoticed or broken: " + ", ".join(unnoticed) if unnoticed else "every mutation was noticed")
    return len(unnoticed) > 0


if __name__ == "__main__":
    raise SystemExit(main())
