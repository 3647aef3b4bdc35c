"""Every setting with its meaning, default and range: frozen records that refuse unknown keys, and the one source of the example and the table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from bot.models import Limits, StateLabel

HIGHEST_PORT = 65_535
NOBODY = 65_534
MINUTES_A_DAY = 1440
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


def _repository_or_empty(name: str) -> str:
    return _repository(name) if name else name


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


_CRON_FIELDS = (("second", 0, 59), ("minute", 0, 59), ("hour", 0, 23), ("day", 1, 31), ("month", 1, 12), ("weekday", 0, 7))
_CRON_NAMES = {
    "month": ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"),
    "weekday": ("sun", "mon", "tue", "wed", "thu", "fri", "sat"),
}
_CRON_ITEM = re.compile(r"(?:\*|(?P<first>[0-9]{1,2}|[a-z]{3})(?:-(?P<last>[0-9]{1,2}|[a-z]{3}))?)(?:/(?P<step>[1-9][0-9]?))?")


def _cron(line: str) -> str:
    fields = line.split()
    remedy = 'write six fields, seconds first, in UTC, for example "0 */10 * * * *" for every ten minutes'
    if len(fields) != len(_CRON_FIELDS):
        raise UnfitError(f"'{line}' has {len(fields)} fields", remedy)
    for text, (name, low, high) in zip(fields, _CRON_FIELDS, strict=True):
        for item in text.casefold().split(","):
            match = _CRON_ITEM.fullmatch(item)
            ends = [_cron_number(end, name) for end in (match["first"], match["last"]) if end] if match else [-1]
            if not all(low <= end <= high for end in ends) or ends != sorted(ends):
                raise UnfitError(f"'{item}' is no {name} of a schedule", remedy)
    return " ".join(fields)


def _cron_number(text: str, field: str) -> int:
    names = _CRON_NAMES.get(field, ())
    if text.isdigit():
        return int(text)
    return names.index(text) + (field == "month") if text in names else -1


def _cron_or_empty(line: str) -> str:
    return _cron(line) if line.strip() else ""


def split_hours(text: str) -> tuple[int, int]:
    """First and last minute of the day of `22:00-06:00`; the end may lie on the next day. Raises UnfitError."""
    match = re.fullmatch(r"([01]?[0-9]|2[0-4]):([0-5][0-9])-([01]?[0-9]|2[0-4]):([0-5][0-9])", text.replace(" ", ""))
    first, last = (int(match[1]) * 60 + int(match[2]), int(match[3]) * 60 + int(match[4])) if match else (0, 0)
    if not match or first == last or max(first, last) > MINUTES_A_DAY:
        raise UnfitError(f"'{text}' are no hours", 'write HH:MM-HH:MM, for example "22:00-06:00"')
    return first, last


def _hours(text: str) -> str:
    split_hours(text)
    return text.replace(" ", "")


def _timezone(name: str) -> str:
    from zoneinfo import ZoneInfo

    try:
        ZoneInfo(name)
    except (ValueError, OSError, LookupError):
        raise UnfitError(f"'{name}' is no time zone", "write a name such as Europe/Berlin, or UTC") from None
    return name


def _issue(text: str) -> str:
    if text and not re.fullmatch(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+#[1-9][0-9]{0,8}", text):
        raise UnfitError(f"'{text}' is not an issue", "write OWNER/NAME#NUMBER, for example acme/ops#1")
    return text


def _session(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", name):
        raise UnfitError(f"'{name}' is no name of a tmux session", "write up to 40 letters, digits, - and _")
    return name


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
Cron = Annotated[str, AfterValidator(_cron)]
OptionalCron = Annotated[str, AfterValidator(_cron_or_empty)]
Hours = Annotated[str, AfterValidator(_hours)]
TimeZone = Annotated[str, AfterValidator(_timezone)]
OptionalIssue = Annotated[str, AfterValidator(_issue)]
Rank = Annotated[int, Field(ge=1, le=9)]
Profile = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Trigger = Literal["label", "command", "assignment", "mention"]
TRIGGERS: tuple[Trigger, ...] = ("label", "command", "assignment", "mention")


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

    def pages_url(self) -> str:
        """The address of the pages: `public_url`, without the `/webhook` that an operator may have written there."""
        return self.public_url.removesuffix("/webhook")

    def hook_url(self) -> str:
        """The address the hook posts to: `public_url` with `/webhook`, written once even where the operator wrote it already."""
        return self.pages_url() + "/webhook"


class MetricsSettings(Model):
    """The separate listener of /metrics, /healthz and /readyz."""

    listen: Listen = Field(
        default="127.0.0.1:9111", description="Address and port of /metrics, /healthz and /readyz; keep it off the internet."
    )


class PagesSettings(Model):
    """The web pages on the webhook's listener: the fleet, a sprint's transcript, help."""

    enabled: bool = Field(default=True, description="Whether there are pages, and links to them in comments.")
    visibility: Literal["repository", "token", "public"] = Field(
        default="repository",
        description="Who may read them. `repository`: whoever may read the repository on the forge (a private one's links carry a key); "
        "`token`: only with the access token or such a link; `public`: whoever reaches the listener.",
    )
    token_file: Path | None = Field(default=None, description="File (mode 0600) with the access token that opens every page.")


class TracingSettings(Model):
    """Traces of sprints by OpenTelemetry; off while `endpoint` is empty. Needs the extra `otel`."""

    endpoint: OptionalUrl = Field(
        default="",
        description="OTLP/HTTP address that takes traces, such as http://127.0.0.1:4318/v1/traces; empty: none, and nothing of OpenTelemetry is loaded.",
    )


class AlertSettings(Model):
    """The receiver /alerts on the metrics listener, which mirrors Alertmanager's alerts into issues; off while both keys are left out."""

    token_file: Path | None = Field(
        default=None,
        description="File (mode 0600) with the token that Alertmanager sends as bearer; without it the receiver is off.",
    )
    repository: Annotated[str, AfterValidator(_repository_or_empty)] = Field(
        default="", description="OWNER/NAME where the bot opens one issue an alert group; it may be one that the bot does not serve."
    )


