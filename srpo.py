"""SRPO: sample-routed policy optimisation (arXiv 2604.02288), with GRPO and SDPO (arXiv 2601.20802) on the same loop.

    python srpo.py                         a tiny Qwen3, fitted here, then trained; a few minutes on two CPU cores
    python srpo.py --compare --seeds 3     every method on the same problems, one table
    python srpo.py --explain               one failed rollout, token by token

What happens in a step:
1. Sample a group of rollouts for every problem and reward each with 0 or 1.
2. A *wrong* rollout that has a *correct sibling* in its group is routed to distillation, every other one to GRPO.
3. The self-teacher, a slow copy (EMA) of the student, sees the question plus the sibling's correct solution and re-reads the
   student's own tokens. It never writes. Each distilled token is pulled towards the teacher's distribution (JSD).
4. A token counts more where the teacher is sure: weight exp(-beta H), rescaled to mean 1 over the batch.
5. Both kinds of token losses are summed and divided by one number, so distillation fades as fewer rollouts are wrong.

The three methods are one formula (paper 3.3),   L = (sum z_grpo l_grpo + sum z_sdpo w JSD) / N:

    method   z_grpo       z_sdpo    w        N                        c = 1: correct
    grpo     1            0         -        all response tokens      m = 1: another rollout of the group is correct
    sdpo     0            m         1        tokens with z_sdpo > 0
    srpo     1-(1-c)m     (1-c)m    entropy  all response tokens

Where to find what: routing (3.1) `pick_demonstration`, `route`; GRPO advantage (2.1, 4.1) `common.group_advantages`; distillation
(2.2) `jsd`; weights (3.2) `entropy_weights`; the sum (3.3) `backward`; teacher (Table 3) `ema_update`, `teacher_pass`.

    paper                                            here
    Qwen3-4B/8B, 32 x 8 rollouts, lr 1 : 10 : 5      tiny: 16 x 8, same lr ratio; other models: the paper's lr
    divergence on the student's top 100 tokens       full vocabulary, in chunks: exact
    advantage with std in 2.1, without in 4.1        without
    teacher prompt cut at 10240 tokens               a rollout whose teacher prompt is too long is not distilled
    10 warm-up steps, weight decay 0.01              5 warm-up steps, no decay (those of common.py)

Left out: rollout correction and clipping of stale ratios (one update a batch, so the ratio is exactly 1), trust-region teacher,
environment feedback, KL to a reference (coefficient 0 in the paper).
"""
import copy
import dataclasses
import json
import math
import random
import re
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

import common
from common import Task, option

LEARNING_RATES = {"tiny": {"grpo": 4e-5, "sdpo": 4e-4, "srpo": 2e-4}, "real": {"grpo": 1e-6, "sdpo": 1e-5, "srpo": 5e-6}}


@dataclass
class Config(common.Config):
    method: Literal["srpo", "grpo", "sdpo", "srpo_no_weight", "mix"] = option(
        "srpo", "srpo_no_weight: routing without entropy weights; mix: 0.9 GRPO + 0.1 SDPO on every rollout, no routing")
    distill: Literal["default", "wrong", "right", "all"] = option(
        "default", "rollouts that may be distilled; default = wrong ones for srpo, all for sdpo and mix")
    beta: float = option(1.0, "entropy weight exp(-beta H); 0 = all tokens alike")
    ema: float = option(0.05, "share of the student that enters the teacher each step; 0 = frozen teacher, 1 = live")
    steps: int = option(120, "training steps")
    prompts_per_step: int = option(16, "problems a step")
    max_new_tokens: int = option(64, "longest response in tokens")
    lr: float | None = option(None, "learning rate; not given = 2e-4 srpo, 4e-4 sdpo, 4e-5 grpo (tiny); 5e-6, 1e-5, 1e-6 (others)")
    eval_every: int = option(20, "evaluate every so many steps; 0 = only before and after")
    gate_tasks: int = option(40, "held-out problems for the check that the model can read a solution; 0 = no check")
    max_prompt_tokens: int = option(4096, "longest teacher prompt; a rollout that would need a longer one is not distilled")
    compare: bool = option(False, "run every method and print one table")
    seeds: int = option(1, "with --compare: seeds a method")
    explain: bool = option(False, "print one failed rollout token by token and stop")


