"""The language-model backend: scripted models that read the real prompts and answer well or badly."""
import json
import re
from zlib import crc32

import numpy as np
import pytest

import dcpm
from dcpm import LLM, Memory
from invariants import check
from real_dcpm import behaviour_cosines
from stress_memory import dump, snapshot

HOME = ("user", "residence", None)
PROMPTS = ("EXTRACT", "RECONCILE", "INDUCE", "STRIP", "CORE", "ANSWER")


class Script:
    """A chat model. Per prompt: a function of it, or a list of answers of which the last one repeats."""

    def __init__(self, **answers):
        self.answers, self.seen, self.batches = answers, [], []

    def __call__(self, conversations):
        out = []
        for talk in conversations:
            prompt = next(m["content"] for m in talk if m["role"] == "user")
            kind = next(k for k in PROMPTS if prompt.startswith(getattr(dcpm, k).split("{")[0]))
            self.seen.append((kind.lower(), talk))
            answer = self.answers.get(kind.lower(), ["{}"])
            answer = answer(prompt) if callable(answer) else answer.pop(0) if len(answer) > 1 else answer[0]
            out.append(answer if isinstance(answer, (str, type(None))) else json.dumps(answer))
        self.batches.append(len(conversations))
        return out

    def prompts(self, kind):
        return [talk[1 if len(talk) > 1 else 0]["content"] for seen, talk in self.seen if seen == kind]


def claims(*found, forget=()):
    """(attribute, value, quote, more fields) -> a reply to EXTRACT."""
    one = {"subject": "user", "polarity": 1}
    return {"claims": [{**one, "attribute": a, "value": v, "text": f"The user: {q}", "quote": q, **more}
                       for a, v, q, *rest in found for more in (rest or [{}])], "forget": list(forget)}


def tell(chat, *texts, memory=None):
    memory = memory or Memory(LLM(chat))
    for i, text in enumerate(texts, len(memory.turns) + 1):
        memory.observe(text, f"2024-05-{i:02d}", f"s{i}")
    return memory


# ---------------------------------------------------------------- by day
def test_good_answers_go_through_the_same_chains():
    chat = Script(extract=[claims(("residence", "Paris", "i live, in: Paris.")),  # points may differ
                           "Sure! " + json.dumps(claims(("residence", "Berlin", "Moved to Berlin!")))],
                  answer=["Berlin", None])
    memory = tell(chat, "Well, I live in Paris, you know.", "Moved to Berlin!")
    paris, berlin = memory.trail(HOME)
    assert (paris.value, berlin.value, berlin.link_kind) == ("Paris", "Berlin", "supersede")
    assert memory.why(paris.id)["because"][0]["text"] == "I live in Paris" and check(memory) == []
    assert memory.answer("Where do I live?", "2024-06-01")[0] == "Berlin" and not +memory.backend.failures
    assert "Berlin (2024-05-02, current)" in chat.prompts("answer")[0]
    assert memory.answer("Why?", "2024-06-01")[0] == "(no answer)" and memory.backend.failures["answer"] == 1


@pytest.mark.parametrize("quote", ["I live in Rome", "", " . ", "i live in paris and Rome", None])
def test_a_claim_whose_quote_is_not_in_the_message_is_dropped(quote):
    found = claims(("residence", "Rome", "x", {"quote": quote}), ("likes", "tea", "tea is fine"))
    memory = tell(Script(extract=[found]), "I live in Paris. tea is fine.")
    assert [b.value for b in memory.beliefs.values()] == ["tea"]


def test_questions_and_the_assistant_are_not_shown_to_be_read():
    chat = Script(extract=[claims()])
    memory = tell(chat, "I saw a fox. Should I get a dog? It was red.", "Do I like tea?", "")
    memory.observe("You like tea.", "2024-05-09", speaker="assistant")
    (prompt,) = chat.prompts("extract")
    message = prompt.split("<message>")[1].split("</message>")[0]
    assert "fox" in message and "red" in message and "dog" not in message and len(memory.turns) == 4


