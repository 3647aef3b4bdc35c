"""Every setting with its meaning, default and range: frozen records that refuse unknown keys, and the one source of the example and the table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from bot.models import Limits, StateLabel

HIGHEST_PORT = 65_535
NOBODY = 65_534
DATABASES = ("sqlite:///", "postgresql://", "postgresql+psycopg://")


class UnfitError(ValueError):
    """A value that has the right type and still cannot be used; `remedy` says what to write instead."""

    def __init__(self, fault: str, remedy: str) -> None:
        self.remedy = remedy
        super().__init__(fault)


def split_listen(listen: str) -> tuple[str, int]:
    """Host and port of `127.0.0.1:8080` or `[::1]:8080`; port 0 lets the system choose. Raises UnfitError."""
    host, colon, port = listen.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not host or (":" in host and not bracketed) or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > HIGHEST_PORT:
        raise UnfitError(f"'{listen}' is not an address to listen on", "write HOST:PORT, for example 127.0.0.1:8080 or [::1]:8080")
    return host.strip("[]"), int(port)


def _listen(listen: str) -> str:
    split_listen(listen)
    return listen


def _url(url: str) -> str:
    try:
        parts = urlsplit(url)
        fit = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        fit, parts = False, urlsplit("")
    if not fit:
        raise UnfitError(f"'{url}' is not a web address", "write it with its scheme, for example https://git.example.org")
    if parts.username is not None or parts.password is not None:
        raise UnfitError(
            "the address carries a user name or a password", "take them out of the address; the token belongs in a file of its own"
        )
    if parts.query or parts.fragment:
        raise UnfitError(f"'{url}' carries a query or a fragment", "write only scheme, host, port and path")
    return url.rstrip("/")


def _url_or_empty(url: str) -> str:
    return _url(url) if url else url


def _repository(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+", name):
        raise UnfitError(f"'{name}' is not a repository", "write OWNER/NAME, for example acme/rocket")
    return name


def _trigger(label: str) -> str:
    if not label.strip() or label in set(StateLabel):
        raise UnfitError(f"'{label}' cannot be the trigger label", "take a name of its own; the labels dispatch/... tell the state")
    return label


def _database(url: str) -> str:
    if url and not url.startswith(DATABASES):
        raise UnfitError(
            "this database is not supported", "write sqlite:////absolute/path.db or postgresql://user@host/name, or leave it out"
        )
    return url


def _user(uid: int) -> int:
    if uid == NOBODY:
        raise UnfitError(
            "65534 is the user `nobody`, whom other services share", "take a number nobody else uses; the default 61184 will do"
        )
    return uid


Listen = Annotated[str, AfterValidator(_listen)]
Url = Annotated[str, AfterValidator(_url)]
OptionalUrl = Annotated[str, AfterValidator(_url_or_empty)]
RepositoryName = Annotated[str, AfterValidator(_repository)]


class Model(BaseModel):
    """Settings are frozen and unknown keys are faults."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class ForgeSettings(Model):
    """The Gitea or Forgejo server."""

    url: Url = Field(description="Address at which the bot calls the server.", examples=["https://git.example.org"])
    public_url: OptionalUrl = Field(default="", description="Address people click, where it differs from `url`.")
    token_file: Path | None = Field(
        default=None,
        description="File (mode 0600) with the access token of the bot's own account; scopes write:issue, write:repository, read:user.",
        examples=["gitea.token"],
    )
    ca_file: Path | None = Field(default=None, description="Certificate of a private authority that signed the server's certificate (PEM).")


