"""Worked examples of the memory: one test per behaviour that a user could notice."""
import sys
from datetime import date, timedelta
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dcpm
from dcpm import Memory, DcpmError

HOME, WORK = ("user", "residence", None), ("user", "employer", None)


def tell(*texts, memory=None, start="2024-05-01", session="s{}"):
    """Observe texts one day apart, each in a session of its own unless `session` says otherwise."""
    memory = memory or Memory()
    first = len(memory.store().turns)
    for i, text in enumerate(texts, first):
        day = (date.fromisoformat(start) + timedelta(i)).isoformat()
        memory.observe(text, day, session.format(i))
    return memory


def values(memory, slot=HOME):
    return [b.value for b in memory.trail(slot)]


def ops(memory):
    return [e.op for e in memory.store().log if e.op != "RAW"]


def test_01_one_claim_one_node():
    memory = tell("I live in Paris.")
    (node,) = memory.trail(HOME)
    assert (node.value, node.prev, node.next) == ("Paris", None, None)
    assert (len(node.sources), node.status) == (1, "active")


def test_02_a_move_supersedes():
    memory = tell("I live in Paris.", "I moved to Berlin.")
    paris, berlin = memory.trail(HOME)
    assert ops(memory) == ["ADD", "SUPERSEDE"]
    assert (berlin.prev, paris.next, berlin.link_kind) == (paris.id, berlin.id, "supersede")
    assert paris.status == "superseded" and memory.answer("Where do I live?", "2024-06-01")[0] == "Berlin"


def test_03_going_back_is_a_third_node():
    memory = tell("I live in Paris.", "I moved to Berlin.", "I'm back in Paris.")
    a, b, c = memory.trail(HOME)
    assert values(memory) == ["Paris", "Berlin", "Paris"] and a.id != c.id and c.prev == b.id
    assert memory.check() == []


def test_04_before():
    memory = tell("I live in Paris.", "I moved to Berlin.", "I'm back in Paris.")
    first, second, _ = memory.trail(HOME)
    assert memory.answer("Where did I live before Berlin?", "2024-06-01") == ("Paris", [first.id])
    assert memory.answer("Where did I live before the present one?", "2024-06-01") == ("Berlin", [second.id])


@pytest.mark.parametrize("session, confidence", [("s{}", 0.99), ("same", 0.90)])
def test_05_confirmation_counts_once_a_session(session, confidence):
    memory = tell("I live in Paris.", "I moved to Berlin.", "I still live in Berlin.", session=session)
    assert ops(memory)[-1] == "CONFIRM" and len(memory.trail(HOME)) == 2
    head = memory.trail(HOME)[-1]
    assert len(head.sources) == 2 and head.confidence == confidence


def test_06_likes_coexist():
    memory = tell("I like coffee.", "I also like tea.")
    assert [len(memory.trail(s)) for s in memory.store().heads] == [1, 1]
    assert all(b.status == "active" for b in memory.store().beliefs.values())


def test_07_giving_up_and_resuming():
    memory = tell("I like coffee.", "I like tea.", "I gave up coffee.", "I'm drinking coffee again.")
    coffee, tea = memory.store().members[("user", "likes")]
    assert [b.polarity for b in memory.trail(coffee)] == [1, -1, 1]
    assert [b.polarity for b in memory.trail(tea)] == [1]


def test_08_refinement_is_not_a_revision():
    memory = tell("I play guitar.", "I play guitar, mostly jazz on weekends.")
    old, new = memory.trail(("user", "hobby", "guitar"))
    assert new.link_kind == "refine" and "guitar" in new.text and "jazz" in new.text and len(new.sources) == 2
    assert memory.answer("What was my previous guitar style?", "2024-06-01")[0] == "Nothing before that."


def test_09_told_late():
    memory = Memory()
    memory.observe("I work at Acme.", "2024-05-01")
    memory.observe("Back in 2023 I worked at Initech.", "2024-05-09")
    assert values(memory, WORK) == ["Initech", "Acme"] and ops(memory) == ["ADD", "SPLICE"]
    assert memory.answer("Where do I work?", "2024-06-01")[0] == "Acme" and memory.check() == []


def test_10_somebody_else():
    memory = tell("I live in Paris.", "My sister moved to Oslo.")
    assert values(memory) == ["Paris"] and values(memory, ("sister", "residence", None)) == ["Oslo"]
    assert memory.answer("Where does my sister live?", "2024-06-01")[0] == "Oslo"


