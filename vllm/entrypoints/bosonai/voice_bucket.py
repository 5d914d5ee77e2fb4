"""Uploaded voices in a bucket of S3, or of a service that speaks its protocol.

Knows keys, conditional writes and what to do while the service does not answer. What records and
clips hold is the store's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from threading import Lock
from typing import Any, NoReturn

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from vllm.entrypoints.bosonai.voice_store import RECORD_FILE, is_voice_id
from vllm.exceptions import ConfigError, VoiceStoreError
from vllm.logger import get_logger

__all__ = ["BucketFiles"]

logger = get_logger(__name__)

_NUM_READERS = 8
_CONFIG = Config(
    connect_timeout=2.0,
    read_timeout=3.0,
    retries={"mode": "standard", "total_max_attempts": 2},
    max_pool_connections=2 * _NUM_READERS,
    # Services other than Amazon's often refuse the checksums that boto3 sends of itself.
    request_checksum_calculation="when_required",
    response_checksum_validation="when_required",
)
_PAUSE_S = 5.0  # between two questions to a service that does not answer
_MAX_CONFLICTS = 3
_DEBRIS_AGE = timedelta(hours=1)  # no upload takes this long
_NOT_FOUND, _CONFLICT, _PRECONDITION_FAILED = 404, 409, 412


class BucketFiles:
    """Two objects per voice: ``ID/VERSION.wav``, and ``ID/voice.json``, which makes it visible.

    The clip is written first and the record last, on the condition that there is none, so that a
    voice is there as a whole and one of several uploads wins. A clip belongs to one version, so a
    deletion never takes that of a later upload.

    Credentials, region and endpoint are found the way every program with boto3 finds them. Nothing
    is asked before the first use, and a service that fails is left alone for some seconds, so that
    only one caller at a time waits for it.

    Args:
        bucket: its name.
        prefix: of all keys, without slashes at its ends; empty for none.
        clock: monotonic seconds.

    Raises:
        ConfigError: boto3's own settings are wrong.
    """

    trust_s = 5.0

    def __init__(
        self, bucket: str, prefix: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._clock = clock
        self._lock = Lock()
        self._retry_at_s: float | None = None  # set while the service does not answer
        self._records: dict[str, tuple[str, bytes]] = {}  # id -> ETag and record, as last listed
        try:
            self._client = boto3.client("s3", config=_CONFIG)
        except (BotoCoreError, ValueError) as error:
            raise ConfigError(f"--voice-store s3://{bucket}: {error}") from error

    def records(self) -> dict[str, bytes]:
        etags = {
            voice_id: item["ETag"]
            for voice_id, name, item in self._listed()
            if name == RECORD_FILE and is_voice_id(voice_id)
        }
        known = self._records
        changed = [name for name, etag in etags.items() if known.get(name, ("",))[0] != etag]
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            fetched = dict(zip(changed, pool.map(self.record, changed), strict=True))
        self._records = {
            voice_id: (etag, record)
            for voice_id, etag in etags.items()
            if (record := fetched.get(voice_id) if voice_id in fetched else known[voice_id][1])
        }
        return {voice_id: record for voice_id, (_, record) in self._records.items()}

    def record(self, voice_id: str) -> bytes | None:
        return self._read(self._key(voice_id, RECORD_FILE))

    def clip(self, voice_id: str, version: str) -> bytes | None:
        return self._read(self._clip_key(voice_id, version))

    def create(self, voice_id: str, version: str, record: bytes, clip: bytes | None) -> bool:
        self._remove_debris()
        if self.record(voice_id) is not None:  # before a clip travels for nothing
            return False
        if clip is not None:
            self._ask("put_object", Key=self._clip_key(voice_id, version), Body=clip)
        if self._put_first(self._key(voice_id, RECORD_FILE), record):
            return True
        self._remove_clip(self._clip_key(voice_id, version))
        return False

    def remove(self, voice_id: str, version: str) -> bool:
        self._ask("delete_object", Key=self._key(voice_id, RECORD_FILE))
        self._remove_clip(self._clip_key(voice_id, version))
        return True

    def _put_first(self, key: str, record: bytes) -> bool:
        """Write a record where there is none; False if another one is there."""
        for _ in range(_MAX_CONFLICTS):
            try:
                self._ask("put_object", Key=key, Body=record, IfNoneMatch="*")
            except ClientError as error:
                if _status_of(error) == _CONFLICT:  # something else is happening to this key
                    continue
                break
            return True
        # An attempt whose answer was lost, and which boto3 made again, met its own record.
        return self._read(key) == record

    def _remove_clip(self, key: str) -> None:
        """Remove a clip without record; what cannot be removed now is debris later."""
        try:
            self._ask("delete_object", Key=key)
        except VoiceStoreError:
            logger.info("%s is left for a later upload to remove", key)

    def _remove_debris(self) -> None:
        """Remove old clips without a record: their upload or deletion broke off."""
        listed = list(self._listed())
        whole = {voice_id for voice_id, name, _ in listed if name == RECORD_FILE}
        newest = datetime.now(UTC) - _DEBRIS_AGE
        for voice_id, name, item in listed:
            if voice_id not in whole and name.endswith(".wav") and item["LastModified"] < newest:
                self._remove_clip(item["Key"])

    def _listed(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Voice id, file name and entry of every object that lies where voices lie."""
        page: dict[str, Any] = {"IsTruncated": True}
        start: dict[str, str] = {}
        while page["IsTruncated"]:
            page = self._ask("list_objects_v2", Prefix=self._prefix, **start)
            for item in page.get("Contents", ()):
                voice_id, _, name = item["Key"].removeprefix(self._prefix).partition("/")
                if is_voice_id(voice_id):
                    yield voice_id, name, item
            start = {"ContinuationToken": page.get("NextContinuationToken", "")}

    def _read(self, key: str) -> bytes | None:
        try:
            body: bytes = self._ask("get_object", Key=key)["Body"]
        except ClientError:
            return None
        return body

    def _ask(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """One request, with its body read.

        Raises:
            ClientError: the service answered that a key, or a condition, does not hold.
            VoiceStoreError: it refused for another reason, or did not answer.
        """
        self._check_is_up()
        try:
            reply: dict[str, Any] = getattr(self._client, operation)(
                Bucket=self._bucket, **arguments
            )
            if "Body" in reply:
                reply["Body"] = reply["Body"].read()
        except ClientError as error:
            status = _status_of(error)
            self._note(is_up=status < 500)
            is_answer = status in (_NOT_FOUND, _CONFLICT, _PRECONDITION_FAILED)
            if is_answer and error.response["Error"]["Code"] != "NoSuchBucket":
                raise
            self._fail(error)
        except BotoCoreError as error:
            self._note(is_up=False)
            self._fail(error)
        self._note(is_up=True)
        return reply

    def _check_is_up(self) -> None:
        """Refuse at once while the service is left alone; when that ends, one caller tries."""
        with self._lock:
            if self._retry_at_s is None:
                return
            now_s = self._clock()
            if now_s < self._retry_at_s:
                raise VoiceStoreError(_FAILURE)
            self._retry_at_s = now_s + _PAUSE_S

    def _note(self, *, is_up: bool) -> None:
        with self._lock:
            self._retry_at_s = None if is_up else self._clock() + _PAUSE_S

    def _fail(self, error: Exception) -> NoReturn:
        logger.error("voice store s3://%s/%s: %s", self._bucket, self._prefix, error)
        raise VoiceStoreError(_FAILURE) from error

    def _key(self, voice_id: str, name: str) -> str:
        return f"{self._prefix}{voice_id}/{name}"

    def _clip_key(self, voice_id: str, version: str) -> str:
        return self._key(voice_id, f"{version}.wav")


_FAILURE = "this server cannot use its voice store, a bucket, at present; see its log"


def _status_of(error: ClientError) -> int:
    status: int = error.response["ResponseMetadata"]["HTTPStatusCode"]
    return status
