"""How writing and reading grow: turns per second, recall and sleep times at 1k, 10k and 100k beliefs.

    python tests/bench_memory.py [largest=100000]
"""
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dcpm

VERBS = ("saw met painted heard wrote visited fixed cleaned drew found "
         "lost sold kept moved opened closed").split()
THINGS = [f"{a} {b}" for a in "old red green tall quiet narrow heavy early".split()
          for b in "bridge lamp door river story engine garden letter window market harbour violin".split()]
SCENES = ("dinner", "trip", "meeting", "concert", "race", "lawn", "exam", "wedding")
QUESTIONS = ("Where do I live?", "What did I paint last month?", "Where did I live before City7?",
             "How do I prepare a trip?", "Which narrow bridge did I visit near number 4711?")


def turn(rng, n):
    """Mostly free facts, some habits and moves, so that chains grow and System2 has work."""
    kind = rng.random()
    if kind < 0.02:
        return f"I moved to City{rng.randrange(50)}."
    if kind < 0.1:
        return f"I wrote a checklist for the {rng.choice(SCENES)} number {n}."
    return f"I {rng.choice(VERBS)} the {rng.choice(THINGS)} near number {n}."


def main(largest):
    rng, memory, n = random.Random(0), dcpm.Memory(), 0
    print(f"{'turns':>8} {'beliefs':>8} {'turns/s':>9} {'recall ms (median of 15)':>26} {'worst':>7}"
          f" {'sleep s':>8} {'again s':>8}")
    for size in (s for s in (1000, 10000, 100000) if s <= largest):
        first, start = n, time.perf_counter()
        while n < size:
            day = f"{2000 + n // 5000}-{n // 400 % 12 + 1:02d}-{n // 20 % 20 + 1:02d}"
            memory.observe(turn(rng, n), day, f"s{n // 20}")
            n += 1
        rate = (n - first) / (time.perf_counter() - start)
        nights = []
        for _ in range(2):
            start = time.perf_counter()
            memory.sleep("2030-01-01")
            nights.append(time.perf_counter() - start)
        times = []
        for question in QUESTIONS * 3:
            start = time.perf_counter()
            memory.recall(question, "2030-01-01")
            times.append(1000 * (time.perf_counter() - start))
        times.sort()
        print(f"{n:8} {len(memory.store().beliefs):8} {rate:9.0f}"
              f" {times[len(times) // 2]:26.1f} {times[-1]:7.1f}"
              f" {nights[0]:8.2f} {nights[1]:8.2f}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100000)
