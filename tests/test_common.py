"""The shared pieces: masks, scoring, GRPO's formulas, tools, answers, data, runs on disk."""
import copy
import dataclasses
import json
import math
import random
import runpy
import signal
import sys
import time
from functools import partial
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen2Config, Qwen3Config

import common
import plot
from common import Task
from conftest import ROOT, timeless


@pytest.fixture(scope="module")
def tok():
    return common.build_tokenizer(common.CHAIN_ATOMS)


@pytest.fixture(scope="module")
def model(tok):
    return common.tiny_model(tok, seed=0).eval()


def ask(text):
    return Task([{"role": "user", "content": text}], "7")


# ----------------------------------------------------------------------------------------- formulas
def test_group_advantages():
    def of(*rewards, **how):
        return common.group_advantages(torch.tensor(rewards), len(rewards), **how).tolist()
    assert of(1., -1., -1., 1.) == pytest.approx([.8660, -.8660, -.8660, .8660], abs=1e-4)
    assert of(1., -1.1, -1.1, -1.1) == pytest.approx([1.5, -.5, -.5, -.5], abs=1e-4)
    assert of(*[1.] + [0.] * 15) == pytest.approx([3.75] + [-.25] * 15, abs=1e-4)
    assert of(1., 0., 0., 1., std=False) == [.5, -.5, -.5, .5]
    assert of(1., 0., 0., 0., std=False) == [.75, -.25, -.25, -.25]
    shares = [5 / 12, 9 / 12, 1 / 12, 12 / 12]  # as ROPD has them
    assert of(*shares) == pytest.approx([-.3656, .4700, -1.2011, 1.0967], abs=1e-4)
    for shift in (0, 11 / 12):
        centred = of(*(r - shift for r in shares), std=False)
        assert centred == pytest.approx([-.145833, .1875, -.479167, .4375], abs=1e-6)
    for flat in ([.1] * 7, [0.] * 4, [1 / 3] * 5, [.7]):  # no variance, or one rollout: exactly zero
        assert of(*flat) == of(*flat, std=False) == [0.0] * len(flat)
    r = torch.tensor([1., 0., 0., 1., 1., 0.])  # groups do not mix, scale does not matter
    a = common.group_advantages(r, 3)
    assert torch.allclose(a, torch.cat([common.group_advantages(part, 3) for part in (r[:3], r[3:])]))
    assert torch.allclose(common.group_advantages(5 * r - 2, 3), a, atol=1e-4)


@pytest.mark.parametrize("ratio, advantage, loss, gradient", [
    (1.5, .5, -.64, 0), (1.5, -.5, .75, .75), (.5, .5, -.25, -.25), (.5, -.5, .40, 0), (4., -.5, 1.5, 0),
    (2., -.5, 1., 1.)])
def test_policy_loss_clips(ratio, advantage, loss, gradient):
    logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
    value = common.policy_loss(logp, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.ones(1, 1))
    value.backward()
    assert float(value.detach()) == pytest.approx(loss) and float(logp.grad) == pytest.approx(gradient)


def test_policy_loss_is_one_token_mean():
    """Lengths 2 and 6, advantages +.5 and -.5, ratio 1: token mean .25, not mean of sequence means (0)."""
    logps = torch.zeros(2, 6, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1] * 6])
    loss = common.policy_loss(logps, torch.zeros(2, 6), torch.tensor([[.5], [-.5]]), mask)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(.25)
    assert logps.grad[0].tolist() == pytest.approx([-.0625, -.0625, 0, 0, 0, 0])
    assert logps.grad[1].tolist() == pytest.approx([.0625] * 6)


# ------------------------------------------------------------------------------------------ scoring
def naive_logits(model, rollouts):
    """All at once, shifted by one: what predicts columns 1, 2, ..."""
    return model(input_ids=rollouts.ids).logits[:, :-1]


def naive_logps(model, rollouts, temperature=1.0):
    """What token_logps must equal."""
    logps = torch.log_softmax(naive_logits(model, rollouts) / temperature, -1)
    logps = logps.gather(2, rollouts.ids[:, 1:, None])[..., 0]
    return torch.nn.functional.pad(logps, (1, 0)) * rollouts.mask


def some_rollouts(model, tok, group_size=3, **how):
    rng = random.Random(0)
    tasks = [common.chain_task(rng) for _ in range(3)]
    how = {"generator": torch.Generator().manual_seed(0), "max_new_tokens": 20, **how}
    return common.rollout(model, tok, tasks, group_size, **how)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rollout_and_scorer_agree(model, tok, temperature):
    rollouts = some_rollouts(model, tok, temperature=temperature)
    logps, entropy = common.score(model, rollouts, temperature, micro_batch=2)
    assert torch.allclose(logps, rollouts.logps, atol=1e-5)
    assert torch.allclose(entropy, rollouts.entropy, atol=1e-4)
    assert torch.allclose(logps, naive_logps(model, rollouts, temperature), atol=1e-5)


def test_padding_changes_nothing(model, tok):
    """Each row alone, without any padding, gives what it gives in the batch."""
    rollouts = some_rollouts(model, tok)
    one = common.token_logps(model, rollouts.ids, rollouts.mask)
    for i, length in enumerate(rollouts.lengths):
        alone = common.token_logps(model, *rollouts.part([i], slice(0, length)))
        assert torch.allclose(alone, one[[i], :length], atol=1e-5) and not one[i, length:].any()
    wide = torch.nn.functional.pad(rollouts.ids, (0, 5), value=9)
    more = common.token_logps(model, wide, torch.nn.functional.pad(rollouts.mask, (0, 5)))
    assert torch.allclose(more[:, :-5], one, atol=1e-5)


