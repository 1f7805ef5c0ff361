"""Scripts by hand that train through `common.compared` and that no other test starts: one step of each."""
import sys

import pytest

import bench_srpo_worlds
import common
import real_training
import srpo


@pytest.fixture
def start(monkeypatch, tmp_path, capsys):
    """Calls a script's main() in an empty folder, with a base model that is hardly fitted -> its output."""
    def call(script, *flags) -> str:
        monkeypatch.setattr(sys, "argv", [script.__file__, *flags])
        script.main()
        return capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    for name in ("small_chain", "corpus", "HEADING", "CLOSING"):  # the scripts change them for good
        monkeypatch.setattr(srpo, name, getattr(srpo, name))
    monkeypatch.setattr(srpo, "FIT", {"documents": 64, "steps": 2, "hidden_size": 32, "layers": 1})
    return call


def test_a_world_of_its_own_trains_and_is_taken_up_again(start):
    flags = ["codes", "--steps", "1", "--seeds", "1", "--methods", "sdpo 4e-4", "srpo 2e-4", "--eval_every",
             "0", "--gate_tasks", "0", "--prompts_per_step", "2", "--group_size", "2", "--eval_tasks", "2",
             "--max_new_tokens", "8"]
    assert "1 runs to go" in start(bench_srpo_worlds, *flags)
    again = start(bench_srpo_worlds, *flags)
    assert again.count("taken from") == 2 and "| srpo 2e-4" in again


def test_a_model_from_a_folder_is_trained_by_four_methods(start, tmp_path):
    tok = common.build_tokenizer(["largest"])
    for part in (common.tiny_model(tok, seed=0), tok):
        part.save_pretrained(tmp_path / "small")
    out = start(real_training, "--model", str(tmp_path / "small"), "--steps", "1")
    assert all(f"| {name}" in out for name in real_training.CELLS)
