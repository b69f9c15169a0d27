"""Settings of a job: what a command, a YAML file and --set may say, checked once and frozen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from peftdyno.bench.byte_sizes import parse_size
from peftdyno.engine.errors import UserError, unknown

if TYPE_CHECKING:
    from peftdyno.engine.adapters.method import Method

METHOD_FIELDS = ("learning_rate", "weight_decay", "warmup_ratio", "schedule", "max_grad_norm")
"""Settings of a job that the section of a method may set for that method alone."""
NO_LIMIT = 0
"""What a limit is given as on the command line for: all rows."""


class JobSettings(BaseModel):
    """One method on one task, with one run a seed; the runs train together. Defaults are PEFT-Bench's protocol, but
    for `limit_validation`: validating on a tenth of a large data set would take longer than short training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    method: str = "lora"
    task: str
    seeds: tuple[int, ...] = Field((42,), min_length=1)
    data: Path | None = None
    """Folder of <task>/<split> files; the hub where absent. Generated tasks need neither."""
    tasks_file: Path | None = None
    """A dataset_info file of LLaMA-Factory that words, divides or adds tasks."""
    steps: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    """Passes over the train split; 10 where neither steps nor epochs are given."""
    batch: int = Field(4, ge=1)
    """Sequences of each run in a step."""
    micro_batch: int | None = Field(None, ge=1)
    """Sequences of each run computed at a time; the batch where absent."""
    activations: Literal["keep", "cheap", "recompute"] | None = None
    """What is kept for the backward pass; everything (keep) where absent, unless a memory limit asks for less."""
    memory_limit: int | None = None
    """Bytes that training may take. The policy and the micro-batch, where they are not given, and the number of runs
    that train together are chosen so that the predicted peak fits."""
    learning_rate: float | None = Field(None, gt=0)
    """The method's own where absent."""
    weight_decay: float | None = Field(None, ge=0)
    warmup_ratio: float = Field(0.1, ge=0, le=1)
    schedule: Literal["cosine", "constant"] = "cosine"
    max_grad_norm: float = Field(1.0, gt=0)
    max_length: int = Field(2048, ge=2)
    """Tokens of a sequence; longer ones are cut in the middle of the prompt, never in the answer."""
    share_prefix: Literal["auto", "on", "off"] = "auto"
    graphs: Literal["auto", "on", "off"] = "auto"
    """Whether training steps are recorded and replayed, on a GPU as CUDA graphs, on a CPU as tapes; auto leaves it in
    short trainings, and on a GPU under a memory limit, which does not predict recordings and their padding."""
    limit_train: int | None = Field(None, ge=1)
    limit_validation: int | None = Field(256, ge=1)
    """Random rows of the validation split; null for all."""
    limit_test: int | None = Field(None, ge=1)
    evaluate_every: float = Field(0.05, ge=0, le=1)
    """Validation loss every this share of the steps; 0 never."""
    save_every: float = Field(0.05, gt=0, le=1)
    evaluation_batch: int | None = Field(None, ge=1)
    """Test rows of each run scored at a time; eight times the batch, at most 32, where absent, so that scoring needs
    less memory than training."""
    pack_weights: Literal["auto", "on", "off"] = "off"
    """Whether the weights are kept again in the forms that products read fastest on CPUs that multiply bf16: three
    times in all while training, twice while scoring."""
    evaluate: bool = True
    """Whether the tuned and the untuned model are scored."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    quant: str | None = None
    """How the frozen linear weights are stored: nf4, nf4-double, or in the compute dtype where absent."""
    device: str = "auto"
    kernels: str = "auto"
    threads: int | None = Field(None, ge=1)
    method_settings: dict[str, Any] = Field(default_factory=dict)
    """Fields of the method that differ from its defaults."""

    @field_validator("memory_limit", mode="before")
    @classmethod
    def _size(cls, value: object) -> int | None:
        return None if value is None else parse_size(value)

    @field_validator("share_prefix", "graphs", "pack_weights", mode="before")
    @classmethod
    def _switch(cls, value: object) -> object:
        """YAML reads a bare on or off as true or false."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _check(self) -> JobSettings:
        if self.steps is not None and self.epochs is not None:
            raise UserError("steps and epochs are both given; give one")
        if self.graphs == "on" and self.memory_limit is not None:
            raise UserError(
                "graphs is on under a memory limit, whose prediction does not include recordings; give graphs auto or "
                "no memory_limit"
            )
        if len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise UserError(f"seeds {', '.join(map(str, self.seeds))} must be different numbers from 0 on")
        return self

    def build_method(self) -> Method:
        """The method with its settings; UserError that names a wrong one."""
        from peftdyno.engine.adapters import method_class

        cls = method_class(self.method)
        known = {item.name for item in fields(cls)}
        for name in self.method_settings:
            if name not in known:
                raise unknown(f"{self.method} setting", name, (*known, *METHOD_FIELDS))
        try:
            return TypeAdapter(cls).validate_python(self.method_settings)
        except ValidationError as error:
            raise user_error(error, f"{self.method}.") from error

    def rows_at_a_time(self) -> int:
        """Test rows of each run scored at a time."""
        return self.evaluation_batch or min(32, 8 * self.batch)


