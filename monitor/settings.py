"""Every setting of Anchorwatch, read from ANCHORWATCH_* variables; all that is wrong is told at once, with the cure.

It knows nothing of what the settings do. The installation key lives here too, since it is a setting that makes itself.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import secrets
import tempfile
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import platformdirs
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from monitor.address import REDIS_SCHEMES, kafka_servers, redis_address
from monitor.database import sqlite_path, sqlite_url
from monitor.errors import ConfigurationError

__all__ = ["Settings", "installation_key", "load_settings"]

PREFIX = "ANCHORWATCH_"
KEY_FILE = "installation.key"
KEY_BYTES = 32


def _known_log(url: str) -> str:
    """Refuse a URL that no log serves; empty is the default's place-holder."""
    if urlsplit(url).scheme == "kafka":
        try:
            kafka_servers(url)
        except ConfigurationError as error:
            raise ValueError(error.cure) from error
    elif url:
        try:
            sqlite_path(url)
        except ConfigurationError as error:
            raise ValueError(f"must be a Kafka, such as kafka://host1:9092,host2:9092, or {error.cure}") from error
    return url


def _known_store(url: str) -> str:
    """The same for the store, which may be a Redis, too."""
    if urlsplit(url).scheme in REDIS_SCHEMES:
        try:
            redis_address(url)
        except ConfigurationError as error:
            raise ValueError(error.problem) from error
    elif url:
        try:
            sqlite_path(url)
        except ConfigurationError as error:
            raise ValueError(f"must be a Redis, such as redis://host:6379/0, or {error.cure}") from error
    return url


def _long_enough(key: SecretStr | None) -> SecretStr | None:
    if key is not None and len(key.get_secret_value()) < KEY_BYTES:
        raise ValueError(f"must have at least {KEY_BYTES} characters; `openssl rand -hex {KEY_BYTES}` makes one")
    return key


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


LogUrl = Annotated[str, AfterValidator(_known_log)]
StoreUrl = Annotated[str, AfterValidator(_known_store)]


