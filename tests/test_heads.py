import json
import re
import threading
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch

from attnctrl.controls import SoftPAG
from attnctrl.errors import AttnCtrlError
from attnctrl.families import SD3
from attnctrl.heads import HeadBatch, HeadSet

from .models import tiny_sd3


WANTED = ((3, 5, 1.0), (4, 2, 1.0))


@pytest.mark.parametrize(
    "text",
    [
        "3.5,4.2",
        "L3H5 L4H2",
        "3.5; 4.2",
        "3,5\n4,2",
        "(3, 5)\n(4, 2)\n",
        [(3, 5), (4, 2)],
        [[3, 5], "4.2"],
        ["L3H5", "4.2"],
    ],
)
def test_spellings_agree(text):
    assert HeadSet.parse(text).heads == WANTED


def test_weights_and_repeats():
    assert HeadSet.parse("3.5:0.5,3.5:0.25").heads == ((3, 5, 0.25),)
    assert HeadSet.parse([(3, 5, 0.5)]).heads == ((3, 5, 0.5),)


def test_files(tmp_path):
    path = tmp_path / "set.json"
    HeadSet.parse("3.5,4.2:0.5").save(path)
    record = json.loads(path.read_text())
    assert record["format_version"] == 1 and record["attnctrl_version"]
    assert HeadSet.parse(path).heads == ((3, 5, 1.0), (4, 2, 0.5))
    text = tmp_path / "heads.txt"
    text.write_text("3,5\n4,2  # a comment\n")
    assert HeadSet.parse(str(text)).heads == WANTED
    bare = tmp_path / "list.json"
    bare.write_text("[[3, 5], [4, 2, 1.0]]")
    assert HeadSet.parse(bare).heads == WANTED


@pytest.mark.parametrize(
    "text", ["", "head five", "3", "3.x", [(3,)], [(3, 5, "much")], [(True, True, True, True)], [], "3.5 and 4.2"]
)
def test_unreadable(text):
    with pytest.raises(AttnCtrlError):
        HeadSet.parse(text)


def test_bad_files(tmp_path):
    with pytest.raises(AttnCtrlError, match="does not exist"):
        HeadSet.parse("nowhere/heads.json")
    path = tmp_path / "set.json"
    path.write_text("{not json")
    with pytest.raises(AttnCtrlError, match="not valid JSON"):
        HeadSet.parse(path)
    path.write_text('{"format_version": 99, "heads": [[0, 0]]}')
    with pytest.raises(AttnCtrlError, match="format_version 99"):
        HeadSet.parse(path)


def test_resolve():
    sites = SD3.sites(tiny_sd3(dual=True))
    weights = HeadSet.parse([(1, 2, 0.5), ("transformer_blocks.0.attn2", 3)]).resolve(sites)
    assert torch.equal(weights["transformer_blocks.1.attn"], torch.tensor([0, 0, 0.5, 0]))
    assert torch.equal(weights["transformer_blocks.0.attn2"], torch.tensor([0, 0, 0, 1.0]))


def test_resolve_lists_every_mistake_and_what_exists():
    with pytest.raises(AttnCtrlError) as error:
        HeadSet.parse("7.0,1.9,1.1").resolve(SD3.sites(tiny_sd3()))
    message = str(error.value)
    assert "layer 7" in message and "head 9 of layer 1" in message and "layers 0 to 2 with 4 heads" in message


