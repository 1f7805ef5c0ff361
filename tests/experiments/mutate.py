"""By hand: does the suite notice an error in a training script, or in the rollouts?

    python tests/experiments/mutate.py SCRIPT [WORD ...]      sod, srpo, ropd or rollout; WORDs: of names

Each mutation replaces text in a copy of the sources, and quick tests run on it until one fails, which is
printed. Exit code 1 if one goes unnoticed. Ten to twenty minutes a script.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Each: name -> (text, what it becomes) in the script itself, or (file, [(text, what it becomes), ...]).
SOD = {
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
    "a denominator for each micro-batch": ("common.py", [("denominator=tokens)", "denominator=mask.sum())")]),
    "no clip of the ratio": ("common.py", [
        ("-advantages * ratio.clamp(1 - clip_low, 1 + clip_high)", "-advantages * ratio")]),
    "no dual clip": ("common.py", [("torch.minimum(loss, -dual_clip * advantages)", "loss")]),
    "minimum for maximum in the clip": ("common.py", [
        ("torch.maximum(-advantages * ratio,", "torch.minimum(-advantages * ratio,")]),
}

SRPO = {
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
        "messages = reprompt(tasks[i // config.group_size].messages, sibling)",
        "messages = tasks[i // config.group_size].messages"),
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

ROPD = {
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
        "rewards = [rewards_of(group, group.students) or",
        "rewards = [rewards_of(group, group.teachers * n)[:n] or"),
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
    "sft: loss on the prompt": ("common.py", [
        ("[0] * len(prompt) + [1] * len(turn)", "[1] * len(prompt) + [1] * len(turn)")]),
    "sft: mean over a micro-batch": (
        "-logps.sum() / mask.sum()", "-logps.sum() / mask[rows].sum()"),
}

ROLLOUT = {
    "a token sees the one behind it": ("mask = column <= here ", "mask = column <= here + 1 "),
    "the window is one too wide": ("column > here - config.sliding_window",
                                   "column >= here - config.sliding_window"),
    "places are off by one": ("place = start + torch.arange", "place = start + 1 + torch.arange"),
    "keys of other rows": ("stored[:, numbers[:, None], :, place]",
                           "stored[:, numbers.flip(0)[:, None], :, place]"),
    "rows that leave are the wrong ones": ("cache.select(alive)", "cache.select(range(len(alive)))"),
    "a waiting row samples": ("if row.done or row.in_cache < len(row.ids):", "if row.done:"),
    "the tool's message is trained": (
        "        for start, end in row.turns:\n            mask[i, start:end] = 1",
        "        mask[i, row.turns[0][0]:row.turns[-1][1]] = 1"),
    "the end of a turn is not trained": ("row.turns.append((row.turn_start, len(row.ids)))",
                                         "row.turns.append((row.turn_start, len(row.ids) - 1))"),
    "a message may fill the budget": ("row.done = len(row.ids) + len(message) >= row.limit",
                                      "row.done = False"),
    "the last call runs": ("row.done = call is None or len(row.status) >= max_turns",
                           "row.done = call is None"),
    "the prompt goes to the wrong group": ("np.repeat(range(len(groups)), [len(group) for group in groups])",
                                           "np.resize(range(len(groups)), len(rows))"),
    "temperature is ignored": ("torch.log_softmax(logits / (temperature or 1.0), -1)",
                               "torch.log_softmax(logits, -1)"),
    "the first token is never drawn": ("u * below[:, -1:], right=True",
                                       "u * below[:, -1:] + below[:, :1], right=True"),
    "a value is read in the write pass": (
        "here = place[:, None, :, None]",
        "assert place.max() < self.length\n        here = place[:, None, :, None]"),
    "the inputs move": ("self.inputs.copy_(new)", "self.inputs = new.clone()"),
    "the bf16 copy is not refreshed": ("        ours.copy_(theirs)", "        pass"),
    "a tool's exception ends the run": (
        "        except Exception as error:\n            return cut_middle(",
        "        except ZeroDivisionError as error:\n            return cut_middle("),
}

# Slow tests, or about other things.
LEFT_OUT = ("learns", "a_compare", "compare_runs", "resume", "users_command", "cascade", "demonstrations",
            "clean_habits", "bad_", "python_tool", "network", "program", "formats", "cache", "answers")
SCRIPTS = {  # script -> (its mutations, the file they are in, quick tests)
    "sod": (SOD, "sod.py", (
        "tests/test_sod.py", "tests/test_common.py", "-k", "not " + " and not ".join(LEFT_OUT))),
    "srpo": (SRPO, "srpo.py", (
        "tests/test_srpo.py", "-k", "not solves and not resume and not compare and not every_method "
        "and not precision and not command_line")),
    "ropd": (ROPD, "ropd.py", (
        "tests/test_ropd.py", "-k", "by_hand or worked or come_back or every_method or selection or once "
        "or three_tries or sft or premise")),
    "rollout": (ROLLOUT, "common.py", (
        "tests/test_common.py", "-k", "agree or greedy or other_models or multi_turn or budget or "
        "waiting or pad or sampler or record or follow or tool_that or same_seed")),
}


def replaced(folder: Path, name: str, mutations: dict, file: str) -> None:
    if isinstance(mutations[name][1], list):
        file, replacements = mutations[name]
    else:
        replacements = [mutations[name]]
    text = (folder / file).read_text(encoding="utf-8")
    for old, new in replacements:
        if text.count(old) != 1:
            raise SystemExit(f"{name}: {old!r} stands {text.count(old)} times in {file}; mend this script")
        text = text.replace(old, new)
    (folder / file).write_text(text, encoding="utf-8")


def main() -> bool:
    script, *words = sys.argv[1:]
    mutations, file, tests = SCRIPTS[script]
    names = [name for name in mutations if not words or any(word in name for word in words)]
    unnoticed = []
    with tempfile.TemporaryDirectory() as cache:  # for the tiny models, fitted in the first run
        for name in ["no mutation", *names]:
            with tempfile.TemporaryDirectory() as folder:
                left_out = shutil.ignore_patterns(".git", "runs", "*cache*")
                shutil.copytree(ROOT, folder, dirs_exist_ok=True, ignore=left_out)
                if name in mutations:
                    replaced(Path(folder), name, mutations, file)
                command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider",
                           *tests]
                env = {"TEST_CACHE": cache, **os.environ}
                run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
            caught = re.findall(r"^(?:FAILED|ERROR) \S+?::(.+?)(?: - |$)", run.stdout, re.M)
            print(f"{name}: {', '.join(caught) or run.stdout.strip().splitlines()[-1]}", flush=True)
            # unmutated, nothing may fail
            if run.returncode not in (0, 1) or bool(caught) != (name in mutations):
                unnoticed.append(name)
    print("unnoticed or broken: " + ", ".join(unnoticed) if unnoticed else "every mutation was noticed")
    return bool(unnoticed)


if __name__ == "__main__":
    raise SystemExit(main())