def test_vocabulary_chunks_change_neither_value_nor_gradient(model, tok, monkeypatch):
    rollouts, results = some_rollouts(model, tok), []
    for size in (2**26, 5 * len(tok)):
        monkeypatch.setattr(common, "CHUNK_LOGITS", size)
        logps = common.token_logps(model, rollouts.ids, rollouts.mask)
        logps.sum().backward()
        results.append([logps.detach(), *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    assert torch.allclose(results[0][0], results[1][0], atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*results))


def test_micro_batches_and_row_order_give_the_same_gradient(model, tok, monkeypatch):
    rollouts = some_rollouts(model, tok)
    advantages = torch.randn(len(rollouts.ids), 1, generator=torch.Generator().manual_seed(1))
    gradients = []

    def keep(model, *_):
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        model.zero_grad()
        return 0.0
    monkeypatch.setattr(common, "apply_gradients", keep)
    order = torch.randperm(len(rollouts.ids), generator=torch.Generator().manual_seed(2))
    fields = {f: getattr(rollouts, f)[order] for f in ("ids", "mask", "logps")}
    shuffled = dataclasses.replace(rollouts, **fields, lengths=[rollouts.lengths[i] for i in order])
    for batch, a, size in ((rollouts, advantages, 0), (rollouts, advantages, 1), (rollouts, advantages, 4),
                           (shuffled, advantages[order], 2)):
        common.update(model, None, batch, a, common.Config(micro_batch=size), 0)
    for g in gradients[1:]:
        assert torch.allclose(g, gradients[0], atol=1e-6)


def test_no_signal_and_no_finite_gradient_move_nothing(tok, model):
    student = copy.deepcopy(model)
    optimizer, rollouts = torch.optim.AdamW(student.parameters()), some_rollouts(student, tok)
    ones, zeros = torch.ones(len(rollouts.ids), 1), torch.zeros(len(rollouts.ids), 1)
    common.update(student, optimizer, rollouts, ones, common.Config(), 9)  # fills Adam's momentum
    before = [p.clone() for p in student.parameters()]
    common.update(student, optimizer, rollouts, zeros, common.Config(), 9)
    (next(student.parameters()).sum() * math.nan).backward()
    assert math.isnan(common.apply_gradients(student, optimizer, 9, 1e-3))
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters()))


def test_minibatches_reuse_the_frozen_log_probs(tok, model, monkeypatch):
    """In the second minibatch the policy has moved: the ratio is not 1, the old log-probs are the same."""
    student, config = copy.deepcopy(model), common.Config(minibatches=2, group_size=3, lr=1e-2)
    rollouts, ratios, real = some_rollouts(student, tok), [], common.policy_loss

    def spy(logps, old_logps, advantages, mask, **how):
        ratios.append(float(((logps - old_logps) * mask).abs().max().detach()))
        return real(logps, old_logps, advantages, mask, **how)
    monkeypatch.setattr(common, "policy_loss", spy)
    optimizer, ones = torch.optim.AdamW(student.parameters()), torch.ones(len(rollouts.ids), 1)
    common.update(student, optimizer, rollouts, ones, config, 9)
    assert ratios[0] < 1e-5 < ratios[1]
    norms = [math.nan, 1.0]  # a skipped update is not hidden by the one behind it
    monkeypatch.setattr(common, "apply_gradients", lambda *how: norms.pop(0))
    assert math.isnan(common.update(student, optimizer, rollouts, ones, config, 9)) and not norms


# ----------------------------------------------------------------------------------------- rollouts
def call(expression, name="calculator"):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{"expression": "{expression}"}}}}\n</tool_call>'


def run_script(monkeypatch, tok, model, rows, **how):
    """rows: per row a list of turns. In place of common.choose, each row gets its own ids, in order."""
    batch, scripts, write = [], {}, common.RowCache.write

    def spy(cache, now):
        if not scripts:  # the first pass has all rows, in their order
            for row, turns in zip(now, rows):
                turns = [t if isinstance(t, list) else common.encode(tok, t) for t in turns]
                scripts[id(row)] = iter([i for turn in turns for i in [*turn, common.end_of_turn(tok)]])
        batch[:] = now
        return write(cache, now)

    def choose(logits, temperature, generator):
        writes = [not row.done and row.in_cache == len(row.ids) for row in batch]
        token = torch.tensor([[next(scripts[id(row)]) if w else 0] for row, w in zip(batch, writes)])
        logps = torch.log_softmax(logits / temperature, -1)
        return torch.cat([token, logps.gather(1, token), common.entropy_of(logps)[:, None]], 1)
    with monkeypatch.context() as patch:
        patch.setattr(common.RowCache, "write", spy)
        patch.setattr(common, "choose", choose)
        tasks = [ask(f"question {i} {'x' * i}") for i in range(len(rows))]
        how = {"max_new_tokens": 400, "tool": common.TOOLS["calculator"], **how}
        return common.rollout(model, tok, tasks, **how)


def response(out, i):
    """ids and mask of row i behind its prompt."""
    columns = slice(out.turns[i][0][0], out.lengths[i])
    return out.ids[i, columns].tolist(), out.mask[i, columns].tolist()