def test_all_turns_of_a_call_are_read_in_one_batch_with_what_was_said_before():
    chat = Script(extract=read, reconcile=[{"operations": []}])
    memory = Memory(LLM(chat))
    ops = memory.ingest([(f"This is message {i}.", "2024-05-01", "s", "user") for i in range(5)])
    assert chat.batches[0] == 5 and [len(o) for o in ops] == [1] * 5 and check(memory) == []
    assert "message 2" in chat.prompts("extract")[3].split("New message")[0]
    assert all(f"message {i}" not in chat.prompts("extract")[3] for i in (0, 4))  # the last two, no more
    memory.observe("A new day.", "2024-05-02", "another session")
    assert "message 4" not in chat.prompts("extract")[-1]


CUT = json.dumps(claims(("residence", "Paris", "I live in Paris")))[:-20]


@pytest.mark.parametrize("bad", ["", None, "I cannot do that.", CUT, "[]", "{}", '{"claims": 3}', "{" * 5000,
                                 '{"claims": [7]}', '{"claims": [{"value": "x"}]}'])
def test_unusable_answers_keep_the_turn_and_count_the_failure(bad):
    chat = Script(extract=[bad])
    memory = tell(chat, "I live in Paris.")
    assert not memory.beliefs and memory.log[-1].op == "FAILED" and check(memory) == []
    assert memory.backend.failures["extract"] == 1
    assert len(chat.seen) == memory.backend.tally["calls"] == (1 if bad is None else 3)
    assert "Paris" in memory.recall("Where in Paris?", "2024-06-01").text  # the raw turn can still be found


def test_a_bad_try_is_repeated_with_the_reason():
    chat = Script(extract=["nonsense", claims(("residence", "Paris", "I live in Paris"))])
    memory = tell(chat, "I live in Paris.")
    assert [b.value for b in memory.trail(HOME)] == ["Paris"] and not +memory.backend.failures
    assert len(chat.seen[1][1]) > len(chat.seen[0][1])


def test_fields_that_make_no_sense_cost_no_more_than_their_claim():
    found = claims(("residence", "Paris", "Paris", {"subject": "The User"}), ("likes", "the", "tea"),
                   ("likes", "tea", "tea", {"polarity": 5}), ("nonsense", "fox", "a fox"),
                   ("plan", "jog", "jog"), ("residence", "Oslo", "sister is in Oslo", {"subject": "sister"}))
    memory = tell(Script(extract=[{**found, "forget": None}]), "Paris! Tea, a fox, jog. My sister is in Oslo")
    assert [(*b.slot[:2], b.value, b.confidence) for b in memory.beliefs.values()] == [
        ("user", "residence", "Paris", 0.9), ("user", "event", "fox", 0.9), ("user", "event", "jog", 0.9),
        ("sister", "residence", "Oslo", 0.4)]


def reconciled(operations):
    """Two claims about jazz, of which a model says how they belong together."""
    chat = Script(extract=[claims(("likes", "jazz", "jazz nights")),
                           claims(("likes", "jazz on tape", "jazz on tape"))],
                  reconcile=[{"operations": operations}])
    return tell(chat, "I like jazz nights.", "I like jazz on tape."), chat


@pytest.mark.parametrize("op, chain", [
    ("CONFIRM", [("jazz", None)]), ("REFINE", [("jazz", None), ("jazz", "refine")]),
    ("SUPERSEDE", [("jazz", None), ("jazz on tape", "supersede")])])
def test_the_model_matches_a_claim_to_a_chain(op, chain):
    memory, _ = reconciled([{"item": 0, "op": op, "id": "b1"}])
    (slot,) = memory.heads
    assert [(b.value, b.link_kind) for b in memory.trail(slot)] == chain and check(memory) == []


@pytest.mark.parametrize("wrong", [
    {"id": "b999"}, {"id": None}, {"item": 4}, {"item": -1}, {"item": "x"}, {"op": "DELETE"}, "none", 7])
