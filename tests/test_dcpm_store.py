"""Invariants over random histories, and the night in vector space on worked vectors."""
import random
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

import dcpm
import stress_memory
from dcpm import Claim, Draft, Memory, embed_words
from invariants import check
from stress_memory import put_turn, snapshot

HERE = Path(__file__).resolve().parent
WORDS = dcpm.LIMITS["words"]


def test_random_histories_keep_every_invariant():
    met = stress_memory.run(16, "suite")
    assert {"ADD", "SUPERSEDE", "REFINE", "CONFIRM", "SPLICE", "RETRACT", "SUPPRESS", "SLEEP"} <= set(met)
    assert {("schemas", "stable"), ("schemas", "dormant"), ("cores", "stable")} <= set(met)
    assert met["operations"] == 16 * 40


def test_the_same_operations_give_the_same_store():
    def final(seed):
        *_, (memory, _) = stress_memory.random_history(random.Random(seed))
        return snapshot(memory)
    assert final("suite-0") == final("suite-0") != final("suite-1")


@pytest.mark.parametrize("hurt, sentence", [
    (lambda b, m: None, None), (lambda b, m: setattr(b["b2"], "prev", None), "mutual"),
    (lambda b, m: setattr(b["b1"], "t_event", "2025-01-01"), "older"),
    (lambda b, m: setattr(b["b1"], "status", "active"), "is active"), (lambda b, m: m.log.pop(), "replaying"),
    (lambda b, m: setattr(b["b2"], "value", "Paris"), "equal"),
    (lambda b, m: b["b1"].sources.clear(), "source"),
    (lambda b, m: setattr(b["b3"], "slot", ("user", "employer", None)), "one chain")])
def test_check_notices_damage(hurt, sentence):
    memory = Memory()
    for day, text in enumerate(("I live in Paris.", "I moved to Berlin.", "I moved to Rome."), 1):
        memory.observe(text, f"2024-05-0{day}")
    hurt(memory.beliefs, memory)
    found = check(memory)
    assert any(sentence in problem for problem in found) if sentence else found == []


def test_odd_texts_are_kept_and_break_nothing():
    memory = Memory()
    texts = ["", "\x00", "a" * 3000, "." * 3000, '"' * 2999, "I " * 1500, "my sister " * 300, "forget " * 300,
             "I like " + "very " * 600, "I moved to " + "A" * 3000, "🙂" * 300, "I live in \x00Paris.",
             "I like \ud83d tea.", "I moved in 0000, on 2023-13-45.", "I'm flying to Rome on 2023-02-29.",
             "In 2021 I lived in Rome. " * 100, "In \u017feptember I was ill.", "I'm off on 0000-00-00."]
    for i, text in enumerate(texts):
        memory.observe(text, "2024-05-01", f"s{i}")
    memory.sleep("2024-06-01")
    assert [t.text for t in memory.turns.values()] == texts and check(memory) == []
    assert memory.recall("", "2024-06-01", 0).text == ""
    assert memory.answer("", "2024-06-01")[0] == "I don't know."


@pytest.mark.parametrize("bad", ["yesterday", "", "2024-13-01", "20240501", "2024-W18-3"])
def test_a_bad_date_is_refused_before_anything_is_kept(bad):
    memory = Memory()
    with pytest.raises((ValueError, dcpm.DcpmError)):
        memory.ingest([("I live in Paris.", "2024-05-01", "s", "user"), ("I ran.", bad, "s", "user")])
    assert not memory.turns and not memory.log
    with pytest.raises(dcpm.DcpmError, match="b99"):
        memory.why("b99")


def test_ingest_is_observe_many_times():
    told = [(f"I moved to {city}.", f"2024-05-0{day}", "s", "user") for day, city in enumerate("AB", 1)]
    one, many = Memory(), Memory()
    assert many.ingest(told) == [one.observe(*turn) for turn in told] and many.beliefs == one.beliefs


