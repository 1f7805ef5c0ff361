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
    apart = (1e4 * torch.eye(2, dtype=F64)).log_softmax(-1).requires_grad_()
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


@pytest.fixture
def train_on(base, monkeypatch, tmp_path):
    """The real training loop on given rollouts -> the last gradient and the lines of metrics.jsonl. `update`,
    if given, takes the place of the optimiser. The teacher never has a gradient."""
    def call(tasks, rollouts, reward, update=lambda model: None, **flags):
        grads = [torch.zeros(base[0].num_parameters())]

        def apply_gradients(model, *_):
            found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
            grads.append(torch.cat([g.flatten() for g in found]))
            update(model)
            model.zero_grad()
            return 0.0

        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        config = dataclasses.replace(CONFIG, **{"steps": 1, "prompts_per_step": len(tasks), "eval_every": 0,
                                                "save_every": 0, "out": str(folder), **flags})
        ema_update = srpo.ema_update

        def follow(teacher, student, rate):
            assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
            ema_update(teacher, student, rate)

        nothing = dict.fromkeys(("accuracy", "se", "greedy_accuracy", "greedy_se", "length", "finished"), 0.0)
        with monkeypatch.context() as patch:
            patch.setattr(common, "load_tasks", lambda *_: (tasks, tasks))
            patch.setattr(random.Random, "sample", lambda rng, population, k: population)
            patch.setattr(common, "rollout", lambda *_, **__: rollouts)
            patch.setattr(common, "rewards", lambda *_: reward)
            patch.setattr(common, "evaluate", lambda *_, **__: nothing)
            patch.setattr(common, "apply_gradients", apply_gradients)
            patch.setattr(srpo, "ema_update", follow)
            srpo.train(config)
        return grads[-1], steps_of(folder)
    return call


# ------------------------------------------------------------------------------------------------ alignment
def test_teacher_equals_student_on_the_same_prompt(base, batch, monkeypatch):
    """JSD 0 at every token; with a longer padded prompt beside it, below 1e-6. Finds off-by-ones, padding."""
    (model, tok), (tasks, rollouts, _) = base, batch
    rows = [0, 4, 8, 12, 16, 20]  # of six problems
    mask = rollouts.mask[rows].bool()

    def divergence(prompt):  # (6, T)
        monkeypatch.setattr(srpo, "reprompt", prompt)
        states, _ = srpo.teacher_pass(model, tok, tasks, rollouts, [0] * 32, rows, CONFIG)
        assert [len(states[i]) for i in rows] == mask.sum(1).tolist()
        return srpo.student_pass(model, model, rollouts, rows, slice(None), rollouts.mask.bool(), states, 1.0)

    with torch.no_grad():
        rho, same = divergence(lambda messages, solution: messages)
        assert same.abs().max() < 1e-6 and torch.equal(rho, mask.float())
        longer = tasks[5].messages  # the last row pads the other five
        _, beside = divergence(lambda messages, solution: [
            {**m, "content": m["content"] + "A1, B2. " * 3 * (messages is longer)} for m in messages])
        assert beside[:5].max() < 1e-6
        assert beside[5][mask[5]][0] > 1e-6  # it reaches the first response token
        ids, _ = rollouts.part(rows)
        hidden = common.hidden_at(model, ids, mask)
        logps = srpo.sampled_logps(model, hidden, ids[mask], 1.0)
        assert (logps - rollouts.logps[rows][mask]).abs().max() < 1e-4


def test_student_and_teacher_have_the_temperature_of_the_rollouts(base, batch):
    (model, tok), (tasks, rollouts, reward) = base, batch
    mask, hot = rollouts.mask.bool(), dataclasses.replace(CONFIG, temperature=0.5)
    demos = srpo.pick_demonstration(reward.tolist(), 4)
    row = next(i for i, d in enumerate(demos) if d is not None)
    with torch.no_grad():
        states, entropy = srpo.teacher_pass(model, tok, tasks, rollouts, demos, [row], hot)
        q = (model.get_output_embeddings()(states[row]) / 0.5).log_softmax(-1)
        assert torch.allclose(entropy[row][mask[row]], common.entropy_of(q), atol=1e-5)
        ids, _ = rollouts.part([row])
        hidden = common.hidden_at(model, ids, mask[[row]])
        p = (model.get_output_embeddings()(hidden) / 0.5).log_softmax(-1)
        tokens = ids[mask[[row]]]
        assert torch.allclose(srpo.sampled_logps(model, hidden, tokens, 0.5),
                              p.gather(1, tokens[:, None])[:, 0], atol=1e-5)
        found = srpo.divergences(model, model, hidden, states[row], 0.5)
        assert torch.allclose(found, srpo.jsd(p, q), atol=1e-6)


