"""By hand: real language, read by a chat model with a sentence encoder, beside the same story read by rules.

    python tests/experiments/real_dcpm.py --model DIR_OR_URL --encoder DIR

One person, eight sessions, forty turns: three habits, each in three areas of life and never named, two moves,
one change of job, one thing asked to be forgotten. One night, then twenty questions. The model answers them
from the context of either memory; a fact is right if the answer holds the word, a choice if it names its
letter.
"""
import re
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]  # tests and the scripts
import dcpm  # noqa: E402
from bench_dcpm import without  # noqa: E402
from invariants import check  # noqa: E402

STORY = """
2024-01-08|I moved to Leeds last month. I know nobody here yet, but the flat is bright.
2024-01-08|Work is fine. I am a lab technician at Norvane.
2024-01-08|For Saturday's dinner I wrote the shopping list on Tuesday and laid the table the night before.
2024-01-08|I went up Ilkley Moor on my own on Sunday, nobody but sheep.
2024-01-08|My brother Tim has bought a sailing boat. He named it Kestrel.
2024-01-29|Before I baked the bread I had a timetable on the fridge, down to each ten minutes.
2024-01-29|The train to York: I had booked seats and a backup connection six weeks ago.
2024-01-29|I found my desk lamp at a flea market, two pounds after some haggling.
2024-01-29|I swam forty lengths early in the morning, when the pool was empty. I like it that way.
2024-01-29|I have started to learn the cello.
2024-02-19|My report for the quarterly review was finished nine days early, with an outline for every page.
2024-02-19|I turned down the running club again and did my ten kilometres alone.
2024-02-19|I mended the old armchair with fabric from the remnants box instead of buying a new one.
2024-02-19|Somebody at work asked me about the rota. I said I would look into it.
2024-02-19|I have a cat now. His name is Bramble.
2024-03-11|For the trip to Wales I packed by a checklist and printed the route twice.
2024-03-11|I saw the new film at the Picture House by myself, in the back row.
2024-03-11|I got my winter coat in the end-of-season sale, seventy percent off.
2024-03-11|I have been seeing a counsellor because of panic attacks.
2024-03-11|Do you think I should get a dog as well?
2024-04-08|I moved to Bristol because Norvane closed the Leeds site.
2024-04-08|I planned the menu for Easter three weeks ahead and cooked a trial run.
2024-04-08|I wandered through the museum alone and took my time. A guided tour would have spoilt it.
2024-04-08|The bookshelves come from a neighbour who was throwing them out. They cost me nothing.
2024-04-08|I gave up the cello. My fingers hurt.
2024-05-06|I quit Norvane. I now work for Halden Optics.
2024-05-06|For my first client meeting I rehearsed the talk four times and wrote an agenda.
2024-05-06|I bought three shirts in the charity shop for the price of one.
2024-05-06|At the concert I sat apart from everybody. It was lovely to listen without any company.
2024-05-06|Please forget what I said about the panic attacks.
2024-06-03|The flight to Oslo: visa, insurance and transfers were all arranged by March.
2024-06-03|I only buy shoes with a voucher, and I had two of them this time.
2024-06-03|I rebuilt the kitchen table from old pallets to save the money.
2024-06-03|I row in a single scull now. A crew would only distract me.
2024-06-03|Tim sold his boat. He lives in Hull.
2024-07-01|The audit at work went smoothly: I had prepared every folder a fortnight before.
2024-07-01|The play was half empty, so I had a whole row to myself. Perfect.
2024-07-01|I cycled the coast path without company, three days.
2024-07-01|I am going to visit Tim on 2024-08-10.
2024-07-01|I love the sea here, by the way."""
# kind | question | what a right answer holds, alternatives with "/", or the letter of the right option
QUESTIONS = """
current|Which city do I live in now?|bristol
current|Which company do I work for now?|halden
current|Do I still play the cello?|^no[,.]/no longer/gave up/quit/stopped/given up
past|Which city did I live in before Bristol?|leeds
past|Which company did I work for before Halden Optics?|norvane
why|Why did I move to Bristol?|closed
how changed|How has where I live changed? Name the cities in order.|leeds.*bristol
span|What is my cat called?|bramble
span|What did my brother call his boat?|kestrel
span|Where did I find my desk lamp?|flea market
other person|Where does my brother Tim live?|hull
coming up|Whom am I going to visit in August?|tim
forgotten|Do I have a health problem?|no information/not known/no mention/not mention/don't know
unanswerable|What is my sister's name?|no information/not known/no mention/not mention/don't know
implicit, seen|What would suit me for my next dinner party? (a) improvise with what is in the fridge \
(b) a written plan for each course (c) order a takeaway at the last minute (d) let the guests decide|b
implicit, seen|What would suit me for my next sports trip? (a) a team camp (b) a busy gym class \
(c) a solitary long-distance walk (d) a doubles tournament|c
implicit, seen|How should I get a new wardrobe for my flat? (a) designer furniture (b) the first one I see \
(c) a rental with butler service (d) second hand, mended by me|d
implicit, unseen|How should I start a vegetable garden? (a) throw seeds and see (b) buy whatever is there \
on the day (c) decide each morning on a whim (d) draw the beds and a sowing calendar in winter|d
implicit, unseen|How would I like to learn Italian? (a) by myself with a book (b) in a lively group \
(c) in a conversation club (d) with a class of friends|a
implicit, unseen|Which telephone should I get? (a) the newest flagship (b) a refurbished one at a discount \
(c) a gold-plated one (d) the dearest contract|b"""
NOW = "2024-07-02"


