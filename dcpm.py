"""DCPM: an agent memory that says why it believes something (dual-process cognitive memory, arXiv 2606.09483).
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
import tempfile
import time
from array import array
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from datetime import date, timedelta
from pathlib import Path

import numpy as np

# ------------------------------------------------------------------ words, tokens, dates
STOP = frozenset("""a an the and or but if so of in on at to for from by with as is am are was were be been being do does did
    done has had will would can could should i me my mine myself you your we our us he him his she her it its they them
    their this that these those there here what which who whom when where why how not no yes too very just also still now
    again really quite lot then than about into out up down over all any some more most other own same s t re ve ll d m
    currently recently always usually often actually finally since because""".split())
QUALIFIER = re.compile(r"\b(especially|only|mostly|mainly|particularly|on weekends)\b", re.I)
MONTHS = {m[:3]: i for i, m in enumerate("january february march april may june july august september october november "
                                         "december".split(), 1)}
WEEKDAYS = {d: i for i, d in enumerate("monday tuesday wednesday thursday friday saturday sunday".split())}
NUMBERS = {n: i for i, n in enumerate("zero one two three four five six seven eight nine ten".split())} | {
    "a": 1, "an": 1, "a few": 3, "a couple of": 2}
_MONTH = (r"(?:january|february|march|april|may|june|july|august|september|october|november|december"
          r"|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec)\b\.?")
DATE = re.compile(rf"""\b(?:(?P<iso>\d{{4}}-\d\d-\d\d)|(?P<d1>\d{{1,2}})(?:st|nd|rd|th)?\ (?:of\ )?(?P<m1>{_MONTH})(?:,?\ (?P<y1>\d{{4}}))?
    |(?P<m2>{_MONTH})\ (?P<d2>\d{{1,2}})(?:st|nd|rd|th)?\b(?:,?\ (?P<y2>\d{{4}}))?|(?:in\ |since\ |last\ )?(?P<m3>{_MONTH}),?\ (?P<y3>\d{{4}})
    |(?:in|since|last|next)\ (?P<m4>{_MONTH})|(?:back\ )?(?:in|since|of)\ (?P<y4>(?:19|20)\d\d)
    |(?P<day>today|tonight|tomorrow|yesterday)|(?P<ago>\d+|a\ few|a\ couple\ of|an?|one|two|three|four|five|six|seven|eight|nine|ten)
    \ (?P<unit>day|week|month|year)s?\ ago|(?P<rel>last|next|this)\ (?P<what>week|weekend|month|year|{'|'.join(WEEKDAYS)}))\b""",
                  re.I | re.X)


@functools.lru_cache(maxsize=100_000)
def stem(word):
    """A crude suffix stripper: walks, walked, walking -> walk. Wrong now and then, but equally for question and text."""
    for suffix in ("'s", "ings", "ing", "ies", "ied", "ed", "es", "ly", "s"):
        if word.endswith(suffix) and len(word) - len(suffix) >= 3 and not word.endswith("ss"):
            word = word[:-len(suffix)] + ("y" if suffix in ("ies", "ied") else "")
            break
    if len(word) > 4 and word[-1] == word[-2] and word[-1] in "bdgmnprt":  # running -> runn -> run
        word = word[:-1]
    return word[:-1] if len(word) > 3 and word.endswith("e") else word


def words(text):
    """Stemmed content words of a text, in order."""
    return [stem(w) for w in re.findall(r"[a-z0-9]+(?:'s)?", text.lower().replace("’", "'")) if w not in STOP]


def key(text):
    """Two values are the same value iff their keys are equal: case, articles, endings and dates do not count."""
    return " ".join(words(DATE.sub(" ", text)))


def count_tokens(text):
    """The counter behind every budget: one per word, number or punctuation mark (no tokenizer is needed offline)."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def digest(*parts):
    """Eight hex digits, the same on every machine (`hash()` of a string is not)."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()[:8]


def days_between(earlier, later):
    return (date.fromisoformat(later[:10]) - date.fromisoformat(earlier[:10])).days


def date_window(text, today):
    """First time expression of `text` -> (first day, last day) as ISO strings, or None.

    Always resolved against `today`, the date of the *conversation*: against the wall clock old dialogues silently rot.
    """
    match = DATE.search(text)
    if not match:
        return None
    g, now = match.groupdict(), date.fromisoformat(today[:10])
    number = next((n for n in (1, 2, 3, 4) if g.get(f"m{n}") or g.get(f"y{n}")), None)
    try:
        if g["iso"]:
            start = end = date.fromisoformat(g["iso"])
        elif number:
            month, day, year = (g.get(f"{k}{number}") for k in "mdy")
            month = MONTHS[month[:3].lower()] if month else None
            if not year:  # no year said: the nearest such month to the conversation
                year = min((now.year + k for k in (-1, 0, 1)), key=lambda y: abs((date(y, month, int(day or 15)) - now).days))
            year = int(year)
            start = date(year, month or 1, int(day or 1))
            end = start if day else date(year + (month or 12) // 12, (month or 12) % 12 + 1, 1) - timedelta(1)
        elif g["day"]:
            start = end = now + timedelta({"yesterday": -1, "tomorrow": 1}.get(g["day"].lower(), 0))
        elif g["ago"]:
            n = NUMBERS.get(g["ago"].lower()) or int(g["ago"])
            start = now - timedelta(n * {"day": 1, "week": 7, "month": 30, "year": 365}[g["unit"].lower()])
            end = start
        else:
            start, end = _relative(g["rel"].lower(), g["what"].lower(), now)
    except (ValueError, OverflowError):  # 31 June, year 0: not a date after all
        return None
    return start.isoformat(), end.isoformat()


def _relative(rel, what, now):
    """last / this / next  week, weekend, month, year or weekday."""
    step = {"last": -1, "this": 0, "next": 1}[rel]
    if what == "year":
        return date(now.year + step, 1, 1), date(now.year + step, 12, 31)
    if what == "month":
        first = (now.replace(day=15) + timedelta(30 * step)).replace(day=1)
        return first, (first + timedelta(31)).replace(day=1) - timedelta(1)
    monday = now - timedelta(now.weekday())
    if what in WEEKDAYS:
        gap = (WEEKDAYS[what] - now.weekday()) % 7
        day = now + timedelta((gap or 7) if step == 1 else gap if step == 0 else gap - 7)
        return day, day
    monday += timedelta(7 * step)
    return (monday + timedelta(5), monday + timedelta(6)) if what == "weekend" else (monday, monday + timedelta(6))


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
    """What an extractor read in a turn: not yet a belief. `attribute` "?" = whichever live chain has this member."""
    attribute: str
    value: str
    text: str
    span: tuple  # (start, end) in the turn's text
    subject: str = "user"
    polarity: int = 1  # +1 holds, -1 no longer / dislikes, 0 unknown (taken back, nothing in its place)
    layer: str = "fact"  # or "identity": preferences, attitudes, values, habits
    t_event: str = ""
    reliability: float = 0.9  # 0.9 said outright, 0.6 hedged, 0.5 inferred, 0.4 reported by another
    until: str = ""  # last day of a plan
    detail: bool = False  # carries a qualifier ("mostly jazz")
    slot: tuple = None  # set when a model has already matched the claim to an existing chain


@dataclass
class Belief:
    """A claim that entered the store. `prev`/`next` make the doubly linked chain of its slot."""
    id: str
    layer: str
    slot: tuple  # (subject, attribute, member): the dimension on which two claims exclude each other
    value: str
    polarity: int
    text: str
    t_event: str  # when it became true
    t_seen: str  # when the memory learnt it; monotone. Two clocks = bi-temporal
    sources: list  # [(turn id, start, end, reliability)], never empty, only grows
    domain: str = ""
    tags: list = field(default_factory=list)  # behaviour poles this belief shows
    until: str = ""
    reason: str = ""
    prev: str = None
    next: str = None
    link_kind: str = None  # "supersede" or "refine": why `prev` exists
    confidence: float = 0.0
    status: str = "active"  # active <=> next is None and not suppressed; else superseded or suppressed


@dataclass
class Schema:
    """One behavioural regularity inside one domain. The text never changes; evidence is what changes."""
    id: str
    subject: str
    domain: str
    behaviour: str  # the abstraction: what is left when the domain's nouns are stripped
    text: str
    created: str
    vector: dict = field(default_factory=dict)  # behaviour vector: feature -> weight
    evidence: list = field(default_factory=list)  # belief ids ever cited (suppressed ones are taken out)
    live: list = field(default_factory=list)  # of those, the active ones at the last sleep
    confidence: float = 0.0
    status: str = "forming"  # forming, stable, contested, dormant
    prev: str = None
    next: str = None


@dataclass
class Core:
    """A regularity behind schemas of different domains: alike in behaviour, unlike in content."""
    id: str
    subject: str
    behaviour: str
    text: str
    created: str
    members: list = field(default_factory=list)  # schema ids, only grows
    evidence: list = field(default_factory=list)  # union of the members' evidence
    confidence: float = 0.0
    status: str = "stable"  # stable or dormant


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
    """One line of the audit log. The log *is* the memory: replaying it into an empty store gives the same store."""
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
    """BM25 over an inverted index that grows document by document (a refit at every write would be quadratic)."""

    def __init__(self):
        self.keys, self.lengths, self.postings = [], array("d"), {}

    def add(self, doc, tokens):
        for token, count in Counter(tokens).items():
            docs, counts = self.postings.setdefault(token, (array("l"), array("d")))
            docs.append(len(self.keys))
            counts.append(count)
        self.keys.append(doc)
        self.lengths.append(len(tokens))

    def scores(self, weights, k1=1.2, b=0.75):
        """{query token: weight} -> one BM25 score per document, shape (documents,)."""
        n, out = len(self.keys), np.zeros(len(self.keys))
        if not n:
            return out
        lengths = np.array(self.lengths)
        norm = k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-9))
        for token, weight in weights.items():
            if token in self.postings:
                docs, counts = (np.array(a) for a in self.postings[token])
                idf = math.log(1 + (n - len(docs) + 0.5) / (len(docs) + 0.5))
                out[docs] += weight * idf * counts * (k1 + 1) / (counts + norm[docs])
        return out


class Store:
    """All records of one user. Every change is one event through `commit`: checked first, then applied as a whole."""

    def __init__(self, user="user"):
        self.user, self.log, self.clock = user, [], ""  # clock: the latest turn's time; nothing reads the wall clock
        self.turns, self.beliefs, self.heads = {}, {}, {}
        self.schemas, self.cores, self.intentions = {}, {}, {}
        self.hidden = set()  # turns that must not be shown: they say what was asked to be forgotten
        self.of_turn = defaultdict(list)  # turn id -> ids of beliefs that cite it
        self.members = defaultdict(list)  # (subject, attribute) -> slots, in order of arrival
        self.speakers = []  # people who speak here (not the assistant): the ones System2 may generalise about
        self.turn_index, self.belief_index = Index(), Index()
        self.columns = {"session": array("l"), "speaker": array("l"), "day": array("l")}  # of turns, for the reader
        self.session_codes = {}

    def new_id(self, letter, *parts):
        """b17 for beliefs and turns (never reused); a hash for what System2 finds: same finding, same id."""
        prefix = "" if self.user == "user" else self.user + "/"
        return prefix + letter + (digest(*parts) if parts else str(len(self.turns if letter == "t" else self.beliefs) + 1))

    def commit(self, op, ids=(), said="", reason="", **data):
        event = Event(len(self.log) + 1, op, list(ids), said, reason, data)
        self.apply(event)
        self.log.append(event)
        return event

    def apply(self, event):
        """Apply one event. Raises DcpmError before anything has changed."""
        data = event.data
        if event.op == "RAW":
            turn = Turn(**data["turn"])
            if turn.id in self.turns:
                raise DcpmError(f"turn {turn.id} exists already; turns are append-only")
            self.turns[turn.id] = turn
            self.clock = max(self.clock, turn.t)
            self.turn_index.add(turn.id, words(turn.text))
            if turn.speaker != "assistant" and turn.speaker not in self.speakers:
                self.speakers.append(turn.speaker)
            self.columns["session"].append(self.session_codes.setdefault(turn.session, len(self.session_codes)))
            self.columns["speaker"].append(self.speakers.index(turn.speaker) if turn.speaker in self.speakers else -1)
            self.columns["day"].append(date.fromisoformat(turn.t[:10]).toordinal())
        elif event.op == "CONFIRM":
            belief = self.beliefs[event.ids[0]]
            belief.sources.append(tuple(data["source"]))
            belief.t_event = data.get("t_event", belief.t_event)
            self._after_source(belief, event.turn)
        elif event.op == "SUPPRESS":
            for id_ in event.ids:
                self.beliefs[id_].status = "suppressed"
                self.hidden.update(source[0] for source in self.beliefs[id_].sources)
            self.hidden.update(data["hide"])
        elif event.op == "SLEEP":
            for kind, cls in (("schemas", Schema), ("cores", Core), ("intentions", Intention)):
                getattr(self, kind).update({n["id"]: cls(**copy.deepcopy(n)) for n in data.get(kind, [])})
        elif event.op == "FAILED":
            pass  # a model call that gave nothing usable: the raw turn is kept, the failure is on record
        else:  # ADD, SUPERSEDE, REFINE, RETRACT, SPLICE
            self._insert(Belief(**copy.deepcopy(data["belief"])), data.get("prev"), data.get("next"), data.get("kind"))

    def _insert(self, belief, prev, next, kind):
        """Put `belief` between its neighbours: all four links or none, and only where no second head can appear."""
        belief.slot, belief.sources = tuple(belief.slot), [tuple(s) for s in belief.sources]
        before, after = self.beliefs.get(prev), self.beliefs.get(next)
        fits = before.next == next if before else after.prev is None if after else belief.slot not in self.heads
        if not fits or belief.id in self.beliefs:
            raise DcpmError(f"{belief.id} would fork the chain of {belief.slot}; read the head again and retry")
        belief.prev, belief.next, belief.link_kind = prev, next, kind if before else None
        if before:
            before.next = belief.id
            before.status = "superseded" if before.status == "active" else before.status
        if after:
            after.prev, after.link_kind, belief.status = belief.id, "supersede", "superseded"
        else:
            self.heads[belief.slot] = belief.id
        if not before and not after:
            self.members[belief.slot[:2]].append(belief.slot)
        self.beliefs[belief.id] = belief
        self.belief_index.add(belief.id, words(f"{belief.slot[1]} {belief.value} {belief.text}"))
        self._after_source(belief, belief.sources[-1][0])

    def _after_source(self, belief, turn):
        """Confidence = 1 - prod(1 - reliability) over distinct sessions: repeating oneself in one sitting adds nothing."""
        best = {}
        for source, _, _, reliability in belief.sources:
            session = self.turns[source].session
            best[session] = max(best.get(session, 0), reliability)
        belief.confidence = round(min(0.99, 1 - math.prod(1 - r for r in best.values())), 4)
        self.of_turn[turn].append(belief.id)
        if belief.status == "suppressed":  # told again after "forget that": it stays forgotten, and so does this turn
            self.hidden.add(turn)

    def chain(self, slot):
        """Beliefs of a slot, oldest first."""
        out, id_ = [], self.heads.get(tuple(slot))
        while id_ and len(out) < len(self.beliefs):
            out.append(self.beliefs[id_])
            id_ = out[-1].prev
        return out[::-1]

    def head(self, slot):
        return self.beliefs.get(self.heads.get(tuple(slot)))

    def sessions(self, ids):
        return {self.turns[s[0]].session for i in ids for s in self.beliefs[i].sources}


# ------------------------------------------------------------------ behaviour lexicon and domains
# Frozen together with the frames below before the test phrases were written; LEXICON_HASH is logged with every result.
POLES = {  # pole -> (opposite, gloss, cues); a cue is a stemmed word or phrase
    "plans": ("improvises", "plans ahead and prepares in detail",
              "checklist|list|schedule|itinerary|spreadsheet|in advance|weeks ahead|timetable|plan ahead|mapped out|"
              "draw up|drew up|prepare|outline|agenda|ahead of time|step by step"),
    "improvises": ("plans", "improvises and decides on the spot",
                   "on a whim|spontaneous|last minute|spur of the moment|improvise|made it up|without a plan|wing it|"
                   "winged it|on the fly|see what happen|no idea beforehand|unplanned"),
    "saves": ("spends", "saves money and looks for the cheaper way",
              "cheap|cheaper|discount|second hand|coupon|bargain|on sale|budget|for free|haggle|borrow|save money|thrifty"),
    "spends": ("saves", "spends freely and takes the best there is",
               "splurge|expensive|luxury|premium|top of the range|first class|treat myself|pay extra|paid extra|"
               "priciest|regardless of price|deluxe"),
    "alone": ("together", "likes to do things alone",
              "alone|by myself|on my own|solo|solitude|in peace|quiet corner|nobody around|without company"),
    "together": ("alone", "likes to do things with other people",
                 "together|with friend|group|invite|crowd|company of|whole gang|team up|teamed up|everyone|joined by"),
    "careful": ("daring", "is careful and avoids risk",
                "careful|double check|safe|insurance|backup|spare|read the warning|just in case|cautious|helmet|twice before"),
    "daring": ("careful", "is daring and takes risks",
               "risk|dare|without looking|deep end|gamble|threw caution|bold|thrill|adrenaline|dangerous|reckless|edge"),
    "routine": ("novelty", "sticks to what is familiar",
                "same as always|usual|the same|routine|habit|as ever|familiar|every time|tradition|old favourite|as before"),
    "novelty": ("routine", "looks for what is new",
                "never tried|new kind|first time|experiment|exotic|something different|novel|curious|unknown|unusual|untested"),
    "makes": ("buys", "makes things by hand",
              "from scratch|by hand|built|homemade|handmade|sewed|carved|diy|made my own|workshop|knitted|glued"),
    "buys": ("makes", "buys things ready-made",
             "ready made|bought|store|order online|ordered|delivery|off the shelf|from the shop|prepackaged|catalogue|hired"),
    "exact": ("rough", "is exact and measures",
              "exact|measure|precise|to the gram|to the minute|ruler|scale|stopwatch|decimal|count every|calibrate"),
    "rough": ("exact", "goes by feel, roughly",
              "roughly|by feel|eyeball|more or less|guess|approximate|give or take|ballpark|by eye|rule of thumb"),
    "paper": ("digital", "prefers paper", "paper|notebook|printed|pencil|handwritten|ink|sticky note|index card|fountain pen"),
    "digital": ("paper", "prefers digital tools", "app|spreadsheet app|tablet|online tool|cloud|software|phone reminder|digital"),
}
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
    "photo": "photo camera portrait lens album darkroom",
}
CUES = [(f" {' '.join(map(stem, cue.split()))} ", pole) for pole, (_, _, cues) in POLES.items() for cue in cues.split("|")]
NOUNS = {stem(noun): domain for domain, nouns in DOMAINS.items() for noun in nouns.split()}


@functools.lru_cache(maxsize=100_000)
def poles_of(text):
    """Behaviour poles that a text shows, by lexicon."""
    padded = " " + " ".join(map(stem, re.findall(r"[a-z0-9]+", text.lower()))) + " "
    return tuple(sorted({pole for cue, pole in CUES if cue in padded}))


def domain_of(text):
    """The domain most of the text's nouns belong to; "" if none."""
    hits = Counter(NOUNS[w] for w in words(text) if w in NOUNS)
    return max(sorted(hits), key=hits.get) if hits else ""


