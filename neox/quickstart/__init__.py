"""The whole path once, small: corpus, tokenizer, training, evaluation, samples, export."""