@pytest.mark.parametrize("text", [
    "Maybe I'll move to Rome.", "Do you think I live in Rome?", '"I live in Rome," said the hero.',
    "If I lived in Rome I would walk more.", "I might move to Rome."])
def test_11_12_no_chain_is_touched(text):
    memory = tell("I live in Paris.", text)
    assert values(memory) == ["Paris"] and len(memory.store().turns) == 2
    assert all(b.slot[1] in ("residence", "maybe") for b in memory.store().beliefs.values())


def test_13_sold():
    memory = tell("I have a car.", "I sold my car.")
    assert [b.polarity for b in memory.trail(("user", "possession", "car"))] == [1, -1]
    assert memory.answer("Do I have a car?", "2024-06-01")[0] == "No, since 2024-05-02."


def test_14_as_of():
    memory = tell("I live in Paris.", "I moved to Berlin.")
    at = [memory.as_of(HOME, day) for day in ("2024-04-30", "2024-05-01", "2024-05-20")]
    assert at[0] is None and [b.value for b in at[1:]] == ["Paris", "Berlin"]


def test_15_forget():
    memory = tell("I have migraines.", "I live in Paris.", "Please forget that I have migraines.")
    (node,) = memory.trail(("user", "condition", "migrain"))
    assert node.status == "suppressed" and memory.check() == []
    context = memory.recall("What do you know about my migraines and where I live?", "2024-06-01")
    assert "igraine" not in context.text and "Paris" in context.text
    assert memory.why(node.id)["text"] == "(forgotten on request)"
    tell("I have migraines.", memory=memory)  # told again: kept, and still not shown
    assert "igraine" not in memory.recall("migraines?", "2024-06-01").text


def test_16_twice_in_one_turn():
    memory = tell("I live in Paris. I live in Paris.")
    assert ops(memory) == ["ADD"] and len(memory.store().beliefs) == 1


# ---------------------------------------------------------------- System2
PLANS = {"cooking": ("I wrote a checklist for the dinner.", "I drew up a schedule for the roast.",
                     "I mapped out the cake step by step."),
         "travel": ("I made a list before the trip.", "I printed an itinerary for the flight.",
                    "I booked the hotel weeks ahead."),
         "work": ("I wrote an agenda for the meeting.", "I prepared the report in advance.",
                  "I made a timetable for the project.")}
OTHERS = ("I found a cheaper song download at a discount.", "I got the concert ticket on sale.",
          "I borrow every guitar.",
          "I went to the gym by myself.", "I run alone.", "I did the race solo.")
WHIM = ("I cooked dinner on a whim.", "I baked a cake without a plan.", "I improvise every stew.")


def planner(*extra):
    memory = tell(*[t for texts in PLANS.values() for t in texts], *OTHERS, *extra)
    memory.sleep("2024-06-01")
    return memory


def schema(memory, domain, behaviour="plans"):
    return memory.store().schemas[memory.store().new_id("s", "user", domain, behaviour)]


def retract(memory, domain):
    """End every belief under the schema of a domain, as if the user had said so."""
    store = memory.store()
    for id_ in schema(memory, domain).live:
        old = store.beliefs[id_]
        turn = dcpm.Turn(store.new_id("t"), "later", "user", f"no longer: {old.text}", "2024-07-01")
        store.commit("RAW", [turn.id], turn.id, turn=dcpm.asdict(turn))
        claim = dcpm.Claim(old.slot[1], old.value, turn.text, (0, len(turn.text)), polarity=-1)
        assert dcpm.write_claims(store, turn, [claim])[0][0] == "RETRACT"


@pytest.mark.parametrize("sessions, status", [("s{}", "stable"), ("one", "forming")])
def test_18_19_a_habit_needs_three_beliefs_from_two_sessions(sessions, status):
    memory = tell(*PLANS["cooking"], session=sessions)
    memory.sleep("2024-06-01")
    (found,) = memory.store().schemas.values()
    assert (found.domain, found.behaviour) == ("cooking", "plans")
    assert (found.confidence, found.status) == (0.80, status)
    before = dcpm.snapshot(memory.store())
    memory.sleep("2024-06-01")
    assert dcpm.snapshot(memory.store()) == before
    if status == "forming":
        assert found.text not in memory.recall("How do I cook?", "2024-06-01").text


