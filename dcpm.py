"""DCPM: an agent memory that says why it believes something (dual-process memory, arXiv 2606.09483).

1. Memory is ordered by what it can do: raw turns -> facts and identity -> belief trajectories -> domain
   schemas and intentions -> core schemas. `python dcpm.py` tells a story through all of them.
2. By day, System1 runs inside every write: keep the turn verbatim, extract claims, reconcile each with the
   chain of its slot. A revision never overwrites: it becomes the new head of a doubly linked chain.
3. By night, System2 clusters the facts by their vectors and induces schemas: one habit in one domain.
4. Its sweep looks for *collisions*, schemas of different domains alike in behaviour and unlike in content
   (that is not contradiction), and lifts them into core schemas, which also speak for domains never seen.
5. Reading asks no model: vectors plus following links, within a token budget, an id on every line;
   `why(id)` walks from a core schema down to the words that were said.

Sections of the paper: 2.1 capability order -> the records, Store; 2.2 daytime writer -> decide, write_claims;
2.3 nighttime sweeper -> two_stage_dbscan, plan_schemas, collisions, plan_cores; 2.4 read path -> search, recall;
all of it behind Memory, one for each user. What needs language is a backend of a few jobs: LLM, or Rules for a
controlled English. Prompts stand beside the step that asks them.

  paper (partly as its authors' code has it)      our default
  a language model extracts and reconciles        rules; --backend llm proposes, the same table decides
  a dense encoder, thresholds unknown             hashed words and concepts; --encoder DIR; LIMITS by encoder
  a refinement shadows the old text, unlinked     it stays linked, as "refine"
  list-valued links; schemas never revisited      single links that cannot fork; support recounted every night
  a claim told late becomes the head              spliced in by event time; the head stays

Left out: session summaries, cores above cores, merging near-twin schemas, vector stores and servers,
intentions marked fulfilled, erasure ("forget" suppresses). The memory is saved as its audit log.
"""
import argparse
import copy
import functools
import hashlib
import json
import math
import os
import re
import sys
from collections import Counter, defaultdict, namedtuple
from dataclasses import asdict, dataclass, field
from datetime import date, timedelta
from pathlib import Path

import numpy as np
from scipy import sparse
from sklearn.cluster import DBSCAN
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.preprocessing import normalize


# ------------------------------------------------------------------ 2.1 records
@dataclass
class Turn:
    """One message, verbatim, append-only."""
    id: str
    session: str
    speaker: str  # "user", "assistant" or a person's name
    text: str
    t: str  # the conversation's ISO date or date-time


@dataclass
class Claim:
    """What an extractor read in a turn, not yet a belief. Attribute "?": whichever chain has this value."""
    attribute: str
    value: str
    text: str = ""
    span: tuple = ()  # (start, end) in the turn's text
    subject: str = "user"
    polarity: int = 1  # +1 holds, -1 no longer / dislikes, 0 taken back with nothing in its place
    layer: str = "fact"  # or "identity": preferences, attitudes, values
    t_event: str = ""
    reliability: float = 0.9  # 0.9 said outright, 0.6 hedged, 0.4 about another person
    until: str = ""  # last day of a plan
    detail: bool = False  # carries a qualifier ("mostly jazz")
    slot: tuple = None  # set when a model has matched the claim to a chain


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
    t_seen: str  # when the memory learnt it. Two clocks: bi-temporal
    sources: list  # [(turn id, start, end, reliability)], never empty, only grows
    until: str = ""
    reason: str = ""
    prev: str = None
    next: str = None
    link_kind: str = None  # "supersede" or "refine": why `prev` exists
    confidence: float = 0.0
    status: str = "active"  # active <=> next is None and not suppressed; else superseded or suppressed


@dataclass
class Schema:
    """One behavioural regularity inside one domain. Its text never changes, its evidence does."""
    id: str
    subject: str
    domain: str
    text: str
    created: str
    behaviour: str = ""  # the same without the nouns of its domain: what V_beh embeds
    evidence: list = field(default_factory=list)  # beliefs that ever supported it
    against: list = field(default_factory=list)  # beliefs that showed the opposite in this domain
    replaces: str = None  # the schema whose opposite it is
    confidence: float = 0.0
    status: str = "forming"  # forming, stable, contested, dormant, withdrawn
    prev: str = None  # set once the one it replaces has fallen
    next: str = None


@dataclass
class Core:
    """A regularity behind schemas of different domains."""
    id: str
    subject: str
    text: str
    created: str
    members: list = field(default_factory=list)  # schema ids, only grows
    evidence: list = field(default_factory=list)  # union of the members' evidence
    confidence: float = 0.0
    status: str = "stable"  # or dormant, withdrawn


@dataclass
class Intention:
    """One future action with an end. Wishes and values are not intentions."""
    id: str
    text: str
    until: str
    evidence: list
    status: str = "open"  # open, expired, withdrawn


# One line of the audit log. The log *is* the memory: replayed, it gives the same store.
Event = namedtuple("Event", "op ids turn reason data")


class DcpmError(Exception):
    """A write that would break an invariant, or a file that cannot be read; nothing has been changed."""


def digest(*parts):
    """Eight hex digits, the same on every machine (`hash()` of a string is not)."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()[:8]


def holds(belief):
    return belief.status == "active" and belief.polarity == 1


# ------------------------------------------------------------------ the store: the only place that sets links
class Store:
    """All records of one user. Every change is one event: checked first, then applied as a whole."""

    def __init__(self):
        self.log, self.clock = [], ""  # the latest turn's time; nothing reads the wall clock
        self.turns, self.beliefs, self.heads = {}, {}, {}
        self.schemas, self.cores, self.intentions = {}, {}, {}
        self.hidden = set()  # turns never to be shown: they say what was asked to be forgotten
        self.people = []  # who speaks here, not the assistant: System2 may generalise about them
        self.docs = []  # (id, text, place of the turn before it or -1): what can be searched
        self.last_turn = {}  # session -> place of its last turn in docs

    def new_id(self, letter, *parts):
        """t5 and b17, never reused; a hash for what System2 finds: the same finding gets the same id."""
        return f"{letter}{digest(*parts) if parts else len(self.turns if letter == 't' else self.beliefs) + 1}"

    def commit(self, op, ids=(), said="", reason="", **data):
        event = Event(op, list(ids), said, reason, data)
        self.apply(event)
        self.log.append(event)

    def apply(self, event):
        """Apply one event: the only way that anything here changes."""
        op, data = event.op, event.data
        if op == "RAW":
            turn = Turn(**data["turn"])
            self.turns[turn.id], self.clock = turn, max(self.clock, turn.t)
            if turn.speaker not in ("assistant", *self.people):
                self.people.append(turn.speaker)
            self.docs.append((turn.id, turn.text, self.last_turn.get(turn.session, -1)))
            self.last_turn[turn.session] = len(self.docs) - 1
        elif op == "CONFIRM":
            belief = self.beliefs[event.ids[0]]
            belief.sources.append(tuple(data["source"]))
            belief.t_event = data.get("t_event", belief.t_event)
            self._weigh(belief)
        elif op == "SUPPRESS":
            for id_ in event.ids:
                self.beliefs[id_].status = "suppressed"
                self.hidden.update(source[0] for source in self.beliefs[id_].sources)
            self.hidden.update(data["hide"])
        elif op == "SLEEP":
            for kind, cls in (("schemas", Schema), ("cores", Core), ("intentions", Intention)):
                getattr(self, kind).update({n["id"]: cls(**copy.deepcopy(n)) for n in data[kind]})
        elif op != "FAILED":  # which only records that a model gave nothing usable
            kind = "refine" if op == "REFINE" else "supersede"
            self._insert(Belief(**copy.deepcopy(data["belief"])), data.get("prev"), data.get("next"), kind)

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
        self.beliefs[belief.id] = belief
        self.docs.append((belief.id, belief.text, -1))
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

    def visible(self, slot):
        """The chain without what was asked to be forgotten."""
        return [b for b in self.chain(slot) if b.status != "suppressed"]

    def head(self, slot):
        return self.beliefs.get(self.heads.get(tuple(slot)))

    def sessions(self, beliefs):
        return {self.turns[source[0]].session for b in beliefs for source in b.sources}


# ------------------------------------------------------------------ one embedding for reading, clustering, sweep
# Cosine limits belong to an encoder: with mpnet paraphrases of one behaviour have .39-.76, so .70 finds nothing.
# cluster, tight: the two stages of DBSCAN; alike, unlike: a collision (2.3; the authors' .70 and .60);
# hit: least score of a search result; own: a schema about the question's own domain; near: a chain to reconcile
Limits = namedtuple("Limits", "cluster tight alike unlike hit own near")
LIMITS = {"words": Limits(0.55, 0.75, 0.70, 0.60, 0.05, 0.3, 0.3),
          "mpnet": Limits(0.45, 0.60, 0.45, 0.75, 0.2, 0.25, 0.4)}


class Vectors:
    """Unit vectors of all texts seen so far, each embedded once, in batches and only when needed."""

    def __init__(self, embed):
        self.embed, self.row, self.blocks, self.docs = embed, {}, [], []

    def __call__(self, texts):
        """texts -> (n, d), dense or sparse as the encoder gives them."""
        return self.matrix(texts)[[self.row[t] for t in texts]]

    def means(self, groups):
        """Lists of texts -> the direction of each list's mean vector; (n, d)."""
        return normalize(type(self(groups[0]))(np.concatenate([np.asarray(self(g).sum(0)).reshape(1, -1) for g in groups])))

    def matrix(self, texts=()):
        """All rows (N, d), those of new `texts` appended."""
        if new := [t for t in dict.fromkeys(texts) if t not in self.row]:
            self.blocks.append(self.embed(new))
            self.row.update(zip(new, range(len(self.row), len(self.row) + len(new))))
        if len(self.blocks) > 1:
            stack = sparse.vstack if sparse.issparse(self.blocks[0]) else np.concatenate
            self.blocks = [stack(self.blocks)]
        return self.blocks[0]

    def search(self, docs, question):
        """How well each of the store's docs fits a question; (docs,)."""
        new = [text for _, text, _ in docs[len(self.docs):]]
        matrix, query = self.matrix([*new, question]), self([question])             # (N, d), (1, d)
        self.docs += [self.row[text] for text in new]
        if not sparse.issparse(matrix):
            return cosines(matrix, query)[self.docs, 0]
        # Hashed words: rare ones count more, idf(w) = ln(1 + (N - n + 1/2) / (n + 1/2)). A concept counts as one word:
        # at its full weight it would hide the words of a turn (recall@10 on LoCoMo .68 / .70 in place of .72 / .74).
        n = np.bincount(matrix.indices, minlength=matrix.shape[1])
        scale = np.where(CONCEPTS, 1 / 9, 1.0)                                      # (d,)
        query = query.multiply(np.log1p((len(self.row) - n + 0.5) / (n + 0.5)) ** 2 * scale).tocsr()
        length = np.sqrt(matrix.power(2) @ scale) * max(sparse.linalg.norm(query), 1e-9)
        return (cosines(matrix, query)[:, 0] / np.maximum(length, 1e-9))[self.docs]


