"""The miniature benchmark of dcpm.py: what a night is worth, on people who never name their habits.

    python tests/experiments/bench_dcpm.py                   two banks of phrases, then the mechanisms
    python tests/experiments/bench_dcpm.py --schema_lines 2  with half the room for schemas
    python tests/experiments/bench_dcpm.py --mechanisms      only the mechanisms, with all --personas
    python tests/experiments/bench_dcpm.py --heldout         the bank nobody tunes on; the result is logged
"""
import copy
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from datetime import date
from itertools import groupby
from pathlib import Path
from unittest import mock

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import dcpm
from dcpm_personas import BANKS, KINDS, make_persona

# ------------------------------------------------------------------ conditions and the answerer
CONDITIONS = ("raw TF-IDF", "System1", "System1 + newest facts", "the same, more tokens",
              "System1+2, no sweep", "System1+2", "placebo")
OTHER_PEOPLE = re.compile(rf"\b({dcpm.RELATIVES})\b")


def tfidf_scorer(texts):
    """A baseline that remembers nothing else: question -> a score for every text."""
    tfidf = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), stop_words="english")
    matrix = tfidf.fit_transform(texts)
    return lambda question: (matrix @ tfidf.transform([question]).T).toarray().ravel()


def bm25_scorer(texts, k1=1.2, b=0.75):
    """The plain one, over whole words: question -> a score for every text."""
    docs = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    found, size = Counter(w for doc in docs for w in doc), np.array([doc.total() for doc in docs])

    def scores(question):
        out = np.zeros(len(docs))
        for w in {*re.findall(r"\w+", question.lower())} & {*found}:
            idf, tf = math.log((len(docs) + 1) / (found[w] + 0.5)), np.array([doc[w] for doc in docs])
            out += idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * size / size.mean()))
        return out
    return scores


def within(lines, budget):
    """Whole lines only, as in `recall`: what does not fit is left out."""
    out = []
    for line in lines:
        cost = dcpm.count_tokens(str(line))
        if cost <= budget:
            out, budget = [*out, line], budget - cost
    return out


def newest_facts(memory, lines, budget):
    """`lines`, and what they leave of the budget is filled with the newest facts, relevant or not."""
    shown = {line.id for line in lines}
    newest = [dcpm.chain_line(memory, b.slot) for b in list(memory.beliefs.values())[:-51:-1]]
    new = {line.id: line for line in newest if line and line.id not in shown}
    return lines + within(new.values(), budget - sum(dcpm.count_tokens(str(line)) for line in lines))


def placebo(memory, rng):
    """The same schemas and cores about behaviours drawn at random: as many, without information."""
    fake = copy.copy(memory)
    fake.schemas, fake.cores = copy.deepcopy((memory.schemas, memory.cores))
    for node in [*fake.schemas.values(), *fake.cores.values()]:
        where = node.text.split(", ")[0]
        node.text = f"{where}, the user {dcpm.POLES[rng.choice(sorted(dcpm.POLES))][1]}."
    return fake


def without(memory, *kinds):
    """The same memory, but it shows no nodes of these kinds."""
    shown = copy.copy(memory)
    for kind in kinds:
        setattr(shown, kind, {})
    return shown


def contexts(memory, fake, tfidf, question, now, budget):
    """{condition: lines} for one question."""
    turns, scores = list(memory.turns.values()), tfidf(question)
    best = [turns[i] for i in sorted(range(len(turns)), key=lambda i: (-scores[i], -i))[:50]]  # ties: newest
    raw = [dcpm.Line(t.id, "raw", f"{t.t[:10]} {t.text}", t.t) for t in best]
    full = memory.recall(question, now, budget).lines
    facts = without(memory, "schemas", "cores")
    plain = facts.recall(question, now, budget).lines
    extra = sum(dcpm.count_tokens(str(line)) for line in full if line.channel == "schema")
    more = facts.recall(question, now, budget + extra).lines
    return dict(zip(CONDITIONS, (
        within(raw, budget), plain, newest_facts(memory, plain, budget),
        newest_facts(memory, more, budget + extra),
        without(memory, "cores").recall(question, now, budget).lines,
        full, fake.recall(question, now, budget).lines)))


STEP = re.compile(r"(?:: |→ )([^:→]+?) \((\d{4}-\d\d-\d\d)(, current)?\)")


def entries_of(line):
    """The dated statements of a line, [(date, text)]: the steps of a chain, else the line itself."""
    steps = [(day, text + mark) for text, day, mark in STEP.findall(line.text)]
    return steps or [(line.t, line.text)]


