"""The published PSCP tables of PEFT-Bench (arXiv:2511.21285): reproduced, explained, corrected."""

from .costs import exact_flop, exact_tflop, trainable_parameters
from .render import as_json, text, write_page

__all__ = ["as_json", "exact_flop", "exact_tflop", "text", "trainable_parameters", "write_page"]
