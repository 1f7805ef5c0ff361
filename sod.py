"""SOD: step-wise on-policy distillation of a tool-using small model (arXiv 2605.07725).

    python sod.py                         the whole experiment on a tiny Qwen3, CPU, a few minutes
    python sod.py --compare --seeds 3     every method and ablation from the same start, one table
    python sod.py --cascade               where student and teacher part, step by step
    python sod.py --model Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-4B --data openai/gsm8k --tool python    one GPU

The method:
1. The student writes turns and tool calls; the tool answers; it goes on. Its own tokens are the loss mask.
   One turn, a contiguous run of them, is a *step*.
2. On-policy distillation (OPD): a teacher scores every token that the student sampled; teacher minus student
   log-prob is the token's advantage, in addition to GRPO's outcome advantage.
3. After a bad tool call the student is in a place the teacher has never seen. There the two disagree most:
   plain OPD listens most where the teacher knows least.
4. So SOD measures the disagreement of each step, d_k, and weighs the step by d_1 / d_k, at most 1 + delta.
5. Everything else is GRPO: one clipped policy loss on the sum of the two advantages.

Where the equations are: Eq. 2 `common.group_advantages`, Eq. 3 `common.policy_loss`, Eq. 6 `step_divergence`,
Eq. 7 `step_weights`, Eq. 8-10 `sod_advantages`.

| | paper and its code | default here |
| --- | --- | --- |
| student, teacher | Qwen3-0.6B or 1.7B, Qwen3-4B; both SFT, teacher then GRPO | tiny Qwen3s, the same way |
| tool | Python sandbox | calculator that times out on 10 % of the calls; --tool python |
| prompts x rollouts, updates a batch | 64 x 16, 4 | 8 x 8, 1 (--minibatches) |
| learning rate | 1e-6 | 3e-4 (tiny), 1e-6 (others) |
| delta, epsilon, coefficient of OPD | 0.2, 1e-6, 1 | the same |
| loss | Eq. 9-10: two; code: one on the summed advantage, clip 0.2/0.28, dual clip 3 | as the code |
| reward | +1 / -1.1 (the code's bonus for tool calls never fires) | 1 / 0; normalised by group, the same |

Left out: distributed training, the sandbox service, overlong penalty, the gated OPD that the code never uses.

Built into the toy, by hand, is the paper's premise: the student's demonstrations contain errors (`STUDENT`),
more of them after a first one; the teacher's contain no time-out. --teacher_knows_timeouts takes it away;
--skill_gap adds a second premise, a skill that only the teacher has.
"""
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import random
import time
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch

import common
from common import BAD_EXPRESSION, Task, Tool, option


@dataclass
class Config(common.Config):
    tiny_tokens: ClassVar[int] = 160
    method: Literal["sod", "grpo", "opd", "opd_grpo", "sft", "decay", "mask_after_error", "no_cap",
                    "sod_no_grpo"] = option("sod", "SOD, a baseline or an ablation, all on the same loop")
    teacher: str = option("tiny", "'tiny', a Hugging Face id or a folder; must share the student's tokenizer")
    tool: Literal["calculator", "python"] = option("calculator", "what the student may call")
    steps: int = option(100, "training steps")
    eval_tasks: int = option(400, "held-out problems")
    delta: float = option(0.2, "cap of a step's weight: 1 + delta")
    coefficient: float = option(1.0, "of the distillation advantage")
    timeout_rate: float | None = option(None, "share of calls that time out; not given = 0.1 on the chain")
    teacher_knows_timeouts: bool = option(False, "the tiny teacher has seen time-outs and repeats the call")
    skill_gap: float = option(0.0, "share of the tiny student's * that it was taught to call as +")
    compare: bool = option(False, "run --methods on --seeds seeds and print one table")
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={
        "help": "for --compare; not given = all"})
    seeds: int = option(3, "seeds for --compare, from --seed on")
    cascade: bool = option(False, "print divergence, weight and teacher reliability by step; no training")
    explain: bool = option(False, "print one rollout of the student token by token, before any training")

    def __post_init__(self):
        super().__post_init__()
        if self.timeout_rate is None:
            self.timeout_rate = 0.1 if self.data == "chain" else 0.0


