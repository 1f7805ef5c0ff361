"""DCPM: an agent memory that says why it believes something (dual-process memory, arXiv 2606.09483).

    python dcpm.py                                                  the story of one user, no download
    python dcpm.py --backend llm --model DIR_OR_URL --encoder DIR   the same, read by a chat model

1. Memory is ordered by what it can do: raw turns -> facts -> belief trajectories -> domain schemas and
   intentions -> core schemas.
2. By day, System1 runs inside every write: keep the turn verbatim, extract claims, reconcile each with the
   chain of its slot. A revision never overwrites: it becomes the new head of a doubly linked chain.
3. By night, System2 clusters the facts by their vectors and induces schemas: one habit in one domain.
4. Its sweep looks for *collisions*, schemas of different domains alike in behaviour and unlike in content
   (that is not contradiction), and lifts them into core schemas, which also speak for domains never seen.
5. Reading asks no model: vectors plus following links, within a token budget, an id on every line;
   `why(id)` walks from a core schema down to the words that were said.

In the paper: 2.1 `Turn` to `Store`; 2.2 `decide`, `write_claims`; 2.3 `two_stage_dbscan`, `plan_schemas`,
`collisions`, `plan_cores`; 2.4 `search`, `recall`. What needs language is a backend of a few jobs: `LLM`, or
`Rules` for a controlled English. One `Memory` holds one user; for many, keep a dictionary of memories.

| the paper (partly as its authors' code has it) | here |
| --- | --- |
| a language model extracts and reconciles | rules; with --backend llm it proposes, the same table decides |
| a dense encoder, thresholds unknown | hashed words and concepts, or --encoder; LIMITS for each |
| a refinement shadows the old text, unlinked | it stays linked, as "refine" |
| list-valued links; schemas never revisited | single links that cannot fork; support recounted every night |
| a claim told late becomes the head | spliced in by event time; the head stays |

Left out: identity as a layer of its own (a taste is a fact like others), session summaries, cores above
cores, merging near-twin schemas, vector stores, intentions marked fulfilled, erasure ("forget" suppresses).
The memory is saved as its audit log.
"""
import argparse
import copy
import functools
import hashlib
import json
import math
import re
import sys
from collections import ChainMap, Counter, namedtuple
from dataclasses import asdict, dataclass, field
from datetime import date, timedelta
from pathlib import Path

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import DBSCAN
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.metrics.pairwise import linear_kernel as cosines  # unit rows (n, d), (m, d) -> (n, m)
from sklearn.preprocessing import normalize


# ------------------------------------------------------------------ 2.1 records
# One message, verbatim, append-only. speaker: "user", "assistant" or a name; t: its ISO date or date-time.
Turn = namedtuple("Turn", "id session speaker text t")


@dataclass
class Claim:
    """What an extractor read in a turn, not yet a belief."""
    attribute: str
    value: str
    text: str = ""
    span: tuple = ()  # (start, end) in the turn's text
    subject: str = "user"
    polarity: int = 1  # +1 holds, -1 no longer / dislikes, 0 taken back with nothing in its place
    t_event: str = ""
    reliability: float = 0.9  # 0.4 about another person
    until: str = ""  # last day of a plan
    slot: tuple = None  # set when a model has matched the claim to a chain


@dataclass
class Belief:
    """A claim that entered the store. `prev` and `next` make the chain of its slot."""
    id: str
    slot: tuple  # (subject, attribute, member): the dimension on which two claims exclude each other
    value: str
    polarity: int
    text: str
    t_event: str  # when it became true
    t_seen: str  # when the memory learnt it. Two clocks: bi-temporal
    sources: list  # [(turn id, start, end, reliability)], never empty, only grows
    until: str = ""
    prev: str = None
    next: str = None
    link_kind: str = None  # "supersede" or "refine": why `prev` exists
    confidence: float = 0.0
    status: str = "active"  # active <=> next is None and not suppressed; else superseded or suppressed


@dataclass
class Node:
    """What the night finds. Its text never changes, its evidence does."""
    id: str
    subject: str
    domain: str  # of a schema
    text: str
    created: str
    evidence: list = field(default_factory=list)  # beliefs that ever supported it
    against: list = field(default_factory=list)  # beliefs that showed the opposite in this domain
    confidence: float = 0.0
    status: str = "forming"


@dataclass
class Schema(Node):
    """One behavioural regularity inside one domain: forming, stable, contested, dormant or withdrawn."""
    behaviour: str = ""  # the text without the nouns of its domain: what V_beh embeds
    replaces: str = None  # the schema whose opposite it is


@dataclass
class Core(Node):
    """A regularity behind schemas of different domains: stable, dormant or withdrawn."""
    members: list = field(default_factory=list)  # schema ids, only grows; evidence is the union of theirs


@dataclass
class Intention(Node):
    """One future action with an end: open, expired or withdrawn. Wishes and values are not intentions."""
    until: str = ""


KINDS = {"schemas": Schema, "cores": Core, "intentions": Intention}
# One line of the audit log. The log *is* the memory: replayed, it gives the same store.
Event = namedtuple("Event", "op ids turn reason data")


class DcpmError(Exception):
    """A write that would break an invariant, or a file that cannot be read; nothing has been changed."""


def digest(*parts):
    """Eight hex digits, the same on every machine: what System2 finds again gets the same id."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()[:8]


def holds(belief):
    return belief.status == "active" and belief.polarity == 1


# ------------------------------------------------------------------ the store: the only place that sets links
class Store:
    """All records of one user. Every change is one event: checked first, then applied as a whole."""
    fresh = True  # has anything been written since the last night?

    def __init__(self, log=()):
        self.log, self.clock = [], ""  # the latest turn's time; nothing reads the wall clock
        self.turns, self.beliefs, self.heads = {}, {}, {}
        self.schemas, self.cores, self.intentions = {}, {}, {}
        self.hidden = set()  # turns never to be shown: they say what was asked to be forgotten
        self.people = []  # who speaks here, not the assistant: System2 may generalise about them
        self.docs = []  # (id, text, place of the turn before it or -1): what can be searched
        self.last_turn = {}  # session -> place of its last turn in docs
        for op, ids, turn_id, reason, data in log:
            self.commit(op, ids, turn_id, reason, **data)

    def commit(self, op, ids=(), turn_id="", reason="", **data):
        """Apply one event, then log it: the only way that anything here changes."""
        if op == "RAW":
            turn = Turn(*data["turn"])
            self.turns[turn.id], self.clock = turn, max(self.clock, turn.t)
            if turn.speaker not in ("assistant", *self.people):
                self.people.append(turn.speaker)
            self.docs.append((turn.id, turn.text, self.last_turn.get(turn.session, -1)))
            self.last_turn[turn.session] = len(self.docs) - 1
        elif op == "CONFIRM":
            belief = self.beliefs[ids[0]]
            belief.sources.append(tuple(data["source"]))
            belief.t_event = data.get("t_event", belief.t_event)
            self._weigh(belief)
        elif op == "SUPPRESS":
            for id_ in ids:
                self.beliefs[id_].status = "suppressed"
                self.hidden.update(source[0] for source in self.beliefs[id_].sources)
            self.hidden.update(data["hide"])
        elif op == "SLEEP":
            for kind, cls in KINDS.items():
                getattr(self, kind).update({n["id"]: cls(**n) for n in data[kind]})
        elif op != "FAILED":  # which only records that a model gave nothing usable
            self._insert(Belief(**data["belief"]))
        self.fresh = op != "SLEEP"
        self.log.append(Event(op, list(ids), turn_id, reason, data))

    def _insert(self, belief):
        """Put a belief between its neighbours: all four links or none, and never a second head."""
        belief.slot, belief.sources = tuple(belief.slot), [tuple(s) for s in belief.sources]  # JSON has lists
        # They must still be neighbours: two writers who read one head cannot both append to it.
        ids = [b.id for b in self.chain(belief.slot)]
        if (belief.prev, belief.next) not in zip([None, *ids], [*ids, None]) or belief.id in self.beliefs:
            raise DcpmError(f"{belief.id} would fork the chain of {belief.slot}; read its head again")
        if before := self.beliefs.get(belief.prev):
            before.next = belief.id
            before.status = "superseded" if before.status == "active" else before.status
        if after := self.beliefs.get(belief.next):
            after.prev, after.link_kind, belief.status = belief.id, "supersede", "superseded"
        else:
            self.heads[belief.slot] = belief.id
        self.beliefs[belief.id] = belief
        self.docs.append((belief.id, belief.text, -1))
        self._weigh(belief)

    def _weigh(self, belief):
        # confidence = 1 - product over sessions of (1 - best reliability in it), at most 0.99: noisy-or
        # by session, the best one stays: saying it twice in one sitting adds nothing
        best = {self.turns[s[0]].session: s[3] for s in sorted(belief.sources, key=lambda s: s[3])}
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

    def as_of(self, slot, t):
        """What held on day `t`: the last node of an event time not after it. None: unknown or forgotten."""
        node = next((b for b in self.chain(slot)[::-1] if b.t_event[:10] <= t[:10]), None)
        return node if node and node.status != "suppressed" else None

    def said(self, belief):
        """The words in which it was told. System2 reads these: in a model's version all facts begin alike."""
        turn, start, end, _ = belief.sources[0]
        return self.turns[turn].text[start:end]


