"""Fine-tune ChatGLM-6B, or train the embedded tiny one.

python train.py                     # data_utils.py holds the settings; --help lists the flags
"""

from collections.abc import Sequence

import lightning

from chatglm.batches import build_loader
from chatglm.callbacks import build_trainer
from chatglm.records import RecordFile
from chatglm.settings import parse_settings, run_script, settings_as_json
from chatglm.training import ChatGLMTraining
from chatglm.weights import save_folder
from data_utils import GROUPS, DataHelper
from models import build_model


def main(argv: Sequence[str] | None = None) -> None:
    """Settings, records, model, fit."""
    train, data = parse_settings(GROUPS, argv, description="Train ChatGLM.")
    lightning.seed_everything(train.seed, verbose=False)
    helper = DataHelper(train, data)
    paths = {split: helper.make_dataset_with_args(split) for split in ("train", "dev")}
    loaders = [
        build_loader(
            RecordFile(path),
            batch_size=train.train_batch_size if split == "train" else train.eval_batch_size,
            pad_token_id=helper.config.pad_token_id,
            shuffle_seed=train.seed if split == "train" else None,
        )
        for split, path in paths.items()
        if path is not None
    ]
    model = build_model(train, helper.config)
    print(
        f"training for {train.epochs} epochs of {len(loaders[0])} batches, learning rate"
        f" {train.peak_learning_rate:g}, precision {train.precision}"
    )
    settings_json = settings_as_json(train, data)
    trainer = build_trainer(
        train,
        lambda folder: save_folder(model, helper.tokenizer, settings_json, folder),
        has_dev_set=len(loaders) == 2,
    )
    trainer.fit(ChatGLMTraining(model, train), *loaders)
    print(f"saved {train.save_dir}/best and {train.save_dir}/last")
    print("talk to it with: python infer_finetuning.py")


if __name__ == "__main__":
    run_script(main)
