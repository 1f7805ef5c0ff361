"""By hand: a chat model as ROPD's rubricator and verifier, beside the rules, on the same answers.

    python tests/experiments/real_judge.py --judge DIR_OR_URL              16 questions of the chain
    python tests/experiments/real_judge.py --judge DIR_OR_URL --data FILE --model DIR      8 of a file

The chain's answers come from ropd.py's tiny student, before any training, and from its rules as teacher. For
a file, --model writes the rollouts, and the file's own solution stands in for a teacher's answer; no rule can
read those, so the table has the model's rows alone. "AUC inside" is the mean over the groups with right and
wrong rollouts: all that centred advantages see.
"""
import argparse
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402
import ropd  # noqa: E402


def make_groups(args) -> tuple[list, list, list]:
    """-> tasks; the teacher's answers to each; args.rollouts answers of a student to each."""
    rng = random.Random(args.seed)
    if args.data == "chain":
        tasks = [ropd.small_chain(rng) for _ in range(args.groups)]
        teachers = ropd.teacher_answers(ropd.symbolic_teacher, tasks, args.teacher_answers)
        model, tok = ropd.load_student(ropd.Config(), "cpu")
    else:
        rows = rng.sample(common.read_rows(args.data), args.groups)
        tasks = [common.row_to_task(row, args.data) for row in rows]
        teachers = [[re.sub("<<.*?>>", "", row["answer"])] for row in rows]  # GSM8K's marks for a calculator
        model, tok = common.load_model(args.model, "cpu", trainable=False)
    n, generator = args.rollouts, torch.Generator().manual_seed(args.seed)
    out = common.rollout(model, tok, tasks, n, max_new_tokens=args.answer_tokens, generator=generator)
    return tasks, teachers, [out.texts[i:i + n] for i in range(0, len(out.texts), n)]


def noted(judge, size, log: list):
    """The judge, but each reply leaves (role, prompt, asked again?, tokens of prompt and of reply) in log."""
    def chat(conversations, **sampling):
        replies = judge(conversations, **sampling)
        for talk, reply in zip(conversations, replies):
            prompt = talk[0]["content"]
            role = "rubric" if prompt.startswith(ropd.RUBRICATOR) else "verdict"
            log.append((role, prompt, len(talk) > 1, sum(size(m["content"]) for m in talk),
                        None if reply is None else size(reply)))
        return replies
    return chat


def measure(name: str, method: str, judge, size, tasks, teachers, students) -> list:
    """-> one row of the table."""
    log, began, tally = [], time.time(), Counter()
    questions = map(ropd.question_text, tasks)
    groups = list(map(ropd.new_group, questions, teachers, students))
    judge = noted(judge, size, log)
    ropd.ask_rubrics(groups, judge, ropd.METHODS[method], tally)
    ropd.ask_verdicts(groups, judge, tally)
    rewards = [ropd.rewards_of(group, group.students) for group in groups]
    teacher_rewards = [ropd.rewards_of(group, group.teachers) for group in groups]
    seconds, row = time.time() - began, [name]
    for role in ("rubric", "verdict"):
        first = [entry for entry in log if entry[0] == role and not entry[2]]
        bad = len({entry[1] for entry in log if entry[0] == role and entry[2]})  # whole, but to be said again
        bad += sum(entry[4] is None for entry in first)
        lost = sum(group.left_out == role for group in groups)
        row.append(f"{bad}, {lost} of {len(first)}" if first else "-")
    kept = [i for i, group in enumerate(groups) if not group.left_out]
    marks = [[common.is_correct(answer.text, tasks[i].answer) for answer in groups[i].students] for i in kept]
    aucs = [ropd.auc(rewards[i], right) for i, right in zip(kept, marks)]
    inside = [x for x in aucs if x is not None]
    reward, teacher_reward, right = sum(rewards, []), sum(teacher_rewards, []), sum(marks, [])
    row.append(f"{sum(group.wrong_totals for group in groups)} of {len(reward) + len(teacher_reward)}")
    row += ["-" if x is None else f"{x:.2f}" for x in (ropd.auc(reward, right), ropd.mean(inside))]
    row.append(f"{ropd.mean(teacher_reward) or 0:.2f}, {ropd.mean(reward) or 0:.2f}")
    for role in ("rubric", "verdict"):
        sizes = [entry[3:] for entry in log if entry[0] == role and entry[4] is not None]
        row.append(", ".join(f"{ropd.mean(column):.0f}" for column in zip(*sizes)) or "-")
    if kept:
        ropd.show_group(groups[kept[0]], marks[0], len(marks[0]))
    print(f"{name}: {dict(tally)}; {len(kept)} groups kept, {sum(right)} of {len(right)} rollouts right\n")
    return [*row, f"{seconds:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--judge", required=True, help="a Hugging Face id or folder, or a server's URL")
    parser.add_argument("--judge_model", default="", help="the model's name on that server")
    parser.add_argument("--data", default="chain", help="'chain' or a file of problems with solutions")
    parser.add_argument("--model", default="", help="with a file: the chat model that writes the rollouts")
    for flag, value in (("groups", 0), ("rollouts", 4), ("teacher_answers", 2), ("answer_tokens", 320),
                        ("reply_tokens", 700), ("seed", 0)):
        parser.add_argument(f"--{flag}", type=int, default=value)
    parser.add_argument("--only", type=int, nargs="*", default=range(4), help="which rows of the table")
    args = parser.parse_args()
    chain = args.data == "chain"
    if not chain and not args.model:
        common.fail("with --data, --model writes the rollouts")
    args.groups = args.groups or (16 if chain else 8)
    found = make_groups(args)
    size = len  # characters of a server's texts: its tokenizer is not here
    if not args.judge.startswith("http"):
        tok = AutoTokenizer.from_pretrained(args.judge)
        size = lambda text: len(common.encode(tok, text))  # noqa: E731
    model = ropd.chat_backend(args.judge, args.judge_model, args.reply_tokens)

    def half(talks, **sampling):  # the rules write the rubric, the model judges by it
        write = talks and talks[0][0]["content"].startswith(ropd.RUBRICATOR)
        return (ropd.symbolic_judge if write else model)(talks, **sampling)
    judges = [("rules", "ropd", ropd.symbolic_judge), ("model", "ropd", model),
              ("rules' rubric, model's verdict", "ropd", half), ("model, no rubric", "judge", model)]
    rows = [measure(*judges[i], size, *found) for i in args.only if chain or i in (1, 3)]
    print(common.table(rows, ["judge", "rubrics: unreadable at first, at last", "verdicts: likewise",
                              "wrong totals", "AUC", "AUC inside",
                              "reward of teacher, student", "tokens of rubric prompt, reply",
                              "of verdict prompt, reply", "seconds"]))


if __name__ == "__main__":
    main()
