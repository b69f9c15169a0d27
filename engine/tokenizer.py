"""Text to tokens, and the one renderer of prompts that training and evaluation share."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import tokenizers
from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from peftdyno.engine.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""What a model folder may hold for its tokenizer; only the first is required."""
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
PROBE = "PROBEANSWER"


@dataclass(frozen=True)
class Tokenizer:
    """Tokens of one model and its chat template; without a template, prompts are plain text.

    A rendered example is the tokens of the prompt followed by the tokens of the response. The two
    are tokenised apart: so the prompt's tokens are the same whatever the response is, in training
    and when only the prompt is known. Tokenising both as one string could merge characters across
    the boundary.
    """

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str]
    """The named special tokens, e.g. ``bos_token``, as templates see them."""
    template: str | None = None
    declared_eos_ids: tuple[int, ...] = ()
    """End tokens that the model's generation settings name."""
    origin: str = "tokenizer"
    """Where it was read from, for messages."""
    end_of_turn_id: int = field(init=False)
    """The token that ends a response."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "end_of_turn_id", self._find_end_of_turn())

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Reads the tokenizer of a model folder; raises UserError that names the file at fault."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.exists():
            raise UserError(
                f"{folder}: no tokenizer.json; write one with "
                "transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception on unreadable files
            raise UserError(f"{path}: not a readable tokenizer file ({error})") from error
        backend.no_padding()
        backend.no_truncation()
        settings = {
            **_json_object(folder / "special_tokens_map.json"),
            **_json_object(folder / "tokenizer_config.json"),
        }
        generation = _json_object(folder / "generation_config.json")
        return cls(
            backend=backend,
            special_tokens=_special_tokens(settings),
            template=_chat_template(folder, settings),
            declared_eos_ids=_id_tuple(generation.get("eos_token_id")),
            origin=str(folder),
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_id(self) -> int | None:
        """The beginning-of-text token, if there is one."""
        return self._special_id("bos_token")

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end generation: the end of a turn, and every other declared end token."""
        declared = (self.end_of_turn_id, self._special_id("eos_token"), *self.declared_eos_ids)
        return tuple(dict.fromkeys(token for token in declared if token is not None))

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text; special tokens spelled out in it become what they name."""
        return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of token ids."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def chat(self, user: str, system: str | None = None) -> str:
        """Prompt text of one user turn, up to where the model is to answer.

        What the template does by itself is kept (SmolLM2's adds a system turn of its own where none
        is given). Without a template: the system text, if any, and the user text, a line each.
        """
        if self.template is None:
            return "".join(f"{text}\n" for text in (system, user) if text is not None)
        turns = [] if system is None else [{"role": "system", "content": system}]
        return self._apply([*turns, {"role": "user", "content": user}], add_generation_prompt=True)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Tokens of a prompt text as `chat` makes it; raises UserError on a doubled beginning-of-text token.

        A template spells out its special tokens; a plain prompt gets those the tokenizer adds in front.
        """
        front = [] if self.template is not None else self._added_front()
        ids = [*front, *self.encode(prompt)]
        if self.bos_id is not None and ids[:2] == [self.bos_id, self.bos_id]:
            token = self.special_tokens["bos_token"]
            raise UserError(
                f"the prompt begins with two '{token}' tokens; remove the one in the text, "
                f"the {'chat template' if self.template else 'tokenizer'} adds its own"
            )
        return ids

    def response_ids(self, response: str) -> list[int]:
        """Tokens of a response, with the end-of-turn token."""
        return [*self.encode(response), self.end_of_turn_id]

    def render(self, prompt: str, response: str) -> tuple[list[int], list[int]]:
        """Tokens of a prompt text (from `chat`), and of its response with the end-of-turn token."""
        return self.prompt_ids(prompt), self.response_ids(response)

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    def _added_front(self) -> list[int]:
        """The beginning-of-text token where the tokenizer puts it in front of plain text."""
        with_added = self.encode("a", add_special_tokens=True)
        return [with_added[0]] if with_added and with_added[0] == self.bos_id else []

    def _find_end_of_turn(self) -> int:
        """The first special token that the template writes after an answer, else the end token."""
        if self.template is not None:
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
            after = self._apply(turns, add_generation_prompt=False).rpartition(PROBE)[2]
            special = {id for id, token in self.backend.get_added_tokens_decoder().items() if token.special}
            for token in self.encode(after):
                if token in special:
                    return token
        end = self._special_id("eos_token")
        if end is None:
            raise UserError(f"{self.origin}: the tokenizer names no end token (eos_token) in its vocabulary")
        return end

    def _apply(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        assert self.template is not None
        try:
            return _compiled(self.template).render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self.special_tokens
            )
        except Exception as error:  # a template is a program, and may fail in any way
            raise UserError(f"{self.origin}: the chat template failed ({error})") from error


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    """A template ready to render, kept because every example of a data set needs it."""
    return _environment().from_string(template)


def _environment() -> ImmutableSandboxedEnvironment:
    """A sandbox with the settings and helpers that chat templates are written for.

    `strftime_now` is left out on purpose: templates that ask for it (Llama 3.1 and later) then use
    their fixed date, so prompts do not depend on the day.
    """
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _raise_template_error
    return environment


def _raise_template_error(message: str) -> NoReturn:
    raise TemplateError(message)


def _json_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Named special tokens, which a config gives as text or as a table with `content`."""
    found = {}
    for name in SPECIAL_NAMES:
        value = settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[name] = value
    return found


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The template in its own file, or in the config: one text, or named ones of which `default` counts."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found}
        if "default" not in named:
            raise UserError(f"{folder / 'tokenizer_config.json'}: field 'chat_template' has no 'default'")
        found = named["default"]
    if found is not None and not isinstance(found, str):
        raise UserError(f"{folder / 'tokenizer_config.json'}: field 'chat_template' is not text")
    return found


def _id_tuple(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(token for token in values if isinstance(token, int))
