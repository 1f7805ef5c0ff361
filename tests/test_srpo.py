"""SRPO's mathematics on worked numbers, its alignment, and one learning run."""
import copy
import dataclasses
import json
import math
import random

import pytest
import torch

import common
import srpo
from common import Rollouts, Task
from conftest import steps_of, timeless

F64 = torch.float64


# ------------------------------------------------------------------------------------------------ routing
@pytest.mark.parametrize("rewards, demos, z_srpo, z_sdpo", [
    ([1, 0, 0, 1], [3, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]),
    ([1, 0, 0, 0], [None, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1]),
    ([0, 0, 0, 0], [None] * 4, [0] * 4, [0] * 4),
    ([1, 1, 1, 1], [1, 0, 0, 0], [0] * 4, [1, 1, 1, 1]),
    ([0.5, 0.49, 0, 0], [None, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1]),
    # two groups of four: the sibling is one's own, never a neighbour
    ([0, 0, 1, 0] + [0, 1, 0, 1], [2, 2, None, 2, 5, 7, 5, 5], [1, 1, 0, 1] + [1, 0, 1, 0],
     [1, 1, 0, 1] + [1, 1, 1, 1]),
])
def test_routing(rewards, demos, z_srpo, z_sdpo):
    assert srpo.pick_demonstration(rewards, 4) == demos
    reward = torch.tensor(rewards, dtype=torch.float)
    z_grpo, routed, counted = srpo.route(reward, demos)
    assert routed.tolist() == z_srpo and (z_grpo + routed).tolist() == [1] * len(rewards) and counted.all()
    z_grpo, routed, counted = srpo.route(reward, demos, "sdpo")
    assert routed.tolist() == z_sdpo == counted.tolist() and not z_grpo.any()
    z_grpo, routed, counted = srpo.route(reward, demos, "grpo")
    assert z_grpo.tolist() == [1] * len(rewards) and not routed.any() and counted.all()


def test_distill_chooses_right_wrong_or_all():
    reward, demos = torch.tensor([1.0, 0, 0, 1]), [3, 0, 0, 0]
    chosen = {d: srpo.route(reward, demos, "sdpo", d)[1].tolist() for d in ("wrong", "right", "all")}
    assert chosen == {"wrong": [0, 1, 1, 0], "right": [1, 0, 0, 1], "all": [1, 1, 1, 1]}
    z_grpo, z_sdpo, counted = srpo.route(reward, demos, "mix")
    assert torch.allclose(z_grpo, torch.full((4,), 0.9))
    assert torch.allclose(z_sdpo, torch.full((4,), 0.1)) and counted.all()


# ------------------------------------------------------------------------------- divergence, entropy, weights
def test_jsd():
    p, q = torch.tensor([[0.5, 0.25, 0.25]], dtype=F64), torch.tensor([[0.8, 0.1, 0.1]], dtype=F64)
    assert srpo.jsd(p.log(), q.log()).item() == pytest.approx(0.050672, abs=1e-6)
    assert torch.allclose(srpo.jsd(p.log(), q.log()), srpo.jsd(q.log(), p.log()))
    assert srpo.jsd(p.log(), p.log()).item() == 0
    apart = torch.eye(2, dtype=F64).log().requires_grad_()  # ruled out: log 0 gives no NaN
    value = srpo.jsd(apart[:1], apart[1:])
    assert value.item() == pytest.approx(math.log(2))
    assert torch.autograd.grad(value.sum(), apart)[0].isfinite().all()
    # the gradient on the logits, in numbers and in closed form
    logits = torch.zeros(1, 3, dtype=F64, requires_grad=True)
    srpo.jsd(logits.log_softmax(-1), q.log()).sum().backward()
    assert torch.allclose(logits.grad, torch.tensor([[-0.106823, 0.053412, 0.053412]], dtype=F64), atol=1e-6)
    p = torch.full((3,), 1 / 3, dtype=F64)
    h = 0.5 * (p / ((p + q[0]) / 2)).log()
    assert torch.allclose(logits.grad[0], p * (h - (p * h).sum()))


