import pytest

from tests import tiny


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))
