"""What the scripts share: tiny models, tasks, tools, rollouts, scoring, the GRPO baseline, runs on disk.

    python common.py        trains the GRPO baseline on the chain task, without tools

Where to start reading: `rollout`, one batched decoding loop; `token_logps`, the one place that scores tokens;
`group_advantages`, `policy_loss` and `update`, which are GRPO; `train`, the loop, written out.

Shapes: B rollouts (prompts x group_size), T columns (padded prompt, then response), N scored tokens, H hidden
size, V vocabulary. `mask` (B, T) is 1 exactly on the tokens that the model sampled: only they carry loss.
`attention_mask` (B, T) is 1 on every real token. Both come from what the loop did, never from token values:
pad may be the same id as the end of a turn.
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
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Callable, ClassVar, Literal, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import InferenceClient, constants
from huggingface_hub.utils import get_session
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoTokenizer, DynamicCache, HfArgumentParser,
                          PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM)

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a warning at each fork of the python tool
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
# For long work that prints no lines of its own; silent in a log file.
progress = functools.partial(tqdm, mininterval=1, leave=False, disable=None)


# ------------------------------------------------------------------------------------- command line
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
    method: Literal["grpo"] = option("grpo", "the baseline is the only one here")
    data: str = option("chain", "'chain' (generated), a hub dataset id, or a jsonl, json, csv, parquet file")
    steps: int = option(60, "training steps")
    prompts_per_step: int = option(8, "problems a step")
    group_size: int = option(8, "rollouts a problem")
    minibatches: int = option(1, "optimiser updates on each batch of rollouts")
    micro_batch: int = option(0, "rollouts a backward pass, to save memory; 0 = all; same gradient")
    max_new_tokens: int = option(0, "tokens a trajectory, tool text included; 0 = 1024, less on the chain")
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
    save_every: int = option(50, "checkpoint every so many steps and at the end; 0 = never")
    show_every: int = option(20, "print one rollout every so many steps; 0 = never")
    fresh: bool = option(False, "fit the tiny models again instead of taking them from the cache")
    thinking: bool = option(False, "let the chat template open a thinking block (models that have one)")
    plot: list[str] = field(default_factory=list, metadata={
        "help": "FILE.png: draw this run at its end; FILE.png RUN...: only draw those run folders"})

    def __post_init__(self):
        if not self.max_new_tokens:
            self.max_new_tokens = self.tiny_tokens if self.data == "chain" else 1024

    @property
    def sampling(self) -> dict:
        return {name: getattr(self, name) for name in ("max_new_tokens", "max_turns", "thinking")}

    @property
    def rate(self) -> float:
        return self.lr if self.lr is not None else 3e-4 if self.model == "tiny" else 1e-6


def parse(config_class, argv=None):
    """Command line -> config. No abbreviations; an unknown flag or bad value: one sentence, exit code 2."""
    parser = HfArgumentParser(config_class, allow_abbrev=False)
    parser.error = fail
    config = config_class(**vars(parser.parse_args(argv)))
    counts = ("prompts_per_step", "group_size", "minibatches", "max_turns", "eval_tasks", "seeds")
    least = {"temperature": 0.01, **dict.fromkeys(counts, 1)}  # of all other numbers: 0
    for name, value in vars(config).items():
        if type(value) in (int, float) and not least.get(name, 0) <= value < math.inf:
            fail(f"--{name} {value} is out of range; give {least.get(name, 0)} or more")
    for flags in (("resume", "overwrite"), ("compare", "explain", "cascade", "plot")):
        if len(given := [f"--{flag}" for flag in flags if getattr(config, flag, False)]) > 1:
            fail(f"{' and '.join(given)} contradict each other; give one of them")
    return config


def setup(config) -> torch.device:
    """Device and threads. One thread for tiny models: more are slow on a busy machine, one is repeatable."""
    if config.threads or config.model == "tiny":
        torch.set_num_threads(config.threads or 1)
    name = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        fail(f"device '{name}' is not usable on this machine; try --device cpu")


# ------------------------------------------------------------------------------------------- models
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
# What the template always writes in one piece is one token of the tiny tokenizer: a tool's answer costs 3.
PHRASES = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>",
           "<|im_start|>system\n", "# Tools\n", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>user\n",
           "<|im_end|>\n<|im_start|>assistant\n", "\n<|im_start|>user\n<tool_response>\n",
           "\n</tool_response><|im_end|>\n<|im_start|>assistant\n"]


def build_tokenizer(atoms: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer without merges (any text can be encoded, digits and operators stay single), plus
    `atoms`: phrases that are one token each."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    # special=False as in Qwen3: special tokens vanish in decoding, and then no tool call could be parsed.
    core.add_tokens([AddedToken(phrase, normalized=False, special=False) for phrase in PHRASES + atoms])
    tok = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tok.chat_template = TEMPLATE
    return tok


def tiny_model(tok, seed: int, hidden_size: int = 64, layers: int = 2) -> Qwen3ForCausalLM:
    """A real Qwen3 (grouped-query attention, q/k norm, tied embeddings), only small; random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(Qwen3Config(
            vocab_size=len(tok), hidden_size=hidden_size, intermediate_size=3 * hidden_size,
            num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, head_dim=hidden_size // 4,
            max_position_embeddings=2048, tie_word_embeddings=True, initializer_range=0.06,
            eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id))


@contextlib.contextmanager
def replacing(path: Path):
    """`with replacing(path) as file:` write `file`; at the end it takes the place of `path` at one blow."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    yield temporary
    os.replace(temporary, path)


def cached(model, key, build: Callable, fresh: bool = False):
    """Loads `model`'s weights from the cache, or calls `build()`, which trains it in place, and stores them.
    key: what the weights depend on (anything json can write)."""
    key = json.dumps([key, model.config.to_dict(), torch.__version__, transformers.__version__], default=str)
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "four-papers"
    path = root / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.pt"
    if path.exists() and not fresh:
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        build()
        root.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            torch.save(model.state_dict(), file)
    return model.eval()


def fit_tiny(name: str, model, docs, steps: int, lr: float = 3e-3, seed: int = 0, fresh: bool = False):
    """Next-token fit of a tiny model on demonstrations; cached. docs: list of (ids, mask), lists of equal
    length; the loss is on the tokens with mask 1, as in SFT."""
    def epoch():  # documents of similar length share a batch of 32, which halves the padding
        order = rng.sample(range(len(docs)), len(docs))
        pools = [sorted(order[i:i + 512], key=lambda j: len(docs[j][0])) for i in range(0, len(order), 512)]
        return [rows[i:i + 32] for rows in pools for i in range(0, len(rows), 32)]

    def build():
        batches = []
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
        ramp = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 50, (steps - s) / steps))
        model.train()
        for _ in progress(range(steps), desc=f"fitting {name}"):
            if not batches:
                batches = epoch()
                rng.shuffle(batches)
            rows = batches.pop()
            ids, mask = (padded([docs[i][j] for i in rows], 0) for j in (0, 1))     # (B, T) each
            # Right padding needs no attention mask under causal attention: no real token can look at a pad.
            loss = -token_logps(model, ids, None, mask).sum() / mask.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()  # after the step: the last gradient must not leak into later training
            ramp.step()

    rng, digest = random.Random(seed), hashlib.sha256(json.dumps(docs).encode()).hexdigest()
    return cached(model, ["fit", digest, steps, 32, lr, seed], build, fresh)


@functools.cache
def hub_reachable() -> bool:
    """One request. Without a network the hub's own client would try for a minute."""
    try:
        return bool(get_session().head(constants.ENDPOINT, timeout=5))
    except Exception:  # each version of the hub's client has its own; all mean the same here
        return False


def mixed_precision(device) -> bool:
    """bf16 or fp32? All that depends on the device asks here: autocast, types, checkpointing, `rescore`."""
    return torch.device(device).type == "cuda"


def autocast(model):
    device = model.device.type
    return torch.autocast(device, torch.bfloat16, enabled=mixed_precision(device))


