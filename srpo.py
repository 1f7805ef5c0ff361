"""SRPO: sample-routed policy optimisation (arXiv 2604.02288), with GRPO and SDPO (2601.20802) on one loop.

    python srpo.py                         a tiny Qwen3, fitted here, then trained; minutes on one CPU core
    python srpo.py --compare               every method, the paper's three at more rates: 45 runs, one table
    python srpo.py --explain               one wrong rollout, token by token
    python srpo.py --model Qwen/Qwen3-0.6B --data FILE --rows_at_once 64 --micro_batch 8     one GPU

What happens in a step:
1. Sample a group of rollouts for every problem and reward each with 0 or 1.
2. A *wrong* rollout with a *correct sibling* in its group is routed to distillation, every other one to GRPO.
3. The self-teacher, a slow copy (EMA) of the student, sees the question plus the sibling's solution and
   re-reads the student's own tokens; it never writes. At every token the student's distribution is pulled
   towards the teacher's (JSD).
4. A token counts more where the teacher is sure: weight exp(-beta H), rescaled to mean 1 over the batch.
5. All token losses are summed and divided by one number, so distillation fades as fewer rollouts are wrong.
6. One update of the student; the teacher follows by a twentieth of the way.

All methods are one formula (3.3),   L = (sum z_grpo l_grpo + sum z_sdpo w JSD) / N

    method           d         z_grpo   z_sdpo   w      c = 1: the rollout is correct
    srpo             (1-c) m   1 - d    d        3.2    m = 1: another one of its group is
    srpo_no_weight   (1-c) m   1 - d    d        1      d = 1: the rollout is distilled
    sdpo             m         0        d        1      N: the tokens of all rollouts that have a z > 0:
    grpo             -         1        0        -      for sdpo those with d = 1, for the others all
    mix              m         0.9      0.1 d    1

By section of the paper: routing (3.1) `pick_demonstration`, `route`; advantage (2.1, 4.1)
`common.group_advantages`; divergence (2.2) `jsd`; weights (3.2) `entropy_weights`; the sum (3.3) `train`;
teacher (2.2, Table 3) `reprompt`, `teacher_pass`, `ema_update`.

    paper                                          here
    32 x 8 rollouts, Qwen3-4B and 8B               16 x 8; the learning rates keep the ratio 1 : 10 : 5
    updates a batch: GRPO 4, the others 1          1 for all, so GRPO is held back further than in the paper
    JSD on the student's top 100 tokens (code)     full vocabulary, in chunks: exact
    SDPO: mean over rollouts of token means (code) one mean over all tokens, as in the formula
    advantage divided by std in 2.1, not in 4.1    not divided
    teacher prompt cut at 10240 tokens (code)      never cut: --max_new_tokens bounds the solution in it
    10 warm-up steps, weight decay 0.01            5 warm-up steps, no decay: those of common.py

Left out: rollout correction and clipping of stale ratios (one update a batch: the ratio is exactly 1), top-K,
the trust-region teacher, environment feedback, KL to a reference (coefficient 0 in the paper).
"""
import copy
import functools
import json
import math
import random
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F

import common
from common import Rollouts, Task, option


# ------------------------------------------------------------------------------------ the equations
def pick_demonstration(rewards: list[float], group_size: int) -> list[int | None]:
    """B rewards -> for every rollout the first correct *other* one of its group, or None (3.1; m = 1 where
    there is one). Correct means at least 0.5."""
    demos = []
    for i in range(len(rewards)):
        start = i - i % group_size
        group = range(start, start + group_size)
        correct = [j for j in group if j != i and rewards[j] >= 0.5]
        demos.append(correct[0] if correct else None)
    return demos


def jsd(logps, teacher_logps):
    """Jensen-Shannon divergence of two log-distributions, (n, V) each -> (n,) nats, at most ln 2 (2.2)."""
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


# ------------------------------------------------------------------------------------ the methods
class Method(NamedTuple):
    """A row of the table at the head of this file; d = 1: the rollout may be distilled, if z_sdpo > 0."""
    distill: str             # of the rollouts with a correct sibling, which have d = 1: wrong, right or all
    z_grpo: float            # where d = 0
    z_grpo_distilled: float  # where d = 1
    z_sdpo: float            # where d = 1; it is 0 where d = 0
    weighted: bool           # w = exp(-beta H) / mean exp(-beta H), else w = 1
    rate: float              # the learning rate, as a multiple of GRPO's (Table 3)


