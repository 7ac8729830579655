"""What `generate.py` does: unconditional samples, prompts from a file, an interactive session, or scoring documents."""

import json
import sys
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

from neox.config import Config
from neox.data.documents import Document, document_text, file_kind
from neox.data.text_files import SurrogateFilter, replaced_line, text_lines
from neox.errors import DataError
from neox.files import absence, require_apart, require_place, write_whole
from neox.inference.generate import GenerationSettings
from neox.inference.loading import load_model
from neox.inference.precompute import precompute
from neox.inference.text import TextCompletion, TextGenerator
from neox.parallel.mesh import Mesh
from neox.results import print_result
from neox.watch import phase

PROMPT_SIGN = "Context prompt >>> "


def run_generation(config: Config, mesh: Mesh) -> None:
    """Load the model and generate as `text_gen_type` says; every process of `mesh` calls this.

    Raises:
        UserError: of the checkpoint, the prompts or the output file.
    """
    kind, prompts = generation_kind(config), []
    if kind != "input-file" and config.generation.sample_input_file and mesh.rank == 0:
        print(f"sample_input_file is not read: text_gen_type is {kind}", file=sys.stderr)
    if kind == "precompute":
        precompute(config, mesh)
        return
    if kind == "input-file":
        prompts = read_prompts(Path(config.generation.sample_input_file or ""))
        require_apart(Path(config.generation.sample_output_file), [config.generation.sample_input_file or ""])
    elif kind == "unconditional":
        prompts = [""] * config.generation.num_samples
    if kind != "interactive" and mesh.rank == 0:
        require_place(Path(config.generation.sample_output_file))
    model, tokenizer = load_model(config, mesh)
    generator = TextGenerator(model, tokenizer, config.batch.train_micro_batch_size_per_gpu or 1)
    settings = GenerationSettings.from_config(config)
    if kind == "interactive":
        run_session(generator, settings, mesh, prompt_end=config.generation.prompt_end)
        return
    results = complete_shared(generator, prompts, settings, mesh)
    if mesh.rank == 0:
        path = Path(config.generation.sample_output_file)
        write_whole(path, "".join(json.dumps(record(result), ensure_ascii=False) + "\n" for result in results))
        print_result(f"{len(results)} sample{'s' * (len(results) != 1)} written to {path}")
        empty = [found for result in results if (found := result.completion).message and not found.tokens]
        if empty:
            print(f"{len(empty)} of {len(results)} prompts: {empty[0].message}", file=sys.stderr)


def generation_kind(config: Config) -> str:
    """`text_gen_type`, or what its absence means: the input file if there is one, else unconditional.

    Raises:
        DataError: input-file without a file.
    """
    given = config.generation
    kind = given.text_gen_type or ("input-file" if given.sample_input_file else "unconditional")
    if kind == "input-file" and not given.sample_input_file:
        raise DataError("text_gen_type is input-file but no file is named; set sample_input_file (-i FILE)")
    return kind


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: the field "text" of each line of a .jsonl file, else each line. Blank lines are skipped.

    Raises:
        DataError: no such file, one that is damaged or not UTF-8, nothing in it, or a line without that field.
    """
    if not path.is_file():
        raise DataError(f"sample_input_file: {path}: {absence(path)}")
    documents = [Document(str(path), number, line) for number, line in text_lines(path) if line.strip()]
    if not documents:
        raise DataError(f"sample_input_file: {path}: holds no prompt; write one a line")
    if file_kind(path) != ".jsonl":
        return [document.raw.rstrip("\r\n") for document in documents]
    clean = SurrogateFilter()
    prompts = [document_text(document, "text", clean) for document in documents]
    if clean.documents:
        print(f"{path}: {replaced_line(clean.documents)}", file=sys.stderr)
    return prompts


def record(result: TextCompletion) -> dict[str, Any]:
    """One line of the output file."""
    completion = result.completion
    fields: dict[str, Any] = {
        "context": result.context,
        "text": result.text,
        "length": len(completion.tokens),
        "finished": completion.finished,
        "message": completion.message,
        "duration_seconds": completion.duration_seconds,
    }
    return fields if completion.logits is None else fields | {"logits": completion.logits.tolist()}


def complete_shared(
    generator: TextGenerator, prompts: list[str], settings: GenerationSettings, mesh: Mesh
) -> list[TextCompletion]:
    """Continue all prompts, shared out among the copies of the model; every process gets all results."""
    numbers = range(mesh.data_rank, len(prompts), mesh.data_size)
    own = generator.complete([prompts[i] for i in numbers], settings=settings, numbers=numbers)
    if mesh.data_size == 1:
        return own
    shares: list[list[TextCompletion]] = [[] for _ in range(mesh.data_size)]
    dist.all_gather_object(shares, own, group=mesh.data_group)
    return [shares[i % mesh.data_size][i // mesh.data_size] for i in range(len(prompts))]


def run_session(generator: TextGenerator, settings: GenerationSettings, mesh: Mesh, *, prompt_end: str) -> None:
    """Read prompts from the terminal and answer, until its end. Only rank 0 has a terminal; the others follow."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # text typed in another encoding must not end the session
    prompts = typed_prompts(sys.stdin, prompt_end) if mesh.rank == 0 else iter(())
    while (prompt := _broadcast(_typed(prompts), mesh)) is not None:
        result = generator.complete([prompt], settings=settings)[0]
        if mesh.rank == 0:
            print_result(result.text)
            if result.completion.message:
                print(result.completion.message, file=sys.stderr)


@phase("waiting for a prompt", lawful=True)
def _typed(prompts: Iterator[str]) -> str | None:
    return next(prompts, None)


def typed_prompts(stream: TextIO, prompt_end: str) -> Iterator[str]:
    """Prompts of a stream, each ended by `prompt_end`; text after that on its line is dropped.

    Bytes that are not text are replaced by U+FFFD, and a line on stderr says so.
    """
    text = ""
    print_result(PROMPT_SIGN, end="", flush=True)
    for line in stream:
        text += line
        if prompt_end in text:
            yield _cleaned(text[: text.index(prompt_end)])
            text = ""
            print_result(PROMPT_SIGN, end="", flush=True)
    if text:
        yield _cleaned(text)


def _cleaned(prompt: str) -> str:
    clean = SurrogateFilter()
    cleaned = clean(prompt)
    if clean.documents:
        print("the prompt had bytes that are not UTF-8; each was replaced by U+FFFD", file=sys.stderr)
    return cleaned


def _broadcast(prompt: str | None, mesh: Mesh) -> str | None:
    """Send what rank 0 has to all."""
    if mesh.world_size == 1:
        return prompt
    box = [prompt]
    dist.broadcast_object_list(box, src=0)
    return box[0]