class Settings(BaseSettings):
    """All settings. The variable of each is its name in capitals behind ANCHORWATCH_; an empty one counts as unset."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="forbid")

    data_dir: Path = Field(
        default_factory=lambda: platformdirs.user_data_path("anchorwatch"),
        description="Directory of the embedded log and store, and of the installation key.",
    )
    log_url: LogUrl = Field(
        default="",
        description="Where records wait: sqlite:///absolute/path, or kafka://host1:9092,host2:9092. By default log.db "
        "in the data directory.",
    )
    kafka_group: str = Field(
        default="anchorwatch",
        min_length=1,
        max_length=249,
        description="Consumer group of the workers of one store. Another store on the same topic needs another, and "
        "must have no dispatcher: what one has told is noted for all.",
    )
    kafka_security_protocol: Annotated[
        Literal["plaintext", "ssl", "sasl_plaintext", "sasl_ssl"], BeforeValidator(_lower)
    ] = Field(
        default="plaintext",
        description="What Kafka's listener speaks: plaintext, ssl, sasl_plaintext or sasl_ssl; ssl is Kafka's TLS.",
    )
    kafka_sasl_mechanism: Annotated[
        Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] | None, BeforeValidator(_upper)
    ] = Field(
        default=None,
        description="How we prove who we are: SCRAM-SHA-512, SCRAM-SHA-256, OAUTHBEARER, or PLAIN, which needs TLS.",
    )
    kafka_username: str = Field(default="", description="Kafka user; for OAUTHBEARER the client's id.")
    kafka_password: SecretStr | None = Field(
        default=None, description="Password of the Kafka user; for OAUTHBEARER the client's secret."
    )
    kafka_password_file: Path | None = Field(default=None, description="File with that password, instead of it.")
    kafka_token_file: Path | None = Field(
        default=None, description="File that something else keeps filled with a valid token, for OAUTHBEARER."
    )
    kafka_token_url: str = Field(
        default="", description="Address where a token is had for the client's id and secret, https, for OAUTHBEARER."
    )
    kafka_token_scope: str = Field(default="", description="Scope that such a token is asked for, if any.")
    kafka_ca_file: Path | None = Field(
        default=None,
        description="PEM file of the authority that signed the brokers' certificates. By default the system's.",
    )
    kafka_cert_file: Path | None = Field(
        default=None, description="PEM file of our own certificate, where the brokers want one."
    )
    kafka_key_file: Path | None = Field(default=None, description="PEM file of that certificate's private key.")
    kafka_compression: Annotated[Literal["none", "gzip", "lz4", "zstd"], BeforeValidator(_lower)] = Field(
        default="zstd", description="How records are compressed on their way: none, gzip, lz4 or zstd."
    )
    kafka_append_seconds: float = Field(
        default=15.0,
        ge=1,
        le=300,
        allow_inf_nan=False,
        description="How long Kafka may take to acknowledge records before it counts as away, and they are sent again.",
    )
    kafka_session_seconds: float = Field(
        default=10.0,
        ge=6,
        le=300,
        allow_inf_nan=False,
        description="How long a worker may give no sign of life before others take over its partitions.",
    )
    kafka_partitions: int = Field(
        default=12,
        ge=1,
        le=10_000,
        description="How many partitions the topic of projections is made with: the most workers it can ever have.",
    )
    kafka_replication: int = Field(
        default=3, ge=1, le=9, description="How many copies of each record the topics are made with."
    )
    kafka_retention_days: float = Field(
        default=7.0,
        ge=1,
        le=3650,
        allow_inf_nan=False,
        description="How long the topic of projections keeps records: the longest outage, and how far back a store can "
        "be rebuilt. Dead letters are kept four times as long.",
    )
    store_url: StoreUrl = Field(
        default="",
        description="Where results are kept: sqlite:///absolute/path, redis://host:6379/0, "
        "redis+sentinel://host1:26379,host2:26379/service or redis+cluster://host1:6379,host2:6379; rediss for TLS. By "
        "default store.db in the data directory.",
    )
    store_password_file: Path | None = Field(
        default=None, description="File with the password of the Redis of the store. By default the URL's, if any."
    )
    store_sentinel_password_file: Path | None = Field(
        default=None, description="File with the password of the sentinels themselves. By default they want none."
    )
    store_ca_file: Path | None = Field(
        default=None,
        description="PEM file of the authority that signed the Redis's certificate. By default the system's.",
    )
    store_ttl_seconds: float = Field(
        default=604_800.0,
        ge=60,
        allow_inf_nan=False,
        description="How long Redis keeps a conversation after its last response. Longer than the session gap.",
    )
    trajectory_points: int = Field(
        default=256, ge=1, le=100_000, description="How many responses of a conversation the store keeps for people."
    )
    installation_key: Annotated[SecretStr | None, AfterValidator(_long_enough)] = Field(
        default=None,
        description="Secret, at least 32 characters, from which conversation ids are derived. All collectors of one "
        "installation need the same. By default made once and kept in the data directory.",
    )
    cache_dir: Path | None = Field(
        default=None,
        description="Directory of converted model weights, about 0.5 GB each. By default the user's cache directory.",
    )
    deployment: str | None = Field(
        default=None,
        min_length=1,
        max_length=256,
        description="Name of the population that responses are judged against. By default the model's name.",
    )
    queue_size: int = Field(
        default=10_000, ge=1, le=10_000_000, description="How many projections a collector may hold in memory."
    )
    when_full: Literal["drop_newest", "drop_oldest", "block", "spool"] = Field(
        default="drop_newest",
        description="What a collector does when its queue is full: drop_newest, drop_oldest, block, which slows "
        "generation down, or spool, which keeps on disk what the log does not take.",
    )
    spool_dir: Path | None = Field(
        default=None,
        description="Directory of a collector's spool, on a local disk; each collector needs its own. By default spool "
        "in the data directory.",
    )
    spool_max_bytes: int = Field(
        default=2**30, ge=2**20, description="How large a collector's spool may grow; a projection takes about 1.5 KB."
    )
    api_host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address that the HTTP interface listens on. One that other machines can reach needs keys.",
    )
    api_port: int = Field(default=8080, ge=0, le=65535, description="Port of the HTTP interface; 0 takes a free one.")
    api_keys_file: Path | None = Field(
        default=None,
        description="File of the HTTP interface's keys, made by `anchorwatch keys create`. By default api-keys.json in "
        "the data directory.",
    )
    api_tls_certificate: Path | None = Field(
        default=None, description="PEM file of the HTTP interface's certificate chain. By default it has no TLS."
    )
    api_tls_key: Path | None = Field(default=None, description="PEM file of that certificate's private key.")
    api_rate: float = Field(
        default=5_000.0,
        gt=0,
        allow_inf_nan=False,
        description="Requests and projections a second that one key of the HTTP interface may send, over time.",
    )
    api_max_items: int = Field(
        default=1_000, ge=1, le=10_000, description="How many projections one HTTP request may bring."
    )
    api_max_body_bytes: int = Field(
        default=4 * 2**20, ge=1024, le=2**30, description="How many bytes the body of one HTTP request may have."
    )
    api_queue_bytes: int = Field(
        default=64 * 2**20, ge=2**20, description="How many bytes all HTTP requests under way may hold in memory."
    )
    api_patience_seconds: float = Field(
        default=10.0,
        gt=0,
        le=300,
        allow_inf_nan=False,
        description="How long an HTTP request waits for the log before it is answered with 503.",
    )
    page_url: str = Field(
        default="",
        pattern=r"^(https?://\S+)?$",
        description="Where people reach the web page; with https its cookies travel over TLS only.",
    )
    page_conversation_url: str = Field(
        default="",
        pattern=r"^(https?://\S*\{conversation_id\}\S*)?$",
        description="Address of a conversation in your log viewer, with {conversation_id} in it: the page links there.",
    )
    page_runbook_url: str = Field(
        default="",
        pattern=r"^(https?://\S*\{kind\}\S*)?$",
        description="Address of the runbook for a kind of finding, with {kind} in it: the page links there.",
    )
    metrics_port: int | None = Field(
        default=None, ge=1, le=65535, description="Port of the Prometheus metrics. By default they are not served."
    )
    metrics_sessions: int = Field(
        default=20,
        ge=0,
        le=20,
        description="How many of the riskiest conversations each worker's metrics name; 0 names none.",
    )
    otlp_endpoint: str = Field(
        default="",
        pattern=r"^(https?://[^\s/]+/\S+)?$",
        description="Where OTLP/HTTP log records are taken, the whole address, such as http://localhost:4318/v1/logs: "
        "workers send each response's score there. By default they send none.",
    )
    otlp_headers_file: Path | None = Field(
        default=None, description="File with headers for it, such as its key: one `name: value` a line."
    )
    otlp_ca_file: Path | None = Field(
        default=None, description="PEM file of the authority that signed its certificate. By default the usual ones."
    )
    otlp_rate: float = Field(
        default=1_000.0,
        gt=0,
        le=100_000,
        allow_inf_nan=False,
        description="Scores a second that one worker sends at most; those that warn are sent beyond it.",
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error", "critical"], BeforeValidator(_lower)] = Field(
        default="info", description="Least severe log line to write: debug, info, warning, error or critical."
    )
    log_format: Annotated[Literal["json", "console"], BeforeValidator(_lower)] = Field(
        default="console", description="Form of log lines: console for people, json for machines."
    )
    session_gap_seconds: float = Field(
        default=86_400.0,
        gt=0,
        allow_inf_nan=False,
        description="A silence longer than this, in event time, starts a conversation anew.",
    )
    page_max_age_seconds: float = Field(
        default=3600.0,
        gt=0,
        allow_inf_nan=False,
        description="A finding older than this pages nobody, unless its episode is still open once the worker has "
        "caught up.",
    )
    alerts_file: Path | None = Field(
        default=None,
        description="File of rules and routes, YAML: whom to tell of what. By default alerts are written to standard "
        "output.",
    )
    batch_size: int = Field(default=500, ge=1, le=10_000, description="How many records a worker folds in one commit.")
    fleet_watch: bool = Field(
        default=True, description="Whether the worker that keeps house looks for shifts of whole deployments."
    )
    fleet_tolerance: float = Field(
        default=0.2,
        gt=0,
        le=5,
        allow_inf_nan=False,
        description="Least move of a deployment's mean that is told as a shift, in standard deviations of its "
        "baseline.",
    )
    fleet_lateness_seconds: float = Field(
        default=120.0,
        ge=0,
        le=86_400,
        allow_inf_nan=False,
        description="How long after its end a minute of the fleet waits for responses that are still on their way.",
    )
    fleet_patience_seconds: float = Field(
        default=600.0,
        gt=0,
        allow_inf_nan=False,
        description="How long the fleet's minutes wait for a partition that lags and does not move.",
    )

    def _kafka(self) -> list[str]:
        """All at once: whoever sets up Kafka's security has several of these to get right."""
        problems = []
        sasl, tls = self.kafka_security_protocol.startswith("sasl"), self.kafka_security_protocol.endswith("ssl")
        mechanism = self.kafka_sasl_mechanism
        if sasl and mechanism is None:
            problems.append("kafka_security_protocol with SASL needs kafka_sasl_mechanism")
        if mechanism is not None and not sasl:
            problems.append("kafka_sasl_mechanism needs kafka_security_protocol=sasl_ssl")
        if mechanism == "PLAIN" and not tls:
            problems.append(
                "kafka_sasl_mechanism=PLAIN sends the password for everybody to read: set "
                "kafka_security_protocol=sasl_ssl, or use SCRAM-SHA-512"
            )
        if mechanism == "OAUTHBEARER" and not tls:
            problems.append("kafka_sasl_mechanism=OAUTHBEARER sends the token for everybody to read: use sasl_ssl")
        if self.kafka_password is not None and self.kafka_password_file is not None:
            problems.append("kafka_password and kafka_password_file are one too many")
        password = self.kafka_password is not None or self.kafka_password_file is not None
        if mechanism == "OAUTHBEARER":
            if (self.kafka_token_file is None) == (not self.kafka_token_url):
                problems.append("OAUTHBEARER needs kafka_token_file or kafka_token_url, and not both")
            if self.kafka_token_url and not (self.kafka_username and password):
                problems.append(
                    "kafka_token_url needs kafka_username and kafka_password_file: the client's id and secret"
                )
        elif mechanism is not None and not (self.kafka_username and password):
            problems.append(f"kafka_sasl_mechanism={mechanism} needs kafka_username and kafka_password_file")
        if (self.kafka_cert_file is None) != (self.kafka_key_file is None):
            problems.append("kafka_cert_file and kafka_key_file go together; give both, or neither")
        if not tls and (self.kafka_ca_file or self.kafka_cert_file):
            problems.append("kafka_ca_file and kafka_cert_file need TLS: kafka_security_protocol=ssl or sasl_ssl")
        return problems

    @model_validator(mode="after")
    def _together(self) -> Settings:
        self.data_dir = self.data_dir.expanduser().absolute()
        self.log_url = self.log_url or sqlite_url(self.data_dir / "log.db")
        self.store_url = self.store_url or sqlite_url(self.data_dir / "store.db")
        problems = self._kafka()
        if (self.api_tls_certificate is None) != (self.api_tls_key is None):
            problems.append("api_tls_certificate and api_tls_key go together; give both, or neither")
        if self.api_queue_bytes < self.api_max_body_bytes + 1024:
            problems.append("api_queue_bytes must have room for one whole body, api_max_body_bytes, and 1 KiB")
        if self.store_ttl_seconds <= self.session_gap_seconds:
            problems.append("store_ttl_seconds must be longer than session_gap_seconds: a silence ends there first")
        if self.log_url == self.store_url:
            problems.append("log_url and store_url name one file; give each its own")
        if problems:
            raise ValueError("\n".join(problems))
        return self


