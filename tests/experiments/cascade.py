"""By hand: the paper's Figure 1 in miniature. What does a wrong call do to divergence, weight and teacher?

    python tests/experiments/cascade.py [flags of sod.py, for example --teacher_knows_timeouts or --delta 0.5]

One rollout of the untrained student for each of 500 problems of the chain task, where the right call is known
at every turn. Prints the mean d_k, teacher entropy, w_k and share of right calls by the teacher: once by
turn, once by what stands before the turn. No training.
"""
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402
import sod  # noqa: E402

MEASURED = {"d": "d_k", "H": "teacher entropy", "w": "w_k", "teacher": "teacher's own call right"}


def right_turns(task) -> list[str]:
    """What each turn must end with, if all before it were right."""
    values, _, operations = common.parse_chain(task.messages[-1]["content"])
    rights = []
    for value, (label, operation, operand) in zip(values, operations):
        rights.append(sod.call_text(label, f"{value}{operation}{operand}"))
    return rights + [f"\\boxed{{{values[-1]}}}"]


def oracle(task, turns: list[str], statuses: list[str]):
    """Yields for each turn: what stands before it, whether it is right, and the right turn (always known).
    'tool error': the last trouble was an error message or a time-out; 'silent error': a wrong call that was
    answered; a right call that succeeds makes the prefix 'clean' again."""
    rights = right_turns(task)
    prefix = "clean"
    k = 0
    for turn, status in zip(turns, statuses):
        is_right = turn.endswith(rights[k])
        yield prefix, is_right, rights[k]
        if is_right and status == "ok":
            prefix = "clean"
            k += 1
        elif status in ("error", "timeout"):
            prefix = "tool error"
        else:
            prefix = "silent error"


@torch.no_grad()
def teacher_is_right(teacher, tok, prefixes: list, rights: list[str], batch: int = 128) -> list[bool]:
    """Would the teacher, greedily, write exactly `right` after the prefix? Teacher-forced: one pass."""
    verdicts = []
    for i in range(0, len(prefixes), batch):
        rows = []
        sizes = []
        for prefix, right in zip(prefixes[i:i + batch], rights[i:i + batch]):
            said = common.encode(tok, right)
            rows.append(prefix + said)
            sizes.append(len(said))
        # Padded on the right: under causal attention no token can look at a pad.
        ids = common.padded(rows, tok.pad_token_id, device=teacher.device)          # (b, T)
        choice = teacher(input_ids=ids).logits.argmax(-1)                           # (b, T)
        for row, size, expected, chosen in zip(rows, sizes, ids, choice):
            start, end = len(row) - size, len(row)
            # The token in column p is predicted from column p - 1.
            verdicts.append(torch.equal(chosen[start - 1:end - 1], expected[start:end]))
    return verdicts


def turn_records(config: sod.Config, count: int) -> list[dict]:
    """One record a turn: prefix, is it right, d, w, teacher's entropy H, is the teacher right."""
    teacher, tok, tasks, rollouts = sod.first_rollouts(config, count)
    teacher_logps, entropy = common.score(teacher, rollouts, config.temperature)    # (B, T) each
    records = []
    prefixes = []
    rights = []
    for i, task in enumerate(tasks):
        row = rollouts.ids[i].tolist()
        spans = rollouts.turns[i]
        turns = [tok.decode(row[start:end], skip_special_tokens=True) for start, end in spans]
        d = sod.step_divergence(rollouts.logps[i], teacher_logps[i], spans)
        w = sod.step_weights(d, config.delta)
        prompt = common.prompt_ids(tok, task.messages, common.TOOLS[config.tool], config.thinking)
        said = spans[0][0]  # here the response begins
        for k, (prefix, is_right, right) in enumerate(oracle(task, turns, rollouts.tool_status[i])):
            start, end = spans[k]
            records.append({"i": i, "k": k, "prefix": prefix, "right": is_right, "d": d[k], "w": w[k],
                            "H": float(entropy[i, start:end].mean())})
            prefixes.append(prompt + row[said:start + 2])  # with the student's phrase (2 tokens)
            rights.append(right)
    verdicts = teacher_is_right(teacher, tok, prefixes, rights)
    for record, verdict in zip(records, verdicts):
        record["teacher"] = verdict
    return records


def mean(key: str, records: list[dict]) -> str:
    return f"{np.mean([r[key] for r in records]):.2f}" if records else "-"


def group_by_first_wrong_turn(records: list[dict]) -> dict[str, list[dict]]:
    """All calls right, the first one wrong, the second one wrong. A wrong first call is a case of its own: it
    raises d_1, against which all later turns are measured."""
    first_wrong = {}  # rollout -> turn
    for r in records:
        if not r["right"]:
            first_wrong.setdefault(r["i"], r["k"])
    names = {None: "clean", 0: "wrong call at turn 1", 1: "wrong call at turn 2"}
    groups = {name: [] for name in names.values()}
    for r in records:
        name = names.get(first_wrong.get(r["i"]))
        if name:
            groups[name].append(r)
    return groups


def cascade(config: sod.Config, count: int = 500) -> None:
    """Prints the two tables."""
    if config.data != "chain":
        common.fail("the right call at every turn is known on --data chain only")
    records = turn_records(config, count)
    groups = group_by_first_wrong_turn(records)

    rows = []
    for key, name in MEASURED.items():
        for group, members in groups.items():
            row = [f"{name}, {group}"]
            for k in range(7):
                row.append(mean(key, [r for r in members if r["k"] == k]))
            rows.append(row)
    sizes = []
    for group, members in groups.items():
        sizes.append(f"{group}: {len({r['i'] for r in members})}")
    print(f"\nby turn, mean over rollouts ({', '.join(sizes)} of {count}; clean = every call right)")
    print(common.table(rows, ["", *[f"turn {k + 1}" for k in range(7)]]))

    rows = []
    for prefix in ("clean", "tool error", "silent error"):
        later = [r for r in records if r["prefix"] == prefix and r["k"] > 0]
        means = [mean(key, later) for key in ("teacher", "right", "d", "H", "w")]
        rows.append([prefix, len(later), *means])
    print("\nby what stands before the turn (turns 2, 3, ...)")
    head = ["prefix", "turns", "teacher right", "student right", "d_k", "teacher entropy", "w_k"]
    print(common.table(rows, head))


def main(argv: list[str] | None = None) -> None:
    cascade(common.parse(sod.Config, argv))


if __name__ == "__main__":
    main()