def load_model(name: str, device, trainable: bool = True):
    """Hugging Face id or folder -> (model, tokenizer). Frozen on a CPU, it keeps the type it was saved in."""
    bf16 = mixed_precision(device)
    # fp32 master weights: bf16 ones would swallow updates of 1e-6
    dtype = torch.float32 if trainable else torch.bfloat16 if bf16 else "auto"
    offline = Path(name).exists() or not hub_reachable()
    try:
        tok = AutoTokenizer.from_pretrained(name, local_files_only=offline)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, local_files_only=offline)
    except (OSError, ValueError) as error:
        reason = "no network" if offline and not Path(name).exists() else str(error).strip().splitlines()[0]
        fail(f"cannot load the model '{name}' ({reason}); "
             "give 'tiny' (a script's default), a model's folder or, with a network, a Hugging Face id")
    if tok.chat_template is None:
        fail(f"the tokenizer of '{name}' has no chat template; take an instruction-tuned model")
    tok.pad_token = tok.pad_token or tok.eos_token
    if trainable and bf16:  # acts in train mode only, so not in rollouts
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.to(device).requires_grad_(trainable).eval(), tok


def check_same_tokenizer(tok, teacher_tok) -> None:
    """Distillation compares log-probs of the same ids, so an id must mean the same to both models."""
    if tok.get_vocab() != teacher_tok.get_vocab():
        fail(f"student and teacher have different tokenizers ({len(tok)} and {len(teacher_tok)} tokens); "
             "take two models of one family")


# -------------------------------------------------------------------------------- tasks and answers
@dataclass
class Task:
    messages: list[dict]  # chat messages, the last one by the user
    answer: str           # what `is_correct` compares with; no model ever sees it


APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul}
ASK = ". Put the last value in \\boxed{}."
CHAIN_ATOMS = ["Start with ", ", work modulo ", ": ", ", ", ASK, "\\boxed{", "10"]


def chain_task(rng, operations=(3, 5), modulus: int = 10) -> Task:
    """A chain of + - *, left to right, modulo `modulus`; without the letters a tiny model miscounts."""
    start, steps = rng.randrange(modulus), []
    for label in "ABCDEFGH"[:rng.randint(*operations)]:
        steps.append(f"{label}{rng.choice('+-*')}{rng.randrange(1, modulus)}")
    text = f"Start with {start}, work modulo {modulus}: {', '.join(steps)}{ASK}"
    return Task([{"role": "user", "content": text}], str(parse_chain(text)[0][-1]))


def parse_chain(text: str) -> tuple[list[int], int, list[tuple[str, str, int]]]:
    """Problem text -> ([start, value after each operation], modulus, [(label, operation, operand), ...])."""
    start, modulus = map(int, re.search(r"Start with (\d+), work modulo (\d+):", text).groups())
    steps = [(a, b, int(c)) for a, b, c in re.findall(r"\b([A-H])([+*-])(\d+)", text)]
    values = [start]
    for _, operation, operand in steps:
        values.append(APPLY[operation](values[-1], operand) % modulus)
    return values, modulus, steps


def load_tasks(source: str, eval_tasks: int, make_chain=chain_task, a_step: int = 1):
    """'chain', a file or a hub id -> (training, held-out tasks): disjoint, the same for every seed."""
    rng = random.Random(20260)
    if source == "chain":
        tasks = [make_chain(rng) for _ in range(20 * eval_tasks + 4000)]
    else:
        tasks = [row_to_task(row, f"{source}, row {i}") for i, row in enumerate(read_rows(source), 1)]
        rng.shuffle(tasks)
    unique = list({json.dumps(task.messages): task for task in tasks}.values())
    if len(unique) < eval_tasks + a_step:
        fail(f"{source} holds {len(unique)} different problems, too few for --eval_tasks {eval_tasks} and "
             f"{a_step} a training step; lower --eval_tasks or --prompts_per_step")
    return unique[eval_tasks:], unique[:eval_tasks]


def read_rows(source: str) -> list[dict]:
    """JSON lines, one JSON list, csv, parquet or a hub id -> rows."""
    kind, rows, where = Path(source).suffix[1:], [], ""
    try:
        if kind in ("jsonl", "json"):  # not through `datasets`, which would not name a bad line
            text = Path(source).read_text(encoding="utf-8")
            if text.lstrip().startswith("["):
                return json.loads(text)
            for number, line in enumerate(text.split("\n"), 1):
                where = f", line {number}"
                rows += [json.loads(line)] if line.strip() else []
            return rows
        import datasets  # slow to import, so only where it is needed
        datasets.disable_progress_bars()
        datasets.utils.logging.set_verbosity(50)  # critical: else it tells of a bad file, too
        if kind in ("csv", "parquet"):
            return list(datasets.load_dataset(kind, data_files=source, split="train"))
        if not hub_reachable():
            raise ConnectionError("no such file, and no network")
        configs = datasets.get_dataset_config_names(source)
        return list(datasets.load_dataset(source, "main" if "main" in configs else configs[0], split="train"))
    except Exception as error:  # the hub alone has a dozen kinds; all mean the same to the user
        fail(f"cannot read {source}{where} ({type(error).__name__}: {' '.join(str(error).split())[:200]}); "
             "give 'chain', a jsonl, json, csv or parquet file, or, with a network, a hub id")


def row_to_task(row: dict, where: str) -> Task:
    """One dataset row -> Task. Columns: question, problem or prompt; answer or solution; optional system."""
    columns = row if isinstance(row, dict) else {}
    question = columns.get("question") or columns.get("problem") or columns.get("prompt")
    answer, system = columns.get("answer", columns.get("solution")), columns.get("system") or ""
    if not isinstance(question, str) or answer is None:
        fail(f"{where}: found the columns {sorted(columns)}, but need question, problem or prompt (a text), "
             "and answer or solution")
    if not any(mark in system + question for mark in ("boxed", "<answer>")):
        question += "\n\nPut the final answer in \\boxed{}."
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    return Task(messages, final_answer(str(answer)) or str(answer).strip())


def final_answer(text: str) -> str | None:
    """What a text commits to: the last \\boxed{}, else <answer>, else `#### x`, else the whole text if it is
    one number or one capital letter; else None."""
    text = text.rsplit("</think>", 1)[-1]
    if "\\boxed{" in text:
        depth, inside = 1, text.rsplit("\\boxed{", 1)[1]
        for i, character in enumerate(inside):
            depth += (character == "{") - (character == "}")
            if depth == 0:
                return inside[:i].strip()
        return None
    number_or_letter = r"\A\s*([A-Z]|[-+$]?[\d.,]*\d%?)\.?\s*\Z"
    for pattern in (r"<answer>(.*?)</answer>", r"####\s*([^\n]+)", number_or_letter):
        if found := re.findall(pattern, text, re.DOTALL):
            return found[-1].strip()
    return None


def is_correct(text: str, answer: str) -> bool:
    """Does `text` commit to `answer`? Numbers lose commas, $, % and trailing zeros, words lose spaces and
    case, a single letter is exact."""
    def normalise(words):
        plain = re.sub(r"[\s,$%]|\\[ ,!%$]", "", words).rstrip(".")
        with contextlib.suppress(InvalidOperation):
            if (number := Decimal(plain)).is_finite():  # not float, which would round a long integer
                return number
        return plain if len(plain) == 1 else plain.casefold()

    found = final_answer(text)
    return found is not None and normalise(found) == normalise(answer)


# -------------------------------------------------------------------------------------------- tools
@dataclass
class Tool:
    name: str
    description: str
    parameter: str    # its one argument, a string
    run: Callable[[dict], tuple[str, str]]  # arguments -> text for the model, 'ok', 'error' or 'timeout'
    workers: int = 1  # more: the calls of one decoding step run in parallel threads

    @property
    def schema(self) -> dict:
        return {"type": "function", "function": {
            "name": self.name, "description": self.description,
            "parameters": {"type": "object", "properties": {self.parameter: {"type": "string"}},
                           "required": [self.parameter]}}}


BAD_EXPRESSION = "error: not a valid expression"
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
             ast.USub: operator.neg, ast.UAdd: operator.pos}


