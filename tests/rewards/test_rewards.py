"""The parts of a reward, and scoring examples."""

import math
import pickle

import pytest
from jsonargparse import ArgumentParser

from cpt_lightning.rewards import Reward, RewardPart, permutation_hits, score
from cpt_lightning.types import Example


def test_the_total_is_the_weighted_sum_of_its_parts():
    """0.9 * accuracy + 0.1 * format, as paper A has it."""
    reward = Reward(kind="text", format="think_answer")
    good, bare = "<think>a</think><answer>red</answer>", "red"
    assert reward(good, "red") == {"total": pytest.approx(1.0), "accuracy": 1.0, "format": 1.0}
    assert reward(bare, "red") == {"total": pytest.approx(0.9), "accuracy": 1.0, "format": 0.0}
    assert reward(good, "blue") == {"total": pytest.approx(0.1), "accuracy": 0.0, "format": 1.0}


def test_without_a_format_the_total_is_the_accuracy():
    assert Reward()("red", "Red") == {"total": 1.0, "accuracy": 1.0}


def test_an_answer_in_the_wrong_style_can_be_made_to_earn_nothing():
    reward = Reward(format="think_answer", accuracy_needs_format=True)
    assert reward("red", "red") == {"total": 0.0, "accuracy": 1.0, "format": 0.0}


def test_the_jigsaw_reward_of_paper_b_is_hits_and_accuracy_and_format():
    """All right and well-formed: 1 + 1 + 1; two of four right: 0.5 + 0 + 1."""
    reward = Reward("permutation", "think_answer", 1.0, 1.0, extra={"hits": RewardPart(permutation_hits)})
    assert reward("<think>.</think><answer>2 1 4 3</answer>", "2, 1, 4, 3")["total"] == pytest.approx(3)
    assert reward("<think>.</think><answer>2 1 3 4</answer>", "2, 1, 4, 3")["total"] == pytest.approx(1.5)


def test_the_jigsaw_reward_of_paper_b_is_written_in_yaml():
    """Hits of 2 of 4 weigh 1, as do accuracy and format: 0.5 + 0 + 1."""
    parser = ArgumentParser()
    parser.add_argument("--reward", type=Reward)
    config = parser.parse_string("""
        reward:
          kind: permutation
          format: think_answer
          accuracy_weight: 1.0
          format_weight: 1.0
          extra: {hit: {function: cpt_lightning.rewards.permutation_hits, weight: 1.0}}
    """)
    reward = parser.instantiate(config).reward
    parts = reward("<think>.</think><answer>2 1 3 4</answer>", "2, 1, 4, 3")
    assert parts == {"total": 1.5, "accuracy": 0.0, "format": 1.0, "hit": 0.5}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "colour"}, "'colour' is unknown; there are exact"),
        ({"format": "xml"}, "'xml' is unknown; there are none, think_answer, think_boxed"),
        ({"accuracy_weight": -1}, "accuracy_weight is -1"),
        ({"format_weight": math.nan}, "format_weight is nan"),
        ({"accuracy_needs_format": True}, "needs a format"),
        ({"extra": {"total": RewardPart(permutation_hits)}}, "'total'"),
        ({"extra": {"recall": RewardPart(permutation_hits)}}, "'recall' has a name that results use otherwise"),
        ({"extra": {"num_samples": RewardPart(permutation_hits)}}, "'num_samples'"),
        ({"extra": {"a/b": RewardPart(permutation_hits)}}, "'a/b'"),
        ({"extra": {"hits": RewardPart(permutation_hits, math.inf)}}, "'hits' is inf"),
    ],
)
def test_a_reward_that_makes_no_sense_is_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        Reward(**options)


def test_a_reward_travels_to_workers():
    reward = Reward("number", "think_boxed", extra={"hits": RewardPart(permutation_hits, 0.5)})
    assert pickle.loads(pickle.dumps(reward)) == reward


def example(reward, row_id="rows.json:7", gold="red"):
    return Example("colours", row_id, [], gold, reward)


def test_completions_of_one_example_stand_together_when_scored():
    examples = [example(Reward(), gold="red"), example(Reward(), gold="blue")]
    totals = [parts["total"] for parts in score(["red", "blue", "red", "blue"], examples)]
    assert totals == [1, 0, 0, 1]
    assert score([], []) == []
    with pytest.raises(ValueError, match="3 completions cannot be shared out among 2 examples"):
        score(["a", "b", "c"], examples)


def failing(completion, gold):
    raise KeyError("oops")


@pytest.mark.parametrize(
    "reward, message",
    [
        (failing, "task 'colours', rows.json:7: the reward raised KeyError"),
        (Reward(kind="letter"), "task 'colours', rows.json:7: .* no option letter"),
        (Reward(extra={"bonus": RewardPart(lambda completion, gold: math.nan)}), "rows.json:7: .*'bonus' is nan"),
        (
            Reward(extra={"bonus": RewardPart(lambda completion, gold: [1.0])}),
            r"rows.json:7: .*'bonus' is \[1.0\]; give a",
        ),
        (lambda completion, gold: {"accuracy": 1.0}, "rows.json:7: .*finite 'total'"),
        (lambda completion, gold: {"total": 1.0}, "rows.json:7: .*finite 'total' and 'accuracy'"),
        (lambda completion, gold: 1.0, "rows.json:7: .*finite 'total'"),
    ],
)
def test_a_reward_that_fails_names_task_and_row(reward, message):
    with pytest.raises(RuntimeError, match=message):
        score(["red"], [example(reward)])


def is_near(completion, gold):
    return abs(float(completion) - float(gold)) < 0.5


def brevity_of_trl(completions, **kwargs):
    return [1 / len(completion) for completion in completions]


def of_trl(prompts, completions):
    return [1.0 for _ in completions]


def of_verl(data_source, solution_str, ground_truth, extra_info=None):
    return 1.0


def of_easyr1(reward_inputs):
    return [{"overall": 1.0} for _ in reward_inputs]


def test_a_function_of_ones_own_is_the_accuracy():
    """It sees the whole text, has its place in the total, and is named where results say how answers are compared."""
    reward = Reward(is_near, extra={"bonus": RewardPart(is_near, 0.5)})
    assert reward("7.2", "7") == {"total": 1.5, "accuracy": 1.0, "bonus": 1.0}
    assert (reward("8", "7")["accuracy"], reward.kind_name, Reward("number").kind_name) == (0.0, "is_near", "number")
    with pytest.raises(ValueError, match=r"the accuracy by of_three is 3.0; give a number in \[0, 1\]"):
        Reward(of_three)("7", "7")


def of_three(completion, gold):
    return 3


def test_a_function_of_ones_own_is_named_in_yaml():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Reward, "reward")
    parsed = parser.parse_string("reward: {kind: tests.rewards.test_rewards.is_near}")
    assert parser.instantiate(parsed).reward == Reward(is_near)


@pytest.mark.parametrize("function", [brevity_of_trl, of_trl, of_verl, of_easyr1, len])
def test_a_reward_function_of_another_trainer_is_refused_at_once(function):
    for make in (RewardPart, Reward):
        with pytest.raises(ValueError, match=rf", {function.__name__}, takes \(.*write a function of one text"):
            make(function)


def test_what_cannot_be_called_is_no_reward_function():
    with pytest.raises(TypeError, match=r"the function of an extra reward part is 3; give a function"):
        RewardPart(3)


@pytest.mark.parametrize("extra", [{"hit": permutation_hits}, [RewardPart(permutation_hits)]])
def test_extra_parts_that_are_none_are_refused_with_an_example(extra):
    with pytest.raises(TypeError, match=r"extra is .*give a dict of parts by name, as \{'hit': RewardPart\(hit\)\}"):
        Reward(extra=extra)
