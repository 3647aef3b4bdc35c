"""`./dev` reads as POSIX sh, the locked requirements are whole and name no host, and a second run asks for nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LISTS = ("requirements.txt", "requirements-dev.txt")


def requirements(name: str) -> dict[str, tuple[str, list[str]]]:
    """Version and hashes by package."""
    found: dict[str, tuple[str, list[str]]] = {}
    for entry in (ROOT / name).read_text().replace("\\\n", " ").splitlines():
        match = re.match(r"([a-z0-9][a-z0-9._-]*)(?:\[[^]]*\])?==([^\s;]+)", entry)
        if match:
            found[match[1]] = (match[2], re.findall(r"--hash=sha256:([0-9a-f]{64})\b", entry))
        else:
            assert not entry.strip(), entry
    return found


@pytest.mark.parametrize("name", LISTS)
def test_every_requirement_is_pinned_and_hashed(name):
    found = requirements(name)
    assert len(found) > 20
    assert [package for package, (_, hashes) in found.items() if not hashes] == []


@pytest.mark.parametrize("name", LISTS)
def test_the_lists_name_no_address(name):
    assert not re.search(r"://|^\s*(-i|--index|--extra-index|--find-links|--trusted-host)", (ROOT / name).read_text(), re.MULTILINE)


def test_the_developers_list_holds_the_other_one():
    both = requirements("requirements-dev.txt")
    assert {package: version for package, (version, _) in requirements("requirements.txt").items()}.items() <= {
        package: version for package, (version, _) in both.items()
    }.items()


def test_what_the_project_asks_for_is_locked():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())

    def names(entries):
        return {re.match(r"[A-Za-z0-9._-]+", entry)[0].lower().replace("_", "-") for entry in entries}

    assert names(project["project"]["dependencies"]) <= set(requirements("requirements.txt"))
    assert names(project["dependency-groups"]["dev"]) <= set(requirements("requirements-dev.txt"))


@pytest.mark.parametrize("script", ["dev", ".ci/run"])
def test_the_scripts_are_posix_sh(script):
    path = ROOT / script
    assert path.read_text().startswith("#!/bin/sh\n")
    assert path.stat().st_mode & 0o111
    for shell in ("sh", "dash"):
        if shutil.which(shell):
            subprocess.run([shell, "-n", str(path)], check=True)


def test_help_lists_every_task_and_nothing_else_is_one():
    shown = subprocess.run([str(ROOT / "dev"), "--help"], cwd="/", capture_output=True, text=True, check=True).stdout
    assert all(f"\n  {task} " in shown for task in ("demo", "test", "check", "bench", "lock"))
    refused = subprocess.run([str(ROOT / "dev"), "nonsense"], cwd="/", capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "usage:" in refused.stderr


def copy(tmp_path: Path) -> Path:
    """A checkout in a folder with a space, without packages."""
    root = tmp_path / "a checkout"
    root.mkdir()
    for name in ("dev", *LISTS):
        shutil.copy(ROOT / name, root / name)
    return root


def prepared(root: Path) -> Path:
    """The same with a virtual environment as a first run leaves it; its Python writes down how it was called."""
    python = root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" >> '{root}/calls'\n")
    python.chmod(0o755)
    digest = subprocess.run(
        "cat requirements.txt requirements-dev.txt | sha256sum | cut -d ' ' -f 1",
        shell=True,
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for kind in ("run", "dev"):
        (root / ".venv" / f".stamp-{kind}").write_text(f"{digest}{root.resolve()}\n")
    return root


def test_a_second_run_goes_straight_to_its_task(tmp_path):
    root = prepared(copy(tmp_path))
    done = subprocess.run(
        [str(root / "dev"), "demo", "--once", "two words"],
        cwd="/",
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": "/x"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert (root / "calls").read_text().split("\n") == ["-c", "", "-P", "-m", "bot", "demo", "--once", "two words", ""]


@pytest.mark.parametrize(
    ("failed", "second", "exit_code", "runs"),
    [([], 0, 0, 1), (["a.py::one"], 0, 0, 2), (["a.py::one"], 1, 1, 2), (["a.py::one", "b.py::two", "c.py::x", "d.py::y"], 0, 1, 1)],
    ids=["all pass", "one passes alone", "one fails again", "too many to try again"],
)
def test_few_failures_get_a_second_try_and_are_named(tmp_path, failed, second, exit_code, runs):
    root = prepared(copy(tmp_path))
    cache = root / ".pytest_cache" / "v" / "cache"
    listed = json.dumps(dict.fromkeys(failed, True), indent=2)
    tools = root / ".venv" / "bin"
    for name in ("ruff", "mypy", "lint-imports"):
        (tools / name).write_text("#!/bin/sh\n")
    (tools / "pytest").write_text(
        f"""#!/bin/sh
