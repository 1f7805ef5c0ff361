"""What the scripts share: tiny models, tasks, tools, rollouts, scoring, the GRPO baseline, runs on disk.

    python common.py        trains the GRPO baseline on the chain task, without tools

Start with `rollout`, one batched decoding loop; `token_logps`, the one place that scores tokens; GRPO, which
is `group_advantages`, `policy_loss` and `update`; `train`, the loop, written out.

Shapes: B rollouts (prompts x group_size), T columns (prompt, response, padding), N scored tokens, H hidden
size, V vocabulary. `mask` (B, T) is 1 exactly on the tokens that the model sampled: only they carry loss.
It comes from what the loop did, never from token values: pad may be the same id as the end of a turn.
"""
import ast
import contextlib
import copy
import functools
import hashlib
import itertools
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
import time
import weakref
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Callable, ClassVar, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import InferenceClient, constants
from huggingface_hub.utils import get_session
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoTokenizer, HfArgumentParser,
                          PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM)

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a warning at each fork of the python tool
# cuDNN's attention makes a plan for each new shape, and *read* passes and micro-batches have many.
torch.backends.cuda.enable_cudnn_sdp(False)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
progress = functools.partial(tqdm, mininterval=1, leave=False, disable=None)  # None: silent in a log file


# ------------------------------------------------------------------------------------- command line
def fail(message: str) -> NoReturn:
    """One sentence on stderr, exit code 2. The only way these scripts complain about their input."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def option(default, help: str, **how):
    """A field of a Config; how: more of argparse's keywords, such as `choices`."""
    return field(default=default, metadata={"help": help, **how})


@dataclass
class Config:
    tiny_tokens: ClassVar[int] = 96  # --max_new_tokens on the chain task
    model: str = option("tiny", "student: 'tiny' (built and fitted here), a Hugging Face id or a folder")
    method: str = option("grpo", "the baseline is the only one here", choices=["grpo"])
    data: str = option("chain", "'chain' (generated), a hub dataset id, or a jsonl, json, csv, parquet file")
    steps: int = option(60, "training steps")
    prompts_per_step: int = option(8, "problems a step")
    group_size: int = option(8, "rollouts a problem")
    minibatches: int = option(1, "optimiser updates on each batch of rollouts")
    micro_batch: int = option(0, "rollouts a backward pass, to save memory; 0 = all; same gradient")
    max_new_tokens: int = option(0, "tokens a trajectory, tool text included; 0 = 1024, less on the chain")
    max_turns: int = option(8, "assistant turns a trajectory; a tool call in the last turn is not run")
    rows_at_once: int = option(0, "rollouts in the cache at once, to save memory; 0 = all; also for judges")
    temperature: float = option(1.0, "of the training rollouts; scoring uses the same")
    lr: float | None = option(None, "learning rate; not given = 3e-4 for tiny models, 1e-6 for others")
    seed: int = option(0, "seeds everything: the fits of the tiny models, prompts, sampling, tool failures")
    eval_every: int = option(0, "evaluate every so many steps; 0 = only before and after")
    eval_tasks: int = option(200, "held-out problems")
    device: str = option("auto", "'auto' (a GPU if there is one; tiny models: the CPU), 'cpu', 'cuda', ...")
    threads: int = option(0, "CPU threads; 0 = one for tiny models, torch's own choice for others")
    out: str = option("", "folder of the run; not given = runs/<script>-<method>-s<seed>")
    overwrite: bool = option(False, "replace the folder of an earlier run")
    resume: bool = option(False, "go on from the last checkpoint in the run's folder")
    save_every: int = option(50, "checkpoint every so many steps and at the end; 0 = never")
    show_every: int = option(20, "print one rollout every so many steps; 0 = never")
    fresh: bool = option(False, "fit the tiny models again instead of taking them from the cache")
    thinking: bool = option(False, "let the chat template open a thinking block (models that have one)")

    def __post_init__(self):
        self.max_new_tokens = self.max_new_tokens or (self.tiny_tokens if self.data == "chain" else 1024)

    @property
    def sampling(self) -> dict:
        names = ("max_new_tokens", "max_turns", "thinking", "rows_at_once")
        return {name: getattr(self, name) for name in names}

    @property
    def rate(self) -> float:
        if self.lr is not None:
            return self.lr
        return 3e-4 if self.model == "tiny" else 1e-6


def parse(config_class, argv=None):
    """Command line -> config. No abbreviations; an unknown flag or bad value: one sentence, exit code 2."""
    parser = HfArgumentParser(config_class, allow_abbrev=False)
    parser.error = fail
    config = config_class(**vars(parser.parse_args(argv)))
    counts = ("prompts_per_step", "group_size", "minibatches", "max_turns", "eval_tasks", "seeds",
              "teacher_answers", "reply_tokens")
    for name, value in vars(config).items():
        least = 1 if name in counts else 0
        if type(value) in (int, float) and not least <= value < math.inf:
            fail(f"--{name} {value} is out of range; give {least} or more")
    if config.temperature < 0.01:
        fail(f"--temperature {config.temperature}: training samples; give 0.01 or more")
    if config.resume and config.overwrite:
        fail("--resume and --overwrite contradict each other; give one of them")
    return config


def setup(config) -> torch.device:
    """Device and threads. Tiny models stay on the CPU even beside a GPU, so that digits are the same, and in
    one thread: more are slow on a busy machine."""
    tiny = config.model == "tiny"
    if config.threads or tiny:
        torch.set_num_threads(config.threads or 1)
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and not tiny else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        fail(f"device '{name}' is not usable on this machine; try --device cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a CUDA graph records what the current device does
    return device


# ------------------------------------------------------------------------------------------- models
# ChatML with the Hermes tool protocol, as Qwen3 speaks it, without Qwen3's thinking blocks.
TEMPLATE = """\
{%- if tools or messages[0].role == 'system' %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}
{%- if tools %}# Tools
{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}<|im_end|>
{% endif %}
{%- for message in messages if message.role != 'system' %}
{%- if message.role == 'tool' %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% else %}<|im_start|>{{ message.role }}
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
    """Byte-level without merges: digits and operators stay single. atoms: phrases that are one token each."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    # special=False as in Qwen3: special tokens vanish in decoding, and then no tool call could be parsed.
    core.add_tokens([AddedToken(phrase, normalized=False, special=False) for phrase in PHRASES + atoms])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   chat_template=TEMPLATE)


def tiny_model(tok, seed: int, hidden_size: int = 64, layers: int = 2) -> Qwen3ForCausalLM:
    """A real Qwen3 (grouped-query attention, q/k norm, tied embeddings), only small; random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(Qwen3Config(
            vocab_size=len(tok), hidden_size=hidden_size, intermediate_size=3 * hidden_size,
            num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, head_dim=hidden_size // 4,
            max_position_embeddings=2048, tie_word_embeddings=True, initializer_range=0.06,
            eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id))


def save(state: dict, path: Path) -> None:
    """All or nothing: killed at any moment, it leaves the earlier file or the new one."""
    unfinished = f"{path}.{os.getpid()}.tmp"
    torch.save(state, unfinished)
    os.replace(unfinished, path)


def cached(model, key, build: Callable, fresh: bool = False):
    """Loads `model`'s weights from the cache, or trains it in place by `build()`. key: the data and settings
    they depend on; after a change of the code, --fresh."""
    key = json.dumps([key, model.config.to_dict(), torch.__version__, transformers.__version__], default=str)
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "four-papers"
    path = root / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.pt"
    if path.exists() and not fresh:
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        build()
        root.mkdir(parents=True, exist_ok=True)
        save(model.state_dict(), path)
    return model.eval()


def batches_of(docs: list, rng: random.Random, size: int = 32):
    """All documents, shuffled, again and again. Similar lengths share a batch, which halves the padding."""
    while True:
        order = rng.sample(docs, len(docs))
        batches = []
        for start in range(0, len(order), 512):
            pool = sorted(order[start:start + 512], key=lambda doc: len(doc[0]))
            batches += [pool[i:i + size] for i in range(0, len(pool), size)]
        rng.shuffle(batches)
        yield from reversed(batches)


def fit_tiny(name: str, model, docs: list, steps: int, lr: float = 3e-3, seed: int = 0, fresh: bool = False):
    """Next-token fit of a tiny model, cached. docs: (ids, mask), lists; the loss is where mask is 1. Muon on
    the layers' matrices, AdamW (rate lr) on the rest: half the steps of AdamW alone."""
    def build():
        matrices = [parameter for parameter in model.base_model.layers.parameters() if parameter.dim() == 2]
        others = list(set(model.parameters()) - set(matrices))
        muon = torch.optim.Muon(matrices, weight_decay=0.01)
        adamw = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01)
        model.train()
        batches = batches_of(docs, random.Random(seed))
        for step in progress(range(steps), desc=f"fitting {name}"):
            all_ids, all_masks = zip(*next(batches))
            ids = padded(all_ids, 0)                                                # (B, T)
            mask = padded(all_masks, 0)                                             # (B, T)
            loss = -token_logps(model, ids, mask).sum() / mask.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            ramp = min((step + 1) / 50, (steps - step) / steps)
            for optimizer, rate in ((muon, 0.025), (adamw, lr)):
                optimizer.param_groups[0]["lr"] = rate * ramp
                optimizer.step()
                optimizer.zero_grad()  # the last gradient must not leak into later training
    return cached(model, ["fit", docs, steps, lr, seed], build, fresh)


