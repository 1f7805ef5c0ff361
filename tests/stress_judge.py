"""Mutated judge replies: each becomes a valid object or a ValueError (a KeyError where a field is missing),
never another exception or a wrong total.

    python tests/stress_judge.py [COUNT]        100,000 by default, about half a minute
"""
import contextlib
import json
import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import ropd

ODD = [None, True, False, 0, 1, -1, 6, 3.0, 2.5, float("nan"), float("inf"), 10**30,
       "", "true", "3", "c1", " ", "\ud800", "\x1b[2J", [], {}, [[]], [True], "x" * 5000]
PIECES = ["{", "}", "[", "]", '"', ",", ":", "\\", "\0", "é", "<think>", "</think>", "```json\n", "\ufeff"]


def rubric_text(k: int) -> str:
    return json.dumps({"rubrics": [{"criterion": f"Says {i}.", "points": 1 + i % 5} for i in range(k)]})


def verdict_text(verdicts, points, total=0) -> str:
    """total: what every answer claims; 0 = the truth."""
    answers = [{"answer_index": i, "judgement": v,
                "final_score": sum(p for p, yes in zip(points, v) if yes) if total == 0 else total}
               for i, v in enumerate(verdicts, 1)]
    return json.dumps({"answers": answers})


def change_value(rng, node):
    """Replaces, drops, doubles or renames something, somewhere in a JSON value."""
    if not isinstance(node, (dict, list)) or not node or rng.random() < 0.2:
        return rng.choice(ODD)
    key, action = rng.choice(list(node) if isinstance(node, dict) else range(len(node))), rng.random()
    if action < 0.15:
        del node[key]
    elif action < 0.25 and isinstance(node, dict):
        node[key + "x"] = node.pop(key)
    elif action < 0.25:
        rng.shuffle(node)
    elif action < 0.35 and isinstance(node, list):
        node.insert(key, json.loads(json.dumps(node[key])))
    else:
        node[key] = change_value(rng, node[key])
    return node


def mutate(rng, text: str) -> str:
    """Up to three changes: cut, insert, drop, prose around it, all of it twice, another value inside."""
    for _ in range(rng.randint(0, 3)):
        at, piece = rng.randrange(len(text) + 1), rng.choice(PIECES)
        changes = [text[:at], text[:at] + piece + text[at:], text[:at] + text[at + rng.randint(1, 9):],
                   f"Sure: {piece} {text} done {{}}", text + text]
        with contextlib.suppress(ValueError):
            changes += [json.dumps(change_value(rng, json.loads(text)))] * 2
        text = rng.choice(changes)
    return text


def check_rubric(text) -> None:
    rubric = ropd.parse_rubric(common.read_object(text))
    assert 4 <= len(rubric.criteria) == len(rubric.points) <= 12
    assert all(type(p) is int and 1 <= p <= 5 for p in rubric.points)
    assert all(c.strip() and "\n" not in c and c.encode() for c in rubric.criteria)


def check_verdicts(text, count, points) -> None:
    verdicts, wrong = ropd.parse_verdicts(common.read_object(text), count, points)
    assert len(verdicts) == count and 0 <= wrong <= count
    for verdict in verdicts:
        assert len(verdict) == len(points) and all(type(v) is bool for v in verdict)
        earned = sum(p * v for p, v in zip(points, verdict))
        assert ropd.rubric_reward(points, verdict) == earned / sum(points)


def mutations(count: int, seed: int) -> Counter:
    """count replies, half of them rubrics -> how many were valid, and how many failed for which reason."""
    rng, outcomes = random.Random(seed), Counter()
    for i in range(count):
        n, points = rng.randint(1, 12), [rng.randint(1, 5) for _ in range(rng.randint(4, 12))]
        try:
            if i % 2:
                check_rubric(mutate(rng, rubric_text(rng.randint(3, 13))))
            else:
                verdicts = [[rng.random() < 0.5 for _ in points] for _ in range(n)]
                check_verdicts(mutate(rng, verdict_text(verdicts, points)), n, points)
            outcomes["valid"] += 1
        except (ValueError, KeyError) as error:
            outcomes[str(error)] += 1
    return outcomes


if __name__ == "__main__":
    total = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    print(f"{total} mutated replies: {dict(mutations(total, seed=1))}")