# ------------------------------------------------------------------ rule extractor
SINGLE = {"residence", "employer", "occupation", "name", "age", "partner", "diet", "birthday"}  # and favourite X
PROPER = {"residence", "employer", "partner", "name"}
RELATIVES = ("sister|brother|mother|mom|mum|father|dad|wife|husband|partner|girlfriend|boyfriend|son|daughter|friend|cousin|"
             "aunt|uncle|neighbour|neighbor|colleague|boss|roommate|grandmother|grandfather|best friend")
_BE, _HAVE = "(?:am|is|are|was)", "(?:have|has|had)"
FRAMES = [(a, p, layer, re.compile(rf"^{pattern}[\s.!]*$", re.I)) for a, p, layer, pattern in (
    # attribute, polarity, layer, predicate after the subject; group v is the value
    ("residence", 1, "fact", r"(?:live[sd]?|living|reside[sd]?|stay|settled|based) (?:over )?in (?P<v>.+)"),
    ("residence", 1, "fact", rf"{_BE} (?:(?:back|living|settled|based|at home) )+in (?P<v>[A-Z].+)"),
    ("residence", 1, "fact", rf"(?:{_HAVE} )?(?:moved|moving|relocated|returned) (?:back |house )?to (?P<v>.+)"),
    ("residence", -1, "fact", r"moved (?:away from|out of) (?P<v>.+)"),
    ("employer", 1, "fact", rf"(?:{_BE} )?work(?:s|ed|ing)? (?:at|for) (?P<v>.+)"),
    ("employer", 1, "fact", r"(?:joined|started (?:working )?(?:at|for)|switched (?:jobs )?to|got (?:a job at|hired by)) (?P<v>.+)"),
    ("employer", 0, "fact", r"(?:(?:have|has) (?P<v>a|my|no) job|(?:quit|lost|left) (?:my|his|her|the) job.*|got laid off.*)"),
    ("occupation", 1, "fact", rf"(?:work(?:s|ing)? as|became|{_BE} training as) an? (?P<v>.+)"),
    ("occupation", 1, "fact", rf"{_BE} an? (?P<v>(?:\w+ )?(?:\w+(?:eer|ist|ician|ian|cher|tor|yer|ter|ner|ver|ger)|nurse|cook|chef))"),
    ("name", 1, "fact", rf"{_BE} called (?P<v>.+)"),
    ("age", 1, "fact", rf"(?:{_BE}|turned) (?P<v>\d{{1,3}})(?: years old)?"),
    ("partner", 1, "fact", rf"(?:{_BE} (?:dating|engaged to|married to)|married) (?P<v>.+)"),
    ("partner", 0, "fact", r"(?:got divorced|broke up|separated)(?P<v>).*"),
    ("diet", 1, "identity", rf"(?:{_BE}|became|went|turned) (?:an? )?(?P<v>vegan|vegetarian|pescatarian|gluten-free|keto)"),
    ("condition", 1, "fact", rf"(?:{_HAVE}|suffer from|get|was diagnosed with) (?P<v>(?:\w+ )?(?:migraines?|asthma|diabetes|"
                             r"insomnia|arthritis|allerg\w+|anxiety|depression|eczema|adhd))"),
    ("possession", 1, "fact", rf"(?:{_HAVE}(?: got)?|own|owns|bought|got|adopted) (?:an?|my own|two|three) (?P<v>.+)"),
    ("possession", -1, "fact", r"(?:sold|lost|gave away|got rid of|donated) (?:my|the|our|his|her) (?P<v>.+)"),
    ("hobby", 1, "fact", r"(?:play|plays|played|playing) (?P<v>.+)"),
    ("hobby", 1, "fact", r"(?:took up|take up|have taken up|picked up|started|got into|do|practi[sc]e|am learning) (?P<v>\w+ing\b.*|"
                         r"yoga|karate|chess|judo|pilates|ballet|pottery|the \w+|\w+ lessons)"),
    ("likes", 1, "identity", rf"(?:like|love|enjoy|adore|prefer)s? (?P<v>.+)|{_BE} (?:fond of|into|a (?:big )?fan of) (?P<w>.+)"),
    ("likes", -1, "identity", rf"(?:dislike|hate|loathe|cannot stand)s? (?P<v>.+)|{_BE} (?:tired|sick) of (?P<w>.+)"),
    ("?", -1, "fact", rf"(?:{_HAVE} )?(?:given up|gave up|quit|stopped|dropped|went off) (?P<v>.+)"),
    ("?", 1, "fact", rf"(?:{_BE} \w+ing|{_BE} back (?:on|to|at|into)|resumed|took up|returned to|started) (?P<v>.+?) again"),
    ("?", 1, "fact", rf"(?:{_BE} back (?:on|to|at|into)|resumed|went back to) (?P<v>.+)"),
    ("cancel", -1, "fact", r"(?:cancelled|canceled|called off|dropped the plan to) (?P<v>.+)"),
    ("habit", 1, "identity", r"(?:always|usually|often|never|regularly|tend to|every \w+) (?P<v>.+)"),
    ("opinion", 1, "identity", r"(?:think|believe|feel|find) (?:that )?(?P<v>.+)"),
)]
FUTURE = re.compile(rf"^(?:{_BE} going to|will|plan to|{_BE} planning to|need to|{_HAVE} to|{_BE}|{_HAVE}|hope to) (?P<v>.+)$", re.I)
NEGATOR = re.compile(rf"^(?:used to|no longer|{_BE} no longer|(?:do|does) not|never|(?:{_HAVE} )?stopped|not)\s+", re.I)
FIRST = re.compile(rf"^(?P<lead>.{{0,40}}?)\b(?:(?P<i>I)|[Mm]y (?P<rel>{RELATIVES}))\s+(?P<rest>.+)$", re.S)
NAMED = re.compile(r"^(?P<rel>[A-Z][a-z]+) (?P<rest>(?:lives|moved|works|joined|got|has) .+)$", re.S)
MY = re.compile(r"^(?:.{0,20}\b)?[Mm]y (?P<a>name|age|birthday|favou?rite [\w ]+?) is (?P<v>.+)$", re.S)
HEDGE = re.compile(r"\b(maybe|might|perhaps|possibly|thinking (?:of|about)|considering|not sure)\b", re.I)
HYPOTHESIS = re.compile(r"\b(if|would|wish|imagine|suppose|unless|as if|hope)\b", re.I)
FORGET = re.compile(r"\b(?:forget|delete|erase|do not remember|don't remember)\b (?:about |that |the fact that |what I said about )?(.+)", re.I)
ADVERB = re.compile(r"^(?:still|now|also|just|really|currently|recently|actually|finally|even|totally|absolutely) ", re.I)
SHORT = [(r"\bI'm\b", "I am"), (r"\bI've\b", "I have"), (r"\bI'll\b", "I will"), (r"\bI'd\b", "I would"), (r"n't\b", " not"),
         (r"\bca not\b", "cannot"), (r"\b(she|he|it|that)'s\b", r"\1 is")]


def clauses(text):
    """(start, end, clause, is_question) of every clause; quoted speech is blanked out, offsets stay those of the turn."""
    text = re.sub(r'"[^"]*"|“[^”]*”', lambda m: " " * len(m.group()), text)
    for sentence in re.finditer(r"[^.!?\n]+(?:[.](?=\w)[^.!?\n]*)*[.!?]*", text):
        question, start = "?" in sentence.group()[-3:], sentence.start()
        for piece in re.split(r"(;|, but |\bbut (?=I\b|my\b)|,? and (?=I\b|my\b)|, then (?=I\b))", sentence.group()):
            lead = len(piece) - len(piece.lstrip())
            body = piece.strip(" .,;!")
            if len(words(body)) > 0:
                yield start + lead, start + lead + len(body), body, question
            start += len(piece)


def tidy(value, attribute):
    """Cut what is not the value: dates, reasons, qualifiers, articles."""
    if attribute in PROPER and (name := re.search(r"\b[A-Z][\w'&-]*(?: [A-Z][\w'&-]*)*", value)):
        return name.group()
    value = re.split(r",| because | since | so that |\b(?:mostly|especially|mainly|only|particularly)\b| on weekends", DATE.sub("|", value))[0]
    value = value.split("|")[0] if value.split("|")[0].strip() else value.replace("|", " ")
    value = re.sub(r"\b(?:anymore|any more|again|too|as well|now|these days|a lot|very much|on|in)\s*$", "", value.strip(" .!,"))
    return re.sub(r"^(?:the|an?|my|some|to) ", "", value.strip(), flags=re.I)[:80]


def extract_rules(turn):
    """Turn -> (claims, phrases to forget, clauses read, clauses that hit a frame). Assistants make no claims."""
    claims, forget, read, framed = [], [], 0, 0
    if turn.speaker == "assistant":
        return claims, forget, read, framed
    me = turn.speaker
    for start, end, body, question in clauses(turn.text):
        body = body.replace("’", "'")
        if found := FORGET.search(body):
            if not question or re.match(r"(?:can|could|will|would|please)", body, re.I):
                forget.append(found.group(1))
                continue
        for pattern, full in SHORT:
            body = re.sub(pattern, full, body)
        if question:
            continue
        claim = _read_clause(body, me, turn.t)
        if claim:
            read += 1
            framed += claim.attribute not in ("event", "maybe")
            claim.span, claim.text = (start, end), turn.text[start:end]
            claims.append(claim)
    return claims, forget, read, framed