# ------------------------------------------------------------------ one embedding for reading and System2
# Cosine limits belong to an encoder: mpnet puts paraphrases of a behaviour at .39-.76, so .70 finds nothing.
# cluster, tight: the two stages of DBSCAN; alike, unlike: a collision (2.3; the authors' .70 and .60);
# hit: least score of a search result; own: a schema of the question's domain; near: a chain to reconcile
Limits = namedtuple("Limits", "cluster tight alike unlike hit own near")
LIMITS = {"words": Limits(0.55, 0.75, 0.70, 0.60, 0.05, 0.3, 0.3),
          "mpnet": Limits(0.45, 0.60, 0.45, 0.75, 0.2, 0.25, 0.65)}


class Vectors:
    """Unit vectors of texts, each embedded once. Questions are not kept: reading must change nothing."""

    def __init__(self, embed):
        self.embed, self.row, self.matrix, self.indexed = embed, {}, None, 0

    def __call__(self, texts):
        """texts -> (n, d), dense or sparse as the encoder gives them."""
        if new := [t for t in dict.fromkeys(texts) if t not in self.row]:
            block = self.embed(new)                                                 # (new, d)
            stack = sparse.vstack if sparse.issparse(block) else np.concatenate
            self.matrix = block if self.matrix is None else stack([self.matrix, block])
            self.row.update(zip(new, range(len(self.row), len(self.row) + len(new))))
        return self.matrix[[self.row[t] for t in texts]]

    def index(self, docs):
        """The store's docs -> what `search` needs of them, made anew only when something was written."""
        if self.indexed < len(docs):
            self.indexed = len(docs)
            self.docs = self([text for _, text, _ in docs])                         # (docs, d)
            self.before = np.array([place for _, _, place in docs])                 # (docs,)
            if sparse.issparse(self.docs):
                # idf(w) = 1 + ln((N + 1) / (n + 1))
                counts = np.bincount(self.docs.indices, minlength=self.docs.shape[1])   # (d,)
                self.idf = 1 + np.log((len(docs) + 1) / (counts + 1))               # (d,)
                self.lengths = np.sqrt(self.docs.power(2) @ SCALE)                  # (docs,)
        return self


# ------------------------------------------------------------------ 2.2 System1: inside every write
STRICT = "You maintain the memory of an assistant. Reply with one JSON object and nothing else."
# One sample reply, on one line: without it a small model leaves out the quote and indents the JSON. What was
# said before comes after the task: in front of it, a small model makes claims of that.
EXTRACT = """List each claim of the new message about {speaker} or people around them, one per event, no
hypotheses.
"subject" is whom it is about. "attribute" is residence (a place), employer (a company), occupation (a
profession), name (their own), partner, diet, likes, hobby, possession, condition (health), plan (with a date)
or event (all else that was done or happened). "polarity" is 1 if it holds, -1 if no longer or disliked.
"quote" is copied word for word from the new message. "forget" lists what it asks to forget.
Sample reply to "I moved to Rome, Opel hired me. My sister Eva sold her car. At work I tidied up twice.":
{{"claims": [{{"subject": "user", "attribute": "residence", "value": "Rome", "polarity": 1, \
"text": "The user moved to Rome, hired by Opel.", "quote": "I moved to Rome"}}, \
{{"subject": "user", "attribute": "employer", "value": "Opel", "polarity": 1, \
"text": "The user works for Opel.", "quote": "Opel hired me"}}, \
{{"subject": "sister Eva", "attribute": "possession", "value": "car", "polarity": -1, \
"text": "Sister Eva sold her car.", "quote": "My sister Eva sold her car"}}, \
{{"subject": "user", "attribute": "event", "value": "tidied up", "polarity": 1, \
"text": "The user tidied up twice at work.", "quote": "At work I tidied up twice"}}], "forget": []}}

Earlier messages, done already, only to understand the new one:
{before}

New message by {speaker} on {t}:
<message>
{text}
</message>"""
RECONCILE = """Which new items are about the same thing as a known one? For each of these give "item", its
number, "id", that of the known one, and "op": "CONFIRM" (the same again), "REFINE" (the same in more detail)
or "SUPERSEDE" (both cannot be true now). Leave out all others: two likes can coexist, two events are two
events, and none is a good answer.
Sample reply to the known "[b4] The user likes tea. [b9] The user ran in the park." and the new "0. The user
ran at the lake. 1. The user quit tea.": {{"operations": [{{"item": 1, "id": "b4", "op": "SUPERSEDE"}}]}}

Known, newest version last:
{chains}

New items:
{items}"""
SINGLE = ("residence", "employer", "occupation", "name", "partner", "diet")  # one value at a time
ATTRIBUTES = (*SINGLE, "likes", "hobby", "possession", "condition", "plan", "event")


def slot_of(store, claim):
    """The dimension a claim speaks about: single-valued attributes have one chain, others one per value."""
    subject, attribute, value = claim.subject, claim.attribute, key(claim.value)
    if claim.slot:
        return claim.slot
    if attribute in SINGLE:
        head = store.head((subject, attribute, None))
        if claim.polarity != -1 or (head and key(head.value) == value):
            return subject, attribute, None
        attribute = "event"  # "I no longer live in Rome" does not end Paris
    if attribute == "event":  # a free fact: only the same sentence confirms it, none excludes it
        return subject, attribute, " ".join(re.findall(r"\w+", claim.text.lower()))
    return subject, attribute, value


def same(a, b):
    """Do two claims or beliefs of one slot say the same? A plan with another date does not."""
    return (key(a.value), a.polarity, a.until) == (key(b.value), b.polarity, b.until)


def decide(store, claim, slot):
    """The decision table: claim c against head h of its slot, the first row that fits.
    -> (op, the belief that is confirmed or comes before, the belief that comes after)

        no head                                   ADD
        the same value, asked to be forgotten     CONFIRM: whatever is said about it now, it stays forgotten
        t(c) >= t(h), other value or polarity     SUPERSEDE, or RETRACT if c denies or takes back: a new head
        t(c) >= t(h), the same in more words      REFINE: a new head that keeps what the old one rests on
        t(c) >= t(h), the same                    CONFIRM: one more source, no new node
        t(c) <  t(h), equals a neighbour in time  CONFIRM that neighbour
        t(c) <  t(h)                              SPLICE: goes in where it belongs, the head stays

    Slot and polarity, never similarity: cosine cannot tell "likes coffee" from "no longer likes coffee".
    Told in time, only the head counts as a duplicate: A, then B, then A again are three nodes.
    """
    head = store.head(slot)
    if head is None:
        return "ADD", None, None
    if head.status == "suppressed" and key(head.value) == key(claim.value):
        return "CONFIRM", head, None
    if claim.t_event >= head.t_event:
        if not same(head, claim):
            return "RETRACT" if claim.polarity < 1 else "SUPERSEDE", head, None
        old, new = (set(words(DATE.sub("", text))) for text in (head.text, claim.text))
        return "REFINE" if old < new else "CONFIRM", head, None
    # Told late. Making it the head, as the authors' code does, would bring back the past as the present.
    after = next(b for b in store.chain(slot) if b.t_event > claim.t_event)
    before = store.beliefs.get(after.prev)
    for neighbour in (before, after):
        if neighbour and same(neighbour, claim):
            return "CONFIRM", neighbour, None
    return "SPLICE", before, after


