"""Random histories against every invariant: writes, late tellings, reverts, forgets, sleeps,
save and load, two users.

    python tests/stress_memory.py [histories=10000] [seed=0]
"""
import random
import sys
import tempfile
from datetime import date, timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dcpm

CITIES, THINGS = ("Paris", "Berlin", "Rome", "Lima"), ("coffee", "tea", "jazz", "rowing")
SAID = ("I moved to {c}.", "I live in {c}.", "I used to live in {c}.", "My sister moved to {c}.",
        "Maybe I'll move to {c}.", "Back in {y} I lived in {c}.", "Three weeks ago I moved to {c}.",
        "I like {t}.", "I gave up {t}.", "I like {t}, mostly at night.", "I'm into {t} again.",
        "Do you think I live in {c}?", "I lived in {c} two years ago and I like {t}.", "I quit my job.",
        "I work at {c} Motors.", "I'm travelling to {c} on 10 June.", "I cancelled the trip to {c}.",
        "I have a car.", "I sold my car.", "I always write a list before the exam in {c}.",
        "I no longer write a list before the exam in {c}.", "Well, so it goes.")
HABITS = ("wrote a checklist for", "mapped out", "improvised",
          "went on a whim to", "went alone to", "had company of two at")
SCENES = ("the dinner", "the trip", "the meeting", "the concert", "the race")


def random_history(rng, length=40):
    """Yield the memory after each of `length` random operations, together with what was done."""
    memory, day = dcpm.Memory(), date(2024, 1, 1)
    # few at a time, so that cores arise and fall within 40 steps
    habits = rng.sample(HABITS, rng.choice((1, 1, 2, 6)))
    for step in range(length):
        day += timedelta(rng.choice((0, 1, 1, 9)))
        user, what = rng.choice(("user", "user", "ann")), rng.random()
        if what < 0.8:
            fill = {"c": rng.choice(CITIES), "t": rng.choice(THINGS), "y": rng.randint(2019, 2024)}
            text = " ".join(rng.choice(SAID).format(**fill) for _ in range(rng.choice((1, 1, 2))))
            if rng.random() < 0.6:
                text = f"I {rng.choice(habits)} {rng.choice(SCENES)} in {fill['c']} with {fill['t']}."
                user = "user"
            told = day - timedelta(rng.choice((0, 0, 0, 30)))  # sessions may arrive out of order
            done = ("observe", text, before_and_after(memory, user, lambda: memory.observe(
                text, told.isoformat(), f"s{step // 3}", user=user)))
        elif what < 0.85:
            if rng.random() < 0.7:
                word = f"{rng.choice(CITIES)} {rng.choice(THINGS)}"
            else:
                word = rng.choice(CITIES + THINGS)
            memory.forget(word, user)
            done = ("forget", word, True)
        elif what < 0.95:
            done = ("sleep", str(day), sleep_changes_no_belief(memory, user, day.isoformat()))
        else:
            with tempfile.TemporaryDirectory() as folder:
                memory.save(Path(folder) / "m.json")
                again = dcpm.Memory.load(Path(folder) / "m.json")
            same = all(dcpm.snapshot(again.stores[u]) == dcpm.snapshot(s) for u, s in memory.stores.items())
            memory, done = again, ("save and load", "", same)
        yield memory, done


def before_and_after(memory, user, act):
    """observe never changes a schema or core, and never makes an id or a source disappear."""
    def look():
        store = memory.store(user)
        nodes = [n for k in ("schemas", "cores", "intentions") for n in getattr(store, k).values()]
        return ([dcpm.asdict(n) for n in nodes],
                {i: len(b.sources) for i, b in store.beliefs.items()}, len(store.turns))
    high, sources, turns = look()
    act()
    high_after, sources_after, turns_after = look()
    return (high == high_after and turns_after == turns + 1
            and all(sources_after.get(i, -1) >= n for i, n in sources.items()))


def sleep_changes_no_belief(memory, user, now):
    """sleep leaves beliefs alone, and sleeping twice is sleeping once."""
    store = memory.store(user)
    before = [dcpm.asdict(b) for b in store.beliefs.values()]
    memory.sleep(now, user)
    once = dcpm.snapshot(store)
    memory.sleep(now, user)
    return before == [dcpm.asdict(b) for b in store.beliefs.values()] and once == dcpm.snapshot(store)


def leaks(memory, now="2026-01-01"):
    """Ids and current values that a recall must not show."""
    out = []
    for user, store in memory.stores.items():
        question = "Where do I live in Paris, Berlin or Rome, and do I like coffee, jazz or lists?"
        found = memory.recall(question, now, user=user)
        for line in found.lines:
            node = store.beliefs.get(line.id)
            if line.id in store.hidden or (node and (node.status == "suppressed")):
                out.append(f"{line.id} is shown")
            if node and node.status == "superseded" and "current" in line.text:
                out.append(f"{line.id} is called current")
            if line.id in store.schemas:
                live = [i for i in store.schemas[line.id].evidence if store.beliefs[i].status == "active"]
                out += [f"{line.id} rests on {len(live)}"] if len(live) < 2 else []
        if dcpm.count_tokens(found.text) > 800:
            out.append("over budget")
    return out


def run(histories, seed=0, length=40):
    """-> operations done; raises AssertionError with the seed of the history that broke an invariant."""
    total = 0
    for n in range(histories):
        for memory, (what, detail, fine) in random_history(random.Random(f"{seed}-{n}"), length):
            total += 1
            problems = memory.check() + leaks(memory) + ([] if fine else [f"{what} broke its promise"])
            assert not problems, f"history {seed}-{n}, after {what} {detail!r}: {problems[:3]}"
    return total


if __name__ == "__main__":
    histories = int(sys.argv[1]) if len(sys.argv) > 1 else 10000
    seed = sys.argv[2] if len(sys.argv) > 2 else "0"
    done = operations = 0
    while done < histories:
        part = min(500, histories - done)
        operations += run(part, f"{seed}-{done}")
        done += part
        print(f"{operations} operations in {done} of {histories} histories: every invariant held after each",
              flush=True)
