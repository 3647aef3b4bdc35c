"""The rules on a tree and the secret scan, on values alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bot.workspace.errors import GitRefused, GitUnavailable
from bot.workspace.hostgit import branch_ref, classify, sha
from bot.workspace.policy import Change, judge, link_fault, matches, printable
from bot.workspace.secrets_scan import PATTERNS, added_lines, scan_patch, scan_text

MODES = {"A": ("000000", "100644"), "M": ("100644", "100644"), "D": ("100644", "000000")}


def rules(path, *, status="A", protected=(), links=None, old=None, new=None, size=1, allow=False):
    modes = MODES[status]
    change = Change(path, old or modes[0], new or modes[1], status, size)
    found = judge([change], links=links or {}, protected=protected, allow_protected=allow)
    return [v.rule for v in found.violations], found.flagged


@pytest.mark.parametrize("status", ["A", "M", "D"])
@pytest.mark.parametrize(
    "path",
    [
        ".gitea/workflows/ci.yml",
        ".GITEA/x",
        ".github/workflows/ci.yml",
        ".GitHub/CODEOWNERS",
        ".forgejo/workflows/a.yaml",
        ".woodpecker.yml",
        ".woodpecker/build.yml",
        ".Woodpecker.YAML",
        ".dispatch.yml",
        ".DISPATCH.yml",
        ".gitlab-ci.yml",
        ".drone.yml",
        "Jenkinsfile",
        "jenkinsfile",
        ".gitmodules",
        "a/b/.gitmodules",
        ".gitattributes",
        "sub/.GitAttributes",
        ".lfsconfig",
        "docs/CODEOWNERS",
        ".github/x. ",
        ".git\u200bhub/x",
        "\uff0egithub/x",
        "deploy/prod/x",
        "secret.pem",
        "a/secret.pem",
        "infra/main.tf",
    ],
)
def test_protected(path, status):
    protected = ("deploy/", "*.pem", "infra/*.tf")
    found, _ = rules(path, status=status, protected=protected)
    assert "protected" in found
    found, flagged = rules(path, status=status, protected=protected, allow=True)
    assert "protected" not in found
    assert flagged == [path]


@pytest.mark.parametrize(
    "path", ["src/github/x", "x/.github/y", "gitea/x", "README.md", "woodpecker.md", "deployment/x", "dispatch.yml", "x/infra/main.tf"]
)
def test_not_protected(path):
    assert rules(path, protected=("deploy/", "infra/*.tf")) == ([], [])


@pytest.mark.parametrize(
    "path", ["AGENTS.md", "sub/CLAUDE.md", ".vscode/tasks.json", ".envrc", "Makefile", "package.json", ".husky/pre-commit"]
)
def test_flagged(path):
    assert rules(path) == ([], [path])


def test_modes_sizes_and_names():
    assert rules("sub", old="160000", new="000000", status="D")[0] == ["submodule"]
    assert rules("sub", new="160000")[0] == ["submodule"]
    assert rules("x", new="100600")[0] == ["mode"]
    assert rules("x", size=5 * 1024**2)[0] == []
    assert rules("x", size=5 * 1024**2 + 1)[0] == ["size"]
    for name in ("a\nb", "a\x1b[31m", "a\x7f", "a\u202egnp.exe", "caf\udce9"):
        assert rules(name)[0] == ["name"]
        assert printable(name).isprintable()
    assert rules("café/文.txt") == ([], [])
    assert [v.rule for v in judge([], links={}, protected=(), allow_protected=False).violations] == ["empty"]


@pytest.mark.parametrize(
    ("path", "target", "fine"),
    [
        ("a", "b", True),
        ("a", "b/c", True),
        ("d/a", "../b", True),
        ("d/e/a", "../../b", True),
        ("d/a", "./../b", True),
        ("a", "../b", False),
        ("d/a", "../../b", False),
        ("a", "/etc/passwd", False),
        ("a/b/t", "s/../x", False),
        ("a", "", False),
        ("a", ".git/config", False),
        ("d/a", "../.GIT/hooks/x", False),
        ("a", "b\nc", False),
    ],
)
def test_links(path, target, fine):
    assert (link_fault(path, target) == "") is fine


@given(st.text(), st.text())
def test_matching_never_raises(path, pattern):
    matches(path, pattern)
    printable(path)
    link_fault(path, pattern)


def test_names_git_would_take():
    assert branch_ref("dispatch/issue-1") == "refs/heads/dispatch/issue-1"
    assert branch_ref("feature/ü#1") == "refs/heads/feature/ü#1"
    for name in ("", "-x", "a..b", "a b", "a:b", "a\nb", "a.lock", "/a", "a/", "a//b", "a@{1}", "a^", ".a", "a/.b", "@", "*", "x" * 201):
        with pytest.raises(GitRefused):
            branch_ref(name)
    for text in ("", "HEAD", "--upload-pack=x", "a" * 39, "A" * 40, "a" * 40 + "\n", "g" * 40):
        with pytest.raises(ValueError, match="object id"):
            sha(text)


PLANTED = {
    "GitHub token": ["ghp_" + "a1B2" * 9, "github_pat_" + "a1B2" * 15],
    "GitLab token": ["glpat-" + "x1Y2" * 5],
    "AWS key": ["AKIA" + "ABCDEFGH23456722"],
    "Anthropic key": ["sk-ant-api03-" + "aB3_" * 8],
    "OpenAI key": ["sk-proj-" + "aB3d" * 12],
    "Slack token": ["xoxb-1234567890-abcdefghij"],
    "Google key": ["AIza" + "a1B2c" * 7],
    "JSON web token": ["eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P"],
    "private key": ["-----BEGIN RSA PRIVATE KEY-----", "-----BEGIN OPENSSH PRIVATE KEY-----", "-----BEGIN PRIVATE KEY-----"],
    "credentials in an address": ["https://bob:hunter22@example.org/x.git", "postgres://u:s3cretpw@db/x"],
    "authorization header": ['"Authorization": "Bearer abcdef0123456789abcdef"', "authorization: token 0123456789abcdef0123"],
    "npm token": ["npm_" + "aB3d" * 9],
    "PyPI token": ["pypi-AgEIcHlwaS5vcmc" + "aB3d" * 15],
    "Stripe key": ["sk_live_" + "aB3d" * 6],
    "Hugging Face token": ["hf_" + "aBcD" * 9],
    "quoted secret": ["password = 'correct1horse2battery'", '"api_key": "0123456789abcdef"', "SECRET: 'abcdefgh1234'"],
}
INNOCENT = [
    'password = "changeme"',
    "token = os.environ['GITEA_TOKEN_1']",
    'password = "${DB_PASSWORD_123456}"',
    "https://example.org:8080/path@v1",
    "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "-----BEGIN PUBLIC KEY-----",
    "ask-questions-about-the-thing-and-then-more-of-it",
    "def token(self) -> str:",
    "the password is 'a very long sentence 1'",
    "https://user:${TOKEN}@example.org",
    "Authorization: Bearer <token>",
]


def test_planted_secrets_are_found():
    assert set(PLANTED) == {kind for kind, _ in PATTERNS}
    for kind, texts in PLANTED.items():
        for text in texts:
            assert scan_text(f"x {text} y") == kind, text
    for text in INNOCENT:
        assert scan_text(text) == "", text


def test_scan_counts_lines_and_is_not_fooled_by_content():
    secret = PLANTED["npm token"][0]
    patch = (
        "diff --git a/one b/one\n--- a/one\n+++ b/one\n@@ -3,2 +3,4 @@ f\n-old\n+++ b/fake\n+@@ -1 +1,99 @@\n kept\n+" + secret + "\n"
        "diff --git a/two b/two\nnew file mode 100644\n--- /dev/null\n+++ b/two\n@@ -0,0 +1 @@\n+"
        + "z" * 50_000
        + " "
        + secret
        + "\n\\ No newline at end of file\n"
        "diff --git a/three b/three\n--- a/three\n+++ b/three\n@@ -1 +0,0 @@\n-" + secret + "\n"
    ).encode()
    assert [(hit.path, hit.line, hit.kind) for hit in scan_patch(patch)] == [("one", 6, "npm token"), ("two", 1, "npm token")]
    assert secret not in repr(scan_patch(patch))


@given(st.binary(max_size=300))
def test_reading_a_patch_never_raises(data):
    list(added_lines(b"@@ -1,9 +1,9 @@\n" + data))


@pytest.mark.parametrize(
    ("stderr", "kind"),
    [
        ("fatal: unable to access 'https://git.example/acme/archived-SSL.git/': Could not resolve host: git.example", "unavailable"),
        ("fatal: unable to access 'https://git.example/a/error: 500.git/': The requested URL returned error: 403", "permission"),
        (
            "remote: This repo is archived. You can view files and clone it, but cannot push.\nfatal: unable to access 'https://x/a/b.git/': The requested URL returned error: 403",
            "archived",
        ),
        (
            "remote: error: User permission denied for writing.\nTo https://x/a/b.git\n ! [remote rejected] 1 -> 2 (pre-receive hook declined)",
            "permission",
        ),
        ("remote: error: branch main is protected from force push\n", "protected"),
        ("remote: error: bot is not allowed to push to branch main", "protected"),
        ("remote: Repository not found\nfatal: repository 'https://x/a/b.git/' not found", "not_found"),
        ("fatal: Authentication failed for 'https://x/a/b.git/'", "auth"),
        ("error: RPC failed; HTTP 502 curl 22 The requested URL returned error: 502", "unavailable"),
        ("fatal: the remote end hung up unexpectedly", "unavailable"),
        ("fatal: unable to access 'https://x/': The requested URL returned error: 301", "moved"),
        (" ! [rejected] a -> b (stale info)", "other"),
        ("", "other"),
    ],
)
def test_what_git_says(stderr, kind):
    fault = classify(stderr)
    assert ("unavailable" if isinstance(fault, GitUnavailable) else fault.kind) == kind
    assert str(fault)
