"""What published models look like: the fields of their configs, and their tensors.

`fields` reads values out of a config.json, `families` knows which names each family of
models gives them, and `weights` turns tensors into the parameters of NNX layers.
"""
