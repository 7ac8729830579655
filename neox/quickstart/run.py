"""The steps of the quickstart in order, each through the functions and scripts that a user has."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from neox.config import Config, load_config
from neox.data import IndexedDataset
from neox.data.preprocess import PreprocessOptions, preprocess
from neox.data.tokenizers.train import save_tokenizer, train_bpe
from neox.errors import ConfigError
from neox.files import write_whole
from neox.inference.loading import load_model
from neox.parallel.mesh import Mesh
from neox.quickstart.bits import HeldOutLoss, held_out_loss
from neox.quickstart.commands import ROOT, run_script, show, typed
from neox.quickstart.corpus import Corpus, build_corpus
from neox.quickstart.pace import affordable_steps
from neox.results import print_result
from neox.training.origin import load_folder
from neox.training.vocabulary import settle_vocabulary

CONFIG = ROOT / "configs" / "quickstart.yml"
HEADING = "# Written by the quickstart, for this machine; it completes "
VOCABULARY = 8192
STEPS = 7
PROMPTS = ("def", "class", "import os\nimport sys\n", '    """Return')  # a space belongs to the token after it
SAMPLE_TOKENS = 80
TRAINING_SECONDS = 305.0
STRIDE_SHARE = 4  # held-out windows advance by this part of their length


@dataclass(frozen=True)
class Run:
    """Where the files of a quickstart are.

    Attributes:
        out: folder of all of them.
        config: YAML file of the model and its training.
    """

    out: Path
    config: Path = CONFIG

    @property
    def local(self) -> Path:
        """YAML file of what belongs to this machine: data, tokenizer, folders, device."""
        return self.out / "local.yml"

    @property
    def tokenizer(self) -> Path:
        """The trained tokenizer."""
        return self.out / "tokenizer.json"

    @property
    def export(self) -> Path:
        """Folder of the exported model."""
        return self.out / "huggingface"

    @property
    def samples(self) -> Path:
        """Generated text, JSON lines."""
        return self.out / "samples.jsonl"

    def prefix(self, corpus: Path) -> str:
        """Prefix of the tokenized files of a corpus."""
        return str(self.out / f"{corpus.stem}_text_document")

    @property
    def files(self) -> list[str]:
        """The configuration as every script is given it."""
        return [typed(self.config), str(self.local)]

    def load(self) -> Config:
        """Read the configuration, for one process."""
        return load_config(self.files, world_size=1)


def run_quickstart(
    run: Run, *, vocab_size: int = VOCABULARY, library: Path | None = None, seconds: float = TRAINING_SECONDS
) -> HeldOutLoss:
    """Do everything, printing a heading and the time of each step.

    Args:
        run: where to, and how.
        vocab_size: tokens of the tokenizer.
        library: see `build_corpus`.
        seconds: that training may take; where `train_iters` steps would take longer, there are fewer.

    Returns:
        What the trained model says of the held-out files.

    Raises:
        UserError: a step cannot be done, or the folder has files of others in it.
    """
    start = time.perf_counter()
    _take_folder(run)
    with _step(1, "Corpus: the Python standard library"):
        corpus = build_corpus(run.out, library=library)
        print_result(f"train     {corpus.train_files:4d} files, {corpus.train_bytes:10,d} bytes: {corpus.train}")
        print_result(
            f"held out  {corpus.held_out_files:4d} files, {corpus.held_out_bytes:10,d} bytes: {corpus.held_out}"
        )
    with _step(2, "Tokenizer: byte-level BPE, from the training files only"):
        save_tokenizer(train_bpe([corpus.train], vocab_size=vocab_size, nfkc=False), run.tokenizer)
        print_result(f"{vocab_size:,} tokens: {run.tokenizer}")
    with _step(3, "Tokens: .bin and .idx files"):
        _tokenize(run, corpus)
        _write_local(run, corpus)
    with _step(4, "Training"):
        steps = _train(run, seconds)
    with _step(5, "Held-out text"):
        loss = _evaluate(run, corpus)
    with _step(6, "Samples"):
        _sample(run)
    with _step(7, "Export to Hugging Face, compared with transformers"):
        _export(run)
    print_result(
        f"\nDone in {time.perf_counter() - start:.0f} s: {loss.bits_per_byte:.3f} bits per byte on held-out files.\n"
    )
    _say_what_next(run, steps)
    return loss


def _take_folder(run: Run) -> None:
    """Mark the folder as a quickstart's, in which the files of an earlier one are replaced; nobody else's are."""
    is_own = run.local.is_file() and run.local.read_text(encoding="utf-8").startswith(HEADING)
    if not is_own and run.out.exists() and (not run.out.is_dir() or any(run.out.iterdir())):
        raise ConfigError(f"--out {run.out}: exists already and was not made by a quickstart; name a new folder")
    if not is_own:
        write_whole(run.local, f"{HEADING}{typed(run.config)}\n")


