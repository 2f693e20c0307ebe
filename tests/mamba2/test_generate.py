"""The command that continues a text with a checkpoint from a folder."""

import codecs
import json
import subprocess
import sys

import pytest

nnx = pytest.importorskip("flax.nnx")
pytest.importorskip("safetensors")

from jax_causal_conv.mamba2 import (
    Engine,
    Mamba2Config,
    Mamba2LM,
    Request,
    SamplingParams,
    generate,
    load,
    save,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def checkpoint(folder, vocab_size, **options):
    sizes = {"d_model": 16, "n_layers": 1, "d_state": 8, "headdim": 8}
    config = Mamba2Config(vocab_size, **sizes, **options)
    save(folder, Mamba2LM(config, rngs=nnx.Rngs(0)))
    return folder


@pytest.fixture(scope="module")
def over_bytes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    return str(checkpoint(folder, 256, bos_token_id=0, eos_token_id=0))


WORDS = {"<end>": 0, "one": 1, "two": 2, "three": 3}


def write_tokenizer(folder, words):
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<end>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def run(capsys, *arguments):
    assert generate.main(list(arguments)) == 0
    return capsys.readouterr().out


def test_a_model_over_bytes_writes_what_the_engine_draws(over_bytes, capsys):
    few = ["--prompt", "Grüße\x1b[2J", "--max-new-tokens", "9"]
    printed = run(capsys, over_bytes, *few, "--seed", "1", "--temperature", "0.9")
    engine = Engine(load(over_bytes), num_slots=1, max_tokens_per_step=16)
    sampling = SamplingParams(0.9, top_p=0.95, seed=1)
    prompt = [0, *"Grüße\x1b[2J".encode()]
    expected = engine.submit(Request(prompt, max_new_tokens=9, sampling=sampling))
    engine.run()
    # A character that is cut off at the end is not written.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = generate.printable(decoder.decode(bytes(expected.tokens)))
    assert printed == f"Grüße\ufffd[2J{text}\n"


def test_a_model_with_a_tokenizer_streams_words(tmp_path, capsys, monkeypatch):
    pytest.importorskip("tokenizers")
    folder = checkpoint(tmp_path, 8)  # tokens 4 to 7 are padding of the vocabulary
    write_tokenizer(folder, WORDS)
    arguments = [str(folder), "--prompt", "one two", "--temperature", "5"]
    printed = run(capsys, *arguments, "--max-new-tokens", "40")
    words = printed.split()
    assert words[:2] == ["one", "two"]
    assert set(words) == set(WORDS) and len(words) <= 42

    # It comes word by word: three tokens, three words with a space before each.
    written = []
    monkeypatch.setattr(Engine, "run", lambda engine: None)
    options = generate.parse([str(folder), "--prompt", "two"])
    generate.stream(options, written.append)
    text = generate.text_of(folder, load(folder).config, "two")
    assert written == ["two"] and text.prompt == [2]
    assert [text.step(token) for token in (3, 7, 1)] == [" three", "", " one"]


def test_a_character_of_several_tokens_comes_when_it_is_complete(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocab = {c: i for i, c in enumerate(sorted(alphabet))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = Mamba2Config(256, d_model=16, n_layers=1, headdim=8)
    text = generate.text_of(tmp_path, config, "x")
    parts = [text.step(token) for token in tokenizer.encode("a€ß").ids]
    assert parts == ["a", "", "", "€", "", "ß"]


def test_the_end_of_the_text_is_not_printed(over_bytes, capsys, monkeypatch):
    def run_to_the_end(engine):
        (generation,) = engine._active.values()
        on_event = generation.terms.on_event
        on_event(generate.Event(0, ord("x")))
        on_event(generate.Event(0, 0, "stop"))

    monkeypatch.setattr(Engine, "run", run_to_the_end)
    assert run(capsys, over_bytes, "--prompt", "a") == "ax\n"


def broken(folder, name, text):
    checkpoint(folder, 4)
    (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("arguments", "prepare", "message"),
    [
        ((), None, "no folder"),
        ((), lambda f: f.mkdir(), "has no config.json"),
        ((), lambda f: broken(f, "config.json", "{"), "is not JSON"),
        (
            (),
            lambda f: broken(f, "model.safetensors", "x"),
            "is not a whole safetensors",
        ),
        ((), lambda f: checkpoint(f, 4), "has no tokenizer.json"),
        ((), lambda f: broken(f, "tokenizer.json", "{"), "is no tokenizer"),
        ((), lambda f: write_tokenizer(checkpoint(f, 3), WORDS), "has 4 tokens"),
        (("--temperature", "-1"), lambda f: checkpoint(f, 256), "temperature must be"),
        (("--seed", "-1"), lambda f: checkpoint(f, 256), "seed must be"),
        (("--max-new-tokens", "0"), lambda f: checkpoint(f, 256), "max_new_tokens"),
        (("--prompt", ""), lambda f: checkpoint(f, 256), "--prompt has no tokens"),
    ],
)
def test_what_is_missing_or_wrong_is_named_in_one_line(
    tmp_path, capsys, arguments, prepare, message
):
    folder = tmp_path / "model"
    if prepare is not None:
        prepare(folder)
    if (folder / "tokenizer.json").exists():
        pytest.importorskip("tokenizers")
    assert generate.main([str(folder), "--prompt", "x", *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_a_tokenizer_without_its_package_names_the_extra(tmp_path, capsys, monkeypatch):
    write_tokenizer(checkpoint(tmp_path, 4), WORDS)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert generate.main([str(tmp_path), "--prompt", "x"]) == 2
    assert 'pip install "jax-causal-conv[generate]"' in capsys.readouterr().err


def test_it_is_a_program_that_ends_quietly_when_its_reader_does(over_bytes):
    command = [sys.executable, "-m", "jax_causal_conv.mamba2.generate", over_bytes]
    process = subprocess.Popen(
        [*command, "--prompt", "x", "--max-new-tokens", "2000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.read(1) == b"x"
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == 0
