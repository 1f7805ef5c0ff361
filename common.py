"""What the four scripts share: tiny models, tasks, tools, rollouts, scoring, the GRPO baseline, runs on disk.

    python common.py            trains the GRPO baseline on the chain task, without tools

Read it in this order when you read it for the first time:
1. `rollout`            one batched decoding loop; ids are only ever appended, so the loss mask is exact by construction
2. `token_logps`        the one place that scores tokens, for students, teachers and references alike
3. `group_advantages`, `policy_loss`    the two formulas of GRPO
4. `train`              the GRPO loop, written out; the loops of the other files have the same shape

Words: B rollouts (prompts x group_size), T columns (padded prompt, then response), N scored tokens, H hidden size, V vocabulary.
`mask` (B, T) is 1 exactly on the tokens that the model sampled itself: only they carry loss. `attention_mask` (B, T) is 1 on every
real token. Both come from lengths and from what the loop did, never from token values: pad may equal the end-of-turn token.
"""
import ast
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import operator
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, ClassVar, Literal, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoTokenizer, DynamicCache, HfArgumentParser, PreTrainedTokenizerFast,
                          Qwen3Config, Qwen3ForCausalLM)

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the tool subprocesses fork; tokenizers would warn each time
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


# ------------------------------------------------------------------------------------------------ command line
def fail(message: str) -> NoReturn:
    """One sentence on stderr, exit code 2. The only way these scripts complain about their input."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def option(default, help: str):
    """A Config field with its help sentence."""
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    tiny_tokens: ClassVar[int] = 96  # --max_new_tokens on the chain task
    model: str = option("tiny", "student: 'tiny' (built and fitted here), a Hugging Face id or a folder")
    method: Literal["grpo"] = field(default="grpo", metadata={"help": "the baseline is the only one here"})
    data: str = option("chain", "'chain' (generated), a Hugging Face dataset id, or a jsonl, json, csv or parquet file")
    steps: int = option(60, "training steps")
    prompts_per_step: int = option(8, "problems a step")
    group_size: int = option(8, "rollouts a problem")
    minibatches: int = option(1, "optimiser updates on each batch of rollouts")
    micro_batch: int = option(0, "rollouts a backward pass, to save memory; 0 = all; the gradient stays the same")
    max_new_tokens: int = option(0, "budget of a trajectory in tokens, tool answers included; 0 = enough for the chain, else 1024")
    max_turns: int = option(8, "assistant turns a trajectory; a tool call in the last turn is not run")
    temperature: float = option(1.0, "of the training rollouts; scoring uses the same")
    lr: float | None = option(None, "learning rate; not given = 3e-4 for tiny models, 1e-6 for others")
    seed: int = option(0, "seed of prompts, sampling and tool failures")
    eval_every: int = option(0, "evaluate every so many steps; 0 = only before and after")
    eval_tasks: int = option(200, "held-out problems")
    device: str = option("auto", "'auto', 'cpu', 'cuda', ...")
    threads: int = option(0, "CPU threads; 0 = one for tiny models, torch's own choice for others")
    out: str = option("", "folder of the run; not given = runs/<script>-<method>-s<seed>")
    overwrite: bool = option(False, "replace the folder of an earlier run")
    resume: bool = option(False, "go on from the last checkpoint in the run's folder")
    save_every: int = option(50, "checkpoint every so many steps; 0 = never")
    show_every: int = option(20, "print one rollout every so many steps; 0 = never")
    fresh: bool = option(False, "fit the tiny models again instead of taking them from the cache")
    thinking: bool = option(False, "let the chat template open a thinking block (models that have one)")
    plot: list[str] = field(default_factory=list, metadata={
        "help": "FILE.png: draw this run at its end; FILE.png RUN...: only draw those run folders"})


AT_LEAST_ONE = {"prompts_per_step", "group_size", "minibatches", "max_turns", "eval_tasks", "seeds"}


def parse(config_class, argv=None):
    """Command line -> config. No abbreviations; an unknown flag or a bad value is one sentence and exit code 2."""
    parser = HfArgumentParser(config_class, allow_abbrev=False)
    parser.error = fail
    config = config_class(**vars(parser.parse_args(argv)))
    for f in dataclasses.fields(config):
        value, least = getattr(config, f.name), {"temperature": 0.01}.get(f.name, int(f.name in AT_LEAST_ONE))
        if type(value) in (int, float) and not least <= value < math.inf:
            fail(f"--{f.name} {value} is out of range; give {least} or more")
    config.max_new_tokens = config.max_new_tokens or (config.tiny_tokens if config.data == "chain" else 1024)
    if config.resume and config.overwrite:
        fail("--resume and --overwrite contradict each other; give one of them")
    if config.prompts_per_step % config.minibatches:
        fail(f"--minibatches {config.minibatches} must divide --prompts_per_step {config.prompts_per_step}")
    return config


def setup(config) -> torch.device:
    """Device and thread count. Tiny models get one thread: it is never slow, and the same on every run."""
    if config.threads or config.model == "tiny":
        torch.set_num_threads(config.threads or 1)
    name = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError):
        fail(f"device '{name}' is not usable on this machine; try --device cpu")
    return torch.device(name)


# ------------------------------------------------------------------------------------------------ models
# ChatML with the Hermes tool protocol, as Qwen3 speaks it, without Qwen3's thinking blocks.
TEMPLATE = """\
{%- if tools or messages[0].role == 'system' %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}
{%- if tools %}# Tools
{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% elif message.role != 'system' %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# What the template always writes in one piece is one token of the tiny tokenizer, so that a tool's answer costs three.
TEMPLATE_ATOMS = ["<|im_start|>system\n", "# Tools\n", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>user\n",
                  "<|im_end|>\n<|im_start|>assistant\n", "\n<|im_start|>user\n<tool_response>\n",
                  "\n</tool_response><|im_end|>\n<|im_start|>assistant\n"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# special=False as in Qwen3: as special tokens they would vanish in decoding, and no tool call could be parsed.
PROTOCOL = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]


def build_tokenizer(atoms: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer without merges, plus `atoms`: phrases that are one token each.

    Any text can be encoded (256 bytes), the toy's boilerplate costs one token a phrase, and digits and operators stay single. Because
    nothing merges, a phrase has the same ids wherever it stands.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    core.add_tokens([AddedToken(a, normalized=False, special=False) for a in [*PROTOCOL, *TEMPLATE_ATOMS, *atoms]])
    tok = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tok.chat_template = TEMPLATE
    return tok


def tiny_model(tok, seed: int, hidden_size: int = 64, layers: int = 2) -> Qwen3ForCausalLM:
    """A real Qwen3 (grouped-query attention, q/k norm, tied embeddings), only small; random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(Qwen3Config(
            vocab_size=len(tok), hidden_size=hidden_size, intermediate_size=3 * hidden_size, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, head_dim=hidden_size // 4, max_position_embeddings=2048,
            tie_word_embeddings=True, initializer_range=0.06, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id))


def cached(model, key, build: Callable, fresh: bool = False):
    """Loads `model`'s weights from the cache, or calls `build()` (which trains it in place) and stores them.

    `key` is anything json can write: what the weights depend on. A damaged file is rebuilt with a warning; the write is atomic.
    """
    text = json.dumps([key, model.config.to_dict(), torch.__version__, transformers.__version__], sort_keys=True, default=str)
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "four-papers"
    path = root / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.pt"
    if path.exists() and not fresh:
        try:
            model.load_state_dict(torch.load(path, weights_only=True))
            return model.eval()
        except Exception as error:  # torch, pickle and zipfile each raise their own kind for a damaged file
            print(f"warning: cached model {path.name} is damaged ({type(error).__name__}); fitting it again")
    build()
    root.mkdir(parents=True, exist_ok=True)
    save_atomically(model.state_dict(), path)
    return model.eval()


def save_atomically(obj, path: Path) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    torch.save(obj, temporary)
    os.replace(temporary, path)


def fit_tiny(name: str, model, docs, steps: int, batch: int = 32, lr: float = 3e-3, seed: int = 0, fresh: bool = False):
    """Next-token fit of a tiny model on demonstrations; cached.

    docs: list of (ids, mask), lists of equal length; loss is on the tokens with mask 1, as in SFT on assistant turns.
    """
    def build():
        rng, order = random.Random(seed), []
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
        ramp = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 50, (steps - s) / steps))
        model.train()
        for _ in tqdm(range(steps), desc=f"fitting {name}", mininterval=1, leave=False):
            if not order:  # an epoch: shuffled, but documents of similar length share a batch, which halves the padding
                order = length_buckets(docs, batch, rng)
            rows = order.pop()
            width = max(len(docs[i][0]) for i in rows)
            ids = torch.tensor([docs[i][0] + [0] * (width - len(docs[i][0])) for i in rows])    # (B, T)
            mask = torch.tensor([docs[i][1] + [0] * (width - len(docs[i][1])) for i in rows])   # (B, T)
            # Right padding needs no attention mask under causal attention: no real token can look at a pad.
            loss = -token_logps(model, ids, None, mask).sum() / mask.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            ramp.step()

    digest = hashlib.sha256(json.dumps(docs).encode()).hexdigest()
    return cached(model, ["fit", digest, steps, batch, lr, seed], build, fresh)


def length_buckets(docs, batch: int, rng) -> list[list[int]]:
    order = rng.sample(range(len(docs)), len(docs))
    pools = [sorted(order[i:i + 16 * batch], key=lambda j: len(docs[j][0])) for i in range(0, len(order), 16 * batch)]
    batches = [pool[i:i + batch] for pool in pools for i in range(0, len(pool), batch)]
    rng.shuffle(batches)
    return batches


def load_model(name: str, device, trainable: bool = True):
    """Hugging Face id or folder -> (model, tokenizer).

    On CUDA a trainable model has fp32 master weights (bf16 ones swallow updates of 1e-6) and is run under bf16 autocast with gradient
    checkpointing; a frozen one is stored in bf16.
    """
    cuda = torch.device(device).type == "cuda"
    try:
        tok = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32 if trainable or not cuda else torch.bfloat16)
    except (OSError, ValueError) as error:
        fail(f"cannot load the model '{name}' ({str(error).splitlines()[0]}); give a Hugging Face id, a model folder or 'tiny'")
    if tok.chat_template is None:
        fail(f"the tokenizer of '{name}' has no chat template; take an instruction-tuned model")
    if tok.pad_token_id is None:
        tok.pad_token = tok.eos_token
    if trainable and cuda:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.to(device).requires_grad_(trainable).eval(), tok


def check_same_tokenizer(tok, teacher_tok) -> None:
    """Distillation compares log-probs of the same ids, so the ids must mean the same to both models."""
    if tok.get_vocab() != teacher_tok.get_vocab():
        fail(f"student and teacher have different tokenizers ({len(tok)} and {len(teacher_tok)} tokens, not the same ids); "
             "take two models of one family")


def autocast(model):
    """bf16 autocast on CUDA, nothing on CPU."""
    device = next(model.parameters()).device.type
    return torch.autocast(device, torch.bfloat16) if device == "cuda" else contextlib.nullcontext()


# ------------------------------------------------------------------------------------------------ tasks and answers
@dataclass
class Task:
    messages: list[dict]  # chat messages, the last one by the user
    answer: str           # what `is_correct` compares with; never shown to a model


def chain_task(rng, operations=(3, 5), modulus: int = 10) -> Task:
    """A left-to-right chain of + - *, modulo `modulus`; letters number the operations (without them a tiny model miscounts)."""
    start, steps = rng.randrange(modulus), []
    for label in "ABCDEFGH"[:rng.randint(*operations)]:
        steps.append(f"{label}{rng.choice('+-*')}{rng.randrange(1, modulus)}")
    text = f"Start with {start}, work modulo {modulus}: {', '.join(steps)}. Put the last value in \\boxed{{}}."
    return Task([{"role": "user", "content": text}], str(chain_values(text)[-1]))


def parse_chain(text: str) -> tuple[int, int, list[tuple[str, str, int]]]:
    """Problem text -> (start, modulus, [(label, operation, operand), ...])."""
    start, modulus = map(int, re.search(r"Start with (\d+), work modulo (\d+):", text).groups())
    return start, modulus, [(a, b, int(c)) for a, b, c in re.findall(r"\b([A-H])([+*-])(\d+)", text)]


APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def chain_values(text: str) -> list[int]:
    """The start value and the value after each operation."""
    start, modulus, steps = parse_chain(text)
    values = [start]
    for _, operation, operand in steps:
        values.append(APPLY[operation](values[-1], operand) % modulus)
    return values


CHAIN_ATOMS = ["Start with ", ", work modulo ", ": ", ", ", ". Put the last value in \\boxed{}.", "\\boxed{", "10"]


def read_rows(path: Path) -> list[dict]:
    """JSON lines (or one JSON list), csv, parquet -> rows. A bad line is named."""
    if path.suffix not in (".jsonl", ".json"):
        import datasets  # slow to import, and only here and for hub ids needed
        return list(datasets.load_dataset(path.suffix[1:], data_files=str(path), split="train"))
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            fail(f"{path}, line {error.lineno}: not valid JSON ({error.msg}); repair the file")
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                fail(f"{path}, line {number}: not valid JSON ({error.msg}); repair or remove that line")
            if not isinstance(rows[-1], dict):
                fail(f"{path}, line {number}: expected an object with a question and an answer, found {line[:40]!r}")
    return rows


def hub_rows(name: str) -> list[dict]:
    import datasets
    try:
        configs = datasets.get_dataset_config_names(name)
        return list(datasets.load_dataset(name, "main" if "main" in configs else configs[0], split="train"))
    except Exception as error:  # the hub raises a dozen kinds; all of them mean the same to the user
        fail(f"'{name}' is neither a file here nor a dataset the hub would give ({type(error).__name__}); check the path or the network")


def load_tasks(source: str, eval_tasks: int, make_chain: Callable = chain_task) -> tuple[list[Task], list[Task]]:
    """'chain', a file or a hub id -> (training tasks, held-out tasks), disjoint as texts, the same for every method and seed."""
    rng = random.Random(20260)
    if source == "chain":
        tasks = [make_chain(rng) for _ in range(20 * eval_tasks + 4000)]
    else:
        path = Path(source)
        if not path.exists() and path.suffix in (".jsonl", ".json", ".csv", ".parquet"):
            fail(f"there is no file {source}; check --data")
        if path.exists() and path.suffix not in (".jsonl", ".json", ".csv", ".parquet"):
            fail(f"{source} is not a jsonl, json, csv or parquet file; check --data")
        rows = read_rows(path) if path.exists() else hub_rows(source)
        tasks = [row_to_task(row, f"{source}, row {i}") for i, row in enumerate(rows, 1)]
        rng.shuffle(tasks)
    unique = list({json.dumps(task.messages): task for task in tasks}.values())
    if len(unique) < eval_tasks + 1:
        fail(f"{source} holds {len(unique)} different problems, too few for --eval_tasks {eval_tasks} and training; lower --eval_tasks")
    return unique[eval_tasks:], unique[:eval_tasks]


def row_to_task(row: dict, where: str) -> Task:
    """One dataset row -> Task. Columns: question, problem or prompt; answer or solution; optional system."""
    question = next((row[c] for c in ("question", "problem", "prompt") if row.get(c)), None)
    answer = next((row[c] for c in ("answer", "solution") if row.get(c) not in (None, "")), None)
    if question is None or answer is None:
        fail(f"{where}: found the columns {sorted(row)}, but need question, problem or prompt, and answer or solution; rename them")
    messages = list(question) if isinstance(question, list) else [{"role": "user", "content": str(question)}]
    if row.get("system"):
        messages = [{"role": "system", "content": row["system"]}, *messages]
    if not any("boxed" in m["content"] or "<answer>" in m["content"] for m in messages):
        messages[-1] = {**messages[-1], "content": messages[-1]["content"] + "\n\nPut the final answer in \\boxed{}."}
    return Task(messages, final_answer(str(answer)) or str(answer).strip())


def final_answer(text: str) -> str | None:
    """The answer a text commits to: the last \\boxed{}, else <answer>, else `#### x`, else the text itself if it is one number or letter."""
    text = text.rsplit("</think>", 1)[-1]
    start = text.rfind("\\boxed{")
    if start >= 0:
        depth = 0
        for i in range(start + 6, len(text)):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                return text[start + 7:i].strip()
        return None
    for pattern in (r"<answer>(.*?)</answer>", r"####\s*([^\n]+)", r"\A\s*([A-Z]|[-+$]?[\d.,]*\d%?)\.?\s*\Z"):
        if found := re.findall(pattern, text, re.DOTALL):
            return found[-1].strip()
    return None


def normalise(answer: str) -> str:
    """Numbers lose commas, units of money, per cent and trailing zeros; other answers only lose spaces, case and $ signs."""
    plain = re.sub(r"[\s,$%]|\\[ ,!%$]", "", answer).rstrip(".")
    try:
        value = float(plain)
        return repr(int(value)) if value.is_integer() else repr(value)
    except (ValueError, OverflowError):
        return plain.casefold()


def is_correct(text: str, answer: str) -> bool:
    """Does `text` commit to `answer`? Both sides are normalised alike."""
    found = final_answer(text)
    return found is not None and normalise(found) == normalise(answer)


# ------------------------------------------------------------------------------------------------ tools
@dataclass
class Tool:
    """One callable tool. `run(arguments)` -> (text for the model, status: 'ok', 'error' or 'timeout')."""
    name: str
    description: str
    parameter: str  # its one string argument
    run: Callable[[dict], tuple[str, str]]
    workers: int = 1  # > 1: calls of one decoding step run in parallel threads

    @property
    def schema(self) -> dict:
        parameters = {"type": "object", "properties": {self.parameter: {"type": "string"}}, "required": [self.parameter]}
        return {"type": "function", "function": {"name": self.name, "description": self.description, "parameters": parameters}}


def calculate(expression: str) -> float:
    """Arithmetic through ast, no eval: numbers, + - * / // % **, unary minus, parentheses. Raises ValueError otherwise."""
    binary = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
              ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow}

    def value(node):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            return -value(node.operand) if isinstance(node.op, ast.USub) else value(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in binary:
            left, right = value(node.left), value(node.right)
            if isinstance(node.op, ast.Pow) and (abs(right) > 64 or abs(left) > 1e6):
                raise ValueError("power too large")  # 9**9**9 would never end
            return binary[type(node.op)](left, right)
        raise ValueError("not arithmetic")

    if len(expression) > 200:
        raise ValueError("too long")
    try:
        result = value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, OverflowError, RecursionError, MemoryError, TypeError) as error:
        raise ValueError(str(error)) from error
    if isinstance(result, complex) or not math.isfinite(result):
        raise ValueError("not a finite real number")
    return result


BAD_EXPRESSION = "error: not a valid expression"


def run_calculator(arguments: dict) -> tuple[str, str]:
    try:
        result = calculate(str(arguments["expression"]))
        return cut_middle(str(int(result) if float(result).is_integer() else result)), "ok"
    except (KeyError, ValueError):
        return BAD_EXPRESSION, "error"


def cut_middle(text: str, limit: int = 256) -> str:
    """Tool text over 256 characters keeps its first and last 128, as in SOD's code."""
    return text if len(text) <= limit else text[:limit // 2] + "...(truncated)..." + text[-limit // 2:]


# Runs inside the child before the model's code: limits first, then the code; a last line that is an expression is printed.
PYTHON_CHILD = """
import ast, resource
for what, limit in ((resource.RLIMIT_CPU, 10), (resource.RLIMIT_AS, 2 << 30), (resource.RLIMIT_FSIZE, 1 << 20),
                    (resource.RLIMIT_NPROC, 64), (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(what, (limit, limit))
tree = ast.parse(open("code.py").read(), "code.py")
if tree.body and isinstance(tree.body[-1], ast.Expr):
    call = tree.body[-1].value
    if not (isinstance(call, ast.Call) and getattr(call.func, "id", "") == "print"):
        tree.body[-1] = ast.Expr(ast.Call(ast.Name("print", ast.Load()), [call], []))
exec(compile(ast.fix_missing_locations(tree), "code.py", "exec"), {"__name__": "__main__"})
"""


def run_python(arguments: dict, seconds: float = 10.0) -> tuple[str, str]:
    """Runs the model's code in a subprocess: isolated mode, own session, limits on CPU, memory, processes and file size, temporary
    folder, empty environment, no stdin; the whole process group is killed at the time limit.

    It does NOT stop code from reading files that you can read, from opening sockets, or from leaving its session. The right wall for
    untrusted models is a container.
    """
    code = str(arguments.get("code", ""))
    fenced = re.search(r"```(?:python)?\n(.*?)```", code, re.DOTALL)
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "out"), "w+b") as out:
        Path(folder, "code.py").write_text(fenced.group(1) if fenced else code, encoding="utf-8")
        child = subprocess.Popen([sys.executable, "-I", "-c", PYTHON_CHILD], cwd=folder, env={}, stdin=subprocess.DEVNULL,
                                 stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = "ok" if child.wait(timeout=seconds) == 0 else "error"
        except subprocess.TimeoutExpired:
            status = "timeout"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # also what the code may have left running
        child.wait()
        out.seek(0)
        text = out.read().decode("utf-8", "replace").strip()
    return ("error: timed out" if status == "timeout" else cut_middle(text) or "(no output)"), status


TOOLS = {
    "calculator": Tool("calculator", "Evaluates one arithmetic expression.", "expression", run_calculator),
    "python": Tool("python", "Runs Python code and returns what it prints.", "code", run_python, workers=8),
}


def parse_tool_call(text: str) -> dict | None:
    """The first well-formed `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, else None (then the trajectory ends)."""
    for body in re.findall(r"<tool_call>\s*(.*?)\s*</tool_call>", text, re.DOTALL):
        with contextlib.suppress(json.JSONDecodeError):
            call = json.loads(body)
            if isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("arguments"), dict):
                return call
    return None


