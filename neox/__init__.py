"""neox: pretraining of large language models, a reimplementation of GPT-NeoX."""

__version__ = "0.1.0"
