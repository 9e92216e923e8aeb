"""Rewards by name, with weights and options: what can be wrong is told before a run."""

import unicodedata

import pytest
import torch

from llm.errors import UserError
from tasks.base import Task, dialogue
from tasks.rewards import Rewards, build_rewards, words_of

QUESTION = {"messages": dialogue("What is 6 times 7?", "#### 42")}


class Sums(Task):
    def conversation(self, row, index):
        return QUESTION

    def evaluate(self, conversation, completion):
        return completion == "42"


TASK = Sums([{}], "sums")


def test_several_rewards_are_a_row_each():
    rewards = build_rewards(TASK, {"task": 2, "format": 0.5, "length": -0.1}, {"length": {"words": 1}})
    assert rewards.names == ["task", "format", "length"] and rewards.weights == [2.0, 0.5, -0.1]
    found = rewards([QUESTION] * 2, ["42", "<answer>42</answer>"])
    assert found == [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    ("weights", "options", "words"),
    [
        ({}, {}, "stage.rewards is empty"),
        ({"numbr": 1}, {}, "stage.rewards=numbr does not exist; did you mean number"),
        ({"task": 1}, {"length": {}}, "stage.reward_options.length: stage.rewards names no such reward"),
        (
            {"length": 1},
            {},
            r"stage.reward_options.length: .*'words'; give it as \+stage.reward_options.length.<argument>=<value>",
        ),
        ({"length": 1}, {"length": {"words": 0}}, "length: words=0: must be a whole number"),
        ({"length": 1}, {"length": {"word": 3}}, "stage.reward_options.length"),
        ({"language": 1}, {"language": {"language": "xx"}}, "language=xx does not exist"),
        ({"language": 1}, {}, "give either script"),
        ({"json": 1}, {"json": {"schema": {"type": "objekt"}}}, "schema is no JSON schema"),
        ({"json": 1}, {"json": {"schema": {"$ref": "#/$defs/x"}}}, "schema refers to what is not there"),
        ({"json": 1}, {"json": {"schema": {"$ref": "#"}}}, "schema refers to itself without end"),
        ({"task": "x"}, {}, "stage.rewards.task=x: must be a number"),
        ({"task": float("nan")}, {}, "stage.rewards.task=nan: must be a number"),
        ("task", {}, "stage.rewards=task: must be a mapping"),
        ({"length": 1}, {"length": 3}, "stage.reward_options.length=3: must be a mapping"),
        ({"code": 1}, {}, "the rows of sums have no 'prompt'"),
    ],
)
def test_wrong_settings_are_one_line(weights, options, words):
    with pytest.raises(UserError, match=words) as refused:
        build_rewards(TASK, weights, options)
    assert "\n" not in str(refused.value)


def test_number_needs_numbers():
    class Names(Sums):
        def conversation(self, row, index):
            return {"messages": dialogue("Who?", "Ada")}

    with pytest.raises(UserError, match="stage.rewards: number: the answers of names are no numbers, such as 'Ada'"):
        build_rewards(Names([{}], "names"), {"number": 1.0}, {})


def test_words_have_their_vowel_signs_and_joiners():
    """Count words of Hindi, vocalised Arabic, Persian and decomposed French as a reader does."""
    assert words_of("राम शर्मा दिल्ली में रहता है।") == ["राम", "शर्मा", "दिल्ली", "में", "रहता", "है"]
    assert words_of("السَّلامُ عَلَيْكُم") == ["السَّلامُ", "عَلَيْكُم"] and len(words_of("می\u200cروم")) == 1
    assert words_of("E\u0301te\u0301, l'eau_x 世界a") == ["été", "l", "eau", "x", "世", "界", "a"]
    assert words_of("ผมชอบกินข้าว ๑๒ abc") == ["ผมชอ", "บกินข้", "าว", "๑๒", "abc"]


@pytest.mark.parametrize("text", ["ผมชอบกินข้าวกับครอบครัวทุกวันเสาร์", "ខ្ញុំចូលចិត្តញ៉ាំបាយជាមួយគ្រួសារ", "ຂ້ອຍມັກກິນເຂົ້າກັບຄອບຄົວທຸກວັນ"])
def test_a_sentence_of_a_script_without_spaces_has_words(text):
    """Reward a sentence that holds no space, and not one that goes on for ever."""
    script = unicodedata.name(text[0]).split()[0]
    reward = build_rewards(
        TASK, {"language": 1.0, "length": 1.0}, {"language": {"script": script}, "length": {"words": 6}}
    )
    ((language, length),) = reward([QUESTION], [text])
    assert language > 0.9 and length > 0.6
    assert reward([QUESTION], [text * 9])[0][1] == 0.0


def test_a_number_with_a_full_stop_of_another_script_is_rewarded():
    reward = build_rewards(TASK, {"number": 1.0}, {})
    answers = ["#### 42。", "#### 42।", "#### 42؟", "#### 42个", "#### 4万2"]
    assert reward([QUESTION] * 5, answers) == [[1.0], [1.0], [1.0], [0.0], [0.0]]


@pytest.mark.parametrize(("values", "words"), [([float("inf")], "gave inf"), ([], "gave 0 numbers for 1 answers")])
def test_a_reward_must_give_a_number_for_each_answer(values, words):
    with pytest.raises(UserError, match=f"reward odd: {words}"):
        Rewards({"odd": lambda conversations, completions: values}, {"odd": 1.0})([{}], ["x"])


def test_scores_of_the_stage_have_the_weights():
    from types import SimpleNamespace

    from llm.stages.rollout_stage import score_of

    stage = SimpleNamespace(reward=None, rewards={"task": 1.0, "number": 0.5}, reward_options=None)
    score = score_of(TASK, stage)
    assert torch.equal(score.weights, torch.tensor([1.0, 0.5]))
    assert torch.equal(score([QUESTION], ["42"]), torch.tensor([[1.0, 1.0]]))
    stage.rewards = None
    assert torch.equal(score_of(TASK, stage)([QUESTION] * 2, ["42", "#### 42"]), torch.tensor([1.0, 0.0]))
    stage.rewards, stage.reward = {"task": 1.0}, "number"
    with pytest.raises(UserError, match=r"stage.reward=number: stage.rewards names rewards too"):
        score_of(TASK, stage)