# ------------------------------------------------------------------------------------ the equations
def step_divergence(logps, teacher_logps, steps) -> list[float]:
    """d_k of one trajectory. logps, teacher_logps (T,); steps: [start, end) columns of its turns."""
    # Eq. 6: d_k = 1/|I_k| sum_{t in I_k} |s_t - q_t|    the absolute value is inside: signs must not cancel
    gap = (logps - teacher_logps).abs()                                             # (T,)
    return [float(gap[start:end].mean()) for start, end in steps]


def step_weights(d: list[float], delta: float = 0.2, epsilon: float = 1e-6) -> list[float]:
    """w_k of one trajectory from its d_k."""
    weights, product = [], 1.0
    for k, d_k in enumerate(d):
        if k > 0:
            product *= (d[k - 1] + epsilon) / (d_k + epsilon)
        # Eq. 7: w_1 = 1,  w_k = min( prod_{u<k} (d_u + eps) / (d_{u+1} + eps), 1 + delta )
        # Only the result is capped: the product telescopes, w_k = min((d_1 + eps) / (d_k + eps), 1 + delta).
        weights.append(min(product, 1 + delta))
    return weights


# Rules for the weights of one trajectory's steps; first_error: the index of its first failed call.
def uniform(d, first_error, delta): return [1.0] * len(d)
def divergence_ratio(d, first_error, delta): return step_weights(d, delta)
def no_cap(d, first_error, delta): return step_weights(d, math.inf)
def decay(d, first_error, delta): return [0.9 ** max(0, k - first_error) for k in range(len(d))]
def mask_after_error(d, first_error, delta): return [float(k <= first_error) for k in range(len(d))]


# method: (weight of each step, coefficient of the GRPO advantage, coefficient of the distillation advantage)
METHODS = {
    "sft": (uniform, 0, 0),  # no training: the cold start itself
    "grpo": (uniform, 1, 0),
    "opd": (uniform, 0, 1),
    "opd_grpo": (uniform, 1, 1),  # what the paper's main table calls OPD
    "sod": (divergence_ratio, 1, 1),
    "sod_no_grpo": (divergence_ratio, 0, 1),
    "no_cap": (no_cap, 1, 1),
    "decay": (decay, 1, 1),
    "mask_after_error": (mask_after_error, 1, 1),
}


def token_weights(logps, teacher_logps, steps, tool_status, rule, delta: float = 0.2):
    """Every token gets its step's weight, tokens the student did not write get 0: (B, T)."""
    weights = torch.zeros_like(logps)                                               # (B, T)
    for i, spans in enumerate(steps):
        # A trajectory without a failed call gets an index behind its last step: no rule then acts on it.
        first_error = next((k for k, s in enumerate(tool_status[i]) if s in ("error", "timeout")), len(spans))
        d = step_divergence(logps[i], teacher_logps[i], spans)
        for (start, end), w in zip(spans, rule(d, first_error, delta)):
            weights[i, start:end] = w
    return weights


def sod_advantages(outcome, logps, teacher_logps, weights, mask, grpo: float = 1.0, coefficient: float = 1.0):
    """outcome (B,), the others (B, T) -> advantages (B, T), detached.

    The paper prints Eq. 9 as a loss in log pi. Differentiated on sampled tokens that would drop the teacher
    and have zero expected gradient; as an advantage it is the score-function form of KL(student || teacher).
    """
    # Eq. 8-10 in advantage form: A_t = A_outcome + c * w_k(t) * (q_t - s_t)
    return ((grpo * outcome[:, None] + coefficient * weights * (teacher_logps - logps)) * mask).detach()


# ------------------------------------------------------------------------------------ the toy world
# The boilerplate of a call is two tokens, a call five, a whole turn with its phrase nine.
OPEN, CLOSE = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "(', ')%10"}}\n</tool_call>'
CALCULATOR, TIMED_OUT = common.TOOLS["calculator"], "error: timed out"
FIRST, SECOND = ("OK, ", "So, ", "Now, ", "Then, "), ("we get ", "we have ", "we do ", "we take ")
# Rates of errors a turn, factor on them once something went wrong, what follows an error, habits of phrase.
STUDENT = dict(malformed=.08, operand=.05, start=.04, skip=.04, copy=.08, worse=1.5, retry=.5, redo=.2,
               phrase=(.35, .3, .2, .15))
TEACHER = dict(malformed=.01, operand=.01, start=.01, skip=.005, copy=.01, worse=1., retry=1., redo=1.,
               phrase=(.2, .2, .3, .3))


