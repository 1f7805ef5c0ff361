"""dcpm.py on LoCoMo, LongMemEval, PersonaMem and LoCoMo-Plus: evidence recall, and with a model answers.

    python tests/experiments/bench_dcpm_corpora.py --data locomo10.json --sample conv-26 [--encoder DIR]
    python tests/experiments/bench_dcpm_corpora.py --data contexts.jsonl --model DIR --ask 9 --conditions
    python tests/experiments/bench_dcpm_corpora.py --data locomo_plus.json --into locomo10.json

The format is detected. Recall is the share of a question's evidence turns among the first 5, 10 and 20.
LoCoMo-Plus puts a short dialogue, the cue, into a conversation and asks for it later by a remark that shares
hardly a word with it. There the figure is the share of remarks with a turn of their cue among the first k.
"""
import ast
import copy
import csv
import json
import random
import re
import sys
from collections import Counter, namedtuple
from datetime import date, datetime, timedelta
from itertools import groupby
from pathlib import Path
from unittest import mock

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import dcpm
from bench_dcpm import bm25_scorer, tfidf_scorer, within, without

CONDITIONS = ("raw turns", "System1", "System1+2")
# gold: refs of evidence turns, for the scorer only; end: how many turns exist when the question is asked
Question = namedtuple("Question", "text kind gold answer now options end", defaults=((), 10 ** 9))
Sample = namedtuple("Sample", "name turns questions")  # turns: [(ref, session, speaker, text, ISO time)]
CATEGORY = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "adversarial"}


# ------------------------------------------------------------------ four formats
def stamp(text):
    """"1:56 pm on 8 May, 2023" or "2023/05/30 (Tue) 23:40" -> "2023-05-08T13:56"."""
    form = "%Y/%m/%d (%a) %H:%M" if "/" in text else "%I:%M %p on %d %B, %Y"
    return datetime.strptime(text, form).isoformat()[:16]


def load_locomo(rows, _):
    """Known malformations: dates without turns, answers missing or integer, evidence "D8:6; D9:17" or "D"."""
    for item in rows:
        turns, questions, talk = [], [], item["conversation"]
        for n in sorted(int(k[8:]) for k, v in talk.items() if re.fullmatch(r"session_\d+", k) and v):
            when = stamp(talk[f"session_{n}_date_time"])
            for turn in talk[f"session_{n}"]:
                picture = f" [shares {turn['blip_caption']}]" if turn.get("blip_caption") else ""
                turns.append((turn["dia_id"], f"s{n}", turn["speaker"], turn.get("text", "") + picture, when))
        for q in item["qa"]:
            found = re.findall(r"D:?(\d+):(\d+)", " ".join(map(str, q.get("evidence") or [])))
            questions.append(Question(
                q["question"], CATEGORY[q["category"]], {f"D{int(a)}:{int(b)}" for a, b in found},
                str(q.get("answer", "")), turns[-1][4]))
        yield Sample(item["sample_id"], turns, questions)


def load_longmemeval(rows, _):
    """One haystack a question; sessions are put in order of their dates (the oracle file is not)."""
    for item in rows:
        turns, gold = [], set()
        sessions = zip(item["haystack_session_ids"], item["haystack_dates"], item["haystack_sessions"])
        for n, (name, when, messages) in enumerate(sorted(sessions, key=lambda s: stamp(s[1]))):
            for i, m in enumerate(messages):
                turns.append((f"{name}#{n}:{i}", f"{name}#{n}", m["role"], m["content"], stamp(when)))
                gold |= {turns[-1][0]} if m.get("has_answer") else set()
        kind = item["question_type"] + ("_abs" if item["question_id"].endswith("_abs") else "")
        asked = Question(item["question"], kind, gold, str(item["answer"]), stamp(item["question_date"]))
        yield Sample(item["question_id"], turns, [asked])