def _read_clause(body, me, t):
    """One clause -> Claim or None (no subject we know, or only a hypothesis)."""
    window = date_window(body, t)
    past = window[0] if window and window[1] < t[:10] else t
    if mine := MY.match(body):
        attribute = mine["a"].replace("favourite", "favorite")
        return Claim(attribute, tidy(mine["v"], attribute), "", (), me, t_event=past,
                     layer="identity" if "favorite" in attribute else "fact")
    match = FIRST.match(body) or NAMED.match(body)
    if not match:
        return None
    subject = me if match.groupdict().get("i") else match["rel"]
    if subject != me and subject[0].islower() and me != "user":
        subject = f"{me}'s {subject}"  # in a dialogue of two, each has a sister
    reliability = 0.9 if subject == me else 0.4
    if HEDGE.search(body):  # never touches a chain: an attribute of its own, keyed by its words
        return Claim("maybe", body, "", (), subject, t_event=t, reliability=0.6)
    if HYPOTHESIS.search(body):
        return None
    rest, flip = ADVERB.sub("", ADVERB.sub("", match["rest"].strip())), 1
    future = FUTURE.match(rest)
    if future and window and window[1] >= t[:10] and (window[0] > t[:10] or "going to" in rest or "will" in rest[:5]):
        return Claim("plan", tidy(future["v"], "plan"), "", (), subject, t_event=t, until=window[1], reliability=reliability)
    if negator := NEGATOR.match(rest):
        if not (negator.group().strip().lower() == "never"):
            rest, flip = ADVERB.sub("", rest[negator.end():]), -1
    for attribute, polarity, layer, pattern in FRAMES:
        if hit := pattern.match(rest):
            groups = hit.groupdict()
            value = tidy(groups.get("v") or groups.get("w") or "", attribute)
            if polarity == 0:
                value = ""
                if flip == 1 and re.match(r"ha(?:ve|s) (?:a|my) job", rest):
                    break
            elif not key(value):
                continue
            return Claim(attribute, value, "", (), subject, polarity * flip, layer, past, reliability,
                         detail=bool(QUALIFIER.search(rest)))
    # Nothing fits: a free fact that keeps the whole clause, so that nothing is lost; denied, it may end a habit.
    return Claim("event" if flip > 0 else "habit", rest, "", (), subject, flip, "fact", past, reliability)


# ------------------------------------------------------------------ System1: inside every write
def member_of(store, claim):
    """Complete a claim's slot: single-valued attributes have no member, others one chain per value."""
    if claim.slot:
        return claim.slot
    attribute, value = claim.attribute, key(claim.value)
    if attribute == "?":  # "gave up coffee": whichever live chain is about coffee
        options = [a for a in ("likes", "hobby", "possession", "diet", "habit") if (claim.subject, a, value) in store.heads]
        attribute = options[0] if options else "likes"
    elif attribute == "cancel":  # the open plan that shares most words; else it stays a fact of its own
        plans = [store.head(s) for s in store.members.get((claim.subject, "plan"), ())]
        overlap = [(len(set(words(p.value)) & set(words(claim.value))), p) for p in plans if p.polarity == 1]
        best = max(overlap, key=lambda o: o[0], default=(0, None))
        if best[0]:
            return (claim.subject, "plan", best[1].slot[2])
        attribute = "event"
    single = attribute in SINGLE or attribute.startswith("favorite")
    return (claim.subject, attribute, None if single else " ".join(sorted(set(value.split()))))


def decide(store, claim, slot):
    """The decision table. -> (op, node to confirm or None, prev id, next id, link kind).

    Polarity and slot first, similarity never: cosine cannot tell "likes coffee" from "no longer likes coffee".
    Only the head counts as a duplicate: A -> B -> A are three nodes.
    """
    head, same = store.head(slot), lambda b: (key(b.value), b.polarity) == (key(claim.value), claim.polarity)
    if head is None:
        return "ADD", None, None, None, None
    if claim.t_event >= head.t_event:
        if same(head):
            old, new = set(words(DATE.sub("", head.text))), set(words(DATE.sub("", claim.text)))
            if old < new or (claim.detail and not new <= old):
                return "REFINE", None, head.id, None, "refine"
            return "CONFIRM", head, None, None, None
        return ("RETRACT" if claim.polarity < 1 else "SUPERSEDE"), None, head.id, None, "supersede"
    chain = store.chain(slot)
    after = next(b for b in chain if b.t_event > claim.t_event)
    before = store.beliefs.get(after.prev)
    for neighbour in (before, after):
        if neighbour and same(neighbour):
            return "CONFIRM", neighbour, None, None, None
    return "SPLICE", None, before and before.id, after.id, "supersede"


def write_claims(store, turn, claims):
    """Reconcile and apply the claims of one turn; an existing node is touched at most once. -> ops."""
    ops, touched = [], set()
    for claim in claims:
        claim.t_event = claim.t_event or turn.t
        slot = member_of(store, claim)
        head = store.head(slot)
        if claim.polarity == -1 and slot[2] is None and head and key(head.value) != key(claim.value):
            slot = (claim.subject, "event", key(claim.text))  # "I used to live in Rome" ends nothing if the head is Paris
        op, node, prev, next_, kind = decide(store, claim, slot)
        source = (turn.id, *claim.span, claim.reliability)
        if {prev, next_, node and node.id} & touched or (node and any(s[0] == turn.id for s in node.sources)):
            continue
        if op == "CONFIRM":
            moved = {"t_event": claim.t_event} if claim.t_event < node.t_event else {}
            store.commit(op, [node.id], turn.id, source=source, **moved)
        else:
            old = store.beliefs.get(prev)
            text = claim.text if op != "REFINE" or set(words(old.text)) <= set(words(claim.text)) else f"{old.text}; {claim.text}"
            because = re.search(r"\b(?:because|since|so that)\b (.+)", claim.text, re.I)
            node = Belief(store.new_id("b"), claim.layer, slot, claim.value, claim.polarity, text, claim.t_event,
                          store.clock, ([*old.sources] if op == "REFINE" else []) + [source],
                          domain_of(claim.text), [] if claim.polarity < 1 else list(poles_of(claim.text)), claim.until,
                          because.group(1) if because else f"told {turn.t[:10]}" if old else "")
            store.commit(op, [node.id], turn.id, node.reason, belief=asdict(node), prev=prev, next=next_, kind=kind)
        touched.update(x for x in (prev, next_, node.id if op == "CONFIRM" else None) if x)
        ops.append((op, node.id))
    return ops


# ------------------------------------------------------------------ System2: while nobody is waiting
BEHAVIOUR_ALIKE, CONTENT_UNLIKE = 0.5, 0.6  # for cue space, chosen on the development bank; the paper's code has 0.70 / 0.60


def two_stage_dbscan(vectors, weights=None):
    """Cluster rows by cosine: similarity 0.55 and >= 3 members; clusters over 12 again at 0.75 and >= 2. -> labels (n,).

    Leftovers of the second stage join the nearest sub-cluster. Equal rows are clustered once, by weight: a hundred
    thousand beliefs have few distinct behaviour vectors.
    """
    from sklearn.cluster import DBSCAN
    rows, inverse, counts = np.unique(vectors, axis=0, return_inverse=True, return_counts=True)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    labels = DBSCAN(eps=0.45, min_samples=3, metric="cosine").fit_predict(rows, sample_weight=counts)
    for label in sorted(set(labels) - {-1}):
        inside = np.flatnonzero(labels == label)
        if counts[inside].sum() <= 12 or len(inside) < 2:
            continue
        sub = DBSCAN(eps=0.25, min_samples=2, metric="cosine").fit_predict(rows[inside], sample_weight=counts[inside])
        if (sub >= 0).any():
            centres = {k: rows[inside[sub == k]].mean(0) for k in sorted(set(sub) - {-1})}
            sub = [k if k >= 0 else max(centres, key=lambda c: rows[i] @ centres[c]) for i, k in zip(inside, sub)]
            labels[inside] = labels.max() + 1 + np.array(sub)
    return labels[inverse.ravel()]


def induce_rules(store, pool):
    """Rule inducer. Clusters in behaviour + domain space -> [(subject, domain, behaviour, text, vector, belief ids)].

    Not over the words of raw sentences: word overlap groups sentence shapes, not habits.
    """
    pool = [b for b in pool if b.tags and b.domain]
    if not pool:
        return []
    columns = {name: i for i, name in enumerate([*POLES, *DOMAINS, *store.speakers])}
    vectors = np.zeros((len(pool), len(columns)))
    for row, belief in zip(vectors, pool):
        row[[columns[tag] for tag in belief.tags]] = 1 / math.sqrt(len(belief.tags))
        row[columns[belief.domain]] = row[columns[belief.slot[0]]] = 1
    groups = defaultdict(list)  # a cluster may chain two poles together; a schema has one domain and one behaviour
    for label, belief in zip(two_stage_dbscan(vectors), pool):
        for pole in belief.tags if label >= 0 else []:
            groups[belief.slot[0], belief.domain, pole].append(belief)
    found = []
    for (subject, domain, pole), beliefs in sorted(groups.items()):
        tags = Counter(tag for b in beliefs for tag in b.tags)
        vector = {tag: round(n / sum(tags.values()), 4) for tag, n in sorted(tags.items())}
        who = "the user" if subject == "user" else subject
        found.append((subject, domain, pole, f"In {domain}, {who} {POLES[pole][1]}.", vector, [b.id for b in beliefs]))
    return found


def name_core_rules(members):
    """Rule version of "one sentence that explains why these habits go together"; no domain in it, so it never ages."""
    behaviour = Counter(m.behaviour for m in members).most_common(1)[0][0]
    who = "the user" if members[0].subject == "user" else members[0].subject
    return behaviour, f"In unrelated parts of life, {who} {POLES[behaviour][1]}."


WITHDRAWN = "(withdrawn: it rested on something the user asked to forget)"


def refresh_schema(schema, store, opposite):
    """Live support, confidence (s + 1) / (s + x + 2), status: what a schema loses when its facts are superseded."""
    allowed = sorted(i for i in schema.evidence if store.beliefs[i].status != "suppressed")
    if len(allowed) < len(schema.evidence) and schema.behaviour not in POLES:  # a model's words may give away what was forgotten
        schema.text, allowed = WITHDRAWN, []
    schema.evidence = allowed
    schema.live = [i for i in schema.evidence if store.beliefs[i].status == "active" and store.beliefs[i].polarity == 1]
    s = len({store.beliefs[i].slot for i in schema.live})  # a chain counts once, by its head
    schema.confidence = round((s + 1) / (s + opposite + 2), 4)
    sessions = len(store.sessions(schema.live))
    schema.status = ("dormant" if s < 2 else "forming" if s < 3 or sessions < 2
                     else "stable" if schema.confidence >= 0.65 else "contested")


def collisions(schemas, store):
    """Pairs alike in behaviour, unlike in content, of one person, in different domains. NOT contradictions.

    Nearest neighbours in behaviour space shortlist the pairs, so the sweep is not quadratic.
    """
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.neighbors import NearestNeighbors
    behaviour = DictVectorizer().fit_transform([s.vector for s in schemas])
    cues = {w for cue, _ in CUES for w in cue.split()}  # content is what is left without the behaviour words
    content = TfidfVectorizer(analyzer=lambda s: [w for i in s.live for w in words(store.beliefs[i].text) if w not in cues]
                              or [s.domain]).fit_transform(schemas)
    near = NearestNeighbors(n_neighbors=min(30, len(schemas)), metric="cosine").fit(behaviour).kneighbors(behaviour, return_distance=False)
    pairs = set()
    for i, row in enumerate(near):
        for j in map(int, row):
            a, b = schemas[i], schemas[j]
            if a.subject != b.subject or a.domain == b.domain:
                continue
            features = set(a.vector) | set(b.vector)
            low, high = (sum(f(a.vector.get(k, 0), b.vector.get(k, 0)) for k in features) for f in (min, max))
            if low / high >= BEHAVIOUR_ALIKE and (content[i] @ content[j].T).sum() < CONTENT_UNLIKE:
                pairs.add((min(i, j), max(i, j)))
    return sorted(pairs)


def collision_groups(n, pairs):
    """Union-find over the pairs; then drop whoever collides with less than half of its group (unions are transitive)."""
    root = list(range(n))

    def find(i):
        while root[i] != i:
            i = root[i]
        return i
    for i, j in pairs:
        root[max(find(i), find(j))] = min(find(i), find(j))
    groups, linked = defaultdict(list), set(pairs)
    for i in range(n):
        groups[find(i)].append(i)
    for group in groups.values():
        while len(group) > 1:
            degree = {i: sum((min(i, j), max(i, j)) in linked for j in group) for i in group}
            worst = min(group, key=degree.get)
            if degree[worst] >= (len(group) - 1) / 2:
                yield group
                break
            group.remove(worst)


def refresh_core(core, schemas, store):
    """Evidence = union of the members'; confidence = the weaker of the two best members of different domains."""
    core.members = sorted(set(core.members))
    core.evidence = sorted({i for m in core.members for i in schemas[m].evidence})
    best = {}
    for m in core.members:
        if schemas[m].status == "stable":
            best[schemas[m].domain] = max(best.get(schemas[m].domain, 0), schemas[m].confidence)
    core.status = "stable" if len(best) >= 2 else "dormant"
    core.confidence = sorted(best.values())[-2] if len(best) >= 2 else 0.0
    if any(schemas[m].text == WITHDRAWN for m in core.members):
        core.text, core.status = WITHDRAWN, "dormant"


