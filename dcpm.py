"""DCPM: an agent memory that says why it believes something (dual-process memory, arXiv 2606.09483).

    python dcpm.py                                                  the story of one user, no download
    python dcpm.py --model DIR_OR_URL --encoder DIR   the same, read by a chat model

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
`collisions`, `plan_cores`; 2.4 `search`, `recall`. **The line**: all above "backends" is the paper and knows
no language but words, keys and dates. Who has read down to that line has read DCPM. What needs language is
eight jobs of a backend: `LLM`, or `Rules` for a controlled English. One `Memory` holds one user; for many,
keep a dictionary of memories.

| the paper (partly as its authors' code has it) | here |
| --- | --- |
| a language model extracts and reconciles | rules; with --model it proposes, the same table decides |
| a dense encoder, thresholds unknown | hashed words and concepts, or --encoder; LIMITS for each |
| nearest neighbours by vectors | words; with --encoder also vectors, fused by reciprocal rank |
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
from collections import ChainMap, Counter, defaultdict, namedtuple
from dataclasses import asdict, dataclass, field
from datetime import date, timedelta
from itertools import product
from pathlib import Path

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from scipy.stats import rankdata
from sklearn.cluster import DBSCAN
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.metrics.pairwise import linear_kernel as cosines  # unit rows (n, d), (m, d) -> (n, m)
from sklearn.preprocessing import normalize


# ------------------------------------------------------------------ words, keys and dates
STOP = frozenset("""
    a an the and or but if so of in on at to for from by with as is am are was were be been being do does
    did done has had will i me my mine myself you your we our us he him his she her it its they them their
    this that these those there here what which who whom when where why how yes too very just also still now
    again really than then about into out up down over all any some more most s t re ve ll d m""".split())
MONTHS = "january february march april may june july august september october november december".split()
DATE = re.compile(rf"""\b(?:(?:on\ |by\ |since\ )?(?P<iso>\d{{4}}-\d\d-\d\d)
    |(?:back\ )?(?:in|since)\ (?:(?P<month>{'|'.join(MONTHS)})\ )?(?P<year>(?:19|20)\d\d)
    |(?P<near>yesterday|today|tomorrow|(?:last|next)\ week))\b""", re.I | re.X)
NEAR = {"yesterday": -1, "today": 0, "tomorrow": 1, "last week": -7, "next week": 7}  # days from the telling
FORGET = re.compile(r"^(?:please |could you |can you )*forget (?:that |about |everything about )?(.+)$", re.I)


@functools.cache
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


def says(text, phrase):
    """Does a text have all content words of a phrase? A phrase without any is said nowhere."""
    wanted = set(words(phrase))
    return bool(wanted) and wanted <= set(words(text))


def asked_to_forget(text):
    """What a message asks to forget, in the plain form "Forget (that) ...", a sentence each."""
    sentences = re.split(r"[.!?\n]+ *", text)
    return [match[1] for match in map(FORGET.match, sentences) if match]


def day_of(t):
    """The date of an ISO date or date-time."""
    return date.fromisoformat(t[:10])


def read_date(text, told):
    """-> (since when it is true, until when it is planned), by its first time expression: a past one says
    when an event was, one still to come when a plan ends; without one (told, ""). What was "in 2021"
    is filed on the last day of 2021, behind all that was told in that year."""
    match = DATE.search(text)
    if not match:
        return told, ""
    if match["near"]:
        near = match["near"].lower()
        # of the conversation: by the wall clock old dialogues would rot
        last = day_of(told) + timedelta(NEAR[near])
        if "week" in near:  # to its Sunday
            last += timedelta(6 - last.weekday())
    else:
        text = match["iso"] or match["year"]
        if match["month"]:
            text += f"-{MONTHS.index(match['month'].lower()) + 1:02}"
        try:
            span = np.datetime64(text)  # a day, a month or a year
        except ValueError:  # 2024-02-31: not a date after all
            return told, ""
        if "since" in match[0].lower():
            return min(str(np.datetime64(span, "D")), told), ""
        last = np.datetime64(span + 1, "D") - 1
    last = str(last)
    return (told, last) if last >= told[:10] else (last, "")


# ------------------------------------------------------------------ 2.1 records
# One message, verbatim, append-only. speaker: "user", "assistant" or a name; t: its ISO date or date-time.
Turn = namedtuple("Turn", "id session speaker text t")
# The dimension on which two claims exclude each other; member: None where there is one value at a time.
Slot = namedtuple("Slot", "subject attribute member")


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
    single: bool = False  # one value at a time (a home), or many side by side (hobbies)
    past: bool = False  # it held once: "I lived in Rome"
    slot: Slot = None  # set when a model has matched the claim to a chain


@dataclass
class Belief:
    """A claim that entered the store. `prev` and `next` make the chain of its slot."""
    id: str
    slot: Slot
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
Event = namedtuple("Event", "op ids turn data")
NEW_NODE = ("ADD", "SUPERSEDE", "RETRACT", "REFINE", "SPLICE")  # operations that put a belief into a chain


class DcpmError(Exception):
    """A write that would break an invariant, or a file that cannot be read; nothing has been changed."""


def digest(*parts):
    """Eight hex digits, the same on every machine: what System2 finds again gets the same id."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()[:8]


def holds(belief):
    return belief.status == "active" and belief.polarity == 1


def told_in(belief):
    """Ids of the turns that a belief rests on."""
    return {source[0] for source in belief.sources}


def ids_of(records):
    return [record.id for record in records]


def texts_of(records):
    return [record.text for record in records]


def chains_of(beliefs):
    return {belief.slot for belief in beliefs}


# ------------------------------------------------------------------ the store: the only place that sets links
class Store:
    """All records of one user. Every change is one event; links are checked before they are set."""
    has_news = True  # has anything been written since the last night?

    def __init__(self, log=()):
        self.log = []
        self.turns = {}
        self.beliefs = {}
        self.heads = {}  # slot -> id of the newest belief of its chain
        self.schemas = {}
        self.cores = {}
        self.intentions = {}
        self.forgotten = set()  # beliefs that were asked to be forgotten
        self.hidden = set()  # turns never to be shown: they say what was asked to be forgotten
        self.people = []  # who speaks here, not the assistant: System2 may generalise about them
        for op, ids, turn_id, data in log:
            self.commit(op, ids, turn_id, **data)

    def commit(self, op, ids=(), turn_id="", **data):
        """Apply one event, then log it: the only way that anything here changes. An event "FAILED" changes
        nothing: it records that a model gave nothing usable."""
        if op == "RAW":
            turn = Turn(*data["turn"])
            self.turns[turn.id] = turn
            if turn.speaker not in ("assistant", *self.people):
                self.people.append(turn.speaker)
        elif op in NEW_NODE:
            self._insert(Belief(**data["belief"]))
        elif op == "CONFIRM":
            belief = self.beliefs[ids[0]]
            belief.sources.append(data["source"])
            belief.t_event = data.get("t_event", belief.t_event)
            self._weigh(belief)
        elif op == "SUPPRESS":
            self.forgotten.update(ids)
            self.hidden.update(data["hide"])
            for id_ in ids:
                self.beliefs[id_].status = "suppressed"
        elif op == "SLEEP":
            for kind, cls in KINDS.items():
                for fields in data[kind]:
                    getattr(self, kind)[fields["id"]] = cls(**fields)
        for id_ in self.forgotten.intersection(ids):  # asked to be forgotten, or told again after that
            self.hidden.update(told_in(self.beliefs[id_]))
        self.has_news = op != "SLEEP"
        self.log.append(Event(op, list(ids), turn_id, data))

    def _insert(self, belief):
        """Put a belief between its neighbours: all four links or none, and never a second head."""
        belief.slot = Slot(*belief.slot)  # JSON has lists
        belief.sources = list(belief.sources)  # its own, not the log's
        before = self.beliefs.get(belief.prev)
        after = self.beliefs.get(belief.next)
        # Who stands before this place must still be `prev`: two writers who read one head cannot both append.
        neighbour = after.prev if after else self.heads.get(belief.slot)
        if belief.prev != neighbour or belief.id in self.beliefs:
            raise DcpmError(f"{belief.id} would fork the chain of {belief.slot}; read its head again")
        if before:
            before.next = belief.id
            if before.status == "active":
                before.status = "superseded"
        if after:
            after.prev = belief.id
            after.link_kind = "supersede"
            belief.status = "superseded"
        else:
            self.heads[belief.slot] = belief.id
        self.beliefs[belief.id] = belief
        self._weigh(belief)

    def _weigh(self, belief):
        # confidence = 1 - product over sessions of (1 - best reliability in it), at most 0.99: a noisy-or;
        # saying it twice in one sitting adds nothing
        best = {}  # session -> reliability
        for turn_id, _, _, reliability in belief.sources:
            session = self.turns[turn_id].session
            best[session] = max(reliability, best.get(session, 0))
        doubt = math.prod(1 - reliability for reliability in best.values())
        belief.confidence = round(min(0.99, 1 - doubt), 4)

    def trail(self, slot):
        """Beliefs of a slot, oldest first."""
        newest_first = []
        belief = self.head(slot)
        while belief:
            newest_first.append(belief)
            belief = self.beliefs.get(belief.prev)
        return newest_first[::-1]

    def head(self, slot):
        return self.beliefs.get(self.heads.get(slot))

    def as_of(self, slot, t):
        """What held on day `t`: the last node of an event time not after it. None: unknown or forgotten."""
        for belief in reversed(self.trail(slot)):
            if belief.t_event[:10] <= t[:10]:
                return belief if belief.status != "suppressed" else None
        return None

    def live(self, ids):
        """Those of these beliefs that hold now."""
        return list(filter(holds, map(self.beliefs.get, ids)))

    def said(self, belief):
        """The words in which it was told. System2 reads these: in a model's version all facts begin alike."""
        turn, start, end, _ = belief.sources[0]
        return self.turns[turn].text[start:end]

    def mentioned(self, question):
        """Whom a question is about: people whose names or kinship share most words with it; else the first
        speaker."""
        asked = set(re.findall(r"\w+", question.lower()))
        shared = {}  # person -> words of theirs in the question
        for person in [*self.people, *(slot.subject for slot in self.heads)]:
            if person != "user":
                shared[person] = len(asked.intersection(re.findall(r"\w\w+", person.lower())))
        most = max(shared.values(), default=0)
        if not most:
            return self.people[:1]
        return [person for person in shared if shared[person] == most]

    def containing(self, phrase):
        """Ids of the beliefs that say every content word of a phrase."""
        return [b.id for b in self.beliefs.values() if says(f"{b.slot.subject} {b.value} {b.text}", phrase)]