printf '%s\\n' "$*" >> '{root}/runs'
case "$*" in *--last-failed*) exit {second} ;; esac
mkdir -p '{cache}'
[ -z '{failed[0] if failed else ""}' ] || {{ cat > '{cache}/lastfailed' <<'END'
{listed}
END
exit 1; }}
"""
    )
    for name in ("ruff", "mypy", "lint-imports", "pytest"):
        (tools / name).chmod(0o755)
    done = subprocess.run([str(root / "dev"), "test", "-k", "x"], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == exit_code, done.stderr
    called = (root / "runs").read_text().splitlines()
    assert called == ["-n 4 --dist worksteal -k x", "--last-failed -k x"][:runs]
    assert ("UNSTABLE" in done.stderr) == (runs == 2 and exit_code == 0)
    assert runs == 1 or all(name in done.stderr for name in failed)


def test_a_moved_checkout_and_a_changed_list_are_set_up_anew(tmp_path):
    root = prepared(copy(tmp_path))
    (root / "requirements.txt").write_text("# changed\n")
    tools = tools_without(tmp_path, "python3", "git", "sudo", "apt-get", "bwrap")
    done = subprocess.run([str(root / "dev"), "demo"], cwd="/", env={"PATH": str(tools)}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "setting up (once)" in done.stderr


def tools_without(tmp_path: Path, *missing: str) -> Path:
    """A folder with the programs every machine has, but for these."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in (
        "sh",
        "cat",
        "cut",
        "sha256sum",
        "cmp",
        "mktemp",
        "rm",
        "dirname",
        "date",
        "grep",
        "sleep",
        "tail",
        "id",
        "ls",
        "env",
        "install",
        "chmod",
        "git",
        "bwrap",
    ):
        if name not in missing and (path := shutil.which(name)):
            (tools / name).symlink_to(path)
    return tools


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        (
            ("git", "python3"),
            ["needed and missing: git python3 python3-venv", "this is no Debian system", "remedy: apt install git python3 python3-venv"],
        ),
        (("python3",), ["needed and missing: python3 python3-venv", "remedy: apt install python3 python3-venv"]),
    ],
)
def test_what_cannot_be_installed_is_named_with_its_remedy(tmp_path, missing, says):
    root = copy(tmp_path)
    tools = tools_without(tmp_path, *missing)
    done = subprocess.run([str(root / "dev"), "test"], cwd="/", env={"PATH": str(tools)}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert all(line in done.stderr for line in says), done.stderr
    assert not (root / ".venv").exists()


def test_no_right_to_install_is_told_apart(tmp_path):
    root = copy(tmp_path)
    tools = tools_without(tmp_path, "python3", "id", "git")
    for name, text in {"apt-get": "exit 99", "id": "echo 1000", "sudo": "exit 1"}.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    done = subprocess.run([str(root / "dev"), "demo"], cwd="/", env={"PATH": str(tools)}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no right to install" in done.stderr


def test_packages_are_installed_with_sudo_where_it_asks_nothing(tmp_path):
    root = copy(tmp_path)
    tools = tools_without(tmp_path, "python3", "id", "git", "install", "bwrap")
    log = tmp_path / "sudo.log"
    scripts = {"apt-get": "exit 0", "id": "echo 1000", "sudo": f'shift; [ "$1" = true ] || printf "%s\\n" "$*" >> "{log}"'}
    for name, text in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    (tools / "true").symlink_to("/bin/true")
    done = subprocess.run([str(root / "dev"), "demo"], cwd="/", env={"PATH": str(tools)}, capture_output=True, text=True, check=False)
    ran = log.read_text()
    assert "apt-get install -y --no-install-recommends git python3 python3-venv" in ran
    assert "apt-get install -y --no-install-recommends bubblewrap" in ran
    assert ran.count("install -m 755") == ran.count("rm -f /usr/sbin/policy-rc.d")
    assert "prometheus" not in ran
    assert "no Python 3.11 or later" in done.stderr


def test_continuous_integration_runs_the_same_command():
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith('exec ./dev test "$@"')


def test_contracts_name_modules_that_exist():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = next(contract["layers"] for contract in settings["contracts"] if contract["type"] == "layers")
    named = [part.strip() for layer in layers for part in layer.split("|")]
    assert len(set(named)) == len(named)
    for name in named:
        if not name.startswith("("):
            path = ROOT / name.replace(".", "/")
            assert path.is_dir() or path.with_suffix(".py").is_file(), name