def test_ids_and_operations_that_were_not_offered_are_refused(wrong):
    fine = {"item": 0, "op": "CONFIRM", "id": "b1"}
    memory, chat = reconciled([{**fine, **wrong}] if isinstance(wrong, dict) else wrong)
    assert memory.backend.failures["reconcile"] == 1 and len(chat.prompts("reconcile")) == 3
    assert len(memory.heads) == 2 and check(memory) == []


def test_the_reconciler_is_shown_whole_chains_and_one_operation_a_node_counts():
    said = ("jazz nights at home", "jazz nights in town", "no more jazz nights", "jazz nights, jazz nights")
    chat = Script(extract=[*(claims(("event", s, s)) for s in said[:3]),
                           claims(("event", "one", said[3][:11]), ("event", "two", said[3]))],
                  reconcile=[{"operations": [{"item": 0, "op": "SUPERSEDE", "id": i}]} for i in ("b1", "b2")]
                  + [{"operations": [{"item": i, "op": "SUPERSEDE", "id": "b3"} for i in (0, 1)]}])
    memory = tell(chat, *said)
    known = chat.prompts("reconcile")[-1].split("New items")[0]
    assert all(s in known for s in said[:3]) and known.count("\n[b") == 1
    assert sorted(len(memory.trail(slot)) for slot in memory.heads) == [1, 4] and check(memory) == []


def test_an_item_goes_to_one_chain():
    shown = dict.fromkeys(("b1", "b2"))
    both = [{"item": 0, "op": "REFINE", "id": "b1"}, {"item": 0, "op": "SUPERSEDE", "id": "b2"}]
    assert dcpm.read_operations(shown, 1, {"operations": both}) == {"b1": (0, "REFINE")}


def test_who_is_spoken_of_has_one_name():
    memory = Memory(LLM(Script(extract=[
        claims(("residence", "Paris", "I live in Paris", {"subject": "user"})),
        claims(("residence", "Rome", "Ann moved to Rome", {"subject": "ann"}))])))
    memory.observe("I live in Paris.", "2024-05-01", "s1", speaker="Ann")
    memory.observe("Ann moved to Rome.", "2024-05-02", "s2", speaker="Bo")
    assert [slot.subject for slot in memory.heads] == ["Ann"]


def test_single_slots_are_not_offered_to_the_reconciler():
    chat = Script(extract=[claims(("residence", "Paris", "I live in Paris")),
                           claims(("event", "living", "I live in Paris by the river"))])
    tell(chat, "I live in Paris.", "I live in Paris by the river.")
    assert not chat.prompts("reconcile")
    chat = Script(extract=[claims(("likes", "jazz", "jazz")),  # nor does it take a claim out of its own
                           claims(("likes", "jazz", "jazz"), ("residence", "Berlin", "in Berlin"))],
                  reconcile=[{"operations": [{"item": 1, "op": "SUPERSEDE", "id": "b1"}]}])
    memory = tell(chat, "I like jazz.", "I like jazz in Berlin.")
    assert memory.head(HOME).value == "Berlin" and chat.prompts("reconcile") and check(memory) == []


def test_plans_and_past_dates_are_read_from_the_quote():
    chat = Script(
        extract=[claims(("plan", "fly to Rome", "fly to Rome on 2024-06-10"), ("employer", "X", "X in 2021")),
                 claims(("plan", "Rome", "fly to Rome"))],
        reconcile=[{"operations": [{"item": 0, "op": "CONFIRM", "id": "b1"}]}], induce=[{"schemas": []}])
    memory = tell(chat, "I fly to Rome on 2024-06-10. I was at X in 2021.", "I fly to Rome, soon!")
    memory.sleep("2024-05-03")
    assert [(i.status, i.until) for i in memory.intentions.values()] == [("open", "2024-06-10")]
    assert memory.head(("user", "employer", None)).t_event == "2021-12-31"
    assert len(memory.beliefs["b1"].sources) == 2


