"""timmy-dispatch: a label or a `/dispatch` comment on a Gitea issue becomes one sandboxed sprint and one pull request."""

__version__ = "0.1.0"
