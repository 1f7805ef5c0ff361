"""DCPM: an agent memory that says why it believes something (dual-process memory, arXiv 2606.09483).

What the method is:
1. Memory is ordered by what it can do: raw turns -> facts and identity -> belief trajectories -> domain
   schemas and intentions -> core schemas. `python dcpm.py` tells a story through all of them, then measures.
2. By day, System1 runs inside every write: keep the turn verbatim, extract claims, reconcile each with the
   chain of its slot. A revision never overwrites: it becomes the new head of a doubly linked chain.
3. By night, System2 induces schemas: one habit in one domain, from >= 3 live beliefs of >= 2 sessions.
4. Its sweep looks for *collisions*, schemas of different domains alike in behaviour and unlike in content
   (that is not contradiction), and lifts them into core schemas, which also say something about domains
   that never came up. (Only for people with five stable schemas or more.)
5. Finding what to show asks no model: word statistics plus following links, within a token budget, an id on
   every line; `why(id)` walks from a core schema down to the words that were said.

How to read this file: part 1 is the method, about 950 lines; the rest is its surroundings, to be looked up.

  1. the method      2.1 capability order -> the records and their store; 2.2 daytime writer -> decide,
                     write_claims; 2.3 nighttime sweeper -> two_stage_dbscan, induce_rules, collisions,
                     plan_sleep; 2.4 read path -> recall, rank_turns; all of it behind the facade `Memory`
  2. language        the two backends that read and phrase: rules (dates, lexicon, frames) and a chat model
  3. experiments     section 3 of the paper: a miniature benchmark of our own, and loaders of real corpora

  paper (partly as its authors' code has it)      our default
  a language model extracts and reconciles        rules; --backend llm proposes, the same table decides
  dense vectors                                   BM25 for reading, a behaviour lexicon for schemas
  collision: behaviour > 0.70, content < 0.60     behaviour Jaccard >= 0.5, content cosine < 0.6
  a refinement shadows the old text, unlinked     it stays linked, as "refine"
  list-valued links; schemas never revisited      single links that cannot fork; support recounted every night
  a claim told late becomes the head              spliced in by event time; the head stays

Left out: session summaries, embeddings, cores above cores, merging near-twin schemas, vector stores and
servers, intentions marked fulfilled. The store lives in memory and is saved as its audit log.
"""
import argparse
import ast
import copy
import csv
import functools
import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from array import array
from collections import Counter, defaultdict, namedtuple
from dataclasses import asdict, dataclass, field
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np

# ================================================================== PART 1: THE METHOD
# What it uses from part 2: words(text), stemmed content words; key(value), equal iff two values are the same;
# poles_of(text) and domain_of(text), habits and domain by a lexicon of POLES and DOMAINS; opposite(pole);
# DATE and date_window(text, today), time expressions; SINGLE, attributes with one value at a time; RULES, a
# backend.

# ------------------------------------------------------------------ records
@dataclass
class Turn:
    """One message, verbatim, append-only. `t` is the conversation's ISO date or date-time."""
    id: str
    session: str
    speaker: str  # "user", "assistant" or a person's name
    text: str
    t: str


@dataclass
class Claim:
    """What an extractor read in a turn, not yet a belief. Attribute "?": whichever chain has this value."""
    attribute: str
    value: str
    text: str = ""
    span: tuple = ()  # (start, end) in the turn's text
    subject: str = "user"
    polarity: int = 1  # +1 holds, -1 no longer / dislikes, 0 unknown (taken back, nothing in its place)
    layer: str = "fact"  # or "identity": preferences, attitudes, values, habits
    t_event: str = ""
    reliability: float = 0.9  # 0.9 said outright, at most 0.6 if hedged, 0.4 about another person
    until: str = ""  # last day of a plan
    detail: bool = False  # carries a qualifier ("mostly jazz")
    slot: tuple = None  # set when a model has already matched the claim to a chain


@dataclass
class Belief:
    """A claim that entered the store. `prev` and `next` make the chain of its slot."""
    id: str
    layer: str
    slot: tuple  # (subject, attribute, member): the dimension on which two claims exclude each other
    value: str
    polarity: int
    text: str
    t_event: str  # when it became true
    t_seen: str  # when the memory learnt it; monotone. Two clocks: bi-temporal
    sources: list  # [(turn id, start, end, reliability)], never empty, only grows
    domain: str = ""
    tags: list = field(default_factory=list)  # behaviour poles that it shows
    until: str = ""
    reason: str = ""
    prev: str = None
    next: str = None
    link_kind: str = None  # "supersede" or "refine": why `prev` exists
    confidence: float = 0.0
    status: str = "active"  # active <=> next is None and not suppressed; else superseded or suppressed


@dataclass
class Schema:
    """One behavioural regularity inside one domain. Its evidence changes; its text can only be withdrawn."""
    id: str
    subject: str
    domain: str
    behaviour: str  # what is left when the domain's nouns are stripped
    text: str
    created: str
    vector: dict = field(default_factory=dict)  # behaviour feature -> weight
    evidence: list = field(default_factory=list)  # beliefs ever cited, without those asked to be forgotten
    live: list = field(default_factory=list)  # of those, the ones that held at the last sleep
    confidence: float = 0.0
    status: str = "forming"  # forming, stable, contested, dormant
    prev: str = None  # the opposite habit that this one replaced
    next: str = None


@dataclass
class Core:
    """A regularity behind schemas of different domains."""
    id: str
    subject: str
    behaviour: str
    text: str
    created: str
    members: list = field(default_factory=list)  # schema ids, only grows
    evidence: list = field(default_factory=list)  # union of the members' evidence
    confidence: float = 0.0
    status: str = "stable"  # or dormant


@dataclass
class Intention:
    """One future action with an end. Wishes and values are not intentions."""
    id: str
    text: str
    until: str
    evidence: list
    status: str = "open"  # open, expired, withdrawn


@dataclass
class Event:
    """One line of the audit log. The log *is* the memory: replayed, it gives the same store."""
    seq: int
    op: str
    ids: list
    turn: str
    reason: str
    data: dict


class DcpmError(Exception):
    """A write that would break an invariant, or a file that cannot be read; nothing has been changed."""


# ------------------------------------------------------------------ store: the only place that sets links
class Index:
    """BM25 over an inverted index that grows document by document: refitting at every write is quadratic."""

    def __init__(self):
        self.keys, self.lengths, self.postings = [], array("d"), {}

    def add(self, doc, tokens):
        for token, count in Counter(tokens).items():
            docs, counts = self.postings.setdefault(token, (array("l"), array("d")))
            docs.append(len(self.keys))
            counts.append(count)
        self.keys.append(doc)
        self.lengths.append(len(tokens))

    def scores(self, query, b=0.75, k1=1.2):
        """{token: weight} -> BM25 score of every document, shape (documents,)."""
        # score(d) = sum over tokens w of weight * idf(w) * f (k1 + 1) / (f + norm(d)),  f = count of w in d
        # norm(d) = k1 (1 - b + b |d| / mean |d|)
        # idf(w) = ln(1 + (N - n + 1/2) / (n + 1/2)),  n of N documents hold w
        n, lengths = len(self.keys), np.array(self.lengths)
        out, mean = np.zeros(n), max(lengths.sum() / max(n, 1), 1e-9)
        norm = k1 * (1 - b + b * lengths / mean)
        for token, weight in query.items():
            if token in self.postings:
                docs, counts = map(np.array, self.postings[token])
                idf = math.log(1 + (n - len(docs) + 0.5) / (len(docs) + 0.5))
                out[docs] += weight * idf * counts * (k1 + 1) / (counts + norm[docs])
        return out


class Store:
    """All records of one user. Every change is one event: checked first, then applied as a whole."""

    def __init__(self, user="user"):
        self.user, self.log = user, []
        self.clock = ""  # the latest turn's time; nothing reads the wall clock
        self.turns, self.beliefs, self.heads = {}, {}, {}
        self.schemas, self.cores, self.intentions = {}, {}, {}
        self.hidden = set()  # turns never to be shown: they say what was asked to be forgotten
        self.members = {}  # (subject, attribute) -> slots, in order of arrival
        self.speakers = []  # people who speak here, not the assistant: System2 may generalise about them
        self.sessions = {}  # name -> number
        self.columns = {name: array("l") for name in ("session", "speaker", "day")}  # of the turns
        self.turn_index, self.belief_index = Index(), Index()

    def new_id(self, letter, *parts):
        """t5 and b17, never reused; a hash for what System2 finds: the same finding gets the same id."""
        number = len(self.turns if letter == "t" else self.beliefs) + 1
        name = f"{letter}{digest(*parts) if parts else number}"
        return name if self.user == "user" else f"{self.user}/{name}"

    def commit(self, op, ids=(), said="", reason="", **data):
        event = Event(len(self.log) + 1, op, list(ids), said, reason, data)
        self.apply(event)
        self.log.append(event)

    def apply(self, event):
        """Apply one event: the only way that anything here changes."""
        data = event.data
        if event.op == "RAW":
            self._keep(Turn(**data["turn"]))
        elif event.op == "CONFIRM":
            belief = self.beliefs[event.ids[0]]
            belief.sources.append(tuple(data["source"]))
            belief.t_event = data.get("t_event", belief.t_event)
            self._weigh(belief)
        elif event.op == "SUPPRESS":
            for id_ in event.ids:
                self.beliefs[id_].status = "suppressed"
                self.hidden.update(source[0] for source in self.beliefs[id_].sources)
            self.hidden.update(data["hide"])
        elif event.op == "SLEEP":
            for kind, cls in (("schemas", Schema), ("cores", Core), ("intentions", Intention)):
                getattr(self, kind).update({n["id"]: cls(**copy.deepcopy(n)) for n in data[kind]})
        elif event.op != "FAILED":  # which only records that a model gave nothing usable
            kind = "refine" if event.op == "REFINE" else "supersede"
            self._insert(Belief(**copy.deepcopy(data["belief"])), data.get("prev"), data.get("next"), kind)

    def _keep(self, turn):
        if turn.id in self.turns:
            raise DcpmError(f"turn {turn.id} exists already; turns are append-only")
        self.turns[turn.id] = turn
        self.clock = max(self.clock, turn.t)
        self.turn_index.add(turn.id, words(turn.text))
        if turn.speaker not in ("assistant", *self.speakers):
            self.speakers.append(turn.speaker)
        speaker = self.speakers.index(turn.speaker) if turn.speaker in self.speakers else -1
        self.columns["session"].append(self.sessions.setdefault(turn.session, len(self.sessions)))
        self.columns["speaker"].append(speaker)
        self.columns["day"].append(date.fromisoformat(turn.t[:10]).toordinal())

    def _insert(self, belief, prev, next, kind):
        """Put `belief` between its neighbours: all four links or none, and never a second head."""
        belief.slot, belief.sources = tuple(belief.slot), [tuple(s) for s in belief.sources]
        before, after = self.beliefs.get(prev), self.beliefs.get(next)
        # The neighbours must still be neighbours: two writers who read one head cannot both append to it.
        if before:
            fits = before.next == next and before.slot == belief.slot
        elif after:
            fits = after.prev is None and after.slot == belief.slot
        else:
            fits = belief.slot not in self.heads
        if not fits or belief.id in self.beliefs:
            raise DcpmError(f"{belief.id} would fork the chain of {belief.slot}; read its head again")
        belief.prev, belief.next, belief.link_kind = prev, next, kind if before else None
        if before:
            before.next = belief.id
            before.status = "superseded" if before.status == "active" else before.status
        if after:
            after.prev, after.link_kind, belief.status = belief.id, "supersede", "superseded"
        else:
            self.heads[belief.slot] = belief.id
        if not before and not after:
            self.members.setdefault(belief.slot[:2], []).append(belief.slot)
        self.beliefs[belief.id] = belief
        subject, attribute, _ = belief.slot
        self.belief_index.add(belief.id, words(f"{subject} {attribute} {belief.value} {belief.text}"))
        self._weigh(belief)

    def _weigh(self, belief):
        """Confidence by noisy-or over sessions: saying it twice in one sitting adds nothing."""
        # confidence = 1 - product over sessions of (1 - best reliability in it), at most 0.99
        best = {}
        for turn, _, _, reliability in belief.sources:
            session = self.turns[turn].session
            best[session] = max(best.get(session, 0), reliability)
        belief.confidence = round(min(0.99, 1 - math.prod(1 - r for r in best.values())), 4)
        if belief.status == "suppressed":  # told again after "forget that": it stays forgotten
            self.hidden.add(belief.sources[-1][0])

    def chain(self, slot):
        """Beliefs of a slot, oldest first."""
        out, id_ = [], self.heads.get(tuple(slot))
        while id_ and len(out) < len(self.beliefs):
            out.append(self.beliefs[id_])
            id_ = out[-1].prev
        return out[::-1]

    def head(self, slot):
        return self.beliefs.get(self.heads.get(tuple(slot)))

    def visible(self, slot):
        """The chain without what was asked to be forgotten."""
        return [b for b in self.chain(slot) if b.status != "suppressed"]


# ------------------------------------------------------------------ System1: inside every write
def slot_of(store, claim):
    """The dimension a claim speaks about: single-valued attributes have one chain, others one per value."""
    if claim.slot:
        return claim.slot
    attribute, value = claim.attribute, " ".join(sorted(set(words(DATE.sub(" ", claim.value)))))
    if attribute == "?":  # "gave up coffee": a chain about coffee which that changes, or any, or a new one
        heads = [store.head((claim.subject, a, value)) for a in ("likes", "hobby", "possession", "habit")]
        known = sorted((h for h in heads if h), key=lambda h: h.polarity == claim.polarity)
        attribute = known[0].slot[1] if known else "likes"
    elif attribute == "cancel":  # the open plan that shares most words; without one it stays a free fact
        plans = [store.head(s) for s in store.members.get((claim.subject, "plan"), ())]
        asked = set(words(claim.value))
        shared = {p.slot: len(asked & set(words(p.value))) for p in plans if p.polarity == 1}
        best = max(shared, key=shared.get, default=None)
        if shared.get(best):
            return best
        attribute = "event"
    single = attribute in SINGLE or attribute.startswith("favorite")
    slot = (claim.subject, attribute, None if single else value)
    head = store.head(slot)
    if single and claim.polarity == -1 and (head is None or key(head.value) != key(claim.value)):
        return claim.subject, "event", key(claim.text)  # "I used to live in Rome" does not end Paris
    return slot


def same(a, b):
    """Do two claims or beliefs of one slot say the same? A plan with another date does not."""
    return (key(a.value), a.polarity, a.until) == (key(b.value), b.polarity, b.until)


# What reconciling decided, in ids: `node` is to be confirmed; `prev` and `next` are neighbours of a new one.
Decision = namedtuple("Decision", "op node prev next", defaults=(None,) * 3)


