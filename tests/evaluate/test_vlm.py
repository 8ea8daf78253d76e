import json

import numpy as np
import pytest

from attnctrl import AttnCtrlError
from attnctrl.apps.cli import main
from attnctrl.apps.evaluation import default_world
from attnctrl.controls import PAI, VHR
from attnctrl.evaluate import t2i
from attnctrl.evaluate.vlm import (
    Answer,
    ChairTest,
    PopeTest,
    Scenes,
    ask,
    training_habits,
    world_named,
    yes_no_tokens,
)
from attnctrl.icons.questions import IconWorld, presence
from attnctrl.pipelines import GroundedVLM

from ..language import folders
from .test_t2i import truth


SAYS = "yes no Is there a cat dog in the image ? Describe picture . star moon".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a tiny LLaVA whose tokenizer knows words of the questions."""
    words, folders.WORDS = folders.WORDS, list(dict.fromkeys([*folders.WORDS, *SAYS]))
    try:
        return folders.save_llava(tmp_path_factory.mktemp("llava"))
    finally:
        folders.WORDS = words


@pytest.fixture(scope="module")
def vlm(model):
    return GroundedVLM.from_pretrained(model)


@pytest.fixture(scope="module")
def pope():
    return PopeTest.make(IconWorld(), 60)


@pytest.fixture
def attnctrl(capsys):
    def run(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return (code, *capsys.readouterr())

    return run


# -- tests of a world ------------------------------------------------------------------------------------------------------


def test_splits_share_their_scenes_and_ask_nothing_twice(pope):
    assert list(pope.splits) == ["random", "popular", "adversarial"]
    for part in pope.splits.values():
        assert len(part) == 60 and sum(probe.present for probe in part) == 30
        for probe in part:
            assert probe.present == (probe.noun in pope.scenes.held[probe.scene])
    assert len(pope.asked) == len(set(pope.asked)) < 180
    again = PopeTest.make(IconWorld(), 60)
    assert again.asked == pope.asked and again.scenes.scenes == pope.scenes.scenes
    other = PopeTest.make(IconWorld(), 60, stream=11)
    assert other.scenes.scenes[:5] != pope.scenes.scenes[:5]


def test_adversarial_questions_are_about_usual_companions(pope):
    world = IconWorld()
    habits = training_habits(world, 1500)
    top = sum(max(habits.beside[noun], key=habits.beside[noun].get) in world.partners[noun] for noun in world.nouns)
    assert top >= 12, "what is counted is what the world means by partners"

    def usual(split):
        part = pope.splits[split]
        return sum(absent.noun in world.partners[held.noun] for held, absent in zip(part[::2], part[1::2]))

    assert usual("adversarial") > 2 * usual("random")


def test_truth_scores_everything_and_its_opposite_nothing(pope):
    truth = [
        Answer(presence(p.noun, pope.scenes.scenes[p.scene].objects).answer, float(p.present)) for p in pope.asked
    ]
    lies = [Answer("No." if p.present else "Yes.", float(not p.present)) for p in pope.asked]
    for answers, value in ((truth, 1), (lies, 0)):
        assert all(found.accuracy.value == value for found in pope.scores(answers).values())
        assert all(found.f1.value == value for found in pope.scores(answers, by_probability=True).values())
    assert all(pope.right(truth)) and not any(pope.right(lies))
    assert pope.scores(truth)["all"].questions == len(pope.asked)


def test_true_captions_hallucinate_nothing():
    test = ChairTest.make(IconWorld(), 20)
    rng = np.random.default_rng(0)
    truth = [Answer(IconWorld().caption(scene, rng)) for scene in test.scenes.scenes]
    found = test.scores(truth)
    assert found.chair_s.value == 0 and found.recall.value == found.f1.value == 1 and found.words.value > 3
    mixed = test.scores(truth[1:] + truth[:1])
    assert mixed.chair_s.value > 0.8 and mixed.recall.value < 0.6
    assert all(test.right(truth))


def test_noise_is_the_same_every_time_and_leaves_the_truth():
    plain, noisy = (Scenes(IconWorld(), 1, 3, noise=noise) for noise in (0.0, 0.5))
    assert noisy.scenes == plain.scenes
    pixels = np.asarray(noisy.picture(1), dtype=float)
    assert (pixels == np.asarray(Scenes(IconWorld(), 1, 3, noise=0.5).picture(1))).all()
    assert np.abs(pixels - np.asarray(plain.picture(1))).mean() > 30
    with pytest.raises(AttnCtrlError, match="no standard deviation"):
        Scenes(IconWorld(), 1, 3, noise=-1.0)


def test_held_out_nouns_have_no_habits():
    class Emoji(IconWorld):
        name, held_out = "some", frozenset({"cat", "dog", "car", "tree", "moon", "key"})

    world = Emoji()
    assert not {noun for held in Scenes(world, 1, 30).held for noun in held} & world.held_out
    test = PopeTest.make(world, 30, ["random"], held_out=True)
    assert {probe.noun for probe in test.asked} <= world.held_out
    with pytest.raises(AttnCtrlError, match="HINT: --split random"):
        PopeTest.make(world, 30, ["popular"], held_out=True)
    with pytest.raises(AttnCtrlError, match="holds no nouns out of training"):
        ChairTest.make(IconWorld(), 5, held_out=True)


# -- asking ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("controls", [(), (PAI(alpha=0.8), VHR())], ids=["plain", "controlled"])
def test_a_padded_batch_answers_as_single_questions_do(vlm, controls):
    scenes = Scenes(IconWorld(), 5, 4)
    texts = ["Is there a cat ?", "picture", "Is there a dog in the image ?", "Describe the picture ."]
    pictures = [scenes.picture(i) for i in range(4)]
    together, report = ask(vlm, pictures, texts, controls, max_new_tokens=5)
    one_by_one, _ = ask(vlm, pictures, texts, controls, max_new_tokens=5, batch_size=1)
    assert [a.text for a in together] == [a.text for a in one_by_one] and all(a.text for a in together)
    for a, b in zip(together, one_by_one):
        assert 0 < a.yes < 1 and a.yes == pytest.approx(b.yes, rel=1e-3)
    assert "PAI" in report if controls else "acted" not in report


def test_yes_and_no_are_told_by_their_first_tokens(vlm, tmp_path):
    tokenizer = vlm.processor.tokenizer
    assert yes_no_tokens(tokenizer) == tuple([tokenizer.convert_tokens_to_ids(word)] for word in ("yes", "no"))
    assert yes_no_tokens(folders.tokenizer()) is None, "a tokenizer that knows neither word"


# -- the command -----------------------------------------------------------------------------------------------------------


def test_pope_is_measured_without_and_under_a_control(attnctrl, model, tmp_path):
    page = tmp_path / "pope.md"
    asked = ("evaluate", "pope", "-m", model, "--questions", 6, "--control", "PAI(alpha=0.5)", "--output", page)
    code, out, err = attnctrl(*asked, "--json", "--max-new-tokens", 3)
    assert code == 0, err
    found = json.loads(out)
    assert found["world"] == "icons, nouns of training" and [r["controls"] for r in found["results"]] == [
        [],
        ["PAI(alpha=0.5)"],
    ]
    for result in found["results"]:
        assert set(result["splits"]) == {"random", "popular", "adversarial", "all"}
        value, low, high = result["splits"]["random"]["accuracy"]
        assert result["splits"]["random"]["questions"] == 6 and low <= value <= high
    text = page.read_text(encoding="utf-8")
    assert "| no control | adversarial | 6 |" in text and "McNemar" in text and "PAI: " in text
    assert str(tmp_path.parent) not in text


def test_chair_counts_captions(attnctrl, model):
    code, out, err = attnctrl("evaluate", "chair", "-m", model, "--captions", 3, "--max-new-tokens", 4)
    assert code == 0, err
    assert "| setting | captions | CHAIR_s |" in out and "| no control | 3 |" in out


@pytest.mark.parametrize(
    "more, said",
    [
        (("--split", "hard"), "has no split 'hard'"),
        (("--world", "moon"), "there is no world 'moon'"),
        (("--held-out",), "holds no nouns out of training"),
        (("--control", "PIA()"), "there is no control 'PIA'"),
        (("--output", "nowhere/pope.md"), "does not exist"),
        (("--world", "emoji"), "emoji"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(attnctrl, monkeypatch, more, said):
    monkeypatch.delenv("ATTNCTRL_EMOJI", raising=False)
    code, _, err = attnctrl("evaluate", "pope", "-m", "no-such-model", *more)
    assert code == 2 and said in err and "Traceback" not in err


def test_text_to_image_is_measured_too(attnctrl, monkeypatch, tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "model_index.json").write_text("{}")
    monkeypatch.setattr(t2i, "load", lambda model, device, dtype: None)
    monkeypatch.setattr(t2i, "pipeline_call", lambda *options: truth)
    page = tmp_path / "quality.md"
    code, out, err = attnctrl("evaluate", "t2i", "-m", tmp_path / "tiny", "--prompts", 6, "--output", page)
    assert code == 0, err
    assert "| all | picture: everything asked | 6 / 6 |" in out and "tiny" in page.read_text(encoding="utf-8")
    code, _, err = attnctrl("evaluate", "t2i", "-m", "builtin:no-such-model")
    assert code == 2 and "there is no built-in model" in err


def test_worlds_go_by_the_models_name():
    assert default_world("builtin:smol-vlm") == "emoji" and default_world("builtin:icons-vlm") == "icons"
    assert world_named("icons").name == "icons"


# -- benchmarks ------------------------------------------------------------------------------------------------------------


def test_every_control_of_language_models_has_settings():
    from attnctrl.controls import LanguageControl
    from attnctrl.controls.spec import control_types, parse_control
    from benchmarks.vlm_answers import LEFT_OUT, SETTINGS

    names = {name for name, kind in control_types().items() if issubclass(kind, LanguageControl)} | {"HeadScale"}
    assert names == {*SETTINGS, *LEFT_OUT} and not {*SETTINGS} & {*LEFT_OUT}
    for name, (default, grid) in SETTINGS.items():
        for setting in (*([default] if default else []), *grid):
            text = setting.replace("{image}", "(0, 4)").replace("{sinks}", "[7]")
            for where in ("early", "middle", "late"):
                text = text.replace(f"{{{where}}}", "heads='0.0'")
            assert parse_control(text).name == name


def test_answers_under_all_controls_are_reported_and_kept(model, tmp_path, capsys):
    from benchmarks import vlm_answers

    words = [
        "--model",
        model,
        "--controls",
        "PAI",
        "VAR",
        "HeadScale",
        "--questions",
        "6",
        "--captions",
        "3",
        "--tune",
    ]
    words += ["4", "--caption-tokens", "6", "--record", str(tmp_path / "record"), "--output", str(tmp_path / "vlm.md")]
    vlm_answers.main(words)
    text = (tmp_path / "vlm.md").read_text(encoding="utf-8")
    assert "| PAI, default" in text and "`HeadScale({" in text and "comparisons with no control" in text
    assert "Not measured:" in text and "`VAR()`: VAR: no sink dimensions are known" in text
    assert "| VAR | `VAR(dims='any')` |" in text and str(tmp_path) not in text
    first = capsys.readouterr().out
    vlm_answers.main(words)
    again = capsys.readouterr().out
    assert "PAI(alpha=0.5): " in first and "PAI(alpha=0.5): " not in again, "nothing is asked twice"
    assert (tmp_path / "vlm.md").read_text(encoding="utf-8") == text


def test_costs_are_measured(tmp_path, capsys):
    from benchmarks import vlm

    words = ["--quick", "--record", str(tmp_path / "record"), "--output", str(tmp_path / "speed.md")]
    vlm.main(words)
    text = (tmp_path / "speed.md").read_text(encoding="utf-8")
    for name in ("VAR", "GIFT", "ACT", "PINE", "TokenPruning", "eager, maps returned"):
        assert f"\n| {name} | " in text, name
    assert text.count("- VAR, prefill") == 1 and "| exponent |" in text and "Not measured" not in text


def test_exponents_tell_linear_from_quadratic():
    from benchmarks.vlm import exponent

    assert exponent({n: 3 * n for n in (1024, 2048, 4096, 8192)}) == "1.00"
    assert exponent({n: n * n for n in (1024, 2048, 4096)}) == "2.00" and exponent({1024: 5}) == "–"