@functools.cache
def hub_reachable() -> bool:
    """One request. Without a network the hub's own client would try for a minute."""
    with contextlib.suppress(Exception):  # each version of the hub's client has errors of its own
        return bool(get_session().head(constants.ENDPOINT, timeout=5))
    return False


def mixed_precision(device) -> bool:
    """bf16 or fp32? All that depends on the device asks here: autocast, types, checkpointing, `rescore`."""
    return torch.device(device).type == "cuda"


def load_pretrained(name: str, kind: type, dtype):
    """Hugging Face id or folder -> (model of the class `kind`, tokenizer); one sentence if there is none."""
    offline = Path(name).exists() or not hub_reachable()
    try:
        tok = AutoTokenizer.from_pretrained(name, local_files_only=offline)
        return kind.from_pretrained(name, dtype=dtype, local_files_only=offline).eval(), tok
    except (OSError, ValueError) as error:
        fail(f"cannot load '{name}' ({str(error).strip().splitlines()[0]}); give a model's folder or, with a "
             "network, a Hugging Face id; the training scripts' own default is 'tiny'")


def load_model(name: str, device, trainable: bool = True):
    """Hugging Face id or folder -> (model, tokenizer), to be trained (fp32) or frozen."""
    bf16 = mixed_precision(device)
    if trainable:
        dtype = torch.float32  # bf16 master weights would swallow updates of 1e-6
    elif bf16:
        dtype = torch.bfloat16
    elif torch.cpu.get_capabilities().get("avx512_bf16"):
        dtype = "auto"  # as it is stored; on a CPU without instructions for bf16 that is 8 times slower
    else:
        dtype = torch.float32
    model, tok = load_pretrained(name, AutoModelForCausalLM, dtype)
    if model.config._attn_implementation != "sdpa":  # others add a bool mask to the scores
        fail(f"'{name}' has no SDPA attention, which rollouts need; take another model")
    if tok.chat_template is None:
        fail(f"the tokenizer of '{name}' has no chat template; take an instruction-tuned model")
    tok.pad_token = tok.pad_token or tok.eos_token
    if trainable and bf16:  # acts in train mode only, so not in rollouts
        model.activation_checkpointing_enable()
    return model.to(device).requires_grad_(trainable), tok


# -------------------------------------------------------------------------------- tasks and answers
@dataclass
class Task:
    messages: list[dict]  # chat messages, the last one by the user
    answer: str           # what `is_correct` compares with; no model ever sees it


APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul}
ASK = ". Put the last value in \\boxed{}."
CHAIN_ATOMS = ["Start with ", ", work modulo ", ": ", ", ", ASK, "\\boxed{", "10"]


def chain_task(rng: random.Random, operations: tuple = (3, 5), modulus: int = 10) -> Task:
    """A chain of + - *, left to right, modulo `modulus`; without the letters a tiny model miscounts."""
    start = rng.randrange(modulus)
    labels = "ABCDEFGH"[:rng.randint(*operations)]
    parts = [f"{label}{rng.choice('+-*')}{rng.randrange(1, modulus)}" for label in labels]
    text = f"Start with {start}, work modulo {modulus}: {', '.join(parts)}{ASK}"
    values, _, _ = parse_chain(text)
    return Task([{"role": "user", "content": text}], str(values[-1]))


def parse_chain(text: str) -> tuple[list[int], int, list[tuple[str, str, int]]]:
    """Problem text -> ([start, value after each operation], modulus, [(label, sign, operand), ...])."""
    start, modulus = map(int, re.search(r"Start with (\d+), work modulo (\d+):", text).groups())
    values = [start]
    operations = []
    for label, sign, operand in re.findall(r"\b([A-H])([+*-])(\d+)", text):
        operations.append((label, sign, int(operand)))
        values.append(APPLY[sign](values[-1], int(operand)) % modulus)
    return values, modulus, operations


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
        fail(f"{source} has too few problems ({len(unique)}); lower --eval_tasks or --prompts_per_step")
    return unique[eval_tasks:], unique[:eval_tasks]


def read_rows(source: str) -> list[dict]:
    """jsonl, json, csv or parquet file, or a hub id -> rows."""
    import datasets  # slow to import, so only where it is needed
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(50)  # critical: else it tells of a bad file, too
    kind = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}.get(Path(source).suffix)
    try:
        if kind:
            return list(datasets.load_dataset(kind, data_files=source, split="train"))
        if not hub_reachable():
            raise ConnectionError("no such file, and no network")
        configs = datasets.get_dataset_config_names(source)
        config = "main" if "main" in configs else configs[0]
        return list(datasets.load_dataset(source, config, split="train"))
    except Exception as error:  # the hub alone has a dozen kinds; all mean the same to the user
        reason = error.__cause__ or error  # `datasets` wraps what was wrong with a file
        fail(f"cannot read {source} ({type(reason).__name__}: {' '.join(str(reason).split())[:200]}); "
             "give 'chain', a jsonl, json, csv or parquet file, or, with a network, a hub id")


def row_to_task(row: dict, where: str) -> Task:
    """One dataset row -> Task. Columns: question, problem or prompt (a text or a list of chat messages);
    answer or solution; optional system."""
    asked = row.get("question") or row.get("problem") or row.get("prompt")
    answer = row.get("solution") if row.get("answer") is None else row["answer"]
    if not isinstance(asked, (str, list)) or answer is None:
        fail(f"{where} has {sorted(row)}, but needs question, problem or prompt (a text), answer or solution")
    messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    if row.get("system"):
        messages = [{"role": "system", "content": row["system"]}, *messages]
    text = " ".join(message["content"] for message in messages)
    if "boxed" not in text and "<answer>" not in text:
        *earlier, last = messages
        messages = [*earlier, {**last, "content": last["content"] + "\n\nPut the final answer in \\boxed{}."}]
    return Task(messages, final_answer(str(answer)) or str(answer).strip())


def final_answer(text: str) -> str | None:
    """The last \\boxed{}, else <answer>, else `#### x`, else the whole text if a number or one capital."""
    text = text.rsplit("</think>", 1)[-1]
    boxed = r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"  # with braces inside, two deep
    number_or_letter = r"\A\s*([A-Z]|[-+$]?[\d.,]*\d%?)\.?\s*\Z"
    for pattern in (boxed, r"<answer>(.*?)</answer>", r"####\s*([^\n]+)", number_or_letter):
        found = re.findall(pattern, text, re.DOTALL)
        if found:
            return found[-1].strip()
    return None


def is_correct(text: str, answer: str) -> bool:
    """Numbers are compared without commas, $ and %, words without spaces and case, a letter exactly."""
    def normalise(words):
        plain = re.sub(r"[\s,$%]|\\[ ,!%$]", "", words).rstrip(".")
        with contextlib.suppress(ValueError):
            return float(plain)
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
        parameters = {"type": "object", "properties": {self.parameter: {"type": "string"}},
                      "required": [self.parameter]}
        return {"type": "function", "function": {
            "name": self.name, "description": self.description, "parameters": parameters}}


BAD_EXPRESSION = "error: not a valid expression"
SIGNS = {ast.USub: operator.neg, ast.UAdd: operator.pos}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow}


