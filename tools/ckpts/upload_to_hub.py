"""Upload an exported model to the Hugging Face Hub, after a check that the folder is whole.

python tools/ckpts/upload_to_hub.py exported organisation/model
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from neox.launch.arguments import Parser
from neox.launch.main import script_main
from neox.results import print_result


def main(arguments: list[str]) -> None:
    """Check, list, and upload unless told not to."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("input_dir", type=Path, help="folder that convert_neox_to_hf.py or save_hf wrote")
    add("repo_id", help="ORGANISATION/NAME; made if it is not there")
    add("revision", nargs="?", help="branch (default: main)")
    add("--message", help="of the commit")
    add("--public", action="store_true", help="a repository that is made is open to everybody")
    add("--dry-run", action="store_true", help="list what would be uploaded, and ask nobody")
    options = parser.parse_args(arguments)
    from neox.checkpoint.huggingface.hub import check_folder, check_repo_id, upload_folder

    check_repo_id(options.repo_id)
    files = check_folder(options.input_dir)
    if options.dry_run:
        for name, size in files.items():
            print_result(f"{size:>16,}  {name}")
        kind = "public" if options.public else "private"
        branch = options.revision or "main"
        print_result(
            f"would upload {len(files)} files, {sum(files.values()):,} bytes, to {options.repo_id} ({kind}) at {branch}"
        )
        return
    address = upload_folder(
        options.input_dir,
        options.repo_id,
        private=not options.public,
        revision=options.revision,
        message=options.message,
    )
    print_result(f"{options.input_dir}: {len(files)} files, {sum(files.values()):,} bytes, at {address}")


if __name__ == "__main__":
    sys.exit(script_main(main))
