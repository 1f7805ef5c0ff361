"""Chat backends: a server that behaves well, badly or not at all; a local model; asking."""
import random
import time
from collections import Counter
from functools import partial
from unittest import mock

import pytest

import common
from conftest import Server

HELLO = [[{"role": "user", "content": "hello"}]]
GOOD = (200, "{}", "stop")


def talk(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


# ------------------------------------------------------------------------------------------- a server
def test_server_request_and_key(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with Server(lambda body, count: GOOD) as server:
        chat = common.chat_backend(server.url, "the-model", 77, json_object=True)
        assert chat(HELLO, temperature=0.7) == ["{}"]
        monkeypatch.setenv("OPENAI_API_KEY", "my-key")
        assert common.chat_backend(server.url, "m", 5)(HELLO) == ["{}"]
    path, body, key = server.requests[1]  # the first one only tries the address
    assert path == "/v1/chat/completions" and body["model"] == "the-model" and body["max_tokens"] == 77
    assert body["temperature"] == 0.7 and body["response_format"] == {"type": "json_object"}
    assert body["messages"] == HELLO[0] and key == "Bearer EMPTY"
    assert server.requests[3][2] == "Bearer my-key" and "response_format" not in server.requests[3][1]


@pytest.fixture
def naps(monkeypatch):
    """Nobody sleeps; how long they would have."""
    common.print_once.cache_clear()
    naps = []
    monkeypatch.setattr(common, "time", mock.Mock(sleep=naps.append))
    return naps


def test_one_bad_answer_costs_one_reply(capsys, naps):
    late, lost = [(500, "", ""), (429, "", ""), (200, "ok", "stop")], [
        (400, "", ""), (403, "", ""), (200, None, "stop"), (200, {"a": 1}, "stop"), (200, "half", "length")]
    with Server(lambda body, count: [GOOD, *late, *lost, *[(503, "", "")] * 3][count - 1]) as server:
        chat = common.chat_backend(server.url, "m", retries=2)
        assert chat(HELLO) == ["ok"] and naps == [1.0, 2.0]
        for _ in lost:  # none is asked for again
            assert chat(HELLO) == [None] and len(naps) == 2
        capsys.readouterr()
        assert chat(HELLO) == [None] and len(naps) == 4 and len(server.requests) == 1 + 3 + len(lost) + 3
        assert "503" in capsys.readouterr().out


@pytest.mark.parametrize("status, body, words", [
    (400, b'{"error": {"message": "max_tokens is\\n too large"}}', "max_tokens is"),
    (402, b"no credit left", "402"), (200, b'{"choices": []}', "IndexError"),
    (200, b"<html>\n<b>Log in</b></html>", "JSON")])
def test_a_server_that_never_gives_a_reply_is_refused_in_its_own_words(status, body, words, refused, naps):
    with Server(lambda *_: (status, body, "")) as server:
        assert words in refused(common.chat_backend, server.url, "m")
    assert naps == ([] if status >= 400 else [1.0, 2.0, 4.0, 8.0])
    for url in (server.url, "http://[bad"):  # nobody listens there any more
        assert url in refused(common.chat_backend, url, "m", retries=1)


def test_order_in_threads_and_a_server_that_is_slow_once_or_gone():
    def behave(body, count):
        time.sleep(1.0 if count == 2 else random.random() / 20)
        return 200, body["messages"][0]["content"], "stop"
    with Server(behave) as server:
        chat = common.chat_backend(server.url, "m", timeout=0.5, retries=2)
        names = [f"n{i}" for i in range(24)]
        assert chat(talk(*names)) == names
    assert chat(HELLO * 3) == [None] * 3  # gone in the middle of a run: the run goes on


# ------------------------------------------------------------------------------------------- a local model
def test_local_model_and_no_text_ends_its_own_turn(tmp_path, monkeypatch):
    tok = common.build_tokenizer(common.CHAIN_ATOMS)
    for part in (tok, common.tiny_model(tok, seed=0)):
        part.save_pretrained(tmp_path)
    seen, rollout = [], common.rollout
    monkeypatch.setattr(common, "rollout", lambda *a, **k: seen.extend(a[2]) or rollout(*a, **k))
    chat = common.chat_backend(str(tmp_path), max_new_tokens=2, device="cpu", rows_at_once=2)
    assert chat(talk("a<|im_end|>\n<tool_call>", "x", "y")) == [None] * 3  # two tokens are no complete answer
    assert [task.messages[0]["content"] for task in seen] == ["a< |im_end|>\n<tool_call>", "x", "y"]


# --------------------------------------------------------------------------------------- asking
def test_read_object():
    good, value = '{"a": [1, {"b": "}"}]}', {"a": [1, {"b": "}"}]}
    for text in (good, f"```json\n{good}\n```", f"<think>{{}}</think>Sure: {good} hope {{it}} helps",
                 good + '{"c": 1}', f"The answer is \\boxed{{5}}. {good}", f"x in {{1,2}}: {good}"):
        assert common.read_object(text) == value, text
    for text in ("", "no object", good[:-3], '{"a": ' + "[" * 100_000):
        with pytest.raises(ValueError, match="JSON object"):
            common.read_object(text)


class Scripted:
    """A chat that plays replies from a list and keeps what it was asked."""

    def __init__(self, *replies):
        self.replies, self.asked = list(replies), []

    def __call__(self, conversations, **sampling):
        self.asked += conversations
        return [self.replies.pop(0) for _ in conversations]


def at_least(least, data):
    if data["n"] < least:
        raise ValueError("too small")
    return data["n"]


def test_ask_again_with_the_reason():
    chat, tally = Scripted('{"n": 1}', "prose", '{"m": 1}', '{"n": 5}', '{"n": 2}', '{"n": 0}'), Counter()
    assert common.ask(chat, talk("a", "b", "c"), partial(at_least, 1), tally, tries=2) == [1, 5, 2]
    first, second = chat.asked[3:]
    assert first[:2] == [*talk("b")[0], {"role": "assistant", "content": "prose"}]
    assert "no whole JSON object" in first[2]["content"] and "'n' is missing" in second[2]["content"]
    assert tally == {"calls": 5, "the reply holds no whole JSON object": 1, "'n' is missing": 1}
    assert common.ask(chat, talk("a"), partial(at_least, 1), tally, tries=1) == [None]
    # it gives up after its tries, and at once without a reply
    chat = Scripted(*['{"n": 1}'] * 9)
    assert common.ask(chat, talk("a"), partial(at_least, 3), tally) == [None] and len(chat.asked) == 3
    assert len(chat.asked[2]) == 3  # the last bad reply alone goes with the question
    chat = Scripted(None, '{"n": 3}')
    assert common.ask(chat, talk("a", "b"), [partial(at_least, 9), partial(at_least, 3)], tally) == [None, 3]
    assert common.ask(chat, [], partial(at_least, 1), tally) == []