def write_claims(store, turn, claims):
    """Reconcile and apply the claims of one turn, one after the other. -> [(op, id)]."""
    ops = []
    for claim in claims:
        claim.t_event = claim.t_event or turn.t
        slot, source = slot_of(store, claim), (turn.id, *claim.span, claim.reliability)
        op, old, after = decide(store, claim, slot)
        if op == "CONFIRM":
            if turn.id in [s[0] for s in old.sources]:
                continue  # said twice in one turn: a sentence cannot confirm itself
            # Told again with an earlier date: it was true since then, but not before its predecessor.
            earliest = store.beliefs[old.prev].t_event if old.prev else ""
            moved = {"t_event": claim.t_event} if earliest <= claim.t_event < old.t_event else {}
            store.commit(op, [old.id], turn.id, source=source, **moved)
        else:  # only a refinement takes over the sources of its predecessor, behind its own
            sources = [source, *old.sources] if op == "REFINE" else [source]
            node = Belief(f"b{len(store.beliefs) + 1}", slot, claim.value, claim.polarity, claim.text,
                          claim.t_event, turn.t, sources, claim.until, old and old.id, after and after.id,
                          old and ("refine" if op == "REFINE" else "supersede"))
            store.commit(op, [node.id], turn.id, belief=asdict(node))
        ops.append((op, store.log[-1].ids[0]))
    return ops


