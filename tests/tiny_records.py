"""A folder of records out of samples, without a corpus."""

import json
from pathlib import Path

import numpy as np

from chatglm.records import SUFFIXES, Counts, ShardWriter, file_crc


def write_folder(folder, *shards, backend="record"):
    """The folder's path; each argument is the list of samples of one shard."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    total, indices, listed = Counts(), [], []
    for number, samples in enumerate(shards):
        path = folder / f"{number:05d}{SUFFIXES[backend]}"
        with ShardWriter(str(path), backend=backend, file=number) as writer:
            for sample in samples:
                writer.write(sample)
                total.add_cuts(sample)
        indices.append(writer.index())
        total.add_lengths(indices[-1])
        listed.append({"name": path.name, "samples": len(samples), "bytes": path.stat().st_size,
                       "crc": file_crc(str(path))})  # fmt: skip
    np.save(folder / "index.npy", np.concatenate(indices))
    manifest = {
        "source": {},
        "files": [],
        "backend": backend,
        "counts": total.as_json(),
        "index_bytes": (folder / "index.npy").stat().st_size,
        "index_crc": file_crc(str(folder / "index.npy")),
        "shards": listed,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return str(folder)
