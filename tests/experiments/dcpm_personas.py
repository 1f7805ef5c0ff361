"""People who never name their habits: the lives and the questions of bench_dcpm.py.

Every habit shows in three domains, in episodes of different days; questions ask about those and about domains
that never came up. Options are phrases that no life contains.
"""
import json
import random
import sys
from collections import defaultdict
from datetime import date, timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import dcpm

SCENES = {
    "cooking": "the dinner|the cake|the soup|the roast",
    "travel": "the trip|the flight|the train journey|the holiday",
    "work": "the report|the meeting|the presentation|the conference",
    "garden": "the lawn|the hedge|the flower bed|the greenhouse",
    "sport": "the race|the hike|the marathon|the swim",
    "home": "the flat|the bedroom wall|the bathroom|the new furniture",
    "music": "the concert|the choir evening|the gig|the recording session",
    "study": "the exam|the essay|the seminar|the thesis",
    "party": "the birthday|the picnic|the wedding|the reunion",
    "gifts": "the gift for Ann|the wrapping|the presents|the gift for Tom"}
# No phrase names its pole. Per pole: three phrases for the history, then one for answer options only.
BANKS = json.loads(Path(__file__).with_name("dcpm_banks.json").read_text(encoding="utf-8"))
CITIES = "Paris Berlin Rome Lima Oslo Quito Cairo Delhi Tokyo Lagos Perth Turin".split()
FIRMS = "Acme Initech Globex Umbrella Hooli Stark Wayne Tyrell".split()
NAMES = "Vega Juno Orla Milo Pip Zora Nemo Tilda Bruno Kiki Otto Wanda Fips Gus Luma Rollo".split()
# Half of the span questions ask by paraphrase: easy ones would prove nothing.
THINGS = {"bike": "thing I pedal", "boat": "thing I row", "kite": "thing I fly", "cactus": "thing I water",
          "lamp": "thing that glows", "robot": "thing that beeps"}
FILLER = ("watched|heard of|thought about|passed by|talked about|dreamt of|saw|forgot".split("|"),
          "an old film|a storm|the tram|a stranger|a bridge|the moon|a lost key|the river".split("|"))
KINDS = ("span", "current", "past", "how changed", "implicit seen", "implicit unseen")


def opposite(pole):
    return dcpm.POLES[pole][0]


