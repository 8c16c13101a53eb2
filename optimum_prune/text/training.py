"""Which text a recipe means to train on: one, or several domains, each with its weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import NoneType

from optimum_prune.errors import RecipeError, shown
from optimum_prune.options import PARTS, build, option, options_of
from optimum_prune.text.text import Text

DOMAINS, DYNAMIC = "domains", "dynamic"
NAMES = ("text", "dataset")
"""What names a text."""
SLACK = 0.01
"""By so much may weights miss to sum to 1."""


@dataclass(frozen=True, kw_only=True)
class DomainText(Text):
    """A domain: a text, and how much of the training is of it."""

    name: str | None = option("What the report calls it; if not given, as its text is called.", None)
    weight: float | None = option(
        "How much of the training is of it; the weights of all sum to 1. If none is given, all are alike.",
        None,
        above=0,
        at_most=1,
    )
    reference: float | None = option(
        "The loss in nats for each token that is to be reached, for `dynamic`; that of the dense model if not given.",
        None,
        above=0,
    )

    @property
    def title(self) -> str:
        """What the report calls it."""
        return self.name or self.describe()


@dataclass(frozen=True, kw_only=True)
class Training(Text):
    """What is trained on: a text, the calibration text if none is named, or domains instead.

    Raises:
        RecipeError: domains and a text, weights of some domains only or that do not sum to 1, or two domains of one name or text.
    """

    dynamic: bool = option(
        "Move the weights of domains to those that are farthest from their reference, as Sheared LLaMA does.", False
    )
    update_every: int = option("Steps between two updates of the weights.", 50, at_least=1)
    domains: tuple[DomainText, ...] = field(default=(), metadata={PARTS: True})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dynamic and len(self.domains) < 2:
            raise RecipeError(
                "The training text is to be loaded dynamically, and has no two domains. Name several under 'domains'."
            )
        if self.domains:
            self._check_domains()
        self._check_samples()

    @property
    def texts(self) -> tuple[DomainText, ...]:
        """The domains; of a text alone, that text."""
        if self.domains:
            return self.domains
        own = {name: getattr(self, name) for name in options_of(Text)}
        return (DomainText(**own),)

    @classmethod
    def from_plain(cls, plain: object) -> Training:
        """What a recipe says under `training`.

        Raises:
            RecipeError: a key or a value that is not known or not right.
        """
        if plain is not None and not isinstance(plain, Mapping):
            return build(cls, plain, "training")  # which says what it should be
        given = dict(plain or {})
        domains = given.pop(DOMAINS, ())
        dynamic = {name: given.pop(name) for name in (DYNAMIC,) if name in given}  # it needs the domains
        if not isinstance(domains, (list, tuple)):
            raise RecipeError(f"The domains of the training text are {shown(domains)}. Write a list of texts.")
        built = tuple(
            build(DomainText, domain, f"domain {number} of the training text")
            for number, domain in enumerate(domains, start=1)
        )
        return replace(build(cls, given, "training"), domains=built, **dynamic)

    @classmethod
    def of(cls, text: Text) -> Training:
        """A text to train on."""
        return cls(**{name: getattr(text, name) for name in options_of(Text)})

    @classmethod
    def with_text(cls, plain: object, given: Mapping[str, object]) -> object:
        """What a recipe says under `training`, with the text or dataset that is given in place of all that it names."""
        if not given or not isinstance(plain, (Mapping, NoneType)):
            return plain
        kept = {key: value for key, value in (plain or {}).items() if key not in (*NAMES, DOMAINS, DYNAMIC)}
        return {**kept, **given}

    @property
    def measures_references(self) -> bool:
        """Whether the dense model tells what loss of each domain is to be reached."""
        return self.dynamic and any(domain.reference is None for domain in self.domains)

    def _check_samples(self) -> None:
        """Refuses a text of which no window is to be trained on."""
        for text in self.texts:
            if text.samples == 0:
                raise RecipeError(f"0 windows of the training text {text.title} are asked for. Ask for at least 1.")

    def _check_domains(self) -> None:
        if self.named:
            raise RecipeError(
                f"The training text names {self.describe()}, and domains besides. Name it as one of the domains."
            )
        for number, domain in enumerate(self.domains, start=1):
            if not domain.named and len(self.domains) > 1:
                called = f"The domain {shown(domain.name)}" if domain.name else f"Domain {number} of the training text"
                raise RecipeError(f"{called} names no text. Give it a 'text' or a 'dataset'.")
        weights = [domain.weight for domain in self.domains if domain.weight is not None]
        if weights and (len(weights) < len(self.domains) or abs(math.fsum(weights) - 1) > SLACK):
            raise RecipeError(
                f"The weights of the domains are {', '.join(str(domain.weight) for domain in self.domains)}, and should sum to 1. Mend them, or "
                f"leave all out for the same everywhere."
            )
        titles = [domain.title for domain in self.domains]
        if len(set(titles)) < len(titles):
            raise RecipeError(f"Two domains are called the same: {', '.join(titles)}. Give each a 'name' of its own.")


def check_apart(training: Training, calibration: Text, evaluation: Text) -> None:
    """Refuses to train on the text that is reported on.

    Args:
        calibration: the text that passes choose by, whose end is reported on if the evaluation names no text.

    Raises:
        RecipeError: one text is both.
    """
    for text in training.texts:
        if not text.named:
            continue
        if not evaluation.named and evaluation.samples != 0 and _holds(text, calibration):
            raise RecipeError(
                f"The training text {text.describe()} holds {calibration.describe()}, whose end is reported on. Name an evaluation text, or what is "
                f"to be trained on alone."
            )
        if text.is_reported_on(evaluation):
            raise RecipeError(
                f"The training text and the evaluation text are both {text.describe()}. What a model is trained on must not be what it is "
                f"reported on: name another text."
            )


def _holds(text: Text, other: Text) -> bool:
    """Whether a text is more than another, and that in it; of one that is the same, the end is left out."""
    return text.overlaps(other) and not text.same_text_as(other)