@functools.cache
def build_tokenizer():
    schema = json.dumps(CALCULATOR.schema)
    return common.build_tokenizer([*common.CHAIN_ATOMS, *FIRST, *SECOND, OPEN, CLOSE, schema,
                                   BAD_EXPRESSION, TIMED_OUT])


def flaky(tool: Tool, rate: float, rng) -> Tool:
    """The same tool, but a call times out with probability `rate`, whatever it asks."""
    def run(arguments):
        return (TIMED_OUT, "timeout") if rng.random() < rate else tool.run(arguments)
    return dataclasses.replace(tool, run=run, workers=1 if rate else tool.workers)


def call_text(label: str, expression: str) -> str:
    return f"{label}{OPEN}{expression}{CLOSE}"


def demonstrate(rng, task: Task, habits: dict, tool: Tool, max_turns: int = 8, gap: float = 0.0):
    """A demonstration [(turn, tool's answer or None), ...], with errors and recoveries as in `habits`; with
    probability `gap` a * is called as +, and as nothing seems wrong, it is not called again."""
    (value, *_), modulus, steps = common.parse_chain(task.messages[-1]["content"])
    turns, k, worse = [], 0, 1.0

    def slip(kind):
        return rng.random() < habits[kind] * worse

    while len(turns) < max_turns:
        phrase = rng.choices(FIRST, habits["phrase"])[0] + rng.choices(SECOND, habits["phrase"])[0]
        if k >= len(steps):
            turns.append((phrase + f"\\boxed{{{rng.randrange(modulus) if slip('copy') else value}}}", None))
            break
        at = k + 1 if slip("skip") and k + 1 < len(steps) else k
        label, operation, operand = steps[at]
        if operation == "*" and gap and rng.random() < gap:
            operation = "+"
        start = rng.randrange(modulus) if slip("start") else value
        other = rng.randrange(1, modulus) if slip("operand") else operand
        expression = f"{start}{operation}{'' if slip('malformed') else other}"
        wrong = (at, start, other) != (k, value, operand)
        answer, status = tool.run({"expression": f"({expression})%{modulus}"})
        turns.append((phrase + call_text(label, expression), answer))
        if status != "ok" or wrong:
            worse = habits["worse"]
            if rng.random() < habits["retry" if status != "ok" else "redo"]:
                continue  # the right recovery from any error: make the call again
        if status == "ok":
            value = int(answer)
        elif rng.random() < 0.5:
            value = rng.randrange(modulus)  # ignores the message, half of the time with an invented value
        k = at + 1
    return turns


def conversation(tok, task: Task, turns, tool: Tool) -> tuple[list[int], list[int]]:
    """Prompt and turns -> (ids, mask), assembled exactly as `common.rollout` does it."""
    ids = common.prompt_ids(tok, task.messages, tool)
    mask = [0] * len(ids)
    for text, answer in turns:
        said = [*common.encode(tok, text), common.end_of_turn(tok)]
        heard = [] if answer is None else common.tool_message_ids(tok, answer)
        ids, mask = ids + said + heard, mask + [1] * len(said) + [0] * len(heard)
    return ids, mask


@functools.cache  # --compare asks for the same corpus again and again
def demonstrations(tok, count: int, who: str, timeout_rate: float, seed: int, gap: float = 0.0):
    rng, habits = random.Random(seed), {"student": STUDENT, "teacher": TEACHER}[who]
    tool, tasks = flaky(CALCULATOR, timeout_rate, rng), [common.chain_task(rng) for _ in range(count)]
    return [conversation(tok, task, demonstrate(rng, task, habits, tool, gap=gap), tool) for task in tasks]


def load_student(config, device):
    """Cold start: the tiny student is fitted on faulty demonstrations; another model is taken as it is."""
    if config.model != "tiny":
        return common.load_model(config.model, device)
    tok = build_tokenizer()
    docs = demonstrations(tok, 8000, "student", config.timeout_rate, seed=1, gap=config.skill_gap)
    model = common.tiny_model(tok, seed=1)
    return common.fit_tiny("the student", model, docs, steps=800, fresh=config.fresh).to(device), tok


