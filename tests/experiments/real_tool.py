"""By hand: does a frozen chat model call the Python tool, and is it right more often?

    python tests/experiments/real_tool.py --model DIR --data FILE [--only 0 4]

The same problems, greedy, once without the tool and once for each way of asking for it; `common.prompt_ids`
stays as it is. A call counts if `common.parse_tool_call` reads it; code in a ``` block is none.
"""
import argparse
import random
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402

SHORT = "Use the tool python for every calculation; nobody runs code in a ``` block."
CALL = '<tool_call>\n{"name": "python", "arguments": {"code": "print((48 + 24) * 3)"}}\n</tool_call>'
FORM = (f"Your first reply is one tool call and nothing else, exactly in this form:\n{CALL}\n"
        "The next message holds what the code printed. Then give the final answer in \\boxed{}.")
EXAMPLE = [("user", "Tom has 48 pens, Ann half as many. Each pen costs 3 dollars. What do all of them cost?"),
           ("assistant", CALL), ("tool", "216"), ("assistant", "All pens cost 216 dollars. \\boxed{216}")]
WAYS = {  # messages before the problem, words after it; None: the tool is not there
    "without the tool": None,
    "as it is": ([], ""),
    "told to": ([("system", SHORT)], ""),
    "told the form": ([("system", f"{SHORT} {FORM}")], ""),
    "an example": ([("system", SHORT), *EXAMPLE], ""),
    "the form last": ([("system", SHORT)], f"\n\n{FORM}"),
}


def asked(task, before, after: str):
    question = {**task.messages[-1], "content": task.messages[-1]["content"] + after}
    return replace(task, messages=[*({"role": role, "content": text} for role, text in before), question])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a Hugging Face id or folder")
    parser.add_argument("--data", required=True, help="a file of problems, as for the training scripts")
    parser.add_argument("--only", type=int, nargs="*", default=range(len(WAYS)), help=f"of {list(WAYS)}")
    numbers = {"problems": 32, "max_new_tokens": 400, "max_turns": 3, "batch": 8, "show": 1}
    for flag, value in numbers.items():
        parser.add_argument(f"--{flag}", type=int, default=value)
    args = parser.parse_args()
    rows = random.Random(0).sample(common.read_rows(args.data), args.problems)
    tasks = [common.row_to_task(row, args.data) for row in rows]
    model, tok = common.load_model(args.model, "cpu", trainable=False)
    table = []
    for way in (list(WAYS)[i] for i in args.only):
        tool = None if WAYS[way] is None else common.TOOLS["python"]
        began, right, calls, finished, users = time.time(), 0, Counter(), 0, 0
        for start in range(0, len(tasks), args.batch):
            part = [asked(task, *(WAYS[way] or ([], ""))) for task in tasks[start:start + args.batch]]
            out = common.rollout(model, tok, part, tool=tool, temperature=0.0, max_turns=args.max_turns,
                                 max_new_tokens=args.max_new_tokens)
            right += int(common.rewards(out, part).sum())
            calls.update(status for row in out.tool_status for status in row)
            users += sum(set(row) != {"none"} for row in out.tool_status)
            finished += int(out.finished.sum())
            for i in range(args.show if start == 0 else 0):
                print(f"--- {way}: {common.transcript(tok, out, i)}\n", flush=True)
        table.append([way, f"{users} of {len(tasks)}", sum(calls.values()) - calls["none"],
                      calls["error"] + calls["timeout"], right, finished, f"{time.time() - began:.0f}"])
        print(common.table(table, ["asked", "problems with a call", "calls", "errors", "right", "finished",
                                   "seconds"]), flush=True)


if __name__ == "__main__":
    main()