def cosines(a, b):
    """Unit rows (n, d), (m, d), dense or sparse -> (n, m)."""
    product = a @ b.T
    return product.toarray() if sparse.issparse(product) else product


# ------------------------------------------------------------------ 2.2 System1: inside every write
STRICT = "You maintain the memory of an assistant. Reply with one JSON object and nothing else."
# One sample reply, on one line: without it a small model leaves out the quote and indents the JSON.
EXTRACT = """Date of the conversation: {t}. Earlier messages, only to understand the new one:
{before}

New message by {speaker}:
<message>
{text}
</message>

List each claim that the new message makes about {speaker} or people around them: events, possessions,
preferences, plans. One claim per event, not a summary. Nothing from the earlier messages, no hypotheses.
"attribute" is one of {attributes}. "polarity" is 1 if it holds, -1 if no longer or disliked.
"quote" is copied word for word from the new message. "forget" lists what the message asks to forget.
Sample reply to "I moved to Rome because Fiat hired me. I wrote a list for my sister's party. I quit tea.":
{{"claims": [{{"subject": "user", "attribute": "residence", "value": "Rome", "polarity": 1, \
"text": "The user moved to Rome because Fiat hired them.", "quote": "I moved to Rome because Fiat hired me"}}, \
{{"subject": "user", "attribute": "event", "value": "list for the party", "polarity": 1, \
"text": "The user wrote a list for the sister's party.", "quote": "I wrote a list for my sister's party"}}, \
{{"subject": "user", "attribute": "likes", "value": "tea", "polarity": -1, "text": "The user quit tea.", \
"quote": "I quit tea"}}], "forget": []}}"""
RECONCILE = """Known chains, newest version last:
{chains}

New items:
{items}

For each item about the same thing as a known one give {{"item": number, "op": "CONFIRM" (nothing new),
"REFINE" (more detail, compatible) or "SUPERSEDE" (both cannot be true now), "id": the known id}}.
Leave out all others: two likes can coexist, and two events are two events.
Sample reply: {{"operations": [{{"item": 0, "op": "SUPERSEDE", "id": "b4"}}]}}"""
SINGLE = ("residence", "employer", "occupation", "name", "partner", "diet")  # one value at a time
ATTRIBUTES = (*SINGLE, "likes", "hobby", "possession", "condition", "plan", "event")


def slot_of(store, claim):
    """The dimension a claim speaks about: single-valued attributes have one chain, others one per value."""
    subject, attribute, value = claim.subject, claim.attribute, key(claim.value)
    if claim.slot:
        return claim.slot
    if attribute == "?":  # "gave up coffee": the chain about coffee that this changes, or any, or a new one
        heads = [store.head((subject, a, value)) for a in ("likes", "hobby", "possession")]
        known = sorted((h for h in heads if h), key=lambda h: h.polarity == claim.polarity)
        return known[0].slot if known else (subject, "likes", value)
    if attribute in SINGLE:
        head = store.head((subject, attribute, None))
        if claim.polarity != -1 or (head and key(head.value) == value):
            return subject, attribute, None
        attribute = "event"  # "I no longer live in Rome" does not end Paris
    if attribute in ("event", "maybe"):  # a free fact: only the same sentence confirms it, none excludes it
        return subject, attribute, " ".join(re.findall(r"\w+", claim.text.lower()))
    return subject, attribute, value


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
        old, new = (set(words(DATE.sub("", text))) for text in (head.text, claim.text))
        if old < new or (claim.detail and not new <= old):
            return Decision("REFINE", prev=head.id)
        return Decision("CONFIRM", node=head.id)
    # Told late. Making it the head, as the authors' code does, would bring back the past as the present.
    after = next(b for b in store.chain(slot) if b.t_event > claim.t_event)
    for neighbour in (store.beliefs.get(after.prev), after):
        if neighbour and same(neighbour, claim):
            return Decision("CONFIRM", node=neighbour.id)
    return Decision("SPLICE", prev=after.prev, next=after.id)


def new_belief(store, turn, claim, slot, decision):
    """The node that a claim becomes; only a refinement takes over text and sources of its predecessor."""
    old, text = store.beliefs.get(decision.prev), claim.text
    inherited = old.sources if decision.op == "REFINE" else []
    if inherited and not set(words(old.text)) <= set(words(text)):
        text = f"{old.text}; {text}"
    because = re.search(r"\bbecause (.+)", claim.text, re.I)
    return Belief(
        store.new_id("b"), claim.layer, slot, claim.value, claim.polarity, text,
        claim.t_event, store.clock, [*inherited, (turn.id, *claim.span, claim.reliability)], claim.until,
        reason=because.group(1).rstrip(".") if because else f"told {turn.t[:10]}" if old else "")


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


def near_chains(memory, claims):
    """{id of a head: its chain} for the chains that a model shall compare new claims with; at most 20."""
    texts = [c.text for c in claims if c.attribute not in SINGLE]  # a single slot needs no model to be found
    found = {}
    for text in texts:
        scores = memory.vectors.search(memory.docs, text)                            # (docs,)
        for i in np.argsort(-scores, kind="stable")[:20]:
            belief = memory.beliefs.get(memory.docs[i][0])
            if belief and scores[i] >= memory.limits.near:
                found[memory.heads[belief.slot]] = memory.visible(belief.slot)
    return {id_: chain for id_, chain in list(found.items())[:20] if chain and chain[-1].id == id_}


# ------------------------------------------------------------------ 2.3 System2: while nobody is waiting
INDUCE = """Facts about {person}, each with its id:
{facts}

Regularities known already:
{known}

Which behaviour does {person} show again and again in one area of life? Name a regularity only if at least
three of the facts from different days show it; none is a good answer. "text" is one sentence: when, what they
do, and why. "evidence" lists the ids that show it, "against" those that show the opposite. "known" is the id
of a known regularity if it is the same one; "replaces" is the id of a known one if the facts now show its
opposite.
Sample reply: {{"schemas": [{{"domain": "pets", "text": "When the dog needs something, the user asks three \
people first, to be sure.", "evidence": ["b3", "b7", "b9"], "against": [], "known": null, "replaces": null}}]}}"""
STRIP = """A habit in one area of life:
{text}

Say it again as a style that could show in any area of life: no noun of its area, no scene, only how the person
goes about things and why.
Sample reply for "When the dog needs something, the user asks three people first, to be sure.":
{{"behaviour": "asks several people first, to be sure"}}"""
CORE = """These habits of one person come from different areas of life:
{schemas}

Is there one sentence that explains why they go together? null if there is none.
Sample reply: {{"text": "The user asks others before deciding, in order to be sure."}}"""
MIN_STABLE = 5  # the authors': with fewer schemas too little is known about a person to generalise
# What an inducer found. known: the schema that it extends; replaces: the schema whose opposite it is.
Draft = namedtuple("Draft", "domain text evidence against known replaces", defaults=((), None, None))


