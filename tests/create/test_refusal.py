"""What counts as an assistant's refusal, and what only begins like one."""

from __future__ import annotations

import pytest

from anchored.create.replies import is_refusal


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't assist with that.",
        "I’m sorry, but I can’t assist with that request.",
        "I'm sorry, I cannot help with this.",
        "Sorry, I can't help you with that.",
        "I cannot fulfill your request.",
        "I can't fulfill this request. I can, however, talk about safety.",
        "I apologize, but I am unable to provide a revision of this answer.",
        "I apologize, but as an AI language model, I cannot generate harmful content.",
        "As an AI language model, I'm not able to provide medical advice.",
        "Unfortunately, I won't be able to assist with that.",
        "I must decline to answer this question.",
        "I'm not comfortable helping with that.",
        "I will not comply with that.",
        "I am sorry, but I won't write that kind of content.",
        "Thank you for asking, but I'm sorry: I can't provide instructions for that.",
        "I can't do that.",
        "I cannot provide information or guidance on illegal activities.",
        "I apologize, but I do not feel comfortable generating malicious code.",
        "I'm really sorry, but I can't revise the student's answer.",
        "I must decline to answer this.",
        "I must respectfully decline to provide that.",
        "I do not feel comfortable writing that.",
        "It is not appropriate for me to revise this solution.",
        "As an AI language model, it is not ethical or appropriate for me to give advice on tax fraud.",
        "My apologies, but this is not something I can help with.",
        "I will not generate that kind of content.",
        "Sorry, but I can't provide the lyrics to the third verse.",
    ],
)
def test_an_assistant_that_declines_refuses(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't come to your party on Friday.",
        "I'm so sorry, but I can't help you move this Saturday.",
        "I can't wait to tell you about photosynthesis!",
        "I'm sorry to hear that. Could you please tell me more about the issue?",
        "I apologize for the inconvenience. Could you provide your order number?",
        "Sorry, we could not find your order. Please check the number.",
        "Customer: I'm sorry, but I can't assist with that.",
        "The sky is blue. I'm sorry, but I can't assist with more.",
        "I cannot recommend this restaurant enough.",
        "I won't lie: the film is long.",
        "We cannot divide by zero, so the expression is undefined.",
        "I can't complete the marathon, but I will start.",
        "Unfortunately, the train was late.",
        "I must decline your kind invitation, dear Anna.",
        "It is not appropriate for guests to arrive early.",
        "It is not easy for me to say goodbye, my friend.",
        "That's not something I can recommend, said the cook, but try the soup.",
        "I don't feel comfortable driving at night, so I take the train.",
        "I won't produce a play this year, the director said.",
        "Sorry, but the lyrics to that song were never written down.",
        "I can't believe it was midnight already, thought Anna.",
        "I refuse to give up, shouted the captain.",
        "I'm sorry for your loss. Grief takes time.",
        "As an AI language model, I have no feelings, but here is a poem.",
        "",
    ],
)
def test_other_texts_do_not(text: str) -> None:
    assert not is_refusal(text)