def test_rules_import_no_model_library():
    code = ("import dcpm; m = dcpm.Memory(); [m.observe(t, '2024-05-01', f's{i}') for i, t in enumerate("
            "['I wrote a list for dinner.', 'I made a list for the stew.', 'I had a list for the cake.'])];"
            "m.sleep('2024-05-02'); assert m.schemas; print(m.answer('How do I cook?', '2024-05-03'))")
    command = [sys.executable, "-X", "importtime", "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    assert run.returncode == 0, run.stderr[-2000:]
    imported = {line.split("|")[-1].strip().split(".")[0] for line in run.stderr.splitlines()}
    assert "sklearn" in imported and not imported & {"torch", "transformers", "datasets", "common"}


# ---------------------------------------------------------------- an older message never becomes the present
SPOTS = [("user", "residence", None), ("user", "employer", None), ("Bo", "residence", None),
         ("user", "likes", "coffe"), ("user", "event", "i saw a fox")]


def random_past(rng):
    """Claims in order of time, (slot, value, polarity, date): no two of one date, and in a chain no value
    comes back after another one. The rows of the decision table that forbid more are named below."""
    said, latest = [], {}
    for n in range(rng.randrange(4, 16)):
        slot = rng.choice(SPOTS)
        value, polarity = latest.get(slot, ("", 0))
        if slot not in latest or rng.random() < 0.6:  # else the same once more
            value, polarity = f"value{n}", rng.choice((1, 1, -1, 0))
        latest[slot] = value, polarity
        said.append((slot, value, polarity, f"2023-{n // 20 + 1:02d}-{n % 20 + 1:02d}"))
    return said


def tell_claims(said):
    memory = Memory()
    for n, (slot, value, polarity, t_event, *text) in enumerate(said):
        turn = put_turn(memory, text[0] if text else f"I said {value}", f"2024-01-{n + 1:02d}", f"s{n}")
        claim = Claim(slot[1], value, turn.text, (0, len(turn.text)), polarity=polarity, t_event=t_event)
        claim.slot = slot
        dcpm.write_claims(memory, turn, [claim])
    assert check(memory) == []
    return memory


def presents(memory):
    """{slot: (the dates of its chain, what its head says)}"""
    return {slot: ([b.t_event for b in memory.trail(slot)], head.value, head.polarity)
            for slot, head in zip(memory.heads, map(memory.head, memory.heads))}


def test_told_in_any_order_every_chain_ends_with_the_same_head_and_dates():
    met = set()
    for seed in range(150):
        rng = random.Random(f"order-{seed}")
        said = random_past(rng)
        in_order = presents(tell_claims(said))
        memory = tell_claims(rng.sample(said, len(said)))
        assert presents(memory) == in_order, seed
        met.update(event.op for event in memory.log)
    assert met == {"RAW", "ADD", "SUPERSEDE", "RETRACT", "CONFIRM", "SPLICE"}


HOME = SPOTS[0]
PARIS, BERLIN, AGAIN = ((HOME, value, 1, f"2023-01-0{day}")
                        for day, value in enumerate(("Paris", "Berlin", "Paris"), 1))
JAZZ = (("user", "hobby", "guitar"), "guitar", 1, "2023-01-02", "I play guitar, mostly jazz")
GUITAR = (("user", "hobby", "guitar"), "guitar", 1, "2023-01-01", "I play guitar")


@pytest.mark.parametrize("row, said, in_order, otherwise", [
    # what is told between them later is news: a confirmation adds a source and no date
    ("t(c) >= t(h), the same: CONFIRM", [PARIS, AGAIN, BERLIN], "Paris Berlin Paris", "Paris Berlin"),
    ("t(c) < t(h), equals a neighbour in time: CONFIRM", [AGAIN, PARIS, BERLIN], "Paris Berlin Paris",
     "Paris Berlin"),
    # the shorter one, told late, says nothing new
    ("t(c) >= t(h), the same in more words: REFINE", [JAZZ, GUITAR], "guitar guitar", "guitar"),
    # of equal dates the order of arrival decides
    ("t(c) >= t(h), other value or polarity: SUPERSEDE", [(*BERLIN[:3], PARIS[3]), PARIS], "Paris Berlin",
     "Berlin Paris")])
def test_rows_of_the_decision_table_that_depend_on_the_order_of_telling(row, said, in_order, otherwise):
    def values(memory):
        return " ".join(b.value for b in memory.trail(said[0][0]))
    ordered = [PARIS, said[0]] if len({c[3] for c in said}) == 1 else sorted(said, key=lambda c: c[3])
    assert values(tell_claims(ordered)) == in_order and values(tell_claims(said)) == otherwise
    assert row.split(": ")[0] in " ".join(dcpm.decide.__doc__.split())  # it is a row of the table


def test_what_was_asked_to_be_forgotten_stays_so_whenever_it_is_told_again():
    """The row "the same value, asked to be forgotten" looks at no date."""
    memory = tell_claims([BERLIN])
    memory.commit("SUPPRESS", ["b1"], hide=[])
    put = put_turn(memory, "I said Berlin", "2024-02-01")
    claim = Claim("residence", "Berlin", put.text, (0, 13), t_event="2023-05-01", slot=HOME)
    assert dcpm.write_claims(memory, put, [claim]) == [("CONFIRM", "b1")]
    assert memory.as_of(HOME, "2024-01-01") is None


# ---------------------------------------------------------------- confidence
@pytest.mark.parametrize("told, confidence", [
    ([("a", 0.9)], 0.9), ([("a", 0.9), ("a", 0.9)], 0.9), ([("a", 0.9), ("b", 0.9)], 0.99),
    ([("a", 0.6), ("b", 0.6)], 0.84), ([("a", 0.4), ("a", 0.6)], 0.6), ([(s, 0.9) for s in "abc"], 0.99)])
def test_confidence_of_a_belief_is_a_noisy_or_over_sessions(told, confidence):
    memory = Memory()
    for i, (session, reliability) in enumerate(told):
        turn = put_turn(memory, "I like tea.", f"2024-05-0{i + 1}", session)
        claim = Claim("likes", "tea", "I like tea", (0, 10), reliability=reliability)
        dcpm.write_claims(memory, turn, [claim])
    (belief,) = memory.beliefs.values()
    assert belief.confidence == confidence


@pytest.mark.parametrize("s, x, sessions, confidence, status", [
    (3, 0, 2, 0.8, "stable"), (5, 0, 3, 0.8571, "stable"), (3, 1, 2, 0.6667, "stable"),
    (3, 2, 2, 0.5714, "contested"), (3, 3, 2, 0.5, "contested"), (5, 2, 2, 0.6667, "stable"),
    (3, 0, 1, 0.8, "forming"), (2, 0, 2, 0.75, "forming"), (1, 0, 1, 0.6667, "dormant"),
    (0, 0, 1, 0.5, "dormant")])
def test_confidence_of_a_schema_is_the_rule_of_succession(s, x, sessions, confidence, status):
    memory = Memory()
    for i in range(s + x + 1):
        turn = put_turn(memory, f"fact {i}", "2024-05-01", f"s{i % sessions}")
        dcpm.write_claims(memory, turn, [Claim("event", f"fact {i}", f"fact {i}", (0, 6))])
    ids = list(memory.beliefs)
    schema = dcpm.Schema("s1", "user", "x", "text", "", evidence=[*ids[:s], ids[-1]], against=ids[s:s + x])
    memory.commit("SUPPRESS", [ids[-1]], hide=[])  # what does not hold counts for nothing
    dcpm.recount(schema, memory)
    assert (schema.confidence, schema.status) == (confidence, status)


# ---------------------------------------------------------------- vectors
def cosine(a, b):
    a, b = embed_words([a, b]).toarray()
    return float(a @ b)


def test_embed_words_gives_unit_rows_and_one_habit_of_one_domain_is_near():
    habits = {("plans", "cooking"): ("I wrote a checklist for the dinner", "I had a list for the stew"),
              ("plans", "travel"): ("I drew up an itinerary for the flight", "I had a list for the trip"),
              ("saves", "cooking"): ("I got the dinner on sale", "I haggled over the stew"),
              ("saves", "travel"): ("I got the flight on sale", "I haggled over the hotel")}
    texts = [(pole, text) for pole, pair in habits.items() for text in pair]
    rows = embed_words([text for _, text in texts])
    assert np.allclose(np.sqrt(rows.multiply(rows).sum(1)), 1)
    for (a, one), (b, two) in combinations(texts, 2):
        assert (cosine(one, two) > WORDS.cluster) == (a == b), (one, two)
    assert cosine("I live in Rome", "I live in Rome") > 0.999 and cosine("I saw a fox", "I heard a bell") == 0


def around(*directions):
    """Unit rows in space: (degrees from x towards y, degrees up, how many)."""
    rows = []
    for flat, up, count in directions:
        flat, up = np.radians(flat), np.radians(up)
        rows += [[np.cos(flat) * np.cos(up), np.sin(flat) * np.cos(up), np.sin(up)]] * count
    return np.array(rows)


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix])
def test_clustering_in_two_stages(kind):
    def cluster(*directions):
        return dcpm.two_stage_dbscan(kind(around(*directions)), WORDS).tolist()
    # 45 degrees are cosine .71: near enough for the first stage, too far for the second
    assert cluster((0, 0, 6), (45, 0, 6)) == [0] * 12  # twelve are not looked at again
    labels = cluster((0, 0, 6), (45, 0, 6), (0, 50, 1), (0, -90, 2))
    one, two = labels[0], labels[6]
    assert one != two and labels == [one] * 6 + [two] * 6 + [one] + [-1] * 2  # the 13th joins the nearest
    assert len(set(cluster((0, 0, 13)))) == 1  # one heap stays one
    assert cluster((0, 0, 3), (90, 0, 3), (0, 90, 2)) == [0] * 3 + [1] * 3 + [-1] * 2
    assert cluster((0, 0, 3), (56, 0, 3)) == [0] * 6  # cosine .559
    assert cluster((0, 0, 3), (57, 0, 3)) == [0] * 3 + [1] * 3  # cosine .545