def make_persona(seed, bank):
    """One life: [(ISO date, session, text)] and [(kind, question, options, index of the right one)]."""
    rng, said, sessions = random.Random(f"persona-{seed}"), defaultdict(list), range(20)
    phrases = {pole: line.split("|") for pole, line in bank["phrases"].items()}
    scenes = {d: line.split("|") for d, line in (SCENES | bank.get("scenes", {})).items()}
    pairs = sorted({tuple(sorted((pole, opposite(pole)))) for pole in phrases})
    poles = [rng.choice(pair) for pair in rng.sample(pairs, 4)]
    domains = rng.sample(sorted(scenes), 10)
    seen, unseen = domains[:6], domains[6:]
    # Three of the six domains per habit, rotated, so that each domain hosts two habits.
    home = {pole: [seen[(i + k) % 6] for k in (0, 2, 3)] for i, pole in enumerate(poles)}
    for pole in poles:
        for domain in home[pole]:
            days = rng.sample(sessions, 3)
            for phrase, scene, n in zip(phrases[pole], rng.sample(scenes[domain][:3], 3), days):
                said[n].append(f"I {phrase.format(scene)}.")
        against, place = phrases[opposite(pole)][:3], rng.choice(scenes[rng.choice(seen)][:3])
        said[rng.choice(sessions)].append(f"I {rng.choice(against).format(place)}.")  # nobody is consistent
        said[rng.choice(sessions)].append(f"My neighbour {rng.choice(against).format(place)}.")
    cities, firms, names = rng.sample(CITIES, 6), rng.sample(FIRMS, 4), rng.sample(NAMES, 9)
    moves, jobs = bank["move"].split("|"), bank["job"].split("|")  # three of each
    for n, text, place in zip((1, 7, 13, 2, 8, 15), moves + jobs, cities[1:4] + firms[:3]):
        said[n].append(text.format(place))
    said[9].append(bank["late"].format(2021, cities[0]))
    said[rng.choice((14, 16))].append(bank["other"].format(cities[4]))
    for n, city in ((5, cities[5]), (11, cities[5]), (18, cities[1]), (19, cities[5])):
        said[n].append(f"I spent a day in {city}.")  # to name a place is not to live there
    for n in (6, 17):
        said[n].append(f"I met somebody from {firms[3]}.")
    things = rng.sample([(colour, thing) for colour in ("red", "blue", "green") for thing in THINGS], 9)
    for (colour, thing), name in zip(things, names):
        said[rng.choice(sessions)].append(bank["span"].format(colour, thing, name))
    turns = []
    for n in sessions:
        day = (date(2024, 1, 3) + timedelta(14 * n)).isoformat()
        texts = said[n] + ["I {} {}.".format(*map(rng.choice, FILLER)) for _ in range(8)]
        turns += [(day, f"s{n}", text) for text in rng.sample(texts, len(texts))]
    timelines = (("live", cities[:4], cities[4:], CITIES), ("work", firms[:3], firms[3:], FIRMS))
    questions = span_questions(rng, bank, dict(zip(things, names))) + chain_questions(rng, timelines)
    return turns, questions + implicit_questions(rng, phrases, scenes, poles, home, unseen)


def as_question(rng, kind, text, right, wrong):
    options = rng.sample([right, *wrong[:3]], 4)
    return kind, text, options, options.index(right)


def span_questions(rng, bank, names):
    out = []
    for i, (colour, thing) in enumerate(rng.sample(sorted(names), 6)):
        near = sorted(names, key=lambda t: (t[0] != colour, t[1] != thing, t))  # near misses first
        text = bank["ask"].format(f"{colour} {thing if i % 2 else THINGS[thing]}")
        out.append(as_question(rng, "span", text, names[colour, thing], [names[t] for t in near[1:]]))
    return out


def chain_questions(rng, timelines):
    out = []
    for verb, chain, extra, pool in timelines:
        decoys = [extra[-1], *rng.sample(chain[:-1] + extra[:-1], 2)]
        out.append(as_question(rng, "current", f"Where do I {verb} now?", chain[-1], decoys))
        for i in range(1, len(chain)):
            others = [extra[-1], *(c for c in chain if c not in chain[i - 1:i + 1]), *extra[:-1],
                      *(c for c in pool if c not in chain + extra)]
            text = f"Where did I {verb} before {chain[i]}?"
            out.append(as_question(rng, "past", text, chain[i - 1], others))
        orders = [chain[::-1], [*chain[1:], chain[0]], [chain[1], chain[0], *chain[2:]]]
        right, *wrong = (" → ".join(order) for order in (chain, *orders))
        out.append(as_question(rng, "how changed", f"How did where I {verb} change over time?", right, wrong))
    return out


def implicit_questions(rng, phrases, scenes, poles, home, unseen):
    """Options differ only in the behaviour they show: one own pole against opposites of own poles."""
    out = []
    for pole in poles:
        others = [opposite(p) for p in poles if p != pole]
        asked = [rng.choice(home[pole]), *rng.sample(unseen, 2)]
        for kind, domain in zip(("implicit seen", "implicit unseen", "implicit unseen"), asked):
            scene, wrong = scenes[domain][3], [opposite(pole), *rng.sample(others, 2)]
            options = [phrases[p][3].format(scene) for p in (pole, *wrong)]
            text = f"Which would suit me best for {scene}?"
            out.append(as_question(rng, kind, text, options[0], options[1:]))
    return out
