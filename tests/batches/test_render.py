"""Rendering through chat templates like the well-known ones, told apart by what they do at the answer's borders."""

from __future__ import annotations

import time

import pytest
from tiny_models import CHATML, CORPUS, END, START, TRIMMED, make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from anchored.batches.render import Conversation, Renderer
from anchored.errors import ModelError
from anchored.records import Answer, Message, Prompt, user_prompt

DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
) + CHATML.removeprefix("{{ bos_token or '' }}")
"""As Qwen2.5's."""

THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% set content, thought = message.content, '' %}"
    "{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{% else %}{{ message.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
"""As Qwen3's: a finished answer always has a thinking block, and an empty one is a prompt's when thinking is off."""

SWITCHED = (
    "{% set mode = '/no_think' if enable_thinking is defined and not enable_thinking else '/think' %}"
    "{{ '<|im_start|>system\n' + mode + '<|im_end|>\n' }}"
) + CHATML.removeprefix("{{ bos_token or '' }}")
"""As SmolLM3's: the switch for thinking changes the system prompt too."""

ALWAYS_THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{{ message.content.split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
"""As DeepSeek-R1's: the generation prompt opens a thinking block that a finished answer does not have."""

EOS_AT_THE_END = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
"""As Phi-3's: an end of document follows the end of the turn."""

INSTRUCT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '[INST] ' + message.content + ' [/INST]' if message.role == 'user' else ' ' + message.content + '<|im_end|>' }}"
    "{% endfor %}"
)
"""As Mistral's and Llama 2's: no generation prompt, a space before the answer, strict roles."""

BARE = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""No token of its own, and a generation prompt that ends with a space, which merges with the answer's first word."""

QUESTION = "How many coins make 68 cents?"


def make_spaced_tokenizer(chat_template: str) -> PreTrainedTokenizerFast:
    """Like SentencePiece's: words carry the space before them, and the beginning of a text gets one."""
    scheme = {"replacement": "▁", "prepend_scheme": "first"}
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(**scheme)
    bpe.decoder = decoders.Metaspace(**scheme)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"], show_progress=False)
    bpe.train_from_iterator([*CORPUS, f"user: {QUESTION}\nassistant: The answer is 5."], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    return tokenizer


def make_pair(
    chosen: str = "The answer is 5.", rejected: str = "4 coins", prompt: Prompt | None = None
) -> Conversation:
    return Conversation(prompt or user_prompt(QUESTION, id="row-7"), (Answer(chosen), Answer(rejected)))


def text(tokenizer: PreTrainedTokenizerFast, ids: tuple[int, ...]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


@pytest.mark.parametrize(
    ("template", "before", "space", "end"),
    [
        (CHATML, f"{START}user\n{QUESTION}{END}\n{START}assistant\n", "", END),
        (TRIMMED, f"{START}user\n\n{QUESTION}{END}{START}assistant\n\n", "", END),
        (EOS_AT_THE_END, f"{START}user\n{QUESTION}{END}\n{START}assistant\n", "", END),
        (INSTRUCT, f"[INST] {QUESTION} [/INST]", " ", END),
        (THINKING, f"{START}user\n{QUESTION}{END}\n{START}assistant\n<think>\n\n</think>\n\n", "", END),
        (BARE, f"user: {QUESTION}\nassistant: ", "", END),
        (
            DEFAULT_SYSTEM,
            f"{START}system\nYou are a helpful assistant.{END}\n{START}user\n{QUESTION}{END}\n{START}assistant\n",
            "",
            END,
        ),
    ],
    ids=["chatml", "trimmed", "eos-at-the-end", "instruct", "thinking", "bare", "default-system"],
)
@pytest.mark.parametrize("bos", [False, True])
def test_the_prompt_is_the_generation_prompt_and_the_answer_ends_its_turn(
    template: str, before: str, space: str, end: str, bos: bool
) -> None:
    start = "<|bos|>" if bos else ""
    if bos and "bos_token" not in template:
        template = "{{ bos_token }}" + template
    tokenizer = make_tokenizer(template, bos)
    rendered = Renderer(tokenizer).one(make_pair())
    assert rendered.id == "row-7"
    assert text(tokenizer, rendered.prompt) == start + before
    assert text(tokenizer, rendered.answers[0]) == f"{space}The answer is 5.{end}"
    assert text(tokenizer, rendered.answers[1]) == f"{space}4 coins{end}"
    assert rendered.prompt.count(tokenizer.convert_tokens_to_ids("<|bos|>")) == bos
    # generation starts from these very ids
    options = {"enable_thinking": False} if template.endswith(THINKING) else {}
    generation = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=False, **options
    )
    assert rendered.prompt == tuple(generation)


def test_where_the_tokenizer_merges_across_the_border_the_answer_is_tokenized_by_itself() -> None:
    tokenizer = make_tokenizer(BARE)
    whole = tokenizer(f"user: {QUESTION}\nassistant: The answer is 5.", add_special_tokens=False)["input_ids"]
    rendered = Renderer(tokenizer).one(make_pair())
    assert tuple(whole[: len(rendered.prompt)]) != rendered.prompt, "the case that this test is about"
    alone = tokenizer(f"The answer is 5.{END}", add_special_tokens=False)["input_ids"]
    assert rendered.answers[0] == tuple(alone)


def test_a_tokenizer_that_puts_a_space_before_a_text_puts_none_before_an_answer() -> None:
    tokenizer = make_spaced_tokenizer(BARE)
    rendered = Renderer(tokenizer).one(make_pair())
    assert text(tokenizer, rendered.prompt + rendered.answers[0]).endswith("assistant: The answer is 5.</s>")


def test_a_switch_for_thinking_is_off_as_in_generation() -> None:
    tokenizer = make_tokenizer(SWITCHED)
    generation = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=False, enable_thinking=False
    )
    assert Renderer(tokenizer).one(make_pair()).prompt == tuple(generation)


