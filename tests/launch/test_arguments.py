"""Command lines of the three scripts."""

import pytest
import yaml

from neox.errors import LaunchError
from neox.launch.arguments import Arguments, parse_arguments
from neox.launch.environment import Placement
from neox.launch.reporting import print_notices


def overrides(arguments):
    pairs = (text.split("=", 1) for text in arguments.overrides)
    return {key: yaml.safe_load(value) for key, value in pairs}


def test_files_and_overrides():
    argv = [
        "configs/pythia/160M.yml",
        "configs/local_setup.yml",
        "train_iters=10",
        "optimizer.params.lr=3e-4",
    ]
    assert parse_arguments("train", argv) == Arguments(
        files=argv[:2], overrides=["train_iters=10", "optimizer.params.lr=3e-4"], config_dir=None
    )


@pytest.mark.parametrize("flag", ["-d", "--conf_dir"])
def test_upstreams_spelling(flag):
    arguments = parse_arguments("train", [flag, "configs", "pythia/160M", "local_setup"])
    assert arguments == Arguments(["pythia/160M", "local_setup"], [], "configs")


def test_flags_between_positionals():
    argv = [
        "a.yml",
        "--iteration",
        "500",
        "b",
        "-H",
        "hosts",
        "seed=1",
        "--wandb_group",
        "1e3",
        "--wandb_team",
        "t",
    ]
    arguments = parse_arguments("train", argv)
    assert arguments.files == ["a.yml", "b"]
    # A group named 1e3 stays a text.
    assert overrides(arguments) == {
        "seed": 1,
        "hostfile": "hosts",
        "iteration": 500,
        "wandb_group": "1e3",
        "wandb_team": "t",
    }


def test_overrides_come_before_flags_so_flags_win():
    assert parse_arguments("train", ["--iteration", "5", "a", "iteration=4"]).overrides == [
        "iteration=4",
        "iteration=5",
    ]


def test_generate():
    argv = "a -i in.txt -o out.jsonl -s 3 -m 64 --text_gen_type input-file "
    argv += "--temperature 0.8 --top_k 4 --top_p 0.9"
    assert overrides(parse_arguments("generate", argv.split())) == {
        "sample_input_file": "in.txt",
        "sample_output_file": "out.jsonl",
        "num_samples": 3,
        "maximum_tokens": 64,
        "text_gen_type": "input-file",
        "temperature": 0.8,
        "top_k": 4,
        "top_p": 0.9,
    }


def test_evaluate():
    arguments = parse_arguments("evaluate", ["a", "--eval_tasks", "lambada", "piqa", "--eval_results_prefix", "run 1"])
    assert arguments.files == ["a"]
    assert overrides(arguments) == {"eval_tasks": ["lambada", "piqa"], "eval_results_prefix": "run 1"}


@pytest.mark.parametrize(
    ("text", "is_file"),
    [
        ("lr=3e-4", False),
        ("optimizer.params.lr=3e-4", False),
        ("train-iters=5", False),
        ("save=runs/a=b.yml", False),
        ("configs/lr=3e-4.yml", True),
        ("sweep.yml=old", True),
        ("160M", True),
    ],
)
def test_what_is_an_override(text, is_file):
    arguments = parse_arguments("train", ["base.yml", text])
    assert (text in arguments.files) is is_file
    assert (text in arguments.overrides) is not is_file


@pytest.mark.parametrize(
    ("script", "argv", "message"),
    [
        ("train", [], "train.py: no configuration file given; example: python train.py"),
        ("generate", ["top_k=1"], "generate.py: no configuration file given"),
        *(
            (
                "train",
                ["a.yml", *words],
                "train.py: unknown flag --wandb-grp, see train.py --help; did you mean '--wandb_group'?",
            )
            for words in (["--wandb-grp", "x"], ["--wandb-grp=x"], ["--wandb-grp", "x", "b.yml"])
        ),
        ("evaluate", ["a.yml", "--zzz"], "evaluate.py: unknown flag --zzz, see evaluate.py --help"),
    ],
)
def test_mistakes_are_one_line(script, argv, message):
    with pytest.raises(LaunchError) as error:
        parse_arguments(script, argv)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("script", "argv", "words"),
    [
        ("train", ["a.yml", "--iteration", "ten"], ["--iteration", "'ten'"]),
        ("evaluate", ["a.yml", "--eval_tasks"], ["--eval_tasks"]),
    ],
)
def test_mistakes_that_argparse_words(script, argv, words):
    with pytest.raises(LaunchError) as error:
        parse_arguments(script, argv)
    line = str(error.value)
    assert line.startswith(f"{script}.py: ")
    assert line.endswith(f"; see {script}.py --help")
    assert all(word in line for word in words)
    assert "\n" not in line


@pytest.mark.parametrize("script", ["train", "generate", "evaluate"])
def test_help_shows_how_to_launch(script, capsys):
    with pytest.raises(SystemExit) as end:
        parse_arguments(script, ["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for command in (
        f"python {script}.py configs/",
        "torchrun --nproc-per-node 8",
        "srun --nodes 2",
        "mpirun -n 16",
    ):
        assert command in shown


def test_override_files_and_loading(tmp_path):
    (tmp_path / "base.yml").write_text(
        "{num_layers: 2, hidden_size: 8, num_attention_heads: 2, seq_length: 4, seed: 5}"
    )
    (tmp_path / "over.yml").write_text("{seed: 6}")
    arguments = parse_arguments(
        "train", ["-d", str(tmp_path), "base", "--override", "over", "hidden_size=16", "--override", "over.yml"]
    )
    assert arguments.override_files == ["over", "over.yml"]
    assert arguments.overrides == ["hidden_size=16"]
    config = arguments.load(world_size=2)
    assert (config.training.seed, config.model.hidden_size, config.parallel.world_size) == (6, 16, 2)
    assert config.replaced == (f"seed: 5 ({tmp_path / 'base.yml'}:1) -> 6 ({tmp_path / 'over.yml'}:1)",)


@pytest.mark.parametrize(
    ("rank", "launcher", "prints"),
    [(None, "", True), (0, "torchrun", True), (1, "torchrun", False), (0, "local", False), (1, "local", False)],
)
def test_notices_are_printed_once_for_a_run(rank, launcher, prints, capsys):
    """By whoever starts the workers, or by rank 0 where something else does."""
    placement = None if rank is None else Placement(rank, rank, 2, 2, "localhost", 29500, launcher)
    print_notices(["a notice"], placement)
    assert capsys.readouterr().err == ("a notice\n" if prints else "")
