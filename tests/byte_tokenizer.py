"""A tokenizer with a token for each byte, and special tokens after them."""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors


def byte_tokenizer(special: Sequence[str], *, template: str = "") -> Tokenizer:
    """The special tokens are 256 and so on; `template` says which are put around a text: `<s> $A`, say."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    if template:
        around = [(name, backend.token_to_id(name)) for name in special if name in template.split()]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=around)
    return backend
