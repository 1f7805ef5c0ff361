"""The language-model backend against scripted models: good, cut, wrong-id, empty and hostile JSON."""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dcpm
from dcpm import LLM, Memory

HOME = ("user", "residence", None)


def claim(value, text, attribute="residence", **more):
    return {"subject": "user", "attribute": attribute, "value": value, "text": text,
            "polarity": 1, "layer": "fact", **more}


class Script:
    """A chat model that answers each kind of prompt from a list; the last answer repeats."""

    def __init__(self, **answers):
        self.answers, self.seen = answers, []

    def __call__(self, conversations):
        out = []
        for talk in conversations:
            prompt = talk[1]["content"] if len(talk) > 1 else talk[0]["content"]
            kind = ("extract" if "New message" in prompt else
                    "reconcile" if "Known chains" in prompt else
                    "induce" if "regularities" in prompt else
                    "core" if "These habits" in prompt else "answer")
            self.seen.append((kind, talk))
            line = self.answers.get(kind, ["{}"])
            answer = line.pop(0) if len(line) > 1 else line[0]
            out.append(answer if isinstance(answer, (str, type(None))) else json.dumps(answer))
        return out

    def count(self, kind):
        return sum(k == kind for k, _ in self.seen)


def test_good_answers_go_through_the_same_chains():
    moved = {"claims": [claim("Berlin", "The user lives in Berlin.")], "forget": []}
    chat = Script(extract=[{"claims": [claim("Paris", "The user lives in Paris.", quote="I live in Paris")]},
                           "Sure! " + json.dumps(moved)],
                  reconcile=[{"operations": [{"item": 0, "op": "SUPERSEDE", "id": "b1"}]}], answer=["Berlin"])
    memory = Memory(LLM(chat))
    memory.observe("Well, I live in Paris, you know.", "2024-05-01")
    memory.observe("Moved to Berlin!", "2024-05-02", "s2")
    paris, berlin = memory.trail(HOME)
    assert (paris.value, berlin.value, berlin.link_kind) == ("Paris", "Berlin", "supersede")
    assert memory.why(paris.id)["because"][0]["text"] == "I live in Paris"
    # no verbatim quote: the whole turn
    assert memory.why(berlin.id)["because"][0]["text"] == "Moved to Berlin!"
    assert memory.answer("Where do I live?", "2024-06-01")[0] == "Berlin" and memory.check() == []


def test_unusable_answers_keep_the_turn_and_count_the_failure():
    cut = json.dumps({"claims": [claim("Paris", "x")]})[:-5]
    for bad in ("", None, "I cannot do that.", cut, "[]",
                '{"claims": 3}', '{"claims": [{"value": "x"}]}', '{"claims": [7]}',
                json.dumps({"claims": [claim("Paris", "x", polarity=5)]}),
                json.dumps({"claims": [claim("", "x")]}), json.dumps({"claims": [claim(None, "x")]}),
                json.dumps({"claims": [], "forget": {"all": 1}}), "{" * 5000):
        chat = Script(extract=[bad])
        memory = Memory(LLM(chat))
        assert memory.observe("I live in Paris.", "2024-05-01") == []
        assert len(memory.store().turns) == 1 and not memory.store().beliefs and memory.check() == []
        assert memory.backend.failures["extract"] == 1 and chat.count("extract") == 3
        assert memory.store().log[-1].op == "FAILED"
        found = memory.recall("Where do I live?", "2024-06-01")
        assert "Paris" in found.text  # the raw turn can still be found


def test_a_bad_try_is_repeated_with_the_reason():
    chat = Script(extract=["nonsense", {"claims": [claim("Paris", "The user lives in Paris.")]}])
    memory = Memory(LLM(chat))
    assert memory.observe("I live in Paris.", "2024-05-01") == [("ADD", "b1")]
    assert "Not usable" in chat.seen[1][1][-1]["content"] and not +memory.backend.failures


def test_ids_that_were_not_shown_are_refused():
    chat = Script(extract=[{"claims": [claim("jazz", "The user likes jazz.", "likes")]},
                           {"claims": [claim("jazz music", "The user likes jazz music.", "likes")]}],
                  reconcile=[{"operations": [{"item": 0, "op": "SUPERSEDE", "id": "b999"}]},
                             {"operations": [{"item": 4, "op": "CONFIRM", "id": "b1"}]},
                             {"operations": [{"item": 0, "op": "DELETE", "id": "b1"}]}])
    memory = Memory(LLM(chat))
    memory.observe("Jazz is nice.", "2024-05-01")
    memory.observe("Jazz music is nice.", "2024-05-02", "s2")
    assert memory.backend.failures["reconcile"] == 1
    assert len(memory.store().heads) == 2 and memory.check() == []