def load_settings() -> Settings:
    """The settings of this process.

    Raises:
        ConfigurationError: lists every wrong value and every ANCHORWATCH_* variable that is no setting.
    """
    names = {PREFIX + name.upper() for name in Settings.model_fields}
    problems = []
    for variable in sorted(os.environ):
        if variable.upper().startswith(PREFIX) and variable.upper() not in names:
            near = difflib.get_close_matches(variable.upper(), names, n=1)
            problems.append(f"{variable}: no such setting" + (f"; did you mean {near[0]}?" if near else ""))
    settings = None
    try:
        settings = Settings()
    except ValidationError as error:
        for problem in error.errors(include_url=False, include_context=False):
            problems += _told(problem["loc"], problem["msg"], problem["input"]).split("\n")
    if settings is None or problems:
        raise ConfigurationError(
            f"{len(problems)} setting{'s are' if len(problems) > 1 else ' is'} wrong:\n  - " + "\n  - ".join(problems),
            cure="correct or unset the variables named above",
        )
    return settings


_FIELDS = re.compile(rf"\b({'|'.join(sorted(Settings.model_fields, key=len, reverse=True))})\b")


def _told(location: tuple[int | str, ...], message: str, value: object) -> str:
    """One problem in a line, or several of several settings. A secret's value is never repeated, nor a URL that may
    hold one."""
    text = message.removeprefix("Value error, ")
    if not location:  # about several: each by the name that people set it by
        return _FIELDS.sub(lambda found: PREFIX + found[0].upper(), text)
    text = text[0].lower() + text[1:]
    field = str(location[0])
    secret = field in ("installation_key", "kafka_password") or "@" in str(value)
    got = "" if secret else f" (got {value!r})"
    return f"{PREFIX}{field.upper()}: {text}{got}"