def plan_sleep(store, now, induce=induce_rules, name_core=name_core_rules, sweep=True):
    """Everything System2 would change, as one dictionary; the store is only read. A pure function of (store, now)."""
    schemas, cores, intentions = (copy.deepcopy(x) for x in (store.schemas, store.cores, store.intentions))
    pool = [b for b in store.beliefs.values() if b.status == "active" and b.polarity == 1 and b.slot[0] in store.speakers
            and b.slot[1] not in ("maybe", "plan")]
    for subject, domain, behaviour, text, vector, ids in induce(store, pool):
        id_ = store.new_id("s", subject, domain, behaviour)
        if id_ in schemas or len(ids) >= 2:
            schema = schemas.setdefault(id_, Schema(id_, subject, domain, behaviour, text, now))
            schema.text = text if schema.text == WITHDRAWN else schema.text
            schema.vector, schema.evidence = vector, list(set(schema.evidence) | set(ids))
    shows = Counter((b.slot[0], b.domain, tag) for b in pool for tag in b.tags)
    for schema in schemas.values():
        refresh_schema(schema, store, shows[schema.subject, schema.domain, POLES.get(schema.behaviour, ("",))[0]])
    for schema in schemas.values():  # a habit that turned into its opposite: linked like beliefs
        old = schemas.get(store.new_id("s", schema.subject, schema.domain, POLES.get(schema.behaviour, ("",))[0]))
        if (old and schema.status == "stable" and old.status != "stable" and (old.created, old.id) < (schema.created, schema.id)
                and not (old.prev or old.next or schema.prev or schema.next)):
            schema.prev, old.next = old.id, schema.id
    stable = sorted((s for s in schemas.values() if s.status == "stable"), key=lambda s: s.id)
    if sweep and len(stable) >= 5:
        for group in collision_groups(len(stable), collisions(stable, store)):
            members = [stable[i] for i in group]
            ids = {m.id for m in members}
            known = [c for c in cores.values() if ids & set(c.members)]
            if known:  # join the core that shares most members, then the oldest: never whichever comes first
                core = min(known, key=lambda c: (-len(ids & set(c.members)), c.created, c.id))
            else:
                named = name_core(members)
                if not named:  # a null answer is allowed: no core
                    continue
                id_ = store.new_id("c", members[0].subject, named[0])
                core = cores.setdefault(id_, Core(id_, members[0].subject, *named, now))
            core.members += ids
    for core in cores.values():
        refresh_core(core, schemas, store)
    for slots in [store.members[(who, "plan")] for who in store.speakers if (who, "plan") in store.members]:
        for belief in (b for slot in slots for b in store.chain(slot) if b.until):
            id_ = store.new_id("i", belief.slot[0], key(belief.value), belief.until)
            item = intentions.setdefault(id_, Intention(id_, belief.value, belief.until, []))
            item.evidence = sorted({*item.evidence, belief.id})
    for item in intentions.values():
        item.evidence = [i for i in item.evidence if store.beliefs[i].status != "suppressed"]
        alive = any(store.beliefs[i].status == "active" for i in item.evidence)
        item.status = "withdrawn" if not alive else "expired" if item.until < now[:10] else "open"
    new = {"schemas": schemas, "cores": cores, "intentions": intentions}
    return {kind: [asdict(n) for _, n in sorted(nodes.items()) if n != getattr(store, kind).get(n.id)]
            for kind, nodes in new.items()}


# ------------------------------------------------------------------ reader: no language model, links and word statistics
ASK = {  # attribute -> how a question asks for it
    "residence": r"\b(live|living|lived|home town|reside|move[d]? to|city|based)\b", "employer": r"\b(work|employer|company|job)\b",
    "occupation": r"\b(occupation|profession|work as|for a living)\b", "diet": r"\bdiet\b", "age": r"\bhow old\b|\bage\b",
    "name": r"\bmy name\b", "partner": r"\b(partner|married|dating)\b", "birthday": r"\bbirthday\b"}
PAST = re.compile(r"\bbefore\b|\bprevious|\bused to\b|\bformer|\bearlier\b|\bdid I (?:live|work)\b|\boriginally\b", re.I)
CHANGE = re.compile(r"\bhow (?:did|has|have|was)\b.*\b(?:chang|evolv|develop)|\bhistory of\b|\bover (?:time|the years)\b", re.I)
COMING = re.compile(r"\bcoming up\b|\bupcoming\b|\bmy plans\b|\bplanned\b|\bnext (?:week|month)\b|\bahead of me\b", re.I)
SHARES = {"profile": 0.1, "identity": 0.2, "schema": 0.2, "intention": 0.1, "fact": 0.4}  # of the budget; the rest flows to facts

SCHEMA_LINES = 4  # with a channel of their own: the authors' quota of 40 % of ten profile lines


@dataclass
class Line:
    """One line of context. `entries` are its dated statements, for whoever reads by program."""
    id: str
    channel: str
    text: str
    t: str
    entries: list  # [(date, text)]

    def __str__(self):
        return f"[{self.id}] {self.text}"

    @functools.cached_property
    def cost(self):
        return count_tokens(str(self))


@dataclass
class Recall:
    lines: list
    text: str
    ids: list


def decay(last, now):
    """Ranking factor at read time, never stored: stored decay would depend on how often System2 runs."""
    return 2 ** (-max(0, days_between(last, now)) / 180)


def named_people(store, question):
    """Speakers and relatives whom the question names."""
    low = set(re.findall(r"\w+", question.lower()))
    return [s for s in store.speakers if s.lower() in low] + [
        s for s in {slot[0] for slot in store.members} - set(store.speakers) if s.split("'s ")[-1].lower() in low]


def rank_turns(store, question, now, k=100):
    """Raw turns by relevance: [(score, turn id)], best first, at most k.

    BM25, then what a memory knows beyond the words of a turn: what stands next to it (an answer seldom repeats the
    words of the question before it), how well its session fits, who spoke, and when.
    """
    if not store.turns:
        return []
    people = [s for s in store.speakers if s.lower() in re.findall(r"\w+", question.lower())]
    names = {stem(p.lower()) for p in people}  # a name in a turn is mostly the *other* one calling: it is no content
    query = Counter(w for w in words(DATE.sub(" ", question)) if w not in names) or Counter(words(question))
    base = store.turn_index.scores(query, b=0.5)
    session, speaker, day = (np.array(store.columns[c]) for c in ("session", "speaker", "day"))
    scores, same = base.copy(), session[1:] == session[:-1]
    scores[1:] += 0.5 * base[:-1] * same
    scores[:-1] += 0.1 * base[1:] * same
    best = np.zeros(session.max() + 1)
    np.maximum.at(best, session, base)
    scores += 0.2 * best[session] * (scores > 0)
    if people:  # mild: questions also ask what somebody said *about* a person
        scores *= np.where(np.isin(speaker, [store.speakers.index(p) for p in people]), 1.2, 1.0)
    if window := date_window(question, now):  # people tell things in the days after they happened
        first, last = (date.fromisoformat(d).toordinal() for d in window)
        scores *= np.where((day >= first) & (day <= last + 14), 1.5, 1.0)
    top = np.argpartition(-scores, k)[:k] if len(scores) > k else np.arange(len(scores))
    top = sorted((int(i) for i in top if scores[i] > 0), key=lambda i: (-scores[i], -i))
    keys = store.turn_index.keys
    return [(float(scores[i]), keys[i]) for i in top if keys[i] not in store.hidden]


def top_beliefs(store, question, k=200):
    """Beliefs by BM25 over their own words, superseded ones included: a hit on any member brings its chain."""
    scores = store.belief_index.scores(Counter(words(question)))
    best = np.argpartition(-scores, k)[:k] if len(scores) > k else np.arange(len(scores))
    best = sorted((int(i) for i in best if scores[i] > 0), key=lambda i: (-scores[i], i))
    return [store.beliefs[store.belief_index.keys[i]] for i in best]


def visible_schemas(store, now):
    """Schemas and cores as far as their support is alive *now*, since `observe` never touches them."""
    def alive(schema):
        beliefs = [store.beliefs[i] for i in schema.evidence]
        live = {b.slot for b in beliefs if b.status == "active" and b.polarity == 1}
        return schema.status == "stable" and len(live) >= 2 and all(b.status != "suppressed" for b in beliefs)

    def rank(node):
        seen = max(store.beliefs[i].t_seen for i in node.evidence)
        return -node.confidence * decay(seen, now), node.id
    schemas = sorted((s for s in store.schemas.values() if alive(s)), key=rank)
    domains = {s.id: s.domain for s in schemas}
    cores = [c for c in store.cores.values() if c.status == "stable" and len({domains.get(m) for m in c.members} - {None}) >= 2]
    return schemas, sorted(cores, key=rank)


def node_line(b):
    """One belief on its own."""
    text = b.text + (" (no longer)" if b.polarity < 1 else "")
    return None if b.status == "suppressed" else Line(b.id, "fact", f"{b.t_event[:10]} {text}", b.t_event, [(b.t_event, text)])


def chain_line(store, slot):
    """The chain of a slot as one line, "Paris (2024-01-05) → Berlin (2025-03-01, current)"; suppressed nodes left out."""
    chain = [b for b in store.chain(slot) if b.status != "suppressed"]
    if len(chain) < 2:
        return node_line(chain[0]) if chain else None

    def show(b):
        return ("no longer " if b.polarity < 1 and b.value else "") + (b.text if b.link_kind == "refine" else b.value or "none")
    steps = [f"{show(b)} ({b.t_event[:10]}{', current' if b.status == 'active' else ''})" for b in chain]
    return Line(chain[-1].id, "fact", f"{slot[0]} {slot[1]}: {' → '.join(steps)}", chain[-1].t_event,
                [(b.t_event, show(b) + (", current" if b.status == "active" else "")) for b in chain])


def recall(store, question, now, budget=800, links=True, schemas=True, sweep=True, separate=False, raw=True):
    """Question -> Recall within `budget` tokens: profile, schemas (proactive), facts with chains, intentions, raw turns.

    `separate=True` gives schemas and cores a channel of their own, four lines on top of the budget, as in the authors'
    reader; otherwise they take their share and displace facts. Every line carries the id to ask `why` about.
    """
    wanted, size = {channel: [] for channel in [*SHARES, "newest"]}, 0
    asked = [a for a, pattern in ASK.items() if re.search(pattern, question, re.I)]
    hits = top_beliefs(store, f"{question} {' '.join(asked)}")
    newest = list(store.beliefs.values())[-50:][::-1]  # nearest-neighbour search always finds something: so do we
    if links:
        people = named_people(store, question) or store.speakers[:1]
        found = [(p, a, None) for p in people for a in asked if (p, a, None) in store.heads] + [b.slot for b in hits]
        found += [(p, a, None) for p in people for a in sorted(SINGLE) if (p, a, None) in store.heads]
        rest = [b.slot for b in newest]
    else:
        found, rest = [b.id for b in hits], [b.id for b in newest]
    found = dict.fromkeys(found)
    for item in [*found, *dict.fromkeys(i for i in rest if i not in found)]:
        line = chain_line(store, item) if links else node_line(store.beliefs[item])
        if line:
            b = store.beliefs[line.id]
            line.channel = ("newest" if item not in found else "identity" if b.layer == "identity" else
                            "profile" if b.slot[1] in SINGLE and b.slot[1] not in asked else "fact")
            wanted[line.channel].append(line)
            size += line.cost
            if size > 3 * budget:  # more could not fit, whatever the shares leave over
                break
    if schemas:
        domain, (found, cores) = domain_of(question), visible_schemas(store, now)
        cores = cores if sweep else []
        found.sort(key=lambda s: s.domain != domain)  # stable sort: the question's own domain first
        first = [s for s in found if s.domain == domain]
        for node in first + cores + [s for s in found if s.domain != domain]:
            wanted["schema"].append(Line(node.id, "schema", node.text, node.created, [(node.created, node.text)]))
    for item in sorted(store.intentions.values(), key=lambda i: (i.until, i.id)):
        if item.status == "open" and item.until >= now[:10] and any(store.beliefs[b].status == "active" for b in item.evidence):
            wanted["intention"].append(Line(item.id, "intention", f"planned until {item.until}: {item.text}", item.until,
                                            [(item.until, item.text)]))
    return assemble(store, wanted, question, now, budget, separate, raw)


def assemble(store, wanted, question, now, budget, separate=False, raw=True):
    """Fill the shares, whole lines only; what a channel leaves over flows to facts, raw turns, then the newest facts."""
    chosen, left = {}, 0

    def spend(lines, tokens):
        for line in lines:
            if line.id not in chosen and line.cost <= tokens:
                chosen[line.id] = line
                tokens -= line.cost
        return tokens
    if separate:
        chosen.update((n.id, n) for n in wanted["schema"][:SCHEMA_LINES])
    for channel in ("profile", "identity", "schema", "intention"):
        share = int(budget * SHARES[channel])
        left += share if separate and channel == "schema" else spend(wanted[channel], share)
    left = spend(wanted["fact"], budget - sum(int(budget * s) for c, s in SHARES.items() if c != "fact") + left)
    if raw:  # so that a span which no frame caught can still be found
        cited = {s[0] for i in chosen if i in store.beliefs for s in store.beliefs[i].sources}
        turns = [store.turns[i] for _, i in rank_turns(store, question, now, 50) if i not in cited]
        left = spend([Line(t.id, "raw", f"{t.t[:10]} {t.speaker}: {t.text}", t.t, [(t.t, t.text)]) for t in turns], left)
    spend(wanted["newest"], left)
    rank = {"c": 0, "s": 1}
    lines = sorted(chosen.values(), key=lambda n: (rank.get(n.id.split("/")[-1][0], 2 if n.channel in ("profile", "identity") else 3),
                                                   n.t, n.id))
    return Recall(lines, "\n".join(map(str, lines)), [n.id for n in lines])


def answer_rules(store, question, now):
    """A direct answer from the chains, or the best line of the context, or an honest "I don't know". -> (text, ids)."""
    low = question.lower()
    if COMING.search(question):
        items = [n for n in recall(store, question, now).lines if n.channel == "intention"]
        return ("; ".join(n.text for n in items), [n.id for n in items]) if items else ("Nothing that I know of.", [])
    people = named_people(store, question) or store.speakers[:1]
    slots = [(p, a, None) for p in people for a, pattern in ASK.items() if re.search(pattern, low)]
    q = set(words(question))
    slots += [b.slot for b in top_beliefs(store, question, 20) if b.slot[2] and b.slot[1] not in ("event", "maybe", "plan")
              and set(words(b.value)) & q]
    for slot in [s for s in slots if s in store.heads]:
        chain = [b for b in store.chain(slot) if b.status != "suppressed"]
        if not chain:
            continue
        head = chain[-1]
        if CHANGE.search(question):
            return chain_line(store, slot).text, [b.id for b in chain]
        if re.match(r"why\b", low):
            turn, start, end, _ = head.sources[0]
            return f"{head.reason or 'no reason given'} — “{store.turns[turn].text[start:end]}”", [head.id]
        if PAST.search(question):
            known = [b for b in chain if b.link_kind != "refine"]
            named = [i for i, b in enumerate(known) if b.value and key(b.value) in key(question)]
            at = named[0] if named else len(known) - 1
            return (known[at - 1].value, [known[at - 1].id]) if at > 0 else ("Nothing before that.", [])
        window = date_window(question, now)
        if window and window[1] < now[:10]:
            node = as_of(store, slot, window[1])
            return (node.value, [node.id]) if node else ("I don't know.", [])
        if re.match(r"(do|does|am|is|have|has)\b", low):
            return ("Yes" if head.polarity == 1 else "No") + f", since {head.t_event[:10]}.", [head.id]
        return (head.value if head.polarity == 1 else f"No longer {head.value}".strip()), [head.id]
    lines = [n for n in recall(store, question, now).lines if q & set(words(n.text))]
    if not lines:
        return "I don't know.", []
    best = max(lines, key=lambda n: len(q & set(words(n.text))))
    return best.text, [best.id]


