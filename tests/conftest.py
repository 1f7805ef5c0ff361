"""One cache folder for the whole session, so that each tiny model is fitted once."""
import contextlib
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on a machine with a GPU, too: digits and devices are the CPU's

import pytest
import torch
from huggingface_hub import constants

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "experiments")]
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory):
    # TEST_CACHE: a folder of your own, to keep the fits between runs
    os.environ["XDG_CACHE_HOME"] = os.environ.get("TEST_CACHE") or str(tmp_path_factory.mktemp("cache"))
    os.environ["HF_HUB_OFFLINE"] = "1"  # for scripts run as processes of their own
    constants.HF_HUB_OFFLINE = False  # here: offline, not even our own `Server` would be reached


@pytest.fixture
def refused(capsys):
    """Calls what must be refused: exit code 2 and exactly one sentence on stderr, which is returned."""
    def call(function, *args, **kwargs) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            function(*args, **kwargs)
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1, message
        return message
    return call


def timeless(folder) -> list[dict]:
    """The lines of a run's metrics.jsonl without their times."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]


def steps_of(folder) -> list[dict]:
    return [row for row in timeless(folder) if "eval" not in row]


@contextlib.contextmanager
def Server(behave, headers=(), pause=0.0):
    """OpenAI-compatible, on the loopback device; `behave(body, count)` -> (status, text, finish reason). Text
    in bytes is the whole reply; with `pause`, byte by byte, so many seconds apart."""
    requests, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                requests.append((self.path, body, self.headers.get("Authorization")))
                count = len(requests)
            status, text, reason = behave(body, count)
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
            reply = text if isinstance(text, bytes) else json.dumps({"choices": [choice]}).encode()
            size = 1 if pause else len(reply)
            with contextlib.suppress(OSError):  # the client has lost patience
                self.send_response(status)
                for name, value in [("Content-Length", str(len(reply))), *headers]:
                    self.send_header(name, value)
                self.end_headers()
                for i in range(0, len(reply), size):
                    time.sleep(pause)
                    self.wfile.write(reply[i:i + size])

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}/v1", requests=requests)
        server.shutdown()