def two_stage_dbscan(vectors, limits):
    """Cluster rows (n, d) by cosine: `cluster`, 3 members; those over 12 again at `tight`, 2. -> labels (n,).

    Leftovers of the second stage join the nearest sub-cluster; -1 is noise.
    """
    labels = DBSCAN(eps=1 - limits.cluster, min_samples=3, metric="cosine").fit_predict(vectors)
    for label in range(labels.max() + 1):
        inside = np.flatnonzero(labels == label)
        if len(inside) <= 12:
            continue
        sub = DBSCAN(eps=1 - limits.tight, min_samples=2, metric="cosine").fit_predict(vectors[inside])
        if sub.max() > 0:
            sums = np.eye(sub.max() + 1)[:, sub] * (sub >= 0)                        # (sub-clusters, inside)
            means = sums / sums.sum(1, keepdims=True) @ vectors[inside]
            labels[inside] = labels.max() + 1 + np.where(sub >= 0, sub, cosines(vectors[inside], means).argmax(1))
    return labels


def group_facts(memory, person):
    """The live facts of one person -> (clusters, noise), lists of beliefs."""
    facts = [b for b in memory.beliefs.values()
             if holds(b) and b.slot[0] == person and b.slot[1] not in ("maybe", "plan")]
    if len(facts) < 3:
        return [], facts
    labels = two_stage_dbscan(memory.vectors([b.text for b in facts]), memory.limits)
    groups = defaultdict(list)
    for belief, label in zip(facts, labels.tolist()):
        groups[label].append(belief)
    noise = groups.pop(-1, [])
    return [groups[label] for label in sorted(groups)], noise


def recount(schema, store):
    """Count again what supports a schema. s: chains that hold and show it; x: those that show the opposite."""
    live = [store.beliefs[i] for i in schema.evidence if holds(store.beliefs[i])]
    s = len({b.slot for b in live})  # a chain counts once, by its head
    x = len({store.beliefs[i].slot for i in schema.against if holds(store.beliefs[i])})
    # confidence = (s + 1) / (s + x + 2): Laplace's rule of succession
    schema.confidence = round((s + 1) / (s + x + 2), 4)
    known, sure = s >= 3 and len(store.sessions(live)) >= 2, schema.confidence >= 0.65
    schema.status = "dormant" if s < 2 else "forming" if not known else "stable" if sure else "contested"


def plan_schemas(memory, now, fresh):
    """All schemas as they should be tonight: new ones, recounted ones, and which replaced its opposite."""
    schemas = copy.deepcopy(memory.schemas)
    for schema in schemas.values():
        withdraw(memory, schema)
    for person in memory.people if fresh else ():
        known = [s for s in schemas.values() if s.subject == person and s.status != "withdrawn"]
        for draft in memory.backend.induce(*group_facts(memory, person), known):
            id_ = draft.known or memory.new_id("s", person, draft.domain, draft.text)
            if id_ not in schemas or schemas[id_].status == "withdrawn":
                if len(draft.evidence) < 2:
                    continue
                schemas[id_] = Schema(id_, person, draft.domain, draft.text, now)
            schema = schemas[id_]
            schema.evidence = sorted({*schema.evidence, *draft.evidence})
            schema.against = sorted({*schema.against, *draft.against} - {*schema.evidence})
            schema.replaces = draft.replaces or schema.replaces
    standing = [s for s in schemas.values() if s.status != "withdrawn"]
    for schema in standing:
        recount(schema, memory)
    for new in standing:
        old = schemas.get(new.replaces)
        if old and new.status == "stable" != old.status and not (new.prev or new.next or old.next):
            new.prev, old.next = old.id, new.id
    return schemas


def withdraw(store, node):
    """A higher node that cites what was asked to be forgotten is gone: its text may give it away."""
    cited = [*node.evidence, *getattr(node, "against", ())]
    if any(store.beliefs[i].status == "suppressed" for i in cited):
        node.status, node.confidence, node.evidence = "withdrawn", 0.0, []
        if isinstance(node, Schema):
            node.against = []


def collisions(behaviour, content, domains, limits):
    """Pairs of schemas alike in behaviour, unlike in content and domain. NOT contradictions.

    behaviour: V_beh (n, d); content: V_con (n, d). -> [(i, j)], i < j
    """
    # collide: cos(V_beh) > 0.70 and cos(V_con) < 0.60 and the domains differ (2.3)
    alike, unlike = cosines(behaviour, behaviour), cosines(content, content)        # (schemas, schemas)
    apart = np.array(domains)[:, None] != np.array(domains)[None, :]
    pairs = np.argwhere(np.triu((alike > limits.alike) & (unlike < limits.unlike) & apart, 1))
    return [(int(i), int(j)) for i, j in pairs]


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


def plan_cores(memory, now, schemas, fresh):
    """All cores: what the sweep finds joins a known core or becomes one, and every core is recounted."""
    cores = copy.deepcopy(memory.cores)
    for core in cores.values():
        withdraw(memory, core)
    for person in memory.people if fresh else ():
        stable = [s for _, s in sorted(schemas.items()) if s.subject == person and s.status == "stable"]
        said = [[memory.beliefs[i].text for i in s.evidence if holds(memory.beliefs[i])] for s in stable]
        for schema, text in zip(stable, memory.backend.strip(stable, said)):
            schema.behaviour = text
        stable = [s for s in stable if s.behaviour]
        if len(stable) >= MIN_STABLE:
            behaviour = memory.vectors.means([s.behaviour.split("\n") for s in stable])  # (schemas, d)
            content = memory.vectors([s.text for s in stable])
            domains = [s.domain for s in stable]
            memory.gate[person] = gate(behaviour, domains, memory.limits)
            for group in collision_groups(len(stable), collisions(behaviour, content, domains, memory.limits)):
                join_core(memory, now, cores, [stable[i] for i in group])
    for core in cores.values():
        core.members = sorted(set(core.members))
        core.evidence = sorted({i for m in core.members for i in schemas[m].evidence})
        # confidence = the second best over domains of (best stable member's): one domain alone proves nothing
        members = sorted((schemas[m] for m in core.members), key=lambda s: s.confidence)
        best = {s.domain: s.confidence for s in members if s.status == "stable"}  # the last, best one stays
        if core.status != "withdrawn":
            core.status = "stable" if len(best) >= 2 else "dormant"
            core.confidence = sorted(best.values())[-2] if len(best) >= 2 else 0.0
    return cores


def join_core(memory, now, cores, members):
    """Schemas that collide -> the core they belong to, which may be a new one; changes `cores`."""
    ids = {m.id for m in members}
    known = [c for c in cores.values() if ids & set(c.members) and c.status != "withdrawn"]
    if not known:
        text = memory.backend.name_core(members)
        if not text:  # a null answer is allowed: no core
            return
        core = Core(memory.new_id("c", members[0].subject, text), members[0].subject, text, now)
        if core.id not in cores or cores[core.id].status == "withdrawn":
            cores[core.id] = core
        known = [cores[core.id]]
    # The core that shares most members, then the oldest: never whichever comes first.
    min(known, key=lambda c: (-len(ids & set(c.members)), c.created, c.id)).members += ids


def gate(behaviour, domains, limits):
    """How far alike and unlike pairs lie apart in V_beh: (pairs, alike, lowest of these, highest of the others)."""
    apart = np.triu(np.array(domains)[:, None] != np.array(domains)[None, :], 1)
    found = cosines(behaviour, behaviour)[apart]                                    # (pairs,)
    alike = found > limits.alike
    return len(found), int(alike.sum()), float(min(found[alike], default=1)), float(max(found[~alike], default=0))


def plan_intentions(store, now):
    """All intentions: plans with a last day, told by people who speak here."""
    intentions = copy.deepcopy(store.intentions)
    for b in store.beliefs.values():
        if b.slot[1] == "plan" and b.until and b.slot[0] in store.people and b.status != "suppressed":
            id_ = store.new_id("i", b.slot[0], key(b.value), b.until)
            item = intentions.setdefault(id_, Intention(id_, b.value, b.until, []))
            item.evidence = sorted({*item.evidence, b.id})
    for item in intentions.values():
        withdraw(store, item)
        alive = any(holds(store.beliefs[i]) for i in item.evidence)
        item.status = "withdrawn" if not alive else "expired" if item.until < now[:10] else "open"
    return intentions


def is_fresh(memory):
    """Has anything been written since the last night?"""
    return not memory.log or memory.log[-1].op != "SLEEP"


def plan_night(memory, now):
    """What System2 would change, as a dictionary. Without a write since the last night it only recounts."""
    # The watermark: a model asked twice about the same facts may find other schemas, so it is asked once.
    fresh = is_fresh(memory)
    schemas = plan_schemas(memory, now, fresh)
    new = {"schemas": schemas, "cores": plan_cores(memory, now, schemas, fresh),
           "intentions": plan_intentions(memory, now)}
    plan = {kind: [asdict(n) for _, n in sorted(nodes.items()) if n != getattr(memory, kind).get(n.id)]
            for kind, nodes in new.items()}
    return plan if fresh or any(plan.values()) else None