def test_multi_turn_ids_masks_and_tool_messages(monkeypatch, tok, model):
    rows = [["first " + call("(4+1)%10"), "then " + call("4+*1"), "\\boxed{7}"], ["\\boxed{3}"],
            [call("2", name="no_such_tool"), "\\boxed{9}"]]
    out = run_script(monkeypatch, tok, model, rows)
    end = common.end_of_turn(tok)
    answers = [["5", common.BAD_EXPRESSION], [], ["error: there is no tool 'no_such_tool'"]]
    for i, turns in enumerate(rows):
        expected, mask = [], []
        for k, turn in enumerate(turns):
            said = [*common.encode(tok, turn), end]
            glue = (f"\n<|im_start|>user\n<tool_response>\n{answers[i][k]}\n</tool_response><|im_end|>\n"
                    "<|im_start|>assistant\n") if k < len(answers[i]) else ""
            heard = common.encode(tok, glue)
            expected, mask = expected + said + heard, mask + [1] * len(said) + [0] * len(heard)
        assert response(out, i) == (expected, mask)
        assert int(out.mask[i].sum()) == sum(mask)
        edges = [k for k, (a, b) in enumerate(zip([0, *mask], [*mask, 0])) if a != b]  # of the runs of 1
        messages = ask(f"question {i} {'x' * i}").messages
        start = len(common.prompt_ids(tok, messages, common.TOOLS["calculator"]))
        assert out.turns[i] == [(start + a, start + b) for a, b in zip(edges[::2], edges[1::2])]
        assert len(out.turns[i]) == len(turns)
    assert out.tool_status == [["ok", "error", "none"], ["none"], ["error", "none"]]
    assert out.finished.tolist() == [True] * 3 and out.texts == ["\\boxed{7}", "\\boxed{3}", "\\boxed{9}"]
    assert common.rewards(out, [ask("")] * 3).tolist() == [1.0, 0.0, 0.0]
    # the cache across tool turns and the compacted batch must give what one full pass gives
    again = common.token_logps(model, out.ids, out.mask)
    assert torch.allclose(again, out.logps, atol=1e-5)
    assert "[5]" in common.transcript(tok, out, 0) and "<|im_end|>" not in common.transcript(tok, out, 0)


def test_ids_survive_a_tokenizer_that_would_encode_them_differently(monkeypatch, tok, model):
    """`\\boxed{` is one token; sampled byte by byte it must stay bytes: nothing is encoded again."""
    bytewise = [i for c in "\\boxed{7}" for i in common.encode(tok, c)]
    assert common.encode(tok, tok.decode(bytewise)) != bytewise
    out = run_script(monkeypatch, tok, model, [[bytewise]])
    assert response(out, 0)[0] == [*bytewise, common.end_of_turn(tok)]
    assert common.rewards(out, [ask("")]).tolist() == [1.0]


def test_budget_turn_limit_and_malformed_calls(monkeypatch, tok, model):
    budget = len(common.encode(tok, call("1+1"))) + 4
    long = run_script(monkeypatch, tok, model, [[call("1+1"), "\\boxed{7}"]], max_new_tokens=budget)
    assert long.finished.tolist() == [False] and long.tool_status == [["ok"]]
    sampled = int(long.mask[0].sum())  # and nothing else: the message is not appended
    assert len(response(long, 0)[0]) == sampled
    turns = run_script(monkeypatch, tok, model, [[call("1+1"), call("2+2")]], max_turns=2)
    assert turns.tool_status == [["ok", "none"]] and not turns.finished[0]  # the last call is not run
    broken = run_script(monkeypatch, tok, model, [['<tool_call>{"name": </tool_call>']])
    assert broken.finished.tolist() == [True] and broken.tool_status == [["none"]]
    cut = some_rollouts(model, tok, max_new_tokens=3)
    assert not cut.finished.any() and int(cut.mask.sum()) == 9 * 3


def test_pad_may_be_the_end_of_turn_token(tok, model):
    same = copy.deepcopy(tok)
    same.pad_token = same.eos_token
    a, b = some_rollouts(model, tok, max_new_tokens=60), some_rollouts(model, same, max_new_tokens=60)
    assert torch.equal(a.mask, b.mask) and a.lengths == b.lengths
    assert torch.allclose(a.logps, b.logps, atol=1e-5)
    for i in a.finished.nonzero().flatten().tolist():  # the sampled end-of-turn is trained
        last = int(a.mask[i].nonzero()[-1])
        assert int(b.ids[i, last]) == common.end_of_turn(tok)


def test_a_turn_ends_with_the_family_s_own_mark(tok):
    for mark in ("<end_of_turn>", "<|end|>"):  # Gemma and Phi end texts with <eos>, turns with another
        vocab = {"a": 0, "<eos>": 1, mark: 2}
        other = mock.Mock(get_vocab=vocab.copy, eos_token_id=1)
        assert common.end_of_turn(other) == 2
    assert common.end_of_turn(mock.Mock(get_vocab=dict, eos_token_id=7)) == 7


def test_same_seed_same_rollouts_and_greedy_is_the_argmax(tok, model):
    assert torch.equal(some_rollouts(model, tok).ids, some_rollouts(model, tok).ids)
    greedy = some_rollouts(model, tok, temperature=0.0)
    chosen = greedy.mask[:, 1:].bool()
    assert torch.equal(naive_logits(model, greedy).argmax(-1)[chosen], greedy.ids[:, 1:][chosen])