class LauncherSettings(Model):
    """The backlog: which open issue is taken next while nobody asks. Off by default."""

    enabled: bool = Field(default=False, description="Whether the next suitable open issue is taken on a schedule.")
    schedule: Cron = Field(default="0 */10 * * * *", description="When a round is held: cron with six fields, seconds first, UTC.")
    per_round: int = Field(default=1, ge=1, le=100, description="Most issues taken in one round.")
    epic_labels: tuple[str, ...] = Field(
        default=("epic",), description="Labels of an issue that only holds others together; a title that begins with `[EPIC]` is the same."
    )
    study_labels: tuple[str, ...] = Field(default=("study",), description="Labels of an issue that people study first; `[STUDY]` likewise.")
    skip_labels: tuple[str, ...] = Field(
        default=(), description="Further labels of issues that are left alone, beside the top-level `skip_labels`."
    )
    priority_labels: dict[str, Rank] = Field(
        default={}, description="Rank of an issue by its label, 1 (first) to 9; without one it is 5. Within a rank the oldest goes first."
    )
    quiet_hours: tuple[Hours, ...] = Field(
        default=(), description='Hours in which nothing is taken, such as ["22:00-06:00"]; `timezone` says whose.'
    )
    timezone: TimeZone = Field(default="UTC", description="Time zone of the quiet hours.")
    max_attempts: int = Field(
        default=3, ge=1, le=100, description="Times an issue is taken before the bot gives up on it and says so there."
    )
    backoff_minutes: float = Field(
        default=60.0, gt=0, description="Distance to the next attempt after one that came to nothing (minutes); it doubles each time."
    )


class RepositoryLauncherSettings(Model):
    """The same for one repository; what is left out is as in `launcher`."""

    enabled: bool | None = Field(default=None, description="Whether issues are taken here.")
    schedule: OptionalCron = Field(default="", description="Rounds of this repository alone; empty: those of the fleet.")
    epic_labels: tuple[str, ...] | None = Field(default=None, description="As `launcher.epic_labels`.")
    study_labels: tuple[str, ...] | None = Field(default=None, description="As `launcher.study_labels`.")
    skip_labels: tuple[str, ...] | None = Field(default=None, description="As `launcher.skip_labels`.")
    priority_labels: dict[str, Rank] | None = Field(default=None, description="As `launcher.priority_labels`.")
    quiet_hours: tuple[Hours, ...] | None = Field(default=None, description="As `launcher.quiet_hours`.")
    timezone: TimeZone | None = Field(default=None, description="As `launcher.timezone`.")
    max_attempts: int | None = Field(default=None, ge=1, le=100, description="As `launcher.max_attempts`.")
    backoff_minutes: float | None = Field(default=None, gt=0, description="As `launcher.backoff_minutes`.")