# ------------------------------------------------------------------ one embedding for reading and System2
# Cosine limits belong to an encoder: mpnet puts paraphrases of a behaviour at .39-.76, so .70 finds nothing.
# cluster, tight: the two stages of DBSCAN; alike, unlike: a collision (2.3; the authors' .70 and .60);
# hit: least score of a search result; domain: a schema of the question's domain; near: a chain to reconcile
Limits = namedtuple("Limits", "cluster tight alike unlike hit domain near")
LIMITS = {"words": Limits(0.55, 0.75, 0.70, 0.60, 0.05, 0.3, 0.3),
          "mpnet": Limits(0.45, 0.60, 0.45, 0.75, 0.2, 0.25, 0.65)}


class Vectors:
    """Unit vectors of texts, each embedded once. Questions are not kept: reading must change nothing."""

    def __init__(self, embed):
        self.embed = embed
        self.rows = {}  # text -> its vector

    def __call__(self, texts):
        """texts, at least one -> (n, d), dense or sparse as the encoder gives them."""
        new = [text for text in dict.fromkeys(texts) if text not in self.rows]
        if new:
            self.rows.update(zip(new, self.embed(new)))
        rows = [self.rows[text] for text in texts]
        return sparse.vstack(rows) if sparse.issparse(rows[0]) else np.stack(rows)


# ------------------------------------------------------------------ 2.2 System1: inside every write
STRICT = "You maintain the memory of an assistant. Reply with one JSON object and nothing else."
# One sample reply, on one line: without it a small model leaves out the quote and indents the JSON. What was
# said before comes after the task: in front of it, a small model makes claims of that.
EXTRACT = """List each claim of the new message about {speaker} or people around them, one per event, no
hypotheses.
"subject" is whom it is about. "attribute" is {attributes}
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


def slot_of(store, claim):
    """The dimension a claim speaks about: single-valued attributes have one chain, others one per value."""
    if claim.slot:
        return claim.slot
    slot = Slot(claim.subject, claim.attribute, None)
    attribute = claim.attribute
    member = key(claim.value)
    if claim.single:
        head = store.head(slot)
        is_news = claim.polarity != -1 and not claim.past
        if is_news or (head and (key(head.value) == member or claim.t_event < head.t_event)):
            return slot
        attribute = "event"  # neither "I no longer live in Rome" nor "I lived in Rome" ends Paris
    if attribute == "event":  # a free fact: only the same sentence confirms it, none excludes it
        member = " ".join(re.findall(r"\w+", claim.text.lower()))
    return Slot(claim.subject, attribute, member)


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
        old_words = set(key(head.text).split())
        new_words = set(key(claim.text).split())
        return "REFINE" if old_words < new_words else "CONFIRM", head, None
    # Told late. Making it the head, as the authors' code does, would bring back the past as the present.
    after = next(b for b in store.trail(slot) if b.t_event > claim.t_event)
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
        slot = slot_of(store, claim)
        source = (turn.id, *claim.span, claim.reliability)
        op, before, after = decide(store, claim, slot)
        if op == "CONFIRM":
            if turn.id in told_in(before):
                continue  # said twice in one turn: a sentence cannot confirm itself
            id_ = before.id
            data = {"source": source}
            # Told again with an earlier date: it was true since then. Only of a forgotten belief `decide`
            # has not seen that what stands before it is older still.
            if claim.t_event < before.t_event and before.status != "suppressed":
                data["t_event"] = claim.t_event
        else:
            id_ = f"b{len(store.beliefs) + 1}"
            node = Belief(id_, slot, claim.value, claim.polarity, claim.text, claim.t_event, turn.t, [source],
                          claim.until)
            if before:
                node.prev = before.id
                node.link_kind = "refine" if op == "REFINE" else "supersede"
            if after:
                node.next = after.id
            if op == "REFINE":  # it alone takes over the sources of its predecessor, behind its own
                node.sources += before.sources
            data = {"belief": asdict(node)}
        store.commit(op, [id_], turn.id, **data)
        ops.append((op, id_))
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
        rows = vectors[inside]                                                      # (inside, d)
        sub = DBSCAN(eps=1 - limits.tight, min_samples=2, metric="cosine").fit_predict(rows)
        if sub.max() < 1:
            continue  # one heap stays one
        means = mean_rows(rows[sub == i] for i in range(sub.max() + 1))             # (sub-clusters, d)
        nearest = cosines(rows, means).argmax(1)                                    # (inside,)
        # leftovers join the sub-cluster of the highest mean cosine
        labels[inside] = labels.max() + 1 + np.where(sub >= 0, sub, nearest)
    return labels


def mean_rows(groups):
    """Groups of (n, d), dense or sparse -> (groups, d)."""
    return np.stack([np.asarray(rows.mean(0)).ravel() for rows in groups])


def clusters_of(memory, facts):
    """Beliefs -> (clusters of beliefs, beliefs in no cluster), by the words in which they were told."""
    vectors = memory.vectors(list(map(memory.said, facts)))                         # (facts, d)
    labels = two_stage_dbscan(vectors, memory.limits)                               # (facts,)
    groups = defaultdict(list)
    for belief, label in zip(facts, labels):
        groups[label].append(belief)
    noise = groups.pop(-1, [])
    return [groups[label] for label in sorted(groups)], noise


def recount(schema, store):
    """Count again what supports a schema: s chains that hold and show it, x that show the opposite."""
    support = store.live(schema.evidence)
    s = len(chains_of(support))  # a chain counts once, by its head
    x = len(chains_of(store.live(schema.against)))
    # confidence = (s + 1) / (s + x + 2): Laplace's rule of succession
    schema.confidence = round((s + 1) / (s + x + 2), 4)
    turns = set().union(*map(told_in, support))
    sessions = {store.turns[i].session for i in turns}
    if s < 2:
        schema.status = "dormant"
    elif s < 3 or len(sessions) < 2:
        schema.status = "forming"
    else:
        schema.status = "stable" if schema.confidence >= 0.65 else "contested"


def plan_schemas(memory, now, schemas):
    """What the inducer finds in tonight's clusters: new schemas, more evidence for known ones."""
    for person in memory.people:
        known = [s for s in schemas.values() if s.subject == person]
        # single-valued attributes and plans show no habit
        slots = [s for s in memory.heads if s.subject == person and s.member and s.attribute != "plan"]
        facts = memory.live(map(memory.heads.get, slots))
        if not facts:
            continue
        clusters, noise = clusters_of(memory, facts)
        for draft in memory.backend.induce(memory, clusters, noise, known):
            id_ = draft.known or f"s{digest(person, draft.domain, draft.text)}"
            if id_ not in schemas:
                if len(draft.evidence) < 2:
                    continue
                schemas[id_] = Schema(id_, person, draft.domain, draft.text, now)
            schema = schemas[id_]
            schema.evidence = sorted({*schema.evidence, *draft.evidence})
            schema.against = sorted({*schema.against, *draft.against} - {*schema.evidence})
            if draft.replaces in schemas:  # what shows the new habit speaks against the old one
                old = schemas[draft.replaces]
                old.against = sorted({*old.against, *draft.evidence} - {*old.evidence})


