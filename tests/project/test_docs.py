"""Every command of the documentation is one that works: scripts, flags, configuration files, overrides, links."""

import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import yaml
from scripts_of import fork_script

from neox.config import load_config
from neox.config.__main__ import main as config_command
from neox.config.requirements import check_training
from neox.config.schema import fields_with_keys, known_keys
from neox.launch.__main__ import main as launch_command
from neox.launch.arguments import parse_arguments

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = ("train.py", "generate.py", "evaluate.py")
TOOLS_OF_OTHERS = ("docker", ".", "pre-commit")
"""Commands that cannot be run here; what they name in the repository is looked at."""


@dataclass(frozen=True)
class Command:
    """One command of a page, its continuation lines joined."""

    page: Path
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line} {' '.join(self.words)}"


def blocks(page: Path, language: str) -> Iterator[tuple[int, list[str]]]:
    """Fenced blocks of a language: number of the first line, lines."""
    inside, start, lines = "", 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("```"):
            if inside == language:
                yield start, lines
            inside, start, lines = ("" if inside else line.removeprefix("```") or "text"), number + 1, []
        elif inside:
            lines.append(line)
    assert not inside, f"{page.name}: a block is not closed"


def commands(page: Path) -> list[Command]:
    """Commands of the bash blocks of a page."""
    found = []
    for start, lines in blocks(page, "bash"):
        pending, first = "", start
        for number, line in enumerate(lines, start=start):
            first = number if not pending else first
            pending += line.removesuffix("\\") + " "
            if not line.endswith("\\"):
                words = shlex.split(pending, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                    words.pop(0)
                if words:
                    found.append(Command(page, first, tuple(words)))
                pending = ""
    return found


ALL = [command for page in PAGES for command in commands(page)]


def script_of(command: Command) -> tuple[str, list[str]] | None:
    """The script of the repository that a command runs, and what it is given."""
    for position, word in enumerate(command.words):
        if word.endswith(".py"):
            return word, list(command.words[position + 1 :])
    return None


def launcher_of(command: Command) -> list[str]:
    """The words before the script."""
    script = script_of(command)
    assert script is not None
    return list(command.words[: len(command.words) - len(script[1]) - 1])


def by_script(*names: str) -> list[Command]:
    return [c for c in ALL if (found := script_of(c)) is not None and found[0] in names]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the repository's configurations and the YAML files that the pages show."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "configs", folder / "configs")
    for page in PAGES:
        for _, lines in blocks(page, "yaml"):
            name = re.fullmatch(r"# ([\w.-]+\.yml)", lines[0])
            if name:
                (folder / name[1]).write_text("\n".join(lines), encoding="utf-8")
    # What the import of a released model writes: the keys of Pythia 160M's config.json.
    model = load_config([ROOT / "configs" / "pythia" / "160M.yml"]).model
    keys = (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "seq_length",
        "max_position_embeddings",
        "pos_emb",
        "rotary_pct",
        "no_weight_tying",
        "gpt_j_residual",
        "padded_vocab_size",
    )
    content = {key: getattr(model, key) for key in keys} | {"precision": "bfloat16"}
    (folder / "pythia.yml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder


def test_there_are_commands_to_check() -> None:
    names = {script_of(c)[0] for c in ALL if script_of(c)}  # type: ignore[index]
    assert set(SCRIPTS) <= names
    assert len(by_script("train.py")) > 10


@pytest.mark.parametrize("command", ALL, ids=str)
def test_command_is_of_a_kind_that_is_checked(command: Command) -> None:
    first, words = command.words[0], command.words
    if first == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    elif first == "pip":
        extras = re.search(r"\.\[([\w,]+)\]", " ".join(words))
        assert extras
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert set(extras[1].split(",")) <= project["optional-dependencies"].keys()
        assert (ROOT / words[words.index("-c") + 1]).is_file()
    elif script_of(command) is not None:
        assert (ROOT / script_of(command)[0]).is_file()  # type: ignore[index]
        assert first in ("python", "torchrun", "srun", "mpirun", "deepspeed", "docker")
    elif words[:2] == ("python", "-m"):
        assert words[2] in ("venv", "neox.config", "neox.launch", "pytest")
    else:
        assert first in TOOLS_OF_OTHERS
        if first == "docker":
            assert (ROOT / "Dockerfile").is_file()


@pytest.mark.parametrize("command", by_script(*SCRIPTS), ids=str)
def test_script_arguments_parse_and_the_configuration_is_valid(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    script, words = script_of(command)  # type: ignore[misc]
    name = script.removesuffix(".py")
    arguments = parse_arguments(name, words)  # type: ignore[arg-type]
    config = arguments.load()
    unit = config.parallel.pipeline_stages * config.parallel.model_parallel_size
    if name == "train":
        # 20B's batch is a multiple of 12 copies, the others' of 8.
        config = config.with_world_size(unit * (12 if config.model.num_layers == 44 else 1))
        check_training(config)


@pytest.mark.parametrize("command", [c for c in ALL if c.words[:3] == ("python", "-m", "neox.config")], ids=str)
def test_config_command(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert config_command(command.words[3:]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", [c for c in ALL if c.words[:3] == ("python", "-m", "neox.launch")], ids=str)
def test_launch_command(command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the commands write; hosts are not asked and nothing is submitted."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("neox.launch.__main__.submit", lambda path: "1")
    monkeypatch.setattr("neox.launch.__main__.check_hosts", lambda path, config, **figures: config is not None)
    (folder / "hosts").write_text("HOST1 slots=8\nHOST2 slots=8\n")
    (folder / "train.py").touch()
    assert launch_command(list(command.words[3:])) == 0


@cache
def help_of(script: str) -> str:
    done = fork_script(script, "--help", COLUMNS="200")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "command", [c for c in ALL if (found := script_of(c)) and found[0].startswith("tools/")], ids=str
)
def test_tool_knows_the_flags(command: Command) -> None:
    script, words = script_of(command)  # type: ignore[misc]
    known = set(re.findall(r"(?<![\w-])--?[\w-]+", help_of(script)))
    given = {word.partition("=")[0] for word in words if word.startswith("-")}
    assert given <= known
    usage = help_of(script).partition("\n\n")[0]
    required = set(re.findall(r"(?<!\[)(?<!\w)(--[\w-]+)", re.sub(r"\[[^\]]*\]", "", usage)))
    assert required <= given


@pytest.mark.parametrize("command", [c for c in ALL if c.words[0] == "torchrun"], ids=str)
def test_torchrun_knows_the_flags(command: Command) -> None:
    from torch.distributed.run import parse_args

    options = parse_args(list(command.words[1:]))
    assert options.training_script == "train.py"
    assert (options.nnodes, options.nproc_per_node) == ("2", "8")


@pytest.mark.parametrize("command", [c for c in ALL if c.words[0] == "deepspeed"], ids=str)
def test_deepspeed_knows_the_flags(command: Command) -> None:
    from deepspeed.launcher.runner import parse_args

    options = parse_args(list(command.words[1:]))
    assert (options.user_script, options.hostfile) == ("train.py", "hosts")


@pytest.mark.parametrize("command", [c for c in ALL if c.words[0] in ("srun", "mpirun")], ids=str)
def test_other_launchers_start_python(command: Command) -> None:
    words = launcher_of(command)
    assert words[-1] == "python"
    flags = {word for word in words if word.startswith("-")}
    known = {
        "srun": {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--kill-on-bad-exit=1"},
        "mpirun": {"-n", "-H", "-x"},
    }
    assert flags <= known[words[0]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for text, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target.partition("#")[0]).exists(), f"[{text}]({target})"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_are_there(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    named = re.findall(r"`((?:neox|tests|configs|tools|docs)/[\w./-]+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def reported_metrics() -> set[str]:
    """Names of metrics in the code that reports them."""
    training = ROOT / "neox" / "training"
    sources = (
        "callbacks.py",
        "metrics/monitors.py",
        "metrics/throughput.py",
        "metrics/expert_load.py",
        "guards/rewind.py",
        "stragglers.py",
    )
    text = "".join((training / name).read_text(encoding="utf-8") for name in sources)
    names = set(re.findall(r'"((?:train|runtime)/\w+)"', text))
    figures = re.findall(r'"(lm_loss\w*)"', (training / "validation.py").read_text(encoding="utf-8"))
    assert names
    assert figures
    return names | {f"{split}/{name}" for split in ("validation", "test") for name in figures}


def test_every_metric_is_documented() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`((?:train|runtime|validation|test)/\w+)`", page)) == reported_metrics()


def test_keys_in_the_pages_are_keys() -> None:
    """What a page shows as `key: value` is a key of the configuration."""
    nested = {place.key.partition(".")[2] for _, place in fields_with_keys()}
    for page in PAGES:
        for key in re.findall(r"`([a-z][a-z_]+): [^`]+`", page.read_text(encoding="utf-8")):
            assert key in known_keys() | nested | {"pipe_partitioned"}, f"{page.name}: {key}"


def test_readme_refuses_what_the_configuration_refuses() -> None:
    """The table of the README and the code agree on a few that people will look for."""
    base = ROOT / "configs" / "small.yml"
    for override in (
        "rpe_num_buckets=8",
        "attention_config=[[[mamba], 12]]",
        "use_mup=true",
        "pos_emb=rpe",
    ):
        with pytest.raises(Exception, match="not supported yet"):
            load_config([base], overrides=[override])


def test_container_has_what_multi_node_runs_need() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    for needed in ("openmpi-bin", "pdsh", "openssh-client", "DS_BUILD_OPS=0", "-c constraints.txt", "USER neox"):
        assert needed in text
    copied = re.findall(r"^COPY --chown=\S+ (.+) \S+$", text, flags=re.MULTILINE)
    assert copied
    assert all((ROOT / name).exists() for names in copied for name in names.split())
    extras = re.search(r"^ARG EXTRAS=(\S+)", text, flags=re.MULTILINE)
    assert extras
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(extras[1].split(",")) <= project["optional-dependencies"].keys()


def test_hooks_name_files_and_tools_that_are_there() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for hook in hooks:
        tool = Path(hook["entry"].split()[0]).name
        assert tool == "python" or any(package.startswith(tool) for package in packages["dev"])