def load_personamem(path, questions_path):
    """Contexts are cut at the end index. System messages hold the persona, and with it answers: left out."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    with open(questions_path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for name, messages in (pair for line in lines for pair in json.loads(line).items()):
        turns, upto, block = [], [0], 0
        for m in messages:
            block += m["role"] == "system"
            if m["role"] != "system":
                text = re.sub(r"^(?:User|Assistant): ", "", m["content"])
                day = (date(2024, 1, 1) + timedelta(30 * block)).isoformat()  # the corpus has no dates
                turns.append((str(len(turns)), f"block {block}", m["role"], text, day))
            upto.append(len(turns))
        yield Sample(name[:8], turns, [Question(
            r["user_question_or_message"], r["question_type"], set(), r["correct_answer"].strip("() "),
            turns[-1][4], ast.literal_eval(r["all_options"]),
            upto[min(int(r["end_index_in_shared_context"]), len(messages))])
            for r in rows if r["shared_context_id"] == name])


def load_personamem_v2(rows, folder):
    """The linked 32k history if it lies beside the file, else the related snippet (an oracle: it says so)."""
    for number, row in enumerate(rows):
        link = folder / row["chat_history_32k_link"]
        whole = json.loads(link.read_text(encoding="utf-8"))["chat_history"] if link.is_file() else None
        messages = [m for m in whole or json.loads(row["related_conversation_snippet"])
                    if m["role"] != "system" and isinstance(m["content"], str)]
        turns = [(str(i), "s1", m["role"], m["content"], "2024-01-01") for i, m in enumerate(messages)]
        options = [row["correct_answer"], *json.loads(row["incorrect_answers"])]
        random.Random(number).shuffle(options)  # the official order depends on Python's string hash
        asked = Question(ast.literal_eval(row["user_query"])["content"], row["pref_type"], set(),
                         "abcd"[options.index(row["correct_answer"])], "2024-01-02",
                         [f"({x}) {o}" for x, o in zip("abcd", options)])
        yield Sample(f"persona {row['persona_id']}" + ("" if whole else " (snippet only)"), turns, [asked])


NUMBERS = {"a": 1, "an": 1, "one": 1, "couple": 2, "two": 2, "few": 3, "several": 3, "three": 3, "four": 4,
           "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11, "twelve": 12}
DAYS = {"day": 1, "week": 7, "month": 30, "year": 365}


def days_of(gap):
    """"about two months later" -> 60; a gap that cannot be read is taken for a month."""
    unit = re.search(r"\b(day|week|month|year)", gap.lower())
    numbers = []
    for word in re.findall(r"[a-z]+|\d+", gap.lower()):
        if word in NUMBERS or word.isdigit():
            numbers.append(NUMBERS.get(word) or int(word))
    half = 0.5 if "half a" in gap.lower() else 1
    # of "a few weeks later" the last number counts
    return round((numbers or [1])[-1] * DAYS[unit[1] if unit else "month"] * half)


def read_dialogue(text, speakers):
    """"A: ...\\nB: ..." -> [(speaker, text)], A and B being the first and the second of `speakers`."""
    said = []
    for line in text.strip().splitlines():
        match = re.match(r"\s*([AB])\s*:\s*(.*)", line)
        if match:
            said.append((speakers["AB".index(match[1])], match[2]))
        elif said and line.strip():  # a line that goes on
            speaker, before = said[-1]
            said[-1] = (speaker, f"{before} {line.strip()}")
    return said


def load_cues(path):
    """A LoCoMo-Plus file -> its rows, None if it is of another format."""
    rows = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else None
    return rows if isinstance(rows, list) and rows and "cue_dialogue" in rows[0] else None


def load_corpus(path, questions=""):
    """File -> list of samples; the format is detected from the first record."""
    guess = Path(questions or path.with_name(re.sub("(shared_)?contexts?", "questions", path.stem) + ".csv"))
    try:
        if path.suffix == ".jsonl":
            return list(load_personamem(path, guess))
        rows = json.loads(path.read_text(encoding="utf-8"))
        rows = rows if isinstance(rows, list) else [rows]
        for column, load in (("conversation", load_locomo), ("haystack_sessions", load_longmemeval),
                             ("related_conversation_snippet", load_personamem_v2)):
            if column in rows[0]:
                return list(load(rows, path.parent))
        raise ValueError(f"no known format, it has {sorted(rows[0])[:8]}")
    except (ValueError, LookupError, TypeError, AttributeError, SyntaxError, csv.Error, OSError) as error:
        raise dcpm.DcpmError(f"--data {path}: {type(error).__name__}: {error}") from error


# ------------------------------------------------------------------ measures
def rankers(memory, turns):
    """{name: function of a question -> refs of the turns, best first}. turns: as in a Sample."""
    refs = [ref for ref, *_ in turns]
    texts = [text for *_, text, _ in turns]
    back = dict(zip(memory.turns, refs))
    tfidf = tfidf_scorer(texts)
    bm25 = bm25_scorer(texts)

    def by_score(scorer):
        return lambda question: [refs[i] for i in np.argsort(-scorer(question), kind="stable")]

    def by_search(searched):
        return lambda question: [back[id_] for _, id_ in dcpm.search(searched, question) if id_ in back]

    def by_encoder(question):
        with mock.patch.object(dcpm, "fuse", lambda scores: scores[1]):
            return by_search(memory)(question)
    plain = copy.copy(memory)
    plain.encoder = "words"
    plain.index = None
    found = {"TF-IDF": by_score(tfidf), "BM25": by_score(bm25), "words": by_search(plain)}
    if memory.encoder != "words":
        found |= {"encoder": by_encoder, "fused": by_search(memory)}
    return found


def evidence_recall(sample, memory):
    """[(kind of question, ranker, [recall@5, @10, @20])], without questions that mark no evidence."""
    refs = {ref for ref, *_ in sample.turns}
    asked = [q for q in sample.questions if q.gold & refs]
    out = []
    for name, rank in rankers(memory, sample.turns).items() if asked else ():
        for q in asked:
            gold = q.gold & refs
            best = rank(q.text)
            out.append((q.kind, name, [len(gold & {*best[:k]}) / len(gold) for k in (5, 10, 20)]))
    return out


def cue_recall(sample, rows, make):
    """[(relation type, ranker, [is a turn of the cue among the first 5, 10, 20?])], one cue at a time."""
    whole = make()
    ingest(sample, whole, len(sample.turns))
    speakers = [*dict.fromkeys(speaker for _, _, speaker, _, _ in sample.turns), "B"][:2]
    asked = date.fromisoformat(sample.turns[-1][4][:10]) + timedelta(7)  # a week after the last session
    out = []
    for row in tqdm(rows, sample.name, leave=False, disable=None):
        told = (asked - timedelta(days_of(row["time_gap"]))).isoformat()
        cue = []
        for n, (speaker, text) in enumerate(read_dialogue(row["cue_dialogue"], speakers)):
            cue.append((f"cue:{n}", "cue", speaker, text, told))
        remark = " ".join(text for _, text in read_dialogue(row["trigger_query"], speakers))
        memory = dcpm.Memory(whole.backend, whole.encoder, whole.log)
        memory.vectors = whole.vectors  # each turn of the conversation is embedded once
        memory.word_vectors = whole.word_vectors
        memory.ingest([(text, when, session, speaker) for _, session, speaker, text, when in cue])
        gold = {ref for ref, *_ in cue}
        for name, rank in rankers(memory, sample.turns + cue).items():
            best = rank(remark)
            out.append((row["relation_type"], name, [float(bool(gold & {*best[:k]})) for k in (5, 10, 20)]))
    return out


def print_table(title, rows):
    """rows: [(kind of question, column, figure or figures)], averaged by kind."""
    if not rows:
        return print(f"\n{title}: nothing to measure")
    columns = dict.fromkeys(column for _, column, _ in rows)
    print(f"\n{title:59}" + "".join(f"{column:^19}" for column in columns))
    for kind in [*dict.fromkeys(kind for kind, *_ in rows), "all questions"]:
        cells = [[v for k, c, v in rows if c == col and kind in (k, "all questions")] for col in columns]
        means = [" ".join(f"{x:.3f}" for x in np.atleast_1d(np.mean(values, 0))) for values in cells]
        print(f"  {kind:42} {len(cells[0]):4} questions" + "".join(f"{mean:^19}" for mean in means))


# ------------------------------------------------------------------ answers
def context(memory, q, name, budget=800):
    """What a condition shows the model."""
    if name != "raw turns":
        shown = memory if name == "System1+2" else without(memory, "schemas", "cores")
        return shown.recall(q.text, q.now, budget).text
    turns = [memory.turns[id_] for _, id_ in dcpm.search(memory, q.text) if id_ in memory.turns]
    lines = within([dcpm.Line(t.id, "raw", f"{t.t[:10]} {t.speaker}: {t.text}", t.t) for t in turns], budget)
    return "\n".join(map(str, sorted(lines, key=lambda line: (line.t, int(line.id[1:])))))


def answers(memory, q, conditions):
    """One reply a condition, all in one batch; "" where the model gave none."""
    asked = "\n".join([q.text, *q.options, "End with the letter."] if q.options else [q.text])
    replies = memory.backend.chat([[{"role": "user", "content": dcpm.ANSWER.format(
        context=context(memory, q, name) or "(nothing)", question=asked)}] for name in conditions])
    memory.backend.tally["calls"] += len(conditions)
    memory.backend.failures["answer"] += sum(not reply for reply in replies)
    return [reply or "" for reply in replies]


def token_f1(answer, gold):
    """F1 over stemmed tokens without articles and punctuation (the benchmark's stemmer is Porter's)."""
    same = (Counter(a := tokens(answer)) & Counter(g := tokens(gold))).total()
    return 2 * same / (len(a) + len(g)) if same else 0.0


def tokens(text):
    return [dcpm.stem(w) for w in re.findall(r"\w+", text.lower()) if w not in ("a", "an", "the", "and")]


def score_answer(reply, q):
    """The benchmark's own metric; for LongMemEval containment, a stand-in for its judge."""
    if q.options:
        found = re.findall(r"\(([a-d])\)", reply.lower()) or re.findall(r"\b([a-d])\b", reply.lower())
        return float({*found} == {q.answer})
    if q.kind == "adversarial" or q.kind.endswith("_abs"):
        return float(bool(re.search(r"no information|not mentioned|not known|don't know", reply, re.I)))
    if q.kind == "multi-hop":
        parts = q.answer.split(",")
        return sum(max(token_f1(said, part) for said in reply.split(",")) for part in parts) / len(parts)
    if q.kind in CATEGORY.values():
        return token_f1(reply, q.answer.split(";")[0] if q.kind == "open-domain" else q.answer)
    said, wanted = (" ".join(["", *tokens(t), ""]) for t in (reply, q.answer))
    return float(wanted in said)


