"""What all sections of the settings share."""

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from fdfo_engine.config.secret_keys import SECRET_ADVICE, is_secret_value


def frozen_list(value: object) -> object:
    """YAML has lists, frozen settings have tuples; strict mode would not take one for the other."""
    return tuple(value) if isinstance(value, list) else value


def no_number(value: object) -> object:
    """For literals with true or false among them: 0 == False would pass as one."""
    return str(value) if type(value) is int else value


Auto = Literal["auto"]
Name = Annotated[str, Field(min_length=1)]
NameList = Annotated[tuple[Name, ...], Field(min_length=1), BeforeValidator(frozen_list)]


def refuse(problems: Iterable[tuple[str, str]]) -> None:
    """Hands `(key below the one validated, sentence)` through pydantic, whose own message would be a template."""
    if found := list(problems):
        text = "; ".join(f"{key}: {sentence}" if key else sentence for key, sentence in found)
        raise PydanticCustomError("fdfo", "{text}", {"text": text, "problems": found})


class Section(BaseModel):
    """What all sections share: frozen, strict types, no unknown keys, only finite numbers."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        hide_input_in_errors=True,
    )

    @field_validator("*")
    @classmethod
    def _fits(cls, value: object) -> object:
        refuse(
            [("", "takes a whole number of at most 30 digits")]
            if isinstance(value, int) and abs(value) >= 10**30
            else []
        )
        return value

    @field_validator("*")
    @classmethod
    def _is_no_secret(cls, value: object) -> object:
        texts = value if isinstance(value, tuple) else (value,)
        refuse([("", SECRET_ADVICE)] if any(map(is_secret_value, texts)) else [])
        return value
