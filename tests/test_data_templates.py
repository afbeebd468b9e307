"""Templates against the paper's text, prompts against hand-made token lists, tokenizers against each other."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from opd_jax.data.templates import TEMPLATES, encode_prompt, render
from opd_jax.data.tokenizers import check_same_tokenizer, load_tokenizer, stop_ids, valid_vocab_size
from opd_jax.errors import InputError

CHAT = (
    "{% for m in messages %}<user> {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}{% if thinking is defined and not thinking %} quiet{% endif %}"
    "{% if fail is defined %}{{ raise_exception('no such mode') }}{% endif %}"
)
WORDS = ["<unk>", "<bos>", "<eos>", "<user>", "<bot>", "what", "is", "1", "+", "?", "quiet", "{", "}"]


def make_tokenizer(words=WORDS, bos=False, chat=None, eos: str | None = "<eos>"):
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token=eos, unk_token="<unk>", chat_template=chat
    )


def ids(text):
    return [WORDS.index(w) for w in text.split()]


def test_named_templates():
    assert render("1 + 1 ?", "plain") == "1 + 1 ?"
    boxed = "1 + 1 ? Please reason step by step, and put your final answer within \\boxed{}."
    assert render("1 + 1 ?", "boxed") == boxed
    lines = render("1 + 1 ?", "dapo").split("\n")
    assert lines == [
        "Solve the following math problem step by step. The last line of your response should be of the form "
        "Answer: $Answer (without quotes) where $Answer is the answer to the problem.",
        "",
        "1 + 1 ?",
        "",
        'Remember to put your answer on its own line after "Answer:".',
    ]


def test_user_template_takes_problems_literally():
    assert render("{problem} {0} \\frac{1}{2}", "Q: {problem} {x}") == "Q: {problem} {0} \\frac{1}{2} {x}"


def test_bad_templates_are_refused():
    with pytest.raises(InputError, match=r"'boxd'.*Expected plain, boxed, dapo, or a text with \{problem\}"):
        render("a", "boxd")
    with pytest.raises(InputError, match=r"escape.*Write \\boxed\{\} with single braces"):
        render("a", r"{problem} Put your answer within \boxed{{}}.")
    assert all(r"\boxed{{}}" not in t for t in TEMPLATES.values())


def test_chat_prompt_ends_with_the_generation_prompt():
    tokenizer = make_tokenizer(chat=CHAT, bos=True)
    assert encode_prompt(tokenizer, "1 + 1", "what is {problem} ?", True, {}) == ids(
        "<user> what is 1 + 1 ? <eos> <bot>"
    )
    quiet = encode_prompt(tokenizer, "1", "plain", True, {"thinking": False})
    assert quiet == ids("<user> 1 <eos> <bot> quiet")
    assert all(type(i) is int for i in quiet)


def test_plain_prompt_gets_the_first_special_token_only():
    assert encode_prompt(make_tokenizer(bos=True), "1 + 1", "plain", False, {}) == ids("<bos> 1 + 1")
    assert encode_prompt(make_tokenizer(bos=True), "<bos> 1", "plain", False, {}) == ids("<bos> 1")
    assert encode_prompt(make_tokenizer(), "1 + 1", "plain", False, {}) == ids("1 + 1")


def test_chat_without_template_names_the_mend():
    with pytest.raises(InputError, match=r"no chat template.*data\.chat=false"):
        encode_prompt(make_tokenizer(), "1", "plain", True, {})
    with pytest.raises(InputError, match=r"chat template failed with data\.chat_arguments.*no such mode"):
        encode_prompt(make_tokenizer(chat=CHAT), "1", "plain", True, {"fail": True})


def test_tokenizer_round_trip_and_stop_ids(tmp_path):
    make_tokenizer(chat=CHAT).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    assert encode_prompt(tokenizer, "1", "plain", True, {}) == ids("<user> 1 <eos> <bot>")
    assert valid_vocab_size(tokenizer) == len(WORDS)
    assert stop_ids(tmp_path, tokenizer) == (2,)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert stop_ids(tmp_path, tokenizer) == (2, 9)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 9]}))
    assert stop_ids(tmp_path, tokenizer) == (2, 4, 9)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": "<eos>"}))
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id='<eos>'"):
        stop_ids(tmp_path, tokenizer)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match=r"generation_config\.json: not a JSON object"):
        stop_ids(tmp_path, tokenizer)


def test_no_end_of_sequence_anywhere_is_refused(tmp_path):
    with pytest.raises(InputError, match="no end-of-sequence id"):
        stop_ids(tmp_path, make_tokenizer(eos=None))


def test_bad_tokenizer_directories(tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(InputError, match="no tokenizer there"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path)


def test_same_tokenizer():
    check_same_tokenizer(make_tokenizer(), make_tokenizer(chat=CHAT))
    swapped = [*WORDS[:5], WORDS[6], WORDS[5], *WORDS[7:]]
    with pytest.raises(InputError, match=r"13 / 13 tokens, 2 ids differ.*id 5: 'what' / 'is'; id 6: 'is' / 'what'"):
        check_same_tokenizer(make_tokenizer(), make_tokenizer(swapped))
    with pytest.raises(InputError, match=r"13 / 14 tokens, 1 ids differ.*id 13: None / 'extra'"):
        check_same_tokenizer(make_tokenizer(), make_tokenizer([*WORDS, "extra"]))
    check_same_tokenizer(make_tokenizer(), make_tokenizer(eos="<bot>"))  # as Qwen3 and its base model


def test_added_tokens_count():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>"])
    assert valid_vocab_size(tokenizer) == len(WORDS) + 1
    with pytest.raises(InputError, match="'<think>' / None"):
        check_same_tokenizer(tokenizer, make_tokenizer())
