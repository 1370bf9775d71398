"""Our models under transformers' Auto classes: in this process, and in folders that carry our code."""

from collections.abc import Mapping
from pathlib import Path

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

AutoClasses = Mapping[str, type[PreTrainedModel]]
"""Names of Auto classes, as AutoModel, and the class of ours that each stands for."""


def register_auto_classes(config_class: type[PreTrainedConfig], model_classes: AutoClasses) -> None:
    """Make the Auto classes of this process know our classes. Repeating it changes nothing.

    A copy of this code that an exported folder carries registers nothing: transformers finds it by the folder's
    config.json, and would take the first copy that registers for the code of every other folder as well.
    """
    if config_class.__module__.startswith("transformers_modules."):
        return
    transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for name, model_class in model_classes.items():
        getattr(transformers, name).register(config_class, model_class, exist_ok=True)


def save_with_code(model: PreTrainedModel, model_classes: AutoClasses, folder: Path) -> None:
    """save_pretrained, and beside the weights the modules that the model needs.

    Each Auto class of `model_classes` that fits the model's kind of stack then opens the folder with
    trust_remote_code=True, wherever torch and transformers are installed.
    """
    name = auto_class_name(model, model_classes)
    type(model.config).register_for_auto_class()
    type(model).register_for_auto_class(name)
    fitting = {each: model_class for each, model_class in model_classes.items() if model_class.fits(model.config)}
    model.config.auto_map = {each: _reference(model_class) for each, model_class in fitting.items()}
    model.save_pretrained(folder)


def auto_class_name(model: PreTrainedModel, model_classes: AutoClasses) -> str:
    """The name of the Auto class that gives models of this very class."""
    return next(name for name, model_class in model_classes.items() if model_class is type(model))


def _reference(model_class: type) -> str:
    """How config.json names a class: by its module beside it."""
    return f"{model_class.__module__.rpartition('.')[2]}.{model_class.__name__}"