def choose(question, lines, options):
    """The one answerer, for every kind of question and every condition: lines -> a score per option.

    It may use the behaviour lexicon on any line, so that raw turns are not handicapped by a weaker reader.
    """
    lines = [n for n in lines if not OTHER_PEOPLE.search(n.text)]  # the questions are all about the user
    entries = sorted((t[:10], text) for n in lines for t, text in entries_of(n)
                     if "no longer" not in text)

    def dates(name, found):
        return [t for t, text in found if re.search(rf"\b{re.escape(name)}\b", text)]
    limit = re.search(r"\bbefore (\w+)", question)
    if limit or "change" in question:  # a line that tells the whole story outranks single mentions
        needed = [limit.group(1)] if limit else options[0].split(" → ")
        stories = [entries_of(n) for n in lines if "→" in n.text and all(w in n.text for w in needed)]
        told = stories[0] if stories else entries
        names = {*needed, *(name for option in options for name in option.split(" → "))}
        first = {name: (dates(name, told) or [""])[0][:10] for name in names}
        if limit:
            end = first[needed[0]] or "9999"
            return [date.fromisoformat(first[o]).toordinal() if "" < first[o] < end else 0 for o in options]
        steps = [[first[name] for name in option.split(" → ")] for option in options]
        return [sum(float(a < b) if a and b else 0.5 for a, b in zip(s, s[1:])) for s in steps]
    if dcpm.attributes_asked(question):
        current = [entry for entry in entries if "current" in entry[1]] or entries
        return [date.fromisoformat(d[-1]).toordinal() if (d := dates(o, current)) else 0 for o in options]
    return by_behaviour(question, lines, options)


def by_behaviour(question, lines, options):
    """Per option: the best line that shares its words, and all that show its behaviour or the opposite."""
    asked, common = set(dcpm.words(question)), set.intersection(*(set(dcpm.words(o)) for o in options))
    weights, scores = [1 + len(asked & set(dcpm.words(n.text))) for n in lines], []
    for option in options:
        own, shown, score = set(dcpm.words(option)) - common, dcpm.poles_of(option), 0
        alike = [w * len(own & set(dcpm.words(n.text))) / max(len(own), 1) for n, w in zip(lines, weights)]
        for n, w in zip(lines, weights):
            there = dcpm.poles_of(n.text)
            score += w * (any(p in there for p in shown) - any(dcpm.POLES[p][0] in there for p in shown))
        scores.append(max(alike, default=0) + score)
    return scores


def credit(scores, right):
    """1 for the right choice, shared equally on a tie: without evidence exactly chance."""
    best = [i for i, s in enumerate(scores) if math.isclose(s, max(scores), abs_tol=1e-9)]
    return (right in best) / len(best)


# ------------------------------------------------------------------ the benchmark
def people(bank, personas, make, seed):
    """(number, memory after the last day and before its night, that day, questions) of every persona."""
    for p in tqdm(range(personas), "personas", leave=False, disable=None):
        turns, questions = make_persona(f"{seed}-{p}", bank)
        memory = make()
        for _, said in groupby(turns, key=lambda turn: turn[1]):
            memory.ingest([(text, day, session, "user") for day, session, text in said])
        yield p, memory, turns[-1][0], questions


def run_benchmark(bank, personas, budget, seed=0, make=dcpm.Memory):
    """-> {condition: array (personas, kinds) of mean credit}, share of claims with a slot."""
    table, slots = {name: np.zeros((personas, len(KINDS))) for name in CONDITIONS}, []
    for p, memory, now, questions in people(bank, personas, make, seed):
        memory.sleep(now)
        slots += [b.slot[1] != "event" for b in memory.beliefs.values() for _ in b.sources]
        fake = placebo(memory, random.Random(f"placebo-{seed}-{p}"))
        tfidf, scores = tfidf_scorer([turn.text for turn in memory.turns.values()]), defaultdict(list)
        for kind, question, options, right in questions:
            for name, lines in contexts(memory, fake, tfidf, question, now, budget).items():
                scores[name, kind].append(credit(choose(question, lines, options), right))
        for (name, kind), values in scores.items():
            table[name][p, KINDS.index(kind)] = np.mean(values)
    return table, np.mean(slots)


def bootstrap(values, seed=0, rounds=2000):
    """Mean and 95 % interval over personas (not questions: a few personas may decide everything)."""
    draws = np.random.default_rng(seed).integers(0, len(values), (rounds, len(values)))
    return values.mean(), *np.percentile(values[draws].mean(1), (2.5, 97.5))


