"""``nox``: the wheel, installed by itself, on every Python from 3.11 to 3.13 that is there.

pip install nox && nox           # what is not installed is skipped; `--error-on-missing-interpreters` asks for all
"""

from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"


@nox.session(python=["3.11", "3.12", "3.13"])
def installed(session: nox.Session) -> None:
    """Build the wheel, install it with nothing else, and run the demo from another folder."""
    place = Path(session.create_tmp()).resolve()
    session.run("python", "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(place), ".")
    session.install(str(next(place.glob("davae-*.whl"))))
    session.chdir(place)
    session.run("davae", "doctor")
    session.run("davae", "configs", "--out", "configs")
    session.run("davae", "demo", "--quick", "--out", "demo")


@nox.session(python=["3.11", "3.12", "3.13"], default=False)
def tests(session: nox.Session) -> None:
    """Run the tests; arguments after ``--`` go to pytest."""
    session.install("-c", "constraints.txt", "-e", ".[dev]")
    session.run("pytest", *session.posargs)