def lively(config_class, tok, **how):
    """A random model whose greedy text does not repeat itself."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(
        vocab_size=len(tok), hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
        initializer_range=0.06,
        tie_word_embeddings=True, pad_token_id=tok.pad_token_id, **how)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.mul_(3)
    return model


# What `rollout` wrote when every row was fed column by column.
GREEDY = [[214, 115, 191, 258],
          [219, 239, 175, 62, 0, 135, 232, 127, 180, 35, 61, 50, 188, 81, 115, 227, 272, 53, 81, 155, 266, 29,
           187, 207],
          [219, 36, 192, 219, 36, 155, 187, 166, 145, 251, 65, 135, 81, 31, 191, 19, 65, 123, 271, 215, 186,
           52, 36, 193]]


def test_greedy_ids_are_those_of_the_plain_loop(tok):
    model = lively(Qwen3Config, tok)
    for rows_at_once in (0, 1, 2):
        out = some_rollouts(model, tok, 1, max_new_tokens=24, temperature=0.0, rows_at_once=rows_at_once)
        assert [response(out, i)[0] for i in range(3)] == GREEDY


@pytest.mark.parametrize("config_class, more", [
    (Qwen2Config, {}), (LlamaConfig, {}),
    (Gemma3TextConfig, {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]})])
def test_other_models(tok, config_class, more):
    """Greedy ids equal the argmax of one full pass, at prompts longer than a sliding window, too."""
    model = lively(config_class, tok, **more)
    out = some_rollouts(model, tok, 2, max_new_tokens=40, temperature=0.0)
    chosen = out.mask[:, 1:].bool()
    assert min(start for (start, _), *_ in out.turns) > 12
    assert torch.equal(naive_logits(model, out).argmax(-1)[chosen], out.ids[:, 1:][chosen])
    assert torch.allclose(common.token_logps(model, out.ids, out.mask), out.logps, atol=1e-4)


def many_turns(monkeypatch, tok, model, **how):
    """Sixteen rows of one to four turns; tools' messages of different lengths, control tokens in some."""
    rng = random.Random(1)
    rows = []
    for i in range(16):
        calls = [call(f"{i}+{k}") for k in range(rng.randrange(4))]
        rows.append([*calls, "x" * rng.randrange(1, 30)])
    answers = ["5", "long " * 20, "a<|im_end|>b</tool_response><|im_start|>", "some more words"]
    tool = dataclasses.replace(common.TOOLS["calculator"], run=lambda arguments: (
        answers[sum(map(ord, arguments["expression"])) % 4], "ok"))
    return rows, run_script(monkeypatch, tok, model, rows, tool=tool, **how)


def test_messages_waiting_leaving_and_slices_change_nothing(monkeypatch, tok, model):
    rows, out = many_turns(monkeypatch, tok, model)
    assert torch.allclose(common.token_logps(model, out.ids, out.mask), out.logps, atol=1e-5)
    assert [len(turns) for turns in out.turns] == [len(row) for row in rows] and out.finished.all()
    for share in (0, 2):  # each message is read at once; all ids go in one by one
        with monkeypatch.context() as patch:
            patch.setattr(common, "READ_WHEN", share)
            _, other = many_turns(patch, tok, model)
        assert torch.equal(other.ids, out.ids) and torch.allclose(other.logps, out.logps, atol=1e-5)
    _, cut = many_turns(monkeypatch, tok, model, max_new_tokens=70)  # a message that would fill it is dropped
    assert not cut.finished.all() and max(len(response(cut, i)[0]) for i in range(16)) <= 70
    assert torch.allclose(common.token_logps(model, cut.ids, cut.mask), cut.logps, atol=1e-5)


def test_the_sampler_draws_from_the_distribution():
    """Chi-square on 1e5 draws of 8 tokens, one of which has probability 0; same generator, same draws."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -math.inf, 1.5, -2.0]).expand(100_000, 8)
    for temperature in (1.0, 0.5):
        generator = torch.Generator().manual_seed(0)
        token, logp, entropy = common.choose(logits, temperature, generator).unbind(1)
        p = torch.softmax(logits[0] / temperature, -1)
        counts = torch.bincount(token.long(), minlength=8)
        expected = 100_000 * p
        chi_square = ((counts - expected)**2 / expected)[p > 0].sum()
        assert counts[5] == 0 and chi_square < 22.5  # six degrees of freedom, p = .001
        assert torch.allclose(logp, p.log()[token.long()], atol=1e-5)
        assert torch.allclose(entropy, -(p * p.log()).nan_to_num().sum(), atol=1e-5)
        again = common.choose(logits, temperature, torch.Generator().manual_seed(0))
        assert torch.equal(again[:, 0], token)


def prepared(tok, model):
    """A cache with three rows, ready for its next *write* pass."""
    rows = [common.Row(common.encode(tok, text), 50, 0) for text in ("Start", "Start with 3", "a b c")]
    cache = common.RowCache(model, 50)
    cache.read(rows, range(3))
    cache.write(rows)
    return cache


def test_a_cuda_graph_could_record_the_write_pass(tok, model, monkeypatch):
    """No value is read on the host: a fake tensor has none. That the test would notice is shown, too."""
    cache = prepared(tok, model)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        assert cache.one_id_a_row().shape == (3, len(tok))
    feed = common.RowCache.feed
    monkeypatch.setattr(common.RowCache, "feed", lambda self, numbers, ids, start, columns: feed(
        self, numbers, ids, start, int(start.max()) + 1))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        with pytest.raises(DataDependentOutputException):
            cache.one_id_a_row()


def test_what_is_recorded_stays_in_its_place(tok, model, monkeypatch):
    """CUDA's path on a CPU, with a recorder that notes addresses: inputs, cache and weights never move."""
    recordings = []

    def record(step):
        cache = step.__self__

        def addresses():
            tensors = [cache.inputs, *cache.layers.values(), *cache.model.parameters()]
            return [tensor.data_ptr() for tensor in tensors]
        step()
        recorded, runs = addresses(), []
        recordings.append(runs)

        def replay():
            assert addresses() == recorded
            runs.append(1)
            return step()
        return replay
    monkeypatch.setattr(common, "mixed_precision", lambda device: True)
    monkeypatch.setattr(common, "record", record)
    _, out = many_turns(monkeypatch, tok, model)
    assert len(recordings) > 1 and sum(map(len, recordings)) > 20  # anew only where rows have left
    assert (common.token_logps(model, out.ids, out.mask) - out.logps).abs().max() < 0.2  # bf16