def coverage(bank):
    """-> shares of a bank: phrases whose pole the lexicon knows, slot sentences that a frame reads."""
    known = [dcpm.poles_of(phrase.format("it")) == (pole,)
             for pole, line in bank["phrases"].items() for phrase in line.split("|")]
    read = [dcpm.read_rules(dcpm.Turn("t1", "s1", "user", text.replace("{}", "2021", text.count("{}") - 1)
                                      .replace("{}", "Rome"), "2024-01-03"))[0]
            for kind in ("move", "late", "other", "job") for text in bank[kind].split("|")]
    return np.mean(known), np.mean([any(c.single for c in claims) for claims in read])


def four_words(bank):
    """All runs of four words in a bank's phrases and templates: two banks may share none."""
    texts = "|".join([*bank["phrases"].values(), *(v for v in bank.values() if isinstance(v, str))])
    texts = [re.sub(r"[.?]", "", text.replace("{}", "X").lower()).split() for text in texts.split("|")]
    return {tuple(t[i:i + 4]) for t in texts for i in range(len(t) - 3)}


GAINS = (("System2, span", "System1", [0]), ("System2, implicit seen", "System1", [4]),
         ("System2, implicit unseen", "System1", [5]), ("over placebo, implicit", "placebo", [4, 5]),
         ("over newest facts, implicit", "System1 + newest facts", [4, 5]),
         ("  with as many tokens", "the same, more tokens", [4, 5]),
         ("sweep, implicit seen", "System1+2, no sweep", [4]),
         ("sweep, implicit unseen", "System1+2, no sweep", [5]))


def print_benchmark(name, bank, table, slots, budget):
    """One table, then the paper's claim in plain numbers. -> {label: (mean, low, high)} in points."""
    lexicon, frames = coverage(bank)
    print(f"\n{name} bank, {len(table['System1'])} personas, {budget} tokens: accuracy in %, chance 25\n"
          f"(the lexicon knows {lexicon:.0%} of the phrases, frames read {frames:.0%} of the slot sentences, "
          f"{slots:.0%} of all claims have a slot)\n{'':23}" + "".join(f"{kind:>16}" for kind in KINDS))
    for condition, values in table.items():
        cells = [bootstrap(100 * values[:, k]) for k in range(len(KINDS))]
        print(f"{condition:23}" + "".join(f"{m:10.1f} ±{(hi - lo) / 2:4.1f}" for m, lo, hi in cells))
    # gains of System1+2 over another condition, per persona
    gain = {label: 100 * (table["System1+2"] - table[over])[:, kinds].mean(1) for label, over, kinds in GAINS}
    span, seen, unseen = list(gain.values())[:3]
    gain["headline: implicit - span"] = (seen + unseen) / 2 - span
    facts = {label: tuple(round(float(x), 1) for x in bootstrap(values)) for label, values in gain.items()}
    for label, (mean, low, high) in facts.items():
        print(f"  {label:30} {mean:+6.1f}  [{low:+.1f}, {high:+.1f}]")
    return facts


# ------------------------------------------------------------------ what each mechanism is worth
MECHANISMS = {  # name -> what replaces what
    "as it is": (dcpm, "MIN_STABLE", dcpm.MIN_STABLE),
    "clustering -> one cluster": (dcpm, "two_stage_dbscan", lambda v, limits: np.zeros(v.shape[0], int)),
    "clustering -> all noise": (dcpm, "two_stage_dbscan", lambda v, limits: np.full(v.shape[0], -1)),
    "sweep -> no pair": (dcpm, "collisions", lambda b, c, domains, limits: np.eye(len(domains)) < 0),
    "sweep -> every pair": (dcpm, "collisions", lambda b, c, domains, limits: np.eye(len(domains)) == 0),
    "strip -> identity": (dcpm.Rules, "strip", lambda self, memory, schemas: [s.text for s in schemas])}
READERS = {"System1": ("schemas", "cores"), "no sweep": ("cores",), "full": ()}  # what each does not see