# ------------------------------------------------------------------ 2.4 reading: vectors and links, no model
ANSWER = """What is known about the user:
{context}

Question: {question}
Answer briefly from what is known; if it is not known, say that there is no information."""
SCHEMA_LINES = 4  # a channel of their own, above the budget: the authors' quota of 40 % of ten profile lines
PROFILE, COMING = 0.2, 0.1  # shares of the budget for single-valued attributes and for intentions


class Line(namedtuple("Line", "id channel text t entries", defaults=((),))):
    """One line of context. entries: the dated statements of a chain, for whoever reads by program."""

    def __str__(self):
        return f"[{self.id}] {self.text}"


Recall = namedtuple("Recall", "lines text ids")


def search(memory, question):
    """Turns and beliefs by relevance: [(score, id)], best first. Superseded ones count: they bring a chain."""
    if not memory.docs:
        return []
    # Names are no search words: in a dialogue it is mostly the *other* speaker who says one.
    names = {w for name in memory.people for w in words(name)}
    query = " ".join(w for w in question.split() if not set(words(w)) & names) or question
    own = memory.vectors.search(memory.docs, query)                                 # (docs,)
    # score = own + 0.5 of the turn before in its session: an answer seldom repeats the words of its question
    before = np.array([place for _, _, place in memory.docs])
    scores = own + 0.5 * np.where(before >= 0, own[before], 0)
    best = [i for i in np.argsort(-scores, kind="stable")[:300] if scores[i] >= memory.limits.hit]
    return [(float(scores[i]), memory.docs[i][0]) for i in best if memory.docs[i][0] not in memory.hidden]


def visible_schemas(memory, question, now):
    """Schemas and cores to show, best first, as far as their support is alive *now*: no write touches them."""
    def alive(node):
        cited = [memory.beliefs[i] for i in node.evidence]
        return (node.status == "stable" and len({b.slot for b in cited if holds(b)}) >= 2
                and all(b.status != "suppressed" for b in cited))

    def rank(node):  # decay is applied while reading: stored, it would depend on how often System2 runs
        seen = max(memory.beliefs[i].t_seen for i in node.evidence)
        idle = max(0, (date.fromisoformat(now[:10]) - date.fromisoformat(seen[:10])).days)
        return -node.confidence * 2 ** (-idle / 180), node.id  # half-life: half a year without new evidence
    schemas = sorted(filter(alive, memory.schemas.values()), key=rank)
    domain = {s.id: s.domain for s in schemas}
    cores = [c for c in memory.cores.values() if alive(c) and len({domain.get(m) for m in c.members} - {None}) >= 2]
    # Schemas of the question's own domain come first; where it has none, cores speak for it.
    close = cosines(memory.vectors([s.text for s in schemas]), memory.vectors([question]))[:, 0] if schemas else []
    own = [s for s, c in zip(schemas, close) if c >= memory.limits.own]
    return own, sorted(cores, key=rank), [s for s in schemas if s not in own]


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


def recall(memory, question, now, budget=800, schemas=True, sweep=True):
    """Question -> Recall within `budget` tokens. Every line carries the id to ask `why` about.

    Schemas and cores have a channel of their own, SCHEMA_LINES lines beside the budget, as in the authors'
    reader. What does not reach `limits.hit` is not shown: no filler.
    """
    chosen, left = {}, budget

    def spend(lines, tokens):  # whole lines only
        nonlocal left
        for line in lines:
            cost = count_tokens(str(line))
            if line and line.id not in chosen and cost <= min(tokens, left):
                chosen[line.id], left, tokens = line, left - cost, tokens - cost
    own, cores, others = visible_schemas(memory, question, now) if schemas else ([], [], [])
    nodes = [*own, *(cores if sweep else []), *others][:SCHEMA_LINES]
    chosen.update((n.id, Line(n.id, "schema", n.text, n.created)) for n in nodes)
    # The attribute asked about comes first; small fixed shares next, so that many hits cannot push them out.
    asked, people = asked_about(question), people_in(memory, question)
    spend([chain_line(memory, (p, a, None)) for a in asked for p in people], left)
    spend([chain_line(memory, (p, a, None)) for a in SINGLE for p in people], int(budget * PROFILE))
    items = [i for i in memory.intentions.values() if i.status == "open" and i.until >= now[:10]
             and any(holds(memory.beliefs[b]) for b in i.evidence)]  # a lapsed plan is never shown as one
    spend([Line(i.id, "intention", f"planned until {i.until}: {i.text}", i.until)
           for i in sorted(items, key=lambda i: (i.until, i.id))], int(budget * COMING))
    cited = set()
    for _, id_ in search(memory, question):
        if left <= 5:
            break
        if id_ in memory.beliefs and (line := chain_line(memory, memory.beliefs[id_].slot)):
            spend([line], left)
            cited |= {source[0] for source in memory.beliefs[id_].sources} if line.id in chosen else set()
        elif id_ in memory.turns and id_ not in cited:
            turn = memory.turns[id_]
            spend([Line(id_, "raw", f"{turn.t[:10]} {turn.speaker}: {turn.text}", turn.t)], left)
    # State order: cores, schemas, then everything by time.
    lines = sorted(chosen.values(), key=lambda n: ({"c": 0, "s": 1}.get(n.id[0], 2), n.t, n.id))
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


def replay(log, store):
    """Audit log -> store."""
    for event in log:
        store.apply(Event(*event))
        store.log.append(Event(*event))
    return store


def snapshot(store):
    """Everything a store holds, its log included, as one comparable string."""
    kinds = (store.turns, store.beliefs, store.schemas, store.cores, store.intentions, store.log)
    rest = (sorted(store.hidden), list(store.heads.values()), store.people, store.docs)
    return json.dumps([kinds, rest], sort_keys=True, default=vars)


def check(store):
    """The broken invariants, as sentences; those about schemas hold after each sleep."""
    b, found = store.beliefs, []  # [(broken?, sentence)]
    for n in b.values():
        p, after, where = b.get(n.prev), b.get(n.next), [(store.turns.get(s[0]), *s[1:3]) for s in n.sources]
        found += [
            ((p and p.next != n.id) or (after and after.prev != n.id) or n.id in (n.prev, n.next),
             f"links of {n.id} are not mutual"),
            (p and n.link_kind == "supersede" and same(p, n), f"{n.id} supersedes an equal claim"),
            (p and p.t_event > n.t_event, f"{n.id} is older than its predecessor"),
            ((n.status == "active") != (n.next is None and n.status != "suppressed"), f"{n.id} is {n.status}"),
            (not where or not all(turn and 0 <= start < end <= len(turn.text) for turn, start, end in where),
             f"{n.id} has no source, or one outside its turn")]
    heads = Counter(n.slot for n in b.values() if n.next is None)
    for slot, count in Counter(n.slot for n in b.values()).items():
        found.append((heads[slot] != 1 or len(store.chain(slot)) != count, f"{slot} is not one chain"))
    slept = store.log and store.log[-1].op == "SLEEP"
    for n in [*store.schemas.values(), *store.cores.values(), *store.intentions.values()] if slept else ():
        live = [b[i] for i in n.evidence if holds(b[i])]
        found += [
            (any(b[i].status == "suppressed" for i in n.evidence), f"{n.id} rests on something forgotten"),
            (n.status == "stable" and (len({x.slot for x in live}) < 3 or len(store.sessions(live)) < 2),
             f"{n.id} is stable without support")]
    for c in store.cores.values():
        members = [store.schemas[m] for m in c.members]
        found += [
            (c.status == "stable" and len({m.domain for m in members if m.status == "stable"}) < 2,
             f"core {c.id} does not rest on two domains"),
            (c.status != "withdrawn" and c.evidence != sorted({i for m in members for i in m.evidence}),
             f"evidence of core {c.id} is not the union of its members'")]
    found.append((snapshot(replay(store.log, Store())) != snapshot(store), "replaying the log gives another store"))
    return [sentence for broken, sentence in found if broken]