def decide(store, claim, slot):
    """The decision table: claim c against head h of its slot, the first row that fits.

        no head                                   ADD
        the same value, asked to be forgotten     CONFIRM: whatever is said about it now, it stays forgotten
        t(c) >= t(h), other value or polarity     SUPERSEDE, or RETRACT if c denies or takes back: a new head
        t(c) >= t(h), more words or a qualifier   REFINE: a new head that keeps what the old one rests on
        t(c) >= t(h), the same                    CONFIRM: one more source, no new node
        t(c) <  t(h), equals a neighbour in time  CONFIRM that neighbour
        t(c) <  t(h)                              SPLICE: goes in where it belongs, the head stays

    Slot and polarity, never similarity: cosine cannot tell "likes coffee" from "no longer likes coffee".
    Told in time, only the head counts as a duplicate: A, then B, then A again are three nodes.
    """
    head = store.head(slot)
    if head is None:
        return Decision("ADD")
    if head.status == "suppressed" and key(head.value) == key(claim.value):
        return Decision("CONFIRM", node=head.id)
    if claim.t_event >= head.t_event:
        if not same(head, claim):
            return Decision("RETRACT" if claim.polarity < 1 else "SUPERSEDE", prev=head.id)
        old, new = set(words(DATE.sub("", head.text))), set(words(DATE.sub("", claim.text)))
        if old < new or (claim.detail and not new <= old):
            return Decision("REFINE", prev=head.id)
        return Decision("CONFIRM", node=head.id)
    # Told late. Making it the head, as the authors' code does, would bring back the past as the present.
    after = next(b for b in store.chain(slot) if b.t_event > claim.t_event)
    before = store.beliefs.get(after.prev)
    for neighbour in (before, after):
        if neighbour and same(neighbour, claim):
            return Decision("CONFIRM", node=neighbour.id)
    return Decision("SPLICE", prev=after.prev, next=after.id)


def new_belief(store, turn, claim, slot, decision):
    """The node that a claim becomes; only a refinement takes over text and sources of its predecessor."""
    old, text = store.beliefs.get(decision.prev), claim.text
    inherited = old.sources if decision.op == "REFINE" else []
    if inherited and not set(words(old.text)) <= set(words(text)):
        text = f"{old.text}; {text}"
    because = re.search(r"\b(?:because|since|so that)\b (.+)", claim.text, re.I)
    if because and (DATE.match(because.group()) or DATE.match(because.group(1))):  # "since 2021" is no reason
        because = None
    return Belief(
        store.new_id("b"), claim.layer, slot, claim.value, claim.polarity, text,
        claim.t_event, store.clock, [*inherited, (turn.id, *claim.span, claim.reliability)],
        domain=domain_of(text), tags=list(poles_of(text)) if claim.polarity == 1 else [], until=claim.until,
        reason=because.group(1) if because else f"told {turn.t[:10]}" if old else "")


def write_claims(store, turn, claims):
    """Reconcile and apply the claims of one turn, one after the other. -> [(op, id)]."""
    ops = []
    for claim in claims:
        claim.t_event = claim.t_event or turn.t
        slot = slot_of(store, claim)
        decision = decide(store, claim, slot)
        op, node = decision.op, store.beliefs.get(decision.node)
        if node and turn.id in [source[0] for source in node.sources]:
            continue  # said twice in one turn: a sentence cannot confirm itself
        if op == "CONFIRM":
            # Told again with an earlier date: it was true since then, but not before its predecessor.
            earliest = store.beliefs[node.prev].t_event if node.prev else ""
            moved = {"t_event": claim.t_event} if earliest <= claim.t_event < node.t_event else {}
            store.commit(op, [node.id], turn.id, source=(turn.id, *claim.span, claim.reliability), **moved)
        else:
            node = new_belief(store, turn, claim, slot, decision)
            store.commit(op, [node.id], turn.id, node.reason, belief=asdict(node),
                         prev=decision.prev, next=decision.next)
        ops.append((op, node.id))
    return ops


# ------------------------------------------------------------------ System2: while nobody is waiting
# Thresholds for cue space, chosen on the development bank; the authors' 0.70 / 0.60 belong to dense vectors.
BEHAVIOUR_ALIKE, CONTENT_UNLIKE = 0.5, 0.6
MIN_STABLE = 5  # the authors': with fewer schemas too little is known about a person to generalise
WITHDRAWN = "(withdrawn: it rested on something the user asked to forget)"


def two_stage_dbscan(vectors):
    """Cluster rows by cosine: similarity 0.55, 3 members; those over 12 again at 0.75, 2. -> labels (n,).

    Leftovers of the second stage join the nearest sub-cluster. Equal rows are clustered once, by weight: a
    hundred thousand beliefs have few distinct behaviour vectors.
    """
    from sklearn.cluster import DBSCAN
    rows, inverse, counts = np.unique(vectors, axis=0, return_inverse=True, return_counts=True)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    labels = DBSCAN(eps=0.45, min_samples=3, metric="cosine").fit_predict(rows, sample_weight=counts)
    for label in sorted(set(labels) - {-1}):
        inside = np.flatnonzero(labels == label)
        if counts[inside].sum() <= 12 or len(inside) < 2:
            continue
        stage2 = DBSCAN(eps=0.25, min_samples=2, metric="cosine")
        sub = stage2.fit_predict(rows[inside], sample_weight=counts[inside])
        centres = {k: rows[inside[sub == k]].mean(0) for k in sorted(set(sub) - {-1})}
        if centres:
            sub = [k if k >= 0 else max(centres, key=lambda c: rows[i] @ centres[c])
                   for i, k in zip(inside, sub)]
            labels[inside] = labels.max() + 1 + np.array(sub)
    return labels[inverse.ravel()]


def induce_rules(store, pool):
    """Clusters in behaviour + domain space; yields (subject, domain, behaviour, text, vector, belief ids).

    Not over the words of raw sentences: without a model word overlap finds sentence shapes, not habits.
    """
    pool = [b for b in pool if b.tags and b.domain]
    # One column per pole, domain and person: two beliefs are near iff behaviour, domain and person agree.
    # cosine = (cosine of the poles + same domain + same person) / 3
    kinds = {"pole": POLES, "domain": DOMAINS, "who": store.speakers}
    columns = {name: i for i, name in enumerate((kind, n) for kind, names in kinds.items() for n in names)}
    vectors = np.zeros((len(pool), len(columns)))
    for row, b in zip(vectors, pool):
        row[[columns["pole", tag] for tag in b.tags]] = 1 / math.sqrt(len(b.tags))
        row[[columns["domain", b.domain], columns["who", b.slot[0]]]] = 1
    labels = two_stage_dbscan(vectors) if pool else []
    groups = defaultdict(list)  # a cluster may chain two poles together; a schema has one
    for b, label in zip(pool, labels):
        for pole in b.tags:
            if label >= 0:  # -1: in no cluster
                groups[b.slot[0], b.domain, pole].append(b)
    for (subject, domain, pole), beliefs in sorted(groups.items()):
        tags = Counter(tag for b in beliefs for tag in b.tags)
        vector = {tag: round(n / tags.total(), 4) for tag, n in sorted(tags.items())}
        text = f"In {domain}, {called(subject)} {POLES[pole][1]}."
        yield subject, domain, pole, text, vector, [b.id for b in beliefs]


def name_core_rules(members):
    """One sentence that explains why these habits go together; it names no domain, so that it never ages."""
    behaviour = Counter(m.behaviour for m in members).most_common(1)[0][0]
    return behaviour, f"In unrelated parts of life, {called(members[0].subject)} {POLES[behaviour][1]}."


def called(subject):
    return "the user" if subject == "user" else subject


def refresh_schema(schema, store, x):
    """Recount the support of a schema. s: chains that hold and show it; x: beliefs that show the opposite."""
    schema.evidence = sorted(schema.evidence)
    schema.live = [i for i in schema.evidence if holds(store.beliefs[i])]
    s = len({store.beliefs[i].slot for i in schema.live})  # a chain counts once, by its head
    sessions = {store.turns[src[0]].session for i in schema.live for src in store.beliefs[i].sources}
    # confidence = (s + 1) / (s + x + 2): Laplace's rule of succession
    schema.confidence = round((s + 1) / (s + x + 2), 4)
    known, sure = s >= 3 and len(sessions) >= 2, schema.confidence >= 0.65
    schema.status = "dormant" if s < 2 else "forming" if not known else "stable" if sure else "contested"


def holds(belief):
    return belief.status == "active" and belief.polarity == 1


def collisions(schemas, store):
    """Pairs of one person's schemas alike in behaviour, unlike in content and domain. NOT contradictions.

    The 30 nearest neighbours in behaviour space shortlist the pairs, so the sweep is not quadratic.
    """
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.neighbors import NearestNeighbors
    cues = {w for cue, _ in CUES for w in cue.split()}

    def content_words(schema):  # what is left without the behaviour words
        said = [w for i in schema.live for w in words(store.beliefs[i].text) if w not in cues]
        return said or [schema.domain]
    content = TfidfVectorizer(analyzer=content_words).fit_transform(schemas)
    behaviour = DictVectorizer().fit_transform([s.vector for s in schemas])
    near = NearestNeighbors(n_neighbors=min(30, len(schemas)), metric="cosine").fit(behaviour)
    pairs = set()
    for i, row in enumerate(near.kneighbors(behaviour, return_distance=False)):
        for j in map(int, row):
            a, b = schemas[i], schemas[j]
            if a.domain != b.domain:
                # weighted Jaccard = sum_k min(a_k, b_k) / sum_k max(a_k, b_k); `&` and `|` take min and max
                u, v = Counter(a.vector), Counter(b.vector)
                alike = (u & v).total() / (u | v).total()
                if alike >= BEHAVIOUR_ALIKE and (content[i] @ content[j].T).sum() < CONTENT_UNLIKE:
                    pairs.add((min(i, j), max(i, j)))
    return sorted(pairs)


def collision_groups(n, pairs):
    """Merge what is linked; drop who collides with less than half of the group: merging is transitive."""
    group_of = {i: [i] for i in range(n)}
    for i, j in pairs:
        merged = sorted({*group_of[i], *group_of[j]})
        group_of.update(dict.fromkeys(merged, merged))
    for group in map(list, sorted({tuple(group) for group in group_of.values()})):
        while len(group) > 1:
            degree = {i: sum((i, j) in pairs or (j, i) in pairs for j in group) for i in group}
            worst = min(group, key=degree.get)
            if degree[worst] >= (len(group) - 1) / 2:
                yield group
                break
            group.remove(worst)


def refresh_core(core, schemas):
    """Recount a core: what it rests on, how sure it is, and whether it still stands."""
    core.members = sorted(set(core.members))
    core.evidence = sorted({i for m in core.members for i in schemas[m].evidence})
    # confidence = the second best over domains of (best stable member's): one domain alone proves nothing
    stable = [schemas[m] for m in core.members if schemas[m].status == "stable"]
    best = {s.domain: s.confidence for s in sorted(stable, key=lambda s: s.confidence)}  # the last one stays
    core.status, core.confidence = "dormant", 0.0
    if len(best) >= 2:
        core.status, core.confidence = "stable", sorted(best.values())[-2]
    if core.text == WITHDRAWN:
        core.status = "dormant"


def plan_schemas(store, now, backend):
    """All schemas as they should be tonight: new ones, recounted ones, and which replaced its opposite."""
    schemas = copy.deepcopy(store.schemas)
    for schema in schemas.values():
        schema.text = text_of(store, schema)
        kept = [i for i in schema.evidence if store.beliefs[i].status != "suppressed"]
        schema.evidence = [] if schema.text == WITHDRAWN else kept
    # The whole pool every night, not only what is uncited: the same store must give the same schemas.
    pool = [b for b in store.beliefs.values() if holds(b) and b.slot[0] in store.speakers
            and b.slot[1] not in ("maybe", "plan")]
    for subject, domain, behaviour, text, vector, ids in backend.induce(store, pool):
        id_, ids = store.new_id("s", subject, domain, behaviour), [i for i in ids if holds(store.beliefs[i])]
        if len(ids) >= (1 if id_ in schemas else 2):
            schema = schemas.setdefault(id_, Schema(id_, subject, domain, behaviour, text, now))
            schema.text = text if schema.text == WITHDRAWN else schema.text
            schema.vector, schema.evidence = vector, list({*schema.evidence, *ids})
    # x of the confidence: live beliefs of the same person and domain that show the opposite behaviour.
    shows = Counter((b.slot[0], b.domain, tag) for b in pool for tag in b.tags)
    for schema in schemas.values():
        refresh_schema(schema, store, shows[schema.subject, schema.domain, opposite(schema.behaviour)])
    for new in schemas.values():
        old = schemas.get(store.new_id("s", new.subject, new.domain, opposite(new.behaviour)))
        if old and old.status != "stable" and new.status == "stable":
            linked = old.prev or old.next or new.prev or new.next
            if not linked and (old.created, old.id) < (new.created, new.id):
                new.prev, old.next = old.id, new.id
    return schemas


def plan_cores(store, now, schemas, backend):
    """All cores: what the sweep finds joins a known core or becomes one, and every core is recounted."""
    cores = copy.deepcopy(store.cores)
    for core in cores.values():
        core.text = text_of(store, core)
    for person in store.speakers:
        stable = [s for _, s in sorted(schemas.items()) if s.subject == person and s.status == "stable"]
        pairs = collisions(stable, store) if len(stable) >= MIN_STABLE else []
        for group in collision_groups(len(stable), pairs):
            join_core(store, now, cores, [stable[i] for i in group], backend)
    for core in cores.values():
        refresh_core(core, schemas)
    return cores


def join_core(store, now, cores, members, backend):
    """Schemas that collide -> the core they belong to, which may be a new one; changes `cores`."""
    ids = {m.id for m in members}
    known = [c for c in cores.values() if ids & set(c.members) and c.text != WITHDRAWN]
    if not known:
        named = backend.name_core(members)
        if not named:  # a null answer is allowed: no core
            return
        id_ = store.new_id("c", members[0].subject, named[0])
        if id_ not in cores or cores[id_].text == WITHDRAWN:
            cores[id_] = Core(id_, members[0].subject, *named, now)
        known = [cores[id_]]
    # The core that shares most members, then the oldest: never whichever comes first.
    min(known, key=lambda c: (-len(ids & set(c.members)), c.created, c.id)).members += ids


def plan_intentions(store, now):
    """All intentions: plans with a last day, told by people who speak here."""
    intentions = copy.deepcopy(store.intentions)
    for b in store.beliefs.values():
        subject, attribute, _ = b.slot
        if attribute == "plan" and b.until and subject in store.speakers and b.status != "suppressed":
            id_ = store.new_id("i", subject, key(b.value), b.until)
            item = intentions.setdefault(id_, Intention(id_, b.value, b.until, []))
            item.evidence = sorted({*item.evidence, b.id})
    for item in intentions.values():
        item.evidence = [i for i in item.evidence if store.beliefs[i].status != "suppressed"]
        item.text = item.text if item.evidence else WITHDRAWN
        alive = any(holds(store.beliefs[i]) for i in item.evidence)
        item.status = "withdrawn" if not alive else "expired" if item.until < now[:10] else "open"
    return intentions


def plan_sleep(store, now, backend):
    """What System2 would change, as a dictionary: a pure function of what it is given."""
    schemas = plan_schemas(store, now, backend)
    new = {"schemas": schemas, "cores": plan_cores(store, now, schemas, backend),
           "intentions": plan_intentions(store, now)}
    return {kind: [asdict(n) for _, n in sorted(nodes.items()) if n != getattr(store, kind).get(n.id)]
            for kind, nodes in new.items()}


