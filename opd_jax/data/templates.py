"""Prompt templates, and the tokens of a prompt: template, then the tokenizer's own chat template."""

from __future__ import annotations

import re
from typing import Any

import jinja2

from opd_jax.errors import InputError

TEMPLATES = {
    "plain": "{problem}",
    "boxed": r"{problem} Please reason step by step, and put your final answer within \boxed{}.",
    "dapo": (
        "Solve the following math problem step by step. The last line of your response should be of the form "
        "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{problem}\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    ),
}
"""paper.md, Prompt templates. ``boxed`` has single braces; the paper's published training file holds an escape."""

INSTRUCTIONS = (
    *(template for template in TEMPLATES.values() if template != "{problem}"),
    r"Please reason step by step, and put your final answer within \boxed{}. {problem}",
    r"{problem} Let's think step by step and output the final answer within \boxed{}.",
    '{problem} Let\'s think step by step and output the final answer after "####".',
)
"""What published training files put around their problems: our templates, and those of verl's MATH and GSM8K."""


def render(problem: str, template: str) -> str:
    """Puts the problem into a template: a name of ``TEMPLATES``, or a text that holds ``{problem}``.

    Raises:
        InputError: neither a known name nor a text with {problem}; an unrendered escape ``\\boxed{{}}``.
    """
    text = TEMPLATES.get(template, template)
    if "{problem}" not in text:
        raise InputError(
            f"data.template={template!r}: no such template, and the text does not hold {{problem}}. "
            f"Expected {', '.join(TEMPLATES)}, or a text with {{problem}} where the problem goes."
        )
    if r"\boxed{{}}" in text:
        raise InputError(
            f"data.template={template!r} holds \\boxed{{{{}}}}, an escape that nothing renders: the model would see "
            "double braces. Write \\boxed{} with single braces."
        )
    return text.replace("{problem}", problem)


def strip_instruction(problem: str) -> str:
    r"""The problem without the ``INSTRUCTIONS`` around it, whatever their spacing and with ``\boxed{{}}``, too."""
    for pattern in _INSTRUCTIONS:
        if match := pattern.fullmatch(problem.strip()):
            return match[1]
    return problem


def _pattern(template: str) -> re.Pattern[str]:
    parts = [re.escape(part).replace(r"\{\}", r"\{+\}+") for part in template.split("{problem}")]
    spaced = [re.sub(r"(?:\\ |\\\n)+", lambda _: r"\s+", part) for part in parts]
    return re.compile(r"(.*?)".join(spaced), re.DOTALL)


_INSTRUCTIONS = [_pattern(template) for template in INSTRUCTIONS]


def encode_prompt(tokenizer: Any, problem: str, template: str, chat: bool, chat_arguments: dict[str, Any]) -> list[int]:
    """The token ids that the model is prompted with.

    Args:
        chat: wrap the rendered text as the user's turn of the tokenizer's chat template, with a generation prompt.
            Otherwise the text is encoded as it is, after the beginning-of-sequence id if the tokenizer adds one.
        chat_arguments: variables of the chat template, e.g. ``enable_thinking: false``.

    Raises:
        InputError: bad template; no chat template, or one that fails; no tokens at all.
    """
    text = render(problem, template)
    if chat:
        ids = _encode_chat(tokenizer, text, chat_arguments)
    else:
        ids = tokenizer.encode(text, add_special_tokens=False)
        # Only the first special id: some tokenizers also append an end-of-sequence, which would end the prompt.
        if (first := tokenizer.encode(text)[:1]) == [tokenizer.bos_token_id] and ids[:1] != first:
            ids = first + ids
    if not ids:
        raise InputError(f"data.template={template!r}: the prompt {text!r} has no tokens.")
    return ids


def _encode_chat(tokenizer: Any, text: str, arguments: dict[str, Any]) -> list[int]:
    if not tokenizer.chat_template:
        raise InputError(
            f"{tokenizer.name_or_path or 'the tokenizer'}: has no chat template, but data.chat=true asks for one. "
            "Set data.chat=false to prompt with the plain text, or use a chat model's tokenizer."
        )
    try:
        # return_dict=False: transformers 5 returns a BatchEncoding by default.
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **arguments,
        )
    except (jinja2.TemplateError, TypeError) as e:
        raise InputError(f"the chat template failed with data.chat_arguments={arguments}: {e}") from e