@pytest.mark.parametrize("alike, unlike, domains, collide", [
    (0.71, 0.59, "ab", True), (0.70, 0.59, "ab", False), (0.71, 0.60, "ab", False), (0.71, 0.59, "aa", False),
    (1.0, 0.0, "ab", True), (1.0, 1.0, "ab", False), (-1.0, 0.0, "ab", False)])  # contradiction
def test_a_collision_is_alike_in_behaviour_and_unlike_in_content_and_domain(alike, unlike, domains, collide):
    behaviour, content = (np.array([[1, 0], [c, np.sqrt(1 - c * c)]]) for c in (alike, unlike))
    expected = np.array([[False, collide], [collide, False]])
    assert (dcpm.collisions(behaviour, content, list(domains), WORDS) == expected).all()
    behaviour, content = sparse.csr_matrix(behaviour), sparse.csr_matrix(content)
    assert (dcpm.collisions(behaviour, content, list(domains), WORDS) == expected).all()


@pytest.mark.parametrize("n, pairs, groups", [
    (3, [(0, 1), (1, 2), (0, 2)], [[0, 1, 2]]), (3, [(0, 1), (1, 2)], [[0, 1, 2]]), (3, [], []),
    (5, [(0, 1), (3, 4)], [[0, 1], [3, 4]]), (5, [(0, 1), (0, 2), (1, 2), (2, 3), (3, 4)], [[0, 1, 2]]),
    (4, [(2, 3), (0, 1), (1, 2), (0, 2), (0, 3), (1, 3)], [[0, 1, 2, 3]])])