def run_tools(tool: Tool, calls: list[dict]) -> list[tuple[str, str]]:
    def one(call):
        if call["name"] != tool.name:
            return f"error: there is no tool {call['name'][:40]}", "error"
        return tool.run(call["arguments"])
    if tool.workers == 1 or len(calls) < 2:
        return [one(call) for call in calls]
    with ThreadPoolExecutor(tool.workers) as pool:
        return list(pool.map(one, calls))


# ------------------------------------------------------------------------------------------------ prompts
def end_of_turn(tok) -> int:
    end = tok.convert_tokens_to_ids("<|im_end|>")  # Qwen3-Base ends its text with another token, its turns with this one
    return end if end is not None and end != tok.unk_token_id else tok.eos_token_id


def render(tok, messages, tools, thinking: bool, add_generation_prompt: bool = True) -> str:
    return tok.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt,
                                   enable_thinking=thinking)


def encode(tok, text: str) -> list[int]:
    return tok(text, add_special_tokens=False).input_ids


def prompt_ids(tok, messages: list[dict], tool: Tool | None = None, thinking: bool = False) -> list[int]:
    """Chat messages -> ids, ending where the assistant begins. A template that ignores `tools` gets the schema in a system message."""
    if tool is None:
        return encode(tok, render(tok, messages, None, thinking))
    text = render(tok, messages, [tool.schema], thinking)
    if tool.name not in text:
        note = ("You can call this tool:\n" + json.dumps(tool.schema) + '\nTo call it, end your turn with <tool_call>{"name": "'
                + tool.name + '", "arguments": {"' + tool.parameter + '": "..."}}</tool_call>.')
        has_system = messages[0]["role"] == "system"
        system = {"role": "system", "content": (messages[0]["content"] + "\n\n" if has_system else "") + note}
        text = render(tok, [system, *messages[has_system:]], None, thinking)
    return encode(tok, text)


