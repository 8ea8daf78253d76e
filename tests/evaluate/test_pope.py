import numpy as np
import pytest

from attnctrl.errors import AttnCtrlError
from attnctrl.evaluate.intervals import wilson
from attnctrl.evaluate.pope import PER_SCENE, SPLITS, Habits, Probe, pope_scores, probes
from attnctrl.evaluate.rates import resampled, share


NOUNS = ("cat", "dog", "car", "tree", "fish", "star", "moon")
SCENES = [["cat", "dog"], ["cat", "cat", "fish"], ["moon"], ["cat", "dog", "car", "tree"]]
HABITS = Habits.count([["cat", "dog"]] * 5 + [["cat", "cat", "fish"]] * 3 + [["star"]] * 9 + [["moon", "tree"]] * 2)


def test_habits_count_scenes_not_objects():
    assert HABITS.seen == {"cat": 8, "dog": 5, "fish": 3, "star": 9, "moon": 2, "tree": 2}
    assert HABITS.beside["cat"] == {"dog": 5, "fish": 3} and HABITS.beside["tree"] == {"moon": 2}


@pytest.mark.parametrize("split", SPLITS)
def test_every_noun_that_is_there_is_followed_by_one_that_is_not(split):
    asked = probes(SCENES, split, NOUNS, HABITS, seed=3)
    assert asked == probes(SCENES, split, NOUNS, HABITS, seed=3)
    for number, held in enumerate(SCENES):
        mine = [probe for probe in asked if probe.scene == number]
        there, absent = mine[::2], mine[1::2]
        assert [p.noun for p in there] == list(dict.fromkeys(held))[:PER_SCENE] and all(p.present for p in there)
        assert not any(p.present or p.noun in held for p in absent)
        assert len({p.noun for p in absent}) == len(absent), "no absent noun is asked about twice"


def test_the_absent_nouns_are_those_of_their_split():
    def absent(split, scene, seed=0):
        return [p.noun for p in probes([scene], split, NOUNS, HABITS, seed) if not p.present]

    assert absent("popular", ["cat", "moon"]) == ["star", "dog"]
    assert absent("adversarial", ["cat", "moon"]) == ["dog", "tree"]
    assert absent("adversarial", ["cat", "dog"])[0] == "fish"
    drawn = {absent("adversarial", ["star"], seed)[0] for seed in range(40)}
    assert len(drawn) > 3, "a noun without companions falls back to a free draw"
    assert len({absent("random", ["star"], seed)[0] for seed in range(60)}) == len(NOUNS) - 1


def test_a_scene_that_shows_everything_has_no_question():
    assert probes([list(NOUNS)], "random", NOUNS, HABITS) == []
    with pytest.raises(AttnCtrlError, match="HINT: random, popular, adversarial"):
        probes(SCENES, "hard", NOUNS, HABITS)


def test_scores_equal_the_definitions():
    rng = np.random.default_rng(0)
    asked = [Probe(i // 4, "cat", bool(rng.random() < 0.5)) for i in range(200)]
    said = [bool(rng.random() < (0.8 if probe.present else 0.3)) for probe in asked]
    truth, yes = np.array([p.present for p in asked]), np.array(said)
    found = pope_scores(asked, said)
    precision, recall = (truth & yes).sum() / yes.sum(), (truth & yes).sum() / truth.sum()
    assert found.questions == 200 and found.accuracy.value == (truth == yes).mean()
    assert (found.precision.value, found.recall.value, found.yes.value) == (precision, recall, yes.mean())
    assert found.f1.value == pytest.approx(2 * precision * recall / (precision + recall))
    for rate in (found.accuracy, found.precision, found.recall, found.f1, found.yes):
        assert 0 <= rate.low < rate.value < rate.high <= 1
    assert (found.accuracy.low, found.accuracy.high) == wilson(int((truth == yes).sum()), 200)


def test_always_yes_is_half_right_and_says_so():
    asked = probes(SCENES, "random", NOUNS, HABITS)
    found = pope_scores(asked, [True] * len(asked))
    assert found.accuracy.value == found.precision.value == 0.5 and found.recall.value == found.yes.value == 1
    silent = pope_scores(asked, [False] * len(asked))
    assert silent.f1.value == silent.yes.value == silent.precision.value == 0 and silent.precision.high == 1
    with pytest.raises(AttnCtrlError, match="HINT:"):
        pope_scores(asked, [True])


def test_intervals_know_that_questions_of_one_picture_belong_together():
    kinds = np.eye(2)[np.arange(60) % 2]
    one = resampled(kinds, lambda n: n[..., 0] / n.sum(-1))
    ten = resampled(10 * kinds, lambda n: n[..., 0] / n.sum(-1))
    assert one == ten and one.value == 0.5
    free, low_high = share(300, 600), ten.high - ten.low
    assert low_high > 2 * (free.high - free.low), "600 answers about 60 pictures say less than 600 about 600"
