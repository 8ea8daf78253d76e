import pytest

from attnctrl.apps.cli import main

from ..pipelines import save_tiny_sd3


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Folder of a tiny SD3 pipeline: 3 layers of 4 heads, 16 x 16 pictures."""
    return str(save_tiny_sd3(tmp_path_factory.mktemp("tiny-sd3")))


@pytest.fixture
def attnctrl(capsys):
    """Runs a command line; returns (exit code, stdout, stderr)."""

    def run(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run
