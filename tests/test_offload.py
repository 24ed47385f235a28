"""A model that is never whole in memory: the same moments and the same small model, bit for bit."""

import json

import pytest
import tiny
import torch

from kvteach import convert, evaluate, folder, layers, sequential, zoo
from kvteach.activations import attention_modules, read, record
from kvteach.calibration import calibrate
from kvteach.moments import Source
from kvteach.offload import device, fetch, is_offloaded, layers_on_disk
from kvteach.plan import Plan

PLANS = [Plan(kv_heads=1), Plan(kv_heads=1, stock=True), Plan(kv_ratio=0.5)]


class Tokenizer:
    """Stands in for one: zoo.load wants one, the tiny models have none."""

    @classmethod
    def from_pretrained(cls, source, **options):
        return cls()

    def save_pretrained(self, at):
        (at / "tokenizer.json").write_text("{}")


@pytest.fixture(autouse=True)
def tokenizer(monkeypatch):
    import transformers

    monkeypatch.setattr(transformers, "AutoTokenizer", Tokenizer)


def made(name, tied):
    model = tiny.MODELS[name](dtype=torch.float32)
    if tied and not model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return model


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folder of a tiny model of float32, in many shards."""
    found = {}

    def make(name, tied=False):
        if (name, tied) not in found:
            found[name, tied] = tmp_path_factory.mktemp(name)
            made(name, tied).save_pretrained(found[name, tied], max_shard_size="30KB")
            assert (found[name, tied] / "model.safetensors.index.json").is_file()
        return found[name, tied]

    return make


def loaded(at, **options):
    return zoo.load(at, **({"device": "cpu"} | options))[0]


def spread(at):
    """By device maps of transformers' own: all on disk, as a tiny memory makes it, and one layer of three on disk."""
    whole = loaded(at)
    layered = layers_on_disk(zoo.FAMILIES[whole.config.model_type], "cpu")
    blocks = layered.pop(next(iter(layered)), None) and next(iter(layers_on_disk(
        zoo.FAMILIES[whole.config.model_type], "cpu"
    )))
    some = layered | {f"{blocks}.{n}": "disk" if n == 1 else "cpu" for n in range(3)}
    auto = zoo.load(at, device_map="auto", max_memory={"cpu": "20KB"})[0]
    assert set(auto.hf_device_map.values()) == {"disk"}
    return whole, auto, zoo.load(at, device_map=some)[0]
