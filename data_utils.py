"""Settings to edit, and the building of training records.

python data_utils.py                # build the records of train_file and eval_file
python data_utils.py --help         # every setting as a flag
"""

from collections.abc import Iterator, Sequence

from tqdm import tqdm

from chatglm import corpus, records, strategies
from chatglm.configuration import ChatGLMConfig
from chatglm.errors import ToolkitError
from chatglm.prompts import TEMPLATE_VERSION, build_prompt
from chatglm.settings import DataSettings, TrainSettings, parse_settings, run_script
from chatglm.tokenizer import ChatGLMTokenizer
from models import build_tokenizer

# What to train. An empty model_name_or_path trains a tiny ChatGLM from scratch in a minute; give
# the folder of the real weights to fine-tune them. `python train.py --help` explains each line.
train_info_args = {
    "model_name_or_path": "",
    "config_name": "./config/config_tiny.json",
    "train_file": ["./data/finetune_train_examples.json"],
    "eval_file": ["./data/finetune_dev_examples.json"],
    "output_dir": "./output",
    "save_dir": "./best_ckpt",
    "max_seq_length": 1024,
    "max_epochs": None,
    "max_steps": -1,
    "train_batch_size": 8,
    "eval_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": None,
    "scheduler_type": "linear",
    "warmup_steps": 20,
    "weight_decay": 0.0,
    "adam_epsilon": 1e-8,
    "optimizer_betas": (0.9, 0.999),
    "max_grad_norm": 1.0,
    "precision": "auto",
    "devices": 1,
    "seed": 42,
}

# What happens to samples longer than max_seq_length.
data_conf = {
    "strategy": "truncation",
    "ensure_answer_min_length": 1,
}

GROUPS = (
    (TrainSettings, train_info_args, "train_info_args in data_utils.py"),
    (DataSettings, data_conf, "data_conf in data_utils.py"),
)


class DataHelper:
    """Builds the tokenizer and the record files that the settings ask for."""

    def __init__(self, train: TrainSettings, data: DataSettings):
        self.train, self.data = train, data
        self.files = {
            "train": corpus.expand_files(train.train_file),
            "dev": corpus.expand_files(train.eval_file),
        }
        # The embedded tokenizer learns from the training text; one with weights needs none.
        paragraphs = corpus.read_paragraphs(self.files["train"]) if train.from_scratch else []
        texts = [text for rounds in paragraphs for one in rounds for text in one]
        self.tokenizer: ChatGLMTokenizer
        self.config: ChatGLMConfig
        self.tokenizer, self.config = build_tokenizer(train, texts)
        if data.ensure_answer_min_length + 3 >= train.max_seq_length:
            raise ToolkitError(
                f"ensure_answer_min_length {data.ensure_answer_min_length} leaves no room for a"
                f" prompt in max_seq_length {train.max_seq_length}"
            )

    def make_dataset_with_args(self, split: str) -> str | None:
        """Path of the record file of "train" or "dev", built now if anything changed.

        None when the split has no files.
        """
        files = self.files[split]
        if not files:
            return None
        path = f"{self.train.output_dir}/{split}.record"
        source = self._source(files)
        reason = records.reason_to_rebuild(path, source)
        if reason is None:
            print(f"{path}: {_summary(records.Counts(**records.read_manifest(path)['counts']))}")
            return path
        print(f"{path}: building ({reason})")
        samples = tqdm(self.samples(files), unit=" samples", desc=split, disable=None)
        counts = records.write_records(path, samples, source)
        print(f"{path}: {_summary(counts)}")
        return path

    def samples(self, files: list[str]) -> Iterator[strategies.Sample]:
        """One sample a round, with the earlier rounds in its prompt."""
        tokenizer = self.tokenizer
        special = strategies.SpecialTokens(
            tokenizer.gmask_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
        )
        for rounds in corpus.read_paragraphs(files):
            prompts = [build_prompt(q, rounds[:i]) for i, (q, _) in enumerate(rounds)]
            answers = [answer for _, answer in rounds]
            encoded = tokenizer.encode_texts([*prompts, *answers])
            for prompt, answer in zip(encoded[: len(rounds)], encoded[len(rounds) :], strict=True):
                yield strategies.truncate(
                    prompt,
                    answer,
                    special,
                    max_seq_length=self.train.max_seq_length,
                    ensure_answer_min_length=self.data.ensure_answer_min_length,
                )

    def _source(self, files: list[str]) -> dict:
        return {
            "data": {path: records.file_hash(path) for path in files},
            "tokenizer": records.file_hash(self.tokenizer.vocab_file),
            "template": TEMPLATE_VERSION,
            "max_seq_length": self.train.max_seq_length,
            "strategy": [self.data.strategy, self.data.ensure_answer_min_length],
            "strategy version": strategies.VERSION,
        }


def _summary(counts: records.Counts) -> str:
    return (
        f"{counts.samples:,} samples, {counts.tokens:,} tokens ({counts.learned_tokens:,} learned),"
        f" longest {counts.longest}, {counts.prompts_cut} prompts and {counts.answers_cut} answers"
        " cut"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Build the records."""
    train, data = parse_settings(GROUPS, argv, description="Build training records.")
    helper = DataHelper(train, data)
    for split in ("train", "dev"):
        helper.make_dataset_with_args(split)


if __name__ == "__main__":
    run_script(main)