# ------------------------------------------------------------------ the memory
class Memory(Store):
    """One user's memory: a store, a backend for what needs language, and the vectors of its encoder.

    backend: Rules() or LLM(chat). encoder: "words" or a folder or hub id of a sentence encoder.
    """
    recall, as_of, check, trail = recall, as_of, check, Store.chain  # functions of this file as methods

    def __init__(self, backend=None, encoder="words"):
        super().__init__()
        self.backend = backend or Rules()
        self.vectors = Vectors(embed_words if encoder == "words" else sentence_encoder(encoder))
        self.limits = next((v for name, v in LIMITS.items() if name in str(encoder)), LIMITS["mpnet"])
        self.gate = {}  # person -> how far apart the last sweep found alike and unlike pairs

    def observe(self, text, t, session="s1", speaker="user"):
        """System1, in the write: keep the raw turn first, then extract, reconcile, apply. -> [(op, id)]."""
        return self.ingest([(text, t, session, speaker)])[0]

    def ingest(self, turns):
        """[(text, t, session, speaker)] -> [[(op, id)]]. All turns are extracted in one batch: it needs no store."""
        turns, kept = list(turns), []
        for _, t, *_ in turns:
            if not re.match(r"\d{4}-\d\d-\d\d", t):  # dates are compared as strings
                raise DcpmError(f"{t!r} does not start with a date like 2024-05-01")
            date.fromisoformat(t[:10])
        for text, t, session, speaker in turns:
            kept.append(Turn(self.new_id("t"), session, speaker, text, t))
            self.commit("RAW", [kept[-1].id], kept[-1].id, turn=asdict(kept[-1]))
        earlier = [t for t in self.turns.values() if t.id not in self.hidden][-len(kept) - 6:]
        return [self.write(turn, *read) for turn, read in zip(kept, self.backend.extract(kept, earlier))]

    def write(self, turn, claims, forget):
        """Reconcile and apply what was read in one turn. claims None: the model gave nothing usable."""
        if claims is None:  # the turn is kept, the failure is on record
            self.commit("FAILED", [turn.id], turn.id, "no usable answer from the model")
        self.backend.reconcile(self, claims or [])
        ops = write_claims(self, turn, claims or [])
        return ops + [("SUPPRESS", i) for what in forget for i in self.forget(what, turn.id)]

    def forget(self, what, turn=""):
        """Suppress what is to be forgotten and hide the turns that say it; nothing is deleted. -> ids.

        Read as a claim ("I live in Paris") it names a slot and a value; else all its content words must occur.
        """
        speaker, ids, need = self.turns[turn].speaker if turn else [*self.people, "user"][0], [], set(words(what))
        claim = read_clause(what, speaker, self.clock)
        if claim and claim.attribute not in ("event", "maybe"):
            need = set(words(claim.value))
            ids = [b.id for b in self.chain(slot_of(self, claim)) if key(b.value) == key(claim.value)]
        ids = ids or [b.id for b in self.beliefs.values()
                      if need and need <= set(words(f"{b.slot[0]} {b.value} {b.text}"))]
        ids = [i for i in ids if self.beliefs[i].status != "suppressed"]
        if ids:
            hide = {t.id for t in self.turns.values() if need <= set(words(t.text))} | {turn} - {""}
            self.commit("SUPPRESS", ids, turn, "asked to forget", hide=sorted(hide))
        return ids

    def sleep(self, now):
        """System2, all or nothing: first the whole plan, then one event."""
        if (plan := plan_night(self, now)) is not None:
            self.commit("SLEEP", [n["id"] for nodes in plan.values() for n in nodes], "", f"night of {now[:10]}", **plan)

    def answer(self, question, now):
        """-> (text, ids that it rests on)."""
        return self.backend.answer(self, question, now)

    def why(self, id_):
        """core -> schemas -> beliefs -> the verbatim span of the raw turn, as a nested dictionary."""
        kinds = (self.cores, self.schemas, self.intentions, self.beliefs, self.turns)
        node = next((kind[id_] for kind in kinds if id_ in kind), None)
        if node is None:
            raise DcpmError(f"there is no record {id_!r}; recall(...).ids lists the ids you can ask about")
        cited = [self.beliefs[i].status for i in getattr(node, "evidence", ())]
        if id_ in self.hidden or getattr(node, "status", "") in ("suppressed", "withdrawn") or "suppressed" in cited:
            return {"id": id_, "text": "(forgotten on request)", "because": []}
        if id_ in self.beliefs:
            below = [{"id": s[0], "t": self.turns[s[0]].t, "text": quote(self, s), "because": []}
                     for s in node.sources]
        else:
            below = [self.why(i) for i in getattr(node, "members", getattr(node, "evidence", []))]
        return {"id": id_, "text": node.text, "because": below}

    def save(self, path):
        """The audit log as JSON, written beside the target and moved over it: a crash spoils nothing."""
        part = Path(f"{path}.part")
        part.write_text(json.dumps({"format": "dcpm-2", "log": self.log}), encoding="utf-8")
        os.replace(part, path)

    @classmethod
    def load(cls, path, backend=None, encoder="words"):
        memory = cls(backend, encoder)
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["format"] != "dcpm-2":
                raise ValueError("unknown format")
            replay(data["log"], memory)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DcpmError(f"{path} is not a memory saved by dcpm.py ({error}); restore a copy") from error
        return memory

    def dump(self):
        """The whole memory as text for people."""
        lines = [f"  {line}" for line in (chain_line(self, slot) for slot in self.heads) if line]
        nodes = [*self.schemas.values(), *self.cores.values(), *self.intentions.values()]
        lines += [f"  [{n.id}] {self.why(n.id)['text']} ({n.status})" for n in nodes]
        return "\n".join([f"{len(self.turns)} turns, {len(self.beliefs)} beliefs", *lines])


# ------------------------------------------------------------------ a language model and a sentence encoder
class LLM:
    """A chat model as extractor, reconciler, inducer, answerer. `chat`: conversations -> texts or None.

    It proposes; the decision table and the store dispose: it chooses among ids it was shown and sets no link.
    """

    def __init__(self, chat):
        self.chat, self.calls, self.failures = chat, 0, Counter()

    def ask(self, kind, prompts, check):
        """prompts -> [check(JSON object) or None], all prompts in one batch; three tries each."""
        import common  # only here: the rule backend needs neither torch nor transformers
        tally = Counter()
        checks = check if isinstance(check, list) else [check] * len(prompts)
        talks = [[{"role": "system", "content": STRICT}, {"role": "user", "content": p}] for p in prompts]
        found = common.ask(self.chat, talks, checks, tally=tally) if talks else []
        self.calls += tally["calls"]
        self.failures[kind] += sum(value is None for value in found)
        return found

    def extract(self, turns, earlier):
        """-> [(claims or None, what to forget)], one a turn. Questions are not shown: a model makes claims of them."""
        out, asked, prompts, checks = [([], []) for _ in turns], [], [], []
        for i, turn in enumerate(turns):
            text = re.sub(r"[^.!?\n]*\?+", "", turn.text).strip()
            if turn.speaker == "assistant" or not words(text):
                continue
            at = next((n for n, t in enumerate(earlier) if t.id == turn.id), 0)
            before = "\n".join(f"{t.speaker}: {t.text[:300]}" for t in earlier[max(0, at - 6):at]) or "(none)"
            prompts.append(EXTRACT.format(t=turn.t, before=before, speaker=turn.speaker, text=text,
                                          attributes=", ".join(ATTRIBUTES)))
            checks.append(functools.partial(self.read_claims, turn))
            asked.append(i)
        for i, found in zip(asked, self.ask("extract", prompts, checks)):
            # Without a usable answer the claims are lost, but a request to forget must not be: the rules read it.
            out[i] = found if found is not None else (None, read_rules(turns[i])[1])
        return out

    @staticmethod
    def read_claims(turn, data):
        """The model's JSON -> (claims, what to forget). A claim whose quote is not in the message is invented."""
        claims = []
        for c in data["claims"]:
            value, text, said = (str(c[k]) for k in ("value", "text", "quote"))
            at, polarity = turn.text.find(said.strip(" .")), c.get("polarity", 1)
            if at < 0 or not said.strip(" .") or not key(value) or polarity not in (1, 0, -1):
                continue
            subject = str(c.get("subject") or turn.speaker).lower().removeprefix("the ")
            subject = turn.speaker if subject in ("user", "i", "me", turn.speaker.lower()) else subject
            window, attribute = date_window(said, turn.t), c.get("attribute")
            plan = attribute == "plan" and window and window[1] >= turn.t[:10]
            when = window[0] if window and not plan and window[1] < turn.t[:10] else turn.t
            claims.append(Claim(
                attribute if attribute in ATTRIBUTES and (plan or attribute != "plan") else "event", value[:200],
                text[:500], (at, at + len(said.strip(" ."))), subject, polarity,
                "identity" if attribute in ("likes", "diet") else "fact", when,
                0.9 if subject == turn.speaker else 0.4, window[1] if plan else ""))
        return claims, [str(f) for f in data.get("forget") or [] if words(str(f))]

    def reconcile(self, memory, claims):
        """Match claims to the chains they belong to. Ids outside the candidates are refused."""
        shown = near_chains(memory, claims) if claims else {}
        if not shown:
            return  # nothing near: the decision table needs no help

        def check(data):
            ops = {}
            for o in data["operations"]:
                if o["id"] not in shown or o["op"] not in ("CONFIRM", "REFINE", "SUPERSEDE"):
                    raise ValueError(f"{o} names an id or an op that was not offered")
                if claims[int(o["item"])].subject == shown[o["id"]][-1].slot[0]:
                    ops.setdefault(o["id"], (int(o["item"]), o["op"]))  # one operation a node: the first
            return ops
        chains = "\n".join(f"[{i}] " + " -> ".join(f"{b.text} ({b.t_event[:10]})" for b in chain)
                           for i, chain in shown.items())
        items = "\n".join(f"{i}. {c.text}" for i, c in enumerate(claims))
        for id_, (item, op) in (self.ask("reconcile", [RECONCILE.format(chains=chains, items=items)], check)[0]
                                or {}).items():
            claim, head = claims[item], memory.beliefs[id_]
            claim.slot = head.slot
            if op != "SUPERSEDE":
                claim.value, claim.polarity, claim.detail = head.value, head.polarity, op == "REFINE"
                claim.until = claim.until or head.until

    def induce(self, clusters, noise, known):
        """Every cluster with a fact that no schema cites yet, and the facts in no cluster, in portions."""
        cited = {i for s in known for i in (*s.evidence, *s.against)}
        groups = [g[:30] for g in clusters] + [noise[i:i + 30] for i in range(0, len(noise), 30)]
        groups = [g for g in groups if len(g) >= 3 and any(b.id not in cited for b in g)]
        lines = "\n".join(f"[{s.id}] {s.domain}: {s.text}" for s in known) or "(none)"
        prompts = [INDUCE.format(person=called(g[0].slot[0]), known=lines, facts="\n".join(
            f"[{b.id}] {b.t_event[:10]} {b.text}" for b in g)) for g in groups]
        checks = [functools.partial(self.read_drafts, {b.id for b in g}, {s.id for s in known}) for g in groups]
        return [draft for found in self.ask("induce", prompts, checks) for draft in found or []]

    @staticmethod
    def read_drafts(shown, known, data):
        drafts = []
        for s in data["schemas"]:
            evidence, against = (sorted(set(s.get(k) or [])) for k in ("evidence", "against"))
            if not set(evidence + against) <= shown or {s.get("known"), s.get("replaces")} - {None, *known}:
                raise ValueError("evidence and against must be ids of the facts, known and replaces ids of a "
                                 "known regularity or null")
            if not str(s["domain"] or "") or not str(s["text"] or ""):
                raise ValueError("domain and text must not be empty")
            drafts.append(Draft(str(s["domain"]).lower(), str(s["text"])[:300], evidence, against,
                                s.get("known"), s.get("replaces")))
        return drafts

    def strip(self, schemas, said):
        """Behaviour texts. A schema's text never changes, so it is asked for once."""
        new = [s for s in schemas if not s.behaviour]

        def check(data):
            return str(data["behaviour"] or "")
        found = self.ask("strip", [STRIP.format(text=s.text) for s in new], check)
        texts = {s.id: text or "" for s, text in zip(new, found)}
        return [s.behaviour or texts[s.id] for s in schemas]

    def name_core(self, members):
        def check(data):
            return str(data["text"])[:300] if data["text"] else ""
        return self.ask("core", [CORE.format(schemas="\n".join(f"{m.domain}: {m.text}" for m in members))], check)[0]

    def answer(self, memory, question, now):
        """-> (text, ids of the context)."""
        context = recall(memory, question, now)
        prompt = ANSWER.format(context=context.text or "(nothing)", question=question)
        reply = self.chat([[{"role": "user", "content": prompt}]])[0]
        self.calls += 1
        self.failures["answer"] += not reply  # not "no information": that would score as a right abstention
        return reply or "(no answer)", context.ids


