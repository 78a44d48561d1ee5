"""`make serve` comes back from whatever an earlier attempt left, and says what is missing; without a network.

Python is the real one, behind a script that makes environments with a pip that installs nothing.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.readme import README

ROOT = README.parent
PIP = """\
import sys
from pathlib import Path
bin = Path(sys.executable).parent
if "install" in sys.argv:
    with (bin.parents[1] / "pip.log").open("a") as log:
        print(*sys.argv[1:], file=log)
    if (bin.parents[1] / "offline").exists():
        sys.exit("no network")
    (bin / "unstir").write_text("#!/bin/sh\\necho serving on ${UNSTIR_PORT:-8000}\\n")
    (bin / "unstir").chmod(0o755)
"""
PYTHON = f"""\
#!/bin/sh
# A Python whose environments have the pip above.
here=$(dirname "$0")
if [ "$1 $2" = "-m venv" ]; then
    "{sys.executable}" -m venv --without-pip "$3" || exit
    if [ -e "$here/interrupt" ]; then rm "$here/interrupt"; exit 130; fi
    site=$("$3/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    mkdir "$site/pip" && cp "$here/pip.py" "$site/pip/__main__.py"
    echo "#!$(cd "$3" && pwd -P)/bin/python" > "$3/bin/pip"
    exit
fi
exec "{sys.executable}" "$@"
"""
OLD = """\
#!/bin/sh
case "$2" in
    *version_info\\ \\<*) exit 1 ;;
    *) echo 3.9.2 ;;
