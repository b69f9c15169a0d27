"""One renderer for training and evaluation, with the tokens that transformers' chat templates give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from peftdyno.engine.errors import UserError
from peftdyno.engine.tokenizer import Tokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CORPUS = ["Is this review positive or negative?", "a gorgeous , witty film", "positive", "negative"] * 4
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_BOS = (
    "{{ bos_token }}\n{% for message in messages -%}\n"
    "    [{{ message['role'] | upper }}] {{ message['content'] | trim }}\n"
    "    {%- if message['role'] == 'assistant' %} {{ eos_token }}{% endif %}\n"
    "{% endfor %}\n"
    "{%- if messages[0]['content'] == 'fail' %}{{ raise_exception('not this one') }}{% endif %}"
    "{%- if add_generation_prompt %}[ASSISTANT]{{ {'é': 1} | tojson }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "bos": WITH_BOS}


def write(folder: Path, template: str | None, *, in_config: bool = False, **settings: object) -> Path:
    """A byte-level BPE tokenizer trained on a few words, with a beginning-of-text token on plain text."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **settings}
    if template is not None and in_config:
        config["chat_template"] = template
    elif template is not None:
        (folder / "chat_template.jinja").write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("system", [None, "Answer with one word."])
@pytest.mark.parametrize("in_config", [True, False])
@pytest.mark.parametrize("template", TEMPLATES)
def test_prompt_equals_transformers(template: str, in_config: bool, system: str | None, tmp_path: Path) -> None:
    import transformers

    folder = write(tmp_path, TEMPLATES[template], in_config=in_config)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = Tokenizer.load(folder)
    user = "  Is this review positive?\n  a gorgeous film 12 \n"
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": user})
    prompt = tokenizer.chat(user, system)
    assert prompt == reference.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    expected = reference.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert tokenizer.prompt_ids(prompt) == expected
    assert tokenizer.decode(expected, skip_special=False) == reference.decode(expected)
    assert tokenizer.decode(expected) == reference.decode(expected, skip_special_tokens=True)


def test_response_ends_where_the_template_ends_a_turn(tmp_path: Path) -> None:
    chatml = Tokenizer.load(write(tmp_path / "a", CHATML))
    assert chatml.end_of_turn_id == SPECIAL.index("<|im_end|>")
    assert chatml.eos_ids == (SPECIAL.index("<|im_end|>"), SPECIAL.index("</s>"))
    with_bos = Tokenizer.load(write(tmp_path / "b", WITH_BOS))
    assert with_bos.eos_ids == (SPECIAL.index("</s>"),)
    prompt = chatml.chat("Is this positive?")
    prompt_ids, response_ids = chatml.render(prompt, "positive")
    assert prompt_ids == chatml.encode(prompt)
    assert response_ids == [*chatml.encode("positive"), chatml.end_of_turn_id]
    assert chatml.decode(response_ids) == "positive"


def test_prompt_tokens_do_not_depend_on_the_response(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, None))
    together = tokenizer.encode("posi" + "tive")
    prompt_ids, response_ids = tokenizer.render("posi", "tive")
    assert [*prompt_ids, *response_ids] != [1, *together, 2]
    assert tokenizer.decode([*prompt_ids, *response_ids]) == "positive"


def test_plain_prompts_get_what_the_tokenizer_adds(tmp_path: Path) -> None:
    import transformers

    folder = write(tmp_path, None)
    tokenizer = Tokenizer.load(folder)
    prompt = tokenizer.chat("a gorgeous film", "Is this positive?")
    assert prompt == "Is this positive?\na gorgeous film\n"
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.prompt_ids(prompt) == reference(prompt).input_ids
    assert tokenizer.end_of_turn_id == SPECIAL.index("</s>")


def test_doubled_beginning_of_text(tmp_path: Path) -> None:
    plain = Tokenizer.load(write(tmp_path / "plain", None))
    with pytest.raises(UserError, match="two '<s>' tokens"):
        plain.prompt_ids("<s>a film")
    templated = Tokenizer.load(write(tmp_path / "template", "{{ bos_token }}" + WITH_BOS))
    with pytest.raises(UserError, match=r"two '<s>' tokens.*chat template"):
        templated.render(templated.chat("a film"), "positive")


def test_end_tokens_of_the_generation_settings(tmp_path: Path) -> None:
    folder = write(tmp_path, CHATML, eos_token={"content": "</s>", "lstrip": False})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    assert Tokenizer.load(folder).eos_ids == (4, 2, 0)


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "tool", "template": "no"}, {"name": "default", "template": CHATML}]
    tokenizer = Tokenizer.load(write(tmp_path / "a", None, chat_template=named))
    assert tokenizer.template == CHATML
    with pytest.raises(UserError, match=r"tokenizer_config\.json: field 'chat_template' has no 'default'"):
        Tokenizer.load(write(tmp_path / "b", None, chat_template=named[:1]))


def test_no_padding_or_cutting_is_inherited(tmp_path: Path) -> None:
    folder = write(tmp_path, CHATML)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    backend.save(str(folder / "tokenizer.json"))
    assert len(Tokenizer.load(folder).encode("negative " * 20)) >= 20
    assert len(Tokenizer.load(folder).encode("negative")) == 1


def test_templates_cannot_reach_out(tmp_path: Path) -> None:
    hostile = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(UserError, match="the chat template failed"):
        Tokenizer.load(write(tmp_path, hostile))


def test_prompts_do_not_depend_on_the_day(tmp_path: Path) -> None:
    dated = "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}26 Jul 2024{% endif %}" + CHATML
    assert Tokenizer.load(write(tmp_path, dated)).chat("x").startswith("26 Jul 2024")


def test_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    folder = write(tmp_path / "a", CHATML)
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(UserError, match=r"tokenizer\.json: not a readable tokenizer file"):
        Tokenizer.load(folder)
    folder = write(tmp_path / "b", None, eos_token=None)
    with pytest.raises(UserError, match="names no end token"):
        Tokenizer.load(folder)
    tokenizer = Tokenizer.load(write(tmp_path / "c", WITH_BOS))
    with pytest.raises(UserError, match="not this one"):
        tokenizer.chat("fail")
    with pytest.raises(UserError, match="the chat template failed"):
        Tokenizer.load(write(tmp_path / "d", "{% for"))