class ReportSettings(Model):
    """The morning report."""

    issue: OptionalIssue = Field(
        default="", description="Issue that the report is posted to, OWNER/NAME#NUMBER of a served repository; empty: none is posted."
    )
    schedule: Cron = Field(default="0 0 6 * * *", description="When it is posted: cron with six fields, seconds first, UTC.")
    hours: int = Field(default=24, ge=1, le=720, description="The window it covers (hours).")


class LaneSettings(Model):
    """Workers in the panes of a tmux session, for who wants to see them work: `timmy-dispatch lanes up`."""

    workers: int = Field(
        default=2, ge=1, le=32, description="Panes that `lanes up` makes where no number is given, each an ordinary worker."
    )
    restart: Literal["never", "on_failure", "always"] = Field(
        default="on_failure",
        description="What happens to a lane whose worker ended by itself: `on_failure` starts it again after a crash, a kill or a vanished pane; "
        "`always` also after a fault of the configuration. What a person stopped is never started again.",
    )
    session: Annotated[str, AfterValidator(_session)] = Field(
        default="timmy-dispatch", description="Name of the tmux session, and of the tmux server's socket (in the state folder)."
    )
    check_seconds: float = Field(default=5.0, gt=0, description="How often `serve` looks after the panes (seconds).")
    backoff_seconds: float = Field(
        default=5.0,
        gt=0,
        description="Distance to the first restart of a lane (seconds); it doubles up to ten minutes while the lane keeps dying.",
    )
    snapshots: int = Field(default=50, ge=1, le=10_000, description="Snapshots of the panes that are kept in the state folder.")


class ExportSettings(Model):
    """Files for other programs, written from the database to the folder `exports` of the state folder."""

    enabled: bool = Field(default=True, description="Whether results.csv and one log file a sprint are written.")
    every_seconds: float = Field(default=60.0, gt=0, description="How often what is new is added (seconds).")


class CollectorSettings(Model):
    """Samples of the fleet and its machine: gauges for Prometheus, and metrics.jsonl, events.jsonl and last_state.json for other programs."""

    enabled: bool = Field(default=True, description="Whether the leader of this state folder takes samples.")
    every_seconds: float = Field(default=60.0, gt=0, le=3600, description="How often a sample is taken (seconds).")
    deadline_seconds: float = Field(
        default=10.0, gt=0, description="Time each source has to answer; one that has not is recorded as unknown (seconds)."
    )
    folder: Path | None = Field(
        default=None,
        description="Folder (mode 0700) of the files, never inside a git repository; left out: `telemetry` in the state folder.",
    )
    rotate_bytes: int = Field(default=16_777_216, ge=65_536, description="Size at which a file is set aside and a new one begun (bytes).")
    keep_files: int = Field(default=10, ge=1, description="Files set aside that are kept, of each kind.")
    repositories_a_sample: int = Field(
        default=4,
        ge=1,
        le=100,
        description="Most repositories that the forge is asked about in one sample; the others have their turn next.",
    )


class RetentionSettings(Model):
    """How long what is over is kept (days). The rows of sprints, intents, decisions and spend stay."""

    deliveries_days: float = Field(default=7.0, gt=0, description="Handled deliveries.")
    dead_letters_days: float = Field(default=30.0, gt=0, description="Deliveries that were given up.")
    replies_days: float = Field(default=30.0, gt=0, description="Replies that are shown in the forge.")
    workflows_days: float = Field(default=30.0, gt=0, description="Finished workflows of sprints.")
    schedules_days: float = Field(default=7.0, gt=0, description="Finished workflows of schedules.")
    journals_days: float = Field(
        default=30.0,
        ge=0,
        description="What the model and its tools said in a sprint that is over and whose pull request is not open any more; its steps, tokens "
        "and cost stay. 0: for ever.",
    )
    plans_days: float = Field(
        default=180.0,
        ge=0,
        description="Plans that were decided on, of issues where nothing is open, runs or has changed since. 0: for ever.",
    )
    follow_ups_days: float = Field(
        default=180.0, ge=0, description="The remarks and failures that follow-ups went by, of such issues. 0: for ever."
    )
    sprints_days: float = Field(
        default=400.0,
        ge=0,
        description="Single steps, last words and outputs of checks of sprints of such issues; the row with outcome, tokens and cost stays. What "
        "a report may ask for, a year, is kept in any case. 0: for ever.",
    )
    workspaces_days: float = Field(default=7.0, gt=0, description="Folders, and kept patches, of sprints that are over.")
    logs_days: float = Field(default=90.0, gt=0, description="Log files of sprints in `exports`.")
    verdicts_days: float = Field(default=366.0, gt=0, description="The history of the verdict on the fleet (stalls, pauses, ...).")


Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]


