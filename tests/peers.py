"""Libraries whose models are oracles; importing this module makes torchvision importable, see `beside.py`."""

from edgetube.bench.studies.peers.beside import declare_torchvision

declare_torchvision()