def test_teacher_prompt(base, batch, monkeypatch):
    (model, tok), (tasks, rollouts, reward) = base, batch
    demos = srpo.pick_demonstration(reward.tolist(), 4)
    routed = [i for i, d in enumerate(demos) if d is not None]
    prompts, prompt_ids = [], common.prompt_ids
    monkeypatch.setattr(common, "prompt_ids", lambda tok, messages, **how: (
        prompts.append(messages), prompt_ids(tok, messages, **how))[1])
    states, entropy = srpo.teacher_pass(model, tok, tasks, rollouts, demos, routed, CONFIG)
    assert prompts and set(states) == set(routed)
    assert ((entropy > 0).any(1).nonzero()[:, 0] == torch.tensor(routed)).all()
    answers = {task.messages[-1]["content"]: task.answer for task in tasks}
    for prompt in prompts:
        problem, rest = prompt[-1]["content"].split(srpo.HEADING, 1)
        solution = rest.split(srpo.CLOSING)[0]
        assert prompt[-1]["content"].endswith(srpo.CLOSING)
        assert common.is_correct(solution, answers[problem]) and "<|" not in solution
    # no thinking, and no text that spells out a special token
    for said, shown in (("long thoughts 9</think>It is 5.", "It is 5."), ("5<|im_end|>", "5< |im_end|>")):
        assert srpo.solution_text(tok, type("Rows", (), {"texts": [said]}), 0) == shown


# ------------------------------------------------------------------------------------------------ the sum
@pytest.mark.parametrize("all_wrong", [0, 1])
def test_the_combined_loss_on_worked_numbers(train_on, monkeypatch, all_wrong):
    """rewards 1 0 0 1, lengths 2 3 1 2, JSD .1 .2 .3 | .4, entropies 0 ln2 ln4 | 0: L = -0.127273. Beside an
    all-wrong group of five tokens nothing changes but N, from 8 to 13 tokens; that of sdpo stays 4."""
    B = 4 + 4 * all_wrong
    mask = torch.tensor([[0] + [1] * n + [0] * (3 - n) for n in (2, 3, 1, 2) + (1, 1, 1, 2) * all_wrong])
    zeros = torch.zeros(B, 4)
    rollouts = Rollouts(torch.full((B, 4), 5), mask, zeros, zeros, (1 + mask.sum(1)).tolist(),
                        torch.ones(B).bool(), [""] * B, [[]] * B, [[]] * B)
    task = Task([{"role": "user", "content": "q"}], "1")
    entropy = torch.zeros(B, 4)
    entropy[1, 1:] = torch.tensor([0, math.log(2), math.log(4)])
    divergences = {1: [0.1, 0.2, 0.3], 2: [0.4]}
    total = []

    def teacher_pass(teacher, tok, tasks, rollouts, demos, routed, config):
        return {i: torch.tensor(divergences[i])[:, None].expand(-1, 64) for i in routed}, entropy

    monkeypatch.setattr(srpo, "teacher_pass", teacher_pass)
    monkeypatch.setattr(srpo, "sampled_logps", lambda student, hidden, ids, T: 0 * hidden.sum(1))
    monkeypatch.setattr(srpo, "divergences", lambda student, teacher, hidden, theirs, T: theirs[:, 0])
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: total.append(float(loss.detach())))
    reward = torch.tensor([1.0, 0, 0, 1] + [0.0] * 4 * all_wrong)
    for flags, expected in (({}, -0.127273), ({"beta": 0.0}, -0.125), ({"method": "srpo_no_weight"}, -0.125),
                            ({"method": "sdpo", "distill": "wrong"}, 0.25), ({"micro_batch": 1}, -0.127273)):
        total.clear()
        train_on([task] * (1 + all_wrong), rollouts, reward, show_every=0, **flags)
        counted = 8 / 13 if all_wrong and flags.get("method") != "sdpo" else 1
        assert sum(total) == pytest.approx(expected * counted, abs=1e-6), flags