def collisions(behaviour, content, domains, limits):
    """V_beh (n, d), V_con (n, d) -> (n, n): alike in the first alone. NOT contradictions."""
    # collide: cos(V_beh) > 0.70 and cos(V_con) < 0.60 and the domains differ (2.3)
    alike = cosines(behaviour, behaviour)                                           # (schemas, schemas)
    unlike = cosines(content, content)                                              # (schemas, schemas)
    domains = np.array(domains)
    apart = domains[:, None] != domains                                             # (schemas, schemas)
    return (alike > limits.alike) & (unlike < limits.unlike) & apart


def collision_groups(collide):
    """Merge what is linked; drop who collides with less than half of the group: merging is transitive."""
    count, labels = connected_components(collide, directed=False)                   # labels: (schemas,)
    for label in range(count):
        group = np.flatnonzero(labels == label)
        while True:
            degree = collide[np.ix_(group, group)].sum(0)                           # (group,)
            if degree.min() >= (len(group) - 1) / 2:
                break
            group = np.delete(group, degree.argmin())
        if len(group) > 1:
            yield group.tolist()


def behaviour_vectors(memory, schemas):
    """V_beh of schemas -> (n, d): the direction of the mean over the sentences of each."""
    # as one text the longest sentence would decide
    return normalize(mean_rows(memory.vectors(s.behaviour.split("\n")) for s in schemas))


def best_match(cores, ids):
    """The core that shares most of these schemas, of equals the oldest; None if none shares any."""
    def shared(core):
        return len({*ids} & {*core.members})
    return max(filter(shared, cores.values()), key=shared, default=None)  # `cores` has the oldest first


def plan_cores(memory, now, schemas, cores):
    """The sweep: collisions between the stable schemas of one person join a known core or become one."""
    for person in memory.people:
        stable = [s for _, s in sorted(schemas.items()) if s.subject == person and s.status == "stable"]
        for schema, behaviour in zip(stable, memory.backend.strip(memory, stable)):
            schema.behaviour = behaviour
        stable = [s for s in stable if s.behaviour]
        if len(stable) < MIN_STABLE:
            continue
        behaviour = behaviour_vectors(memory, stable)                               # (schemas, d)
        content = memory.vectors(texts_of(stable))                                  # (schemas, d)
        domains = [s.domain for s in stable]
        for group in collision_groups(collisions(behaviour, content, domains, memory.limits)):
            members = [stable[i] for i in group]
            core = best_match(cores, ids_of(members))
            if not core:
                text = memory.backend.name_core(members)
                if not text:
                    continue  # a null answer is allowed: no core
                id_ = f"c{digest(person, text)}"
                core = cores.setdefault(id_, Core(id_, person, "", text, now))
            core.members = sorted({*core.members, *ids_of(members)})


def recount_core(core, schemas):
    """Its evidence is the union of its members'; it is as sure as its second best domain."""
    members = [schemas[i] for i in core.members]
    core.evidence = sorted(set().union(*(s.evidence for s in members)))
    best = {}  # domain -> confidence of its best stable member
    for schema in members:
        if schema.status == "stable":
            best[schema.domain] = max(schema.confidence, best.get(schema.domain, 0))
    # confidence = the second best over domains of (best stable member's): one domain alone proves nothing
    core.confidence = sorted([0.0, 0.0, *best.values()])[-2]
    core.status = "stable" if core.confidence else "dormant"


def plan_intentions(store, now, intentions):
    """Plans with a last day, told by people who speak here."""
    for belief in store.beliefs.values():
        person = belief.slot.subject
        if not belief.until or person not in store.people or belief.id in store.forgotten:
            continue
        id_ = f"i{digest(person, key(belief.value), belief.until)}"
        item = intentions.setdefault(id_, Intention(id_, person, "", belief.value, now, until=belief.until))
        item.evidence = sorted({*item.evidence, belief.id})
    for item in intentions.values():
        item.status = "expired" if item.until < now[:10] else "open"
        if not store.live(item.evidence):
            item.status = "withdrawn"


def night(memory, now):
    """System2, all or nothing: first the whole plan, then one event. Without a write only plans lapse."""
    nodes = copy.deepcopy({kind: getattr(memory, kind) for kind in KINDS})
    live = {}
    for kind, found in nodes.items():
        for node in found.values():
            # What cites a belief that was asked to be forgotten is gone: its text may give it away.
            if not memory.forgotten.isdisjoint(node.evidence):
                node.status = "withdrawn"
                node.evidence = []
        live[kind] = {i: node for i, node in found.items() if node.status != "withdrawn"}
    # The watermark: a model asked twice about the same facts may find other schemas, so it is asked once.
    if memory.has_news:
        plan_schemas(memory, now, live["schemas"])
        for schema in live["schemas"].values():
            recount(schema, memory)
        plan_cores(memory, now, live["schemas"], live["cores"])
        for core in live["cores"].values():
            recount_core(core, live["schemas"])
    plan_intentions(memory, now, nodes["intentions"])  # all: a plan that was cancelled may come back
    changes = {}
    for kind, found in nodes.items():
        found |= live[kind]
        before = getattr(memory, kind)
        changes[kind] = [asdict(found[i]) for i in sorted(found) if found[i] != before.get(i)]
    if memory.has_news or any(changes.values()):
        memory.commit("SLEEP", now=now, **changes)


# ------------------------------------------------------------------ 2.4 reading: vectors and links, no model
ANSWER = """What is known about the user:
{context}

Question: {question}
Answer briefly from what is known; if it is not known, say that there is no information."""
SCHEMA_LINES = 4  # a channel of their own, above the budget: the authors' quota of 40 % of ten profile lines
PROFILE = 0.2  # share of the budget for single-valued attributes
COMING = 0.1  # and for intentions
RRF_K = 10  # of the fusion; fixed on two LoCoMo conversations, where 1 to 60 differ little


class Line(namedtuple("Line", "id channel text t")):
    """One line of context. channel: schema (cores as well), fact, intention or raw."""

    def __str__(self):
        return f"[{self.id}] {self.text}"


Recall = namedtuple("Recall", "lines text ids")


class Index:
    """What the search reads of all turns and beliefs, made anew only when something was written."""

    def __init__(self, memory):
        self.events = len(memory.log)
        records = memory.turns | memory.beliefs
        self.ids = list(records)
        texts = texts_of(records.values())
        self.words = memory.word_vectors(texts)                                     # (records, d)
        # idf(w) = 1 + ln((N + 1) / (n + 1)), n of N records have the word w
        self.idf = 1 + np.log((len(texts) + 1) / (self.words.getnnz(0) + 1))        # (d,)
        self.meaning = memory.vectors(texts) if memory.encoder != "words" else None
        self.earlier = []  # places of turns ...
        self.later = []  # ... and of the next ones in their sessions
        last = {}  # session -> place of its last turn
        for place, turn in enumerate(memory.turns.values()):
            if turn.session in last:
                self.earlier.append(last[turn.session])
                self.later.append(place)
            last[turn.session] = place


