"""`attnctrl batch --engine ray` on a Ray of this machine with two workers."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from attnctrl.apps.batch import cluster


ray = pytest.importorskip("ray", reason="Ray is not installed")
FAST = ("--steps", "2", "--max-sequence-length", "1", "--batch-size", "2")
ROWS = [
    {"id": f"n{n}", "prompt": "a red cat", "seed": n, **({"controls": ["SoftPAG(heads='1.2')"]} if n % 3 else {})}
    for n in range(14)
]


@pytest.fixture(scope="module")
def local_ray():
    paths = [str(Path(__file__).parents[2]), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def hashes(folder: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    found = {line["id"]: line["sha256"] for line in lines}
    assert len(found) == len(lines)
    return found


@pytest.mark.slow
def test_workers_make_what_one_process_makes_and_one_may_be_killed(local_ray, attnctrl, model, tmp_path, monkeypatch):
    requests = tmp_path / "r.jsonl"
    requests.write_text("\n".join(map(json.dumps, ROWS)))
    started, start = [], cluster.RayWorkers._start  # the workers' process ids, to come

    def watched(self):
        worker = start(self)
        started.append(worker.__ray_call__.remote(lambda self: os.getpid()))
        return worker

    monkeypatch.setattr(cluster.RayWorkers, "_start", watched)
    command = ("batch", requests, "--model", model, *FAST, "--engine", "ray", "--workers", "2")
    code, _, err = attnctrl(*command, "--output", tmp_path / "whole")
    assert code == 0, err
    assert len(started) == 2 and len(hashes(tmp_path / "whole")) == len(ROWS)

    def kill_one():  # as soon as there are results, so in the middle of the run
        while not (tmp_path / "killed" / "results.jsonl").exists():
            time.sleep(0.01)
        os.kill(ray.get(started[-1]), signal.SIGKILL)

    threading.Thread(target=kill_one, daemon=True).start()
    code, _, err = attnctrl(*command, "--output", tmp_path / "killed")
    assert code == 0, err
    assert len(started) == 5  # two, two, and one in the place of the killed one
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")
