"""SRPO: sample-routed policy optimisation (arXiv 2604.02288), with GRPO and SDPO (2601.20802) on one loop.

    python srpo.py                         a tiny Qwen3, fitted here, then trained; minutes on two CPU cores
    python srpo.py --compare --seeds 3     every method on the same problems, one table
    python srpo.py --explain               one wrong rollout, token by token

What happens in a step:
1. Sample a group of rollouts for every problem and reward each with 0 or 1.
2. A *wrong* rollout with a *correct sibling* in its group is routed to distillation, every other one to GRPO.
3. The self-teacher, a slow copy (EMA) of the student, sees the question plus the sibling's solution and
   re-reads the student's own tokens; it never writes. Each is pulled towards what the teacher expects (JSD).
4. A token counts more where the teacher is sure: weight exp(-beta H), rescaled to mean 1 over the batch.
5. All token losses are summed and divided by one number, so distillation fades as fewer rollouts are wrong.

The three methods are one formula (3.3),   L = (sum z_grpo l_grpo + sum z_sdpo w JSD) / N

    method   z_grpo       z_sdpo    w      N                         c = 1: the rollout is correct
    grpo     1            0         -      all response tokens       m = 1: another one of its group is
    sdpo     0            m         1      tokens with z_sdpo > 0
    srpo     1-(1-c)m     (1-c)m    3.2    all response tokens

By section of the paper: routing (3.1) `pick_demonstration`, `route`; advantage (2.1, 4.1)
`common.group_advantages`; divergence (2.2) `jsd`; weights (3.2) `entropy_weights`; the sum (3.3) `backward`;
teacher (2.2, Table 3) `reprompt`, `teacher_pass`, `ema_update`.

    paper                                          here
    32 x 8 rollouts, Qwen3-4B and 8B               tiny: 16 x 8; the learning rates keep the ratio 1 : 10 : 5
    JSD on the student's top 100 tokens (code)     full vocabulary, in chunks: exact
    SDPO: mean over rollouts of token means (code) one mean over all tokens, as in the formula
    advantage divided by std in 2.1, not in 4.1    not divided
    teacher prompt cut at 10240 tokens (code)      a rollout with a longer one goes to GRPO, and is counted
    10 warm-up steps, weight decay 0.01            5 warm-up steps, no decay: those of common.py

Left out: rollout correction and clipping of stale ratios (one update a batch: the ratio is exactly 1), top-K,
the trust-region teacher, environment feedback, KL to a reference (coefficient 0 in the paper).
"""
import copy
import dataclasses
import functools
import json
import math
import random
import time
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

import common
from common import Task, option

LEARNING_RATES = {"tiny": {"grpo": 4e-5, "sdpo": 4e-4, "srpo": 2e-4},  # 1 : 10 : 5 as in Table 3
                  "real": {"grpo": 1e-6, "sdpo": 1e-5, "srpo": 5e-6}}


@dataclass
class Config(common.Config):
    tiny_tokens: ClassVar[int] = 64
    method: Literal["srpo", "grpo", "sdpo", "srpo_no_weight", "mix"] = option(
        "srpo", "srpo_no_weight: routing, all tokens alike; mix: 0.9 GRPO + 0.1 SDPO, no routing")
    distill: Literal["default", "wrong", "right", "all"] = option(
        "default", "which rollouts may be distilled; default = wrong for srpo, all for sdpo and mix")
    beta: float = option(1.0, "entropy weight exp(-beta H) of srpo; 0 = all tokens alike")
    ema: float = option(0.05, "share of the student entering the teacher each step; 0 = frozen, 1 = live")
    steps: int = option(120, "training steps")
    prompts_per_step: int = option(16, "problems a step")
    lr: float | None = option(None, "learning rate; not given = the method's own, see LEARNING_RATES")
    eval_every: int = option(20, "evaluate every so many steps; 0 = only before and after")
    gate_tasks: int = option(40, "held-out problems to check that the model can read a solution; 0 = none")
    max_prompt_tokens: int = option(4096, "a rollout that needs a longer teacher prompt goes to GRPO")
    compare: bool = option(False, "run every method on --seeds seeds and print one table")
    seeds: int = option(1, "seeds for --compare, from --seed on")
    explain: bool = option(False, "print one wrong rollout token by token, then stop")

    @property
    def rate(self) -> float:
        rates = LEARNING_RATES["tiny" if self.model == "tiny" else "real"]
        return self.lr if self.lr is not None else rates.get(self.method, rates["srpo"])


