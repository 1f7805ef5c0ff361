"""Random histories against every invariant: messages, claims, late tellings, reverts, retractions, requests
to forget, nights, save and load, in any order.

    python tests/experiments/stress_memory.py [histories=10000] [seed=0]

After each operation: the invariants of the store (invariants.py; its log, replayed, gives the same store),
the promise of the operation, and what a recall is made of: the lines of all chains, and the schemas and
cores that count as supported. A whole recall follows each operation that may change what is shown or hidden
(`may_hide`, a turn newly hidden, a memory loaded), and the last one.
"""
import json
import random
import sys
import tempfile
from collections import Counter
from datetime import date, timedelta
from pathlib import Path

import sklearn

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]  # tests and the scripts
import dcpm
from invariants import check

CITIES, THINGS = ("Paris", "Berlin", "Rome", "Lima"), ("coffee", "tea", "jazz", "rowing")
SAID = ("I moved to {c}.", "I live in {c}.", "I no longer live in {c}.", "My sister moved to {c}.",
        "Maybe I'll move to {c}.", "Back in {y} I lived in {c}.", "On {y}-03-01 I moved to {c}.",
        "I like {t}.", "I gave up {t}.", "I like {t}, mostly on weekends.", "I'm enjoying {t} again.",
        "Do you think I live in {c}?", "In {y} I worked at {c} Motors and I like {t}.", "I quit my job.",
        "I work at {c} Motors.", "I'm flying to {c} on {y}-06-10.", "I'm not flying to {c} on {y}-06-10.",
        "I have a car.", "I sold my car.", "Please forget that I like {t}.", "Forget that I live in {c}.",
        "Well, so it goes.")
HABITS = (("wrote a checklist for", "had a list for", "made a schedule for"),
          ("improvised", "went on a whim to", "had, without a plan,"),
          ("got on sale", "borrowed things for", "haggled over"))
SCENES = ("dinner", "flight", "meeting", "concert", "race", "exam", "wedding")
SLOTS = [("user", "residence", None), ("user", "likes", "coffe"), ("Bo", "residence", None)]
QUESTION = "Where do I live in Paris, Berlin or Rome, and do I like coffee, jazz or lists for dinner?"


def nodes(memory):
    kinds = (memory.schemas, memory.cores, memory.intentions)
    return [repr(node) for kind in kinds for node in kind.values()]


def put_turn(memory, text, t, session="s1", speaker="user"):
    """Keep a turn without reading it, so that claims can be written by hand."""
    turn = dcpm.Turn(f"t{len(memory.turns) + 1}", session, speaker, text, t)
    memory.commit("RAW", turn=turn)
    return turn


def dump(memory):
    """The whole memory as text for people."""
    lines = [str(line) for line in dcpm.chain_lines(memory, memory.heads)]
    for node in (*memory.schemas.values(), *memory.cores.values(), *memory.intentions.values()):
        lines.append(f"[{node.id}] {memory.why(node.id)['text']} ({node.status})")
    return "\n".join(lines)


def snapshot(store):
    """Everything a store holds, its log included, as one comparable string."""
    kinds = (store.turns, store.beliefs, store.schemas, store.cores, store.intentions, store.log)
    rest = (sorted(store.hidden), list(store.heads.values()), store.people, sorted(store.forgotten))
    return json.dumps([kinds, rest], sort_keys=True, default=vars)


def random_claims(rng, memory, told, text):
    """Claims on random slots at random times, or on one belief, or on all that a schema or core rests on."""
    def claim(attribute, value, slot, polarity, said=text):
        t_event = (told - timedelta(rng.choice((0, 0, 0, 40, 400)))).isoformat()
        return dcpm.Claim(attribute, value, said, (0, len(text)), polarity=polarity, t_event=t_event,
                          slot=slot)
    what = rng.random()
    if what < 0.5 and memory.schemas:
        node = rng.choice(list((memory.cores or memory.schemas).values()))
        olds, polarity = [memory.beliefs[i] for i in node.evidence], rng.choice((-1, -1, 1))
        return [claim(b.slot[1], b.value, b.slot, polarity) for b in olds]
    if what < 0.7 and memory.beliefs:
        old = memory.beliefs[rng.choice(list(memory.beliefs))]
        return [claim(old.slot[1], old.value, old.slot, rng.choice((1, -1)), f"{old.text}, {text}")]
    return [claim(slot[1], "coffee" if slot[2] else rng.choice(CITIES), slot, rng.choice((1, 1, 1, -1, 0)))
            for slot in rng.choices(SLOTS, k=2)]