class WebhookSettings(Model):
    """Where deliveries come in."""

    listen: Listen = Field(default="127.0.0.1:8080", description="Address and port the bot listens on for Gitea's deliveries.")
    public_url: Url = Field(
        default="http://127.0.0.1:8080",
        description="Address of that listener as Gitea and people reach it; the hook posts to its path /webhook.",
    )
    secret_files: tuple[Path, ...] = Field(
        default=(),
        description="Files (mode 0600) with the webhook secret; several are accepted at once while you rotate.",
        examples=[["webhook.secret"]],
    )
    max_body_bytes: int = Field(
        default=8_388_608, ge=65_536, le=67_108_864, description="Largest delivery accepted (bytes); a larger one is answered 413."
    )
    read_timeout_seconds: float = Field(default=10.0, gt=0, le=120, description="Time a delivery may take to arrive (seconds).")

    def hook_url(self) -> str:
        """The address the hook posts to: `public_url` with `/webhook`, written once even where the operator wrote it already."""
        return self.public_url if self.public_url.endswith("/webhook") else self.public_url + "/webhook"


class MetricsSettings(Model):
    """The separate listener of /metrics, /healthz and /readyz."""

    listen: Listen = Field(
        default="127.0.0.1:9111", description="Address and port of /metrics, /healthz and /readyz; keep it off the internet."
    )


class RepositorySettings(Model):
    """One repository the bot serves, and what it narrows or grants there."""

    name: RepositoryName = Field(description="OWNER/NAME.", examples=["acme/rocket"])
    base_branch: str = Field(
        default="", description="Branch to work from and to open pull requests against; empty: the repository's default branch."
    )
    max_running: int = Field(default=1, ge=1, description="Most sprints at once in this repository.")
    max_open_prs: int = Field(default=0, ge=0, description="Most open pull requests of the bot before it waits; 0: no limit.")
    checks: tuple[str, ...] = Field(
        default=(),
        description="Commands run in the sandbox before a pull request counts as ready, one after the other.",
        examples=[["make test"]],
    )
    checks_timeout_seconds: int = Field(default=1800, ge=1, description="Time all checks together may take (seconds).")
    allow_users: tuple[str, ...] = Field(default=(), description="Logins that may trigger here even without write access.")
    protected_paths: tuple[str, ...] = Field(default=(), description="Paths the agent may not change here, beside the built-in ones.")
    provider: str = Field(default="", description="Name of the provider to begin with here; empty: the first of the list.")


class LimitSettings(Model):
    """The most one sprint may use. 0 USD means that money is not limited (a model without a price)."""

    steps: int = Field(default=60, ge=1, description="Most model calls of one sprint.")
    minutes: float = Field(default=45.0, gt=0, description="Most working time of one sprint (minutes).")
    tokens: int = Field(default=2_000_000, ge=1000, description="Most tokens of one sprint, input and output together.")
    usd: float = Field(default=5.0, ge=0, description="Most money of one sprint (USD); 0: not limited, for models without a price.")

    def limits(self) -> Limits:
        """The same in seconds, as a noun of the model."""
        return Limits(steps=self.steps, seconds=int(self.minutes * 60), tokens=self.tokens, usd=self.usd)


class QueueSettings(Model):
    """Who goes next."""

    slots: int = Field(default=2, ge=1, le=256, description="Sprints one process runs at once.")
    max_running: int = Field(default=0, ge=0, description="Most sprints at once over all processes; 0: no limit beside the slots.")
    max_per_repository: int = Field(default=1, ge=1, description="Most sprints at once in any one repository.")
    max_attempts: int = Field(default=3, ge=1, description="Attempts of a sprint whose worker died, before it has failed.")
    usd_per_day: float = Field(default=0.0, ge=0, description="Money all sprints together may use a day (USD); 0: no limit.")
    ageing_minutes: int = Field(default=240, ge=1, description="Waiting time that lifts a sprint by one priority (minutes).")


class PriceSettings(Model):
    """USD per million tokens."""

    input: float = Field(default=0.0, ge=0, description="USD per million input tokens.")
    output: float = Field(default=0.0, ge=0, description="USD per million output tokens.")
    cached: float | None = Field(
        default=None, ge=0, description="USD per million input tokens read from the provider's cache; left out: as `input`."
    )


