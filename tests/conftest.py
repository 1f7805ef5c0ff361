"""One cache folder for the whole session, so that each tiny model is fitted once."""
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory):
    # TEST_CACHE: a folder of your own, to keep the fits between runs
    folder = os.environ.get("TEST_CACHE") or str(tmp_path_factory.mktemp("cache"))
    os.environ["XDG_CACHE_HOME"] = folder
    os.environ["HF_HUB_OFFLINE"] = "1"
    return folder


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
