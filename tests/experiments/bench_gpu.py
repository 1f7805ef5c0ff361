"""By hand, on a GPU: what README's commands cost with Qwen3-0.6B as student, Qwen3-4B as teacher and judge.

    python tests/experiments/bench_gpu.py --tokenizer Qwen/Qwen3-0.6B [--only sod ropd srpo rollout] [--steps 1]

The models have the real shapes and random weights, so nothing but a tokenizer is needed, and every text is as
long as it may be: the worst case. What such models write is replaced by text of that length which can be
read, every second rollout counts as right, and evaluations are left out; all else is the scripts' own path.
"""
import argparse
import functools
import gc
import json
import re
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3Config

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common
import ropd
import sod
import srpo

SHAPES = {
    "0.6B": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16),
    "4B": dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32)}
COMMON = ["--model", "0.6B", "--micro_batch", "8", "--overwrite", "--show_every", "0", "--save_every", "0",
          "--eval_tasks", "8", "--eval_every", "0"]
COMMANDS = {  # as in README, but for the names of the models
    "sod": (sod, ["--teacher", "4B", "--tool", "python"]),
    "ropd": (ropd, ["--teacher", "4B", "--judge", "4B", "--prompts_per_step", "8"]),
    "srpo": (srpo, ["--gate_tasks", "0"])}
FIGURES = defaultdict(list)  # seconds of each part; tokens; differences of log-probs


def random_model(tokenizer, device, name, kind, dtype):
    """In the place of common.load_pretrained: a model of Qwen3's shape."""
    config = Qwen3Config(**SHAPES[name], vocab_size=151936, num_key_value_heads=8, head_dim=128,
                         tie_word_embeddings=True, max_position_embeddings=40960)
    torch.manual_seed(0)
    with torch.device(device):
        return kind.from_config(config, dtype=dtype).eval(), AutoTokenizer.from_pretrained(tokenizer)


def timed(name: str, fn):
    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        torch.cuda.synchronize()
        began = time.time()
        result = fn(*args, **kwargs)
        torch.cuda.synchronize()
        FIGURES[name].append(time.time() - began)
        return result
    return wrapper


