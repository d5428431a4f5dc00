"""``nox``: the wheel, installed by itself, on every Python from 3.11 to 3.13 that is there.

``nox -s studio`` drives the page in a browser: Chromium where it is installed, or what DAVAE_CHROMIUM names.

pip install nox && nox           # what is not installed is skipped; `--error-on-missing-interpreters` asks for all
"""

from pathlib import Path

import nox

LARGEST_WHEEL = 45_000_000

nox.options.default_venv_backend = "venv"


@nox.session(python=["3.11", "3.12", "3.13"])
def installed(session: nox.Session) -> None:
    """Build the wheel, install it with nothing else, and use it from another folder."""
    place = Path(session.create_tmp()).resolve()
    session.run("python", "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(place), ".")
    wheel = next(place.glob("davae-*.whl"))
    if wheel.stat().st_size > LARGEST_WHEEL:
        session.error(f"{wheel.name} has {wheel.stat().st_size / 1e6:.1f} MB")
    session.install(str(wheel))
    session.chdir(place)
    session.run("davae", "doctor")
    session.run("davae", "recipes", "list")
    session.run("davae", "configs", "--out", "configs")
    session.run("davae", "comfyui", "--out", "custom_nodes/davae")
    launch = ("accelerate", "launch", "--cpu", "--config_file", "configs/accelerate/one-gpu.yaml", "-m", "davae")
    session.run(*launch, "train", "autoencoder", "--recipe", "debug", "--out", "launched")
    session.run("davae", "demo", "--quick", "--out", "demo")


@nox.session(python=["3.11", "3.12", "3.13"], default=False)
def tests(session: nox.Session) -> None:
    """Run the tests; arguments after ``--`` go to pytest."""
    session.install("-c", "constraints.txt", "-e", ".[dev]")
    session.run("pytest", *session.posargs)


@nox.session(default=False)
def studio(session: nox.Session) -> None:
    """Drive the studio in a browser."""
    session.install("-c", "constraints.txt", "-e", ".[dev,studio]", "playwright")
    session.run("pytest", "tests/studio", *session.posargs)
