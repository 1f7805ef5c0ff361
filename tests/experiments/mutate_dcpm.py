"""By hand: does the suite notice when a mechanism of dcpm.py does nothing?

    python tests/experiments/mutate_dcpm.py

Applies eight mutations, one after the other, runs the tests of dcpm.py with each and prints which of them
fail. Exit code 1 if a mutation goes unnoticed. In the child process this file is a pytest plugin.
"""
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
TESTS_FOLDER = HERE.parent
sys.path[:0] = [str(TESTS_FOLDER), str(TESTS_FOLDER.parent)]
import dcpm

TESTS = ("test_dcpm.py", "test_dcpm_llm.py", "test_dcpm_store.py", "-k", "not histories")  # those are slow


def schema_texts(backend, memory, schemas):
    return [s.text for s in schemas]


def without(induce, **fields):
    """An inducer whose drafts lack these fields: no evidence against them, no link to the old habit."""
    return lambda *args: [draft._replace(**fields) for draft in induce(*args)]


MUTATIONS = {  # name -> [(owner, attribute, what it becomes)]
    "clustering -> one cluster": [(dcpm, "two_stage_dbscan", lambda rows, _: np.zeros(rows.shape[0], int))],
    "clustering -> all noise": [(dcpm, "two_stage_dbscan", lambda rows, _: np.full(rows.shape[0], -1))],
    "sweep -> no pair": [(dcpm, "collisions", lambda rows, *_: np.zeros((rows.shape[0],) * 2, bool))],
    "sweep -> every pair": [(dcpm, "collisions", lambda rows, *_: ~np.eye(rows.shape[0], dtype=bool))],
    "watermark off": [(dcpm.Store, "has_news", property(lambda self: True, lambda self, value: None))],
    "strip -> identity": [(backend, "strip", schema_texts) for backend in (dcpm.Rules, dcpm.LLM)],
    "against ignored": [(backend, "induce", without(backend.induce, against=()))
                        for backend in (dcpm.Rules, dcpm.LLM)],
    "replaces ignored": [(backend, "induce", without(backend.induce, replaces=None))
                         for backend in (dcpm.Rules, dcpm.LLM)],
}


def apply(name):
    for owner, attribute, new in MUTATIONS[name]:
        getattr(owner, attribute)  # it must be there
        setattr(owner, attribute, new)


if os.environ.get("DCPM_MUTATION"):
    apply(os.environ["DCPM_MUTATION"])


def main():
    unnoticed = []
    for name in ("", *MUTATIONS):
        command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "mutate_dcpm", *TESTS]
        env = {**os.environ, "DCPM_MUTATION": name, "PYTHONPATH": str(HERE)}
        run = subprocess.run(command, cwd=TESTS_FOLDER, env=env, capture_output=True, text=True)
        caught = re.findall(r"^FAILED \S+?::(.+?)(?: - |$)", run.stdout, re.M)
        summary = run.stdout.strip().splitlines()[-1]
        print(f"{name or 'no mutation'}: {summary}", *caught, sep="\n    ", flush=True)
        if run.returncode not in (0, 1) or bool(caught) != bool(name):  # unmutated, nothing may fail
            unnoticed.append(name or "no mutation")
    print("unnoticed or broken: " + ", ".join(unnoticed) if unnoticed else "every mutation was noticed")
    return bool(unnoticed)


if __name__ == "__main__":
    raise SystemExit(main())