def calculate(node) -> float:
    """Value of an arithmetic syntax tree: numbers, + - * / // % **, signs, parentheses; else ValueError."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](calculate(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = calculate(node.left), calculate(node.right)
        if not isinstance(node.op, ast.Pow) or abs(right) <= 64 and abs(left) <= 1e6:  # 9**9**9 never ends
            return OPERATORS[type(node.op)](left, right)
    raise ValueError("not arithmetic")


def run_calculator(arguments: dict) -> tuple[str, str]:
    """Arithmetic through ast; nothing is ever evaluated as code."""
    try:
        value = calculate(ast.parse(str(arguments["expression"])[:200].strip(), mode="eval").body)
        return cut_middle(str(int(value) if value == int(value) else value)), "ok"
    except (KeyError, ValueError, TypeError, SyntaxError, ArithmeticError, RecursionError, MemoryError):
        return BAD_EXPRESSION, "error"  # int() refuses what is infinite, no number, or complex


def cut_middle(text: str, limit: int = 256) -> str:
    """Tool text over 256 characters keeps its first and last 128, as in SOD's code."""
    return text if len(text) <= limit else text[:limit // 2] + "...(truncated)..." + text[-limit // 2:]


# Runs inside the child before the model's code: limits first; a last line that is an expression is printed.
PYTHON_CHILD = """
import ast, resource
for what, limit in ((resource.RLIMIT_CPU, 10), (resource.RLIMIT_AS, 2 << 30),
                    (resource.RLIMIT_FSIZE, 1 << 20), (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(what, (limit, limit))
tree = ast.parse(open("code.py").read(), "code.py")
last = tree.body[-1] if tree.body else None
if isinstance(last, ast.Expr) and getattr(getattr(last.value, "func", None), "id", "") != "print":
    last.value = ast.Call(ast.Name("print", ast.Load()), [last.value], [])
exec(compile(ast.fix_missing_locations(tree), "code.py", "exec"), {"__name__": "__main__"})
"""


def run_python(arguments: dict, seconds: float = 10.0) -> tuple[str, str]:
    """Runs the model's code in a subprocess (POSIX): isolated mode, own session, temporary folder, empty
    environment, no stdin, limits on CPU, memory and file size; a time-out kills the whole process group. It
    does NOT stop code from reading your files, opening sockets or leaving its session: use a container."""
    code = str(arguments.get("code", ""))
    code = re.sub(r".*?```(?:python)?\n(.*?)```.*", r"\1", code, count=1, flags=re.DOTALL)  # in a fence
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "out"), "w+b") as out:
        Path(folder, "code.py").write_text(code, encoding="utf-8", errors="replace")
        child = subprocess.Popen([sys.executable, "-I", "-c", PYTHON_CHILD], cwd=folder, env={},
                                 stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
        try:
            status = "ok" if child.wait(timeout=seconds) == 0 else "error"
        except subprocess.TimeoutExpired:
            status = "timeout"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # also what the code may have left running
        child.wait()
        out.seek(0)
        text = cut_middle(out.read().decode("utf-8", "replace").strip()) or "(no output)"
    return "error: timed out" if status == "timeout" else text, status


TOOLS = {
    "calculator": Tool("calculator", "Evaluates one arithmetic expression.", "expression", run_calculator),
    "python": Tool("python", "Runs Python code and returns what it prints.", "code", run_python, workers=8),
}


def parse_tool_call(text: str) -> dict | None:
    """The first well-formed <tool_call>{"name": ..., "arguments": {...}}</tool_call> in a turn, or None."""
    for body in re.findall(r"<tool_call>\s*(.*?)\s*</tool_call>", text, re.DOTALL):
        with contextlib.suppress(ValueError, RecursionError):
            call = json.loads(body)
            if type(call) is dict and type(call.get("name")) is str and type(call.get("arguments")) is dict:
                return call
    return None


def run_tools(tool: Tool, calls: list[dict]) -> list[tuple[str, str]]:
    def one(call):
        missing = f"error: there is no tool {call['name'][:40]}", "error"
        return tool.run(call["arguments"]) if call["name"] == tool.name else missing
    with ThreadPoolExecutor(tool.workers) as pool:
        return list(pool.map(one, calls))


# ------------------------------------------------------------------------------------------ prompts
def end_of_turn(tok) -> int:
    """Id that ends an assistant's turn. Qwen3-Base ends texts with another token, but turns with this one."""
    return tok.get_vocab().get("<|im_end|>", tok.eos_token_id)


def render(tok, messages, tools, thinking: bool) -> str:
    return tok.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True,
                                   enable_thinking=thinking)


def encode(tok, text: str, **how) -> list[int]:
    return tok(text, add_special_tokens=False, **how).input_ids


def prompt_ids(tok, messages: list[dict], tool: Tool | None = None, thinking: bool = False) -> list[int]:
    """Chat messages -> ids up to where the assistant begins."""
    text = render(tok, messages, [tool.schema] if tool else None, thinking)
    if tool and tool.description not in text:  # the template ignores tools: a system message of ours tells
        note = (f"You can call this tool:\n{json.dumps(tool.schema)}\nTo call it, end your turn with "
                f'<tool_call>{{"name": "{tool.name}", "arguments": {{"{tool.parameter}": "..."}}}}'
                "</tool_call>.")
        own = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else ""
        rest = messages[1:] if own else messages
        text = render(tok, [{"role": "system", "content": own + note}, *rest], None, thinking)
    return encode(tok, text)


@functools.lru_cache(maxsize=64)
def tool_glue(tok, thinking: bool = False) -> tuple[list[int], list[int]]:
    """What the tokenizer's own template puts before and after a tool's text: from behind the assistant's
    end-of-turn token (sampled, so already there) to where its next turn begins."""
    said, heard = "@@SAID@@", "@@HEARD@@"
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said},
            {"role": "tool", "content": heard}]
    text = render(tok, talk, None, thinking)
    if heard not in text:  # the template has no tool role: say it as the user
        talk[-1] = {"role": "user", "content": f"<tool_response>\n{heard}\n</tool_response>"}
        text = render(tok, talk, None, thinking)
    before, after = text.split(said, 1)[1].split(heard, 1)
    end = tok.convert_ids_to_tokens(end_of_turn(tok))
    return encode(tok, before.split(end, 1)[-1]), encode(tok, after)


def tool_message_ids(tok, text: str, thinking: bool = False) -> list[int]:
    """A tool's answer as ids. Control tokens in `text` are encoded as plain text: no tool can end a turn."""
    before, after = tool_glue(tok, thinking)
    return before + encode(tok, text, split_special_tokens=True) + after


def defused(tok, text: str) -> str:
    """Text for use inside a prompt: every special token of this tokenizer is broken up, `<|im_end|>` becomes
    `< |im_end|>`, so that what a model or a server wrote can neither end nor begin a turn."""
    special = {*tok.all_special_tokens, *(t.content for t in tok.added_tokens_decoder.values() if t.special)}
    for token in sorted(special, key=len, reverse=True):
        text = text.replace(token, f"{token[:1]} {token[1:]}")
    return text


# ----------------------------------------------------------------------------------------- rollouts
@dataclass
class Rollouts:
    """B = len(tasks) * group_size rows; the group_size rollouts of one task stand side by side."""
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


@dataclass
class Row:
    """One trajectory while it is being written."""
    response: list = field(default_factory=list)   # (id, 1 if sampled, log-prob, entropy) of each token
    queue: deque = field(default_factory=deque)    # ids waiting to be taken instead of sampled
    turn: list[int] = field(default_factory=list)  # sampled ids of the current turn
    status: list[str] = field(default_factory=list)
    text: str = ""
    finished: bool = False
    done: bool = False


