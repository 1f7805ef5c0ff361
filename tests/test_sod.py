"""SOD: the equations with worked numbers, the toy world, the loop, the command line."""
import importlib.util
import json
import math
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import cascade
import common
import sod
from conftest import ROOT, steps_of, timeless


# ---------------------------------------------------------------------------------------- equations
def test_absolute_value_is_inside_the_mean():
    s, q = torch.tensor([0., 1., 3., -2.]), torch.tensor([-1., 2., 0., 0.])  # +1 and -1 do not cancel
    assert sod.step_divergence(s, q, [(0, 2), (0, 3), (3, 4)]) == pytest.approx([1.0, 5 / 3, 2.0])


@pytest.mark.parametrize("d, w", [
    ([.2, .4, .8], [1, .500001, .250001]), ([.3, .3, .3], [1, 1, 1]), ([.4, .2, .1], [1, 1.2, 1.2]),
    ([.4, .2, .8], [1, 1.2, .500001]), ([.218, .40, 1.284], [1, .545001, .169783]), ([.5], [1]),
    ([.2, .5, 1, .5, .2, .1], [1, .400001, .200001, .400001, 1, 1.2]),
    ([0, .3], [1, 3.3333e-6]), ([.3, 0], [1, 1.2]), ([0, 0], [1, 1]), ([.4, .1, .4], [1, 1.2, 1.0])])
def test_step_weights(d, w):
    assert sod.step_weights(d) == pytest.approx(w, rel=1e-4)


def test_the_product_telescopes_other_caps_and_ablation_weights():
    rng = random.Random(0)
    for _ in range(200):  # the order of the steps between does not matter
        d = [rng.random() * 10 ** rng.randint(-3, 1) for _ in range(rng.randint(1, 9))]
        w = [min((d[0] + 1e-6) / (d_k + 1e-6), 1.2) for d_k in d]
        assert sod.step_weights(d) == pytest.approx(w, rel=1e-9)
    assert sod.step_weights([.4, .2, .8], delta=.5) == pytest.approx([1, 1.5, .5000006], rel=1e-5)
    assert sod.no_cap([.4, .1, .4], 3, .2) == pytest.approx([1, 3.99997, 1], rel=1e-5)
    d = [.1, .2, .3, .4, .5, .6]
    assert sod.decay(d, 1, .2) == pytest.approx([1, 1, .9, .81, .729, .6561])
    assert sod.mask_after_error(d, 1, .2) == [1, 1, 0, 0, 0, 0]
    assert sod.decay(d, 6, .2) == sod.mask_after_error(d, 6, .2) == sod.uniform(d, 0, .2) == [1] * 6
    assert sod.divergence_ratio([.7], 0, .2) == [1]  # one step: SOD is OPD


@pytest.fixture
def one_step(tmp_path, monkeypatch):
    """A step of `sod.train` on hand-made rollouts -> the advantages that reach the update, (B, T).

    s, q (B, T): log-probs of student and teacher. mask, turns, status: as in Rollouts; not given = one turn
    of all tokens, no call. The outcome advantages come from `reward` (B,), unless `outcome` (B,) is given.
    """
    def run(s, q, mask=None, turns=None, status=None, reward=None, outcome=None, group_size=1, **flags):
        B, T = s.shape
        model, teacher = common.tiny_model(tok, seed=0).eval(), object()
        mask = torch.ones(B, T, dtype=torch.long) if mask is None else mask
        reward = torch.zeros(B) if reward is None else torch.tensor(reward)
        # `s + 1` are the sampler's log-probs, `s` the scorer's.
        rollouts = SimpleNamespace(mask=mask, logps=s + 1, turns=turns or [[(0, T)]] * B,
                                   tool_status=status or [["none"]] * B)
        updates = []

        def score(scorer, scored, temperature, micro_batch):
            assert scorer is teacher and scored is rollouts and (temperature, micro_batch) == (0.7, 3)
            return q, None

        for owner, name, stand_in in (
                (sod, "load_student", lambda *args: (model, tok)),
                (sod, "load_teacher", lambda *args: teacher),
                (common, "rollout", lambda *args, **how: rollouts),
                (common, "rescore", lambda *args: vars(rollouts).update(logps=s)), (common, "score", score),
                (common, "rewards", lambda *args: reward),
                (common, "update", lambda *args: updates.append(args) or 0.0),
                (common.Run, "rollout_figures", lambda *args: {"grad": 0.0}),
                (common, "evaluate", lambda *args, **how: dict.fromkeys(
                    ("accuracy", "se", "greedy_accuracy", "greedy_se", "length", "finished"), 0.0))):
            monkeypatch.setattr(owner, name, stand_in)
        if outcome is not None:
            monkeypatch.setattr(common, "group_advantages", lambda *args: torch.tensor(outcome))
        sod.train(sod.Config(steps=1, prompts_per_step=B // group_size, group_size=group_size, eval_tasks=1,
                             temperature=0.7, micro_batch=3, show_every=0, save_every=0, overwrite=True,
                             out=str(tmp_path / "step"), **flags))
        (student, _, updated, advantages, _, step), = updates
        assert student is model and updated is rollouts and step == 0
        return advantages
    return run


