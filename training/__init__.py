"""How the embedded voice model is made: data, codec, language model, export.

Commands only; nothing under ``vllm`` imports this package. The steps and their order are in
README.md.
"""