@functools.lru_cache(maxsize=64)
def tool_glue(tok, thinking: bool = False) -> tuple[list[int], list[int]]:
    """The ids that the template puts before and after a tool's text, from the assistant's end-of-turn to its next turn.

    Rendered from the tokenizer's own template around markers, so that no model family is hard-coded. The sampled end-of-turn token
    itself is already there and is not repeated.
    """
    end = tok.convert_ids_to_tokens(end_of_turn(tok))
    said, answered = "@@SAID@@", "@@TOOL@@"
    talk = [{"role": "user", "content": "u"}, {"role": "assistant", "content": said}]
    try:
        text = render(tok, [*talk, {"role": "tool", "content": answered}], None, thinking)
    except Exception:  # a template may refuse the role
        text = ""
    if answered not in text:
        content = f"<tool_response>\n{answered}\n</tool_response>"
        text = render(tok, [*talk, {"role": "user", "content": content}], None, thinking)
    before, after = text.split(said, 1)[1].split(answered, 1)
    return encode(tok, before.split(end, 1)[-1]), encode(tok, after)


def tool_message_ids(tok, text: str, thinking: bool = False) -> list[int]:
    """A tool's answer as the ids that follow the assistant's end-of-turn token. Control tokens inside `text` are only text."""
    before, after = tool_glue(tok, thinking)
    inside = tok(text, add_special_tokens=False, split_special_tokens=bool(re.search(r"<\|", text))).input_ids
    return before + inside + after


