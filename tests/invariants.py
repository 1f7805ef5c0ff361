"""What must hold in a memory after every write, and for schemas and cores after every sleep."""
from collections import Counter

from dcpm import KINDS, Store, holds, same


def check(store):
    """The broken invariants, as sentences; those about schemas hold after each sleep."""
    b, found = store.beliefs, []  # [(broken?, sentence)]
    for n in b.values():
        p, after, where = b.get(n.prev), b.get(n.next), [(store.turns.get(s[0]), *s[1:3]) for s in n.sources]
        found += [
            ((p and p.next != n.id) or (after and after.prev != n.id), f"links of {n.id} are not mutual"),
            (p and n.link_kind == "supersede" and same(p, n), f"{n.id} supersedes an equal claim"),
            (p and p.t_event > n.t_event, f"{n.id} is older than its predecessor"),
            ((n.status == "active") != (not n.next and n.status != "suppressed"), f"{n.id} is {n.status}"),
            (not where or not all(turn and 0 <= start < end <= len(turn.text) for turn, start, end in where),
             f"{n.id} has no source, or one outside its turn")]
    for slot, count in Counter(n.slot for n in b.values()).items():
        head = store.head(slot)
        found.append((not head or head.next or len(store.trail(slot)) != count, f"{slot} is not one chain"))
    for n in () if store.has_news else [n for kind in KINDS for n in getattr(store, kind).values()]:
        live = [b[i] for i in n.evidence if holds(b[i])]
        sessions = {store.turns[source[0]].session for x in live for source in x.sources}
        weak = len({x.slot for x in live}) < 3 or len(sessions) < 2
        found += [(any(b[i].status == "suppressed" for i in n.evidence), f"{n.id} cites something forgotten"),
                  (n.status == "stable" and weak, f"{n.id} is stable without support")]
    for c in store.cores.values():
        members = [store.schemas[m] for m in c.members]
        domains = {m.domain for m in members if m.status == "stable"}
        union = sorted({i for m in members for i in m.evidence})
        found += [(c.status == "stable" and len(domains) < 2, f"core {c.id} does not rest on two domains"),
                  (c.status != "withdrawn" and c.evidence != union, f"evidence of core {c.id} is no union")]
    again = vars(Store(store.log))
    found.append((any(getattr(store, k) != v for k, v in again.items()), "replaying the log gives another"))
    return [sentence for broken, sentence in found if broken]