# ------------------------------------------------------------------ reader: words and links, no model
ASK = {  # attribute -> how a question asks for it
    "residence": r"\b(live|living|lived|home town|reside|moved? to|city|based)\b",
    "employer": r"\b(work|employer|company|job)\b", "occupation": r"\b(occupation|profession|for a living)\b",
    "diet": r"\bdiet\b", "age": r"\bhow old\b|\bage\b", "name": r"\bmy name\b",
    "partner": r"\b(partner|married|dating)\b", "birthday": r"\bbirthday\b"}
SHARES = {"profile": 0.1, "identity": 0.2, "schema": 0.2, "intention": 0.1}  # of the budget; the rest: facts
SCHEMA_LINES = 4  # with a channel of their own: the authors' quota of 40 % of ten profile lines


@dataclass
class Line:
    """One line of context. `entries` are its dated statements, for whoever reads by program."""
    id: str
    channel: str
    text: str
    t: str
    entries: list = None  # [(date, text)]; by default the line itself

    def __post_init__(self):
        self.entries = self.entries or [(self.t, self.text)]

    def __str__(self):
        return f"[{self.id}] {self.text}"

    @functools.cached_property
    def cost(self):
        return count_tokens(str(self))


Recall = namedtuple("Recall", "lines text ids")


def rank_turns(store, question, now, k=100):
    """Raw turns by relevance: [(score, turn id)], best first, at most k.

    BM25, then what a memory knows beyond the words of a turn: what stands next to it (an answer seldom
    repeats the words of the question before it), how well its session fits, who spoke, and when.
    """
    if not store.turns:
        return []
    people = [i for i, s in enumerate(store.speakers) if is_named(s, question)]
    # Names are no search words: in a turn it is mostly the *other* speaker who says one.
    names = {w for i in people for w in words(store.speakers[i])}
    query = [w for w in words(DATE.sub(" ", question)) if w not in names]
    base = store.turn_index.scores(Counter(query or words(question)), b=0.5)
    # score = own + 0.5 turn before + 0.1 turn after (both in its session) + 0.2 best of the session,
    #         times 1.2 if the person asked about speaks, times 1.5 if told soon after the time asked about
    session, speaker, day = (np.array(store.columns[c]) for c in ("session", "speaker", "day"))
    scores, same = base.copy(), session[1:] == session[:-1]
    scores[1:] += 0.5 * base[:-1] * same
    scores[:-1] += 0.1 * base[1:] * same
    best = np.zeros(session.max() + 1)
    np.maximum.at(best, session, base)
    scores += 0.2 * best[session] * (scores > 0)
    if people:  # mild: questions also ask what somebody said *about* a person
        scores *= np.where(np.isin(speaker, people), 1.2, 1.0)
    if window := date_window(question, now):  # people tell things in the days after they happened
        first, last = (date.fromisoformat(d).toordinal() for d in window)
        scores *= np.where((day >= first) & (day <= last + 14), 1.5, 1.0)
    keys = store.turn_index.keys
    return [(float(scores[i]), keys[i]) for i in best_of(scores, k) if keys[i] not in store.hidden]


def best_of(scores, k):
    """Indices of the k best positive scores, best first, later ones first on a tie."""
    top = np.argpartition(-scores, k)[:k] if len(scores) > k else np.arange(len(scores))
    return sorted((int(i) for i in top if scores[i] > 0), key=lambda i: (-scores[i], -i))


def top_beliefs(store, question, k=200):
    """Beliefs by BM25 over their words, superseded ones included: any member brings its chain."""
    keys, scores = store.belief_index.keys, store.belief_index.scores(Counter(words(question)))
    return [store.beliefs[keys[i]] for i in best_of(scores, k)]


def is_named(subject, question):
    """Does the question name this person, by first name or kinship?"""
    name = subject.split("'s ")[-1]  # in a dialogue of two a sister is "Ann's sister"
    name = name.split()[0] if name[:1].isupper() else name
    return re.search(rf"\b{re.escape(name)}\b", question, re.I) is not None


def people_in(store, question):
    """Whom a question is about: people known here, else the first speaker; [] if it names a stranger."""
    others = dict.fromkeys(subject for subject, _ in store.members if subject not in store.speakers)
    named = [subject for subject in [*others, *store.speakers] if is_named(subject, question)]
    # "Where does Tom live?" must not be answered with where the user lives.
    return named or ([] if STRANGER.search(question) else store.speakers[:1])


def asked_about(question):
    """Single-valued attributes that a question is about."""
    favourites = [f"favorite {thing.lower()}" for thing in re.findall(r"\bfavou?rite (\w+)", question, re.I)]
    return [a for a, pattern in ASK.items() if re.search(pattern, question, re.I)] + favourites


def visible_schemas(store, now):
    """Schemas and cores as far as their support is alive *now*: `observe` never touches them."""
    def alive(schema):
        beliefs = [store.beliefs[i] for i in schema.evidence]
        return (schema.status == "stable" and len({b.slot for b in beliefs if holds(b)}) >= 2
                and all(b.status != "suppressed" for b in beliefs))

    def rank(node):  # decay is applied while reading: stored, it would depend on how often System2 runs
        seen = max(store.beliefs[i].t_seen for i in node.evidence)
        idle = max(0, (date.fromisoformat(now[:10]) - date.fromisoformat(seen[:10])).days)
        return -node.confidence * 2 ** (-idle / 180), node.id  # half-life: half a year without new evidence
    schemas = sorted((s for s in store.schemas.values() if alive(s)), key=rank)
    domain = {s.id: s.domain for s in schemas}
    cores = [c for c in store.cores.values()
             if c.status == "stable" and len({domain[m] for m in c.members if m in domain}) >= 2]
    return schemas, sorted(cores, key=rank)


def chain_line(store, slot):
    """A chain as one line, "Paris (2024-01-05) → Berlin (2025-03-01, current)"; no suppressed nodes.

    Where the present was to be forgotten, what is left is the past and is not called current.
    """
    chain, steps, entries = store.visible(slot), [], []
    for b in chain:
        text = b.text if b.link_kind == "refine" else b.value or "none"
        text = f"no longer {text}" if b.polarity < 1 and b.value else text
        mark = ", current" if b.status == "active" else ""
        steps.append(f"{text} ({b.t_event[:10]}{mark})")
        entries.append((b.t_event, text + mark))
    if not chain:
        return None
    if len(chain) == 1 and b.status == "active":
        return Line(b.id, "fact", f"{b.t_event[:10]} {b.text}", b.t_event)
    return Line(b.id, "fact", f"{slot[0]} {slot[1]}: {' → '.join(steps)}", b.t_event, entries)


def recall(store, question, now, budget=800, schemas=True, sweep=True, separate=False):
    """Question -> Recall within `budget` tokens. Every line carries the id to ask `why` about.

    `separate=True` gives schemas and cores a channel of their own, four lines on top of the budget, as in
    the authors' reader; else they take their share and displace facts.
    """
    wanted, size = {c: [] for c in (*SHARES, "fact", "newest")}, 0
    # 1. What to show: chains of the attribute asked about, then word hits, then the profile, then the newest.
    asked = asked_about(question)
    hits = [b.slot for b in top_beliefs(store, f"{question} {' '.join(asked)}")]
    people = people_in(store, question)
    first = [(p, a, None) for a in asked for p in people]
    profile = [(p, a, None) for a in sorted(SINGLE) for p in people]
    found = dict.fromkeys(s for s in (*first, *hits, *profile) if s in store.heads)
    newest = [b.slot for b in list(store.beliefs.values())[-50:][::-1]]  # so that something is always found
    for slot in dict.fromkeys([*found, *newest]):
        if line := chain_line(store, slot):
            if slot not in found:
                line.channel = "newest"
            elif store.head(slot).layer == "identity":
                line.channel = "identity"
            elif slot[2] is None and slot[1] not in asked:
                line.channel = "profile"
            wanted[line.channel].append(line)
            size += line.cost
            if size > 3 * budget:  # more could not fit, whatever the shares leave over
                break
    # 2. Schemas of the question's own domain come first; where it has none, cores speak for it.
    if schemas:
        stable, cores = visible_schemas(store, now)
        own = [s for s in stable if s.domain == domain_of(question)]
        nodes = own + (cores if sweep else []) + [s for s in stable if s not in own]
        wanted["schema"] = [Line(n.id, "schema", n.text, n.created) for n in nodes]
    # 3. What is coming up; `until` is compared with `now`, so a lapsed plan is never shown as one.
    for item in sorted(store.intentions.values(), key=lambda i: (i.until, i.id)):
        alive = any(holds(store.beliefs[b]) for b in item.evidence)
        if item.status == "open" and item.until >= now[:10] and alive:
            text = f"planned until {item.until}: {item.text}"
            wanted["intention"].append(Line(item.id, "intention", text, item.until))
    return assemble(store, wanted, question, now, budget, separate)


def assemble(store, wanted, question, now, budget, separate):
    """Fill the shares, whole lines only; what they leave goes to facts, raw turns, then the newest facts."""
    chosen, left = {}, budget

    def spend(lines, tokens):  # -> how many were used
        used = 0
        for line in lines:
            if line.id not in chosen and used + line.cost <= tokens:
                chosen[line.id] = line
                used += line.cost
        return used
    if separate:
        chosen.update((n.id, n) for n in wanted.pop("schema")[:SCHEMA_LINES])
    # Small fixed shares first, so that a hundred matching facts cannot push the profile or a plan out.
    for channel, share in SHARES.items():
        left -= spend(wanted.get(channel, []), int(budget * share))
    left -= spend(wanted["fact"], left)
    cited = {s[0] for i in chosen if i in store.beliefs for s in store.beliefs[i].sources}
    turns = [store.turns[i] for _, i in rank_turns(store, question, now, 50) if i not in cited]
    left -= spend([Line(t.id, "raw", f"{t.t[:10]} {t.speaker}: {t.text}", t.t) for t in turns], left)
    spend(wanted["newest"], left)

    def order(line):  # cores, schemas, profile and identity, then everything else by time
        kind = line.id.split("/")[-1][0]
        rank = 2 if line.channel in ("profile", "identity") else 3
        return {"c": 0, "s": 1}.get(kind, rank), line.t, line.id
    lines = sorted(chosen.values(), key=order)
    return Recall(lines, "\n".join(map(str, lines)), [n.id for n in lines])


def as_of(store, slot, t):
    """What held on day `t`: the last node whose event time is not after it. None: not known, or forgotten."""
    node = next((b for b in store.chain(slot)[::-1] if b.t_event[:10] <= t[:10]), None)
    return None if node is None or node.status == "suppressed" else node


def quote(store, source):
    """The words a belief rests on. Of a turn that must not be shown a part may be seen, never the whole."""
    turn, (_, start, end, _) = store.turns[source[0]], source
    if turn.id in store.hidden and (start, end) == (0, len(turn.text)):
        return "(not shown: it also says what was asked to be forgotten)"
    return turn.text[start:end]


def text_of(store, node):
    """The text of a record, unless it may give away what was asked to be forgotten since the last night."""
    forgotten = any(store.beliefs[i].status == "suppressed" for i in getattr(node, "evidence", ()))
    _, gloss, _ = POLES.get(getattr(node, "behaviour", ""), ("", "", ""))
    by_rule = gloss and node.text.endswith(f" {gloss}.")  # a fixed sentence: it repeats no single belief
    return WITHDRAWN if forgotten and not by_rule else node.text


# ------------------------------------------------------------------ the facade
class Memory:
    """One memory for many users, each with a store of their own.

    `backend` does the four jobs that need language: extract, induce, name_core, answer. RULES or an LLM.
    """

    def __init__(self, backend=None):
        self.stores, self.backend = {}, backend or RULES
        self.claims = Counter()  # True: claims that got a slot, False: kept as free facts

    def store(self, user="user"):
        return self.stores.setdefault(user, Store(user))

    def observe(self, text, t, session="s1", speaker="user", user="user"):
        """System1, in the write: keep the raw turn first, then extract, reconcile, apply. -> [(op, id)]."""
        if date.fromisoformat(t[:10]).isoformat() != t[:10]:  # dates are compared as strings
            raise DcpmError(f"{t!r} does not start with a date like 2024-05-01")
        text = text.encode(errors="replace").decode()  # half a character (a lone surrogate) cannot be saved
        store = self.store(user)
        turn = Turn(store.new_id("t"), session, speaker, text, t)
        store.commit("RAW", [turn.id], turn.id, turn=asdict(turn))
        claims, forget = self.backend.extract(store, turn)
        if claims is None:  # the model gave nothing usable: the turn is kept, the failure is on record
            store.commit("FAILED", [turn.id], turn.id, "no usable answer from the model")
        self.claims.update(c.attribute not in ("event", "maybe") for c in claims or ())
        ops = write_claims(store, turn, claims or ())
        return ops + [("SUPPRESS", i) for what in forget for i in self.forget(what, user, turn.id)]

    def forget(self, what, user="user", turn=""):
        """Suppress beliefs and hide turns that hold every content word of `what`; nothing is deleted."""
        store, need = self.store(user), set(words(what))
        if not need:
            return []
        ids = [b.id for b in store.beliefs.values() if b.status != "suppressed"
               and need <= set(words(f"{b.slot[0]} {b.value} {b.text}"))]
        hide = {t.id for t in store.turns.values() if need <= set(words(t.text))} | {turn} - {""}
        store.commit("SUPPRESS", ids, turn, "asked to forget", hide=sorted(hide))
        return ids

    def sleep(self, now, user="user"):
        """System2, all or nothing: first the whole plan, then one event; no change, no event."""
        store = self.store(user)
        plan = plan_sleep(store, now, self.backend)
        if any(plan.values()):
            ids = [n["id"] for nodes in plan.values() for n in nodes]
            store.commit("SLEEP", ids, reason=f"night of {now[:10]}", **plan)

    def recall(self, question, now, budget=800, user="user", **switches):
        return recall(self.store(user), question, now, budget, **switches)

    def answer(self, question, now, user="user"):
        """-> (text, ids that it rests on)."""
        return self.backend.answer(self.store(user), question, now)

    def trail(self, slot, user="user"):
        return self.store(user).chain(slot)

    def as_of(self, slot, t, user="user"):
        return as_of(self.store(user), slot, t)

    def why(self, id_, user="user"):
        """core -> schemas -> beliefs -> the verbatim span of the raw turn, as a nested dictionary."""
        store = self.store(user)
        kinds = (store.cores, store.schemas, store.intentions, store.beliefs, store.turns)
        node = next((kind[id_] for kind in kinds if id_ in kind), None)
        if node is None:
            raise DcpmError(f"there is no record {id_!r}; recall(...).ids lists the ids you can ask about")
        if id_ in store.hidden or getattr(node, "status", "") == "suppressed":
            return {"id": id_, "text": "(forgotten on request)", "because": []}
        if id_ in store.beliefs:
            said = [(store.turns[source[0]], quote(store, source)) for source in node.sources]
            below = [{"id": turn.id, "t": turn.t, "text": text, "because": []} for turn, text in said]
        else:
            below = [self.why(i, user) for i in getattr(node, "members", getattr(node, "evidence", []))]
        return {"id": id_, "text": text_of(store, node), "because": below}

    def check(self):
        """What is broken, as sentences; [] when all invariants of all users hold. Replays every log."""
        return [f"{user}: {problem}" for user, store in self.stores.items() for problem in check_store(store)]

    def save(self, path):
        """The audit logs as JSON, written beside the target and moved over it: a crash spoils nothing."""
        users = {user: store.log for user, store in self.stores.items()}
        text = json.dumps({"format": "dcpm-1", "users": users}, ensure_ascii=False, default=vars)
        part = Path(f"{path}.part")
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)

    @classmethod
    def load(cls, path, backend=None):
        memory = cls(backend)
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["format"] != "dcpm-1":
                raise ValueError("unknown format")
            for user, log in data["users"].items():
                memory.stores[user] = replay([Event(**e) for e in log], user)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise DcpmError(f"{path} is not a memory saved by dcpm.py ({error}); restore a copy") from error
        return memory

    def dump(self, user="user"):
        """The whole memory as text for people."""
        store = self.store(user)
        lines = [chain_line(store, slot) for slots in store.members.values() for slot in slots]
        out = [f"{len(store.turns)} turns, {len(store.beliefs)} beliefs", *(f"  {n}" for n in lines if n)]
        for node in [*store.schemas.values(), *store.cores.values(), *store.intentions.values()]:
            out.append(f"  [{node.id}] {text_of(store, node)} ({node.status})")
        return "\n".join(out)