def calculate(node) -> float:
    """Value of an arithmetic syntax tree: numbers, + - * / // % **, signs, parentheses; else an error."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.UnaryOp):
        return SIGNS[type(node.op)](calculate(node.operand))
    left = calculate(node.left)
    right = calculate(node.right)
    if isinstance(node.op, ast.Pow) and (abs(right) > 64 or abs(left) > 1e6):
        raise ValueError("9**9**9 would never end")
    return OPERATORS[type(node.op)](left, right)


def run_calculator(arguments: dict) -> tuple[str, str]:
    """Arithmetic through ast; nothing is ever evaluated as code."""
    try:
        value = calculate(ast.parse(str(arguments["expression"])[:200].strip(), mode="eval").body)
        return cut_middle(str(int(value) if value == int(value) else value)), "ok"
    except Exception:  # the text is no arithmetic, or its value is infinite, no number, or complex
        return BAD_EXPRESSION, "error"


def cut_middle(text: str, limit: int = 256) -> str:
    """Tool text over 256 characters keeps its first and last 128, as in SOD's code."""
    return text if len(text) <= limit else text[:limit // 2] + "...(truncated)..." + text[-limit // 2:]


# Runs inside the child: limits, then the model's code as in an interpreter: a bare expression is printed.
PYTHON_CHILD = """
import ast, resource as r
for what, limit in (r.RLIMIT_CPU, 10), (r.RLIMIT_AS, 2 << 30), (r.RLIMIT_FSIZE, 1 << 20), (r.RLIMIT_CORE, 0):
    r.setrlimit(what, (limit, limit))
tree = ast.parse(open("code.py").read(), "code.py")
exec(compile(ast.Interactive(tree.body), "code.py", "single"), {"__name__": "__main__"})
"""


def run_python(arguments: dict, seconds: float = 10.0) -> tuple[str, str]:
    """Runs the model's code in a subprocess (POSIX): isolated mode, own session, temporary folder, empty
    environment, no stdin, limits on CPU, memory and file size; a time-out kills the whole process group. It
    does NOT stop code from reading your files, opening sockets or leaving its session: use a container."""
    code = re.sub(r".*?```(?:python)?\n(.*?)```.*", r"\1", str(arguments.get("code", "")), flags=re.DOTALL)
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "out"), "wb") as out:
        Path(folder, "code.py").write_text(code, encoding="utf-8", errors="replace")
        child = subprocess.Popen([sys.executable, "-I", "-c", PYTHON_CHILD], cwd=folder, env={},
                                 stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
        try:
            status = "ok" if child.wait(seconds) == 0 else "error"
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            return "error: timed out", "timeout"
        return cut_middle(Path(folder, "out").read_text(errors="replace").strip()) or "(no output)", status


TOOLS = {tool.name: tool for tool in (
    Tool("calculator", "Evaluates one arithmetic expression.", "expression", run_calculator),
    Tool("python", "Runs Python code and returns what it prints.", "code", run_python, workers=8))}


def parse_tool_call(text: str) -> dict | None:
    """The first well-formed <tool_call>{"name": ..., "arguments": {...}}</tool_call> in a turn, or None."""
    for body in re.findall(r"<tool_call>\s*(.*?)\s*</tool_call>", text, re.DOTALL):
        with contextlib.suppress(ValueError, RecursionError):
            match json.loads(body):
                case {"name": str(), "arguments": dict()} as call:
                    return call
    return None


def run_tools(tool: Tool | None, calls: list[dict]) -> list[tuple[str, str]]:
    """-> (text for the model, status) a call. An exception in a tool costs one answer, not the run."""
    def answer(call):
        if call["name"] != tool.name:
            return f"error: there is no tool {call['name'][:40]!r}", "error"
        try:
            return tool.run(call["arguments"])
        except Exception as error:
            return cut_middle(f"error: {type(error).__name__}: {error}"), "error"
    if len(calls) < 2 or tool.workers == 1:
        return [answer(call) for call in calls]
    with ThreadPool(tool.workers) as pool:
        return pool.map(answer, calls)


# ------------------------------------------------------------------------------------------ prompts
@functools.lru_cache(maxsize=64)  # the vocabulary is copied at each call
def end_of_turn(tok) -> int:
    """Id that ends an assistant's turn. Base models and Gemma end texts with another token, their eos."""
    vocab = tok.get_vocab()
    marks = ("<|im_end|>", "<end_of_turn>", "<|end|>")  # Qwen's, Gemma's, Phi's
    return next((vocab[mark] for mark in marks if mark in vocab), tok.eos_token_id)


def render(tok, messages, tools, thinking: bool) -> str:
    return tok.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True,
                                   enable_thinking=thinking)


def encode(tok, text: str, **how) -> list[int]:
    return tok(text, add_special_tokens=False, **how).input_ids


def prompt_ids(tok, messages: list[dict], tool: Tool | None = None, thinking: bool = False) -> list[int]:
    """Chat messages -> ids up to where the assistant begins."""
    text = render(tok, messages, [tool.schema] if tool else None, thinking)
    if tool and tool.description not in text:  # the template ignores tools: the first message tells of it
        example = json.dumps({"name": tool.name, "arguments": {tool.parameter: "..."}})
        note = (f"You can call this tool:\n{json.dumps(tool.schema)}\nTo call it, end your turn with "
                f"<tool_call>{example}</tool_call>.\n\n{messages[0]['content']}")
        text = render(tok, [{**messages[0], "content": note}, *messages[1:]], None, thinking)
    return encode(tok, text)


@functools.lru_cache(maxsize=64)
def tool_glue(tok, thinking: bool = False) -> tuple[list[int], list[int]]:
    """What the template puts before and after a tool's text: from behind the assistant's end-of-turn token
    (sampled, so already there) to where its next turn begins. A user says it, as Qwen3 has it."""
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "@@SAID@@"},
            {"role": "user", "content": "<tool_response>\n@@HEARD@@\n</tool_response>"}]
    before, after = render(tok, talk, None, thinking).split("@@SAID@@", 1)[1].split("@@HEARD@@", 1)
    end = tok.convert_ids_to_tokens(end_of_turn(tok))
    return encode(tok, before.split(end, 1)[-1]), encode(tok, after)


def tool_message_ids(tok, text: str, thinking: bool = False) -> list[int]:
    """A tool's answer as ids. Control tokens in `text` are encoded as plain text: no tool can end a turn."""
    before, after = tool_glue(tok, thinking)
    return before + encode(tok, text, split_special_tokens=True) + after


def defused(tok, text: str) -> str:
    """Text for a prompt, its special tokens broken up (`< |im_end|>`): it cannot end or begin a turn."""
    for token in tok.added_tokens_decoder.values():
        if token.special:
            text = text.replace(token.content, f"{token.content[0]} {token.content[1:]}")
    return text


# ----------------------------------------------------------------------------------------- rollouts
@dataclass
class Rollouts:
    """B = len(tasks) * group_size rows; the group_size rollouts of one task stand side by side."""
    ids: torch.Tensor              # (B, T) prompt, turns, tools' messages; padded on the right
    mask: torch.Tensor             # (B, T) 1 = sampled by the model (its end-of-turn included)
    logps: torch.Tensor            # (B, T) log-prob of each sampled token when it was sampled; 0 elsewhere
    entropy: torch.Tensor          # (B, T) of the distribution it was sampled from, in nats; 0 elsewhere
    lengths: list[int]             # of the rows without their padding
    finished: torch.Tensor         # (B,) the model ended its last turn itself, without asking for a tool
    texts: list[str]               # text of the last turn: what the reward reads
    turns: list[list[tuple[int, int]]]  # per row the [start, end) columns of its turns
    tool_status: list[list[str]]   # per row and turn: none, ok, error, timeout

    def part(self, rows, columns=slice(None)):
        """ids, mask of some rows and columns, (b, t) each."""
        return self.ids[rows, columns], self.mask[rows, columns]


@dataclass
class Row:
    """One trajectory while it is being written."""
    ids: list[int]                     # prompt, turns, tools' messages; only grows
    limit: int                         # of the number of ids
    turn_start: int                    # where the current turn begins
    in_cache: int = 0                  # so many of its ids are in the cache
    draws: list[tuple] = field(default_factory=list)  # log-prob, entropy of each sampled id
    turns: list[tuple[int, int]] = field(default_factory=list)
    status: list[str] = field(default_factory=list)
    text: str = ""
    finished: bool = False             # it ended its last turn itself
    done: bool = False                 # nothing more will be written