def readable(messages, number: int, tokens: int) -> str:
    """What a judge must reply to this prompt, or else an answer of about so many tokens."""
    asked = messages[-1]["content"]
    if asked.startswith(ropd.RUBRICATOR):
        return json.dumps({"rubrics": [{"criterion": f"It says {k}.", "points": k} for k in range(1, 5)]})
    if asked.startswith(ropd.VERIFIER):
        entries = range(1, len(re.findall(r"^<\w{8} answer \d+>$", asked, re.MULTILINE)) + 1)
        return json.dumps({"answers": [{"answer_index": i, "judgement": [i % 2 == 0] * 4} for i in entries]})
    return f"Answer {number}. " + "The sum of 3 and 4 is 7. " * (tokens // 12) + "\\boxed{7}"


def readable_rollout(rollout):
    student, others = timed("rollout", rollout), timed("teacher, judge: writing", rollout)

    def wrapper(model, tok, tasks, group_size=1, **how):
        trained = next(model.parameters()).requires_grad
        out = (student if trained else others)(model, tok, tasks, group_size, **how)
        prompts = [task.messages for task in tasks for _ in range(group_size)]
        out.texts = [readable(m, i, how["max_new_tokens"]) for i, m in enumerate(prompts)]
        out.finished[:] = True
        if trained:
            FIGURES["tokens"].append(int(out.mask.sum()))
        return out
    return wrapper


def watched_rescore(rescore):
    """Notes how far the sampler's log-probs are from the scorer's."""
    def wrapper(student, rollouts, config):
        sampled = rollouts.logps.clone()
        rescore(student, rollouts, config)
        FIGURES["sampled - scored"].append(float((sampled - rollouts.logps).abs().max()))
    return wrapper


def watched_loss(policy_loss):
    """Notes how far the log-probs of the update are from those of the scorer: the ratio must be 1."""
    def wrapper(logps, old_logps, advantages, mask, **how):
        FIGURES["updated - scored"].append(float(((logps - old_logps) * mask).detach().abs().max()))
        return policy_loss(logps, old_logps, advantages, mask, **how)
    return wrapper


def run(name: str, script, flags: list[str]) -> list:
    """-> one row of the table: means over the steps."""
    FIGURES.clear()
    gc.collect(), torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        script.main([*flags, "--out", f"{folder}/run"])
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [record["seconds"] for record in map(json.loads, lines) if "seconds" in record]
    parts = ("rollout", "teacher, judge: writing", "score", "update")
    cells = [sum(FIGURES[part]) / len(steps) for part in parts]
    if script is srpo:
        cells[3] -= cells[2]  # there the teacher reads inside `backward`
    for pair, values in FIGURES.items():
        if "scored" in pair and script is not srpo:  # whose ratio is 1 by construction
            print(f"{name}: largest difference of log-probs, {pair}: {max(values):.5f}")
    speed = sum(FIGURES["tokens"]) / sum(FIGURES["rollout"])
    return [name, *(f"{s:.1f}" for s in [sum(steps) / len(steps), *cells]), f"{speed:.0f}",
            f"{torch.cuda.max_memory_allocated() / 1e9:.1f}"]


@torch.no_grad()
def compare_with_generate(data: str, new_tokens: int, batches: list[int]) -> None:
    """Tokens a second of `common.rollout` and of transformers' `generate`, same prompts, same lengths; of
    both models by size of the batch."""
    tasks = [common.row_to_task(row, data) for row in common.read_rows(data)[:128]]
    model, tok = common.load_model("0.6B", "cuda")
    prompts = [common.prompt_ids(tok, task.messages) for task in tasks[:8] for _ in range(8)]
    ids = common.padded(prompts, tok.pad_token_id, left=True, device="cuda")            # (64, P)
    real = common.padded([[1] * len(p) for p in prompts], 0, left=True, device="cuda")  # (64, P)

    def generate():
        with torch.autocast("cuda", torch.bfloat16):
            model.generate(input_ids=ids, attention_mask=real, do_sample=True, top_k=0,
                           max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    ours = functools.partial(common.rollout, model, tok, tasks[:8], 8, max_new_tokens=new_tokens)
    for name, fn in (("rollout", ours), ("generate", generate), ("rollout again", ours)):
        timed(name, fn)()  # the first to come pays for what is new: lengths, memory
        speed = 64 * new_tokens / FIGURES[name][-1]
        print(f"{name}: 64 x {new_tokens} tokens, {speed:.0f} tokens/s", flush=True)
    for name in ("0.6B", "4B"):
        model, tok = common.load_model(name, "cuda", trainable=name == "0.6B")
        for size in batches:
            timed(f"{name}, {size}", common.rollout)(model, tok, tasks[:size], max_new_tokens=64)
            seconds = FIGURES[f"{name}, {size}"][-1]
            print(f"{name}: {size} x 64 tokens, {size * 64 / seconds:.0f} tokens/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", required=True, help="Hugging Face id or folder, of a Qwen3 or Qwen2.5")
    parser.add_argument("--only", nargs="*", default=[*COMMANDS, "rollout"])
    parser.add_argument("--data", default="openai/gsm8k", help="the problems of sod.py and ropd.py")
    parser.add_argument("--choices", default="physics/train.json", help="the problems of srpo.py")
    parser.add_argument("--steps", default="1")
    parser.add_argument("--max_new_tokens", default="1024")
    parser.add_argument("--reply_tokens", default="512", help="of teacher and judge; README's command: 2048")
    args = parser.parse_args()
    common.load_pretrained = functools.partial(random_model, args.tokenizer, "cuda")
    if "rollout" in args.only:
        compare_with_generate(args.data, 512, [8, 32, 64, 128])
    common.rollout = readable_rollout(common.rollout)
    common.score, common.update = timed("score", common.score), timed("update", common.update)
    common.rescore, common.policy_loss = watched_rescore(common.rescore), watched_loss(common.policy_loss)
    srpo.teacher_pass = timed("score", srpo.teacher_pass)
    common.evaluate = lambda *_, **__: dict.fromkeys(
        ("accuracy", "se", "greedy_accuracy", "greedy_se", "length", "finished"), 0.0)
    common.rewards = lambda rollouts, tasks: 1.0 * (torch.arange(len(rollouts.ids), device="cuda") % 2)
    srpo.backward = timed("update", srpo.backward)
    rows = []
    for name in [name for name in args.only if name in COMMANDS]:
        script, flags = COMMANDS[name]
        flags = [*COMMON, *flags, "--steps", args.steps, "--max_new_tokens", args.max_new_tokens, "--data",
                 args.choices if name == "srpo" else args.data]
        rows.append(run(name, script, flags + ["--reply_tokens", args.reply_tokens] * (name == "ropd")))
        print(common.table(rows, ["script", "s a step", "rollout", "teacher, judge", "score", "update",
                                  "rollout tokens/s", "peak GB"]), flush=True)


if __name__ == "__main__":
    main()
