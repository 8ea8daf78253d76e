import shutil
import struct
import zlib
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from attnctrl.apps.cli import main

from ..language.folders import save_llava
from ..pipelines import save_tiny_sd3


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT = 60_000  # ms


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Folder of a tiny SD3 pipeline: 3 layers of 4 heads, 16 x 16 pictures."""
    return str(save_tiny_sd3(tmp_path_factory.mktemp("tiny-sd3")))


@pytest.fixture(scope="session")
def vlm(tmp_path_factory):
    """Folder of a tiny LLaVA: 4 layers, 2 x 2 image tokens."""
    return save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def picture(tmp_path_factory):
    """A picture file of 40 x 20 pixels."""
    path = tmp_path_factory.mktemp("pictures") / "wide.png"
    raw = np.random.default_rng(0).integers(0, 255, (20, 40, 3), dtype=np.uint8)
    Image.fromarray(raw).save(path)
    return path


@pytest.fixture
def attnctrl(capsys):
    """Runs a command line; returns (exit code, stdout, stderr)."""

    def run(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="driving a browser needs playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@contextmanager
def serving(model, **options):
    """(address, studio) of a running demo. It limits the pictures that Pillow opens while it runs."""
    from attnctrl.apps.demo.serve import serve
    from attnctrl.apps.generate import Job

    limit = Image.MAX_IMAGE_PIXELS
    try:
        blocks, studio = serve(Job(prompt="of the page", model=model, device="cpu"), wait=False, **options)
        try:
            yield blocks.local_url, studio
        finally:
            blocks.close()
            studio.close()
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def bomb(side: int) -> bytes:
    """A small PNG file that claims side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )
