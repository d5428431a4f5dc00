"""``python -m davae``, which launchers such as ``accelerate launch -m davae`` call."""

from davae.cli.main import main

main()