def with_neighbours(scores, index, least):
    """A turn's own score, half of the turn before, a fifth of the one after; 0 where under `least`."""
    # an answer seldom repeats the words of its question
    total = scores.copy()                                                           # (records,)
    total[index.later] += 0.5 * scores[index.earlier]
    total[index.earlier] += 0.2 * scores[index.later]
    return np.where(total >= least, total, 0)


def fuse(rankings):
    """Several scores of the records, each (records,) -> one, by the ranks alone; 0 is no rank."""
    fused = 0
    for scores in rankings:
        ranks = rankdata(-scores, method="ordinal")                                 # (records,) 1 is the best
        # score(d) = sum over rankings of 1 / (k + rank(d)): Cormack et al. 2009
        fused = fused + np.where(scores > 0, 1 / (RRF_K + ranks), 0)
    return fused


def search(memory, question):
    """Turns and beliefs by relevance: [(score, id)], best first."""
    if not memory.turns:
        return []
    if not memory.index or memory.index.events != len(memory.log):
        memory.index = Index(memory)
    index = memory.index
    # Names are no search words: in a dialogue it is mostly the *other* speaker who says one.
    names = set(words(" ".join(memory.people)))
    query = " ".join(w for w in question.split() if names.isdisjoint(words(w))) or question
    # idf twice: once for the question's words, once for the records', whose rows have none
    rare = memory.word_vectors.embed([query]).multiply(index.idf ** 2)              # (1, d)
    by_words = (index.words @ normalize(rare).T).toarray()[:, 0]                    # (records,)
    scores = with_neighbours(by_words, index, LIMITS["words"].hit)
    if index.meaning is not None:
        by_meaning = index.meaning @ memory.vectors.embed([query])[0]               # (records,)
        scores = fuse([scores, with_neighbours(by_meaning, index, memory.limits.hit)])
    found = []
    for place in np.argsort(-scores, kind="stable")[:300]:
        if scores[place] > 0 and index.ids[place] not in memory.hidden:
            found.append((float(scores[place]), index.ids[place]))
    return found


def is_supported(memory, node):
    """Is enough of its evidence alive now? By day no write touches a node, so the reader looks."""
    chains = chains_of(memory.live(node.evidence))
    return node.status == "stable" and len(chains) >= 2 and memory.forgotten.isdisjoint(node.evidence)


def visible_schemas(memory, question, now):
    """Schemas and cores to show, best first: those of the question's domain, cores, the rest."""
    def rank(node):  # decay is applied while reading: stored, it would depend on how often System2 runs
        seen = max(memory.beliefs[i].t_seen for i in node.evidence)
        idle = (day_of(now) - day_of(seen)).days
        return -node.confidence * 2 ** (-idle / 180), node.id  # half-life: half a year without new evidence
    schemas = [s for s in memory.schemas.values() if is_supported(memory, s)]
    if not schemas:
        return []
    schemas.sort(key=rank)
    cores = []
    for core in memory.cores.values():
        domains = {s.domain for s in schemas if s.id in core.members}
        if is_supported(memory, core) and len(domains) >= 2:
            cores.append(core)
    # Schemas of the question's own domain come first; where it has none, cores speak for it.
    query = memory.vectors.embed([question])                                        # (1, d)
    close = cosines(memory.vectors(texts_of(schemas)), query)[:, 0]                 # (schemas,)
    of_domain = [s for s, cosine in zip(schemas, close) if cosine >= memory.limits.domain]
    others = [s for s in schemas if s not in of_domain]
    return of_domain + sorted(cores, key=rank) + others


def chain_line(store, slot):
    """A chain as one line, "Paris (2024-01-05) → Berlin (2025-03-01, current)"; no suppressed nodes."""
    chain = [b for b in store.trail(slot) if b.status != "suppressed"]
    if not chain:
        return None
    last = chain[-1]
    if len(chain) == 1 and last.status == "active":
        return Line(last.id, "fact", f"{last.t_event[:10]} {slot.subject}: {last.text}", last.t_event)
    steps = []
    for belief in chain:
        step = belief.text if belief.link_kind == "refine" else belief.value or "none"
        if belief.polarity < 1 and belief.value:
            step = f"no longer {step}"
        # Where the present was to be forgotten, what is left is the past and is not called current.
        mark = ", current" if belief.status == "active" else ""
        steps.append(f"{step} ({belief.t_event[:10]}{mark})")
    return Line(last.id, "fact", f"{slot.subject} {slot.attribute}: {' → '.join(steps)}", last.t_event)


def chain_lines(store, slots):
    lines = (chain_line(store, slot) for slot in slots)
    return list(filter(None, lines))


def asked_lines(memory, question):
    """The chains that a question asks for."""
    pairs = memory.backend.asks_for(memory, question)
    return chain_lines(memory, [slot for slot in memory.heads if slot[:2] in pairs])


def intention_lines(memory, now):
    """What is still to come, the nearest first; a lapsed plan is never shown as one."""
    lines = []
    for item in sorted(memory.intentions.values(), key=lambda item: item.until):
        if item.until >= now[:10] and memory.live(item.evidence):
            lines.append(Line(item.id, "intention", f"planned until {item.until}: {item.text}", item.until))
    return lines


def hit_lines(memory, question):
    """What the search finds: a belief as its chain; a turn only if no belief above it rests on it."""
    lines = []
    cited = set()
    for _, id_ in search(memory, question):
        if id_ in memory.beliefs:
            belief = memory.beliefs[id_]
            lines += chain_lines(memory, [belief.slot])
            cited.update(told_in(belief))
        elif id_ not in cited:
            turn = memory.turns[id_]
            lines.append(Line(id_, "raw", f"{turn.t[:10]} {turn.speaker}: {turn.text}", turn.t))
    return lines


