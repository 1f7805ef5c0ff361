"""Properties of the store over random histories, scale, and what the rule backend must not import."""
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import dcpm
import stress_memory


def test_three_hundred_random_histories():
    assert stress_memory.run(300, "suite", 20) == 300 * 20


def test_random_histories_reach_every_kind_of_event_and_node():
    events, nodes = Counter(), Counter()
    for n in range(60):
        for memory, _ in stress_memory.random_history(random.Random(f"kinds-{n}")):
            pass
        for store in memory.stores.values():
            events.update(e.op for e in store.log)
            kinds = (store.schemas, store.cores, store.intentions)
            nodes.update((type(node).__name__, node.status) for kind in kinds for node in kind.values())
    assert {"RAW", "ADD", "SUPERSEDE", "REFINE", "CONFIRM",
            "SPLICE", "RETRACT", "SUPPRESS", "SLEEP"} <= set(events)
    assert {("Schema", "stable"), ("Schema", "forming"), ("Schema", "dormant"),
            ("Core", "stable"), ("Intention", "open")} <= set(nodes)


def test_check_notices_damage():
    def damaged(hurt):
        memory = dcpm.Memory()
        for day, text in enumerate(("I live in Paris.", "I moved to Berlin.", "I moved to Rome."), 1):
            memory.observe(text, f"2024-05-0{day}")
        beliefs = memory.store().beliefs
        hurt(beliefs, memory.store())
        return memory.check()
    assert damaged(lambda b, s: None) == []
    assert any("mutual" in p for p in damaged(lambda b, s: setattr(b["b2"], "prev", None)))
    assert any("older" in p for p in damaged(lambda b, s: setattr(b["b1"], "t_event", "2025-01-01")))
    assert any("status" in p for p in damaged(lambda b, s: setattr(b["b1"], "status", "active")))
    assert any("source" in p for p in damaged(lambda b, s: b["b1"].sources.clear()))
    assert any("equal" in p for p in damaged(lambda b, s: setattr(b["b2"], "value", "Paris")))
    assert any("replaying" in p for p in damaged(lambda b, s: s.log.pop()))


def test_same_operations_same_store():
    def final(n):
        *_, (memory, _) = stress_memory.random_history(random.Random(n))
        return [dcpm.snapshot(s) for s in memory.stores.values()]
    assert final(5) == final(5)


def test_rule_backend_imports_no_model_library():
    code = ("import dcpm; m = dcpm.Memory(); [m.observe(t, '2024-05-01', f's{i}') for i, t in enumerate("
            "['I wrote a checklist for dinner.', 'I made a list for the stew.', "
            "'I planned the cake on a schedule.'])];"
            "m.sleep('2024-05-02'); print(m.answer('How do I cook?', '2024-05-03'))")
    run = subprocess.run([sys.executable, "-X", "importtime", "-c", code],
                         capture_output=True, text=True, cwd=HERE.parent)
    assert run.returncode == 0, run.stderr[-2000:]
    modules = [line.rsplit("|", 1)[-1].strip() for line in run.stderr.splitlines() if "|" in line]
    imported = {module.split(".")[0] for module in modules}
    assert "sklearn" in imported and not imported & {"torch", "transformers", "datasets", "common"}


def test_hostile_and_odd_texts_are_kept_and_break_nothing():
    memory = dcpm.Memory()
    texts = ["", "\x00", "a" * 3000, "." * 3000, "1 " * 1500, '"' * 2999, "I " * 1500,
             "my sister " * 300, "\n" * 3000, "I like " + "very " * 600, "I moved to " + "A" * 3000,
             "forget " * 300, "🙂" * 300, "I live in \x00Paris.",
             "on 99 May, in 0000, 31 June 2023, 2023-13-45, 99999999999 years ago",
             "I moved to Oslo 900 years ago.", "I'm flying to Rome on 29 February 2023.",
             "In 2021 I lived in Rome. " * 100]
    for i, text in enumerate(texts):
        memory.observe(text, "2024-05-01", f"s{i}")
    memory.sleep("2024-06-01")
    assert [t.text for t in memory.store().turns.values()] == texts and memory.check() == []
    assert memory.recall("", "2024-06-01", 0).text == ""
    assert memory.answer("", "2024-06-01")[0] == "I don't know."


def test_a_bad_date_and_an_unknown_id_are_refused_before_anything_is_kept():
    memory = dcpm.Memory()
    for bad in ("yesterday", "", "2024-13-01", "20240501", "2024-W18-3"):
        try:
            memory.observe("I live in Paris.", bad)
        except (ValueError, dcpm.DcpmError):
            pass
        else:
            raise AssertionError(bad)
    assert not memory.store().turns
    try:
        memory.why("b99")
    except dcpm.DcpmError as error:
        assert "b99" in str(error)