def test_opposite_behaviour_lowers_confidence():
    memory = tell(*PLANS["cooking"], "I baked a cake without a plan.")
    memory.sleep("2024-06-01")
    assert schema(memory, "cooking").confidence == round(4 / 6, 4)  # s = 3, x = 1


def test_17_20_core_and_why():
    memory = planner()
    (core,) = memory.store().cores.values()
    members = [schema(memory, d) for d in ("cooking", "travel", "work")]
    assert sorted(core.members) == sorted(m.id for m in members) and core.status == "stable"
    assert core.evidence == sorted({i for m in members for i in m.evidence}) and memory.check() == []
    tree = memory.why(core.id)
    spans = [s for m in tree["because"] for b in m["because"] for s in b["because"]]
    assert len(spans) == 9 and all(s["text"] in memory.store().turns[s["id"]].text for s in spans)
    assert core.id in memory.recall("How should I set up my new aquarium?", "2024-06-02").ids


def test_21_support_falls_away():
    memory = planner()
    (core,) = memory.store().cores.values()
    retract(memory, "cooking")
    found = memory.recall("dinner?", "2024-07-01")
    assert schema(memory, "cooking").id not in found.ids  # hidden before the night
    tell(*WHIM, memory=memory, start="2024-07-02")
    memory.sleep("2024-08-01")
    core = memory.store().cores[core.id]
    old, new = schema(memory, "cooking"), schema(memory, "cooking", "improvises")
    assert old.status == "dormant" and new.status == "stable" and (new.prev, old.next) == (old.id, new.id)
    assert core.status == "stable" and len(core.members) == 3
    retract(memory, "travel")
    memory.sleep("2024-08-02")
    assert memory.store().cores[core.id].status == "dormant" and memory.check() == []
    assert len(memory.store().schemas) == 6


def test_22_23_what_is_no_collision():
    memory = planner()
    store = memory.store()
    stable = [s for s in store.schemas.values() if s.status == "stable"]
    pairs = dcpm.collisions(stable, store)
    assert {(stable[i].behaviour, stable[j].behaviour) for i, j in pairs} == {("plans", "plans")}
    twin = dcpm.copy.deepcopy(stable[0])
    assert dcpm.collisions([stable[0], twin], store) == []  # same domain


def test_union_of_collisions_is_not_transitive():
    assert list(dcpm.collision_groups(3, [(0, 1), (1, 2), (0, 2)])) == [[0, 1, 2]]
    (group,) = dcpm.collision_groups(5, [(0, 1), (1, 2), (2, 3), (3, 4)])
    assert len(group) < 5


def test_24_intentions_lapse():
    memory = tell("I'm flying to Rome on 10 June.")
    memory.sleep("2024-05-02")
    assert "flying to Rome" in memory.answer("What is coming up?", "2024-06-09")[0]
    assert memory.answer("What is coming up?", "2024-06-11")[0] == "Nothing that I know of."
    assert "Rome" in memory.recall("When was I flying to Rome?", "2024-06-11").text
    memory.sleep("2024-06-11")
    assert [i.status for i in memory.store().intentions.values()] == ["expired"]
    cancelled = tell("I'm flying to Rome on 10 June.", "I cancelled the trip to Rome.")
    cancelled.sleep("2024-05-03")
    assert [i.status for i in cancelled.store().intentions.values()] == ["withdrawn"]


def test_25_interrupted_night(monkeypatch):
    memory = tell(*[t for texts in PLANS.values() for t in texts], *OTHERS)
    before = dcpm.snapshot(memory.store())
    for name in ("refresh_schema", "collisions", "refresh_core"):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError):
            patch.setattr(dcpm, name, lambda *a: (_ for _ in ()).throw(RuntimeError("power cut")))
            memory.sleep("2024-06-01")
        assert dcpm.snapshot(memory.store()) == before


def test_26_save_and_load(tmp_path):
    memory = planner("I live in Paris.", "Please forget that I run alone.")
    memory.save(tmp_path / "m.json")
    again = Memory.load(tmp_path / "m.json")
    assert dcpm.snapshot(again.store()) == dcpm.snapshot(memory.store())
    question = ("Where do I live and how do I cook?", "2024-06-02")
    assert again.recall(*question) == memory.recall(*question) and again.check() == []
    (tmp_path / "cut.json").write_text((tmp_path / "m.json").read_text()[:200])
    with pytest.raises(DcpmError, match="not a memory"):
        Memory.load(tmp_path / "cut.json")