# ------------------------------------------------------------------------------------------------ rollouts
@dataclass
class Rollouts:
    """B = len(tasks) * group_size rows, the group_size rollouts of one task side by side."""
    ids: torch.Tensor              # (B, T) left-padded prompt, then response, right-padded
    attention_mask: torch.Tensor   # (B, T) 1 = real token
    mask: torch.Tensor             # (B, T) 1 = sampled by the model (its end-of-turn included)
    logps: torch.Tensor            # (B, T) log-prob of each sampled token when it was sampled; 0 elsewhere
    entropy: torch.Tensor          # (B, T) of the distribution it was sampled from, in nats; 0 elsewhere
    prompt_length: int             # columns of the padded prompt
    finished: torch.Tensor         # (B,) the model ended its last turn itself, without asking for a tool
    texts: list[str]               # text of the last turn: what the reward reads
    steps: list[list[tuple[int, int]]]  # per row the [start, end) columns of its turns
    tool_status: list[list[str]]   # per row and turn: none, ok, error, timeout


def step_spans(mask: list[int]) -> list[tuple[int, int]]:
    """Steps = maximal runs of 1 in a row of the mask, as [start, end) columns."""
    edges = np.flatnonzero(np.diff(np.asarray([0, *mask, 0])))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2])]


def choose(logits, temperature: float, top_p: float, generator):
    """logits (n, V) -> token, its log-prob, entropy, each (n,). temperature 0 is greedy; top_p < 1 is for evaluation only."""
    logps = torch.log_softmax(logits / (temperature or 1.0), -1)                    # (n, V)
    probs = logps.exp()
    if top_p < 1:
        ranked, order = probs.sort(-1, descending=True)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0  # a token stays while those before it hold less than top_p
        probs = torch.zeros_like(probs).scatter(-1, order, ranked)
    token = logits.argmax(-1) if temperature == 0 else torch.multinomial(probs, 1, generator=generator)[:, 0]
    entropy = -(logps.exp() * logps).nan_to_num().sum(-1)                           # (n,)
    return token, logps.gather(1, token[:, None])[:, 0], entropy


def padded(sequences, value, left: bool = False, device=None, dtype=torch.long):
    """list of lists -> (B, longest) tensor."""
    width = max(len(s) for s in sequences)
    return torch.tensor([[value] * (width - len(s)) * left + list(s) + [value] * (width - len(s)) * (not left)
                         for s in sequences], device=device, dtype=dtype)