def as_of(store, slot, t):
    """What held on day `t`: the last node whose event time is not after it. None before the first."""
    known = [b for b in store.chain(slot) if b.t_event[:10] <= t[:10] and b.status != "suppressed"]
    return known[-1] if known else None


# ------------------------------------------------------------------ the facade
class Memory:
    """One memory for many users, each with a store of their own. `backend` is "rules" or an LLM (see below)."""

    def __init__(self, backend=None, auto_sleep_every=0):
        self.stores, self.backend, self.auto_sleep_every = {}, backend, auto_sleep_every
        self.read = self.framed = 0  # clauses read and clauses that hit a frame: the extractor's honest coverage

    def store(self, user="user"):
        return self.stores.setdefault(user, Store(user))

    def observe(self, text, t, session="s1", speaker="user", user="user"):
        """System1, inside the write: keep the raw turn first, then extract, reconcile, apply. -> [(op, belief id)]."""
        store = self.store(user)
        if self.auto_sleep_every and store.turns and session not in (seen := {x.session for x in store.turns.values()}):
            if len(seen) % self.auto_sleep_every == 0:
                self.sleep(t, user)
        date.fromisoformat(t[:10])  # a bad date is refused before anything is kept
        turn = Turn(store.new_id("t"), session, speaker, text, t)
        store.commit("RAW", [turn.id], turn.id, turn=asdict(turn))
        if self.backend:
            claims, forget = self.backend.extract(store, turn)
            if claims is None:  # the turn is kept, nothing is claimed, and the failure is on record
                store.commit("FAILED", [turn.id], turn.id, "no usable answer from the model")
                claims = []
        else:
            claims, forget, read, framed = extract_rules(turn)
            self.read, self.framed = self.read + read, self.framed + framed
        ops = write_claims(store, turn, claims)
        for what in forget:
            ops += [("SUPPRESS", i) for i in self.forget(what, user, turn.id)]
        return ops

    def forget(self, what, user="user", turn=""):
        """Suppress every belief whose text holds all content words of `what`; nodes and links stay, nobody sees them."""
        store, need = self.store(user), set(words(what))
        if not need:
            return []
        ids = [b.id for b in store.beliefs.values() if b.status != "suppressed" and need <= set(words(f"{b.slot[0]} {b.value} {b.text}"))]
        hide = [t.id for t in store.turns.values() if need <= set(words(t.text))]
        store.commit("SUPPRESS", ids, turn, f"asked to forget", hide=sorted({*hide, *([turn] if turn else [])}))
        return ids

    def sleep(self, now, user="user", sweep=True):
        """System2. All or nothing: the plan is computed first and applied as one event; no change, no event."""
        store = self.store(user)
        extra = {"induce": self.backend.induce, "name_core": self.backend.name_core} if self.backend else {}
        plan = plan_sleep(store, now, sweep=sweep, **extra)
        if any(plan.values()):
            store.commit("SLEEP", [n["id"] for nodes in plan.values() for n in nodes], reason=f"night of {now[:10]}", **plan)
        return plan

    def recall(self, question, now, budget=800, user="user", **switches):
        return recall(self.store(user), question, now, budget, **switches)

    def answer(self, question, now, user="user"):
        if self.backend:
            context = self.recall(question, now, user=user)
            return self.backend.answer(context.text, question), context.ids
        return answer_rules(self.store(user), question, now)

    def trail(self, slot, user="user"):
        return self.store(user).chain(slot)

    def as_of(self, slot, t, user="user"):
        return as_of(self.store(user), slot, t)

    def why(self, id_, user="user"):
        """core -> schemas -> beliefs -> the verbatim span of the raw turn, as a nested dictionary."""
        store = self.store(user)
        if id_ in store.cores:
            node = store.cores[id_]
            below = [self.why(m, user) for m in node.members]
        elif node := store.schemas.get(id_) or store.intentions.get(id_):
            below = [self.why(b, user) for b in node.evidence]
        elif node := store.beliefs.get(id_):
            below = [{"id": turn, "text": store.turns[turn].text[start:end], "t": store.turns[turn].t, "because": []}
                     for turn, start, end, _ in node.sources]
        elif node := store.turns.get(id_):
            below = []
        else:
            raise DcpmError(f"there is no record {id_!r}; recall(...).ids lists the ids you can ask about")
        if getattr(node, "status", "") == "suppressed":
            return {"id": id_, "text": "(forgotten on request)", "because": []}
        return {"id": id_, "text": node.text, "because": below}

    def check(self):
        """All invariants of all users; [] when they hold. (Replaying every log is included, so this is not for hot loops.)"""
        return [f"{user}: {problem}" for user, store in self.stores.items() for problem in check_store(store)]

    def save(self, path):
        """The audit logs as JSON; written beside the target and moved over it, so a crash leaves the old file."""
        data = {"format": "dcpm-1", "users": {u: [asdict(e) for e in s.log] for u, s in self.stores.items()}}
        path = Path(path)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, ensure_ascii=False)
        os.replace(name, path)

    @classmethod
    def load(cls, path, **options):
        memory = cls(**options)
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["format"] != "dcpm-1":
                raise ValueError("unknown format")
            for user, log in data["users"].items():
                memory.stores[user] = replay([Event(**e) for e in log], user)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise DcpmError(f"{path} is not a memory saved by dcpm.py ({error}); restore it from a copy") from error
        return memory

    def dump(self, user="user"):
        """The whole memory as text for people."""
        store = self.store(user)
        out = [f"{len(store.turns)} turns, {len(store.beliefs)} beliefs"]
        out += [f"  [{s}] {line.text}" for s in store.heads.values() if (line := chain_line(store, store.beliefs[s].slot))]
        for node in [*store.schemas.values(), *store.cores.values(), *store.intentions.values()]:
            out.append(f"  [{node.id}] {node.text} ({node.status}{getattr(node, 'confidence', '') and f', {node.confidence:.2f}'})")
        return "\n".join(out)


def replay(log, user="user"):
    """Audit log -> store. The log is the only thing that is saved."""
    store = Store(user)
    for event in log:
        store.apply(event)
        store.log.append(event)
    return store


def snapshot(store):
    """Everything a store holds, as one comparable string."""
    parts = {k: {i: asdict(n) for i, n in getattr(store, k).items()} for k in ("turns", "beliefs", "schemas", "cores", "intentions")}
    return json.dumps([parts, sorted(store.hidden), sorted(store.heads.values()), [asdict(e) for e in store.log]], sort_keys=True)


def check_store(store):
    """The invariants of one store, as a list of sentences about what is broken."""
    bad, b = [], store.beliefs
    slept = store.log and store.log[-1].op == "SLEEP"
    for n in b.values():
        if (n.next and b[n.next].prev != n.id) or (n.prev and b[n.prev].next != n.id) or n.id in (n.prev, n.next):
            bad.append(f"links of {n.id} are not mutual")
        if n.link_kind == "supersede" and n.prev and (key(b[n.prev].value), b[n.prev].polarity) == (key(n.value), n.polarity):
            bad.append(f"{n.id} supersedes an equal claim")
        if n.prev and b[n.prev].t_event > n.t_event:
            bad.append(f"{n.id} is older than its predecessor")
        if (n.status == "active") != (n.next is None and n.status != "suppressed"):
            bad.append(f"status of {n.id} is {n.status}")
        if not n.sources or any(s[0] not in store.turns or not 0 <= s[1] < s[2] <= len(store.turns[s[0]].text) for s in n.sources):
            bad.append(f"{n.id} has no source, or one outside its turn")
    slots = Counter(n.slot for n in b.values())
    heads = Counter(n.slot for n in b.values() if n.next is None)
    for slot, count in slots.items():
        if heads[slot] != 1 or len(store.chain(slot)) != count or store.head(slot).next:
            bad.append(f"{slot} has {heads[slot]} heads, and {len(store.chain(slot))} of {count} nodes can be reached")
    for node in [*store.schemas.values(), *store.cores.values(), *store.intentions.values()]:
        if slept and any(b[i].status == "suppressed" for i in node.evidence):
            bad.append(f"{node.id} rests on something forgotten")
    for s in store.schemas.values():
        live = [i for i in s.live if b[i].status == "active"]
        if slept and s.status == "stable" and (len({b[i].slot for i in live}) < 3 or len(store.sessions(live)) < 2):
            bad.append(f"schema {s.id} is stable on {len(live)} beliefs")
    for c in store.cores.values():
        domains = {store.schemas[m].domain for m in c.members if store.schemas[m].status == "stable"}
        if c.status == "stable" and len(domains) < 2:
            bad.append(f"core {c.id} rests on {len(domains)} domain(s)")
        if c.evidence != sorted({i for m in c.members for i in store.schemas[m].evidence}):
            bad.append(f"evidence of core {c.id} is not the union of its members'")
    again = replay(store.log, store.user)
    if any(getattr(again, k) != getattr(store, k) for k in
           ("turns", "beliefs", "heads", "schemas", "cores", "intentions", "hidden", "of_turn", "members", "speakers")):
        bad.append("replaying the log gives another store")
    return bad


# ------------------------------------------------------------------ the miniature benchmark
# Phrases never name a pole. Per pole: three phrases for the history, then the one that appears in answer options only.
SCENES = {"cooking": "the dinner|the cake|the soup|the roast", "travel": "the trip|the flight|the train journey|the holiday",
          "work": "the report|the meeting|the presentation|the conference", "garden": "the lawn|the hedge|the flower bed|the greenhouse",
          "sport": "the race|the hike|the marathon|the swim", "home": "the flat|the bedroom wall|the bathroom|the new furniture",
          "music": "the concert|the choir evening|the gig|the recording session", "study": "the exam|the essay|the seminar|the thesis",
          "party": "the birthday|the picnic|the wedding|the reunion", "gifts": "the gift for Ann|the wrapping|the presents|the gift for Tom"}
BANKS = {
    "development": {
        "phrases": {
            "plans": "wrote a checklist for {}|drew up a schedule for {}|prepared {} weeks ahead|settle every detail of {} in advance",
            "improvises": "decided on {} on a whim|went into {} without a plan|left {} to the last minute|just see what happens with {}",
            "saves": "used a coupon for {}|hunted for a discount on {}|got the things for {} second hand|find a cheaper way to do {}",
            "spends": "splurged on {}|chose the premium version of {}|paid extra for {}|go for luxury with {}",
            "alone": "did {} by myself|enjoyed {} in solitude|kept {} solo|handle {} on my own",
            "together": "invited half the street to {}|did {} with friends|turned {} into a group thing|do {} as a whole gang",
            "careful": "double checked {}|took out insurance for {}|packed a spare for {}|keep a backup for {}",
            "daring": "took a big risk with {}|gambled on {}|jumped in at the deep end with {}|look for the thrill in {}",
            "routine": "did {} the same as always|kept to the familiar version of {}|took my old favourite for {}|stick to tradition with {}",
            "novelty": "tried something different for {}|ran an experiment with {}|picked an exotic variant of {}|go for an unusual kind of {}",
            "makes": "made all of {} from scratch|built what {} needed|used homemade things for {}|do {} by hand",
            "buys": "ordered everything for {}|took ready made things for {}|had {} sorted by delivery|get {} off the shelf",
            "exact": "measured everything for {}|timed {} with a stopwatch|was precise about {}|get {} right to the minute",
            "rough": "went by feel with {}|eyeballed {}|made a rough guess at {}|do {} give or take"},
        "move": "I moved to {}.|I live in {} now.|We unpacked; I'm living in {}.", "late": "Back in {} I lived in {}.",
        "job": "I work at {}.|I started working at {}.|I switched to {}.", "other": "My sister moved to {}.",
        "span": "I named the {} {} {}.", "ask": "What did I name the {}?"},
    "validation": {
        "phrases": {
            "plans": "thought {} through a month before|made an outline of {}|had a spreadsheet for {}|lay out {} point by point",
            "improvises": "made {} up as I went|took {} as it came|had no idea beforehand about {}|be spontaneous about {}",
            "saves": "waited until {} was on sale|haggled over {}|kept the budget of {} tiny|spend as little as possible on {}",
            "spends": "went first class with {}|ignored the price tag of {}|treated myself to the finest for {}|get a deluxe take on {}",
            "alone": "kept {} to myself|wanted nobody around for {}|had {} in peace|have {} without company",
            "together": "shared {} with the neighbours|teamed up for {}|filled the place with people for {}|let everyone join {}",
            "careful": "read the warnings before {}|took no chances with {}|wore a helmet for {}|go for the safe side of {}",
            "daring": "threw caution to the wind for {}|said yes to {} without looking|pushed {} to the edge|be bold about {}",
            "routine": "repeated last year's version of {}|did {} as before|followed my habit with {}|do {} as ever",
            "novelty": "tested a novel idea for {}|gave {} a twist nobody had seen|chose an unknown variant of {}|be curious about {}",
            "makes": "sewed and glued things for {}|carved a piece for {}|put my own kit for {} into shape|have a handmade touch in {}",
            "buys": "hired somebody for {}|picked things for {} from a catalogue|got {} prepackaged|leave {} to a store",
            "exact": "counted every item of {}|used a ruler for {}|did the sums for {} to two decimals|calibrate {}",
            "rough": "went with a ballpark for {}|did {} by eye|let {} come out somewhere near|do {} approximately"},
        "move": "I relocated to {}.|These days I'm settled in {}.|I returned to {}.", "late": "In {} I was living in {}.",
        "job": "I work for {}.|I joined {}.|I got a job at {}.", "other": "My sister is based in {}.",
        "span": "The {} {} got a name from me: {}.", "ask": "How is the {} called?"}}