# ------------------------------------------------------------------ the command
def ingest(sample, memory, last):
    """Turns up to `last`, in portions of one session and at most 16 turns, with a progress bar."""
    turns = tqdm(sample.turns[len(memory.turns):last], sample.name, leave=False, disable=None)
    for _, said in groupby(enumerate(turns), lambda pair: (pair[1][1], pair[0] // 16)):
        memory.ingest([(text, when, session, speaker) for _, (_, session, speaker, text, when) in said])


def evaluate(sample, memory, ask, conditions):
    """Ask `ask` questions, each when its time has come; ingest the rest. -> [(kind, condition, score)]."""
    scores, n = [], len(sample.turns)
    for q in sorted(sample.questions, key=lambda q: q.end)[:ask]:
        if min(q.end, n) > len(memory.turns):
            ingest(sample, memory, min(q.end, n))
            memory.sleep(q.now)
        replies = answers(memory, q, conditions)
        scores += [(q.kind, name, score_answer(reply, q)) for name, reply in zip(conditions, replies)]
    ingest(sample, memory, n)
    return scores


def run_cues(args, rows):
    """LoCoMo-Plus: row i goes into conversation i modulo their number."""
    if not args.into:
        raise dcpm.DcpmError(f"--data {args.data} holds LoCoMo-Plus cues; say --into locomo10.json as well")
    samples = samples_of(args.into, args)
    make = dcpm.make_memory(args)
    found = []
    for number, sample in enumerate(samples):
        found += cue_recall(sample, rows[number::len(samples)], make)
    print_table("a turn of the cue among the first 5 10 20", found)


def samples_of(path, args):
    samples = [s for s in load_corpus(Path(path), args.questions) if args.sample in ("", s.name)]
    if not samples:
        raise dcpm.DcpmError(f"--sample {args.sample}: {path} has no such sample")
    return samples


def run(args):
    try:
        cues = load_cues(Path(args.data))
        if cues:
            return run_cues(args, cues)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise dcpm.DcpmError(f"--data {args.data}: {type(error).__name__}: {error}") from error
    samples = samples_of(args.data, args)
    found, scores, conditions = [], [], CONDITIONS if args.conditions else CONDITIONS[-1:]
    make = dcpm.make_memory(args)
    for sample in samples:
        keep = list(dict.fromkeys(session for _, session, *_ in sample.turns))[:args.sessions or None]
        sample, memory = sample._replace(turns=[turn for turn in sample.turns if turn[1] in keep]), make()
        left = max(0, args.ask - len(scores) // len(conditions)) if args.model else 0
        scores += evaluate(sample, memory, left, conditions)
        found += evidence_recall(sample, memory)
        slots = sum(b.slot[1] != "event" for b in memory.beliefs.values())
        sizes = map(len, (memory.turns, memory.beliefs, memory.schemas, memory.cores))
        print("{}: {} turns, {} beliefs, {} schemas, {} cores,".format(sample.name, *sizes), slots, "slots")
    print_table("evidence recall @5 @10 @20", found)
    if args.model:
        print_table("answers (LongMemEval: containment of the gold answer)", scores)
        print(f"{memory.backend.tally['calls']} model calls, failures {dict(+memory.backend.failures)}")


def main(argv=None):
    parser = dcpm.memory_parser(__doc__.split("\n")[0])
    for flag, default, text in (
            ("data", "", "a LoCoMo, LongMemEval, PersonaMem or LoCoMo-Plus file"),
            ("into", "", "LoCoMo-Plus: the LoCoMo file whose conversations take in the cues"),
            ("questions", "", "PersonaMem: the questions csv (looked for beside --data)"),
            ("sample", "", "only the sample of this name, e.g. conv-26"),
            ("sessions", 0, "only the first N sessions of each sample (0 = all)"),
            ("ask", 100000, "llm: answer at most N questions")):
        parser.add_argument(f"--{flag}", type=type(default), default=default, help=text)
    parser.add_argument("--conditions", action="store_true", help="llm: raw turns and System1 alone as well")
    args = parser.parse_args(argv)
    if not args.data or min(args.sessions, args.ask) < 0:
        dcpm.fail("--data FILE is needed; --sessions and --ask must be >= 0")
    try:
        run(args)
    except (dcpm.DcpmError, OSError) as error:
        dcpm.fail(error)


if __name__ == "__main__":
    main()