# ------------------------------------------------------------------ 2.3 System2: while nobody is waiting
# "evidence" before "text": a small model that begins with the sentence copies one fact.
INDUCE = """Most of the facts below may show one habit, in one area of life. "evidence" lists the ids of all
facts that show it, at least three, of different days; "against" those that show its opposite, mostly none.
"domain" is the area of life. "text" says in twenty words when, what {person} always does, and why. No habit
is a good answer, too.
Sample reply to "[b3] The user asked three friends which vet is best. [b4] The user rang two breeders about
dog food. [b7] The user asked a trainer and a neighbour before puppy school. [b9] The user cut the lawn.":
{{"schemas": [{{"evidence": ["b3", "b4", "b7"], "against": [], "domain": "pets", \
"text": "When the dog needs something, the user asks several people first, to be sure."}}]}}

Facts about {person}:
{facts}"""
KNOWN = """

Habits known already:
{known}
Where the facts show one of them again, add "known": its id; where now the opposite, "replaces": its id."""
STRIP = """A habit in one area of life:
{text}

Say it as a style for any area of life: no noun of its area, only how the person goes about things and why.
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
    """Rows (n, d) -> labels (n,), -1 is noise: clusters of 3 at `cluster`; over 12, again of 2 at `tight`."""
    labels = DBSCAN(eps=1 - limits.cluster, min_samples=3, metric="cosine").fit_predict(vectors)
    for label in range(labels.max() + 1):
        inside = np.flatnonzero(labels == label)
        if len(inside) <= 12:
            continue
        sub = DBSCAN(eps=1 - limits.tight, min_samples=2, metric="cosine").fit_predict(vectors[inside])
        if sub.max() > 0:  # leftovers join the nearest sub-cluster
            sums = np.eye(sub.max() + 1)[:, sub] * (sub >= 0)                       # (sub-clusters, inside)
            means = sums / sums.sum(1, keepdims=True) @ vectors[inside]             # (sub-clusters, d)
            nearest = cosines(vectors[inside], means).argmax(1)                     # (inside,)
            labels[inside] = labels.max() + 1 + np.where(sub >= 0, sub, nearest)
    return labels


def recount(schema, store):
    """Count again what supports a schema: s chains that hold and show it, x that show the opposite."""
    live = [store.beliefs[i] for i in schema.evidence if holds(store.beliefs[i])]
    s = len({b.slot for b in live})  # a chain counts once, by its head
    x = len({store.beliefs[i].slot for i in schema.against if holds(store.beliefs[i])})
    # confidence = (s + 1) / (s + x + 2): Laplace's rule of succession
    schema.confidence = round((s + 1) / (s + x + 2), 4)
    schema.status = "stable" if schema.confidence >= 0.65 else "contested"
    if s < 3 or len({store.turns[source[0]].session for b in live for source in b.sources}) < 2:
        schema.status = "forming" if s >= 2 else "dormant"


def plan_schemas(memory, now, schemas, fresh):
    """Bring `schemas` up to date: new ones, more evidence, all recounted."""
    for person in memory.people if fresh else ():
        known = [s for s in schemas.values() if s.subject == person]
        facts = [b for b in memory.beliefs.values()
                 if holds(b) and b.slot[0] == person and b.slot[1] not in ("plan", *SINGLE)]
        if not facts:
            continue
        labels = two_stage_dbscan(memory.vectors(list(map(memory.said, facts))), memory.limits)  # (facts,)
        groups = [[b for b, at in zip(facts, labels) if at == label] for label in range(-1, labels.max() + 1)]
        for draft in memory.backend.induce(memory, [g for g in groups[1:] if g], groups[0], known):
            id_ = draft.known or "s" + digest(person, draft.domain, draft.text)
            if id_ not in schemas and len(draft.evidence) < 2:
                continue
            schema = schemas.setdefault(id_, Schema(id_, person, draft.domain, draft.text, now))
            schema.evidence = sorted({*schema.evidence, *draft.evidence})
            schema.against = sorted({*schema.against, *draft.against} - {*schema.evidence})
            schema.replaces = draft.replaces or schema.replaces
    for schema in schemas.values():
        recount(schema, memory)


def collisions(behaviour, content, domains, limits):
    """V_beh (n, d), V_con (n, d) -> (n, n): alike in the first alone. NOT contradictions."""
    # collide: cos(V_beh) > 0.70 and cos(V_con) < 0.60 and the domains differ (2.3)
    alike, unlike = cosines(behaviour, behaviour), cosines(content, content)        # (schemas, schemas)
    apart = np.array(domains)[:, None] != np.array(domains)[None, :]                # (schemas, schemas)
    return (alike > limits.alike) & (unlike < limits.unlike) & apart


def collision_groups(collide):
    """Merge what is linked; drop who collides with less than half of the group: merging is transitive."""
    count, labels = connected_components(collide, directed=False)                   # labels: (schemas,)
    for group in (np.flatnonzero(labels == label) for label in range(count)):
        while (degree := collide[np.ix_(group, group)].sum(0)).min() < (len(group) - 1) / 2:  # (group,)
            group = np.delete(group, degree.argmin())
        if len(group) > 1:
            yield group.tolist()


def sweep(memory, now, cores, stable):
    """Find collisions between the stable schemas of one person and lift them into `cores`."""
    # V_beh is the direction of the mean over a schema's sentences: as one text the longest would decide.
    parts = [memory.vectors(s.behaviour.split("\n")) for s in stable]               # [(sentences, d)]
    behaviour = normalize(np.vstack([np.asarray(part.sum(0)).ravel() for part in parts]))  # (schemas, d)
    content, domains = memory.vectors([s.text for s in stable]), np.array([s.domain for s in stable])
    # The gate, told by the story: how far alike and unlike pairs across domains lie apart.
    memory.gate[stable[0].subject] = cosines(behaviour, behaviour)[np.triu(domains[:, None] != domains)]
    for group in collision_groups(collisions(behaviour, content, domains, memory.limits)):
        members, ids = [stable[i] for i in group], {stable[i].id for i in group}
        known = [c for c in cores.values() if ids & set(c.members)]
        if not known:
            text = memory.backend.name_core(members)
            if not text:  # a null answer is allowed: no core
                continue
            core = Core("c" + digest(members[0].subject, text), members[0].subject, "", text, now)
            known = [cores.setdefault(core.id, core)]
        # The core that shares most members, then the oldest: never whichever comes first.
        min(known, key=lambda c: (-len(ids & set(c.members)), c.created, c.id)).members += ids


def plan_cores(memory, now, schemas, cores, fresh):
    """What the sweep finds joins a known core or becomes one, and every core is recounted."""
    for person in memory.people if fresh else ():
        stable = [s for _, s in sorted(schemas.items()) if s.subject == person and s.status == "stable"]
        said = [[memory.said(b) for i in s.evidence if holds(b := memory.beliefs[i])] for s in stable]
        for schema, text in zip(stable, memory.backend.strip(stable, said)):
            schema.behaviour = text
        stable = [s for s in stable if s.behaviour]
        if len(stable) >= MIN_STABLE:
            sweep(memory, now, cores, stable)
    for core in cores.values():
        core.members = sorted(set(core.members))
        members = sorted((schemas[m] for m in core.members if m in schemas), key=lambda s: s.confidence)
        core.evidence = sorted({i for s in members for i in s.evidence})
        # confidence = the second best over domains of (best stable member's): one domain alone proves nothing
        best = {s.domain: s.confidence for s in members if s.status == "stable"}  # the last, best one stays
        core.status = "stable" if len(best) >= 2 else "dormant"
        core.confidence = sorted(best.values())[-2] if len(best) >= 2 else 0.0


def plan_intentions(store, now, intentions):
    """Plans with a last day, told by people who speak here."""
    for b in store.beliefs.values():
        if b.slot[1] == "plan" and b.until and b.slot[0] in store.people and b.status != "suppressed":
            id_ = "i" + digest(b.slot[0], key(b.value), b.until)
            item = intentions.setdefault(id_, Intention(id_, b.slot[0], "", b.value, now, until=b.until))
            item.evidence = sorted({*item.evidence, b.id})
    for item in intentions.values():
        alive = any(holds(store.beliefs[i]) for i in item.evidence)
        item.status = "withdrawn" if not alive else "expired" if item.until < now[:10] else "open"


def sleep(memory, now):
    """System2, all or nothing: first the whole plan, then one event. Without a write it only recounts."""
    # The watermark: a model asked twice about the same facts may find other schemas, so it is asked once.
    fresh, new = memory.fresh, copy.deepcopy({kind: getattr(memory, kind) for kind in KINDS})
    for node in [node for nodes in new.values() for node in nodes.values()]:
        # What cites a belief that was asked to be forgotten is gone: its text may give it away.
        if any(memory.beliefs[i].status == "suppressed" for i in [*node.evidence, *node.against]):
            node.status, node.confidence, node.evidence, node.against = "withdrawn", 0.0, [], []
    live = {kind: {i: n for i, n in nodes.items() if n.status != "withdrawn"} for kind, nodes in new.items()}
    plan_schemas(memory, now, live["schemas"], fresh)
    plan_cores(memory, now, live["schemas"], live["cores"], fresh)
    plan_intentions(memory, now, new["intentions"])  # all of them: a plan that was cancelled may come back
    plan = {kind: [asdict(n) for _, n in sorted((nodes | live[kind]).items())
                   if n != getattr(memory, kind).get(n.id)] for kind, nodes in new.items()}
    if fresh or any(plan.values()):
        ids = [n["id"] for nodes in plan.values() for n in nodes]
        memory.commit("SLEEP", ids, "", f"night of {now[:10]}", **plan)


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
    """Turns and beliefs by relevance: [(score, id)], best first. A superseded one brings its chain."""
    if not memory.docs:
        return []
    # Names are no search words: in a dialogue it is mostly the *other* speaker who says one.
    names = {w for name in memory.people for w in words(name)}
    query = " ".join(w for w in question.split() if not set(words(w)) & names) or question
    query, index, lengths = memory.vectors.embed([query]), memory.vectors.index(memory.docs), 1.0  # (1, d)
    if sparse.issparse(query):
        query = query.multiply(index.idf ** 2 * SCALE).tocsr()
        lengths = index.lengths * np.linalg.norm(query.data)                        # (docs,)
    own = cosines(index.docs, query)[:, 0] / np.maximum(lengths, 1e-9)              # (docs,)
    # score = own + 0.5 of the turn before in its session: an answer seldom repeats the words of its question
    scores = own + 0.5 * np.where(index.before >= 0, own[index.before], 0)          # (docs,)
    best = [i for i in np.argsort(-scores, kind="stable")[:300] if scores[i] >= memory.limits.hit]
    return [(float(scores[i]), memory.docs[i][0]) for i in best if memory.docs[i][0] not in memory.hidden]


def visible_schemas(memory, question, now, sweep):
    """Schemas and cores to show, best first, as far as their support is alive now: no write touches them."""
    def alive(node):
        cited = [memory.beliefs[i] for i in node.evidence]
        return (node.status == "stable" and len({b.slot for b in cited if holds(b)}) >= 2
                and all(b.status != "suppressed" for b in cited))

    def rank(node):  # decay is applied while reading: stored, it would depend on how often System2 runs
        seen = max(memory.beliefs[i].t_seen for i in node.evidence)
        idle = max(0, (date.fromisoformat(now[:10]) - date.fromisoformat(seen[:10])).days)
        return -node.confidence * 2 ** (-idle / 180), node.id  # half-life: half a year without new evidence
    schemas = sorted(filter(alive, memory.schemas.values()), key=rank)
    if not schemas:
        return []
    cores = [c for c in memory.cores.values() if sweep and alive(c)
             and len({s.domain for s in schemas if s.id in c.members}) >= 2]
    # Schemas of the question's own domain come first; where it has none, cores speak for it.
    query = memory.vectors.embed([question])                                        # (1, d)
    close = cosines(memory.vectors([s.text for s in schemas]), query)[:, 0]         # (schemas,)
    own = [s for s, c in zip(schemas, close) if c >= memory.limits.own]
    return [*own, *sorted(cores, key=rank), *(s for s in schemas if s not in own)]


def chain_line(store, slot):
    """A chain as one line, "Paris (2024-01-05) → Berlin (2025-03-01, current)"; no suppressed nodes."""
    chain, steps, entries = [b for b in store.chain(slot) if b.status != "suppressed"], [], []
    for b in chain:
        text = b.text if b.link_kind == "refine" else b.value or "none"
        text = f"no longer {text}" if b.polarity < 1 and b.value else text
        # Where the present was to be forgotten, what is left is the past and is not called current.
        mark = ", current" if b.status == "active" else ""
        steps.append(f"{text} ({b.t_event[:10]}{mark})")
        entries.append((b.t_event, text + mark))
    if not chain:
        return None
    if len(chain) == 1 and b.status == "active":
        return Line(b.id, "fact", f"{b.t_event[:10]} {slot[0]}: {b.text}", b.t_event)
    return Line(b.id, "fact", f"{slot[0]} {slot[1]}: {' → '.join(steps)}", b.t_event, entries)


def recall(memory, question, now, budget=800, schemas=True, sweep=True):
    """Question -> Recall within `budget` tokens, SCHEMA_LINES schemas and cores beside it, no filler."""
    nodes = visible_schemas(memory, question, now, sweep)[:SCHEMA_LINES] if schemas else []
    chosen, left = {n.id: Line(n.id, "schema", n.text, n.created) for n in nodes}, budget

    def spend(lines, tokens):  # whole lines only
        nonlocal left
        for line in lines:
            cost = count_tokens(str(line))
            if line and line.id not in chosen and cost <= min(tokens, left):
                chosen[line.id], left, tokens = line, left - cost, tokens - cost
    # The attribute asked about comes first; small fixed shares next, so that many hits cannot push them out.
    asked, people = asked_about(memory, question)
    spend([chain_line(memory, (p, a, None)) for a in asked for p in people], left)
    spend([chain_line(memory, (p, a, None)) for a in SINGLE for p in people], int(budget * PROFILE))
    items = [i for i in memory.intentions.values() if i.status == "open" and i.until >= now[:10]
             and any(holds(memory.beliefs[b]) for b in i.evidence)]  # a lapsed plan is never shown as one
    spend([Line(i.id, "intention", f"planned until {i.until}: {i.text}", i.until)
           for i in sorted(items, key=lambda i: (i.until, i.id))], int(budget * COMING))
    cited = set()
    for _, id_ in search(memory, question):
        if id_ in memory.beliefs and (line := chain_line(memory, memory.beliefs[id_].slot)):
            spend([line], left)
            cited |= {source[0] for source in memory.beliefs[id_].sources} if line.id in chosen else set()
        elif id_ in memory.turns and id_ not in cited:
            turn = memory.turns[id_]
            spend([Line(id_, "raw", f"{turn.t[:10]} {turn.speaker}: {turn.text}", turn.t)], left)
    # State order: cores, schemas, then everything by time.
    lines = sorted(chosen.values(), key=lambda n: ({"c": 0, "s": 1}.get(n.id[0], 2), n.t, n.id))
    return Recall(lines, "\n".join(map(str, lines)), [n.id for n in lines])


# ------------------------------------------------------------------ the memory
class Memory(Store):
    """A store with a backend, Rules() or LLM(chat), and an encoder: "words", a folder or a hub id."""
    sleep, recall, trail = sleep, recall, Store.chain  # functions as methods

    def __init__(self, backend=None, encoder="words", log=()):
        super().__init__(log)
        self.backend = backend or Rules()
        self.vectors = Vectors(embed_words if encoder == "words" else sentence_encoder(encoder))
        self.limits = next((v for name, v in LIMITS.items() if name in Path(encoder).name), LIMITS["mpnet"])
        self.gate = {}  # person -> the last sweep's cosines of V_beh, all pairs across domains

    def observe(self, text, t, session="s1", speaker="user"):
        """System1, in the write: keep the raw turn first, then extract, reconcile, apply. -> [(op, id)]."""
        return self.ingest([(text, t, session, speaker)])[0]

    def ingest(self, turns):
        """[(text, t, session, speaker)] -> [[(op, id)]]. All turns are extracted in one batch."""
        turns, kept, out = list(turns), [], []
        for _, t, *_ in turns:
            if str(date.fromisoformat(t[:10])) != t[:10]:  # dates are compared as strings
                raise DcpmError(f"{t!r} does not start with a date like 2024-05-01")
        for text, t, session, speaker in turns:
            kept.append(Turn(f"t{len(self.turns) + 1}", session, speaker, text, t))
            self.commit("RAW", [kept[-1].id], kept[-1].id, turn=kept[-1])
        for turn, (claims, forget) in zip(kept, self.backend.extract(self, kept)):
            if claims is None:  # the turn is kept, the failure is on record
                self.commit("FAILED", [turn.id], turn.id, "no usable answer from the model")
            self.backend.reconcile(self, claims or [])
            ops = write_claims(self, turn, claims or [])
            out.append(ops + [("SUPPRESS", i) for what in forget for i in self.forget(what, turn.id)])
        return out

    def forget(self, what, turn=""):
        """Suppress beliefs and hide the turns that say them; nothing is deleted. -> ids."""
        speaker = self.turns[turn].speaker if turn else [*self.people, "user"][0]
        ids, need = [], set(words(what))
        # As a claim ("I live in Paris") it names a slot and a value; else all its content words must occur.
        claim = read_clause(what, speaker, self.clock or "2000-01-01")
        if claim and claim.attribute != "event":
            need = set(words(claim.value))
            ids = [b.id for b in self.chain(slot_of(self, claim)) if key(b.value) == key(claim.value)]
        ids = ids or [b.id for b in self.beliefs.values()
                      if need and need <= set(words(f"{b.slot[0]} {b.value} {b.text}"))]
        ids = [i for i in ids if self.beliefs[i].status != "suppressed"]
        if ids:
            hide = {t.id for t in self.turns.values() if need <= set(words(t.text))} | {turn} - {""}
            self.commit("SUPPRESS", ids, turn, "asked to forget", hide=sorted(hide))
        return ids

    def answer(self, question, now):
        """-> (text, ids that it rests on)."""
        return self.backend.answer(self, question, now)

    def why(self, id_):
        """core -> schemas -> beliefs -> the verbatim span of the raw turn, as a nested dictionary."""
        node = ChainMap(self.cores, self.schemas, self.intentions, self.beliefs, self.turns).get(id_)
        if node is None:
            raise DcpmError(f"there is no record {id_!r}; recall(...).ids lists the ids you can ask about")
        cited = getattr(node, "evidence", None)  # []: a higher node that the night withdrew
        status = {getattr(node, "status", ""), *(self.beliefs[i].status for i in cited or ())}
        if id_ in self.hidden or "suppressed" in status or cited == []:
            return {"id": id_, "text": "(forgotten on request)", "because": []}
        below = [self.why(i) for i in getattr(node, "members", cited or ())]
        for turn, start, end, _ in getattr(node, "sources", ()):
            said = self.turns[turn].text[start:end]
            if turn in self.hidden and said == self.turns[turn].text:  # a part may be seen, never the whole
                said = "(not shown: it also says what was asked to be forgotten)"
            below.append({"id": turn, "t": self.turns[turn].t, "text": said, "because": []})
        return {"id": id_, "text": node.text, "because": below}

    def save(self, path):
        """The audit log as JSON, written beside the target and moved over it: a crash spoils nothing."""
        part = Path(f"{path}.part")
        part.write_text(json.dumps({"format": "dcpm-3", "log": self.log}), encoding="utf-8")
        part.replace(path)

    @classmethod
    def load(cls, path, backend=None, encoder="words"):
        try:
            return cls(backend, encoder, json.loads(Path(path).read_text(encoding="utf-8"))["log"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DcpmError(f"{path} is not a memory saved by dcpm.py ({error}); restore a copy") from error

    def dump(self):
        """The whole memory as text for people."""
        lines = [f"{line} ({self.beliefs[line.id].confidence:.2f})" for slot in self.heads
                 if (line := chain_line(self, slot))]
        nodes = [n for kind in KINDS for n in getattr(self, kind).values()]
        return "\n".join(lines + [f"[{n.id}] {self.why(n.id)['text']} ({n.status})" for n in nodes])


# ------------------------------------------------------------------ a language model and a sentence encoder
class LLM:
    """A chat model as extractor, reconciler, inducer, answerer. `chat`: conversations -> texts or None.

    It proposes; the decision table and the store dispose: it chooses among ids it was shown and sets no link.
    """

    def __init__(self, chat):
        self.chat, self.tally, self.failures = chat, Counter(), Counter()

    def ask(self, kind, prompts, check):
        """prompts -> [check(JSON object) or None], all prompts in one batch; three tries each."""
        import common  # only here: the rule backend needs neither torch nor transformers
        talks = [[{"role": "system", "content": STRICT}, {"role": "user", "content": p}] for p in prompts]
        found = common.ask(self.chat, talks, check, tally=self.tally)
        self.failures[kind] += found.count(None)
        return found

    def extract(self, memory, turns):
        """-> [(claims or None, what to forget)], one a turn."""
        prompts = {}  # turn id -> prompt
        for turn in turns:
            text = re.sub(r"[^.!?\n]*\?+", "", turn.text).strip()  # a model makes claims of questions
            if turn.speaker != "assistant" and words(text):
                sitting = [t for t in memory.turns.values() if t.session == turn.session]
                before = "\n".join(f"{t.speaker}: {t.text[:300]}" for t in sitting[:sitting.index(turn)][-2:]
                                   if t.id not in memory.hidden)
                prompts[turn.id] = EXTRACT.format(t=turn.t, before=before or "(none)", speaker=turn.speaker,
                                                  text=text)
        checks = [functools.partial(self.read_claims, memory.turns[id_]) for id_ in prompts]
        found = dict(zip(prompts, self.ask("extract", list(prompts.values()), checks)))
        # Without a usable answer the claims are lost, but not a request to forget: the rules read it.
        return [found.get(t.id, ([], [])) or (None, read_rules(t)[1]) for t in turns]

    @staticmethod
    def read_claims(turn, data):
        """The model's JSON -> (claims, what to forget). A quote that is not in the message is invented."""
        claims = []
        for c in data["claims"]:
            value, polarity, attribute = str(c["value"]), c.get("polarity", 1), c.get("attribute")
            quote = re.findall(r"\w+", str(c["quote"]))
            at = quote and re.search(r"\W+".join(quote), turn.text, re.I)  # only its punctuation may differ
            if not at or not key(value) or polarity not in (1, 0, -1):
                continue
            subject = str(c.get("subject") or turn.speaker).lower().removeprefix("the ")
            subject = turn.speaker if subject in ("user", "i", "me", turn.speaker.lower()) else subject
            t_event, until = read_date(at[0], turn.t)
            if attribute not in ATTRIBUTES or (attribute == "plan" and not until):
                attribute = "event"  # a plan without an end is none
            claims.append(Claim(attribute, value[:200], str(c["text"])[:500], at.span(), subject, polarity,
                                t_event, 0.9 if subject == turn.speaker else 0.4,
                                until if attribute == "plan" else ""))
        return claims, [str(f) for f in data.get("forget") or [] if words(str(f))]

    def reconcile(self, memory, claims):
        """Match claims to the chains they belong to. Ids outside the candidates are refused."""
        # A single slot needs no model to be found. shown: id of a head -> its chain
        shown, known = {}, [b for b in memory.beliefs.values() if b.slot[1] not in SINGLE]
        new = [c.text for c in claims if c.attribute not in SINGLE]
        if known and new:
            near = cosines(memory.vectors([b.text for b in known]), memory.vectors(new)).max(1)  # (beliefs,)
            for i in np.argsort(-near, kind="stable")[:20]:
                head = memory.head(known[i].slot)
                if near[i] >= memory.limits.near and head.status == "active":
                    shown[head.id] = [b for b in memory.chain(head.slot) if b.status != "suppressed"]
        if not shown:
            return  # nothing near: the decision table needs no help

        def check(data):  # -> one operation a node, the first
            ops = {o["id"]: (int(o["item"]), o["op"]) for o in data["operations"][::-1]}
            if not ops.keys() <= shown.keys() or not all(
                    0 <= item < len(claims) and op in ("CONFIRM", "REFINE", "SUPERSEDE")
                    for item, op in ops.values()):
                raise ValueError("it names an item, an op or an id that was not offered")
            return ops
        chains = "\n".join(f"[{i}] " + " -> ".join(f"{b.text} ({b.t_event[:10]})" for b in chain)
                           for i, chain in shown.items())
        items = "\n".join(f"{i}. {c.text}" for i, c in enumerate(claims))
        found = self.ask("reconcile", [RECONCILE.format(chains=chains, items=items)], check)[0] or {}
        for id_, (item, op) in found.items():
            claim, head = claims[item], memory.beliefs[id_]
            if claim.subject != head.slot[0] or claim.attribute in SINGLE:
                continue  # the chain of someone else; a single-valued claim has a chain of its own
            claim.slot = head.slot
            if op != "SUPERSEDE":
                claim.value, claim.polarity = head.value, head.polarity
                claim.until = claim.until or head.until
                claim.text = f"{head.text}; {claim.text}" if op == "REFINE" else claim.text

    def induce(self, memory, clusters, noise, known):
        """Every cluster with a fact that no schema cites yet, and the facts in no cluster, in portions."""
        cited = {i for s in known for i in (*s.evidence, *s.against)}
        groups = [g[:30] for g in clusters] + [noise[i:i + 30] for i in range(0, len(noise), 30)]
        groups = [g for g in groups if len(g) >= 3 and any(b.id not in cited for b in g)]
        ids = {None, *(s.id for s in known)}

        def check(shown, data):
            drafts = []
            for s in data["schemas"]:
                evidence, against = (sorted(set(s.get(k) or [])) for k in ("evidence", "against"))
                if not {*evidence, *against} <= shown or not {s.get("known"), s.get("replaces")} <= ids:
                    raise ValueError("all ids must be among those shown: facts, or known regularities")
                if not s["domain"] or not s["text"]:
                    raise ValueError("domain and text must not be empty")
                drafts.append(Draft(str(s["domain"]).lower(), str(s["text"])[:300], evidence, against,
                                    s.get("known"), s.get("replaces")))
            return drafts
        lines = "\n".join(f"[{s.id}] {s.domain}: {s.text}" for s in known)
        prompts = [INDUCE.format(person=g[0].slot[0], facts="\n".join(
            f"[{b.id}] {b.t_event[:10]} {memory.said(b)}" for b in g)) for g in groups]
        prompts = [p + KNOWN.format(known=lines) if known else p for p in prompts]
        checks = [functools.partial(check, {b.id for b in g}) for g in groups]
        return [draft for found in self.ask("induce", prompts, checks) for draft in found or []]

    def strip(self, schemas, said):
        """Behaviour texts. A schema's text never changes, so it is asked for once."""
        new = [s for s in schemas if not s.behaviour]
        found = self.ask("strip", [STRIP.format(text=s.text) for s in new],
                         lambda data: " ".join(str(data["behaviour"] or "").split()))
        texts = {s.id: text or "" for s, text in zip(new, found)}
        return [s.behaviour or texts[s.id] for s in schemas]

    def name_core(self, members):
        prompt = CORE.format(schemas="\n".join(f"{m.domain}: {m.text}" for m in members))
        return self.ask("core", [prompt], lambda data: str(data["text"] or "")[:300])[0]

    def answer(self, memory, question, now):
        """-> (text, ids of the context)."""
        context = recall(memory, question, now)
        prompt = ANSWER.format(context=context.text or "(nothing)", question=question)
        reply = self.chat([[{"role": "user", "content": prompt}]])[0]
        self.tally["calls"] += 1
        self.failures["answer"] += not reply  # not "no information": that would score as a right abstention
        return reply or "(no answer)", context.ids


