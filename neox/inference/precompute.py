"""What a reference model thinks of documents, written beside them, so that it need not run during training."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

from neox.config import Config, named_documents
from neox.data import IndexedDataset, IndexedDatasetWriter
from neox.data.ids import AllowedIds
from neox.data.indexed import open_corpus
from neox.errors import ConfigError
from neox.inference.loading import load_weights
from neox.model.layers import Decoder
from neox.model.loss import Labels
from neox.parallel.mesh import Mesh
from neox.results import print_result


def precompute(config: Config, mesh: Mesh) -> None:
    """Write `<path>_<precompute_model_name>` for every set of documents that the configuration names.

    Copies of the model share the documents; every process of `mesh` calls this.

    Raises:
        UserError: no name or no data are given, or the checkpoint or a file cannot be read.
    """
    name, paths = config.generation.precompute_model_name, named_documents(config)
    if not name:
        raise ConfigError("text_gen_type: precompute needs a name for what it writes; set precompute_model_name")
    if not paths:
        raise ConfigError("text_gen_type: precompute needs documents; set train_data_paths or pos_train_data_paths")
    sets = [open_corpus(config, path) for path in paths]
    model = load_weights(config, mesh)
    assert model.config.padded_vocab_size is not None, "the vocabulary was resolved before the model was built"
    for documents in sets:
        documents.allowed = AllowedIds(model.config.padded_vocab_size)
        documents.check_ids()
    for documents in sets:
        scores = _shared_scores(model, documents, config.batch.train_micro_batch_size_per_gpu or 1, mesh)
        prefix = f"{documents.prefix}_{name}"
        if mesh.rank == 0:
            with IndexedDatasetWriter(prefix, np.float32) as writer:
                for row in scores:
                    writer.add_document(row)
            print_result(f"{len(documents)} documents scored in {prefix}.bin")
        else:
            for _ in scores:
                continue


def document_scores(model: Decoder, documents: list[np.ndarray]) -> list[np.ndarray]:
    """Log-probability of the next token at each token, float32 of the length of each document.

    The last token has 0, and every token that the model's `seq_length` leaves out NaN: it is not to be trained on.

    Args:
        model: in eval mode, with sequence parallelism off.
        documents: token ids of each, run together as one batch.
    """
    width = min(max(map(len, documents)), model.config.seq_length + 1)
    rows = np.zeros((len(documents), max(width, 2)), np.int64)
    for row, document in zip(rows, documents, strict=True):
        row[: min(width, len(document))] = document[:width]
    device = next(model.parameters()).device
    tokens = torch.from_numpy(rows).to(device)
    with torch.inference_mode():
        scores = model(tokens[:, :-1], Labels(tokens[:, 1:].contiguous())).cpu().numpy()
    found = [np.zeros(len(document), np.float32) for document in documents]
    for given, row in zip(found, scores, strict=True):
        count = max(0, min(len(given), width) - 1)
        given[:count] = row[:count]
        given[width - 1 if len(given) > width else len(given) :] = np.nan
    return found


def _shared_scores(model: Decoder, documents: IndexedDataset, size: int, mesh: Mesh) -> Iterator[np.ndarray]:
    """Scores of all documents in order, on every process, each copy of the model taking a share of every stretch."""
    stretch = size * mesh.data_size
    for start in range(0, len(documents), stretch):
        numbers = range(start, min(start + stretch, len(documents)))
        own = numbers[mesh.data_rank * size : (mesh.data_rank + 1) * size]
        scores = document_scores(model, [documents.get(number) for number in own]) if own else []
        shares = [scores]
        if mesh.data_size > 1:
            shares = [[] for _ in range(mesh.data_size)]
            dist.all_gather_object(shares, scores, group=mesh.data_group)
        for share in shares:
            yield from share
