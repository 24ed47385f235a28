"""The command, in this process and in one of its own: what it prints, its JSON, its errors, its exit status."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from kvteach import cli, commands, folder, throughput, zoo
from kvteach.machine import Meter

SHORT = ["--windows", "2", "--length", "32", "--device", "cpu"]


@pytest.fixture
def run(capsys):
    """main(arguments) -> exit status, stdout, stderr."""

    def call(*arguments):
        status = cli.main([str(part) for part in arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture(scope="module")
def tiny_folders(tmp_path_factory):
    """Tiny models of random weights with the tokenizer of the minis."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(zoo.NAMES["mini-llama"].folder)
    made = {}
    for name in ("llama-gqa", "bloom"):
        model = tiny.MODELS[name]()
        model.resize_token_embeddings(len(tokenizer))
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


@pytest.fixture
def forbidden(monkeypatch):
    """No weights may be read."""
    monkeypatch.setattr(zoo, "load", lambda *a, **k: pytest.fail("the model was loaded"))


def no_trace(err):
    return "Traceback" not in err


@pytest.mark.parametrize(
    "dial", [["--kv-heads", "2"], ["--kv-heads", "2", "--stock"], ["--kv-ratio", "0.5"]], ids=str
)
def test_compress_evaluate_generate(run, tmp_path, dial):
    out = tmp_path / "small"
    status, said, err = run(
        "compress", "mini-llama", *dial, "--out", out, *SHORT, "--eval-windows", 1, "--json", "-"
    )
    assert status == 0 and len(said.splitlines()) == 1
    made = json.loads(said)
    share = 0.5 if "--kv-ratio" in dial else 0.25
    assert made["cache_bytes_per_token"] == share * made["original_cache_bytes_per_token"] == share * 8192
    planned = re.search(r"planned: .* (\d+) bytes of cache", err)
    assert int(planned[1]) == made["cache_bytes_per_token"]
    work = "calibrating" if "--stock" in dial else "compressing"
    assert err.index("planned:") < err.index(work)  # said before the work
    assert made["plan"]["sequential"] == ("--stock" not in dial)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    assert made["out"] == str(out) and made["plan"]["basis"] and made["calibration"]["windows"] == 2

    status, said, err = run("evaluate", out, *SHORT, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert status == 0 and found["original"] == "mini-llama"
    assert f"{found['perplexity_ratio']:.4g}" in said and "Loading" not in said
    assert found["perplexity_ratio"] == pytest.approx(found["perplexity"] / found["original_perplexity"])
    assert found["kl"] > 0 and 0 < found["agreement"] < 1
    for name in (
        "cache_bytes_per_token",
        "original_cache_bytes_per_token",
        "parameters",
        "original_parameters",
    ):
        assert found[name] == made[name]

    status, said, _ = run(
        "generate", out, "Return a new", "--max-new-tokens", 3, "--device", "cpu", "--json", "-"
    )
    assert status == 0 and json.loads(said)["new_tokens"] <= 3


@pytest.mark.parametrize("name, kv_heads", [("llama-gqa", 1), ("bloom", 4)])
def test_a_folder_as_source_and_full_rank(run, tiny_folders, tmp_path, name, kv_heads):
    out = tmp_path / "small"
    status, _, err = run(
        "compress", tiny_folders[name], "--kv-heads", kv_heads, "--basis", "activation-svd", "--out", out, *SHORT,
        "--eval-windows", 0,
    )  # fmt: skip
    assert status == 0 and "| perplexity |" not in (out / "README.md").read_text()
    status, said, err = run("evaluate", out, *SHORT, "--json", "-")
    found = json.loads(said)
    assert status == 0 and found["original"] == str(tiny_folders[name]) and "not bit for bit" not in err
    if name == "bloom":  # as many heads as before: nothing is lost
        assert found["kl"] == pytest.approx(0, abs=1e-9) and found["perplexity_ratio"] == pytest.approx(1)

    status, said, err = run("evaluate", out, *SHORT, "--original", "mini-llama", "--json", "-")
    assert status == 0 and "'mini-llama' is not bit for bit the model" in err
    assert json.loads(said)["original"] == "mini-llama"


def test_an_offloaded_run_is_the_run_in_memory(run, tiny_folders, tmp_path):
    found = []
    for way in (["--no-sequential"], ["--offload"]):
        out = tmp_path / str(len(found)) / "small"
        status, said, err = run(
            "compress", tiny_folders["llama-gqa"], "--kv-heads", 1, "--out", out, *SHORT, "--eval-windows", 1, *way,
            "--json", "-",
        )  # fmt: skip
        assert status == 0 and ("needed:" in err) is (way == ["--offload"])
        found.append(json.loads(said) | {"out": None, "card": (out / "README.md").read_text()})
        assert [path.name for path in out.parent.iterdir()] == ["small"]
        assert ("model.safetensors.index.json" in os.listdir(out)) is (way == ["--offload"])
    assert found[0] == found[1]
    scores = []
    for way in ([], ["--offload"]):
        status, said, _ = run("evaluate", out, *SHORT, *way, "--json", "-")
        assert status == 0
        scores.append(json.loads(said))
        status, said, _ = run(
            "generate", out, "x", "--max-new-tokens", 3, "--device", "cpu", *way, "--json", "-"
        )
        assert status == 0
        scores[-1]["text"] = json.loads(said)["text"]
    assert scores[0] == scores[1]


def test_an_uncompressed_model_has_perplexity_and_bytes(run):
    status, said, _ = run("evaluate", "mini-bloom", *SHORT, "--json", "-")
    found = json.loads(said)
    assert status == 0 and found["perplexity"] > 1 and found["cache_bytes_per_token"] == 8192
    assert "kl" not in found and "original_perplexity" not in found


def test_two_copies_of_one_model_do_not_differ(run):
    status, said, _ = run("evaluate", "mini-llama", "--original", "mini-llama", *SHORT, "--json", "-")
    assert status == 0 and json.loads(said)["perplexity_ratio"] == 1


@pytest.mark.parametrize("name", ["llama-gqa", "bloom"])
def test_bench(run, tiny_folders, monkeypatch, name):
    monkeypatch.setattr(throughput, "Meter", functools.partial(Meter, megabytes=1))
    options = ["--kv-heads", 2, 1, "--context", 9, 5, "--batch", 2, "--device", "cpu", "--json", "-"]
    status, said, err = run("bench", tiny_folders[name], *options)
    found = json.loads(said)
    assert status == 0 and len(said.splitlines()) == 1
    rows = [(row["model"], row["context"], row["kv_heads"]) for row in found["rows"]]
    whole = 4 if name == "bloom" else 2
    blocks = "" if name == "bloom" else ", blocks"
    few = [(f"{heads} heads{blocks}", heads) for heads in (2, 1)]
    assert rows == [(model, c, heads) for c in (9, 5) for model, heads in [("model", whole), *few]]
    for row in found["rows"]:
        assert row["tokens_per_second"] > 0 and row["predicted"] > 0
        assert (
            row["cache_bytes"] * whole == found["rows"][0]["cache_bytes"] * row["kv_heads"]
            or row["context"] == 5
        )
    assert err.index("planned:") < err.index("predicted") and err.count("planned:") == 2


def test_bench_refuses_before_loading(run, forbidden):
    status, said, err = run("bench", "mini-llama", "--kv-heads", 4, 3)
    assert (
        status == 1
        and said == ""
        and "kv_heads is 3; for 8 key-value heads it must be one of 1, 2, 4, 8" in err
    )
    for option in ("--context", "--batch"):
        status, _, err = run("bench", "mini-llama", option, 0)
        assert status == 1 and f"{option[2:]} is 0; it should be a whole number, 1 or more" in err


def test_spectrum(run):
    status, said, err = run("spectrum", "mini-llama", *SHORT, "--json", "-")
    found = json.loads(said)
    assert status == 0 and found["width"] == 256 and len(found["layers"]) == 4
    assert "keys before RoPE" in err
    for layer in found["layers"]:
        for ranks in layer.values():
            assert 1 <= ranks["0.9"] <= ranks["0.99"] <= 64  # no more directions than tokens


def test_doctor(run, monkeypatch):
    status, said, _ = run("doctor")
    assert status == 0 and "all is there" in said and "torch" in said
    real = commands._version
    monkeypatch.setattr(
        commands, "_version", lambda name: {"gguf": None, "torch": "2.1.9"}.get(name, real(name))
    )
    status, said, _ = run("doctor", "--json", "-")
    assert status == 1
    assert json.loads(said)["missing"] == ["torch 2.1.9 is older than 2.2", "gguf is not installed"]


def test_what_doctor_asks_for_is_what_the_package_asks_for():
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    extra = re.search(r"^models = \[(.*?)\]", project, re.DOTALL | re.MULTILINE)[1]
    assert dict(re.findall(r'"([a-z]+)>=([\d.]+)', extra)) == commands.NEEDED


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--kv-heads", "3"], "kv_heads is 3; for 8 key-value heads it must be one of 1, 2, 4, 8"),
        (["--kv-ratio", "1.5"], "kv_ratio is 1.5; it must be above 0 and at most 1"),
        (["--kv-ratio", "0.5", "--stock"], "stock=True makes ordinary heads"),
        (["--kv-heads", "2", "--basis", "magic"], "no basis 'magic'; it is one of mean-pool"),
        (["--kv-heads", "2", "--sequential", "--offload"], "--sequential needs the whole model in memory"),
        (["--kv-heads", "2", "--stock", "--basis", "weight-svd"], "does not pass through RoPE"),
    ],
)
def test_a_plan_that_cannot_be_is_told_before_loading(run, forbidden, tmp_path, arguments, sentence):
    status, said, err = run("compress", "mini-llama", *arguments, "--out", tmp_path / "out")
    assert status == 1 and sentence in err and len(err.splitlines()) == 1 and said == ""
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written_is_told_before_loading(run, forbidden, tmp_path):
    (tmp_path / "file").write_text("x")
    status, _, err = run("compress", "mini-llama", "--kv-heads", 2, "--out", tmp_path)
    assert status == 1 and "holds files already: name a new folder" in err
    status, _, err = run("evaluate", "mini-llama", "--json", tmp_path / "missing/found.json")
    assert status == 1 and "its folder does not exist" in err


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["evaluate", "mini-lama"], "no model 'mini-lama' (did you mean 'mini-llama'?)"),
        (["spectrum", "mini-llama", "--text", "nowhere.txt"], "no text 'nowhere.txt'"),
        (
            ["evaluate", "mini-llama", "--windows", "0"],
            "count and length are 0 and 512; both must be at least 1",
        ),
        (
            ["evaluate", "mini-llama", "--length", "4096", "--windows", "1"],
            "windows have 4096 tokens, the model 2048",
        ),
        (["evaluate", "mini-llama", "--windows", "9999"], "ask for fewer or shorter ones"),
        (["generate", "mini-llama", ""], "the text has no tokens"),
        (["generate", "mini-llama", "x", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
    ],
)
def test_errors_are_one_sentence(run, arguments, sentence):
    status, _, err = run(*arguments)
    assert status == 1 and sentence in err.splitlines()[-1] and no_trace(err)