def replay(log, user="user"):
    """Audit log -> store."""
    store = Store(user)
    for event in log:
        store.apply(event)
        store.log.append(event)
    return store


def snapshot(store):
    """Everything a store holds, its log included, as one comparable string."""
    kinds = (store.turns, store.beliefs, store.schemas, store.cores, store.intentions, store.log)
    rest = (sorted(store.hidden), list(store.heads.values()), list(store.members.values()), store.speakers)
    return json.dumps([kinds, rest], sort_keys=True, default=vars)


def check_store(store):
    """The invariants of one store; those about schemas hold after each sleep."""
    bad, b = [], store.beliefs

    def refuse(broken, sentence):
        bad.extend([sentence] if broken else [])
    for n in b.values():
        p, after = b.get(n.prev), b.get(n.next)
        refuse((p and p.next != n.id) or (after and after.prev != n.id) or n.id in (n.prev, n.next),
               f"links of {n.id} are not mutual")
        refuse(p and n.link_kind == "supersede" and same(p, n), f"{n.id} supersedes an equal claim")
        refuse(p and p.t_event > n.t_event, f"{n.id} is older than its predecessor")
        refuse((n.status == "active") != (n.next is None and n.status != "suppressed"),
               f"status of {n.id} is {n.status}")
        spans = [(store.turns.get(turn), start, end) for turn, start, end, _ in n.sources]
        refuse(not spans or any(t is None or not 0 <= start < end <= len(t.text) for t, start, end in spans),
               f"{n.id} has no source, or one outside its turn")
    heads = Counter(n.slot for n in b.values() if n.next is None)
    for slot, count in Counter(n.slot for n in b.values()).items():
        refuse(heads[slot] != 1 or len(store.chain(slot)) != count or store.head(slot).next,
               f"{slot}: {heads[slot]} heads, {len(store.chain(slot))} of {count} nodes in reach")
    if store.log and store.log[-1].op == "SLEEP":
        for node in [*store.schemas.values(), *store.cores.values(), *store.intentions.values()]:
            forgotten = any(b[i].status == "suppressed" for i in node.evidence)
            refuse(forgotten, f"{node.id} rests on something forgotten")
        for s in (s for s in store.schemas.values() if s.status == "stable"):
            sessions = {store.turns[src[0]].session for i in s.live for src in b[i].sources}
            refuse(len({b[i].slot for i in s.live if holds(b[i])}) < 3 or len(sessions) < 2,
                   f"schema {s.id} is stable on {len(s.live)} beliefs of {len(sessions)} sessions")
    for c in store.cores.values():
        members = [store.schemas[m] for m in c.members]
        refuse(c.status == "stable" and len({m.domain for m in members if m.status == "stable"}) < 2,
               f"core {c.id} does not rest on two domains")
        refuse(c.evidence != sorted({i for m in members for i in m.evidence}),
               f"evidence of core {c.id} is not the union of its members'")
    again = replay(store.log, store.user)
    refuse(snapshot(again) != snapshot(store), "replaying the log gives another store")
    return bad


# ================================================================== PART 2: LANGUAGE, BY RULES OR A MODEL
# ------------------------------------------------------------------ words, tokens, dates
STOP = frozenset("""
    a an the and or but if so of in on at to for from by with as is am are was were be been being do does
    did done has had will would can could should i me my mine myself you your we our us he him his she her
    it its they them their this that these those there here what which who whom when where why how not no
    yes too very just also still now again really quite lot then than about into out up down over all any
    some more most other own same s t re ve ll d m currently recently always usually often actually
    finally since because""".split())
MONTHS = {m: i for i, m in enumerate("jan feb mar apr may jun jul aug sep oct nov dec".split(), 1)}
WEEKDAYS = {d: i for i, d in enumerate("monday tuesday wednesday thursday friday saturday sunday".split())}
NUMBERS = {n: i for i, n in enumerate("zero one two three four five six seven eight nine ten".split())}
NUMBERS |= {"a": 1, "an": 1, "a few": 3, "a couple of": 2}
_MONTH = (r"(?:january|february|march|april|may|june|july|august|september|october|november|december"
          r"|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec)\b\.?")
DATE = re.compile(rf"""\b(?:(?P<iso>\d{{4}}-\d\d-\d\d)
    |(?P<d1>\d{{1,2}})(?:st|nd|rd|th)?\ (?:of\ )?(?P<m1>{_MONTH})(?:,?\ (?P<y1>\d{{4}}))?
    |(?P<m2>{_MONTH})\ (?P<d2>\d{{1,2}})(?:st|nd|rd|th)?\b(?:,?\ (?P<y2>\d{{4}}))?
    |(?:in\ |since\ |last\ )?(?P<m3>{_MONTH}),?\ (?P<y3>\d{{4}})
    |(?:in|since|last|next)\ (?P<m4>{_MONTH})|(?:back\ )?(?:in|since|of)\ (?P<y4>(?:19|20)\d\d)
    |(?P<day>today|tonight|tomorrow|yesterday)
    |(?P<ago>\d+|a\ few|a\ couple\ of|an?|one|two|three|four|five|six|seven|eight|nine|ten)
    \ (?P<unit>day|week|month|year)s?\ ago
    |(?P<rel>last|next|this)\ (?P<what>week|weekend|month|year|{'|'.join(WEEKDAYS)}))\b
    """, re.I | re.X | re.A)  # A: else a dotless i would pass for the i of "this", and be looked up in vain


@functools.lru_cache(maxsize=100_000)
def stem(word):
    """A crude suffix stripper: walks, walked, walking -> walk. Wrong at times, but for all texts alike."""
    for suffix in ("'s", "ings", "ing", "ies", "ied", "ed", "es", "ly", "s"):
        if word.endswith(suffix) and len(word) - len(suffix) >= 3 and not word.endswith("ss"):
            word = word[:-len(suffix)] + ("y" if suffix in ("ies", "ied") else "")
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] in "bdgmnprt":  # running -> runn -> run
        word = word[:-1]
    return word[:-1] if len(word) > 3 and word.endswith("e") else word


def words(text):
    """Stemmed content words of a text, in order."""
    found = re.findall(r"[a-z0-9]+(?:'s)?", text.lower().replace("’", "'"))
    return [stem(w) for w in found if w not in STOP]


def key(text):
    """Two values are the same iff their keys are equal: case, articles, endings do not count.

    Nor does a date, unless the value is nothing but a date (a birthday).
    """
    return " ".join(words(DATE.sub(" ", text)) or words(text))


def count_tokens(text):
    """The counter behind every budget: one per word, number or punctuation mark."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def digest(*parts):
    """Eight hex digits, the same on every machine (`hash()` of a string is not)."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()[:8]


def date_window(text, today):
    """First time expression of `text` -> (first day, last day) as ISO strings, or None.

    `today` is the date of the *conversation*: against the wall clock old dialogues silently rot.
    """
    match = DATE.search(text)
    if not match:
        return None
    g, now = match.groupdict(), date.fromisoformat(today[:10])
    form = next((n for n in "1234" if g.get("m" + n) or g.get("y" + n)), None)
    try:
        if g["iso"]:
            start = end = date.fromisoformat(g["iso"])
        elif form:
            month, day, year = (g.get(k + form) for k in "mdy")
            month, day = MONTHS[month[:3].lower()] if month else 1, day and int(day)
            nearest = min((now.year - 1, now.year, now.year + 1),  # no year said: the nearest such month
                          key=lambda y: abs((date(y, month, 15) - now).days))
            start = date(int(year or nearest), month, day or 1)
            following = start.replace(day=1) + timedelta(31)
            end = (start if day else following.replace(day=1) - timedelta(1) if g.get("m" + form)
                   else start.replace(month=12, day=31))
        elif g["day"]:
            start = end = now + timedelta({"yesterday": -1, "tomorrow": 1}.get(g["day"].lower(), 0))
        elif g["ago"]:
            n = NUMBERS.get(g["ago"].lower()) or int(g["ago"])
            days = {"day": 1, "week": 7, "month": 30, "year": 365}[g["unit"].lower()]
            start = end = now - timedelta(n * days)
        else:
            step = {"last": -1, "this": 0, "next": 1}[g["rel"].lower()]
            start, end = _relative(step, g["what"].lower(), now)
    except (ValueError, OverflowError):  # 31 June, a million years ago: not a date after all
        return None
    return start.isoformat(), end.isoformat()


def _relative(step, what, now):
    """last (-1), this (0), next (1) week, weekend, month, year or weekday -> first and last day."""
    monday = now - timedelta(now.weekday())
    if what == "year":
        return date(now.year + step, 1, 1), date(now.year + step, 12, 31)
    if what == "month":
        first = (now.replace(day=15) + timedelta(30 * step)).replace(day=1)
        return first, (first + timedelta(31)).replace(day=1) - timedelta(1)
    if what in WEEKDAYS:
        gap = (WEEKDAYS[what] - now.weekday()) % 7
        day = now + timedelta(gap if step == 0 else gap - 7 if step < 0 else gap or 7)
        return day, day
    monday += timedelta(7 * step)
    return monday + timedelta(5 if what == "weekend" else 0), monday + timedelta(6)


# ------------------------------------------------------------------ behaviour lexicon and domains
# Two entries are a pair of opposite poles: name | gloss | cues. Lexicon, domains and frames were fixed before
# the test bank was first run; their hash is logged with every held-out result.
LEXICON = """
plans | plans ahead and prepares in detail | checklist, list, schedule, itinerary, spreadsheet, in advance, \
weeks ahead, timetable, plan ahead, mapped out, draw up, drew up, prepare, outline, agenda, ahead of time, \
step by step
improvises | improvises and decides on the spot | on a whim, spontaneous, last minute, spur of the moment, \
improvise, made it up, without a plan, wing it, winged it, on the fly, see what happen, no idea beforehand, \
unplanned
saves | saves money and looks for the cheaper way | cheap, cheaper, discount, second hand, coupon, bargain, \
on sale, budget, for free, haggle, borrow, save money, thrifty
spends | spends freely and takes the best there is | splurge, expensive, luxury, premium, top of the range, \
first class, treat myself, pay extra, paid extra, priciest, regardless of price, deluxe
alone | likes to do things alone | alone, by myself, on my own, solo, solitude, in peace, quiet corner, \
nobody around, without company
together | likes to do things with other people | together, with friend, group, invite, crowd, company of, \
whole gang, team up, teamed up, everyone, joined by
careful | is careful and avoids risk | careful, double check, safe, insurance, backup, spare, \
read the warning, just in case, cautious, helmet, twice before
daring | is daring and takes risks | risk, dare, without looking, deep end, gamble, threw caution, bold, \
thrill, adrenaline, dangerous, reckless, edge
routine | sticks to what is familiar | same as always, usual, the same, routine, habit, as ever, familiar, \
every time, tradition, old favourite, as before
novelty | looks for what is new | never tried, new kind, first time, experiment, exotic, \
something different, novel, curious, unknown, unusual, untested
makes | makes things by hand | from scratch, by hand, built, homemade, handmade, sewed, carved, diy, \
made my own, workshop, knitted, glued
buys | buys things ready-made | ready made, bought, store, order online, ordered, delivery, off the shelf, \
from the shop, prepackaged, catalogue, hired
exact | is exact and measures | exact, measure, precise, to the gram, to the minute, ruler, scale, \
stopwatch, decimal, count every, calibrate
rough | goes by feel, roughly | roughly, by feel, eyeball, more or less, guess, approximate, give or take, \
ballpark, by eye, rule of thumb
paper | prefers paper | paper, notebook, printed, pencil, handwritten, ink, sticky note, index card, \
fountain pen
digital | prefers digital tools | app, spreadsheet app, tablet, online tool, cloud, software, \
phone reminder, digital"""
_rows = [line.split(" | ") for line in LEXICON.strip().split("\n")]
# name -> (its opposite, row i ^ 1; gloss; cues)
POLES = {name: (_rows[i ^ 1][0], gloss, cues) for i, (name, gloss, cues) in enumerate(_rows)}
DOMAINS = {
    "cooking": "cook dinner bake cake stew kitchen meal recipe lunch soup roast pasta",
    "travel": "trip flight journey travel hotel holiday vacation airport ferry",
    "work": "work report office meeting presentation client deadline project colleague conference",
    "garden": "garden flower bed seed tomato lawn hedge rose compost greenhouse",
    "sport": "run marathon gym race hike swim workout climb",
    "home": "flat apartment kitchenette shelf shelves wall furniture bedroom repair bathroom",
    "music": "guitar concert song piano choir record band gig melody",
    "study": "exam course class lecture essay thesis study homework seminar",
    "party": "birthday party wedding celebration anniversary picnic reunion",
    "gifts": "gift present gifts presents wrapping",
    "pets": "dog puppy cat kitten vet leash aquarium",  # the last two occur in the test bank only
    "photo": "photo camera portrait lens album darkroom"}
CUES = [(f" {' '.join(map(stem, cue.split()))} ", pole) for pole, (_, _, c) in POLES.items()
        for cue in c.split(", ")]
NOUNS = {stem(noun): domain for domain, nouns in DOMAINS.items() for noun in nouns.split()}


@functools.lru_cache(maxsize=100_000)
def poles_of(text):
    """Behaviour poles that a text shows, by lexicon."""
    padded = " " + " ".join(map(stem, re.findall(r"[a-z0-9]+", text.lower()))) + " "
    return tuple(sorted({pole for cue, pole in CUES if cue in padded}))


def opposite(behaviour):
    return POLES[behaviour][0] if behaviour in POLES else ""


def domain_of(text):
    """The domain that most of the text's nouns belong to; "" if none."""
    hits = Counter(NOUNS[w] for w in words(text) if w in NOUNS)
    return max(sorted(hits), key=hits.get) if hits else ""


# ------------------------------------------------------------------ rule extractor
SINGLE = {"residence", "employer", "occupation", "name", "age", "partner", "diet", "birthday"}  # + favourites
PROPER = {"residence", "employer", "partner", "name"}  # a capitalised name, if there is one, is the value
IDENTITY = {"diet", "likes", "habit", "opinion"}
RELATIVES = ("sister|brother|mother|mom|mum|father|dad|wife|husband|partner|girlfriend|boyfriend|son|"
             "daughter|friend|cousin|aunt|uncle|neighbour|neighbor|colleague|boss|roommate|grandmother|"
             "grandfather|best friend")
