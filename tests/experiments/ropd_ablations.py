"""By hand: two ablations of ROPD's Table 6 that need functions of their own.

    python tests/experiments/ropd_ablations.py --method per_student_rubric
    python tests/experiments/ropd_ablations.py --method not_blind --judge DIR_OR_URL
    python tests/experiments/ropd_ablations.py --compare           both, beside ropd.py's own methods

Flags are those of ropd.py.
per_student_rubric: each rollout has a rubric of its own, so rewards of a group are not on one scale.
not_blind: the verifier is told who wrote an answer. The rules read no labels: with them it is ropd digit for
digit.
"""
import copy
import re
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ropd  # noqa: E402

ABLATIONS = {"per_student_rubric": ropd.Method(), "not_blind": ropd.Method()}
ask_rubrics, ask_verdicts = ropd.ask_rubrics, ropd.ask_verdicts
blind_pool, verifier_prompt = ropd.blind_pool, ropd.verifier_prompt


def singles_of(groups: list) -> list:
    return [single for group in groups for single in group.singles]


def rubrics(groups, judge, method, tally) -> None:
    for group in groups:
        group.told = method is ABLATIONS["not_blind"]
        group.singles = []
        if method is ABLATIONS["per_student_rubric"]:
            for student in group.students:  # the group keeps the same answers, so it gets their verdicts
                teachers = copy.deepcopy(group.teachers)
                group.singles.append(replace(group, teachers=teachers, students=[student]))
    ask_rubrics(singles_of(groups) or groups, judge, method, tally)


def verdicts(groups, judge, tally) -> None:
    ask_verdicts(singles_of(groups) or groups, judge, tally)
    for group in groups:
        for single in group.singles:
            # One lost rollout loses them all: a mean over the survivors is biased.
            group.left_out = group.left_out or single.left_out
            group.wrong_totals += single.wrong_totals
            if not single.left_out:
                for answer in single.students + single.teachers:  # each by its own rubric: a mark in [0, 1]
                    answer.verdict = ropd.rubric_reward(single.rubric.values(), answer.verdict)
        if group.singles:
            group.teachers = group.singles[0].teachers


def pool(group) -> list:
    return group.teachers + group.students if getattr(group, "told", False) else blind_pool(group)


def prompt(group) -> list[dict]:
    talk = verifier_prompt(group)
    if getattr(group, "told", False):
        text = talk[0]["content"]
        fence = re.search(r"<(\w{8}) question>", text)[1]
        for i, answer in enumerate(group.pool, 1):
            source = "teacher" if i <= len(group.teachers) else "student"
            text = text.replace(f"<{fence} answer {i}>", f"<{fence} {source} answer {i}>")
        talk[0]["content"] = text
    return talk


PATCHES = {"ask_rubrics": rubrics, "ask_verdicts": verdicts, "blind_pool": pool, "verifier_prompt": prompt}


if __name__ == "__main__":
    ropd.METHODS.update(ABLATIONS)  # the choices of --method, and the rows of --compare
    vars(ropd).update(PATCHES)
    ropd.main()
