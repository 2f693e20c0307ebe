"""Writes goldens/mamba2.npz: what transformers' Mamba2 computes for small models.

    pip install torch transformers
    python -m tests.support.make_mamba2_goldens

Weights and tokens are drawn by name from the raw bits of a PCG64 generator, which numpy
guarantees never to change, so that the file holds results alone: the logits of a batch
and the greedy continuations of prompts. Every parameter is random: one that is 0 or 1
would hide a mistake.
"""

import json
import math
import zlib

import numpy as np

from tests.support import REPOSITORY

GOLDENS = REPOSITORY / "tests" / "mamba2" / "goldens" / "mamba2.npz"

# config.json as transformers reads it. Sizes are odd, chunks do not divide the text.
SHARED = {
    "model_type": "mamba2",
    "num_hidden_layers": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MODELS = {
    "tied, one group": SHARED
    | {
        "vocab_size": 61,
        "hidden_size": 40,
        "num_heads": 5,
        "head_dim": 16,
        "state_size": 16,
        "n_groups": 1,
        "chunk_size": 16,
        "tie_word_embeddings": True,
    },
    "untied, three groups, width 3": SHARED
    | {
        "vocab_size": 48,  # a multiple of 16, as the original code pads it
        "hidden_size": 24,
        "num_heads": 6,
        "head_dim": 8,
        "state_size": 12,
        "n_groups": 3,
        "chunk_size": 7,
        "conv_kernel": 3,
        "use_conv_bias": False,
    },
    "biases, limited steps": SHARED
    | {
        "vocab_size": 53,
        "hidden_size": 36,
        "num_heads": 8,
        "head_dim": 9,
        "state_size": 10,
        "n_groups": 2,
        "chunk_size": 5,
        "use_bias": True,
        "time_step_limit": [0.05, 0.3],
        "residual_in_fp32": False,
    },
    "expand 3, large epsilon, width 2": SHARED
    | {
        "vocab_size": 37,
        "hidden_size": 30,
        "expand": 3,
        "num_heads": 9,
        "head_dim": 10,
        "state_size": 5,
        "n_groups": 9,
        "chunk_size": 64,
        "conv_kernel": 2,
        "layer_norm_epsilon": 0.1,
    },
}
BATCH, LENGTH = 2, 37
PROMPTS = (1, 9, 22)  # tokens
NEW_TOKENS = 12


def uniform(shape, *name):
    """float32 in [-1, 1), the same on every machine: 24 random bits each."""
    seed = zlib.crc32("/".join(map(str, name)).encode())
    bits = np.random.PCG64(seed).random_raw(math.prod(shape)) >> np.uint64(40)
    return (bits.astype(np.float32) / 2**23 - 1).reshape(shape)


def weights(config, seed):
    """Every tensor of a checkpoint, by transformers' names."""
    vocab, model = config["vocab_size"], config["hidden_size"]
    heads, groups = config["num_heads"], config["n_groups"]
    inner = heads * config["head_dim"]
    channels = inner + 2 * groups * config["state_size"]
    projected = inner + channels + heads

    tensors = {}

    def draw(name, shape, scale, mean=0.0):
        random = uniform(shape, seed, name)
        tensors[name] = (random * np.float32(scale) + np.float32(mean)).astype("f4")

    draw("backbone.embeddings.weight", (vocab, model), 1)
    for i in range(config["num_hidden_layers"]):
        layer = f"backbone.layers.{i}"
        draw(f"{layer}.norm.weight", (model,), 0.5, 1)
        draw(f"{layer}.mixer.in_proj.weight", (projected, model), 1.5 / model**0.5)
        draw(
            f"{layer}.mixer.conv1d.weight",
            (channels, 1, config.get("conv_kernel", 4)),
            0.9,
        )
        draw(f"{layer}.mixer.dt_bias", (heads,), 2, -2)
        draw(f"{layer}.mixer.A_log", (heads,), 1.2, 0.2)
        draw(f"{layer}.mixer.D", (heads,), 1.5)
        draw(f"{layer}.mixer.norm.weight", (inner,), 0.5, 1)
        draw(f"{layer}.mixer.out_proj.weight", (model, inner), 6 / inner**0.5)
        if config.get("use_conv_bias", True):
            draw(f"{layer}.mixer.conv1d.bias", (channels,), 0.5)
        if config.get("use_bias", False):
            draw(f"{layer}.mixer.in_proj.bias", (projected,), 0.3)
            draw(f"{layer}.mixer.out_proj.bias", (model,), 0.3)
    draw("backbone.norm_f.weight", (model,), 0.5, 1)
    if not config.get("tie_word_embeddings", False):
        draw("lm_head.weight", (vocab, model), 1)
    return tensors


def texts(config, seed):
    """A batch of tokens and the prompts, of which each is a list."""

    def tokens(shape, name):
        share = (uniform(shape, seed, name) + 1) / 2
        return np.floor(share * config["vocab_size"]).astype(np.int32)

    prompts = [tokens((length,), f"prompt {length}").tolist() for length in PROMPTS]
    return tokens((BATCH, LENGTH), "batch"), prompts


def write_checkpoint(directory, config, tensors):
    """config.json and model.safetensors."""
    from safetensors.numpy import save_file

    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")


def original(config, tensors):
    """The same model in the layout of state-spaces/mamba2-*: its config and tensors."""
    mixer = {
        "layer": "Mamba2",
        "d_state": config["state_size"],
        "headdim": config["head_dim"],
        "ngroups": config["n_groups"],
        "chunk_size": config["chunk_size"],
    }
    for theirs, ours in {
        "d_conv": "conv_kernel",
        "expand": "expand",
        "bias": "use_bias",
        "conv_bias": "use_conv_bias",
        "dt_limit": "time_step_limit",
    }.items():
        if ours in config:
            mixer[theirs] = config[ours]
    multiple = 16 if config["vocab_size"] % 16 == 0 else 1
    tied = config.get("tie_word_embeddings", False)
    table = tensors["backbone.embeddings.weight"]
    tensors = {
        name.replace("embeddings", "embedding"): value
        for name, value in tensors.items()
    }
    return {
        "d_model": config["hidden_size"],
        "d_intermediate": 0,
        "n_layer": config["num_hidden_layers"],
        "vocab_size": config["vocab_size"] - multiple // 2,  # padded when it is made
        "ssm_cfg": mixer,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": config.get("residual_in_fp32", True),
        "fused_add_norm": True,
        "pad_vocab_size_multiple": multiple,
        "tie_embeddings": tied,
    }, tensors | ({"lm_head.weight": table} if tied else {})


def golden(config, seed):
    """What transformers computes: arrays by name."""
    import torch
    from transformers import Mamba2Config, Mamba2ForCausalLM

    model = Mamba2ForCausalLM(Mamba2Config(**config)).eval()
    state = {name: torch.tensor(value) for name, value in weights(config, seed).items()}
    if config.get("tie_word_embeddings", False):
        state["lm_head.weight"] = state["backbone.embeddings.weight"]
    model.load_state_dict(state, strict=True)
    batch, prompts = texts(config, seed)
    # transformers limits step sizes in whole texts but not in decoding with a cache:
    # a model with limits continues by whole texts.
    cached = "time_step_limit" not in config
    with torch.no_grad():
        logits = model(torch.tensor(batch), use_cache=False).logits.numpy()
        continuations = [
            model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                use_cache=cached,
            )[0, len(prompt) :].tolist()
            for prompt in prompts
        ]
    return {"logits": logits, "continuations": np.array(continuations, np.int32)}


def main():
    import torch
    import transformers

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    arrays = {"made with": versions}
    for number, (name, config) in enumerate(MODELS.items()):
        results = golden(config, seed=number)
        arrays |= {f"{name}/{key}": value for key, value in results.items()}
    GOLDENS.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDENS, **arrays)
    print(f"{GOLDENS}: {GOLDENS.stat().st_size:,} bytes; {arrays['made with']}")


if __name__ == "__main__":
    main()