def test_forgetting_through_the_model_and_without_it():
    chat = Script(extract=[claims(("condition", "migraines", "migraines are back")),
                           claims(forget=["the", "migraines"]), "nothing usable"])
    memory = tell(chat, "My migraines are back.", "Never mention my migraines again.")
    assert [b.status for b in memory.beliefs.values()] == ["suppressed"]
    assert "igraine" not in memory.recall("migraines", "2024-06-01").text and check(memory) == []
    tell(chat, "I walked to the old mill.", "Please forget my migraines.", memory=memory)
    assert "FAILED" in [event.op for event in memory.log[-2:]]
    assert "t4" not in memory.recall("mill", "2024-06-01").ids
    later = chat.prompts("extract")[-1].split("New message")[0]
    assert "igraine" not in later  # nor is it handed to the model again


def test_embedding_in_batches_gives_the_vectors_of_one_text_at_a_time(monkeypatch):
    import common
    import torch
    from transformers import BertConfig, BertModel

    class Letters:
        """A tokenizer of letters that pads, at first on the wrong side."""
        padding_side = "left"

        def __call__(self, texts, padding, truncation, max_length, return_tensors):
            assert self.padding_side == "right" and padding and truncation
            rows = [[ord(c) % 50 + 1 for c in text][:max_length] for text in texts]
            longest = max(map(len, rows))
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
            return {"input_ids": ids, "attention_mask": (ids > 0).long()}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=51, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=32)
    monkeypatch.setattr(common, "load_pretrained", lambda *_: (BertModel(config).eval(), Letters()))
    embed = dcpm.sentence_encoder("letters")
    texts = [("a walnut loaf " * 9)[:1 + 37 * i % 110] for i in range(70)]
    rows = embed(texts)
    assert rows.shape == (70, 16) and np.allclose(np.linalg.norm(rows, axis=1), 1)
    assert np.allclose(rows, np.concatenate([embed([text]) for text in texts]), atol=1e-5)


def test_with_an_encoder_two_rankings_are_fused_by_reciprocal_rank(monkeypatch):
    words, meaning = np.array([0.9, 0, 0.4, 0.4]), np.array([0.1, 0.8, 0, 0.2])
    k = dcpm.RRF_K
    expected = [1 / (k + 1) + 1 / (k + 3), 1 / (k + 1), 1 / (k + 2), 1 / (k + 3) + 1 / (k + 2)]
    assert np.allclose(dcpm.fuse([words, meaning]), expected)  # 0 is no rank, of equals the first goes first
    monkeypatch.setattr(dcpm, "sentence_encoder", lambda name: embed)
    memory = Memory(encoder="toy")
    for text in ("a solitary walk", "the harbour lights", "a hermit, lonely", "nothing"):
        memory.observe(text, "2024-05-01", text)
    plain = Memory(log=memory.log)
    assert [id_ for _, id_ in dcpm.search(plain, "alone at the harbour")] == ["t2"]
    assert {id_ for _, id_ in dcpm.search(memory, "alone at the harbour")} >= {"t1", "t2", "t3"}


# ---------------------------------------------------------------- by night, with a dense encoder
DOMAINS = {"kitchen": "oven bread soup", "rails": "station ticket carriage", "office": "memo desk payroll",
           "river": "canoe paddle rapids", "fiddle": "strings tune bow"}
HABITS = {"order": "timetable rehearsed outline early beforehand arranged", "alone": "solitary hermit lonely",
          "thrift": "voucher barter leftover", "whim": "impulse unplanned suddenly"}
SENSE = {word: i for i, (name, line) in enumerate([*DOMAINS.items(), *HABITS.items()])
         for word in [name, *line.split()]}
SHOWN = {"kitchen": "timetable rehearsed outline", "rails": "early beforehand arranged",
         "office": "outline early rehearsed", "river": HABITS["alone"], "fiddle": HABITS["thrift"]}


def embed(texts):
    """A toy of a sentence encoder: words of one sense share a direction, whatever their letters."""
    rows = np.full((len(texts), 80), 0.01)
    for row, text in zip(rows, texts):
        for word in re.findall(r"\w+", text.lower()):
            row[SENSE.get(word, 16 + crc32(word.encode()) % 64)] += 3 if word in SENSE else 0.2
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def habit(domain, words):
    return [f"I did the {noun} thing, {word}." for noun, word in zip(DOMAINS[domain].split(), words.split())]


