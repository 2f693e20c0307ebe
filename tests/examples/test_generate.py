"""The program that continues a text with a checkpoint from a folder."""

import json

import pytest

nnx = pytest.importorskip("flax.nnx")
pytest.importorskip("safetensors")

from examples import generate
from jax_causal_conv.mamba2 import Mamba2Config, Mamba2LM, save
from tests.support import quick


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    with quick.compilation():
        yield


def checkpoint(folder, vocab_size):
    config = Mamba2Config(
        vocab_size, d_model=16, n_layers=1, d_state=8, headdim=8, eos_token_id=0
    )
    save(folder, Mamba2LM(config, rngs=nnx.Rngs(0)))
    return str(folder)


def test_a_model_over_bytes_continues_a_text(tmp_path, capsys):
    arguments = [checkpoint(tmp_path, 256), "Grüße", "--max-new-tokens", "5"]
    printed = []
    for options in ([], [], ["--seed", "1", "--temperature", "0.9"]):
        assert generate.main(arguments + options) == 0
        printed.append(capsys.readouterr().out)
    assert all(text.startswith("Grüße") for text in printed)
    assert printed[0] == printed[1] != printed[2]


def test_a_model_with_a_tokenizer_continues_a_text(tmp_path, capsys):
    pytest.importorskip("tokenizers")
    words = {"<end>": 0, "one": 1, "two": 2, "three": 3}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<end>"},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    arguments = [checkpoint(tmp_path, 4), "one two", "--max-new-tokens", "3"]
    assert generate.main(arguments) == 0
    printed = capsys.readouterr().out.split()
    assert printed[:2] == ["one", "two"]
    assert set(printed) <= set(words) and len(printed) <= 5


def test_what_is_missing_or_wrong_is_named(tmp_path, capsys):
    model = checkpoint(tmp_path, 4)
    for arguments, message in [
        ([str(tmp_path / "none"), "x"], "config.json"),
        ([model, "x"], "no tokenizer.json"),
        ([model, "x", "--temperature", "-1"], "temperature must be"),
    ]:
        assert generate.main(arguments) == 2
        assert message in capsys.readouterr().err