class PauseHoursSettings(Model):
    """Hours in which nothing new starts; what runs is finished, what waits is kept."""

    hours: Hours = Field(
        description="First and last minute, such as 22:00-06:00; the end may lie on the next day.", examples=["22:00-06:00"]
    )
    days: tuple[Day, ...] = Field(default=(), description="Days on which the hours begin, such as [sat, sun]; empty: every day.")
    timezone: TimeZone = Field(default="UTC", description="Time zone of the hours, such as Europe/Berlin.")
    reason: str = Field(default="", max_length=200, description="What people are told.")


class BreakerSettings(Model):
    """The automatic breaker: after failures in a row that are the fleet's own, nothing starts but one try at a time."""

    failures: int = Field(default=5, ge=0, le=50, description="Sprints in a row that must fail for no fault of their task; 0: no breaker.")
    scopes: tuple[Literal["fleet", "repository", "provider"], ...] = Field(
        default=("fleet", "repository"),
        description="What it watches and holds. The fleet's opens only where more than one repository failed, if repositories have their own.",
    )
    first_probe_seconds: float = Field(
        default=300.0, gt=0, description="Time until the first try (seconds); it doubles with each that fails."
    )
    max_probe_seconds: float = Field(default=3600.0, gt=0, description="Most time between two tries (seconds).")


def _policy(value: object) -> object:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value


ProbePolicy = Annotated[Literal["off", "watch", "act"], BeforeValidator(_policy)]
ModelName = Annotated[str, Field(max_length=200, pattern=r"^(?:[A-Za-z0-9][A-Za-z0-9_./:@+-]*)?$")]


class ExpectedModel(Model):
    """What a Hermes profile should run; an empty provider means that any will do."""

    provider: ModelName = Field(default="", description="Provider, as the profile's configuration names it.")
    model: ModelName = Field(min_length=1, description="Model.")


class WatchdogSettings(Model):
    """Probes that look at the fleet by the clock, and act on what they find only where told to."""

    enabled: bool = Field(default=True, description="Whether the probes run.")
    policy: dict[str, ProbePolicy] = Field(
        default={},
        description='What a probe may do, by its name, such as {"stuck": "act", "webhook": "off"}: `off`, `watch` (look and tell; the default), `act`.',
    )
    every_seconds: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={}, description="How often a probe looks, by its name (seconds), where that differs from its own period."
    )
    backoff_minutes: float = Field(
        default=60.0, gt=0, description="Least time between two actions on the same thing (minutes); it doubles with each, up to a day."
    )
    actions_per_hour: int = Field(default=6, ge=0, description="Most actions of all probes together in an hour; 0: none at all.")
    expect: dict[Profile, ExpectedModel] = Field(
        default={},
        description='Model that each Hermes profile should run, such as {"default": {"provider": "nous", "model": "hermes-4"}}; `default` is the root.',
    )
    hermes_home: Path | None = Field(
        default=None, description="Hermes' folder; left out: that of the provider with `from_hermes`, else $HERMES_HOME, else ~/.hermes."
    )
    stuck_minutes: float = Field(
        default=30.0,
        gt=0,
        description="Time without a step after which a sprint counts as stuck (minutes); checks get their own time on top.",
    )
    webhook_silent_minutes: float = Field(
        default=90.0, gt=0, description="Time without a delivery after which Gitea is asked for a test delivery (minutes)."
    )
    disk_warn_bytes: int = Field(
        default=5 * 1024**3, ge=0, description="Free space of the state folder below which the disk is a warning (bytes)."
    )
    disk_failing_bytes: int = Field(default=1024**3, ge=0, description="The same for failing (bytes).")
    prometheus_url: OptionalUrl = Field(
        default="", description="Address of Prometheus, such as http://127.0.0.1:9090; empty: it is not looked at."
    )
    alertmanager_url: OptionalUrl = Field(
        default="", description="Address of Alertmanager, such as http://127.0.0.1:9093; empty: it is not looked at."
    )