_BE, _HAVE = "(?:am|is|are|was)", "(?:have|has|had)"
FRAMES = [(a, p, re.compile(rf"^{pattern}[\s.!]*$", re.I)) for a, p, pattern in (
    # attribute, polarity, predicate after the subject; group v (or w) is the value
    ("residence", 1, r"(?:live[sd]?|living|reside[sd]?|stay|settled|based) (?:over )?in (?P<v>.+)"),
    ("residence", 1, rf"{_BE} (?:(?:back|living|settled|based|at home) )+in (?P<v>[A-Z].+)"),
    ("residence", 1, rf"(?:{_HAVE} )?(?:moved|moving|relocated|returned) (?:back |house )?to (?P<v>.+)"),
    ("residence", -1, r"moved (?:away from|out of) (?P<v>.+)"),
    ("employer", 1, rf"(?:{_BE} )?work(?:s|ed|ing)? (?:at|for) (?P<v>.+)"),
    ("employer", 1, r"(?:joined|started (?:working )?(?:at|for)|switched to|got a job at) (?P<v>.+)"),
    ("employer", 0, r"(?:ha(?:ve|s) (?:a|my|no) job|(?:quit|lost|left) (?:my|his|her|the) job.*|was fired)"),
    ("diet", 1, rf"(?:{_BE}|became|went|turned) (?:an? )?(?P<v>vegan|vegetarian|pescatarian|keto)"),
    ("occupation", 1, rf"(?:work(?:s|ing)? as|became|{_BE} training as) an? (?P<v>.+)"),
    ("occupation", 1, rf"{_BE} an? (?P<v>(?:\w+ )?(?:\w+(?:eer|ist|ician|ian|cher|tor|yer|ter|ner|ver|ger)"
                      r"|nurse|cook|chef))(?: (?:at|in|for) .+)?"),
    ("name", 1, rf"{_BE} called (?P<v>.+)"),
    ("age", 1, rf"(?:{_BE}|turned) (?P<v>\d{{1,3}})(?: years old)?"),
    ("partner", 1, rf"(?:{_BE} (?:dating|engaged to|married to)|married) (?P<v>.+)"),
    ("partner", 0, r"(?:got divorced|broke up|separated)(?P<v>).*"),
    ("condition", 1, rf"(?:{_HAVE}|suffer from|get|was diagnosed with) (?P<v>(?:\w+ )?(?:migraines?|asthma|"
                     r"diabetes|insomnia|arthritis|allerg\w+|anxiety|depression|eczema|adhd))\b.*"),
    ("possession", 1, rf"(?:{_HAVE}(?: got)?|owns?|bought|got|adopted) (?:an?|my own|two|three) (?P<v>.+)"),
    ("possession", -1, r"(?:sold|lost|gave away|got rid of|donated) (?:my|the|our|his|her) (?P<v>.+)"),
    ("hobby", 1, r"(?:play|plays|played|playing) (?P<v>.+)"),
    ("hobby", 1, r"(?:took up|take up|have taken up|picked up|started|got into|do|practi[sc]e|am learning) "
                 r"(?P<v>\w+ing\b.*|yoga|karate|chess|judo|pilates|ballet|pottery|the \w+|\w+ lessons)"),
    ("likes", 1, rf"(?:like|love|enjoy|adore|prefer)s? (?P<v>.+)"
                 rf"|{_BE} (?:fond of|into|a (?:big )?fan of) (?P<w>.+)"),
    ("likes", -1, rf"(?:dislike|hate|loathe|cannot stand)s? (?P<v>.+)|{_BE} (?:tired|sick) of (?P<w>.+)"),
    ("?", -1, rf"(?:{_HAVE} )?(?:given up|gave up|quit|stopped|dropped|went off) (?P<v>.+)"),
    ("?", 1, rf"(?:{_BE} \w+ing|{_BE} back (?:on|to|at|into)|resumed|took up|returned to|started) "
             r"(?P<v>.+?) again"),
    ("?", 1, rf"(?:{_BE} back (?:on|to|at|into)|resumed|went back to) (?P<v>.+)"),
    ("cancel", -1, r"(?:cancelled|canceled|called off|dropped the plan to) (?P<v>.+)"),
    ("habit", 1, r"(?:always|usually|often|never|regularly|tend to|every \w+) (?P<v>.+)"),
    ("opinion", 1, r"(?:think|believe|feel|find) (?:that )?(?P<v>.+)"),
)]
FUTURE = re.compile(rf"^(?:{_BE} going to|will|plan to|{_BE} planning to|need to|{_HAVE} to|{_BE}|{_HAVE}) "
                    r"(?P<v>.+)$", re.I)
NEGATOR = re.compile(rf"^(?:used to|(?:{_HAVE} )?never|(?:{_BE} )?no longer|(?:do|does) not|"
                     rf"(?:{_HAVE} )?stopped|not)\s+", re.I)
FIRST = re.compile(rf"^.{{0,40}}?\b(?:(?P<i>I|[Ww]e)|[Mm]y (?P<who>{RELATIVES})(?: [A-Z][a-z]+)?)\s+"
                   r"(?P<rest>.+)$", re.S)
NAMED = re.compile(r"^(?!(?:He|She|They|It|You|This|That|There|The|Some\w+|Every\w+|No\w+|Who) )"
                   r"(?P<who>[A-Z][a-z]+) (?P<rest>(?:lives|moved|works|joined|got|has) .+)$", re.S)
STRANGER = re.compile(rf"\b[Mm]y ({RELATIVES})\b|\b(?i:do|does|did|is|was|has|will) ((?!I\b)[A-Z]\w*)"
                      r"|\b(?i:do|does|did|has) (he|she|they|my \w+)\b")
MY = re.compile(r"^(?:.{0,20}\b)?[Mm]y (?P<a>name|age|birthday|favou?rite [\w ]+?) is (?!not )(?P<v>.+)$",
                re.S)
# Before "I": a question without its mark, what others say, another time. After it: a past without a date.
ASIDE = re.compile(r"\b(?:said|says?|thinks?|thought|told|whether|true that|when|while|before|until|dream)\b"
                   r"|\b(?:do|did|am|have|can|could|should|shall|will|may) I $", re.I)
LONG_AGO = re.compile(r"(?:lived|worked|was (?!diagnosed|fired|called)|"
                      r".* (?:until|when I was|as a (?:child|kid)))\b")
HEDGE = re.compile(r"\b(maybe|might|perhaps|possibly|thinking (?:of|about)|considering|not sure)\b", re.I)
HYPOTHESIS = re.compile(r"\b(if|would|wish|imagine|suppose|unless|as if|hope)\b", re.I)
CLAUSE_ENDS = re.compile(r"(;|, but |\bbut (?=I\b|my\b)|,? and (?=I\b|my\b)|, then (?=I\b))")
QUALIFIER = re.compile(r"\b(?:especially|only|mostly|mainly|particularly|on weekends)\b", re.I)
# Only as a request: "I will never forget Paris", "don't forget the milk" and "I forget names" are none.
FORGET = re.compile(r"^(?:(?:and|so|ok(?:ay)?|well|oh|now|just|please|kindly|let's|"
                    r"(?:can|could|will|would) you|you (?:can|may|should|must)|"
                    r"I(?:'d| would)? (?:want|like) you to)[, ]+)*"
                    r"(?:forget|delete|erase|(?:do not|don't) remember)\b "
                    r"(?:(?:everything|all|what|whatever|that|the fact that|about|I|ever|have|said|told you|"
                    r"mentioned) )*"
                    r"(?!it\b)(.+?)(?:,? (?:please|now|from your memory|thanks))*$", re.I)
ADVERB = re.compile(r"^(?:(?:still|now|also|just|really|currently|recently|actually|finally|even|totally|"
                    r"ha(?:ve|s) been(?= \w+ing)) )+", re.I)
SHORT = [(r"\bI'm\b", "I am"), (r"\b(I|[Ww]e)'ve\b", r"\1 have"), (r"\b(I|[Ww]e)'ll\b", r"\1 will"),
         (r"\b(I|[Ww]e)'d\b", r"\1 would"), (r"\b([Ww])e're\b", r"\1e are"),
         (r"n't\b", " not"), (r"\bca not\b", "cannot"), (r"\b(she|he|it|that)'s\b", r"\1 is")]


def clauses(text):
    """(start, end, clause, is_question) of every clause; quoted speech is blanked out."""
    text = re.sub(r'"[^"]*"|“[^”]*”', lambda m: " " * len(m.group()), text)
    for sentence in re.finditer(r"(?:\b(?:St|Mrs?|Ms|Dr|Prof)[.]|[.](?=\w)|[^.!?\n])+[.!?]*", text):
        question, start = "?" in sentence.group()[-3:], sentence.start()
        for piece in CLAUSE_ENDS.split(sentence.group()):
            body, lead = piece.strip(" .,;!"), len(piece) - len(piece.lstrip(" .,;!"))
            if words(body):
                yield start + lead, start + lead + len(body), body, question
            start += len(piece)


def tidy(value, attribute):
    """Cut what is not the value: dates, reasons, qualifiers, articles."""
    if attribute in PROPER and (name := re.search(r"\b[A-Z][\w'&-]*(?: (?!I\b)[A-Z][\w'&-]*)*", value)):
        return name.group()
    parts = [p for p in DATE.sub("|", value).split("|") if p.strip()] or [""]
    value = re.split(rf",| because | since | so that |{QUALIFIER.pattern}", parts[0])[0].strip(" .!,")
    value = re.sub(r"\b(?:anymore|any more|again|too|as well|now|these days|a lot|very much|on|in)$", "",
                   value)
    return re.sub(r"^(?:the|an?|my|some|to|now) ", "", value.strip(), flags=re.I)[:80]


def extract_rules(turn):
    """Turn -> (claims, phrases to forget). An assistant claims nothing: a suggestion is no preference."""
    claims, forget = [], []
    # The order matters: a request to forget is no claim, and a question asserts nothing.
    for start, end, body, question in clauses(turn.text) if turn.speaker != "assistant" else ():
        found = FORGET.match(body.replace("’", "'"))
        if found and (not question or re.match(r"(?:can|could|will|would|please)", body, re.I)):
            forget.append(found.group(1))
        elif not question:
            body = body.replace("’", "'")
            for pattern, full in SHORT:
                body = re.sub(pattern, full, body)
            if claim := read_clause(body, turn.speaker, turn.t):
                claim.span, claim.text = (start, end), turn.text[start:end]
                claims.append(claim)
    return claims, forget


def read_clause(body, me, t):
    """One clause -> Claim, or None (no subject that we know, or only a hypothesis)."""
    window = date_window(body, t)
    since = window[0] if window and window[1] < t[:10] else t  # only a date in the past moves the event
    if mine := MY.match(body):
        attribute = mine["a"].replace("favourite", "favorite")
        value = mine["v"] if attribute == "birthday" else tidy(mine["v"], attribute)
        if attribute == "birthday" and window and not re.search(r"\d", value):  # "tomorrow" goes stale
            value = " to ".join(dict.fromkeys(window))
        return Claim(attribute, value, subject=me, t_event=t)
    match = FIRST.match(body) or NAMED.match(body)
    if not match:
        return None
    subject = me if match.groupdict().get("i") else match["who"]
    if subject != me and subject[0].islower() and me != "user":
        subject = f"{me}'s {subject}"  # in a dialogue of two, each has a sister
    told = dict(subject=subject, t_event=since, reliability=0.9 if subject == me else 0.4)
    if HEDGE.search(body):  # an attribute of its own: never touches a chain
        return Claim("maybe", body, **{**told, "reliability": min(0.6, told["reliability"])})
    if HYPOTHESIS.search(body):
        return None
    rest, sign = ADVERB.sub("", match["rest"].strip()), 1
    if ASIDE.search(body[:match.start("rest")]) or not window and LONG_AGO.match(rest):
        return Claim("event", body, **told)
    future = FUTURE.match(rest) if not re.match(r"(?:was|were|had)\b", rest) else None
    ahead = window and window[1] >= t[:10] and (window[0] > t[:10] or re.match(r"will|\w+ going to", rest))
    if future and ahead and (denied := re.match(r"not (.+)", future["v"])):
        return Claim("cancel", tidy(denied[1], "plan"), polarity=-1, **told)
    if future and ahead:
        return Claim("plan", tidy(future["v"], "plan"), until=window[1], **told)
    if negator := NEGATOR.match(rest):
        rest, sign = ADVERB.sub("", rest[negator.end():]), -1
    # The date has been read; left inside it would hide the frame ("became a vegetarian in 2021").
    undated = " ".join(DATE.sub(" ", rest).split())
    for attribute, polarity, pattern in FRAMES:
        if hit := pattern.match(undated):
            value = tidy(next((v for v in hit.groupdict().values() if v), ""), attribute)
            if polarity == 0:
                if sign == 1 and re.match(r"ha(?:ve|s) (?:a|my) job", undated):
                    break
                value = ""
            elif not key(value) or (attribute in PROPER - {"partner"} and not value[0].isupper()):
                continue  # "I joined a gym" is no job
            layer = "identity" if attribute in IDENTITY else "fact"
            return Claim(attribute, value, polarity=polarity * sign, layer=layer,
                         detail=bool(QUALIFIER.search(rest)), **told)
    # No frame fits: a free fact keeps the whole clause, so that nothing is lost; denied, it may end a habit.
    return Claim("event" if sign > 0 else "habit", rest, polarity=sign, **told)


# ------------------------------------------------------------------ rule answers, and the backend as a whole
PAST = re.compile(r"\b(before|previous\w*|used to|former\w*|earlier|originally|did I (?:live|work))\b", re.I)
CHANGE = re.compile(r"\bhow (?:did|has|have)\b.*\b(?:chang|evolv|develop)|\bhistory of\b|\bover time\b", re.I)
COMING = re.compile(r"\b(coming up|upcoming|my plans|planned|next (?:week|month)|ahead of me)\b", re.I)


def answer_rules(store, question, now):
    """An answer from the chains, or the best line of context, or "I don't know". -> (text, ids)."""
    lines = recall(store, question, now).lines
    if COMING.search(question):
        items = [n for n in lines if n.channel == "intention"]
        return "; ".join(n.text for n in items) or "Nothing that I know of.", [n.id for n in items]
    q, people = set(words(question)), people_in(store, question)
    slots = [(p, a, None) for p in people for a in asked_about(question)]
    slots += [b.slot for b in top_beliefs(store, question, 20) if set(words(b.value)) & q
              and b.slot[0] in people and b.slot[2] and b.slot[1] not in ("event", "maybe", "plan")]
    for slot in slots:
        if chain := store.visible(slot):
            return answer_from_chain(store, slot, chain, question, now)
    if not people:  # a stranger: at most a line that names them
        name = "".join(filter(None, STRANGER.search(question).groups()))
        lines = [n for n in lines if is_named(name, n.text)]
    best = max(lines, key=lambda n: len(q & set(words(n.text))), default=None)
    return (best.text, [best.id]) if best and q & set(words(best.text)) else ("I don't know.", [])