@torch.no_grad()
def rollout(model, tok, tasks, group_size: int = 1, *, tool: Tool | None = None, max_new_tokens: int = 256,
            max_turns: int = 8, temperature: float = 1.0, generator=None, thinking: bool = False) -> Rollouts:
    """Samples group_size trajectories a task, all in one batch with one KV cache.

    In each column every row either *samples* its next token or, while ids are queued for it (a tool's answer
    with the template around it), *takes the next queued id*. Which of the two it was is the loss mask.
    Nothing is decoded and encoded again: the ids are what the model saw. A turn ends with the end-of-turn
    token; if it holds a tool call, the tool runs and its message is queued, else the row is done.
    """
    assert not model.training, "rollouts need model.eval(): gradient checkpointing would switch the cache off"
    device, end = model.device, end_of_turn(tok)
    prompts = [prompt_ids(tok, task.messages, tool, thinking) for task in tasks]
    ids = padded(prompts, tok.pad_token_id, left=True, device=device)                       # (tasks, P)
    attention = padded([[1] * len(p) for p in prompts], 0, left=True, device=device)        # (tasks, P)
    cache = DynamicCache(config=model.config)
    with autocast(model):  # each distinct prompt is read once, then its cache is copied to the whole group
        logits = model(input_ids=ids, attention_mask=attention, position_ids=positions(attention),
                       cache=cache, logits_to_keep=1).logits[:, -1]               # (tasks, V)
    cache.batch_repeat_interleave(group_size)
    logits, attention = logits.repeat_interleave(group_size, 0), attention.repeat_interleave(group_size, 0)
    rows = [Row() for _ in range(len(tasks) * group_size)]
    batch = rows  # the rows that are still being decoded, in the order of the cache
    while True:
        token, logp, entropy = choose(logits.float(), temperature, generator)               # (n,) each
        queued = [row.queue.popleft() if row.queue else -1 for row in batch]
        forced = torch.tensor(queued, device=device)                                        # (n,)
        token = torch.where(forced >= 0, forced, token)  # (n,) every row drew; a queued id overrules the draw
        calls = []
        for row, t, q, lp, h in zip(batch, token.tolist(), queued, logp.tolist(), entropy.tolist()):
            if not row.done:  # a done row may sit in the batch for a while: what it draws is dropped
                row.response.append((t, 1, lp, h) if q < 0 else (t, 0, 0.0, 0.0))
                if q < 0:  # only a sampled end token ends the turn, not the ones in a tool's message
                    row.turn.append(t)
                    if t == end and (call := close_turn(row, tok, tool, max_turns)):
                        calls.append((row, call))
        answers = run_tools(tool, [call for _, call in calls]) if calls else []
        for (row, _), (text, row.status[-1]) in zip(calls, answers):
            row.queue.extend(tool_message_ids(tok, text, thinking))
            row.done = len(row.response) + len(row.queue) >= max_new_tokens
        for row in batch:
            row.done |= len(row.response) >= max_new_tokens
        keep = [j for j, row in enumerate(batch) if not row.done]
        if not keep:
            return pack(tok, prompts, rows, group_size, device)
        if len(keep) < len(batch) / 2:  # done rows leave, but not one by one: each time copies the cache
            index = torch.tensor(keep, device=device)
            cache.batch_select_indices(index)
            token, attention, batch = token[index], attention[index], [batch[j] for j in keep]
        attention = torch.cat([attention, attention.new_ones(len(batch), 1)], 1)
        with autocast(model):
            logits = model(input_ids=token[:, None], attention_mask=attention, cache=cache,
                           position_ids=positions(attention)[:, -1:]).logits[:, -1]         # (n, V)


def close_turn(row: Row, tok, tool: Tool | None, max_turns: int) -> dict | None:
    """Ends the row's turn; returns the tool call to run, or marks the row as done."""
    row.text, row.turn = tok.decode(row.turn[:-1], skip_special_tokens=False), []
    row.status.append("none")
    call = parse_tool_call(row.text) if tool else None
    row.finished, row.done = call is None, call is None or len(row.status) >= max_turns
    return None if row.done else call


def pack(tok, prompts, rows: list[Row], group_size: int, device) -> Rollouts:
    """Finished rows -> tensors."""
    for row in rows:
        if row.turn:  # cut in the middle of a turn
            row.text = tok.decode(row.turn, skip_special_tokens=False)
            row.status.append("none")

    def columns(left, right, fill=0, how=torch.long):                               # (B, T)
        return torch.cat([padded(left, fill, True, device, how), padded(right, fill, False, device, how)], 1)

    prompts = [p for p in prompts for _ in range(group_size)]
    nothing, ones = ([[bit] * len(p) for p in prompts] for bit in (0, 1))
    tokens, sampled, logps, entropy = ([[e[j] for e in row.response] for row in rows] for j in range(4))
    mask = columns(nothing, sampled)                                                # (B, T)
    return Rollouts(
        ids=columns(prompts, tokens, tok.pad_token_id), mask=mask,
        attention_mask=columns(ones, [[1] * len(t) for t in tokens]),
        logps=columns(nothing, logps, 0, torch.float), entropy=columns(nothing, entropy, 0, torch.float),
        prompt_length=max(map(len, prompts)), texts=[row.text for row in rows],
        finished=torch.tensor([row.finished for row in rows], device=device),
        steps=[step_spans(m) for m in mask.tolist()], tool_status=[row.status for row in rows])


def choose(logits, temperature: float, generator):
    """logits (n, V) -> token, its log-prob, entropy in nats, each (n,). Temperature 0 is greedy."""
    logps = torch.log_softmax(logits / (temperature or 1.0), -1)                    # (n, V)
    probs = logps.exp()                                                             # (n, V)
    token = logits.argmax(-1) if temperature == 0 else torch.multinomial(probs, 1, generator=generator)[:, 0]
    return token, logps.gather(1, token[:, None])[:, 0], entropy_of(logps)


def entropy_of(logps):
    """H = -sum_v p(v) log p(v), (n, V) -> (n,) nats; 0 log 0 = 0."""
    return -(logps.exp() * logps).nan_to_num().sum(-1)


def padded(sequences, value, left: bool = False, device=None, dtype=torch.long):
    """list of lists -> (B, longest) tensor."""
    width = max(len(s) for s in sequences)
    fill = [[value] * (width - len(s)) for s in sequences]
    rows = [f + list(s) if left else list(s) + f for s, f in zip(sequences, fill)]
    return torch.tensor(rows, device=device, dtype=dtype)


def positions(attention_mask):
    """(B, T) -> (B, T): positions count real tokens, so padding on either side changes nothing."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def step_spans(mask: list[int]) -> list[tuple[int, int]]:
    """Steps = maximal runs of 1 in one row of the mask, as [start, end) columns."""
    edges = np.flatnonzero(np.diff([0, *mask, 0]))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2])]


def rewards(rollouts: Rollouts, tasks: list[Task]):
    """1.0 for a finished rollout whose last turn holds the right answer, else 0.0: (B,)."""
    group_size = len(rollouts.texts) // len(tasks)
    right = [done and is_correct(text, tasks[i // group_size].answer)
             for i, (text, done) in enumerate(zip(rollouts.texts, rollouts.finished.tolist()))]
    return torch.tensor(right, dtype=torch.float, device=rollouts.ids.device)


def transcript(tok, rollouts: Rollouts, row: int) -> str:
    """One rollout for people: what the model wrote, with the tools' texts in [brackets]."""
    parts, heard_from = [], None
    for start, end in rollouts.steps[row]:
        if heard_from:
            heard = tok.decode(rollouts.ids[row, heard_from:start], skip_special_tokens=True)
            heard = heard.partition("<tool_response>")[2].partition("</tool_response>")[0]
            parts.append(f"[{heard.strip()}]")
        parts.append(tok.decode(rollouts.ids[row, start:end], skip_special_tokens=True).strip())
        heard_from = end
    return " ".join(parts).replace("\n", " ")


# ------------------------------------------------------------------------------------------ scoring
CHUNK_LOGITS = 2**26  # 256 MB in fp32


def hidden_at(model, ids, attention_mask, mask):
    """Last hidden states from which the tokens under `mask` are predicted: (N, H), row by row. ids, mask
    (B, T); attention_mask (B, T), or None if the padding is all on the right. The token in column p is
    predicted from column p - 1: this shift is here and nowhere else."""
    with autocast(model):
        hidden = model.base_model(input_ids=ids, attention_mask=attention_mask, use_cache=False,
                                  position_ids=None if attention_mask is None else positions(attention_mask)
                                  ).last_hidden_state                               # (B, T, H)
    return hidden[:, :-1][mask[:, 1:].bool()]


