"""What a user pays for before anything is asked of a model."""

import subprocess
import sys

import pytest


HEAVY = ("torch", "diffusers", "transformers", "xformers", "accelerate", "numpy")


def loaded_after(code: str) -> str:
    """Heavy modules in a fresh interpreter after `code`, and what it printed on stderr."""
    code += f"\nimport sys; print('loaded:', [name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "code",
    [
        "import attnctrl; attnctrl.__version__; dir(attnctrl)",
        "from attnctrl.apps.cli import main; assert main(['--help']) == 0",
        "from attnctrl.apps.cli import main; assert main(['generate', '--help']) == 0",
        "from attnctrl.apps.cli import main; assert main(['--version']) == 0",
        "from attnctrl.icons.models import builtin_models; builtin_models()",
    ],
)
def test_nothing_heavy_is_imported(code):
    assert loaded_after(code) == "loaded: []"


def test_public_names():
    code = (
        "import attnctrl as ac; [getattr(ac, name) for name in ac.__all__]; assert ac.SoftPAG is ac.controls.SoftPAG"
    )
    assert "torch" in loaded_after(code)


def test_an_unknown_name_is_told():
    import attnctrl

    with pytest.raises(AttributeError, match="no attribute 'Nothing'; public names: .*SoftPAG"):
        attnctrl.Nothing