def learning_rate(config) -> float:
    rates = LEARNING_RATES["tiny" if config.model == "tiny" else "real"]
    return config.lr if config.lr is not None else rates.get(config.method, rates["srpo"])


# ------------------------------------------------------------------------------------------------ the equations
def pick_demonstration(rewards: list[float], group_size: int) -> list[int | None]:
    """For every rollout the first correct *other* rollout of its group, or None (paper 3.1, B.5; m = 1 where there is one).

    rewards: B numbers, the group_size rollouts of a problem side by side; correct from 0.5 on.
    """
    demos = []
    for i in range(len(rewards)):
        group = range(i - i % group_size, i - i % group_size + group_size)
        demos.append(next((j for j in group if j != i and rewards[j] >= 0.5), None))
    return demos


def route(rewards, demos: list[int | None], method: str = "srpo", distill: str = "default"):
    """Who learns from what (paper 3.1): z_grpo (B,), z_sdpo (B,), counted (B,) bool: whose tokens make up the denominator N."""
    correct = rewards >= 0.5                                                        # (B,) c
    available = torch.tensor([d is not None for d in demos], device=rewards.device)  # (B,) m
    if distill == "default":
        distill = "wrong" if method.startswith("srpo") else "all"
    # z_sdpo = (1 - c) m,   z_grpo = 1 - z_sdpo
    chosen = available & {"wrong": ~correct, "right": correct, "all": torch.ones_like(correct)}[distill]
    z_sdpo, everyone = chosen.float(), torch.ones_like(correct)
    if method == "grpo":
        return everyone.float(), 0 * z_sdpo, everyone
    if method == "sdpo":
        return 0 * z_sdpo, z_sdpo, chosen
    if method == "mix":  # mixing losses = mixing the advantages that SDPO's gradient gives to each vocabulary entry
        return 0.9 * everyone.float(), 0.1 * z_sdpo, everyone
    return 1 - z_sdpo, z_sdpo, everyone


def jsd(logps, teacher_logps):
    """Jensen-Shannon divergence of two log-distributions (n, V) -> (n,), in nats, at most ln 2 (paper 2.2, alpha 0.5 of Table 3)."""
    # m = (p + q) / 2,   JSD = KL(p || m) / 2 + KL(q || m) / 2
    log_m = torch.logaddexp(logps, teacher_logps) - math.log(2)                     # (n, V)
    to_student = (logps.exp() * (logps - log_m)).sum(-1)                            # (n,)
    to_teacher = (teacher_logps.exp() * (teacher_logps - log_m)).sum(-1)            # (n,)
    return 0.5 * (to_student + to_teacher)


def entropy(logps):
    """H = -sum_v q(v) log q(v) in nats over the full vocabulary, (n, V) -> (n,) (paper 3.2)."""
    return -(logps.exp() * logps).sum(-1)


def entropy_weights(teacher_entropy, beta: float):
    """w = exp(-beta H) / mean exp(-beta H), (N,) -> (N,), without gradient (paper 3.2).

    N: the valid tokens of *all* distilled rollouts of the optimiser batch. A mean over a micro-batch would change the mixing ratio.
    """
    raw = torch.exp(-beta * teacher_entropy.detach())                               # (N,)
    return raw / raw.mean()


@torch.no_grad()
def ema_update(teacher, student, rate: float) -> None:
    """theta' <- (1 - rate) theta' + rate theta, once a step (paper Table 3). In fp32: bf16 would round the small change away."""
    for old, new in zip(teacher.parameters(), student.parameters()):  # tied embeddings appear once in parameters()
        old.lerp_(new, rate)