def test_whitespace_of_an_answer_is_kept_unless_the_template_trims_it() -> None:
    for template, expected in [(CHATML, f"  5 \n\n{END}"), (TRIMMED, f"5{END}"), (BARE, f"  5{END}")]:
        tokenizer = make_tokenizer(template)
        assert text(tokenizer, Renderer(tokenizer).one(make_pair(chosen="  5 \n\n")).answers[0]) == expected


def test_an_added_token_of_spaces_ends_no_turn() -> None:
    tokenizer = make_tokenizer(CHATML)
    tokenizer.add_tokens(["  "])
    assert text(tokenizer, Renderer(tokenizer).one(make_pair(chosen="5  ")).answers[0]) == f"5  {END}"


@pytest.mark.parametrize("chosen", ["", " ", "?", QUESTION, "assistant\n", f"a {END} b", "<think>", "5 </thin", "🙂é"])
def test_answers_that_look_like_something_else_stay_whole(chosen: str) -> None:
    tokenizer = make_tokenizer(CHATML)
    assert text(tokenizer, Renderer(tokenizer).one(make_pair(chosen=chosen)).answers[0]) == chosen + END


def test_an_answer_with_its_own_thoughts_is_scored_with_them() -> None:
    tokenizer = make_tokenizer(THINKING)
    thoughtful = [f"<think>\n{thought}\n</think>\n\n5" for thought in ("one", "two")]
    rendered = Renderer(tokenizer).one(make_pair(*thoughtful))
    assert text(tokenizer, rendered.prompt).endswith("assistant\n")
    assert text(tokenizer, rendered.answers[0]) == thoughtful[0] + END
    assert text(tokenizer, rendered.answers[1]) == thoughtful[1] + END


def test_a_prompt_keeps_its_end_and_an_answer_its_start() -> None:
    tokenizer = make_tokenizer(CHATML)
    pair = make_pair("The answer is 5. " * 50, "4 coins")
    full = Renderer(tokenizer).one(pair)
    cut = Renderer(tokenizer, max_prompt_tokens=7, max_answer_tokens=20).one(pair)
    assert cut.prompt == full.prompt[-7:]
    assert cut.answers[0] == full.answers[0][:20]
    assert cut.answers[1] == full.answers[1]
    assert (full.cut_prompt, full.cut_answers) == (False, 0)
    assert (cut.cut_prompt, cut.cut_answers) == (True, 1)
    assert tokenizer.convert_tokens_to_ids(END) not in cut.answers[0]
    exact = Renderer(tokenizer, max_answer_tokens=len(full.answers[1])).one(pair)
    assert exact.answers[1][-1] == tokenizer.convert_tokens_to_ids(END)
    short = Renderer(tokenizer, max_answer_tokens=len(full.answers[1]) - 1).one(pair)
    assert short.answers[1] == full.answers[1][:-1]


def test_turns_before_the_last_are_part_of_the_prompt() -> None:
    tokenizer = make_tokenizer(CHATML)
    turns = (Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Yo"), Message("user", "5?"))
    rendered = Renderer(tokenizer).one(make_pair(prompt=Prompt(turns, "x")))
    expected = "".join(f"{START}{turn.role}\n{turn.content}{END}\n" for turn in turns)
    assert text(tokenizer, rendered.prompt) == f"{expected}{START}assistant\n"


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ((Message("system", "Be brief."), Message("user", "Hi")), "System role not supported"),
        ((Message("user", "Hi"), Message("user", "there")), "roles must alternate"),
    ],
)
def test_a_conversation_that_the_template_refuses_names_the_pair(turns: tuple[Message, ...], reason: str) -> None:
    renderer = Renderer(make_tokenizer(INSTRUCT))
    first, error, last = renderer.render([make_pair(), make_pair(prompt=Prompt(turns, "bad-row")), make_pair("6", "7")])
    assert (first, last) == (renderer.one(make_pair()), renderer.one(make_pair("6", "7")))
    with pytest.raises(ModelError, match=rf"'bad-row'.*{reason}"):
        raise error if isinstance(error, ModelError) else AssertionError(error)


def test_a_template_whose_answers_do_not_follow_its_generation_prompt_names_the_pair() -> None:
    with pytest.raises(ModelError, match=r"'row-7'.*generation prompt"):
        Renderer(make_tokenizer(ALWAYS_THINKING)).one(make_pair())


def test_half_a_surrogate_pair_names_the_pair() -> None:
    with pytest.raises(ModelError, match=r"'row-7'.*surrogate"):
        Renderer(make_tokenizer()).one(make_pair(chosen="a\ud800b"))


def test_a_model_without_a_chat_template_is_refused() -> None:
    with pytest.raises(ModelError, match="no chat template"):
        Renderer(make_tokenizer(chat_template=None))


def test_without_any_end_token_there_is_an_error() -> None:
    tokenizer = make_tokenizer(BARE)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="EOS"):
        Renderer(tokenizer).one(make_pair())


def test_many_pairs_give_what_each_gives_alone_and_are_quick() -> None:
    renderer = Renderer(make_tokenizer(TRIMMED))
    pairs = [make_pair("It is. " * (index % 40), str(index), user_prompt(f"{index}? " * 20)) for index in range(600)]
    start = time.process_time()
    rendered = renderer.render(pairs)
    assert time.process_time() - start < 20
    assert rendered[::37] == [renderer.one(pair) for pair in pairs[::37]]
    assert renderer.render([]) == []