@torch.no_grad()
def rollout(model, tok, tasks, group_size: int = 1, *, tool: Tool | None = None, max_new_tokens: int = 256, max_turns: int = 8,
            temperature: float = 1.0, top_p: float = 1.0, generator=None, thinking: bool = False) -> Rollouts:
    """Samples group_size trajectories a task, all in one batch with one KV cache.

    In each column every row either *samples* its next token or, while ids are queued for it (a tool's answer with the template around
    it), *takes the next queued id*. Which of the two it was is the loss mask. So a tool turn costs no second prefill, and nothing is
    ever decoded and encoded again: a row's ids are exactly what the model saw.

    A turn ends with the end-of-turn token; if its text holds a tool call, the tool runs and its message is queued, else the row is
    done. A message that would not fit into max_new_tokens is not appended. Rows that are done leave the batch.
    """
    assert not model.training, "rollouts need model.eval(): train mode may switch the cache off"
    device = next(model.parameters()).device
    prompts = [prompt_ids(tok, task.messages, tool, thinking) for task in tasks]
    ids = padded(prompts, tok.pad_token_id, left=True, device=device)                       # (tasks, P)
    attention = padded([[1] * len(p) for p in prompts], 0, left=True, device=device)        # (tasks, P)
    cache = DynamicCache(config=model.config)
    with autocast(model):  # each distinct prompt is read once, then its cache is copied to the whole group
        logits = model(input_ids=ids, attention_mask=attention, position_ids=(attention.cumsum(1) - 1).clamp(min=0),
                       past_key_values=cache, logits_to_keep=1).logits[:, -1]
    cache.batch_repeat_interleave(group_size)
    logits, attention = logits.repeat_interleave(group_size, 0), attention.repeat_interleave(group_size, 0)

    B, end = len(tasks) * group_size, end_of_turn(tok)
    tokens, sampled, logps, entropies = ([[] for _ in range(B)] for _ in range(4))  # per row, the response so far
    queues, turn, status = [deque() for _ in range(B)], [[] for _ in range(B)], [[] for _ in range(B)]
    texts, finished = [""] * B, [False] * B
    rows, alive = list(range(B)), [True] * B  # which trajectory sits in which batch row
    while any(alive):
        token, logp, entropy = choose(logits.float(), temperature, top_p, generator)        # (n,) each
        forced = torch.tensor([queues[i].popleft() if queues[i] else -1 for i in rows], device=device)  # (n,) -1 = sample
        token = torch.where(forced >= 0, forced, token)                                     # (n,)
        calls = []
        for j, (i, t, lp, h, f) in enumerate(zip(rows, *(x.tolist() for x in (token, logp, entropy, forced)))):
            if not alive[j]:
                continue
            tokens[i].append(t)
            sampled[i].append(int(f < 0))
            logps[i].append(lp if f < 0 else 0.0)
            entropies[i].append(h if f < 0 else 0.0)
            if f < 0:
                turn[i].append(t)
                if t == end:
                    text = tok.decode(turn[i][:-1], skip_special_tokens=False)
                    call = parse_tool_call(text) if tool else None
                    texts[i], turn[i] = text, []
                    status[i].append("none")
                    if call and len(status[i]) < max_turns:
                        calls.append((j, i, call))
                    else:
                        finished[i], alive[j] = call is None, False
        for (j, i, _), (text, outcome) in zip(calls, run_tools(tool, [c for *_, c in calls]) if calls else []):
            message = tool_message_ids(tok, text, thinking)
            status[i][-1] = outcome
            if len(tokens[i]) + len(message) < max_new_tokens:
                queues[i].extend(message)
            else:
                alive[j] = False
        for j, i in enumerate(rows):
            alive[j] = alive[j] and len(tokens[i]) < max_new_tokens
        keep = [j for j, a in enumerate(alive) if a]
        if not keep:
            break
        if len(keep) < len(rows) / 2:  # done rows leave the batch, but not one by one: each time costs a copy of the cache
            index = torch.tensor(keep, device=device)
            cache.batch_select_indices(index)
            token, attention = token[index], attention[index]
            rows, alive = [rows[j] for j in keep], [True] * len(keep)
        attention = torch.cat([attention, attention.new_ones(len(rows), 1)], 1)
        with autocast(model):
            logits = model(input_ids=token[:, None], attention_mask=attention, position_ids=attention.sum(1, keepdim=True) - 1,
                           past_key_values=cache).logits[:, -1]
    for i in range(B):
        if turn[i]:  # cut in the middle of a turn
            texts[i] = tok.decode(turn[i], skip_special_tokens=False)
            status[i].append("none")
    return pack(tok, prompts, group_size, tokens, sampled, logps, entropies, finished, texts, status, device)


def pack(tok, prompts, group_size, tokens, sampled, logps, entropies, finished, texts, status, device) -> Rollouts:
    """Lists of the decoding loop -> tensors."""
    prompts = [p for p in prompts for _ in range(group_size)]
    P = max(map(len, prompts))
    ids = torch.cat([padded(prompts, tok.pad_token_id, True, device), padded(tokens, tok.pad_token_id, False, device)], 1)  # (B, T)
    zeros = torch.zeros(len(prompts), P, device=device)
    attention = torch.cat([padded([[1] * len(p) for p in prompts], 0, True, device),
                           padded([[1] * len(t) for t in tokens], 0, False, device)], 1)    # (B, T)
    mask = torch.cat([zeros.long(), padded(sampled, 0, False, device)], 1)                  # (B, T)
    logp, entropy = (torch.cat([zeros, padded(x, 0.0, False, device, torch.float)], 1) for x in (logps, entropies))
    return Rollouts(ids, attention, mask, logp, entropy, P, torch.tensor(finished, device=device), texts,
                    [step_spans(m) for m in mask.tolist()], status)


def rewards(rollouts: Rollouts, tasks: list[Task]):
    """1.0 for a finished rollout whose last turn holds the right answer, else 0.0. (B,)"""
    group_size = len(rollouts.texts) // len(tasks)
    return torch.tensor([float(bool(done) and is_correct(text, tasks[i // group_size].answer))
                         for i, (text, done) in enumerate(zip(rollouts.texts, rollouts.finished.tolist()))])


def transcript(tok, rollouts: Rollouts, row: int) -> str:
    """One rollout for people: what the model wrote, with the tools' texts in [brackets]."""
    spans = rollouts.steps[row]
    parts = []
    for (start, end), following in zip(spans, [*spans[1:], None]):
        parts.append(tok.decode(rollouts.ids[row, start:end], skip_special_tokens=True).strip())
        if following:
            text = tok.decode(rollouts.ids[row, end:following[0]], skip_special_tokens=True)
            inside = re.search(r"<tool_response>\s*(.*?)\s*</tool_response>", text, re.DOTALL)
            parts.append(f"[{inside.group(1) if inside else text.strip()}]")
    return " ".join(parts).replace("\n", " ")


# ------------------------------------------------------------------------------------------------ scoring
def hidden_at(model, ids, attention_mask, mask):
    """Last hidden states from which the tokens under `mask` are predicted: (N, H), row by row.

    ids, mask (B, T); attention_mask (B, T) or None (right padding only). The token in column p is predicted from column p-1: this
    shift is here and nowhere else. Positions count real tokens, so padding on either side changes nothing.
    """
    positions = None if attention_mask is None else (attention_mask.cumsum(1) - 1).clamp(min=0)
    with autocast(model):
        hidden = model.base_model(input_ids=ids, attention_mask=attention_mask, position_ids=positions,
                                  use_cache=False).last_hidden_state                # (B, T, H)
    return hidden[:, :-1][mask[:, 1:].bool()]


def over_vocab_chunks(hidden, head, fn, *rows):
    """fn(logits (n, V), *rows (n, ...)) -> tensor (n,) or tuple of them, applied to chunks of tokens; results concatenated.

    (tokens x vocabulary) logits never exist at once: a chunk holds 2^26 of them, and with gradients each chunk is recomputed in the
    backward pass. hidden (N, H); head: the language-model head; each of rows has N entries.
    """
    dtype = torch.bfloat16 if hidden.device.type == "cuda" else hidden.dtype
    weight, bias = head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)  # cast once, not in every chunk

    def one(h, *r):
        return fn(F.linear(h.to(dtype), weight, bias).float(), *r)

    size = max(1, 2**26 // weight.shape[0])
    chunks = list(zip(*(x.split(size) for x in (hidden, *rows))))
    recompute = torch.is_grad_enabled() and len(chunks) > 1
    pieces = [checkpoint(one, *c, use_reentrant=False) if recompute else one(*c) for c in chunks]
    return tuple(map(torch.cat, zip(*pieces))) if isinstance(pieces[0], tuple) else torch.cat(pieces)


def token_logps(model, ids, attention_mask, mask, temperature: float = 1.0, with_entropy: bool = False):
    """log p(token | everything before it) under `mask`, 0 elsewhere: (B, T); with_entropy: also the entropy in nats, (B, T).

    The one place that scores tokens. Must agree with what `rollout` noted while sampling; a test holds it to 1e-5.
    """
    def fn(logits, target):                                                         # (n, V), (n,)
        logits = logits / temperature
        logp = logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1)        # (n,)
        if not with_entropy:
            return logp
        with torch.no_grad():
            every = logits.log_softmax(1)                                           # (n, V)
            return logp, -(every.exp() * every).sum(1)

    chosen = mask.bool()
    values = over_vocab_chunks(hidden_at(model, ids, attention_mask, mask), model.get_output_embeddings(), fn, ids[chosen])

    def spread(v):
        return torch.zeros(ids.shape, device=ids.device).masked_scatter(chosen, v)  # (B, T)
    return (spread(values[0]), spread(values[1])) if with_entropy else spread(values)


def micro_batches(rollouts: Rollouts, rows, size: int):
    """Cuts rows into parts of similar length and yields (part, columns in use): longest first, so memory runs out at once or never."""
    lengths = rollouts.attention_mask.sum(1).tolist()
    rows = sorted(rows, key=lambda i: -lengths[i])
    for i in range(0, len(rows), size or len(rows)):
        part = rows[i:i + (size or len(rows))]
        used = rollouts.attention_mask[part].any(0).nonzero()
        yield part, slice(int(used[0]), int(used[-1]) + 1)


@torch.no_grad()
def score(model, rollouts: Rollouts, temperature: float = 1.0, micro_batch: int = 0):
    """token_logps and entropies of whole rollouts without gradient, in micro-batches: two tensors (B, T)."""
    logps, entropy = torch.zeros_like(rollouts.logps), torch.zeros_like(rollouts.logps)
    for part, columns in micro_batches(rollouts, range(len(rollouts.ids)), micro_batch):
        logps[part, columns], entropy[part, columns] = token_logps(
            model, rollouts.ids[part, columns], rollouts.attention_mask[part, columns], rollouts.mask[part, columns],
            temperature, with_entropy=True)
    return logps, entropy


def rescore(model, rollouts: Rollouts, config) -> None:
    """On CUDA, replaces the sampler's log-probs by the scorer's: bf16 kernels of the two differ by about 1e-2, and the
    ratio of an unchanged policy must be 1. On CPU (fp32) they agree to 1e-5, so nothing is done."""
    if rollouts.ids.device.type == "cuda":
        rollouts.logps, rollouts.entropy = score(model, rollouts, config.temperature, config.micro_batch)


# ------------------------------------------------------------------------------------------------ GRPO
def group_advantages(rewards, group_size: int, std: bool = True):
    """GRPO advantages, (B,) -> (B,): A_i = (r_i - mean) / (std + 1e-6) within the group (DeepSeekMath, arXiv 2402.03300, eq. 3).

    std is the unbiased one (n - 1). A group of one, or one without variance, gives exactly 0: float noise must not be blown up.
    std=False keeps r_i - mean (Dr. GRPO, arXiv 2503.20783).
    """
    grouped = rewards.double().view(-1, group_size)                                 # (groups, group_size)
    centred = grouped - grouped.mean(1, keepdim=True)
    if std and group_size > 1:
        centred = centred / (grouped.std(1, keepdim=True) + 1e-6)
    flat = grouped.max(1, keepdim=True).values == grouped.min(1, keepdim=True).values
    return centred.masked_fill(flat, 0.0).flatten().float()


def policy_loss(logps, old_logps, advantages, mask, clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float = 3.0,
                denominator=None):
    """Clipped policy-gradient loss, a scalar: the sum over `mask` of the token losses / denominator (default: tokens in the mask).

    logps, old_logps, mask (B, T); advantages (B, T) or (B, 1). Pass the token count of the whole optimiser batch as denominator when
    you split it, then micro-batches give the same gradient as one batch. Clip range and dual clip as in DAPO and verl.
    """
    ratio = (logps - old_logps).clamp(-20, 20).exp()                                # (B, T)
    # L_t = max(-A rho, -A clip(rho, 1 - low, 1 + high)); for A < 0 at most -dual_clip * A
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))
    loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return (loss * mask).sum() / (mask.sum() if denominator is None else denominator)


