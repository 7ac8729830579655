"""Command lines of `train.py`, `generate.py` and `evaluate.py`: flags that become overrides."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from neox.errors import LaunchError
from neox.results import HelpParser

if TYPE_CHECKING:
    from neox.config import Config, ModelReader

Script = Literal["train", "generate", "evaluate"]


@dataclass(frozen=True)
class Arguments:
    """What the command line asks for.

    Attributes:
        files: configuration files in the order given, as typed (`load_config` adds folder and extension).
        overrides: `key=value` strings that outrank the files; values are YAML.
        config_dir: folder that holds the files (`-d`), or None.
        override_files: files whose keys replace those of `files` (`--override`).
    """

    files: list[str]
    overrides: list[str]
    config_dir: str | None
    override_files: list[str] = field(default_factory=list)

    def load(self, *, world_size: int | None = None, read_model: "ModelReader | None" = None) -> "Config":
        """Read and resolve the configuration.

        Args:
            world_size: number of processes; None before it is known.

            read_model: see `load_config`.

        Raises:
            ConfigError: with one line for each mistake.
            CheckpointError: from `read_model`.
        """
        from neox.config import load_config, resolve_config_paths  # pydantic; `--help` does without

        return load_config(
            resolve_config_paths(self.files, self.config_dir),
            overrides=self.overrides,
            override_files=resolve_config_paths(self.override_files, self.config_dir),
            world_size=world_size,
            read_model=read_model,
        )


def parse_arguments(script: Script, argv: Sequence[str]) -> Arguments:
    """Read the arguments after the script's name. `--help` prints examples and exits.

    Raises:
        LaunchError: an unknown flag, a value of the wrong type, or no configuration file.
    """
    parser = _build_parser(script)
    options = vars(parser.parse_intermixed_args(list(argv)))
    from neox.config import split_overrides

    positionals, config_dir = options.pop("config"), options.pop("conf_dir")
    override_files = options.pop("override") or []
    files, overrides = split_overrides(positionals)
    if not files:
        raise LaunchError(f"{script}.py: no configuration file given; example: {_EXAMPLES[script][0][1]}")
    # json.dumps gives YAML that keeps a text a text, whatever it looks like.
    flags = [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    return Arguments(files, overrides + flags, config_dir, override_files)


class Parser(HelpParser):
    """A parser whose complaints are a `LaunchError`."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise LaunchError(f"{self.prog}: {message}; see {self.prog} --help")

    def parse_intermixed_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        """Read the words of a command line, flags and others in any order.

        Raises:
            LaunchError: an unknown flag, with the nearest that there is.
        """
        found, rest = self.parse_known_intermixed_args(args, namespace)
        # What is left beside the unknown flag, such as its value, depends on the version of argparse.
        for flag in (word.partition("=")[0] for word in rest if word.startswith("-")):
            from neox.config.problems import did_you_mean

            hint = did_you_mean(flag, [name for action in self._actions for name in action.option_strings])
            raise LaunchError(f"{self.prog}: unknown flag {flag}, see {self.prog} --help{hint}")
        if rest:
            self.error(f"unexpected argument {rest[0]}")
        return found


def _build_parser(script: Script) -> argparse.ArgumentParser:
    parser = Parser(
        prog=f"{script}.py",
        description=_DESCRIPTIONS[script],
        epilog=_epilog(script),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "config",
        nargs="*",
        metavar="CONFIG | key=value",
        help="YAML files (.yml may be left out), then overrides",
    )
    parser.add_argument("-d", "--conf_dir", metavar="DIR", help="folder of the configuration files")
    parser.add_argument(
        "--override", action="append", metavar="FILE", help="a YAML file whose keys replace those of the others"
    )
    parser.add_argument("-H", "--hostfile", metavar="FILE", help="hosts for the deepspeed launcher")
    parser.add_argument("--iteration", type=int, metavar="N", help="checkpoint to load; default: the latest")
    {"train": _add_train, "generate": _add_generate, "evaluate": _add_evaluate}[script](parser)
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--autotuning", dest="autotuning_run", choices=("tune", "run"), help=argparse.SUPPRESS)
    parser.add_argument("--wandb_group", metavar="NAME", help="Weights & Biases group")
    parser.add_argument("--wandb_team", metavar="NAME", help="Weights & Biases team")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    kinds = ("unconditional", "input-file", "interactive")
    parser.add_argument("--text_gen_type", metavar="KIND", help=f"what to generate: {', '.join(kinds)}")
    parser.add_argument("-i", "--sample_input_file", metavar="FILE", help="prompts, one a line")
    parser.add_argument("-o", "--sample_output_file", metavar="FILE", help="where samples go, as JSON lines")
    parser.add_argument("-s", "--num_samples", type=int, metavar="N", help="samples to write when unconditional")
    parser.add_argument("-m", "--maximum_tokens", type=int, metavar="N", help="new tokens per sample")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest token")
    parser.add_argument("--top_k", type=int, metavar="K", help="sample among the K likeliest tokens; 0 = all")
    parser.add_argument("--top_p", type=float, metavar="P", help="sample within this probability mass; 0 = all")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--eval_tasks", nargs="+", metavar="TASK", help="lm-evaluation-harness tasks (after CONFIG)")
    parser.add_argument("--eval_results_prefix", metavar="PREFIX", help="start of the result file's name")


_DESCRIPTIONS = {
    "train": "Train a model.",
    "generate": "Generate text from a trained model.",
    "evaluate": "Evaluate a trained model with lm-evaluation-harness.",
}

_EXAMPLES = {
    "train": [
        ("this machine", "python train.py configs/pythia/160M.yml configs/local_setup.yml"),
        ("upstream's spelling", "python train.py -d configs pythia/160M local_setup"),
        ("overrides", "python train.py configs/small.yml train_iters=100 optimizer.params.lr=3e-4"),
        ("a file of overrides", "python train.py configs/small.yml configs/local_setup.yml --override mine.yml"),
    ],
    "generate": [
        (
            "this machine",
            "python generate.py configs/small.yml configs/local_setup.yml -m 64 --temperature 0.8",
        ),
        (
            "prompts",
            "python generate.py configs/small.yml --text_gen_type input-file -i prompts.txt -o samples.jsonl",
        ),
    ],
    "evaluate": [
        (
            "this machine",
            "python evaluate.py configs/small.yml configs/local_setup.yml --eval_tasks lambada_openai piqa",
        ),
    ],
}


def _epilog(script: Script) -> str:
    plain = f"{script}.py CONFIG..."
    launchers = [
        ("one process", f"torchrun --nproc-per-node 1 {plain}"),
        ("8 GPUs", f"torchrun --nproc-per-node 8 {plain}"),
        (
            "2 hosts of 8 GPUs",
            f"torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 {plain}",
        ),
        ("Slurm", f"srun --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 python {plain}"),
        ("MPI", f"mpirun -n 16 -H HOST1:8,HOST2:8 -x MASTER_ADDR=HOST1 python {plain}"),
    ]
    lines = [f"  {name:<20} {command}" for name, command in _EXAMPLES[script] + launchers]
    return "\n".join(["examples:", *lines])
