"""SOD: step-wise on-policy distillation of a tool-using small model (arXiv 2605.07725).

    python sod.py                         the whole experiment on a tiny Qwen3, CPU, a few minutes
    python sod.py --compare --seeds 3     every method and ablation from the same start, one table
    python sod.py --explain               one rollout, token by token
    python sod.py --model Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-4B --data openai/gsm8k --tool python \\
                  --rows_at_once 64 --micro_batch 8                                         one GPU

What happens in a training step:
1. The student writes turns and tool calls; the tool answers; it goes on. Its own tokens are the loss mask.
   One turn, a contiguous run of them, is what the paper calls a *step*.
2. GRPO: a rollout is rewarded with 0 or 1; its outcome advantage says how it did beside its group.
3. On-policy distillation (OPD): a teacher scores every token that the student sampled. Teacher minus student
   log-prob is the token's own advantage.
4. After a bad tool call the student is in a place the teacher has never seen. There the two disagree most:
   plain OPD listens most where the teacher knows least. So SOD measures the disagreement of each turn, d_k,
   and weighs the turn by d_1 / d_k, at most 1 + delta.
5. The rest is GRPO: one clipped policy loss on the sum of the two advantages.

Where the equations are: Eq. 2 `common.group_advantages`, Eq. 3 `common.policy_loss`, Eq. 6 `step_divergence`,
Eq. 7 `step_weights`, Eq. 8-10 `train`.

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
from typing import ClassVar

import torch

import common
from common import BAD_EXPRESSION, Task, Tool, option


# ------------------------------------------------------------------------------------ the equations
def step_divergence(logps, teacher_logps, turns: list[tuple[int, int]]) -> list[float]:
    """d_k of one rollout. logps, teacher_logps (T,); turns: their [start, end) columns."""
    # Eq. 6: d_k = 1/|I_k| sum_{t in I_k} |s_t - q_t|    the absolute value is inside: signs must not cancel
    gap = (logps - teacher_logps).abs()                                             # (T,)
    return [float(gap[start:end].mean()) for start, end in turns]


def step_weights(d: list[float], delta: float = 0.2, epsilon: float = 1e-6) -> list[float]:
    """w_k of one rollout from its d_k."""
    weights = []
    product = 1.0
    for k, d_k in enumerate(d):
        if k > 0:
            product *= (d[k - 1] + epsilon) / (d_k + epsilon)
        # Eq. 7: w_1 = 1,  w_k = min( prod_{u<k} (d_u + eps) / (d_{u+1} + eps), 1 + delta )
        # Only the result is capped: the product telescopes, w_k = min((d_1 + eps) / (d_k + eps), 1 + delta).
        weights.append(min(product, 1 + delta))
    return weights


def first_failed_call(tool_status: list[str]) -> int:
    """Index of the first turn whose call failed. If none did, the number of turns: all come before it."""
    for k, status in enumerate(tool_status):
        if status in ("error", "timeout"):
            return k
    return len(tool_status)


# Rules: the d_k of one rollout, the index of its first failed call, --delta -> a weight for each turn.
def uniform(d: list[float], first_error: int, delta: float) -> list[float]:
    """Plain OPD: all turns alike."""
    return [1.0] * len(d)


def divergence_ratio(d: list[float], first_error: int, delta: float) -> list[float]:
    """SOD."""
    return step_weights(d, delta)


def no_cap(d: list[float], first_error: int, delta: float) -> list[float]:
    """SOD with delta = infinity: a turn may count any number of times as much as the first."""
    return step_weights(d, math.inf)


def decay(d: list[float], first_error: int, delta: float) -> list[float]:
    """0.9, 0.81, ... after the first failed call, whatever d_k is."""
    return [0.9 ** max(0, k - first_error) for k in range(len(d))]


def mask_after_error(d: list[float], first_error: int, delta: float) -> list[float]:
    """Nothing after the first failed call."""
    return [float(k <= first_error) for k in range(len(d))]


# method: (rule for the weights, coefficient of the GRPO advantage, coefficient of the distillation advantage)
# A rule of your own needs a function above, a row here, and nothing else.
METHODS = {
    "sod": (divergence_ratio, 1, 1),
    "opd_grpo": (uniform, 1, 1),  # what the paper's main table calls OPD
    "opd": (uniform, 0, 1),
    "grpo": (uniform, 1, 0),
    "sft": (uniform, 0, 0),  # no training: the cold start itself
}
METHODS |= {  # the ablations of the paper's Table 2
    "sod_no_grpo": (divergence_ratio, 0, 1),
    "no_cap": (no_cap, 1, 1),
    "decay": (decay, 1, 1),
    "mask_after_error": (mask_after_error, 1, 1),
}


@dataclass
class Config(common.Config):
    tiny_tokens: ClassVar[int] = 160
    method: str = option("sod", "SOD, a baseline or an ablation, all on the same loop", choices=METHODS)
    teacher: str = option("tiny", "'tiny', a Hugging Face id or a folder; must share the student's tokenizer")
    tool: str = option("calculator", "what the student may call", choices=common.TOOLS)
    steps: int = option(100, "training steps")
    eval_tasks: int = option(400, "held-out problems")
    delta: float = option(0.2, "cap of a turn's weight: 1 + delta")
    coefficient: float = option(1.0, "of the distillation advantage")
    timeout_rate: float | None = option(None, "share of calls that time out; not given = 0.1 on the chain")
    teacher_knows_timeouts: bool = option(False, "the tiny teacher has seen time-outs and repeats the call")
    skill_gap: float = option(0.0, "share of the tiny student's * that it was taught to call as +")
    compare: bool = option(False, "run every method on --seeds seeds and print one table")
    methods: list[str] = field(default_factory=list, metadata={"help": "only these rows of --compare"})
    seeds: int = option(3, "seeds for --compare, from --seed on")
    explain: bool = option(False, "print one rollout of the student token by token, before any training")

    def __post_init__(self):
        super().__post_init__()
        if self.timeout_rate is None:
            self.timeout_rate = 0.1 if self.data == "chain" else 0.0


# ------------------------------------------------------------------------------------ the toy world
# The boilerplate of a call is two tokens, a call five, a whole turn with its phrase nine.
OPEN = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "('
CLOSE = ')%10"}}\n</tool_call>'
CALCULATOR = common.TOOLS["calculator"]
TIMED_OUT = "error: timed out"
FIRST = ("OK, ", "So, ", "Now, ", "Then, ")
SECOND = ("we get ", "we have ", "we do ", "we take ")
STUDENT = {
    # Rates of errors a turn:
    "malformed": 0.08,  # the second operand is missing
    "operand": 0.05,    # another second operand
    "start": 0.04,      # another first operand
    "skip": 0.04,       # an operation is left out
    "copy": 0.08,       # another last answer
    "worse": 1.5,       # factor on these rates once something went wrong
    # Probability that the same call is made again:
    "retry": 0.5,       # after an error message or a time-out
    "redo": 0.2,        # after a wrong call that was answered
    "phrase": (0.35, 0.3, 0.2, 0.15),  # how often it says each of FIRST, and of SECOND
}
TEACHER = {
    "malformed": 0.01,
    "operand": 0.01,
    "start": 0.01,
    "skip": 0.005,
    "copy": 0.01,
    "worse": 1.0,
    "retry": 1.0,
    "redo": 1.0,
    "phrase": (0.2, 0.2, 0.3, 0.3),
}


@functools.cache
def build_tokenizer():
    schema = json.dumps(CALCULATOR.schema)
    own = [*FIRST, *SECOND, OPEN, CLOSE, schema, BAD_EXPRESSION, TIMED_OUT]
    return common.build_tokenizer(common.CHAIN_ATOMS + own)


def flaky(tool: Tool, rate: float, rng: random.Random) -> Tool:
    """The same tool, but a call times out with probability `rate`, whatever it asks."""
    def run(arguments: dict) -> tuple[str, str]:
        if rng.random() < rate:
            return TIMED_OUT, "timeout"
        return tool.run(arguments)

    workers = 1 if rate else tool.workers  # threads would draw from `rng` in any order
    return dataclasses.replace(tool, run=run, workers=workers)


def call_text(label: str, expression: str) -> str:
    return f"{label}{OPEN}{expression}{CLOSE}"


def demonstrate(rng: random.Random, task: Task, habits: dict, tool: Tool, max_turns: int = 8,
                gap: float = 0.0) -> list[tuple[str, str | None]]:
    """A demonstration [(turn, tool's answer or None), ...], with errors and recoveries as in `habits`; with
    probability `gap` a * is called as +, and as nothing seems wrong, it is not called again."""
    values, modulus, operations = common.parse_chain(task.messages[-1]["content"])
    value = values[0]
    turns = []
    worse = 1.0
    k = 0  # the operation to do next

    def slip(kind: str) -> bool:
        return rng.random() < habits[kind] * worse

    while len(turns) < max_turns:
        phrase = rng.choices(FIRST, habits["phrase"])[0] + rng.choices(SECOND, habits["phrase"])[0]
        if k >= len(operations):
            answer = rng.randrange(modulus) if slip("copy") else value
            turns.append((f"{phrase}\\boxed{{{answer}}}", None))
            break

        # The call, as it should be but for the slips.
        skips = slip("skip") and k + 1 < len(operations)
        at = k + 1 if skips else k
        label, operation, operand = operations[at]
        if operation == "*" and gap and rng.random() < gap:
            operation = "+"
        start = rng.randrange(modulus) if slip("start") else value
        other = rng.randrange(1, modulus) if slip("operand") else operand
        wrong = (at, start, other) != (k, value, operand)
        written = "" if slip("malformed") else other
        expression = f"{start}{operation}{written}"
        answer, status = tool.run({"expression": f"({expression})%{modulus}"})
        turns.append((phrase + call_text(label, expression), answer))

        # What it makes of the tool's answer.
        failed = status != "ok"
        if failed or wrong:
            worse = habits["worse"]
            again = habits["retry"] if failed else habits["redo"]
            if rng.random() < again:
                continue  # the right recovery from any error: make the call again
        if not failed:
            value = int(answer)
        elif rng.random() < 0.5:
            value = rng.randrange(modulus)  # ignores the message, half of the time with an invented value
        k = at + 1
    return turns


def conversation(tok, task: Task, turns: list, tool: Tool) -> tuple[list[int], list[int]]:
    """Prompt and turns -> (ids, mask), assembled exactly as `common.rollout` does it."""
    ids = common.prompt_ids(tok, task.messages, tool)
    mask = [0] * len(ids)
    for text, answer in turns:
        sampled = common.encode(tok, text) + [common.end_of_turn(tok)]
        given = [] if answer is None else common.tool_message_ids(tok, answer)
        ids += sampled + given
        mask += [1] * len(sampled) + [0] * len(given)
    return ids, mask


@functools.lru_cache(maxsize=2)  # --compare asks for the same corpus again and again
def demonstrations(tok, count: int, who: str, timeout_rate: float, seed: int, gap: float = 0.0) -> list:
    habits = {"student": STUDENT, "teacher": TEACHER}[who]
    rng = random.Random(seed)
    tool = flaky(CALCULATOR, timeout_rate, rng)
    tasks = [common.chain_task(rng) for _ in range(count)]
    docs = []
    for task in tasks:
        turns = demonstrate(rng, task, habits, tool, gap=gap)
        docs.append(conversation(tok, task, turns, tool))
    return docs


def load_student(config: Config, device: torch.device):
    """Cold start: the tiny student is fitted on faulty demonstrations; another model is taken as it is."""
    if config.model != "tiny":
        return common.load_model(config.model, device)
    tok = build_tokenizer()
    seed = 2 * config.seed + 1
    docs = demonstrations(tok, 8000, "student", config.timeout_rate, seed, gap=config.skill_gap)
    model = common.tiny_model(tok, seed)
    model = common.fit_tiny("the student", model, docs, steps=400, seed=seed, fresh=config.fresh)
    return model.to(device), tok


def load_teacher(config: Config, tok, device: torch.device):
    """The frozen teacher, which must read the student's ids: `tok` is the student's tokenizer."""
    if config.teacher == "tiny":
        teacher_tok = build_tokenizer()
    else:
        teacher, teacher_tok = common.load_model(config.teacher, device, trainable=False)
    if tok.get_vocab() != teacher_tok.get_vocab():
        common.fail("student and teacher have different tokenizers; take two models of one family")
    if config.teacher == "tiny":  # only now: it takes a minute
        teacher = tiny_teacher(config, tok).to(device)
    return teacher.requires_grad_(False)


def tiny_teacher(config: Config, tok):
    """Fitted on nearly clean demonstrations and then improved with GRPO, as in the paper. Unless it knows
    them, there are no time-outs in either phase."""
    rate = config.timeout_rate if config.teacher_knows_timeouts else 0.0
    seed = 2 * config.seed + 2  # not that of any student
    docs = demonstrations(tok, 8000, "teacher", rate, seed)
    teacher = common.tiny_model(tok, seed, hidden_size=96)
    common.fit_tiny("the teacher", teacher, docs, steps=250, seed=seed, fresh=config.fresh)
    weights = b"".join(p.detach().numpy().tobytes() for p in teacher.parameters())
    # The source of `improve` is in the key: a reader who edits it must get a new teacher. What it calls is
    # not: after a change of `common.update` or the like, --fresh.
    key = ["grpo", hashlib.sha256(weights).hexdigest(), rate, inspect.getsource(improve), seed]
    return common.cached(teacher, key, lambda: improve(teacher, tok, rate, seed), config.fresh)


def improve(model, tok, timeout_rate: float, seed: int, steps: int = 40) -> None:
    """GRPO on the outcome alone, in place."""
    config = Config(prompts_per_step=8, group_size=8)  # fixed: the teacher ignores the student's flags
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    tool = flaky(CALCULATOR, timeout_rate, rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.rate, weight_decay=0.0)
    for step in common.progress(range(steps), desc="GRPO for the teacher"):
        tasks = [common.chain_task(rng) for _ in range(config.prompts_per_step)]
        rollouts = common.rollout(model, tok, tasks, config.group_size, tool=tool,
                                  max_new_tokens=config.tiny_tokens, generator=generator)
        reward = common.rewards(rollouts, tasks)                                    # (B,)
        advantages = common.group_advantages(reward, config.group_size)             # (B,)
        common.update(model, optimizer, rollouts, advantages[:, None], config, step)


# ----------------------------------------------------------------------------------------- training
def evaluate(student, tok, tasks: list[Task], config: Config) -> dict:
    """The same problems and dice for every method: time-outs hit the same numbers of calls, perhaps the 3rd
    and the 17th, whichever rollout makes them."""
    tool = flaky(common.TOOLS[config.tool], config.timeout_rate, random.Random(0))
    return common.evaluate(student, tok, tasks, tool=tool, **config.sampling)


def tool_figures(tool_status: list[list[str]]) -> dict:
    """Mean turns and calls of a rollout, and the share of the calls that failed."""
    statuses = sum(tool_status, [])
    calls = [status for status in statuses if status != "none"]
    failed = [status for status in calls if status != "ok"]
    return {"turns": len(statuses) / len(tool_status), "calls": len(calls) / len(tool_status),
            "failed calls": len(failed) / max(1, len(calls))}


def train(config: Config) -> dict:
    """One loop for all methods, in the order of the list at the head of this file."""
    device = common.setup(config)
    rule, grpo, distill = METHODS[config.method]
    train_tasks, held_out = common.load_tasks(config.data, config.eval_tasks, a_step=config.prompts_per_step)
    run = common.Run(config, "sod")
    student, tok = load_student(config, device)
    teacher = load_teacher(config, tok, device) if distill else None
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.rate, weight_decay=0.0)
    rng = random.Random(config.seed)
    tool_rng = random.Random(config.seed)
    generator = torch.Generator(device).manual_seed(config.seed)
    tool = flaky(common.TOOLS[config.tool], config.timeout_rate, tool_rng)
    measure = functools.partial(evaluate, student, tok, held_out, config)

    first = run.open_folder([student, optimizer], generator, rng, tool_rng)
    if not config.resume:
        run.evaluated("before", measure())

    last = 0 if config.method == "sft" else config.steps
    for step in range(first, last):
        started = time.time()
        # 1. y ~ pi(. | x), with the tool's answers in it;   mask = 1 on what the student wrote
        tasks = rng.sample(train_tasks, config.prompts_per_step)
        rollouts = common.sample(student, tok, tasks, config, generator, tool)
        common.rescore(student, rollouts, config)
        mask = rollouts.mask                                                        # (B, T)
        rollout_ended = time.time()

        # 2. Eq. 2: A_i = (r_i - mean(r)) / std(r), over the rollouts of one problem
        reward = common.rewards(rollouts, tasks)                                    # (B,)
        outcome = common.group_advantages(reward, config.group_size)                # (B,)

        # 3. s_t = log pi(y_t | x, y_<t),   q_t = log pi_teacher(y_t | x, y_<t)
        logps = rollouts.logps                                                      # (B, T) s
        teacher_logps = logps  # without a teacher q = s: no advantage              # (B, T) q
        if distill:
            teacher_logps, _ = common.score(teacher, rollouts, config.temperature, config.micro_batch)

        # 4. d_k = mean of |s_t - q_t| over turn k (Eq. 6),   w_k = min(d_1 / d_k, 1 + delta) (Eq. 7)
        weights = torch.zeros_like(logps)                                           # (B, T) w_k(t)
        for i, turns in enumerate(rollouts.turns):
            d = step_divergence(logps[i], teacher_logps[i], turns)
            w = rule(d, first_failed_call(rollouts.tool_status[i]), config.delta)
            for (start, end), w_k in zip(turns, w):
                weights[i, start:end] = w_k

        # 5. Eq. 8-10: A_t = A_i + c w_k(t) (q_t - s_t)
        # The paper prints Eq. 9 as a loss in log pi. Its gradient on sampled tokens would drop the teacher
        # and be zero on average; as an advantage it is the score-function form of KL(student || teacher).
        c = config.coefficient * distill
        advantages = grpo * outcome[:, None] + c * weights * (teacher_logps - logps)    # (B, T)
        advantages = (advantages * mask).detach()  # (B, T), the same for all updates on this batch
        advantages_ready = time.time()
        norm = common.update(student, optimizer, rollouts, advantages, config, step)  # Eq. 3

        tokens = mask.sum()
        figures = {"solved": float(reward.mean())}
        figures["|A|"] = float(advantages.abs().sum() / tokens)
        if distill:
            figures["kl(teacher)"] = float(((logps - teacher_logps) * mask).sum() / tokens)
            figures["weight"] = float(weights.sum() / tokens)
        figures |= tool_figures(rollouts.tool_status)
        figures |= run.rollout_figures(rollouts, reward, norm)
        run.step(step + 1, started, figures, rollout_seconds=rollout_ended - started,
                 score_seconds=advantages_ready - rollout_ended)
        run.show(step, tok, tasks, rollouts)
        run.end_step(step + 1, measure)
    return run.finish(student, tok, measure)


# ------------------------------------------------------------------------------- comparing, looking inside
def compare(config: Config) -> None:
    """Every method from the same start, with the same prompts; mean and spread over seeds."""
    variants = {method: {"method": method} for method in METHODS}
    found = common.compared(train, config, variants, "sod")
    print(common.seed_table(found, {
        "accuracy_after": "T = 1", "greedy_accuracy_after": "greedy", "accuracy_best": "best, T = 1",
        "accuracy_before": "start, T = 1", "greedy_accuracy_before": "start, greedy",
        "seconds_per_step": "seconds a step"}))


def first_rollouts(config: Config, count: int):
    """Before any training -> teacher, tokenizer, `count` problems, one rollout of the student for each."""
    device = common.setup(config)
    _, tasks = common.load_tasks(config.data, count)
    student, tok = load_student(config, device)
    teacher = load_teacher(config, tok, device)
    generator = torch.Generator(device).manual_seed(config.seed)
    tool = flaky(common.TOOLS[config.tool], config.timeout_rate, random.Random(config.seed))
    rollouts = common.rollout(student, tok, tasks, tool=tool, generator=generator,
                              temperature=config.temperature, **config.sampling)
    common.rescore(student, rollouts, config)
    return teacher, tok, tasks, rollouts


def explain(config: Config) -> None:
    """One rollout token by token: the distillation part (the outcome advantage would need a group)."""
    teacher, tok, tasks, rollouts = first_rollouts(config, 8)
    teacher_logps, entropy = common.score(teacher, rollouts, config.temperature)    # (B, T) each

    def events(row: int) -> tuple[int, int]:
        return len(set(rollouts.tool_status[row])), len(rollouts.turns[row])

    i = max(range(len(tasks)), key=events)
    turns = rollouts.turns[i]
    rule, _, _ = METHODS[config.method]
    d = step_divergence(rollouts.logps[i], teacher_logps[i], turns)
    weights = rule(d, first_failed_call(rollouts.tool_status[i]), config.delta)
    rows = []
    column = turns[0][0]  # the first one behind the prompt; then the first one behind a turn
    for (start, end), w in zip(turns, weights):
        for t in range(column, end):
            token = repr(tok.decode([int(rollouts.ids[i, t])]))[:34]
            if t < start:
                rows.append([token, "given", "", "", "", "", ""])
                continue
            s = float(rollouts.logps[i, t])
            q = float(teacher_logps[i, t])
            rows.append([token, "sampled", s, q, float(entropy[i, t]), w, w * (q - s)])
        column = end
    print(tasks[i].messages[-1]["content"])
    print(common.table(rows, ["token", "", "student", "teacher", "entropy", "weight", "w(q-s)"]))


def main(argv: list[str] | None = None) -> None:
    config = common.parse(Config, argv)
    common.launch(config, train, explain=explain, compare=compare)


if __name__ == "__main__":
    main()