@torch.no_grad()
def rollout(model, tok, tasks: list[Task], group_size: int = 1, *, tool: Tool | None = None,
            max_new_tokens: int = 256, max_turns: int = 8, temperature: float = 1.0, generator=None,
            thinking: bool = False, rows_at_once: int = 0) -> Rollouts:
    """Samples group_size trajectories a task, rows_at_once of them in one cache (0 = all). A row is a list of
    ids that only grows, and all that is known about it is in the row:

        prompt        sampled turn      tool's message    sampled turn
        p p p p p p | s s s s s s END | g g g g g g g g | s s s s END      p, g    given, mask 0
        p p p p | s s s END | . . . . . . . . . . . . . . . . . . . .      s, END  sampled, mask 1
        p p p p p p p | s s s s s END | g g g | s s s s s s s s s s .      .       padding, added at the end

    Nothing is decoded and encoded again: the ids are what the model saw. A turn ends with the end-of-turn
    token. If it holds a tool call (of several, the first well-formed one), the tool runs and its message is
    given, or the row ends if that would fill its budget; without a call the row is done.
    """
    assert not model.training, "rollouts need model.eval(): gradient checkpointing would switch the cache off"
    rows = []
    for task in tasks:
        prompt = prompt_ids(tok, task.messages, tool, thinking)
        for _ in range(group_size):
            rows.append(Row([*prompt], limit=len(prompt) + max_new_tokens, turn_start=len(prompt)))
    writer = for_writing(model)
    size = rows_at_once or len(rows)
    for i in range(0, len(rows), size):
        write_rows(writer, tok, rows[i:i + size], tool, max_turns, temperature, generator, thinking)

    ids = padded([row.ids for row in rows], tok.pad_token_id, model.device)         # (B, T)
    mask = torch.zeros_like(ids)                                                    # (B, T)
    for i, row in enumerate(rows):
        for start, end in row.turns:
            mask[i, start:end] = 1
    draws = torch.cat([torch.tensor(row.draws) for row in rows]).to(model.device)   # (N, 2)
    logps = on_grid(mask, draws[:, 0])                                              # (B, T)
    entropy = on_grid(mask, draws[:, 1])                                            # (B, T)
    finished = torch.tensor([row.finished for row in rows], device=model.device)    # (B,)
    return Rollouts(ids, mask, logps, entropy, finished=finished,
                    lengths=[len(row.ids) for row in rows], texts=[row.text for row in rows],
                    turns=[row.turns for row in rows], tool_status=[row.status for row in rows])


def sample(model, tok, tasks: list[Task], config, generator, tool: Tool | None = None) -> Rollouts:
    """The rollouts of a step, group_size a task, by the flags in `config`."""
    return rollout(model, tok, tasks, config.group_size, tool=tool, temperature=config.temperature,
                   generator=generator, **config.sampling)


READ_WHEN = 0.25  # share of the rows that wait for a *read* pass


def write_rows(model, tok, rows: list[Row], tool: Tool | None, max_turns: int, temperature: float, generator,
               thinking: bool) -> None:
    """Writes the rows to their ends, in one cache, which two kinds of pass fill.

    *write* puts the next id of every row into the cache. If it was the row's last one, the row samples what
    follows it. *read* puts in many ids of some rows at once: the prompts, and later tools' messages, as soon
    as enough rows wait with one; until then a message goes in with *write*, id by id. *read* leaves the last
    id to *write*, since what follows must be sampled.
    """
    cache = RowCache(model, length=max(row.limit for row in rows))
    # Rows of one problem stand side by side: their prompt is read once and copied.
    groups = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row.ids)]
    cache.read([group[0] for group in groups], range(len(groups)))
    cache.select(np.repeat(range(len(groups)), [len(group) for group in groups]))
    for row in rows:
        row.in_cache = len(row.ids) - 1

    batch = rows  # those in the cache, in its order
    while batch:
        logits = cache.write(batch)                                                 # (n, V)
        draws = choose(logits, temperature, generator)                              # (n, 3)
        callers, calls = [], []
        for row, (token, *draw) in zip(batch, draws.tolist()):
            if row.done or row.in_cache < len(row.ids):  # what such a row drew is dropped
                continue
            row.ids.append(int(token))
            row.draws.append(draw)
            if token == end_of_turn(tok) or len(row.ids) == row.limit:
                call = end_turn(row, tok, tool, max_turns)
                if call:
                    callers.append(row)
                    calls.append(call)

        for row, (text, status) in zip(callers, run_tools(tool, calls)):
            row.status[-1] = status
            message = tool_message_ids(tok, text, thinking)
            row.done = len(row.ids) + len(message) >= row.limit
            if not row.done:
                row.ids += message
                row.turn_start = len(row.ids)

        alive = [i for i, row in enumerate(batch) if not row.done]
        if len(alive) < len(batch) / 2:  # done rows leave together, since each time copies the cache
            cache.select(alive)
            batch = [batch[i] for i in alive]
        waiting = [i for i, row in enumerate(batch) if len(row.ids) - row.in_cache > 1]
        if waiting and len(waiting) >= READ_WHEN * len(alive):
            cache.read([batch[i] for i in waiting], waiting)


def end_turn(row: Row, tok, tool: Tool | None, max_turns: int) -> dict | None:
    """Ends the row's turn or, at its limit, the row; returns the tool call to run, if there is one."""
    ended = row.ids[-1] == end_of_turn(tok)
    row.turns.append((row.turn_start, len(row.ids)))
    row.status.append("none")
    row.text = tok.decode(row.ids[row.turn_start:len(row.ids) - ended])
    call = parse_tool_call(row.text) if tool and ended else None
    row.finished = ended and call is None
    row.done = call is None or len(row.status) >= max_turns
    return None if row.done else call


class RowCache:
    """Keys and values of n rows, each with its own length, and the passes that add to them. What a pass
    leaves behind a row's end (padding, an id that is repeated) is written over before any token sees it."""

    def __init__(self, model, length: int):
        self.model = model
        self.length = length
        self.layers = {}  # number of a layer -> (2, n, heads, length, d), keys and values
        self.recording = mixed_precision(model.device)
        self.write_pass = None  # `one_id_a_row`, on a GPU recorded; made anew when rows have left
        self.inputs = None      # for it, from `write`: the next id of each row and its place, (n, 2)
        self.columns = 0        # for it, from `write`: so many columns are in use
        self.at = None          # for `update`, from `feed`: rows, places, width

    def read(self, rows: list[Row], numbers) -> None:
        """All ids of these rows that wait, but the last. numbers: where the rows stand in the cache."""
        device = self.model.device
        ids = padded([row.ids[row.in_cache:-1] for row in rows], 0, device)         # (r, q)
        start = torch.tensor([[row.in_cache] for row in rows], device=device)       # (r, 1)
        for row in rows:
            row.in_cache = len(row.ids) - 1
        columns = max(row.in_cache for row in rows)
        self.feed(torch.tensor(numbers, device=device), ids, start, columns)

    def write(self, rows: list[Row]):
        """The next id of every row in the cache -> logits (n, V) of what follows it."""
        new = []
        for row in rows:
            place = min(row.in_cache, len(row.ids) - 1)  # a done row has no next id: its last one again
            new.append([row.ids[place], place])
            row.in_cache = place + 1
        new = torch.tensor(new)                                                     # (n, 2)
        self.columns = max(row.in_cache for row in rows)
        if self.write_pass is None:
            self.inputs = new.to(self.model.device)
            self.write_pass = record(self.one_id_a_row) if self.recording else self.one_id_a_row
        self.inputs.copy_(new)  # in place: a recorded pass reads the same memory again and again
        return self.write_pass()

    def one_id_a_row(self):
        """The *write* pass on `self.inputs`, ids and places. Nothing in it waits for a value or depends on
        one, so a CUDA graph can record it."""
        everyone = torch.arange(len(self.inputs), device=self.inputs.device)        # (n,)
        ids, place = self.inputs.split(1, dim=1)                                    # (n, 1) each
        hidden = self.feed(everyone, ids, place, self.columns)                      # (n, 1, H)
        return lm_head(self.model.get_output_embeddings())(hidden[:, 0])            # (n, V)

    def feed(self, numbers, ids, start, columns: int):
        """Both passes: the ids (r, q) of the rows with these numbers (r,) go to their places from `start`
        (r, 1) on -> last hidden states (r, q, H). Attention reads so many columns; on a GPU, all."""
        width = self.length if self.recording else columns
        place = start + torch.arange(ids.shape[1], device=ids.device)               # (r, q)
        place = place.clamp(max=self.length - 1)  # padding may reach beyond the cache
        self.at = numbers, place, width
        here = place[:, None, :, None]                                              # (r, 1, q, 1)
        column = torch.arange(width, device=ids.device)                             # (width,)
        mask = column <= here  # (r, 1, q, width) a token sees itself and what stands before it in its row
        config = self.model.config
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            near = column > here - config.sliding_window                            # (r, 1, q, width)
            mask = {"full_attention": mask, "sliding_attention": mask & near}
        return self.model.base_model(input_ids=ids, attention_mask=mask, position_ids=place, cache=self,
                                     use_cache=True).last_hidden_state

    def update(self, key, value, layer: int, **_):                                  # (r, heads, q, d) each
        """Called by the model's layers during `feed`: keys and values of new ids -> of their whole rows."""
        numbers, place, width = self.at                                             # (r,), (r, q)
        new = torch.stack([key, value])                                             # (2, r, heads, q, d)
        if layer not in self.layers:
            self.layers[layer] = new.new_zeros(*new.shape[:3], self.length, new.shape[4])
        stored = self.layers[layer]                                                 # (2, n, heads, length, d)
        stored[:, numbers[:, None], :, place] = new.permute(1, 3, 0, 2, 4)          # (r, q, 2, heads, d)
        if len(numbers) == stored.shape[1]:  # all rows, in their order: no copy
            numbers = slice(None)
        return stored[:, numbers, :, :width]                                        # (2, r, heads, width, d)

    def select(self, numbers) -> None:
        """Keeps these rows of the cache, in this order; a row may be taken several times."""
        numbers = torch.tensor(numbers, dtype=torch.long, device=self.model.device)     # (rows,)
        for layer, stored in self.layers.items():
            self.layers[layer] = stored[:, numbers]
        self.write_pass = None  # it worked on other tensors