@functools.cache
def sentence_encoder(name):
    """Folder or hub id -> embed(texts) -> (n, d) unit rows: mean pooling over the tokens."""
    import common
    import torch
    from transformers import AutoModel
    model, tok = common.load_pretrained(name, AutoModel, torch.float32)

    @torch.no_grad()
    def embed(texts):
        # one at a time, (1, T): there is no padding that would have to be masked
        batches = (tok(text, truncation=True, max_length=256, return_tensors="pt") for text in texts)
        rows = [model(**batch).last_hidden_state[0].mean(0) for batch in batches]   # [(d,)]
        return normalize(torch.stack(rows).numpy())
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
    word = re.sub(r"(?<=\w{3})(?:ies|ied)$", "y", word)
    word = re.sub(r"(?<=\w{3})(?:'s|ings?|ed|es|ly|(?<!s)s)$", "", word)
    word = re.sub(r"(?<=\w\w)([bdgmnprt])\1$", r"\1", word)  # running -> runn -> run
    return re.sub(r"(?<=\w{3})e$", "", word)


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


def read_date(text, told):
    """-> (since when it is true, until when it is planned), by its first time expression: a past one says
    when an event was, one still to come when a plan ends; without one (told, "")."""
    match = DATE.search(text)
    if not match:
        return told, ""
    first = date.fromisoformat(told[:10])  # of the conversation: by the wall clock old dialogues would rot
    if match["day"]:
        first = last = first + timedelta({"yesterday": -1, "today": 0, "tomorrow": 1}[match["day"].lower()])
    elif match["week"]:  # Monday to Sunday
        first += timedelta({"last": -7, "next": 7}[match["week"].lower()] - first.weekday())
        last = first + timedelta(6)
    else:
        month = f"-{MONTHS.index(match['month'].lower()) + 1:02}" if match["month"] else ""
        try:
            span = np.datetime64(match["iso"] or match["year"] + month)  # a day, a month or a year
        except ValueError:  # 2024-02-31: not a date after all
            return told, ""
        after = (span.astype(int) + 1).astype(span.dtype)
        first, last = span.astype("M8[D]").item(), after.astype("M8[D]").item() - timedelta(1)
    return (told, str(last)) if str(last) >= told[:10] else (str(first), "")