def load_teacher(config, tok, device):
    """The tiny teacher is fitted on nearly clean demonstrations and then improved with GRPO, as in the paper.
    Unless it `knows` them, there are no time-outs in either phase."""
    teacher, teacher_tok = None, build_tokenizer()
    if config.teacher != "tiny":
        teacher, teacher_tok = common.load_model(config.teacher, device, trainable=False)
    if tok.get_vocab() != teacher_tok.get_vocab():  # an id must mean the same to both
        common.fail("student and teacher have different tokenizers; take two models of one family")
    if teacher:
        return teacher
    rate = config.timeout_rate if config.teacher_knows_timeouts else 0.0
    docs = demonstrations(tok, 8000, "teacher", rate, seed=2)
    teacher = common.tiny_model(tok, seed=2, hidden_size=96)
    common.fit_tiny("the teacher", teacher, docs, steps=500, seed=2, fresh=config.fresh)
    weights = b"".join(p.detach().numpy().tobytes() for p in teacher.parameters())
    # The source of `improve` is in the key: a reader who edits it must get a new teacher.
    key = ["grpo", hashlib.sha256(weights).hexdigest(), rate, inspect.getsource(improve)]
    common.cached(teacher, key, lambda: improve(teacher, tok, rate), config.fresh)
    return teacher.to(device).requires_grad_(False)


def improve(model, tok, timeout_rate: float, steps: int = 40) -> None:
    """GRPO on the outcome alone, in place."""
    config = Config(prompts_per_step=8, group_size=8)  # fixed: the teacher ignores the student's flags
    rng, generator = random.Random(3), torch.Generator().manual_seed(3)
    tool = flaky(CALCULATOR, timeout_rate, rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.rate, weight_decay=0.0)
    for step in common.progress(range(steps), desc="GRPO for the teacher"):
        tasks = [common.chain_task(rng) for _ in range(config.prompts_per_step)]
        rollouts = common.rollout(model, tok, tasks, config.group_size, tool=tool,
                                  max_new_tokens=config.tiny_tokens, generator=generator)
        advantages = common.group_advantages(common.rewards(rollouts, tasks), config.group_size)
        common.update(model, optimizer, rollouts, advantages[:, None], config, step)


# ----------------------------------------------------------------------------------------- training
def train(config: Config) -> dict:
    """Rollouts with tool -> outcome advantage, teacher's scores of the same ids, step weights -> one loss."""
    device = common.setup(config)
    rule, grpo, distill = METHODS[config.method]
    train_tasks, held_out = common.load_tasks(config.data, config.eval_tasks, a_step=config.prompts_per_step)
    run = common.Run(config, "sod")
    student, tok = load_student(config, device)
    teacher = load_teacher(config, tok, device)
    rng, tool_rng = random.Random(config.seed), random.Random(config.seed)
    generator = torch.Generator(device).manual_seed(config.seed)
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.rate, weight_decay=0.0)
    tool = flaky(common.TOOLS[config.tool], config.timeout_rate, tool_rng)

    def measure():  # the same problems and dice for every method; a time-out hits the n-th call
        still = flaky(common.TOOLS[config.tool], config.timeout_rate, random.Random(0))
        return common.evaluate(student, tok, held_out, tool=still, **config.sampling)

    first = run.open_folder([student, optimizer], generator, rng, tool_rng)
    if not config.resume:
        run.evaluated("before", measure())
    for step in range(first, 0 if config.method == "sft" else config.steps):
        started = time.time()
        tasks = rng.sample(train_tasks, config.prompts_per_step)
        rollouts = common.rollout(student, tok, tasks, config.group_size, tool=tool, generator=generator,
                                  temperature=config.temperature, **config.sampling)
        common.rescore(student, rollouts, config)
        sampled = time.time()

        # Everything that enters the advantage is computed once per batch of rollouts and then frozen.
        logps, teacher_logps = rollouts.logps, rollouts.logps                       # (B, T)
        if distill:
            teacher_logps, _ = common.score(teacher, rollouts, config.temperature, config.micro_batch)
        reward = common.rewards(rollouts, tasks)                                    # (B,)
        outcome = common.group_advantages(reward, config.group_size)                # (B,)
        weights = token_weights(logps, teacher_logps, rollouts.turns, rollouts.tool_status, rule,
                                config.delta)                                       # (B, T)
        advantages = sod_advantages(outcome, logps, teacher_logps, weights, rollouts.mask, grpo,
                                    config.coefficient * distill)                   # (B, T)
        scored = time.time()
        norm = common.update(student, optimizer, rollouts, advantages, config, step)

        tokens, statuses = rollouts.mask.sum(), sum(rollouts.tool_status, [])
        failed = [status != "ok" for status in statuses if status != "none"]
        run.step(step + 1, started, {
            "solved": float(reward.mean()), "|A|": float(advantages.abs().sum() / tokens),
            "kl(teacher)": float(((logps - teacher_logps) * rollouts.mask).sum() / tokens),
            "weight": float(weights.sum() / tokens), "turns": len(statuses) / len(reward),
            "failed calls": float(np.mean(failed or [0])), **run.rollout_figures(rollouts, reward, norm)},
            rollout_seconds=sampled - started, score_seconds=scored - sampled)
        if config.show_every and step % config.show_every == 0:
            print(f"      {tasks[0].messages[-1]['content']}\n      > {common.transcript(tok, rollouts, 0)}")
        run.end_step(step + 1, measure)
    return run.finish(student, tok, measure)


