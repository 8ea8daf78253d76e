"""The folder of a Hugging Face Space, as `make space` writes it: it needs what it lists, and nothing of the checkout."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from attnctrl.apps.demo.serve import pick_vlm
from attnctrl.icons.models import builtin_models


ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "apps" / "space" / "write.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="the Space is written from a checkout")


def write(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True)


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    folder = tmp_path_factory.mktemp("space") / "folder"
    done = write(folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_requirements_are_the_published_packages_that_the_page_needs(space):
    lines = (space / "requirements.txt").read_text().splitlines()
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert {"torch", "diffusers", "transformers", "gradio"} <= {line.split("==")[0] for line in lines}
    assert not [line for line in lines if line not in pins or "attnctrl" in line]
    (version,) = re.findall(r"(?m)^sdk_version: (.+)$", (space / "README.md").read_text())
    assert f"gradio=={version}" in lines
    assert "*.safetensors filter=lfs" in (space / ".gitattributes").read_text()
    large = [path.suffix for path in space.rglob("*") if path.is_file() and path.stat().st_size > 10_000_000]
    assert set(large) <= {".safetensors"}


def test_folder_is_written_again_but_never_over_other_things(space, tmp_path):
    (space / ".git").mkdir(exist_ok=True)
    (space / "attnctrl" / "gone.py").write_text("")
    assert write(space).returncode == 0
    assert (space / ".git").is_dir() and not (space / "attnctrl" / "gone.py").exists()
    (tmp_path / "thesis.tex").write_text("precious")
    done = write(tmp_path)
    assert done.returncode == 1 and "holds other things: thesis.tex" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.skipif("icons-t2i" not in builtin_models(), reason="the built-in model is not there")
def test_app_runs_from_its_folder_alone(space):
    gradio_client = pytest.importorskip("gradio_client", reason="the page needs gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MODEL", "VLM")} | address
    told = subprocess.run(
        [sys.executable, "-c", "import attnctrl; print(attnctrl.__file__)"],
        cwd=space, env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(told.stdout.strip()).resolve().is_relative_to(space.resolve())
    app = subprocess.Popen(
        [sys.executable, "app.py"], cwd=space, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        until = time.monotonic() + 120
        while time.monotonic() < until and app.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        assert app.poll() is None, app.stdout.read()
        client = gradio_client.Client(f"http://127.0.0.1:{port}", verbose=False, analytics_enabled=False)
        facts = client.predict(api_name="/model")
        assert facts["model"] == "builtin:icons-t2i" and facts["heads"] == [8] * 8
        made = client.predict(prompt="a red cat", steps=1, api_name="/generate")
        assert Path(made).stat().st_size > 0
        assert facts.get("ask", {}).get("model") == pick_vlm(None)
        if pick_vlm(None):
            asked = {"picture": gradio_client.handle_file(made), "question": "What is in the picture?"}
            assert client.predict(**asked, api_name="/ask")["answer"]
    finally:
        app.terminate()
        app.wait(30)
