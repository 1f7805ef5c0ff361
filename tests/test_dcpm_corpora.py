"""Loaders on two-row files with every known malformation, the benchmark's machinery, and the command line."""
import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dcpm
from conftest import Server

LOCOMO = [{"sample_id": "two", "conversation": {
    "speaker_a": "Ada", "speaker_b": "Bo",
    "session_2_date_time": "9:05 am on 2 June, 2023", "session_2": [
        {"speaker": "Bo", "dia_id": "D2:1", "text": "What did you bake?"},
        {"speaker": "Ada", "dia_id": "D2:2", "text": "A walnut loaf for the fair.",
         "blip_caption": "a photo of bread"}],
    "session_1_date_time": "1:56 pm on 8 May, 2023", "session_1": [
        {"speaker": "Ada", "dia_id": "D1:1", "text": "Hi Bo! I moved to Lima."},
        {"speaker": "Bo", "dia_id": "D1:2", "text": ""}],
    "session_3_date_time": "1:00 pm on 9 July, 2023"},  # a date without turns
    "qa": [{"question": "What did Ada bake?", "answer": 7, "evidence": ["D2:02; D1:1", "D"], "category": 1},
           {"question": "Where does Bo live?", "evidence": ["D:1:1"], "category": 5,
            "adversarial_answer": "SECRET"},
           {"question": "Why?", "answer": "GOLDANSWER", "evidence": [], "category": 3}]}]


def put(path, data):
    path.write_text(json.dumps(data) if not isinstance(data, str) else data, encoding="utf-8")
    return str(path)


def test_locomo(tmp_path, capsys):
    path = put(tmp_path / "l.json", LOCOMO)
    (sample,) = dcpm.load_corpus(path)
    assert [t[0] for t in sample.turns] == ["D1:1", "D1:2", "D2:1", "D2:2"]
    assert sample.turns[0][4] == "2023-05-08T13:56"
    assert [q.gold for q in sample.questions] == [{"D2:2", "D1:1"}, {"D1:1"}, set()]
    assert sample.questions[0].answer == "7" and "photo of bread" in sample.turns[-1][3]
    memory = dcpm.Memory()
    ids = dcpm.ingest(sample, memory)
    assert memory.check() == [] and [b.value for b in memory.trail(("Ada", "residence", None))] == ["Lima"]
    text = dcpm.snapshot(memory.store())
    assert "SECRET" not in text and "GOLDANSWER" not in text  # gold fields never reach the store
    best = dcpm.rank_turns(memory.store(), "What did Ada bake?", "2023-08-01")[0]
    assert best[1] in (ids["D2:1"], ids["D2:2"])
    dcpm.main(["--data", path])
    out = capsys.readouterr().out
    assert "multi-hop" in out and "BM25" in out and "two: 4 turns" in out


def test_longmemeval(tmp_path, capsys):
    rows = [{"question_id": f"q{n}{'_abs' * n}", "question_type": "multi-session",
             "question": "What degree?", "answer": 3,
             "question_date": "2023/05/30 (Tue) 23:40", "haystack_session_ids": ["late", "early"],
             "haystack_dates": ["2023/05/21 (Sun) 02:21", "2023/05/20 (Sat) 02:21"],
             "answer_session_ids": ["late"],
             "haystack_sessions": [[{"role": "user", "content": "I have a degree.", "has_answer": True}],
                                   [{"role": "user", "content": "Hello"},
                                    {"role": "assistant", "content": "I live in Rome."}]]}
            for n in (0, 1)]
    samples = dcpm.load_corpus(put(tmp_path / "m.json", rows))
    assert [t[4][:10] for t in samples[0].turns] == ["2023-05-20", "2023-05-20", "2023-05-21"]  # put in order
    assert samples[0].questions[0].gold == {"late#1:0"}
    assert samples[1].questions[0].category == "multi-session_abs"
    memory = dcpm.Memory()
    dcpm.ingest(samples[0], memory)
    texts = [b.text for b in memory.store().beliefs.values()]
    assert not any("Rome" in text for text in texts)  # what the assistant says is no claim
    assert "Rome" in memory.recall("Who lives in Rome?", "2023-06-01").text  # but it can be found
    dcpm.main(["--data", str(tmp_path / "m.json"), "--format", "longmemeval"])
    assert "multi-session" in capsys.readouterr().out


def personamem(tmp_path, end="3"):
    messages = [{"role": "system", "content": "PERSONA: likes jazz"},
                {"role": "user", "content": "User: I like tea."},
                {"role": "assistant", "content": "Assistant: Noted."},
                {"role": "user", "content": "User: FUTURE coffee"}]
    first, second = json.dumps({"c1": messages}), json.dumps({"c2": messages[:2]})
    put(tmp_path / "contexts.jsonl", first + "\n\n" + second + "\n")
    with open(tmp_path / "questions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question_type", "user_question_or_message", "correct_answer", "all_options",
                         "shared_context_id", "end_index_in_shared_context"])
        options = str(["(a) coffee", "(b) tea", "(c) rum", "(d) milk"])
        writer.writerow(["recall", "What do I drink?", "(b)", options, "c1", end])
    return str(tmp_path / "contexts.jsonl")


