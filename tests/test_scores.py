"""Scores against numbers worked out by hand, and against the libraries called directly."""

import math
import subprocess
import sys
from pathlib import Path

import jieba
import pytest
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_chinese import Rouge

from chatglm.scores import METRICS, mean_scores, score_answer

ROOT = Path(__file__).parents[1]
ZERO = dict.fromkeys(METRICS, 0.0)


def f1(common, in_prediction, in_label):
    precision, recall = common / in_prediction, common / in_label
    return pytest.approx(200 * precision * recall / (precision + recall), abs=1e-3)


def test_an_equal_answer_scores_100():
    text = "坐高铁，从南京南站到上海虹桥站。\n约一个半小时。"
    assert score_answer(text, text) == dict.fromkeys(METRICS, 100.0)


def test_bleu_counts_characters_and_rouge_counts_words():
    # 开车|去|上海 against 坐|高铁|去|上海: 去, 上 and 海 of 5 characters; 去 and 上海 of the words
    scores = score_answer("开车去上海", "坐高铁去上海")
    precisions = [3 / 5, 2 / 4, 1 / 3, 1 / 2 / 2]  # no 4 characters in common: half of one of 2
    bleu = math.exp(1 - 6 / 5) * math.prod(precisions) ** (1 / 4)  # 5 characters for 6
    assert scores["bleu-4"] == pytest.approx(100 * bleu, abs=1e-3)
    assert scores["rouge-1"] == f1(2, 3, 4)
    assert scores["rouge-2"] == f1(1, 2, 3)
    assert scores["rouge-l"] == f1(2, 3, 4)


def test_rouge_l_wants_the_order_and_rouge_1_does_not():
    scores = score_answer("上海去高铁坐", "坐高铁去上海")
    assert scores["rouge-1"] == 100.0
    assert scores["rouge-l"] == f1(1, 4, 4)


def test_each_precision_without_a_match_is_halved_again():
    # of 4, 3, 2 and 1 runs one character matches: 1/4, then 1/2 of 1/3, 1/4 of 1/2, 1/8 of 1/1
    bleu = (1 / 4 * 1 / 2 / 3 * 1 / 4 / 2 * 1 / 8) ** (1 / 4)
    assert score_answer("甲乙丙丁", "甲子丑寅")["bleu-4"] == pytest.approx(100 * bleu, abs=1e-3)


@pytest.mark.parametrize(
    ("prediction", "label"),
    [
        ("盐水鸭先腌，再煮。\n最后放凉。", "先用炒热的花椒盐腌。\n\n再用小火煮熟，放凉切块。"),
        ("Use torch.compile first.", "Use `torch.compile`, then measure."),
        ("。", "南京"),
        ("哈哈哈哈哈哈哈哈哈哈", "哈哈"),
    ],
)
def test_scores_are_those_of_the_libraries(prediction, label):
    words = [" ".join(jieba.cut(text)) for text in (prediction, label)]
    expected = {name: 100 * one["f"] for name, one in Rouge().get_scores(*words)[0].items()}
    expected["bleu-4"] = 100 * sentence_bleu(
        [list(label)], list(prediction), smoothing_function=SmoothingFunction().method3
    )
    assert score_answer(prediction, label) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("blank", ["", " \n", "\u3000"])
def test_a_blank_text_scores_0(blank):
    assert score_answer(blank, "南京") == score_answer("南京", blank) == ZERO


def test_a_text_of_more_words_than_python_recurses_is_scored():
    long = "高铁 " * (2 * sys.getrecursionlimit())
    assert score_answer(long, "坐高铁")["rouge-1"] > 0


def test_means_are_taken_over_samples_and_blank_ones_count():
    mean = mean_scores([score_answer("南京南站", "南京南站"), ZERO])
    assert mean == dict.fromkeys(METRICS, 50.0)


def test_the_dictionary_is_loaded_in_silence():
    code = "from chatglm.scores import score_answer; print(score_answer('南京', '南京')['rouge-1'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("100.0\n", "")
