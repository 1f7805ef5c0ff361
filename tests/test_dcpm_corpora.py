"""Loaders on two-row files, metrics with worked numbers, and both benchmark scripts in miniature."""
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bench_dcpm as bench
import bench_dcpm_corpora as corpora
import dcpm
from conftest import Server
from invariants import check
from stress_memory import snapshot

HERE = Path(__file__).resolve().parent
LOCOMO = [{"sample_id": "two", "conversation": {
    "session_2_date_time": "9:05 am on 2 June, 2023", "session_2": [
        {"speaker": "Bo", "dia_id": "D2:1", "text": "What did you bake?"},
        {"speaker": "Ada", "dia_id": "D2:2", "text": "A walnut loaf.", "blip_caption": "a photo of bread"}],
    "session_1_date_time": "1:56 pm on 8 May, 2023", "session_1": [
        {"speaker": "Ada", "dia_id": "D1:1", "text": "Hi Bo! I moved to Lima."}],
    "session_3_date_time": "1:00 pm on 9 July, 2023"},  # a date without turns
    "qa": [{"question": "What loaf was it?", "answer": 7, "evidence": ["D2:02; D1:1", "D"], "category": 1},
           {"question": "Where?", "evidence": ["D:1:1"], "category": 5, "adversarial_answer": "GOLD"},
           {"question": "Why?", "answer": "GOLD", "evidence": [], "category": 3}]}]


def put(path, data):
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def test_locomo(tmp_path, capsys):
    path = put(tmp_path / "l.json", LOCOMO)
    (sample,) = corpora.load_corpus(path)
    assert [t[0] for t in sample.turns] == ["D1:1", "D2:1", "D2:2"]
    assert sample.turns[0][4] == "2023-05-08T13:56" and "photo of bread" in sample.turns[-1][3]
    assert [q.gold for q in sample.questions] == [{"D2:2", "D1:1"}, {"D1:1"}, set()]
    memory = dcpm.Memory()
    corpora.ingest(sample, memory, 3)
    assert check(memory) == [] and memory.head(("Ada", "residence", None)).value == "Lima"
    assert "GOLD" not in snapshot(memory)
    assert ("multi-hop", "TF-IDF", [1, 1, 1]) in corpora.evidence_recall(sample, memory)
    corpora.main(["--data", str(path), "--sessions", "1"])
    assert "two: 1 turns" in capsys.readouterr().out


def test_longmemeval(tmp_path):
    row = {"question_id": "q", "question_type": "multi-session", "question": "What degree?", "answer": 3,
           "question_date": "2023/05/30 (Tue) 23:40", "haystack_session_ids": ["late", "early"],
           "haystack_dates": ["2023/05/21 (Sun) 02:21", "2023/05/20 (Sat) 02:21"],
           "haystack_sessions": [[{"role": "user", "content": "I have a degree.", "has_answer": True}],
                                 [{"role": "assistant", "content": "I live in Rome."}]]}
    first, second = corpora.load_corpus(put(tmp_path / "m.json", [row, {**row, "question_id": "q_abs"}]))
    assert [t[4] for t in first.turns] == ["2023-05-20T02:21", "2023-05-21T02:21"]  # put in order
    assert first.questions[0].gold == {"late#1:0"} and second.questions[0].kind == "multi-session_abs"