def test_folders(tmp_path):
    heads = HeadSet(
        ((3, 5, 1.0), (4, 2, 0.5)),
        family="sd3",
        base_model="owner/base",
        objective="icons",
        provenance={"scores": [0.25]},
    )
    assert heads.save_pretrained(tmp_path / "mine") == tmp_path / "mine"
    for read in (HeadSet.from_pretrained, HeadSet.parse):
        assert read(tmp_path / "mine") == read(str(tmp_path / "mine" / "head_set.json")) == heads
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "base_model: owner/base\n" in card and "`3.5,4.2:0.5`" in card and "chosen for `icons`" in card
    (tmp_path / "mine" / "README.md").write_text("my words")
    heads.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "my words"
    assert "base_model" not in HeadSet(WANTED, base_model="builtin:icons-t2i")._card("x")
    with pytest.raises(AttnCtrlError, match="holds no head_set.json"):
        HeadSet.from_pretrained(tmp_path)
    with pytest.raises(AttnCtrlError, match="no hub id"):
        HeadSet.from_pretrained(tmp_path / "nowhere" / "at" / "all")
    (tmp_path / "lines").write_text("3,5\n4,2\n")
    assert HeadSet.from_pretrained(tmp_path / "lines").heads == WANTED


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as one small file needs: repositories, resolve, preupload, commit."""

    protocol_version = "HTTP/1.1"
    files: dict = {}
    commit = "0" * 40

    def log_message(self, *args) -> None:
        pass

    def answer(self, content: bytes | dict, status: int = 200, **headers: str) -> None:
        content = json.dumps(content).encode() if isinstance(content, dict) else content
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self) -> None:
        found = re.fullmatch(r"/(\w+/\w+)/resolve/(\w+)/(.+)", self.path.split("?")[0])
        content = self.files.get((found[1], found[3])) if found else None
        if content is None:
            return self.answer(b"", 404, X_Error_Code="EntryNotFound")
        return self.answer(content, ETag=f'"{hash(content):x}"', X_Repo_Commit=self.commit)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        where = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            return self.answer({"url": f"{where}/{json.loads(body)['organization']}/{json.loads(body)['name']}"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        repo, action = re.fullmatch(r"/api/models/(\w+/\w+)/(\w+)/\w+", self.path.split("?")[0]).groups()
        if action == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        Hub.commit = f"{int(self.commit, 16) + 1:040x}"
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.files[repo, line["value"]["path"]] = b64decode(line["value"]["content"])
        return self.answer({"commitUrl": f"{where}/{repo}/commit/{self.commit}", "commitOid": self.commit})


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine; its files by (repository, path)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    where = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", where)
    template = where + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Hub, "files", {})
    yield Hub.files
    server.shutdown()
    server.server_close()


def test_the_hub(hub, tmp_path):
    heads = HeadSet(
        ((3, 5, 1.0), (4, 2, 0.5)), family="sd3", objective="icons", provenance={"versions": {"torch": "2"}}
    )
    assert "/me/mine/commit/" in heads.push_to_hub("me/mine", token="none")
    assert 'from_pretrained("me/mine")' in hub["me/mine", "README.md"].decode()
    assert HeadSet.from_pretrained("me/mine", cache_dir=tmp_path) == heads
    hub["me/mine", "README.md"] = b"my words"
    HeadSet(WANTED).push_to_hub("me/mine", token="none")
    assert hub["me/mine", "README.md"] == b"my words"
    assert HeadSet.from_pretrained("me/mine", cache_dir=tmp_path).heads == WANTED
    with pytest.raises(AttnCtrlError, match="'me/other' cannot be read from the hub"):
        HeadSet.from_pretrained("me/other", cache_dir=tmp_path)
    with pytest.raises(AttnCtrlError, match="cannot be pushed to 'no name'"):
        heads.push_to_hub("no name", token="none")


def test_a_batch_of_sets():
    sites = SD3.sites(tiny_sd3())
    batch = HeadBatch(["0.1", None, "0.1:0.5,2.3"])
    weights = batch.resolve(sites)
    assert len(batch) == 3 and str(batch) == "0.1 | none | 0.1:0.5,2.3"
    assert list(weights) == ["transformer_blocks.0.attn", "transformer_blocks.2.attn"]
    assert weights["transformer_blocks.0.attn"].tolist() == [[0, 1, 0, 0], [0, 0, 0, 0], [0, 0.5, 0, 0]]
    assert weights["transformer_blocks.2.attn"].tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert HeadBatch([HeadSet(WANTED, family="sd3"), None]).family == "sd3" and batch.family is None


def test_refused_batches():
    with pytest.raises(AttnCtrlError, match="without images"):
        HeadBatch([])
    with pytest.raises(AttnCtrlError, match="several families: flux, sd3"):
        HeadBatch([HeadSet(WANTED, family="sd3"), HeadSet(WANTED, family="flux")])
    with pytest.raises(AttnCtrlError, match="layers 0 to 2 with 4 heads"):
        HeadBatch(["0.1", "7.0"]).resolve(SD3.sites(tiny_sd3()))


@pytest.fixture
def presets(monkeypatch, tmp_path):
    """Two folders of assets, as in a wheel and in a checkout; "bold" is in both."""
    folders = tmp_path / "wheel", tmp_path / "checkout"
    told = {"description": "thicker lines"}
    HeadSet(WANTED, family="sd3", provenance=told).save_pretrained(folders[0] / "heads" / "bold")
    HeadSet(((0, 0, 1.0),)).save_pretrained(folders[1] / "heads" / "bold")
    HeadSet(((1, 2, 0.5),), base_model="owner/base", objective="contrast").save_pretrained(
        folders[1] / "heads" / "air"
    )
    (folders[1] / "heads" / "no set").mkdir()
    monkeypatch.setattr("attnctrl.icons.models.asset_folders", lambda: (*folders, tmp_path / "nowhere"))


def test_presets(presets):
    assert HeadSet.presets() == {"air": "1 heads of owner/base for contrast", "bold": "thicker lines"}
    assert list(HeadSet.presets()) == ["air", "bold"]
    assert HeadSet.parse("preset:bold").heads == WANTED and HeadSet.parse("preset:air").heads == ((1, 2, 0.5),)
    assert SoftPAG(heads="preset:bold").heads.family == "sd3"
    for name in ("cold", "no set", "", "../bold"):
        with pytest.raises(AttnCtrlError, match="no head preset .*\nHINT: head presets: preset:air, preset:bold"):
            HeadSet.parse(f"preset:{name}")


def test_an_installation_without_presets_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("attnctrl.icons.models.asset_folders", lambda: (tmp_path,))
    assert HeadSet.presets() == {}
    with pytest.raises(AttnCtrlError, match="none in this installation"):
        HeadSet.parse("preset:bold")
