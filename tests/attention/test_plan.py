import math

import pytest
import torch

from attnctrl.attention import KeyGroup, Lerp, NegativeText, Plan, Segment, run
from attnctrl.errors import AttnCtrlError

from .helpers import qkv


ALL = (KeyGroup(slice(0, None)),)


def test_plain():
    assert Plan().is_plain
    assert Plan(lerps=(Lerp("identity", torch.zeros(4)),)).is_plain
    assert not Plan(lerps=(Lerp("identity", torch.tensor([0.0, 0.1])),)).is_plain
    assert not Plan(head_scale=torch.ones(4)).is_plain
    assert not Plan((Segment(slice(0, None), ALL),)).is_plain
    assert not Plan(negative=NegativeText(slice(0, 4), slice(4, 6), slice(6, 8))).is_plain


def test_a_lerp_knows_its_heads():
    lerp = Lerp("identity", torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.0, 1.0]]))
    assert lerp.heads == (1, 2)
    assert not lerp.full
    assert Lerp("identity", torch.ones(3)).full
    named = Lerp("identity", torch.ones(3), heads=(2, 0))
    assert named.heads == (0, 2)
    assert not named.full, "named heads mean that values may change: nothing is read"


def test_runs_become_slices():
    segment = Segment(torch.tensor([3, 4, 5]), [KeyGroup(torch.tensor([0, 1]))])
    assert segment.queries == slice(3, 6)
    assert segment.keys[0].tokens == slice(0, 2)


@pytest.mark.parametrize("index", [[3, 1], [1, 1]])
def test_an_unsorted_index_is_refused_because_biases_follow_it(index):
    with pytest.raises(AttnCtrlError, match="HINT: as_tokens"):
        KeyGroup(torch.tensor(index), torch.zeros(2))


@pytest.mark.parametrize(
    "arguments",
    [
        ("identiti", torch.ones(2)),
        ("identity", 0.5),
        ("identity", torch.ones(1, 1, 2)),
        ("uniform", torch.tensor(1.0)),
    ],
)
def test_a_wrong_lerp_is_refused_at_construction(arguments):
    with pytest.raises(AttnCtrlError):
        Lerp(*arguments)


def test_plans_are_frozen():
    with pytest.raises(AttributeError):
        Plan().rows = (0,)