def record(step: Callable) -> Callable:
    """`step` as a CUDA graph: recorded once, then replayed without Python, which saves 1,500 kernel launches
    a token. What it works on must stay where it is and change in place. Where that fails, step itself."""
    try:
        step()  # the first run makes plans and buffers, which are no part of the recording
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = step()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        print_once(f"note: CUDA could not record a pass of the rollouts, which are slower now ({error})")
        return step

    def replay():
        graph.replay()
        return output
    return replay


@functools.cache
def print_once(text: str) -> None:
    print(text, flush=True)


COPIES = weakref.WeakKeyDictionary()  # model -> its bf16 copy


@torch.no_grad()
def for_writing(model):
    """The model that rollouts run on. On a GPU, beside fp32 weights that are trained, a bf16 copy of them,
    brought up to date here, in place: half the memory to read for each token, and no casts."""
    if not mixed_precision(model.device) or model.dtype == torch.bfloat16:
        return model
    if model not in COPIES:
        COPIES[model] = copy.deepcopy(model).requires_grad_(False)
        for parameter in COPIES[model].parameters():  # and no buffer: rotary frequencies stay fp32
            parameter.data = parameter.data.to(torch.bfloat16)
    for ours, theirs in zip(COPIES[model].parameters(), model.parameters()):
        ours.copy_(theirs)
    return COPIES[model]


def choose(logits, temperature: float, generator):
    """logits (n, V) -> (n, 3): token, its log-prob, entropy in nats. Temperature 0 is greedy."""
    logps = torch.log_softmax(logits / (temperature or 1.0), -1)                    # (n, V)
    token = logps.argmax(-1, keepdim=True)                                          # (n, 1)
    if temperature:  # where a uniform number falls among the cumulative sums
        below = logps.exp().cumsum(-1)                                              # (n, V)
        u = torch.rand(len(logps), 1, generator=generator, device=logps.device)     # (n, 1)
        token = torch.searchsorted(below, u * below[:, -1:], right=True)            # (n, 1)
        token = token.clamp(max=logps.shape[1] - 1)  # acts where logits are NaN
    return torch.cat([token, logps.gather(1, token), entropy_of(logps)[:, None]], 1)


def entropy_of(logps):
    """H = -sum_v p(v) log p(v), (n, V) -> (n,) nats; 0 log 0 = 0."""
    return -(logps.exp() * logps).nan_to_num().sum(-1)


def padded(sequences: list[list], value, device=None):
    """list of lists -> (B, longest) tensor, padded on the right. Under causal attention no real token can see
    a pad that stands behind it, so that nothing here needs an attention mask."""
    width = max(map(len, sequences))
    rows = [sequence + [value] * (width - len(sequence)) for sequence in sequences]
    return torch.tensor(rows, device=device)