def lm_head(head) -> Callable:
    """The head as a function hidden (n, H) -> logits (n, V) in fp32; its weights are cast once, here."""
    dtype = torch.bfloat16 if mixed_precision(head.weight.device) else head.weight.dtype
    weight, bias = head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)
    # .float(): a softmax in bf16 would lose the small probabilities
    return lambda hidden: F.linear(hidden.to(dtype), weight, bias).float()


def over_vocab_chunks(hidden, head, fn, *rows):
    """fn(logits (n, V), *rows (n, ...)) -> tensor (n,) or tuple of them, over chunks of tokens, concatenated.
    hidden (N, H); rows: N entries each. All logits never exist at once: a chunk holds CHUNK_LOGITS of them,
    and under gradients it is computed again in the backward pass."""
    logits = lm_head(head)

    def one(h, *r):                                                                 # (n, H), (n, ...)
        return fn(logits(h), *r)

    size = max(1, CHUNK_LOGITS // head.weight.shape[0])
    chunks = list(zip(*(x.split(size) for x in (hidden, *rows))))
    recompute = torch.is_grad_enabled() and len(chunks) > 1
    pieces = [checkpoint(one, *c, use_reentrant=False) if recompute else one(*c) for c in chunks]
    return tuple(map(torch.cat, zip(*pieces))) if isinstance(pieces[0], tuple) else torch.cat(pieces)


def token_logps(model, ids, attention_mask, mask, temperature: float = 1.0, with_entropy: bool = False):
    """log p(token | all before it) under `mask`, 0 elsewhere: (B, T); with_entropy: also entropies in nats.
    The one place that scores tokens; what `rollout` notes while sampling agrees to 1e-5."""
    def fn(logits, target):                                                         # (n, V), (n,)
        logits = logits / temperature
        logp = logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1)        # (n,)
        return (logp, entropy_of(logits.detach().log_softmax(1))) if with_entropy else logp

    def spread(values):                                                             # (N,) -> (B, T)
        return torch.zeros(ids.shape, device=ids.device).masked_scatter(mask.bool(), values)

    hidden = hidden_at(model, ids, attention_mask, mask)                            # (N, H)
    values = over_vocab_chunks(hidden, model.get_output_embeddings(), fn, ids[mask.bool()])
    return tuple(map(spread, values)) if with_entropy else spread(values)


def micro_batches(rollouts: Rollouts, rows: list[int], size: int):
    """Splits `rows` into lists of at most `size` (0: all), each with the columns it uses. Similar lengths
    together and the longest first, so that memory runs out in the first step or never."""
    size, lengths = size or len(rows), rollouts.attention_mask.sum(1).tolist()
    rows = sorted(rows, key=lambda i: -lengths[i])
    for i in range(0, len(rows), size or 1):
        used = rollouts.attention_mask[rows[i:i + size]].any(0).nonzero()
        yield rows[i:i + size], slice(int(used[0]), int(used[-1]) + 1)


@torch.no_grad()
def score(model, rollouts: Rollouts, temperature: float = 1.0, micro_batch: int = 0):
    """token_logps and entropies of whole rollouts, without gradient, in micro-batches: two tensors (B, T)."""
    logps, entropy = torch.zeros_like(rollouts.logps), torch.zeros_like(rollouts.logps)
    for batch in micro_batches(rollouts, range(len(rollouts.ids)), micro_batch):  # batch = (rows, columns)
        logps[batch], entropy[batch] = token_logps(
            model, rollouts.ids[batch], rollouts.attention_mask[batch], rollouts.mask[batch], temperature,
            with_entropy=True)
    return logps, entropy


def rescore(model, rollouts: Rollouts, config) -> None:
    """In bf16, the scorer's log-probs instead of the sampler's: their kernels differ by about 1e-2, and the
    ratio of an unchanged policy must be 1."""
    if mixed_precision(rollouts.ids.device):
        rollouts.logps, rollouts.entropy = score(model, rollouts, config.temperature, config.micro_batch)


# --------------------------------------------------------------------------------------------- GRPO
def group_advantages(rewards, group_size: int, std: bool = True):
    """GRPO advantages, (B,) -> (B,). std=False leaves out the division (Dr. GRPO, arXiv 2503.20783). A group
    of one, or one without variance, gives exactly 0: float noise must not be blown up."""
    grouped = rewards.double().view(-1, group_size)                                 # (groups, group_size)
    # DeepSeekMath (arXiv 2402.03300), section 4.1.2: A_i = (r_i - mean(r)) / std(r); std is unbiased, + 1e-6
    advantages = grouped - grouped.mean(1, keepdim=True)
    if std and group_size > 1:
        advantages = advantages / (grouped.std(1, keepdim=True) + 1e-6)
    flat = grouped.max(1, keepdim=True).values == grouped.min(1, keepdim=True).values
    return advantages.masked_fill(flat, 0.0).flatten().float()


def policy_loss(logps, old_logps, advantages, mask, clip_low: float = 0.2, clip_high: float = 0.28,
                dual_clip: float = 3.0, denominator=None):
    """Clipped policy-gradient loss: sum of the token losses under `mask` / denominator (default: its tokens).
    logps, old_logps, mask (B, T); advantages (B, T) or (B, 1). Micro-batches give the gradient of the whole
    batch if the denominator is the token count of the whole batch."""
    # rho_t = pi(y_t) / pi_old(y_t)
    ratio = (logps - old_logps).clamp(-20, 20).exp()                                # (B, T)
    # L_t = max(-A rho, -A clip(rho, 1 - low, 1 + high)), and where A < 0 at most -dual_clip A
    # (the range is DAPO's; the dual clip, as in verl, bounds what one very unlikely token can do)
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))
    loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return (loss * mask).sum() / (mask.sum() if denominator is None else denominator)


def apply_gradients(model, optimizer, step: int, lr: float) -> float:
    """Clip to norm 1, warm up over 5 steps, update. Returns the norm before clipping; not finite: no step."""
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 5)
        optimizer.step()
    optimizer.zero_grad()
    return norm


def update(student, optimizer, rollouts: Rollouts, advantages, config, step: int) -> float:
    """--minibatches optimiser updates on a batch of rollouts -> the last gradient norm. advantages (B, T) or
    (B, 1). With one update a batch the ratio is 1 and the clip inert; with more, it starts to act."""
    norm, advantages = 0.0, advantages.expand(rollouts.ids.shape)                   # (B, T)
    student.train()  # switches gradient checkpointing on; the models have no dropout
    for rows in torch.arange(len(rollouts.ids)).chunk(config.minibatches):
        if not (advantages[rows] * rollouts.mask[rows]).any():
            continue  # no signal: not even Adam's momentum may move the weights
        tokens = rollouts.mask[rows].sum()  # one denominator: the micro-batches add up to the whole gradient
        for batch in micro_batches(rollouts, rows.tolist(), config.micro_batch):    # (rows, columns)
            mask = rollouts.mask[batch]                                             # (b, t)
            logps = token_logps(student, rollouts.ids[batch], rollouts.attention_mask[batch], mask,
                                config.temperature)                                 # (b, t)
            policy_loss(logps, rollouts.logps[batch], advantages[batch], mask, denominator=tokens).backward()
        norm = apply_gradients(student, optimizer, step, config.rate)
    student.eval()
    return norm


def evaluate(model, tok, tasks, **sampling) -> dict:
    """Accuracy at T = 1 and greedy, each with its standard error over problems; length, share finished.
    sampling: keyword arguments of `rollout`. The seed is fixed: all methods see the same dice."""
    size, result = 512 if model.num_parameters() < 1e7 else 32, {}  # rows at once, for the KV cache's sake
    for prefix, temperature in (("", 1.0), ("greedy_", 0.0)):
        generator = torch.Generator(model.device).manual_seed(1234)
        right, length, finished = [], 0, 0
        for i in range(0, len(tasks), size):
            out = rollout(model, tok, tasks[i:i + size], generator=generator, temperature=temperature,
                          **sampling)
            right += rewards(out, tasks[i:i + size]).tolist()
            length, finished = length + int(out.mask.sum()), finished + int(out.finished.sum())
        right = torch.tensor(right)                                                 # (tasks,)
        spread = float(right.std()) if len(tasks) > 1 else 0.0
        result |= {prefix + "accuracy": float(right.mean()), prefix + "se": spread / math.sqrt(len(tasks))}
        if temperature:
            result |= {"length": length / len(tasks), "finished": finished / len(tasks)}
    return result