def test_a_recording_that_fails_is_said_once_and_the_pass_runs(tok, model, monkeypatch, capsys):
    monkeypatch.setattr(common, "mixed_precision", lambda device: True)  # and there is no CUDA here
    common.print_once.cache_clear()
    out = some_rollouts(model, tok)
    assert capsys.readouterr().out.count("could not record") == 1 and out.mask.any()


def test_rollouts_follow_the_weights_that_are_trained(tok, model, monkeypatch):
    """On CUDA's path they run on a bf16 copy: one object, brought up to date; rotary tables stay fp32."""
    assert common.for_writing(model) is model
    monkeypatch.setattr(common, "mixed_precision", lambda device: True)
    student = copy.deepcopy(model)
    first = common.for_writing(student)
    address = next(first.parameters()).data_ptr()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
        second = common.for_writing(student)
    assert second is first is not student and next(second.parameters()).data_ptr() == address
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(second.parameters(), student.parameters()))
    assert all(b.dtype == torch.float32 for b in second.buffers())
    assert not next(second.parameters()).requires_grad


def test_a_tool_that_fails_costs_one_answer(monkeypatch, tok, model):
    def run(arguments):
        raise RuntimeError("out of order")
    broken = dataclasses.replace(common.TOOLS["calculator"], run=run)
    out = run_script(monkeypatch, tok, model, [[call("1+1"), "\\boxed{7}"]], tool=broken)
    assert out.tool_status == [["error", "none"]] and out.finished[0]
    assert "[error: RuntimeError: out of order]" in common.transcript(tok, out, 0)


# Shows no tools, knows no role `tool`, and closes the thinking block where thinking is off, as Qwen3's does.
OTHER = """{% for m in messages if m.role != 'tool' %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""


def test_templates(tok):
    """What stands around a tool's answer comes from the template; the tool is shown by any template."""
    other, tool = copy.deepcopy(tok), common.TOOLS["calculator"]
    other.chat_template = OTHER
    glue = "\n<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert tok.decode(common.tool_message_ids(tok, "5")) == glue
    assert tok.decode(common.tool_message_ids(other, "5")) == glue + "<think>\n\n</think>\n\n"
    assert tok.decode(common.tool_message_ids(other, "5", thinking=True)) == glue
    for messages in (ask("1+1?").messages, [{"role": "system", "content": "1+1?"}, *ask("2?").messages]):
        for t in (tok, other):
            text = tok.decode(common.prompt_ids(t, messages, tool))
            assert "Evaluates one arithmetic expression." in text and "expression" in text and "1+1?" in text


def test_no_text_in_a_prompt_can_begin_or_end_a_turn(tok):
    """Neither a tool's answer nor what a model wrote, whatever the tokenizer's special tokens look like."""
    other = copy.deepcopy(tok)
    other.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["[INST]", "<end_of_turn>"]})
    special = set(other.convert_tokens_to_ids([*other.all_special_tokens, "[INST]", "<end_of_turn>"]))
    text = "a<|im_end|>b[INST]<s><end_of_turn><|im_start|>"
    assert len(special) == 5 and special <= {*common.encode(other, text)} | {other.pad_token_id}
    assert not special & {*common.encode(other, common.defused(other, text))}
    assert common.defused(other, "x < 3, a[0], <|im|>") == "x < 3, a[0], <|im|>"
    written, plain = (common.tool_message_ids(other, t) for t in (text, "a"))
    assert [i for i in written if i in special] == [i for i in plain if i in special]


# -------------------------------------------------------------------------------------------- tools
def test_calculator():
    for text, answer in (("(4+1)%10", "5"), ("-3%4", "1"), ("2**10", "1024"), ("7/2", "3.5"), (" 6*7", "42")):
        assert common.run_calculator({"expression": text}) == (answer, "ok")
    for text in ("4+*1", "", "1/0", "9**9**9", "__import__('os')", "a", "'x'*3", "(-8)**.5", "1<2"):
        assert common.run_calculator({"expression": text}) == (common.BAD_EXPRESSION, "error"), text


def test_python_tool(tmp_path):
    run = common.run_python
    assert run({"code": "x = 6\nx * 7"}) == ("42", "ok") and run({"code": "[].append(1)"})[0] == "(no output)"
    assert run({"code": "text\n```python\nprint(1)\n```"}) == ("1", "ok")
    text, status = run({"code": "1/0"})
    assert status == "error" and "ZeroDivisionError" in text and len(text) <= 273
    assert run({"code": "def f(:"})[1] == "error"
    text, _ = run({"code": "print('a' * 500 + 'b' * 500)"})
    assert len(text) == 273 and text.startswith("a" * 128 + "...") and text.endswith("b" * 128)
    assert run({"code": "import os; print(sorted(os.environ))"})[0] in ("[]", "['LC_CTYPE']")
    assert run({"code": "input()"})[1] == "error" and run({"code": ""}) == ("(no output)", "ok")
    # a time-out ends the children, too
    code = f"import os,time\nif os.fork() == 0: time.sleep(2); open('{tmp_path}/mark', 'w')\nwhile True: pass"
    assert run({"code": code}, seconds=1.0) == ("error: timed out", "timeout")
    time.sleep(2)
    assert not (tmp_path / "mark").exists()


def test_parse_tool_call():
    assert common.parse_tool_call(call("1+1")) == {"name": "calculator", "arguments": {"expression": "1+1"}}
    for bad in ("", "{}", '{"name": 1, "arguments": {}}', '{"name": "a", "arguments": ""}', "[" * 100_000):
        assert common.parse_tool_call(f"<tool_call>{bad}</tool_call>") is None


