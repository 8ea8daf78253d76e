import pytest

from ..pipelines import tiny_sd3_pipeline


@pytest.fixture(scope="session")
def pipe(tmp_path_factory):
    """A tiny SD3 pipeline: 3 layers of 4 heads, 16 x 16 pictures."""
    return tiny_sd3_pipeline(tmp_path_factory.mktemp("tokenizer"))
