"""The hand-written models of the core's tests."""

from tests.core.conftest import describe as describe
from tests.core.conftest import llama_7b as llama_7b
from tests.core.conftest import tiny as tiny