METHODS = {  #               distill  z_grpo  z_grpo  z_sdpo  weighted  rate
    #                                d = 0   d = 1   d = 1
    "srpo":           Method("wrong", 1.0,    0.0,    1.0,    True,     5),
    "srpo_no_weight": Method("wrong", 1.0,    0.0,    1.0,    False,    5),
    "sdpo":           Method("all",   0.0,    0.0,    1.0,    False,    10),
    "grpo":           Method("all",   1.0,    1.0,    0.0,    False,    1),
    # SDPO's gradient is an advantage per vocabulary entry, so this mixes advantages
    "mix":            Method("all",   0.9,    0.9,    0.1,    False,    5),
}


def route(rewards, demos: list[int | None], method: str = "srpo", distill: str = "default"):
    """Who learns from what (3.1), three tensors (B,): z_grpo, z_sdpo, and whose tokens N counts (bool)."""
    row = METHODS[method]
    correct = rewards >= 0.5                                                        # (B,) c
    available = torch.tensor([d is not None for d in demos], device=rewards.device)  # (B,) m
    allowed = {"wrong": ~correct, "right": correct, "all": available}
    # d = (1 - c) m,   z_sdpo = d,   z_grpo = 1 - d: of srpo
    d = available & allowed[row.distill if distill == "default" else distill]       # (B,)
    z_grpo = torch.where(d, row.z_grpo_distilled, row.z_grpo)                       # (B,)
    z_sdpo = row.z_sdpo * d                                                         # (B,)
    return z_grpo, z_sdpo, z_grpo + z_sdpo > 0


@dataclass
class Config(common.Config):
    tiny_tokens: ClassVar[int] = 64
    method: str = option("srpo", "srpo_no_weight: routing, all tokens alike; mix: 0.9 GRPO + 0.1 SDPO",
                         choices=METHODS)
    distill: str = option("default", "which rollouts may be distilled; default = the method's own",
                          choices=("default", "wrong", "right", "all"))
    beta: float = option(1.0, "entropy weight exp(-beta H) of srpo; 0 = all tokens alike")
    ema: float = option(0.05, "share of the student entering the teacher each step; 0 = frozen, 1 = live")
    steps: int = option(120, "training steps")
    prompts_per_step: int = option(16, "problems a step")
    lr: float | None = option(None, "learning rate; not given = 4e-5 (tiny) or 1e-6 times the method's rate")
    eval_every: int = option(20, "evaluate every so many steps; 0 = only before and after")
    gate_tasks: int = option(40, "held-out problems to check that the model can read a solution; 0 = none")
    compare: bool = option(False, "run every method on --seeds seeds and print one table")
    methods: list[str] = field(default_factory=list, metadata={"help": "only these rows of --compare"})
    seeds: int = option(3, "seeds for --compare, from --seed on")
    explain: bool = option(False, "print one wrong rollout token by token, then stop")

    @property
    def rate(self) -> float:
        if self.lr is not None:
            return self.lr
        return METHODS[self.method].rate * (4e-5 if self.model == "tiny" else 1e-6)


# ------------------------------------------------------------------------------------ the self-teacher
HEADING = "\n\nCorrect solution:\n\n"
CLOSING = "\n\nNow answer the question above yourself, correctly."


def reprompt(messages: list[dict], solution: str) -> list[dict]:
    """The teacher's prompt: the last user message, then a correct solution and one line that asks again."""
    *earlier, last = messages
    content = last["content"] + HEADING + solution + CLOSING
    return [*earlier, {**last, "content": content}]


def solution_text(tok, rollouts: Rollouts, row: int) -> str:
    """A rollout as demonstration: without thinking, its special tokens broken up."""
    answer = rollouts.texts[row].rsplit("</think>", 1)[-1]
    return common.defused(tok, answer.strip())