# --------------------------------------------------------------------------------- answers and data
@pytest.mark.parametrize("text, answer, right", [
    ("so \\boxed{42}", "42", True), ("\\boxed{1,234.0}", "1234", True), ("\\boxed{+1,000}", "1000.0", True),
    ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}", True), ("\\boxed{1} then \\boxed{2}", "2", True),
    ("\\boxed{2", "2", False), ("#### 72", "72", True), ("$18", "18", True), ("50%", "50", True),
    ("<answer>\nD\n</answer>", "D", True), ("<answer>d</answer>", "D", False), ("C", "C", True),
    ("<answer>D. text</answer>", "D", False), ("I think it is 42", "42", False), ("", "1", False),
    ("<think>\\boxed{1}</think> \\boxed{3}", "3", True), ("\\boxed{}", "1", False), ("-7.50", "-7.5", True),
    ("\\boxed{Paris}", "paris", True), ("A or B\n<answer>\nB\n</answer>", "B", True)])
def test_answers(text, answer, right):
    assert common.is_correct(text, answer) is right


def test_chain_problems():
    assert common.parse_chain("Start with 3, work modulo 10: A-9, B*7, C-7. Put")[0] == [3, 4, 8, 1]
    train, held_out = common.load_tasks("chain", 50)
    texts = [{t.messages[0]["content"] for t in tasks} for tasks in (train, held_out)]
    assert not texts[0] & texts[1] and len(held_out) == 50
    assert all(common.is_correct(f"\\boxed{{{t.answer}}}", t.answer) for t in held_out)


def test_real_formats(tmp_path):
    def write(path, text):
        path.write_text(text)
        return str(path)
    rows = [{"question": f"q{i}", "answer": f"text\n#### {i}"} for i in range(3)]
    train, held = common.load_tasks(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n"), 1)
    assert {t.answer for t in train + held} == {"0", "1", "2"} and "\\boxed" in held[0].messages[0]["content"]
    choices = [{"prompt": which, "answer": 0, "system": "Answer in <answer>"} for which in ("?", "Which?")]
    train, held = common.load_tasks(write(tmp_path / "b.json", json.dumps(choices)), 1)
    assert [m["role"] for m in train[0].messages] == ["system", "user"] and train[0].answer == "0"
    assert train[0].messages[1]["content"] in ("?", "Which?")
    talk = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"},
            {"role": "user", "content": "3"}]
    row = common.row_to_task({"prompt": talk, "solution": 4}, "here")
    assert row.messages[:2] == talk[:2] and row.messages[2]["content"].startswith("3\n\nPut the final")
    assert talk[2]["content"] == "3" and row.answer == "4"
    train, _ = common.load_tasks(write(tmp_path / "c.csv", "problem,solution\n1+1,2\n2+2,4\n"), 1)
    assert train[0].answer in ("2", "4")


GOOD = '{"question": "q", "answer": "1"}\n'


@pytest.mark.parametrize("name, text, word", [
    ("a.jsonl", GOOD + '{"question": "tru', "row 1"), ("a.jsonl", GOOD + GOOD[:9] + "\n" + GOOD, "row 1"),
    ("a.jsonl", '{"foo": 1, "answer": "2"}\n', "'foo'"), ("a.jsonl", GOOD, "too few"),
    ("a.json", '[\n{"question": "q"},\n{"question"\n]', "position 33"), ("a.jsonl", "\xe9", "row 0"),
    ("x.parquet", "none", "cannot read"), ("a.csv", "foo,bar\n1,2\n", "'bar'"),
    ("notes.txt", "hi", "no network")])
