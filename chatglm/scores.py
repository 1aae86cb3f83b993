"""Scores of an answer against its label: BLEU-4 over characters, ROUGE F1 over words.

The rule is compute_metrics of ptuning/main.py in THUDM/ChatGLM-6B (commit 90f2e47), which scores
ADGEN, so that numbers can be laid beside those published with it: jieba cuts the words for ROUGE;
BLEU is smoothed by NIST's geometric sequence (nltk's method3); each score is times 100, rounded to
4 digits, and averaged over the samples. A blank answer, which rouge_chinese refuses and which ends
the run there, scores 0 here.
"""

import logging
from collections.abc import Sequence
from statistics import fmean

import jieba
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_chinese import Rouge

METRICS = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")

jieba.setLogLevel(logging.WARNING)  # else it tells on stderr that it loads its dictionary


def score_answer(prediction: str, label: str) -> dict[str, float]:
    """The METRICS of one answer, each 0 to 100; all 0 where either text is blank.

    ROUGE-L takes time and memory by the product of both lengths: 0.8 s and 150 MB for a thousand
    words against a thousand.
    """
    if not prediction.strip() or not label.strip():
        return dict.fromkeys(METRICS, 0.0)
    words = [" ".join(jieba.cut(text)) for text in (prediction, label)]
    scores = {name: rouge["f"] for name, rouge in Rouge().get_scores(*words)[0].items()}
    scores["bleu-4"] = sentence_bleu(
        [list(label)], list(prediction), smoothing_function=SmoothingFunction().method3
    )
    return {name: round(100 * scores[name], 4) for name in METRICS}


def mean_scores(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each of the METRICS over one sample or more."""
    return {name: fmean(one[name] for one in scores) for name in METRICS}