# A row is a pair of opposite poles, each: name | gloss | phrases that show it.
LEXICON = """
plans | plans ahead and prepares in detail | checklist, list, schedule, itinerary, spreadsheet, in advance, \
weeks ahead, timetable, plan ahead, mapped out, draw up, drew up, prepare, outline, agenda, ahead of time, \
step by step || improvises | improvises and decides on the spot | on a whim, spontaneous, last minute, spur \
of the moment, improvise, made it up, without a plan, wing it, winged it, on the fly, see what happen, no \
idea beforehand, unplanned
saves | saves money and looks for the cheaper way | cheap, cheaper, discount, second hand, coupon, bargain, \
on sale, budget, for free, haggle, borrow, save money, thrifty || spends | spends freely and takes the best \
there is | splurge, expensive, luxury, premium, top of the range, first class, treat myself, pay extra, paid \
extra, priciest, regardless of price, deluxe
alone | likes to do things alone | alone, by myself, on my own, solo, solitude, in peace, quiet corner, \
nobody around, without company || together | likes to do things with other people | together, with friend, \
group, invite, crowd, company of, whole gang, team up, teamed up, everyone, joined by
careful | is careful and plays it safe | careful, double check, safe, insurance, backup, spare, read the \
warning, just in case, cautious, helmet, twice before || daring | is daring and takes risks | risk, dare, \
without looking, deep end, gamble, threw caution, bold, thrill, adrenaline, dangerous, reckless, edge
routine | sticks to what is familiar | same as always, usual, the same, routine, habit, as ever, familiar, \
every time, tradition, old favourite, as before || novelty | looks for what is new | never tried, new kind, \
first time, experiment, exotic, something different, novel, curious, unknown, unusual, untested
makes | makes things by hand | from scratch, by hand, built, homemade, handmade, sewed, carved, diy, made my \
own, workshop, knitted, glued || buys | buys things ready-made | ready made, bought, store, order online, \
ordered, delivery, off the shelf, from the shop, prepackaged, catalogue, hired
exact | is exact and measures | exact, measure, precise, to the gram, to the minute, ruler, scale, \
stopwatch, decimal, count every, calibrate || rough | goes by feel, roughly | roughly, by feel, eyeball, \
more or less, guess, approximate, give or take, ballpark, by eye, rule of thumb
paper | prefers paper | paper, notebook, printed, pencil, handwritten, ink, sticky note, index card, \
fountain pen || digital | prefers digital tools | app, spreadsheet app, tablet, online tool, cloud, \
software, phone reminder, digital"""
ROWS = [pole.split(" | ") for row in LEXICON.strip().split("\n") for pole in row.split(" || ")]
POLES = {name: (ROWS[i ^ 1][0], gloss) for i, (name, gloss, _) in enumerate(ROWS)}  # the opposite, the gloss
CUES = [(f" {' '.join(map(stem, cue.split()))} ", name) for name, gloss, cues in ROWS
        for cue in (gloss, *cues.split(", "))]  # a schema's own text shows its pole
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
    return max(sorted(hits), key=hits.get, default="")


