"""Checks shapes and dtypes of arrays against the package's annotations, at every call in the tests.

jaxtyping's import hook hands the signature of each function to `check`. Only annotations of arrays
are checked: pyright sees to the others, and tests may put simpler objects in their place. NumPy's
arrays may stand for JAX's.
"""

import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

from beartype import beartype
from jaxtyping import AbstractArray


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function with its arrays checked; itself if no annotation has any."""
    hints = {name: _arrays_of(hint) for name, hint in function.__annotations__.items()}
    hints = {name: hint for name, hint in hints.items() if hint is not Any}
    if not hints:
        return function
    function.__annotations__ = hints
    return beartype(function)


def _arrays_of(hint: Any) -> Any:
    """Returns the annotation with any container of arrays allowed; `Any` if it has no arrays."""
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return hint.dtype[Any, hint.dim_str]
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Callable:
        return Any
    arrays = [_arrays_of(each) for each in inner]
    if all(each is Any for each in arrays):
        return Any
    if origin in (typing.Union, types.UnionType):
        kept = [a if a is not Any else each for a, each in zip(arrays, inner, strict=True)]
        return typing.Union[tuple(kept)]  # noqa: UP007
    return origin[
        tuple(each if each is Ellipsis else a for a, each in zip(arrays, inner, strict=True))
    ]
