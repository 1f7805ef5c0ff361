"""By hand: `common.rollout`, the loop it replaced, which fed every row column by column, and `generate`.

    python tests/experiments/bench_rollout.py [--repeats 7]

One process, one thread, alternating; medians of CPU seconds. 64 rollouts of tiny students of `sod.py`, one
for each length of the tool's answers and fitted on such answers (minutes, cached). The last line is JSON.
"""
import argparse
import dataclasses
import functools
import json
import random
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common
import sod


# --------------------------------------------------------------------------------- the loop that was replaced
@dataclass
class ColumnRow:
    queue: deque = field(default_factory=deque)
    turn: list[int] = field(default_factory=list)
    turns: int = 0
    done: bool = False


def left_padded(prompts, pad):
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    real = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(real)


def positions(attention_mask):
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def column_rollout(model, tok, tasks, group_size, *, tool=None, max_new_tokens, max_turns=8, temperature=1.0,
                   generator=None, passes=None):
    """-> the ids of each row and how many were sampled. All rows share a column; a tool's answer takes one a
    token."""
    end = common.end_of_turn(tok)
    new, seen = left_padded([common.prompt_ids(tok, task.messages, tool) for task in tasks], tok.pad_token_id)
    start = new.shape[1]
    last = start + max_new_tokens
    cache = DynamicCache(config=model.config)
    ids = [row[keep.bool()].tolist() for row, keep in zip(new, seen) for _ in range(group_size)]
    rows = [ColumnRow() for _ in ids]
    index = list(range(len(ids)))
    sampled = 0
    for column in range(start, last):
        logits = model(input_ids=new, attention_mask=seen, cache=cache, logits_to_keep=1,
                       position_ids=positions(seen)[:, -new.shape[1]:]).logits[:, -1]
        if passes is not None:
            passes.append(1)
        if column == start:
            cache.batch_repeat_interleave(group_size)
            logits, seen = (x.repeat_interleave(group_size, 0) for x in (logits, seen))
        logps = torch.log_softmax(logits / (temperature or 1.0), -1)
        if temperature:
            token = torch.multinomial(logps.exp(), 1, generator=generator)[:, 0]
        else:
            token = logits.argmax(-1)
        logp, entropy = logps.gather(1, token[:, None]).tolist(), common.entropy_of(logps).tolist()
        batch = [rows[i] for i in index]
        queued = torch.tensor([row.queue.popleft() if row.queue else -1 for row in batch])
        token = torch.where(queued < 0, token, queued)
        calls = []
        for i, row, t, given in zip(index, batch, token.tolist(), (queued >= 0).tolist()):
            if row.done:
                continue
            ids[i].append(t)
            if given:
                continue
            sampled += 1
            row.turn.append(t)
            if t == end:
                text, row.turn = tok.decode(row.turn[:-1]), []
                row.turns += 1
                call = common.parse_tool_call(text) if tool else None
                row.done = call is None or row.turns >= max_turns
                if not row.done:
                    calls.append((row, call))
        for (row, _), (text, _) in zip(calls, common.run_tools(tool, [call for _, call in calls])):
            row.queue.extend(common.tool_message_ids(tok, text))
            row.done = column + 1 + len(row.queue) >= last
        keep = [j for j, row in enumerate(batch) if not row.done]
        if not keep:
            break
        if len(keep) < len(batch) / 2:
            cache.batch_select_indices(torch.tensor(keep))
            token, seen, index = token[keep], seen[keep], [index[j] for j in keep]
        new, seen = token[:, None], F.pad(seen, (0, 1), value=1)
    return ids, sampled


# ------------------------------------------------------------------------------------- what is measured
def long_answers(spaces: int) -> common.Tool:
    """The calculator, with so many spaces behind its answer: one token each."""
    def run(arguments):
        text, status = sod.CALCULATOR.run(arguments)
        return text + " " * spaces, status
    return dataclasses.replace(sod.CALCULATOR, run=run)


