"""Examples, batches and answers, against the released code and the chat's own prompts."""

from pathlib import Path

import pytest

from chatglm.corpus import read_paragraphs
from chatglm.errors import ToolkitError
from chatglm.evaluation import (
    Example,
    batches_by_length,
    build_examples,
    check_lengths,
    generate_answers,
    summarize,
)
from chatglm.scores import METRICS
from chatglm.strategies import Sample
from chatglm.tokenizer import train_tokenizer

BUNDLED = Path(__file__).parents[1] / "data" / "finetune_train_examples.json"
PARAGRAPHS = [
    [("南京有什么好吃的？", "盐水鸭，还有小笼包！"), ("第一种怎么做？", "先腌，再煮。")],
    [("你好", "你好：有事吗？")],
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    paragraphs = [*read_paragraphs([str(BUNDLED)]), *PARAGRAPHS]
    texts = [text for rounds in paragraphs for one in rounds for text in one]
    return train_tokenizer(texts, str(tmp_path_factory.mktemp("tokenizer")), vocab_size=2432)


def test_the_model_reads_what_it_reads_in_chat(tokenizer):
    examples = build_examples(PARAGRAPHS, tokenizer, max_seq_length=99)
    assert len(examples) == 3
    for example in examples:
        assert example.prompt_ids == tokenizer.encode_prompt(example.prompt)


def test_a_label_is_whole_and_as_the_tokenizer_writes_it(tokenizer):
    whole, cut = (build_examples(PARAGRAPHS, tokenizer, max_seq_length=n) for n in (99, 8))
    assert [one.label for one in whole] == [one.label for one in cut]
    assert whole[0].label == "盐水鸭,还有小笼包!"
    assert any(one.sample.answer_cut for one in cut)


def test_a_batch_is_answered_as_the_released_code_does_and_as_each_prompt_alone(released, golden):
    padded = golden["greedy_batch.input_ids"]
    prompts = [[token for token in row if token != 3] for row in padded.tolist()]
    assert len({len(ids) for ids in prompts}) > 1
    options = {"max_new_tokens": 80 - padded.shape[1], "eos_token_id": 305}
    together = generate_answers(released, prompts, **options)
    for ids, answer, row in zip(prompts, together, golden["greedy_batch.output_ids"], strict=True):
        assert answer == [token for token in row[padded.shape[1] :].tolist() if token != 3]
        assert generate_answers(released, [ids], **options) == [answer]


def test_batches_hold_every_index_once_longest_first():
    batches = list(batches_by_length([2, 9, 4, 9, 1], 2, name="test"))
    assert batches == [[1, 3], [2, 0], [4]]


def test_the_longer_of_label_and_prediction_must_fit():
    example = Example("", "", Sample([9] * 10, context_length=4))
    check_lengths([example], max_new_tokens=5, longest=10)
    for max_new_tokens, longest in ((5, 9), (6, 10)):
        with pytest.raises(ToolkitError, match="max_sequence_length"):
            check_lengths([example], max_new_tokens=max_new_tokens, longest=longest)


def test_the_summary_counts_what_makes_a_mean_doubtful():
    examples = [Example("", "", Sample([9], 0, prompt_cut=cut)) for cut in (True, False, True)]
    lines = [
        {"prediction": text, "finish_reason": reason, **dict.fromkeys(METRICS, 1.0)}
        for text, reason in (("", "stop"), (" \n", "length"), ("好", "stop"))
    ]
    summary = summarize(lines, examples, loss=0.0)
    assert {name: summary.pop(name) for name in METRICS} == dict.fromkeys(METRICS, 1.0)
    assert summary == {
        "perplexity": 1, "samples": 3, "empty predictions": 2, "cut predictions": 1,
        "cut prompts": 2,
    }  # fmt: skip
