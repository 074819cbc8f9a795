"""Settings: tables of a file become arguments of a class, checked against that class's own signature."""

import difflib
import inspect
import json
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from fedvision.errors import ExperimentError

Fraction = Annotated[float, Ge(0), Le(1)]
PositiveFraction = Annotated[float, Gt(0), Le(1)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]


def nearest(name: str, known: list[str]) -> str:
    """A hint for a misspelt name: the nearest known one and all of them."""
    folded = {candidate.casefold(): candidate for candidate in known}
    close = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    guess = f"did you mean {folded[close[0]]!r}? " if close else ""
    return f"{guess}known: {', '.join(known) or 'none'}"


def parameters(target: Callable[..., Any], without: frozenset[str] = frozenset()) -> dict[str, inspect.Parameter]:
    """The named parameters of a class or function, with annotations resolved, less those in ``without``."""
    signature = inspect.signature(target)
    hints = _hints(target)
    factories = {f.name: f.default_factory for f in fields(target)} if is_dataclass(target) else {}
    known = {}
    for name, parameter in signature.parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or name in without:
            continue
        make = factories.get(name, MISSING)
        default = parameter.default if make is MISSING else make()
        known[name] = parameter.replace(annotation=hints.get(name, Any), default=default)
    return known


def resolve(target: Callable[..., Any], values: Mapping[str, Any], where: str, without: frozenset[str] = frozenset()) -> dict[str, Any]:
    """``values`` checked against the signature of ``target``, with its defaults filled in.

    Args:
        target: the class or function that the table names.
        values: what the file or the overrides say, in TOML's types.
        where: the table's name, for messages.
        without: parameters that the caller supplies itself.

    Raises:
        ExperimentError: an unknown key, a missing one, or a value of the wrong type or range.
    """
    known = parameters(target, without)
    for key in values:
        if key not in known:
            raise ExperimentError(f"{where}.{key}: {_title(target)} has no such setting; {nearest(key, sorted(known))}")
    settings: dict[str, Any] = {}
    for name, parameter in known.items():
        if name in values:
            settings[name] = check(_completed(values[name], parameter.default), parameter.annotation, f"{where}.{name}")
        elif parameter.default is parameter.empty:
            raise ExperimentError(f"{where}.{name} is missing; {_title(target)} needs it ({describe(parameter.annotation)})")
        else:
            settings[name] = parameter.default
    return settings


def check(value: Any, annotation: Any, where: str) -> Any:
    """``value`` as ``annotation`` demands; never coerced except int to float and list to tuple.

    Raises:
        ExperimentError: with the key, the value and what was expected.
    """
    if annotation is Any or isinstance(annotation, str):
        return value
    try:
        adapter = TypeAdapter(annotation, config=None if _has_own_config(annotation) else ConfigDict(arbitrary_types_allowed=True))
        return adapter.validate_json(json.dumps(value), strict=True)
    except PydanticUserError:
        return value
    except ExperimentError as error:  # of a validator of ours
        raise ExperimentError(f"{where}: {error}") from error.__cause__
    except (ValidationError, TypeError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise ExperimentError(f"{where} = {value!r}: expected {describe(annotation)} ({reason[:1].lower()}{reason[1:]})") from None


def describe(annotation: Any) -> str:
    """An annotation in words: ``number > 0``, ``one of 'exact', 'stale'``, ``list of whole number``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        signs = {Ge: (">=", "ge"), Gt: (">", "gt"), Le: ("<=", "le"), Lt: ("<", "lt")}
        bounds = [f"{signs[type(b)][0]} {getattr(b, signs[type(b)][1])}" for b in arguments[1:] if type(b) in signs]
        return " ".join([describe(arguments[0]), " and ".join(bounds)]).strip()
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(a) for a in arguments if a is not type(None))
    if origin in (list, tuple):
        return f"list of {describe(arguments[0])}" if arguments else "list"
    plain = {int: "whole number", float: "number", str: "text", bool: "true or false", dict: "table", Any: "anything"}
    return plain.get(annotation) or plain.get(origin) or str(getattr(annotation, "__name__", annotation))


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    function = target.__init__ if inspect.isclass(target) else target  # type: ignore[misc]
    try:
        hints = get_type_hints(function, include_extras=True)
        return hints or get_type_hints(target, include_extras=True)
    except (NameError, TypeError):
        return {}


def _completed(value: Any, default: Any) -> Any:
    """A table that names no class of its own refines the default table."""
    if isinstance(value, Mapping) and isinstance(default, Mapping) and "name" not in value:
        return {**default, **value}
    return value


def _has_own_config(annotation: Any) -> bool:
    return hasattr(annotation, "__pydantic_config__") or hasattr(annotation, "__pydantic_validator__")


def _title(target: Callable[..., Any]) -> str:
    return getattr(target, "__name__", str(target))