def test_personamem(tmp_path, capsys, monkeypatch):
    path = personamem(tmp_path)
    first, second = dcpm.load_corpus(path)
    assert first.questions[0].end == 2 and first.questions[0].answer == "b" and second.questions == []
    seen = []

    def chat(conversations):  # a model that keeps what it was shown
        seen.extend(str(c) for c in conversations)
        return ["(b)"] * len(conversations)
    monkeypatch.setattr(dcpm.LLM, "load", classmethod(lambda cls, *a: cls(chat)))
    dcpm.main(["--data", path, "--backend", "llm", "--model", "scripted"])
    shown = seen[next(i for i, talk in enumerate(seen) if "What do I drink" in talk)]
    assert "FUTURE" not in shown and "PERSONA" not in shown and "tea" in shown  # cut at the end index
    assert "recall                         1.000" in capsys.readouterr().out


def test_personamem_v2(tmp_path):
    snippet = [{"role": "system", "content": "PERSONA"}, {"role": "user", "content": "I love yoga."}]
    row = {"chat_history_32k_link": "none.json", "related_conversation_snippet": json.dumps(snippet),
           "correct_answer": "yoga", "incorrect_answers": json.dumps(["golf", "chess", "judo"]),
           "persona_id": "5", "pref_type": "neutral",
           "user_query": "{'role': 'user', 'content': 'What now?'}"}
    samples = dcpm.load_corpus(put(tmp_path / "v2.json", [row, {**row, "chat_history_32k_link": "h.json"}]))
    put(tmp_path / "h.json", {"chat_history": [{"role": "user", "content": "I love golf."}]})
    question = samples[0].questions[0]
    assert question.options["abcd".index(question.answer)].endswith("yoga")
    assert "snippet only" in samples[0].name
    assert [t[3] for t in samples[0].turns] == ["I love yoga."]
    assert [t[3] for t in dcpm.load_corpus(str(tmp_path / "v2.json"))[1].turns] == ["I love golf."]


def test_a_server_as_backend(tmp_path, capsys):
    """Over HTTP, from the command line to the scores: it extracts, once it breaks off, it answers;
    or it is gone."""
    def behave(body, count):
        prompt = body["messages"][-1]["content"]
        if "New message by Ada" in prompt and "Lima" in prompt.split("<message>")[1]:
            found = {"subject": "Ada", "attribute": "residence", "value": "Lima",
                     "text": "Ada lives in Lima.", "quote": "Lima"}
            return 200, json.dumps({"claims": [found]}), "stop"
        if "New message" in prompt or "Not usable" in prompt:
            return 200, '{"claims": [', "length"
        return 200, "no information", "stop"
    flags = ["--data", put(tmp_path / "l.json", LOCOMO), "--backend", "llm", "--model_name", "m"]
    with Server(behave) as server:
        dcpm.main([*flags, "--model", server.url])
    out = capsys.readouterr().out
    assert "4 turns, 1 beliefs" in out and "failures after 3 tries {'extract': 3}" in out
    assert "answers, adversarial                    1.000" in out
    assert {body["model"] for _, body, _ in server.requests} == {"m"}
    assert {body["temperature"] for _, body, _ in server.requests} == {0.0}


@pytest.mark.parametrize("name, content", [
    ("a.json", "[{"), ("a.json", "[]"), ("a.json", '[{"x": 1}]'), ("a.json", "3"),
    ("a.json", json.dumps([{"conversation": {}, "qa": [{}]}])), ("a.jsonl", '{"c": [\n'),
    ("a.json", json.dumps([{"haystack_sessions": []}]))])
def test_bad_files_are_one_sentence_and_exit_code_2(tmp_path, capsys, name, content):
    with pytest.raises(SystemExit) as stop:
        dcpm.main(["--data", put(tmp_path / name, content)])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and error.startswith("dcpm.py: ") and "\n" not in error


@pytest.mark.parametrize("flags", [
    ["--pers", "3"], ["--personas", "x"], ["--personas", "1"], ["--backend", "llm"],
    ["--model", "x"], ["--data", "no/such/file"], ["--sample", "x"], ["--data", "x", "--heldout"],
    ["--format", "csv"], ["--budget", "-1"]])
def test_bad_flags(capsys, flags):
    with pytest.raises(SystemExit) as stop:
        dcpm.main(flags)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and error.startswith("dcpm.py: ") and "\n" not in error