def test_the_reconciler_is_shown_the_whole_chain():
    cities = ("Paris", "Berlin", "Rome", "Lima")
    chat = Script(extract=[{"claims": [claim(c, f"The user lives in {c}.")]} for c in cities],
                  reconcile=[{"operations": []}])
    memory = Memory(LLM(chat))
    for day, city in enumerate(cities, 1):
        memory.observe(f"{city} is home.", f"2024-05-0{day}", f"s{day}")
    prompt = [talk[1]["content"] for kind, talk in chat.seen if kind == "reconcile"][-1]
    assert all(city in prompt.split("New items")[0] for city in cities[:3])
    assert [b.value for b in memory.trail(HOME)] == list(cities)


def habits(domain, n):
    texts = [f"The user planned the {domain} carefully, part {i}." for i in range(n)]
    return [{"claims": [claim(f"{domain} {i}", text, "event")]} for i, text in enumerate(texts)]


def with_schemas(induce, core=None):
    domains = ("dinner", "trip", "report", "concert", "race")
    chat = Script(extract=[h for d in domains for h in habits(d, 3)], reconcile=[{"operations": []}],
                  induce=[induce], core=[core or {"behaviour": None, "text": None}])
    memory = Memory(LLM(chat))
    for i in range(15):
        memory.observe(f"message {i} about something", f"2024-05-{i + 1:02d}", f"s{i}")
    return memory, chat


def test_schemas_cores_and_idempotence():
    domains = ("dinner", "trip", "report", "concert", "race")
    chat_ids = {d: [f"b{3 * k + i}" for i in (1, 2, 3)] for k, d in enumerate(domains)}
    answer = {"schemas": [{"domain": d, "behaviour": "prepares well ahead",
                           "text": f"For a {d} the user prepares.", "evidence": ids}
                          for d, ids in chat_ids.items()]}
    memory, chat = with_schemas(answer, {"behaviour": "likes certainty",
                                         "text": "The user wants no surprises."})
    store = memory.store()

    def induce(store, pool):  # one prompt with all facts, whatever the clusters are
        return [("user", s["domain"], s["behaviour"], s["text"], {"prepar": 1.0}, s["evidence"])
                for s in answer["schemas"]]
    memory.backend.induce = induce
    memory.sleep("2024-06-01")
    (core,) = store.cores.values()
    assert len(store.schemas) == 5 and core.text == "The user wants no surprises." and memory.check() == []
    before, calls = dcpm.snapshot(store), memory.backend.calls
    memory.sleep("2024-06-01")
    assert dcpm.snapshot(store) == before and memory.backend.calls == calls
    # a model's sentence may give away what was forgotten: schema and core are withdrawn
    memory.forget("dinner")
    memory.sleep("2024-06-02")
    assert store.cores[core.id].status == "dormant" and memory.check() == []
    assert not any("dinner" in s.text for s in store.schemas.values())


def test_induction_refuses_foreign_evidence():
    foreign = {"domain": "x", "behaviour": "plans", "text": "t", "evidence": ["b1", "b777"]}
    memory, chat = with_schemas({"schemas": [foreign]})
    memory.sleep("2024-06-01")
    assert memory.backend.failures["induce"] >= 1 and not memory.store().schemas
    before, calls = dcpm.snapshot(memory.store()), memory.backend.calls
    memory.sleep("2024-06-01")
    assert dcpm.snapshot(memory.store()) == before
    assert memory.backend.calls == calls  # failures are cached too


def test_induction_through_the_prompt():
    memory, chat = with_schemas({"schemas": []})
    memory.sleep("2024-06-01")
    shown = "".join(talk[1]["content"] for kind, talk in chat.seen if kind == "induce")
    assert all(f"[b{i}]" in shown for i in range(1, 16)) and not memory.store().schemas


def test_forgetting_through_the_model():
    chat = Script(extract=[{"claims": [claim("migraines", "The user has migraines.", "condition")]},
                           {"claims": [], "forget": ["migraines"]}])
    memory = Memory(LLM(chat))
    memory.observe("My migraines are back.", "2024-05-01")
    memory.observe("Never mention my migraines again.", "2024-05-02", "s2")
    assert "migraine" not in memory.recall("migraines", "2024-06-01").text.lower() and memory.check() == []


def test_metrics():
    def score(reply, category, answer, options=()):
        question = dcpm.Question("q", category, set(), answer, "2024-01-01", list(options))
        return dcpm.score_answer(reply, question)
    assert score("(c)", "recall", "c", "abcd") == 1 and score("either (a) or (c)", "recall", "c", "abcd") == 0
    assert score("So my answer is b", "recall", "b", "abcd") == 1
    assert score("There is no information about that.", "adversarial", "") == 1
    assert score("Paris", "adversarial", "") == 0
    assert score("the red cars", "single-hop", "red car") == 1
    assert score("running, apples", "multi-hop", "run, pears") == 0.5
    assert score("likely no", "open-domain", "Likely no; because of work") == 1
    assert score("It was Business Administration.", "single-session-user", "business administration") == 1


def test_a_turn_to_be_hidden_is_not_quoted_whole():
    found = [claim("Paris", "The user lives in Paris."),  # no verbatim quote: it rests on the whole turn
             claim("migraines", "The user has migraines.", "condition", quote="migraines")]
    memory = Memory(LLM(Script(extract=[{"claims": found}])))
    memory.observe("I live in Paris, with migraines.", "2024-05-01")
    memory.forget("migraines")
    assert "not shown" in str(memory.why("b1")) and "migraines" not in str(memory.why("b1"))