CITIES = "Paris Berlin Rome Lima Oslo Quito Cairo Delhi Tokyo Lagos Perth Turin".split()
FIRMS = "Acme Initech Globex Umbrella Hooli Stark Wayne Tyrell".split()
NAMES = "Vega Juno Orla Milo Pip Zora Nemo Tilda Bruno Kiki Otto Wanda Fips Gus Luma Rollo".split()
THINGS = {"bike": "thing I pedal", "boat": "thing I row", "kite": "thing I fly", "cactus": "thing I water", "lamp": "thing that glows",
          "robot": "thing that beeps"}  # half of the span questions ask by paraphrase: easy ones would prove nothing
FILLER = ([f"I {verb}" for verb in ("watched", "heard of", "thought about", "passed by", "talked about", "dreamt of", "saw", "forgot")],
          ["an old film.", "a storm.", "the tram.", "a stranger.", "the news.", "a bridge.", "the moon.", "a lost key.", "the river."])
KINDS = ("span", "current", "past", "how changed", "implicit seen", "implicit unseen")


def make_persona(seed, bank):
    """One generated life: [(ISO date, session, text)] and [(kind, question, options, index of the right one)]."""
    rng = random.Random(f"persona-{seed}")
    phrases = {pole: line.split("|") for pole, line in bank["phrases"].items()}
    scenes = {d: line.split("|") for d, line in (SCENES | bank.get("scenes", {})).items()}
    pairs = sorted({tuple(sorted((pole, POLES[pole][0]))) for pole in phrases})
    poles = [rng.choice(pair) for pair in rng.sample(pairs, 4)]
    domains = rng.sample(sorted(scenes), 10)
    seen, unseen = domains[:6], domains[6:]
    home = {pole: [seen[(i + k) % 6] for k in (0, 2, 3)] for i, pole in enumerate(poles)}  # where each habit shows
    said, sessions = defaultdict(list), list(range(20))
    for pole in poles:
        for domain in home[pole]:
            for phrase, scene, n in zip(phrases[pole][:3], rng.sample(scenes[domain][:3], 3), rng.sample(sessions, 3)):
                said[n].append(f"I {phrase.format(scene)}.")
        exception, place = rng.choice(phrases[POLES[pole][0]][:3]), rng.choice(scenes[rng.choice(seen)][:3])
        said[rng.choice(sessions)].append(f"I {exception.format(place)}.")  # nobody is consistent
        said[rng.choice(sessions)].append(f"My neighbour {rng.choice(phrases[POLES[pole][0]][:3]).format(place)}.")
    cities, firms, names = rng.sample(CITIES, 6), rng.sample(FIRMS, 4), rng.sample(NAMES, 9)
    for n, text, city in zip((1, 7, 13), bank["move"].split("|"), cities[1:4]):
        said[n].append(text.format(city))
    said[9].append(bank["late"].format(2021, cities[0]))
    said[rng.choice((14, 16))].append(bank["other"].format(cities[4]))
    for n, text, firm in zip((2, 8, 15), bank["job"].split("|"), firms):
        said[n].append(text.format(firm))
    for n, city in ((5, cities[5]), (11, cities[5]), (18, cities[1]), (19, cities[5])):  # to name a place is not to live there
        said[n].append(f"I spent a day in {city}.")
    for n in (6, 17):
        said[n].append(f"I met somebody from {firms[3]}.")
    things = rng.sample([(colour, thing) for colour in ("red", "blue", "green") for thing in THINGS], 9)
    for (colour, thing), name in zip(things, names):
        said[rng.choice(sessions)].append(bank["span"].format(colour, thing, name))
    turns = []
    for n in sessions:
        day = (date(2024, 1, 3) + timedelta(14 * n)).isoformat()
        texts = said[n] + [" ".join(map(rng.choice, FILLER)) for _ in range(8)]
        rng.shuffle(texts)
        turns += [(day, f"s{n}", text) for text in texts]
    return turns, persona_questions(rng, bank, phrases, scenes, poles, home, unseen, cities, firms, dict(zip(things, names)))


def persona_questions(rng, bank, phrases, scenes, poles, home, unseen, cities, firms, things):
    out = []

    def ask(kind, question, right, wrong):
        options = [right, *wrong[:3]]
        rng.shuffle(options)
        out.append((kind, question, options, options.index(right)))
    for i, (colour, thing) in enumerate(rng.sample(sorted(things), 6)):
        wrong = sorted(things, key=lambda t: (t[0] != colour, t[1] != thing, t))  # near misses first
        wrong = [things[t] for t in wrong if t != (colour, thing)]
        ask("span", bank["ask"].format(f"{colour} {thing if i % 2 else THINGS[thing]}"), things[colour, thing], wrong)
    for verb, chain, extra in (("live", cities[:4], cities[4:]), ("work", firms[:3], firms[3:])):
        ask("current", f"Where do I {verb} now?", chain[-1], [extra[-1], *rng.sample(chain[:-1] + extra[:-1], 2)])
        for i in range(1, len(chain)):
            ask("past", f"Where did I {verb} before {chain[i]}?", chain[i - 1],
                [extra[-1], *[c for c in chain if c not in chain[i - 1:i + 1]], *extra[:-1],
                 *(c for c in (CITIES if verb == "live" else FIRMS) if c not in chain + extra)])
        orders = [chain[::-1], [*chain[1:], chain[0]], [chain[1], chain[0], *chain[2:]]]
        ask("how changed", f"How did where I {verb} change over time?", " → ".join(chain), [" → ".join(o) for o in orders])
    for pole in poles:
        others = [POLES[p][0] for p in poles if p != pole]
        for kind, domain in [("implicit seen", rng.choice(home[pole]))] + [("implicit unseen", d) for d in rng.sample(unseen, 2)]:
            scene = scenes[domain][3]
            ask(kind, f"Which would suit me best for {scene}?", phrases[pole][3].format(scene),
                [phrases[p][3].format(scene) for p in [POLES[pole][0], *rng.sample(others, 2)]])
    return out


OTHERS = re.compile(rf"\b({RELATIVES})\b")


def choose(question, lines, options):
    """The one answerer, for every kind of question and every condition: lines of context -> a score per option.

    It may use the behaviour lexicon on any line, so that raw turns are not handicapped by a weaker reader.
    """
    asked = set(words(question))
    about_me = [n for n in lines if not OTHERS.search(n.text)]  # the questions are all about the user
    entries = sorted((t[:10], text) for n in about_me for t, text in n.entries if "no longer" not in text)

    def dates(name, found=None):
        return [t for t, text in (entries if found is None else found) if re.search(rf"\b{re.escape(name)}\b", text)]
    limit = re.search(r"\bbefore (\w+)", question)
    if CHANGE.search(question) or limit:  # where a line tells a whole story that answers, believe it before single mentions
        wanted = [limit.group(1)] if limit else set.intersection(*(set(o.split(" → ")) for o in options))
        chain = next((n.entries for n in about_me if "→" in n.text and all(w in n.text for w in wanted)), entries)
        if limit:
            end = (dates(limit.group(1), chain) or ["9999"])[0]
            firsts = [(dates(option, chain) or ["9999"])[0] for option in options]
            return [date.fromisoformat(f[:10]).toordinal() if f < end else 0 for f in firsts]
        steps = [[(dates(name, chain) or [""])[0] for name in option.split(" → ")] for option in options]
        return [sum(0.5 if not (a and b) else float(a < b) for a, b in zip(s, s[1:])) for s in steps]
    if any(re.search(ASK[a], question) for a in ("residence", "employer")):
        current = [entry for entry in entries if "current" in entry[1]]
        return [date.fromisoformat(d[-1]).toordinal() if (d := dates(o, current or entries)) else 0 for o in options]
    common, scores = set.intersection(*(set(words(o)) for o in options)), []
    weights = [1 + len(asked & set(words(n.text))) for n in about_me]
    for option in options:
        own = set(words(option)) - common
        lexical = max((w * len(own & set(words(n.text))) / max(len(own), 1) for n, w in zip(about_me, weights)), default=0)
        shown, score = poles_of(option), 0
        for n, w in zip(about_me, weights):
            there = poles_of(n.text)
            score += w * (any(p in there for p in shown) - any(POLES[p][0] in there for p in shown))
        scores.append(lexical + score)
    return scores


def credit(scores, right):
    """1 for the right choice, shared equally on a tie: without evidence exactly chance."""
    best = [i for i, s in enumerate(scores) if math.isclose(s, max(scores), abs_tol=1e-9)]
    return (right in best) / len(best)


def placebo(store, rng):
    """The same schemas and cores, but about behaviours drawn at random: as long, as many, and without information."""
    fake = copy.copy(store)
    fake.schemas, fake.cores = copy.deepcopy((store.schemas, store.cores))
    for node in [*fake.schemas.values(), *fake.cores.values()]:
        node.text = node.text.replace(POLES[node.behaviour][1], POLES[rng.choice(sorted(POLES))][1])
    return fake


CONDITIONS = {  # name -> switches of recall; "shared" = schemas displace facts instead of having a channel of their own
    "raw TF-IDF": None,
    "System1, links off": dict(schemas=False, links=False),
    "System1": dict(schemas=False),
    "System1+2, no sweep": dict(separate=True, sweep=False),
    "System1+2": dict(separate=True),
    "System1, more tokens": dict(schemas=False),  # as many as System1+2 spends in all
    "placebo": dict(separate=True),
    "System1+2, shared": dict(),
    "placebo, shared": dict()}


def raw_lines(store, question, budget):
    """The baseline: TF-IDF over turns, best first, within the budget."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    turns = list(store.turns.values())
    if not hasattr(store, "tfidf"):
        store.tfidf = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), stop_words="english")
        store.matrix = store.tfidf.fit_transform([t.text for t in turns])
    scores, out = (store.matrix @ store.tfidf.transform([question]).T).toarray().ravel(), []
    for i in sorted(range(len(turns)), key=lambda i: (-scores[i], -i)):  # ties: newest first, as in our reader
        line = Line(turns[i].id, "raw", f"{turns[i].t[:10]} {turns[i].text}", turns[i].t, [(turns[i].t, turns[i].text)])
        cost = count_tokens(f"[{line.id}] {line.text}")
        if cost > budget:
            break
        budget -= cost
        out.append(line)
    return out


def contexts(store, fake, question, now, budget):
    """{condition: lines} for one question."""
    out = {"raw TF-IDF": raw_lines(store, question, budget)}
    for name, switches in CONDITIONS.items():
        if switches is not None:
            extra = sum(n.cost for n in out["System1+2"] if n.channel == "schema") if name == "System1, more tokens" else 0
            out[name] = recall(fake if "placebo" in name else store, question, now, budget + extra, **switches).lines
    return out


def run_benchmark(bank, personas=60, budget=120, seed=0):
    """-> {condition: array (personas, kinds) of mean credit}, and how much the extractor and the lexicon covered."""
    from tqdm import tqdm
    table, read, framed = {name: np.zeros((personas, len(KINDS))) for name in CONDITIONS}, 0, 0
    for p in tqdm(range(personas), desc="personas", leave=False, disable=None):
        turns, questions = make_persona(f"{seed}-{p}", bank)
        memory, now = Memory(), turns[-1][0]
        for day, session, text in turns:
            memory.observe(text, day, session)
        memory.sleep(now)
        store = memory.store()
        fake = placebo(store, random.Random(f"placebo-{seed}-{p}"))
        read, framed = read + memory.read, framed + memory.framed
        for k, kind in enumerate(KINDS):
            chosen = [q for q in questions if q[0] == kind]
            scores = defaultdict(list)
            for _, question, options, right in chosen:
                for name, lines in contexts(store, fake, question, now, budget).items():
                    scores[name].append(credit(choose(question, lines, options), right))
            for name, values in scores.items():
                table[name][p, k] = np.mean(values)
    lines = [(pole, phrase) for pole, line in bank["phrases"].items() for phrase in line.split("|")]
    known = np.mean([poles_of(phrase.format("it")) == (pole,) for pole, phrase in lines])
    return table, framed / max(read, 1), known


def bootstrap(values, seed=0, rounds=2000):
    """Mean and 95 % interval over personas (not questions: a few personas may decide everything)."""
    draws = np.random.default_rng(seed).integers(0, len(values), (rounds, len(values)))
    low, high = np.percentile(values[draws].mean(1), (2.5, 97.5))
    return values.mean(), low, high


def print_benchmark(name, table, frames, lexicon, budget):
    """One table, then the paper's claim in plain numbers. -> {label: (mean, low, high)} in points."""
    print(f"\n{name} bank: {len(next(iter(table.values())))} personas, budget {budget} tokens, accuracy in %, chance 25;"
          f" frames hit {frames:.0%} of clauses, lexicon knows {lexicon:.0%} of phrases")
    print(f"{'':23}" + "".join(f"{kind:>17}" for kind in KINDS))
    for condition, values in table.items():
        cells = [bootstrap(100 * values[:, k]) for k in range(len(KINDS))]
        print(f"{condition:23}" + "".join(f"{m:>9.1f} ±{(hi - lo) / 2:4.1f}  " for m, lo, hi in cells))
    gain = 100 * (table["System1+2"] - table["System1"])
    versus = 100 * (table["System1+2"] - table["placebo"])
    longer = 100 * (table["System1+2"] - table["System1, more tokens"])
    shared = 100 * (table["System1+2, shared"] - table["System1"])
    sweep = 100 * (table["System1+2"] - table["System1+2, no sweep"])
    facts = {"gain of System2, span": gain[:, 0], "gain, implicit seen": gain[:, 4], "gain, implicit unseen": gain[:, 5],
             "headline: implicit - span": gain[:, 4:].mean(1) - gain[:, 0], "over placebo, implicit": versus[:, 4:].mean(1),
             "over System1 with as many tokens": longer[:, 4:].mean(1),
             "sweep alone, implicit unseen": sweep[:, 5], "shared budget, span": shared[:, 0],
             "shared budget, implicit": shared[:, 4:].mean(1)}
    facts = {label: tuple(round(float(x), 1) for x in bootstrap(values)) for label, values in facts.items()}
    for label, (mean, low, high) in facts.items():
        print(f"  {label:34} {mean:+6.1f}  [{low:+.1f}, {high:+.1f}]")
    return facts


# ------------------------------------------------------------------ real corpora: loaders and evaluation
@dataclass
class Question:
    text: str
    category: str
    gold: set  # refs of evidence turns; used by the scorer only, never shown to the store
    answer: str
    now: str
    options: list = field(default_factory=list)
    end: int = None  # number of turns that exist when the question is asked; later ones would leak the future