def run_mechanisms(bank, personas, budget, seed=0, make=dcpm.Memory):
    """-> {mechanism: array (personas, 8)}: % of 3 readers x (seen, unseen), stable schemas, stable cores."""
    out = {name: [] for name in MECHANISMS}
    for _, memory, now, questions in people(bank, personas, make, seed):
        for name, patch in MECHANISMS.items():
            slept, found = copy.copy(memory), defaultdict(list)  # the same days, another night
            slept.schemas, slept.cores, slept.intentions, slept.log = {}, {}, {}, [*memory.log]
            with mock.patch.object(*patch):
                slept.sleep(now)
            for reader, kinds in READERS.items():
                shown = without(slept, *kinds)
                for kind, question, options, right in questions:
                    if kind in KINDS[-2:]:
                        lines = shown.recall(question, now, budget).lines
                        found[reader, kind].append(100 * credit(choose(question, lines, options), right))
            cells = [np.mean(found[reader, kind]) for reader in READERS for kind in KINDS[-2:]]
            out[name].append(cells + [sum(n.status == "stable" for n in nodes.values())
                                      for nodes in (slept.schemas, slept.cores)])
    return {name: np.array(rows) for name, rows in out.items()}


def print_mechanisms(name, table):
    print(f"\n{name} bank, {len(table['as it is'])} personas: what each mechanism is worth, implicit seen / "
          f"unseen\n{'':27}" + "".join(f"{reader:>16}" for reader in READERS) + "   schemas  cores")
    for mechanism, values in table.items():
        print(f"{mechanism:27}{3 * '{:9.1f} /{:5.1f}'}{{:10.1f}}{{:7.1f}}".format(*values.mean(0)))


# ------------------------------------------------------------------ the command
def lexicon_hash():
    """What must not change unnoticed between two results on the held-out bank."""
    return dcpm.digest(dcpm.POLES, dcpm.CUES, dcpm.DOMAINS, dcpm.TABLE)


def log_heldout(facts, table, path, args):
    """Append date, commit, hashes and figures to a log outside the repository; old results stay."""
    describe = subprocess.run("git describe --always --dirty", shell=True, cwd=path.parent, text=True,
                              stdout=subprocess.PIPE)
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state")
    log = state / "four-papers" / "dcpm_heldout.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    entry = {"date": time.strftime("%Y-%m-%d %H:%M"), "commit": describe.stdout.strip() or "no git",
             "lexicon": lexicon_hash(), "bank": dcpm.digest(path.read_text(encoding="utf-8")),
             "flags": vars(args), "facts": facts,
             "accuracy": {c: np.round(100 * v.mean(0), 1).tolist() for c, v in table.items()}}
    with open(log, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
    print(f"\nlogged in {log}")


def main(argv=None):
    parser = dcpm.memory_parser(__doc__.split("\n")[0])
    for flag, default, text in (
            ("personas", 60, "generated personas"), ("budget", 120, "tokens of context per question"),
            ("seed", 0, "of the personas"), ("schema_lines", 4, "schemas and cores beside the budget")):
        parser.add_argument(f"--{flag}", type=int, default=default, help=text)
    parser.add_argument("--heldout", action="store_true", help="the held-out bank instead; it is logged")
    parser.add_argument("--mechanisms", action="store_true", help="only what each mechanism is worth")
    args = parser.parse_args(argv)
    if args.personas < 2 or min(args.budget, args.schema_lines) < 0 or args.model:
        dcpm.fail("--personas must be >= 2, --budget and --schema_lines >= 0, and no --model given")
    if args.heldout and args.mechanisms:
        dcpm.fail("--mechanisms is about the development and validation banks; leave out --heldout")
    path, banks = Path(__file__).with_name("dcpm_heldout_bank.json"), BANKS
    dcpm.SCHEMA_LINES = args.schema_lines
    try:
        make = dcpm.make_memory(args)
        if args.heldout:
            banks = {"held-out": json.loads(path.read_text(encoding="utf-8"))}
            shared = [four_words(banks["held-out"]) & four_words(bank) for bank in BANKS.values()]
            print("runs of four words shared with other banks:", sum(map(len, shared)))
        print(f"Lexicon and frames {lexicon_hash()}, {args.schema_lines} lines of schemas, {make().limits}"
              "\n± is half a 95 % bootstrap interval over personas.")
        for name, bank in {} if args.mechanisms else banks.items():
            table, slots = run_benchmark(bank, args.personas, args.budget, args.seed, make)
            facts = print_benchmark(name, bank, table, slots, args.budget)
            if args.heldout:
                log_heldout(facts, table, path, args)
        for name, bank in {} if args.heldout else banks.items():
            personas = args.personas if args.mechanisms else min(args.personas, 24)
            print_mechanisms(name, run_mechanisms(bank, personas, args.budget, args.seed, make))
    except (dcpm.DcpmError, OSError) as error:
        dcpm.fail(error)


if __name__ == "__main__":
    main()