def test_union_of_collisions_drops_who_collides_with_less_than_half(n, pairs, groups):
    collide = np.zeros((n, n), bool)
    for i, j in pairs:
        collide[i, j] = collide[j, i] = True
    assert list(dcpm.collision_groups(collide)) == groups


# ---------------------------------------------------------------- a night with a scripted inducer
class Toy(dcpm.Rules):
    """The first word of a fact is its domain, "not" makes it evidence against; behaviour is a table."""

    def __init__(self, **behaviour):
        self.behaviour = behaviour

    def induce(self, memory, clusters, noise, known):
        facts = [b for group in (*clusters, noise) for b in group]
        for domain in dict.fromkeys(b.text.split()[0] for b in facts):
            of = [b for b in facts if b.text.split()[0] == domain]
            yield Draft(domain, f"{domain} text", [b.id for b in of if " not " not in b.text],
                        [b.id for b in of if " not " in b.text])

    def strip(self, memory, schemas):
        return [self.behaviour[s.domain] for s in schemas]

    def name_core(self, members):
        return "core of " + " ".join(sorted(m.domain for m in members))


def facts(memory, *texts, days=range(1, 4)):
    for text in texts:
        for day in days:
            said = f"{text} {day}"
            turn = put_turn(memory, said, f"2024-05-{day:02d}", f"s{day}")
            dcpm.write_claims(memory, turn, [Claim("event", said, said, (0, len(said)))])