@pytest.fixture
def chain(one_step):
    """Two turns with a tool's token between them -> advantages, loss and its gradient."""
    def run(tool_token=(-7., -.1), ratio=1.0, method="sod", **flags):
        s = torch.tensor([[-.5, -1, tool_token[0], -.2, -2, -.7]])
        q = torch.tensor([[-.7, -.6, tool_token[1], -1, -.8, -.7]])
        mask = torch.tensor([[1, 1, 0, 1, 1, 0]])
        a = one_step(s, q, mask, [[(0, 2), (3, 5)]], [["ok", "none"]], outcome=[.5], method=method, **flags)
        logps = (s + math.log(ratio) * torch.eye(6)[:1]).requires_grad_()  # the first token has moved
        loss = common.policy_loss(logps, s, a, mask)
        loss.backward()
        return a[0].tolist(), float(loss.detach()), logps.grad[0].tolist()
    return run


@pytest.mark.parametrize("tool_token", [(-7., -.1), (3., -9.)])
def test_whole_chain(chain, tool_token):
    """Two steps with a tool token between them, which must not matter at all."""
    a, loss, gradient = chain(tool_token)
    assert a == pytest.approx([.3, .9, 0, .26, .86, 0], abs=1e-5)
    assert loss == pytest.approx(-.58, abs=1e-5)
    # -A m / N: nothing flows through w, d, q
    assert gradient == pytest.approx([-.075, -.225, 0, -.065, -.215, 0], abs=1e-5)
    # without the outcome it is w (q - s), with w = 1, 1, -, .3, .3, -
    a, _, _ = chain(tool_token, method="sod_no_grpo")
    assert a == pytest.approx([1 * -.2, 1 * .4, 0, .3 * -.8, .3 * 1.2, 0], abs=1e-5)


def test_the_clip_acts_on_the_sum(chain):
    _, loss, gradient = chain(ratio=1.5)
    assert loss == pytest.approx(-.601, abs=1e-4) and gradient[0] == 0  # .3 * 1.28 instead of .3 * 1.5
    assert gradient[1:] == pytest.approx([-.225, 0, -.065, -.215, 0], abs=1e-5)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_reductions(one_step):
    s, q = torch.randn(2, 4), torch.randn(2, 4)
    turns, outcome = [[(0, 2), (2, 4)]] * 2, [.5, -.5]
    same = torch.tensor(outcome)[:, None].expand(2, 4)

    def step(s, q, method="sod", **flags):
        return one_step(s, q, turns=turns, outcome=outcome, method=method, **flags)
    assert torch.equal(step(s, q, "grpo"), same) and torch.equal(step(s, q, coefficient=0.), same)  # GRPO
    assert torch.allclose(step(s, q, "opd"), q - s)                                                 # OPD
    assert torch.allclose(step(s, q, "opd", coefficient=2.), 2 * (q - s))
    assert torch.allclose(step(s, q, "opd_grpo"), same + q - s)
    assert torch.equal(step(s, s), same)                                            # teacher = student
    assert not step(s.clone().requires_grad_(), q.clone().requires_grad_()).requires_grad