def answer_from_chain(store, slot, chain, question, now):
    head, window = chain[-1], date_window(question, now)
    if CHANGE.search(question):
        return chain_line(store, slot).text, [b.id for b in chain]
    if re.match(r"why\b", question, re.I):
        return f"{head.reason or 'no reason given'} — “{quote(store, head.sources[0])}”", [head.id]
    if window and window[1] < now[:10] and "before" not in question:
        node = as_of(store, slot, window[1])
        return (spoken(node), [node.id]) if node else ("I don't know.", [])
    named = [b for b in chain if b.value and set(words(b.value)) <= set(words(question))]
    if re.match(r"(did|have|has)\b", question, re.I) and slot[2] is None and named:
        return f"Yes, since {named[-1].t_event[:10]}.", [named[-1].id]
    # Walk one link back; a refinement is no earlier state, nor is having had none.
    if PAST.search(question) and not re.match(r"(did|when)\b", question, re.I):
        known = [b for b in chain if b.link_kind != "refine" and (b.value or b is head)]
        named = [i for i, b in enumerate(known) if b.value and key(b.value) in key(question)]
        at = named[0] if named else len(known) - 1
        return (known[at - 1].value, [known[at - 1].id]) if at > 0 else ("Nothing before that.", [])
    if head.status != "active":  # what came after it was to be forgotten
        return "I don't know.", []
    if re.match(r"(do|does|am|is|have|has)\b", question, re.I):
        if asks_just_that(chain, question):
            return ("Yes" if head.polarity == 1 else "No") + f", since {head.t_event[:10]}.", [head.id]
        return (head.text if slot[2] else spoken(head)), [head.id]
    return (head.text if slot[2] and head.polarity < 1 else spoken(head)), [head.id]


def asks_just_that(chain, question):
    """May it be answered by yes or no: does it ask for the head's whole value, and for nothing else?"""
    head, asked = chain[-1], set(words(question))
    if not set(words(head.value)) <= asked:  # "Do I live in Rome?" to somebody in Paris
        return False
    if head.slot[1] == "likes" and not re.search(r"\b(like|love|enjoy|prefer|fond)", question, re.I):
        return False
    told = {w for b in chain for w in words(f"have {b.slot[1]} {b.text}")}
    return head.slot[2] is None or asked <= told


def spoken(belief):
    if belief.polarity == 1:
        return belief.value
    return f"No longer {belief.value}." if belief.value else "Nothing."


RULES = SimpleNamespace(extract=lambda store, turn: extract_rules(turn), induce=induce_rules,
                        name_core=name_core_rules, answer=answer_rules)


# ------------------------------------------------------------------ LLM backend: the same jobs, a chat model
STRICT = "You maintain the memory of an assistant. Reply with one JSON object and nothing else."
EXTRACT = """Conversation date: {t}. Earlier messages, for reference only:
{before}

New message by {speaker}:
<message>
{text}
</message>

List what the new message itself claims about {speaker} or the people around them. Not a claim: questions,
quotations, hypotheses. Resolve relative dates against the conversation date. Spell out implied attitudes.
{{"claims": [{{"subject": "{speaker}" or e.g. "sister", "attribute": one of {attributes},
"value": short value, "text": one self-contained sentence, "polarity": 1 holds, -1 no longer or dislikes,
0 taken back, "layer": "fact" or "identity", "when": since "YYYY-MM-DD", "until": "YYYY-MM-DD" of a plan,
"quote": the exact words}}], "forget": [what the message asks to forget]}}"""
RECONCILE = """Known chains, newest version last:
{chains}

New items:
{items}

For each item about the same thing as a known one give {{"item": number, "op": "CONFIRM" (nothing new),
"REFINE" (more detail, compatible) or "SUPERSEDE" (both cannot be true now), "id": the known id}}.
Leave out all others. Two likes can coexist. {{"operations": [...]}}"""
INDUCE = """Facts about one person, each with its id:
{facts}

Known regularities of this person:
{schemas}

Name behavioural regularities inside one area of life that at least three facts from different days support;
none is a good answer. Prefer to extend a known one: repeat its "domain" and "behaviour" word for word.
"behaviour" names the style or motive in two to four words, without any noun of the area.
{{"schemas": [{{"domain": "...", "behaviour": "...", "text": "circumstance, habit and motive in one sentence",
"evidence": [ids]}}]}}"""
CORE = """These habits of one person come from different areas of life:
{schemas}

Is there one sentence that explains why they go together?
{{"behaviour": two to four words or null, "text": the sentence or null}}"""
ANSWER = """What is known about the user:
{context}

Question: {question}
Answer briefly from what is known; if it is not known, say that there is no information."""
ATTRIBUTES = sorted({*SINGLE, *IDENTITY, "hobby", "possession", "condition", "plan", "event"})


class LLM:
    """A chat model as extractor, reconciler, inducer, answerer. `chat`: conversations -> texts or None.

    It proposes; the decision table and the store dispose: it chooses among ids it was shown and sets no link.
    """

    def __init__(self, chat, name="", tries=3):
        self.chat, self.name, self.tries = chat, name, tries
        self.cache, self.calls, self.failures = {}, 0, Counter()

    @classmethod
    def load(cls, model, model_name="", max_new_tokens=512):
        import common  # only here: the rule backend needs neither torch nor transformers
        chat = common.chat_backend(model, model_name, max_new_tokens, 0.0)
        return cls(chat, f"{model} {model_name} {max_new_tokens}")

    def ask(self, kind, prompt, check):
        """-> check(JSON object), or None after `tries` unusable answers. Cached, so that nights repeat."""
        address = hashlib.sha256(f"{self.name}\0{prompt}".encode()).hexdigest()
        if address not in self.cache:
            talk, value = [{"role": "system", "content": STRICT}, {"role": "user", "content": prompt}], None
            for _ in range(self.tries):
                self.calls += 1
                text = self.chat([talk])[0] or ""
                try:
                    value = json.loads(re.search(r"\{.*\}", text, re.S).group())
                    check(value)
                    break
                except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
                        RecursionError) as error:
                    # Decoding is greedy: the same prompt would fail the same way, so the reason goes with it.
                    value, note = None, f"Not usable ({type(error).__name__}: {error}). One JSON object."
                    talk = talk[:2] + [{"role": "assistant", "content": text[:2000]},
                                       {"role": "user", "content": note}]
            self.failures[kind] += value is None
            if value is None and not text:  # silence may pass, a bad answer would come again
                return None
            self.cache[address] = value
        value = self.cache[address]
        return None if value is None else check(value)

    def extract(self, store, turn):
        """-> (claims, what to forget), or (None, []) when the model gave nothing usable."""
        if turn.speaker == "assistant":
            return [], []

        def check(data):
            claims = [self.read_claim(c, turn) for c in data["claims"]]
            forget = data.get("forget") or []
            forget = [forget] if isinstance(forget, str) else forget
            if not isinstance(forget, list) or not all(isinstance(f, str) for f in forget):
                raise ValueError('"forget" must be a list of strings')
            return claims, [f for f in forget if set(words(f)) - set(words(f"user {turn.speaker}"))]
        before = [f"{t.speaker}: {t.text[:300]}" for t in list(store.turns.values())[-21:-1]
                  if t.id not in store.hidden]
        prompt = EXTRACT.format(t=turn.t, before="\n".join(before) or "(none)", speaker=turn.speaker,
                                text=turn.text, attributes=ATTRIBUTES)
        # Without a usable answer the claims are lost, but a request to forget must not be: the rules read it.
        claims, forget = self.ask("extract", prompt, check) or (None, extract_rules(turn)[1])
        return self.reconcile(store, claims) if claims else claims, forget

    def read_claim(self, c, turn):
        """One claim of the model's JSON, checked; without a verbatim quote the whole turn is the span."""
        if not all(isinstance(c[k], (str, int, float)) for k in ("value", "text")):
            raise ValueError("value and text must be strings")
        value, text = (str(c[k]).encode(errors="replace").decode() for k in ("value", "text"))
        value, polarity, quote = value[:200], c.get("polarity", 1), str(c.get("quote") or "").strip()
        subject = str(c.get("subject") or turn.speaker)
        if re.fullmatch(rf"(?:the )?user|I|me|{re.escape(turn.speaker)}", subject, re.I):
            subject = turn.speaker
        elif subject[0].islower() and turn.speaker != "user":
            subject = f"{turn.speaker}'s {subject}"  # in a dialogue of two, each has a sister
        if polarity not in (1, 0, -1) or (not key(value) and polarity != 0) or not turn.text:
            raise ValueError("each claim needs a value, and a polarity of 1, 0 or -1")
        at = turn.text.find(quote) if quote else -1
        # What is no date counts as not said.
        when, until = (str(c.get(k) or "")[:10] for k in ("when", "until"))
        when, until = (day if date_window(day, turn.t) == (day, day) else "" for day in (when, until))
        span = (at, at + len(quote)) if at >= 0 else (0, len(turn.text))
        return Claim(c["attribute"] if c["attribute"] in ATTRIBUTES else "event", value, text[:500], span,
                     subject, int(polarity), "identity" if c.get("layer") == "identity" else "fact",
                     when if "" < when < turn.t[:10] else turn.t,
                     0.9 if subject == turn.speaker else 0.4, until)

    def reconcile(self, store, claims):
        """Match claims to the chains they belong to. Ids outside the candidates are refused."""
        near = dict.fromkeys(b.slot for c in claims for b in top_beliefs(store, f"{c.value} {c.text}", 20)
                             if store.head(b.slot).status != "suppressed")
        shown = {store.heads[slot]: store.visible(slot) for slot in list(near)[:20]}
        if not shown:
            return claims  # nothing to compare with: all are new

        def check(data):
            for o in data["operations"]:
                fine = o["id"] in shown and o["op"] in ("CONFIRM", "REFINE", "SUPERSEDE")
                if not fine or int(o["item"]) not in range(len(claims)):
                    raise ValueError(f"{o} names an id, an item or an op that was not offered")
            ops = {o["id"]: o for o in data["operations"][::-1]}  # one operation a node: the first
            return {int(o["item"]): (o["op"], id_) for id_, o in ops.items()}
        chains = [f"[{i}] " + " -> ".join(f"{b.text} ({b.t_event[:10]})" for b in chain)
                  for i, chain in shown.items()]
        items = [f"{i}. {c.text}" for i, c in enumerate(claims)]
        prompt = RECONCILE.format(chains="\n".join(chains), items="\n".join(items))
        for item, (op, id_) in (self.ask("reconcile", prompt, check) or {}).items():
            claim, head = claims[item], store.beliefs[id_]
            if claim.subject == head.slot[0]:
                claim.slot = head.slot
                if op != "SUPERSEDE":
                    claim.value, claim.polarity, claim.detail = head.value, head.polarity, op == "REFINE"
                    claim.until = claim.until or head.until
        return claims

    def induce(self, store, pool):
        """Beliefs that no schema cites yet, clustered by their words, to the model; as induce_rules."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        # A schema that rests on something forgotten falls tonight, and frees what else it rests on.
        standing = [s for s in store.schemas.values() if text_of(store, s) != WITHDRAWN]
        cited, found = {i for s in standing for i in s.evidence}, []
        for subject in store.speakers:
            mine = [b for b in pool if b.slot[0] == subject and b.id not in cited][-400:]
            known = [s for s in standing if s.subject == subject]
            known = "\n".join(f"{s.domain} / {s.behaviour}: {s.text}" for s in known) or "(none)"
            if len(mine) < 3:
                continue
            vectors = TfidfVectorizer(analyzer=words).fit_transform([b.text for b in mine]).toarray()
            labels = two_stage_dbscan(vectors)
            groups = [[b for b, x in zip(mine, labels) if x == label] for label in sorted(set(labels))]
            if labels.min() < 0:  # facts in no cluster are handed over too, in portions
                groups[:1] = [groups[0][i:i + 30] for i in range(0, len(groups[0]), 30)]
            for group in groups:
                shown = {b.id for b in group}

                def check(data):
                    for s in data["schemas"]:
                        filled = words(s["behaviour"]) and s["domain"] and s["text"]
                        if not filled or not set(s["evidence"]) <= shown:
                            raise ValueError("evidence must be ids from the list; no field may be empty")
                    return data["schemas"]
                facts = "\n".join(f"[{b.id}] {b.t_event[:10]} {b.text}" for b in group)
                prompt = INDUCE.format(facts=facts, schemas=known)
                for s in self.ask("induce", prompt, check) or []:
                    label = sorted(set(words(s["behaviour"])))
                    vector, text = {w: round(1 / len(label), 4) for w in label}, str(s["text"])[:300]
                    names = str(s["domain"]).lower(), str(s["behaviour"]).lower()
                    found.append((subject, *names, text, vector, s["evidence"]))
        return found

    def name_core(self, members):
        def check(data):
            both = data["behaviour"], data["text"]
            return (str(both[0]).lower(), str(both[1])[:300]) if all(both) else ()
        lines = "\n".join(f"{m.domain}: {m.text}" for m in members)
        return self.ask("core", CORE.format(schemas=lines), check)

    def answer(self, store, question, now):
        """-> (text, ids of the context)."""
        self.calls += 1
        context = recall(store, question, now)
        prompt = ANSWER.format(context=context.text or "(nothing)", question=question)
        reply = self.chat([[{"role": "user", "content": prompt}]])[0]
        self.failures["answer"] += not reply  # not "no information": that would score as a right abstention
        return reply or "(no answer)", context.ids


# ================================================================== PART 3: EXPERIMENTS
# ------------------------------------------------------------------ the miniature benchmark
# No phrase names its pole. Per pole: three phrases for the history, then one for answer options only.
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
DEVELOPMENT = """
plans|wrote a checklist for {}|drew up a schedule for {}|prepared {} weeks ahead|\
settle every detail of {} in advance
improvises|decided on {} on a whim|went into {} without a plan|left {} to the last minute|\
just see what happens with {}
saves|used a coupon for {}|hunted for a discount on {}|got the things for {} second hand|\
find a cheaper way to do {}
spends|splurged on {}|chose the premium version of {}|paid extra for {}|go for luxury with {}
alone|did {} by myself|enjoyed {} in solitude|kept {} solo|handle {} on my own
together|invited half the street to {}|did {} with friends|turned {} into a group thing|do {} as a whole gang
careful|double checked {}|took out insurance for {}|packed a spare for {}|keep a backup for {}
daring|took a big risk with {}|gambled on {}|jumped in at the deep end with {}|look for the thrill in {}
routine|did {} the same as always|kept to the familiar version of {}|took my old favourite for {}|\
stick to tradition with {}
novelty|tried something different for {}|ran an experiment with {}|picked an exotic variant of {}|\
go for an unusual kind of {}
makes|made all of {} from scratch|built what {} needed|used homemade things for {}|do {} by hand
buys|ordered everything for {}|took ready made things for {}|had {} sorted by delivery|get {} off the shelf
exact|measured everything for {}|timed {} with a stopwatch|was precise about {}|get {} right to the minute
rough|went by feel with {}|eyeballed {}|made a rough guess at {}|do {} give or take"""
VALIDATION = """
plans|thought {} through a month before|made an outline of {}|had a spreadsheet for {}|\
lay out {} point by point
improvises|made {} up as I went|took {} as it came|had no idea beforehand about {}|be spontaneous about {}
saves|waited until {} was on sale|haggled over {}|kept the budget of {} tiny|spend as little as possible on {}
spends|went first class with {}|ignored the price tag of {}|treated myself to the finest for {}|\
get a deluxe take on {}
alone|kept {} to myself|wanted nobody around for {}|had {} in peace|have {} without company
together|shared {} with the neighbours|teamed up for {}|filled the place with people for {}|\
let everyone join {}
careful|read the warnings before {}|took no chances with {}|wore a helmet for {}|go for the safe side of {}
daring|threw caution to the wind for {}|said yes to {} without looking|pushed {} to the edge|be bold about {}
routine|repeated last year's version of {}|did {} as before|followed my habit with {}|do {} as ever
novelty|tested a novel idea for {}|gave {} a twist nobody had seen|chose an unknown variant of {}|\
be curious about {}
makes|sewed and glued things for {}|carved a piece for {}|put my own kit for {} into shape|\
have a handmade touch in {}
buys|hired somebody for {}|picked things for {} from a catalogue|got {} prepackaged|leave {} to a store
exact|counted every item of {}|used a ruler for {}|did the sums for {} to two decimals|calibrate {}
rough|went with a ballpark for {}|did {} by eye|let {} come out somewhere near|do {} approximately"""
BANKS = {
    "development": {
        "phrases": dict(line.split("|", 1) for line in DEVELOPMENT.strip().split("\n")),
        "move": "I moved to {}.|I live in {} now.|We unpacked; I'm living in {}.",
        "late": "Back in {} I lived in {}.", "other": "My sister moved to {}.",
        "job": "I work at {}.|I started working at {}.|I switched to {}.",
        "span": "I named the {} {} {}.", "ask": "What did I name the {}?"},
    "validation": {
        "phrases": dict(line.split("|", 1) for line in VALIDATION.strip().split("\n")),
        "move": "I relocated to {}.|These days I'm settled in {}.|I returned to {}.",
        "late": "In {} I was living in {}.", "other": "My sister is based in {}.",
        "job": "I work for {}.|I joined {}.|I got a job at {}.",
        "span": "The {} {} got a name from me: {}.", "ask": "How is the {} called?"}}
CITIES = "Paris Berlin Rome Lima Oslo Quito Cairo Delhi Tokyo Lagos Perth Turin".split()
FIRMS = "Acme Initech Globex Umbrella Hooli Stark Wayne Tyrell".split()
NAMES = "Vega Juno Orla Milo Pip Zora Nemo Tilda Bruno Kiki Otto Wanda Fips Gus Luma Rollo".split()
# Half of the span questions ask by paraphrase: easy ones would prove nothing.
THINGS = {"bike": "thing I pedal", "boat": "thing I row", "kite": "thing I fly", "cactus": "thing I water",
          "lamp": "thing that glows", "robot": "thing that beeps"}
FILLER = ("watched|heard of|thought about|passed by|talked about|dreamt of|saw|forgot".split("|"),
          "an old film|a storm|the tram|a stranger|a bridge|the moon|a lost key|the river".split("|"))
KINDS = ("span", "current", "past", "how changed", "implicit seen", "implicit unseen")
OTHER_PEOPLE = re.compile(rf"\b({RELATIVES})\b")


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


def choose(question, lines, options):
    """The one answerer, for every kind of question and every condition: lines -> a score per option.

    It may use the behaviour lexicon on any line, so that raw turns are not handicapped by a weaker reader.
    """
    lines = [n for n in lines if not OTHER_PEOPLE.search(n.text)]  # the questions are all about the user
    entries = sorted((t[:10], text) for n in lines for t, text in n.entries if "no longer" not in text)

    def dates(name, found):
        return [t for t, text in found if re.search(rf"\b{re.escape(name)}\b", text)]
    limit = re.search(r"\bbefore (\w+)", question)
    if CHANGE.search(question) or limit:  # a line that tells the whole story outranks single mentions
        needed = [limit.group(1)] if limit else options[0].split(" → ")
        stories = [n.entries for n in lines if "→" in n.text and all(w in n.text for w in needed)]
        told = stories[0] if stories else entries
        names = {*needed, *(name for option in options for name in option.split(" → "))}
        first = {name: (dates(name, told) or [""])[0][:10] for name in names}
        if limit:
            end = first[needed[0]] or "9999"
            return [date.fromisoformat(first[o]).toordinal() if "" < first[o] < end else 0 for o in options]
        steps = [[first[name] for name in option.split(" → ")] for option in options]
        return [sum(float(a < b) if a and b else 0.5 for a, b in zip(s, s[1:])) for s in steps]
    if any(re.search(ASK[a], question) for a in ("residence", "employer")):
        current = [entry for entry in entries if "current" in entry[1]] or entries
        return [date.fromisoformat(d[-1]).toordinal() if (d := dates(o, current)) else 0 for o in options]
    asked, common, scores = set(words(question)), set.intersection(*(set(words(o)) for o in options)), []
    weights = [1 + len(asked & set(words(n.text))) for n in lines]
    for option in options:
        own, shown, score = set(words(option)) - common, poles_of(option), 0
        same = [w * len(own & set(words(n.text))) / max(len(own), 1) for n, w in zip(lines, weights)]
        for n, w in zip(lines, weights):
            there = poles_of(n.text)
            score += w * (any(p in there for p in shown) - any(opposite(p) in there for p in shown))
        scores.append(max(same, default=0) + score)
    return scores


def credit(scores, right):
    """1 for the right choice, shared equally on a tie: without evidence exactly chance."""
    best = [i for i, s in enumerate(scores) if math.isclose(s, max(scores), abs_tol=1e-9)]
    return (right in best) / len(best)


def placebo(store, rng):
    """The same schemas and cores about behaviours drawn at random: as many, without information."""
    fake = copy.copy(store)
    fake.schemas, fake.cores = copy.deepcopy((store.schemas, store.cores))
    for node in [*fake.schemas.values(), *fake.cores.values()]:
        node.text = node.text.replace(POLES[node.behaviour][1], POLES[rng.choice(sorted(POLES))][1])
    return fake


CONDITIONS = {  # switches of recall
    "raw TF-IDF": None, "System1": dict(schemas=False),
    "System1+2, no sweep": dict(separate=True, sweep=False), "System1+2": dict(separate=True),
    "System1, more tokens": dict(schemas=False),  # as many as System1+2 spends in all
    "placebo": dict(separate=True)}


def tfidf_scorer(texts):
    """The baseline that remembers nothing else: question -> a score for every text."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    tfidf = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), stop_words="english")
    matrix = tfidf.fit_transform(texts)
    return lambda question: (matrix @ tfidf.transform([question]).T).toarray().ravel()