def rewards(rollouts: Rollouts, tasks: list[Task]):
    """1.0 for a finished rollout whose last turn holds the right answer, else 0.0: (B,)."""
    group_size = len(rollouts.texts) // len(tasks)
    right = [is_correct(text, tasks[i // group_size].answer) for i, text in enumerate(rollouts.texts)]
    return torch.tensor(right, device=rollouts.ids.device).float() * rollouts.finished


def transcript(tok, rollouts: Rollouts, row: int) -> str:
    """One rollout for people: what the model wrote, with the tools' texts in [brackets]."""
    ids = rollouts.ids[row]                                                         # (T,)
    parts = []
    for start, end in rollouts.turns[row]:
        if parts:
            heard = re.split("</?tool_response>", tok.decode(ids[said_until:start]))[1]
            parts.append(f"[{heard.strip()}]")
        parts.append(tok.decode(ids[start:end], skip_special_tokens=True).strip())
        said_until = end
    return " ".join(parts).replace("\n", " ")


# ------------------------------------------------------------------------------------------ scoring
CHUNK_LOGITS = 2**26  # 256 MB in fp32


def hidden_at(model, ids, mask):
    """Last hidden states from which the tokens under `mask` are predicted: (N, H), row by row. ids, mask
    (B, T), padded on the right. The token in column p is predicted from column p - 1: this shift is here and
    nowhere else."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=mixed_precision(ids.device)):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state     # (B, T, H)
    return hidden[:, :-1][mask[:, 1:].bool()]


def lm_head(head) -> Callable:
    """The head as a function hidden (n, H) -> logits (n, V) in fp32. Models that cap or scale their logits
    behind it (Gemma 2, Granite, Cohere) would be scored wrongly."""
    dtype = torch.bfloat16 if mixed_precision(head.weight.device) else head.weight.dtype

    def logits(hidden):                                                             # (n, H)
        # The weights are cast in each call, so that the gradients of all chunks add up in fp32.
        bias = None if head.bias is None else head.bias.to(dtype)
        # .float(): a softmax in bf16 would lose the small probabilities
        return F.linear(hidden.to(dtype), head.weight.to(dtype), bias).float()
    return logits


def over_vocab_chunks(hidden, head, fn: Callable, *rows):
    """fn(logits (n, V), *rows (n, ...)) -> (n, ...) on chunks of the N tokens, joined. hidden (N, H); rows: N
    entries each. All logits never exist at once: a chunk holds CHUNK_LOGITS of them, and under gradients it
    is computed again in the backward pass."""
    to_logits = lm_head(head)

    def one(hidden, *rows):                                                         # (n, H), (n, ...)
        return fn(to_logits(hidden), *rows)
    size = max(1, CHUNK_LOGITS // head.weight.shape[0])
    columns = [column.split(size) for column in (hidden, *rows)]
    again = torch.is_grad_enabled() and len(columns[0]) > 1
    values = []
    for chunk in zip(*columns):
        values.append(checkpoint(one, *chunk, use_reentrant=False) if again else one(*chunk))
    return torch.cat(values)


def token_logps(model, ids, mask, temperature: float = 1.0, with_entropy: bool = False):
    """log p(token | all before it) under `mask`, 0 elsewhere: (B, T); with_entropy: also entropies in nats.
    The one place that scores tokens; what `rollout` notes while sampling agrees to 1e-5."""
    def fn(logits, target):                                                         # (n, V), (n,)
        logits = logits / temperature
        logp = logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1)        # (n,)
        if with_entropy:
            return torch.stack([logp, entropy_of(logits.detach().log_softmax(1))], 1)   # (n, 2)
        return logp

    hidden = hidden_at(model, ids, mask)                                            # (N, H)
    values = over_vocab_chunks(hidden, model.get_output_embeddings(), fn, ids[mask.bool()])
    if with_entropy:
        return on_grid(mask, values[:, 0]), on_grid(mask, values[:, 1])
    return on_grid(mask, values)


def on_grid(mask, values):
    """Values of the tokens under `mask`, (N,) -> (B, T), 0 elsewhere."""
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask.bool(), values)


def micro_batches(rollouts: Rollouts, rows: list[int], size: int):
    """Splits `rows` into lists of at most `size` (0: all), each with the columns it uses. Similar lengths
    together and the longest first, so that memory runs out at the start of a step, if at all."""
    rows = sorted(rows, key=lambda i: -rollouts.lengths[i])
    size = size or max(1, len(rows))
    for i in range(0, len(rows), size):
        yield rows[i:i + size], slice(0, rollouts.lengths[rows[i]])


@torch.no_grad()
def score(model, rollouts: Rollouts, temperature: float = 1.0, micro_batch: int = 0):
    """token_logps and entropies of whole rollouts, without gradient, in micro-batches: two tensors (B, T)."""
    logps = torch.zeros_like(rollouts.logps)                                        # (B, T)
    entropy = torch.zeros_like(rollouts.logps)                                      # (B, T)
    for rows, columns in micro_batches(rollouts, range(len(rollouts.ids)), micro_batch):
        ids, mask = rollouts.part(rows, columns)                                    # (b, t) each
        scores = token_logps(model, ids, mask, temperature, with_entropy=True)      # (b, t) each
        logps[rows, columns], entropy[rows, columns] = scores
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
    flat = grouped.amax(1, keepdim=True) == grouped.amin(1, keepdim=True)
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


def apply_gradients(model, optimizer, step: int, lr: float, warmup: int = 5) -> float:
    """Clip to norm 1, warm up, update. Returns the norm before clipping; if it is not finite, no step."""
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warmup)
        optimizer.step()
    optimizer.zero_grad()  # after the step: the last gradient must not leak into later training
    return norm


def update(student, optimizer, rollouts: Rollouts, advantages, config, step: int) -> float:
    """--minibatches optimiser updates on a batch of rollouts -> mean gradient norm. advantages (B, T) or
    (B, 1). With one update a batch the ratio is 1 and the clip inert; with more, it starts to act."""
    advantages = advantages.expand(rollouts.ids.shape)                              # (B, T)
    norms = []
    student.train()  # switches gradient checkpointing on; the models have no dropout
    for minibatch in torch.arange(len(rollouts.ids)).chunk(config.minibatches):
        if not (advantages[minibatch] * rollouts.mask[minibatch]).any():
            continue  # no signal: not even Adam's momentum may move the weights
        # one denominator: the micro-batches add up to the whole gradient
        tokens = rollouts.mask[minibatch].sum()
        for rows, columns in micro_batches(rollouts, minibatch.tolist(), config.micro_batch):
            ids, mask = rollouts.part(rows, columns)                                # (b, t) each
            logps = token_logps(student, ids, mask, config.temperature)             # (b, t)
            loss = policy_loss(logps, rollouts.logps[rows, columns], advantages[rows, columns], mask,
                               denominator=tokens)
            loss.backward()
        norms.append(apply_gradients(student, optimizer, step, config.rate))
    student.eval()
    return sum(norms) / max(1, len(norms))  # not finite if one of them is not


def evaluate(model, tok, tasks: list[Task], **sampling) -> dict:
    """Accuracy at T = 1 and greedy, standard errors, length, share finished. Same dice for all methods."""
    def sample(temperature):
        generator = torch.Generator(model.device).manual_seed(1234)
        rollouts = rollout(model, tok, tasks, temperature=temperature, generator=generator, **sampling)
        return rollouts, rewards(rollouts, tasks)                                   # reward: (tasks,)

    rollouts, right = sample(temperature=1.0)  # in this order: a tool's dice go on
    _, greedy_right = sample(temperature=0.0)
    n = len(tasks)
    result = {"accuracy": float(right.mean()), "se": float(right.std()) / n**0.5}
    result |= {"greedy_accuracy": float(greedy_right.mean()), "greedy_se": float(greedy_right.std()) / n**0.5}
    result |= {"length": int(rollouts.mask.sum()) / n, "finished": int(rollouts.finished.sum()) / n}
    return result


# ------------------------------------------------------------------------------------- runs on disk
# Flags that change no number of a step, but for rounding.
FREE_FLAGS = ("steps", "out", "resume", "overwrite", "threads", "micro_batch", "save_every", "show_every",
              "fresh", "compare", "methods", "seeds", "explain")


def fingerprint(config, script: str) -> dict:
    """What the numbers of a run depend on: the flags that matter, and the source of script and common.py."""
    flags = {name: value for name, value in asdict(config).items() if name not in FREE_FLAGS}
    here = Path(__file__).parent
    source = (here / f"{script}.py").read_bytes() + (here / "common.py").read_bytes()
    return {**flags, "code": hashlib.sha256(source).hexdigest()[:16]}


def run_folder(config, script: str) -> Path:
    return Path(config.out or f"runs/{script}-{config.method}-s{config.seed}")


def last_state(folder: Path) -> dict | None:
    """The run's last checkpoint."""
    path = folder / "state.pt"
    return torch.load(path, weights_only=True, map_location="cpu") if path.exists() else None


class Run:
    """A run's folder (metrics.jsonl, summary.json, state.pt, model/), its console lines, its checkpoint."""

    def __init__(self, config, script: str):
        self.config = config
        self.script = script
        self.folder = run_folder(config, script)
        self.metrics = self.folder / "metrics.jsonl"
        self.interrupted = False
        print_once.cache_clear()  # each warning is said once a run
        # What survives --resume.
        self.notes = {"step": 0, "seconds": 0.0, "step_seconds": 0.0, "skipped_steps": 0,
                      "fingerprint": fingerprint(config, script)}
        if config.resume:
            self.resume()
        elif any(self.folder.glob("*")) and not (config.overwrite and self.metrics.exists()):
            fail(f"{self.folder} exists; if it is a run, --overwrite replaces it and --resume goes on")
        self.began = time.time() - self.notes["seconds"]  # the time before a stop counts too

    def resume(self) -> None:
        """Reads the checkpoint. It must be of a run with the same flags; --steps may differ."""
        self.state = last_state(self.folder)
        if self.state is None:
            fail(f"there is no checkpoint in {self.folder}; start with --overwrite instead of --resume")
        then = self.state["notes"]["fingerprint"]
        now = self.notes["fingerprint"]
        code = then.pop("code")
        if code != now["code"]:
            print("the code has changed since this run began; it goes on with today's", flush=True)
            now["code"] = f"{code}, {now['code']}"  # a run of both: no --compare takes it for one of today's
        changed = [f"--{name}" for name in then if then[name] != now.get(name)]
        if changed:
            fail(f"{self.folder} was begun with other values of {', '.join(changed)}; give those again")
        self.notes = {**self.state["notes"], "fingerprint": now}
        if self.notes["step"] > self.config.steps:
            fail(f"{self.folder} has {self.notes['step']} steps behind it; give --steps at least as many")

    def open_folder(self, modules: list, generator: torch.Generator, *dice: random.Random) -> int:
        """Names what a checkpoint holds, restores it on --resume, returns the first step to do. modules: the
        student, the optimiser, whatever else has a state_dict. Only now, with data and models loaded, is
        anything written: a start that fails on bad input leaves an earlier run as it was."""
        config = self.config
        self.modules = [module for module in modules if module is not None]
        self.generator = generator
        self.dice = dice
        student = modules[0]
        amount = f"{config.steps} steps x {config.prompts_per_step} prompts x {config.group_size} rollouts"
        print(f"{self.script}.py  {config.method}  {config.model} model, "
              f"{student.num_parameters() / 1e6:.2f} M parameters | {student.device}, "
              f"{torch.get_num_threads()} thread(s) | seed {config.seed} | {amount}")
        print("The loss is not printed: with one update a batch it says nothing about progress.", flush=True)
        if config.resume:
            for module, state in zip(self.modules, self.state["modules"], strict=True):
                module.load_state_dict(state)
            generator.set_state(self.state["generator"])
            for rng, state in zip(dice, self.state["dice"], strict=True):
                rng.setstate(state)
            os.truncate(self.metrics, self.notes["bytes"])  # what came after the checkpoint is done again
            del self.state  # three times as large as the model
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        signal.signal(signal.SIGINT, self.interrupt)
        return self.notes["step"]

    def interrupt(self, *_) -> None:
        """Ctrl-C: the step is finished and saved first; a second Ctrl-C stops at once."""
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def warn(self, text: str) -> None:
        print_once(f"warning: {text}")

    def log(self, record: dict) -> None:
        with open(self.metrics, "a") as file:
            file.write(json.dumps(record) + "\n")

    def rollout_figures(self, rollouts: Rollouts, reward, norm: float) -> dict:
        """Figures of a step; warns of what keeps a model from learning. reward: (B,), or of some groups."""
        groups = reward.view(-1, self.config.group_size)                            # (groups, group_size)
        tokens = rollouts.mask.sum()
        flat = int((groups.amax(1) == groups.amin(1)).sum())
        entropy = float(rollouts.entropy.sum() / tokens)
        cut = float((~rollouts.finished).float().mean())
        if flat == len(groups) > 0 and groups.shape[1] > 1:
            self.warn("no group has different rewards; take easier or harder problems or raise --group_size")
        if cut > 0.5:
            self.warn("more than half of the rollouts are cut; raise --max_new_tokens or --max_turns")
        if entropy < 0.01:
            self.warn("the entropy is below 0.01: the model repeats itself; lower --lr")
        return {"entropy": entropy, "grad": norm, "length": float(tokens / len(rollouts.mask)), "cut": cut,
                "flat groups": f"{flat}/{len(groups)}"}

    def step(self, step: int, started: float, figures: dict, **more) -> None:
        """One line on the console (`figures`), one object in metrics.jsonl (`figures` and `more`)."""
        if not math.isfinite(figures["grad"]):
            self.notes["skipped_steps"] += 1
            self.warn("a gradient is not finite; such steps are skipped and counted; lower --lr")
        seconds = time.time() - started
        self.notes["step_seconds"] += seconds
        values = [f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()]
        steps = self.config.steps
        print(f"step {step:>{len(str(steps))}}/{steps}  {'  '.join(values)}  {seconds:.2f}s", flush=True)
        self.log({"step": step, **figures, **more, "seconds": seconds})

    def show(self, step: int, tok, tasks: list[Task], rollouts: Rollouts) -> None:
        """Prints the first problem and its first rollout, every --show_every steps."""
        if self.config.show_every and step % self.config.show_every == 0:
            print(f"      {tasks[0].messages[-1]['content']}\n      > {transcript(tok, rollouts, 0)}")

    def end_step(self, step: int, measure: Callable[[], dict]) -> None:
        """Evaluation and checkpoint, where they are due. A checkpoint replaces the one before."""
        config = self.config
        self.notes["step"] = step
        if config.eval_every and step % config.eval_every == 0:
            self.evaluated(step, measure())
        due = config.save_every and (step % config.save_every == 0 or step == config.steps)
        if due or self.interrupted:
            self.notes["seconds"] = time.time() - self.began
            self.notes["bytes"] = self.metrics.stat().st_size
            modules = [module.state_dict() for module in self.modules]
            dice = [rng.getstate() for rng in self.dice]
            state = {"notes": self.notes, "modules": modules, "generator": self.generator.get_state(),
                     "dice": dice}
            save(state, self.folder / "state.pt")
        if self.interrupted:
            print(f"stopped after step {step}; --resume goes on from there", flush=True)
            raise SystemExit(130)

    def evaluated(self, when: str | int, result: dict) -> None:
        """when: 'before', 'after' or the number of a step."""
        accuracy = result["accuracy"]
        self.notes.setdefault("before", result)
        self.notes["best"] = max(self.notes.get("best", 0.0), accuracy)
        gain = f"  ({accuracy - self.notes['before']['accuracy']:+.3f})" if when == "after" else ""
        print(f"eval {when}  accuracy {accuracy:.3f} +- {result['se']:.3f} at T = 1, "
              f"{result['greedy_accuracy']:.3f} greedy, length {result['length']:.0f}{gain}", flush=True)
        self.log({"eval": when, "step": self.notes["step"], **result})

    def finish(self, model, tok, measure: Callable[[], dict], **more) -> dict:
        """Last evaluation, model/, summary.json; returns the summary."""
        signal.signal(signal.SIGINT, signal.default_int_handler)  # all steps are done: Ctrl-C stops at once
        after = measure()
        self.evaluated("after", after)
        notes = self.notes
        summary = {"method": self.config.method, "seed": self.config.seed, "accuracy_best": notes["best"]}
        for key, value in after.items():
            summary[f"{key}_before"] = notes["before"][key]
            summary[f"{key}_after"] = value
        summary |= {"seconds": time.time() - self.began, "skipped_steps": notes["skipped_steps"],
                    "seconds_per_step": notes["step_seconds"] / max(1, notes["step"]), **more}
        summary |= {"fingerprint": notes["fingerprint"], "config": asdict(self.config),
                    "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}
        model.save_pretrained(self.folder / "model")
        tok.save_pretrained(self.folder / "model")
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=1))
        print(f"wrote {self.folder}/  total {summary['seconds']:.0f} s", flush=True)
        return summary


def table(rows: list[list], head: list[str]) -> str:
    """Aligned text, and Markdown as well."""
    cells = [head]
    for row in rows:
        cells.append([f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row])
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for row in cells:
        lines.append("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
    lines.insert(1, re.sub("[^|]", "-", lines[0]))
    return "\n".join(lines)


def compared(train: Callable, config, variants: dict[str, dict], script: str) -> dict[str, list[dict]]:
    """Trains every variant (name -> the flags in which it differs) on --seeds seeds: name -> summaries. A
    cell is one variant on one seed. --methods picks variants by name. After a stop, finished cells are taken
    if flags and code are the same, and the one in the middle goes on."""
    for name in config.methods:
        if name not in variants:
            fail(f"--methods: there is no '{name}'; give some of: {' | '.join(variants)}")
    variants = {name: variants[name] for name in config.methods or variants}
    cells = list(itertools.product(range(config.seed, config.seed + config.seeds), variants))
    print(f"{len(cells)} runs: {len(variants)} variants on {config.seeds} seeds", flush=True)
    summaries = {name: [] for name in variants}
    seconds = []  # of the cells that were trained here
    fitted = set()
    for done, (seed, name) in enumerate(cells, 1):
        folder = Path(config.out or f"runs/{script}-compare", f"{re.sub('[^a-z0-9_]+', '-', name)}-s{seed}")
        fresh = config.fresh and seed not in fitted  # the tiny models of a seed are fitted anew only once
        flags = {"seed": seed, "out": str(folder), "show_every": 0, "fresh": fresh, **variants[name]}
        cell = replace(config, **flags)
        print(f"\n{name}, seed {seed}", flush=True)
        summary = finished_cell(cell, script)
        if summary is None:
            started = time.time()
            summary = train(cell)
            fitted.add(seed)
            seconds.append(time.time() - started)
            left = len(cells) - done
            print(f"{left} runs to go, about {left * np.median(seconds) / 60:.0f} minutes", flush=True)
        summaries[name].append(summary)
    return summaries


def finished_cell(cell, script: str) -> dict | None:
    """The summary of a cell that need not be trained again; else None, and --resume or --overwrite is set. A
    finished cell of other flags or code is not thrown away unasked."""
    folder = Path(cell.out)
    now = fingerprint(cell, script)
    path = folder / "summary.json"
    if cell.overwrite:
        return None
    if path.exists():
        summary = json.loads(path.read_text())
        if summary["fingerprint"] == now and summary["config"]["steps"] == cell.steps:
            print(f"taken from {folder}, where it was finished earlier; --overwrite trains it again")
            return summary
    state = last_state(folder)
    same = state is not None and state["notes"]["fingerprint"] == now
    cell.resume = same and state["notes"]["step"] <= cell.steps
    cell.overwrite = not cell.resume
    if path.exists() and not cell.resume:
        fail(f"{folder} holds a run of other flags, steps or code; move it, or give --out or --overwrite")
    return None


def seed_table(summaries: dict[str, list[dict]], columns: dict[str, str]) -> str:
    """columns: key of the summaries -> heading. Cells: mean ± sample standard deviation over the seeds.
    Behind the first column, the mean *paired difference* to the first row, ± its standard error."""
    def cell(values, divisor=1.0):
        values = [value for value in values if value is not None]
        if not values:
            return "-"
        spread = f" ± {np.std(values, ddof=1) / divisor:.3f}" if len(values) > 1 else ""
        return f"{np.mean(values):.3f}{spread}"

    first_key, *_ = columns
    first_row, *_ = summaries.values()
    rows = []
    for name, runs in summaries.items():
        cells = [cell([run.get(key) for run in runs]) for key in columns]
        gaps = [run[first_key] - other[first_key] for run, other in zip(runs, first_row)]
        paired = "" if runs is first_row else cell(gaps, divisor=len(gaps)**0.5)
        cells.insert(1, paired)
        rows.append([name, *cells])
    head = ["method", *columns.values()]
    head.insert(2, f"minus {rows[0][0]}, ± s.e.")
    return table(rows, head)


def launch(config, train: Callable, **actions: Callable) -> None:
    """The action whose flag is given, else train. What may happen at any time ends in one sentence."""
    given = [flag for flag in actions if getattr(config, flag)]
    if len(given) > 1:
        fail(f"--{' and --'.join(given)} contradict each other; give one of them")
    if getattr(config, "methods", None) and not config.compare:
        fail("--methods picks rows of --compare; a single run takes --method")
    action = actions[given[0]] if given else train
    try:
        action(config)
    except torch.OutOfMemoryError:
        fail("out of GPU memory; lower --rows_at_once (rollouts, judges), --micro_batch (same gradient), "
             "--max_new_tokens, or a local judge's --reply_tokens")
    except OSError as error:  # a folder that cannot be written, a full disk
        fail(" ".join(str(error).split()))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


# ---------------------------------------------------------------------- chat, for judges and memory
def chat_backend(name: str, model_name: str = "", max_new_tokens: int = 512, *, json_object: bool = False,
                 rows_at_once: int = 0, device: str = "", **network) -> Callable:
    """A function: conversations (lists of messages), temperature -> texts, None where no full answer came.
    name: a Hugging Face id or folder, or an OpenAI-compatible server's URL (`model_name`: its model). A
    model's dice start anew with each process, so a resumed run is not digit for digit the same."""
    if name.startswith(("http://", "https://")):
        return endpoint(name, model_name, max_new_tokens, json_object, **network)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, tok = load_model(name, device, trainable=False)
    generator = torch.Generator(device).manual_seed(0)

    def chat(conversations, temperature=0.0):
        # No text may end its own turn: here, where the tokenizer is known, its control tokens are broken up.
        tasks = []
        for conversation in conversations:
            messages = [{**message, "content": defused(tok, message["content"])} for message in conversation]
            tasks.append(Task(messages, ""))
        out = rollout(model, tok, tasks, max_new_tokens=max_new_tokens, temperature=temperature,
                      generator=generator, rows_at_once=rows_at_once)
        answers = []
        for text, finished in zip(out.texts, out.finished.tolist()):
            answers.append(text.rsplit("</think>", 1)[-1].strip() if finished else None)
        return answers
    return chat


def endpoint(url: str, model_name: str, max_new_tokens: int, json_object: bool, timeout: float = 60.0,
             retries: int = 4) -> Callable:
    """`chat_backend` for a server, 8 requests at once. A request that fails is repeated after 1, 2, 4, 8 s,
    but for one that the server refuses (4xx, save 408 and 429). The first request is made here: a wrong
    address, key, model or flag must show before any work is done."""
    # The key is explicit: without one the client would send this machine's Hugging Face token to the URL.
    key = os.environ.get("OPENAI_API_KEY") or "EMPTY"
    client = InferenceClient(base_url=url, api_key=key, timeout=timeout)
    usual = {"model": model_name or "default", "max_tokens": max_new_tokens}
    if json_object:
        usual["response_format"] = {"type": "json_object"}

    def request(messages, temperature):
        """-> (text or None, what was said instead of a reply)."""
        for attempt in range(retries + 1):
            if attempt:
                time.sleep(2.0**(attempt - 1))
            try:
                reply = client.chat_completion(messages, temperature=temperature, **usual)
                choice = reply.choices[0]
                text = choice.message.content
            except Exception as error:  # the error classes differ between versions, these attributes do not
                said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                code = getattr(getattr(error, "response", None), "status_code", 0)
                if 400 <= code < 500 and code not in (408, 429):  # too slow, too many at once
                    break
            else:
                cut = choice.finish_reason in ("length", "content_filter")
                usable = isinstance(text, str) and text and not cut
                return (text if usable else None), ""
        return None, said

    def chat(conversations, temperature=0.0):
        with ThreadPool(8) as pool:
            replies = pool.map(functools.partial(request, temperature=temperature), conversations)
        said = next((said for _, said in replies if said), "")
        if said:
            print_once(f"warning: {url} gave no reply to a request ({said})")
        return [text for text, _ in replies]

    _, said = request([{"role": "user", "content": "Reply with the JSON object {}."}], 0.0)
    if said:
        fail(f"{url} gives no reply ({said}); check address, model name '{model_name}' and $OPENAI_API_KEY")
    return chat


def read_object(text: str) -> dict:
    """A reply's first JSON object, else ValueError: a later one may be an inner item of one that is cut."""
    found = re.search(r'\{\s*".*', text.rsplit("</think>", 1)[-1], re.DOTALL)  # \boxed{5} opens no object
    try:
        return json.JSONDecoder().raw_decode(found[0] if found else "")[0]
    except (ValueError, RecursionError):
        raise ValueError("the reply holds no whole JSON object") from None


def ask(chat: Callable, conversations: list, check, tally: Counter, tries: int = 3) -> list:
    """check(the reply's JSON object) for each conversation, None where no usable reply came. check: a
    function, or a list with one for each conversation; a Value-, Lookup-, Type- or AttributeError in it is
    told to the model, which is asked again. tally counts the calls and what was wrong."""
    checks = check if isinstance(check, list) else [check] * len(conversations)
    results = [None] * len(conversations)
    todo = dict(enumerate(conversations))  # what is still to be asked
    for _ in range(tries):
        if not todo:
            break
        replies = dict(zip(todo, chat(list(todo.values()))))
        todo = {}
        for i, reply in replies.items():
            tally["calls"] += 1
            if reply is None:
                tally["no complete reply"] += 1
                continue
            try:
                results[i] = checks[i](read_object(reply))
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
                tally[reason] += 1
                note = f"Your last reply could not be used: {reason}. Reply with one JSON object alone."
                todo[i] = [*conversations[i], {"role": "assistant", "content": reply[:2000]},
                           {"role": "user", "content": note}]
    return results


# -------------------------------------------------------------------------------- the GRPO baseline
small_chain = functools.partial(chain_task, operations=(2, 4), modulus=7)


def worked_solution(rng: random.Random, task: Task, wrong: float = 0.0) -> str:
    """A chain solved: `A4+1=5, B5*5=4. \\boxed{4}`; a result is random with probability `wrong`."""
    values, modulus, operations = parse_chain(task.messages[-1]["content"])
    value = values[0]
    parts = []
    for label, sign, operand in operations:
        result = APPLY[sign](value, operand) % modulus
        if rng.random() < wrong:
            result = rng.randrange(modulus)
        parts.append(f"{label}{value}{sign}{operand}={result}")
        value = result
    return ", ".join(parts) + f". \\boxed{{{value}}}"


def demonstration(tok, task: Task, answer: str, thinking: bool = False) -> tuple[list[int], list[int]]:
    """Task and one assistant turn -> (ids, mask), as a rollout would have produced them."""
    prompt = prompt_ids(tok, task.messages, thinking=thinking)
    turn = [*encode(tok, answer), end_of_turn(tok)]
    return prompt + turn, [0] * len(prompt) + [1] * len(turn)


def load_student(config, device):
    """The tiny model, fitted on worked solutions (15 % wrong results), or a Hugging Face model as it is."""
    if config.model != "tiny":
        return load_model(config.model, device)
    tok = build_tokenizer(CHAIN_ATOMS)
    rng = random.Random(config.seed)
    tasks = [small_chain(rng) for _ in range(8000)]
    docs = [demonstration(tok, task, worked_solution(rng, task, wrong=0.15)) for task in tasks]
    model = tiny_model(tok, config.seed)
    model = fit_tiny("the student", model, docs, steps=300, seed=config.seed, fresh=config.fresh)
    return model.to(device), tok


def train(config: Config) -> dict:
    """GRPO: sample groups, centre and scale rewards within each group, one clipped policy-gradient update."""
    device = setup(config)
    train_tasks, held_out = load_tasks(config.data, config.eval_tasks, small_chain, config.prompts_per_step)
    run = Run(config, "common")
    student, tok = load_student(config, device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.rate, weight_decay=0.0)
    rng = random.Random(config.seed)
    generator = torch.Generator(device).manual_seed(config.seed)
    measure = functools.partial(evaluate, student, tok, held_out, **config.sampling)

    first = run.open_folder([student, optimizer], generator, rng)
    if not config.resume:
        run.evaluated("before", measure())
    for step in range(first, config.steps):
        started = time.time()
        tasks = rng.sample(train_tasks, config.prompts_per_step)
        rollouts = sample(student, tok, tasks, config, generator)
        rescore(student, rollouts, config)
        reward = rewards(rollouts, tasks)                                           # (B,)
        advantages = group_advantages(reward, config.group_size)                    # (B,)
        norm = update(student, optimizer, rollouts, advantages[:, None], config, step)

        figures = {"solved": float(reward.mean()), **run.rollout_figures(rollouts, reward, norm)}
        run.step(step + 1, started, figures)
        run.show(step, tok, tasks, rollouts)
        run.end_step(step + 1, measure)
    return run.finish(student, tok, measure)


def main(argv=None) -> None:
    launch(parse(Config, argv), train)


if __name__ == "__main__":
    main()