# ------------------------------------------------------------------------------------- runs on disk
# Flags that may change between a run and its --resume. All others are part of what the run is.
FREE_FLAGS = {"steps", "out", "resume", "overwrite", "threads", "save_every", "show_every", "plot", "fresh",
              "compare", "methods", "seeds"}


def changed_flags(recorded: dict, config) -> list[str]:
    """The flags of an earlier run that are different now."""
    return [f"--{k}" for k, v in recorded.items() if k not in FREE_FLAGS and v != getattr(config, k, v)]


def run_folder(config, script: str) -> Path:
    return Path(config.out or f"runs/{script}-{config.method}-s{config.seed}")


class Run:
    """A run's folder (metrics.jsonl, summary.json, state.pt, model/), its console lines, its checkpoint."""

    def __init__(self, config, script: str):
        self.config, self.script, self.folder = config, script, run_folder(config, script)
        self.metrics, self.checkpoint = self.folder / "metrics.jsonl", self.folder / "state.pt"
        self.began, self.interrupted, self.warned, self.last_eval = time.time(), False, set(), (None, {})
        self.notes = {"step": 0, "seconds": 0.0, "step_seconds": 0.0, "skipped_steps": 0}  # survive --resume
        if config.resume:
            if not (self.checkpoint.exists() and self.metrics.exists()):
                fail(f"there is no checkpoint in {self.folder}; start with --overwrite instead of --resume")
            self.state = torch.load(self.checkpoint, weights_only=True, map_location="cpu")
            if changed := changed_flags(self.state["config"], config):
                fail(f"{self.folder} was begun with other flags ({', '.join(changed)}); "
                     "go on with the same ones, or start again with --overwrite")
            self.notes = self.state["notes"]
            self.began -= self.notes["seconds"]  # the time before the stop counts too
        elif any(self.folder.glob("*")) and not (config.overwrite and self.metrics.exists()):
            fail(f"{self.folder} exists; if it is a run, --overwrite replaces it and --resume goes on")

    def track(self, modules: list, generator: torch.Generator, *dice: random.Random) -> int:
        """Names what a checkpoint holds, restores it on --resume, returns the first step to do. modules: the
        student, the optimiser, whatever else has a state_dict. Only now, with data and models loaded, is
        anything written: a start that fails on bad input leaves an earlier run as it was."""
        self.modules, self.generator, self.dice, config = modules, generator, dice, self.config
        print(f"{self.script}.py  {config.method}  {config.model} model, "
              f"{modules[0].num_parameters() / 1e6:.2f} M parameters | {modules[0].device}, "
              f"{torch.get_num_threads()} thread(s) | seed {config.seed} | {config.steps} steps x "
              f"{config.prompts_per_step} prompts x {config.group_size} rollouts\n"
              "The loss is not printed: with one update a batch it says nothing about progress.", flush=True)
        if config.resume:
            for module, state in zip(modules, self.state["modules"], strict=True):
                module.load_state_dict(state)
            generator.set_state(self.state["generator"])
            for rng, state in zip(dice, self.state["dice"], strict=True):
                rng.setstate(state)
            # What came after the checkpoint is done again; a kill may have left half a line, without its "}".
            lines = self.metrics.read_text().splitlines()
            lines = [line + "\n" for line in lines if line.endswith("}") and '"after"' not in line
                     and json.loads(line).get("step", 0) <= self.notes["step"]]
            with replacing(self.metrics) as file:
                file.write_text("".join(lines))
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            self.metrics.touch()

        def interrupt(*_):  # Ctrl-C: the step is finished and saved first; a second Ctrl-C stops at once
            self.interrupted = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGINT, interrupt)
        return self.notes["step"]

    def end_step(self, step: int, measure: Callable[[], dict]) -> None:
        """Evaluation and checkpoint, where they are due. A checkpoint replaces the one before."""
        config, self.notes["step"] = self.config, step
        if config.eval_every and step % config.eval_every == 0:
            self.evaluated(step, measure())
        due = config.save_every and (step % config.save_every == 0 or step == config.steps)
        if due or self.interrupted:
            self.notes["seconds"] = time.time() - self.began
            with replacing(self.checkpoint) as file:
                torch.save({"notes": self.notes, "config": dataclasses.asdict(config),
                            "modules": [module.state_dict() for module in self.modules],
                            "generator": self.generator.get_state(),
                            "dice": [rng.getstate() for rng in self.dice]}, file)
        if self.interrupted:
            print(f"stopped after step {step}; --resume goes on from there", flush=True)
            raise SystemExit(130)

    def log(self, record: dict) -> None:
        with open(self.metrics, "a") as file:
            file.write(json.dumps(record) + "\n")

    def step(self, step: int, started: float, shown: dict, **more) -> None:
        """One line on the console (`shown`), one object in metrics.jsonl (`shown` and `more`)."""
        seconds, steps = time.time() - started, self.config.steps
        self.notes["step_seconds"] += seconds
        values = "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
        print(f"step {step:>{len(str(steps))}}/{steps}  {values}  {seconds:.2f}s", flush=True)
        self.log({"step": step, **shown, **more, "seconds": seconds})

    def evaluated(self, when, result: dict) -> None:
        """when: 'before', 'after' or the number of a step."""
        accuracy, self.last_eval = result["accuracy"], (when, result)
        before = self.notes.setdefault("before", result)
        self.notes["best"] = max(self.notes.get("best", 0.0), accuracy)
        print(f"eval {when}  accuracy {accuracy:.3f} +- {result['se']:.3f} at T = 1, "
              f"{result['greedy_accuracy']:.3f} greedy, length {result['length']:.0f}"
              + f"  ({accuracy - before['accuracy']:+.3f})" * (when == "after"), flush=True)
        self.log({"eval": when, **({"step": when} if isinstance(when, int) else {}), **result})

    def warn(self, text: str) -> None:  # each warning once
        if text not in self.warned:
            print(f"warning: {text}", flush=True)
        self.warned.add(text)

    def watch(self, rollouts: Rollouts, reward, norm: float) -> dict:
        """Figures of a step's rollouts; warns of the usual reasons why nothing is learnt. reward: (B,), or
        those of fewer whole groups. cut: the share that ran out of tokens or turns."""
        groups, tokens = reward.view(-1, self.config.group_size), rollouts.mask.sum()   # (groups, group_size)
        flat = int((groups.amax(1) == groups.amin(1)).sum())
        entropy, cut = float(rollouts.entropy.sum() / tokens), float((~rollouts.finished).float().mean())
        skipped = not math.isfinite(norm)
        self.notes["skipped_steps"] += skipped
        for condition, text in (
                (flat == len(groups) > 0 and self.config.group_size > 1, "in every group all rewards are "
                 "equal: no signal from them; take easier or harder problems, or a larger --group_size"),
                (cut > 0.5, "more than half of the rollouts did not finish and score 0; "
                 "raise --max_new_tokens or --max_turns"),
                (entropy < 0.01, "the entropy is below 0.01: the model repeats itself; lower --lr"),
                (skipped, "the gradient is not finite; such steps are skipped and counted; lower --lr")):
            if condition:
                self.warn(text)
        return {"entropy": entropy, "grad": norm, "length": float(tokens / len(rollouts.mask)), "cut": cut,
                "flat groups": f"{flat}/{len(groups)}"}

    def finish(self, model, tok, measure: Callable[[], dict], **more) -> dict:
        """Last evaluation (unless the last step had one), model/, summary.json; returns the summary."""
        config, notes, (when, after) = self.config, self.notes, self.last_eval
        after = after if when == notes["step"] > 0 else measure()
        self.evaluated("after", after)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        summary = {"method": config.method, "seed": config.seed, "accuracy_best": notes["best"]}
        for name, key in (("accuracy", "accuracy"), ("greedy", "greedy_accuracy"), ("length", "length")):
            summary |= {name + "_before": notes["before"][key], name + "_after": after[key]}
        summary |= {
            "se": after["se"], "greedy_se": after["greedy_se"], "skipped_steps": notes["skipped_steps"],
            "seconds": time.time() - self.began,
            "seconds_per_step": notes["step_seconds"] / max(1, notes["step"]),
            **more, "config": dataclasses.asdict(config),
            "versions": {module.__name__: module.__version__ for module in (torch, transformers)}}
        for part in (model, tok):
            part.save_pretrained(self.folder / "model")
        with replacing(self.folder / "summary.json") as file:
            file.write_text(json.dumps(summary, indent=1))
        print(f"wrote {self.folder}/  total {summary['seconds']:.0f} s", flush=True)
        return summary