def test_expected_gradient_is_that_of_the_reverse_kl(one_step):
    student, teacher = torch.tensor([.3, -.2, .1], requires_grad=True), torch.tensor([1., 0., -1.])
    log_p, log_q = student.log_softmax(0), teacher.log_softmax(0)
    exact = (log_p.exp() * (log_p - log_q)).sum()
    gradient, = torch.autograd.grad(exact, student, retain_graph=True)
    assert float(exact.detach()) == pytest.approx(.254363, abs=1e-6)
    assert gradient.tolist() == pytest.approx([-.302110, -.058195, .360305], abs=1e-6)
    # The three tokens that could be sampled, each as a rollout of length 1.
    advantages = one_step(log_p.detach()[:, None], log_q[:, None], method="sod_no_grpo")            # (3, 1)
    expected = 0
    for token in range(3):
        s = log_p[token].view(1, 1)
        loss = common.policy_loss(s, s.detach(), advantages[token:token + 1], torch.ones(1, 1))
        expected += log_p[token].exp().detach() * torch.autograd.grad(loss, student, retain_graph=True)[0]
    assert torch.allclose(expected, gradient, atol=1e-6)


def test_a_rollout_is_compared_with_its_own_group(one_step):
    s = torch.zeros(8, 1)
    a = one_step(s, s, reward=[1., 0., 0., 0., 1., 0., 0., 1.], group_size=4, method="grpo")[:, 0]
    assert a.tolist() == pytest.approx([1.5, -.5, -.5, -.5, .866, -.866, -.866, .866], abs=1e-3)


def weights_of(one_step, d, status, **flags):
    """The weight that each turn of one token gets, where the teacher is d[i][k] above the student."""
    d = torch.tensor(d)                                                             # (B, turns)
    turns = [[(k, k + 1) for k in range(d.shape[1])]] * len(d)
    return (one_step(torch.zeros_like(d), d, turns=turns, status=status, **flags) / d).tolist()


def test_each_rollout_has_its_own_weights_and_errors(one_step):
    d = [[.4, .2, .8], [.2, .4, .1]]
    status = [["ok", "error", "none"], ["timeout", "ok", "none"]]
    for method, expected in {"sod_no_grpo": [[1, 1.2, .5], [1, .5, 1.2]], "opd": [[1, 1, 1], [1, 1, 1]],
                             "no_cap": [[1, 2, .5], [1, .5, 2]], "decay": [[1, 1, .9], [1, .9, .81]],
                             "mask_after_error": [[1, 1, 0], [1, 0, 0]]}.items():
        for row, right in zip(weights_of(one_step, d, status, method=method), expected):
            assert row == pytest.approx(right, abs=1e-4)
    capped = weights_of(one_step, d, status, method="sod", delta=.5)
    assert capped[0] == pytest.approx([1, 1.5, .5], abs=1e-4)
    for method in ("decay", "mask_after_error"):  # no failed call: no rule acts
        assert weights_of(one_step, d, [["ok", "ok", "none"]] * 2, method=method) == [[1, 1, 1]] * 2


def test_figures_of_a_step(one_step, tmp_path):
    weights_of(one_step, [[.4, .2, .8], [.2, .4, .1]],
               [["ok", "error", "none"], ["ok", "timeout", "ok"]], method="sod")
    figures, = steps_of(tmp_path / "step")
    assert (figures["turns"], figures["calls"], figures["failed calls"]) == (3, 2.5, .4)
    assert figures["kl(teacher)"] == pytest.approx(-.35) and figures["solved"] == 0
    assert figures["weight"] == pytest.approx(5.4 / 6, abs=1e-4)


def test_a_method_is_one_row(one_step, tmp_path, monkeypatch, capsys):
    """A rule and its row are written into a copy of sod.py; --method and --methods take it."""
    source = (ROOT / "sod.py").read_text()
    assert source.count("METHODS = {\n") == 1
    row = '    "new": (lambda d, first_error, delta: [1.0, 0.25], 0, 1),\n'
    (tmp_path / "changed.py").write_text(source.replace("METHODS = {\n", "METHODS = {\n" + row))
    spec = importlib.util.spec_from_file_location("changed", tmp_path / "changed.py")
    changed = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "changed", changed)
    spec.loader.exec_module(changed)
    trained = []

    def train(config):
        trained.append(config.method)
        return {"accuracy_after": 0.0}
    monkeypatch.setattr(changed, "train", train)
    changed.main(["--method", "new", "--out", str(tmp_path / "one")])
    changed.main(["--compare", "--seeds", "1", "--methods", "new", "grpo", "--out", str(tmp_path / "all")])
    assert trained == ["new", "new", "grpo"] and "| new " in capsys.readouterr().out
    # and the loop follows the row
    monkeypatch.setitem(sod.METHODS, "new", changed.METHODS["new"])
    assert weights_of(one_step, [[.4, .2]], [["ok", "none"]], method="new") == [[1, .25]]