class ProviderSettings(Model):
    """One entry of the chain: an OpenAI-compatible endpoint, or `from_hermes: true`, which unfolds in its place."""

    name: str = Field(default="", description="Name in comments, metrics and `repositories[].provider`; empty: taken from the address.")
    base_url: OptionalUrl = Field(
        default="", description="OpenAI-compatible endpoint, with its /v1 where it has one.", examples=["http://127.0.0.1:11434/v1"]
    )
    model: str = Field(default="", description="Model to ask for.", examples=["qwen3-coder:30b"])
    key_file: Path | None = Field(default=None, description="File (mode 0600) with the API key; leave it out for a server that needs none.")
    key_env: str = Field(default="", description="Environment variable with the API key; a file is safer.")
    headers: dict[str, str] = Field(default={}, description="Further HTTP headers of every call; never a key.")
    extra_body: dict[str, object] = Field(default={}, description="Further members of the request body, for what only this server knows.")
    context_window: int = Field(default=131_072, ge=1024, description="Tokens the model can take in.")
    max_output_tokens: int = Field(default=8192, ge=64, description="Most tokens of one answer.")
    price: PriceSettings = Field(default=PriceSettings(), description="What it costs; without a price the money limit cannot hold.")
    idle_seconds: float = Field(default=300.0, gt=0, description="Silence after which a call is given up (seconds).")
    call_seconds: float = Field(default=900.0, gt=0, description="Most time of one call (seconds).")
    from_hermes: bool = Field(
        default=False, description="Take address, model and key from the Hermes login of this machine instead; nothing of it is changed."
    )
    hermes_home: Path | None = Field(default=None, description="Hermes' folder; left out: $HERMES_HOME, else ~/.hermes.")


class SandboxSettings(Model):
    """The wall round everything the model runs."""

    kind: Literal["bubblewrap", "none"] = Field(
        default="bubblewrap", description="`none` runs the model's commands without a wall: every comment and pull request will say so."
    )
    user: Annotated[int, AfterValidator(_user)] = Field(
        default=61_184, ge=1, description="Numeric user the model's commands run as when the service runs as root; never 0."
    )
    command_seconds: int = Field(default=120, ge=1, description="Time of one command (seconds).")
    memory_bytes: int = Field(default=8 * 1024**3, ge=1024**2, description="Address space of one process (bytes).")
    processes: int = Field(default=256, ge=1, description="Processes of one sandbox.")
    cpu_seconds: int = Field(default=300, ge=1, description="CPU time of one process (seconds).")
    open_files: int = Field(default=1024, ge=16, description="Open files of one process.")
    file_bytes: int = Field(default=256 * 1024**2, ge=1024, description="Size of one file (bytes).")
    tmp_bytes: int = Field(default=256 * 1024**2, ge=1024**2, description="Size of /tmp and of the home folder inside (bytes each).")
    workspace_bytes: int = Field(default=1024**3, ge=1024**2, description="Size of the work tree with its .git (bytes).")
    workspace_inodes: int = Field(default=200_000, ge=100, description="Files and folders in the work tree.")
    output_bytes: int = Field(default=8 * 1024**2, ge=1024, description="Output after which a command is ended (bytes).")
    read_only_paths: tuple[Path, ...] = Field(default=(), description="Folders of this machine the model may read, such as a tool chain.")


class ReconcileSettings(Model):
    """How often the forge is asked for what no webhook announced."""

    every_seconds: float = Field(default=300.0, gt=0, description="How often the forge is asked for what no delivery announced (seconds).")
    poll_seconds: float = Field(default=15.0, gt=0, description="The same while deliveries cannot reach the bot (seconds).")
    leave_to_webhook_seconds: float = Field(default=120.0, ge=0, description="What is younger is left to its delivery (seconds).")
    ask_after_seconds: float = Field(default=86_400.0, gt=0, description="What is older is asked about instead of run (seconds).")


