import pytest

from attnctrl.errors import AttnCtrlError
from attnctrl.evaluate.chair import Caption, chair_scores


def caption(mentioned, present, words=5):
    return Caption(tuple(mentioned.split()), frozenset(present.split()), words)


def test_scores_equal_the_definitions():
    captions = [
        caption("cat cat dog", "cat dog"),  # all there, one of them twice
        caption("cat moon moon", "cat star", 8),  # two mentions of one thing that is absent
        caption("", "tree", 2),
        caption("fish", "cat", 1),
    ]
    found = chair_scores(captions)
    assert [c.hallucinated for c in captions] == [0, 2, 0, 1]
    assert found.captions == 4 and found.chair_s.value == 2 / 4 and found.chair_i.value == 3 / 7
    assert found.recall.value == 3 / 6 and found.words.value == 4
    precision, recall = 4 / 7, 3 / 6
    assert found.f1.value == pytest.approx(2 * precision * recall / (precision + recall))


def test_saying_nothing_hallucinates_nothing_and_scores_nothing():
    found = chair_scores([caption("", "cat", 0)] * 5)
    assert found.chair_s.value == found.chair_i.value == found.recall.value == found.f1.value == 0
    assert found.chair_s.high > 0.3, "five captions prove little"


def test_perfect_captions_score_everything():
    found = chair_scores([caption("cat dog", "cat dog"), caption("moon", "moon")] * 10)
    assert found.chair_s.value == found.chair_i.value == 0 and found.recall.value == found.f1.value == 1
    assert (found.recall.low, found.recall.high) == (1, 1)
    with pytest.raises(AttnCtrlError, match="HINT:"):
        chair_scores([])
