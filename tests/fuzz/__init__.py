"""What attacks the package; `benchmarks/fuzz.py` runs it for long."""

from tests.fuzz import commands, data, files, networks, surroundings

TARGETS = (
    *networks.TARGETS, *files.TARGETS, *data.TARGETS, *commands.TARGETS, *surroundings.TARGETS,
)  # fmt: skip