esac
"""


class Checkout:
    """A folder with what `make` reads, and a machine with this Python alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "unstir"
        self.tools = folder / "bin"
        self.tools.mkdir()
        (self.folder / ".ci").mkdir(parents=True)
        for name in ("Makefile", "pyproject.toml", ".ci/environment", ".ci/run"):
            shutil.copy(ROOT / name, self.folder / name)
        (self.tools / "pip.py").write_text(PIP)
        self.tool("python3", PYTHON)

    def tool(self, name: str, script: str) -> None:
        path = self.tools / name
        path.write_text(script)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def make(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "PYTHON", "UNSTIR"))}
        path = f"{self.tools}:/usr/bin:/bin"
        return subprocess.run(
            ["make", "--no-print-directory", *arguments],
            cwd=self.folder,
            env={**clean, "PATH": path, **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    @property
    def installed(self) -> list[str]:
        log = self.folder / "pip.log"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)


def served(done: subprocess.CompletedProcess[str], port: int = 8000) -> bool:
    assert done.returncode == 0, done.stdout + done.stderr
    return f"serving on {port}\n" in done.stdout


def test_the_first_time_installs_and_the_second_does_not(checkout):
    first = checkout.make("serve")
    assert served(first)
    assert "about 2.8 GB" in first.stdout
    assert ".venv/bin/uv pip install --torch-backend cpu 'torch<2.14'" in first.stdout
    assert checkout.installed == ["--disable-pip-version-check install --editable ."]  # with its progress: not --quiet
    second = checkout.make("serve", UNSTIR_PORT="8001")
    assert served(second, 8001)
    assert "GB" not in second.stdout
    assert len(checkout.installed) == 1


def test_other_dependencies_and_those_of_development_are_installed(checkout):
    checkout.make("serve")
    with (checkout.folder / "pyproject.toml").open("a") as file:
        file.write("# another\n")
    assert served(checkout.make("serve"))
    assert len(checkout.installed) == 2
    assert checkout.make("install", "PIP_OPTIONS=--extra-index-url somewhere").returncode == 0
    assert checkout.installed[2:] == [
        "--disable-pip-version-check install --extra-index-url somewhere --editable .[dev]"
    ]
    assert served(checkout.make("serve"))  # which has all that serving needs
    assert len(checkout.installed) == 3


def test_an_attempt_that_was_interrupted_while_the_environment_was_made(checkout):
    (checkout.tools / "interrupt").touch()
    assert checkout.make("serve").returncode != 0
    again = checkout.make("serve")
    assert served(again)
    assert ".venv is made anew: it has no working pip" in again.stderr


def test_an_attempt_that_was_interrupted_while_pip_ran(checkout):
    (checkout.folder / "offline").touch()
    assert checkout.make("serve").returncode != 0
    (checkout.folder / "offline").unlink()
    again = checkout.make("serve")
    assert served(again)
    assert "anew" not in again.stderr  # pip goes on where it was
    assert len(checkout.installed) == 2


def test_a_checkout_that_was_moved(checkout):
    assert served(checkout.make("serve"))
    checkout.folder = checkout.folder.rename(checkout.folder.with_name("elsewhere"))
    moved = checkout.make("serve")
    assert served(moved)
    assert ".venv is made anew: it was made in another place" in moved.stderr


def test_an_interpreter_that_is_gone(checkout):
    assert served(checkout.make("serve"))
    python = checkout.folder / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/nowhere/python3")
    again = checkout.make("serve")
    assert served(again)
    assert ".venv is made anew: its Python does not start" in again.stderr


def test_a_python_that_is_too_old(checkout):
    checkout.tool("mine", PYTHON)
    checkout.tool("python3", OLD)
    for name in ("python3.11", "python3.12", "python3.13", "python3.14"):  # hide those of this machine
        checkout.tool(name, OLD)
    refused = checkout.make("serve")
    assert refused.returncode != 0
    assert "Python 3.11 or newer is needed, and python3 is 3.9.2." in refused.stderr
    assert "make serve PYTHON=" in refused.stderr
    assert not (checkout.folder / ".venv").exists()
    assert served(checkout.make("serve", "PYTHON=mine"))
    assert served(checkout.make("serve"))  # which keeps it
    assert len(checkout.installed) == 1


def test_a_newer_python_beside_an_old_one_is_found(checkout):
    checkout.tool("python3", OLD)
    checkout.tool("python3.14", PYTHON)
    assert served(checkout.make("serve"))


def test_an_environment_of_a_python_that_is_too_old(checkout):
    binaries = checkout.folder / ".venv" / "bin"
    binaries.mkdir(parents=True)
    shutil.copy(checkout.tools / "python3", binaries / "python")
    (binaries / "python").write_text(OLD)
    again = checkout.make("serve")
    assert served(again)
    assert ".venv is made anew: its Python is older than 3.11" in again.stderr


def test_another_python_that_is_asked_for(checkout):
    assert served(checkout.make("serve"))
    checkout.tool(
        "other", PYTHON.replace("exec ", 'case "$2" in *base_prefix*) echo /opt/other 3 12 0; exit;; esac\nexec ')
    )
    again = checkout.make("serve", PYTHON="other")
    assert served(again)
    assert ".venv is made anew: it is not of other" in again.stderr


def test_a_python_without_venv(checkout):
    checkout.tool("python3", PYTHON.replace("exec ", 'case "$2" in *ensurepip*) exit 1;; esac\nexec '))
    refused = checkout.make("serve")
    assert refused.returncode != 0
    assert "apt install python3-venv" in refused.stderr
    assert not (checkout.folder / ".venv").exists()


BARE = ("bash", "chmod", "cp", "dirname")  # of a machine without curl, node and npm


def run_ci(checkout: Checkout, apt_get: str) -> subprocess.CompletedProcess[str]:
    """`.ci/run` where `make` only says that it was called."""
    for name in BARE:
        (checkout.tools / name).unlink(missing_ok=True)
        (checkout.tools / name).symlink_to(shutil.which(name) or name)
    checkout.tool("make", f"#!/bin/sh\necho $* >> {checkout.folder}/made\n")
    checkout.tool("apt-get", f"#!/bin/bash\n{apt_get}\n")
    return subprocess.run(
        ["bash", ".ci/run"], cwd=checkout.folder, env={"PATH": str(checkout.tools)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def installed_by(checkout: Checkout, node: str = "exit 0") -> str:
    """What apt-get does when it works."""
    (checkout.folder / "node").write_text(f"#!/bin/sh\n{node}\n")
    each = f"cp {checkout.folder}/node {checkout.tools}/$name; chmod +x {checkout.tools}/$name"
    return f"[ $1 = update ] || for name in curl node npm; do {each}; done"


def test_ci_stops_where_its_own_installation_fails(checkout):
    for fails in ("update", "install"):
        assert run_ci(checkout, f"[ $1 != {fails} ]").returncode != 0
    absent = run_ci(checkout, "true")  # says that all is well, and installs nothing
    assert absent.returncode != 0
    assert "curl is needed by the tests, and does not start: install curl nodejs npm" in absent.stderr
    assert not (checkout.folder / "made").exists()


def test_ci_does_not_run_with_an_old_node(checkout):
    old = run_ci(checkout, installed_by(checkout, "case $1 in -e) exit 1;; *) echo v16.20.2;; esac"))
    assert old.returncode != 0
    assert "Node 18 or newer is needed by the tests, and node is v16.20.2" in old.stderr
    assert not (checkout.folder / "made").exists()


def test_ci_installs_what_is_missing_and_runs_all(checkout):
    assert run_ci(checkout, installed_by(checkout)).returncode == 0
    assert (checkout.folder / "made").read_text().split() == ["check", "test", "test-programs"]