# ------------------------------------------------------------------ the memory
class Memory(Store):
    """A store with a backend, Rules() or LLM(chat), and an encoder: "words", a folder or a hub id."""

    def __init__(self, backend=None, encoder="words", log=()):
        super().__init__(log)
        self.backend = backend or Rules()
        self.encoder = encoder
        self.word_vectors = Vectors(embed_for_search)
        self.vectors = Vectors(embed_words if encoder == "words" else sentence_encoder(encoder))
        self.limits = LIMITS.get(encoder, LIMITS["mpnet"])
        self.index = None  # of the search

    def observe(self, text, t, session="", speaker="user"):
        """System1, in the write: keep the raw turn first, then extract, reconcile, apply. -> [(op, id)], []
        where nothing was read: the turn is kept all the same and can be found by its words. Without a name
        of its own a day is a session."""
        return self.ingest([(text, t, session or t[:10], speaker)])[0]

    def ingest(self, turns):
        """[(text, t, session, speaker)] -> [[(op, id)]]. All turns are extracted in one batch."""
        kept = []
        for text, t, session, speaker in turns:
            if str(day_of(t)) != t[:10]:  # dates are compared as strings
                raise DcpmError(f"{t!r} does not start with a date like 2024-05-01")
            kept.append(Turn(f"t{len(self.turns) + len(kept) + 1}", session, speaker, text, t))
        for turn in kept:
            self.commit("RAW", turn=turn)
        out = []
        for turn, (claims, forget) in zip(kept, self.backend.extract(self, kept)):
            if claims is None:  # the turn is kept, the failure is on record, a plain request is honoured
                self.commit("FAILED", turn_id=turn.id)
                claims = []
                forget = asked_to_forget(turn.text)
            self.backend.reconcile(self, claims)
            ops = write_claims(self, turn, claims)
            for phrase in forget:
                ops += [("SUPPRESS", id_) for id_ in self.forget(phrase, turn.id)]
            out.append(ops)
        return out

    def forget(self, what, turn=""):
        """Suppress beliefs and hide the turns that say them; nothing is deleted. -> ids. A belief about
        something else that mentions it stays, and has to be named."""
        speaker = self.turns[turn].speaker if turn else [*self.people, "user"][0]
        ids = self.backend.forgets(self, what, speaker)
        ids = sorted(set(ids) - self.forgotten)
        hide = set()  # turns of which no belief was made are found here alone
        for secret in (what, *(self.beliefs[i].value for i in ids)):
            hide.update(told.id for told in self.turns.values() if says(told.text, secret))
        if ids or hide:
            self.commit("SUPPRESS", ids, turn, hide=sorted({turn, *hide} - {""}))
        return ids

    def sleep(self, now):
        """System2. `now`: an ISO date; nothing reads the wall clock."""
        night(self, now)

    def recall(self, question, now, budget=800):
        """Question -> Recall within `budget` tokens, SCHEMA_LINES schemas and cores beside it; no filler."""
        chosen = {}
        for node in visible_schemas(self, question, now)[:SCHEMA_LINES]:
            chosen[node.id] = Line(node.id, "schema", node.text, node.created)
        # What is asked for comes first; small fixed shares next, so that many hits cannot push them out.
        people = self.mentioned(question)
        profile = [slot for slot in self.heads if slot.subject in people and slot.member is None]
        left = budget
        for lines, share in ((asked_lines(self, question), 1), (chain_lines(self, profile), PROFILE),
                             (intention_lines(self, now), COMING), (hit_lines(self, question), 1)):
            least = max(0, left - int(budget * share))  # what these lines must leave
            for line in lines:
                cost = count_tokens(str(line))
                if line.id not in chosen and left - cost >= least:  # whole lines only
                    chosen[line.id] = line
                    left -= cost

        def state_order(line):  # cores (c...), schemas (s...), then everything by time, t2 before t10
            return "" if line.channel == "schema" else line.t, len(line.id), line.id
        lines = sorted(chosen.values(), key=state_order)
        return Recall(lines, "\n".join(map(str, lines)), ids_of(lines))

    def answer(self, question, now):
        """-> (text, ids that it rests on)."""
        return self.backend.answer(self, question, now)

    def why(self, id_):
        """core -> schemas -> beliefs -> the verbatim span of the raw turn, as a nested dictionary."""
        node = ChainMap(self.cores, self.schemas, self.intentions, self.beliefs, self.turns).get(id_)
        if node is None:
            raise DcpmError(f"there is no record {id_!r}; recall(...).ids lists the ids you can ask about")
        cited = getattr(node, "evidence", ())
        # a higher node that cites nothing was withdrawn by the night
        if id_ in self.hidden or cited == [] or not self.forgotten.isdisjoint([id_, *cited]):
            return {"id": id_, "text": "(forgotten on request)", "because": []}
        because = [self.why(i) for i in getattr(node, "members", cited)]
        for turn_id, start, end, _ in getattr(node, "sources", ()):
            turn = self.turns[turn_id]
            said = turn.text[start:end]
            if turn_id in self.hidden and said == turn.text:  # a part may be seen, never the whole
                said = "(not shown: it also says what was asked to be forgotten)"
            because.append({"id": turn_id, "t": turn.t, "text": said, "because": []})
        return {"id": id_, "text": node.text, "because": because}

    def save(self, path):
        """The audit log as JSON, written beside the target and moved over it: a crash spoils nothing."""
        part = Path(f"{path}.part")
        part.write_text(json.dumps(self.log), encoding="utf-8")
        part.replace(path)

    @classmethod
    def load(cls, path, backend=None, encoder="words"):
        try:
            return cls(backend, encoder, json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DcpmError(f"{path} is not a memory saved by dcpm.py ({error}); restore a copy") from error


# ==================================================================== backends: all that needs language
class Backend:
    """The eight jobs. Here the paper ends: nothing above this line uses a name below it, but for defaults.

        extract(memory, turns)        -> [(claims or None: no usable answer, what to forget)], one a turn
        reconcile(memory, claims)     sets claim.slot where a claim belongs to a chain
        forgets(memory, phrase, who)  -> ids of the beliefs that `who` means by a request to forget
        asks_for(memory, question)    -> [(subject, attribute)] of the chains asked for; [] = search alone
        induce(memory, clusters, noise, known)  -> drafts of schemas, from clustered facts and the rest
        strip(memory, schemas)        -> the behaviour of each, without the nouns of its domain
        name_core(members)            -> one sentence that explains these schemas, or None
        answer(memory, question, now) -> (text, ids that it rests on)
    """


# Words with capital letters; what comes after them is not the name: "Acme as an engineer".
NAME = r"(the )?(?P<value>(?-i:[A-Z])\S*( ((of|de|&) )?(?-i:[A-Z0-9])\S*)*).*"
# One row an attribute, the first that fits is read. To teach the memory a new one, add a row.
# name, with a hint for a model | one value at a time or many | how it is said | how a question asks for it
# In what is said, NAME is a value with a capital letter ("I joined a gym" is no job), VALUE any; "+" holds,
# "@" too, but only with a date, ">" with one to come, "-" no longer, "0" taken back. "I" is whoever it is
# about, "my" is theirs.
TABLE = """
plan (with a date) | many | > I (am|is|will|plan to) VALUE | -
residence (a place) | one | + I lives? in NAME; + I (am|is) (living|back) in NAME; \
+ I moved (back )?to NAME; @ I (lived|was living) in NAME | live|lived|moved? to
employer (a company) | one | + I works? (at|for) NAME; + I joined NAME; + I started (working )?at NAME; \
@ I worked (at|for) NAME; 0 I (lost|quit|left) (my|his|her) job | work|employer|job
occupation (a profession) | one | + my job is an? VALUE; + I works? as an? VALUE | profession|job
name (their own) | one | + my name is NAME; + I (am|is) called NAME | my name|am I called
partner | one | + I (am|is) (married|engaged) to VALUE | partner|married|engaged
diet | one | + I (am|is|became) an? (?P<value>vegan|vegetarian) | diet
condition (health) | many | + I have (?P<value>migraines?|asthma|diabetes|insomnia|allergies)( .*)? | -
possession | many | + I (have|has|own|owns|bought|got|adopted) an? VALUE; \
- I (sold|lost|gave away) (my|his|her) VALUE | -
hobby | many | + I (plays?|took up) VALUE | -
likes | many | + I (likes?|loves?|enjoys?|(am|is) [a-z]+ing(?= .+ again)) VALUE; \
- I (dislikes?|hates?|gave up|stopped|quit) VALUE | -"""
# told: the name and its hint; frames: [(sign, pattern)]
Attribute = namedtuple("Attribute", "told single frames asked")


def read_table(table):
    """The rows -> {name: Attribute}."""
    attributes = {}
    for row in table.strip().split("\n"):
        told, how_many, said, asked = row.split(" | ")
        frames = []
        for frame in said.split("; "):
            sign, pattern = frame.split(" ", 1)
            pattern = pattern.replace("NAME", NAME)
            pattern = pattern.replace("VALUE", "(?P<value>.+)")
            frames.append((sign, re.compile(f"^{pattern}$", re.I)))
        question = re.compile(rf"\b({asked})\b", re.I) if asked != "-" else None
        attributes[told.split(" ")[0]] = Attribute(told, how_many == "one", frames, question)
    return attributes


ATTRIBUTES = read_table(TABLE)


def placed(claim, speaker, t_event, until):
    """A claim with its dates, and what follows from its attribute and from who tells it."""
    claim.t_event = t_event
    claim.until = until if claim.attribute == "plan" else ""
    claim.single = claim.attribute in ATTRIBUTES and ATTRIBUTES[claim.attribute].single
    claim.reliability = 0.9 if claim.subject == speaker else 0.4
    return claim


# ------------------------------------------------------------------ a language model and a sentence encoder
class LLM(Backend):
    """A chat model. `chat`: conversations -> texts or None.

    It proposes; the decision table and the store dispose: it chooses among ids it was shown and sets no link.
    """

    def __init__(self, chat):
        self.chat = chat
        self.tally = Counter()
        self.failures = Counter()

    def ask(self, kind, prompts, check):
        """prompts -> [check(JSON object) or None], all prompts in one batch; three tries each."""
        import common  # only here: the rule backend needs neither torch nor transformers
        system = {"role": "system", "content": STRICT}
        talks = [[system, {"role": "user", "content": prompt}] for prompt in prompts]
        replies = common.ask(self.chat, talks, check, tally=self.tally)
        self.failures[kind] += replies.count(None)
        return replies

    def extract(self, memory, turns):
        asked = [turn for turn in turns if turn.speaker != "assistant" and words(statements(turn))]
        prompts = [extract_prompt(memory, turn) for turn in asked]
        checks = [functools.partial(read_claims, memory, turn) for turn in asked]
        replies = dict(zip(asked, self.ask("extract", prompts, checks)))
        return [replies.get(turn, ([], [])) or (None, []) for turn in turns]

    def reconcile(self, memory, claims):
        """Match claims to the chains they belong to. A single slot needs no model to be found."""
        shown = near_chains(memory, [claim.text for claim in claims if not claim.single])
        if not shown:
            return  # nothing near: the decision table needs no help
        items = [f"{i}. {claim.text}" for i, claim in enumerate(claims)]
        prompt = RECONCILE.format(chains="\n".join(shown.values()), items="\n".join(items))
        check = functools.partial(read_operations, shown, len(claims))
        for id_, (item, op) in (self.ask("reconcile", [prompt], check)[0] or {}).items():
            claim = claims[item]
            head = memory.beliefs[id_]
            if claim.subject != head.slot.subject or claim.single:
                continue  # the chain of someone else; a single-valued claim has a chain of its own
            claim.slot = head.slot
            if op != "SUPERSEDE":
                claim.value = head.value
                claim.polarity = head.polarity
                claim.until = claim.until or head.until
            if op == "REFINE":
                claim.text = f"{head.text}; {claim.text}"

    def forgets(self, memory, phrase, who):
        return memory.containing(phrase)

    def asks_for(self, memory, question):
        return []  # reading asks no model: the profile's share and the search must do

    def induce(self, memory, clusters, noise, known):
        """Each cluster, and the facts in none, by portions of 30 with a fact that no schema cites yet."""
        cited = set().union(*(s.evidence + s.against for s in known))
        groups = []
        for facts in (*clusters, noise):
            groups += [facts[i:i + 30] for i in range(0, len(facts), 30)]
        prompts = []
        checks = []
        for group in groups:
            ids = set(ids_of(group))
            if len(group) < 3 or ids <= cited:
                continue
            facts = [f"[{b.id}] {b.t_event[:10]} {memory.said(b)}" for b in group]
            prompt = INDUCE.format(person=group[0].slot.subject, facts="\n".join(facts))
            if known:
                prompt += KNOWN.format(known="\n".join(f"[{s.id}] {s.domain}: {s.text}" for s in known))
            prompts.append(prompt)
            checks.append(functools.partial(read_drafts, ids, {None, *ids_of(known)}))
        replies = self.ask("induce", prompts, checks)
        return sum(filter(None, replies), [])

    def strip(self, memory, schemas):
        """A schema's text never changes, so it is asked for once."""
        new = [s for s in schemas if not s.behaviour]
        prompts = [STRIP.format(text=text) for text in texts_of(new)]
        replies = self.ask("strip", prompts, lambda data: " ".join(str(data["behaviour"] or "").split()))
        texts = dict(zip(ids_of(new), replies))
        return [s.behaviour or texts[s.id] or "" for s in schemas]

    def name_core(self, members):
        prompt = CORE.format(schemas="\n".join(f"{s.domain}: {s.text}" for s in members))
        return self.ask("core", [prompt], lambda data: str(data["text"] or ""))[0]

    def answer(self, memory, question, now):
        context = memory.recall(question, now)
        prompt = ANSWER.format(context=context.text or "(nothing)", question=question)
        reply = self.chat([[{"role": "user", "content": prompt}]])[0]
        self.tally["calls"] += 1
        self.failures["answer"] += not reply  # not "no information": that would score as a right abstention
        return reply or "(no answer)", context.ids


def statements(turn):
    """A turn without its questions: a model makes claims of them."""
    return re.sub(r"[^.!?\n]*\?+", "", turn.text).strip()


def extract_prompt(memory, turn):
    """EXTRACT with the last two turns of the sitting, which may say what the new one is about."""
    sitting = [t for t in memory.turns.values() if t.session == turn.session]
    last = sitting[:sitting.index(turn)][-2:]
    before = "\n".join(f"{t.speaker}: {t.text[:300]}" for t in last if t.id not in memory.hidden)
    attributes = ", ".join(row.told for row in ATTRIBUTES.values())
    return EXTRACT.format(t=turn.t, before=before or "(none)", text=statements(turn), speaker=turn.speaker,
                          attributes=attributes)


def read_claims(memory, turn, data):
    """The reply to EXTRACT -> (claims, what to forget). A quote that is not in the message is invented."""
    claims = []
    people = {person.lower(): person for person in memory.people}
    for fields in data["claims"]:
        value = str(fields["value"])
        polarity = fields.get("polarity", 1)
        attribute = fields.get("attribute")
        quote = re.findall(r"\w+", str(fields["quote"]))
        found = re.search(r"\W+".join(quote), turn.text, re.I)  # only its punctuation may differ
        if not quote or not found or not key(value) or polarity not in (1, 0, -1):
            continue
        subject = str(fields.get("subject") or turn.speaker).lower().removeprefix("the ")
        if subject in ("user", "i", "me"):
            subject = turn.speaker
        subject = people.get(subject, subject)  # as the store writes the name
        t_event, until = read_date(found[0], turn.t)
        if attribute not in ATTRIBUTES or (attribute == "plan" and not until):
            attribute = "event"  # a plan without an end is none
        claim = Claim(attribute, value, str(fields["text"]), found.span(), subject, polarity)
        claims.append(placed(claim, turn.speaker, t_event, until))
    return claims, list(filter(words, map(str, data.get("forget") or [])))


def near_chains(memory, texts):
    """The chains of the 20 beliefs nearest to new texts: {id of the head: its chain as a line}."""
    known = [b for b in memory.beliefs.values() if b.slot.member is not None]
    shown = {}
    if not known or not texts:
        return shown
    near = cosines(memory.vectors(texts_of(known)), memory.vectors(texts)).max(1)   # (beliefs,)
    for i in np.argsort(-near, kind="stable")[:20]:
        head = memory.head(known[i].slot)
        if near[i] >= memory.limits.near and head.status == "active":
            shown[head.id] = str(chain_line(memory, head.slot))
    return shown


def read_operations(shown, count, data):
    """The reply to RECONCILE -> {id: (item, op)}, the first operation on a node."""
    operations = {}
    for fields in data["operations"]:
        id_ = fields["id"]
        item = int(fields["item"])
        op = fields["op"]
        if id_ not in shown or not 0 <= item < count or op not in ("CONFIRM", "REFINE", "SUPERSEDE"):
            raise ValueError("it names an item, an op or an id that was not offered")
        if item not in [taken for taken, _ in operations.values()]:  # an item goes to one chain
            operations.setdefault(id_, (item, op))
    return operations


def read_drafts(shown, known, data):
    """The reply to INDUCE -> drafts, refused if they name an id that was not shown."""
    drafts = []
    for fields in data["schemas"]:
        domain = fields["domain"]
        text = fields["text"]
        evidence = set(fields.get("evidence") or [])
        against = set(fields.get("against") or [])
        links = (fields.get("known"), fields.get("replaces"))
        if not evidence | against <= shown or not known.issuperset(links):
            raise ValueError("all ids must be among those shown: facts, or known regularities")
        if not domain or not text:
            raise ValueError("domain and text must not be empty")
        drafts.append(Draft(str(domain).lower(), str(text), evidence, against, *links))
    return drafts


@functools.cache
def sentence_encoder(name):
    """Folder or hub id -> embed(texts) -> (n, d) unit rows: mean pooling over the tokens."""
    import common
    import torch
    from transformers import AutoModel
    model, tok = common.load_pretrained(name, AutoModel, torch.float32)
    tok.padding_side = "right"

    @torch.no_grad()
    def embed(texts):
        rows = np.empty((len(texts), model.config.hidden_size), np.float32)         # (n, d)
        # Texts of similar length share a batch: little is padding, and the mask takes that out again.
        order = np.argsort(list(map(len, texts)))
        for start in range(0, len(texts), 32):
            places = order[start:start + 32]
            batch = tok([texts[i] for i in places], padding=True, truncation=True, max_length=256,
                        return_tensors="pt")
            hidden = model(**batch).last_hidden_state                               # (B, T, d)
            mask = batch["attention_mask"][..., None]                               # (B, T, 1)
            rows[places] = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
        return normalize(rows)
    return embed


# ------------------------------------------------------------------ a lexicon of behaviours and domains
# One row a pole of behaviour: name | its opposite | gloss | phrases that show it.
LEXICON = """
plans | improvises | plans ahead and prepares in detail | checklist, list, schedule, itinerary, \
spreadsheet, in advance, weeks ahead, timetable, plan ahead, mapped out, draw up, drew up, prepare, \
outline, agenda, ahead of time, step by step
improvises | plans | improvises and decides on the spot | on a whim, spontaneous, last minute, spur of the \
moment, improvise, made it up, without a plan, wing it, winged it, on the fly, see what happen, no idea \
beforehand, unplanned
saves | spends | saves money and looks for the cheaper way | cheap, cheaper, discount, second hand, coupon, \
bargain, on sale, budget, for free, haggle, borrow, save money, thrifty
spends | saves | spends freely and takes the best there is | splurge, expensive, luxury, premium, top of \
the range, first class, treat myself, pay extra, paid extra, priciest, regardless of price, deluxe
alone | together | likes to do things alone | alone, by myself, on my own, solo, solitude, in peace, quiet \
corner, nobody around, without company
together | alone | likes to do things with other people | together, with friend, group, invite, crowd, \
company of, whole gang, team up, teamed up, everyone, joined by
careful | daring | is careful and plays it safe | careful, double check, safe, insurance, backup, spare, \
read the warning, just in case, cautious, helmet, twice before
daring | careful | is daring and takes risks | risk, dare, without looking, deep end, gamble, threw \
caution, bold, thrill, adrenaline, dangerous, reckless, edge
routine | novelty | sticks to what is familiar | same as always, usual, the same, routine, habit, as ever, \
familiar, every time, tradition, old favourite, as before
novelty | routine | looks for what is new | never tried, new kind, first time, experiment, exotic, \
something different, novel, curious, unknown, unusual, untested
makes | buys | makes things by hand | from scratch, by hand, built, homemade, handmade, sewed, carved, diy, \
made my own, workshop, knitted, glued
buys | makes | buys things ready-made | ready made, bought, store, order online, ordered, delivery, off the \
shelf, from the shop, prepackaged, catalogue, hired
exact | rough | is exact and measures | exact, measure, precise, to the gram, to the minute, ruler, scale, \
stopwatch, decimal, count every, calibrate
rough | exact | goes by feel, roughly | roughly, by feel, eyeball, more or less, guess, approximate, give \
or take, ballpark, by eye, rule of thumb
paper | digital | prefers paper | paper, notebook, printed, pencil, handwritten, ink, sticky note, index \
card, fountain pen
digital | paper | prefers digital tools | app, spreadsheet app, tablet, online tool, cloud, software, phone \
reminder, digital"""
POLES = {}  # name -> (its opposite, its gloss)
CUES = []  # (stemmed phrase between spaces, the pole that it shows)
for row in LEXICON.strip().split("\n"):
    name, opposite, gloss, cues = row.split(" | ")
    POLES[name] = (opposite, gloss)
    for cue in (gloss, *cues.split(", ")):  # a schema's own text shows its pole
        CUES.append((f" {' '.join(map(stem, cue.split()))} ", name))
DOMAINS = """
cooking: cook dinner bake cake stew kitchen meal recipe lunch soup roast pasta
travel: trip flight journey travel hotel holiday vacation airport ferry
work: work report office meeting presentation client deadline project colleague conference
garden: garden flower bed seed tomato lawn hedge rose compost greenhouse
sport: run marathon gym race hike swim workout climb
home: flat apartment kitchenette shelf shelves wall furniture bedroom repair bathroom
music: guitar concert song piano choir record band gig melody
study: exam course class lecture essay thesis study homework seminar
party: birthday party wedding celebration anniversary picnic reunion
gifts: gift present gifts presents wrapping
pets: dog puppy cat kitten vet leash aquarium
photo: photo camera portrait lens album darkroom"""
NOUNS = {}  # stem -> domain
for row in DOMAINS.strip().split("\n"):
    domain, nouns = row.split(": ")
    NOUNS.update(dict.fromkeys(map(stem, nouns.split()), domain))


@functools.cache
def poles_of(text):
    """Behaviour poles that a text shows, by lexicon."""
    padded = f" {' '.join(map(stem, re.findall('[a-z0-9]+', text.lower())))} "
    return tuple(sorted({pole for cue, pole in CUES if cue in padded}))


def domain_of(text):
    """The domain that most of the text's nouns belong to; "" if none."""
    return most_common(NOUNS[w] for w in words(text) if w in NOUNS)


def most_common(names):
    """The most frequent name, of equals the first in the alphabet; "" if there is none."""
    counts = Counter(names)
    return max(sorted(counts), key=counts.get, default="")


def features(text, weight):
    """Words, and the concepts of the lexicon at `weight` times the weight of a word."""
    concepts = [f"<{name}>" for name in (*poles_of(text), domain_of(text)) if name]
    return words(text) + weight * concepts


def hashed(weight):
    """-> embed(texts) -> (n, 32768) sparse unit rows; no model, no download."""
    return HashingVectorizer(analyzer=functools.partial(features, weight=weight),
                             n_features=2 ** 15, alternate_sign=False,
                             dtype=np.float32).transform


embed_words = hashed(3)
# In search a concept counts as one word: at its full weight it would hide the words of a turn (recall@10 on
# LoCoMo .68 / .70, not .73 / .72).
embed_for_search = hashed(1)


# ------------------------------------------------------------------ rules: a controlled English
# What the story, the tests and the miniature benchmark speak: the frames of the table, plans with a date, and
# all other clauses in which "I" or "my sister" comes early, as free facts. A clause with a question mark, in
# quotation marks, with "maybe", "would" and the like, or without such a subject gives nothing.
RELATIVES = "sister|brother|mother|father|wife|husband|partner|son|daughter|friend|neighbour|colleague|boss"
WHO = rf"(?P<who>(?:{RELATIVES})\b(?: [A-Z][a-z]+\b)?)"
SUBJECT = re.compile(rf"^(?P<lead>.{{0,40}}?)\b(?:I|[Mm]y {WHO}) (?P<rest>.+)$", re.S)
OWNER = re.compile(rf"^(?P<lead>.{{0,40}}?)\b[Mm]y (?:{WHO}'s )?(?P<rest>.+)$", re.S)
SHORT = {"’": "'", "I'm": "I am", "I'll": "I will", "I've": "I have", "n't": " not"}
START = r"^(?P<start>I(?: am| is| have| will)?|my [a-z ]+? is)"
NOT = re.compile(rf"{START} (?:(?:(?:do |does |did )?not(?: going to)?|no longer|never|used to) )", re.I)
ADVERB = re.compile(rf"{START} (?:(?:still|now|also|just|currently|really|finally) )+", re.I)
LEAD = re.compile(rf"^(?:and|but|so|now|well|these\ days|{DATE.pattern}|[\s,;])*$", re.I | re.X)
UNSURE = re.compile(r"\b(?:maybe|might|perhaps|thinking of|if|would|wish|imagine)\b", re.I)


def read_rules(turn):
    """Turn -> (claims, phrases to forget). An assistant claims nothing: a suggestion is no preference."""
    claims = []
    forget = []
    for start, clause, is_question in clauses(turn.text) if turn.speaker != "assistant" else ():
        request = FORGET.match(clause)
        if request:
            forget.append(request[1])
        elif words(clause) and not is_question:
            claim = read_clause(clause, turn.speaker, turn.t)
            if claim:
                end = start + len(clause)
                claim.span = (start, end)
                claim.text = turn.text[start:end]
                claims.append(claim)
    return claims, forget


def clauses(text):
    """-> (start, clause, does its sentence end in a question mark?); quoted speech is blanked out."""
    text = re.sub(r'"[^"]*"|“[^”]*”', lambda quoted: " " * len(quoted[0]), text)
    for sentence in re.finditer(r"(?:[.](?=\w)|(?<=\b(?:St|Mr|Ms|Dr))[.]|[^.!?\n])+[.!?]*", text):
        start = sentence.start()
        for piece in re.split(r"(;|,? (?:and|but) (?=I\b|my\b))", sentence[0]):
            clause = piece.strip(" .,;!?")
            yield start + piece.find(clause), clause, "?" in sentence[0][-3:]
            start += len(piece)


def read_clause(clause, me, t):
    """One clause -> Claim, or None: no subject that we know, a hedge or a hypothesis."""
    for short, long in SHORT.items():
        clause = clause.replace(short, long)
    if UNSURE.search(clause):
        return None
    t_event, until = read_date(clause, t)
    for opening, pronoun in ((OWNER, "my"), (SUBJECT, "I")):
        match = opening.match(clause)
        claim = match and read_frame(f"{pronoun} {match['rest']}", match["lead"], t_event != t, until)
        if claim:
            break
    if not match:
        return None
    claim = claim or Claim("event", clause)  # no frame fits: the whole clause, with its "not"
    claim.subject = me
    if match["who"]:
        claim.subject = match["who"] if me == "user" else f"{me}'s {match['who']}"
    return placed(claim, me, t_event, until)


def read_frame(said, lead, is_past, until):
    """A clause that begins with "I" or "my" -> the Claim of the first frame that fits, or None."""
    if not LEAD.match(lead):
        return None
    positive, sign = without_not(" ".join(DATE.sub(" ", said).split()))
    for attribute, row in ATTRIBUTES.items():
        for mark, pattern in row.frames:
            match = pattern.match(positive)
            if not match or (mark == "@" and not is_past) or (mark == ">" and not until):
                continue  # "I lived in Rome" tells no date
            value = tidy(match.groupdict().get("value", ""))
            polarity = {"-": -1, "0": 0}.get(mark, 1)
            if key(value) or polarity == 0:
                return Claim(attribute, value, polarity=polarity * sign, past=mark == "@")
    return None


def without_not(said):
    """-> (a clause without its "not" and adverbs, +1 or -1)."""
    plain = ADVERB.sub(r"\g<start> ", said)
    positive = NOT.sub(r"\g<start> ", plain)
    return ADVERB.sub(r"\g<start> ", positive), 1 if positive == plain else -1


def tidy(value):
    """Cut what is not the value: reasons, qualifiers, articles."""
    value = re.split(r",| because | so that | mostly ", value)[0].strip(" .!,")
    return re.sub(r"^(?:the|an?|my|some) ", "", re.sub(r" (?:anymore|again|too|now|on|in)$", "", value))


def attributes_asked(question):
    """The attributes of the table that a question asks for."""
    return [name for name, row in ATTRIBUTES.items() if row.asked and row.asked.search(question)]


class Rules(Backend):
    """The jobs without a model."""

    def extract(self, memory, turns):
        return [read_rules(turn) for turn in turns]

    def reconcile(self, memory, claims):
        """Nothing to do: a frame names its slot."""

    def forgets(self, memory, phrase, who):
        """As a claim ("I live in Paris") it names a slot and a value; else all its content words count."""
        today = max((turn.t for turn in memory.turns.values()), default="2000-01-01")
        claim = read_clause(phrase, who, today)
        ids = []
        if claim and claim.attribute != "event":
            chain = memory.trail(slot_of(memory, claim))
            ids = ids_of(b for b in chain if key(b.value) == key(claim.value))
        return ids or memory.containing(phrase)

    def asks_for(self, memory, question):
        return list(product(memory.mentioned(question), attributes_asked(question)))

    def induce(self, memory, clusters, noise, known):
        """At most one draft a cluster: the domain and the behaviour that most of its sentences show."""
        pool = sum(clusters, noise)
        ids = {schema.text: schema.id for schema in known}
        for cluster in clusters:  # facts in no cluster give none: what DBSCAN finds decides
            texts = texts_of(cluster)
            domain = most_common(filter(None, map(domain_of, texts)))
            pole = most_common(sum(map(poles_of, texts), ()))
            if not domain or not pole:
                continue
            opposite = POLES[pole][0]
            person = cluster[0].slot.subject.replace("user", "the user")
            text = f"In {domain}, {person} {POLES[pole][1]}."
            reverse = f"In {domain}, {person} {POLES[opposite][1]}."
            against = ids_of(b for b in pool if domain_of(b.text) == domain and opposite in poles_of(b.text))
            evidence = {*ids_of(cluster)} - {*against}
            yield Draft(domain, text, evidence, against, replaces=ids.get(reverse))

    def strip(self, memory, schemas):
        """The cluster's own sentences without the nouns of their domain: V_beh is made of real words."""
        for schema in schemas:
            texts = map(memory.said, memory.live(schema.evidence))
            yield "\n".join(without_nouns(text, schema.domain) for text in texts)

    def name_core(self, members):
        gloss = most_common(s.text.split(", ", 1)[1] for s in members)
        return f"In unrelated parts of life, {gloss}"

    def answer(self, memory, question, now):
        """Rules phrase no answer: the chain that is asked for, else what the search finds, facts first."""
        lines = asked_lines(memory, question) + hit_lines(memory, question)
        lines.sort(key=lambda line: line.channel != "fact")
        return (lines[0].text, [lines[0].id]) if lines else ("I don't know.", [])


def without_nouns(text, domain):
    kept = [w for w in re.findall(r"[\w']+", text) if NOUNS.get(stem(w.lower())) != domain]
    return " ".join(kept)


# ------------------------------------------------------------------ the story
STORY = """
2024-01-08|I live in Paris. I work at Acme. My sister Ann moved to Oslo.
2024-01-20|I wrote a checklist for the dinner. I like coffee.
2024-02-03|I wrote an itinerary for the flight. I run alone.
2024-02-17|I prepared the report weeks ahead. I wrote a checklist for the cake.
2024-03-02|I moved to Berlin because Acme closed in Paris. I went to the gym by myself.
2024-03-16|I booked the hotel in advance. I got a cheaper guitar. I had a list for the meeting.
2024-03-30|I had a list for the stew. I did the race solo. I still live in Berlin. I have migraines.
2024-04-13|Back in 2021 I lived in Rome. I had a schedule for the journey.
2024-04-20|Maybe I'll move to Lima.
2024-04-27|I made a schedule for the project. I gave up coffee. I'm flying to Rome on 2024-06-10.
2024-05-11|I got a concert ticket on sale. I haggled over a piano. Please forget that I have migraines."""


def tell_story(memory):
    """One persona, eleven sessions, one night: what is written, revised, generalised, forgotten, and why."""
    print("1. By day every message is kept verbatim, read, and reconciled with what is already believed.\n")
    now = "2024-05-12"
    said = [line.split("|") for line in STORY.strip().split("\n")]
    turns = [(text, day, day, "user") for day, text in said]
    for (day, text), ops in zip(said, memory.ingest(turns)):
        done = ", ".join(map(" ".join, ops)) or "NOTHING was read; the message itself is kept"
        print(f'   {day}  "{text}"\n               {done}')
    memory.sleep(now)
    print("\n2. A revised belief is a chain, not an overwritten row; Rome, told last, was spliced in:\n")
    for question in ("Where do I live?", "Do I like coffee?", "Where does my sister live?", "Migraines?"):
        print(f"   {question:27} {memory.answer(question, now)[0]}")
    print("\n3. By night facts become schemas, and schemas alike in behaviour, not in content, a core.\n")
    for node in (memory.schemas | memory.cores).values():
        figures = f"{node.status}, {node.confidence:.2f}, {len(node.evidence)} beliefs"
        print(f"   [{node.id}] {node.text} ({figures})")
    question = "How should I get ready for my first aquarium?"
    print(f"\n4. The context for a question about a domain that never came up: {question}\n"
          f"   Room for {SCHEMA_LINES} schemas and cores: those of the question's domain, if any; cores;\n"
          "   then the schemas of most confidence and freshest evidence. The others stay out.\n"
          "   Below them the profile and what is coming, each within its share of the budget.\n")
    for line in memory.recall(question, now, 300).lines:
        print(f"   {line}")
    for core in list(memory.cores)[:1]:
        print(f"\n5. Why does it believe that? why({core!r}), down to the words that were said:\n")
        for schema in memory.why(core)["because"]:
            print(f"   because [{schema['id']}] {schema['text']}")
            for belief in schema["because"][:2]:
                source = belief["because"][0]
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
    parser.add_argument("--model", default="", help="a chat model to read with: hub id, folder or URL")
    parser.add_argument("--model_name", default="", help="the server's name of the model")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="the model's longest reply")
    return parser


def make_memory(args):
    """Flags -> a function that makes an empty Memory; a model is loaded once."""
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