def make_optimizer(model, config):
    """AdamW, constant learning rate after 5 warm-up steps (see `set_lr`)."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=base_lr(config), weight_decay=0.0)


def base_lr(config) -> float:
    return config.lr if config.lr is not None else (3e-4 if config.model == "tiny" else 1e-6)


def update(student, optimizer, rollouts: Rollouts, advantages, config, step: int) -> float:
    """One pass over a batch of rollouts: --minibatches optimiser updates, each exact for any --micro_batch.

    advantages (B, T) or (B, 1). Returns the last gradient norm. With one update a batch the ratio is 1 and the
    clip inert; with more, later minibatches are slightly off-policy and the clip starts to act.
    """
    norm, B = 0.0, len(rollouts.ids)
    advantages = advantages.expand(rollouts.ids.shape)                              # (B, T)
    student.train()
    for rows in torch.arange(B).chunk(config.minibatches):
        tokens = rollouts.mask[rows].sum()  # one denominator for the whole optimiser batch
        if not (advantages[rows] * rollouts.mask[rows]).any():
            continue  # no signal: not even Adam's momentum may move the weights
        for part, columns in micro_batches(rollouts, rows.tolist(), config.micro_batch):
            mask = rollouts.mask[part, columns]                                     # (b, t)
            logps = token_logps(student, rollouts.ids[part, columns], rollouts.attention_mask[part, columns],
                                mask, config.temperature)                           # (b, t)
            policy_loss(logps, rollouts.logps[part, columns], advantages[part, columns], mask,
                        denominator=tokens).backward()
        norm = apply_gradients(student, optimizer, step, base_lr(config))
    student.eval()
    return norm


def apply_gradients(model, optimizer, step: int, lr: float) -> float:
    """Clip to norm 1, warm up over 5 steps, update. Returns the norm before clipping; if it is not finite, nothing is updated."""
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 5)
        optimizer.step()
    optimizer.zero_grad()
    return norm


# ------------------------------------------------------------------------------------------------ evaluation
def evaluate(model, tok, tasks, *, samples: int = 1, greedy: bool = False, **sampling) -> dict:
    """avg@k (`accuracy`), its standard error over problems (`se`), pass@k, maj@k, mean length, share finished.

    sampling: keyword arguments of `rollout`. The seed is fixed, so all methods see the same problems and the
    same dice. greedy=True adds `greedy_accuracy` and `greedy_se`.
    """
    generator = torch.Generator(next(model.parameters()).device).manual_seed(1234)
    out = rollout(model, tok, tasks, samples, generator=generator, **sampling)
    right = rewards(out, tasks).view(-1, samples)                                   # (tasks, samples)
    votes = [Counter(normalise(a) for a in map(final_answer, out.texts[i:i + samples]) if a is not None)
             for i in range(0, len(out.texts), samples)]
    majority = [bool(v) and v.most_common(1)[0][0] == normalise(t.answer) for v, t in zip(votes, tasks)]
    spread = float(right.mean(1).std()) if len(tasks) > 1 else 0.0
    result = {"accuracy": float(right.mean()), "se": spread / math.sqrt(len(tasks)),
              f"pass@{samples}": float(right.amax(1).mean()), f"maj@{samples}": float(np.mean(majority)),
              "length": float(out.mask.sum(1).float().mean()), "finished": float(out.finished.float().mean())}
    if greedy:
        best = evaluate(model, tok, tasks, **{**sampling, "temperature": 0.0})
        result |= {"greedy_accuracy": best["accuracy"], "greedy_se": best["se"]}
    return result


# ------------------------------------------------------------------------------------------------ runs on disk
def run_folder(config, script: str) -> Path:
    return Path(config.out or f"runs/{script}-{config.method}-s{config.seed}")


class Run:
    """A run's folder (metrics.jsonl, summary.json, state.pt, model/), its lines on the console, its checkpoint."""

    def __init__(self, config, script: str):
        self.config, self.script, self.warned, self.parts = config, script, set(), {}
        self.notes = {"step": 0, "seconds": 0.0, "step_seconds": 0.0, "skipped_steps": 0}  # survives --resume
        self.clock = time.time()
        self.folder = run_folder(config, script)
        self.metrics = self.folder / "metrics.jsonl"
        if config.resume:
            self.state = self._load_state()
        elif self.folder.exists() and any(self.folder.iterdir()):
            if not config.overwrite:
                fail(f"{self.folder} exists; add --resume to go on, --overwrite to replace it, or another --out")
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def _load_state(self) -> dict:
        path = self.folder / "state.pt"
        if not path.exists():
            fail(f"there is no checkpoint {path}; start without --resume")
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:
            fail(f"the checkpoint {path} is damaged ({type(error).__name__}); start again with --overwrite")
        free = {"steps", "resume", "overwrite", "out", "threads", "save_every", "show_every", "plot", "fresh"}
        changed = [k for k, v in state["config"].items() if k not in free and v != getattr(self.config, k, v)]
        if changed:
            fail("--resume needs the flags of the first start; changed: " + ", ".join("--" + k for k in changed))
        self.notes = state["notes"]
        lines = [line for line in self.metrics.read_text().splitlines() if line.endswith("}")]
        kept = [x for x in lines if json.loads(x).get("step", 0) <= self.notes["step"] and '"after"' not in x]
        self.metrics.write_text("".join(x + "\n" for x in kept))  # what came after the checkpoint is done again
        return state

    def track(self, **parts) -> int:
        """Names everything that a checkpoint must hold (models, optimiser, dice); on --resume restores it.

        Returns the first step to do. After this call, and not before, the random state is the run's own.
        """
        self.parts = parts
        if self.config.resume:
            for name, part in parts.items():
                (getattr(part, "load_state_dict", None) or getattr(part, "set_state", None)
                 or part.setstate)(self.state[name])
        return self.notes["step"]

    def save(self, step: int) -> None:
        """Checkpoint at the end of a step if one is due: one file, written beside the old one and then renamed."""
        self.notes["step"] = step
        if self.config.save_every and (step % self.config.save_every == 0 or step == self.config.steps):
            state = {name: (getattr(part, "state_dict", None) or getattr(part, "get_state", None) or part.getstate)()
                     for name, part in self.parts.items()}
            self._tick()
            save_atomically({**state, "notes": self.notes, "config": dataclasses.asdict(self.config)},
                            self.folder / "state.pt")

    def _tick(self) -> None:
        self.notes["seconds"] += time.time() - self.clock
        self.clock = time.time()

    def log(self, record: dict) -> None:
        with open(self.metrics, "a") as f:
            f.write(json.dumps(record) + "\n")

    def step(self, step: int, seconds: float, shown: dict, **more) -> None:
        """One line on the console (`shown`), one object in metrics.jsonl (`shown` and `more`)."""
        self.notes["step_seconds"] += seconds
        values = "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
        print(f"step {step:>{len(str(self.config.steps))}}/{self.config.steps}  {values}  {seconds:.2f}s", flush=True)
        self.log({"step": step, **shown, **more, "seconds": seconds})

    def evaluated(self, when, result: dict) -> None:
        """when: 'before', 'after' or a step."""
        if when == "before":
            self.notes |= {"before": result, "best": result["accuracy"]}
        self.notes["best"] = max(self.notes["best"], result["accuracy"])
        change = f"  ({result['accuracy'] - self.notes['before']['accuracy']:+.3f})" if when == "after" else ""
        print(f"eval {when}  accuracy {result['accuracy']:.3f} +- {result['se']:.3f} at T = 1, "
              f"{result['greedy_accuracy']:.3f} greedy, length {result['length']:.0f}{change}", flush=True)
        self.log({"eval": when, **({"step": when} if isinstance(when, int) else {}), **result})

    def warn(self, text: str) -> None:
        """Each warning once."""
        if text not in self.warned:
            self.warned.add(text)
            print(f"warning: {text}", flush=True)

    def watch(self, rollouts: Rollouts, flat: int, groups: int, norm: float) -> None:
        """The usual reasons why nothing is learnt, each with a remedy."""
        if flat == groups and self.config.group_size > 1:
            self.warn("every group is all right or all wrong, so the outcome gives no signal in this step; take "
                      "easier or harder problems, or a larger --group_size")
        if (~rollouts.finished).float().mean() > 0.5:
            self.warn("more than half of the rollouts did not finish and score 0; raise --max_new_tokens or --max_turns")
        if rollouts.entropy.sum() / rollouts.mask.sum() < 0.01:
            self.warn("the policy's entropy is below 0.01: it writes the same text again and again; lower --lr")
        if not math.isfinite(norm):
            self.notes["skipped_steps"] += 1
            self.warn("the gradient is not finite; such steps are skipped and counted; lower --lr")

    def finish(self, model, tok, after: dict, **more) -> dict:
        """Writes model/ and summary.json; returns the summary."""
        self.evaluated("after", after)
        self._tick()
        before, steps = self.notes["before"], max(1, self.notes["step"])
        versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
        summary = {"method": self.config.method, "seed": self.config.seed,
                   "accuracy_before": before["accuracy"], "accuracy_after": after["accuracy"],
                   "accuracy_best": self.notes["best"], "se_before": before["se"], "se": after["se"],
                   "greedy_before": before["greedy_accuracy"], "greedy_after": after["greedy_accuracy"],
                   "greedy_se": after["greedy_se"], "skipped_steps": self.notes["skipped_steps"],
                   "seconds": self.notes["seconds"], "seconds_per_step": self.notes["step_seconds"] / steps,
                   **more, "config": dataclasses.asdict(self.config), "versions": versions}
        model.save_pretrained(self.folder / "model")
        tok.save_pretrained(self.folder / "model")
        temporary = self.folder / "summary.json.tmp"
        temporary.write_text(json.dumps(summary, indent=1))
        os.replace(temporary, self.folder / "summary.json")
        print(f"wrote {self.folder}/  total {summary['seconds']:.0f} s", flush=True)
        return summary


