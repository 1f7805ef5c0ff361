"""How writing and reading grow: turns a second, recall and nights on the way to 100,000 beliefs.

    python tests/experiments/bench_memory.py [largest=100000]
"""
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import dcpm

VERBS = "saw met painted heard visited fixed cleaned drew found kept moved opened closed".split()
THINGS = [f"{a} {b}" for a in "old red green tall quiet narrow heavy early".split()
          for b in "bridge lamp door river story engine garden letter window market harbour violin".split()]
SCENES = ("dinner", "trip", "meeting", "concert", "race", "lawn", "exam", "wedding")
QUESTIONS = ("Where do I live?", "What did I paint?", "Where did I live before City7?",
             "How do I prepare a trip?", "Which narrow bridge did I visit near number 4711?")
NIGHT = 10000  # the largest memory that sleeps here


def turn(rng, n):
    """Mostly free facts, some habits and moves, so that chains grow and the night has work."""
    kind = rng.random()
    if kind < 0.005:
        return f"I moved to City{rng.randrange(50)}."
    if kind < 0.1:
        return f"I wrote a checklist for the {rng.choice(SCENES)} number {n}."
    return f"I {rng.choice(VERBS)} the {rng.choice(THINGS)} near number {n}."


def seconds(act, *args):
    start = time.perf_counter()
    act(*args)
    return time.perf_counter() - start


def main(largest):
    rng, memory, n = random.Random(0), dcpm.Memory(), 0
    print("  turns  beliefs  turns/s   recall ms: first, median, worst   night s, again")
    for size in (s for s in (1000, 10000, 30000, 100000) if s <= largest):
        first, start = n, time.perf_counter()
        while n < size:
            day = f"{2000 + n // 5000}-{n // 400 % 12 + 1:02d}-{n // 20 % 20 + 1:02d}"
            memory.observe(turn(rng, n), day, f"s{n // 20}")
            n += 1
        rate = (n - first) / (time.perf_counter() - start)
        nights = [seconds(memory.sleep, "2030-01-01") for _ in range(2)] if size <= NIGHT else []
        cold, *times = [1000 * seconds(memory.recall, q, "2030-01-01") for q in QUESTIONS * 4]
        times.sort()
        middle, worst = times[len(times) // 2], times[-1]
        print(f"{n:7} {len(memory.beliefs):8} {rate:8.0f} {cold:18.0f} {middle:7.0f} {worst:6.0f}"
              f"  {' '.join(f'{t:7.2f}' for t in nights)}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100000)