def test_27_users_are_isolated():
    memory = Memory()
    for day, user, city in ((1, "u1", "Paris"), (2, "u2", "Lima"), (3, "u1", "Berlin"), (4, "u2", "Quito")):
        memory.observe(f"I moved to {city}.", f"2024-05-0{day}", user=user)
    found = memory.recall("Where do I live? Lima, Quito?", "2024-06-01", user="u1")
    other = memory.recall("Where do I live?", "2024-06-01", user="u2")
    assert found.ids and not set(found.ids) & set(other.ids)
    assert "Lima" not in found.text and "Quito" not in found.text


@pytest.mark.parametrize("budget", [0, 10, 50, 200])
def test_28_budget(budget):
    memory = planner("I live in Paris.", "I moved to Berlin.", "I'm flying to Rome on 10 June.")
    found = memory.recall("How do I plan a trip?", "2024-06-01", budget)
    assert dcpm.count_tokens(found.text) <= budget
    full = set(memory.recall("How do I plan a trip?", "2024-06-01", 100000).text.splitlines())
    assert set(found.text.splitlines()) <= full


def test_superseded_versions_bring_their_chain():
    memory = tell("I live in Paris.", "I moved to Berlin.", "I moved to Rome.")
    text = memory.recall("Did I ever live in Paris?", "2024-06-01").text
    assert "Paris (2024-05-01) → Berlin (2024-05-02) → Rome (2024-05-03, current)" in text


def test_a_chain_cannot_fork():
    memory = tell("I live in Paris.", "I moved to Berlin.")
    store, before = memory.store(), dcpm.snapshot(memory.store())
    node = dcpm.copy.deepcopy(store.head(HOME))
    node.id = "b99"
    with pytest.raises(DcpmError, match="fork"):
        store.commit("SUPERSEDE", [node.id], belief=dcpm.asdict(node), prev=store.chain(HOME)[0].id,
                     kind="supersede")
    assert dcpm.snapshot(store) == before


@pytest.mark.parametrize("text, window", [
    ("on 25 May 2023", ("2023-05-25", "2023-05-25")), ("in June 2023", ("2023-06-01", "2023-06-30")),
    ("yesterday", ("2024-05-14", "2024-05-14")), ("two weeks ago", ("2024-05-01", "2024-05-01")),
    ("last month", ("2024-04-01", "2024-04-30")), ("in 2021", ("2021-01-01", "2021-12-31")),
    ("last Friday", ("2024-05-10", "2024-05-10")), ("next week", ("2024-05-20", "2024-05-26")),
    ("on 31 June", None), ("nothing", None), ("in December", ("2023-12-01", "2023-12-31")),
    ("on March 3rd", ("2024-03-03", "2024-03-03"))])
def test_dates_are_read_against_the_conversation(text, window):
    assert dcpm.date_window(text, "2024-05-15") == window  # a Wednesday


@pytest.mark.parametrize("texts, slot, chain", [
    (["I used to live in Rome.", "I moved to Madrid last March."], HOME,
     [("Madrid", 1)]),  # Rome begins nothing
    (["I'm a nurse at St. Mary's hospital."], ("user", "occupation", None), [("nurse", 1)]),
    (["I became a vegetarian in 2021."], ("user", "diet", None), [("vegetarian", 1)]),
    (["My brother Tom works at Shell."], ("brother", "employer", None), [("Shell", 1)]),
    (["I've been playing tennis.", "I stopped playing tennis."], ("user", "hobby", "tenni"),
     [("tennis", 1), ("tennis", -1)]),
    (["We moved to Lisbon.", "They moved to Oslo."], HOME, [("Lisbon", 1)]),
    (["My birthday is 3 May."], ("user", "birthday", None), [("3 May", 1)]),
    (["My favourite colour is blue.", "My favorite colour is now green."], ("user", "favorite colour", None),
     [("blue", 1), ("green", 1)]),
    (["I quit my job.", "I started working at Globex yesterday!"], WORK, [("", 0), ("Globex", 1)])])
def test_frames(texts, slot, chain):
    memory = tell(*texts)
    assert [(b.value, b.polarity) for b in memory.trail(slot)] == chain and memory.check() == []