def read(prompt):
    """The extractor: the whole message is one event."""
    said = prompt.split("<message>")[1].split("</message>")[0].strip(" .\n")
    return claims(("event", said, said, {"text": said}))


def induce(prompt):
    """The inducer: facts of one domain and one sense, in words of its own."""
    found, shown = [], re.findall(r"^\[(b\d+)\] \S+ (.+)$", prompt, re.M)
    for domain, nouns in DOMAINS.items():
        facts = [(i, text) for i, text in shown if set(nouns.split()) & set(re.findall(r"\w+", text))]
        if len(facts) >= 3:
            word = re.findall(r"\w+", facts[0][1])[-1]
            found.append(draft(domain=domain, text=f"In the {domain} the user goes for what is {word}.",
                               evidence=[i for i, _ in facts]))
    return {"schemas": found}


def draft(**fields):
    return {"domain": "kitchen", "text": "t", "evidence": ["b1", "b2", "b3"], "against": [], "known": None,
            "replaces": None, **fields}


def strip(prompt):
    """Every habit in other words: only the encoder can see that three of them are alike."""
    words = {"kitchen": "likes it rehearsed", "rails": "arranged beforehand", "office": "an early outline",
             "river": "a hermit", "fiddle": "barter"}
    return {"behaviour": next(text for domain, text in words.items() if f"the {domain} " in prompt)}


def night(**answers):
    chat = Script(**{"extract": read, "reconcile": [{"operations": []}], "induce": induce, "strip": strip,
                     "core": [{"text": "The user wants no surprises."}], **answers})
    memory = Memory(LLM(chat))
    memory.vectors = dcpm.Vectors(embed)
    tell(chat, *[text for domain, shown in SHOWN.items() for text in habit(domain, shown)], memory=memory)
    memory.sleep("2024-06-01")
    return memory, chat


def test_habits_in_other_words_collide_into_one_core():
    memory, chat = night()
    (core,) = memory.cores.values()
    assert len(memory.schemas) == 5 and all(s.status == "stable" for s in memory.schemas.values())
    assert sorted(memory.schemas[m].domain for m in core.members) == ["kitchen", "office", "rails"]
    assert core.text == "The user wants no surprises." and check(memory) == []
    assert not +memory.backend.failures
    (prompt,) = chat.prompts("core")
    assert "kitchen" in prompt and "river" not in prompt
    found = behaviour_cosines(memory)
    assert len(found) == 10 and (found > memory.limits.alike).sum() == 3
    spans = [s["text"] for m in memory.why(core.id)["because"] for b in m["because"] for s in b["because"]]
    assert len(spans) == 9 and "I did the oven thing, timetable" in spans


def test_the_night_reads_what_was_said_and_not_the_models_version():
    def bland(prompt):
        found = read(prompt)
        found["claims"][0]["text"] = f"The user did the thing {crc32(prompt.encode())}."
        return found
    memory, _ = night(extract=bland)
    assert len(memory.schemas) == 5 and len(memory.cores) == 1


def test_a_large_cluster_is_shown_in_portions():
    chat = Script(extract=read, induce=[{"schemas": []}])
    memory = tell(chat, *(f"I did thing {word}." for word in map("x{}y".format, range(28))))
    facts = list(memory.beliefs.values())
    known = dcpm.Schema("s1", "user", "kitchen", "t", "2024-05-01", evidence=[b.id for b in facts[:20]])
    with_more = [*facts[:20] * 2, *facts[20:]]  # the first 30 are all cited
    memory.backend.induce(memory, [with_more], [], [known])
    (prompt,) = chat.prompts("induce")
    assert facts[-1].id in prompt


def test_a_second_night_asks_nothing_even_if_the_model_would_find_more():
    memory, chat = night()
    before, calls = snapshot(memory), memory.backend.tally["calls"]
    chat.answers["induce"] = [{"schemas": [{"domain": "x", "text": "By chance.", "evidence": ["b1", "b2"]}]}]
    chat.answers["core"] = [{"text": "Something else."}]
    memory.sleep("2024-06-01")
    assert snapshot(memory) == before and memory.backend.tally["calls"] == calls