def table(rows: list[list], head: list[str]) -> str:
    """Aligned text, and Markdown as well."""
    cells = [head, *[[f"{c:.3f}" if isinstance(c, float) else str(c) for c in row] for row in rows]]
    widths = [max(len(r[i]) for r in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(r, widths)) + " |" for r in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def compared(train: Callable, config, variants: dict[str, dict], script: str) -> dict[str, list[dict]]:
    """Trains every variant (name -> the flags in which it differs) on --seeds seeds: name -> summaries.
    After a stop, finished cells are taken and a cell in the middle goes on; --overwrite starts anew."""
    found = {name: [] for name in variants}
    for seed in range(config.seed, config.seed + config.seeds):
        for name, flags in variants.items():
            cell_name = f"{re.sub('[^a-z0-9_]+', '-', name)}-s{seed}"
            folder = Path(config.out or f"runs/{script}-compare", cell_name)
            summary = folder / "summary.json"
            cell = dataclasses.replace(config, **{"seed": seed, "out": str(folder), "show_every": 0, **flags})
            print(f"\n{name}, seed {seed}", flush=True)
            done = json.loads(summary.read_text()) if summary.exists() and not config.overwrite else None
            if done and done["config"]["steps"] == cell.steps and not changed_flags(done["config"], cell):
                print(f"taken from {folder}, where it was finished earlier; --overwrite trains it again")
            else:
                cell.resume = (folder / "state.pt").exists() and not config.overwrite
                cell.overwrite = config.overwrite or not summary.exists()
                done = train(cell)
                config = dataclasses.replace(config, fresh=False)  # the tiny models are fitted anew only once
            found[name].append(done)
    return found


def seed_table(found: dict[str, list[dict]], columns: dict[str, str]) -> str:
    """name -> summaries, one a seed; columns: key of the summary -> heading. Cells: mean ± sample standard
    deviation over the seeds that have a number, - where none has."""
    def cell(runs, key):
        values = [run[key] for run in runs if run.get(key) is not None]
        spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        return f"{np.mean(values):.3f}{spread}" if values else "-"
    rows = [[name, *(cell(runs, key) for key in columns)] for name, runs in found.items()]
    return table(rows, ["method", *columns.values()])


def plot_runs(png: str, folders: list) -> None:
    """Accuracy, solved share, entropy and response length of run folders over the step, in one PNG."""
    import matplotlib.pyplot as plt
    titles = {"accuracy": "held-out accuracy, T = 1", "solved": "solved (training batch)",
              "entropy": "entropy (nats)", "length": "sampled tokens a rollout"}
    figure, axes = plt.subplots(1, len(titles), figsize=(16, 3.5), layout="tight")
    for folder in map(Path, folders):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines if line.endswith("}")]  # while it runs, one may be half
        when = {"before": 0, "after": max(r.get("step", 0) for r in records)}
        for axis, (key, title) in zip(axes, titles.items()):
            points = [(when.get(r.get("eval"), r.get("step")), r[key]) for r in records
                      if key in r and ("eval" in r) == (key == "accuracy")]
            axis.plot(*zip(*points), "o-" if key == "accuracy" else "-", label=folder.name)
            axis.set(title=title, xlabel="step")
    axes[0].legend(fontsize=8)
    figure.savefig(png, dpi=120)
    print(f"wrote {png}")


def launch(config, script: str, train: Callable, **actions: Callable) -> None:
    """What `python X.py` does: the action whose flag is given, else train and, with --plot, draw. What may
    happen at any time ends in one sentence."""
    try:
        for flag, action in actions.items():
            if getattr(config, flag):
                return action(config)
        if len(config.plot) < 2:
            train(config)
        if config.plot:
            plot_runs(config.plot[0], config.plot[1:] or [run_folder(config, script)])
    except torch.OutOfMemoryError:
        fail("out of GPU memory; lower --micro_batch (same gradient), --max_new_tokens or --group_size")
    except OSError as error:  # a folder that cannot be written, a full disk
        fail(" ".join(str(error).split()))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


# ---------------------------------------------------------------------- chat, for judges and memory
def chat_backend(name: str, model_name: str = "", max_new_tokens: int = 512, temperature: float = 0.0, *,
                 json_object: bool = False, batch: int = 8, device: str = "auto", **network) -> Callable:
    """A function: list of conversations (lists of messages) -> list of texts, None where no full answer came.
    name: the URL of an OpenAI-compatible server (`model_name` is its name of the model), or a Hugging Face id
    or folder. The function takes its own temperature and max_new_tokens: one model can play several roles."""
    if name.startswith(("http://", "https://")):
        return endpoint(name, model_name, max_new_tokens, temperature, json_object, **network)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tok = load_model(name, device, trainable=False)
    generator = torch.Generator(device).manual_seed(0)

    def chat(conversations, temperature=temperature, max_new_tokens=max_new_tokens):
        answers: list[str | None] = [None] * len(conversations)
        # No text may end its own turn: here, where the tokenizer is known, its control tokens are broken up.
        safe = [[{**m, "content": defused(tok, m["content"])} for m in c] for c in conversations]
        room = model.config.max_position_embeddings - max_new_tokens  # a longer conversation gets no answer
        fitting = [i for i, c in enumerate(safe) if len(prompt_ids(tok, c)) <= room]
        for start in range(0, len(fitting), batch):
            part = fitting[start:start + batch]
            out = rollout(model, tok, [Task(safe[i], "") for i in part], max_new_tokens=max_new_tokens,
                          temperature=temperature, generator=generator)
            for i, text, done in zip(part, out.texts, out.finished.tolist()):
                answers[i] = text.rsplit("</think>", 1)[-1].strip() if done else None
        return answers
    return chat


def endpoint(url: str, model_name: str, max_new_tokens: int, temperature: float, json_object: bool,
             api_key_env: str = "OPENAI_API_KEY", timeout: float = 60.0, retries: int = 4, workers: int = 8,
             sleep: Callable = time.sleep) -> Callable:
    """`chat_backend` for a server, `workers` requests at once, each at most `timeout` seconds long.
    A first request is made here: a wrong address, key, model or flag must show before any work is done."""
    # The key is explicit: without one the client would send this machine's Hugging Face token to the URL.
    client = InferenceClient(base_url=url, api_key=os.environ.get(api_key_env) or "EMPTY", timeout=timeout)
    fixed = {"model": model_name or "default"}
    fixed |= {"response_format": {"type": "json_object"}} if json_object else {}
    told = []  # the first thing that the server said instead of a reply

    def request(messages, sampling):
        """-> text or None, what was said instead of a reply, its HTTP status."""
        for attempt in range(retries + 1):
            try:
                reply = within(timeout, lambda: client.chat_completion(messages, **fixed, **sampling))
                text, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
                whole = isinstance(text, str) and text and reason not in ("length", "content_filter")
                return text if whole else None, "", 200
            except Exception as error:  # the error classes differ between versions, these attributes do not
                response = getattr(error, "response", None)
                code = getattr(response, "status_code", 0)
                said = getattr(response, "text", "") or getattr(error, "doc", "") or str(error)
                said = f"{code or type(error).__name__} {said or f'nothing whole in {timeout:g} s'}"
                if 0 < code < 500 and code not in (408, 429):
                    break  # refused; all else may be better in a while, a lost connection for example
                wait = response.headers.get("retry-after", "") if code else ""
                if attempt < retries:
                    sleep(min(float(wait) if wait.isdigit() else 2.0 ** attempt, 60.0))
        return None, " ".join(said.split())[:300], code

    def chat(conversations, temperature=temperature, max_new_tokens=max_new_tokens, first=False):
        sampling = {"max_tokens": max_new_tokens, "temperature": temperature}
        with ThreadPoolExecutor(workers) as pool:
            replies = list(pool.map(lambda messages: request(messages, sampling), conversations))
        for _, said, code in replies:  # here and not in the threads: everything is said once
            if said and first or code in (401, 402, 403, 404):  # every other request would fail, too
                fail(f"{url} gives no reply ({said}); check the server, the address, the model name "
                     f"'{model_name}' and ${api_key_env}")
            if said and not told:
                told.append(said)
                print(f"warning: {url} gave no reply to a request ({said}); said only once", flush=True)
        return [text for text, _, _ in replies]

    chat([[{"role": "user", "content": "Reply with the JSON object {} and nothing else."}]], first=True)
    return chat