def test_forgotten_things_do_not_come_back_refined():
    memory = tell("I have migraines.", "Forget my migraines.",
                  "I have migraines, mostly at night.", "I no longer have migraines.")
    assert [b.status for b in memory.trail(("user", "condition", "migrain"))] == ["suppressed"]
    assert "igraine" not in memory.recall("migraines at night", "2024-06-01").text and memory.check() == []


# ---------------------------------------------------------------- things that once went wrong
@pytest.mark.parametrize("text", ["Don't forget that I like tea.", "I will never forget tea.",
                                  "I forget how I make tea.", "Did you forget the tea?"])
def test_to_speak_of_forgetting_is_no_request(text):
    memory = tell("I like tea.", text)
    assert not memory.store().hidden and memory.answer("Do I like tea?", "2024-06-01")[0].startswith("Yes")


@pytest.mark.parametrize("text", ["Please forget the tea.", "Can you forget that I like tea?",
                                  "OK, forget tea.", "I'd like you to forget about tea.",
                                  "Don't remember that I like tea."])
def test_requests_to_forget(text):
    memory = tell("I like tea.", text)
    assert memory.store().hidden and "tea" not in memory.recall("Do I like tea?", "2024-06-01").text


def test_where_only_the_date_changed():
    memory = tell("My birthday is 3 May.", "My birthday is 4 June.", "I'm flying to Rome on 10 June.",
                  "I'm flying to Rome on 20 June.")
    assert ops(memory) == ["ADD", "SUPERSEDE"] * 2
    memory.sleep("2024-05-05")
    assert memory.answer("When is my birthday?", "2024-05-06")[0] == "4 June"
    assert "flying to Rome" in memory.answer("What is coming up?", "2024-06-15")[0]


def test_a_stranger_does_not_get_the_users_facts():
    memory = tell("I live in Paris.", "My best friend lives in Oslo.")
    memory.observe("I live in Rome.", "2024-05-03", speaker="Bo Roe")
    for question, answer in (("Where does Tom live?", "I don't know."), ("Where do I live?", "Paris"),
                             ("Where does my brother live?", "I don't know."),
                             ("Where does my best friend live?", "Oslo"), ("Where does Bo live?", "Rome")):
        assert memory.answer(question, "2024-06-01")[0] == answer


def test_two_claims_of_one_turn_about_one_chain():
    memory = tell("I like coffee.", "I like coffee, but I gave up coffee.")
    assert memory.answer("Do I like coffee?", "2024-06-01")[0].startswith("No")
    memory = tell("I live in Paris.", "In 2021 I lived in Rome. In 2022 I lived in Lima.")
    assert values(memory) == ["Rome", "Lima", "Paris"]


def test_the_past_does_not_become_the_present_by_forgetting():
    memory = tell("I live in Rome.", "I moved to Paris.")
    memory.forget("Paris")
    assert memory.answer("Where do I live?", "2024-06-01")[0] == "I don't know."
    assert memory.as_of(HOME, "2024-06-01") is None and memory.as_of(HOME, "2024-05-01").value == "Rome"
    assert "current" not in memory.recall("Where do I live?", "2024-06-01").text


def test_times_without_a_job():
    memory = Memory()
    for text, day in (("I work at Acme.", "2024-01-05"), ("I quit my job.", "2024-03-05")):
        memory.observe(text, day)
    assert memory.answer("Where do I work?", "2024-04-01")[0] == "Nothing."
    memory.observe("I joined Globex.", "2024-05-05")
    assert memory.answer("Where did I work in April 2024?", "2024-06-01")[0] == "Nothing."
    assert memory.answer("Where did I work before Globex?", "2024-06-01")[0] == "Acme"


def test_since_is_a_reason_or_a_date():
    assert "tram" in tell("I live in Paris since the tram stops here.").trail(HOME)[0].reason
    assert tell("I live in Paris since 2021.").trail(HOME)[0].reason == ""


def test_a_forgotten_plan_is_no_intention():
    memory = tell("I'm flying to Rome on 10 June.")
    memory.sleep("2024-05-02")
    (intention,) = memory.store().intentions
    memory.forget("Rome")
    for _ in range(2):  # before and after the next night
        assert "Rome" not in memory.dump() + str(memory.why(intention))
        memory.sleep("2024-05-03")
    again = tell("I'm flying to Rome on 10 June.")
    again.forget("Rome")
    again.sleep("2024-05-03")
    assert not again.store().intentions


