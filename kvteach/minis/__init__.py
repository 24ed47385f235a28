"""Two small models with one key-value head per query head, trained here: ``mini-llama`` (RoPE), ``mini-bloom`` (ALiBi).

``kvteach.zoo.load("mini-llama")`` loads them; `kvteach.minis.train` says how they were made and makes them again.
"""