def test_personamem_is_cut_at_the_end_index(tmp_path, capsys):
    messages = [{"role": "system", "content": "PERSONA"}, {"role": "user", "content": "User: I like tea."},
                {"role": "assistant", "content": "Assistant: Noted."}, {"role": "user", "content": "FUTURE"}]
    path = put(tmp_path / "contexts.jsonl", "\n\n".join(json.dumps({c: messages}) for c in ("c1", "c2")))
    put(tmp_path / "questions.csv", "question_type,user_question_or_message,correct_answer,all_options,"
        "shared_context_id,end_index_in_shared_context\nrecall,What tea?,(b),\"['(a) no', '(b) tea']\",c1,3")
    first, second = corpora.load_corpus(path)
    assert first.questions[0].end == 2 and first.questions[0].answer == "b" and second.questions == []

    with Server(lambda body, _: (200, '{"claims": [], "is it": "(b)"}', "stop")) as server:
        flags = ["--model", server.url, "--model_name", "m", "--conditions"]
        corpora.main(["--data", str(path), *flags])
    prompts = [body["messages"][-1]["content"] for _, body, _ in server.requests]
    shown = [p for p in prompts if "What tea" in p]
    assert len(shown) == 3 and all("I like tea." in p for p in shown)
    assert not any("FUTURE" in p or "PERSONA" in p for p in shown)
    assert capsys.readouterr().out.count("1.000") == 6  # three conditions, by kind and in all


def test_personamem_v2(tmp_path):
    snippet = [{"role": "system", "content": "PERSONA"}, {"role": "user", "content": "I love yoga."}]
    row = {"chat_history_32k_link": "none.json", "related_conversation_snippet": json.dumps(snippet),
           "correct_answer": "yoga", "incorrect_answers": '["golf", "chess", "judo"]', "persona_id": "5",
           "pref_type": "neutral", "user_query": "{'role': 'user', 'content': 'What now?'}"}
    put(tmp_path / "h.json", {"chat_history": [{"role": "user", "content": "I love golf."}]})
    rows = [row, {**row, "chat_history_32k_link": "h.json"}]
    first, second = corpora.load_corpus(put(tmp_path / "v2.json", rows))
    (asked,) = first.questions
    assert asked.options["abcd".index(asked.answer)].endswith("yoga") and "snippet only" in first.name
    assert [s.turns[0][3] for s in (first, second)] == ["I love yoga.", "I love golf."]


CUES = [{"relation_type": "causal", "time_gap": "about two months later", "cue_dialogue":
         "A: I twisted my ankle on the stairs.\nB: Ouch!\nRest it.",
         "trigger_query": "A: No ankle, no dance."},
        {"relation_type": "goal", "time_gap": "a few weeks later", "cue_dialogue":
         "A: I want to swim a mile by spring.\nB: Good luck.",
         "trigger_query": "A: The violin is out of tune."}]


def test_locomo_plus(tmp_path, capsys, monkeypatch, refused):
    into = put(tmp_path / "l.json", LOCOMO)
    (sample,) = corpora.load_corpus(into)
    told = []
    ingest = dcpm.Memory.ingest

    def noting(self, turns):
        told.extend(turns)
        return ingest(self, turns)
    monkeypatch.setattr(dcpm.Memory, "ingest", noting)
    found = corpora.cue_recall(sample, CUES, dcpm.Memory)
    cues = [turn for turn in told if turn[2] == "cue"]
    # asked on 2023-06-09, a week after the last session; two months before, and three weeks
    assert [(text, when, speaker) for text, when, _, speaker in cues] == [
        ("I twisted my ankle on the stairs.", "2023-04-10", "Ada"), ("Ouch! Rest it.", "2023-04-10", "Bo"),
        ("I want to swim a mile by spring.", "2023-05-19", "Ada"), ("Good luck.", "2023-05-19", "Bo")]
    assert ("causal", "words", [1, 1, 1]) in found and ("goal", "words", [0, 0, 0]) in found
    assert [name for _, name, _ in found] == 2 * ["TF-IDF", "BM25", "words"]
    path = put(tmp_path / "plus.json", CUES)
    corpora.main(["--data", str(path), "--into", str(into)])
    printed = capsys.readouterr().out
    assert "causal" in printed and "goal" in printed and "2 questions" in printed
    assert "--into" in refused(corpora.main, ["--data", str(path)])
    put(path, [{**CUES[0], "cue_dialogue": None}])
    refused(corpora.main, ["--data", str(path), "--into", str(into)])