def test_a_core_is_as_sure_as_the_second_of_its_domains():
    toy = Toy(art="alpha", bus="alpha", cup="alpha", den="beta", elk="gamma")
    memory = Memory(toy)
    facts(memory, "art", "bus", "cup", "den", "elk")
    facts(memory, "art", days=(4, 5))
    facts(memory, "cup did not", days=(1,))
    memory.sleep("2024-06-01")
    (core,) = memory.cores.values()
    assert sorted(memory.schemas[m].confidence for m in core.members) == [0.6667, 0.8, 0.8571]
    assert (core.confidence, core.text) == (0.8, "core of art bus cup")
    facts(memory, "bus did not", days=(1, 2))
    memory.sleep("2024-06-02")
    core = memory.cores[core.id]
    assert (core.confidence, len(core.members)) == (0.6667, 3)  # bus is contested now
    facts(memory, "cup did not", days=(2,))
    memory.sleep("2024-06-03")
    assert (memory.cores[core.id].status, memory.cores[core.id].confidence) == ("dormant", 0.0)
    assert check(memory) == []


@pytest.mark.parametrize("first, second, winner", [
    ("art bus", "cup den", "art bus"), ("elk fox", "art bus", "elk fox"),  # as many members: the older one
    ("art bus", "cup den elk", "cup den elk")])
def test_a_group_joins_the_core_of_most_members_then_the_oldest(first, second, winner):
    domains = ("art", "bus", "cup", "den", "elk", "fox")
    toy = Toy(**{d: "alpha" if d in first else d for d in domains})
    memory = Memory(toy)
    facts(memory, *domains)
    memory.sleep("2024-06-01")
    toy.behaviour.update(dict.fromkeys(second.split(), "beta"))
    facts(memory, "art", days=(4,))
    memory.sleep("2024-06-02")
    assert [c.text for c in memory.cores.values()] == [f"core of {first}", f"core of {second}"]
    toy.behaviour.update(dict.fromkeys(domains, "gamma"))  # all of them collide: both cores are touched
    facts(memory, "art", days=(5,))
    memory.sleep("2024-06-03")
    joined = {c.text.removeprefix("core of "): len(c.members) for c in memory.cores.values()}
    assert joined.pop(winner) == 6
    (loser,) = joined
    assert joined[loser] == len(loser.split())


def test_fewer_than_five_stable_schemas_or_no_name_make_no_core():
    memory = Memory(Toy(art="alpha", bus="alpha", cup="alpha", den="alpha", elk="alpha"))
    facts(memory, "art", "bus", "cup", "den")
    memory.sleep("2024-06-01")
    assert len(memory.schemas) == 4 and not memory.cores
    facts(memory, "elk")
    memory.backend.name_core = lambda members: None
    memory.sleep("2024-06-02")
    assert len(memory.schemas) == 5 and not memory.cores


def test_without_a_write_a_second_night_asks_nothing():
    memory = Memory(Toy(art="alpha"))
    facts(memory, "art")
    turn = put_turn(memory, "a trip", "2024-05-05")
    dcpm.write_claims(memory, turn, [Claim("plan", "trip", "a trip", (0, 6), until="2024-06-10")])
    memory.sleep("2024-06-01")
    before = snapshot(memory)
    memory.backend.induce = lambda *a: [Draft("other", "found by chance", list(memory.beliefs))]
    memory.sleep("2024-06-01")
    assert snapshot(memory) == before
    memory.sleep("2024-07-01")  # time alone ends a plan, and still nothing else
    assert [i.status for i in memory.intentions.values()] == ["expired"] and len(memory.schemas) == 1
    before = snapshot(memory)
    memory.sleep("2024-07-01")
    assert snapshot(memory) == before