# ------------------------------------------------------------------------------------ the toy world
tok = sod.build_tokenizer()


def test_a_call_costs_five_tokens_and_a_tool_message_three():
    call = sod.call_text("", "4+1")
    assert len(common.encode(tok, call)) == 5 and len(common.tool_message_ids(tok, "5")) == 3
    assert common.run_tools(common.TOOLS["calculator"], [common.parse_tool_call(call)]) == [("5", "ok")]


def test_demonstrations_are_what_a_rollout_would_have_produced():
    rng = random.Random(0)
    tool = sod.flaky(sod.CALCULATOR, .1, rng)
    for _ in range(50):
        task = common.chain_task(rng)
        turns = sod.demonstrate(rng, task, sod.STUDENT, tool)
        ids, mask = sod.conversation(tok, task, turns, tool)
        turns_in_mask = sum(now > before for before, now in zip([0, *mask], mask))
        assert turns_in_mask == len(turns) <= 8
        text = tok.decode(ids, skip_special_tokens=False)
        said_and_heard = [pair for turn in turns for pair in zip(("assistant", "tool"), turn) if pair[1]]
        messages = task.messages + [{"role": role, "content": text} for role, text in said_and_heard]
        whole = tok.apply_chat_template(messages, tools=[tool.schema], tokenize=False,
                                        add_generation_prompt=True)
        assert whole.startswith(text)
        # Encoding the text again gives other ids: end-of-turn and the header after it would merge.
        assert len(turns) == 1 or ids != common.encode(tok, text)


def test_clean_habits_always_succeed_but_for_the_skill_that_is_missing():
    habits = {**sod.TEACHER, **dict.fromkeys(("malformed", "operand", "start", "skip", "copy"), 0)}
    rng = random.Random(1)
    tool = sod.flaky(sod.CALCULATOR, .1, rng)
    for _ in range(100):
        task = common.chain_task(rng)
        turns = sod.demonstrate(rng, task, habits, tool, max_turns=99)
        assert common.is_correct(turns[-1][0], task.answer)
        # with a gap of 1 in skill, every * becomes a +, and that is the only error
        turns = sod.demonstrate(rng, task, habits, tool, max_turns=99, gap=1)
        text = task.messages[0]["content"].replace("*", "+")
        assert common.is_correct(turns[-1][0], str(common.parse_chain(text)[0][-1]))


def test_oracle_follows_errors_and_recoveries():
    text = "Start with 4, work modulo 10: A+1, B*5. Put the last value in \\boxed{}."
    task = common.Task([{"role": "user", "content": text}], "5")
    right_a, right_b = "OK, we get " + sod.call_text("A", "4+1"), "So, we do " + sod.call_text("B", "5*5")
    turns = [right_a, right_a, sod.call_text("B", "5*6"), right_b, "\\boxed{5}"]
    found = list(cascade.oracle(task, turns, ["timeout", "ok", "ok", "ok", "none"]))
    assert [(prefix, right) for prefix, right, _ in found] == [
        ("clean", True), ("tool error", True), ("clean", False), ("silent error", True), ("clean", True)]