@functools.cache
def sentence_encoder(name):
    """A sentence encoder's folder or hub id -> embed(texts) -> (n, d) unit rows: mean pooling over the tokens."""
    import torch
    from transformers import AutoModel, AutoTokenizer
    try:
        tok, model = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name).eval()
    except (OSError, ValueError) as error:
        raise DcpmError(f"--encoder {name}: no sentence encoder ({str(error).splitlines()[0]})") from error

    @torch.no_grad()
    def embed(texts):
        rows = []
        for start in range(0, len(texts), 32):
            batch = tok(texts[start:start + 32], padding=True, truncation=True, max_length=256, return_tensors="pt")
            hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][:, :, None]  # (B, T, d), (B, T, 1)
            rows.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(rows).numpy()
    return embed


# ------------------------------------------------------------------ words, dates, concepts
STOP = frozenset("""
    a an the and or but if so of in on at to for from by with as is am are was were be been being do does
    did done has had will i me my mine myself you your we our us he him his she her it its they them their
    this that these those there here what which who whom when where why how yes too very just also still now
    again really than then about into out up down over all any some more most s t re ve ll d m""".split())
MONTHS = "january february march april may june july august september october november december".split()
DATE = re.compile(rf"""\b(?:(?:on\ |by\ |since\ )?(?P<iso>\d{{4}}-\d\d-\d\d)
    |(?:back\ )?(?:in|since)\ (?:(?P<month>{'|'.join(MONTHS)})\ )?(?P<year>(?:19|20)\d\d)
    |(?P<week>last|next)\ week|(?P<day>yesterday|today|tomorrow))\b""", re.I | re.X)


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
    """Stemmed content words of a text, in order. "not" and its kin are never dropped."""
    found = re.findall(r"[a-z0-9]+(?:'s)?", text.lower().replace("’", "'").replace("n't", " not"))
    return [stem(w) for w in found if w not in STOP]


def key(text):
    """Two values are the same iff their keys are equal: case, articles, endings, dates do not count."""
    return " ".join(words(DATE.sub(" ", text)) or words(text))


def count_tokens(text):
    """The counter behind every budget: one per word, number or punctuation mark."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def date_window(text, today):
    """First time expression of `text` -> (first day, last day) as ISO strings, or None.

    `today` is the date of the *conversation*: against the wall clock old dialogues silently rot.
    """
    match = DATE.search(text)
    if not match:
        return None
    now = date.fromisoformat(today[:10])
    try:
        if match["iso"]:
            first = last = date.fromisoformat(match["iso"])
        elif match["year"]:
            month = MONTHS.index(match["month"].lower()) + 1 if match["month"] else 0
            first = date(int(match["year"]), month or 1, 1)
            last = (first + timedelta(31)).replace(day=1) - timedelta(1) if month else first.replace(month=12, day=31)
        elif match["week"]:
            first = now - timedelta(now.weekday() + (7 if match["week"].lower() == "last" else -7))
            last = first + timedelta(6)
        else:
            first = last = now + timedelta({"yesterday": -1, "today": 0, "tomorrow": 1}[match["day"].lower()])
    except ValueError:  # 2024-02-31: not a date after all
        return None
    return first.isoformat(), last.isoformat()


# Two rows are a pair of opposite poles: name | gloss | phrases that show it.
LEXICON = """
plans | plans ahead and prepares in detail | checklist, list, schedule, itinerary, spreadsheet, in \
advance, weeks ahead, timetable, plan ahead, mapped out, draw up, drew up, prepare, outline, agenda, ahead \
of time, step by step
improvises | improvises and decides on the spot | on a whim, spontaneous, last minute, spur of the moment, \
improvise, made it up, without a plan, wing it, winged it, on the fly, see what happen, no idea \
beforehand, unplanned
saves | saves money and looks for the cheaper way | cheap, cheaper, discount, second hand, coupon, \
bargain, on sale, budget, for free, haggle, borrow, save money, thrifty
spends | spends freely and takes the best there is | splurge, expensive, luxury, premium, top of the \
range, first class, treat myself, pay extra, paid extra, priciest, regardless of price, deluxe
alone | likes to do things alone | alone, by myself, on my own, solo, solitude, in peace, quiet corner, \
nobody around, without company
together | likes to do things with other people | together, with friend, group, invite, crowd, company of, \
whole gang, team up, teamed up, everyone, joined by
careful | is careful and avoids risk | careful, double check, safe, insurance, backup, spare, read the \
warning, just in case, cautious, helmet, twice before
daring | is daring and takes risks | risk, dare, without looking, deep end, gamble, threw caution, bold, \
thrill, adrenaline, dangerous, reckless, edge
routine | sticks to what is familiar | same as always, usual, the same, routine, habit, as ever, familiar, \
every time, tradition, old favourite, as before
novelty | looks for what is new | never tried, new kind, first time, experiment, exotic, something \
different, novel, curious, unknown, unusual, untested
makes | makes things by hand | from scratch, by hand, built, homemade, handmade, sewed, carved, diy, made \
my own, workshop, knitted, glued
buys | buys things ready-made | ready made, bought, store, order online, ordered, delivery, off the shelf, \
from the shop, prepackaged, catalogue, hired
exact | is exact and measures | exact, measure, precise, to the gram, to the minute, ruler, scale, \
stopwatch, decimal, count every, calibrate
rough | goes by feel, roughly | roughly, by feel, eyeball, more or less, guess, approximate, give or take, \
ballpark, by eye, rule of thumb
paper | prefers paper | paper, notebook, printed, pencil, handwritten, ink, sticky note, index card, \
fountain pen
digital | prefers digital tools | app, spreadsheet app, tablet, online tool, cloud, software, phone \
reminder, digital"""
_rows = [line.split(" | ") for line in LEXICON.strip().split("\n")]
POLES = {name: (_rows[i ^ 1][0], gloss) for i, (name, gloss, _) in enumerate(_rows)}  # name -> (opposite, gloss)
CUES = [(f" {' '.join(map(stem, cue.split()))} ", name) for name, _, cues in _rows for cue in cues.split(", ")]
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
    "pets": "dog puppy cat kitten vet leash aquarium",
    "photo": "photo camera portrait lens album darkroom"}
NOUNS = {stem(noun): domain for domain, nouns in DOMAINS.items() for noun in nouns.split()}


@functools.lru_cache(maxsize=100_000)
def poles_of(text):
    """Behaviour poles that a text shows, by lexicon."""
    padded = " " + " ".join(map(stem, re.findall(r"[a-z0-9]+", text.lower()))) + " "
    return tuple(sorted({pole for cue, pole in CUES if cue in padded}))


def domain_of(text):
    """The domain that most of the text's nouns belong to; "" if none."""
    hits = Counter(NOUNS[w] for w in words(text) if w in NOUNS)
    return max(sorted(hits), key=hits.get) if hits else ""