def test_entropy():
    rows = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.1, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4], dtype=F64)
    assert common.entropy_of(rows.log()).tolist() == pytest.approx([0, .325083, .693147, 1.386294], abs=1e-6)


@pytest.mark.parametrize("entropies, beta, weights", [
    ([0, 1, 2], 1, [1.995723, 0.734185, 0.270092]),
    ([0, 1, 2], 2, [2.600440, 0.351931, 0.047629]),
    ([0, 1, 2], 0, [1, 1, 1]),
    ([0, math.log(2), math.log(4)], 1, [1.714286, 0.857143, 0.428571]),
    ([0, 0.5, 1, 3], 1, [1.976092, 1.198560, 0.726964, 0.098384]),
    ([0.7, 0.7], 1, [1, 1]), ([1, 1], 1000, [1, 1]), ([0.6, 0.7], 200, [2, 0])  # no underflow
])
def test_entropy_weights(entropies, beta, weights):
    h = torch.tensor(entropies, dtype=F64, requires_grad=True)
    w = srpo.entropy_weights(h, beta)
    assert not w.requires_grad and w.mean().item() == pytest.approx(1)
    assert torch.allclose(w, torch.tensor(weights, dtype=F64), atol=1e-6)


def test_ema_rate_is_the_new_share():
    teacher, student = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        teacher.weight.fill_(1.0), student.weight.fill_(0.0)
    for expected in (0.95, 0.9025, 0.857375):
        srpo.ema_update(teacher, student, 0.05)
        assert teacher.weight.item() == pytest.approx(expected)
    srpo.ema_update(teacher, student, 1.0)
    assert teacher.weight.item() == 0.0


# ----------------------------------------------------------------------- one small model for all that follows
CONFIG = srpo.Config(group_size=4, max_new_tokens=24, gate_tasks=0)