def features(text):
    """Words, and the concepts of the lexicon at three times the weight of a word."""
    return words(text) + 3 * [f"<{name}>" for name in (*poles_of(text), domain_of(text)) if name]


HASH = HashingVectorizer(analyzer=features, n_features=2 ** 15, alternate_sign=False, dtype=np.float32)
embed_words = HASH.transform  # texts -> (n, 32768) sparse unit rows; no model, no download
# In search a concept counts as one word: at its full weight it would hide the words of a turn (recall@10 on
# LoCoMo .68 / .70, not .73 / .72).
SCALE = np.ones(2 ** 15)                                                            # (d,)
SCALE[HashingVectorizer(analyzer=str.split, n_features=2 ** 15).transform(
    [f"<{name}>" for name in (*POLES, *DOMAINS)]).indices] = 1 / 9


# ------------------------------------------------------------------ rules: a controlled English
# What the story, the tests and the miniature benchmark speak. Everything else in the first person is a free
# fact, found by its words. Reading real language is the model's job.
RELATIVES = "sister|brother|mother|father|wife|husband|partner|son|daughter|friend|neighbour|colleague|boss"
SUBJECT = re.compile(rf"^(?P<lead>.{{0,40}}?)\b(?:I|[Mm]y (?P<who>(?:{RELATIVES})\b(?: [A-Z][a-z]+\b)?)) "
                     r"(?P<rest>.+)$", re.S)
NAME = r"(?:the )?(?P<v>(?-i:[A-Z]).+)"  # "I joined a gym" is no job
FRAMES = [(attribute, polarity, re.compile(rf"^(?:{pattern})$", re.I)) for attribute, polarity, pattern in (
    # attribute, polarity, predicate after the subject; group v is the value, group past needs a date
    ("residence", 1, rf"(?:lives? in|(?:am|is) (?:living |back )?in|moved (?:back )?to) {NAME}"),
    ("residence", 1, rf"(?P<past>lived|was living) in {NAME}"),
    ("employer", 1, rf"(?:works? (?:at|for)|joined|started (?:working )?at|switched to) {NAME}"),
    ("employer", 1, rf"(?P<past>worked) (?:at|for) {NAME}"),
    ("employer", 0, r"(?:lost|quit|left) (?:my|his|her) job(?P<v>)"),
    ("partner", 1, r"(?:am|is) (?:married|engaged) to (?P<v>.+)"),
    ("diet", 1, r"(?:am|became) an? (?P<v>vegan|vegetarian)"),
    ("condition", 1, r"have (?P<v>migraines?|asthma|diabetes|insomnia|allergies)\b.*"),
    ("possession", 1, r"(?:have|has|own|bought|got|adopted) an? (?P<v>.+)"),
    ("possession", -1, r"(?:sold|lost|gave away) (?:my|his|her) (?P<v>.+)"),
    ("hobby", 1, r"(?:plays?|took up) (?P<v>.+)"),
    ("likes", 1, r"(?:likes?|loves?|enjoys?|(?:am|is) \w+ing(?= .+ again)) (?P<v>.+)"),
    ("likes", -1, r"(?:dislikes?|hates?|gave up|stopped|quit) (?P<v>.+)"))]
SHORT = {"’": "'", "I'm": "I am", "I'll": "I will", "I've": "I have", "n't": " not"}
PLAN = re.compile(r"^(?:am|is|will|plan to) (?P<v>.+)$", re.I)
NEGATOR = re.compile(r"^(?:no longer|never|used to|(?:(?:do|does|did|am|is|have) )?not(?: going to)?) ", re.I)
ADVERB = re.compile(r"^(?:(?:still|now|also|just|currently|really|finally) )+", re.I)
LEAD = re.compile(rf"^(?:and|but|so|now|well|these\ days|{DATE.pattern}|[\s,;])*$", re.I | re.X)
UNSURE = re.compile(r"\b(?:maybe|might|perhaps|thinking of|if|would|wish|imagine)\b", re.I)
FORGET = re.compile(r"^(?:please |could you |can you )*forget (?:that |about |everything about )?(.+)$", re.I)


def read_rules(turn):
    """Turn -> (claims, phrases to forget). An assistant claims nothing: a suggestion is no preference."""
    claims, forget = [], []
    text = re.sub(r'"[^"]*"|“[^”]*”', lambda m: " " * len(m.group()), turn.text)  # quoted speech
    sentences = re.finditer(r"(?:[.](?=\w)|[^.!?\n])+[.!?]*", text)
    for sentence in sentences if turn.speaker != "assistant" else ():
        start, question = sentence.start(), "?" in sentence.group()[-3:]
        for piece in re.split(r"(;|,? (?:and|but) (?=I\b|my\b))", sentence.group()):
            body = piece.strip(" .,;!")
            at, start = start + piece.find(body), start + len(piece)
            if (found := FORGET.match(body)) and (not question or body[:1] in "CcPp"):
                forget.append(found.group(1))
            elif words(body) and not question and (claim := read_clause(body, turn.speaker, turn.t)):
                claim.span, claim.text = (at, at + len(body)), turn.text[at:at + len(body)]
                claims.append(claim)
    return claims, forget