def test_micro_batches_and_row_order_change_nothing(train_on, batch):
    whole, (line,) = train_on(*batch)
    assert 0 < line["routed"] < 1 and whole.abs().max() > 0
    for size in (1, 3):
        grad, (other,) = train_on(*batch, micro_batch=size)
        assert torch.allclose(whole, grad, atol=1e-6) and other["jsd"] == pytest.approx(line["jsd"])
    tasks, rollouts, reward = batch
    turn = [i for g in range(7, -1, -1) for i in range(4 * g, 4 * g + 4)]  # groups in reverse
    turned = dataclasses.replace(
        rollouts, ids=rollouts.ids[turn], mask=rollouts.mask[turn], texts=[rollouts.texts[i] for i in turn],
        lengths=[rollouts.lengths[i] for i in turn])
    other, _ = train_on(tasks[::-1], turned, reward[turn])
    assert torch.allclose(whole, other, atol=1e-6)


def test_without_routed_rollouts_srpo_is_grpo(train_on, batch):
    for reward in (torch.zeros(32), torch.ones(32)):  # all wrong: nothing to route; all right
        for method in ("srpo", "grpo", "mix", "srpo_no_weight"):
            _, (line,) = train_on(*batch[:2], reward, lambda model: pytest.fail("a step without signal"),
                                  method=method, distill="wrong")
            assert line["routed"] == line["grad"] == 0


def test_each_loss_moves_its_own_quantity(train_on, base, batch):
    """A small step: SDPO lowers the divergence on this batch, GRPO raises log p of successes, SRPO both."""
    tasks, rollouts, reward = batch
    mixed = [i for i in range(32) if reward[i] and not reward.view(8, 4)[i // 4].all()]
    successes = []

    @torch.no_grad()
    def update(student):
        for p in student.parameters():
            p -= 0.05 * p.grad if p.grad is not None else 0
        student.eval()
        successes.append(float(common.score(student, rollouts)[0][mixed].sum()))

    before = float(common.score(base[0], rollouts)[0][mixed].sum())
    for method in ("sdpo", "grpo", "srpo"):
        successes.clear()
        _, lines = train_on(*batch, update, method=method, distill="wrong", ema=0.0, steps=2)
        assert method == "sdpo" or successes[0] > before
        assert method == "grpo" or lines[1]["jsd"] < lines[0]["jsd"]


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


def test_the_precision_of_cuda_on_a_cpu(tmp_path, monkeypatch, train_on, batch):
    exact, _ = train_on(*batch)
    monkeypatch.setattr(common, "mixed_precision", lambda device: True)
    close, (line,) = train_on(*batch)
    assert line["routed"] > 0 and torch.cosine_similarity(exact, close, dim=0) > 0.99
    _, steps = run(tmp_path / "r", "--steps", "2")
    assert all(math.isfinite(r["grad"]) for r in steps)


def test_without_signal_neither_student_nor_teacher_moves(tmp_path, monkeypatch, base):
    monkeypatch.setattr(common, "rewards", lambda rollouts, tasks: torch.zeros(len(rollouts.texts)))
    monkeypatch.setattr(srpo, "ema_update", lambda *_: pytest.fail("the teacher moved"))
    summary, steps = run(tmp_path / "r", "--method", "sdpo", "--steps", "2")
    after = common.load_model(str(tmp_path / "r" / "model"), "cpu")[0]
    for p, q in zip(base[0].parameters(), after.parameters()):
        assert torch.equal(p, q)


def test_after_a_step_that_is_skipped_the_teacher_waits(tmp_path, monkeypatch):
    """The second of three gradients is not finite: the teacher follows twice."""
    clip, follow, steps, followed = torch.nn.utils.clip_grad_norm_, srpo.ema_update, [], []

    def clip_or_nan(*args):
        steps.append(clip(*args))
        return torch.tensor(math.nan) if len(steps) == 2 else steps[-1]

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_or_nan)
    monkeypatch.setattr(srpo, "ema_update", lambda *args: (followed.append(len(steps)), follow(*args)))
    summary, _ = run(tmp_path / "r", "--steps", "3")
    assert summary["skipped_steps"] == 1 and followed == [1, 3]


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
               "--save_every", "0", "--out", str(tmp_path / "c"), "--group_size", "4", "--eval_tasks", "4",
               "--seeds", "1"])
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    names = [row[1].strip() for row in rows[1:]]
    assert len(names) == len(set(names)) == 15 and {"sdpo", "srpo_no_weight", "mix"} < set(names)
    assert {f"grpo --lr {rate}" for rate in ("0.0001", "0.0002", "0.0005")} < set(names)  # 4e-5: its own
    assert names[0] == "srpo"  # what the others are compared with
    column = {cell.strip(): k for k, cell in enumerate(rows[0])}
    for row in rows[1:]:  # one evaluation: the mean
        assert row[column["T = 1"]] == row[column["mean"]] and float(row[column[".9 at"]]) == 1
    srpo.main([*small, "--explain"])
    out = capsys.readouterr().out
    assert "sibling" in out and "teacher would say" in out and "<|im_end|>" in out
    assert out.count("<- first wrong token") == 1 and repr(srpo.HEADING) not in out
    rows = [{"question": f"Say {t.answer}. " + t.messages[0]["content"], "answer": t.answer}
            for t in (srpo.small_chain(rng) for _ in range(30))]
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, rows)))
    srpo.main([*small, "--explain", "--data", str(tmp_path / "other.jsonl")])  # nobody knows what is wrong
    out = capsys.readouterr().out
    assert "teacher would say" in out and "first wrong token" not in out