WRONG = {
    "2 of 8 query tokens are in no segment, the first is 6": Plan((Segment(slice(0, 6), ALL),)),
    "do not sum to 1, token 4: 2": Plan((Segment(slice(0, 8), ALL), Segment(slice(4, 5), ALL))),
    "do not sum to 1, token 2: 0.5": Plan((Segment(slice(0, 8), ALL, torch.tensor([1, 1, 0.5, 1, 1, 1, 1, 1])),)),
    "weight (3,) for 8 query tokens": Plan((Segment(slice(0, 8), ALL, torch.ones(3)),)),
    "a weight is negative": Plan((Segment(slice(0, 8), ALL, 2.0), Segment(slice(0, 8), ALL, -1.0))),
    "queries: tokens 0..8 reach outside 0..7": Plan((Segment(slice(0, 9), ALL),)),
    "key group 0: tokens 3..30 reach outside 0..9": Plan((Segment(slice(0, 8), (KeyGroup(torch.tensor([3, 30])),)),)),
    "key group 1 repeats 2 keys": Plan((Segment(slice(0, 8), (KeyGroup(slice(0, 5)), KeyGroup(slice(3, 9)))),)),
    "leaves its rows without a key": Plan((Segment(slice(0, 8), (KeyGroup(slice(0, 5), -math.inf),)),)),
    "segment 0 leaves its rows": Plan((Segment(slice(0, 8), ()),)),
    "segment 0 leaves its rows without": Plan(
        (Segment(slice(0, 8), (KeyGroup(slice(0, 2), torch.full((2,), -math.inf)),)),)
    ),
    "bias (3,) for 5 keys": Plan((Segment(slice(0, 8), (KeyGroup(slice(0, 5), torch.zeros(3)),)),)),
    "bias (1, 3, 5) for 4 heads": Plan((Segment(slice(0, 8), (KeyGroup(slice(0, 5), torch.zeros(1, 3, 5)),)),)),
    "key group 0: scale 0.0 is not above 0": Plan((Segment(slice(0, 8), (KeyGroup(slice(0, 5), scale=0.0),)),)),
    "key group 0: scale inf is not": Plan((Segment(slice(0, 8), (KeyGroup(slice(0, 5), scale=math.inf),)),)),
    "bias nan": Plan((Segment(slice(0, 8), (KeyGroup(slice(0, 5), math.nan),)),)),
    "bias holds NaN or +inf": Plan((Segment(slice(0, 8), (KeyGroup(slice(0, 5), torch.full((5,), math.inf)),)),)),
    "(identity) needs as many queries as keys": Plan(lerps=(Lerp("identity", torch.ones(4)),)),
    "(uniform) with a region needs": Plan(lerps=(Lerp("uniform", torch.ones(4), slice(0, 2)),)),
    "region: tokens 2..19 reach outside 0..7": Plan(lerps=(Lerp("mean_query", torch.ones(4), slice(2, 20)),)),
    "the region is empty": Plan(lerps=(Lerp("mean_query", torch.ones(4), slice(0, 0)),)),
    "strength is (3,), not (4,)": Plan(lerps=(Lerp("uniform", torch.ones(3)),)),
    "head 7 of 4": Plan(lerps=(Lerp("uniform", torch.ones(4), heads=(7,)),)),
    "strength is not finite": Plan(lerps=(Lerp("uniform", torch.full((4,), math.nan)),)),
    "head_scale is (3,)": Plan(head_scale=torch.ones(3)),
    "segments and a negative text exclude each other": Plan(
        (Segment(slice(0, 8), ALL),), negative=NegativeText(slice(0, 8), slice(0, 5), slice(5, 10))
    ),
    "image is 4 of 8 queries": Plan(negative=NegativeText(slice(0, 4), slice(4, 6), slice(6, 10))),
    "positive: tokens 8..11 reach outside": Plan(negative=NegativeText(slice(0, 8), slice(8, 12), slice(0, 8))),
    "negative is empty": Plan(negative=NegativeText(slice(0, 8), slice(0, 10), slice(3, 3))),
    "2 keys are positive and negative": Plan(negative=NegativeText(slice(0, 8), slice(0, 6), slice(4, 10))),
    "a grid of 2 x 3 for 8 rows": Plan(lerps=(Lerp("smoothed", torch.ones(4), sigma=1.0, grid=(2, 3)),)),
    "a grid of 2 x 3 for 5 rows": Plan(lerps=(Lerp("smoothed", torch.ones(4), slice(0, 5), sigma=1.0, grid=(2, 3)),)),
    "rows (0, 0) are empty or repeat": Plan(rows=(0, 0)),
    "rows (5,) are not all in a batch of 2": Plan(rows=(5,)),
    "head_scale is (3, 4) for 1 rows": Plan(head_scale=torch.ones(3, 4), rows=(0,)),
}


@pytest.mark.parametrize("reason", WRONG)
def test_check_says_what_is_wrong(reason):
    with pytest.raises(AttnCtrlError) as caught:
        WRONG[reason].check(8, 10, heads=4, batch=2)
    assert reason in str(caught.value)


JOINT = {
    "2 tokens are image and text": NegativeText(slice(0, 5), slice(3, 6), slice(6, 8)),
    "1 tokens are image and text": NegativeText(slice(0, 5), slice(5, 6), slice(4, 5)),
}


@pytest.mark.parametrize("reason", JOINT)
def test_a_negative_text_divides_a_joint_sequence(reason):
    with pytest.raises(AttnCtrlError, match=reason):
        Plan(negative=JOINT[reason]).check(8, 8)
    with pytest.raises(AttnCtrlError, match=reason):
        run(*qkv(1, 2, 8), Plan(negative=JOINT[reason]))