def contexts(store, fake, tfidf, question, now, budget):
    """{condition: lines} for one question."""
    turns, scores, raw, left = list(store.turns.values()), tfidf(question), [], budget
    for t in (turns[i] for i in sorted(range(len(turns)), key=lambda i: (-scores[i], -i))):  # ties: newest
        raw.append(Line(t.id, "raw", f"{t.t[:10]} {t.text}", t.t))
        left -= raw[-1].cost
        if left < 0:
            break
    out = {"raw TF-IDF": raw[:-1] if left < 0 else raw}
    for name, switches in list(CONDITIONS.items())[1:]:
        extra = sum(n.cost for n in out["System1+2"] if n.channel == "schema") if "more" in name else 0
        known = fake if "placebo" in name else store
        out[name] = recall(known, question, now, budget + extra, **switches).lines
    return out


def run_benchmark(bank, personas=60, budget=120, seed=0):
    """-> {condition: array (personas, kinds) of mean credit}, coverage of frames, coverage of lexicon."""
    from tqdm import tqdm
    table, claims = {name: np.zeros((personas, len(KINDS))) for name in CONDITIONS}, Counter()
    for p in tqdm(range(personas), desc="personas", leave=False, disable=None):
        turns, questions = make_persona(f"{seed}-{p}", bank)
        memory, now = Memory(), turns[-1][0]
        for day, session, text in turns:
            memory.observe(text, day, session)
        memory.sleep(now)
        claims += memory.claims
        fake = placebo(memory.store(), random.Random(f"placebo-{seed}-{p}"))
        tfidf, scores = tfidf_scorer([text for _, _, text in turns]), defaultdict(list)
        for kind, question, options, right in questions:
            for name, lines in contexts(memory.store(), fake, tfidf, question, now, budget).items():
                scores[name, kind].append(credit(choose(question, lines, options), right))
        for (name, kind), values in scores.items():
            table[name][p, KINDS.index(kind)] = np.mean(values)
    known = [poles_of(phrase.format("it")) == (pole,) for pole, line in bank["phrases"].items()
             for phrase in line.split("|")]
    return table, claims[True] / max(claims.total(), 1), np.mean(known)


def bootstrap(values, seed=0, rounds=2000):
    """Mean and 95 % interval over personas (not questions: a few personas may decide everything)."""
    draws = np.random.default_rng(seed).integers(0, len(values), (rounds, len(values)))
    return values.mean(), *np.percentile(values[draws].mean(1), (2.5, 97.5))


def print_benchmark(name, table, frames, lexicon, budget):
    """One table, then the paper's claim in plain numbers. -> {label: (mean, low, high)} in points."""
    personas = len(table["System1"])
    print(f"\n{name} bank, {personas} personas, {budget} tokens of context: accuracy in %, chance 25"
          f"\n(frames hit {frames:.0%} of claims, the lexicon knows {lexicon:.0%} of phrases)")
    print(" " * 23 + "".join(f"{kind:>17}" for kind in KINDS))
    for condition, values in table.items():
        cells = [bootstrap(100 * values[:, k]) for k in range(len(KINDS))]
        print(f"{condition:23}" + "".join(f"{m:>9.1f} ±{(hi - lo) / 2:4.1f}  " for m, lo, hi in cells))

    def gain(over, kinds):  # of System1+2, per persona, in points
        return 100 * (table["System1+2"] - table[over])[:, kinds].mean(1)
    span, seen, unseen, implicit = [0], [4], [5], [4, 5]
    facts = {"gain of System2, span": gain("System1", span), "gain, implicit seen": gain("System1", seen),
             "gain, implicit unseen": gain("System1", unseen),
             "headline: implicit - span": gain("System1", implicit) - gain("System1", span),
             "over placebo, implicit": gain("placebo", implicit),
             "over as many tokens, implicit": gain("System1, more tokens", implicit),
             "sweep alone, implicit unseen": gain("System1+2, no sweep", unseen)}
    facts = {label: tuple(round(float(x), 1) for x in bootstrap(values)) for label, values in facts.items()}
    for label, (mean, low, high) in facts.items():
        print(f"  {label:34} {mean:+6.1f}  [{low:+.1f}, {high:+.1f}]")
    span, seen, unseen, _, _, same, _ = facts.values()
    verdict = "Yes" if min(seen[1], unseen[1]) > span[2] else "Not shown"
    print(f"  Does System2 help most on implicit questions and least on span? {verdict} on this bank: "
          f"{seen[0]:+.1f} and {unseen[0]:+.1f} points\n  against {span[0]:+.1f}. Against a System1 that may "
          f"show as many tokens: {same[0]:+.1f} [{same[1]:+.1f}, {same[2]:+.1f}] on implicit.")
    return facts


# ------------------------------------------------------------------ real corpora
@dataclass
class Question:
    text: str
    category: str
    gold: set  # refs of evidence turns; for the scorer only, never shown to the store
    answer: str
    now: str
    options: list = field(default_factory=list)
    end: int = None  # how many turns exist when the question is asked; later ones would leak the future


@dataclass
class Sample:
    name: str
    turns: list  # [(ref, session, speaker, text, ISO time)]
    questions: list


CATEGORY = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "adversarial"}


def stamp(text):
    """"1:56 pm on 8 May, 2023" or "2023/05/30 (Tue) 23:40" -> "2023-05-08T13:56"."""
    if found := re.search(r"(\d+):(\d+) ?([ap]m)? on (\d+) (\w+),? (\d{4})", text):
        hour, minute, half, day, month, year = found.groups()
        hour = int(hour) % 12 + 12 * (half == "pm") if half else int(hour)
        month = MONTHS[month[:3].lower()]
    else:
        year, month, day, hour, minute = re.search(r"(\d{4})/(\d+)/(\d+).*?(\d+):(\d+)", text).groups()
    return f"{year}-{int(month):02d}-{int(day):02d}T{int(hour):02d}:{minute}"


def load_locomo(rows, _):
    """Known malformations: dates without turns, answers missing or integer, evidence "D8:6; D9:17" or "D"."""
    for item in rows:
        turns, questions, talk = [], [], item["conversation"]
        for n in sorted(int(k[8:]) for k, v in talk.items() if re.fullmatch(r"session_\d+", k) and v):
            when = stamp(talk[f"session_{n}_date_time"])
            for turn in talk[f"session_{n}"]:
                picture = f" [shares {turn['blip_caption']}]" if turn.get("blip_caption") else ""
                text = (turn.get("text") or "") + picture
                turns.append((turn["dia_id"], f"session_{n}", turn["speaker"], text, when))
        for q in item["qa"]:
            found = re.findall(r"D:?(\d+):(\d+)", " ".join(map(str, q.get("evidence") or [])))
            gold = {f"D{int(a)}:{int(b)}" for a, b in found}
            kind = CATEGORY.get(q["category"], str(q["category"]))
            questions.append(Question(q["question"], kind, gold, str(q.get("answer", "")), turns[-1][4]))
        yield Sample(item["sample_id"], turns, questions)


def load_longmemeval(rows, _):
    """One haystack a question; sessions are put in order of their dates (the oracle file is not)."""
    for item in rows:
        turns, gold = [], set()
        sessions = zip(item["haystack_session_ids"], item["haystack_dates"], item["haystack_sessions"])
        for n, (session, when, messages) in enumerate(sorted(sessions, key=lambda s: stamp(s[1]))):
            for i, message in enumerate(messages):
                ref = f"{session}#{n}:{i}"
                turns.append((ref, f"{session}#{n}", message["role"], message["content"], stamp(when)))
                gold |= {ref} if message.get("has_answer") else set()
        kind = item["question_type"] + ("_abs" if item["question_id"].endswith("_abs") else "")
        asked = Question(item["question"], kind, gold, str(item["answer"]), stamp(item["question_date"]))
        yield Sample(item["question_id"], turns, [asked])


