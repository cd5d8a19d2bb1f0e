"""What attacks the package; `benchmarks/fuzz.py` runs it for long."""

from tests.fuzz import (
    checkpoints,
    commands,
    data,
    datasets,
    files,
    images,
    modules,
    networks,
    surroundings,
)

#: Inputs whose right answer is known, for the three gates of the package (images, checkpoints, data sets), and modules.
GATES = (*images.TARGETS, *checkpoints.TARGETS, *datasets.TARGETS, *modules.TARGETS)
TARGETS = (
    *GATES, *networks.TARGETS, *files.TARGETS, *data.TARGETS, *commands.TARGETS, *surroundings.TARGETS,
)  # fmt: skip