@pytest.mark.parametrize(
    "wrong, reason",
    [
        ({"sigma": 1.0}, "needs the grid"),
        ({"sigma": 0.0, "grid": (2, 2)}, "sigma 0.0 is not above 0"),
        ({"sigma": 1.0, "grid": (4,)}, r"grid \(4,\) is not"),
        ({"sigma": math.nan, "grid": (2, 0)}, "sigma nan is not above 0; grid"),
    ],
)
def test_a_wrong_smoothing_is_refused(wrong, reason):
    with pytest.raises(AttnCtrlError, match=reason):
        Lerp("smoothed", torch.ones(2), **wrong)


def test_sigma_belongs_to_smoothing():
    with pytest.raises(AttnCtrlError, match="belongs to target 'smoothed'"):
        Lerp("uniform", torch.ones(2), sigma=2.0)


def test_a_wrong_negative_text_names_everything():
    with pytest.raises(AttnCtrlError) as caught:
        NegativeText(slice(0, 4), slice(4, 6), slice(6, 8), scale=math.nan, tau=0.0, alpha=1.5, norm="l3")
    for reason in ("scale nan", "tau 0.0", "alpha 1.5", "norm 'l3'"):
        assert reason in str(caught.value)


def test_check_lists_every_reason():
    plan = Plan(
        (Segment(slice(0, 3), (KeyGroup(slice(0, 99)),)),),
        (Lerp("identity", torch.ones(3)),),
        torch.ones(9),
        rows=(7,),
    )
    with pytest.raises(AttnCtrlError) as caught:
        plan.check(8, 10, heads=4, batch=2)
    message = str(caught.value)
    for reason in (
        "in no segment",
        "reach outside",
        "as many queries",
        "strength is",
        "head_scale is",
        "rows (7,)",
        "HINT:",
    ):
        assert reason in message


def test_a_right_plan_passes():
    plan = Plan(
        (
            Segment(slice(0, 5), (KeyGroup(slice(0, 4)), KeyGroup(slice(4, None), torch.full((6,), -math.inf)))),
            Segment(slice(3, 8), (KeyGroup(slice(0, 3), torch.zeros(2, 1, 3)),), torch.tensor([0.25, 0.75, 1, 1, 1])),
            Segment(slice(3, 5), ALL, torch.tensor([0.75 - 1, 0.25 - 1]) + 1 - torch.tensor([0.0, 0.0])),
        ),
    )
    with pytest.raises(AttnCtrlError, match="sum to 1"):
        plan.check(8, 10, heads=4, batch=2)
    first = Segment(slice(0, 5), plan.segments[0].keys, torch.tensor([1, 1, 1, 0.75, 0.25]))
    Plan((first, plan.segments[1]), (Lerp("mean_query", torch.rand(2, 4)),)).check(8, 10, heads=4, batch=2)


@pytest.mark.parametrize(
    "plan", [Plan((Segment(slice(0, 6), ALL),)), Plan((Segment(slice(0, 6), ALL), Segment(slice(0, 2), ALL)))]
)
def test_running_an_uncovered_plan_raises_even_unchecked(plan):
    with pytest.raises(AttnCtrlError, match="of 8 query tokens"):
        run(*qkv(1, 2, 8), plan)


def test_describe():
    plan = Plan(
        (Segment(slice(0, 3), ALL), Segment(torch.tensor([3, 5, 9]), ALL)),
        (Lerp("identity", torch.tensor([0, 0.7, 0, 0.7]), slice(0, 6)), Lerp("uniform", torch.zeros(4))),
        rows=(1,),
    )
    assert plan.describe() == (
        "2 segments (3 + 3 query tokens); identity 0.7 on heads 1,3, 6 region tokens, mask (rows 1)"
    )
    assert Plan().describe() == "plain attention"
    assert Plan((Segment(slice(0, None), ALL),)).describe() == "1 segment (0: query tokens)"


def test_a_plan_is_resolved_once_per_length():
    plan = Plan((Segment(slice(0, None), (KeyGroup(slice(0, 4)),)),))
    run(*qkv(1, 2, 8), plan)
    run(*qkv(1, 2, 8), plan)
    run(*qkv(1, 2, 9), plan)
    assert len(plan.programs) == 2


def test_same_plan_for_other_rows():
    plan = Plan(head_scale=torch.ones(2))
    assert plan.on(1, 2).rows == (1, 2)
    assert plan.rows is None