# ---------------------------------------------------------------- the miniature benchmark
def test_the_default_command_runs_small(capsys):
    dcpm.main(["--personas", "3"])
    out = capsys.readouterr().out
    assert "broken invariants: none" in out and "development bank" in out and "validation bank" in out
    assert "Does System2 help most" in out


def test_no_evidence_is_exactly_chance():
    _, questions = dcpm.make_persona(1, dcpm.BANKS["development"])
    assert {kind for kind, *_ in questions} == set(dcpm.KINDS)
    for _, question, options, right in questions:
        assert dcpm.credit(dcpm.choose(question, [], options), right) == 1 / len(options)
        assert len(set(options)) == 4


def test_personas_repeat_and_options_are_unseen_phrases():
    bank = dcpm.BANKS["development"]
    assert dcpm.make_persona(3, bank) == dcpm.make_persona(3, bank)
    told = " ".join(text for _, _, text in dcpm.make_persona(3, bank)[0])
    assert not any(line.split("|")[3].split("{}")[0].strip() in told for line in bank["phrases"].values()
                   if line.split("|")[3].split("{}")[0].strip().count(" ") > 1)


def test_placebo_has_the_same_shape_and_is_near_system1():
    table, _, _ = dcpm.run_benchmark(dcpm.BANKS["development"], 12)
    implicit = dcpm.KINDS.index("implicit unseen")
    gap = (table["placebo"] - table["System1"])[:, implicit]
    mean, low, high = dcpm.bootstrap(gap)
    assert mean < 0.15  # noise cannot help; no claim here about what System2 itself does


def test_banks_share_no_four_words_in_a_row():
    here = Path(__file__).resolve().parent
    banks = {**dcpm.BANKS, "held-out": json.loads((here / "dcpm_heldout_bank.json").read_text())}

    def grams(bank):
        lines = [p.format("X") for line in bank["phrases"].values() for p in line.split("|")]
        kinds = ("move", "late", "job", "other", "span", "ask")
        lines += [t.replace("{}", "X") for k in kinds for t in bank[k].split("|")]
        words = [line.lower().rstrip(".?").split() for line in lines]
        return {tuple(w[i:i + 4]) for w in words for i in range(len(w) - 3)}
    names = list(banks)
    for i, a in enumerate(names):
        for b in names[i + 1:]:
            assert not grams(banks[a]) & grams(banks[b])
    for line in banks["held-out"]["phrases"].values():
        assert all(len(dcpm.poles_of(p.format("it"))) <= 1 for p in line.split("|"))


def test_heldout_appends_to_a_log_outside_the_repository(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for _ in range(2):
        dcpm.main(["--heldout", "--personas", "2"])
    lines = (tmp_path / "four-papers" / "dcpm_heldout.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert len(entries) == 2 and entries[0]["facts"] == entries[1]["facts"]
    assert {"date", "commit", "lexicon", "bank", "accuracy"} <= set(entries[0])
    assert "development" not in capsys.readouterr().out  # the two kinds of bank never run together


def test_the_default_command_does_not_read_the_test_bank(monkeypatch, capsys):
    read = Path.read_text

    def guarded(self, *args, **kwargs):
        assert "heldout" not in self.name
        return read(self, *args, **kwargs)
    monkeypatch.setattr(Path, "read_text", guarded)
    dcpm.main(["--personas", "2"])


def test_bootstrap_is_over_personas():
    mean, low, high = dcpm.bootstrap(np.array([0.0, 0, 0, 1]))
    assert mean == 0.25 and low == 0 and high >= 0.5


@pytest.mark.parametrize("change", [
    lambda talk: talk.update(session_1_date_time="1:56 pm on 31 February, 2023"),
    lambda talk: talk["session_1"][0].update(text=["a", "list"]),
    lambda talk: talk["session_1"][0].update(speaker=None),
    lambda talk: talk["session_1"][0].update(dia_id=["D1:1"])])
def test_rows_that_could_not_be_ingested_are_refused_at_once(tmp_path, capsys, change):
    rows = json.loads(json.dumps(LOCOMO))
    change(rows[0]["conversation"])
    with pytest.raises(SystemExit) as stop:
        dcpm.main(["--data", put(tmp_path / "l.json", rows)])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and error.startswith("dcpm.py: ") and "\n" not in error


@pytest.mark.parametrize("gold, reply, score", [
    ("No", "Yes, you did.", 0), ("No", "No.", 1), ("2", "12 days", 0), ("hot", "the hotel", 0),
    ("blue kites", "A blue kite, I think", 1)])
def test_containment_is_of_whole_words(gold, reply, score):
    question = dcpm.Question("?", "temporal-reasoning", set(), gold, "2024-01-01")
    assert dcpm.score_answer(reply, question) == score
