import pytest

from ..pipelines import save_tiny_sd3


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Folder of a tiny SD3 pipeline: 3 layers of 4 heads, 16 x 16 pictures, 4 x 4 image tokens."""
    return save_tiny_sd3(tmp_path_factory.mktemp("tiny-sd3"))
