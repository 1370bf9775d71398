"""Options that several commands have: numbers in bounds, and the device to work on."""

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch


def bounded(kind: type, holds: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    """A type for argparse: `kind` of the text where that `holds`; what is `wanted` stands in the error."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


count = bounded(int, lambda value: value >= 1, "a whole number from 1 on")
positive = bounded(float, lambda value: 0 < value < math.inf, "a number above 0")


def usable_device(name: str | None) -> torch.device:
    """The device of that name; None: a GPU where there is one. Raises ValueError where torch has none such."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}: use another, as cpu or cuda") from error
    return device