@pytest.mark.parametrize("gap, days", [
    ("two months later", 60), ("six weeks later", 42), ("about one month later", 30), ("a few days later", 3),
    ("several months later", 90), ("half a year later", 182), ("10 days later", 10), ("much later", 30)])
def test_gaps_of_locomo_plus(gap, days):
    assert corpora.days_of(gap) == days


def test_with_an_encoder_every_ranker_has_a_column(monkeypatch, tmp_path):
    """A toy encoder that knows two senses: what it finds, words do not, and the fusion has both."""
    def embed(texts):
        baked = [[1.0, 0.0] if re.search("loaf|baked|bread|rolls", text) else [0.0, 1.0] for text in texts]
        return np.array(baked)
    monkeypatch.setattr(dcpm, "sentence_encoder", lambda name: embed)
    (sample,) = corpora.load_corpus(put(tmp_path / "l.json", LOCOMO))
    memory = dcpm.Memory(encoder="toy")
    corpora.ingest(sample, memory, 3)
    best = {name: rank("rolls in Lima")[:1] for name, rank in corpora.rankers(memory, sample.turns).items()}
    assert best["words"] == ["D1:1"] and best["encoder"] == ["D2:2"] and "fused" in best


@pytest.mark.parametrize("name, content", [
    ("a.json", "[{"), ("a.json", "[]"), ("a.json", '[{"x": 1}]'), ("a.jsonl", '{"c": [\n')])
def test_odd_files_are_one_sentence_and_exit_code_2(tmp_path, refused, name, content):
    refused(corpora.main, ["--data", str(put(tmp_path / name, content))])


@pytest.mark.parametrize("kind, gold, reply, score", [
    ("adversarial", "", "There is no information.", 1), ("single-hop", "a red kite", "the kite", 2 / 3),
    ("multi-hop", "tea, rum", "rum", 0.5), ("open-domain", "yes; maybe", "Yes", 1),
    ("temporal-reasoning", "2", "12 days", 0), ("temporal-reasoning", "blue kites", "A blue kite", 1)])
def test_metrics(kind, gold, reply, score):
    assert corpora.score_answer(reply, corpora.Question("?", kind, set(), gold, "2024-01-01")) == score
    # idf(tea) = ln(3 / 1.5); its document has the average length, so the rest is 2.2 / 2.2
    assert bench.bm25_scorer(["hot tea", "old boat"])("tea") == pytest.approx([np.log(2), 0])


def test_without_evidence_everything_is_exactly_chance():
    _, questions = bench.make_persona(1, bench.BANKS["development"])
    assert {kind for kind, *_ in questions} == {*bench.KINDS}
    for _, question, options, right in questions:
        assert len({*options}) == 4 and bench.credit(bench.choose(question, [], options), right) == 1 / 4
    empty = dcpm.Memory()  # no schemas: the placebo has none to change, and ties with System1
    found = bench.contexts(empty, bench.placebo(empty, None), lambda question: [], "Why?", "2024-01-01", 120)
    assert {len(lines) for lines in found.values()} == {0}
    assert bench.bootstrap(np.array([0.5, 0.5])) == (0.5, 0.5, 0.5)


def test_two_banks_share_no_four_words():
    development, validation = map(bench.four_words, bench.BANKS.values())
    assert len(development) > 100 and not development & validation


@pytest.mark.parametrize("script, flags, wanted", [
    ("bench_dcpm.py", ["--personas", "2"], ["development bank", "placebo", "headline", "sweep -> every"]),
    ("bench_dcpm_corpora.py", ["--data", "l.json"], ["multi-hop", "BM25", "two: 3 turns"])])
def test_the_scripts_run(tmp_path, script, flags, wanted):
    put(tmp_path / "l.json", LOCOMO)
    command = [sys.executable, HERE / "experiments" / script, *flags]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert run.returncode == 0 and all(text in run.stdout.decode() for text in wanted), run.stderr