def fitted_student(tok, tool: common.Tool, spaces: int):
    rng = random.Random(1)
    docs = []
    for _ in range(4000):
        task = common.chain_task(rng)
        docs.append(sod.conversation(tok, task, sod.demonstrate(rng, task, sod.STUDENT, tool), tool))
    return common.fit_tiny(f"a student ({spaces})", common.tiny_model(tok, seed=1), docs, steps=400)


def ours(*args, passes=None, **how):
    """`common.rollout` -> the ids of each row and how many were sampled."""
    feed = common.RowCache.feed
    common.RowCache.feed = lambda *a: (passes.append(1) if passes is not None else None, feed(*a))[1]
    out = common.rollout(*args, **how)
    common.RowCache.feed = feed
    return [out.ids[i, :length].tolist() for i, length in enumerate(out.lengths)], int(out.mask.sum())


@torch.no_grad()
def generated(model, tok, tasks, group_size, *, max_new_tokens, generator, passes=None, cache="dynamic"):
    new, seen = left_padded([common.prompt_ids(tok, task.messages) for task in tasks], tok.pad_token_id)
    new, seen = new.repeat_interleave(group_size, 0), seen.repeat_interleave(group_size, 0)
    torch.manual_seed(generator.initial_seed())
    out = model.generate(input_ids=new, attention_mask=seen, do_sample=True, top_k=0,
                         max_new_tokens=max_new_tokens, eos_token_id=common.end_of_turn(tok),
                         pad_token_id=tok.pad_token_id,
                         cache_implementation=None if cache == "dynamic" else cache)
    rows = out[:, new.shape[1]:]
    lengths = (rows == common.end_of_turn(tok)).float().argmax(1) + 1
    return [row.tolist() for row in rows], int(lengths.sum())


def measure(ways: dict, repeats: int, model, tok, tasks, **how) -> dict:
    """Alternating: name -> medians of CPU seconds, passes, sampled tokens."""
    figures = {name: [] for name in ways}
    for seed in range(repeats):
        for name, way in ways.items():
            passes = []
            generator = torch.Generator().manual_seed(seed)
            began = time.process_time()
            _, sampled = way(model, tok, tasks, 8, generator=generator, passes=passes, **how)
            figures[name].append((time.process_time() - began, len(passes), sampled))
    return {name: [sorted(column)[repeats // 2] for column in zip(*runs)] for name, runs in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    tok = sod.build_tokenizer()
    rng = random.Random(0)
    tasks = [common.chain_task(rng) for _ in range(8)]
    ways = {"column by column": column_rollout, "rows of their own length": ours}
    results, rows = {}, []
    for spaces, budget in ((0, 160), (15, 320), (60, 640)):
        tool = long_answers(spaces)
        model = fitted_student(tok, tool, spaces)
        flags = {"tool": tool, "max_new_tokens": budget, "temperature": 0.0}
        greedy = [way(model, tok, tasks, 2, **flags)[0] for way in ways.values()]
        assert greedy[0] == greedy[1], "greedy ids differ"
        results[f"answers of {spaces + 3} tokens"] = measure(ways, repeats, model, tok, tasks, tool=tool,
                                                             max_new_tokens=budget)
    model = fitted_student(tok, long_answers(0), 0)
    plain = {**ways, "generate": generated, "generate, static": functools.partial(generated, cache="static")}
    results["one turn without a tool"] = measure(plain, repeats, model, tok, tasks, max_new_tokens=32)
    for case, figures in results.items():
        before = figures["column by column"][0]
        for name, (seconds, passes, sampled) in figures.items():
            rows.append([case, name, passes or "-", seconds, f"{seconds / before:.2f}", sampled,
                         round(sampled / seconds)])
    print(common.table(rows, ["", "", "passes", "CPU s", "of before", "sampled tokens", "tokens a CPU s"]))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