class FollowUpSettings(Model):
    """How the bot goes on with its own open pull requests, on the same branch."""

    reviews: bool = Field(default=True, description="Whether a review that requests changes starts a follow-up.")
    checks: bool = Field(default=True, description="Whether a red check on what the bot pushed starts a follow-up.")
    check_tries: int = Field(
        default=2, ge=1, le=10, description="Follow-ups by red checks of one issue in a row, before a person has to ask again."
    )
    settle_seconds: float = Field(
        default=20.0,
        ge=0,
        description="Time from the first red check to the look at all of them (seconds); while one is pending it begins anew.",
    )
    no_fix_label: str = Field(
        default="dispatch/no-fix",
        description="Label of an issue or a pull request whose red checks are left to people; it must not be exclusive.",
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
    allow_users: tuple[str, ...] = Field(
        default=(), description="Logins that count as writers here where the bot, not being an administrator, may not ask."
    )
    protected_paths: tuple[str, ...] = Field(default=(), description="Paths the agent may not change here, beside the built-in ones.")
    provider: str = Field(default="", description="Name of the provider to begin with here; empty: the first of the list.")
    fix_checks: bool | None = Field(
        default=None, description="Whether a red check starts a follow-up here; left out: as `follow_ups.checks`."
    )
    triggers: tuple[Trigger, ...] | None = Field(
        default=None, description="What starts a sprint here, where that differs from the top-level `triggers`."
    )
    roles: dict[str, Literal["read", "write", "admin", "operator"]] = Field(
        default={}, description="Level a command needs here, by its name, where that is higher than usual; a lower one changes nothing."
    )
    pause_hours: tuple[PauseHoursSettings, ...] = Field(
        default=(), description="Hours in which nothing new starts here, beside the top-level `pause_hours`."
    )
    plan_first: bool = Field(
        default=False,
        description="Whether what nobody writes a comment for (label, assignment, backlog) begins with a plan that a person approves.",
    )
    launcher: RepositoryLauncherSettings = Field(
        default=RepositoryLauncherSettings(),
        description="How the backlog of this repository is taken up, where that differs from `launcher`.",
    )


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
    pause_hours: tuple[PauseHoursSettings, ...] = Field(
        default=(), description="Hours in which this provider is passed over; it needs a `name`, and `from_hermes` has none."
    )
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
    tracing: TracingSettings = Field(default=TracingSettings(), description="Traces of sprints; off by default.")
    alerts: AlertSettings = Field(
        default=AlertSettings(), description="Where Alertmanager's alerts are mirrored as issues; off by default."
    )
    pages: PagesSettings = Field(default=PagesSettings(), description="The web pages, and who may read them.")
    trigger_label: Annotated[str, AfterValidator(_trigger)] = Field(default="dispatch", description="Label that starts a sprint.")
    triggers: tuple[Trigger, ...] = Field(
        default=TRIGGERS,
        description="What starts a sprint, beside the backlog: the label, `/dispatch` in a comment, assigning the issue to the bot's account, "
        "mentioning it in the issue's text.",
    )
    state_dir: Path = Field(description="Folder (mode 0700) for the database and the sprints' work.", examples=["/var/lib/timmy-dispatch"])
    database: Annotated[str, AfterValidator(_database)] = Field(
        default="", description="sqlite:/// or postgresql:// address; empty: a SQLite file in the state folder."
    )
    operators: tuple[str, ...] = Field(default=(), description="Logins that may use the operator's commands everywhere.")
    allow_users: tuple[str, ...] = Field(
        default=(),
        description="Logins that count as writers where the bot, not being an administrator of the repository, may not ask for levels.",
    )
    allow_bots: tuple[str, ...] = Field(default=(), description="Bot accounts that may trigger, if their access allows it.")
    limits: LimitSettings = Field(default=LimitSettings(), description="The most one sprint may use; a comment may only lower it.")
    queue: QueueSettings = Field(default=QueueSettings(), description="Who goes next, and how many at once.")
    pause_hours: tuple[PauseHoursSettings, ...] = Field(
        default=(), description="Hours in which nothing new starts anywhere; the fleet counts as paused."
    )
    breaker: BreakerSettings = Field(
        default=BreakerSettings(), description="What happens when sprints fail in a row for no fault of their tasks."
    )
    providers: tuple[ProviderSettings, ...] = Field(min_length=1, description="Model endpoints, tried in this order.")
    engine: str = Field(default="loop", min_length=1, description="Agent engine; `loop` is the built-in one.")
    sandbox: SandboxSettings = Field(default=SandboxSettings(), description="The wall round everything the model runs.")
    reconcile: ReconcileSettings = Field(default=ReconcileSettings(), description="How missed deliveries are found.")
    follow_ups: FollowUpSettings = Field(default=FollowUpSettings(), description="How the bot goes on with its own open pull requests.")
    launcher: LauncherSettings = Field(
        default=LauncherSettings(), description="The backlog: which open issue is taken next while nobody asks."
    )
    lanes: LaneSettings = Field(default=LaneSettings(), description="Workers in panes of tmux.")
    report: ReportSettings = Field(default=ReportSettings(), description="The morning report.")
    exports: ExportSettings = Field(default=ExportSettings(), description="results.csv and the log files of sprints.")
    collector: CollectorSettings = Field(default=CollectorSettings(), description="Samples of the fleet and its machine, every minute.")
    watchdog: WatchdogSettings = Field(
        default=WatchdogSettings(), description="Probes that look at the fleet by the clock, and act only where told to."
    )
    retention: RetentionSettings = Field(default=RetentionSettings(), description="How long what is over is kept.")
    timing: EngineSettings = Field(default=EngineSettings(), description="Leases, ticks and throttles; rarely touched.")
    protected_paths: tuple[str, ...] = Field(default=(), description="Paths the agent may not change anywhere, beside the built-in ones.")
    skip_labels: tuple[str, ...] = Field(
        default=("wontfix", "invalid", "duplicate", "question"),
        description="Labels of an issue that is not worked on unless somebody asks with `run force`.",
    )
    plan_hours: float = Field(
        default=72.0, gt=0, le=720, description="Time a plan waits for somebody's `/dispatch approve` before it is let go (hours)."
    )
    commands_per_comment: int = Field(default=5, ge=1, description="Most commands obeyed in one comment.")
    commands_per_person: int = Field(default=10, ge=1, description="Most commands of one person in `commands_window_minutes`.")
    commands_window_minutes: int = Field(default=10, ge=1, description="The window of that cap (minutes).")
    commit_trailer: str = Field(default="", description="Line added to every commit message, such as `Reviewed-by: nobody`.")

    def repository(self, full_name: str) -> RepositorySettings | None:
        """The settings of `owner/repo` (compared without case), or None where the bot does not serve it."""
        wanted = full_name.casefold()
        return next((repo for repo in self.repositories if repo.name.casefold() == wanted), None)

    def triggers_of(self, repository: RepositorySettings) -> tuple[Trigger, ...]:
        """What starts a sprint in one repository."""
        return self.triggers if repository.triggers is None else repository.triggers

    def launcher_of(self, repository: RepositorySettings) -> LauncherSettings:
        """The launcher's settings in one repository: those of the fleet, with what the repository says otherwise."""
        own = {name: value for name, value in repository.launcher if value not in (None, "")}
        return self.launcher.model_copy(update=own)

    def telemetry_dir(self) -> Path:
        """Where the collector writes."""
        return self.collector.folder or self.state_dir / "telemetry"

    def fixes_checks(self, repository: RepositorySettings) -> bool:
        """Whether red checks start follow-ups in one repository."""
        return self.follow_ups.checks if repository.fix_checks is None else repository.fix_checks

    def database_url(self) -> str:
        """The SQLAlchemy URL of the one database: what is configured, else a SQLite file in the state folder."""
        return self.database or f"sqlite:///{self.state_dir / 'timmy.db'}"


def record(annotation: Any) -> type[BaseModel] | None:
    """The settings record an annotation speaks of: itself, or the item of a tuple; None for plain values and for mappings by name."""
    if get_origin(annotation) is dict:
        return None
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return annotation if issubclass(annotation, BaseModel) else None
    return next((found for inner in get_args(annotation) if (found := record(inner))), None)
