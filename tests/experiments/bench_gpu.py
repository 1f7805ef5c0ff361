"""By hand, for forty minutes of one GPU: what rollouts and README's three commands cost at Qwen3-0.6B and 4B.

    python tests/experiments/bench_gpu.py                         all parts, in this order
    python tests/experiments/bench_gpu.py --only recorded steps   some of them
    python tests/experiments/bench_gpu.py --device cpu --tiny     every line once, on a CPU, in two minutes

    part      minutes  what
    recorded        2  64 x 128 tokens, greedy: the *write* pass recorded as a CUDA graph, and not
    lengths         4  64 x 512 and 128 x 512 tokens; transformers' `generate` on the same prompts
    steps           6  two steps (the first warms up) of sod.py, srpo.py, ropd.py, at most 512 tokens
    memory          2  a step of sod.py with --micro_batch 8 (warms up), 2, 4, 8, 16
    run            20  20 steps of sod.py, on the CPU and on the card; flags not known here (--model) go to sod.py

Each figure is printed and appended to --log at once. What fails costs one line. A part starts no new work once
its minutes are over; on a GPU each is a process of its own, which a CUDA error cannot outlive. But for the last
part, models have the real shapes and random weights: nothing is downloaded, and all texts run to their limit.
Texts that scripts read are then replaced by readable ones, every second rollout is right, no evaluations.
"""
import argparse
import functools
import gc
import json
import re
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import AutoTokenizer, Qwen3Config

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common
import ropd
import sod
import srpo

SHAPES = {  # hidden_size, intermediate_size, layers, heads, heads of keys and values, head_dim
    "0.6B": (1024, 3072, 28, 16, 8, 128),
    "4B": (2560, 9728, 36, 32, 8, 128),
    "tiny": (32, 64, 2, 4, 2, 16)}
COMMANDS = {  # as in README, but for the names of the models
    "sod": (sod, ["--teacher", "4B", "--tool", "python", "--timeout_rate", "0"]),
    "srpo": (srpo, ["--gate_tasks", "0"]),
    "ropd": (ropd, ["--teacher", "4B", "--judge", "4B"])}
SENTENCE = "The sum of 3 and 4 is 7. "


def note(args, what: str, figures: dict) -> None:
    """One line on the console and one in the log, now."""
    line = json.dumps({"part": args.part, "what": what, **figures, "card": args.card})
    print(line, flush=True)
    with open(args.log, "a") as file:
        file.write(line + "\n")


def check_time(args) -> None:
    if time.time() > args.until:
        raise TimeoutError("the minutes of this part are over")


def attempt(args, what: str, work, *inputs):
    """work(args, what, *inputs), or a line that says why not."""
    try:
        check_time(args)
        return work(args, what, *inputs)
    except (Exception, SystemExit) as error:
        note(args, what, {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:300]})
    finally:
        gc.collect()
        torch.cuda.empty_cache()  # does nothing on a CPU


def start(args) -> float:
    """Seconds; from here on the peak of memory is taken."""
    if args.device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    return time.time()


def since(args, began: float) -> dict:
    """Seconds, once the card has done all that it was told, and the peak of memory."""
    if args.device != "cpu":
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 1e9
    return {"seconds": round(time.time() - began, 4), "peak_gb": round(peak, 3)}


def timed(args, fn):
    """fn, but each call is noted."""
    @functools.wraps(fn)
    def wrapper(*inputs, **how):
        began = start(args)
        result = fn(*inputs, **how)
        figures = since(args, began)
        if isinstance(result, common.Rollouts):
            figures |= {"rows": len(result.ids), "tokens": int(result.mask.sum())}
        if fn.__name__ == "record":
            figures["worked"] = result is not inputs[0]
        note(args, f"  {fn.__name__}", figures)
        args.piece_ended = start(args)
        return result
    return wrapper


# --------------------------------------------------------------------------------- recorded, lengths
def random_model(args, name: str, kind: type, dtype):
    """In the place of common.load_pretrained."""
    hidden, intermediate, layers, heads, key_heads, head_dim = SHAPES["tiny" if args.tiny else name]
    config = Qwen3Config(vocab_size=151936, hidden_size=hidden, intermediate_size=intermediate,
                         num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_heads,
                         head_dim=head_dim, tie_word_embeddings=True, max_position_embeddings=40960)
    torch.manual_seed(0)
    with torch.device(args.device):
        model = kind.from_config(config, dtype=dtype).eval()
    if args.tokenizer:
        return model, AutoTokenizer.from_pretrained(args.tokenizer)
    return model, common.build_tokenizer(common.CHAIN_ATOMS)