def compare(config: Config) -> None:
    """Every method from the same start, with the same prompts; mean and spread over seeds."""
    found = common.compared(train, config, {m: {"method": m} for m in config.methods}, "sod")
    start = next(iter(found.values()))[0]
    print(f"\nstart: {start['accuracy_before']:.3f} at T = 1, {start['greedy_before']:.3f} greedy; "
          f"standard error of one {start['se']:.3f}")
    print(common.seed_table(found, {"accuracy_after": "T = 1", "accuracy_best": "best T = 1",
                                    "greedy_after": "greedy", "seconds_per_step": "seconds a step"}))


# ----------------------------------------------------------------------------------- looking inside
def oracle(task: Task, turns: list[str], statuses: list[str]):
    """Yields for each turn: what stands before it, whether it is right, and the right turn (always known).
    'tool error': the last trouble was an error message or a time-out; 'silent error': a wrong call that was
    answered; a right call that succeeds makes the prefix 'clean' again."""
    values, _, steps = common.parse_chain(task.messages[-1]["content"])
    rights = [call_text(label, f"{value}{operation}{operand}")
              for value, (label, operation, operand) in zip(values, steps)] + [f"\\boxed{{{values[-1]}}}"]
    k, prefix = 0, "clean"
    for turn, status in zip(turns, statuses):
        is_right = turn.endswith(rights[k])
        yield prefix, is_right, rights[k]
        if is_right and status == "ok":
            k, prefix = k + 1, "clean"
        else:
            prefix = "tool error" if status in ("error", "timeout") else "silent error"


@torch.no_grad()
def teacher_is_right(teacher, tok, prefixes, rights, batch: int = 128) -> list[bool]:
    """Would the teacher, greedily, write exactly `right` after the prefix? Teacher-forced: one pass."""
    verdicts, head = [], teacher.get_output_embeddings()
    for i in range(0, len(prefixes), batch):
        said = [common.encode(tok, r) for r in rights[i:i + batch]]
        pairs = list(zip(prefixes[i:i + batch], said))
        ids = common.padded([p + s for p, s in pairs], tok.pad_token_id, device=teacher.device)       # (b, T)
        mask = common.padded([[0] * len(p) + [1] * len(s) for p, s in pairs], 0, device=teacher.device)
        hidden, target = common.hidden_at(teacher, ids, None, mask), ids[mask.bool()]    # (N, H), (N,)
        hits = common.over_vocab_chunks(hidden, head, lambda logits, t: logits.argmax(1) == t, target)
        verdicts += [bool(h.all()) for h in hits.split([len(s) for s in said])]
    return verdicts


def look(config: Config, count: int):
    """Before any training: teacher, tokenizer, problems, rollouts, the teacher's log-probs and entropies."""
    device, (_, tasks) = common.setup(config), common.load_tasks(config.data, count)
    student, tok = load_student(config, device)
    teacher, generator = load_teacher(config, tok, device), torch.Generator(device).manual_seed(config.seed)
    tool = flaky(common.TOOLS[config.tool], config.timeout_rate, random.Random(config.seed))
    rollouts = common.rollout(student, tok, tasks, tool=tool, generator=generator,
                              temperature=config.temperature, **config.sampling)
    return teacher, tok, tasks, rollouts, *common.score(teacher, rollouts, config.temperature)