def load_personamem(path, questions_path):
    """Contexts are cut at the end index. System messages hold the persona, and with it answers: left out."""
    contexts, rows = {}, defaultdict(list)
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            contexts.update(json.loads(line) if line.strip() else {})
        except ValueError as error:
            raise DcpmError(f"{path}, line {number}: not JSON ({error})") from error
    with open(questions_path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            rows[row["shared_context_id"]].append(row)
    for name, messages in contexts.items():
        turns, upto, session = [], [0], 0
        for message in messages:
            if message["role"] == "system":
                session += 1
            else:
                text = re.sub(r"^(?:User|Assistant): ", "", message["content"])
                day = (date(2024, 1, 1) + timedelta(30 * session)).isoformat()  # the corpus has no dates
                turns.append((str(len(turns)), f"block {session}", message["role"], text, day))
            upto.append(len(turns))
        yield Sample(name[:8], turns, [Question(
            r["user_question_or_message"], r["question_type"], set(), r["correct_answer"].strip("() "),
            turns[-1][4], ast.literal_eval(r["all_options"]),
            upto[min(int(r["end_index_in_shared_context"]), len(messages))]) for r in rows[name]])


def load_personamem_v2(rows, folder):
    """The linked 32k history if it lies beside the file, else the related snippet (an oracle: it says so)."""
    for number, row in enumerate(rows):
        link = folder / row["chat_history_32k_link"]
        whole = json.loads(link.read_text(encoding="utf-8"))["chat_history"] if link.is_file() else None
        messages = whole or json.loads(row["related_conversation_snippet"])
        turns = [(str(i), "history", m["role"], m["content"], "2024-01-01") for i, m in enumerate(messages)
                 if m["role"] != "system" and isinstance(m["content"], str)]
        options = [row["correct_answer"], *json.loads(row["incorrect_answers"])]
        random.Random(number).shuffle(options)  # the official order depends on Python's string hash
        letter = "abcd"[options.index(row["correct_answer"])]
        shown = [f"({x}) {o}" for x, o in zip("abcd", options)]
        text = ast.literal_eval(row["user_query"])["content"]
        asked = Question(text, row["pref_type"], set(), letter, "2024-01-02", shown)
        yield Sample(f"persona {row['persona_id']}" + ("" if whole else " (snippet only)"), turns, [asked])


def checked(sample):
    """A sample as it is; what would only fail while ingesting is refused here."""
    for turn in sample.turns:
        if not all(isinstance(x, str) for x in turn):
            raise TypeError(f"{sample.name}: {turn} is not ref, session, speaker, text and time")
        date.fromisoformat(turn[4][:10])
    for q in sample.questions:
        date.fromisoformat(q.now[:10])
        if not isinstance(q.text, str):
            raise TypeError(f"{sample.name}: {q.text!r} is no question")
    return sample


def load_corpus(path, format="", questions=""):
    """File -> list of samples; the format is detected from the first record when it is not given."""
    path = Path(path)
    if not path.is_file():
        raise DcpmError(f"--data {path}: there is no such file")
    if format not in ("", "personamem") and path.suffix == ".jsonl":
        raise DcpmError(f"--data {path}: a .jsonl file is read as PersonaMem, not as {format}")
    try:
        if path.suffix == ".jsonl":
            guess = path.with_name(re.sub("(shared_)?contexts?", "questions", path.stem) + ".csv")
            if not Path(questions or guess).is_file():
                raise DcpmError(f"PersonaMem needs --questions FILE.csv; there is no {questions or guess}")
            return list(map(checked, load_personamem(path, questions or guess)))
        rows = json.loads(path.read_text(encoding="utf-8"))
        rows = rows if isinstance(rows, list) else [rows]
        for column, kind, load in (("conversation", "locomo", load_locomo),
                                   ("haystack_sessions", "longmemeval", load_longmemeval),
                                   ("related_conversation_snippet", "personamem", load_personamem_v2)):
            if column in rows[0] and format in ("", kind):
                return list(map(checked, load(rows, path.parent)))
        raise DcpmError(f"--data {path}: not {format or 'a known format'}; it has {sorted(rows[0])[:8]}")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError, SyntaxError, csv.Error,
            RecursionError) as error:
        raise DcpmError(f"--data {path}: bad record ({type(error).__name__}: {error})") from error


def ingest(sample, memory, first=0, last=None):
    """Observe turns first..last of a sample, with a progress bar. -> {ref: turn id} of all turns."""
    from tqdm import tqdm
    turns = tqdm(sample.turns[first:last], sample.name, leave=False, disable=None)
    for _, session, speaker, text, when in turns:
        memory.observe(text, when, session, speaker)
    return {ref: i for (ref, *_), i in zip(sample.turns, memory.store().turns)}


def evidence_recall(sample, memory, ids):
    """{(category, ranker): [recall@5, @10, @20 per question]}, without questions that mark no evidence."""
    refs, back, out = [ref for ref, *_ in sample.turns], {i: ref for ref, i in ids.items()}, defaultdict(list)
    texts, bm25 = [text for *_, text, _ in sample.turns], Index()
    asked = [(q, q.gold & set(ids)) for q in sample.questions if q.gold & set(ids)]
    tfidf = tfidf_scorer(texts) if asked else None
    for i, text in enumerate(texts):
        bm25.add(i, re.findall(r"\w+", text.lower()))  # the plain one: whole words, no memory
    for q, gold in asked:
        scores = {"TF-IDF": tfidf(q.text), "BM25": bm25.scores(Counter(re.findall(r"\w+", q.text.lower())))}
        order = {name: [refs[i] for i in np.argsort(-x, kind="stable")] for name, x in scores.items()}
        best = [back[i] for _, i in rank_turns(memory.store(), q.text, q.now)]
        order["DCPM"] = [*best, *(ref for ref in refs if ref not in best)]  # the others list all turns, too
        for name, found in order.items():
            out[q.category, name].append([len(gold & set(found[:k])) / len(gold) for k in (5, 10, 20)])
    return out


def tokens(text):
    return [stem(w) for w in re.findall(r"[a-z0-9]+", text.lower()) if w not in ("a", "an", "the", "and")]


def token_f1(answer, gold):
    """F1 over stemmed tokens without articles and punctuation (the benchmark's stemmer is Porter's)."""
    a, g = tokens(answer), tokens(gold)
    same = (Counter(a) & Counter(g)).total()
    return 2 * same / (len(a) + len(g)) if same else 0.0


def score_answer(reply, question):
    """The benchmark's own metric; for LongMemEval containment, a stand-in for its judge."""
    kind, gold = question.category, question.answer
    if question.options:
        found = re.findall(r"\(([a-d])\)", reply.lower()) or re.findall(r"\b([a-d])\b", reply.lower())
        return float(set(found) == {gold})
    if kind == "adversarial" or kind.endswith("_abs"):
        return float(bool(re.search(r"no information|not mentioned|not known|don't know", reply, re.I)))
    if kind == "multi-hop":
        parts = [max(token_f1(said, part) for said in reply.split(",")) for part in gold.split(",")]
        return sum(parts) / len(parts)
    if kind in CATEGORY.values():
        return token_f1(reply, gold.split(";")[0] if kind == "open-domain" else gold)
    said, wanted = (" ".join(["", *tokens(t), ""]) for t in (reply, gold))
    return float(wanted in said)


def evaluate_corpus(args):
    """Ingest every sample, print evidence recall by category; with a model also answer and score."""
    samples = [s for s in load_corpus(args.data, args.format, args.questions) if args.sample in ("", s.name)]
    if not samples:
        raise DcpmError(f"--sample {args.sample}: {args.data} has no such sample")
    backend = LLM.load(args.model, args.model_name, args.max_new_tokens) if args.model else None
    found, scores, claims, left = defaultdict(list), defaultdict(list), Counter(), args.ask if backend else 0
    for sample in samples:
        keep = list(dict.fromkeys(session for _, session, *_ in sample.turns))[:args.sessions or None]
        sample.turns = [t for t in sample.turns if t[1] in keep]
        memory, n, done = Memory(backend), len(sample.turns), 0
        asked_at = {id(q): n if q.end is None else min(q.end, n) for q in sample.questions}
        for q in sorted(sample.questions, key=lambda q: asked_at[id(q)])[:left]:
            end = asked_at[id(q)]  # never a turn beyond its end
            if end > done:
                ingest(sample, memory, done, end)
                memory.sleep(q.now)
            done, left = end, left - 1
            options = [*q.options, "End with the letter."] if q.options else []
            scores[q.category].append(score_answer(memory.answer("\n".join([q.text, *options]), q.now)[0], q))
        for where, values in evidence_recall(sample, memory, ingest(sample, memory, done)).items():
            found[where] += values
        claims += memory.claims
        store = memory.store()
        print(f"{sample.name}: {n} turns, {len(store.beliefs)} beliefs, {len(store.heads)} chains")
    print(f"{claims[True]} of {claims.total()} claims have a slot, the others were kept as free facts")
    print_evidence(found)
    if backend:
        print(f"model calls {backend.calls}, failures after {backend.tries} tries {dict(+backend.failures)}")
    for category, values in sorted(scores.items()):
        print(f"  answers, {category:30} {np.mean(values):.3f}  ({len(values)} questions)")
    asked = [q for sample in samples for q in sample.questions]
    if scores and any(not q.options and q.category not in CATEGORY.values() for q in asked):
        print("  (containment of the gold answer: a substitute for that benchmark's judge)")


def print_evidence(found):
    if not found:
        return print("this corpus marks no evidence turns: there is no recall to measure")
    rankers = "TF-IDF", "BM25", "DCPM"
    print(f"\nevidence recall @5 / @10 / @20{'':20}" + "".join(f"{ranker:^22}" for ranker in rankers))
    for category in [*dict.fromkeys(c for c, _ in found), "all questions"]:
        rows = [[v for (c, r), values in found.items() if r == ranker and category in (c, "all questions")
                 for v in values] for ranker in rankers]
        line = "".join("  {:.3f} {:.3f} {:.3f} ".format(*np.mean(values, 0)) for values in rows)
        print(f"  {category:34} {len(rows[0]):4} questions {line}")


# ------------------------------------------------------------------ the command
STORY = """
2024-01-08|I live in Paris. I work at Acme. My sister moved to Oslo.
2024-01-20|I wrote a checklist for the dinner. I like coffee.
2024-02-03|I drew up an itinerary for the flight. I run alone.
2024-02-17|I prepared the report weeks ahead. I mapped out the cake step by step.
2024-03-02|I moved to Berlin because Acme closed its Paris office. I went to the gym by myself.
2024-03-16|I booked the hotel in advance. I borrowed a guitar. I made an agenda for the meeting. I have \
migraines.
2024-03-30|I had a list for the stew. I did the race solo. I still live in Berlin.
2024-04-13|Back in 2021 I lived in Rome. I had a schedule for the train journey. Maybe I'll move to Lima.
2024-04-27|I made a timetable for the project. I gave up coffee. I'm flying to Rome on 10 June.
2024-05-11|I got a concert ticket on sale. I haggled over a piano. Please forget that I have migraines."""


def tell_story():
    """One persona, ten sessions, one night: what is written, revised, generalised and forgotten, and why."""
    memory = Memory()
    store = memory.store()
    print("1. By day every message is kept verbatim, read, and reconciled with what is already believed.\n")
    for day, text in (line.split("|") for line in STORY.strip().split("\n")):
        ops = ", ".join(f"{op} {id_}" for op, id_ in memory.observe(text, day, session=day))
        print(f'   {day}  "{text}"\n{" " * 15}{ops}')
    print("\n2. A revised belief is a chain, not an overwritten row; Rome, told last, was spliced in:\n")
    print(f"   {chain_line(store, ('user', 'residence', None)).text}\n")
    memory.sleep("2024-05-12")
    for question in ("Where do I live?", "Where did I live before Berlin?", "Why do I live in Berlin?",
                     "Do I like coffee?", "Where does my sister live?", "What is coming up?",
                     "Do I have migraines?"):
        text, ids = memory.answer(question, "2024-05-12")
        print(f"   {question:33} {text}   {', '.join(ids)}")
    print("\n3. By night habits inside a domain become schemas, habits alike across domains a core schema.\n")
    for node in [*store.schemas.values(), *store.cores.values()]:
        known = f"{node.status}, {node.confidence:.2f}, {len(node.evidence)} beliefs"
        print(f"   [{node.id}] {node.text} ({known})")
    question = "How should I get ready for my first aquarium?"
    print(f"\n4. The context for a question about a domain that never came up: {question}\n")
    for line in memory.recall(question, "2024-05-12", 50, separate=True).lines:
        print(f"   {line}")
    core = next(iter(store.cores))
    print(f"\n5. Why does it believe that? why({core!r}), down to the words that were said:\n")
    print(f"   {store.cores[core].text}")
    for schema in memory.why(core)["because"]:
        print(f"     because [{schema['id']}] {schema['text']}")
        for belief in schema["because"][:2]:
            for source in belief["because"]:
                print(f"       because [{belief['id']}] {source['t']}: “{source['text']}”")
    print(f"\n   broken invariants: {memory.check() or 'none'}\n")


def lexicon_hash():
    """What must not change unnoticed between two results on the test bank."""
    return digest(POLES, DOMAINS, [(a, p, f.pattern) for a, p, f in FRAMES])


def log_heldout(facts, table, path):
    """Append date, commit, hashes and figures to a log outside the repository; old results stay."""
    try:
        describe = "git describe --always --dirty".split()
        commit = subprocess.run(describe, cwd=path.parent, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = "no git"
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state")
    log = state / "four-papers" / "dcpm_heldout.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    entry = {"date": time.strftime("%Y-%m-%d %H:%M"), "commit": commit, "lexicon": lexicon_hash(),
             "bank": digest(path.read_text(encoding="utf-8")), "facts": facts,
             "accuracy": {c: np.round(100 * v.mean(0), 1).tolist() for c, v in table.items()}}
    with open(log, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
    print(f"\nlogged in {log}")


def benchmark(args):
    path = Path(__file__).resolve().parent / "tests" / "dcpm_heldout_bank.json"
    banks = {"held-out": json.loads(path.read_text(encoding="utf-8"))} if args.heldout else BANKS
    print(f"The miniature benchmark. Lexicon and frames {lexicon_hash()}; collision: behaviour >= "
          f"{BEHAVIOUR_ALIKE}, content < {CONTENT_UNLIKE};"
          "\n± is half a 95 % bootstrap interval over personas.")
    for name, bank in banks.items():
        table, *coverage = run_benchmark(bank, args.personas, args.budget, args.seed)
        facts = print_benchmark(name, table, *coverage, args.budget)
        if args.heldout:
            log_heldout(facts, table, path)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="dcpm.py", allow_abbrev=False, description=__doc__.split("\n")[0])
    for flag, default, text in (
            ("personas", 60, "generated personas in the miniature benchmark"),
            ("budget", 120, "tokens of context per question in the benchmark"),
            ("seed", 0, "of the personas"),
            ("data", "", "a LoCoMo, LongMemEval or PersonaMem file: ingest it and print evidence recall"),
            ("questions", "", "PersonaMem: the questions csv (looked for beside --data)"),
            ("sample", "", "only the sample of this name, e.g. conv-26"),
            ("sessions", 0, "only the first N sessions of each sample (0 = all)"),
            ("model", "", "llm: a Hugging Face chat model, a folder, or the URL of a server"),
            ("model_name", "", "llm: the server's name of the model"),
            ("max_new_tokens", 512, "llm: longest reply"),
            ("ask", 100000, "llm: answer at most N questions")):
        parser.add_argument(f"--{flag}", type=type(default), default=default, help=text)
    parser.add_argument("--heldout", action="store_true", help="the test bank instead; the result is logged")
    parser.add_argument("--format", default="", choices=["", "locomo", "longmemeval", "personamem"])
    parser.add_argument("--backend", default="rules", choices=["rules", "llm"])

    def fail(message):
        print(f"dcpm.py: {message}", file=sys.stderr)
        raise SystemExit(2)
    parser.error = fail
    args = parser.parse_args(argv)
    if args.personas < 2 or min(args.budget, args.sessions, args.ask) < 0 or args.max_new_tokens < 1:
        fail("--personas must be >= 2, --max_new_tokens >= 1; --budget, --sessions and --ask >= 0")
    if (args.backend == "llm") != bool(args.model) or (args.model and not args.data):
        fail("--backend llm goes with --model NAME and --data FILE")
    if args.data and args.heldout:
        fail("--heldout is about generated personas; leave out --data or --heldout")
    if not args.data and (args.sample or args.sessions):
        fail("--sample and --sessions go with --data FILE")
    try:
        if args.data:
            evaluate_corpus(args)
        else:
            if not args.heldout:
                tell_story()
            benchmark(args)
    except (DcpmError, OSError) as error:
        fail(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
