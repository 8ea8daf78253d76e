"""`--engine ray` of `attnctrl batch` and `attnctrl hunt`, on a Ray of this machine with two workers."""

import json
import os
import shutil
import signal
import threading
import time
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch

from attnctrl.apps.batch.cluster import PATIENCE, Pool
from attnctrl.errors import AttnCtrlError


ray = pytest.importorskip("ray", reason="Ray is not installed")
FAST = ("--steps", "2", "--max-sequence-length", "1", "--batch-size", "2")
RAY = ("--engine", "ray", "--workers", "2")
ROWS = [
    {"id": f"n{n}", "prompt": "a red cat", "seed": n, **({"controls": ["SoftPAG(heads='1.2')"]} if n % 3 else {})}
    for n in range(14)
]


@pytest.fixture(scope="module")
def local_ray():
    paths = [str(Path(__file__).parents[2]), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker: matrix products round the same
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()
    torch.set_num_threads(threads)


@pytest.fixture
def started(monkeypatch):
    """The process ids, to come, of the workers in the order in which they were started."""
    found, start = [], Pool._start

    def watched(self):
        worker = start(self)
        found.append(worker.__ray_call__.remote(lambda self: os.getpid()))
        return worker

    monkeypatch.setattr(Pool, "_start", watched)
    return found


def kill_when(there: Path, started: list) -> None:
    """Kills the last worker as soon as there are results, so in the middle of the run."""

    def wait_and_kill():
        while not (there.exists() and there.stat().st_size):
            time.sleep(0.01)
        os.kill(ray.get(started[-1]), signal.SIGKILL)

    threading.Thread(target=wait_and_kill, daemon=True).start()


def hashes(folder: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    found = {line["id"]: line["sha256"] for line in lines}
    assert len(found) == len(lines)
    return found


@pytest.mark.slow
def test_workers_make_what_one_process_makes_and_one_may_be_killed(local_ray, attnctrl, model, tmp_path, started):
    requests = tmp_path / "r.jsonl"
    requests.write_text("\n".join(map(json.dumps, ROWS)))
    command = ("batch", requests, "--model", model, *FAST, *RAY)
    code, _, err = attnctrl(*command, "--output", tmp_path / "whole")
    assert code == 0, err
    assert len(started) == 2 and len(hashes(tmp_path / "whole")) == len(ROWS)
    kill_when(tmp_path / "killed" / "results.jsonl", started)
    code, _, err = attnctrl(*command, "--output", tmp_path / "killed")
    assert code == 0, err
    assert len(started) == 5  # two, two, and one in the place of the killed one
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")


def brightness(images, prompts) -> list[float]:
    return [float(np.asarray(image).mean()) for image in images]


@pytest.mark.slow
def test_a_search_on_workers_is_the_search_of_one_process(local_ray, attnctrl, model, tmp_path, started):
    search = ("--prompt", "a red cat", "--prompt", "a blue car", "--rounds", "2", "--per-round", "1", "--scale", "9")
    search += ("--objective", "tests.apps.test_batch_ray:brightness")
    command = ("hunt", "--model", model, *FAST, *search)
    code, _, err = attnctrl(*command, "--output", tmp_path / "local")
    assert code == 0, err
    kill_when(tmp_path / "ray" / "scores.jsonl", started)
    code, _, err = attnctrl(*command, *RAY, "--output", tmp_path / "ray")
    assert code == 0, err
    assert len(started) == 3
    record = (tmp_path / "local/scores.jsonl").read_bytes()
    lines = record.splitlines(keepends=True)
    assert len(lines) > 50 and len({json.loads(line).get("score") for line in lines}) > 10
    shutil.copytree(
        tmp_path / "local", tmp_path / "cut"
    )  # what a kill of the command leaves: whole batches and a torn line
    (tmp_path / "cut/scores.jsonl").write_bytes(b"".join(lines[:30]) + lines[30][:9])
    code, _, err = attnctrl(*command, *RAY, "--output", tmp_path / "cut")
    assert code == 0, err
    for folder in (tmp_path / "ray", tmp_path / "cut"):
        assert (folder / "scores.jsonl").read_bytes() == record
        for name in ("head_set.json", "hunt.json", "result.md", "result.json"):
            assert (folder / name).read_bytes() == (tmp_path / "local" / name).read_bytes(), name


# -- the pool alone --------------------------------------------------------------------------------------------------------


class Adder:
    def __init__(self, first: int):
        if first < 0:
            raise AttnCtrlError(f"{first} is less than 0")
        self.first = first

    def add(self, number: int) -> int:
        if number == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 14:
            raise RuntimeError("no 14")
        return self.first + number


@pytest.mark.slow
def test_a_pool_larger_than_the_cluster_answers_and_tells_what_failed(local_ray, started):
    pool = Pool(Adder, 100, count=3)  # one waits for ever: the cluster has two
    try:
        assert pool.ask("add", 1) == 101
        made = {item: answer for item, answer, _ in pool.run(deque([1, 13, 14, 2]), "add", lambda item: (item,))}
    finally:
        pool.close()
    assert (made[1], made[2]) == (101, 102) and str(made[14]) == "no 14"
    assert isinstance(made[13], ray.exceptions.RayActorError) and len(started) == 3 + PATIENCE
    with pytest.raises(AttnCtrlError, match="could not start: .*-1 is less than 0"):
        Pool(Adder, -1, count=1).ask("add", 1)
