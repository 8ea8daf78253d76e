"""`attnctrl batch --output ADDRESS`: results behind fsspec, here in its file system in memory."""

import hashlib
import json
import tarfile
import uuid

import fsspec
import pytest
from fsspec.registry import known_implementations

from attnctrl.apps.batch import remote
from attnctrl.apps.batch import run as running
from attnctrl.apps.batch.remote import Address, RemoteResults
from attnctrl.apps.batch.results import head
from attnctrl.errors import AttnCtrlError

from .test_batch import FAST, MIXED, lines, write


@pytest.fixture
def memory():
    """An address of its own."""
    store, folder = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}/run"
    yield Store(store, folder)
    store.rm(folder, recursive=True)


class Store:
    def __init__(self, store, folder: str):
        self.store, self.folder, self.address = store, folder, f"memory:/{folder}"

    def files(self) -> dict[str, bytes]:
        return {path[len(self.folder) + 1 :]: self.store.cat_file(path) for path in self.store.find(self.folder)}

    def lines(self, name: str) -> list[dict]:
        return [json.loads(line) for line in self.files().get(name, b"").splitlines()]

    def put(self, name: str, data: bytes) -> None:
        self.store.pipe_file(f"{self.folder}/{name}", data)

    def remove(self, name: str) -> None:
        self.store.rm_file(f"{self.folder}/{name}")


@pytest.fixture
def batch(attnctrl, model, tmp_path):
    def run(rows, output, *arguments):
        requests = write(tmp_path / "requests.jsonl", rows)
        code, out, err = attnctrl("batch", requests, "--model", model, *FAST, "--output", output, *arguments)
        assert "Traceback" not in err
        return code, out.splitlines(), err

    return run


def test_what_is_there_is_what_a_folder_has(batch, memory, tmp_path, monkeypatch):
    code, _, err = batch(MIXED, tmp_path / "out", "--shard-size", "5")
    assert code == 0, err
    code, out, err = batch(MIXED, memory.address, "--shard-size", "5")
    assert code == 0, err
    names = ("results.jsonl", "shard-000000.tar", "shard-000001.tar")
    assert out == [f"{memory.address}/{name}" for name in names]
    files = memory.files()
    folder = {str(path.relative_to(tmp_path / "out")): path for path in (tmp_path / "out").rglob("[!.]*.*")}
    assert set(files) == set(folder)
    assert all(files[name] == path.read_bytes() for name, path in folder.items() if name.endswith(".png"))
    assert [{**line, "seconds": 0} for line in memory.lines("results.jsonl")] == [
        {**line, "seconds": 0} for line in lines(tmp_path / "out/results.jsonl")
    ]
    with memory.store.open(f"{memory.folder}/{names[2]}") as file, tarfile.open(fileobj=file) as shard:
        assert len(shard.getnames()) == 6

    monkeypatch.setattr(running, "Worker", None)  # nothing is loaded: everything exists
    assert batch(MIXED, memory.address)[0] == 0 and memory.files() == files
    monkeypatch.undo()
    memory.remove("cars/blue-5.png")
    assert batch(MIXED, memory.address)[0] == 0
    again = memory.files()
    assert {name: again[name] for name in files if name.endswith(".png")} == {
        name: data for name, data in files.items() if name.endswith(".png")
    }
    assert len(memory.lines("results.jsonl")) == 8
    code, _, err = batch([{**MIXED[0], "seed": 1}], memory.address)
    assert code == 2 and "was made in this folder already" in err


def test_failures_and_wrong_rows_are_kept_there(batch, memory):
    rows = [MIXED[0], {"id": "odd", "prompt": "x", "height": 15}, {"id": "wrong"}]
    code, _, err = batch(rows, memory.address)
    assert code == 2 and memory.files() == {}
    code, _, err = batch(rows, memory.address, "--skip-invalid")
    assert code == 1 and f"{memory.address}/failed.jsonl" in err and f"{memory.address}/rejected.jsonl" in err
    assert [line["id"] for line in memory.lines("failed.jsonl")] == ["odd"]
    assert [line["line"] for line in memory.lines("rejected.jsonl")] == [3]
    code, _, _ = batch([MIXED[0], {**rows[1], "height": 16}], memory.address)
    assert code == 0 and set(memory.files()) == {"plain.png", "odd.png", "results.jsonl"}