class EngineSettings(Model):
    """Leases, ticks and throttles. Operators rarely touch them."""

    beat_seconds: float = Field(default=5.0, gt=0, description="How often a worker shows that it lives (seconds).")
    lease_seconds: float = Field(default=30.0, gt=0, description="Silence after which a worker counts as dead (seconds).")
    tick_seconds: float = Field(default=1.0, gt=0, description="How often the queue is looked at (seconds).")
    progress_seconds: float = Field(default=3.0, ge=0, description="Least time between two edits of a status comment (seconds).")
    queue_poll_seconds: float = Field(default=0.2, gt=0, description="How often a free slot asks for work (seconds).")
    stall_after_seconds: float = Field(
        default=600.0, gt=0, description="Time without progress after which the fleet counts as stalled (seconds)."
    )
    shutdown_seconds: float = Field(default=10.0, gt=0, description="Time running sprints get to stop at a shutdown (seconds).")


class Settings(Model):
    """The whole configuration; see `dispatch.example.yml` for every key with its meaning."""

    forge: ForgeSettings = Field(description="The Gitea or Forgejo server.")
    repositories: tuple[RepositorySettings, ...] = Field(
        min_length=1, description="The repositories the bot serves; it ignores all others."
    )
    webhook: WebhookSettings = Field(default=WebhookSettings(), description="Where Gitea's deliveries come in.")
    metrics: MetricsSettings = Field(default=MetricsSettings(), description="What Prometheus and health checks read.")
    trigger_label: Annotated[str, AfterValidator(_trigger)] = Field(default="dispatch", description="Label that starts a sprint.")
    state_dir: Path = Field(description="Folder (mode 0700) for the database and the sprints' work.", examples=["/var/lib/timmy-dispatch"])
    database: Annotated[str, AfterValidator(_database)] = Field(
        default="", description="sqlite:/// or postgresql:// address; empty: a SQLite file in the state folder."
    )
    operators: tuple[str, ...] = Field(default=(), description="Logins that may use the operator's commands everywhere.")
    allow_users: tuple[str, ...] = Field(default=(), description="Logins that may trigger in every repository even without write access.")
    allow_bots: tuple[str, ...] = Field(default=(), description="Bot accounts that may trigger, if their access allows it.")
    limits: LimitSettings = Field(default=LimitSettings(), description="The most one sprint may use; a comment may only lower it.")
    queue: QueueSettings = Field(default=QueueSettings(), description="Who goes next, and how many at once.")
    providers: tuple[ProviderSettings, ...] = Field(min_length=1, description="Model endpoints, tried in this order.")
    engine: str = Field(default="loop", min_length=1, description="Agent engine; `loop` is the built-in one.")
    sandbox: SandboxSettings = Field(default=SandboxSettings(), description="The wall round everything the model runs.")
    reconcile: ReconcileSettings = Field(default=ReconcileSettings(), description="How missed deliveries are found.")
    timing: EngineSettings = Field(default=EngineSettings(), description="Leases, ticks and throttles; rarely touched.")
    protected_paths: tuple[str, ...] = Field(default=(), description="Paths the agent may not change anywhere, beside the built-in ones.")
    commands_per_comment: int = Field(default=5, ge=1, description="Most commands obeyed in one comment.")
    commands_per_person: int = Field(default=10, ge=1, description="Most commands of one person in `commands_window_minutes`.")
    commands_window_minutes: int = Field(default=10, ge=1, description="The window of that cap (minutes).")
    commit_trailer: str = Field(default="", description="Line added to every commit message, such as `Reviewed-by: nobody`.")

    def repository(self, full_name: str) -> RepositorySettings | None:
        """The settings of `owner/repo` (compared without case), or None where the bot does not serve it."""
        wanted = full_name.casefold()
        return next((repo for repo in self.repositories if repo.name.casefold() == wanted), None)

    def database_url(self) -> str:
        """The SQLAlchemy URL of the one database: what is configured, else a SQLite file in the state folder."""
        return self.database or f"sqlite:///{self.state_dir / 'timmy.db'}"


def record(annotation: Any) -> type[BaseModel] | None:
    """The settings record an annotation speaks of: itself, or the item of a tuple; None for plain values."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return annotation if issubclass(annotation, BaseModel) else None
    return next((found for inner in get_args(annotation) if (found := record(inner))), None)