@pytest.fixture(scope="module", autouse=True)
def base():
    """The real corpus and the real code, only shrunk: (model, tokenizer)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(srpo, "OPERATIONS", (2, 2))
        patch.setattr(srpo, "MODULUS", 5)
        patch.setattr(srpo, "FIT", {"documents": 4000, "steps": 300, "hidden_size": 64, "layers": 2})
        found = srpo.load_student(CONFIG, "cpu")
        patch.setattr(srpo, "load_student", lambda config, device: copy.deepcopy(found))
        yield found


@pytest.fixture(scope="module")
def batch(base):
    """Eight problems, four rollouts each, of which at least one group is mixed; rewards 0 or 1."""
    rng = random.Random(5)
    tasks = [srpo.small_chain(rng) for _ in range(8)]
    rollouts = common.rollout(*base, tasks, 4, max_new_tokens=24, generator=torch.Generator().manual_seed(3))
    return tasks, rollouts, common.rewards(rollouts, tasks)


def gradients(base, batch, **flags):
    model, tok = base
    student, teacher = copy.deepcopy(model), copy.deepcopy(model).requires_grad_(False)
    log = srpo.backward(student, teacher, tok, *batch, dataclasses.replace(CONFIG, **flags))
    assert all(p.grad is None for p in teacher.parameters())
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in student.parameters()]
    return torch.cat([g.flatten() for g in grads]), log


# ------------------------------------------------------------------------------------------------ alignment
def test_teacher_equals_student_on_the_same_prompt(base, batch):
    """JSD 0 at every token; with a longer padded prompt beside it, below 1e-6. Finds off-by-ones, padding."""
    (model, tok), (tasks, rollouts, _) = base, batch
    rows, same = list(range(6)), [tasks[i // 4].messages for i in range(6)]
    longer = [*same[:5], srpo.reprompt(same[5], "A1, B2. " * 3)]  # the last row pads the other five

    def logps(messages):
        ids, attention, mask = srpo.response_batch(tok, messages, rollouts, rows)
        hidden = common.hidden_at(model, ids, attention, mask)
        return torch.log_softmax(model.get_output_embeddings()(hidden), -1), ids[mask.bool()], mask.sum(1)

    with torch.no_grad():
        p, ids, lengths = logps(same)
        q, again, _ = logps(longer)
        assert torch.equal(ids, again) and torch.equal(ids, rollouts.ids[rows][rollouts.mask[rows].bool()])
        assert srpo.jsd(p, p).abs().max() < 1e-7
        kept = int(lengths[:5].sum())
        assert srpo.jsd(p[:kept], q[:kept]).max() < 1e-6 and (p[:kept] - q[:kept]).abs().max() < 1e-4
        assert srpo.jsd(p[kept:kept + 1], q[kept:kept + 1]) > 1e-6  # it reaches the first response token
        sampled = rollouts.logps[rows][rollouts.mask[rows].bool()]
        assert (p.gather(1, ids[:, None])[:, 0] - sampled).abs().max() < 1e-4


def test_teacher_prompt(base, batch):
    tok, (tasks, rollouts, reward) = base[1], batch
    demos = srpo.pick_demonstration(reward.tolist(), 4)
    messages = srpo.teacher_messages(tok, tasks, rollouts, demos, CONFIG)
    assert messages and set(messages) == {i for i, d in enumerate(demos) if d is not None}
    for i, prompt in messages.items():
        text = prompt[-1]["content"]
        solution = text.split(srpo.HEADING)[1].split(srpo.CLOSING)[0]
        assert text.startswith(tasks[i // 4].messages[-1]["content"]) and text.endswith(srpo.CLOSING)
        assert common.is_correct(solution, tasks[i // 4].answer) and "<|" not in solution
    # no thinking, and no text that spells out a special token
    for said, shown in (("long thoughts 9</think>It is 5.", "It is 5."), ("5<|im_end|>", "5< |im_end|>")):
        ids = torch.tensor([[i for character in said for i in common.encode(tok, character)]])
        rollouts = type("Rows", (), {"ids": ids, "mask": torch.ones_like(ids)})
        assert srpo.solution_text(tok, rollouts, 0) == shown


def test_over_long_teacher_prompts_are_counted_and_go_to_grpo(base, batch):
    grad, log = gradients(base, batch, max_prompt_tokens=5)
    assert log["too_long"] > 0 == log["routed"]
    assert grad.any() and torch.equal(grad, gradients(base, batch, method="grpo")[0])
    assert gradients(base, batch)[1]["too_long"] == 0


# ------------------------------------------------------------------------------------------------ the sum
def test_the_combined_loss_on_worked_numbers(base, monkeypatch):
    """rewards 1 0 0 1, lengths 2 3 1 2, JSD .1 .2 .3 | .4, entropies 0 ln2 ln4 | 0: L = -0.127273."""
    model, tok = base
    mask = torch.tensor([[0] + [1] * n + [0] * (3 - n) for n in (2, 3, 1, 2)])
    attention, zeros = mask + torch.tensor([1, 0, 0, 0]), torch.zeros(4, 4)
    rollouts = Rollouts(torch.full((4, 4), 5), attention, mask, zeros, zeros, 1, torch.ones(4), [""] * 4,
                        [[]] * 4, [[]] * 4)
    task = Task([{"role": "user", "content": "q"}], "1")
    spread = {1: torch.tensor([0, math.log(2), math.log(4)]), 2: torch.zeros(1)}
    divergences = {1: [0.1, 0.2, 0.3], 2: [0.4]}
    total = []

    def teacher_pass(teacher, tok, messages, rollouts, config):
        wide = {i: torch.tensor(divergences[i])[:, None].expand(-1, 64) for i in messages}
        return wide, {i: spread[i] for i in messages}

    monkeypatch.setattr(srpo, "teacher_pass", teacher_pass)
    monkeypatch.setattr(srpo, "sampled_logps", lambda student, hidden, ids, T: 0 * hidden.sum(1))
    monkeypatch.setattr(srpo, "divergences", lambda student, teacher, hidden, theirs, T: theirs[:, 0])
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: total.append(float(loss.detach())))
    reward = torch.tensor([1.0, 0, 0, 1])
    for flags, expected in (({}, -0.127273), ({"beta": 0.0}, -0.125), ({"method": "srpo_no_weight"}, -0.125),
                            ({"method": "sdpo", "distill": "wrong"}, 0.25), ({"micro_batch": 1}, -0.127273)):
        total.clear()
        srpo.backward(model, model, tok, [task], rollouts, reward, dataclasses.replace(CONFIG, **flags))
        assert sum(total) == pytest.approx(expected, abs=1e-6), flags


def test_micro_batches_and_row_order_change_nothing(base, batch):
    whole, log = gradients(base, batch)
    assert log["signal"] and 0 < log["routed"] < 1 and whole.abs().max() > 0
    for size in (1, 3):
        assert torch.allclose(whole, gradients(base, batch, micro_batch=size)[0], atol=1e-6)
    tasks, rollouts, reward = batch
    turn = [i for g in range(7, -1, -1) for i in range(4 * g, 4 * g + 4)]  # groups in reverse
    turned = dataclasses.replace(rollouts, **{name: getattr(rollouts, name)[turn] for name in (
        "ids", "attention_mask", "mask")})
    other, _ = gradients(base, (tasks[::-1], turned, reward[turn]))
    assert torch.allclose(whole, other, atol=1e-6)


def test_without_routed_rollouts_srpo_is_grpo(base, batch):
    for reward in (torch.zeros(32), torch.ones(32)):  # all wrong: nothing to route; all right
        for method in ("srpo", "grpo", "mix", "srpo_no_weight"):
            grad, log = gradients(base, (*batch[:2], reward), method=method, distill="wrong")
            assert not grad.any() and not log["signal"] and log["routed"] == 0


def test_each_loss_moves_its_own_quantity(base, batch):
    """A small step: SDPO lowers the divergence on this batch, GRPO raises log p of successes, SRPO both."""
    (model, tok), (tasks, rollouts, reward) = base, batch
    mixed = [i for i in range(32) if reward[i] and not reward.view(8, 4)[i // 4].all()]

    def step(student, method):  # -> divergence of the routed rollouts, before the step
        config = dataclasses.replace(CONFIG, method=method, distill="wrong")
        log = srpo.backward(student, copy.deepcopy(model), tok, tasks, rollouts, reward, config)
        with torch.no_grad():
            for p in student.parameters():
                p -= 0.05 * p.grad if p.grad is not None else 0
        return log.get("jsd")

    def successes(student):
        return float(common.score(student, rollouts)[0][mixed].sum())

    for method in ("sdpo", "grpo", "srpo"):
        student = copy.deepcopy(model)
        step(student, method)
        assert method == "sdpo" or successes(student) > successes(model)
        assert method == "grpo" or step(student, "sdpo") < step(copy.deepcopy(model), "sdpo")


# ------------------------------------------------------------------------------------------------ whole runs
def run(folder, *flags):
    """One run on the small base, in process; returns its summary and its log."""
    srpo.main(["--out", str(folder), "--prompts_per_step", "4", "--group_size", "4", "--max_new_tokens", "24",
               "--eval_tasks", "30", "--eval_every", "0", "--gate_tasks", "0", *flags])
    return json.loads((folder / "summary.json").read_text()), steps_of(folder)


@pytest.mark.parametrize("flags", ["--method sdpo --distill right --ema 0", "--method grpo",
                                   "--method mix --ema 1", "--beta 2 --distill all --micro_batch 5"])
def test_every_method_runs(tmp_path, flags):
    summary, steps = run(tmp_path / "r", "--steps", "2", *flags.split())
    assert len(steps) == 2 and 0 <= summary["accuracy_after"] <= 1 and summary["skipped_steps"] == 0
    for r in steps:
        assert {"solved", "cut", "length", "routed", "all wrong", "all right"} <= r.keys()
        assert ("jsd" in r) == (r["routed"] > 0) == ("teacher H" in r) and 0 <= r.get("jsd", 0) <= math.log(2)
        assert "grpo" not in flags or r["routed"] == 0
    modules = torch.load(tmp_path / "r" / "state.pt", weights_only=True)["modules"]
    assert len(modules) == 3 - ("grpo" in flags)  # GRPO has no teacher to keep


def test_resume_gives_the_run_that_was_never_stopped(tmp_path):
    for name, steps, *more in (("a", "4"), ("b", "2"), ("b", "4", "--resume")):
        run(tmp_path / name, "--steps", steps, "--save_every", "2", *more)
    assert timeless(tmp_path / "a") == timeless(tmp_path / "b")


def test_the_precision_of_cuda_on_a_cpu(tmp_path, monkeypatch, base, batch):
    exact, _ = gradients(base, batch)
    monkeypatch.setattr(common, "mixed_precision", lambda device: True)
    close, log = gradients(base, batch)
    assert log["routed"] > 0 and torch.cosine_similarity(exact, close, dim=0) > 0.99
    _, steps = run(tmp_path / "r", "--steps", "2")
    assert all(math.isfinite(r["grad"]) for r in steps)


def test_without_signal_neither_student_nor_teacher_moves(tmp_path, monkeypatch, base):
    monkeypatch.setattr(common, "rewards", lambda rollouts, tasks: torch.zeros(len(rollouts.texts)))
    monkeypatch.setattr(srpo, "ema_update", lambda *_: pytest.fail("the teacher moved"))
    summary, steps = run(tmp_path / "r", "--method", "sdpo", "--steps", "2")
    after = common.load_model(str(tmp_path / "r" / "model"), "cpu")[0]
    for p, q in zip(base[0].parameters(), after.parameters()):
        assert torch.equal(p, q)


def test_training_solves_the_problems_it_sees_again_and_again(tmp_path):
    """Four training problems: within 12 steps most of their rollouts are right."""
    rng = random.Random(4)
    rows = [{"question": t.messages[0]["content"], "answer": t.answer}
            for t in (srpo.small_chain(rng) for _ in range(8))]
    (tmp_path / "few.jsonl").write_text("\n".join(map(json.dumps, rows)))
    _, steps = run(tmp_path / "r", "--data", str(tmp_path / "few.jsonl"), "--eval_tasks", "4",
                   "--group_size", "16", "--steps", "12", "--lr", "1e-3", "--save_every", "0")
    solved = [r["solved"] for r in steps]
    assert sum(solved[-5:]) / 5 > sum(solved[:2]) / 2 + 0.2


def test_gates_compare_and_explain(tmp_path, capsys, base):
    rng = random.Random(9)
    found = srpo.gates(*base, [srpo.small_chain(rng) for _ in range(10)], CONFIG)
    assert len(found) == 4 and all(0 <= v <= 1 for v in found.values())
    small = ["--group_size", "8", "--max_new_tokens", "24", "--eval_tasks", "10"]
    srpo.main([*small, "--prompts_per_step", "2", "--compare", "--steps", "1", "--eval_every", "1",
               "--save_every", "0", "--out", str(tmp_path / "c"), "--group_size", "4", "--eval_tasks", "4"])
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    names = [row[1].strip() for row in rows[1:]]
    assert len(names) == len(set(names)) == 15 and {"sdpo", "srpo_no_weight", "mix"} < set(names)
    assert {f"grpo --lr {rate}" for rate in ("0.0001", "0.0002", "0.0005")} < set(names)  # 4e-5: its own
    assert all(row[2] == row[4] and float(row[5]) == 1 for row in rows[1:])  # one evaluation: the mean
    srpo.main([*small, "--explain"])
    out = capsys.readouterr().out
    assert "sibling" in out and "teacher would say" in out and "<|im_end|>" in out


def test_the_command_line(refused, tmp_path):
    for flags, word in (("--method ppo", "ppo"), ("--ema 1.5", "--ema"), ("--minibatches 2", "--minibatches"),
                        ("--data none.json", "none.json")):
        assert word in refused(srpo.main, ["--out", str(tmp_path / "r"), *flags.split()])
    assert srpo.Config().max_new_tokens == 64 and srpo.Config(data="train.json").max_new_tokens == 1024