def test_a_compressed_model_is_not_compressed_again(run, tmp_path):
    out = tmp_path / "small"
    few = [*SHORT, "--eval-windows", 0, "--basis", "mean-pool"]
    assert run("compress", "mini-llama", "--kv-heads", 4, "--out", out, *few)[0] == 0
    for command in (["spectrum", out], ["compress", out, "--kv-heads", 2, "--out", tmp_path / "again"]):
        status, _, err = run(*command, *SHORT)
        assert status == 1 and "compressed already" in err
    config = json.loads((out / "config.json").read_text())
    config["kvteach"]["source_name"] = str(tmp_path / "moved")
    (out / "config.json").write_text(json.dumps(config))
    status, _, err = run("evaluate", out, *SHORT)
    assert status == 1 and "the original cannot be loaded" in err and "Name it with --original" in err
    del config["kvteach"]["source_name"]
    (out / "config.json").write_text(json.dumps(config))
    status, _, err = run("evaluate", out, *SHORT)
    assert status == 1 and "does not say what it was made from" in err


@pytest.mark.parametrize(
    "error, code, last", [(KeyboardInterrupt, 130, "interrupted"), (OSError("disk full"), 1, "disk full")]
)
@pytest.mark.parametrize("way", [["--basis", "mean-pool"], ["--sequential"]], ids=str)
def test_a_save_that_fails_leaves_no_folder_and_the_work(run, tmp_path, monkeypatch, error, code, last, way):
    def stop(*args):
        raise error

    monkeypatch.setattr(folder, "_card", stop)
    arguments = [
        "compress",
        "mini-llama",
        "--kv-heads",
        4,
        *way,
        "--eval-windows",
        0,
        *SHORT,
    ]
    status, said, err = run(*arguments, "--out", tmp_path / "out")
    assert status == code and err.splitlines()[-1] == f"kvteach: {last}" and no_trace(err)
    assert "written" not in said and f"the same command is given again: {tmp_path / 'out.resume'}" in err
    assert [path.name for path in tmp_path.iterdir()] == ["out.resume"]
    monkeypatch.undo()
    status, said, err = run(*arguments, "--out", tmp_path / "out")
    assert status == 0 and said.count(f"going on from {tmp_path / 'out.resume'}") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_bug_says_its_type_and_debug_shows_it(run, monkeypatch):
    monkeypatch.setattr(zoo, "config", lambda name: 1 / 0)
    status, _, err = run("evaluate", "mini-llama")
    assert (status, err) == (1, "kvteach: ZeroDivisionError: division by zero (--debug shows where)\n")
    with pytest.raises(ZeroDivisionError):
        cli.main(["evaluate", "mini-llama", "--debug"])
    monkeypatch.setenv("KVTEACH_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(["evaluate", "mini-llama"])


def test_a_package_that_is_missing_is_named(run, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(zoo, "config", missing)
    status, _, err = run("spectrum", "mini-llama")
    assert (status, err) == (1, 'kvteach: torch is not installed: pip install "kvteach[models]"\n')


@pytest.mark.parametrize(
    "arguments", [[], ["compress", "mini-llama", "--out", "x"], ["evaluate"], ["compress", "m", "--kv-heads", "x"],
                  ["compress", "m", "--out", "x", "--kv-heads", "2", "--kv-ratio", "0.5"]]
)  # fmt: skip
def test_a_wrong_command_line_is_two(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2 and "usage: kvteach" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    code = "import sys, kvteach.cli\ntry: kvteach.cli.main(['--help'])\nexcept SystemExit: pass\nprint(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "transformers", "numpy", "tqdm"} & set(out.split())


def test_in_a_process_of_its_own():
    command = [sys.executable, "-m", "kvteach", "generate", "mini-llama", "def größe", "--json", "-"]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0
    assert json.loads(done.stdout.decode().splitlines()[-1])["prompt"] == "def größe"
    assert "bytes of cache for each token" in done.stderr.decode()
