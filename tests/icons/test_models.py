import json

import pytest

from attnctrl.errors import AttnCtrlError
from attnctrl.icons import models
from attnctrl.icons.models import builtin_models, builtin_path, resolve_model


def pipeline_folder(path):
    path.mkdir(parents=True)
    (path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    return path


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A package folder with one shipped model as in a wheel, one as in a checkout, and something that is no model."""
    package = tmp_path / "site" / "attnctrl"
    pipeline_folder(package / "assets" / "wheel-model")
    pipeline_folder(tmp_path / "site" / "assets" / "checkout-model")
    (tmp_path / "site" / "assets" / "requests").mkdir()
    monkeypatch.setattr(models, "_PACKAGE", package)
    return tmp_path / "site"


def test_wheel_and_checkout(shipped):
    assert list(builtin_models()) == ["wheel-model", "checkout-model"]
    assert builtin_path("wheel-model") == shipped / "attnctrl" / "assets" / "wheel-model"
    assert resolve_model("builtin:checkout-model") == str(shipped / "assets" / "checkout-model")


def test_unknown_names_list_what_exists(shipped):
    for name in ("none", "", "requests", "../assets/checkout-model"):
        with pytest.raises(AttnCtrlError, match="HINT: built-in models: builtin:wheel-model, builtin:checkout-model"):
            resolve_model(f"builtin:{name}")


def test_nothing_shipped(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_PACKAGE", tmp_path / "attnctrl")
    with pytest.raises(AttnCtrlError, match="none in this installation"):
        builtin_path("icons-t2i")


def test_folders_and_hub_ids(tmp_path, monkeypatch):
    folder = pipeline_folder(tmp_path / "models" / "mine")
    assert resolve_model(folder) == str(folder)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("models/mine") == "models/mine"  # a folder that exists comes before a hub id
    assert resolve_model("stabilityai/stable-diffusion-3.5-medium") == "stabilityai/stable-diffusion-3.5-medium"


def test_what_is_neither(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    for model, message in (
        (tmp_path / "none", "no folder that exists"),
        ("", "no folder that exists"),
        ("./none", "no folder that exists"),
        ("mymodel", "no folder that exists"),
        (tmp_path, "no model_index.json"),
        (tmp_path / "model.safetensors", "is a file"),
    ):
        with pytest.raises(AttnCtrlError, match=message):
            resolve_model(model)