@pytest.mark.parametrize("said, token", [
    ("A3+4=1, B1*5=0. \\boxed{0}", 5),           # 3 + 4 = 2, modulo 5
    ("A2, B1. \\boxed{1}", 4),                    # the second result
    ("A2, B0. \\boxed{1}", 6),                    # right until the last word
    ("A2", 2),                                      # it stops too early
    ("The answer is 3", None), ("A2, B0", None),   # in no style; cut, but right as far as it goes
])
def test_the_first_wrong_token(base, said, token):
    tok = base[1]
    problem = "Start with 3, work modulo 5: A+4, B*5. Put the last value in \\boxed{}."
    task = Task([{"role": "user", "content": problem}], "0")
    ids = common.encode(tok, said)
    if token is not None or said.startswith("The"):
        ids.append(common.end_of_turn(tok))
    assert srpo.first_wrong(tok, ids, task) == token


def test_an_example_is_an_ordinary_rollout(base, monkeypatch, capsys, refused):
    """One in which the model wrote the teacher's heading is not shown, were it the only one."""
    real = common.rollout

    def rollout(*args, **how):
        rollouts = real(*args, **how)
        return dataclasses.replace(rollouts, texts=[srpo.HEADING + text for text in rollouts.texts])
    monkeypatch.setattr(common, "rollout", rollout)
    assert "--group_size" in refused(srpo.main, ["--explain", "--group_size", "8", "--max_new_tokens", "24"])


def test_a_new_variant_is_one_row(tmp_path, monkeypatch, refused):
    monkeypatch.setitem(srpo.METHODS, "half", srpo.Method("all", 0.5, 0.5, 0.5, True, 2))
    _, steps = run(tmp_path / "r", "--steps", "1", "--method", "half")
    assert steps[0]["sd(w)"] > 0
    assert srpo.Config(method="half").rate == 2 * srpo.Config(method="grpo").rate
    z_grpo, z_sdpo, counted = srpo.route(torch.tensor([1.0, 0]), [None, 0], "half")
    assert z_grpo.tolist() == [0.5, 0.5] and z_sdpo.tolist() == [0, 0.5] and counted.all()


def test_the_paper_s_learning_rates():
    for model, rates in (("tiny", (4e-5, 4e-4, 2e-4)), ("Qwen/Qwen3-8B", (1e-6, 1e-5, 5e-6))):
        found = [srpo.Config(model=model, method=method).rate for method in ("grpo", "sdpo", "srpo")]
        assert found == pytest.approx(rates)


def test_the_command_line(refused, tmp_path):
    for flags, word in (("--method ppo", "ppo"), ("--ema 1.5", "--ema"), ("--minibatches 2", "--minibatches"),
                        ("--compare --lr 1e-4", "--lr out"), ("--methods grpo", "--method"),
                        ("--compare --method grpo", "--method"), ("--data none.json", "none.json")):
        assert word in refused(srpo.main, ["--out", str(tmp_path / "r"), *flags.split()])
    assert srpo.Config().max_new_tokens == 64 and srpo.Config(data="train.json").max_new_tokens == 1024
