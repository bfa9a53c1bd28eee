"""A question as a chat model is asked it: a message of the user's in the tokenizer's own template, up to where the answer begins.

As in lm-eval, a special token that a message spells is one. Not here: token ids (encoder).
"""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from clbench.types import UserMistake

Message = dict[str, str]
DAY = datetime(2024, 7, 26)
"""What a template is told that asks for the date: a run reads the same prompts on whatever day it goes on."""
FORMS = "dmbByYaAHMS"
"""The parts of a date that a template may ask for, as strftime calls them."""
PROBE = "?"
"""A message that no template changes."""


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserMistake where there is no template, or one that cannot be used."""
    if tokenizer.chat_template is None:
        raise UserMistake(
            "prompt=chat, but the model's tokenizer has no chat template; choose prompt=plain, or put the template into its folder (model.name)"
        )
    try:
        asked(tokenizer, "")
        spacing(tokenizer)
    except (TemplateError, ValueError) as error:  # ValueError: several templates, none of them the default one
        reason = " ".join(str(error).split())
        raise UserMistake(
            f"prompt=chat, but the tokenizer's chat template cannot be used ({reason}); choose prompt=plain"
        ) from error


def own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's template, in which the day is always the same."""
    template = tokenizer.get_chat_template()
    if "strftime_now" not in template:
        return template
    # transformers drops the line's end behind a tag, so the template begins a line, as it does by itself.
    written = "".join(f" | replace('%{form}', '{DAY.strftime(f'%{form}')}')" for form in FORMS)
    return f"{{%- macro strftime_now(form) -%}}{{{{ form{written} }}}}{{%- endmacro %}}\n{template}"


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **settings: Any) -> str:
    """The text that the template makes of messages, each with a `role` and its `content`."""
    template = own_template(tokenizer)
    return str(tokenizer.apply_chat_template(list(messages), chat_template=template, tokenize=False, **settings))


def asked(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """The text in which the model is asked a question."""
    return rendered(tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)


def spacing(tokenizer: PreTrainedTokenizerBase) -> str:
    """The white space that the template puts between a question and its answer."""
    told = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE}]
    question, whole = asked(tokenizer, PROBE), rendered(tokenizer, told)
    between = whole[len(question) :].partition(PROBE)[0] if whole.startswith(question) else ""
    return between if between.isspace() else ""


def after_special(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """What follows the last special token that a text spells: a tokenizer reads it apart from what is before."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.split("|".join(map(re.escape, special)), text)[-1] if special else text
