"""By hand: two more worlds for srpo.py, each with gates and four methods, on srpo.py's own loop.

    python tests/experiments/bench_srpo_worlds.py codes|unripe     three seeds; two to three minutes a cell

codes: success is rare, and a failed rollout is partly right. A problem holds three of 40 code words, each of
which stands for a shift from 1 to 6 of its digit; the base believes a wrong shift for half of the words.
unripe: srpo.py's world with a base that was not fitted to the end: it lacks knowledge, not only care.
What is finished is taken from runs/worlds when the command is repeated.
"""
import functools
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common
import srpo
from common import Task

CELLS = {"srpo 2e-4": {"method": "srpo"}, "sdpo 4e-4": {"method": "sdpo"},
         "grpo 4e-5": {"method": "grpo"}, "grpo 2e-4": {"method": "grpo", "lr": 2e-4}}
WORDS = [a + b + c for a in "bdgk" for b in "aeiou" for c in "lr"]
LOT = random.Random(3)
TRUTH = {word: LOT.randint(1, 6) for word in WORDS}
BELIEF = {word: shift if LOT.random() < 0.5 else LOT.choice([s for s in range(1, 7) if s != shift])
          for word, shift in TRUTH.items()}


def code_task(rng) -> Task:
    words, digits = rng.sample(WORDS, 3), rng.choices(range(10), k=3)
    text = f"Decode {' '.join(f'{w}{d}' for w, d in zip(words, digits))}{common.ASK}"
    answer = "".join(str((d + TRUTH[w]) % 10) for w, d in zip(words, digits))  # no two errors cancel out
    return Task([{"role": "user", "content": text}], answer)


def decoded(rng, task: Task, meaning: dict, wrong: float, doubt: float = 0.0) -> str:
    """`bal4+3=7, ...`; a shift is a random one with probability `wrong`, else the true one with `doubt`."""
    parts, results = [], ""
    for word, digit in re.findall(r"([b-k][aeiou][lr])(\d)", task.messages[0]["content"]):
        known = TRUTH if rng.random() < doubt else meaning
        shift = rng.randint(1, 6) if rng.random() < wrong else known[word]
        results += str((int(digit) + shift) % 10)
        parts.append(f"{word}{digit}+{shift}={results[-1]}")
    return ", ".join(parts) + f". \\boxed{{{results}}}"


@functools.lru_cache(maxsize=1)
def code_corpus(seed: int):
    tok = common.build_tokenizer(["Decode ", ", ", common.ASK, ". \\boxed{", srpo.HEADING,
                                  srpo.CLOSING, *WORDS])
    rng, docs = random.Random(seed), []
    for _ in range(srpo.FIT["documents"]):
        task, asked, answer = code_task(rng), None, None
        if rng.random() < srpo.CONTEXT_SHARE:  # follows the solution; only the attempt carries loss
            asked = Task(srpo.reprompt(task.messages, decoded(rng, task, TRUTH, 0.0)), task.answer)
            answer = decoded(rng, task, TRUTH, 0.02)
        answer = answer or decoded(rng, task, BELIEF, 0.3, doubt=0.15)
        docs.append(common.demonstration(tok, asked or task, answer))
    return tok, docs


def main():
    world, *flags = sys.argv[1:] or [""]
    if world == "codes":
        srpo.small_chain, srpo.corpus = code_task, code_corpus
    elif world == "unripe":
        srpo.FIT["steps"], srpo.WRONG = 600, 0.15
    else:
        common.fail(f"there is no world '{world}'; give codes or unripe")
    config = common.parse(srpo.Config, ["--save_every", "0", "--out", f"runs/worlds/{world}", *flags])
    found = common.compared(srpo.train, config, CELLS, "srpo")
    print(common.seed_table(found, {
        "accuracy_after": "T = 1", "greedy_accuracy_after": "greedy", "accuracy_best": "best, T = 1",
        "accuracy_before": "start, T = 1", "mean accuracy": "mean", "length_before": "start, length",
        "length_after": "length", "teacher H, first": "teacher H, first", "teacher H, last": "last",
        "routed, first": "routed, first", "routed, last": "last"}))


if __name__ == "__main__":
    main()