# ------------------------------------------------------------------------------------------------ the self-teacher
HEADING, CLOSING = "\n\nCorrect solution:\n\n", "\n\nNow answer the question above yourself, correctly."


def reprompt(messages: list[dict], solution: str) -> list[dict]:
    """The teacher's prompt: the last user message is followed by a correct solution and one line that asks again."""
    return [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + HEADING + solution + CLOSING}]


def solution_text(tok, rollouts, row: int) -> str:
    """A rollout as demonstration: no special tokens (an end-of-turn inside would look finished), no thinking block."""
    text = tok.decode(rollouts.ids[row][rollouts.mask[row].bool()], skip_special_tokens=True)
    return re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL).strip()


def teacher_messages(tok, tasks, rollouts, demos, config) -> dict[int, list[dict]]:
    """Per rollout with a demonstration the teacher's messages. A prompt over --max_prompt_tokens is left out, never cut."""
    group_size = len(rollouts.ids) // len(tasks)
    messages = {i: reprompt(tasks[i // group_size].messages, solution_text(tok, rollouts, d))
                for i, d in enumerate(demos) if d is not None}
    return {i: m for i, m in messages.items()
            if len(common.prompt_ids(tok, m, thinking=config.thinking)) <= config.max_prompt_tokens}


def response_batch(tok, messages: list[list[dict]], rollouts, rows: list[int], thinking: bool = False):
    """[left-padded prompt | response, right-padded] -> ids, attention_mask, mask, each (b, t).

    Student and teacher inputs are both built here; only the prompt differs. The response is the rollout's own ids, never encoded
    anew, so token k of a row is the same token for both and `common.hidden_at` aligns them.
    """
    device, pad = rollouts.ids.device, tok.pad_token_id
    prompts = [common.prompt_ids(tok, m, thinking=thinking) for m in messages]
    responses = [rollouts.ids[i][rollouts.mask[i].bool()].tolist() for i in rows]
    ids = torch.cat([common.padded(prompts, pad, True, device), common.padded(responses, pad, False, device)], 1)   # (b, t)
    ones = [[[1] * len(s) for s in part] for part in (prompts, responses)]
    left, right = common.padded(ones[0], 0, True, device), common.padded(ones[1], 0, False, device)
    return ids, torch.cat([left, right], 1), torch.cat([torch.zeros_like(left), right], 1)


@torch.no_grad()
def teacher_pass(teacher, tok, messages: dict[int, list[dict]], rollouts, config):
    """The teacher re-reads the rollouts named in `messages`: row -> hidden states (n, H), row -> entropies (n,).

    Hidden states instead of distributions: n x H is small, n x V is not, and the head turns one into the other in chunks.
    """
    hidden, entropies = {}, {}
    for rows, _ in common.micro_batches(rollouts, messages, config.micro_batch) if messages else ():
        ids, attention, mask = response_batch(tok, [messages[i] for i in rows], rollouts, rows, config.thinking)
        states = common.hidden_at(teacher, ids, attention, mask)                    # (n, H)
        spread = common.over_vocab_chunks(states, teacher.get_output_embeddings(),
                                          lambda logits: entropy(F.log_softmax(logits / config.temperature, -1)))  # (n,)
        lengths = mask.sum(1).tolist()
        hidden |= zip(rows, states.split(lengths))
        entropies |= zip(rows, spread.split(lengths))
    return hidden, entropies


# ------------------------------------------------------------------------------------------------ one step
def token_losses(student, teacher, hidden, targets, teacher_hidden, routed, temperature: float):
    """Log-probs of the tokens that are not routed (n_g,), JSD of those that are (n_s,).

    hidden (n, H) of the student, targets (n,) ids, routed (n,) bool, teacher_hidden (n_s, H).
    """
    head, theirs = student.get_output_embeddings(), teacher.get_output_embeddings()
    dtype = torch.bfloat16 if hidden.device.type == "cuda" else hidden.dtype  # as over_vocab_chunks does for the student
    weight, bias = theirs.weight.to(dtype), None if theirs.bias is None else theirs.bias.to(dtype)

    def logp(logits, target):                                                       # (n, V), (n,)
        return F.log_softmax(logits / temperature, -1).gather(1, target[:, None])[:, 0]

    def divergence(logits, states):                                                 # (n, V), (n, H)
        with torch.no_grad():
            teacher_logits = F.linear(states.to(dtype), weight, bias).float()       # (n, V)
            teacher_logps = F.log_softmax(teacher_logits / temperature, -1)
        return jsd(F.log_softmax(logits / temperature, -1), teacher_logps)

    return (common.over_vocab_chunks(hidden, head, logp, targets),
            common.over_vocab_chunks(hidden[routed], head, divergence, teacher_hidden))


def backward(student, teacher, tok, tasks, rollouts, reward, config) -> dict:
    """Routes one batch of rollouts and adds the gradient of L to the student, in micro-batches. Returns what is logged.

    `signal` is False when nothing in the batch teaches anything: then there is no gradient and the caller must not step.
    """
    B, group_size = len(rollouts.ids), len(rollouts.ids) // len(tasks)
    demos = pick_demonstration(reward.tolist(), group_size)
    messages = teacher_messages(tok, tasks, rollouts, demos, config)
    demos = [d if i in messages else None for i, d in enumerate(demos)]
    z_grpo, z_sdpo, counted = route(reward, demos, config.method, config.distill)   # (B,) each
    # A_i = r_i - mean over the *whole* group, distilled rollouts included: over the others alone it would always be 0.
    advantages = common.group_advantages(reward, group_size, std=False)             # (B,)
    tokens = rollouts.mask[counted].sum()  # N: zero-advantage rollouts count too

    started = time.time()
    routed = z_sdpo.nonzero()[:, 0].tolist()  # the teacher reads these and no others: this is where SRPO saves time
    hidden_t, entropies = teacher_pass(teacher, tok, {i: messages[i] for i in routed}, rollouts, config)
    log = {"routed": len(routed) / B, "teacher_seconds": time.time() - started}
    weights, divergence = {}, 0.0
    if routed:
        every = torch.cat([entropies[i] for i in routed])                           # (N_s,)
        weighted = config.method.startswith("srpo") and config.method != "srpo_no_weight"
        w = entropy_weights(every, config.beta if weighted else 0.0)                # (N_s,)
        weights = dict(zip(routed, w.split([len(entropies[i]) for i in routed])))
        log |= {"teacher_entropy": float(every.mean()), "weight_spread": float(w.std(correction=0))}

    active = [i for i in range(B) if z_sdpo[i] or z_grpo[i] * advantages[i]]  # the others contribute exactly 0
    student.train()
    for rows, _ in common.micro_batches(rollouts, active, config.micro_batch) if active else ():
        ids, attention, mask = response_batch(tok, [tasks[i // group_size].messages for i in rows], rollouts, rows, config.thinking)
        lengths = mask.sum(1)                                                       # (b,)
        z_g, z_s, A = (x[rows].repeat_interleave(lengths) for x in (z_grpo, z_sdpo, advantages.to(ids.device)))  # (n,) each
        hidden = common.hidden_at(student, ids, attention, mask)                    # (n, H)
        here = [i for i in rows if z_sdpo[i]]
        states = torch.cat([hidden[:0].detach(), *(hidden_t[i] for i in here)])     # (n_s, H)
        w = torch.cat([A[:0], *(weights[i] for i in here)])                         # (n_s,)
        logps, d = token_losses(student, teacher, hidden, ids[mask.bool()], states, z_s > 0, config.temperature)
        # L = (sum z_grpo l_grpo + sum z_sdpo w JSD) / N. One update a batch: the old policy is this one, the ratio exactly 1.
        loss = common.policy_loss(logps, logps.detach(), A, z_g, denominator=tokens)
        (loss + (z_s[z_s > 0] * w * d).sum() / tokens).backward()
        divergence += float(d.detach().sum())
    student.eval()
    if routed:
        log["jsd"] = divergence / len(every)
    return log | {"signal": bool(active)}


# ------------------------------------------------------------------------------------------------ the tiny base model
# What it takes: a base that is often wrong, yet reads a correct solution when one stands in the prompt. A tiny model learns that
# only from documents that look so, hence they are part of its corpus: an ability by design, not one that emerged.
MODULUS, OPERATIONS = 10, (5, 5)
FIT = {"documents": 12000, "steps": 800, "hidden_size": 80, "layers": 3}
CONTEXT_SHARE = 0.6    # documents with a correct solution in the prompt
SAME_STYLE = 0.8       # of those: the attempt keeps the solution's style
WRONG_STEP = 0.05      # a result is a random number and the chain goes on from it
WRONG_WITH_SOLUTION = 0.01  # the same after a correct solution
SNAP_BACK = 0.5        # after an error: each later result is the solution's again, although it does not follow


def small_chain(rng) -> Task:
    return common.chain_task(rng, OPERATIONS, MODULUS)


def write_solution(rng, task: Task, long: bool, wrong: float = 0.0, snap_back: float = 0.0) -> str:
    """One of two styles with the same reward, `A3+4=7, B7*5=5. \\boxed{5}` (long) or `A7, B5. \\boxed{5}` (terse)."""
    text = task.messages[-1]["content"]
    value, modulus, steps = common.parse_chain(text)
    parts = []
    for (label, operation, operand), right in zip(steps, common.chain_values(text)[1:]):
        result = right if rng.random() < snap_back else common.APPLY[operation](value, operand) % modulus
        if rng.random() < wrong:
            result = rng.randrange(modulus)
        parts.append(f"{label}{value}{operation}{operand}={result}" if long else f"{label}{result}")
        value = result
    return ", ".join(parts) + f". \\boxed{{{value}}}"


def context_document(rng, tok, task: Task):
    """Question, a correct solution, then an attempt. Carries loss on both: the solution is good training text as well."""
    long = rng.random() < 0.5
    solution = write_solution(rng, task, long)
    attempt = write_solution(rng, task, long == (rng.random() < SAME_STYLE), WRONG_WITH_SOLUTION, SNAP_BACK)
    ids, mask = common.demonstration(tok, Task(reprompt(task.messages, solution), task.answer), attempt)
    start = ids.index(common.encode(tok, HEADING)[0]) + 1
    length = len(common.encode(tok, solution))
    mask[start:start + length] = [1] * length
    return ids, mask


def load_student(config, device):
    """The tiny base, fitted on the corpus above and cached, or a Hugging Face model."""
    if config.model != "tiny":
        return common.load_model(config.model, device)
    tok, rng = common.build_tokenizer([*common.CHAIN_ATOMS, ". \\boxed{", HEADING, CLOSING]), random.Random(1)
    docs = []
    for _ in range(FIT["documents"]):
        task = small_chain(rng)
        docs.append(context_document(rng, tok, task) if rng.random() < CONTEXT_SHARE else common.demonstration(
            tok, task, write_solution(rng, task, rng.random() < 0.5, WRONG_STEP)))
    model = common.tiny_model(tok, 1, FIT["hidden_size"], FIT["layers"])
    return common.fit_tiny("the base model", model, docs, FIT["steps"], fresh=config.fresh).to(device), tok


def gates(student, tok, tasks, config) -> dict:
    """Can this model read a solution? Without that, a self-teacher is noise. Prints three accuracies at T = 1, warns if one is off."""
    device = next(student.parameters()).device
    sampling = dict(max_new_tokens=config.max_new_tokens, thinking=config.thinking,
                    generator=torch.Generator(device).manual_seed(4321))
    group_size, tasks = config.group_size, tasks[:config.gate_tasks]
    rollouts = common.rollout(student, tok, tasks, group_size, **sampling)
    reward = common.rewards(rollouts, tasks)                                        # (B,)
    solved = [(t, solution_text(tok, rollouts, g * group_size + int(r.argmax())))
              for g, (t, r) in enumerate(zip(tasks, reward.view(-1, group_size))) if r.max() > 0]
    result = {"student": float(reward.mean()), "groups": len(solved) / len(tasks)}
    for name, shift in (("sibling", 0), ("other", 1)):
        shown = [Task(reprompt(task.messages, solved[(i + shift) % len(solved)][1]), task.answer)
                 for i, (task, _) in enumerate(solved)]
        out = common.rollout(student, tok, shown, group_size, **sampling) if len(shown) > 1 else None
        result[name] = float(common.rewards(out, shown).mean()) if out else float("nan")
    print(f"gates     student {result['student']:.2f} (0.2 to 0.5)   groups with a success {result['groups']:.2f} (from 0.6)   teacher"
          f" with a sibling's solution {result['sibling']:.2f} (from 0.8), with another problem's {result['other']:.2f} (clearly less)")
    if not (0.2 <= result["student"] <= 0.5 and result["groups"] >= 0.6 and result["sibling"] >= 0.8
            and result["other"] < result["sibling"] - 0.2):
        print("warning: a gate failed: this model and these problems are no fair ground for a self-teacher")
    return result


# ------------------------------------------------------------------------------------------------ training
def evaluate(student, tok, tasks, config) -> dict:
    """common.evaluate at T = 1 and greedy, plus the paper's T = 0.6 with top-p 0.95 (`cool_accuracy`)."""
    sampling = dict(max_new_tokens=config.max_new_tokens, thinking=config.thinking)
    result = common.evaluate(student, tok, tasks, greedy=True, **sampling)
    cool = common.evaluate(student, tok, tasks, temperature=0.6, top_p=0.95, **sampling)
    return result | {"cool_accuracy": cool["accuracy"], "cool_se": cool["se"]}


def train(config: Config) -> dict:
    """The loop of all methods: sample, route, distil and reinforce in one backward pass, step, then move the teacher."""
    if config.minibatches != 1:
        common.fail("--minibatches must be 1 here: routing, weights and the denominator belong to one update of the whole batch")
    device = common.setup(config)
    run = common.Run(config, "srpo")
    train_tasks, held_out = common.load_tasks(config.data, config.eval_tasks, small_chain)
    student, tok = load_student(config, device)
    common.header("srpo.py", config, student, device)
    teacher = copy.deepcopy(student).requires_grad_(False)  # a copy of its own: sharing storage would make it live
    optimizer, rng = common.make_optimizer(student, config), random.Random(config.seed)
    generator = torch.Generator(device).manual_seed(config.seed)

    def evaluated(when):
        result = evaluate(student, tok, held_out, config)
        run.notes["best_cool"] = max(run.notes.get("best_cool", 0.0), result["cool_accuracy"])
        run.evaluated(when, result)
        if when == "before":
            run.notes |= {"cool_before": result["cool_accuracy"], "length_before": result["length"]}

    if config.gate_tasks and not config.resume:
        run.log({"gates": gates(student, tok, held_out, config)})
    first = run.track(model=student, teacher=teacher, optimizer=optimizer, dice=generator, prompts=rng)
    if not config.resume:
        evaluated("before")
    for step in range(first, config.steps):
        started = time.time()
        tasks = rng.sample(train_tasks, config.prompts_per_step)
        rollouts = common.rollout(student, tok, tasks, config.group_size, max_new_tokens=config.max_new_tokens,
                                  temperature=config.temperature, generator=generator, thinking=config.thinking)
        sampled = time.time()
        reward = common.rewards(rollouts, tasks).to(device)                         # (B,)
        log, norm = backward(student, teacher, tok, tasks, rollouts, reward, config), 0.0
        if log.pop("signal"):  # else not even Adam's momentum may move the weights, and the teacher stays too
            norm = common.apply_gradients(student, optimizer, step, learning_rate(config))
            if math.isfinite(norm):
                ema_update(teacher, student, config.ema)
        solved = reward.view(-1, config.group_size).mean(1)                         # (groups,)
        wrong, right = int((solved == 0).sum()), int((solved == 1).sum())
        run.watch(rollouts, wrong + right, config.prompts_per_step, norm)
        shown = {"solved": float(reward.mean()), "routed": log.pop("routed"), "grad": norm,
                 "length": float(rollouts.mask.sum(1).float().mean()), "all wrong/right": f"{wrong}/{right}"}
        for key, name in (("jsd", "jsd"), ("teacher_entropy", "H"), ("weight_spread", "sd(w)")):
            if key in log:
                shown[name] = log.pop(key)
        run.step(step + 1, time.time() - started, shown, reward=shown["solved"], all_wrong=wrong, all_right=right,
                 finished=float(rollouts.finished.float().mean()), rollout_seconds=sampled - started,
                 entropy=float(rollouts.entropy.sum() / rollouts.mask.sum()), **log)
        if config.show_every and step % config.show_every == 0:
            print(f"      {tasks[0].messages[-1]['content']}\n      > {common.transcript(tok, rollouts, 0)}")
        if config.eval_every and (step + 1) % config.eval_every == 0 and step + 1 < config.steps:
            evaluated(step + 1)
        run.save(step + 1)
    after = evaluate(student, tok, held_out, config)
    trends = {name: ends(run, key) for name, key in (("teacher_entropy", "H"), ("routed", "routed"), ("teacher_seconds",) * 2)}
    return run.finish(student, tok, after, cool_before=run.notes["cool_before"], cool_after=after["cool_accuracy"],
                      length_before=run.notes["length_before"], length_after=after["length"],
                      cool_best=max(run.notes["best_cool"], after["cool_accuracy"]), **trends)


def ends(run, key: str) -> list[float]:
    """A logged quantity at the start and at the end: means of the first and of the last ten steps that have it."""
    values = [r[key] for r in map(json.loads, run.metrics.read_text().splitlines()) if key in r]
    return [sum(part) / len(part) for part in (values[:10], values[-10:])] if values else []


# ------------------------------------------------------------------------------------------------ compare, explain
ROWS = {"grpo": {"method": "grpo"}, "sdpo": {"method": "sdpo"}, "srpo": {"method": "srpo"},
        "srpo, no weights": {"method": "srpo_no_weight"}, "mix": {"method": "mix"},
        "grpo at srpo's rate": {"method": "grpo", "lr_of": "srpo"}}


def compare(config) -> None:
    """Every method from the same start on the same problems; after each of the --seeds one table, mean and deviation."""
    found = {name: [] for name in ROWS}
    for seed in range(config.seed, config.seed + config.seeds):
        for name, row in ROWS.items():
            lr = learning_rate(dataclasses.replace(config, method=row.get("lr_of", row["method"])))
            folder = f"{config.out or 'runs/srpo-compare'}/{re.sub('[^a-z]+', '-', name)}-s{seed}"
            first = seed == config.seed and name == next(iter(ROWS))  # the base is fitted and examined once
            found[name].append(train(dataclasses.replace(
                config, method=row["method"], lr=lr, seed=seed, out=folder, show_every=0, plot=[],
                fresh=config.fresh and first, gate_tasks=config.gate_tasks if first else 0)))
        print(comparison(found), flush=True)
    print("final: after the last step; best: of all evaluations; a > b: means over the first and over the last ten steps")


def comparison(found: dict[str, list[dict]]) -> str:
    """Summaries of the runs so far -> the table."""
    def trend(runs, key):
        pairs = [s[key] for s in runs if s[key]]
        return " > ".join(f"{sum(x) / len(x):.2f}" for x in zip(*pairs)) if pairs else "-"

    def mean(runs, key):
        return sum(s[key] for s in runs) / len(runs)
    accuracies = ("accuracy_after", "accuracy_best", "cool_after", "cool_best")
    start = next(iter(found.values()))
    rows = [["start", mean(start, "accuracy_before"), "", mean(start, "cool_before"), "", mean(start, "length_before"), *["-"] * 4]]
    for name, runs in found.items():
        rows.append([name, *(common.mean_spread([s[k] for s in runs]) for k in accuracies), mean(runs, "length_after"),
                     trend(runs, "teacher_entropy"), trend(runs, "routed"), trend(runs, "teacher_seconds"),
                     mean(runs, "seconds_per_step")])
    return common.table(rows, ["method", "final, T 1", "best, T 1", "final, T 0.6", "best, T 0.6", "length", "teacher H",
                               "routed", "teacher s", "s/step"])


def explain(config) -> None:
    """One wrong rollout with a correct sibling: what the teacher says about each of its tokens."""
    device = common.setup(config)
    tasks, _ = common.load_tasks(config.data, config.eval_tasks, small_chain)
    student, tok = load_student(config, device)
    rng, generator = random.Random(config.seed), torch.Generator(device).manual_seed(config.seed)
    for _ in range(20):
        task = [rng.choice(tasks)]
        rollouts = common.rollout(student, tok, task, config.group_size, max_new_tokens=config.max_new_tokens,
                                  temperature=config.temperature, generator=generator, thinking=config.thinking)
        reward = common.rewards(rollouts, task)
        demos = pick_demonstration(reward.tolist(), config.group_size)
        messages = teacher_messages(tok, task, rollouts, demos, config)
        if wrong := [i for i in messages if reward[i] < 0.5]:
            break
    else:
        common.fail("no wrong rollout with a correct sibling in 20 problems; take easier problems or a larger --group_size")
    row = wrong[0]
    with torch.no_grad():
        both = []
        for prompt in (task[0].messages, messages[row]):  # before any training the teacher is the student, only better informed
            ids, attention, mask = response_batch(tok, [prompt], rollouts, [row], config.thinking)
            logits = student.get_output_embeddings()(common.hidden_at(student, ids, attention, mask)).float()
            both.append(F.log_softmax(logits / config.temperature, -1))             # (n, V)
    p, q = both
    target, d, h = ids[mask.bool()], jsd(p, q), entropy(q)                          # (n,) each
    w = entropy_weights(h, config.beta)
    print(f"problem   {task[0].messages[-1]['content']}\nanswer    {task[0].answer}\nsibling   {solution_text(tok, rollouts, demos[row])}"
          f"\nrollout   {common.transcript(tok, rollouts, row)}   (wrong)\n")
    print(common.table([[tok.decode([t]).replace("\n", "\\n"), *(float(x[k].exp()) for x in (p[:, t], q[:, t])),
                         tok.decode(q[k].argmax()).replace("\n", "\\n"), float(d[k]), float(h[k]), float(w[k])]
                        for k, t in enumerate(target.tolist())],
                       ["token", "student p", "teacher p", "teacher's favourite", "JSD", "entropy H", "weight w"]))
    print("\nthe weights have mean 1 over this rollout; in training the mean is taken over all distilled tokens of the step")


def main(argv=None) -> None:
    config = common.parse(Config, argv)
    if config.ema > 1:
        common.fail(f"--ema {config.ema} is out of range; give a share from 0 to 1")
    if config.explain:
        return explain(config)
    if config.compare:
        return compare(config)
    if len(config.plot) < 2:
        train(config)
    if config.plot:
        common.plot_runs(config.plot[0], config.plot[1:] or [config.out or f"runs/srpo-{config.method}-s{config.seed}"])


if __name__ == "__main__":
    main()