def test_processes_share_the_rows(batch, memory, tmp_path, monkeypatch):
    rows = [{"id": f"n{n}", "prompt": "a red cat", "seed": n} for n in range(5)]
    batch(rows, tmp_path / "alone", "--batch-size", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        code, out, err = batch(rows, memory.address, "--batch-size", "2")
        assert code == 0, err
    assert "results.jsonl" not in memory.files() and out == [f"{memory.address}/results-*.jsonl"]
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(running, "Worker", None)
    assert batch(rows, memory.address, "--batch-size", "2")[0] == 0  # puts together what the processes made
    assert {line["id"]: line["sha256"] for line in memory.lines("results.jsonl")} == {
        line["id"]: line["sha256"] for line in lines(tmp_path / "alone/results.jsonl")
    }
    assert [name for name in memory.files() if name.startswith("results")] == ["results.jsonl"]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nowhere://bucket/run", "Protocol not known: nowhere"),
        ("file:///dev/null/run", "cannot be used: NotADirectoryError"),
    ],
)
def test_addresses_that_cannot_be_used(batch, address, message):
    code, out, err = batch(MIXED[:1], address)
    assert code == 2 and out == [] and f"output {address!r}" in err and message in err


def test_a_file_system_that_is_not_installed(batch, monkeypatch):
    monkeypatch.setitem(known_implementations, "steam", {"class": "none.Steam", "err": "Install steamfs to access it"})
    code, _, err = batch(MIXED[:1], "steam://bucket/run")
    assert code == 2 and "needs another package: Install steamfs" in err and "HINT: pip install steamfs" in err


# -- parts ---------------------------------------------------------------------------------------------------------------


def picture(number: int) -> tuple[dict, bytes]:
    data = f"picture {number}".encode()
    begins = head(f"n{number}", 0, 1, f"row{number}", "group", "print", f"n{number}.png")
    return {**begins, "sha256": hashlib.sha256(data).hexdigest()}, data


def held(memory) -> list[str]:
    return sorted(name for name in memory.files() if name.startswith("results"))


def test_lines_go_into_parts_of_bounded_size(memory, monkeypatch):
    monkeypatch.setattr(remote, "FULL", 4)
    with RemoteResults(Address(memory.address)) as results:
        for first in range(0, 10, 2):
            results.commit([picture(first), picture(first + 1)])
            assert sum(len(memory.lines(name)) for name in held(memory)) == first + 2
            assert len(held(memory)) == first // 4 + 1
    assert held(memory) == ["results.jsonl"]
    assert [line["id"] for line in memory.lines("results.jsonl")] == [f"n{number}" for number in range(10)]


def test_what_a_kill_leaves_is_taken_over(memory):
    gone = RemoteResults(Address(memory.address)).__enter__()
    gone.commit([picture(0), picture(1)])
    (part,) = held(memory)
    memory.put("results-2-longer.jsonl", memory.files()[part])  # its predecessor was not removed
    memory.put("results-3-torn.jsonl", b'{"id": "n2", "image"')
    memory.put("n2.png", b"half of")
    memory.put("results-4-late.jsonl", json.dumps(picture(3)[0]).encode() + b"\n")  # whose picture is not there
    with RemoteResults(Address(memory.address)) as results:
        assert set(results.done.by_id) == {"n0", "n1", "n3"} - {"n3"}
        assert held(memory) == ["results.jsonl"] and len(memory.lines("results.jsonl")) == 2
        results.commit([picture(2)])
    assert [line["id"] for line in memory.lines("results.jsonl")] == ["n0", "n1", "n2"]
    assert memory.files()["n2.png"] == b"picture 2"
    memory.put("results.jsonl", b"junk\n")
    with pytest.raises(AttnCtrlError, match="has a line that is no result"):
        RemoteResults(Address(memory.address)).__enter__()