def features(text):
    """Words, and the concepts of the lexicon at three times the weight of a word."""
    return words(text) + 3 * [f"<{name}>" for name in (*poles_of(text), domain_of(text)) if name]


HASH = HashingVectorizer(analyzer=features, n_features=2 ** 15, alternate_sign=False, dtype=np.float32)
CONCEPTS = np.zeros(2 ** 15, bool)  # the columns of the concepts
CONCEPTS[HashingVectorizer(analyzer=str.split, n_features=2 ** 15).transform(
    [f"<{name}>" for name in (*POLES, *DOMAINS)]).indices] = True


def embed_words(texts):
    """texts -> (n, 32768) sparse unit rows: a hashed bag of stemmed words and concepts. No model, no download."""
    return HASH.transform(texts)


# ------------------------------------------------------------------ rules: a controlled English
# What the story, the tests and the miniature benchmark speak. Everything else in the first person is a free
# fact, found by its words. Reading real language is the model's job.
RELATIVES = "sister|brother|mother|father|wife|husband|partner|son|daughter|friend|neighbour|colleague|boss"
SUBJECT = re.compile(rf"^(?P<lead>.{{0,40}}?)\b(?:I|[Mm]y (?P<who>(?:{RELATIVES})\b(?: [A-Z][a-z]+\b)?)) (?P<rest>.+)$", re.S)
FRAMES = [(attribute, polarity, re.compile(rf"^(?:{pattern})$", re.I)) for attribute, polarity, pattern in (
    # attribute, polarity, predicate after the subject; group v is the value
    ("residence", 1, r"(?:live in|lives in|(?:am|is) (?:living |back )?in(?= [A-Z])|moved (?:back )?to) (?P<v>.+)"),
    ("employer", 1, r"(?:works? (?:at|for)|joined|started (?:working )?at|switched to) (?P<v>.+)"),
    ("employer", 0, r"(?:lost|quit|left) (?:my|his|her) job(?P<v>)"),
    ("partner", 1, r"(?:am|is) (?:married|engaged) to (?P<v>.+)"),
    ("diet", 1, r"(?:am|became) an? (?P<v>vegan|vegetarian)"),
    ("condition", 1, r"have (?P<v>migraines?|asthma|diabetes|insomnia|allergies)"),
    ("possession", 1, r"(?:have|has|own|bought|got|adopted) an? (?P<v>.+)"),
    ("possession", -1, r"(?:sold|lost|gave away) (?:my|his|her) (?P<v>.+)"),
    ("hobby", 1, r"(?:plays?|took up) (?P<v>.+)"),
    ("likes", 1, r"(?:likes?|loves?|enjoys?) (?P<v>.+)"),
    ("likes", -1, r"(?:dislikes?|hates?) (?P<v>.+)"),
    ("?", -1, r"(?:gave up|stopped|quit) (?P<v>.+)"),
    ("?", 1, r"(?:am|is) \w+ing (?P<v>.+?) again"),
)]
PAST = {"residence": r"(?:lived|was living) in (?P<v>.+)", "employer": r"worked (?:at|for) (?P<v>.+)"}  # with a date
PLAN = re.compile(r"^(?:am|is|will|plan to) (?P<v>.+)$", re.I)
NEGATOR = re.compile(r"^(?:no longer|never|used to|(?:(?:do|does|did|am|is) )?not(?: going to)?) ", re.I)
ADVERB = re.compile(r"^(?:(?:still|now|also|just|currently|really|finally) )+", re.I)
LEAD = re.compile(rf"^(?:and|but|so|now|well|these days|{DATE.pattern}|[\s,;])*$", re.I | re.X)
HEDGE = re.compile(r"\b(?:maybe|might|perhaps|thinking of)\b", re.I)
HYPOTHESIS = re.compile(r"\b(?:if|would|wish|imagine)\b", re.I)
QUALIFIER = re.compile(r"\b(?:especially|only|mostly|mainly|on weekends)\b", re.I)
FORGET = re.compile(r"^(?:please |could you |can you )*forget (?:that |about |everything about )?(.+)$", re.I)


def clauses(text):
    """(start, end, clause, is it a question?) of every clause; quoted speech is blanked out."""
    text = re.sub(r'"[^"]*"|“[^”]*”', lambda m: " " * len(m.group()), text)
    for sentence in re.finditer(r"(?:[.](?=\w)|[^.!?\n])+[.!?]*", text):
        start = sentence.start()
        for piece in re.split(r"(;|,? (?:and|but) (?=I\b|my\b))", sentence.group()):
            body, lead = piece.strip(" .,;!"), len(piece) - len(piece.lstrip(" .,;!"))
            if words(body):
                yield start + lead, start + lead + len(body), body, "?" in sentence.group()[-3:]
            start += len(piece)


def read_rules(turn):
    """Turn -> (claims, phrases to forget). An assistant claims nothing: a suggestion is no preference."""
    claims, forget = [], []
    for start, end, body, question in clauses(turn.text) if turn.speaker != "assistant" else ():
        if (found := FORGET.match(body)) and (not question or body[:1] in "CcPp"):
            forget.append(found.group(1))
        elif not question and (claim := read_clause(body, turn.speaker, turn.t)):
            claim.span, claim.text = (start, end), turn.text[start:end]
            claims.append(claim)
    return claims, forget


def read_clause(body, me, t):
    """One clause -> Claim, or None (no subject that we know, or only a hypothesis)."""
    full = re.sub(r"\bI'm\b", "I am", body.replace("’", "'").replace("don't", "do not"))
    full = re.sub(r"\bI'll\b", "I will", re.sub(r"\bI've\b", "I have", full))
    match = SUBJECT.match(full)
    if not match or HYPOTHESIS.search(full):
        return None
    subject = me if not match["who"] else match["who"] if me == "user" else f"{me}'s {match['who']}"
    told, window = dict(text=body, subject=subject, t_event=t, reliability=0.9 if subject == me else 0.4), date_window(full, t or "2000-01-01")
    if HEDGE.search(full):  # an attribute of its own: never touches a chain
        return Claim("maybe", body, **{**told, "reliability": min(0.6, told["reliability"])})
    rest = ADVERB.sub("", match["rest"])
    negated = NEGATOR.match(rest)
    rest, sign = (ADVERB.sub("", rest[negated.end():]), -1) if negated else (rest, 1)
    if window and window[1] >= t[:10] and (plan := PLAN.match(rest if sign > 0 else f"am {rest}")):
        return Claim("plan", tidy(plan["v"]), polarity=sign, until=window[1], **told)
    if window and window[1] < t[:10]:  # only a date in the past moves the event
        told["t_event"] = window[0]
    undated = " ".join(DATE.sub(" ", rest).split())
    dated = [(a, 1, re.compile(f"^{p}$", re.I)) for a, p in PAST.items()] if window and told["t_event"] != t else []
    for attribute, polarity, pattern in [*FRAMES, *dated] if LEAD.match(match["lead"]) else ():
        if hit := pattern.match(undated):
            value = tidy(hit["v"])
            if polarity and not key(value) or attribute in ("residence", "employer") and not value[:1].isupper() and polarity:
                continue  # "I joined a gym" is no job
            return Claim(attribute, value, polarity=polarity * sign, detail=bool(QUALIFIER.search(rest)),
                         layer="identity" if attribute in ("likes", "diet") else "fact", **told)
    return Claim("event", full, **told)  # no frame fits: the whole clause, with its "not"


def tidy(value):
    """Cut what is not the value: dates, reasons, qualifiers, articles."""
    value = re.split(rf",| because | so that |{QUALIFIER.pattern}", DATE.split(value)[0])[0].strip(" .!,")
    return re.sub(r"^(?:the|an?|my|some) ", "", re.sub(r" (?:anymore|too|now|on|in)$", "", value), flags=re.I)


ASK = {  # attribute -> how a question asks for it
    "residence": r"\b(?:live|lived|moved? to)\b", "employer": r"\b(?:work|employer|job)\b",
    "partner": r"\b(?:partner|married|engaged)\b", "diet": r"\bdiet\b"}


def asked_about(question):
    """Single-valued attributes that a question is about."""
    return [a for a, pattern in ASK.items() if re.search(pattern, question, re.I)]


def people_in(store, question):
    """Whom a question is about: people known here by name or kinship, else the first speaker; [] if a stranger."""
    known = dict.fromkeys([*store.people, *(slot[0] for slot in store.heads)])
    asked = set(re.findall(r"\w+", question.lower()))
    named = [p for p in known if p != "user" and asked & set(p.lower().split())]
    # "Where does Tom live?" must not be answered with where the user lives.
    stranger = re.search(rf"\b[Mm]y (?:{RELATIVES})\b|\b(?:does|did|is|was|has) (?!I\b)[A-Z]\w+", question)
    return named or ([] if stranger else store.people[:1])