def installation_key(settings: Settings) -> bytes:
    """The key from which conversation ids are derived; made at the first call and kept, readable by its owner only.

    Raises:
        ConfigurationError: the key file can't be written, is readable by others, or is damaged. It is never replaced
            silently, because every derived conversation id would change.
    """
    if settings.installation_key is not None:
        return settings.installation_key.get_secret_value().encode()
    path = settings.data_dir / KEY_FILE
    try:
        if not path.exists():
            _make_key(path)
        mode = path.stat().st_mode
        text = path.read_text(encoding="ascii").strip()
        key = bytes.fromhex(text)
    except OSError as error:
        raise ConfigurationError(
            f"the installation key {path} can't be read or made: {error.strerror}",
            cure="let this user write to ANCHORWATCH_DATA_DIR, or set ANCHORWATCH_INSTALLATION_KEY",
        ) from error
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigurationError(
            f"the installation key {path} is damaged",
            cure="restore it from a copy. Deleting it makes a new one, and every conversation id derived from now on "
            "differs from the old ones",
        ) from None
    if os.name == "posix" and mode & 0o077:
        raise ConfigurationError(f"other users can read the installation key {path}", cure=f"chmod 600 {path}")
    return key


def _make_key(path: Path) -> None:
    """Write a whole key and then give it its name, so that two processes at their first start agree on one."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=KEY_FILE)  # 0600
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(KEY_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())
        # A link fails where the name is taken; a rename would put a second key in the first one's place.
        with contextlib.suppress(FileExistsError):
            os.link(name, path)
    finally:
        Path(name).unlink()