# ------------------------------------------------------------------------------------ the equations
def pick_demonstration(rewards: list[float], group_size: int) -> list[int | None]:
    """B rewards -> for every rollout the first correct *other* one of its group, or None (3.1; m = 1 where
    there is one). Correct means at least 0.5."""
    demos = []
    for i in range(len(rewards)):
        start = i - i % group_size
        siblings = (j for j in range(start, start + group_size) if j != i and rewards[j] >= 0.5)
        demos.append(next(siblings, None))
    return demos


def route(rewards, demos: list[int | None], method: str = "srpo", distill: str = "default"):
    """Who learns from what (3.1), three tensors (B,): z_grpo, z_sdpo, and whose tokens N counts (bool)."""
    correct = rewards >= 0.5                                                        # (B,) c
    available = torch.tensor([d is not None for d in demos], device=rewards.device)  # (B,) m
    everyone = torch.ones_like(correct)                                             # (B,)
    if distill == "default":
        distill = "wrong" if method.startswith("srpo") else "all"
    # z_sdpo = (1 - c) m,   z_grpo = 1 - z_sdpo
    chosen = available & {"wrong": ~correct, "right": correct, "all": everyone}[distill]
    if method == "grpo":
        return everyone.float(), torch.zeros_like(rewards), everyone
    if method == "sdpo":
        return torch.zeros_like(rewards), chosen.float(), chosen
    if method == "mix":  # SDPO's gradient is an advantage per vocabulary entry, so this mixes advantages
        return 0.9 * everyone, 0.1 * chosen, everyone
    return 1 - chosen.float(), chosen.float(), everyone


def jsd(logps, teacher_logps):
    """Jensen-Shannon divergence of two log-distributions, (n, V) each -> (n,) nats, at most ln 2 (2.2)."""
    logps, teacher_logps = logps.clamp(min=-1e4), teacher_logps.clamp(min=-1e4)  # at -inf: 0 * inf = NaN
    # m = (p + q) / 2,   JSD = KL(p || m) / 2 + KL(q || m) / 2
    log_m = torch.logaddexp(logps, teacher_logps) - math.log(2)                     # (n, V)
    from_student = (logps.exp() * (logps - log_m)).sum(-1)                          # (n,)
    from_teacher = (teacher_logps.exp() * (teacher_logps - log_m)).sum(-1)          # (n,)
    return 0.5 * (from_student + from_teacher)


def entropy_weights(teacher_entropy, beta: float):
    """w = exp(-beta H) / mean exp(-beta H), (n,) -> (n,), without gradient (3.2). n: the tokens of *all*
    distilled rollouts of the step; means over micro-batches would change the mixture."""
    return len(teacher_entropy) * torch.softmax(-beta * teacher_entropy.detach(), 0)   # (n,)


@torch.no_grad()
def ema_update(teacher, student, rate: float) -> None:
    """theta' <- (1 - rate) theta' + rate theta, once a step (Table 3). bf16 would round the change away."""
    for old, new in zip(teacher.parameters(), student.parameters()):  # tied embeddings appear only once here
        old.lerp_(new, rate)


# ------------------------------------------------------------------------------------ the self-teacher
HEADING, CLOSING = "\n\nCorrect solution:\n\n", "\n\nNow answer the question above yourself, correctly."


def reprompt(messages: list[dict], solution: str) -> list[dict]:
    """The teacher's prompt: the last user message, then a correct solution and one line that asks again."""
    content = messages[-1]["content"] + HEADING + solution + CLOSING
    return [*messages[:-1], {**messages[-1], "content": content}]


