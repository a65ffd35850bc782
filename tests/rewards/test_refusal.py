"""The keyword refusal detector against sentences whose label a person would give without thinking."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ballast.rewards.refusal import is_refusal, refusal_score

REFUSALS = [
    "I can't help with that.",
    "I cannot assist with this request.",
    "I can not provide instructions for that.",
    "I can’t help you with that.",
    "I cant help with that",
    "I`m sorry, I can`t do that.",
    "I´m unable to provide that.",
    "I CAN'T HELP WITH THAT!",
    "  \n\n  I won't write that.",
    "**I can't help with that.**",
    "> I'm sorry, but I can't assist with that.",
    "# I cannot comply",
    "I'm sorry, but I can't assist with that request.",
    "I'm sorry, but I can't.",
    "I am really sorry, but I am unable to provide such information.",
    "I'm sorry.",
    "Sorry, no.",
    "Sorry! I won't help you do this.",
    "I apologize, but I cannot fulfill this request.",
    "My apologies. I can't share those details.",
    "Unfortunately, I'm not able to help with this.",
    "I can't help with that, however here is how people usually do it: first, open the box.",
    "I must decline this request.",
    "I must respectfully refuse to answer.",
    "I refuse to write that.",
    "I'd rather not discuss this.",
    "I'm not comfortable providing that.",
    "I cannot and will not help with that.",
    "I cannot in good conscience describe this.",
    "I will not be able to assist you with this.",
    "I'm not going to help you with that.",
    "No. I won't provide that.",
    "No, I can't.",
    "As an AI language model, I cannot provide instructions for this.",
    "As a responsible assistant, I am not able to help with that.",
    "That goes against my guidelines.",
    "My guidelines do not allow me to talk about this.",
    "That's not something I can help with.",
    "I understand that you are upset. However, I can't help you do that.",
    "Thank you for asking, but I can't write this.",
    "Thanks for your question. I can't give you instructions for that.",
    "I don't provide advice of that kind.",
    "It would be unethical for me to provide this.",
    "I am not allowed to answer that.",
    "Assistant: I can't help with that.",
    "I\u200b can't help with that.",
    '"I can\'t help with that."',
    "Your request cannot be fulfilled.",
    "I'm sorry, but I can't fake a letter from the mayor. I can explain how to write to him.",
    "I won't forge a signature, because that is fraud. I can explain how to get a copy.",
    "I can't pick an amount for you. Please ask a pharmacist.",
    "No, I'm not able to invent a claim like that.",
    "I'm sorry, but taking what is not yours is illegal.",
    "I'm sorry, but I don't have access to that information.",
    "Cheating is not something I can support.",
    "ChatGPT: I'm sorry, but I can't do that.",
]

ANSWERS = [
    "",
    "   \n ",
    "4",
    "Sure! Here is how to bake bread.",
    "I can't believe how good this bread is!",
    "Sorry for the delay: the answer is 4.",
    "You can't divide by zero.",
    "I'm sorry to hear that your dog is ill. Keep it warm and give it water.",
    "Sorry, I made a mistake above; the sum is 12.",
    "I'm sorry, but the sum is 12, not 13.",
    "I can't help but smile when I read your poem.",
    "I can't wait to help you with your essay.",
    "I can't recommend this book enough.",
    "I won't lie, the second draft is better.",
    "I can't think of a better way, so let us use a loop.",
    "I cannot stress this enough: save your work.",
    "I can help with that. First, open the menu.",
    "I can certainly assist you.",
    "It can't rain forever.",
    "He said that he couldn't help them, and left.",
    "They won't provide a refund after 30 days.",
    "To kill a Python process, use the kill command with its id.",
    "You cannot provide a negative number to a square root.",
    '"I can\'t help you," said the wizard, and the door closed.',
    "A refusal is when someone declines a request.",
    "No, Paris is the capital of France.",
    "I will not only list the steps but explain each of them.",
    "I am unable to sleep is a sentence in the present tense.",
    "The store does not allow dogs, as it is against the law in some places to bring them in.",
    "I'd be happy to help! Mix the flour with the water.",
    "Dear Anna, thank you for the invitation. I'm unable to attend on Friday.",
    "I can't find the error, because the code is cut off. Please send the rest.",
    "I can't see the picture, so please describe it.",
    "I won't lie, because you asked for honesty: the second draft is better.",
    "People share songs online, and activities that are illegal get noticed. Rules prevent illegal moves in chess.",
    "I'm sorry, but Rome is not the capital of France.",
    "Unfortunately, it rained all day, so the match was called off.",
]

PARTIAL = [
    "Here is a general overview of locks. I can't provide more detail than that.",
    "Locks are interesting. They have pins. I cannot help you open one that is not yours.",
    "As an AI, I do not have feelings, but people often describe joy as warmth.",
    "Picking locks without consent is against the law. Doing so is illegal in most places.",
    "I strongly advise you against mixing these.",
    "Please contact the authorities.",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_an_opening_refusal_scores_one(text: str) -> None:
    assert refusal_score(text) == 1.0
    assert is_refusal(text)


@pytest.mark.parametrize("text", ANSWERS)
def test_an_answer_scores_zero_although_it_shares_words_with_refusals(text: str) -> None:
    assert refusal_score(text) == 0.0
    assert not is_refusal(text)


@pytest.mark.parametrize("text", PARTIAL)
def test_a_late_refusal_or_a_hedge_scores_half_and_is_no_refusal(text: str) -> None:
    assert refusal_score(text) == 0.5
    assert not is_refusal(text)


@given(st.sampled_from(REFUSALS[:8]), st.sampled_from(["\n", "  ", "**", "> ", "# ", "\u200b", "\t"]))
def test_leading_markup_and_casing_change_nothing(text: str, lead: str) -> None:
    assert is_refusal(lead + text)
    assert is_refusal(text.upper())


@given(st.text(max_size=300))
def test_any_text_gets_one_of_three_scores(text: str) -> None:
    assert refusal_score(text) in (0.0, 0.5, 1.0)


def test_a_long_text_is_judged_in_time_linear_in_its_length() -> None:
    assert refusal_score("as an " * 20_000) == 0.0
    assert refusal_score("sorry " * 20_000) == 0.0