def step_records(config: Config, count: int) -> list[dict]:
    """One record a step: prefix, is it right, d, w, teacher's entropy H, is the teacher right."""
    teacher, tok, tasks, rollouts, teacher_logps, teacher_entropy = look(config, count)
    records, prefixes, rights = [], [], []
    for i, task in enumerate(tasks):
        spans, row = rollouts.turns[i], rollouts.ids[i].tolist()
        turns = [tok.decode(row[a:b], skip_special_tokens=True) for a, b in spans]
        d = step_divergence(rollouts.logps[i], teacher_logps[i], spans)
        w = step_weights(d, config.delta)
        pad = int(rollouts.attention_mask[i].argmax())  # column of the first real token
        for k, (prefix, is_right, right) in enumerate(oracle(task, turns, rollouts.tool_status[i])):
            a, b = spans[k]
            records.append(dict(i=i, k=k, prefix=prefix, right=is_right, d=d[k], w=w[k],
                                H=float(teacher_entropy[i, a:b].mean())))
            prefixes.append(row[pad:a + 2])  # with the student's phrase (2 tokens), no part of `right`
            rights.append(right)
    verdicts = teacher_is_right(teacher, tok, prefixes, rights)
    return [{**record, "teacher": verdict} for record, verdict in zip(records, verdicts)]


def cascade(config: Config, count: int = 500) -> None:
    """The paper's Figure 1 in miniature: what a wrong call does to divergence, weight, teacher. A wrong first
    call is a case of its own: it raises d_1, against which all later steps are measured."""
    if config.data != "chain":
        common.fail("--cascade needs to know the right call at every step, so it works on --data chain only")
    records = step_records(config, count)
    wrong = {r["i"]: r["k"] for r in reversed(records) if not r["right"]}  # trajectory -> first wrong step
    groups = {"clean": {r["i"] for r in records} - set(wrong),
              **{f"wrong call at step {n}": {i for i, k in wrong.items() if k == n - 1} for n in (1, 2)}}

    def mean(key, selected) -> str:
        return f"{np.mean([r[key] for r in selected]):.2f}" if selected else "-"

    names = {"d": "d_k", "H": "teacher entropy", "w": "w_k", "teacher": "teacher's own call right"}
    rows = [[f"{name}, {group}", *(mean(key, [r for r in records if r["i"] in members and r["k"] == k])
                                   for k in range(7))]
            for key, name in names.items() for group, members in groups.items()]
    sizes = ", ".join(f"{group}: {len(members)}" for group, members in groups.items())
    print(f"\nby step, mean over trajectories ({sizes} of {count}; clean = every call right)")
    print(common.table(rows, ["", *(f"step {k + 1}" for k in range(7))]))
    rows = []
    for prefix in ("clean", "tool error", "silent error"):
        later = [r for r in records if r["prefix"] == prefix and r["k"] > 0]
        rows.append([prefix, len(later), *(mean(key, later) for key in ("teacher", "right", "d", "H", "w"))])
    head = ["prefix", "steps", "teacher right", "student right", "d_k", "teacher entropy", "w_k"]
    print("\nby what stands before the step (steps 2, 3, ...)\n" + common.table(rows, head))


def explain(config: Config) -> None:
    """One rollout token by token: the distillation part (the outcome advantage would need a group)."""
    _, tok, tasks, rollouts, teacher_logps, teacher_entropy = look(config, 8)
    status, steps, rows = rollouts.tool_status, rollouts.turns, []
    i = max(range(len(tasks)), key=lambda j: len(set(status[j])) + len(steps[j]) / 100)  # an eventful one
    rule, _, _ = METHODS[config.method]
    weights = token_weights(rollouts.logps, teacher_logps, steps, status, rule, config.delta)   # (B, T)
    for t in range(rollouts.prompt_length, len(rollouts.ids[i])):
        token = repr(tok.decode([int(rollouts.ids[i, t])]))[:34]
        s, q, h, w = (float(x[i, t]) for x in (rollouts.logps, teacher_logps, teacher_entropy, weights))
        if rollouts.mask[i, t]:
            rows.append([token, "sampled", s, q, h, w, w * (q - s)])
        elif rollouts.attention_mask[i, t]:
            rows.append([token, "given", *[""] * 5])
    print(tasks[i].messages[-1]["content"])
    print(common.table(rows, ["token", "", "student", "teacher", "entropy", "weight", "w(q-s)"]))


def main(argv=None) -> None:
    config = common.parse(Config, argv)
    if unknown := set(config.methods) - set(METHODS):
        common.fail(f"--methods {' '.join(sorted(unknown))}: unknown; choose from {', '.join(METHODS)}")
    common.launch(config, "sod", train, cascade=cascade, explain=explain, compare=compare)


if __name__ == "__main__":
    main()