@dataclass
class Sample:
    name: str
    turns: list  # [(ref, session, speaker, text, ISO time)]
    questions: list


def stamp(text):
    """"1:56 pm on 8 May, 2023" or "2023/05/30 (Tue) 23:40" -> "2023-05-08T13:56"."""
    found = re.search(r"(\d+):(\d+) ?([ap]m)? on (\d+) (\w+),? (\d{4})", text)
    if found:
        hour, minute, half, day, month, year = found.groups()
        hour = int(hour) % 12 + 12 * (half == "pm") if half else int(hour)
        return f"{year}-{MONTHS[month[:3].lower()]:02d}-{int(day):02d}T{hour:02d}:{minute}"
    year, month, day, hour, minute = re.search(r"(\d{4})/(\d+)/(\d+).*?(\d+):(\d+)", text).groups()
    return f"{year}-{int(month):02d}-{int(day):02d}T{int(hour):02d}:{minute}"


CATEGORY = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "adversarial"}


def load_locomo(data):
    """Known malformations: dates of sessions without turns, answers missing or integer, evidence like "D8:6; D9:17"."""
    for item in data if isinstance(data, list) else [data]:
        turns, conversation = [], item["conversation"]
        numbers = sorted(int(k[8:]) for k, v in conversation.items() if re.fullmatch(r"session_\d+", k) and v)
        for n in numbers:
            when = stamp(conversation[f"session_{n}_date_time"])
            for turn in conversation[f"session_{n}"]:
                text = turn.get("text") or ""
                text += f" [shares {turn['blip_caption']}]" if turn.get("blip_caption") else ""
                turns.append((turn["dia_id"], f"session_{n}", turn["speaker"], text, when))
        questions = []
        for q in item["qa"]:
            found = re.findall(r"D:?(\d+):(\d+)", " ".join(map(str, q.get("evidence") or [])))
            answer = q.get("answer", "no information available" if q["category"] == 5 else "")
            questions.append(Question(q["question"], CATEGORY.get(q["category"], str(q["category"])),
                                      {f"D{int(a)}:{int(b)}" for a, b in found}, str(answer), turns[-1][4]))
        yield Sample(item["sample_id"], turns, questions)


def load_longmemeval(data):
    """One haystack a question; sessions are put in order of their dates (the oracle file is not)."""
    for item in data:
        turns, gold = [], set()
        sessions = zip(item["haystack_session_ids"], item["haystack_dates"], item["haystack_sessions"])
        for n, (session, when, messages) in enumerate(sorted(sessions, key=lambda s: stamp(s[1]))):
            for i, message in enumerate(messages):
                ref = f"{session}#{n}:{i}"
                turns.append((ref, f"{session}#{n}", message["role"], message["content"], stamp(when)))
                gold |= {ref} if message.get("has_answer") else set()
        kind = item["question_type"] + ("_abs" if item["question_id"].endswith("_abs") else "")
        yield Sample(item["question_id"], turns, [Question(item["question"], kind, gold, str(item["answer"]),
                                                            stamp(item["question_date"]))])


def load_personamem(path, questions_path):
    """Contexts are cut at the end index. System messages hold the persona, which gives answers away: they are left out."""
    contexts = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            contexts.update(json.loads(line) if line.strip() else {})
        except ValueError as error:
            raise DcpmError(f"{path}, line {number}: not JSON ({error})") from error
    rows = defaultdict(list)
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
        yield Sample(name[:8], turns, [
            Question(r["user_question_or_message"], r["question_type"], set(), r["correct_answer"].strip("() "), turns[-1][4],
                     ast.literal_eval(r["all_options"]), upto[min(int(r["end_index_in_shared_context"]), len(messages))])
            for r in rows[name]])


def load_personamem_v2(rows, folder):
    """Reads the linked 32k history if it lies beside the file, else only the related snippet (an oracle: it says so)."""
    for number, row in enumerate(rows):
        link = Path(folder) / row["chat_history_32k_link"]
        history = json.loads(link.read_text())["chat_history"] if link.exists() else json.loads(row["related_conversation_snippet"])
        turns = [(str(i), "history", m["role"], m["content"], "2024-01-01") for i, m in enumerate(history)
                 if m["role"] != "system" and isinstance(m["content"], str)]
        options = [row["correct_answer"], *json.loads(row["incorrect_answers"])]
        random.Random(number).shuffle(options)  # the official order depends on Python's string hash
        letter = "abcd"[options.index(row["correct_answer"])]
        yield Sample(f"persona {row['persona_id']}" + ("" if link.exists() else " (snippet only)"), turns,
                     [Question(ast.literal_eval(row["user_query"])["content"], row["pref_type"], set(), letter, "2024-01-02",
                               [f"({x}) {o}" for x, o in zip("abcd", options)])])


def load_corpus(path, format="", questions=""):
    """File -> list of samples; the format is detected from the first record when it is not given."""
    path = Path(path)
    if not path.is_file():
        raise DcpmError(f"--data {path}: there is no such file")
    if path.suffix == ".jsonl" or format == "personamem" and questions:
        questions = questions or str(path).replace("context", "questions").replace(".jsonl", ".csv")
        if not Path(questions).is_file():
            raise DcpmError(f"PersonaMem needs its questions file too: --questions FILE.csv (looked for {questions})")
        return list(load_personamem(path, questions))
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        first = data[0] if isinstance(data, list) else data
        keys = set(first)
        kind = ("locomo" if "conversation" in keys else "longmemeval" if "haystack_sessions" in keys
                else "personamem" if "related_conversation_snippet" in keys else "")
        if not kind or format and format != kind:
            raise DcpmError(f"--data {path}: this does not look like {format or 'any format that I know'}; "
                               f"its first record has {sorted(keys)[:8]}")
        rows = data if isinstance(data, list) else [data]
        return list(load_locomo(rows) if kind == "locomo" else load_longmemeval(rows) if kind == "longmemeval"
                    else load_personamem_v2(rows, path.parent))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DcpmError(f"--data {path}: a record is not as expected ({type(error).__name__}: {error})") from error


def ingest(sample, backend=None, memory=None, first=0, last=None):
    """Observe turns first..last of a sample (System1), with a progress bar. -> memory, {ref: turn id}."""
    from tqdm import tqdm
    memory = memory or Memory(backend)
    for ref, session, speaker, text, when in tqdm(sample.turns[first:last], desc=sample.name, leave=False, disable=None):
        memory.observe(text, when, session, speaker)
    ids = list(memory.store().turns)
    return memory, {ref: i for (ref, *_), i in zip(sample.turns, ids)}


def baselines(texts):
    """Rankers over raw turns that remember nothing else: question -> indices, best first."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    tfidf, bm25 = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), stop_words="english"), Index()
    matrix = tfidf.fit_transform(texts)
    for i, text in enumerate(texts):
        bm25.add(i, re.findall(r"\w+", text.lower()))
    return {"TF-IDF": lambda q: np.argsort(-(matrix @ tfidf.transform([q]).T).toarray().ravel(), kind="stable"),
            "BM25": lambda q: np.argsort(-bm25.scores(Counter(re.findall(r"\w+", q.lower()))), kind="stable")}


def evidence_recall(sample, memory, ids):
    """{(category, ranker): [recall@5, @10, @20 per question]}; questions without readable evidence are left out."""
    refs, out = [ref for ref, *_ in sample.turns], defaultdict(list)
    back = {i: ref for ref, i in ids.items()}
    rankers = {name: (lambda q, rank=rank: [refs[i] for i in rank(q)]) for name, rank in
               baselines([text for _, _, _, text, _ in sample.turns]).items()}
    for question in sample.questions:
        gold = question.gold & set(refs)
        if not gold:
            continue
        rankers["DCPM"] = lambda q: [back[i] for _, i in rank_turns(memory.store(), q, question.now)]
        for name, rank in rankers.items():
            order = rank(question.text)
            out[question.category, name].append([len(gold & set(order[:k])) / len(gold) for k in (5, 10, 20)])
    return out


# ------------------------------------------------------------------ LLM backend: the same four jobs, by a chat model
STRICT = "You maintain the memory of an assistant. Reply with one JSON object and nothing else."
EXTRACT = """Conversation date: {t}. Earlier messages, for reference only:
{before}

New message by {speaker}:
<message>
{text}
</message>

List what the new message itself claims about {speaker} or the people around them. Not a claim: questions, quotations, hypotheses.
Resolve relative dates against the conversation date. Make attitudes that are only implied explicit.
{{"claims": [{{"subject": "{speaker}" or e.g. "sister", "attribute": one of {attributes}, "value": short value,
"text": one self-contained sentence, "polarity": 1 holds, -1 no longer or dislikes, 0 taken back, "layer": "fact" or "identity",
"when": "YYYY-MM-DD" since when, "until": "YYYY-MM-DD" for a plan, else "", "quote": the exact words}}],
"forget": [what the message asks to forget]}}"""
RECONCILE = """Known chains, newest version last:
{chains}

New items:
{items}

For each item that speaks of the same thing as a known one give {{"item": number, "op": "CONFIRM" (nothing new), "REFINE" (more
detail, compatible) or "SUPERSEDE" (both cannot be true now), "id": the known id}}. Leave out items about something else.
Two likes can coexist. {{"operations": [...]}}"""
INDUCE = """Facts about one person, each with its id:
{facts}

Known regularities of this person:
{schemas}

