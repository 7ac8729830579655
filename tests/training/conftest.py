"""Corpora for the training tests."""

import pytest
from training.layouts import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Source text of the standard library by ASCII code."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "stdlib_text_document")