class Rules:
    """The same jobs without a model: for the story, the tests and the miniature benchmark."""

    def extract(self, turns, earlier):
        return [read_rules(turn) for turn in turns]

    def reconcile(self, memory, claims):
        """Nothing to do: a frame names its slot."""

    def induce(self, clusters, noise, known):
        """One cluster gives at most one draft: domain and behaviour are what most of its sentences show.

        Facts in no cluster give none, so that what DBSCAN finds decides.
        """
        pool, text_of = [b for group in [*clusters, noise] for b in group], {s.text: s.id for s in known}
        for cluster in clusters:
            person = called(cluster[0].slot[0])
            domains = Counter(d for b in cluster if (d := domain_of(b.text)))
            poles = Counter(p for b in cluster for p in poles_of(b.text))
            if domains and poles:
                domain, pole = (max(sorted(c), key=c.get) for c in (domains, poles))
                text, reverse = (f"In {domain}, {person} {POLES[p][1]}." for p in (pole, POLES[pole][0]))
                against = [b.id for b in pool if domain_of(b.text) == domain and POLES[pole][0] in poles_of(b.text)]
                evidence = [b.id for b in cluster if b.id not in against]
                yield Draft(domain, text, evidence, against, text_of.get(text), text_of.get(reverse))

    def strip(self, schemas, said):
        """The cluster's own sentences without the nouns of their domain, so that V_beh is made of real words."""
        return ["\n".join(" ".join(w for w in re.findall(r"[\w']+", text) if NOUNS.get(stem(w.lower())) != s.domain)
                          for text in texts) for s, texts in zip(schemas, said)]

    def name_core(self, members):
        """The gloss of most members, without a domain, so that it never ages."""
        gloss = Counter(m.text.split(", ", 1)[1] for m in members).most_common(1)[0][0]
        return f"In unrelated parts of life, {gloss}"

    def answer(self, memory, question, now):
        """An answer from the chains, or the best line of context, or "I don't know". -> (text, ids)."""
        lines, q, people = memory.recall(question, now).lines, set(words(question)), people_in(memory, question)
        if re.search(r"coming up|my plans|planned", question, re.I):
            items = [n for n in lines if n.channel == "intention"]
            return "; ".join(n.text for n in items) or "Nothing that I know of.", [n.id for n in items]
        slots = [(p, a, None) for p in people for a in asked_about(question)]
        slots += [s for s in memory.heads if s[0] in people and s[2] and s[1] not in ("event", "maybe", "plan")
                  and set(s[2].split()) <= q]
        for slot in slots:
            if chain := memory.visible(slot):
                return answer_from_chain(memory, slot, chain, question, now)
        best = max((n for n in lines if people), key=lambda n: len(q & set(words(n.text))), default=None)
        return (best.text, [best.id]) if best and q & set(words(best.text)) else ("I don't know.", [])


def answer_from_chain(memory, slot, chain, question, now):
    head, window = chain[-1], date_window(question, now)
    if re.search(r"\bchanged?\b|\bover time\b", question, re.I):
        return chain_line(memory, slot).text, [b.id for b in chain]
    if re.match(r"why\b", question, re.I):
        return f"{head.reason or 'no reason given'} — “{quote(memory, head.sources[0])}”", [head.id]
    if window and window[1] < now[:10]:
        node = as_of(memory, slot, window[1])
        return (node.value, [node.id]) if node else ("I don't know.", [])
    if re.search(r"\bbefore\b|\bprevious", question, re.I):  # one link back; a refinement is no earlier state
        known = [b for b in chain if b.link_kind != "refine" and b.value]
        at = next((i for i, b in enumerate(known) if key(b.value) in key(question)), len(known) - 1)
        return (known[at - 1].value, [known[at - 1].id]) if at > 0 else ("Nothing before that.", [])
    if head.status != "active":  # what came after it was to be forgotten
        return "I don't know.", []
    if re.match(r"(?:do|does|am|is|have|has)\b", question, re.I) and set(words(head.value)) <= set(words(question)):
        return f"{'Yes' if head.polarity == 1 else 'No'}, since {head.t_event[:10]}.", [head.id]
    return (head.text if slot[2] else head.value or "Nothing."), [head.id]


def called(person):
    return "the user" if person == "user" else person


# ------------------------------------------------------------------ the story
STORY = """
2024-01-08|I live in Paris. I work at Acme. My sister Ann moved to Oslo.
2024-01-20|I wrote a checklist for the dinner. I like coffee.
2024-02-03|I drew up an itinerary for the flight. I run alone.
2024-02-17|I prepared the report weeks ahead. I mapped out the cake step by step.
2024-03-02|I moved to Berlin because Acme closed in Paris. I went to the gym by myself.
2024-03-16|I booked the hotel in advance. I borrowed a guitar. I made an agenda for the meeting. I have migraines.
2024-03-30|I had a list for the stew. I did the race solo. I still live in Berlin.
2024-04-13|Back in 2021 I lived in Rome. I had a schedule for the journey. Maybe I'll move to Lima.
2024-04-27|I made a timetable for the project. I gave up coffee. I'm flying to Rome on 2024-06-10.
2024-05-11|I got a concert ticket on sale. I haggled over a piano. Please forget that I have migraines."""


def tell_story(memory):
    """One persona, ten sessions, one night: what is written, revised, generalised and forgotten, and why."""
    print("1. By day every message is kept verbatim, read, and reconciled with what is already believed.\n")
    told = [line.split("|") for line in STORY.strip().split("\n")]
    for (day, text), ops in zip(told, memory.ingest([(text, day, day, "user") for day, text in told])):
        print(f'   {day}  "{text}"\n{" " * 15}{", ".join(f"{op} {id_}" for op, id_ in ops)}')
    print("\n2. A revised belief is a chain, not an overwritten row; Rome, told last, was spliced in:\n")
    if line := chain_line(memory, ("user", "residence", None)):
        print(f"   {line.text}\n")
    memory.sleep("2024-05-12")
    for question in ("Where do I live?", "Where did I live before Berlin?", "Why do I live in Berlin?",
                     "Do I like coffee?", "Where does my sister live?", "What is coming up?",
                     "Do I have migraines?"):
        text, ids = memory.answer(question, "2024-05-12")
        print(f"   {question:33} {text}   {', '.join(ids[:4])}")
    print("\n3. By night clusters of facts become schemas, schemas alike in behaviour and unlike in content a core.")
    for pairs, alike, low, high in memory.gate.values():
        print(f"   Gate: of {pairs} pairs across domains {alike} are alike in behaviour (cosine {low:.2f} or more), "
              f"the others at most {high:.2f}; the limit is {memory.limits.alike:.2f}.")
    print()
    for node in [*memory.schemas.values(), *memory.cores.values()]:
        print(f"   [{node.id}] {node.text} ({node.status}, {node.confidence:.2f}, {len(node.evidence)} beliefs)")
    question = "How should I get ready for my first aquarium?"
    print(f"\n4. The context for a question about a domain that never came up: {question}\n")
    for line in memory.recall(question, "2024-05-12", 50).lines:
        print(f"   {line}")
    for core in list(memory.cores)[:1]:
        print(f"\n5. Why does it believe that? why({core!r}), down to the words that were said:\n")
        print(f"   {memory.cores[core].text}")
        for schema in memory.why(core)["because"]:
            print(f"     because [{schema['id']}] {schema['text']}")
            for belief in schema["because"][:2]:
                for source in belief["because"]:
                    print(f"       because [{belief['id']}] {source['t']}: “{source['text']}”")
    print(f"\n   broken invariants: {memory.check() or 'none'}\n")
    print("What is each mechanism worth?         python tests/bench_dcpm.py\n"
          "LoCoMo, LongMemEval, PersonaMem:      python tests/bench_dcpm_corpora.py --data FILE")


def fail(message):
    """One sentence on stderr, exit code 2."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def memory_parser(description):
    """The flags of every script that makes memories."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=description)
    parser.error = fail
    parser.add_argument("--encoder", default="words", help="'words', or a sentence encoder: folder or hub id")
    parser.add_argument("--backend", default="rules", choices=["rules", "llm"])
    parser.add_argument("--model", default="", help="llm: a Hugging Face chat model, a folder, or a server's URL")
    parser.add_argument("--model_name", default="", help="llm: the server's name of the model")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="llm: longest reply")
    return parser


def make_memory(args):
    """Flags -> a function that makes an empty Memory; a model is loaded once."""
    if (args.backend == "llm") != bool(args.model):
        raise DcpmError("--backend llm and --model NAME go together")
    backend = None
    if args.model:
        import common
        backend = LLM(common.chat_backend(args.model, args.model_name, args.max_new_tokens))
    return functools.partial(Memory, backend, args.encoder)


def main(argv=None):
    args = memory_parser(__doc__.split("\n")[0]).parse_args(argv)
    try:
        tell_story(make_memory(args)())
    except (DcpmError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main()