def problems(count: int) -> list[common.Task]:
    """Prompts of about 150 tokens with the tokenizer that is built here."""
    texts = [f"Problem {i}. {SENTENCE * 4} Put the sum in \\boxed{{}}." for i in range(count)]
    return [common.Task([{"role": "user", "content": text}], "7") for text in texts]


def note_speed(args, what: str, model, ids, tokens: int, began: float) -> None:
    """share_of_limit: 1 if a token takes the time to read all weights once, and all rows' keys and values, in
    bf16. ids (rows, T): prompts, then `tokens` new ones."""
    figures = since(args, began)
    rows, columns = ids.shape
    config = model.config
    weights = 2 * model.num_parameters()  # embeddings are counted once: they are read as the head
    column = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # keys, values
    in_use = columns - tokens / 2  # columns, on average
    limit = tokens * (weights + rows * in_use * column) / (1e9 * args.bandwidth)
    figures["tokens_a_second"] = round(rows * tokens / figures["seconds"], 1)
    figures["ms_a_token"] = round(1000 * figures["seconds"] / tokens, 3)
    figures["share_of_limit"] = round(limit / figures["seconds"], 5)
    note(args, what, figures)


def write(args, what: str, model, tok, rows: int, tokens: int, temperature: float = 1.0, record=None):
    """Rollouts, 8 a problem -> ids (rows, T). record: in the place of common.record."""
    tasks = problems(rows // 8)
    with patch.object(common, "record", record or common.record):
        common.rollout(model, tok, tasks, 8, max_new_tokens=4)  # to warm up
        began = start(args)
        ids = common.rollout(model, tok, tasks, 8, max_new_tokens=tokens, temperature=temperature).ids
    note_speed(args, what, model, ids, tokens, began)
    return ids


@torch.no_grad()
def generate(args, what: str, model, tok, rows: int, tokens: int, cache: str) -> None:
    """transformers' own, on the bf16 copy that rollouts use."""
    prompts = [common.prompt_ids(tok, task.messages) for task in problems(rows // 8) * 8]
    inputs = tok.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(args.device)
    began = start(args)
    ids = common.for_writing(model).generate(**inputs, do_sample=True, top_k=0, max_new_tokens=tokens,
                                             min_new_tokens=tokens, cache_implementation=cache,
                                             pad_token_id=tok.pad_token_id)         # (rows, T)
    note_speed(args, what, model, ids, tokens, began)


def recorded(args) -> None:
    model, tok = common.load_model("0.6B", args.device)
    size = (args.rows, args.tokens // 4)
    ids = attempt(args, "recorded", write, model, tok, *size, 0.0)                  # (rows, T)
    plain = attempt(args, "not recorded", write, model, tok, *size, 0.0, lambda step: step)
    note(args, "greedy ids", {"rows": len(ids), "rows_that_are_the_same": int((ids == plain).all(1).sum())})


def lengths(args) -> None:
    model, tok = common.load_model("0.6B", args.device)
    for rows in (args.rows, 2 * args.rows):
        attempt(args, f"rollout {rows} x {args.tokens}", write, model, tok, rows, args.tokens)
    for rows in (args.rows, 2 * args.rows):
        for name in ("dynamic", "static, first", "static, again"):  # a static cache is compiled at first
            what = f"generate {rows} x {args.tokens}, {name}"
            attempt(args, what, generate, model, tok, rows, args.tokens, name.split(",")[0])


# -------------------------------------------------------------------------------- steps, memory, run
def train(args, what: str, script, flags: list[str]) -> None:
    """The script's own `train`; its parts, steps and evaluations are noted."""
    rescore, log = common.rescore, common.Run.log

    def noted_rescore(student, rollouts, config):
        sampled = rollouts.logps                                                    # (B, T)
        rescore(student, rollouts, config)
        note(args, "  sampled - scored", {"largest": float((sampled - rollouts.logps).abs().max())})

    def noted_log(run, record):
        log(run, record)
        if script is srpo and "seconds" in record:  # its update is no function
            note(args, "  update", since(args, args.piece_ended))
        note(args, f"{what}, step {record['step']}", record)
        check_time(args)

    parts = {name: timed(args, getattr(common, name)) for name in ("rollout", "score", "update")}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as patches:
        patches.enter_context(patch.multiple(common, rescore=noted_rescore, **parts))
        patches.enter_context(patch.object(srpo, "teacher_pass", timed(args, srpo.teacher_pass)))
        patches.enter_context(patch.object(common.Run, "log", noted_log))
        flags = ["--out", f"{folder}/run", "--show_every", "0", "--save_every", "0", *flags]
        script.train(common.parse(script.Config, flags))


def readable(tok, asked: str, number: int, tokens: int) -> str:
    """What a judge must reply to this prompt, or else an answer of about so many tokens."""
    if asked.startswith(ropd.RUBRICATOR):
        return json.dumps({"rubrics": [{"criterion": f"It says {k}.", "points": k} for k in range(1, 5)]})
    if asked.startswith(ropd.VERIFIER):
        count = len(re.findall(r"^<\w{8} answer \d+>$", asked, re.MULTILINE))
        verdicts = [{"answer_index": i + 1, "judgement": [i % 2 == 0] * 4} for i in range(count)]
        return json.dumps({"answers": verdicts})
    return f"Answer {number}. {SENTENCE * (tokens // len(common.encode(tok, SENTENCE)))}\\boxed{{7}}"


def command(args, what: str, steps: int, micro_batch: int) -> None:
    """Steps of one of README's commands. what: the script's name first."""
    name = what.split()[0]
    script, flags = COMMANDS[name]
    flags = [*flags, "--model", "0.6B", "--device", args.device, "--steps", str(steps), "--micro_batch",
             str(micro_batch), "--max_new_tokens", str(args.tokens), "--group_size", str(args.rows // 8)]
    if name == "ropd":
        flags += ["--prompts_per_step", "8", "--reply_tokens", str(args.tokens)]  # README's command: 2048
    rollout = common.rollout

    @functools.wraps(rollout)
    def readable_rollout(model, tok, tasks, group_size=1, *, max_new_tokens, **how):
        out = rollout(model, tok, tasks, group_size, max_new_tokens=max_new_tokens, **how)
        for i in range(len(out.texts)):
            asked = tasks[i // group_size].messages[-1]["content"]
            out.texts[i] = readable(tok, asked, i, max_new_tokens)
        out.finished[:] = True
        return out

    nothing = dict.fromkeys(("accuracy", "se", "greedy_accuracy", "greedy_se", "length", "finished"), 0.0)
    replaced = {"rollout": readable_rollout, "evaluate": lambda *_, **__: nothing,
                "load_tasks": lambda *_, **__: (problems(64), problems(8)),
                "rewards": lambda rollouts, tasks: 1.0 * (torch.arange(len(rollouts.ids), device=args.device) % 2)}
    with patch.multiple(common, **replaced), patch.object(common.Run, "finish", lambda *_, **__: {}):
        train(args, what, script, flags)


def steps(args) -> None:
    for name in COMMANDS:
        attempt(args, name, command, 2, 8)


def memory(args) -> None:
    for size in (8, 2, 4, 8, 16):
        attempt(args, f"sod --micro_batch {size}", command, 1, size)


def run(args) -> None:
    flags = ["--steps", "2", "--eval_tasks", "4"] if args.tiny else ["--steps", "20"]
    if "--model" not in args.more:
        with patch.object(common, "mixed_precision", lambda device: False):
            attempt(args, "the CPU", train, sod, [*flags, "--device", "cpu", *args.more])
    attempt(args, "the card", train, sod, [*flags, "--device", args.device, *args.more])


PARTS = {"recorded": (recorded, 2), "lengths": (lengths, 4), "steps": (steps, 6), "memory": (memory, 2),
         "run": (run, 20)}


def do_part(args) -> None:
    part, minutes = PARTS[args.part]
    args.until = time.time() + 60 * minutes
    with ExitStack() as patches:
        patches.enter_context(patch.object(common, "record", timed(args, common.record)))
        if part is not run:
            patches.enter_context(patch.object(common, "load_pretrained", functools.partial(random_model, args)))
        if args.tiny:  # nothing is fitted
            patches.enter_context(patch.object(common, "cached", lambda model, *_: model.eval()))
            patches.enter_context(patch.object(sod, "demonstrations", lambda *_, **__: []))
        if args.device == "cpu":  # CUDA's path, in bf16, where recording falls back
            patches.enter_context(patch.object(common, "mixed_precision", lambda device: True))
        attempt(args, "all of it", lambda *_: part(args))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, few tokens")
    parser.add_argument("--log", default="bench_gpu.jsonl", help="figures are appended here")
    parser.add_argument("--bandwidth", type=float, default=3350.0, help="of the card, GB/s: H100 3350, H200 4800")
    parser.add_argument("--tokenizer", help="Hugging Face id or folder; not given = built here, without merges")
    args, args.more = parser.parse_known_args()
    args.rows, args.tokens = (8, 16) if args.tiny else (64, 512)
    args.card = args.device
    for args.part in args.only:
        if args.device == "cpu" or len(args.only) == 1:
            if args.device != "cpu":
                args.card = torch.cuda.get_device_name()
            do_part(args)
            continue
        minutes = 2 * PARTS[args.part][1] + 1
        try:
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", args.part], timeout=60 * minutes)
        except subprocess.TimeoutExpired:
            note(args, "all of it", {"failed": f"still at work after {minutes} minutes"})


if __name__ == "__main__":
    main()