def test_what_is_known_is_extended_and_stripped_once():
    memory, chat = night()
    asked = len(chat.prompts("strip"))
    (old,) = [s for s in memory.schemas.values() if s.domain == "kitchen"]
    chat.answers["induce"] = lambda prompt: {"schemas": [draft(
        text="Other words.", evidence=re.findall(r"^\[(b\d+)\] .*oven", prompt, re.M), known=old.id)]}
    tell(chat, "I did the oven thing, early and arranged.", memory=memory)
    memory.sleep("2024-06-02")
    new = memory.schemas[old.id]
    assert len(memory.schemas) == 5 and new.text == old.text
    assert (len(new.evidence), new.confidence) == (4, 0.8333)
    assert len(chat.prompts("strip")) == asked and len(memory.cores) == 1 and check(memory) == []


def test_a_contested_habit_leaves_its_core_and_a_reversed_one_is_linked():
    memory, chat = night()
    (old,), (core,) = [s for s in memory.schemas.values() if s.domain == "kitchen"], memory.cores

    def against(prompt):
        ids = re.findall(r"^\[(b\d+)\] .*(?:impulse|unplanned|suddenly)", prompt, re.M)
        both = [draft(text=old.text, evidence=[], against=ids, known=old.id),
                draft(text="In the kitchen the user follows impulse.", evidence=ids, replaces=old.id)]
        return {"schemas": (both if turned else both[:1]) if ids else []}
    chat.answers.update(induce=against, strip=[{"behaviour": "unplanned"}])
    turned = False
    tell(chat, *habit("kitchen", "impulse unplanned suddenly"), memory=memory)
    memory.sleep("2024-06-02")
    found = memory.schemas[old.id]
    assert (found.status, found.confidence, len(found.against)) == ("contested", 0.5, 3)
    assert memory.cores[core].status == "stable" and old.id not in memory.recall("oven?", "2024-06-02").ids
    turned = True
    tell(chat, "I did the oven thing again, unplanned.", memory=memory)
    memory.sleep("2024-06-03")
    (new,) = [s for s in memory.schemas.values() if s.text == "In the kitchen the user follows impulse."]
    assert new.status == "stable" and len(memory.schemas[old.id].against) == 4
    assert new.id not in memory.cores[core].members and check(memory) == []


@pytest.mark.parametrize("wrong", [
    {"evidence": ["b1", "b2", "b777"]}, {"against": ["b777"]}, {"known": "s0"}, {"replaces": "s0"},
    {"domain": ""}, {"text": None}, {"evidence": [["b1"]]}, {"evidence": 3}])
def test_drafts_with_ids_that_were_not_shown_are_refused(wrong):
    memory, _ = night(induce=[{"schemas": [draft(**wrong)]}])
    assert not memory.schemas and memory.backend.failures["induce"] >= 1 and check(memory) == []


@pytest.mark.parametrize("answers, schemas", [
    (("induce", '{"schemas": [{"domain": "kit'), 0), (("induce", None), 0), (("induce", {"schemas": []}), 0),
    (("strip", "{"), 5), (("strip", {"behaviour": None}), 5), (("core", {"text": None}), 5),
    (("core", "{"), 5)])
def test_cut_empty_and_null_answers_make_nothing_up(answers, schemas):
    memory, _ = night(**{answers[0]: [answers[1]]})
    assert len(memory.schemas) == schemas and not memory.cores and check(memory) == []
    assert memory.log[-1].op == "SLEEP"


def test_a_core_on_something_forgotten_is_withdrawn_and_named_again():
    memory, chat = night(core=[{"text": "Because of the bread."}, {"text": "No surprises."}])
    (core,) = memory.cores
    memory.forget("bread")
    assert "Because" not in dump(memory) + str(memory.why(core)) + memory.recall("bread", "2024-06-02").text
    memory.sleep("2024-06-02")
    statuses = {c.text: c.status for c in memory.cores.values()}
    assert statuses["Because of the bread."] == "withdrawn" and check(memory) == []
    assert "bread" not in chat.prompts("core")[-1]