@torch.no_grad()
def teacher_pass(teacher, tok, tasks: list[Task], rollouts: Rollouts, demos, routed: list[int], config):
    """The teacher re-reads the rows `routed`, each behind its problem and its sibling's solution -> hidden
    states, {row: (n, hidden)}, and entropies (B, T). Distributions, (n, V), are too large to keep: the head
    makes them anew."""
    def entropies(logits):                                                          # (n, V)
        return common.entropy_of(F.log_softmax(logits / config.temperature, -1))    # (n,)

    states = {}
    entropy = torch.zeros(rollouts.ids.shape, device=rollouts.ids.device)           # (B, T)
    for rows, columns in common.micro_batches(rollouts, routed, config.micro_batch):
        sequences = []
        masks = []
        for i in rows:
            sibling = solution_text(tok, rollouts, demos[i])
            messages = reprompt(tasks[i // config.group_size].messages, sibling)
            prompt = common.prompt_ids(tok, messages, thinking=config.thinking)
            # The response is the rollout's own ids, never encoded anew: the k-th token under the mask is the
            # same for student and teacher.
            response = rollouts.ids[i][rollouts.mask[i].bool()].tolist()
            sequences.append(prompt + response)
            masks.append([0] * len(prompt) + [1] * len(response))
        ids = common.padded(sequences, tok.pad_token_id, teacher.device)            # (b, P + R)
        mask = common.padded(masks, 0, teacher.device)                              # (b, P + R)

        hidden = common.hidden_at(teacher, ids, mask)                               # (n, hidden)
        lengths = mask.sum(1).tolist()
        states.update(zip(rows, hidden.split(lengths)))
        values = common.over_vocab_chunks(hidden, teacher.get_output_embeddings(), entropies)   # (n,)
        entropy[rows, columns] = common.on_grid(rollouts.mask[rows, columns], values)
    return states, entropy


# ------------------------------------------------------------------------------------ the student
def sampled_logps(student, hidden, ids, temperature: float):
    """Log-prob of each token: hidden (n, hidden) of the student, ids (n,) -> (n,)."""
    def logp(logits, token):                                                        # (n, V), (n,)
        logps = F.log_softmax(logits / temperature, -1)                             # (n, V)
        return logps.gather(1, token[:, None])[:, 0]
    return common.over_vocab_chunks(hidden, student.get_output_embeddings(), logp, ids)


def divergences(student, teacher, hidden, teacher_hidden, temperature: float):
    """JSD at each token: hidden, teacher_hidden (n, hidden) -> (n,). Only the student gets a gradient."""
    teacher_logits = common.lm_head(teacher.get_output_embeddings())

    def divergence(logits, states):                                                 # (n, V), (n, hidden)
        with torch.no_grad():
            q = F.log_softmax(teacher_logits(states) / temperature, -1)             # (n, V)
        return jsd(F.log_softmax(logits / temperature, -1), q)
    return common.over_vocab_chunks(hidden, student.get_output_embeddings(), divergence, teacher_hidden)


def student_pass(student, teacher, rollouts: Rollouts, rows: list, columns: slice, distilled,
                 teacher_states: dict, temperature: float):
    """The student reads a micro-batch of its own rollouts -> rho and JSD of each token, (b, t) each, 0 where
    there is none. distilled (B, T): the tokens that have a JSD."""
    ids, mask = rollouts.part(rows, columns)                                        # (b, t) each
    mask = mask.bool()                                                              # (b, t)
    distilled = distilled[rows, columns]                                            # (b, t)
    hidden = common.hidden_at(student, ids, mask)                                   # (n, hidden)

    # rho = pi(y_t) / pi_old(y_t). pi_old is this very policy: rho is 1, its gradient that of log pi(y_t)
    logps = sampled_logps(student, hidden, ids[mask], temperature)                  # (n,)
    rho = common.on_grid(mask, (logps - logps.detach()).exp())                      # (b, t)

    # JSD_t = JSD(pi(. | x, y_<t) || pi_teacher(. | x, sibling, y_<t))
    divergence = torch.zeros_like(rho)                                              # (b, t)
    if distilled.any():
        # Both row by row: the rows that have teacher_states are the distilled ones.
        ours = hidden[distilled[mask]]                                              # (k, hidden)
        theirs = torch.cat([teacher_states[i] for i in rows if i in teacher_states])    # (k, hidden)
        values = divergences(student, teacher, ours, theirs, temperature)           # (k,)
        divergence = common.on_grid(distilled, values)
    return rho, divergence


# ------------------------------------------------------------------------------------ training
def train(config: Config) -> dict:
    """One loop for all methods, in the order of the list at the head of this file."""
    train_tasks, held_out = common.load_tasks(config.data, config.eval_tasks, small_chain,
                                              config.prompts_per_step)
    run = common.Run(config, "srpo")
    student, tok = load_student(config, common.setup(config))
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.rate, weight_decay=0.0)
    method = METHODS[config.method]
    teacher = None  # GRPO has none
    if method.z_sdpo:
        teacher = copy.deepcopy(student).requires_grad_(False)  # storage of its own, else it is the student
    rng = random.Random(config.seed)
    generator = torch.Generator(student.device).manual_seed(config.seed)
    measure = functools.partial(common.evaluate, student, tok, held_out, **config.sampling)

    first = run.open_folder([student, optimizer, teacher], generator, rng)
    if not config.resume:
        if config.gate_tasks:
            run.log({"gates": gates(student, tok, held_out[:config.gate_tasks], config)})
        run.evaluated("before", measure())

    for step in range(first, config.steps):
        started = time.time()
        # 1. y_1 ... y_G ~ pi(. | x) for every problem x,   r_i = 1 if y_i is right, else 0
        tasks = rng.sample(train_tasks, config.prompts_per_step)
        rollouts = common.sample(student, tok, tasks, config, generator)
        reward = common.rewards(rollouts, tasks)                                    # (B,)
        # A_i = r_i - mean(r) over the *whole* group: in its GRPO part all are right, their A would be 0
        A = common.group_advantages(reward, config.group_size, std=False)           # (B,)

        # 2. z_sdpo = (1 - c) m,   z_grpo = 1 - z_sdpo;   in N, rollouts without any gradient count, too
        demos = pick_demonstration(reward.tolist(), config.group_size)
        z_grpo, z_sdpo, counted = route(reward, demos, config.method, config.distill)   # (B,) each
        N = rollouts.mask[counted].sum()

        # 3. pi_teacher(. | x, sibling, y_<t), for the routed rollouts alone: the fewer, the faster
        teacher_started = time.time()
        routed = z_sdpo.nonzero()[:, 0].tolist()
        teacher_states, H = teacher_pass(teacher, tok, tasks, rollouts, demos, routed, config)  # .., (B, T)
        teacher_seconds = time.time() - teacher_started

        # 4. w = exp(-beta H) / mean exp(-beta H), over the tokens of *all* routed rollouts
        distilled = rollouts.mask.bool() & (z_sdpo[:, None] > 0)                    # (B, T)
        w = torch.zeros_like(H)                                                     # (B, T)
        w[distilled] = entropy_weights(H[distilled], config.beta if method.weighted else 0.0)

        # 5. L = (sum z_grpo l_grpo + sum z_sdpo w JSD) / N   with   l_grpo = -A rho
        jsd_sum = 0.0
        active = (z_sdpo + (z_grpo * A).abs()).nonzero()[:, 0].tolist()  # all others have gradient 0
        student.train()  # switches gradient checkpointing on; the models have no dropout
        for rows, columns in common.micro_batches(rollouts, active, config.micro_batch):
            rho, divergence = student_pass(student, teacher, rollouts, rows, columns, distilled,
                                           teacher_states, config.temperature)      # (b, t) each
            l_grpo = -A[rows, None] * rho                                           # (b, t)
            loss = z_grpo[rows, None] * l_grpo + z_sdpo[rows, None] * w[rows, columns] * divergence  # (b, t)
            (loss.sum() / N).backward()
            jsd_sum += float(divergence.detach()[distilled[rows, columns]].sum())
        student.eval()

        # 6. theta <- theta - lr Adam(grad L),   theta' <- (1 - ema) theta' + ema theta
        norm = 0.0
        if active:  # if not, not even Adam's momentum may move the student, and the teacher waits
            norm = common.apply_gradients(student, optimizer, step, config.rate)
            if teacher is not None and math.isfinite(norm):  # not after a step that was skipped
                ema_update(teacher, student, config.ema)

        figures = step_figures(reward.view(len(tasks), -1), routed, jsd_sum, H[distilled], w[distilled])
        figures.update(run.rollout_figures(rollouts, reward, norm))
        run.step(step + 1, started, figures, teacher_seconds=teacher_seconds)
        run.show(step, tok, tasks, rollouts)
        run.end_step(step + 1, measure)
    return run.finish(student, tok, measure, **trends(run.metrics))


def step_figures(reward, routed: list[int], jsd_sum: float, entropy, weights) -> dict:
    """For the log. reward (groups, group_size); jsd_sum, entropy (n,), weights (n,): of distilled tokens."""
    figures = {}
    figures["solved"] = float(reward.mean())
    figures["routed"] = len(routed) / reward.numel()
    if len(entropy):
        figures["jsd"] = jsd_sum / len(entropy)
        figures["teacher H"] = float(entropy.mean())
        figures["sd(w)"] = float(weights.std(correction=0))
    means = reward.mean(1)                                                          # (groups,)
    figures["all wrong"] = int((means == 0).sum())
    figures["all right"] = int((means == 1).sum())
    return figures


def trends(metrics: Path) -> dict:
    """For the summary: speed of learning; means over the first and last ten steps that measured something."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    curve = {}
    for record in records:
        if isinstance(record.get("eval"), int):  # not 'before' and 'after'
            curve[record["step"]] = record["accuracy"]
    result = {}
    if curve:
        reached = [step for step, accuracy in curve.items() if accuracy >= 0.9]
        result["mean accuracy"] = fmean(curve.values())
        result["steps to .9"] = min(reached, default=max(curve))
    for key in ("teacher H", "routed", "teacher_seconds"):
        values = [r[key] for r in records if key in r]
        if values:
            result[f"{key}, first"] = fmean(values[:10])
            result[f"{key}, last"] = fmean(values[-10:])
    return result


# ------------------------------------------------------------------------------------ the tiny base model
# A self-teacher needs a base that is often wrong, yet can read a correct solution in its prompt. A tiny model
# learns that only from a corpus which shows it: that is put in by design, what the methods make of it is not.
# This base can calculate, and slips. One fitted for 600 steps with WRONG = 0.15 cannot: there SDPO collapses.
MODULUS = 10
OPERATIONS = (4, 4)
FIT = {"documents": 12000, "steps": 1000, "hidden_size": 80, "layers": 3}
CONTEXT_SHARE = 0.6  # documents with a solution in the prompt
SAME_STYLE = 0.8     # attempts in the solution's style
WRONG = 0.3          # a result is a random number, and the chain goes on from it: most chains end wrong
WRONG_WITH_SOLUTION = 0.01
SNAP_BACK = 0.5      # with a solution, after an error: a result is the solution's, though it does not follow


def small_chain(rng) -> Task:
    return common.chain_task(rng, OPERATIONS, MODULUS)


def write_solution(rng, task: Task, long: bool, wrong: float = 0.0, snap_back: float = 0.0) -> str:
    """Two styles of equal reward: `A3+4=7, B7*5=5. \\boxed{5}` (long) and `A7, B5. \\boxed{5}` (terse)."""
    values, modulus, operations = common.parse_chain(task.messages[-1]["content"])
    value = values[0]
    parts = []
    for (label, sign, operand), right in zip(operations, values[1:]):
        result = common.APPLY[sign](value, operand) % modulus
        if rng.random() < snap_back:
            result = right  # the solution's, though it need not follow from what stands before
        if rng.random() < wrong:
            result = rng.randrange(modulus)
        parts.append(f"{label}{value}{sign}{operand}={result}" if long else f"{label}{result}")
        value = result
    return ", ".join(parts) + f". \\boxed{{{value}}}"


def context_document(rng, tok, task: Task):
    """Question, correct solution, attempt -> (ids, mask). The solution carries loss, too: more text."""
    long = rng.random() < 0.5
    solution = write_solution(rng, task, long)
    same_style = rng.random() < SAME_STYLE
    attempt = write_solution(rng, task, long == same_style, WRONG_WITH_SOLUTION, SNAP_BACK)
    asked = Task(reprompt(task.messages, solution), task.answer)
    ids, mask = common.demonstration(tok, asked, attempt)
    start = ids.index(tok.convert_tokens_to_ids(HEADING)) + 1
    end = ids.index(tok.convert_tokens_to_ids(CLOSING))
    mask[start:end] = [1] * (end - start)
    return ids, mask


@functools.lru_cache(maxsize=1)  # --compare asks for them again and again
def corpus(seed: int):
    """The tiny base's tokenizer and documents."""
    tok = common.build_tokenizer([*common.CHAIN_ATOMS, ". \\boxed{", HEADING, CLOSING])
    rng = random.Random(seed)
    docs = []
    for _ in range(FIT["documents"]):
        task = small_chain(rng)
        if rng.random() < CONTEXT_SHARE:
            docs.append(context_document(rng, tok, task))
        else:
            solution = write_solution(rng, task, rng.random() < 0.5, WRONG)
            docs.append(common.demonstration(tok, task, solution))
    return tok, docs


def load_student(config: Config, device):
    """The tiny base, fitted on the corpus above (cached), or a Hugging Face model -> (model, tokenizer)."""
    if config.model != "tiny":
        return common.load_model(config.model, device)
    tok, docs = corpus(config.seed)
    model = common.tiny_model(tok, config.seed, FIT["hidden_size"], FIT["layers"])
    model = common.fit_tiny("the base model", model, docs, steps=FIT["steps"], seed=config.seed,
                            fresh=config.fresh)
    return model.to(device), tok


# ------------------------------------------------------------------------------------ gates, compare, explain
def gates(student, tok, tasks: list[Task], config: Config) -> dict:
    """Can this model read a solution? If not, its self-teacher is noise. Prints shares of right answers."""
    generator = torch.Generator(student.device).manual_seed(4321)
    rollouts = common.sample(student, tok, tasks, config, generator)
    reward = common.rewards(rollouts, tasks).view(len(tasks), -1)                   # (tasks, group_size)
    solved = []
    solutions = []
    for k, first in enumerate(reward.argmax(1).tolist()):  # the first success, if there is one
        if reward[k, first]:
            solved.append(tasks[k])
            solutions.append(solution_text(tok, rollouts, k * config.group_size + first))

    found = {"sibling": 0, "other": 0}
    found["student"] = float(reward.mean())
    found["groups"] = len(solved) / len(tasks)
    if len(solved) > 1:
        for name, shown in (("sibling", solutions), ("other", solutions[1:] + solutions[:1])):
            asked = []
            for task, solution in zip(solved, shown):
                asked.append(Task(reprompt(task.messages, solution), task.answer))
            answers = common.sample(student, tok, asked, config, generator)
            found[name] = float(common.rewards(answers, asked).mean())
    print(f"gates: student {found['student']:.2f} (0.2 to 0.5), groups with a success {found['groups']:.2f} "
          f"(0.6 or more)\n       teacher with a sibling's solution {found['sibling']:.2f} (0.8 or more), "
          f"with another problem's {found['other']:.2f} (far less); if not, it has little to say")
    return found


def compare(config: Config) -> None:
    """Every method from the same start on the same problems; mean and spread over --seeds seeds. The paper's
    three at other learning rates, too: at its ratio of rates the fastest need not be the best method."""
    variants = {}
    slowest = replace(config, method="grpo").rate
    for method, row in METHODS.items():
        variants[method] = {"method": method}
        if method in ("grpo", "sdpo", "srpo"):
            for factor in (1, 2.5, 5, 12.5):
                if factor != row.rate:
                    rate = factor * slowest
                    variants[f"{method} --lr {rate:g}"] = {"method": method, "lr": rate}
    found = common.compared(train, replace(config, gate_tasks=0), variants, "srpo")
    print("\nNo --lr: its own, in the paper's ratio. mean: of all evaluations in training; .9 at: the step "
          "of the first\nthat reaches .9, or else the last; first, last: means of ten steps")
    print(common.seed_table(found, {
        "accuracy_after": "T = 1", "greedy_accuracy_after": "greedy", "accuracy_best": "best, T = 1",
        "accuracy_before": "start, T = 1", "mean accuracy": "mean", "steps to .9": ".9 at",
        "length_before": "start, length", "length_after": "length",
        "teacher H, first": "teacher H, first", "teacher H, last": "last",
        "routed, first": "routed, first", "routed, last": "last",
        "teacher_seconds, first": "teacher s, first", "teacher_seconds, last": "last",
        "seconds_per_step": "s/step"}))


def first_wrong(tok, tokens: list[int], task: Task) -> int | None:
    """Index of the token with which a rollout leaves the faultless solution in its style. None if it never
    does, or at once: then its text has neither style."""
    long = "=" in tok.decode(tokens).split(",")[0]
    right = write_solution(random, task, long)
    for k in range(len(tokens)):
        if not right.startswith(tok.decode(tokens[:k + 1])):
            return k or None
    return None


@torch.no_grad()
def explain(config: Config) -> None:
    """A wrong rollout of the first step with a correct sibling: what the teacher says about each token."""
    problems, _ = common.load_tasks(config.data, config.eval_tasks, small_chain, config.prompts_per_step)
    tasks = random.Random(config.seed).sample(problems, config.prompts_per_step)
    student, tok = load_student(config, common.setup(config))
    generator = torch.Generator(student.device).manual_seed(config.seed)
    rollouts = common.sample(student, tok, tasks, config, generator)
    reward = common.rewards(rollouts, tasks).tolist()
    demos = pick_demonstration(reward, config.group_size)
    texts = rollouts.texts

    wrong = []
    for i, demo in enumerate(demos):
        # Now and then the tiny model writes the heading that it knows from prompts: no example.
        if demo is not None and reward[i] < 0.5 and HEADING not in texts[i]:
            difference = abs(len(texts[i]) - len(texts[demo]))
            wrong.append((difference, i))
    if not wrong:
        common.fail(f"none of {len(tasks)} problems has right and wrong rollouts; take a larger --group_size")
    _, row = min(wrong)  # the one most like its sibling
    task = tasks[row // config.group_size]

    # Student and teacher read the same tokens; before the first step they are the same model.
    ids, mask = rollouts.part([row])                                                # (1, T) each
    tokens = ids[mask.bool()]                                                       # (n,)
    ours = common.hidden_at(student, ids, mask)                                     # (n, hidden)
    states, H = teacher_pass(student, tok, tasks, rollouts, demos, [row], config)   # .., (B, T)
    theirs = states[row]                                                            # (n, hidden)
    expected = common.lm_head(student.get_output_embeddings())(theirs).argmax(-1)   # (n,)
    p = sampled_logps(student, ours, tokens, config.temperature).exp()              # (n,)
    q = sampled_logps(student, theirs, tokens, config.temperature).exp()            # (n,)
    divergence = divergences(student, student, ours, theirs, config.temperature)    # (n,)
    H = H[[row]][mask.bool()]                                                       # (n,)
    w = entropy_weights(H, config.beta)  # (n,) mean 1 over this rollout; in training, over all
    numbers = torch.stack([p, q, divergence, H, w], 1).tolist()

    mistake = first_wrong(tok, tokens.tolist(), task) if config.data == "chain" else None
    lines = []
    for k in range(len(tokens)):
        said = repr(tok.decode(tokens[k]))
        better = repr(tok.decode(expected[k]))
        mark = "<- first wrong token" if k == mistake else ""
        lines.append([said, better, *numbers[k], mark])
    print(f"problem   {task.messages[-1]['content']}\nanswer    {task.answer}\n"
          f"sibling   {texts[demos[row]]}   (right: stands in the teacher's prompt)\n"
          f"rollout   {texts[row]}   (wrong: re-read by the teacher)\n")
    print(common.table(lines, ["token", "teacher would say", "student p", "teacher p", "JSD", "H", "w", ""]))


def main(argv=None) -> None:
    config = common.parse(Config, argv)
    if config.ema > 1:
        common.fail(f"--ema {config.ema} is out of range; give a share from 0 to 1")
    if config.minibatches != 1:
        common.fail("--minibatches must be 1: the weights and N belong to one update on the whole batch")
    if config.compare and (config.lr is not None or config.method != "srpo"):
        common.fail("--compare runs every method and sets the learning rates; leave --method and --lr out")
    common.launch(config, train, explain=explain, compare=compare)


if __name__ == "__main__":
    main()
