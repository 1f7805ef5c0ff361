"""By hand, for forty minutes of one GPU: what rollouts and README's three commands cost at Qwen3-0.6B and 4B.

    python tests/experiments/bench_gpu.py [--only recorded steps]
    python tests/experiments/bench_gpu.py --device cpu --tiny     every line once, on a CPU, in two minutes

    recorded   2 min  64 x 128 tokens, greedy: the *write* pass recorded as a CUDA graph, and not
    lengths    4 min  64 x 512 and 128 x 512 tokens; transformers' `generate` on the same prompts
    steps      6 min  two steps (the first warms up) of sod.py, srpo.py, ropd.py, at most 512 tokens
    memory     2 min  a step of sod.py with --micro_batch 8 (warms up), 2, 4, 8, 16
    run       20 min  20 steps of sod.py on the CPU and on the card; takes its flags: --model DIR ...

Each figure is printed and appended to --log at once. What fails costs one line. A part starts no new work
when its minutes are over; on a GPU it is a process of its own, which no CUDA error outlives. But for `run`,
models have the real shapes and random weights: nothing is downloaded, and all texts run to their limit. Those
that scripts read are replaced by readable ones, every second rollout is right, there are no evaluations.
"""
import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest.mock import Mock, patch

import torch
from transformers import AutoTokenizer, Qwen3Config

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common
import ropd
import sod
import srpo

# hidden size, that of the MLP, layers, heads
SHAPES = {"0.6B": (1024, 3072, 28, 16), "4B": (2560, 9728, 36, 32), "tiny": (32, 64, 2, 16)}
COMMANDS = {  # as in README, but for the names of the models
    "sod": (sod, ["--teacher", "4B", "--tool", "python", "--timeout_rate", "0"]),
    "srpo": (srpo, ["--gate_tasks", "0"]),
    "ropd": (ropd, ["--teacher", "4B", "--judge", "4B", "--prompts_per_step", "8"])}
SENTENCE = "The sum of 3 and 4 is 7. "


def note(args, what: str, figures: dict) -> None:
    """One line on the console and one in the log, now."""
    for key, value in figures.items():
        figures[key] = round(value, 5) if isinstance(value, float) else value
    line = json.dumps({"part": args.part, "what": what, **figures, "card": args.card})
    print(line, flush=True)
    with open(args.log, "a") as file:
        file.write(line + "\n")


def attempt(args, what: str, work, *inputs):
    """work(args, what, *inputs), or a line that says why not."""
    try:
        return work(args, what, *inputs)
    except (Exception, SystemExit) as error:
        note(args, what, {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]})
    finally:
        gc.collect()
        torch.cuda.empty_cache()  # does nothing on a CPU


def measured(args, what: str, fn, *inputs, **how):
    """fn(*inputs, **how), and a line with its seconds, its peak of memory and, if it writes, its speed.
    share_of_limit: 1 if a token takes the time to read all weights and all rows' keys and values once."""
    if time.time() > args.until:
        raise TimeoutError("the minutes of this part are over")
    if args.device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.time()
    result = fn(*inputs, **how)
    if args.device != "cpu":
        torch.cuda.synchronize()
    seconds = time.time() - began
    figures = {"seconds": seconds, "peak_gb": torch.cuda.max_memory_allocated() / 1e9}
    if "max_new_tokens" in how:  # texts that run to their limit
        model, tokens = inputs[0], how["max_new_tokens"]
        rows, columns = getattr(result, "ids", result).shape
        config = model.config
        # bf16; embeddings are counted once: they are read as the head; half of the new columns: on average
        column = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        read = 2 * model.num_parameters() + rows * (columns - tokens / 2) * column
        figures |= {"rows": rows, "tokens": tokens, "tokens_a_second": rows * tokens / seconds,
                    "ms_a_token": 1000 * seconds / tokens,
                    "share_of_limit": tokens * read / (1e9 * args.bandwidth) / seconds}
    note(args, what, figures)
    args.ended = time.time()
    return result


