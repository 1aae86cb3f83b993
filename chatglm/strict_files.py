"""The files of a model, strictly: every tensor of a checkpoint is there and fits, or it is refused.

transformers fills what is missing with random values, drops what is too much, and warns among other
lines: weights that are not those of the file answer nonsense, and nobody knows why.
"""

import logging
from typing import Any

from .errors import ToolkitError
from .tying import is_shared, parted_head, parted_state

logger = logging.getLogger("chatglm")


class StrictFilesMixin:
    """Loading and saving; stands before the classes of transformers."""

    config: Any

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a folder or hub name, strictly: every tensor must be there and fit.

        Only a prefix encoder may be missing (p-tuning that starts now). Code in the folder is
        never run.

        Raises:
            ToolkitError: with the names of missing, surplus or misshapen tensors.
        """
        kwargs.pop("trust_remote_code", None)
        wants_info = kwargs.pop("output_loading_info", False)
        report = logging.getLogger("transformers.modeling_utils")
        report.addFilter(_only_errors)  # the names are in the error below
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *args,
                output_loading_info=True,
                **{**kwargs, "ignore_mismatched_sizes": True},
            )
        finally:
            report.removeFilter(_only_errors)
        _check_loaded(str(pretrained_model_name_or_path), info)
        if model.config.tie_word_embeddings and not is_shared(model):
            raise ToolkitError(
                f"{pretrained_model_name_or_path}: head and embedding differ, so they can't be one"
                " tensor: set tie_word_embeddings to false, or leave it out"
            )
        return (model, info) if wants_info else model

    def save_pretrained(
        self, save_directory, is_main_process=True, state_dict=None, *args, **kwargs
    ):
        """transformers' own; head and embedding are two tensors in the file, as released."""
        state = None if state_dict is None else parted_state(state_dict)
        with parted_head(self):
            super().save_pretrained(save_directory, is_main_process, state, *args, **kwargs)


def _only_errors(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _check_loaded(where: str, info: dict) -> None:
    missing = {k for k in info["missing_keys"] if not k.startswith("transformer.prefix_encoder.")}
    new_prefix = set(info["missing_keys"]) - missing
    misshapen = {f"{name} {list(found)} != {list(expected)}"
                 for name, found, expected in info["mismatched_keys"]}  # fmt: skip
    faults = [
        f"{len(names)} {kind}: {', '.join(sorted(names)[:8])}{' ...' if len(names) > 8 else ''}"
        for kind, names in (
            ("missing", missing),
            ("surplus", info["unexpected_keys"]),
            ("misshapen (stored != config.json)", misshapen),
        )
        if names
    ]
    if faults:
        raise ToolkitError(
            f"{where}: the tensors do not fit its config.json: {'; '.join(faults)}. Take all files"
            " of one checkpoint; check quantization_bit and pre_seq_len in config.json"
        )
    if new_prefix:
        logger.warning("%s: no prefix encoder stored; a new one was drawn", where)