def test_bad_data_is_refused_in_one_sentence(name, text, word, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(common, "hub_reachable", lambda: False)
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    assert word in refused(common.load_tasks, str(tmp_path / name), 1)
    assert "cannot read" in refused(common.load_tasks, str(tmp_path), 1)


def test_without_a_network_one_sentence_at_once(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(common.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    common.hub_reachable.cache_clear()
    started = time.time()
    assert "'tiny'" in refused(common.load_model, "no/such-model", "cpu")
    assert "'chain'" in refused(common.load_tasks, "no/such-dataset", 1)
    assert "cannot load" in refused(common.load_model, str(tmp_path), "cpu")
    assert time.time() - started < 10
    common.hub_reachable.cache_clear()


@pytest.mark.parametrize("argv, word", [
    (["--nonsense", "1"], "--nonsense"), (["--step", "3"], "--step"), (["--steps", "many"], "many"),
    (["--steps", "-1"], "-1"), (["--group_size", "0"], "group_size"), (["--temperature", "0"], "temperature"),
    (["--method", "ppo"], "ppo"), (["--resume", "--overwrite"], "--resume"), (["--lr", "nan"], "lr"),
    (["--device", "abacus"], "abacus")])
def test_bad_flags_are_refused_in_one_sentence(argv, word, refused):
    assert word in refused(lambda: common.setup(common.parse(common.Config, argv)))


def test_auto_takes_a_gpu_but_for_tiny_models(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert common.setup(common.Config()).type == "cpu"
    current = []
    monkeypatch.setattr(torch, "empty", lambda *_, device: mock.Mock(device=torch.device(device)))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert common.setup(common.Config(model="some/model")).type == "cuda"
    assert common.setup(common.Config(model="some/model", device="cuda:1")) == current[-1]


# --------------------------------------------------------------------------------------- evaluation
def test_evaluate(monkeypatch, tok, model):
    out = some_rollouts(model, tok, group_size=1)
    out.texts, out.finished = ["\\boxed{7}", "7", "\\boxed{1}"], torch.tensor([True, False, True])
    monkeypatch.setattr(common, "rollout", lambda *args, **how: out)
    result = common.evaluate(model, tok, [ask("a"), ask("b"), ask("c")], max_new_tokens=20)
    third = dict.fromkeys(("accuracy", "se", "greedy_accuracy", "greedy_se"), 1 / 3)
    assert result == pytest.approx({**third, "length": int(out.mask.sum()) / 3, "finished": 2 / 3})


# ------------------------------------------------------------------------------ models, cache, runs
def test_cache_hit_and_fresh(tok, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    docs = [common.demonstration(tok, common.small_chain(random.Random(5)), "\\boxed{1}")] * 64
    first, again, anew = models = [common.tiny_model(tok, 3, 32) for _ in range(3)]
    stamps = []
    for student in models:
        common.fit_tiny("a test model", student, docs, steps=10, fresh=student is anew)
        path, = (tmp_path / "four-papers").iterdir()
        stamps.append(path.stat().st_mtime_ns)
    assert stamps[0] == stamps[1] < stamps[2]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    assert all(p.grad is None for p in first.parameters())  # nothing may leak into the training that follows


SMALL = ["--prompts_per_step", "2", "--group_size", "4", "--eval_tasks", "8", "--max_new_tokens", "40",
         "--show_every", "0"]


@pytest.fixture(scope="module", autouse=True)
def fitted(session_cache):
    """The baseline on shorter chains; its student is fitted once, quickly, for all runs."""
    fit = common.fit_tiny
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "small_chain", partial(common.chain_task, operations=(2, 2), modulus=4))
        patch.setattr(common, "fit_tiny", lambda *args, steps, **how: fit(*args, steps=150, lr=6e-3, **how))
        found = common.load_student(common.Config(), "cpu")
        patch.setattr(common, "fit_tiny", fit)
        patch.setattr(common, "load_student", lambda config, device: copy.deepcopy(found))
        yield


def test_stopped_and_resumed_equals_never_stopped_and_nothing_is_lost(tmp_path, refused, capsys, monkeypatch):
    whole, parts, step = tmp_path / "whole", tmp_path / "parts", common.Run.step
    flags = ["--steps", "4", "--save_every", "0", "--eval_every", "2", *SMALL]
    calls, evaluate = [], common.evaluate
    monkeypatch.setattr(common, "evaluate", lambda *a, **k: calls.append(1) or evaluate(*a, **k))

    def interrupted(run, number, *rest, **more):  # Ctrl-C in the third step ends it and saves
        step(run, number, *rest, **more)
        if (run.folder, number) == (parts, 3):
            signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(common.Run, "step", interrupted)
    common.main(["--out", str(whole), *flags])
    assert len(calls) == 4  # before, after steps 2 and 4, and at the end
    with pytest.raises(SystemExit) as stop:
        common.main(["--out", str(parts), *flags])
    assert stop.value.code == 130 and "stopped after step 3" in capsys.readouterr().out
    with open(parts / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "solved": 0.1}\n{"step": 5, "sol')  # what a kill leaves behind
    for more, word in (("--seed", "--seed"), ("--steps", "3 steps behind")):
        assert word in refused(common.main, ["--resume", "--out", str(parts), *flags, more, "1"])
    with monkeypatch.context() as patch:  # other code goes on, and says so
        patch.setattr(common.Path, "read_bytes", lambda path: b"edited")
        common.main(["--resume", "--out", str(parts), *flags])
    assert "the code has changed" in capsys.readouterr().out
    mixed = json.loads((parts / "summary.json").read_text())["fingerprint"]
    # it is of two codes, so of neither
    assert mixed != common.fingerprint(common.parse(common.Config, flags), "common")
    assert timeless(whole) == timeless(parts)
    a, b = (json.loads((f / "summary.json").read_text()) for f in (whole, parts))
    assert a["accuracy_best"] == b["accuracy_best"]
    for x, y in zip(*(common.load_model(str(f / "model"), "cpu")[0].parameters() for f in (whole, parts))):
        assert torch.equal(x, y)
    before = sorted(str(f) for f in tmp_path.rglob("*"))
    for flags, word in ((["--out", str(parts)], "exists"), (["--resume", "--out", "none"], "no checkpoint"),
                        (["--overwrite", "--out", str(tmp_path)], "exists"),  # it is no run
                        (["--overwrite", "--out", str(parts), "--data", "none.jsonl"], "cannot read"),
                        (["--out", str(whole / "summary.json" / "x")], "Not a directory")):
        assert word in refused(common.main, [*flags, *SMALL])  # and nothing is destroyed
    assert sorted(str(f) for f in tmp_path.rglob("*")) == before
    plot.plot_runs(tmp_path / "a.png", [whole, parts])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_compare_that_was_stopped_goes_on(tmp_path, capsys, monkeypatch, refused):
    """Finished cells are taken, a cell in the middle goes on; the table is that of an uninterrupted run.
    What was finished with other flags or code is only replaced when asked."""
    trained = []

    def compare(out, stop=None, steps=3, **flags):
        def train(cell):
            if len(trained) == stop:  # dies in the middle of this cell, after its checkpoint
                common.train(dataclasses.replace(cell, steps=1))
                (common.Path(cell.out) / "summary.json").unlink()
                raise KeyboardInterrupt
            trained.append(common.Path(cell.out).name)
            return common.train(cell)
        config = common.Config(steps=steps, prompts_per_step=2, group_size=4, eval_tasks=8, max_new_tokens=40,
                               save_every=1, out=str(tmp_path / out), **flags)
        config.seeds, config.methods, variants = 1, [], {"low": {"lr": 1e-4}, "a high rate": {"lr": 1e-3}}
        summaries = common.compared(train, config, variants, "common")
        return common.seed_table(summaries, {"accuracy_after": "T = 1"})

    whole = compare("whole")
    trained.clear()
    with pytest.raises(KeyboardInterrupt):
        compare("parts", stop=1)
    capsys.readouterr()
    assert compare("parts") == whole and trained == ["low-s0", "a-high-rate-s0"]
    out = capsys.readouterr().out
    assert out.count("taken from") == 1 and out.count("step 1/3") == 0 and out.count("step 2/3") == 1
    assert "2 runs: 2 variants on 1 seeds" in out and "0 runs to go" in out
    for name in trained:
        assert timeless(tmp_path / "whole" / name) == timeless(tmp_path / "parts" / name)
    trained.clear()
    assert "--overwrite" in refused(compare, "parts", temperature=0.9)
    assert "--overwrite" in refused(compare, "parts", steps=2)  # a checkpoint of more must not pass for it
    fingerprint = common.fingerprint
    with monkeypatch.context() as patch:
        patch.setattr(common, "fingerprint", lambda *how: {**fingerprint(*how), "code": "edited"})
        assert "code" in refused(compare, "parts")
    assert not trained and compare("parts") == whole
    compare("parts", steps=2, overwrite=True)
    assert len(trained) == 2 and "step 1/2" in capsys.readouterr().out
    trained.clear()
    compare("parts")  # to more steps it goes on
    assert len(trained) == 2 and "step 1/3" not in capsys.readouterr().out


def test_fresh_fits_the_models_of_each_seed_once(tmp_path):
    fits = []
    config = common.Config(out=str(tmp_path), fresh=True)
    config.seeds, config.methods = 2, ["b", "a"]

    def train(cell):
        fits.append((common.Path(cell.out).name, cell.fresh))
    common.compared(train, config, {"a": {}, "b": {}, "c": {}}, "common")
    assert fits == [("b-s0", True), ("a-s0", False), ("b-s1", True), ("a-s1", False)]


def test_seed_table_pairs_seed_by_seed():
    runs = {"a": [{"x": 1.0, "y": None}, {"x": 3.0, "y": 2.0}], "b": [{"x": 1.5}, {"x": 4.5}], "c": []}
    lines = common.seed_table(runs, {"x": "X", "y": "Y"}).splitlines()
    head, _, a, b, c = [line.split("|") for line in lines]
    a, b, c = ([cell.strip() for cell in row] for row in (a, b, c))
    assert head[3].strip() == "minus a, ± s.e."
    assert a[2:5] == ["2.000 ± 1.414", "", "2.000"] and b[2:5] == ["3.000 ± 2.121", "1.000 ± 0.500", "-"]
    assert c[2:5] == ["-", "-", "-"]


@pytest.mark.parametrize("error, word", [(torch.OutOfMemoryError("CUDA out of\nmemory."), "--micro_batch"),
                                         (OSError(28, "No space left\non device", "x"), "No space left")])
def test_what_may_happen_at_any_time_is_one_sentence(error, word, refused):
    train = mock.Mock(side_effect=error)
    assert word in refused(common.launch, common.Config(), train)


@pytest.mark.parametrize("name", ["common", "ropd", "srpo"])  # sod and dcpm run as processes elsewhere
def test_scripts_are_programs(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    assert stop.value.code == 0 and "--group_size" in capsys.readouterr().out


def test_the_precision_of_cuda_on_a_cpu(tmp_path, monkeypatch, tok, model):
    """bf16 autocast, bf16 head, gradient checkpointing, rescored log-probs: two steps, still near fp32."""
    results = []
    for bf16 in (False, True):
        monkeypatch.setattr(common, "mixed_precision", lambda device: bf16)
        student = copy.deepcopy(model)
        rollouts = some_rollouts(student, tok)
        common.rescore(student, rollouts, common.Config())
        logps, _ = common.score(student, rollouts)
        assert torch.equal(logps, rollouts.logps) or not bf16  # the ratio is exactly 1
        results.append(naive_logps(student, rollouts) - logps)
        common.main(["--steps", "2", "--out", str(tmp_path / str(bf16)), *SMALL])
        frozen, _ = common.load_model(str(tmp_path / str(bf16) / "model"), "cpu", trainable=False)
        assert frozen.dtype is (torch.bfloat16 if bf16 else torch.float32)
    assert results[0].abs().max() < 1e-5 < results[1].abs().max() < 0.1
    summary = json.loads((tmp_path / "True" / "summary.json").read_text())
    assert summary["skipped_steps"] == 0 and summary["versions"]["torch"] == torch.__version__
    for part in (frozen, tok):
        part.save_pretrained(tmp_path / "bf16")
    monkeypatch.undo()  # on a CPU that has bf16, a frozen model keeps its type
    for has, trainable, dtype in ((True, False, torch.bfloat16), (True, True, torch.float32),
                                  (False, False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has})
        assert common.load_model(str(tmp_path / "bf16"), "cpu", trainable)[0].dtype is dtype


def test_a_model_whose_attention_cannot_mask_is_refused(tok, model, monkeypatch, refused):
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    monkeypatch.setattr(common, "load_pretrained", lambda *_: (eager, tok))
    assert "SDPA" in refused(common.load_model, "folder", "cpu")


def test_grpo_learns(tmp_path):
    summary = common.train(common.Config(steps=25, eval_tasks=100, show_every=0, out=str(tmp_path / "run")))
    assert summary["accuracy_after"] > summary["accuracy_before"] + 0.05
