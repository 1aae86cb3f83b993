"""Samples on disk: TFRecord files (length and CRC with every record), and their manifest.

A record is int32, little-endian: the context length, then the token ids, unpadded. The manifest
beside it says what it was built from; a change of any of that means building again.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tfrecords

from .errors import ToolkitError
from .strategies import Sample

_OPTIONS = tfrecords.TFRecordOptions(compression_type=tfrecords.TFRecordCompressionType.NONE)


@dataclass
class Counts:
    """What went into a record file."""

    samples: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    prompts_cut: int = 0
    answers_cut: int = 0
    longest: int = 0

    def add(self, sample: Sample) -> None:
        """Count one sample."""
        self.samples += 1
        self.tokens += len(sample.input_ids)
        self.learned_tokens += len(sample.input_ids) - sample.context_length - 1
        self.prompts_cut += sample.prompt_cut
        self.answers_cut += sample.answer_cut
        self.longest = max(self.longest, len(sample.input_ids))


def file_hash(path: str) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason_to_rebuild(path: str, source: dict[str, Any]) -> str | None:
    """Why the record file can't be used for this source, or None if it can."""
    if not os.path.exists(path) or not os.path.exists(manifest_path(path)):
        return "not built yet"
    try:
        manifest = read_manifest(path)
    except ToolkitError:
        return "its manifest cannot be read"
    old = manifest["source"]
    for key in source:
        if old.get(key) != source[key]:
            return f"{key} changed"
    return None if os.path.getsize(path) == manifest["bytes"] else "the file was changed"


def manifest_path(path: str) -> str:
    """Where the manifest of a record file stands."""
    return f"{path}.manifest.json"


def read_manifest(path: str) -> dict[str, Any]:
    """The manifest of a record file.

    Raises:
        ToolkitError: if it is missing or not a manifest.
    """
    try:
        with open(manifest_path(path), encoding="utf-8") as file:
            manifest = json.load(file)
    except (OSError, ValueError) as error:
        raise ToolkitError(
            f"{manifest_path(path)}: {error}; build the records with: python data_utils.py"
        ) from None
    if not isinstance(manifest, dict) or not {"source", "counts", "bytes"} <= manifest.keys():
        raise ToolkitError(f"{manifest_path(path)}: not a manifest; run: python data_utils.py")
    return manifest


def write_records(path: str, samples: Iterable[Sample], source: dict[str, Any]) -> Counts:
    """Write all samples and the manifest, each aside and then renamed.

    Raises:
        ToolkitError: if there are no samples; nothing is written then.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    counts, aside = Counts(), f"{path}.part"
    with tfrecords.TFRecordWriter(aside, options=_OPTIONS) as writer:
        for sample in samples:
            values = [sample.context_length, *sample.input_ids]
            writer.write(np.asarray(values, dtype="<i4").tobytes())
            counts.add(sample)
    manifest = {"source": source, "counts": vars(counts), "bytes": os.path.getsize(aside)}
    with open(f"{manifest_path(path)}.part", "w", encoding="utf-8") as file:
        json.dump(manifest, file, ensure_ascii=False, indent=2)
    if not counts.samples:
        os.remove(aside)
        os.remove(f"{manifest_path(path)}.part")
        raise ToolkitError(f"{path}: its source holds no samples: {', '.join(source['data'])}")
    os.replace(aside, path)
    os.replace(f"{manifest_path(path)}.part", manifest_path(path))
    return counts


class RecordFile:
    """Random access to the samples of one record file."""

    def __init__(self, path: str):
        if not os.path.exists(path):
            raise ToolkitError(f"{path}: not built yet; run: python data_utils.py")
        self.path = path
        try:
            self._reader = tfrecords.tf_record_random_reader(
                path, options=_OPTIONS, with_share_memory=True
            )
            self._offsets = [offset for offset, _ in self._reader.read_offsets(0)]
        except Exception as error:  # the reader raises its own classes, without a common one
            raise ToolkitError(
                f"{path}: damaged ({error}); delete it and run: python data_utils.py"
            ) from None
        expected = read_manifest(path)["counts"]["samples"]
        if len(self._offsets) != expected:
            raise ToolkitError(
                f"{path}: {len(self._offsets)} records of {expected}; delete it and run:"
                " python data_utils.py"
            )

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Sample:
        try:
            content, _ = self._reader.read(self._offsets[index])
        except Exception as error:  # the reader raises its own classes for a bad CRC
            raise ToolkitError(
                f"{self.path}: record {index} at byte {self._offsets[index]} is damaged ({error});"
                " delete the file and run: python data_utils.py"
            ) from None
        values = np.frombuffer(content, dtype="<i4")
        return Sample(input_ids=values[1:].tolist(), context_length=int(values[0]))

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of every sample, and how many of them are learned; two int64 arrays."""
        tokens = np.array([len(self[index].input_ids) for index in range(len(self))])
        contexts = np.array([self[index].context_length for index in range(len(self))])
        return tokens, tokens - contexts - 1
