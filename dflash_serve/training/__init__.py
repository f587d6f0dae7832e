"""Trains a DFlash drafter for a target: answers by the target itself, training, simulated acceptance, plots.

Stands alone: it imports nothing else of this project, and needs torch, transformers (for the tokenizer), numpy,
safetensors, rich and matplotlib. Start with `python -m dflash_serve.training --help` or the README beside this file.
"""