def random_model(args, name: str, kind: type, dtype):
    """In the place of common.load_pretrained."""
    hidden, mlp, layers, heads = SHAPES["tiny" if args.tiny else name]
    config = Qwen3Config(
        vocab_size=151936, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, head_dim=8 if args.tiny else 128,
        tie_word_embeddings=True, max_position_embeddings=40960)
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


def write(args, what: str, model, tok, rows: int, tokens: int, temperature: float = 1.0):
    """Rollouts, 8 a problem -> ids (rows, T)."""
    inputs = (model, tok, problems(rows // 8), 8)
    common.rollout(*inputs, max_new_tokens=4)  # to warm up
    out = measured(args, what, common.rollout, *inputs, max_new_tokens=tokens, temperature=temperature)
    return out.ids


def generate(args, what: str, model, tok, rows: int, tokens: int, cache: str) -> None:
    """transformers' own, on the bf16 copy that rollouts use."""
    model = common.for_writing(model)
    prompts = [common.prompt_ids(tok, task.messages) for task in problems(rows // 8) * 8]
    inputs = tok.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(args.device)
    measured(args, what, type(model).generate, model, **inputs, max_new_tokens=tokens, min_new_tokens=tokens,
             do_sample=True, top_k=0, cache_implementation=cache, pad_token_id=tok.pad_token_id)


def recorded(args) -> None:
    model, tok = common.load_model("0.6B", args.device)
    size = (args.rows, args.tokens // 4)
    ids = attempt(args, "recorded", write, model, tok, *size, 0.0)                  # (rows, T)
    with patch.object(common, "record", lambda step: step):
        plain = attempt(args, "not recorded", write, model, tok, *size, 0.0)        # (rows, T)
    note(args, "greedy ids", {"rows": len(ids), "the_same": int((ids == plain).all(1).sum())})


def lengths(args) -> None:
    model, tok = common.load_model("0.6B", args.device)
    for rows in (args.rows, 2 * args.rows):
        attempt(args, f"rollout {rows} x {args.tokens}", write, model, tok, rows, args.tokens)
    for rows in (args.rows, 2 * args.rows):
        for name in ("dynamic", "static, first", "static, again"):  # a static cache is compiled at first
            what = f"generate {rows} x {args.tokens}, {name}"
            attempt(args, what, generate, model, tok, rows, args.tokens, name.split(",")[0])


def train(args, what: str, script, flags: list[str]) -> None:
    """The script's own `train`; its parts, steps and evaluations are noted. srpo.py's update is no function:
    it is what follows the last part of a step."""
    rescore, log = common.rescore, common.Run.log

    def noted_rescore(student, rollouts, config):
        sampled = rollouts.logps                                                    # (B, T)
        rescore(student, rollouts, config)
        note(args, "  sampled - scored", {"largest": float((sampled - rollouts.logps).abs().max())})

    def noted_log(run, record):
        log(run, record)
        note(args, what, {**record, "since_last_part": time.time() - args.ended,
                          "peak_gb": torch.cuda.max_memory_allocated() / 1e9})

    parts = {}
    for name in ("rollout", "score", "update"):
        parts[name] = partial(measured, args, f"  {name}", getattr(common, name))
    reads = partial(measured, args, "  teacher_pass", srpo.teacher_pass)
    with (tempfile.TemporaryDirectory() as folder, patch.multiple(common, rescore=noted_rescore, **parts),
          patch.object(srpo, "teacher_pass", reads), patch.object(common.Run, "log", noted_log)):
        flags = ["--out", f"{folder}/run", "--show_every", "0", "--save_every", "0", *flags]
        script.train(common.parse(script.Config, flags))


def judged(chat, conversations: list, check, tally) -> list:
    """In the place of common.ask: the judge writes, and what it should have written is the result."""
    chat(conversations)
    if check is ropd.parse_rubric:
        return [{"It is right.": 1} for _ in conversations]
    results = []
    for one in check:  # of the answers to one question, every second meets the criterion
        verdicts = [[i % 2 == 0] for i in range(one.keywords["count"])]
        results.append((verdicts, 0))
    return results


def command(args, what: str, name: str, *more: str) -> None:
    """Steps of one of README's commands."""
    rollout = common.rollout

    def readable_rollout(model, tok, tasks, *inputs, max_new_tokens, **how):
        out = rollout(model, tok, tasks, *inputs, max_new_tokens=max_new_tokens, **how)
        text = SENTENCE * (max_new_tokens // len(common.encode(tok, SENTENCE)))
        out.texts = [f"Answer {i}. {text}" for i in range(len(out.texts))]
        out.finished[:] = True
        return out

    script, flags = COMMANDS[name]
    flags = ["--model", "0.6B", "--device", args.device, "--max_new_tokens", str(args.tokens), *flags, *more]
    if script is ropd:
        flags += ["--reply_tokens", str(args.tokens)]  # README's command: 2048
    if args.tiny:
        flags += ["--prompts_per_step", "2", "--group_size", "4"]
    nothing = Mock()
    replaced = {"rollout": readable_rollout, "ask": judged, "evaluate": nothing,
                "load_tasks": lambda *_, **__: (problems(64), problems(8)),
                "rewards": lambda out, tasks: 1.0 * (torch.arange(len(out.ids), device=args.device) % 2)}
    with patch.multiple(common, **replaced), patch.multiple(common.Run, evaluated=nothing, finish=nothing):
        train(args, what, script, flags)


def steps(args) -> None:
    for name in COMMANDS:
        attempt(args, name, command, name, "--steps", "2", "--micro_batch", "8")


def memory(args) -> None:
    for size in ("8", "2", "4", "8", "16"):
        attempt(args, f"sod --micro_batch {size}", command, "sod", "--steps", "1", "--micro_batch", size)


def run(args) -> None:
    flags = ["--steps", "20", *args.more]
    if args.tiny:  # nothing is fitted
        flags += ["--steps", "2", "--eval_tasks", "4"]
        sod.demonstrations = lambda *_, **__: []
        common.cached = lambda model, *_: model.eval()
    if "--model" not in args.more:
        with patch.object(common, "mixed_precision", lambda device: False):
            attempt(args, "the CPU", train, sod, [*flags, "--device", "cpu"])
    attempt(args, "the card", train, sod, [*flags, "--device", args.device])


PARTS = {"recorded": (recorded, 2), "lengths": (lengths, 4), "steps": (steps, 6), "memory": (memory, 2),
         "run": (run, 20)}


def do_part(args, part, minutes: float) -> None:
    args.until = time.time() + 60 * minutes
    replaced = {"record": partial(measured, args, "  record", common.record),
                "print_once": lambda text: note(args, text, {})}
    if part is not run:
        replaced["load_pretrained"] = partial(random_model, args)
    if args.device == "cpu":  # CUDA's path, in bf16, where recording falls back
        replaced["mixed_precision"] = lambda device: True
    with patch.multiple(common, **replaced):
        attempt(args, "the whole part", lambda *_: part(args))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, few tokens, nothing is fitted")
    parser.add_argument("--log", default="bench_gpu.jsonl", help="figures are appended here")
    parser.add_argument("--bandwidth", type=float, default=3350.0, help="GB/s: H100 3350, H200 4800")
    parser.add_argument("--tokenizer", help="Hugging Face id or folder; not given = built here, no merges")
    args, args.more = parser.parse_known_args()
    args.rows, args.tokens = (8, 16) if args.tiny else (64, 512)
    args.card = "cpu" if args.device == "cpu" else torch.cuda.get_device_name()
    for args.part in args.only:
        part, minutes = PARTS[args.part]
        if args.device == "cpu" or len(args.only) == 1:
            do_part(args, part, minutes)
        else:
            words = [sys.executable, __file__, *sys.argv[1:], "--only", args.part]
            hangs = 60 * (2 * minutes + 1)
            attempt(args, "the whole part", lambda *_: subprocess.run(words, timeout=hangs, check=True))


if __name__ == "__main__":
    main()