def tell(name, memory):
    """Ingest the story, sleep one night; prints what became of it. -> memory"""
    began = time.time()
    turns = [line.split("|") for line in STORY.strip().split("\n")]
    memory.ingest([(text, day, day, "user") for day, text in turns])
    day_time, began = time.time() - began, time.time()
    memory.sleep(NOW)
    print(f"\n== {name}: {day_time:.0f} s by day, {time.time() - began:.0f} s by night")
    failed = sum(event.op == "FAILED" for event in memory.log)
    long = [slot for slot in memory.heads if len(memory.trail(slot)) > 1]
    print(f"{len(memory.turns)} turns, {failed} extractions failed, {len(memory.beliefs)} beliefs, "
          f"{len(memory.heads)} chains, {len(long)} of them revised")
    for slot in long:
        print(f"   {dcpm.chain_line(memory, slot)}")
    gate = behaviour_cosines(memory)
    print(f"schemas {dict(count(memory.schemas))}, cores {dict(count(memory.cores))}, pairs alike "
          f"{(gate > memory.limits.alike).sum()} of {len(gate)}, "
          f"broken invariants {check(memory) or 'none'}")
    for node in [*memory.schemas.values(), *memory.cores.values(), *memory.intentions.values()]:
        print(f"   [{node.id}] {node.text} ({node.status}; {getattr(node, 'behaviour', '')[:90]})")
    return memory


def behaviour_cosines(memory):
    """The gate before a sweep: cosines of V_beh, all pairs of schemas of different domains."""
    schemas = [s for s in memory.schemas.values() if s.behaviour]
    if not schemas:
        return np.zeros(0)
    domains = np.array([s.domain for s in schemas])
    vectors = dcpm.behaviour_vectors(memory, schemas)
    return dcpm.cosines(vectors, vectors)[np.triu(domains[:, None] != domains)]


def watched(chat):
    """The chat model, with a line for every call: a story takes minutes."""
    def call(conversations, **sampling):
        began = time.time()
        replies = chat(conversations, **sampling)
        print(f"   {len(conversations)} replies in {time.time() - began:.0f} s", flush=True)
        return replies
    return call


def count(nodes):
    found = defaultdict(int)
    for node in nodes.values():
        found[node.status] += 1
    return found


def answers(model, memory, questions, conditions):
    """{condition: {kind: [1 or 0]}}. System1 alone is asked for habits only: schemas say nothing else."""
    out, replies = {}, {}
    for name, unseen in conditions.items():
        asked, chosen = [], [q for q in questions if not unseen or q[0].startswith("implicit")]
        for _, question, _ in chosen:
            context = without(memory, *unseen).recall(question, NOW, 400).text or "(nothing)"
            letter = " Reply with the letter of one option." if "(a)" in question else ""
            prompt = dcpm.ANSWER.format(context=context, question=question + letter)
            asked.append([{"role": "user", "content": prompt}])
        new = [talk for talk in asked if str(talk) not in replies]  # a context without schemas stays the same
        replies |= {str(talk): reply for talk, reply in zip(new, model.chat(new) if new else [])}
        out[name] = defaultdict(list)
        for (kind, question, gold), talk in zip(chosen, asked):
            reply = (replies[str(talk)] or "").lower()
            if "(a)" in question:
                found = re.findall(r"\(([a-d])\)", reply) or re.findall(r"\b([a-d])\b", reply)
                right = set(found) == {gold}
            else:
                right = (any(re.search(g, reply, re.S) for g in gold.split("/"))
                         and ("no information" in gold or "no information" not in reply))
            out[name][kind].append(int(right))
            print(f"   {name}: {'+' if right else '-'} {question[:60]} -> {' '.join(reply.split())[:90]}")
    return out


def main():
    parser = dcpm.memory_parser(__doc__.split("\n")[0])
    args = parser.parse_args()
    if not args.model:
        dcpm.fail("this needs --model DIR_OR_URL")
    empty = dcpm.make_memory(args)()
    empty.backend.chat = watched(empty.backend.chat)
    real = tell("model", empty)
    rules = tell("rules", dcpm.Memory())
    questions = [line.split("|") for line in QUESTIONS.strip().split("\n")]
    conditions = {"System1+2": (), "System1": ("schemas", "cores")}
    table = {}
    for name, memory in (("model", real), ("rules", rules)):
        for condition, kinds in answers(real.backend, memory, questions, conditions).items():
            table[f"{name}, {condition}"] = kinds
    names = list(dict.fromkeys(kind for kind, *_ in questions))
    print("\n| memory | " + " | ".join(names) + " |\n|" + " --- |" * (len(names) + 1))
    for name, kinds in table.items():
        cells = [f"{sum(kinds[k])}/{len(kinds[k])}" if kinds[k] else "-" for k in names]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print(f"calls {real.backend.tally['calls']}, failures after all tries {dict(+real.backend.failures)}")


if __name__ == "__main__":
    main()
