"""Grammars and regular expressions, parsed token by token by llguidance."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass

from llguidance import LLMatcher, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from hasten.guidance.text.constraints.base import BoundConstraint, Constraint, UnsatisfiableError
from hasten.guidance.text.vocabulary import Vocabulary

# Without it the mask at a forced position holds the canonical token alone, while single checks accept every spelling.
# It stands behind the rules, so that line numbers in messages are those of the rules as they were written.
NO_FORCING = '\n%llguidance {"no_forcing": true}\n'


@dataclass(frozen=True)
class Grammar(Constraint):
    """The text belongs to a context-free language.

    Args:
        text: rules in Lark (`start: "a" NUMBER`), with llguidance's extensions, or in EBNF as llama.cpp writes it
            (`root ::= "a" [0-9]+`).

    Raises (from bind):
        ValueError: the grammar has a mistake; the message says at which line and column of `text`.
    """

    text: str

    def bind(self, vocabulary: Vocabulary) -> BoundConstraint:
        if not isinstance(self.text, str):
            raise ValueError(f"a grammar is a string, got {type(self.text).__name__}")
        try:
            lark = any_to_lark(self.text)
        except Exception as error:  # the converter raises bare Exceptions
            raise ValueError(f"grammar: {error}") from error
        header, _, rules = lark.partition("\n") if lark.startswith("%llguidance") else ("", "", lark)
        if header not in ("", "%llguidance {}"):
            raise ValueError(f"grammar: hasten sets the options of llguidance itself, remove the line {header!r}")
        return BoundGrammar(rules + NO_FORCING, vocabulary, "grammar")


@dataclass(frozen=True)
class Regex(Constraint):
    r"""The whole text matches a regular expression of Python's `re`, as `re.fullmatch` decides.

    Look-around, backreferences and `\b` are refused. Where the Unicode classes of `re` and of Rust's regex differ (`\w`
    and "²", `\s` and "\x1c"), only what both accept is generated.

    Raises (from bind):
        ValueError: the pattern has a mistake, or a construct that cannot be enforced; the message says which and where.
    """

    pattern: str

    def bind(self, vocabulary: Vocabulary) -> BoundConstraint:
        if not isinstance(self.pattern, str):
            raise ValueError(f"regex {self.pattern!r}: a pattern is a string, got {type(self.pattern).__name__}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", FutureWarning)  # "[a&&b]" and the like, which Rust reads otherwise
                compiled = re.compile(self.pattern)
        except (re.error, FutureWarning) as error:
            raise ValueError(f"regex {self.pattern!r}: {error}") from error
        lark = regex_to_lark(self.pattern, use_ascii="")
        lark = re.sub(r"\\(.)", lambda escape: r"\z" if escape[1] == "Z" else escape[0], lark)
        grammar = BoundGrammar(f"start: /{lark}/{NO_FORCING}", vocabulary, f"regex {self.pattern!r}")
        return _BoundRegex(grammar, compiled)


class BoundGrammar(BoundConstraint):
    """The state is llguidance's matcher."""

    can_fill_mask = True

    def __init__(self, lark: str, vocabulary: Vocabulary, what: str):
        super().__init__(vocabulary)
        self._what = what
        grammar = LLMatcher.grammar_from_lark(lark)
        is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar, vocabulary.llguidance)
        if messages:
            kind = UnsatisfiableError if is_error and "Unsatisfiable" in messages[0] else ValueError
            raise kind(f"{what}: {'; '.join(messages)}")
        self._start = LLMatcher(vocabulary.llguidance, grammar)
        self._refuse_if_unsatisfiable(what)

    def start(self):
        return self._start.deep_copy()

    def fork(self, state):
        return state.deep_copy()

    def complete(self, state):
        return state.is_accepting()

    def _accepts(self, state, token, text):
        valid = state.validate_tokens([token]) == 1
        self._raise_errors(state)
        return valid

    def _advance(self, state, token, text):
        if state.try_consume_tokens([token]) != 1:
            self._raise_errors(state)
            raise ValueError(f"{self._what}: token {token} ({text!r}) is not valid here, {self.allowed_text(state)} is")
        self._raise_errors(state)
        return state

    def _allow(self, state, mask):
        matcher = state.deep_copy()  # where no token is valid, the matcher that is asked stops for good
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if "NoExtensionBias" in matcher.get_error():
            mask[:] = 0
        else:
            self._raise_errors(matcher)

    def _raise_errors(self, state) -> None:
        """A matcher that met a limit stays broken, and may accept anything afterwards."""
        if state.is_error():
            raise RuntimeError(f"{self._what}: {state.get_error()}")


class _BoundRegex(BoundConstraint):
    """The state is the matcher and the bytes so far: `re` has the last word when the text ends."""

    can_fill_mask = True

    def __init__(self, grammar: BoundGrammar, compiled: re.Pattern):
        super().__init__(grammar.vocabulary)
        self._grammar, self._compiled = grammar, compiled
        self._refuse_if_unsatisfiable(f"regex {compiled.pattern!r}")

    def start(self):
        return self._grammar.start(), b""

    def fork(self, state):
        return self._grammar.fork(state[0]), state[1]

    def complete(self, state):
        return self._grammar.complete(state[0]) and self._compiled.fullmatch(state[1].decode()) is not None

    def _accepts(self, state, token, text):
        return self._grammar._accepts(state[0], token, text)

    def _advance(self, state, token, text):
        return self._grammar._advance(state[0], token, text), state[1] + text

    def _allow(self, state, mask):
        self._grammar._allow(state[0], mask)
