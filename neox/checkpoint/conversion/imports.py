"""A model of another project as a checkpoint of ours, with the configuration that describes it."""

from collections.abc import Iterator
from pathlib import Path

import yaml

from neox.checkpoint.conversion.convert import native_files, write_native
from neox.checkpoint.described import described_keys
from neox.checkpoint.huggingface import HuggingFaceReader
from neox.checkpoint.meta_llama import MetaLlamaReader
from neox.checkpoint.native.lineage import check_vacant
from neox.config import config_from_dict, load_config
from neox.errors import CheckpointError
from neox.files import write_whole


def import_model(
    reader: HuggingFaceReader | MetaLlamaReader,
    root: Path,
    *,
    config_file: Path,
    precision: str | None = None,
    dry_run: bool = False,
) -> Iterator[str]:
    """Write `root/global_step0`, and the YAML file to train on with; one tensor is in memory at a time.

    Args:
        reader: the model.
        root: folder of checkpoints.
        config_file: the file to write.
        precision: type of the weights; None for the one they have.
        dry_run: write nothing.

    Yields:
        Lines on what was done, or would be.

    Raises:
        UserError: the folder is not whole, `root` has checkpoints in it, `config_file` is there already with something
            else in it, or one of them cannot be written.
    """
    check_vacant(root)
    reader.check_files()
    keys = described_keys(reader)
    if precision is not None:
        keys["precision"] = {"bf16": "bfloat16"}.get(precision, precision)
    text = yaml.safe_dump(keys, sort_keys=False)
    if config_file.exists() and config_file.read_bytes() != text.encode():  # other tools read --config_file
        raise CheckpointError(f"{config_file}: exists already, with other content; name a new file in --config_file")
    if dry_run:
        config = config_from_dict(keys | {"train_micro_batch_size_per_gpu": 1}, world_size=None)
        yield from (f"{size:>16,}  {name}" for name, size in native_files(config.model).items())
        yield f"would write {root / 'global_step0'}: {reader.folder} in {keys['precision']}, and {config_file}"
        return
    is_new = not config_file.exists()
    write_whole(config_file, text)
    try:
        folder = write_native(reader, load_config([config_file]), root)
    except BaseException:
        if is_new:
            config_file.unlink(missing_ok=True)  # it describes what is not there
        raise
    yield f"{folder}: {reader.folder} in {keys['precision']}, configuration in {config_file}"