def within(seconds: float, call: Callable):
    """call(), or TimeoutError: a server that drips byte by byte never reaches the time-out of a read."""
    future = Future()

    def run():
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)
    threading.Thread(target=run, daemon=True).start()  # a daemon, so that nobody waits for the last drop
    return future.result(seconds)


def read_object(text: str) -> dict:
    """The first JSON object of a reply, whatever thinking, prose or code fence is around it; else ValueError.
    The first one decides: a later one may be an inner item of an object that is cut."""
    if not text.lstrip().startswith("{"):  # else a value may speak of </think>
        text = text.rsplit("</think>", 1)[-1]
    found = re.search(r'(\[\s*)?(\{\s*")', text)  # \boxed{5} and {1, 2} open no object
    if not found or found[1]:
        raise ValueError("the reply holds no JSON object")
    try:
        return json.JSONDecoder().raw_decode(text, found.start(2))[0]
    except (ValueError, RecursionError):
        raise ValueError("the JSON object is broken or cut") from None


def ask(chat: Callable, conversations: list, check, tries: int = 3, tally: Counter | None = None) -> list:
    """check(the reply's JSON object) for each conversation, None where no usable reply came. check: one or a
    list of functions; by ValueError, LookupError or TypeError they call a reply unusable. The model is then
    asked again and told why, but not where no complete reply came. tally: counts "calls" and the reasons."""
    checks = check if isinstance(check, list) else [check] * len(conversations)
    results, talks, todo = [None] * len(checks), list(conversations), list(range(len(checks)))
    tally = Counter() if tally is None else tally
    for _ in range(tries):
        asked, todo = todo, []
        for i, reply in zip(asked, chat([talks[i] for i in asked]) if asked else []):
            reason = "no complete reply"
            if reply is not None:
                try:
                    results[i], reason = checks[i](read_object(reply)), ""
                except (ValueError, LookupError, TypeError, AttributeError) as error:
                    reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
                    note = f"Your last reply could not be used: {reason}. Reply with one JSON object alone."
                    talks[i] = [*conversations[i], {"role": "assistant", "content": reply[:2000]},
                                {"role": "user", "content": note}]
                    todo.append(i)
            tally.update(["calls", reason] if reason else ["calls"])
    return results


def remembered(chat: Callable, path: Path, key) -> Callable:
    """`chat` with a memory on disk: JSON lines, of which a later one replaces an earlier one. key: what else
    the replies depend on. A conversation that stands several times in one call has several replies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    memory, known = open(path, "a+b", buffering=0), {}  # one write a line: runs side by side do not mix
    memory.seek(0)
    try:
        for number, line in enumerate(memory.read().splitlines(), 1):
            entry = json.loads(line)
            known[entry["address"]] = entry["reply"]
    except (ValueError, LookupError, TypeError):
        fail(f"{path}, line {number}: not a line of such a memory; repair or remove it")

    def chat_or_remember(conversations, **sampling):
        addresses, times = [], Counter()
        for conversation in conversations:
            text = json.dumps([key, sampling, conversation], sort_keys=True)
            addresses.append(hashlib.sha256(f"{text} {times[text]}".encode()).hexdigest()[:32])
            times[text] += 1
        new = [i for i, address in enumerate(addresses) if address not in known]
        for i, reply in zip(new, chat([conversations[i] for i in new], **sampling) if new else []):
            if reply is not None:
                known[addresses[i]] = reply
                entry = {"address": addresses[i], "said": conversations[i][-1]["content"], "reply": reply}
                memory.write((json.dumps(entry) + "\n").encode())
        return [known.get(address) for address in addresses]
    return chat_or_remember


# -------------------------------------------------------------------------------- the GRPO baseline
small_chain = functools.partial(chain_task, operations=(2, 4), modulus=7)


def worked_solution(rng, task: Task, wrong: float = 0.0) -> str:
    """A chain solved: `A4+1=5, B5*5=4. \\boxed{4}`; a result is random with probability `wrong`."""
    (value, *_), modulus, steps = parse_chain(task.messages[-1]["content"])
    parts = []
    for label, operation, operand in steps:
        before, value = value, APPLY[operation](value, operand) % modulus
        if rng.random() < wrong:
            value = rng.randrange(modulus)
        parts.append(f"{label}{before}{operation}{operand}={value}")
    return ", ".join(parts) + f". \\boxed{{{value}}}"


def demonstration(tok, task: Task, answer: str) -> tuple[list[int], list[int]]:
    """Task and one assistant turn -> (ids, mask), as a rollout would have produced them."""
    prompt, turn = prompt_ids(tok, task.messages), [*encode(tok, answer), end_of_turn(tok)]
    return prompt + turn, [0] * len(prompt) + [1] * len(turn)


def load_student(config, device):
    """The tiny model, fitted on worked solutions (15 % wrong results), or a Hugging Face model as it is."""
    if config.model != "tiny":
        return load_model(config.model, device)
    tok, rng = build_tokenizer(CHAIN_ATOMS), random.Random(1)
    tasks = [small_chain(rng) for _ in range(8000)]
    docs = [demonstration(tok, task, worked_solution(rng, task, wrong=0.15)) for task in tasks]
    student = tiny_model(tok, seed=1)
    return fit_tiny("the student", student, docs, steps=600, fresh=config.fresh).to(device), tok


def train(config: Config) -> dict:
    """GRPO: sample groups, centre and scale rewards within each group, one clipped policy-gradient update."""
    device = setup(config)
    train_tasks, held_out = load_tasks(config.data, config.eval_tasks, small_chain, config.prompts_per_step)
    run = Run(config, "common")
    student, tok = load_student(config, device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.rate, weight_decay=0.0)
    rng, generator = random.Random(config.seed), torch.Generator(device).manual_seed(config.seed)

    def measure():
        return evaluate(student, tok, held_out, **config.sampling)

    first = run.track([student, optimizer], generator, rng)
    if not config.resume:
        run.evaluated("before", measure())
    for step in range(first, config.steps):
        started = time.time()
        tasks = rng.sample(train_tasks, config.prompts_per_step)
        rollouts = rollout(student, tok, tasks, config.group_size, temperature=config.temperature,
                           generator=generator, **config.sampling)
        rescore(student, rollouts, config)
        reward = rewards(rollouts, tasks)                                           # (B,)
        advantages = group_advantages(reward, config.group_size)                    # (B,)
        norm = update(student, optimizer, rollouts, advantages[:, None], config, step)

        run.step(step + 1, started, {"solved": float(reward.mean()), **run.watch(rollouts, reward, norm)})
        if config.show_every and step % config.show_every == 0:
            print(f"      {tasks[0].messages[-1]['content']}\n      > {transcript(tok, rollouts, 0)}")
        run.end_step(step + 1, measure)
    return run.finish(student, tok, measure)


def main(argv=None) -> None:
    launch(parse(Config, argv), "common", train)


if __name__ == "__main__":
    main()