def random_history(rng, length=40):
    """Yield the memory after each of `length` random operations, with (what, detail, was all well?)."""
    memory, day = dcpm.Memory(), date(2024, 1, 1)
    habits = rng.sample(HABITS, rng.choice((1, 1, 2, 3)))  # few at a time, so that cores arise and fall
    scenes = rng.sample(SCENES, 5)
    for step in range(length):
        day += timedelta(rng.choice((0, 1, 1, 9)))
        told = day - timedelta(rng.choice((0, 0, 0, 30)))  # sessions may arrive out of order
        what, session = rng.random(), f"s{step // 3}"
        if what < 0.66:
            fill = {"c": rng.choice(CITIES), "t": rng.choice(THINGS), "y": rng.randint(2019, 2025)}
            texts = [rng.choice(SAID).format(**fill) for _ in range(rng.choice((1, 1, 2)))]
            speaker = rng.choice(("user", "user", "Bo"))
            if rng.random() < 0.7:
                texts = [f"I {rng.choice(habit)} the {scene} {fill['t']}."
                         for habit in (habits[0], rng.choice(habits)) for scene in rng.sample(scenes, 2)]
                speaker = "user"
            done = ("observe", " ".join(texts), keeps_what_it_must(memory, lambda: memory.observe(
                " ".join(texts), told.isoformat(), session, speaker)))
        elif what < 0.8:
            text = f"message {step}"
            turn = put_turn(memory, text, told.isoformat(), session)
            claims = random_claims(rng, memory, told, text)
            done = ("write_claims", claims, keeps_what_it_must(
                memory, lambda: dcpm.write_claims(memory, turn, claims), turns=0))
        elif what < 0.83:
            word = rng.choice((rng.choice(CITIES + THINGS), f"{rng.choice(scenes)} {rng.choice(THINGS)}"))
            done = ("forget", word, keeps_what_it_must(memory, lambda: memory.forget(word), turns=0))
        elif what < 0.97:
            done = ("sleep", str(day), sleep_changes_no_belief(memory, day.isoformat()))
        else:
            with tempfile.TemporaryDirectory() as folder:
                memory.save(Path(folder) / "m.json")
                again = dcpm.Memory.load(Path(folder) / "m.json")
            same = snapshot(again) == snapshot(memory)
            memory, done = again, ("save and load", "", same)
        yield memory, done


def keeps_what_it_must(memory, act, turns=1):
    """By day no schema or core changes, no id or source disappears, and what was claimed keeps its turn."""
    before, count = nodes(memory), len(memory.turns)
    sources = {i: b.sources[:] for i, b in memory.beliefs.items()}
    done = act()
    cited = {source[0] for b in memory.beliefs.values() for source in b.sources}
    claimed = any(isinstance(op, tuple) and op[0] != "SUPPRESS" for op in done)
    return (nodes(memory) == before and len(memory.turns) == count + turns
            and (not claimed or list(memory.turns)[-1] in cited)
            and all(memory.beliefs[i].sources[:len(s)] == s for i, s in sources.items()))


def sleep_changes_no_belief(memory, now):
    """sleep leaves beliefs alone, and sleeping twice is sleeping once: the second night logs nothing. (That
    the log tells all is one of the invariants.)"""
    before = list(map(repr, memory.beliefs.values()))
    memory.sleep(now)
    events = len(memory.log)
    memory.sleep(now)
    return before == list(map(repr, memory.beliefs.values())) and events == len(memory.log)


def faults(memory, lines, higher):
    """What is wrong with these lines of chains, and with these schemas and cores, if they are shown."""
    out = []
    for line in lines:
        node = memory.beliefs.get(line.id)
        if line.id in memory.hidden or (node and node.status == "suppressed"):
            out.append(f"{line.id} is shown")
        if node and node.status == "superseded" and "current" in line.text:
            out.append(f"{line.id} is called current")
    for node in higher:
        cited = [memory.beliefs[i] for i in node.evidence]
        if sum(map(dcpm.holds, cited)) < 2 or any(b.status == "suppressed" for b in cited):
            out.append(f"{node.id} is shown without support")
    return out


def parts_leak(memory):
    """What the parts of a recall must not show: all chains, all schemas and cores that count as supported."""
    higher = [*memory.schemas.values(), *memory.cores.values()]
    supported = [node for node in higher if dcpm.is_supported(memory, node)]
    return faults(memory, dcpm.chain_lines(memory, memory.heads), supported)


def leaks(memory, now="2026-01-01"):
    """What a whole recall must not show."""
    found = memory.recall(QUESTION, now)
    higher = [memory.schemas.get(i) or memory.cores.get(i) for i in found.ids]
    out = faults(memory, found.lines, filter(None, higher))
    if dcpm.count_tokens("\n".join(str(line) for line in found.lines if line.channel != "schema")) > 800:
        out.append("over budget")
    return out


def may_hide(event):
    """May it change what is visible or hidden? A night that changed no schema, core or intention cannot."""
    return event.op in ("RETRACT", "SUPPRESS") or any(event.data.get(kind) for kind in dcpm.KINDS)


@sklearn.config_context(assume_finite=True, skip_parameter_validation=True)  # a sixth of the time
def run(histories, seed=0, length=40):
    """-> what was met, counted; an AssertionError names the seed of the history that broke an invariant."""
    met = Counter()
    for n in range(histories):
        events, hidden = 0, set()
        history = random_history(random.Random(f"{seed}-{n}"), length)
        for step, (memory, (what, detail, fine)) in enumerate(history, 1):
            problems = check(memory) + parts_leak(memory) + ([] if fine else [f"{what} broke its promise"])
            hides = memory.hidden != hidden or any(map(may_hide, memory.log[events:]))
            if hides or what == "save and load" or step == length:
                problems += leaks(memory)
                met["recalls"] += 1
            assert not problems, f"history {seed}-{n}, after {what} {detail!r}: {problems[:3]}"
            met.update({(kind, node.status) for kind in ("schemas", "cores", "intentions")
                        for node in getattr(memory, kind).values()} | {"operations"})
            events, hidden = len(memory.log), set(memory.hidden)
        met.update(event.op for event in memory.log)
    return met


if __name__ == "__main__":
    histories = int(sys.argv[1]) if len(sys.argv) > 1 else 10000
    seed, met = sys.argv[2] if len(sys.argv) > 2 else "0", Counter()
    for done in range(0, histories, 500):
        met += run(min(500, histories - done), f"{seed}-{done}")
        print(f"{met['operations']} operations in {min(done + 500, histories)} of {histories} histories: "
              "after each the invariants held and no part of a recall leaked; nor did a whole recall, "
              f"after {met['recalls']} of them", flush=True)
    print(*(f"{kind}: {count}" for kind, count in met.most_common()), sep=", ")