def read_clause(body, me, t):
    """One clause -> Claim, or None: no subject that we know, a hedge or a hypothesis."""
    full = body
    for short, long in SHORT.items():
        full = full.replace(short, long)
    match = SUBJECT.match(full)
    if not match or UNSURE.search(full):
        return None
    subject = me if not match["who"] else match["who"] if me == "user" else f"{me}'s {match['who']}"
    t_event, until = read_date(full, t)
    told = dict(text=body, subject=subject, t_event=t_event, reliability=0.9 if subject == me else 0.4)
    rest, sign = ADVERB.sub("", match["rest"]), 1
    if negated := NEGATOR.match(rest):
        rest, sign = ADVERB.sub("", rest[negated.end():]), -1
    if until and (plan := PLAN.match(rest if sign > 0 else f"am {rest}")):
        return Claim("plan", tidy(plan["v"]), polarity=sign, until=until, **told)
    undated = " ".join(DATE.sub(" ", rest).split())
    for attribute, polarity, pattern in FRAMES if LEAD.match(match["lead"]) else ():
        hit = pattern.match(undated)
        value = tidy(hit["v"]) if hit else ""
        if hit and hit.groupdict().get("past") and t_event == t:
            continue  # "I lived in Rome" tells no date
        if hit and (key(value) or not polarity):
            return Claim(attribute, value, polarity=polarity * sign, **told)
    return Claim("event", full, **told)  # no frame fits: the whole clause, with its "not"


def tidy(value):
    """Cut what is not the value: dates, reasons, qualifiers, articles."""
    value = re.split(r",| because | so that | mostly ", DATE.split(value)[0])[0].strip(" .!,")
    return re.sub(r"^(?:the|an?|my|some) ", "", re.sub(r" (?:anymore|again|too|now|on|in)$", "", value))


ASK = {  # attribute -> how a question asks for it
    "residence": r"\b(?:live|lived|moved? to)\b", "employer": r"\b(?:work|employer|job)\b",
    "partner": r"\b(?:partner|married|engaged)\b", "diet": r"\bdiet\b"}


def asked_about(store, question):
    """-> (single-valued attributes, people): people known by name or kinship, else the first speaker."""
    said = set(re.findall(r"\w+", question.lower()))
    known = dict.fromkeys([*store.people, *(slot[0] for slot in store.heads)])
    people = [p for p in known if p != "user" and said & set(p.lower().split())] or store.people[:1]
    return [a for a, pattern in ASK.items() if re.search(pattern, question, re.I)], people


class Rules:
    """The same jobs without a model."""

    def extract(self, memory, turns):
        return [read_rules(turn) for turn in turns]

    def reconcile(self, memory, claims):
        """Nothing to do: a frame names its slot."""

    def induce(self, memory, clusters, noise, known):
        """At most one draft a cluster: the domain and the behaviour that most of its sentences show."""
        pool, ids = [b for group in [*clusters, noise] for b in group], {s.text: s.id for s in known}
        for cluster in clusters:  # facts in no cluster give none: what DBSCAN finds decides
            domains = Counter(d for b in cluster if (d := domain_of(b.text)))
            poles = Counter(p for b in cluster for p in poles_of(b.text))
            if domains and poles:
                domain, pole = (max(sorted(c), key=c.get) for c in (domains, poles))
                opposite, person = POLES[pole][0], cluster[0].slot[0].replace("user", "the user")
                text, reverse = (f"In {domain}, {person} {POLES[p][1]}." for p in (pole, opposite))
                against = [b.id for b in pool if domain_of(b.text) == domain and opposite in poles_of(b.text)]
                evidence = [b.id for b in cluster if b.id not in against]
                yield Draft(domain, text, evidence, against, ids.get(text), ids.get(reverse))

    def strip(self, schemas, said):
        """The cluster's own sentences without the nouns of their domain: V_beh is made of real words."""
        def kept(text, domain):
            return " ".join(w for w in re.findall(r"[\w']+", text) if NOUNS.get(stem(w.lower())) != domain)
        return ["\n".join(kept(text, s.domain) for text in texts) for s, texts in zip(schemas, said)]

    def name_core(self, members):
        gloss = Counter(m.text.split(", ", 1)[1] for m in members).most_common(1)[0][0]
        return f"In unrelated parts of life, {gloss}"

    def answer(self, memory, question, now):
        """Rules phrase no answer: the line of context that says most about the question. -> (text, ids)"""
        (asked, people), q = asked_about(memory, question), set(words(question))

        def fit(line):
            subject, attribute, _ = memory.beliefs[line.id].slot if line.channel == "fact" else ("", "", "")
            shared = len(q & set(words(line.text)))
            return attribute in asked and subject in people, shared > 0 and line.channel == "fact", shared
        best = max(recall(memory, question, now).lines, key=fit, default=None)
        return (best.text, [best.id]) if best and any(fit(best)) else ("I don't know.", [])


# ------------------------------------------------------------------ the story
STORY = """
2024-01-08|I live in Paris. I work at Acme. My sister Ann moved to Oslo.
2024-01-20|I wrote a checklist for the dinner. I like coffee.
2024-02-03|I wrote an itinerary for the flight. I run alone.
2024-02-17|I prepared the report weeks ahead. I wrote a checklist for the cake.
2024-03-02|I moved to Berlin because Acme closed in Paris. I went to the gym by myself.
2024-03-16|I booked the hotel in advance. I got a cheaper guitar. I had a list for the meeting.
2024-03-30|I had a list for the stew. I did the race solo. I still live in Berlin. I have migraines.
2024-04-13|Back in 2021 I lived in Rome. I had a schedule for the journey. Maybe I'll move to Lima.
2024-04-27|I made a schedule for the project. I gave up coffee. I'm flying to Rome on 2024-06-10.
2024-05-11|I got a concert ticket on sale. I haggled over a piano. Please forget that I have migraines."""


def tell_story(memory):
    """One persona, ten sessions, one night: what is written, revised, generalised and forgotten, and why."""
    print("1. By day every message is kept verbatim, read, and reconciled with what is already believed.\n")
    told, now = [line.split("|") for line in STORY.strip().split("\n")], "2024-05-12"
    for (day, text), ops in zip(told, memory.ingest([(text, day, day, "user") for day, text in told])):
        print(f'   {day}  "{text}"\n{" " * 15}{", ".join(map(" ".join, ops))}')
    memory.sleep(now)
    print("\n2. A revised belief is a chain, not an overwritten row; Rome, told last, was spliced in:\n")
    for question in ("Where do I live?", "Do I like coffee?", "Where does my sister live?", "Migraines?"):
        text, ids = memory.answer(question, now)
        print(f"   {question:27} {text}   {', '.join(ids)}")
    print("\n3. By night facts become schemas, and schemas alike in behaviour, not in content, a core.")
    for found in memory.gate.values():
        alike = found > memory.limits.alike
        print(f"   Gate: {alike.sum()} of {len(found)} pairs across domains are alike in behaviour, "
              f"{found[alike].min(initial=1):.2f} or more;\n   the others reach "
              f"{found[~alike].max(initial=0):.2f}; the limit is {memory.limits.alike:.2f}.\n")
    for n in [*memory.schemas.values(), *memory.cores.values()]:
        print(f"   [{n.id}] {n.text} ({n.status}, {n.confidence:.2f}, {len(n.evidence)} beliefs)")
    for i in memory.intentions.values():
        print(f"   [{i.id}] {i.text} ({i.status} until {i.until})")
    question = "How should I get ready for my first aquarium?"
    print(f"\n4. The context for a question about a domain that never came up: {question}\n")
    print(*(f"   {line}" for line in memory.recall(question, now, 50).lines), sep="\n")
    for core in list(memory.cores)[:1]:
        print(f"\n5. Why does it believe that? why({core!r}), down to the words that were said:\n")
        for schema in memory.why(core)["because"]:
            print(f"   because [{schema['id']}] {schema['text']}")
            for belief in schema["because"][:2]:
                for source in belief["because"]:
                    print(f"     because [{belief['id']}] {source['t']}: “{source['text']}”")
    print("\nWhat is each mechanism worth?         python tests/experiments/bench_dcpm.py\n"
          "LoCoMo, LongMemEval, PersonaMem:      python tests/experiments/bench_dcpm_corpora.py --data FILE")


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
    parser.add_argument("--model", default="", help="llm: a chat model: hub id, folder, or a server's URL")
    parser.add_argument("--model_name", default="", help="llm: the server's name of the model")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="llm: longest reply")
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