Name behavioural regularities inside one area of life that at least three facts from different days support; none is a good answer.
Prefer to extend a known one: repeat its "domain" and "behaviour" word for word. "behaviour" names the style or motive in two to four words
without any noun of the area. {{"schemas": [{{"domain": "...", "behaviour": "...", "text": "circumstance, habit and motive in one
sentence", "evidence": [ids]}}]}}"""
CORE = """These habits of one person come from different areas of life:
{schemas}

Is there one sentence that explains why they go together? {{"behaviour": two to four words or null, "text": the sentence or null}}"""
ANSWER = """What is known about the user:
{context}

Question: {question}
Answer briefly from what is known; if it is not known, say that there is no information."""
ATTRIBUTES = sorted(SINGLE | {"likes", "hobby", "possession", "condition", "habit", "plan", "opinion", "event"})


class LLM:
    """Chat model as extractor, reconciler, inducer and answerer. `chat`: list of conversations -> list of texts or None.

    It proposes; the decision table and the store dispose: a model can choose among ids it was shown, never set a link.
    """

    def __init__(self, chat, name="", tries=3):
        self.chat, self.name, self.tries = chat, name, tries
        self.cache, self.calls, self.failures = {}, 0, Counter()

    @classmethod
    def load(cls, model, model_name="", max_new_tokens=512):
        import common  # only here: the rule backend needs neither torch nor transformers
        return cls(common.chat_backend(model, model_name, max_new_tokens, 0.0), f"{model} {model_name} {max_new_tokens}")

    def ask(self, kind, prompt, check):
        """-> check(JSON object), or None after `tries` answers that do not parse. Cached by prompt: sleep must be repeatable."""
        address = hashlib.sha256(f"{self.name}\0{prompt}".encode()).hexdigest()
        if address not in self.cache:
            talk, value = [{"role": "system", "content": STRICT}, {"role": "user", "content": prompt}], None
            for _ in range(self.tries):
                self.calls += 1
                text = self.chat([talk])[0]
                try:
                    value = json.loads(re.search(r"\{.*\}", text or "", re.S).group())
                    check(value)
                    break
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    value, why = None, f"{type(error).__name__}: {error}"
                    talk = talk[:2] + [{"role": "assistant", "content": (text or "")[:2000]},  # greedy: the same prompt would
                                       {"role": "user", "content": f"Not usable ({why}). One JSON object."}]  # fail the same way
            self.cache[address] = value
            self.failures[kind] += value is None
        value = self.cache[address]
        return None if value is None else check(value)

    def extract(self, store, turn):
        """-> (claims, what to forget), or (None, []) when the model gave nothing usable."""
        if turn.speaker == "assistant":
            return [], []
        before = "\n".join(f"{t.speaker}: {t.text[:300]}" for t in list(store.turns.values())[-21:-1]) or "(none)"

        def check(data):
            claims = []
            for c in data["claims"]:
                attribute = c["attribute"] if c["attribute"] in ATTRIBUTES else "event"
                at = turn.text.find(str(c.get("quote") or "\0"))  # a quote that is not verbatim: the whole turn is the span
                span = (at, at + len(c["quote"])) if at >= 0 else (0, len(turn.text))
                when, until = (str(c.get(k) or "")[:10] for k in ("when", "until"))
                when = when if re.fullmatch(r"\d{4}-\d\d-\d\d", when) and when < turn.t[:10] else turn.t
                until = date.fromisoformat(until).isoformat() if until else ""
                if c.get("polarity", 1) not in (1, 0, -1) or not key(str(c["value"])) and c.get("polarity") != 0 or span[1] <= span[0]:
                    raise ValueError("each claim needs a value, and a polarity of 1, 0 or -1")
                subject = str(c.get("subject") or turn.speaker)
                claims.append(Claim(attribute, str(c["value"])[:200], str(c["text"])[:500], span, subject, c.get("polarity", 1),
                                    "identity" if c.get("layer") == "identity" else "fact", when, until=until))
            return claims, [str(f) for f in data.get("forget", [])]
        claims, forget = self.ask("extract", EXTRACT.format(t=turn.t, before=before, speaker=turn.speaker, text=turn.text,
                                                            attributes=ATTRIBUTES), check) or (None, [])
        return self.reconcile(store, claims) if claims else claims, forget

    def reconcile(self, store, claims):
        """Match claims to chains they belong to. Ids outside the candidates are refused."""
        near = list(dict.fromkeys(b.slot for c in claims for b in top_beliefs(store, f"{c.value} {c.text}", 20)
                                  if b.status != "suppressed"))[:20]
        if not near:
            return claims  # nothing to compare with: all are new
        shown = {store.heads[slot]: " -> ".join(f"{b.text} ({b.t_event[:10]})" for b in store.chain(slot)) for slot in near}

        def check(data):
            out = {}
            for o in data["operations"]:
                if o["id"] not in shown or not 0 <= int(o["item"]) < len(claims) or o["op"] not in ("CONFIRM", "REFINE", "SUPERSEDE"):
                    raise ValueError(f"{o} names an id, item or op that was not offered")
                out.setdefault(int(o["item"]), (o["op"], o["id"]))
            return out
        prompt = RECONCILE.format(chains="\n".join(f"[{i}] {text}" for i, text in shown.items()),
                                  items="\n".join(f"{i}. {c.text}" for i, c in enumerate(claims)))
        for item, (op, id_) in (self.ask("reconcile", prompt, check) or {}).items():
            claim, head = claims[item], store.beliefs[id_]
            if claim.subject == head.slot[0]:
                claim.slot = head.slot
                if op != "SUPERSEDE":
                    claim.value, claim.polarity, claim.detail = head.value, head.polarity, op == "REFINE"
        return claims

    def induce(self, store, pool):
        """Uncited beliefs, clustered by their words, to the model; -> schemas as `induce_rules` returns them."""
        cited, found = {i for s in store.schemas.values() for i in s.evidence}, []
        for subject in store.speakers:
            mine = [b for b in pool if b.slot[0] == subject and b.id not in cited][-400:]
            known = [s for s in store.schemas.values() if s.subject == subject]
            if len(mine) < 3:
                continue
            from sklearn.feature_extraction.text import TfidfVectorizer
            labels = two_stage_dbscan(TfidfVectorizer(analyzer=words).fit_transform([b.text for b in mine]).toarray())
            loose = [b for b, label in zip(mine, labels) if label < 0]  # in no cluster: handed over too, in portions
            groups = [[b for b, x in zip(mine, labels) if x == label] for label in sorted(set(labels) - {-1})]
            for group in groups + [loose[i:i + 30] for i in range(0, len(loose), 30)]:
                shown = {b.id for b in group}

                def check(data):
                    for s in data["schemas"]:
                        if not set(s["evidence"]) <= shown or not words(s["behaviour"]) or not s["domain"] or not s["text"]:
                            raise ValueError("evidence must be ids from the list; domain, behaviour and text must be given")
                    return data["schemas"]
                prompt = INDUCE.format(facts="\n".join(f"[{b.id}] {b.t_event[:10]} {b.text}" for b in group),
                                       schemas="\n".join(f"{s.domain} / {s.behaviour}: {s.text}" for s in known) or "(none)")
                for s in self.ask("induce", prompt, check) or []:
                    label = words(s["behaviour"])
                    found.append((subject, str(s["domain"]).lower(), str(s["behaviour"]).lower(), str(s["text"])[:300],
                                  {w: round(1 / len(set(label)), 4) for w in sorted(set(label))}, s["evidence"]))
        return found

    def name_core(self, members):
        def check(data):
            return (str(data["behaviour"]).lower(), str(data["text"])[:300]) if data["behaviour"] and data["text"] else ()
        return self.ask("core", CORE.format(schemas="\n".join(f"{m.domain}: {m.text}" for m in members)), check) or None

    def answer(self, context, question):
        self.calls += 1
        talk = [{"role": "user", "content": ANSWER.format(context=context or "(nothing)", question=question)}]
        return self.chat([talk])[0] or "no information"


def token_f1(answer, gold):
    """F1 over stemmed tokens without articles and punctuation (a crude stemmer; the benchmark uses Porter's)."""
    a, g = ([stem(w) for w in re.findall(r"[a-z0-9]+", t.lower()) if w not in ("a", "an", "the", "and")] for t in (answer, gold))
    same = sum((Counter(a) & Counter(g)).values())
    return 2 * same / (len(a) + len(g)) if same else 0.0


def score_answer(reply, question):
    """The benchmark's own metric; for LongMemEval containment, a stand-in for its judge."""
    if question.options:
        found = re.findall(r"\(([a-d])\)", reply.lower()) or re.findall(r"\b([a-d])\b", reply.lower())
        return float(set(found) == {question.answer})
    unknown = re.search(r"no information|not mentioned|not known|don't know", reply, re.I)
    if question.category == "adversarial" or question.category.endswith("_abs"):
        return float(bool(unknown))
    if question.category in CATEGORY.values():
        if question.category == "multi-hop":
            return float(np.mean([max(token_f1(part, gold) for part in reply.split(",")) for gold in question.answer.split(",")]))
        return token_f1(reply, question.answer.split(";")[0] if question.category == "open-domain" else question.answer)
    return float(" ".join(words(question.answer)) in " ".join(words(reply)))


def evaluate_corpus(args, backend):
    """Ingest every sample; print evidence recall by category, and scored answers where something can answer."""
    samples = load_corpus(args.data, args.format, args.questions)
    samples = [s for s in samples if args.sample in ("", s.name)]
    if not samples:
        raise DcpmError(f"--sample {args.sample}: no such sample in {args.data}")
    found, scores, read, framed, failures = defaultdict(list), defaultdict(list), 0, 0, Counter()
    for sample in samples:
        if args.sessions:
            keep = list(dict.fromkeys(session for _, session, *_ in sample.turns))[:args.sessions]
            sample.turns = [t for t in sample.turns if t[1] in keep]
        memory, done = Memory(backend), 0
        for question in sorted(sample.questions, key=lambda q: q.end or len(sample.turns)):
            end = min(question.end or len(sample.turns), len(sample.turns))
            memory, ids = ingest(sample, memory=memory, first=done, last=end)  # never a turn beyond the question's end
            done = end
            if (backend or question.options) and sum(map(len, scores.values())) < args.ask:
                scores[question.category].append(score_answer(reply_to(memory, question, backend), question))
        if not sample.questions:
            memory, ids = ingest(sample, memory=memory)
        for where, values in evidence_recall(sample, memory, ids).items():
            found[where] += values
        read, framed = read + memory.read, framed + memory.framed
        store = memory.store()
        print(f"{sample.name}: {len(store.turns)} turns, {len(store.beliefs)} beliefs on {len(store.heads)} chains")
    if backend:
        print(f"model calls {backend.calls}, failures after {backend.tries} tries: {dict(+backend.failures) or 'none'}")
    else:
        print(f"rule extractor: {framed} of {read} claims hit a frame, the others were kept as free facts")
    print_evidence(found)
    for category, values in sorted(scores.items()):
        print(f"  answers, {category:40} {np.mean(values):.3f}  ({len(values)} questions)")


def reply_to(memory, question, backend):
    """With a model: its reply. Without: a letter by the benchmark's rule answerer (a sanity figure, not a reader)."""
    if backend:
        text = question.text + "".join(f"\n{o}" for o in question.options) + ("\nEnd with the letter." if question.options else "")
        return memory.answer(text, question.now)[0]
    lines = memory.recall(question.text, question.now).lines
    scores = choose("", lines, question.options)
    return f"({'abcd'[int(np.argmax(scores))]})"


def print_evidence(found):
    if not found:
        print("this corpus marks no evidence turns: there is no recall to measure")
        return
    print(f"\nevidence recall @5 / @10 / @20{'':20}" + "".join(f"{r:^22}" for r in ("TF-IDF", "BM25", "DCPM")))
    categories = list(dict.fromkeys(c for c, _ in found))
    for category in [*categories, "all questions"]:
        rows = [np.array([v for (c, r), values in found.items() if r == ranker and category in (c, "all questions") for v in values])
                for ranker in ("TF-IDF", "BM25", "DCPM")]
        print(f"  {category:34} {len(rows[0]):4} questions " + "".join(f"  {a:.3f} {b:.3f} {c:.3f} " for a, b, c in (r.mean(0) for r in rows)))


# ------------------------------------------------------------------ the command
STORY = (("2024-01-08", "monday", "I live in Paris. I work at Acme. My sister moved to Oslo."),
         ("2024-01-20", "cooking", "I wrote a checklist for the dinner. I like coffee."),
         ("2024-02-03", "trip", "I drew up an itinerary for the flight. I run alone."),
         ("2024-02-17", "office", "I prepared the report weeks ahead. I mapped out the cake step by step."),
         ("2024-03-02", "spring", "I moved to Berlin because Acme closed its Paris office. I went to the gym by myself."),
         ("2024-03-16", "april", "I booked the hotel in advance. I borrowed a guitar. I made an agenda for the meeting. I have migraines."),
         ("2024-03-30", "easter", "I had a list for the stew. I did the race solo. I still live in Berlin."),
         ("2024-04-13", "late", "Back in 2021 I lived in Rome. I had a schedule for the train journey. Maybe I'll move to Lima."),
         ("2024-04-27", "plans", "I made a timetable for the project. I gave up coffee. I'm flying to Rome on 10 June."),
         ("2024-05-11", "last", "I got a concert ticket on sale. I haggled over a piano. "
                               "Please forget that I have migraines."))


def tell_story():
    """One persona, ten sessions, one night: what gets written, revised, generalised, forgotten, and why it is believed."""
    memory = Memory()
    print("1. By day: every message is kept verbatim, read, and reconciled with what is already believed.\n")
    for day, session, text in STORY:
        print(f'   {day}  "{text}"')
        ops = memory.observe(text, day, session)
        print("               " + ", ".join(f"{op} {id_}" for op, id_ in ops))
    home = ("user", "residence", None)
    print("\n2. A belief that was revised is a chain, not an overwritten row (told late: Rome was spliced in front):\n")
    print("   " + chain_line(memory.store(), home).text)
    for question in ("Where do I live?", "Where did I live before Berlin?", "Why do I live in Berlin?", "Do I like coffee?",
                     "Do I have migraines?"):
        text, ids = memory.answer(question, "2024-05-12")
        print(f"   {question:34} {text}   {ids}")
    memory.sleep("2024-05-12")
    store = memory.store()
    print("\n3. By night: habits inside one domain become schemas; habits alike across domains become core schemas.\n")
    for node in [*store.schemas.values(), *store.cores.values()]:
        print(f"   [{node.id}] {node.text}  {node.status}, confidence {node.confidence:.2f}, {len(node.evidence)} beliefs")
    question = "How should I get ready for my first aquarium?"
    print(f"\n4. Next morning, about a domain that was never mentioned: “{question}”\n")
    for line in memory.recall(question, "2024-05-12", 60, schemas=True, separate=True).text.splitlines():
        print("   " + line)
    core = next(iter(store.cores.values()))
    print(f"\n5. Why does it believe that? why({core.id!r}), down to the words that were said:\n")
    tree = memory.why(core.id)
    print(f"   {tree['text']}")
    for schema in tree["because"]:
        print(f"     because [{schema['id']}] {schema['text']}")
        for belief in schema["because"][:2]:
            for source in belief["because"]:
                print(f"       because [{belief['id']}] {source['t']}: “{source['text']}”")
    print(f"\n   all invariants hold: {not memory.check()}\n")


def lexicon_hash():
    """What must not change between writing the test bank and reporting it."""
    return digest(POLES, DOMAINS, [(a, p, layer, f.pattern) for a, p, layer, f in FRAMES])


def log_heldout(facts, table, path):
    """Append date, commit, hashes and figures to a log outside the repository; old results stay."""
    here = Path(__file__).resolve().parent
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True).stdout.strip()
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "four-papers"
    folder.mkdir(parents=True, exist_ok=True)
    entry = {"date": time.strftime("%Y-%m-%d %H:%M"), "commit": commit, "lexicon": lexicon_hash(), "bank": digest(path.read_text()),
             "facts": facts, "accuracy": {c: np.round(100 * v.mean(0), 1).tolist() for c, v in table.items()}}
    with open(folder / "dcpm_heldout.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
    print(f"\nlogged to {folder / 'dcpm_heldout.jsonl'}")


def benchmark(args):
    banks = dict(BANKS)
    if args.heldout:
        path = Path(__file__).resolve().parent / "tests" / "dcpm_heldout_bank.json"
        banks = {"held-out": json.loads(path.read_text(encoding="utf-8"))}
    print(f"The miniature benchmark. Lexicon and frames {lexicon_hash()}; collision iff behaviour >= {BEHAVIOUR_ALIKE} and content"
          f" < {CONTENT_UNLIKE}. ± is half a 95 % bootstrap interval over personas.")
    for name, bank in banks.items():
        table, frames, lexicon = run_benchmark(bank, args.personas, args.budget, args.seed)
        facts = print_benchmark(name, table, frames, lexicon, args.budget)
        span, seen, unseen = (facts[k] for k in ("gain of System2, span", "gain, implicit seen", "gain, implicit unseen"))
        print(f"  Does System2 help most on implicit questions and least on span? "
              f"{'Yes' if min(seen[1], unseen[1]) > span[2] else 'Not shown'} on this bank: {seen[0]:+.1f} and {unseen[0]:+.1f} against "
              f"{span[0]:+.1f} points,\n  but only {facts['over System1 with as many tokens'][0]:+.1f} over a System1 that may show as many tokens.")
        if args.heldout:
            log_heldout(facts, table, path)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="dcpm.py", allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("--personas", type=int, default=60, help="generated personas in the miniature benchmark")
    parser.add_argument("--budget", type=int, default=120, help="tokens of context per question in the benchmark")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--heldout", action="store_true", help="run the test bank instead, and log the result outside the repository")
    parser.add_argument("--data", default="", help="a LoCoMo, LongMemEval or PersonaMem file: ingest it and print evidence recall")
    parser.add_argument("--format", default="", choices=["", "locomo", "longmemeval", "personamem"], help="detected if not given")
    parser.add_argument("--questions", default="", help="PersonaMem: the questions csv (looked for beside --data)")
    parser.add_argument("--sample", default="", help="only the sample of this name, e.g. conv-26")
    parser.add_argument("--sessions", type=int, default=0, help="only the first N sessions of each sample (0 = all)")
    parser.add_argument("--ask", type=int, default=100000, help="answer at most N questions")
    parser.add_argument("--backend", default="rules", choices=["rules", "llm"])
    parser.add_argument("--model", default="", help="llm: a Hugging Face chat model, a folder, or the URL of a server")
    parser.add_argument("--model_name", default="", help="llm: the server's name of the model")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="llm: longest reply")

    def fail(message):
        print(f"dcpm.py: {message}", file=sys.stderr)
        raise SystemExit(2)
    parser.error = fail
    args = parser.parse_args(argv)
    if args.personas < 2 or args.budget < 0 or args.sessions < 0 or args.ask < 0:
        fail("--personas must be at least 2; --budget, --sessions and --ask must not be negative")
    if (args.backend == "llm") != bool(args.model) or (args.model and not args.data):
        fail("--backend llm goes with --model NAME and --data FILE")
    try:
        if args.data:
            evaluate_corpus(args, LLM.load(args.model, args.model_name, args.max_new_tokens) if args.model else None)
        else:
            if not args.heldout:
                tell_story()
            benchmark(args)
    except DcpmError as error:
        fail(error)


if __name__ == "__main__":
    main()
