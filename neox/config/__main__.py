"""Look at configurations: `python -m neox.config check FILES... [key=value...]`, and `show`, `docs`, `schema`.

check     every mistake of the files, each with its line
show      what they resolve to, with the place that each value comes from
docs      rewrite the generated pages: docs/configuration.md, docs/layouts.md, configs/schema.json
schema    print the JSON Schema of a configuration file
schedule  draw the learning rate of every step, and the batch size where it grows
layouts   print the table of legal layouts as markdown
"""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from neox import results
from neox.config import (
    Config,
    deepspeed_dict,
    json_schema,
    load_config,
    reference,
    resolve_config_paths,
    schedule_plot,
    show,
    split_overrides,
)
from neox.config.layouts import markdown
from neox.errors import ConfigError, UserError
from neox.files import require_apart
from neox.patience import path_mistake
from neox.results import EXIT_BROKEN_PIPE, HelpParser, print_result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 2 for a user's mistake."""
    try:
        options = _read(arguments)
        run: Callable[[argparse.Namespace], None] = options.run
        run(options)
        results.finish()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:
        results.drop()  # the reader, `head` say, has seen enough
        return EXIT_BROKEN_PIPE
    except OSError as error:
        mistake = path_mistake(error)
        if mistake is None:
            raise
        print(mistake, file=sys.stderr)
        return mistake.exit_status
    return 0


class _Parser(HelpParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help")


def _read(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # What follows a flag that stands between files.
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(options, "items")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.items = [*getattr(options, "items", []), *rest]
    return options


def _paths(options: argparse.Namespace) -> list[Path]:
    files, _ = split_overrides(options.items)
    if not files:
        raise ConfigError("no configuration file given; example: python -m neox.config check configs/small.yml")
    return resolve_config_paths(files, options.conf_dir)


def _override_paths(options: argparse.Namespace) -> list[Path]:
    return resolve_config_paths(options.override, options.conf_dir)


def _load(options: argparse.Namespace) -> Config:
    _, overrides = split_overrides(options.items)
    return load_config(
        _paths(options),
        overrides=overrides,
        override_files=_override_paths(options),
        world_size=options.world_size,
    )


def _check(options: argparse.Namespace) -> None:
    config = _load(options)
    if config.parallel.world_size is not None and config.batch.train_batch_size:
        deepspeed_dict(config)
    for notice in config.notices:
        print_result(notice)
    print_result(f"valid: {', '.join(map(str, _paths(options)))}")


def _show(options: argparse.Namespace) -> None:
    config = _load(options)
    for notice in config.notices:
        print(notice, file=sys.stderr)
    if options.yaml:
        print_result(show.as_yaml(config, only_given=options.given), end="")
        return
    rows = show.rows(config, only_given=options.given)
    print_result(show.as_json(rows) if options.json else show.table(rows), end="")


def _schedule(options: argparse.Namespace) -> None:
    if options.png is not None:
        require_apart(Path(options.png), [*_paths(options), *_override_paths(options)])
    config = _load(options)
    print_result(schedule_plot.draw(config), end="")
    if options.png is not None:
        schedule_plot.save_png(config, options.png)
        print_result(f"written: {options.png}")


def _docs(options: argparse.Namespace) -> None:
    for path, text in reference.pages().items():
        name = path.relative_to(reference.ROOT)
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            print_result(f"{name}: up to date")
        elif options.check:
            raise ConfigError(f"{name}: stale; run make docs")
        else:
            path.write_text(text, encoding="utf-8")
            print_result(f"{name}: rewritten")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m neox.config", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_files(commands.add_parser("check", help="check configuration files and print every mistake"), _check)
    shown = commands.add_parser("show", help="print the resolved configuration with the source of each value")
    _add_files(shown, _show)
    shown.add_argument("--given", action="store_true", help="only what the files and the command line set")
    form = shown.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object")
    form.add_argument("--yaml", action="store_true", help="a file that resolves to the same configuration")
    schedule = commands.add_parser("schedule", help="draw the learning rate and the batch size over the iterations")
    _add_files(schedule, _schedule)
    schedule.add_argument("--png", default=None, metavar="PATH", help="draw it into this file too; needs matplotlib")
    docs = commands.add_parser("docs", help="rewrite the generated pages")
    docs.add_argument("--check", action="store_true", help="fail when a page is stale, and write nothing")
    docs.set_defaults(run=_docs)
    schema = commands.add_parser("schema", help="print the JSON Schema of a configuration file")
    schema.set_defaults(run=lambda options: print_result(json_schema.text(), end=""))
    layouts = commands.add_parser("layouts", help="print the table of legal layouts as markdown")
    layouts.set_defaults(run=lambda options: print_result(markdown(), end=""))
    return parser


def _add_files(command: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None]) -> None:
    command.add_argument("items", nargs="+", metavar="FILE|key=value")
    command.add_argument("-d", "--conf_dir", default=None, help="folder of the files")
    command.add_argument(
        "--override", action="append", default=[], metavar="FILE", help="a file whose keys replace those of the others"
    )
    command.add_argument("--world-size", type=int, default=None, help="number of processes to check the layout for")
    command.set_defaults(run=run)


if __name__ == "__main__":
    results.open_streams()
    results.claim()
    sys.exit(main())
