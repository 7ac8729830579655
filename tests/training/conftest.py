"""Corpora for the training tests."""

import pytest
from training.growth import write_documents
from training.layouts import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Documents by ASCII code."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus_text_document")


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Short documents of such text, each with its end-of-document token."""
    return write_documents(tmp_path_factory.mktemp("documents") / "short_text_document")