def solution_text(tok, rollouts, row: int) -> str:
    """A rollout as demonstration, without thinking and without special tokens, real or spelt out."""
    text = tok.decode(rollouts.ids[row][rollouts.mask[row].bool()], skip_special_tokens=True)
    return common.defused(tok, text.rsplit("</think>", 1)[-1].strip())


def teacher_messages(tok, tasks, rollouts, demos, config) -> dict[int, list[dict]]:
    """Row -> the teacher's messages, where there is a demonstration. Too long ones are dropped, not cut."""
    group_size = len(rollouts.ids) // len(tasks)
    messages = {i: reprompt(tasks[i // group_size].messages, solution_text(tok, rollouts, d))
                for i, d in enumerate(demos) if d is not None}
    return {i: m for i, m in messages.items()
            if len(common.prompt_ids(tok, m, thinking=config.thinking)) <= config.max_prompt_tokens}


def response_batch(tok, messages: list, rollouts, rows: list[int], thinking: bool = False):
    """[left-padded prompt | response, right-padded] -> ids, attention_mask, mask, (b, t) each. For student
    and teacher alike: the response is made of the rollout's own ids, never encoded anew, so the k-th token
    under the mask is the same for both."""
    device, pad = rollouts.ids.device, tok.pad_token_id
    prompts = [common.prompt_ids(tok, m, thinking=thinking) for m in messages]
    responses = [rollouts.ids[i][rollouts.mask[i].bool()].tolist() for i in rows]
    ids = [common.padded(prompts, pad, True, device), common.padded(responses, pad, False, device)]
    real = [common.padded([[1] * len(p) for p in prompts], 0, True, device),
            common.padded([[1] * len(r) for r in responses], 0, False, device)]
    return torch.cat(ids, 1), torch.cat(real, 1), torch.cat([torch.zeros_like(real[0]), real[1]], 1)


@torch.no_grad()
def teacher_pass(teacher, tok, messages: dict[int, list[dict]], rollouts, config):
    """The teacher re-reads the rows named in `messages`: row -> hidden states (n, H), row -> entropies (n,).
    Hidden states are kept, not distributions: n x H is small, n x V is not, and the head makes them anew."""
    def spread(logits):                                                             # (n, V)
        return common.entropy_of(F.log_softmax(logits / config.temperature, -1))    # (n,)

    hidden, entropies = {}, {}
    for rows, _ in common.micro_batches(rollouts, list(messages), config.micro_batch):
        prompts = [messages[i] for i in rows]
        ids, attention, mask = response_batch(tok, prompts, rollouts, rows, config.thinking)
        states = common.hidden_at(teacher, ids, attention, mask)                    # (n, H)
        h = common.over_vocab_chunks(states, teacher.get_output_embeddings(), spread)   # (n,)
        lengths = mask.sum(1).tolist()
        hidden |= zip(rows, states.split(lengths))
        entropies |= zip(rows, h.split(lengths))
    return hidden, entropies


# ------------------------------------------------------------------------------------ one step
def sampled_logps(student, hidden, ids, temperature: float):
    """Log-prob of each token: hidden (n, H) of the student, ids (n,) -> (n,)."""
    def logp(logits, token):                                                        # (n, V), (n,)
        return F.log_softmax(logits / temperature, -1).gather(1, token[:, None])[:, 0]
    return common.over_vocab_chunks(hidden, student.get_output_embeddings(), logp, ids)


def divergences(student, teacher, hidden, teacher_hidden, temperature: float):
    """JSD at each token: hidden, teacher_hidden (n, H) -> (n,). The gradient goes to the student alone."""
    teacher_logits = common.lm_head(teacher.get_output_embeddings())

    def divergence(logits, states):                                                 # (n, V), (n, H)
        with torch.no_grad():
            q = F.log_softmax(teacher_logits(states) / temperature, -1)             # (n, V)
        return jsd(F.log_softmax(logits / temperature, -1), q)
    return common.over_vocab_chunks(hidden, student.get_output_embeddings(), divergence, teacher_hidden)


def backward(student, teacher, tok, tasks, rollouts, reward, config) -> dict:
    """Routes a batch of rollouts by their reward (B,), leaves the gradient of L in the student, returns what
    is to be logged. `signal`: is there a gradient? If not, the caller must not step."""
    B, group_size, started = len(rollouts.ids), len(rollouts.ids) // len(tasks), time.time()
    demos = pick_demonstration(reward.tolist(), group_size)
    _, wanted, _ = route(reward, demos, config.method, config.distill)              # (B,)
    demos = [d if z else None for d, z in zip(demos, wanted.tolist())]
    messages = teacher_messages(tok, tasks, rollouts, demos, config)
    z_grpo, z_sdpo, counted = route(                                                # (B,) each
        reward, [d if i in messages else None for i, d in enumerate(demos)], config.method, config.distill)
    # A_i = r_i - mean over the *whole* group: over its GRPO part, all of them right, it would always be 0
    advantages = common.group_advantages(reward, group_size, std=False)             # (B,)
    tokens = rollouts.mask[counted].sum()  # N: rollouts without any gradient count too

    # The teacher reads the routed rollouts and no others: here SRPO saves time.
    teacher_hidden, entropies = teacher_pass(teacher, tok, messages, rollouts, config)
    log, weights = {"routed": len(messages) / B, "teacher_seconds": time.time() - started}, {}
    log["too_long"] = sum(d is not None for d in demos) - len(messages)
    if messages:
        h = torch.cat([entropies[i] for i in messages])                             # (n,)
        w = entropy_weights(h, config.beta if config.method == "srpo" else 0.0)     # (n,)
        weights = dict(zip(messages, w.split([len(entropies[i]) for i in messages])))
        log |= {"jsd": 0.0, "teacher H": float(h.mean()), "sd(w)": float(w.std(correction=0))}

    active = [i for i in range(B) if z_sdpo[i] or z_grpo[i] * advantages[i]]  # all others have gradient 0
    student.train()
    for rows, _ in common.micro_batches(rollouts, active, config.micro_batch):
        prompts = [tasks[i // group_size].messages for i in rows]
        ids, attention, mask = response_batch(tok, prompts, rollouts, rows, config.thinking)
        hidden = common.hidden_at(student, ids, attention, mask)                    # (n, H)
        z_g, z_s, A = (x[rows].repeat_interleave(mask.sum(1)) for x in (z_grpo, z_sdpo, advantages))  # (n,)
        # L = (sum z_grpo l_grpo + sum z_sdpo w JSD) / N. This policy is the one that sampled: ratio 1.
        logps = sampled_logps(student, hidden, ids[mask.bool()], config.temperature)    # (n,)
        loss = common.policy_loss(logps, logps.detach(), A, z_g, denominator=tokens)
        if distilled := [i for i in rows if z_sdpo[i]]:
            states = torch.cat([teacher_hidden[i] for i in distilled])              # (m, H)
            w = torch.cat([weights[i] for i in distilled])                          # (m,)
            d = divergences(student, teacher, hidden[z_s > 0], states, config.temperature)  # (m,)
            loss = loss + (z_s[z_s > 0] * w * d).sum() / tokens
            log["jsd"] += float(d.detach().sum()) / len(h)
        loss.backward()
    student.eval()
    return log | {"signal": bool(active)}


# ------------------------------------------------------------------------------------ the tiny base model
# A self-teacher needs a base that is often wrong, yet can read a correct solution in its prompt. A tiny model
# learns that only from a corpus which shows it: that is put in by design, what the methods make of it is not.
MODULUS, OPERATIONS = 10, (5, 5)
FIT = {"documents": 12000, "steps": 800, "hidden_size": 80, "layers": 3}
CONTEXT_SHARE, SAME_STYLE = 0.6, 0.8    # documents with a solution in the prompt; attempts in its style
WRONG, WRONG_WITH_SOLUTION = 0.05, 0.01  # a result is a random number, and the chain goes on from it
SNAP_BACK = 0.5  # with a solution, after an error: a result is the solution's, though it does not follow


def small_chain(rng) -> Task:
    return common.chain_task(rng, OPERATIONS, MODULUS)


def write_solution(rng, task: Task, long: bool, wrong: float = 0.0, snap_back: float = 0.0) -> str:
    """Two styles of equal reward: `A3+4=7, B7*5=5. \\boxed{5}` (long) and `A7, B5. \\boxed{5}` (terse)."""
    (value, *values), modulus, steps = common.parse_chain(task.messages[-1]["content"])
    parts = []
    for (label, operation, operand), right in zip(steps, values):
        result = common.APPLY[operation](value, operand) % modulus if rng.random() >= snap_back else right
        if rng.random() < wrong:
            result = rng.randrange(modulus)
        parts.append(f"{label}{value}{operation}{operand}={result}" if long else f"{label}{result}")
        value = result
    return ", ".join(parts) + f". \\boxed{{{value}}}"


def context_document(rng, tok, task: Task):
    """Question, correct solution, attempt -> (ids, mask). The solution carries loss, too: more text."""
    long = rng.random() < 0.5
    solution = write_solution(rng, task, long)
    same_style = rng.random() < SAME_STYLE
    attempt = write_solution(rng, task, long == same_style, WRONG_WITH_SOLUTION, SNAP_BACK)
    ids, mask = common.demonstration(tok, Task(reprompt(task.messages, solution), task.answer), attempt)
    start, length = ids.index(common.encode(tok, HEADING)[0]) + 1, len(common.encode(tok, solution))
    mask[start:start + length] = [1] * length
    return ids, mask


@functools.cache  # --compare asks for them again and again
def corpus():
    """The tiny base's tokenizer and documents."""
    tok = common.build_tokenizer([*common.CHAIN_ATOMS, ". \\boxed{", HEADING, CLOSING])
    rng, docs = random.Random(1), []
    for _ in range(FIT["documents"]):
        task = small_chain(rng)
        if rng.random() < CONTEXT_SHARE:
            docs.append(context_document(rng, tok, task))
        else:
            solution = write_solution(rng, task, rng.random() < 0.5, WRONG)
            docs.append(common.demonstration(tok, task, solution))
    return tok, docs


def load_student(config, device):
    """The tiny base, fitted on the corpus above (cached), or a Hugging Face model -> (model, tokenizer)."""
    if config.model != "tiny":
        return common.load_model(config.model, device)
    tok, docs = corpus()
    model = common.tiny_model(tok, 1, FIT["hidden_size"], FIT["layers"])
    return common.fit_tiny("the base model", model, docs, FIT["steps"], fresh=config.fresh).to(device), tok


def gates(student, tok, tasks, config) -> dict:
    """Can this model read a solution? If not, its self-teacher is noise. Prints shares of right answers."""
    generator = torch.Generator(student.device).manual_seed(4321)

    def attempt(tasks):
        out = common.rollout(student, tok, tasks, config.group_size, temperature=config.temperature,
                             generator=generator, **config.sampling)
        return out, common.rewards(out, tasks).view(len(tasks), -1)                 # (tasks, group_size)

    rollouts, reward = attempt(tasks)
    solved = reward.amax(1).nonzero()[:, 0].tolist()
    first = reward.argmax(1).tolist()  # the first success of each group
    solutions = [solution_text(tok, rollouts, i * config.group_size + first[i]) for i in solved]
    found = {"student": float(reward.mean()), "groups": len(solved) / len(tasks), "sibling": 0, "other": 0}
    for name, shown in (("sibling", solutions), ("other", solutions[1:] + solutions[:1])):
        if len(solved) > 1:
            asked = [Task(reprompt(tasks[i].messages, s), tasks[i].answer) for i, s in zip(solved, shown)]
            found[name] = float(attempt(asked)[1].mean())
    print(f"gates: student {found['student']:.2f} (0.2 to 0.5), groups with a success {found['groups']:.2f} "
          f"(0.6 or more)\n       teacher with a sibling's solution {found['sibling']:.2f} (0.8 or more), "
          f"with another problem's {found['other']:.2f} (far less); if not, it has little to say")
    return found


# ------------------------------------------------------------------------------------ training
def train(config: Config) -> dict:
    """One loop for all methods: sample, route, one backward pass, one update, then the teacher follows."""
    device = common.setup(config)
    train_tasks, held_out = common.load_tasks(config.data, config.eval_tasks, small_chain,
                                              config.prompts_per_step)
    run = common.Run(config, "srpo")
    student, tok = load_student(config, device)
    # Storage of its own, else it would be the student. GRPO has no teacher.
    teacher = None if config.method == "grpo" else copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.rate, weight_decay=0.0)
    rng, generator = random.Random(config.seed), torch.Generator(device).manual_seed(config.seed)

    def measure():
        return common.evaluate(student, tok, held_out, **config.sampling)

    first = run.open_folder([student, optimizer] + [teacher] * bool(teacher), generator, rng)
    if not config.resume:
        if config.gate_tasks:
            run.log({"gates": gates(student, tok, held_out[:config.gate_tasks], config)})
        run.evaluated("before", measure())
    for step in range(first, config.steps):
        started = time.time()
        tasks = rng.sample(train_tasks, config.prompts_per_step)
        rollouts = common.rollout(student, tok, tasks, config.group_size, temperature=config.temperature,
                                  generator=generator, **config.sampling)
        sampled = time.time()
        reward, norm = common.rewards(rollouts, tasks), 0.0                         # (B,)
        log = backward(student, teacher, tok, tasks, rollouts, reward, config)
        if log.pop("signal"):  # if not, not even Adam's momentum may move the student, and the teacher waits
            norm = common.apply_gradients(student, optimizer, step, config.rate)
            if teacher is not None and math.isfinite(norm):
                ema_update(teacher, student, config.ema)
        times = {"rollout_seconds": sampled - started, "teacher_seconds": log.pop("teacher_seconds")}
        too_long, group_mean = log.pop("too_long"), reward.view(-1, config.group_size).mean(1)  # (groups,)
        if too_long:
            run.warn("some teacher prompts are longer than --max_prompt_tokens, and their rollouts get a "
                     "negative GRPO advantage instead of a teacher; raise it, or shorten the answers")
        run.step(step + 1, started, {
            "solved": float(reward.mean()), **log, "all wrong": int((group_mean == 0).sum()),
            "all right": int((group_mean == 1).sum()), **run.rollout_figures(rollouts, reward, norm)},
            too_long=too_long, **times)
        if config.show_every and step % config.show_every == 0:
            print(f"      {tasks[0].messages[-1]['content']}\n      > {common.transcript(tok, rollouts, 0)}")
        run.end_step(step + 1, measure)
    return run.finish(student, tok, measure, **trends(run.metrics))


def trends(metrics) -> dict:
    """For the summary: speed of learning; means over the first and last ten steps that measured something."""
    records, result = [json.loads(line) for line in metrics.read_text().splitlines()], {}
    if curve := {r["step"]: r["accuracy"] for r in records if isinstance(r.get("eval"), int)}:
        result["mean accuracy"] = sum(curve.values()) / len(curve)
        result["steps to .9"] = next((step for step, a in curve.items() if a >= 0.9), max(curve))
    for key in ("teacher H", "routed", "teacher_seconds"):
        values = [r[key] for r in records if key in r]
        for when, ten in (("first", values[:10]), ("last", values[-10:])):
            result[f"{key}, {when}"] = sum(ten) / len(ten) if ten else None
    return result


# ------------------------------------------------------------------------------------ compare, explain
def compare(config) -> None:
    """Every method from the same start on the same problems; mean and spread over --seeds seeds. The paper's
    three at other learning rates, too: at its ratio of rates the fastest need not be the best method."""
    variants, slowest = {}, dataclasses.replace(config, method="grpo").rate
    for method in ("grpo", "sdpo", "srpo", "srpo_no_weight", "mix"):
        own = dataclasses.replace(config, method=method).rate
        variants[method] = {"method": method}
        for rate in (slowest, 2.5 * slowest, 5 * slowest, 12.5 * slowest):
            if method in LEARNING_RATES["tiny"] and rate != own:
                variants[f"{method} --lr {rate:g}"] = {"method": method, "lr": rate}
    found = common.compared(train, dataclasses.replace(config, gate_tasks=0), variants, "srpo")
    start = found["grpo"][0]
    print(f"\nstart: {start['accuracy_before']:.3f}, length {start['length_before']:.1f}. No --lr: its own, "
          "in the paper's ratio. mean: of all evaluations in\ntraining; .9 at: the step of the first that "
          "reaches .9, or else the last; first, last: means of ten steps")
    print(common.seed_table(found, {
        "accuracy_after": "T = 1", "accuracy_best": "best", "mean accuracy": "mean", "steps to .9": ".9 at",
        "length_after": "length", "teacher H, first": "teacher H, first", "teacher H, last": "last",
        "routed, first": "routed, first", "routed, last": "last",
        "teacher_seconds, first": "teacher s, first", "teacher_seconds, last": "last",
        "seconds_per_step": "s/step"}))


@torch.no_grad()
def explain(config) -> None:
    """One wrong rollout with a correct sibling: what the teacher says about each of its tokens."""
    device = common.setup(config)
    tasks, _ = common.load_tasks(config.data, config.eval_tasks, small_chain, config.prompts_per_step)
    student, tok = load_student(config, device)
    tasks = random.Random(config.seed).sample(tasks, config.prompts_per_step)
    generator = torch.Generator(device).manual_seed(config.seed)
    rollouts = common.rollout(student, tok, tasks, config.group_size, temperature=config.temperature,
                              generator=generator, **config.sampling)
    reward = common.rewards(rollouts, tasks).tolist()
    demos = pick_demonstration(reward, config.group_size)
    messages = teacher_messages(tok, tasks, rollouts, demos, config)
    row = next((i for i in messages if reward[i] < 0.5), None)
    if row is None:
        common.fail(f"none of {len(tasks)} problems has right and wrong rollouts; take a larger --group_size")
    task, logps = tasks[row // config.group_size], []
    for prompt in (task.messages, messages[row]):  # at step 0 the teacher is the student
        ids, attention, mask = response_batch(tok, [prompt], rollouts, [row], config.thinking)
        hidden = common.hidden_at(student, ids, attention, mask)                    # (n, H)
        logits = common.lm_head(student.get_output_embeddings())(hidden)            # (n, V)
        logps.append(F.log_softmax(logits / config.temperature, -1))
    (p, q), tokens = logps, ids[mask.bool()]
    h = common.entropy_of(q)                                                        # (n,)
    p_token, q_token = (x.exp().gather(1, tokens[:, None])[:, 0] for x in (p, q))   # (n,) each
    columns = [x.tolist() for x in (p_token, q_token, jsd(p, q), h, entropy_weights(h, config.beta))]
    said, expected = ([repr(tok.decode([i]))[1:-1] for i in x.tolist()] for x in (tokens, q.argmax(1)))
    print(f"problem   {task.messages[-1]['content']}\nanswer    {task.answer}\n"
          f"sibling   {solution_text(tok, rollouts, demos[row])}   (right: stands in the teacher's prompt)\n"
          f"rollout   {solution_text(tok, rollouts, row)}   (wrong: re-read by the teacher)\n")
    print(common.table(list(zip(said, expected, *columns)),  # mean 1 over this rollout; in training, over all
                       ["token", "teacher would say", "student p", "teacher p", "JSD", "H", "weight"]))


def main(argv=None) -> None:
    config = common.parse(Config, argv)
    if config.ema > 1:
        common.fail(f"--ema {config.ema} is out of range; give a share from 0 to 1")
    if config.minibatches != 1:
        common.fail("--minibatches must be 1: the weights and N belong to one update on the whole batch")
    common.launch(config, "srpo", train, explain=explain, compare=compare)


if __name__ == "__main__":
    main()