def header(script: str, config, model, device) -> None:
    count = sum(p.numel() for p in model.parameters())
    print(f"{script}  {config.method}  {config.model} model, {count / 1e6:.2f} M parameters | {device}, "
          f"{torch.get_num_threads()} threads | seed {config.seed} | {config.steps} steps x {config.prompts_per_step} prompts x "
          f"{config.group_size} rollouts\nthe loss is not printed: with one update a batch its value says nothing about progress", flush=True)


def table(rows: list[list], head: list[str]) -> str:
    """Aligned text table, Markdown as well."""
    cells = [head, *[[f"{c:.3f}" if isinstance(c, float) else str(c) for c in row] for row in rows]]
    widths = [max(len(r[i]) for r in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(r, widths)) + " |" for r in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def mean_spread(values) -> str:
    """mean ± sample standard deviation over seeds."""
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def plot_runs(png: str, folders: list) -> None:
    """Draws accuracy, solved share, entropy and response length of one or more run folders into one PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.5))
    for folder in folders:
        try:
            records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        except OSError:
            fail(f"{folder} is not a run's folder (no metrics.jsonl in it); check --plot")
        last = max((r.get("step", 0) for r in records), default=0)
        place = {"before": 0, "after": last}
        evals = [(place.get(r["eval"], r["eval"]), r["accuracy"]) for r in records if "eval" in r]
        axes[0].plot(*zip(*evals), "o-", label=Path(folder).name)
        steps = [r for r in records if "eval" not in r]
        for axis, key in zip(axes[1:], ("solved", "entropy", "length")):
            axis.plot([r["step"] for r in steps if key in r], [r[key] for r in steps if key in r])
    for axis, title in zip(axes, ("held-out accuracy, T = 1", "solved (training batch)", "entropy (nats)", "response tokens")):
        axis.set(title=title, xlabel="step")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(png, dpi=120)
    plt.close(figure)
    print(f"wrote {png}")


def train_and_plot(config, train: Callable, script: str) -> None:
    """What `python X.py` does: train, then draw with --plot FILE.png; with --plot FILE.png RUN..., only draw."""
    if len(config.plot) < 2:
        train(config)
    if config.plot:
        plot_runs(config.plot[0], config.plot[1:] or [run_folder(config, script)])


# ------------------------------------------------------------------------------------------------ chat, for judges and memory
def chat_backend(name: str, model_name: str = "", max_new_tokens: int = 512, temperature: float = 0.0, *, json_object: bool = False,
                 api_key_env: str = "OPENAI_API_KEY", timeout: float = 60.0, retries: int = 4, workers: int = 8, batch: int = 8,
                 device="auto", sleep: Callable = time.sleep) -> Callable[[list[list[dict]]], list[str | None]]:
    """A function: list of conversations (lists of messages) -> list of texts, None where no complete answer came.

    name: a URL (OpenAI-compatible server; `model_name` is the server's) or a Hugging Face id or folder (local, batched).
    """
    if name.startswith(("http://", "https://")):
        return endpoint(name, model_name, max_new_tokens, temperature, json_object, api_key_env, timeout, retries, workers, sleep)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tok = load_model(name, device, trainable=False)
    room = getattr(model.config, "max_position_embeddings", 1 << 30) - max_new_tokens
    generator = torch.Generator(device).manual_seed(0)

    def chat(conversations):
        answers: list[str | None] = [None] * len(conversations)
        fits = [i for i, c in enumerate(conversations) if len(prompt_ids(tok, c)) <= room]  # too long a prompt is no answer, not a crash
        for start in range(0, len(fits), batch):
            part = fits[start:start + batch]
            out = rollout(model, tok, [Task(conversations[i], "") for i in part], max_new_tokens=max_new_tokens,
                          temperature=temperature, generator=generator)
            for i, text, done in zip(part, out.texts, out.finished.tolist()):
                answers[i] = text.rsplit("</think>", 1)[-1].strip() if done else None
        return answers
    return chat


def endpoint(url, model_name, max_new_tokens, temperature, json_object, api_key_env, timeout, retries, workers, sleep):
    """OpenAI-compatible server through huggingface_hub. Retries 429, 5xx, time-outs and lost connections with back-off."""
    from huggingface_hub import InferenceClient
    # The key is always explicit: without one, the client would send this machine's Hugging Face token to the URL.
    client = InferenceClient(base_url=url, api_key=os.environ.get(api_key_env) or "EMPTY", timeout=timeout)
    extra = {"response_format": {"type": "json_object"}} if json_object else {}

    def ask(messages):
        for attempt in range(retries + 1):
            try:
                choice = client.chat_completion(messages, model=model_name or "default", max_tokens=max_new_tokens,
                                                temperature=temperature, **extra).choices[0]
                complete = choice.message.content and choice.finish_reason != "length"
                return choice.message.content if complete else None
            except Exception as error:  # the transport library's own error classes differ between versions: look at attributes
                code = getattr(getattr(error, "response", None), "status_code", None)
                if code in (401, 403, 404):
                    fail(f"{url} answered {code}; check the address, the model name '{model_name}' and the key in ${api_key_env}")
                if code is not None and code != 429 and code < 500:
                    return None  # this conversation was refused; asking again would not help
                if attempt < retries:
                    sleep(min(2.0 ** attempt, 30.0))
        return None

    def chat(conversations):
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(ask, conversations))
    return chat


# ------------------------------------------------------------------------------------------------ the GRPO baseline
def worked_solution(rng, task: Task, wrong: float = 0.0) -> str:
    """A chain solved in writing, `A4+1=5, B5*5=5. \\boxed{5}`; each result is a random number with probability `wrong`."""
    value, modulus, steps = parse_chain(task.messages[-1]["content"])
    parts = []
    for label, operation, operand in steps:
        result = APPLY[operation](value, operand) % modulus
        if rng.random() < wrong:
            result = rng.randrange(modulus)
        parts.append(f"{label}{value}{operation}{operand}={result}")
        value = result
    return ", ".join(parts) + f". \\boxed{{{value}}}"


def demonstration(tok, task: Task, answer: str) -> tuple[list[int], list[int]]:
    """Task and one assistant turn -> (ids, mask) as the rollout would have produced them."""
    prompt, turn = prompt_ids(tok, task.messages), [*encode(tok, answer), end_of_turn(tok)]
    return prompt + turn, [0] * len(prompt) + [1] * len(turn)


def load_student(config, device):
    """The tiny model, fitted on worked solutions with 15 % wrong results, or a Hugging Face model."""
    if config.model != "tiny":
        return load_model(config.model, device)
    tok, rng = build_tokenizer(CHAIN_ATOMS), random.Random(1)
    tasks = [small_chain(rng) for _ in range(8000)]
    docs = [demonstration(tok, task, worked_solution(rng, task, wrong=0.15)) for task in tasks]
    model = tiny_model(tok, seed=1)
    return fit_tiny("the student", model, docs, steps=600, fresh=config.fresh).to(device), tok


def small_chain(rng) -> Task:
    return chain_task(rng, operations=(2, 4), modulus=7)


def train(config: Config) -> dict:
    """GRPO: sample groups, centre and scale the rewards within each group, one clipped policy-gradient update."""
    device = setup(config)
    run = Run(config, "common")
    train_tasks, held_out = load_tasks(config.data, config.eval_tasks, small_chain)
    student, tok = load_student(config, device)
    header("common.py", config, student, device)
    optimizer, rng = make_optimizer(student, config), random.Random(config.seed)
    generator = torch.Generator(device).manual_seed(config.seed)
    sampling = dict(max_new_tokens=config.max_new_tokens, thinking=config.thinking)
    first = run.track(model=student, optimizer=optimizer, dice=generator, prompts=rng)
    if not config.resume:
        run.evaluated("before", evaluate(student, tok, held_out, greedy=True, **sampling))
    for step in range(first, config.steps):
        started = time.time()
        tasks = rng.sample(train_tasks, config.prompts_per_step)
        rollouts = rollout(student, tok, tasks, config.group_size, temperature=config.temperature,
                           generator=generator, **sampling)
        rescore(student, rollouts, config)
        sampled = time.time()
        reward = rewards(rollouts, tasks).to(device)                                # (B,)
        advantages = group_advantages(reward, config.group_size)[:, None]           # (B, 1)
        norm = update(student, optimizer, rollouts, advantages, config, step)
        flat = int((reward.view(-1, config.group_size).std(1, correction=0) == 0).sum())
        run.watch(rollouts, flat, config.prompts_per_step, norm)
        run.step(step + 1, time.time() - started,
                 {"solved": float(reward.mean()), "entropy": float(rollouts.entropy.sum() / rollouts.mask.sum()),
                  "grad": norm, "length": float(rollouts.mask.sum(1).float().mean()),
                  "flat groups": f"{flat}/{config.prompts_per_step}"}, rollout_seconds=sampled - started)
        if config.show_every and step % config.show_every == 0:
            print(f"      {tasks[0].messages[-1]['content']}\n      > {transcript(tok, rollouts, 0)}")
        if config.eval_every and (step + 1) % config.eval_every == 0:
            run.evaluated(step + 1, evaluate(student, tok, held_out, greedy=True, **sampling))
        run.save(step + 1)
    return run.finish(student, tok, evaluate(student, tok, held_out, greedy=True, **sampling))


def main(argv=None) -> None:
    train_and_plot(parse(Config, argv), train, "common")


if __name__ == "__main__":
    main()
