"""Progress bars and sentences on stderr, silent where nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from shutil import get_terminal_size
from typing import Any, NoReturn, TypeVar

from tqdm import tqdm

from optimum_prune.errors import printable

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """What is shown on stderr while a run goes on: a bar for whatever takes long, and sentences; or nothing."""

    visible: bool = False
    output: bool = False
    """Whether sentences, and what a pass in another interpreter prints, are shown on stderr."""

    @classmethod
    def for_terminal(cls, quiet: bool = False) -> Progress:
        """Bars if stderr is a terminal, and the output of other interpreters, if nobody asked for silence."""
        return cls(visible=not quiet and sys.stderr.isatty(), output=not quiet)

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """The items, with a bar that counts them."""
        return iter(self._bar(items, description, total))

    def bar(self, description: str, total: int | None, done: int = 0, unit: str = "it") -> tqdm[NoReturn]:
        """A bar that is moved by hand.

        Args:
            total: what it counts to, if that is known.
            done: where it begins.
            unit: what it counts; other than passes through a loop, it is counted in thousands and millions.
        """
        moved: tqdm[NoReturn] = self._bar(None, description, total, initial=done, unit=unit, unit_scale=unit != "it")
        return moved

    def _bar(self, items: Any, description: str, total: int | None, **more: Any) -> Any:
        size = get_terminal_size()  # a terminal that does not know its size counts as one of 80 by 24
        return tqdm(
            items,
            description,
            total,
            leave=False,
            disable=not self.visible,
            ncols=size.columns,
            nrows=size.lines,
            **more,
        )

    def say(self, sentence: str) -> None:
        """Puts a sentence on stderr, if anything is to be shown."""
        if self.output:
            self.warn(sentence)

    def warn(self, sentence: str) -> None:
        """Puts a sentence on stderr, whatever is to be shown; a stderr that takes nothing loses no run."""
        with suppress(OSError, ValueError):
            print(printable(sentence), file=sys.stderr, flush=True)

    @contextmanager
    def libraries(self, *, datasets: bool = False) -> Iterator[None]:
        """Lets transformers and huggingface_hub show their bars only if bars are to be shown, for the time of a `with`.

        Args:
            datasets: those of datasets too, which takes 60 MB if nothing else has imported it.
        """
        if self.visible:
            yield
            return
        import huggingface_hub.utils as hub
        from transformers import modeling_gguf_pytorch_utils
        from transformers.utils import logging as transformers_logging

        with ExitStack() as stack:
            if transformers_logging.is_progress_bar_enabled():
                transformers_logging.disable_progress_bar()
                stack.callback(transformers_logging.enable_progress_bar)
            if datasets:
                from datasets import utils

                if not utils.are_progress_bars_disabled():
                    utils.disable_progress_bars()
                    stack.callback(utils.enable_progress_bars)
            if not hub.are_progress_bars_disabled():
                hub.disable_progress_bars()
                stack.callback(hub.enable_progress_bars)
            # The bar of the .gguf reader has no switch of its own.
            stack.callback(setattr, modeling_gguf_pytorch_utils, "tqdm", modeling_gguf_pytorch_utils.tqdm)
            modeling_gguf_pytorch_utils.tqdm = partial(modeling_gguf_pytorch_utils.tqdm, disable=True)
            yield
