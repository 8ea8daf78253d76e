"""`attnctrl batch` killed at any moment, in a folder and at an address: the next run goes on, loses nothing and makes nothing twice."""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from .test_batch import FAST, SOFTPAG, lines, write


# Imports everything once and forks a process for each run. Reads {"arguments", "after", "at"}: seconds to a SIGKILL, or the number of
# a moment before (even; half of what is to be written is written) or after (odd) a call that changes files, of `os` or of fsspec.
NURSERY = """
import json, os, signal, sys, threading, time
from fsspec.implementations.local import LocalFileSystem
from attnctrl.apps.cli import main
import attnctrl.apps.batch.run, attnctrl.apps.loading, attnctrl.processors
import diffusers
diffusers.StableDiffusion3Pipeline, diffusers.AutoencoderKL, diffusers.SD3Transformer2DModel
diffusers.FlowMatchEulerDiscreteScheduler

def die_at(moment, owner, names):
    count = [0]
    def wrap(name):
        real = getattr(owner, name)
        def call(*args, **kwargs):
            now = count[0]
            count[0] += 2
            if now == moment:
                if name in ("write", "pipe_file"):
                    real(*args[:-1], args[-1][: len(args[-1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            out = real(*args, **kwargs)
            if now + 1 == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return out
        setattr(owner, name, call)
    for name in names:
        wrap(name)

print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_RDWR)
        for target in (0, 1, 2):
            os.dup2(quiet, target)
        if order["at"] is not None and "file://" in str(order["arguments"]):
            die_at(order["at"], LocalFileSystem, ("pipe_file", "rm_file"))
        elif order["at"] is not None:
            die_at(order["at"], os, ("write", "replace", "fsync", "unlink"))
        os._exit(main(order["arguments"]))
    if order["after"] is not None:
        killer = threading.Timer(order["after"], os.kill, (child, signal.SIGKILL))
        killer.start()
    status = os.waitpid(child, 0)[1]
    if order["after"] is not None:
        killer.cancel()
    print(json.dumps([os.waitstatus_to_exitcode(status), time.monotonic() - began]), flush=True)
"""


@pytest.fixture(scope="module")
def nursery():
    """Runs a command line in a process of its own, killed or not: (exit code or minus the signal, seconds)."""
    if not hasattr(os, "fork"):
        pytest.skip("processes are forked")
    process = subprocess.Popen(
        [sys.executable, "-c", NURSERY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"

    def run(*arguments, after=None, at=None):
        order = {"arguments": [str(argument) for argument in arguments], "after": after, "at": at}
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield run
    process.stdin.close()
    process.wait()


def state(folder: Path) -> dict[str, tuple]:
    """Files with their hashes and results, each of which must be right and there once."""
    made = lines(folder / "results.jsonl")
    found = {line["file"]: (line["id"], line["seed"], line["sha256"]) for line in made}
    assert len(found) == len(made)
    assert set(found) == {str(path.relative_to(folder)) for path in folder.rglob("*.png")}
    assert [path.name for path in folder.glob("results*")] == ["results.jsonl"]
    for name, (_, _, mark) in found.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == mark
    return found


def many(count: int) -> list[dict]:
    """Rows of three kinds, some of several pictures."""
    kinds = ({}, {"controls": [SOFTPAG]}, {"width": 24, "output_name": "wide/{}"})
    rows = []
    for number in range(count):
        kind = {
            key: value.format(number) if key == "output_name" else value for key, value in kinds[number % 3].items()
        }
        rows.append({"id": f"n{number}", "prompt": f"a red cat, number {number}", "seed": number, **kind})
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("address", [False, True], ids=["folder", "address"])
def test_a_run_killed_twenty_times_is_an_unbroken_run(nursery, model, tmp_path, address):
    requests = write(tmp_path / "r.jsonl", many(60))
    command = ("batch", requests, "--model", model, *FAST, "--batch-size", "4", "--output")

    def output(name: str) -> str:
        return f"{'file://' * address}{tmp_path / name}"

    code, seconds = nursery(*command, tmp_path / "whole")
    whole = state(tmp_path / "whole")
    assert code == 0 and len(whole) == 60
    code, start = nursery(*command, tmp_path / "whole")  # nothing to do: no model is loaded
    rng, kills, runs = random.Random(0), 0, 0
    while kills < 20:
        code, _ = nursery(*command, output(f"run-{runs}"), after=rng.uniform(start, seconds * 0.6))
        if code == 0:
            assert state(tmp_path / f"run-{runs}") == whole
            runs += 1
        else:
            assert code == -9
            kills += 1
    assert nursery(*command, output(f"run-{runs}"))[0] == 0
    assert state(tmp_path / f"run-{runs}") == whole


@pytest.mark.slow
@pytest.mark.parametrize("address", [False, True], ids=["folder", "address"])
def test_every_moment_of_writing_survives_a_kill(nursery, model, tmp_path, address):
    requests = write(tmp_path / "r.jsonl", many(5))
    command = ("batch", requests, "--model", model, *FAST, "--batch-size", "2", "--output")
    assert nursery(*command, tmp_path / "whole")[0] == 0
    whole, kills = state(tmp_path / "whole"), 0
    for moment in range(0, 60, 2):  # what follows one call precedes the next
        folder = tmp_path / f"run-{moment}"
        output = f"{'file://' * address}{folder}"
        code, _ = nursery(*command, output, at=moment)
        if code == 0:
            break  # the run has no more moments
        kills += code == -9
        assert nursery(*command, output)[0] == 0
        assert state(folder) == whole
    assert kills >= 15