# -------------------------------------------------------------------------------------- the scripts
@pytest.fixture(scope="module", autouse=True)
def smaller_fits():
    """Shorter chains, short fits, hardly any GRPO for the teacher: the same code."""
    fit, demonstrations, config = common.fit_tiny, sod.demonstrations, sod.Config()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.chain_task, "__defaults__", ((2, 2), 10))
        patch.setattr(common, "fit_tiny", lambda *args, steps, **how: fit(*args, steps=100, lr=6e-3, **how))
        patch.setattr(sod, "demonstrations",
                      lambda tok, n, *args, **how: demonstrations(tok, n // 4, *args, **how))
        patch.setattr(sod.improve, "__defaults__", (2,))
        yield sod.load_student(config, "cpu")[0], sod.load_teacher(config, tok, "cpu")


SMALL = ["--prompts_per_step", "2", "--group_size", "4", "--eval_tasks", "8", "--show_every", "0"]


def test_resume_equals_never_stopped(tmp_path):
    for name, steps, *more in (("whole", "4"), ("parts", "2"), ("parts", "4", "--resume")):
        sod.main(["--steps", steps, "--save_every", "1", "--out", str(tmp_path / name), *SMALL, *more])
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "parts")


def test_the_precision_of_cuda_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "mixed_precision", lambda device: True)
    sod.main(["--steps", "2", "--minibatches", "2", "--out", str(tmp_path / "run"), *SMALL])
    assert all(math.isfinite(r["grad"]) and r["grad"] for r in steps_of(tmp_path / "run"))


def test_sod_learns(tmp_path):
    config = sod.Config(steps=20, lr=1e-3, eval_tasks=100, show_every=0, out=str(tmp_path / "run"))
    summary = sod.train(config)
    assert summary["accuracy_after"] > summary["accuracy_before"] + 0.05


def test_compare_runs_every_method(tmp_path, capsys):
    sod.main(["--compare", "--seeds", "1", "--steps", "1", *SMALL, "--out", str(tmp_path)])
    out = capsys.readouterr().out
    for method in sod.METHODS:
        assert f"| {method} " in out and len(steps_of(tmp_path / f"{method}-s0")) == (method != "sft")
    before, after = timeless(tmp_path / "sft-s0")
    assert before["accuracy"] == after["accuracy"]


def test_cascade_and_explain(capsys, monkeypatch):
    monkeypatch.setattr(cascade.cascade, "__defaults__", (60,))
    cascade.main([])
    sod.main(["--explain"])
    out = capsys.readouterr().out
    assert all(words in out for words in ("| silent error", "wrong call at turn 1", " sampled ", " given"))


def test_bad_input_is_refused_in_one_sentence(tmp_path, refused):
    other, folder = common.build_tokenizer(["a phrase of its own"]), str(tmp_path / "other")
    common.tiny_model(other, 0).save_pretrained(folder)
    other.save_pretrained(folder)
    for flags, word in ((["--teacher", folder], "different tokenizers"),
                        (["--compare", "--methods", "ppo"], "no 'ppo'"),
                        (["--method", "ppo"], "invalid choice"),
                        (["--model", folder], "different tokenizers"), (["--timeout_rate", "-1"], "timeout"),
                        (["--explain", "--compare"], "--explain and --compare")):
        assert word in refused(sod.main, [*flags, "--out", str(tmp_path / "run"), *SMALL])
    assert "chain only" in refused(cascade.main, ["--data", "nothing.jsonl"])
    assert not (tmp_path / "run").exists()


def test_the_users_command(tmp_path, smaller_fits, monkeypatch):
    """`python sod.py` as a process of its own, from saved models (else it would fit them in full);
    then real data through the python tool."""
    for name, model in zip(("student", "teacher"), smaller_fits):
        model.save_pretrained(tmp_path / name)
        tok.save_pretrained(tmp_path / name)
    (tmp_path / "data.jsonl").write_text("\n".join(
        json.dumps({"question": f"What is {i}+1?", "answer": f"#### {i + 1}"}) for i in range(20)))
    flags = ["--steps", "2", "--eval_tasks", "4", "--group_size", "2", "--prompts_per_step", "2",
             "--model", "student", "--teacher", "teacher", "--threads", "1"]
    result = subprocess.run([sys.executable, str(ROOT / "sod.py"), *flags], capture_output=True, text=True,
                            cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert all(words in result.stdout for words in ("eval before", "step 2/2", "wrote runs/sod-sod-s0/"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sod, "load_teacher", lambda *how: pytest.fail("grpo has no teacher"))
    sod.main([*flags, "--data", "data.jsonl", "--tool", "python", "--max_new_tokens", "40", "--out", "real",
              "--method", "grpo"])
    assert len(timeless(tmp_path / "real")) == 4
