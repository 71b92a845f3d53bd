"""Drafters: where the guesses come from."""

from specdec.drafters.combine import first_hit, union
from specdec.drafters.model import draft_model, early_exit
from specdec.drafters.ngram import ngram
from specdec.drafters.none import none
from specdec.drafters.suffix import suffix

__all__ = ["draft_model", "early_exit", "first_hit", "ngram", "none", "suffix", "union"]
