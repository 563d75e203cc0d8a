"""Chat templates cut into segments: what is the prompt's, what is the answer's, where a turn ends."""

import pytest

from palate.data.segments import Chat, Segment, rewrites_history, stop_tokens, turn_ending
from palate.models.tokenizer import train_bpe
from palate.records import Message
from palate.settings import PalateError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BARE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{% if m['role'] != 'assistant' or loop.last %}{{ m['role'] }}: {{ m['content'] }};"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def tokenizer():
    made = train_bpe(["user assistant system: hello there <|im_start|> <|im_end|>"] * 3, 300)
    made.inner.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return made


def turns(*said):
    return tuple(Message("assistant" if i % 2 else "user", text) for i, text in enumerate(said))


def test_the_plain_template_ends_turns_with_the_end_token(tokenizer):
    assert turn_ending(tokenizer) == ("<eos>", "")
    prompt, answer = Chat.of(tokenizer).whole(turns("Hi"), turns("", "Hello")[1:])
    assert prompt == [Segment("User: Hi\nAssistant:")]
    assert answer == [Segment(" Hello<eos>", answer=True, ended=True)]
    assert stop_tokens(tokenizer) == (tokenizer.eos,)


def test_chatml_keeps_the_line_break_out_of_the_answer(tokenizer):
    tokenizer.inner.chat_template = CHATML
    assert turn_ending(tokenizer) == ("<|im_end|>", "\n")
    prompt, answer = Chat.of(tokenizer).whole(turns("a", "b", "c"), turns("", "d")[1:])
    assert [s.text for s in prompt] == [
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
        "b<|im_end|>",
        "\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n",
    ]
    assert [s.answer for s in prompt] == [False, True, False]
    assert answer == [Segment("d<|im_end|>", answer=True, ended=True)]
    end = tokenizer.encode("<|im_end|>")
    assert stop_tokens(tokenizer) == (tokenizer.eos, *end)


def test_a_template_without_an_end_mark_leaves_the_end_to_us(tokenizer):
    tokenizer.inner.chat_template = BARE
    chat = Chat.of(tokenizer)
    assert (chat.mark, chat.blank) == ("", "\n")
    prompt, answer = chat.whole(turns("a", "b", "c"), turns("", " d ")[1:])
    assert "".join(s.text for s in prompt) == "user: a\nassistant: b\nuser: c\nassistant:"
    assert [s.text for s in prompt if s.answer] == [" b"]
    assert answer == [Segment(" d", answer=True, ended=False)]


@pytest.mark.parametrize("template", [None, CHATML, BARE])
def test_segments_are_the_rendered_text(tokenizer, template):
    tokenizer.inner.chat_template = template or tokenizer.inner.chat_template
    chat = Chat.of(tokenizer)
    talk = turns("a", "b", "", "d", "e b")
    assert "".join(s.text for s in chat.prompt(talk)) == tokenizer.render(talk, True)


def test_an_empty_answer_is_its_end(tokenizer):
    _, answer = Chat.of(tokenizer).whole(turns("Hi"), turns("", "")[1:])
    assert answer[-1].text.strip() == "<eos>"
    assert answer[-1].ended


def test_answers_of_several_turns(tokenizer):
    talk = turns("a", "b", "c", "d", "late")
    prompt, answer = Chat.of(tokenizer).whole(talk[:1], talk[1:])
    assert prompt == Chat.of(tokenizer).prompt(talk[:1])
    assert [s.answer for s in answer] == [True, False, True]
    assert "".join(s.text for s in [*prompt, *answer]) == tokenizer.render(talk[:4], False)


def test_a_template_that_rewrites_history_is_noticed(tokenizer):
    tokenizer.inner.chat_template = FORGETFUL
    chat, talk = Chat.of(tokenizer), turns("a", "b", "c", "d")
    prompt, answer = chat.whole(talk[:3], talk[3:])
    assert [s.text for s in prompt] == ["user: a;user: c;assistant: "]
    assert answer[-1].text == "d;"
    assert rewrites_history(prompt, talk[:3])
    with pytest.raises(PalateError, match="Keep only its last turn"):
        chat.whole(talk[:1], talk[1:])


def test_a_template_that_drops_answers_is_refused(tokenizer):
    tokenizer.inner.chat_template = "nothing"
    with pytest.raises(PalateError, match="leaves out what the assistant says"):
        Chat.of(tokenizer)