def test_a_core_is_withdrawn_and_named_again():
    domains = ("dinner", "trip", "report", "concert", "race")
    schemas = [("user", d, "prepares", f"For a {d} the user prepares, even with gout.", {"prepar": 1.0},
                [f"b{4 * k + i}" for i in (1, 2, 3, 4)]) for k, d in enumerate(domains)]
    chat = Script(extract=[h for d in domains for h in habits(d, 4)], reconcile=[{"operations": []}],
                  core=[{"behaviour": "likes certainty", "text": "Because of gout."},
                        {"behaviour": "likes certainty", "text": "No surprises."}])
    memory = Memory(LLM(chat))
    for i in range(20):
        memory.observe(f"message {i} about something", f"2024-05-{i + 1:02d}", f"s{i}")

    def induce(store, pool):
        if not forgotten:
            return schemas
        return [(*names, text.replace(", even with gout", ""), vector, [i for i in ids if i != "b1"])
                for *names, text, vector, ids in schemas]
    memory.backend.induce = induce
    forgotten = False
    memory.sleep("2024-06-01")
    (core,) = memory.store().cores
    assert "gout" in memory.dump()
    memory.forget("dinner, part 0")
    forgotten = True
    assert "dinner the user prepares" not in memory.dump() and "Because of gout" not in str(memory.why(core))
    memory.sleep("2024-06-02")
    again = memory.store().cores[core]
    assert (again.text, again.status) == ("No surprises.", "stable") and memory.check() == []
    once = dcpm.snapshot(memory.store())
    memory.sleep("2024-06-02")
    assert dcpm.snapshot(memory.store()) == once


def test_optional_fields_that_are_wrong_do_not_cost_the_claim():
    found = [claim("Paris", "x", when="2024-02-31", until="soon", subject="the user", quote=" ")]
    memory = Memory(LLM(Script(extract=[{"claims": found, "forget": None}])))
    memory.observe("Paris is home.", "2024-05-01")
    (belief,) = memory.trail(HOME)
    assert (belief.t_event, belief.until, belief.confidence) == ("2024-05-01", "", 0.9)


def test_what_a_model_may_ask_to_forget():
    chat = Script(extract=[{"claims": [claim("migraines", "The user has migraines.", "condition")]},
                           {"claims": [], "forget": ["the user"]},  # everything: refused
                           {"claims": [], "forget": "migraines"}, "nothing usable"])
    memory = Memory(LLM(chat))
    for day, text in enumerate(("I have migraines.", "Hm.", "Not that.", "Forget my asthma, please."), 1):
        memory.observe(text, f"2024-05-0{day}")
        assert [b.status for b in memory.store().beliefs.values()] == ["active" if day < 3 else "suppressed"]
    assert [b.status for b in memory.store().beliefs.values()] == ["suppressed"]
    later = [talk[1]["content"] for kind, talk in chat.seen if kind == "extract"][-1]
    assert "migraines" not in later  # nor is it handed to the model again
    assert memory.store().log[-1].op == "SUPPRESS"  # a request counts even where the model failed


def test_others_have_lines_of_their_own():
    sister = {"claims": [claim("Oslo", "x", subject="sister")]}
    memory = Memory(LLM(Script(extract=[sister], reconcile=[{"operations": []}])))
    for person in ("Ann", "Bo"):
        memory.observe("My sister lives in Oslo.", "2024-05-01", speaker=person)
    assert sorted(slot[0] for slot in memory.store().heads) == ["Ann's sister", "Bo's sister"]
    assert all(b.confidence == 0.4 for b in memory.store().beliefs.values())


def test_a_silent_model_is_asked_again_and_its_silence_is_no_answer():
    chat = Script(extract=[None, None, None, {"claims": [claim("Paris", "x")]}], answer=[None])
    backend = LLM(chat)
    for expected in ([], ["Paris"]):
        memory = Memory(backend)
        memory.observe("I live in Paris.", "2024-05-01")
        assert [b.value for b in memory.trail(HOME)] == expected
    assert memory.answer("Where do I live?", "2024-06-01")[0] == "(no answer)"
    assert backend.failures == {"extract": 1, "answer": 1}


def test_confirming_a_plan_keeps_its_date():
    plan = {"claims": [claim("fly to Rome", "The user flies to Rome.", "plan", until="2024-06-10")]}
    again = {"claims": [claim("Rome", "The user flies to Rome soon.", "plan")]}
    memory = Memory(LLM(Script(extract=[plan, again], reconcile=[{"operations": [
        {"item": 0, "op": "CONFIRM", "id": "b1"}]}], induce=[{"schemas": []}])))
    memory.observe("I fly to Rome on 10 June.", "2024-05-01", "a")
    memory.observe("Soon, to Rome!", "2024-05-02", "b")
    memory.sleep("2024-05-03")
    assert [i.status for i in memory.store().intentions.values()] == ["open"]
