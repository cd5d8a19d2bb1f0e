"""What the tests of stores share."""

from __future__ import annotations

import numpy as np
import torch

from kornia_tinyvit.distillation.store import RecordStore


def write_records(store: RecordStore, epoch: int, indices, values: torch.Tensor, checksums) -> int:
    """Write whole shards from rows in any order, and return the number of new records."""
    indices, checksums = np.asarray(indices), np.asarray(checksums)
    shards, rows = np.divmod(store.order.positions(epoch, indices), store.manifest.shard_records)
    written = 0
    for shard in np.unique(shards).tolist():
        chosen = np.flatnonzero(shards == shard)
        chosen = chosen[np.argsort(rows[chosen])]
        with store.writer(epoch, shard) as writer:
            if len(writer.missing()):
                written += writer.write(indices[chosen], values[torch.from_numpy(chosen)], checksums[chosen])
    return written