@contextmanager
def _step(number: int, title: str) -> Iterator[None]:
    print_result(f"\n[{number}/{STEPS}] {title}", flush=True)
    start = time.perf_counter()
    yield
    print_result(f"      {time.perf_counter() - start:.1f} s", flush=True)


def _tokenize(run: Run, corpus: Corpus) -> None:
    for text in (corpus.train, corpus.held_out):
        summary = preprocess(
            PreprocessOptions(
                inputs=[text],
                output_prefix=str(run.out / text.stem),
                tokenizer_type="HFTokenizer",
                vocab_file=str(run.tokenizer),
                append_eod=True,
                progress=False,
            )
        )
        print_result(f"{summary.tokens['text']:10,d} tokens: {run.prefix(text)}.bin")


def _write_local(run: Run, corpus: Corpus) -> None:
    """Write the second configuration file, which the first one needs to be trained here."""
    held_out = [run.prefix(corpus.held_out)]
    keys = {
        "train_data_paths": [run.prefix(corpus.train)],
        "valid_data_paths": held_out,
        "test_data_paths": held_out,
        "tokenizer_type": "HFTokenizer",
        "vocab_file": str(run.tokenizer),
        "save": str(run.out / "checkpoints"),
        "load": str(run.out / "checkpoints"),
        # One device: the batch is too small to be shared.
        "num_gpus": 1,
        "precision": "bfloat16" if torch.cuda.is_available() else "fp32",
    }
    run.local.write_text(f"{HEADING}{typed(run.config)}\n{json.dumps(keys, indent=2)}\n", encoding="utf-8")


def _train(run: Run, seconds: float) -> int:
    """Train as long as the machine can in the time; return the number of steps."""
    config = settle_vocabulary(run.load())
    steps, wanted = affordable_steps(config, seconds), config.training.train_iters
    changes = []
    if steps != wanted or load_folder(config) is not None:
        changes = [f"train_iters={steps}", "override_lr_scheduler=true"]
    if steps != wanted:
        print_result(f"{wanted} steps would take more than {seconds:.0f} s on this machine: training {steps}")
    run_script("train.py", *run.files, *changes)
    return steps


def _evaluate(run: Run, corpus: Corpus) -> HeldOutLoss:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = run.load()
    model, tokenizer = load_model(config, Mesh(device=device))
    stride = max(1, config.model.seq_length // STRIDE_SHARE)
    documents = IndexedDataset(run.prefix(corpus.held_out))
    assert documents.sizes[:].sum() > 0, "documents without text are never written"
    loss = held_out_loss(
        model,
        (documents[i] for i in range(len(documents))),
        eod=tokenizer.eod,
        text_bytes=corpus.held_out_bytes,
        stride=stride,
    )
    print_result(f"{loss.bits_per_byte:.4f} bits per byte: {loss.nats:,.0f} nats, {loss.text_bytes:,} bytes of text")
    print_result(f"every one of {loss.tokens:,} tokens, the {len(documents)} ends of documents included, in windows of")
    print_result(
        f"{config.model.seq_length} tokens that advance by {stride}; {loss.nats / loss.tokens:.4f} nats a token"
    )
    return loss


def _sample(run: Run) -> None:
    prompts = run.out / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in PROMPTS), encoding="utf-8")
    options = ["-i", str(prompts), "-o", str(run.samples), "-m", str(SAMPLE_TOKENS), "--temperature", "0.7"]
    run_script("generate.py", *run.files, *options, "--top_p", "0.95")
    for line in run.samples.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        print_result("-" * 80)
        print_result(sample["context"] + sample["text"])
    print_result("-" * 80)


def _export(run: Run) -> None:
    if run.export.exists():  # of an earlier quickstart in this folder
        shutil.rmtree(run.export)
    arguments = ["--input_dir", str(run.out / "checkpoints"), "--output_dir", str(run.export)]
    run_script("tools/ckpts/convert_neox_to_hf.py", *arguments, "--config_file", *run.files)


def _say_what_next(run: Run, steps: int) -> None:
    print_result(
        f"Everything is in {run.out}: corpus, tokenizer, tokens, checkpoints, samples, and the export in {run.export}."
    )
    print_result("What to type next:")
    files = " ".join(run.files)
    show("train on, to twice the length", f"train.py {files} train_iters={2 * steps} override_lr_scheduler=true")
    show(
        "type prompts and read what follows",
        f"generate.py {files} --text_gen_type interactive --temperature 0.7",
    )
    show(
        "tokenize text of your own (.txt or .jsonl)",
        "tools/datasets/preprocess_data.py --input FILE --output-prefix data/mine "
        f"--tokenizer-type HFTokenizer --vocab-file {run.tokenizer} --append-eod",
    )
    show(
        "and train on that",
        f"train.py {files} finetune=true save=mine 'train_data_paths=[data/mine_text_document]'",
    )