def make_settings(values: Mapping[str, Any]) -> JobSettings:
    """Settings from plain values: fields, and a section named after the method.

    UserError for unknown names, with the closest known ones, for sections of other methods, and for wrong values.
    """
    values = dict(values)
    method = values.get("method", JobSettings.model_fields["method"].default)
    sections = {name: values.pop(name) for name in list(values) if isinstance(values[name], Mapping)}
    for name in values:
        if name not in job_fields():
            raise unknown("setting", name, (*job_fields(), str(method)))
    for name in sections:
        if name != method:
            raise unknown("section of settings", name, (str(method),))
    section = dict(sections.get(str(method), {}))
    own = {name: section.pop(name) for name in METHOD_FIELDS if name in section}
    try:
        return JobSettings(**{**values, **own}, method_settings=section)
    except ValidationError as error:
        raise user_error(error) from error


def job_fields() -> tuple[str, ...]:
    """Names that a config may set outside a method's section."""
    return tuple(name for name in JobSettings.model_fields if name != "method_settings")


def gather(
    options: Mapping[str, Any], config: Path | None, sets: Iterable[str], renamed: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Plain values: those of the config file, then the options that were given, then `--set name=value`.

    A name with a dot goes into a section: `lora.rank=8`. `renamed` are other names that a config may use.
    """
    values = {} if config is None else read_config(config)
    for other, name in (renamed or {}).items():
        if other in values:
            values[name] = values.pop(other)
    values.update({name: value for name, value in options.items() if value is not None})
    for text in sets:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UserError(f"--set {text}: give name=value, e.g. --set lora.rank=8")
        _put(values, name.strip(), _value(text, value))
    for name in ("limit_train", "limit_validation", "limit_test"):
        if values.get(name) == NO_LIMIT:
            values[name] = None
    return values


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    section, dot, inner = name.partition(".")
    if not dot:
        values[name] = value
        return
    found = values.setdefault(section, {})
    if not isinstance(found, dict):
        raise UserError(f"--set {name}: '{section}' is a single setting, not a section")
    found[inner] = value


def _value(text: str, value: str) -> Any:
    """The value as YAML reads it, so that numbers, lists and true or false can be given."""
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {text}: the value is not readable") from error


def read_config(path: Path) -> dict[str, Any]:
    """A YAML file of settings; UserError names the file and what is wrong."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"config {path} must hold `name: value` lines")
    return content


def user_error(error: ValidationError, before: str = "") -> UserError:
    """The first complaint of pydantic in one line."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return UserError(message)
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return UserError(f"setting '{before}{name}' is missing")
    return UserError(f"setting '{before}{name}' is {first['input']!r}: {message}")
