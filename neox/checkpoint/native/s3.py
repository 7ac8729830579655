"""Copies of checkpoints in storage that speaks Amazon's S3.

Credentials, region and address of the store come from where boto3 looks for them: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_PROFILE, ~/.aws.
"""

import json
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from neox.checkpoint.native.lineage import Lineage
from neox.checkpoint.native.manifest import LATEST, MANIFEST, Manifest
from neox.checkpoint.native.store import Team
from neox.errors import CheckpointError, ConfigError, UserError
from neox.pulse import pulse

SCHEME = "s3://"
ATTEMPTS = 8
"""boto3 tries a request so often, and waits longer each time."""


class S3Folder:
    """A place in a bucket.

    Args:
        address: `s3://bucket/prefix`.
        part_bytes: files are uploaded in parts of this size, several at a time.
        attempts: how often a request is tried.

    Raises:
        ConfigError: boto3 is not installed.
    """

    def __init__(self, address: str, *, part_bytes: int, attempts: int = ATTEMPTS) -> None:
        try:
            import boto3
            from boto3.s3.transfer import TransferConfig
            from botocore.config import Config
            from botocore.exceptions import BotoCoreError
        except ImportError:
            raise ConfigError('s3_path: needs boto3; pip install "neox[s3]"') from None
        self.address = address
        self._bucket, _, prefix = address.removeprefix(SCHEME).partition("/")
        self._prefix = prefix.strip("/")
        self._parts = TransferConfig(multipart_threshold=part_bytes, multipart_chunksize=part_bytes)
        retries = {"mode": "standard", "total_max_attempts": attempts}
        try:
            self._client: Any = boto3.session.Session().client("s3", config=Config(retries=retries, connect_timeout=10))
        except (BotoCoreError, ValueError) as error:
            raise ConfigError(f"s3_path {address}: {error}; check AWS_ENDPOINT_URL, AWS_PROFILE and ~/.aws") from None
        # A store that takes connections and never answers costs a minute an attempt, and all together more than the
        # time in which every process must get on.
        self._client.meta.events.register("before-send.s3", lambda **_: pulse())

    def check(self) -> None:
        """See that the bucket can be reached.

        Raises:
            ConfigError: it cannot; says why.
        """
        problem = _problem(lambda: self._client.head_bucket(Bucket=self._bucket))
        if problem:
            raise ConfigError(
                f"s3_path {self.address}: bucket {self._bucket} cannot be used ({problem}); "
                "check its name, AWS_ENDPOINT_URL, and the credentials in AWS_ACCESS_KEY_ID or AWS_PROFILE"
            )

    def put_file(self, path: Path, key: str) -> None:
        """Upload a file. Raises what boto3 raises."""
        self._client.upload_file(str(path), self._bucket, self._key(key), Config=self._parts)

    def put_text(self, text: str, key: str) -> None:
        """Write an object. Raises what boto3 raises."""
        self._client.put_object(Bucket=self._bucket, Key=self._key(key), Body=text.encode())

    def others(self, root: str, lineage: Lineage, *, start: int | None) -> list[str]:
        """Names of the checkpoints below `root` that a run would come to and may not replace.

        Args:
            root: place in the store.
            lineage: the run.
            start: the iteration that it is resumed from; None for one that begins, which has none there.

        Raises:
            ConfigError: the store does not say.
        """
        found: list[str] = []

        def look() -> None:
            for number, place in sorted(self._checkpoints(root)):
                if start is None or (number > start and not self.may_replace(place, lineage)):
                    found.append(place)

        problem = _problem(look)
        if problem:
            raise ConfigError(f"s3_path {self.address}: cannot be listed ({problem}); its credentials need that right")
        return found

    def _checkpoints(self, root: str) -> Iterator[tuple[int, str]]:
        """Number and place of each checkpoint below `root`. Raises what boto3 raises."""
        begin = self._key(f"{root}/global_step")
        pages = self._client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self._bucket, Prefix=begin, Delimiter="/"):
            for entry in page.get("CommonPrefixes", ()):
                number = entry["Prefix"][len(begin) : -1]
                if number.isdecimal():
                    yield int(number), f"{root}/global_step{number}"

    def may_replace(self, place: str, lineage: Lineage) -> bool:
        """Whether a run may write a copy to `place`: nothing whole is there, or its own. Raises what boto3 raises."""
        key = self._key(f"{place}/{MANIFEST}")
        if not self._client.list_objects_v2(Bucket=self._bucket, Prefix=key, MaxKeys=1).get("KeyCount"):
            return True
        try:
            content = json.loads(self._client.get_object(Bucket=self._bucket, Key=key)["Body"].read())
            return lineage.includes(content.get("run", content["checksum"]))
        except (ValueError, KeyError, AttributeError, TypeError):
            return False

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name


def upload_checkpoint(folder: Path, target: S3Folder, team: Team) -> str | None:
    """Copy a native checkpoint to `target/<name of its root>/`; its manifest follows the files, and `latest` that.

    The first rank of each host uploads what the ranks of its host wrote. A copy of another run stays.

    Returns:
        Why it failed, the same on every rank; None if it did not.
    """
    root = folder.resolve().parent.name
    place = f"{root}/{folder.name}"

    def put(names: Iterable[str]) -> None:
        for name in names:
            target.put_file(folder / name, f"{place}/{name}")

    def put_last() -> None:
        put([MANIFEST])
        target.put_text(folder.name, f"{root}/{LATEST}")

    def check() -> None:
        if not target.may_replace(place, Lineage.of(Manifest.parse(folder))):
            raise CheckpointError(f"{place} there was written by another run and is not replaced")

    hosts = team.gather(socket.gethostname())
    problems = team.gather(_problem(check) if team.rank == 0 else None)
    if not any(problems):
        problems = team.gather(_problem(lambda: put(_own_files(folder, team.rank, hosts))))
    if not any(problems):
        problems = team.gather(_problem(put_last) if team.rank == 0 else None)
    return next((problem for problem in problems if problem), None)


def _own_files(folder: Path, rank: int, hosts: list[str]) -> list[str]:
    """What this rank is to upload, but for the manifest: the first rank also what is no rank's."""
    if hosts.index(hosts[rank]) != rank:
        return []
    writers = {name: int(name.split("-")[1]) for name in Manifest.parse(folder).by_file()}
    mine = [name for name, writer in writers.items() if hosts[writer] == hosts[rank]]
    if rank == 0:
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        mine += [name for name in names if name not in writers and name != MANIFEST]
    return mine


def _problem(work: Callable[[], object]) -> str | None:
    """Do something with the store; what went wrong in one line, if anything."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        work()
    except (Boto3Error, BotoCoreError, ClientError, OSError, UserError) as error:
        return " ".join(str(error).split())
    return None