def test_the_sweep_looks_at_one_person_at_a_time():
    memory, people = Memory(), ("Ann", "Bo", "Cy", "Di", "home")  # one is called like a domain
    scenes = ("dinner", "trip", "report", "lawn", "race", "concert", "exam", "birthday")
    for n, person in enumerate(people):
        for i in range(3):
            for scene in scenes:
                phrase = ("wrote a checklist for", "prepared weeks ahead", "made an agenda for")[i]
                day = f"2024-05-{9 * i + n + 1:02d}"
                memory.observe(f"I {phrase} the {scene}.", day, f"s{i}", speaker=person)
    memory.sleep("2024-06-01")
    assert sorted(c.subject for c in memory.store().cores.values()) == sorted(people)
    assert all(len(c.members) == len(scenes) for c in memory.store().cores.values())


def test_letters_that_only_look_like_ascii():
    memory = tell("I am going to Rome th\u0131s week.", "I like \ud83d tea.",
                  "In \u017feptember I lived in Lima.")
    assert len(memory.store().turns) == 3 and memory.check() == []


@pytest.mark.parametrize("told, question, answer", [
    ("I live in Paris.", "Do I live in Berlin?", "Paris"),
    ("I live in Paris.", "Do I live in Paris?", "Yes, since"),
    ("I live in Paris.", "Did I live in Paris?", "Yes, since"),
    ("I work at Acme.", "Do I work at Initech?", "Acme"),
    ("I like coffee.", "Do I like coffee?", "Yes, since"),
    ("I like coffee.", "Do I hate coffee?", "I like coffee"),
    ("I like hot dogs.", "Do I like hot chocolate?", "I like hot dogs"),
    ("I like coffee.", "Does my sister like coffee?", "I don't know."),
    ("I like coffee.", "Does Tom like coffee?", "I don't know."),
    ("I live in Paris.", "Where does my teacher live?", "I don't know."),
    ("I never eat meat.", "What do I eat?", "I never eat meat")])
def test_answers_say_no_more_than_is_known(told, question, answer):
    assert tell(told).answer(question, "2024-06-01")[0].startswith(answer)


@pytest.mark.parametrize("text", [
    "Tom said I moved to Oslo.", "It's not true that I live in Rome.", "Do I live in Rome", "I joined a gym.",
    "Ask me whether I live in Lima.", "When I lived in Lima, I worked at Acme.", "I switched to decaf.",
    "I lived in Rome for ten years.", "I lived in Rome when I was a child.", "I moved to the couch.",
    "In my dream I live in Rome.", "My name is not Bob.", "I was called by the bank."])
def test_what_only_looks_like_a_fact_changes_no_chain(text):
    memory = tell("I live in Paris. I work at Globex. My name is Ann.", text)
    assert values(memory) == ["Paris"] and values(memory, WORK) == ["Globex"]
    assert values(memory, ("user", "name", None)) == ["Ann"]


@pytest.mark.parametrize("text", ["I was born on 10 June.", "I had surgery in July.",
                                  "I was going to fly to Rome on 10 June."])
def test_what_is_over_is_no_plan(text):
    memory = tell(text)
    memory.sleep("2024-05-02")
    assert not memory.store().intentions


def test_a_denied_plan_is_withdrawn():
    memory = tell("I'm flying to Rome on 10 June.", "I'm not flying to Rome on 10 June anymore.")
    memory.sleep("2024-05-03")
    assert memory.answer("What is coming up?", "2024-05-04")[0] == "Nothing that I know of."


def test_a_birthday_tomorrow_is_a_date():
    assert values(tell("My birthday is tomorrow."), ("user", "birthday", None)) == ["2024-05-02"]


@pytest.mark.parametrize("text", [
    "Forget my migraines, please.", "Please forget what I told you about my migraines.",
    "Please forget everything about my migraines.", "Please forget that I ever had migraines.",
    "Delete my migraines from your memory.", "Please forget that I have migraines."])
def test_ways_to_ask_for_forgetting(text):
    memory = tell("I suffer from migraines.", "Forget it, I have a headache.", text)
    statuses = [b.status for b in memory.store().beliefs.values() if "migraine" in b.text]
    assert statuses == ["suppressed"] and len(memory.store().hidden) == 2
